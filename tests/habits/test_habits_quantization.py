"""``torch.ao.quantization`` and ``torch.jit.script`` on layers of this package and on optimized models."""

import copy
import warnings

import pytest
import torch
from support.layers import ONE_OF_EACH
from torch.ao import quantization

import advdl_ops
from advdl_ops import nn


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.relu = (
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        )  # fmt: skip
        self.conv2, self.relu2 = torch.nn.Conv2d(8, 8, 1), torch.nn.ReLU()
        self.norm = torch.nn.GroupNorm(2, 8)

    def forward(self, x):
        x = self.relu(self.bn(self.conv(self.quant(x))))
        return self.dequant(self.norm(self.relu2(self.conv2(x))))


def ours():
    net = Net()
    net.conv, net.bn, net.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNormAct2d(8), nn.Conv2d(8, 8, 1)
    net.norm = nn.GroupNorm(2, 8)
    return net


@pytest.fixture(params=["optimized", "layers"])
def pair(request):
    torch.manual_seed(0)
    stock = Net()
    made = advdl_ops.optimize(copy.deepcopy(stock)) if request.param == "optimized" else ours()
    made.load_state_dict(stock.state_dict())
    return stock.eval(), made.eval()


GROUPS = [["conv", "bn", "relu"], ["conv2", "relu2"]]


def test_fuse_modules(pair):
    x = torch.randn(2, 3, 9, 9)
    stock, made = (quantization.fuse_modules(model, GROUPS) for model in pair)
    assert type(made.conv) is type(stock.conv) and type(made.bn) is torch.nn.Identity
    with torch.no_grad():
        torch.testing.assert_close(made(x), stock(x))


def test_training_fusion(pair):
    for model in pair:
        model.train()
    stock, made = (quantization.fuse_modules_qat(model, GROUPS[:1]) for model in pair)
    assert type(made.conv) is type(stock.conv)


@pytest.mark.filterwarnings("ignore")
def test_static_quantization(pair):
    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantized kernels")
    outs, kinds = [], []
    x = torch.randn(2, 3, 9, 9)
    for model in pair:
        model.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(quantization.fuse_modules(model, GROUPS))
        prepared(x)
        converted = quantization.convert(prepared)
        kinds.append([type(m) for m in converted.modules() if type(m) is not type(model)][1:])
        outs.append(converted(x))
    assert kinds[0] == kinds[1]
    torch.testing.assert_close(outs[1], outs[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_activation_would_be_lost():
    model = torch.nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNormAct2d(4, act="relu")).eval()
    with pytest.raises(RuntimeError, match="BatchNormAct2d has an activation of its own"):
        quantization.fuse_modules(model, [["0", "1"]])
    model.qconfig = quantization.default_qconfig
    with pytest.raises(RuntimeError, match=r"has an activation of its own.* qconfig to None"):
        quantization.prepare(model)
    model[1].qconfig = None
    prepared = quantization.prepare(model)
    assert type(prepared[0]) is torch.nn.Conv2d and type(prepared[1]) is nn.BatchNormAct2d


@pytest.mark.parametrize("layer", ONE_OF_EACH, ids=lambda layer: type(layer).__name__)
def test_script_is_refused_by_one_sentence(layer):
    model = torch.nn.Sequential(torch.nn.ReLU(), layer)
    before = list(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script .*restore.*torch\.export"):
            torch.jit.script(model)
    assert all(a is b for a, b in zip(before, model, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_of_a_restored_model():
    model = advdl_ops.optimize(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()))
    x = torch.randn(1, 3, 5, 5)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(advdl_ops.restore(model))(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_graph_mode_is_refused_by_one_sentence(pair):
    from torch.ao.quantization import quantize_fx

    mapping = quantization.get_default_qconfig_mapping("x86")
    with pytest.raises(RuntimeError, match=r"FX graph mode .*restore\(model\)"):
        quantize_fx.prepare_fx(pair[1], mapping, (torch.randn(1, 3, 9, 9),))


def test_recurrent_dropout_would_be_lost():
    model = torch.nn.Sequential(nn.LSTM(4, 8, recurrent_dropout=0.5))
    with pytest.raises(RuntimeError, match="recurrent_dropout"):
        model[0].qconfig = quantization.default_qconfig
    model.eval()[0].qconfig = quantization.default_qconfig
    assert type(model[0]) is torch.nn.LSTM
