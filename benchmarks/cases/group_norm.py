"""Group norm, instance norm and layer norm 2d with their activation, on CPU and CUDA, in both layouts.

Stock's other forms compete too if they are the fastest in some case, each also compiled. Instance norm:
``F.group_norm(x, C)`` and ``F.layer_norm`` over height and width, 1.9x to 2.8x as fast as ``F.instance_norm``. Layer
norm 2d: with the output made contiguous, as Inductor's backward otherwise takes 2.8x as long in contiguous layout; and
``torch.var_mean``, which is faster only compiled (eager: 0.2x to 0.4x). ConvNeXt's form with mean and squares is slower
than it (0.8x to 0.9x).

Bytes, as passes over the activation tensor: forward reads x and writes y, backward reads x and dy and writes dx. This
holds if a set stays on chip between statistics and apply. If it does not (CUDA beyond shared memory), x, or x and dy,
are read twice: docs/kernels.md. The cases count the former, so the share of the copy rate refers to the least traffic.

Flops per element: statistics 4, apply 3; backward: mask 1, two sums 4, apply 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..norms import LAYOUTS, Random, add_norm, stock_activation
from ..registry import Case

if TYPE_CHECKING:
    import torch

    from ..measure_op import Function, Problem, Tensors

PASSES = {"fwd": 2, "bwd": 3, "full": 5}
FLOPS = {"fwd": 7, "bwd": 10, "full": 17}


def forms(case: Case) -> tuple[str, ...]:
    """Other stock forms of the same function, see the head of this file."""
    if case.options["kind"] == "instance_norm":
        return ("group_norm", "layer_norm")
    if case.options["kind"] == "layer_norm_2d":
        return ("var_mean", *(["contiguous"] if case.layout == "contiguous" else []))
    return ()


def stock(case: Case, act: str | None, form: str = "") -> Function:
    """torch's own norm, or one of ``forms``; timm's and torchvision's permutations around layer norm."""
    import torch
    import torch.nn.functional as F

    kind, groups = case.options["kind"], case.options["groups"]
    activate = stock_activation(act, training=True)
    channels_last = case.layout == "channels_last"

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
        if form == "group_norm":
            y = F.group_norm(x, x.shape[1], weight, bias)
        elif form == "layer_norm":  # its output is contiguous whatever x is
            y = F.layer_norm(x, x.shape[2:])
            y = y.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else y
        elif form == "var_mean":
            var, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
            scale, shift = (inputs[name][:, None, None] for name in ("weight", "bias"))
            y = torch.addcmul(shift, scale, (x - mean) * torch.rsqrt(var + 1e-5))
        elif kind == "instance_norm":
            y = F.instance_norm(x, weight=weight, bias=bias)
        elif kind == "layer_norm_2d":
            y = F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias).movedim(-1, 1)
            y = y.contiguous() if form == "contiguous" else y
        else:
            assert isinstance(groups, int)
            y = F.group_norm(x, groups, weight, bias)
        if "residual" in inputs:
            y = y.add_(inputs["residual"])
        return activate(y)

    return function


def fused(case: Case, act: str | None) -> Function:
    from advdl_ops import functional

    kind, groups = case.options["kind"], case.options["groups"]

    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        x, weight, bias = inputs["x"], inputs.get("weight"), inputs.get("bias")
        residual = inputs.get("residual")
        if kind == "instance_norm":
            return functional.instance_norm(x, weight=weight, bias=bias, act=act, residual=residual)
        if kind == "layer_norm_2d":
            return functional.layer_norm_2d(x, weight, bias, act=act, residual=residual)
        assert isinstance(groups, int)
        return functional.group_norm(x, groups, weight, bias, act=act, residual=residual)

    return function


def problem(case: Case) -> Problem:
    from ..measure_op import Problem

    act = case.options["act"]
    assert act is None or isinstance(act, str)
    random = Random(case)
    inputs = {"x": random.activation(scale=2.0, shift=0.5).requires_grad_()}
    if case.options["kind"] != "instance_norm":  # whose default has no weights
        channels = case.shape[1]
        inputs["weight"] = random.normal(channels, scale=0.2, shift=1.0).requires_grad_()
        inputs["bias"] = random.normal(channels, scale=0.2).requires_grad_()
    if case.options["residual"]:
        inputs["residual"] = random.activation().requires_grad_()
    functions = {"eager": stock(case, act), "advdl_ops": fused(case, act)}
    functions |= {f"eager {form}": stock(case, act, form) for form in forms(case)}
    made = Problem(inputs, {}, functions)
    made.grad = random.away_from_kinks(stock(case, None), made)
    return made


def add(
    kind: str,
    shape: tuple[int, ...],
    layout: str,
    *,
    groups: int = 32,
    act: str | None = "silu",
    residual: bool = False,
    **common: Any,
) -> None:
    """``common``: further arguments of :func:`.add_norm`."""
    name = kind if kind != "group_norm" or groups == 32 else f"{kind}{groups}"
    extra = 1 if residual else 0
    add_norm(
        problem,
        "_".join([name, *(["add"] if residual else []), *([act] if act else [])]),
        shape,
        layout,
        training=True,
        passes={
            mode: n + extra * (3 if mode == "full" else 1 + (mode == "bwd"))
            for mode, n in PASSES.items()
        },
        flops=FLOPS,
        options={"kind": kind, "groups": groups, "act": act, "residual": residual},
        **common,
    )


STEM = (16, 64, 56, 56)
UNET = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8), (8, 256, 56, 56))
VOLUME = (1, 32, 96, 96, 96)

for _layout, _target in zip(LAYOUTS, (">= 2.0x, stretch 2.5x", ">= 4x"), strict=True):
    add("group_norm", STEM, _layout, suites=("quick", "ops"), target=_target)
for _layout, _target in zip(LAYOUTS, (">= 2.5x", ">= 5x"), strict=True):
    add("instance_norm", STEM, _layout, act="leaky_relu", target=_target, compile_ours=False)
for _layout in LAYOUTS:
    add("group_norm", STEM, _layout, dtype="bfloat16", modes=("full",), compile_ours=False)
    add("group_norm", STEM, _layout, residual=True, act="relu", modes=("full",), compile_ours=False)
    add("layer_norm_2d", (16, 96, 56, 56), _layout, act=None, compile_ours=False)
    for _shape in UNET:
        add("group_norm", _shape, _layout, modes=("full",), compile_ours=False)
    add("instance_norm", VOLUME, _layout, act="leaky_relu", modes=("full",), compile_ours=False)
    # The cost of a call dominates here: few groups, one position, 7x7.
    add("group_norm", (1, 64, 28, 28), _layout, groups=4, modes=("full",), compile_ours=False)
    add("group_norm", (8, 512, 7, 7), _layout, modes=("full",), compile_ours=False)
    add("layer_norm_2d", (8, 768, 7, 7), _layout, act=None, modes=("full",), compile_ours=False)
add("group_norm", (128, 1024), "contiguous", modes=("full",), compile_ours=False)
add("group_norm", (64, 256, 4, 4), "contiguous", modes=("full",), compile_ours=False)

# targets.md, CUDA
for _layout in LAYOUTS:
    for _shape in UNET:
        add(
            "group_norm",
            _shape,
            _layout,
            dtype="bfloat16",
            device="cuda",
            suites=("quick", "ops") if _shape == UNET[-1] else ("ops",),
            target=">= 75% of copy at >= 64 MB, >= 1.5x compile, never below eager",
        )
    add("instance_norm", VOLUME, _layout, act="leaky_relu", dtype="bfloat16", device="cuda")
    add("layer_norm_2d", (64, 384, 14, 14), _layout, act=None, dtype="bfloat16", device="cuda")
    add("group_norm", (8, 512, 7, 7), _layout, dtype="bfloat16", device="cuda", modes=("full",))
add(
    "group_norm",
    (1, 128, 20, 256, 256),
    "contiguous",
    dtype="bfloat16",
    device="cuda",
    modes=("fwd",),
    target="<= 245 us on an H200",
)

# For tests of the benchmark itself.
for _layout in LAYOUTS:
    for _kind in ("group_norm", "instance_norm", "layer_norm_2d"):
        add(_kind, (2, 8, 4, 4), _layout, groups=2, residual=True, hidden=True)
