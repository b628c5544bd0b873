"""Every raw operator: its schema, and its fake function with exact sizes, dtypes and strides.

Raw operators write no argument, but for those whose name ends in ``_``. ``csrc/bindings/<family>.cpp`` implements them
for CPU and CUDA; what they compute stands in ``csrc/common/<family>.h``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Kept alive: destroying a Library takes its operators away.
_library = torch.library.Library("advdl_ops", "DEF")

# The running statistics are an output here, [2, C], for the caller to copy: what a compiler may trace inside of an
# autograd.Function writes no input. Eagerly batch_norm_act_ writes them in place: a tensor and two copies less.
_library.define(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float momentum, float eps, int act, float act_param) "
    "-> (Tensor out, Tensor stats, Tensor running_out)"
)
_library.define(
    "batch_norm_act_(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, int act, float act_param) "
    "-> (Tensor out, Tensor stats)"
)
_library.define(
    "batch_norm_act_backward(Tensor dout, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, Tensor stats, "
    "bool training, int act, float act_param, int z_source, bool need_dx, bool need_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
# Statistics [2, N * groups]: mean and variance. groups = 0: of each position over its channels, [2, N * S].
_library.define(
    "group_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int groups, float eps, int act, "
    "float act_param) -> (Tensor out, Tensor stats)"
)
# dweight and dbias are empty where neither weight nor bias is given.
_library.define(
    "group_norm_backward(Tensor dout, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, Tensor stats, "
    "int groups, float eps, int act, float act_param, int z_source, bool need_dx, bool need_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


@torch.library.register_fake("advdl_ops::batch_norm_act", lib=_library)
def _(x, residual, weight, bias, running_mean, running_var, training, *options):
    out, stats = _fake_forward(x, residual, weight, bias, running_mean, running_var)
    writes_running = training and running_mean is not None
    running = x if running_mean is None else running_mean
    return out, stats, running.new_empty((2, x.shape[1] if writes_running else 0))


@torch.library.register_fake("advdl_ops::batch_norm_act_", lib=_library)
def _(x, residual, weight, bias, running_mean, running_var, *options):
    return _fake_forward(x, residual, weight, bias, running_mean, running_var)


def _fake_forward(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_devices("batch_norm_act", x, *others)
    return _kept(x), x.new_empty((2, x.shape[1]), dtype=_acc(x))


@torch.library.register_fake("advdl_ops::batch_norm_act_backward", lib=_library)
def _(
    dout, x, saved, weight, bias, stats, training, act, act_param, z_source, need_dx, need_dresidual
):
    return (
        _kept(x) if need_dx else x.new_empty(0),
        _kept(x) if need_dresidual else x.new_empty(0),
        stats.new_empty(stats.shape[1]),
        stats.new_empty(stats.shape[1]),
    )


@torch.library.register_fake("advdl_ops::group_norm", lib=_library)
def _(x, residual, weight, bias, groups, eps, act, act_param):
    _check_devices("group_norm", x, residual, weight, bias)
    sets = x.shape[0] * (groups or math.prod(x.shape[2:]))
    return _kept(x), x.new_empty((2, sets), dtype=_acc(x))


@torch.library.register_fake("advdl_ops::group_norm_backward", lib=_library)
def _(
    dout, x, saved, weight, bias, stats, groups, eps, act, act_param, z_source, need_dx, need_dresidual
):  # fmt: skip
    channels = 0 if weight is None and bias is None else x.shape[1]
    return (
        _kept(x) if need_dx else x.new_empty(0),
        _kept(x) if need_dresidual else x.new_empty(0),
        stats.new_empty(channels),
        stats.new_empty(channels),
    )


def _check_devices(function: str, x: Tensor, *others: Tensor | None) -> None:
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"{function}: tensors on {x.device} and on {t.device}")


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kept(x: Tensor) -> Tensor:
    """An output with ``x``'s strides where the kernels read x as it is ([N, C, S] or [N, S, C]), else contiguous."""
    dense = x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())
    return (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if dense
        else x.new_empty(x.shape)
    )
