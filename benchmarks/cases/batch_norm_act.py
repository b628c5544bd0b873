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
In channels_last, and on a GPU, nothing of the first pass is left in the cache. With a residual the reduction
reads x, y and dy and writes d residual. The apply step then reads that and x.

Flops per element: statistics 4, apply 3 (+1 residual); backward: mask 1, two sums 4, apply 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..norms import LAYOUTS, Random, add_norm, stock_activation
from ..registry import Case

if TYPE_CHECKING:
    import torch

    from ..measure_op import Function, Problem, Tensors


def passes(training: bool, residual: bool, cached: bool) -> dict[str, int]:
    """Passes over the activation tensor per mode, as in the table above."""
    if not training:
        return {"fwd": 3 if residual else 2}
    forward = (2 if cached else 3) + residual
    backward = (3 if cached else 5) + 2 * residual
    return {"fwd": forward, "bwd": backward, "full": forward + backward}


def flops(training: bool, residual: bool) -> dict[str, int]:
    """Per element."""
    if not training:
        return {"fwd": 3 + residual}
    return {"fwd": 7 + residual, "bwd": 10, "full": 17 + residual}


def stock(act: str | None, training: bool) -> Function:
    """The fastest stock formulation: the addition in place, and the activation in place if that is faster."""
    import torch.nn.functional as F

    activate = stock_activation(act, training)

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
        return activate(y)

    return function


def fused(act: str | None, training: bool) -> Function:
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


def problem(case: Case) -> Problem:
    from ..measure_op import Problem

    training, act = bool(case.options["training"]), case.options["act"]
    assert act is None or isinstance(act, str)
    random, channels = Random(case), case.shape[1]
    inputs = {
        "x": random.activation(scale=2.0, shift=0.5),
        "weight": random.normal(channels, scale=0.2, shift=1.0),
        "bias": random.normal(channels, scale=0.2),
    }
    if case.options["residual"]:
        inputs["residual"] = random.activation()
    for tensor in inputs.values():
        tensor.requires_grad_(training)
    state = {
        "running_mean": random.normal(channels, scale=0.1),
        "running_var": random.normal(channels).abs_().add_(0.5),
    }
    functions = {"eager": stock(act, training), "advdl_ops": fused(act, training)}
    made = Problem(inputs, state, functions, frozen=("weight", "bias"))
    if training:
        made.grad = random.away_from_kinks(stock(None, True), made)
    return made


def add(
    shape: tuple[int, ...],
    layout: str,
    *,
    training: bool = True,
    residual: bool = False,
    act: str | None = "relu",
    device: str = "cpu",
    **common: Any,
) -> None:
    """``common``: further arguments of :func:`.add_norm`."""
    moved = passes(training, residual, cached=device == "cpu" and layout == "contiguous")
    add_norm(
        problem,
        "_".join(["batch_norm", *(["add"] if residual else []), *([act] if act else [])]),
        shape,
        layout,
        training=training,
        passes=moved,
        flops=flops(training, residual),
        device=device,
        options={"residual": residual, "act": act},
        **common,
    )


STEM = (16, 64, 56, 56)

for _layout, _target in zip(LAYOUTS, (">= 2.5x", ">= 1.8x, stretch 2.2x"), strict=True):
    add(STEM, _layout, suites=("quick", "ops"), target=_target)
for _layout, _target in zip(LAYOUTS, (">= 2.3x", ">= 1.8x"), strict=True):
    add(STEM, _layout, residual=True, suites=("quick", "ops"), target=_target)
for _layout in LAYOUTS:
    # advdl_ops is compiled only in the rows above, because that takes half a minute each.
    for _shape in ((16, 256, 56, 56), (16, 512, 28, 28), (16, 2048, 7, 7)):
        add(_shape, _layout, modes=("full",), compile_ours=False)
    add(STEM, _layout, dtype="bfloat16", modes=("fwd", "full"), compile_ours=False)
    add(STEM, _layout, act="silu", modes=("full",), compile_ours=False)
    add(STEM, _layout, training=False, compile_ours=_layout == "contiguous")
    add((1, 64, 56, 56), _layout, training=False, compile_ours=_layout == "contiguous")
    add(STEM, _layout, training=False, residual=True, compile_ours=False)
add(STEM, "contiguous", training=False, act="hardswish", compile_ours=False)
add(STEM, "contiguous", training=False, act="gelu", compile_ours=False)

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
    add((2, 8, 4, 4), _layout, hidden=True)
