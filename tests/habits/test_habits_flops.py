"""``torch.utils.flop_counter`` counts as in stock, and the profiler shows names and shapes."""

import copy
import subprocess
import sys

import pytest
import torch
from support.torchvision_stub import torchvision_models
from torch import nn as stock
from torch.utils.flop_counter import FlopCounterMode

import advdl_ops
from advdl_ops import models, nn

stocks = torchvision_models()


def counted(model, *inputs, gradients):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
        out = model(*inputs)
        if gradients:
            out = out[0] if isinstance(out, tuple) else out
            out.sum().backward()
    return counter.get_total_flops()


def zoo(name):
    return lambda: (
        getattr(stocks, name)(num_classes=5), models.create_model(name, num_classes=5)
    )  # fmt: skip


def layer(kind, *args, **options):
    return lambda: (getattr(stock, kind)(*args, **options), getattr(nn, kind)(*args, **options))


def optimized(make):
    model = make()
    return model, advdl_ops.optimize(copy.deepcopy(model))


PAIRS = {
    "optimized resnet18": (
        lambda: optimized(lambda: stocks.resnet18(num_classes=5)),
        (2, 3, 64, 64),
    ),
    "optimized mobilenet_v2": (
        lambda: optimized(lambda: stocks.mobilenet_v2(num_classes=5)),
        (2, 3, 64, 64),
    ),
    "zoo resnet50": (zoo("resnet50"), (2, 3, 64, 64)),
    "convolution": (layer("Conv2d", 8, 16, 3, 1, 1), (2, 8, 12, 12)),
    "dilated": (layer("Conv2d", 32, 32, 3, 1, 2, 2), (2, 32, 12, 12)),
    "strided": (layer("Conv2d", 8, 16, 3, 2, 1), (2, 8, 13, 12)),
    "groups": (layer("Conv2d", 8, 16, 3, 1, 1, groups=2), (2, 8, 12, 12)),
    "depthwise": (layer("Conv2d", 8, 8, 3, 1, 1, groups=8), (2, 8, 12, 12)),
    "transposed": (layer("ConvTranspose2d", 8, 4, 2, 2), (2, 8, 12, 12)),
    "transposed, stride 1": (layer("ConvTranspose2d", 16, 16, 3), (2, 16, 12, 12)),
    "norm": (layer("GroupNorm", 2, 8), (2, 8, 12, 12)),
    "LSTM": (layer("LSTM", 5, 7, 2), (4, 3, 5)),
    "LSTM, both directions": (layer("LSTM", 5, 7, bidirectional=True), (4, 3, 5)),
    "LSTM, projection": (layer("LSTM", 5, 7, proj_size=3), (4, 3, 5)),
    "LSTM cell": (layer("LSTMCell", 5, 7), (3, 5)),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_counts_are_those_of_stock(name, gradients):
    make, shape = PAIRS[name]
    original, ours = make()
    # In fp32 stock's LSTM is one operator of oneDNN, which torch does not count.
    original, ours, x = original.double(), ours.double(), torch.randn(shape, dtype=torch.float64)
    expected = counted(original, x, gradients=gradients)
    assert counted(ours, x, gradients=gradients) == expected
    assert expected > 0 or name == "norm"


def test_every_convolution_and_recurrent_operator_has_a_formula():
    from torch.utils.flop_counter import flop_registry

    names = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("advdl_ops::")
    }
    counted_names = {str(key).removeprefix("advdl_ops.") for key in flop_registry}
    silent = (
        "batch_norm",
        "group_norm",
        "layer_norm",
        "convert_layout",
        "winograd_pack",
        "checksum",
    )
    missing = {n for n in names if n not in counted_names and not n.startswith(silent)}
    assert not missing


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "advdl_ops"])
def test_whichever_is_imported_first(first):
    other = {"advdl_ops": "torch.utils.flop_counter"}.get(first, "advdl_ops")
    code = (
        f"import torch, {first}, {other}; from torch.utils.flop_counter import flop_registry as r; "
    )
    code += "assert torch.ops.advdl_ops.conv2d in r; import inspect; "
    code += "assert 'class FlopCounterMode' in inspect.getsource(torch.utils.flop_counter)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_profiler_shows_names_and_shapes():
    model = models.resnet18(num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profiler:
        model(x)
        nn.Conv2d(32, 32, 3, padding=1)(torch.randn(4, 32, 28, 28))
    events = {
        e.key: e for e in profiler.key_averages(group_by_input_shape=True) if "advdl_ops" in e.key
    }
    assert events and all(any(e.input_shapes) for e in events.values()), list(events)
