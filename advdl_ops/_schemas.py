"""Every raw operator: its schema, and its fake function with exact sizes, dtypes and strides.

Raw operators are functional: they write no argument. ``csrc/bindings/<family>.cpp`` implements them for CPU and
CUDA; what they compute stands in ``csrc/common/<family>.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Kept alive: destroying a Library takes its operators away.
_library = torch.library.Library("advdl_ops", "DEF")

_library.define(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float momentum, float eps, int act, float act_param) "
    "-> (Tensor out, Tensor mean, Tensor rstd, Tensor running_mean_out, Tensor running_var_out)"
)
_library.define(
    "batch_norm_act_backward(Tensor dout, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, bool training, int act, float act_param, int z_source, bool need_dx, bool need_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("advdl_ops::batch_norm_act", lib=_library)
def _(
    x, residual, weight, bias, running_mean, running_var, training, momentum, eps, act, act_param
):
    channels = x.shape[1]
    writes_running = training and running_mean is not None
    size = channels if writes_running else 0
    running = x if running_mean is None else running_mean
    return (
        _kept(x),
        x.new_empty(channels, dtype=_acc_dtype(x)),
        x.new_empty(channels, dtype=_acc_dtype(x)),
        running.new_empty(size),
        running.new_empty(size),
    )


@torch.library.register_fake("advdl_ops::batch_norm_act_backward", lib=_library)
def _(
    dout,
    x,
    saved,
    weight,
    bias,
    mean,
    rstd,
    training,
    act,
    act_param,
    z_source,
    need_dx,
    need_dresidual,
):
    return (
        _kept(x) if need_dx else x.new_empty(0),
        _kept(x) if need_dresidual else x.new_empty(0),
        torch.empty_like(mean),
        torch.empty_like(mean),
    )


def _kept(x: Tensor) -> Tensor:
    """An output with ``x``'s strides where the kernels read x as it is ([N, C, S] or [N, S, C]), else contiguous."""
    dense = (
        x.is_contiguous()
        or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
        or (x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d))
        or (x.dim() == 3 and x.transpose(1, 2).is_contiguous())
    )
    return (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if dense
        else x.new_empty(x.shape)
    )
