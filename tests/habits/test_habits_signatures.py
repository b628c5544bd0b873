"""Every class and forward takes what torch's takes, by the same names, in the installed version of torch."""

import inspect

import pytest
import torch

from advdl_ops import functional, nn

CLASSES = {
    nn.Conv2d: torch.nn.Conv2d,
    nn.ConvTranspose2d: torch.nn.ConvTranspose2d,
    nn.BatchNormAct2d: torch.nn.BatchNorm2d,
    nn.GroupNorm: torch.nn.GroupNorm,
    nn.LayerNorm2d: torch.nn.LayerNorm,
    nn.InstanceNorm1d: torch.nn.InstanceNorm1d,
    nn.InstanceNorm2d: torch.nn.InstanceNorm2d,
    nn.InstanceNorm3d: torch.nn.InstanceNorm3d,
    nn.LSTMCell: torch.nn.LSTMCell,
    nn.LSTM: torch.nn.LSTM,
}
# torch.nn.LSTM takes *args; these are the parameters of its overload, and of the class above it.
LSTM = [
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
]


@pytest.mark.parametrize("ours", CLASSES, ids=lambda kind: kind.__name__)
def test_constructors(ours):
    own = inspect.signature(ours).parameters
    stock = inspect.signature(CLASSES[ours]).parameters
    if ours is nn.LSTM:
        assert list(own)[: len(LSTM)] == LSTM
        rnn = inspect.signature(torch.nn.RNNBase).parameters
        assert all(own[name].default == rnn[name].default for name in LSTM)
        return
    for name, parameter in stock.items():
        assert name in own, name
        assert own[name].default == parameter.default, name
    by_position = [n for n, p in stock.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(own)[: len(by_position)] == by_position


@pytest.mark.parametrize("ours", CLASSES, ids=lambda kind: kind.__name__)
def test_forwards(ours):
    own = list(inspect.signature(ours.forward).parameters)
    stock = list(inspect.signature(CLASSES[ours].forward).parameters)
    assert own[: len(stock)] == stock


# torch's own function for each, or the operator below it; the order of the arguments is that of torch.
FUNCTIONS = {
    "conv2d": torch.ops.aten.conv2d.default,
    "conv_transpose2d": torch.ops.aten.conv_transpose2d.input,
    "batch_norm_act": torch.nn.functional.batch_norm,
    "group_norm": torch.nn.functional.group_norm,
    "instance_norm": torch.nn.functional.instance_norm,
    "lstm_cell": torch.ops.aten.lstm_cell.default,
    "lstm": torch.ops.aten.lstm.input,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    own = list(inspect.signature(getattr(functional, name)).parameters)
    stock = FUNCTIONS[name]
    if isinstance(stock, torch._ops.OpOverload):
        names = [argument.name for argument in stock._schema.arguments]
    else:
        names = list(inspect.signature(stock).parameters)
    assert own[: len(names)] == names
