"""The raw operators ``conv2d`` and ``conv2d_backward``: each direction runs the candidate that ``choice.py`` gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._schemas import _check_devices, _library, acc_dtype, conv2d_format
from ..activation import activation_of
from . import choice
from .choice import Candidate
from .cpu import Gradients, Needs, Transformed, sum_of
from .problem import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    Epilogue,
    call_key,
    convert,
    layout_of,
    problem_of,
)


class _Plan(NamedTuple):
    """What a call of this kind runs, remembered from the first one.

    Attributes:
        steps: the candidates, with the gradients that each computes (not used in a forward).
        memory_format: of x, and of its gradient or the output.
    """

    steps: tuple[tuple[Candidate, Needs], ...]
    memory_format: torch.memory_format


_NOTHING: Needs = (False, False, False)


def forward(x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue) -> Tensor:
    """``act(conv2d(x, weight) * scale + shift + residual)`` in ``x``'s memory format."""
    scale, shift, residual, act = epilogue
    parts = act.name, scale is None, shift is None, residual is None
    key = call_key(x, weight, conv), parts
    plan = choice.plans.get(key)
    if plan is None:
        given = conv2d_format(x)
        problem = problem_of(FORWARD, x, weight, conv, epilogue.name())

        def trial(candidate: Candidate) -> Tensor:
            return output(candidate, given, x, weight, conv, epilogue)

        candidate = choice.chosen(problem, x.device, trial)
        plan = choice.keep(key, x, _Plan(((candidate, _NOTHING),), given))
    return output(plan.steps[0][0], plan.memory_format, x, weight, conv, epilogue)


def output(
    candidate: Candidate,
    given: torch.memory_format,
    x: Tensor,
    weight: Tensor | Transformed,
    conv: Conv,
    epilogue: Epilogue,
) -> Tensor:
    """A forward by one candidate, in ``given``, the memory format of ``x``. ``weight``: in the form that it takes."""
    out = candidate.run(x, weight, conv, epilogue, candidate.memory_format or given)
    return out if candidate.keeps_format else convert(out, given)


def backward(
    dz: Tensor, x: Tensor, weight: Tensor, conv: Conv, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of the weight and of a bias ``[C_out]``; empty where not needed.

    The candidates for x and for the weight are chosen separately. If it is the same one, it computes both in one call.
    """
    key = call_key(x, weight, conv), dz.stride(), needs
    plan = choice.plans.get(key)
    if plan is None:
        plan = choice.keep(key, x, _plan_of_backward(dz, x, weight, conv, needs))
    dx = dweight = dbias = None
    for candidate, wanted in plan.steps:
        found = gradients(candidate, plan.memory_format, dz, x, weight, conv, wanted)
        dx = dx if found[0] is None else found[0]
        dweight = dweight if found[1] is None else found[1]
        dbias = dbias if found[2] is None else found[2]
    if needs[2] and dbias is None:
        dbias = sum_of(dz)
    acc = acc_dtype(x.dtype)
    return (
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0, dtype=acc) if dweight is None else dweight,
        x.new_empty(0, dtype=acc) if dbias is None else dbias,
    )


def _plan_of_backward(dz: Tensor, x: Tensor, weight: Tensor, conv: Conv, needs: Needs) -> _Plan:
    given, layout = conv2d_format(x), layout_of(dz)
    serving: dict[str, tuple[Candidate, list[bool]]] = {}
    for at, direction in enumerate((INPUT_GRADIENT, WEIGHT_GRADIENT)):
        if needs[at]:
            alone = at == 0, at == 1, False

            def trial(candidate: Candidate, alone: Needs = alone) -> Tensor | None:
                dx, dweight, _ = gradients(candidate, given, dz, x, weight, conv, alone)
                return dx if alone[0] else dweight

            problem = problem_of(direction, x, weight, conv, layout)
            candidate = choice.chosen(problem, x.device, trial)
            serving.setdefault(candidate.name, (candidate, [False] * 3))[1][at] = True
    if needs[2] and serving:
        # The depthwise kernel sums dz as it reads it.
        next(iter(serving.values()))[1][2] = True
    steps = ((candidate, (w[0], w[1], w[2])) for candidate, w in serving.values())
    return _Plan(tuple(steps), given)


def gradients(
    candidate: Candidate,
    given: torch.memory_format,
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
) -> Gradients:
    """Gradients by one candidate, in the memory formats of ``x`` (``given``) and of the weight."""
    memory_format = candidate.memory_format or given
    dx, dweight, dbias = candidate.run(dz, x, weight, conv, needs, memory_format)
    if dx is not None and not candidate.keeps_format:
        dx = convert(dx, given)
    if dweight is not None:
        if dweight.stride() != weight.stride():
            dweight = convert(dweight, conv2d_format(weight))
        dweight = dweight.to(acc_dtype(x.dtype))
    return dx, dweight, dbias


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
