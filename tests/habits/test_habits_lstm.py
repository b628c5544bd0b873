"""What people do with LSTMs: initialization by class, pickling, compiling."""

import copy
import pickle

import pytest
import torch

import advdl_ops
from advdl_ops import nn


class Tagger(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lstm, self.head = kind(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def models():
    return advdl_ops.optimize(Tagger(torch.nn.LSTM)), Tagger(nn.LSTM)


@pytest.mark.parametrize("number", [0, 1])
def test_is_an_instance_of_torchs(number):
    model = models()[number]
    assert isinstance(model.lstm, torch.nn.LSTM) and isinstance(model.lstm, nn.LSTM)
    assert not isinstance(model.lstm, torch.nn.GRU)
    reached = []

    def init(module):
        if isinstance(module, torch.nn.LSTM):
            reached.append(module)
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    torch.nn.init.ones_(parameter)

    model.apply(init)
    assert reached == [model.lstm] and (model.lstm.bias_ih_l0 == 1).all()


@pytest.mark.parametrize("number", [0, 1])
def test_copies_and_pickles(number):
    model, x = models()[number], torch.randn(5, 2, 4)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(again.lstm) is nn.LSTM
        assert torch.equal(again(x), model(x))
    assert "LSTM(4, 6)" in repr(model)


@pytest.mark.parametrize("number", [0, 1])
def test_compiles(number):
    torch._dynamo.reset()
    model, x = models()[number], torch.randn(5, 2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_restored():
    model = advdl_ops.restore(models()[0])
    assert type(model.lstm) is torch.nn.LSTM
    assert model(torch.randn(5, 2, 4)).shape == (5, 2, 3)
