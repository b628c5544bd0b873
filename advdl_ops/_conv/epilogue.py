"""The epilogue of a convolution whose kernel has none: an activation in place, or a pass of the norm's kernel."""

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
    """Statistics ``[2, C]`` with mean 0 and variance 1, and their two rows ``[C]``."""

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
    """``act(z * scale + shift + residual)``. With only an activation, it may be written over ``z``.

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
    """As :func:`epilogue`, always in a new tensor."""
    _, mean, var = unit_statistics(z.shape[1], z)
    return _norm_op(
        z, residual, scale, shift, mean, var, False, 0.0, 0.0, act.code, act.param
    )[0]  # fmt: skip


def activated(z: Tensor, act: Activation, in_place: bool) -> Tensor:
    """``act(z)``, written over ``z`` if ``in_place`` allows it and torch has the activation in place."""
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


# Entries are never removed: a captured CUDA graph may read their memory again, and another stream may still read it.
_kept: dict[tuple[torch.device, int, torch.dtype], Unit] = {}
_KEPT_AT_MOST = 1024


def unit_statistics(channels: int, like: Tensor) -> Unit:
    """With these statistics the norm's kernels compute the epilogue of a convolution. They must not be written.

    They are kept for each device, number of channels and dtype, because filling them takes longer than a small
    convolution.
    """
    if not unwatched(like):
        return _made(channels, like)  # may be a tracer's tensor, not a real one
    key = like.device, channels, acc_dtype(like.dtype)
    found = _kept.get(key)
    if found is not None:
        return found
    # Not an inference tensor, because a later call may have to save it for backward.
    with torch.inference_mode(False), torch.no_grad():
        made = _made(channels, like)
    if len(_kept) >= _KEPT_AT_MOST:
        return made
    if like.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return made  # its memory belongs to the graph
        # The next reader may use another stream.
        torch.cuda.current_stream(like.device).synchronize()
    return _kept.setdefault(key, made)  # if two threads made it, the first one's


def _made(channels: int, like: Tensor) -> Unit:
    acc, size = acc_dtype(like.dtype), (1, channels)
    stats = torch.cat([like.new_zeros(size, dtype=acc), like.new_ones(size, dtype=acc)])
    return Unit(stats, *stats.unbind())
