"""The loop of every CUDA LSTM, csrc/bindings/lstm_cuda.cpp, without a GPU: CPU tensors, and emulated kernels."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_emulation import LstmBinding, unavailable
from support.accuracy import acc_dtype, assert_accurate, f64
from support.lstm_operator import VARIANTS, arguments
from torch import Tensor

from advdl_ops._schemas import LSTMArguments

# The module, not the function of the same name.
reference = importlib.import_module("advdl_ops.reference.lstm")

OUTPUTS = ("y", "h_n", "c_n")
Arguments = dict[str, Any]  # of the forward operator, but for ``save``
# In the order of what backward returns; dbias is that of either bias.
LEAVES = (
    "x", "h0", "c0", "w_ih", "w_hh", "b_ih", "w_hr", "ln_hh_weight", "ln_c_weight", "ln_c_bias",
)  # fmt: skip
# Those that are returned only where they are asked for.
NEEDS = ("x", "w_ih", "w_hh", "b_ih", "w_hr")


def apart(t: Tensor) -> Tensor:
    """``t`` within a larger tensor of NaN: no two rows lie side by side."""
    wide = t.new_full([n + 2 for n in t.shape], torch.nan)
    view = wide[tuple(slice(1, n + 1) for n in t.shape)]
    return view.copy_(t)


def packed(*sizes: int, **options: Any) -> dict[str, Any]:
    return {"batch_sizes": torch.tensor(sizes), **options}


CASES: dict[str, dict[str, Any]] = VARIANTS | {
    "c alone": {"h0": None},
    "no states, recurrent mask": {"h0": None, "c0": None, "masks": True},
    "no states, projection, reverse": {"h0": None, "c0": None, "projection": True, "reverse": True},
    "no states, lengths, reverse, masks": {
        "h0": None,
        "c0": None,
        "reverse": True,
        "masks": True,
        "lengths": torch.tensor([2, 4, 1]),
    },
    "one sequence": {"batch": 1},
    "one step of one sequence": {"steps": 1, "batch": 1, "projection": True, "norm": True},
    "many": {"steps": 9, "batch": 6, "masks": True},
    "batch_first, projection, masks": {"batch_first": True, "projection": True, "masks": True},
    "packed, reverse, projection, layer norm": packed(
        3, 3, 1, 1, reverse=True, projection=True, norm=True
    ),
    "packed, reverse, masks": packed(3, 2, 2, 1, reverse=True, masks=True),
    "packed, one step": packed(3),
    "rows apart": {"layout": apart},
    "rows apart, batch_first": {"layout": apart, "batch_first": True, "norm": True},
    "rows apart, multiplied": {"layout": apart, "w_ih": None},
    "rows apart, multiplied, batch_first, lengths": {
        "layout": apart,
        "w_ih": None,
        "batch_first": True,
        "lengths": torch.tensor([2, 4, 1]),
    },
    "rows apart, multiplied, packed": packed(3, 2, 2, 1, layout=apart, w_ih=None),
    "rows apart, lengths": {"layout": apart, "lengths": torch.tensor([2, 4, 1])},
}
for of_one_dtype in ("bf16", "fp64"):
    del CASES[of_one_dtype]
EVERY = pytest.mark.parametrize("name", CASES)
PARTS = (
    "plain", "multiplied", "masks, projection, packed", "layer norm, projection, lengths", "all",
)  # fmt: skip
DTYPES = (torch.float32, f64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def cuda() -> Iterator[LstmBinding]:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
    with LstmBinding() as started:
        yield started


def is_number(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def make(name: str, dtype: torch.dtype = f64) -> Arguments:
    options = dict(CASES[name])
    layout = options.pop("layout", None)
    given = arguments(**(options | {"dtype": dtype}))
    if layout is not None:
        given = {n: layout(t) if is_number(t) else t for n, t in given.items()}
    return given


def make_outer(given: Arguments) -> list[Tensor | None]:
    """The gradients of y, h_n and c_n, laid out as x is."""
    g = torch.Generator().manual_seed(1)
    laid = (lambda t: t) if given["x"].is_contiguous() else apart
    plain = reference.lstm(LSTMArguments(**given))
    outer = [torch.randn(t.shape, generator=g, dtype=f64) for t in plain]
    return [laid(t.to(given["x"].dtype)) for t in outer]


def by_reference(
    given: Arguments, outer: list[Tensor | None], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients in ``dtype``."""
    wide = {n: t.detach().to(dtype) if is_number(t) else t for n, t in given.items()}
    gates, size = given["w_hh"].shape
    batch = reference.batch_of(LSTMArguments(**given))
    # What is not given is zero, and has a gradient.
    for n, shape in {"h0": (batch, size), "c0": (batch, gates // 4), "b_ih": (gates,)}.items():
        wide[n] = torch.zeros(shape, dtype=dtype) if wide[n] is None else wide[n]
    leaves = {n: wide[n].requires_grad_() for n in LEAVES if wide[n] is not None}
    found = reference.lstm(LSTMArguments(**wide))
    pairs = zip(found, outer, strict=True)
    zeros = [torch.zeros_like(t) if d is None else d.to(dtype) for t, d in pairs]
    grads = torch.autograd.grad(found, list(leaves.values()), zeros)
    named = {n: t.detach() for n, t in zip(OUTPUTS, found, strict=True)}
    return named | {f"d{n}": t for n, t in zip(leaves, grads, strict=True)}


def by_steps_in(
    dtype: torch.dtype, given: Arguments, outer: list[Tensor | None]
) -> dict[str, Tensor]:
    """As stock PyTorch would, step by step in ``dtype``: the reference without its wider arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_widened", lambda x: lambda t: t)
        return by_reference(given, outer, dtype)


def size_of(given: Arguments, outer: list[Tensor | None], exact: dict[str, Tensor]) -> float:
    """Of the terms that a result adds up, at most. The slopes of the gates take over the rounding of their inputs."""
    wide = {n: t.to(f64) if is_number(t) else t for n, t in given.items()}
    if wide["w_ih"] is not None:
        wide |= {"x": wide["x"] @ wide["w_ih"].T, "w_ih": None}
    dz = by_reference(wide, outer, f64)["dx"].abs().flatten(0, -2)
    if dz.numel() == 0:
        return 0.0
    x = given["x"].to(f64).abs().flatten(0, -2)
    w_ih, w_hh, *biases = (
        torch.zeros(1, dtype=f64) if given[n] is None else given[n].to(f64).abs()
        for n in ("w_ih", "w_hh", "b_ih", "b_hh")
    )
    h = max(exact["y"].abs().max().item(), 1.0)
    z = (wide["x"].abs() + h * w_hh.sum(1) + sum(biases)).max().item()
    sums = (dz.T @ x, dz.sum(0) * h, dz @ w_hh, dz @ w_ih if w_ih.dim() == 2 else dz)
    return z + (1 + z) * max(t.max().item() for t in sums)


def run(
    cuda: LstmBinding,
    given: Arguments,
    outer: list[Tensor | None],
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The same by the CUDA operators, but for the gradients named in ``without``."""
    y, h_n, c_n, *saved = cuda.call("lstm", (*given.values(), True))
    needs = {n: n not in without and (given[n] is not None or n == "b_ih") for n in NEEDS}
    grads = cuda.call("lstm_backward", (*outer, *given.values(), y, *saved, *needs.values()))
    found = {"y": y, "h_n": h_n, "c_n": c_n}
    for n, t in zip(LEAVES, grads, strict=True):
        if needs.get(n, n in ("h0", "c0") or given[n] is not None):
            found[f"d{n}"] = t
        else:
            assert t.numel() == 0, n
    return found


def check(found: dict[str, Tensor], given: Arguments, outer: list[Tensor | None]) -> None:
    """By the rule of support/accuracy.py; gradients of weights in the weights' dtype, as autograd hands them on."""
    dtype = given["x"].dtype
    exact, plain = by_reference(given, outer, f64), by_steps_in(dtype, given, outer)
    size = size_of(given, outer, exact)
    assert found.keys() == exact.keys()
    for n, t in found.items():
        assert t.dtype == (dtype if n in (*OUTPUTS, "dx", "dh0", "dc0") else acc_dtype(dtype)), n
        assert_accurate(t.to(dtype), exact[n], plain[n], size, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EVERY
def test_values_and_gradients(cuda: LstmBinding, name: str, dtype: torch.dtype) -> None:
    given = make(name, dtype)
    outer = make_outer(given)
    check(run(cuda, given, outer), given, outer)


@pytest.mark.parametrize(
    "missing", [m for n in (1, 2, 3) for m in itertools.combinations(range(3), n)]
)
@pytest.mark.parametrize("name", PARTS)
def test_outputs_without_a_gradient(cuda: LstmBinding, name: str, missing: tuple[int, ...]) -> None:
    given = make(name, torch.float32)
    outer = [None if i in missing else t for i, t in enumerate(make_outer(given))]
    check(run(cuda, given, outer), given, outer)


@pytest.mark.parametrize("without", [(n,) for n in NEEDS] + [NEEDS], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_gradients_that_are_not_wanted(
    cuda: LstmBinding, name: str, without: tuple[str, ...]
) -> None:
    """They are empty, and the others have the same bits."""
    given = make(name, torch.bfloat16)
    outer = make_outer(given)
    expected = run(cuda, given, outer)
    found = run(cuda, given, outer, without)
    assert found.keys() == expected.keys() - {f"d{n}" for n in without}
    for n, t in found.items():
        assert torch.equal(t, expected[n]), n


@EVERY
def test_without_saving(cuda: LstmBinding, name: str) -> None:
    given = make(name, torch.float16)
    saved = cuda.call("lstm", (*given.values(), True))
    unsaved = cuda.call("lstm", (*given.values(), False))
    assert all(map(torch.equal, saved[:3], unsaved[:3]))
    assert all(t.numel() == 0 for t in unsaved[3:])


@pytest.mark.parametrize("name", [n for n in CASES if "lengths" in CASES[n]])
def test_what_is_behind_a_sequence_does_not_matter(cuda: LstmBinding, name: str) -> None:
    given = make(name, torch.float32)
    outer = make_outer(given)
    expected = run(cuda, given, outer)
    time, batch = (1, 0) if given["batch_first"] else (0, 1)
    steps = torch.arange(given["x"].shape[time])
    ends = steps.unsqueeze(batch) >= given["lengths"].unsqueeze(time)
    for t in (given["x"], outer[0]):
        t[ends] = torch.nan
    found = run(cuda, given, outer)
    for n, t in found.items():
        assert torch.equal(t, expected[n]), n
    assert bool(found["y"][ends].eq(0).all())
    assert bool(found["dx"][ends].eq(0).all())


@pytest.mark.parametrize("missing", [(), ("h0", "c0"), ("b_ih", "b_hh"), ("b_ih",)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["one step", "one step of one sequence", "no sequence"])
def test_cell(cuda: LstmBinding, name: str, dtype: torch.dtype, missing: tuple[str, ...]) -> None:
    """A sequence of one step, of which y is h_n."""
    options = {n: v for n, v in CASES[name].items() if n in ("batch", "steps")}
    given = arguments(**(options | {"dtype": dtype, "steps": 1})) | dict.fromkeys(missing)
    outer = [None, *make_outer(given)[1:]]
    tensors = [given["x"][0], *(given[n] for n in ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"))]
    h, c, gates = cuda.call("lstm_cell", (*tensors, True))
    *unsaved, empty = cuda.call("lstm_cell", (*tensors, False))
    assert all(map(torch.equal, (h, c), unsaved))
    assert empty.numel() == 0
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih")
    back = (*outer[1:], *tensors[:5], gates)
    grads = cuda.call("lstm_cell_backward", (*back, True, True, True, True))
    found = {"y": h[None], "h_n": h, "c_n": c}
    found |= {f"d{n}": t for n, t in zip(names, grads, strict=True)}
    found["dx"] = found["dx"][None]
    check(found, given, outer)
    none = cuda.call("lstm_cell_backward", (*back, False, False, False, False))
    for n, t, u in zip(names, grads, none, strict=True):
        assert torch.equal(t, u) if n in ("h0", "c0") else u.numel() == 0, n
