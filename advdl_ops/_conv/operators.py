"""The raw operators ``conv2d`` and ``conv2d_backward``: each direction by the candidate that ``choice.py`` names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._schemas import _check_devices, _library, conv2d_format
from ..activation import activation_of
from ..reference.batch_norm_act import acc_dtype
from . import choice
from .choice import Candidate
from .cpu import sum_of
from .problem import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    Epilogue,
    convert,
    layout_of,
    problem_of,
)


def forward(x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue) -> Tensor:
    """``act(conv2d(x, weight) * scale + shift + residual)`` in ``x``'s memory format."""
    problem = problem_of(FORWARD, x, weight, conv, epilogue.name())
    given = conv2d_format(x)

    def run(candidate: Candidate) -> Tensor:
        out = candidate.run(x, weight, conv, epilogue, candidate.memory_format or given)
        return convert(out, given)

    return run(choice.chosen(problem, x.device, run))


def backward(
    dz: Tensor, x: Tensor, weight: Tensor, conv: Conv, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of the weight and of a bias ``[C_out]``; empty where not needed.

    Those of x and weight are chosen each for itself; what one candidate serves it computes together.
    """
    given, acc = conv2d_format(x), acc_dtype(x.dtype)

    def run(candidate: Candidate, wanted: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
        memory_format = candidate.memory_format or given
        dx, dweight, dbias = candidate.run(dz, x, weight, conv, wanted, memory_format)
        return (
            None if dx is None else convert(dx, given),
            None if dweight is None else convert(dweight, conv2d_format(weight)).to(acc),
            dbias,
        )

    found: list[Tensor | None] = [None, None, None]
    serving: dict[str, tuple[Candidate, list[bool]]] = {}
    layout = layout_of(dz)
    for at, direction in enumerate((INPUT_GRADIENT, WEIGHT_GRADIENT)):
        if needs[at]:
            alone = at == 0, at == 1, False
            candidate = choice.chosen(
                problem_of(direction, x, weight, conv, layout),
                x.device,
                lambda c, alone=alone, at=at: run(c, alone)[at],  # type: ignore[misc]
            )
            serving.setdefault(candidate.name, (candidate, [False] * 3))[1][at] = True
    if needs[2]:
        if not serving:
            found[2] = sum_of(dz)
        else:
            # The depthwise kernel sums dz as it reads it.
            next(iter(serving.values()))[1][2] = True
    for candidate, wanted in serving.values():
        gradients = run(candidate, (wanted[0], wanted[1], wanted[2]))
        found = [g if g is not None else f for g, f in zip(gradients, found, strict=True)]
    dx, dweight, dbias = found
    return (
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0, dtype=acc) if dweight is None else dweight,
        x.new_empty(0, dtype=acc) if dbias is None else dbias,
    )


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: int,
    act_param: float,
) -> Tensor:
    """:func:`forward` with the arguments of the schema, see ``_schemas.py``."""
    _check_devices("conv2d", x, weight, scale, shift, residual)
    epilogue = Epilogue(scale, shift, residual, activation_of(act, act_param))
    return forward(x, weight, _conv(stride, padding, dilation, groups), epilogue)


def conv2d_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`backward` with the arguments of the schema, see ``_schemas.py``."""
    _check_devices("conv2d_backward", dz, x, weight)
    conv = _conv(stride, padding, dilation, groups)
    return backward(dz, x, weight, conv, (need_dx, need_dweight, need_dbias))


def _conv(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Conv:
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    return Conv((sh, sw), (ph, pw), (dh, dw), groups)


for _device in ("CPU", "CUDA"):
    _library.impl("conv2d", conv2d, _device)
    _library.impl("conv2d_backward", conv2d_backward, _device)
