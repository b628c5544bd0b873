"""What follows a convolution whose kernel leaves it undone: an activation in place, or a pass of the norm's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schemas import acc_dtype
from ..activation import Activation
from ..backend import unwatched
from ..reference.activation import activate

_norm_op = torch.ops.advdl_ops.batch_norm_act.default


class Unit(NamedTuple):
    """Statistics ``[2, C]`` of mean 0 and deviation 1, and the two rows of it ``[C]``."""

    stats: Tensor
    mean: Tensor
    var: Tensor


def epilogue(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """``act(z * scale + shift + residual)``; with an activation alone it may be written over ``z``.

    Shapes: ``z``, ``residual`` ``[N, C, H, W]``; ``scale``, ``shift`` ``[C]``.
    """
    if scale is None and shift is None and residual is None:
        return activated(z, act, in_place=True)
    return normalized(z, scale, shift, residual, act)


def normalized(
    z: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """As :func:`epilogue`, in a tensor of its own."""
    _, mean, var = unit_statistics(z.shape[1], z)
    return _norm_op(
        z, residual, scale, shift, mean, var, False, 0.0, 0.0, act.code, act.param
    )[0]  # fmt: skip


def activated(z: Tensor, act: Activation, in_place: bool) -> Tensor:
    """``act(z)``, written over ``z`` where that is allowed and the activation can."""
    if act.code == 0:
        return z
    write = _IN_PLACE.get(act.name) if in_place else None
    if write is None:
        return activate(z, act)
    return write(z, act.param)


_IN_PLACE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda z, _: z.relu_(),
    "leaky_relu": lambda z, slope: F.leaky_relu_(z, slope),
    "elu": lambda z, alpha: F.elu_(z, alpha),
    "silu": lambda z, _: F.silu(z, inplace=True),
    "gelu": lambda z, _: torch.ops.aten.gelu_(z),
    "gelu_tanh": lambda z, _: torch.ops.aten.gelu_(z, approximate="tanh"),
    "sigmoid": lambda z, _: z.sigmoid_(),
    "tanh": lambda z, _: z.tanh_(),
    "hardswish": lambda z, _: F.hardswish(z, inplace=True),
    "relu6": lambda z, _: F.relu6(z, inplace=True),
}


# Nothing leaves it: a captured CUDA graph reads the memory again, and another stream may still be reading it.
_kept: dict[tuple[torch.device, int, torch.dtype], Unit] = {}
_KEPT_AT_MOST = 1024


def unit_statistics(channels: int, like: Tensor) -> Unit:
    """With these statistics the norm's kernels are the epilogue of a convolution ``like``; nobody writes them.

    Kept by device, channels and dtype: to fill them takes longer than a small convolution.
    """
    if not unwatched(like):
        return _made(channels, like)  # perhaps a tracer's, not a real one
    key = like.device, channels, acc_dtype(like.dtype)
    found = _kept.get(key)
    if found is not None:
        return found
    # An inference tensor could not be saved for backward by whoever comes next.
    with torch.inference_mode(False), torch.no_grad():
        made = _made(channels, like)
    if len(_kept) >= _KEPT_AT_MOST:
        return made
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return made  # memory of the graph
        # Another stream may be the next to read it.
        torch.cuda.current_stream(like.device).synchronize()
    return _kept.setdefault(key, made)  # of two threads that made it the first one's


def _made(channels: int, like: Tensor) -> Unit:
    acc, size = acc_dtype(like.dtype), (1, channels)
    stats = torch.cat([like.new_zeros(size, dtype=acc), like.new_ones(size, dtype=acc)])
    return Unit(stats, *stats.unbind())
