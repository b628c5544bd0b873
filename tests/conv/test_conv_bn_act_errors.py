"""conv_bn_act: bad input is refused as torch refuses it, on every path, and nothing is changed."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import advdl_ops
from advdl_ops.functional import conv_bn_act
from advdl_ops.nn import ConvBNAct

c6 = torch.ones(6)
X = (2, 4, 6, 6)


def arguments(**changed):
    found = {
        "input": torch.randn(X),
        "weight": torch.randn(6, 4, 3, 3),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
        "bn_weight": torch.ones(6),
        "bn_bias": torch.zeros(6),
        "bias": torch.zeros(6),
    }
    return found | changed


CASES = {
    "rank 2": {"input": torch.randn(6, 6)},
    "rank 5": {"input": torch.randn(2, 4, 3, 6, 6)},
    "channels of x": {"input": torch.randn(2, 5, 6, 6)},
    "too small": {"input": torch.randn(2, 4, 2, 6)},
    "x of fp64": {"input": torch.randn(X).double()},
    "x of integers": {"input": torch.ones(X, dtype=torch.int64)},
    "weight of bf16": {"weight": torch.randn(6, 4, 3, 3).bfloat16()},
    "channels of weight": {"weight": torch.randn(7, 4, 3, 3), "bias": None},
    "length of bias": {"bias": torch.zeros(5)},
    "groups": {"groups": 3},
    "stride 0": {"stride": 0},
    "padding": {"padding": "full"},
    "negative padding": {"padding": -1},
    "channels of running_mean": {"running_mean": torch.zeros(5)},
    "channels of running_var": {"running_var": torch.ones(1)},
    "channels of bn_weight": {"bn_weight": torch.ones(7)},
    "channels of bn_bias": {"bn_bias": torch.ones(1)},
    "statistics of fp64": {"running_mean": c6.double() * 0, "running_var": c6.double()},
    "norm of bf16": {"bn_weight": c6.bfloat16(), "bn_bias": c6.bfloat16()},
    "negative eps": {"eps": -1.0},
    "no running_mean": {"running_mean": None, "training": False},
    "no running statistics": {"running_mean": None, "running_var": None, "training": False},
    "one value per channel": {"input": torch.randn(1, 4, 3, 3), "training": True},
}
OWN_CASES = {
    "order": ({"order": "bn-conv-act"}, ValueError, "order"),
    "act": ({"act": "mish"}, ValueError, "act"),
    "act module": ({"act": torch.nn.Softplus()}, TypeError, "act"),
    "residual of another shape": ({"residual": torch.randn(2, 6, 4, 3)}, ValueError, "residual"),
    "residual to broadcast": ({"residual": torch.randn(6, 1, 1)}, ValueError, "residual"),
    "residual of integers": (
        {"residual": torch.ones(2, 6, 4, 4, dtype=torch.int32)},
        RuntimeError,
        "residual",
    ),
    "meta residual": (
        {"residual": torch.randn(2, 6, 4, 4, device="meta")},
        RuntimeError,
        "residual",
    ),
}


@pytest.fixture(params=list(itertools.product(["fused", "reference"], [True, False])), ids=str)
def _path(request):
    """Fused or reference; with gradients off (folded in eval) or on."""
    backend, grad = request.param
    with advdl_ops.use_backend(backend), torch.set_grad_enabled(grad):
        yield


def by_torch(given):
    g = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    conv = {k: g.pop(k) for k in ("stride", "padding", "dilation", "groups") if k in g}
    y = F.conv2d(g.pop("input"), g.pop("weight"), g.pop("bias"), **conv)
    g["weight"], g["bias"] = g.pop("bn_weight"), g.pop("bn_bias")
    return F.batch_norm(y, **g)


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_as_torch_refuses(name, training):
    given = arguments(**({"training": training} | CASES[name]))
    kept = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    with pytest.raises(Exception) as expected:  # noqa: PT011
        by_torch(given)
    with pytest.raises(Exception) as found:  # noqa: PT011
        conv_bn_act(**given)
    # Integers are a NotImplementedError: one kind of torch's RuntimeError.
    assert issubclass(found.type, expected.type), repr(found.value)
    for key in ("running_mean", "running_var", "input", "weight"):
        if kept[key] is not None:
            assert torch.equal(kept[key], given[key])


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OWN_CASES)
def test_own_arguments(name, training):
    changed, expected, argument = OWN_CASES[name]
    given = arguments(training=training, **changed)
    kept = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    with pytest.raises(expected) as found:
        conv_bn_act(**given)
    assert found.type is expected
    assert re.match(
        rf"(conv_bn_act|batch_norm_act|conv2d): {argument} \(.+\) must ", str(found.value), re.S
    ), str(found.value)
    for key in ("running_mean", "running_var"):
        assert torch.equal(kept[key], given[key])


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_module_stays_as_it_was(mode, grad):
    layer = ConvBNAct(4, 6, 3, act="relu")
    layer(torch.randn(X))
    layer.train(mode)
    with torch.set_grad_enabled(grad):
        layer(torch.randn(X))  # the cache is filled where there is one
        kept = copy.deepcopy(layer.state_dict())
        for x, residual in [
            (torch.randn(2, 3, 6, 6), None),
            (torch.randn(X).double(), None),
            (torch.ones(X, dtype=torch.int64), None),
            (torch.randn(4, 6), None),
            (torch.randn(X), torch.randn(2, 6, 5, 6)),
            (torch.randn(X), torch.randn(2, 1, 6, 6)),
        ]:
            with pytest.raises((RuntimeError, ValueError)):
                layer(x, residual)
            for key, t in kept.items():
                assert torch.equal(layer.state_dict()[key], t), key


def test_constructor_refuses():
    with pytest.raises(
        ValueError, match=r"ConvBNAct: order \('act-bn'\) must be one of conv-bn-act"
    ):
        ConvBNAct(4, 6, 3, order="act-bn")
    with pytest.raises(ValueError, match=r"ConvBNAct: act \('rellu'\) must be"):
        ConvBNAct(4, 6, 3, act="rellu")
    with pytest.raises(ValueError, match="in_channels must be divisible by groups"):
        ConvBNAct(4, 6, 3, groups=3)
