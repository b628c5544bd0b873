"""Bad input: torch's exception types, one form of message, and nothing changed."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.checks import (
    check_refused_call_keeps_nothing_alive,
    check_refused_module_stays,
    error_of_type,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from advdl_ops.functional import batch_norm_act
from advdl_ops.nn import BatchNormAct2d

c3 = torch.ones(3)
X = (4, 3, 5, 5)


def arguments(**changed):
    found = {
        "input": torch.randn(X),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
    }
    return found | changed


# name -> (what is wrong, the argument that the message must name); torch is asked for its own exception.
CASES = {
    "rank 1": ({"input": torch.randn(3)}, "x"),
    "rank 0": ({"input": torch.tensor(1.0)}, "x"),
    "channels of x": ({"input": torch.randn(4, 5, 2, 2)}, "running_mean"),
    "channels of running_mean": ({"running_mean": torch.zeros(4)}, "running_mean"),
    "channels of running_var": ({"running_var": torch.ones(2)}, "running_var"),
    "channels of weight": ({"weight": torch.ones(4)}, "weight"),
    "channels of bias": ({"bias": torch.ones(1)}, "bias"),
    "x of integers": ({"input": torch.ones(X, dtype=torch.int64)}, "x"),
    "x of int8": ({"input": torch.ones(X, dtype=torch.int8)}, "x"),
    "x of booleans": ({"input": torch.ones(X, dtype=torch.bool)}, "x"),
    "x of complex numbers": ({"input": torch.ones(X, dtype=torch.complex64)}, "x"),
    "running_mean of fp64": (
        {"running_mean": c3.double() * 0, "running_var": c3.double()},
        "running_mean",
    ),
    "running statistics of bf16 beside fp32": (
        {"running_mean": c3.bfloat16() * 0, "running_var": c3.bfloat16()},
        "running_mean",
    ),
    "weight of fp64": ({"weight": c3.double(), "bias": c3.double()}, "weight"),
    "weight of bf16 beside fp32": ({"weight": c3.bfloat16(), "bias": c3.bfloat16()}, "weight"),
    "weight of fp32 beside fp64": ({"input": torch.randn(X).double()}, "running_mean"),
    "one value per channel": ({"input": torch.randn(1, 3, 1, 1)}, "x"),
    "one value per channel, 2-D": ({"input": torch.randn(1, 3)}, "x"),
    "negative eps": ({"eps": -1e-5}, "eps"),
    "zero eps in training": ({"eps": 0.0}, "eps"),
    "negative eps in eval": ({"eps": -1e-5, "training": False}, "eps"),
    "no running_mean in eval": ({"running_mean": None, "training": False}, "running_mean"),
    "no running_var in eval": ({"running_var": None, "training": False}, "running_var"),
    "neither in eval": (
        {"running_mean": None, "running_var": None, "training": False},
        "running_mean",
    ),
    "running_mean alone": ({"running_var": None}, "running_var"),
    "running_var alone": ({"running_mean": None}, "running_mean"),
    "meta statistics": (
        {"running_mean": c3.to("meta"), "running_var": c3.to("meta"), "training": False},
        "running_mean",
    ),
    "meta weight": ({"weight": c3.to("meta"), "bias": c3.to("meta")}, "weight"),
    "meta x": ({"input": torch.randn(X, device="meta")}, "running_mean"),
}
# What torch has no argument for.
OWN_CASES = {
    "rank 6": ({"input": torch.randn(2, 3, 1, 1, 1, 2)}, "x", ValueError),
    "weight of rank 2": ({"weight": torch.ones(3, 1)}, "weight", RuntimeError),
    "unknown act": ({"act": "rellu"}, "act", ValueError),
    "act of another module": ({"act": torch.nn.Softmax()}, "act", TypeError),
    "act of another type": ({"act": torch.relu}, "act", TypeError),
    "act of a subclass": ({"act": type("MyReLU", (torch.nn.ReLU,), {})()}, "act", TypeError),
    "residual of another shape": ({"residual": torch.randn(4, 3, 5, 4)}, "residual", ValueError),
    "residual to broadcast": ({"residual": torch.randn(1, 3, 1, 1)}, "residual", ValueError),
    "residual of integers": (
        {"residual": torch.ones(X, dtype=torch.int32)},
        "residual",
        RuntimeError,
    ),
    "meta residual": ({"residual": torch.randn(X, device="meta")}, "residual", RuntimeError),
}


def assert_refused(call, expected_type, argument):
    """Exactly torch's type, or its nearest public base; ``function: argument (value) must ...``."""
    text = error_of_type(call, expected_type)
    assert re.match(
        rf"(batch_norm_act|BatchNormAct2d): {argument}( \(.*\))? must (?!$)",
        text,
        re.S,
    ), text
    if " and " not in argument:
        assert re.search(rf"{argument} \(.+\) must", text, re.S), text


def assert_untouched(kept, given):
    for name, t in kept.items():
        if isinstance(t, torch.Tensor) and not t.is_meta:
            assert torch.equal(t, given[name]), name
            assert t.dtype == given[name].dtype


@pytest.mark.parametrize("name", CASES)
def test_as_torch_refuses(backend, name):
    changed, argument = CASES[name]
    given = arguments(**changed)
    kept = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    stock = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    with pytest.raises(Exception) as by_torch:  # noqa: PT011
        F.batch_norm(stock.pop("input"), **stock)
    # Wrong rank: torch reads channels from whatever is there; the module's own check raises a ValueError.
    expected = ValueError if name.startswith("rank") else by_torch.type
    assert_refused(lambda: batch_norm_act(**given), expected, argument)
    assert_untouched(kept, given)


@pytest.mark.parametrize("name", OWN_CASES)
def test_own_arguments(backend, name):
    changed, argument, expected = OWN_CASES[name]
    given = arguments(**changed)
    kept = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    assert_refused(lambda: batch_norm_act(**given), expected, argument)
    assert_untouched(kept, given)


def fake(case):
    """The case on meta tensors, where the operator's fake function serves."""
    given = arguments(**case)
    return {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in given.items()}


@pytest.mark.parametrize("name", [n for n in CASES if "meta" not in n])
def test_as_of_real_tensors_on_meta(name):
    changed, argument = CASES[name]
    with pytest.raises(Exception) as real:  # noqa: PT011
        batch_norm_act(**arguments(**changed))
    assert_refused(lambda: batch_norm_act(**fake(changed)), real.type, argument)


@pytest.mark.parametrize("name", [n for n in CASES if "meta" not in n])
def test_as_of_real_tensors_on_fake_ones(name):
    changed, argument = CASES[name]
    with pytest.raises(Exception) as real:  # noqa: PT011
        batch_norm_act(**arguments(**changed))
    with FakeTensorMode() as mode:
        given = {
            n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t
            for n, t in arguments(**changed).items()
        }
        assert_refused(lambda: batch_norm_act(**given), real.type, argument)


def test_a_refused_call_keeps_nothing_alive():
    def call(**changed):
        batch_norm_act(**arguments(**changed))

    # Refused by the operator; by the operator for what Python has no name for.
    check_refused_call_keeps_nothing_alive(call, X, {"weight": torch.ones(4)}, {"momentum": "a"})


@pytest.mark.parametrize("grad", [True, False])
def test_buffers_that_cannot_be_written(grad):
    expanded = arguments(running_var=torch.ones(1).expand(3))
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="must not be expanded"):
        batch_norm_act(**expanded)
    assert not expanded["running_mean"].any()
    batch_norm_act(**expanded | {"training": False})  # read only
    given = arguments(running_mean=torch.zeros(3, requires_grad=True))
    given["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="running_mean must not require a gradient"):
        batch_norm_act(**given)
    assert not given["running_mean"].any()


MODULE_CASES = {
    "rank 3": (torch.randn(3, 5, 5), None),
    "channels": (torch.randn(4, 2, 5, 5), None),
    "integers": (torch.ones(X, dtype=torch.int64), None),
    "fp64": (torch.randn(X).double(), None),
    "one value per channel": (torch.randn(1, 3, 1, 1), None),
    "residual": (torch.randn(X), torch.randn(4, 3, 5, 1)),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", MODULE_CASES)
def test_module_stays_as_it_was(backend, name, momentum):
    x, residual = MODULE_CASES[name]
    module, stock = BatchNormAct2d(3, momentum=momentum), torch.nn.BatchNorm2d(3)
    module(torch.randn(X))
    expected = None if residual is None else ValueError
    check_refused_module_stays(module, (x, residual), expected, stock)


def test_module_refuses_an_unknown_activation():
    assert_refused(lambda: BatchNormAct2d(3, act="swish"), ValueError, "act")
    assert_refused(lambda: BatchNormAct2d(3, act=torch.nn.Softmax()), TypeError, "act")


def test_the_message_of_the_issue():
    with pytest.raises(ValueError, match=r"batch_norm_act: eps \(-1.0\) must not be negative"):
        batch_norm_act(**arguments(eps=-1.0, training=False))
    with pytest.raises(ValueError, match=r"act \('swish'\) must be None, one of relu, "):
        batch_norm_act(**arguments(act="swish"))


@pytest.mark.gpu
def test_two_devices():
    for name in ("running_mean", "running_var", "weight", "bias", "residual"):
        value = torch.ones(X if name == "residual" else 3, device="cuda")
        given = arguments(**{name: value})
        assert_refused(lambda g=given: batch_norm_act(**g), RuntimeError, name)
