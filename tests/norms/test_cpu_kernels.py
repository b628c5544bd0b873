"""The CPU kernels without torch (`_C.cpu`): every capability of this machine, dtype and layout against fp64.

The operators of the library run one capability; here each is forced in turn, on threads of the binding's own, in
a workspace that holds NaN and is guarded on both sides.
"""

import platform
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.cpu_kernels import ACTIVATIONS, DTYPES, INPUT, OUTPUT, PAIRS, RESIDUAL, pointer
from torch import Tensor

SHAPES = [(1, 1, 2), (2, 3, 1), (3, 5, 7), (4, 33, 49), (2, 64, 200), (0, 4, 9)]


@dataclass
class Case:
    """Inputs of one call, [N, C, S] in fp64 and as the kernel gets them."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    channels_last: bool
    act: str
    with_residual: bool

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.shape))
        c = self.shape[1]

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.x = (random(*self.shape) * 2 + 3).to(self.dtype)
        self.residual = random(*self.shape).to(self.dtype) if self.with_residual else None
        self.dout = random(*self.shape).to(self.dtype)
        self.weight, self.bias = (random(c).to(self.acc) for _ in range(2))
        self.running_mean = random(c).to(self.acc)
        self.running_var = random(c).to(self.acc).abs() + 0.5

    def laid(self, tensor: Tensor | None) -> Tensor | None:
        """[N, C, S] memory as the kernel is to find it."""
        if tensor is None or not self.channels_last:
            return tensor
        return tensor.transpose(1, 2).contiguous()

    def unlaid(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if self.channels_last else tensor

    def empty(self) -> Tensor:
        n, c, s = self.shape
        size = (n, s, c) if self.channels_last else (n, c, s)
        return torch.full(size, float("nan"), dtype=self.dtype)

    @property
    def shape_argument(self) -> tuple[int, ...]:
        acc = DTYPES[self.acc]
        return (*self.shape, int(self.channels_last), DTYPES[self.dtype], acc, acc)

    def reference(self, training: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients by torch in ``dtype``."""
        x, weight, bias = (
            t.to(dtype, copy=True).requires_grad_() for t in (self.x, self.weight, self.bias)
        )
        residual = None
        if self.residual is not None:
            residual = self.residual.to(dtype, copy=True).requires_grad_()
        mean, var = (t.to(dtype, copy=True) for t in (self.running_mean, self.running_var))
        z = torch.nn.functional.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
        z = z if residual is None else z + residual
        out = ACTIVATIONS[self.act][1](z)
        out.backward(self.dout.to(dtype))
        found = {"out": out, "dx": x.grad, "dweight": weight.grad, "dbias": bias.grad}
        found |= {"running_mean": mean, "running_var": var}
        if residual is not None:
            found["dresidual"] = residual.grad
        return {name: t.detach() for name, t in found.items() if t is not None}

    def run(self, cpu: ModuleType, training: bool, threads: int = 1) -> dict[str, Tensor]:
        """The same by the kernels."""
        c = self.shape[1]
        x, residual, dout = self.laid(self.x), self.laid(self.residual), self.laid(self.dout)
        out, mean, rstd = self.empty(), torch.empty(c).to(self.acc), torch.empty(c).to(self.acc)
        running_mean, running_var = torch.empty_like(mean), torch.empty_like(mean)
        code = ACTIVATIONS[self.act][0]
        cpu.batch_norm_act_forward(
            shape=self.shape_argument,
            training=training,
            momentum=0.1,
            eps=1e-5,
            act=code,
            act_param=0.0,
            x=pointer(x),
            residual=pointer(residual),
            weight=pointer(self.weight),
            bias=pointer(self.bias),
            running_mean=pointer(self.running_mean),
            running_var=pointer(self.running_var),
            out=pointer(out),
            mean=pointer(mean),
            rstd=pointer(rstd),
            running_mean_out=pointer(running_mean) if training else 0,
            running_var_out=pointer(running_var) if training else 0,
            threads=threads,
        )
        source, saved = (INPUT, None) if residual is None else (RESIDUAL, residual)
        if residual is not None and self.act == "relu":
            source, saved = OUTPUT, out
        dx, dresidual = self.empty(), self.empty() if residual is not None else None
        dweight, dbias = torch.empty_like(mean), torch.empty_like(mean)
        cpu.batch_norm_act_backward(
            shape=self.shape_argument,
            training=training,
            act=code,
            act_param=0.0,
            z_source=source,
            dout=pointer(dout),
            x=pointer(x),
            saved=pointer(saved),
            weight=pointer(self.weight),
            bias=pointer(self.bias),
            mean=pointer(mean),
            rstd=pointer(rstd),
            dx=pointer(dx),
            dresidual=pointer(dresidual),
            dweight=pointer(dweight),
            dbias=pointer(dbias),
            threads=threads,
        )
        found = {
            "out": self.unlaid(out),
            "dx": self.unlaid(dx),
            "dweight": dweight,
            "dbias": dbias,
            "running_mean": running_mean if training else self.running_mean,
            "running_var": running_var if training else self.running_var,
        }
        if dresidual is not None:
            found["dresidual"] = self.unlaid(dresidual)
        return found


def error(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return (found.double() - exact).abs().max().item() if exact.numel() else 0.0


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(cpu: ModuleType, dtype: torch.dtype, channels_last: bool, training: bool) -> None:
    """The error against fp64 is at most that of torch in the same arithmetic, plus a few units in the last place."""
    for shape in SHAPES:
        if training and shape[0] * shape[2] < 2:
            continue
        for act, with_residual in PAIRS:
            case = Case(shape, dtype, channels_last, act, with_residual)
            exact = case.reference(training, torch.float64)
            # torch in the accumulation type, rounded to the dtype: what a perfect kernel would return.
            stock = case.reference(training, case.acc)
            found = case.run(cpu, training)
            assert found.keys() == exact.keys()
            for name, value in exact.items():
                own = found[name]
                units = 8 * max(1.0, value.abs().max().item() if value.numel() else 0.0)
                if dtype == torch.float64:
                    # "exact" is fp64 itself: its sums carry an error that grows as the root of their length.
                    units *= max(1.0, (shape[0] * shape[2]) ** 0.5)
                limit = error(stock[name].to(own.dtype), value) + units * torch.finfo(own.dtype).eps
                assert error(own, value) <= limit, (shape, act, with_residual, name)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_thread_count_does_not_change_a_bit(cpu: ModuleType, channels_last: bool) -> None:
    case = Case((8, 40, 700), torch.float32, channels_last, "silu", True)
    one = case.run(cpu, True, threads=1)
    for threads in (2, 3, 8):
        other = case.run(cpu, True, threads=threads)
        for name, value in one.items():
            assert torch.equal(other[name], value), (threads, name)


@pytest.mark.parametrize("channels_last", [False, True], ids=["first", "last"])
def test_large_mean_keeps_the_variance(cpu: ModuleType, channels_last: bool) -> None:
    """Mean 4096, deviation 1: E[x^2] - E[x]^2 in fp32 would leave no digit."""
    case = Case((4, 3, 500), torch.float32, channels_last, "identity", False)
    case.x = case.x - case.x.mean() + 4096
    found = case.run(cpu, True)
    exact = case.reference(True, torch.float64)
    assert error(found["out"], exact["out"]) < 2e-3


def test_set_capability_refuses(cpu: ModuleType) -> None:
    before = cpu.capability()
    with pytest.raises(ValueError, match="set_capability: name \\('sse9'\\)"):
        cpu.set_capability("sse9")
    assert cpu.capability() == before


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one capability only")
def test_cpu_flags_agree_with_what_is_offered() -> None:
    """A capability that the CPU reports is not refused."""
    from advdl_ops import _C

    before = _C.cpu.capability()
    flags = Path("/proc/cpuinfo").read_text()
    for name, flag in (("avx2", " avx2 "), ("avx512", " avx512vl ")):
        if flag in flags:
            _C.cpu.set_capability(name)
    _C.cpu.set_capability(before)
