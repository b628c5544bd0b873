"""What the CUDA operators of the convolution choose among and what each candidate computes, on CPU tensors.

torch's own convolution and the epilogue's kernel exist on CPU too; the Triton launchers are a fake that computes by
torch. Their values have tests of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.accuracy import assert_accurate
from support.conv2d_cuda import (
    CASES,
    DTYPES,
    LAYOUTS,
    NAMES,
    RELU,
    SILU,
    SLOW,
    Case,
    Launchers,
    Tuner,
    backward,
    exact_backward,
    exact_forward,
    forward,
    last,
    make_inputs,
    serve_as_on_cuda,
    size,
    ways,
    wide,
    with_strides,
)
from torch import Tensor

from advdl_ops import _schemas, tuning
from advdl_ops._conv import choice, cuda, operators
from advdl_ops._conv.problem import Problem
from advdl_ops.activation import IDENTITY, Activation


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    made = Tuner()
    monkeypatch.setattr(tuning, "choose", made.choose)
    return made


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Launchers]:
    made = {"conv2d": Launchers(depthwise=False), "depthwise_conv2d": Launchers(depthwise=True)}
    serve_as_on_cuda(monkeypatch, *made.values())
    return made


# ---- values of every candidate ----

EVERY = ("scale", "shift", "residual")
EPILOGUES = [((), IDENTITY), (("shift",), RELU), (EVERY, SILU), (("residual",), RELU), ((), SILU)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(
    case: Case, dtype: torch.dtype, layout: str, tuner: Tuner, launchers: dict[str, Launchers]
) -> None:
    i = make_inputs(case, dtype, layout)
    terms = size(case, i)[0]
    for epilogue, act in EPILOGUES:
        exact = exact_forward(case, wide(i, torch.float64), act, epilogue)
        stock = exact_forward(case, i, act, epilogue)
        for name in ways(case, i.x):
            tuner.wish = name
            out = forward(case, i, act, epilogue)
            what = (name, epilogue, act.name)
            assert tuner.asked[-1][1] == ways(case, i.x), what
            assert_accurate(out, exact, stock, terms, what)
            assert out.dtype == dtype and out.stride() == kept_strides(out, i.x), what


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_backward(
    case: Case, dtype: torch.dtype, layout: str, tuner: Tuner, launchers: dict[str, Launchers]
) -> None:
    i = make_inputs(case, dtype, layout)
    exact, stock = exact_backward(case, wide(i, torch.float64)), exact_backward(case, i)
    for name in ways(case, i.x):
        tuner.wish = name
        found = backward(case, i, True, True, True)
        for own, e, s, terms, what in zip(
            found, exact, stock, size(case, i)[1:], ("dx", "dweight", "dbias"), strict=True
        ):
            assert_accurate(own.to(s.dtype), e, s, terms, (name, what))
        dx, dweight, dbias = found
        assert dx.stride() == kept_strides(dx, i.x) and dx.dtype == dtype
        assert dweight.is_contiguous() and dweight.dtype == dbias.dtype == torch.float32


def kept_strides(out: Tensor, x: Tensor) -> tuple[int, ...]:
    return torch.empty(out.shape, memory_format=_schemas.conv2d_format(x)).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp64_is_torchs_alone(layout: str, tuner: Tuner, launchers: Any) -> None:
    case = CASES["dilated"]
    i = wide(make_inputs(case, torch.float32, layout), torch.float64)
    i = i._replace(x=with_strides(i.x, LAYOUTS[layout]))
    torch.testing.assert_close(forward(case, i, SILU, EVERY), exact_forward(case, i, SILU, EVERY))
    found = backward(case, i, True, True, True)
    torch.testing.assert_close(found, exact_backward(case, i))
    assert tuner.asked == []


def test_no_position_is_torchs_alone(tuner: Tuner, launchers: Any) -> None:
    case = Case((0, 4, 5, 5), (6, 4, 3, 3))
    i = make_inputs(case, torch.float32, "contiguous")
    assert forward(case, i, RELU, EVERY).shape == (0, 6, 5, 5)
    dx, dweight, dbias = backward(case, i, True, True, True)
    assert dx.shape == case.x and not dweight.any() and not dbias.any()
    assert tuner.asked == []


# ---- what is asked ----


def test_each_direction_is_chosen_for_itself(tuner: Tuner, launchers: dict[str, Launchers]) -> None:
    case = CASES["3x3"]
    i = make_inputs(case, torch.float32, "contiguous")
    tuner.wish = NAMES[1]
    forward(case, i, RELU, ("shift",)), backward(case, i, True, True, False)
    assert [key.direction for key, _ in tuner.asked] == [
        "forward",
        "input_gradient",
        "weight_gradient",
    ]
    # The choice runs last.
    assert launchers["conv2d"].called[-1] == ("weight_gradient", SLOW)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_what_is_not_needed_is_empty(needs: tuple[bool, ...], tuner: Tuner, launchers: Any) -> None:
    case = CASES["3x3"]
    i = make_inputs(case, torch.bfloat16, "channels_last")
    found = backward(case, i, *needs)
    exact = exact_backward(case, i)
    assert [t.shape == e.shape for t, e in zip(found, exact, strict=True)] == list(needs)
    assert [t.numel() > 0 for t in found] == list(needs)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert len(tuner.asked) == (not needs[2])


def test_the_key_tells_all_that_times_depend_on(tuner: Tuner, launchers: Any) -> None:
    base = Case((2, 4, 8, 8), (4, 4, 3, 3))

    def key(case: Case = base, dtype: torch.dtype = torch.float32, layout: str = "contiguous",
            epilogue: tuple[str, ...] = ("shift",), act: Activation = RELU,
            weight: str = "contiguous") -> Problem:  # fmt: skip
        inputs = make_inputs(case, dtype, layout)
        in_layout = last(inputs.weight) if weight == "channels_last" else inputs.weight.contiguous()
        forward(case, inputs._replace(weight=in_layout), act, epilogue)
        return tuner.asked[-1][0]

    assert key() == key()
    keys = [
        key(),
        key(base._replace(x=(2, 4, 8, 9))),
        key(base._replace(weight=(8, 4, 3, 3))),
        key(base._replace(stride=(2, 1))),
        key(base._replace(padding=(0, 1))),
        key(base._replace(dilation=(2, 1))),
        key(base._replace(weight=(4, 2, 3, 3), groups=2)),
        key(base._replace(weight=(4, 1, 3, 3), groups=4)),
        key(dtype=torch.bfloat16),
        key(layout="channels_last"),
        key(weight="channels_last"),
        key(epilogue=("scale", "shift")),
        key(act=SILU),
    ]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        keys.append(key())
    with torch.backends.cudnn.flags(enabled=False):
        keys.append(key())
    assert len(set(keys)) == len({tuning._text(k) for k in keys}) == len(keys)


def test_the_layout_of_dz_is_part_of_the_key(tuner: Tuner, launchers: Any) -> None:
    case = CASES["3x3"]
    i = make_inputs(case, torch.float32, "contiguous")
    backward(case, i, True, False, False)
    backward(case, i._replace(dz=last(i.dz)), True, False, False)
    backward(case, i._replace(dz=i.dz[:1, :1, :1, :1].expand(i.dz.shape)), True, False, False)
    layouts = [(key.layout, key.epilogue) for key, _ in tuner.asked]
    assert layouts == [("contiguous", dz) for dz in ("contiguous", "channels_last", "strided")]


def test_a_known_choice_asks_nothing(tuner: Tuner, launchers: dict[str, Launchers]) -> None:
    case = CASES["3x3"]
    i = make_inputs(case, torch.float32, "contiguous")
    forward(case, i, RELU, ("shift",))
    key = tuner.asked[0][0]
    tuning._choices[i.x.device, key] = tuning.Choice(NAMES[1], {}, {})
    del launchers["conv2d"].called[:], tuner.asked[:]
    forward(case, i, RELU, ("shift",))
    assert launchers["conv2d"].called == [("forward", SLOW)] and tuner.asked == []


def test_without_triton_torch_is_left(
    tuner: Tuner, launchers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "has_triton", lambda: False)
    case = CASES["3x3"]
    forward(case, make_inputs(case, torch.float32, "contiguous"), RELU, ())
    assert tuner.asked[0][1] == ["cudnn", "cudnn channels_last"]
    forward(case, make_inputs(case, torch.float32, "channels_last"), RELU, ())
    assert len(tuner.asked) == 1  # nothing to choose among


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("direction", ["forward", "input_gradient", "weight_gradient"])
def test_the_launchers_offer_configs_of_different_names(depthwise: bool, direction: str) -> None:
    pytest.importorskip("triton")
    found = choice._on_cuda(direction, depthwise, torch.bfloat16, True, False)
    configs = getattr(cuda.launchers(depthwise), f"{direction.upper()}_CONFIGS")
    assert len(configs) > 1
    assert [c.run.keywords["config"] for c in found[1:]] == list(configs)
    assert len({c.name for c in found}) == len(found) == 1 + len(configs)
    assert hasattr(cuda.launchers(depthwise), direction)


# ---- cuDNN's flags, devices, registration ----


def test_cudnn_is_deterministic_and_its_flags_are_restored(
    monkeypatch: pytest.MonkeyPatch, launchers: Any
) -> None:
    seen: list[tuple[Any, ...]] = []

    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic

    real = torch.ops.aten

    def convolution(*args: Any) -> Tensor:
        seen.append(args[9:11])
        return real._convolution(*args)

    def convolution_backward(*args: Any) -> Any:
        seen.append(flags())
        return real.convolution_backward(*args)

    fake = SimpleNamespace(_convolution=convolution, convolution_backward=convolution_backward)
    case = CASES["3x3"]
    i = wide(make_inputs(case, torch.float32, "contiguous"), torch.float64)
    with torch.backends.cudnn.flags(benchmark=True, deterministic=False):
        with monkeypatch.context() as patched:
            patched.setattr(cuda.torch, "ops", SimpleNamespace(aten=fake))
            forward(case, i, IDENTITY, ()), backward(case, i, True, True, False)
        assert flags() == (True, False)
    assert seen == [(False, True)] * 2  # forward, and both gradients by one call


def test_tensors_of_two_devices(tuner: Tuner) -> None:
    case = CASES["3x3"]
    i = make_inputs(case, torch.float32, "contiguous")
    options = (1, 1), (1, 1), (1, 1), 1
    with pytest.raises(RuntimeError, match="conv2d: tensors on cpu and on meta"):
        operators.conv2d(i.x, i.weight, None, i.shift.to("meta"), None, *options, 0, 0.0)


@pytest.mark.parametrize("op", ["conv2d", "conv2d_backward"])
def test_every_operator_is_registered_for_cuda(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"advdl_ops::{op}", "CUDA")


def test_the_import_brings_no_triton() -> None:
    program = "import sys, advdl_ops; sys.exit(any(m == 'triton' or 'ops.triton' in m for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


INTERPRETED = """
import torch
from advdl_ops import reference, tuning
from advdl_ops._conv import choice, operators
from advdl_ops.activation import ACTIVATIONS

run = []
def choose(key, candidates, device):
    name = next(n for n in candidates if n.startswith("triton"))
    run.append((key.direction, name))
    return name
tuning.choose = choose

def chosen(problem, device, trial):
    found = choice.candidates(problem, torch.device("cuda"))
    return choice._by_measurement(problem, found, device, trial)
choice.chosen, choice.keep = chosen, lambda key, x, plan: plan

torch.manual_seed(0)
act, options = ACTIVATIONS["silu"], [[2, 1], [1, 2], [1, 2]]
for groups in (2, 4):
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(4, 4 // groups, 3, 3)
    scale, shift = torch.rand(4), torch.randn(4)
    z = torch.nn.functional.conv2d(x, weight, None, *options, groups)
    residual, dz = torch.randn_like(z), torch.randn_like(z)
    out = operators.conv2d(x, weight, scale, shift, residual, *options, groups, act.code, act.param)
    exact = reference.conv2d(*(t.double() for t in (x, weight)), None, *options, groups,
                             *(t.double() for t in (scale, shift, residual)), act)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    found = operators.conv2d_backward(dz, x, weight, *options, groups, True, True, True)
    exact = torch.ops.aten.convolution_backward(
        *(t.double() for t in (dz, x, weight)), [4], *options, False, [0, 0], groups, [True] * 3)
    for own, e in zip(found, exact, strict=True):
        torch.testing.assert_close(own.double(), e, rtol=1e-5, atol=1e-4)
assert len(run) == 6, run
"""


def test_the_launchers_take_what_they_are_given() -> None:
    """The real ones, by Triton's interpreter; tolerances of fp32, as values have tests of their own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
