"""Batch norm + activation, with and without a residual: ResNet shapes in both layouts.

Bytes, as passes over the activation tensor (N*C*S elements; statistics and parameters are negligible):

=================  ===========================================  ============  ====
mode               must move                                    2 passes in   else
                                                                the cache
=================  ===========================================  ============  ====
eval fwd           read x, write y (+ read residual)            2 (3)         2 (3)
train fwd          statistics read x; apply reads x, writes y   2 (3)         3 (4)
train bwd          reduce reads x, dy; apply reads x, dy,       3 (5)         5 (7)
                   writes dx (+ y for the mask, d residual)
=================  ===========================================  ============  ====

On a CPU in contiguous layout one channel fits into the cache, so its second read is free ("in the cache").
In channels_last, and on a GPU, nothing of the first pass is left. With a residual the reduction reads x, y
and dy and writes d residual, which the apply step then reads beside x.

Flops per element: statistics 4, apply 3 (+1 residual); backward: mask 1, two sums 4, apply 5.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..registry import Case, register

if TYPE_CHECKING:
    import torch

    from ..op_flow import Problem, Tensors
    from ..session import Session

MARGIN = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}  # see _gradient
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def passes(training: bool, residual: bool, cached: bool) -> dict[str, int]:
    """Passes over the activation tensor per mode, as in the table above."""
    if not training:
        return {"fwd": 3 if residual else 2}
    forward = (2 if cached else 3) + residual
    backward = (3 if cached else 5) + 2 * residual
    return {"fwd": forward, "bwd": backward, "full": forward + backward}


def flops(training: bool, residual: bool, elements: int) -> dict[str, int]:
    if not training:
        return {"fwd": (3 + residual) * elements}
    forward, backward = (7 + residual) * elements, 10 * elements
    return {"fwd": forward, "bwd": backward, "full": forward + backward}


def stock(act: str | None, training: bool):
    """The strongest stock formulation: everything after the norm in place."""
    import torch.nn.functional as F

    acts = {
        None: lambda y: y,
        "relu": F.relu_,
        "silu": lambda y: F.silu(y, inplace=True),
        "gelu": F.gelu,
        "hardswish": lambda y: F.hardswish(y, inplace=True),
    }

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        y = F.batch_norm(
            inputs["x"],
            state["running_mean"],
            state["running_var"],
            inputs["weight"],
            inputs["bias"],
            training,
        )
        if "residual" in inputs:
            y = y.add_(inputs["residual"])
        return acts[act](y)

    return function


def fused(act: str | None, training: bool):
    from advdl_ops.functional import batch_norm_act

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        return batch_norm_act(
            inputs["x"],
            state["running_mean"],
            state["running_var"],
            inputs["weight"],
            inputs["bias"],
            training,
            residual=inputs.get("residual"),
            act=act,
        )

    return function


def _gradient(problem: Problem, dtype: str) -> torch.Tensor:
    """A random gradient that is zero where the pre-activation is so near zero that rounding decides."""
    import torch

    inputs = {name: tensor.detach().double() for name, tensor in problem.inputs.items()}
    state = {name: tensor.double() for name, tensor in problem.state.items()}
    before = stock(None, True)(inputs, state)
    gradient = torch.randn_like(problem.inputs["x"].detach())
    return gradient.masked_fill_(before.abs() < MARGIN[dtype], 0.0)


def problem(case: Case) -> Problem:
    import torch

    from ..op_flow import Problem

    training, act = bool(case.options["training"]), case.options["act"]
    assert act is None or isinstance(act, str)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale + shift

    def activation(tensor: torch.Tensor) -> torch.Tensor:
        layout = getattr(
            torch, case.layout if case.layout == "channels_last" else "contiguous_format"
        )
        placed = tensor.to(case.device, getattr(torch, case.dtype))
        return placed.contiguous(memory_format=layout).requires_grad_(training)

    channels = case.shape[1]
    inputs = {"x": activation(random(*case.shape, scale=2.0, shift=0.5))}
    inputs["weight"] = (
        random(channels, scale=0.2, shift=1.0).to(case.device).requires_grad_(training)
    )
    inputs["bias"] = random(channels, scale=0.2).to(case.device).requires_grad_(training)
    if case.options["residual"]:
        inputs["residual"] = activation(random(*case.shape))
    state = {
        "running_mean": random(channels, scale=0.1).to(case.device),
        "running_var": random(channels).abs_().add_(0.5).to(case.device),
    }
    functions = {"eager": stock(act, training), "advdl_ops": fused(act, training)}
    made = Problem(inputs, state, functions)
    if training:
        made.grad = _gradient(made, case.dtype)
    return made


def run(case: Case, session: Session) -> None:
    from ..op_flow import measure_op

    measure_op(case, session, problem(case))


def add(
    shape: tuple[int, ...],
    layout: str,
    *,
    training: bool = True,
    residual: bool = False,
    act: str | None = "relu",
    dtype: str = "float32",
    device: str = "cpu",
    suites: tuple[str, ...] = ("ops",),
    modes: tuple[str, ...] | None = None,
    target: str = "",
    compile: bool = True,
    rounds: int = 11,
    hidden: bool = False,
) -> None:
    elements = math.prod(shape)
    moved = passes(training, residual, cached=device == "cpu" and layout == "contiguous")
    op = "_".join(["batch_norm", *(["add"] if residual else []), *([act] if act else [])])
    size = "x".join(map(str, shape))
    parts = [op, "train" if training else "eval", size, layout, dtype, device]
    register(
        Case(
            name="/".join(parts),
            suites=suites,
            op=op,
            modes=modes or tuple(moved),
            dtype=dtype,
            layout=layout,
            shape=shape,
            device=device,
            run=run,
            bytes={mode: count * elements * SIZE[dtype] for mode, count in moved.items()},
            flops=flops(training, residual, elements),
            passes=moved,
            target=target,
            rounds=rounds,
            compile=compile,
            hidden=hidden,
            options={"training": training, "residual": residual, "act": act},
        )
    )


LAYOUTS = ("contiguous", "channels_last")
STEM = (16, 64, 56, 56)

for _layout, _target in zip(LAYOUTS, (">= 2.5x", ">= 1.8x, stretch 2.2x"), strict=True):
    add(STEM, _layout, suites=("quick", "ops"), target=_target)
for _layout, _target in zip(LAYOUTS, (">= 2.3x", ">= 1.8x"), strict=True):
    add(STEM, _layout, residual=True, suites=("quick", "ops"), target=_target)
for _layout in LAYOUTS:
    # torch.compile is many times slower than eager here (see the rows above) and costs half a minute each
    for _shape in ((16, 256, 56, 56), (16, 512, 28, 28), (16, 2048, 7, 7)):
        add(_shape, _layout, modes=("full",), compile=False)
    add(STEM, _layout, dtype="bfloat16", modes=("fwd", "full"), compile=False)
    add(STEM, _layout, act="silu", modes=("full",), compile=False)
    add(STEM, _layout, training=False, compile=_layout == "contiguous")
    add((1, 64, 56, 56), _layout, training=False, compile=_layout == "contiguous")
    add(STEM, _layout, training=False, residual=True, compile=False)
add(STEM, "contiguous", training=False, act="hardswish", compile=False)
add(STEM, "contiguous", training=False, act="gelu", compile=False)

# targets.md, CUDA: ResNet-50 shapes at batch 128
CUDA_TARGET = ">= 1.5x eager, >= 1.1x compile"
BIG = (128, 256, 56, 56)
for _layout in LAYOUTS:
    for _shape in ((128, 64, 112, 112), (128, 512, 28, 28), (128, 2048, 7, 7)):
        add(_shape, _layout, dtype="bfloat16", device="cuda", target=CUDA_TARGET)
    for _residual in (False, True):
        add(
            BIG,
            _layout,
            residual=_residual,
            dtype="bfloat16",
            device="cuda",
            suites=("quick", "ops"),
            target=CUDA_TARGET,
        )
    add(BIG, _layout, device="cuda", modes=("full",))
    add((128, 64, 56, 56), _layout, training=False, dtype="bfloat16", device="cuda")

# For tests of the benchmark itself.
for _layout in LAYOUTS:
    add((2, 8, 4, 4), _layout, hidden=True, compile=False)
