"""The CPU kernels of the group norms without torch (`_C.cpu`): every capability of this machine against fp64.

Each in a workspace that holds NaN and is guarded on both sides, and between guards of its own tensors' memory.
"""

from types import ModuleType

import pytest
import torch
from support.accuracy import acc_dtype, f64
from support.cpu_kernels import ACTIVATIONS, DTYPES, INPUT, OUTPUT, PAIRS, RESIDUAL, pointer
from support.group_norm import (
    INSTANCE,
    POSITION,
    Norm,
    exactly,
    norms_of,
    problem_of,
    stock,
    term_sizes,
)
from support.norms import Problem, check_results
from torch import Tensor

MIXES = ["fp32", "fp64", "bf16", "fp16", "all-bf16"]
# A set shorter than a vector, sets of every kind of run, several chunks, nothing.
SHAPES = [(2, 3, 1), (3, 6, 7), (2, 4, 33), (4, 33, 49), (70, 33, 3), (1, 2, 33000), (0, 4, 9)]
NAMES = {
    "identity": "none"
}  # of support.cpu_kernels.ACTIVATIONS in support.accuracy.ACTIVATIONS, where another
GUARD = 61  # elements: what lies between is not aligned to anything


class Guarded:
    """A tensor between NaNs: one that is read is seen in the results, one that is written by `check`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        count = torch.Size(shape).numel()
        self.memory = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype)
        self.tensor = self.memory[GUARD : GUARD + count].view(shape)

    def check(self) -> None:
        assert self.memory[:GUARD].isnan().all()
        assert self.memory[len(self.memory) - GUARD :].isnan().all()


def run(
    cpu: ModuleType, p: Problem, norm: Norm, act: str, last: bool, threads: int = 1
) -> dict[str, Tensor]:
    """Output and gradients by the kernels."""
    n, c, s = p.x.shape
    groups = {POSITION: 0, INSTANCE: c}.get(norm, norm)
    acc = acc_dtype(p.x.dtype)
    memory = []

    def empty(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        memory.append(Guarded(shape, dtype))
        return memory[-1].tensor

    def like_x() -> Tensor:
        return empty(*((n, s, c) if last else (n, c, s)), dtype=p.x.dtype)

    def given(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        if t.dim() == 1:
            return empty(c, dtype=t.dtype).copy_(t)
        return like_x().copy_(t.transpose(1, 2) if last else t)

    x, residual, dout, weight, bias = map(given, (p.x, p.residual, p.dout, p.weight, p.bias))
    out, stats = like_x(), empty(2, n * (groups or s))
    weight_dtype = p.x.dtype if p.weight is None else p.weight.dtype
    shape = (n, c, s, groups, int(last), DTYPES[p.x.dtype], DTYPES[weight_dtype])
    code = ACTIVATIONS[act][0]
    options = {"shape": shape, "eps": p.eps, "act": code, "act_param": 0.0, "threads": threads}
    options |= {"weight": pointer(weight), "bias": pointer(bias), "x": pointer(x)}
    options |= {"mean": pointer(stats[0]), "var": pointer(stats[1])}
    cpu.group_norm_forward(residual=pointer(residual), out=pointer(out), **options)
    source, saved = (INPUT, None) if residual is None else (RESIDUAL, residual)
    if residual is not None and act == "relu":
        source, saved = OUTPUT, out
    dx, dresidual = like_x(), None if residual is None else like_x()
    dweight, dbias = (None, None) if p.weight is None else (empty(c), empty(c))
    cpu.group_norm_backward(
        z_source=source,
        dout=pointer(dout),
        saved=pointer(saved),
        dx=pointer(dx),
        dresidual=pointer(dresidual),
        dweight=pointer(dweight),
        dbias=pointer(dbias),
        **options,
    )
    for guarded in memory:
        guarded.check()
    found = {"out": out, "dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias}
    return {
        name: t.transpose(1, 2)
        if last and t.dim() > 1
        else t.to(weight_dtype)
        if t.dim() == 1
        else t
        for name, t in found.items()
        if t is not None
    }


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("mix", MIXES)
def test_values(cpu: ModuleType, one_thread: None, mix: str, last: bool) -> None:
    for i, shape in enumerate(SHAPES):
        norms = norms_of(shape) if shape[0] else [2, POSITION]
        for j, norm in enumerate(norms):
            act, residual = PAIRS[(i + j) % len(PAIRS)]
            p = problem_of(
                norm, shape, mix, residual=residual, affine=(i + j) % 5 != 4, running=False
            )
            name = NAMES.get(act, act)
            found = run(cpu, p, norm, act, last)
            exact = exactly(p, norm, name) if mix == "fp64" else stock(p.to(f64), norm, name)
            plain, sizes = stock(p, norm, name), term_sizes(p, norm)
            check_results(p, found, exact, plain, sizes, (shape, norm, act))


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_thread_count_does_not_change_a_bit(cpu: ModuleType, last: bool) -> None:
    for shape in [(1, 6, 11003), (3, 40, 700), (130, 300, 3)]:
        for norm, act in ((1, "silu"), (2, "relu"), (POSITION, "silu")):
            p = problem_of(norm, shape, residual=True)
            one = run(cpu, p, norm, act, last)
            for threads in (2, 3, 4, 8):
                other = run(cpu, p, norm, act, last, threads)
                for name, value in one.items():
                    assert torch.equal(other[name], value), (shape, norm, threads, name)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_what_is_not_wanted_is_not_written(cpu: ModuleType, last: bool) -> None:
    """Without dx, dresidual, dweight: null pointers."""
    for shape in [(3, 6, 7), (3, 6, 40)]:
        for norm in (1, 3, 0):
            n, c, s = shape
            size = (n, s, c) if last else shape
            x, dout = torch.randn(2, *size)
            stats = torch.ones(2, n * (norm or s))
            for wanted in range(8):
                dx, dresidual = torch.zeros(2, *size)
                dweight, dbias = torch.zeros(2, c)
                cpu.group_norm_backward(
                    shape=(*shape, norm, int(last), 0, 0),
                    eps=1e-5,
                    act=ACTIVATIONS["silu"][0],
                    act_param=0.0,
                    z_source=INPUT,
                    dout=pointer(dout),
                    x=pointer(x),
                    saved=0,
                    weight=0,
                    bias=0,
                    mean=pointer(stats[0]),
                    var=pointer(stats[1]),
                    dx=pointer(dx) if wanted & 1 else 0,
                    dresidual=pointer(dresidual) if wanted & 2 else 0,
                    dweight=pointer(dweight) if wanted & 4 else 0,
                    dbias=pointer(dbias) if wanted & 4 else 0,
                )
                assert dx.any() == bool(wanted & 1)
                assert dresidual.any() == bool(wanted & 2)
                assert dweight.any() == dbias.any() == bool(wanted & 4)
