"""Every raw operator: its schema, and its fake function with exact sizes, dtypes and strides.

Only operators whose name ends in ``_`` write an argument. ``csrc/common/<family>.h`` has the formulas. The
implementations are in:

- ``csrc/bindings/<family>.cpp``: the norms and the LSTM for CPU and CUDA; ``dense_conv2d``, ``depthwise_conv2d`` and
  ``convert_layout`` and ``checksum`` for CPU;
- ``_conv/operators.py``: ``conv2d`` for CPU and CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Kept alive, because destroying a Library unregisters its operators.
_library = torch.library.Library("advdl_ops", "DEF")

# The new running statistics are an output here, [2, C], which the caller copies: a compiler can only trace an
# autograd.Function that writes no input. In eager mode, batch_norm_act_ writes them in place and saves a tensor and two
# copies.
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
# The last pass of batch_norm_act alone, to the same bits, with the statistics that it returned.
_library.define(
    "batch_norm_act_apply(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor stats, int act, "
    "float act_param) -> Tensor"
)
_library.define(
    "batch_norm_act_backward(Tensor dout, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, Tensor stats, "
    "bool training, int act, float act_param, int z_source, bool need_dx, bool need_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
# Synchronized batch norm takes statistics and sums of all processes together. The moments are [2, C]: mean, and sum of
# squared distances from it; means are those of dz * xhat and of dz.
_library.define("batch_norm_moments(Tensor x) -> Tensor")
_library.define(
    "batch_norm_act_input_gradient(Tensor dout, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, "
    "Tensor stats, Tensor means, int act, float act_param, int z_source) -> Tensor dx"
)
# stats is [2, N * groups]: mean and variance. With groups = 0 each position is normalized over its channels: [2, N *
# S].
_library.define(
    "group_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, int groups, float eps, int act, "
    "float act_param) -> (Tensor out, Tensor stats)"
)
# dweight and dbias are empty if neither weight nor bias is given.
_library.define(
    "group_norm_backward(Tensor dout, Tensor x, Tensor? saved, Tensor? weight, Tensor? bias, Tensor stats, "
    "int groups, float eps, int act, float act_param, int z_source, bool need_dx, bool need_dresidual) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
# out = act(conv2d(x, weight) * scale + shift + residual), scale and shift [C_out], in the memory format of x.
_CONV2D_OPTIONS = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_library.define(
    "conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
    f"{_CONV2D_OPTIONS}, int act, float act_param) -> Tensor"
)
# dz is the gradient of conv2d(x, weight), dbias its sum. dweight and dbias are at least fp32. dweight has the memory
# format of the weight (autograd would copy any other). Gradients that are not needed are empty.
_library.define(
    f"conv2d_backward(Tensor dz, Tensor x, Tensor weight, {_CONV2D_OPTIONS}, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
# The same for weight [C, 1, kH, kW] over x [N, C, H, W], groups = C.
_library.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int act, float act_param) -> Tensor"
)
_library.define(
    "depthwise_conv2d_backward(Tensor dz, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    "bool need_dx, bool need_dweight, bool need_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
# The same for groups = 1 in fp32 or fp64 and up to 64 taps, on CPU only. conv2d calls it where it is the fastest.
# Results have the memory formats of x and of the weight.
_library.define(
    "dense_conv2d(Tensor x, Tensor weight, Tensor? shift, Tensor? residual, "
    "int[2] stride, int[2] padding, int[2] dilation, int act, float act_param) -> Tensor"
)
_library.define(
    "dense_conv2d_backward(Tensor dz, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    "bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)"
)
# The same for a 3x3 filter with stride 1 in fp32, bf16 and fp16, by Winograd's minimal filtering, on CPU only. A tile
# is 0: 2x2, 1: 2x4, 2: 4x4 outputs. Scale and shift are in fp32. `packed` is the weight transformed by winograd_pack,
# in fp32, whose size depends on the CPU's capability; None: made for the call.
_library.define("winograd_pack(Tensor weight, int groups, int tile) -> Tensor")
_library.define(
    "winograd_conv2d(Tensor x, Tensor weight, Tensor? packed, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int[2] padding, int[2] dilation, int groups, int tile, int act, float act_param) -> Tensor"
)
_library.define(
    "winograd_conv2d_backward(Tensor dz, Tensor x, Tensor weight, int[2] padding, int[2] dilation, int groups, "
    "int dx_tile, int dweight_tile, bool need_dx, bool need_dweight) -> (Tensor dx, Tensor dweight)"
)
# Of the bytes of x, contiguous or in channels_last, see csrc/common/checksum.h.
_library.define("checksum(Tensor x) -> int")
# A copy of x [N, C, H, W] in the other memory format.
_library.define("convert_layout(Tensor x, bool channels_last) -> Tensor")
# One step of torch's LSTM cell. The gates [N, 4H] are for backward, and empty unless `save`.
_library.define(
    "lstm_cell(Tensor x, Tensor? h, Tensor? c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool save) "
    "-> (Tensor h_out, Tensor c_out, Tensor gates)"
)
# Gradients of the weights are at least fp32. Gradients that are not needed are empty.
_library.define(
    "lstm_cell_backward(Tensor? dh, Tensor? dc, Tensor x, Tensor? h, Tensor? c, Tensor w_ih, Tensor w_hh, "
    "Tensor gates, bool need_dx, bool need_dw_ih, bool need_dw_hh, bool need_dbias) "
    "-> (Tensor dx, Tensor dh_in, Tensor dc_in, Tensor dw_ih, Tensor dw_hh, Tensor dbias)"
)
# One layer and direction over whole sequences. gates, cells and products (with layer norm only) are for backward. They
# have rows as x, and are empty unless `save`.
_LSTM_ARGUMENTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor? w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor? w_hr, "
    "Tensor? lengths, Tensor? batch_sizes, Tensor? recurrent_mask, Tensor? zoneout_c_mask, Tensor? zoneout_h_mask, "
    "float zoneout_c, float zoneout_h, Tensor? ln_hh_weight, Tensor? ln_hh_bias, Tensor? ln_c_weight, "
    "Tensor? ln_c_bias, float eps, bool batch_first, bool reverse"
)


class LSTMArguments(NamedTuple):
    """The arguments that ``lstm`` and ``lstm_backward`` share, in the order of their schemas.

    Sizes: T steps, B sequences, I features of ``x``, H the hidden size, R the size of ``h`` (H, or P with ``w_hr``).
    Tensors have the dtype of ``x`` unless another is given.
    """

    x: Tensor  # [T, B, I], with batch_first [B, T, I], with batch_sizes [rows, I]
    h0: Tensor | None  # [B, R]; None: zeros; must be given with batch_sizes
    c0: Tensor | None  # [B, H]; None: zeros
    w_ih: (
        Tensor | None
    )  # [4H, I], gates in the order i, f, g, o; None: x is already the product with it, I = 4H
    w_hh: Tensor  # [4H, R]
    b_ih: Tensor | None  # [4H]
    b_hh: Tensor | None  # [4H]
    w_hr: Tensor | None  # [P, H]: the projection
    lengths: Tensor | None  # [B] int64, on x's device, for a padded x
    batch_sizes: Tensor | None  # [T] int64, on the CPU, as in a PackedSequence
    recurrent_mask: Tensor | None  # [B, R]: the factor of h before w_hh
    zoneout_c_mask: (
        Tensor | None
    )  # uint8, rows as x, H wide; 1: the unit of the cell keeps its value
    zoneout_h_mask: Tensor | None  # uint8, rows as x, R wide; 1: the unit of h keeps its value
    zoneout_c: float  # the rate, used without a mask
    zoneout_h: float
    ln_hh_weight: Tensor | None  # [4H]: layer norm of w_hh h; all four ln_* are given or none
    ln_hh_bias: Tensor | None  # [4H]
    ln_c_weight: Tensor | None  # [H]: layer norm of the cell
    ln_c_bias: Tensor | None  # [H]
    eps: float  # of the layer norms
    batch_first: bool
    reverse: bool


_library.define(
    f"lstm({_LSTM_ARGUMENTS}, bool save) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells, Tensor products)"
)
# dbias is the gradient of b_ih, of b_hh and of ln_hh_bias.
_library.define(
    f"lstm_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, {_LSTM_ARGUMENTS}, Tensor y, Tensor gates, Tensor cells, "
    "Tensor products, bool need_dx, bool need_dw_ih, bool need_dw_hh, bool need_dbias, bool need_dw_hr) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor dbias, Tensor dw_hr, "
    "Tensor dln_hh_weight, Tensor dln_c_weight, Tensor dln_c_bias)"
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


def _of_negative(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``batch_norm_act_`` for tensors with the negative bit, such as ``torch.view_as_real(z.conj())[..., 1]``.

    Torch's own fallback passes copies to every other operator, but cannot do so for one that writes two tensors.
    """
    *tensors, training = arguments[:7]
    for running in tensors[4:]:
        if training and running is not None and running.numel() > 1 and 0 in running.stride():
            raise RuntimeError(
                "batch_norm_act: running statistics that are expanded cannot be written"
            )
    resolved = [t if t is None else t.resolve_neg() for t in tensors]
    outputs = torch.ops.advdl_ops.batch_norm_act_.default(*resolved, *arguments[6:])
    for given, written in zip(tensors[4:], resolved[4:], strict=True):
        if training and given is not written:
            given.copy_(written)
    return outputs


_library.impl("batch_norm_act_", _of_negative, "Negative")


def _fake_forward(x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_devices("batch_norm_act", x, *others)
    return _kept(x), x.new_empty((2, x.shape[1]), dtype=acc_dtype(x.dtype))


@torch.library.register_fake("advdl_ops::batch_norm_act_apply", lib=_library)
def _(x, residual, weight, bias, stats, *options):
    _check_devices("batch_norm_act_apply", x, residual, weight, bias, stats)
    return _kept(x)


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


@torch.library.register_fake("advdl_ops::batch_norm_moments", lib=_library)
def _(x):
    return x.new_empty((2, x.shape[1]), dtype=acc_dtype(x.dtype))


@torch.library.register_fake("advdl_ops::batch_norm_act_input_gradient", lib=_library)
def _(dout, x, saved, weight, bias, stats, means, *options):
    _check_devices("batch_norm_act_input_gradient", dout, x, saved, weight, bias, stats, means)
    return _kept(x)


@torch.library.register_fake("advdl_ops::group_norm", lib=_library)
def _(x, residual, weight, bias, groups, eps, act, act_param):
    _check_devices("group_norm", x, residual, weight, bias)
    sets = x.shape[0] * (groups or math.prod(x.shape[2:]))
    return _kept(x), x.new_empty((2, sets), dtype=acc_dtype(x.dtype))


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


@torch.library.register_fake("advdl_ops::conv2d", lib=_library)
def _(x, weight, scale, shift, residual, stride, padding, dilation, groups, act, act_param):
    _check_devices("conv2d", x, weight, scale, shift, residual)
    return _fake_conv2d(x, weight, stride, padding, dilation)


@torch.library.register_fake("advdl_ops::conv2d_backward", lib=_library)
def _(dz, x, weight, stride, padding, dilation, groups, need_dx, need_dweight, need_dbias):
    return _fake_conv2d_backward(x, weight, need_dx, need_dweight, need_dbias)


@torch.library.register_fake("advdl_ops::depthwise_conv2d", lib=_library)
def _(x, weight, scale, shift, residual, stride, padding, dilation, act, act_param):
    _check_devices("depthwise_conv2d", x, weight, scale, shift, residual)
    return _fake_conv2d(x, weight, stride, padding, dilation)


@torch.library.register_fake("advdl_ops::depthwise_conv2d_backward", lib=_library)
def _(dz, x, weight, stride, padding, dilation, need_dx, need_dweight, need_dbias):
    return _fake_conv2d_backward(x, weight, need_dx, need_dweight, need_dbias)


@torch.library.register_fake("advdl_ops::dense_conv2d", lib=_library)
def _(x, weight, shift, residual, stride, padding, dilation, act, act_param):
    return _fake_conv2d(x, weight, stride, padding, dilation)


@torch.library.register_fake("advdl_ops::dense_conv2d_backward", lib=_library)
def _(dz, x, weight, stride, padding, dilation, need_dx, need_dweight):
    return _fake_conv2d_backward(x, weight, need_dx, need_dweight, False)[:2]


@torch.library.register_fake("advdl_ops::winograd_conv2d", lib=_library)
def _(x, weight, packed, scale, shift, residual, padding, dilation, groups, tile, act, act_param):
    return _fake_conv2d(x, weight, (1, 1), padding, dilation)


@torch.library.register_fake("advdl_ops::winograd_conv2d_backward", lib=_library)
def _(dz, x, weight, padding, dilation, groups, dx_tile, dweight_tile, need_dx, need_dweight):
    return _fake_conv2d_backward(x, weight, need_dx, need_dweight, False)[:2]


@torch.library.register_fake("advdl_ops::convert_layout", lib=_library)
def _(x, channels_last):
    return torch.empty_like(
        x, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def _fake_conv2d(x, weight, stride, padding, dilation):
    return torch.empty(
        conv2d_shape(x.shape, weight.shape, stride, padding, dilation),
        dtype=x.dtype,
        device=x.device,
        memory_format=conv2d_format(x),
    )


def _fake_conv2d_backward(x, weight, need_dx, need_dweight, need_dbias):
    return (
        torch.empty_like(x, memory_format=conv2d_format(x)) if need_dx else x.new_empty(0),
        torch.empty_like(weight, dtype=acc_dtype(x.dtype), memory_format=conv2d_format(weight))
        if need_dweight
        else x.new_empty(0, dtype=acc_dtype(x.dtype)),
        x.new_empty(weight.shape[0] if need_dbias else 0, dtype=acc_dtype(x.dtype)),
    )


def conv2d_shape(
    x: Sequence[int], weight: Sequence[int], stride: Any, padding: Any, dilation: Any
) -> tuple[int, int, int, int]:
    """The shape ``[N, C_out, H_out, W_out]`` of a convolution, from the shapes of x and weight; options are pairs."""
    batch, _, height, width = x
    outputs, _, kernel_h, kernel_w = weight
    return (
        batch,
        outputs,
        (height + 2 * padding[0] - dilation[0] * (kernel_h - 1) - 1) // stride[0] + 1,
        (width + 2 * padding[1] - dilation[1] * (kernel_w - 1) - 1) // stride[1] + 1,
    )


def conv2d_format(x: Tensor) -> torch.memory_format:
    """The memory format of a convolution's output: channels_last if ``x`` [N, C, H, W] is that and not contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


@torch.library.register_fake("advdl_ops::lstm_cell", lib=_library)
def _(x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    _check_devices("lstm_cell", x, h, c, w_ih, w_hh, b_ih, b_hh)
    batch, hidden = x.shape[0], w_hh.shape[1]
    gates = x.new_empty((batch, 4 * hidden)) if save else x.new_empty(0)
    return x.new_empty((batch, hidden)), x.new_empty((batch, hidden)), gates


@torch.library.register_fake("advdl_ops::lstm_cell_backward", lib=_library)
def _(dh, dc, x, h, c, w_ih, w_hh, gates, need_dx, need_dw_ih, need_dw_hh, need_dbias):
    batch, hidden = x.shape[0], w_hh.shape[1]
    return (
        x.new_empty(x.shape if need_dx else 0),
        x.new_empty((batch, hidden)),
        x.new_empty((batch, hidden)),
        x.new_empty(w_ih.shape if need_dw_ih else 0, dtype=acc_dtype(x.dtype)),
        x.new_empty(w_hh.shape if need_dw_hh else 0, dtype=acc_dtype(x.dtype)),
        x.new_empty(4 * hidden if need_dbias else 0, dtype=acc_dtype(x.dtype)),
    )


@torch.library.register_fake("advdl_ops::lstm", lib=_library)
def _(*given):
    a, save = LSTMArguments(*given[:-1]), given[-1]
    on_device = a._replace(batch_sizes=None)
    _check_devices("lstm", a.x, *[t for t in on_device if isinstance(t, Tensor)])
    x, hidden, size = a.x, a.w_hh.shape[0] // 4, a.w_hh.shape[1]
    batch = _lstm_batch(a)
    return (
        x.new_empty((*x.shape[:-1], size)),
        x.new_empty((batch, size)),
        x.new_empty((batch, hidden)),
        x.new_empty((*x.shape[:-1], 4 * hidden) if save else 0),
        x.new_empty((*x.shape[:-1], hidden) if save else 0),
        x.new_empty((*x.shape[:-1], 4 * hidden) if save and a.ln_hh_weight is not None else 0),
    )


@torch.library.register_fake("advdl_ops::lstm_backward", lib=_library)
def _(dy, dh_n, dc_n, *given):
    a = LSTMArguments(*given[: len(LSTMArguments._fields)])
    need_dx, need_dw_ih, need_dw_hh, need_dbias, need_dw_hr = given[-5:]
    x, hidden, size, acc = a.x, a.w_hh.shape[0] // 4, a.w_hh.shape[1], acc_dtype(a.x.dtype)
    batch = _lstm_batch(a)
    norm = a.ln_hh_weight is not None

    def gradient(weight, wanted):
        return x.new_empty(weight.shape if wanted and weight is not None else 0, dtype=acc)

    return (
        x.new_empty(x.shape if need_dx else 0),
        x.new_empty((batch, size)),
        x.new_empty((batch, hidden)),
        gradient(a.w_ih, need_dw_ih),
        gradient(a.w_hh, need_dw_hh),
        x.new_empty(4 * hidden if need_dbias else 0, dtype=acc),
        gradient(a.w_hr, need_dw_hr),
        x.new_empty(4 * hidden if norm else 0, dtype=acc),
        x.new_empty(hidden if norm else 0, dtype=acc),
        x.new_empty(hidden if norm else 0, dtype=acc),
    )


def _lstm_batch(a: LSTMArguments) -> int:
    if a.batch_sizes is None:
        return a.x.shape[0 if a.batch_first else 1]
    # The number of sequences is batch_sizes[0], but a fake function may not read values.
    assert a.h0 is not None, "lstm: h0 must be given beside batch_sizes"
    return a.h0.shape[0]


def _check_devices(function: str, x: Tensor, *others: Tensor | None) -> None:
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(f"{function}: tensors on {x.device} and on {t.device}")


HALF = torch.bfloat16, torch.float16


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _kept(x: Tensor) -> Tensor:
    """An output with ``x``'s strides if the kernels read x without a copy ([N, C, S] or [N, S, C]), else contiguous."""
    dense = x.is_contiguous() or (x.dim() > 2 and x.movedim(1, -1).is_contiguous())
    return (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        if dense
        else x.new_empty(x.shape)
    )
