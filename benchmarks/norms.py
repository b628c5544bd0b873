"""What the cases of the norms share: stock activations, random tensors, names and registration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .registry import Case, register

if TYPE_CHECKING:
    import torch

    from .measure_op import Function, Problem
    from .session import Session

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
LAYOUTS = ("contiguous", "channels_last")
# The distance from a kink within which rounding may decide the side, for values of order 1.
MARGIN = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}


def stock_activation(act: str | None, training: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The fastest stock form of an activation after a norm.

    It is in place. With gradients only if its backward reads the output: silu, gelu and hardswish would need a copy of
    their input, which costs more than a new output.
    """
    import torch.nn.functional as F

    return {
        None: lambda y: y,
        "relu": F.relu_,
        "leaky_relu": lambda y: F.leaky_relu(y, inplace=True),
        "silu": lambda y: F.silu(y, inplace=not training),
        "gelu": F.gelu,
        "hardswish": lambda y: F.hardswish(y, inplace=not training),
    }[act]


class Random:
    """Random tensors of one case, the same in every run."""

    def __init__(self, case: Case) -> None:
        import torch

        self.case, self.generator = case, torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        import torch

        values = torch.randn(*shape, generator=self.generator) * scale + shift
        return values.to(self.case.device)

    def activation(self, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """A tensor of the case's shape, dtype and layout. channels_last means innermost channels for any rank."""
        import torch

        values = self.normal(*self.case.shape, scale=scale, shift=shift)
        values = values.to(getattr(torch, self.case.dtype))
        if self.case.layout == "channels_last":
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        return values

    def away_from_kinks(self, before: Function, problem: Problem) -> torch.Tensor:
        """A random gradient, zero where the pre-activation ``before`` is so close to zero that rounding decides."""
        inputs = {name: tensor.detach().double() for name, tensor in problem.inputs.items()}
        state = {name: tensor.double() for name, tensor in problem.state.items()}
        near = before(inputs, state).abs() < MARGIN[self.case.dtype]
        return self.activation().masked_fill_(near, 0.0)


def run(problem: Callable[[Case], Problem]) -> Callable[[Case, Session], None]:
    def measure(case: Case, session: Session) -> None:
        from .measure_op import measure_op

        measure_op(case, session, problem(case))

    return measure


def add_norm(
    problem: Callable[[Case], Problem],
    op: str,
    shape: tuple[int, ...],
    layout: str,
    *,
    training: bool,
    passes: Mapping[str, int],
    flops: Mapping[str, int],
    dtype: str = "float32",
    device: str = "cpu",
    suites: tuple[str, ...] = ("ops",),
    modes: tuple[str, ...] | None = None,
    target: str = "",
    compile_ours: bool = True,
    rounds: int = 11,
    hidden: bool = False,
    options: Mapping[str, object],
) -> None:
    """Registers one case with ``passes`` over x and ``flops`` per element of x, for each mode."""
    elements = math.prod(shape)
    parts = [op, "train" if training else "eval", "x".join(map(str, shape)), layout, dtype, device]
    register(
        Case(
            name="/".join(parts),
            suites=suites,
            op=op,
            modes=modes or tuple(passes),
            dtype=dtype,
            layout=layout,
            shape=shape,
            device=device,
            run=run(problem),
            bytes={mode: count * elements * SIZE[dtype] for mode, count in passes.items()},
            flops={mode: count * elements for mode, count in flops.items()},
            passes=passes,
            target=target,
            rounds=rounds,
            compile=not hidden,
            compile_ours=compile_ours,
            hidden=hidden,
            options={"training": training, **options},
        )
    )
