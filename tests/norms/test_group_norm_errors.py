"""Bad input to the group norms: torch's exception types, one form of message, and nothing changed."""

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

from advdl_ops import nn
from advdl_ops.functional import group_norm, instance_norm, layer_norm_2d

X = (4, 6, 5, 5)
c6 = torch.ones(6)


def torchs_layer_norm(x, **options):
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), **options).movedim(-1, 1)


FUNCTIONS = {
    "group_norm": (group_norm, F.group_norm),
    "layer_norm_2d": (layer_norm_2d, torchs_layer_norm),
    "instance_norm": (instance_norm, F.instance_norm),
}


def arguments(function, **changed):
    found = {"input": torch.randn(X), "weight": torch.ones(6), "bias": torch.zeros(6)}
    if function == "group_norm":
        found["num_groups"] = 3
    if function == "instance_norm":
        found |= {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    return found | changed


BY_TORCH = None  # its own type


def bare(dtype):
    """Without weight and bias, whose dtype torch would complain of first."""
    return {"input": torch.ones(X, dtype=dtype), "weight": None, "bias": None}


# (function, what is wrong) -> (the change, the argument that the message names, the exception where it is not torch's)
ALL = {
    "rank 1": ({"input": torch.randn(6)}, "x", BY_TORCH),
    "rank 0": ({"input": torch.tensor(1.0)}, "x", BY_TORCH),
    "channels of weight": ({"weight": torch.ones(4)}, "weight", BY_TORCH),
    "channels of bias": ({"bias": torch.ones(1)}, "bias", BY_TORCH),
    "weight of rank 2": ({"weight": torch.ones(6, 1)}, "weight", RuntimeError),
    "weight of rank 0": ({"weight": torch.tensor(1.0)}, "weight", RuntimeError),
    "x of integers": (bare(torch.int64), "x", BY_TORCH),
    "x of int8": (bare(torch.int8), "x", BY_TORCH),
    "x of booleans": (bare(torch.bool), "x", BY_TORCH),
    "x of complex numbers": (bare(torch.complex64), "x", BY_TORCH),
    "weight of fp64": ({"weight": c6.double(), "bias": c6.double()}, "weight", BY_TORCH),
    "weight of bf16 beside fp32": (
        {"weight": c6.bfloat16(), "bias": c6.bfloat16()},
        "weight",
        BY_TORCH,
    ),
    "weight of integers": ({"weight": c6.long(), "bias": c6.long()}, "weight", BY_TORCH),
    "fp16 weight beside bf16": (
        {"input": torch.randn(X).bfloat16(), "weight": c6.half(), "bias": c6.half()},
        "weight",
        RuntimeError,
    ),
    "weight and bias of two dtypes": (
        {"input": torch.randn(X).bfloat16(), "bias": torch.zeros(6).bfloat16()},
        "bias",
        RuntimeError,
    ),
    "x no tensor": ({"input": [[1.0]]}, "x", TypeError),
    "weight no tensor": ({"weight": [1.0] * 6}, "weight", TypeError),
    "bias no tensor": ({"bias": 0.0}, "bias", TypeError),
    "residual no tensor": ({"residual": 1.0}, "residual", TypeError),
    "negative eps": ({"eps": -1e-5}, "eps", ValueError),
    "unknown act": ({"act": "rellu"}, "act", ValueError),
    "act of another module": ({"act": torch.nn.Softmax()}, "act", TypeError),
    "act of another type": ({"act": torch.relu}, "act", TypeError),
    "residual of another shape": ({"residual": torch.randn(4, 6, 5, 4)}, "residual", ValueError),
    "residual to broadcast": ({"residual": torch.randn(1, 6, 1, 1)}, "residual", ValueError),
    "residual of another rank": ({"residual": torch.randn(4, 6, 25)}, "residual", ValueError),
    "residual of integers": (
        {"residual": torch.ones(X, dtype=torch.int32)},
        "residual",
        RuntimeError,
    ),
    "meta residual": ({"residual": torch.randn(X, device="meta")}, "residual", RuntimeError),
    "meta weight": ({"weight": c6.to("meta"), "bias": c6.to("meta")}, "weight", RuntimeError),
    "meta bias": ({"bias": c6.to("meta")}, "bias", RuntimeError),
    "meta x": ({"input": torch.randn(X, device="meta")}, r"(running_mean|weight)", RuntimeError),
}
GROUP = {
    "groups that do not divide": ({"num_groups": 4}, "num_groups", BY_TORCH),
    "more groups than channels": ({"num_groups": 12}, "num_groups", BY_TORCH),
    "no group": ({"num_groups": 0}, "num_groups", RuntimeError),  # torch: ZeroDivisionError
    "a negative number of groups": ({"num_groups": -2}, "num_groups", BY_TORCH),
    "groups of a float": ({"num_groups": 3.0}, "num_groups", BY_TORCH),
    "one value per group": ({"input": torch.randn(1, 6, 1, 1), "num_groups": 6}, "x", BY_TORCH),
    "one value per group, 2-D": ({"input": torch.randn(1, 6), "num_groups": 6}, "x", BY_TORCH),
}
INSTANCE = {
    "one position": ({"input": torch.randn(4, 6, 1, 1)}, "x", BY_TORCH),
    "rank 2": ({"input": torch.randn(4, 6)}, "x", BY_TORCH),
    "running_mean no tensor": ({"running_mean": [0.0] * 6}, "running_mean", TypeError),
    "running_mean alone": ({"running_var": None}, "running_var", ValueError),
    "running_var alone": ({"running_mean": None}, "running_mean", ValueError),
    "channels of running_mean": ({"running_mean": torch.zeros(5)}, "running_mean", BY_TORCH),
    "channels of running_var": ({"running_var": torch.zeros(5)}, "running_var", BY_TORCH),
    "running_mean of fp64": ({"running_mean": c6.double()}, "running_mean", RuntimeError),
    "expanded running_var": (
        {"running_var": torch.ones(1).expand(6)},
        "running_var",
        RuntimeError,
    ),
    "no statistics": (
        {"running_mean": None, "running_var": None, "use_input_stats": False},
        "running_mean",
        BY_TORCH,
    ),
    "meta statistics": (
        {"running_mean": c6.to("meta"), "running_var": c6.to("meta")},
        "running_mean",
        RuntimeError,
    ),
}
CASES = {(f, name): case for f in FUNCTIONS for name, case in ALL.items()}
CASES |= {("group_norm", name): case for name, case in GROUP.items()}
CASES |= {("instance_norm", name): case for name, case in INSTANCE.items()}
EVERY = pytest.mark.parametrize("case", CASES, ids="-".join)


def copied(given):
    return {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}


def expected_type(case):
    """Torch's own for the same mistake, where it makes one of it."""
    changed, _, named = CASES[case]
    if named is not BY_TORCH:
        return named
    given = copied(arguments(case[0], **changed))
    with pytest.raises(Exception) as by_torch:  # noqa: PT011
        FUNCTIONS[case[0]][1](given.pop("input"), **given)
    # IndexError: torch counts the channels of what has none.
    return RuntimeError if by_torch.type is IndexError else by_torch.type


def assert_refused(function, given, expected, argument):
    """Exactly this type; ``function: argument (value) must ...``."""
    text = error_of_type(lambda: FUNCTIONS[function][0](**given), expected)
    pattern = rf"{function}: {argument} \(.+\) must (?!$)"
    # What act and the statistics are called without a value of their own.
    if argument in ("running_mean", "act"):
        pattern = rf"{function}: {argument}.* must (?!$)"
    assert re.match(pattern, text, re.S), text


@EVERY
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_refused_as_torch_does_and_nothing_written(backend, case, grad):
    changed, argument, _ = CASES[case]
    given = arguments(case[0], **changed)
    if grad and isinstance(given["bias"], torch.Tensor) and given["bias"].is_floating_point():
        given["bias"] = given["bias"].clone().requires_grad_()
    kept = copied(given)
    assert_refused(case[0], given, expected_type(case), argument)
    for name, t in kept.items():
        if isinstance(t, torch.Tensor) and not t.is_meta:
            assert torch.equal(t, given[name]), name
            assert t.dtype == given[name].dtype


@pytest.mark.parametrize("case", [c for c in CASES if "meta" not in c[1]], ids="-".join)
def test_as_of_real_tensors_on_meta_and_fake_ones(case):
    """Where the operator's fake function serves."""
    changed, argument, _ = CASES[case]
    given, expected = arguments(case[0], **changed), expected_type(case)
    if case[1] != "expanded running_var":  # to("meta") need not keep it so
        on_meta = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in given.items()}
        assert_refused(case[0], on_meta, expected, argument)
    with FakeTensorMode() as mode:
        fake = {
            n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in given.items()
        }
        assert_refused(case[0], fake, expected, argument)


def test_the_messages_of_the_issue():
    with pytest.raises(
        RuntimeError, match=r"^group_norm: num_groups \(32\) must divide the channels \(48\)$"
    ):
        group_norm(torch.randn(2, 48, 4, 4), 32)
    with pytest.raises(ValueError, match=r"^group_norm: eps \(-1.0\) must not be negative$"):
        group_norm(torch.randn(2, 48, 4, 4), 16, eps=-1.0)


def test_integers_with_weights_are_a_runtime_error_too():
    """As torch's complaint of their dtypes is: NotImplementedError is one of its kind."""
    for function, (own, stock) in FUNCTIONS.items():
        for call in (own, stock):
            given = arguments(function, input=torch.ones(X, dtype=torch.int32))
            with pytest.raises(RuntimeError):
                call(given.pop("input"), **given)


def test_what_is_no_mistake(backend):
    """At the edges of what is refused."""
    assert group_norm(torch.randn(2, 6), 6).shape == (2, 6)
    assert group_norm(torch.randn(1, 6, 1, 2), 6).shape == (1, 6, 1, 2)
    assert group_norm(torch.randn(1, 6, 1), 3).shape == (1, 6, 1)
    assert group_norm(torch.randn(X), 6, eps=0.0).isfinite().all()
    assert layer_norm_2d(torch.randn(1, 1)).eq(0).all()
    assert layer_norm_2d(torch.randn(4, 6, 0)).shape == (4, 6, 0)
    assert instance_norm(torch.randn(1, 6, 2)).shape == (1, 6, 2)
    assert group_norm(torch.randn(2, 6, 1, 1, 1, 2), 3).shape == (2, 6, 1, 1, 1, 2)


def test_a_refused_call_keeps_nothing_alive():
    def call(**changed):
        group_norm(**arguments("group_norm", **changed))

    # Refused by the operator; by the operator for what Python has no name for.
    check_refused_call_keeps_nothing_alive(call, X, {"weight": torch.ones(4)}, {"eps": "a"})


MODULE_CASES = {
    "rank": (torch.randn(6), None, ValueError),
    "integers": (torch.ones(X, dtype=torch.int64), None, BY_TORCH),
    "fp64": (torch.randn(X).double(), None, BY_TORCH),
    "channels": (torch.randn(4, 5, 5, 5), None, BY_TORCH),
    "one position": (torch.randn(4, 6, 1, 1), None, BY_TORCH),
    "residual": (torch.randn(X), torch.randn(4, 6, 5, 1), ValueError),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", MODULE_CASES)
def test_module_stays_as_it_was(backend, name, momentum):
    x, residual, expected = MODULE_CASES[name]
    options = {"momentum": momentum, "affine": True, "track_running_stats": True}
    module, stock = nn.InstanceNorm2d(6, **options), torch.nn.InstanceNorm2d(6, **options)
    module(torch.randn(X))
    check_refused_module_stays(module, (x, residual), expected, stock)


def test_modules_refuse_an_unknown_activation():
    for module, given in (
        (nn.GroupNorm, (2, 6)),
        (nn.LayerNorm2d, (6,)),
        (nn.InstanceNorm1d, (6,)),
    ):
        with pytest.raises(ValueError, match=rf"^{module.__name__}: act \('swish'\) must be None"):
            module(*given, act="swish")
        with pytest.raises(TypeError, match=rf"^{module.__name__}: act .* must"):
            module(*given, act=torch.nn.Softmax())


@pytest.mark.gpu
def test_two_devices():
    for function, names in {
        "group_norm": ("weight", "bias", "residual"),
        "instance_norm": ("running_mean", "running_var", "weight", "residual"),
    }.items():
        for name in names:
            value = torch.ones(X if name == "residual" else 6, device="cuda")
            given = arguments(function, **{name: value})
            assert_refused(function, given, RuntimeError, name)


def test_running_statistics_are_named_in_evaluation():
    x = torch.randn(2, 4, 3, 3)
    for bad in (torch.zeros(3), torch.zeros(4, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"^instance_norm: running_mean \("):
            instance_norm(x, bad, bad + 1, use_input_stats=False)
    with pytest.raises(NotImplementedError, match=r"^instance_norm: x \(dtype"):
        instance_norm(x.int(), torch.zeros(4), torch.ones(4), use_input_stats=False)


def test_written_running_statistics_must_not_require_a_gradient():
    x, mean = torch.randn(2, 4, 3, 3), torch.zeros(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"^instance_norm: running_mean must not require"):
        instance_norm(x, mean, torch.ones(4))
    assert mean.eq(0).all()


def test_eps_that_is_no_number():
    with pytest.raises(ValueError, match=r"^group_norm: eps \(nan\) must not be negative"):
        group_norm(torch.randn(2, 4, 3), 2, eps=float("nan"))
