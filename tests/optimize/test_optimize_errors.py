"""optimize() and restore(): what they refuse."""

import copy

import pytest
import torch
from support.optimize import Block
from torch import nn as stock

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")


def test_errors():
    block = Block(stock.BatchNorm2d, stock.ReLU())
    with pytest.raises(TypeError, match=r"optimize: model \(int\) must be a torch\.nn\.Module"):
        advdl_ops.optimize(3)
    in_place = copy.deepcopy(block)
    in_place.compile()
    for compiled in (torch.compile(block), in_place):
        with pytest.raises(TypeError, match="must be optimized before it is compiled, or with inp"):
            advdl_ops.optimize(compiled)
    with pytest.raises(TypeError, match=r"restore: model \(int\) must be a torch\.nn\.Module"):
        advdl_ops.restore(3)
    with pytest.raises(ValueError, match=r"optimize: model \(0\.conv1\.weight\) must have data"):
        advdl_ops.optimize(stock.Sequential(copy.deepcopy(block).to("meta")))
    with pytest.raises(ValueError, match="must not be optimized already"):
        advdl_ops.optimize(advdl_ops.optimize(block))
    assert type(block.conv1) is stock.Conv2d


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_models_are_refused():
    scripted = torch.jit.script(stock.Sequential(stock.Conv2d(3, 4, 3)))
    with pytest.raises(TypeError, match="must not be scripted or traced"):
        advdl_ops.optimize(stock.Sequential(scripted))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantized_models_are_refused():
    model = stock.Sequential(stock.Conv2d(3, 4, 3), stock.LSTM(3, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {stock.LSTM})
    with pytest.raises(ValueError, match=r"optimize: model \(1\) must not be quantized"):
        advdl_ops.optimize(quantized, inplace=True)
    assert type(quantized[0]) is stock.Conv2d
