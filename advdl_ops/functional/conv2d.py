"""2-D convolution, dilated and depthwise too, with scale, shift, residual addition and activation as one op.

Dilated: Yu & Koltun 2016 (arXiv:1511.07122). Depthwise: Howard et al. 2017 (arXiv:1704.04861).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _lean, reference
from .._conv import choice, operators
from .._conv.choice import Candidate
from .._conv.epilogue import activated, normalized, unit_statistics
from .._conv.problem import (
    FORWARD,
    Conv,
    Epilogue,
    call_key,
    check_groups,
    has_format,
    padded_by,
    pair_of,
    problem_of,
)
from .._lean import Kind
from .._schemas import acc_dtype, conv2d_shape
from .._stock_faults import convolution, sees_nothing
from ..activation import IDENTITY, Activation, resolve_activation
from ..backend import (
    autocast_dtype,
    cast,
    fixed,
    is_exported,
    needs_grad,
    serves_native,
    unwatched,
)
from ..reference.activation import finished
from ._norm import (
    HALF,
    Z_INPUT,
    Z_OUTPUT,
    Z_RESIDUAL,
    check_floating,
    check_per_channel,
    check_residual,
    check_tensors,
    gradient_like,
    gradients_with_graph,
    without_relu,
)

_NAME = "conv2d"
_NO_EPILOGUE = Epilogue()


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    act: str | Activation | torch.nn.Module | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""``act((conv2d(x) + bias) * scale + shift + residual)``; arguments as of :func:`torch.nn.functional.conv2d`.

    .. math:: y_{n,o,p} = \mathrm{act}\Big(\Big(\sum_{c,k} w_{o,c,k}\, x_{n,c,sp + dk - q} + b_o\Big) \gamma_o + \beta_o
        + r_{n,o,p}\Big)

    with stride s, dilation d and padding q by zeros; c runs over the channels of the group of o.

    Args:
        input: x, ``[N, C_in, H, W]`` or ``[C_in, H, W]``; fp32, fp64, bf16 or fp16; contiguous or channels_last (kept;
            other strides give a contiguous result). Complex numbers are left to torch.
        weight: ``[C_out, C_in / groups, kH, kW]`` in ``x``'s dtype.
        bias: ``[C_out]`` or ``None``; in ``x``'s dtype, or fp32 with a half-precision ``x``, as scale and shift.
        stride, dilation: >= 1, one number or (height, width).
        padding: >= 0, one number or (height, width), or ``"valid"`` (none), or ``"same"`` (stride 1: the output has
            ``x``'s size).
        groups: divides ``C_in`` and ``C_out``; if it equals both, depthwise kernels serve.
        act: ``None``, a name or a ``torch.nn`` module, see :func:`.resolve_activation`.
        residual: of the output's shape and dtype, added before the activation.
        scale, shift: ``[C_out]`` or ``None``; for example a norm with fixed statistics.

    Returns:
        ``[N, C_out, H_out, W_out]`` (or without N, as ``x``) in ``x``'s memory format and dtype;
        ``H_out = (H + 2 padding - dilation (kH - 1) - 1) // stride + 1``. Under autocast in the autocast dtype.

    Raises:
        RuntimeError: shapes that do not fit together, ``groups`` that do not divide the channels, a kernel larger than
            the padded ``x``, a stride, padding or dilation out of range, an unknown padding, ``"same"`` with a stride,
            mixed dtypes or devices; of a non-floating ``x`` its subclass ``NotImplementedError``.
        ValueError: an unknown ``act``, ``residual`` of another shape.
        TypeError: an option that is not an integer, or an argument that must be a tensor and is not.

    Saved for backward are ``x`` and the weight; for relu the output; for the other activations, and if ``scale``
    needs a gradient, the result of the convolution alone and the residual.
    """
    x = input
    activation = act if type(act) is Activation else resolve_activation(_NAME, act)
    # Complex numbers are torch's alone.
    if isinstance(x, Tensor) and x.is_complex() and scale is None and shift is None:
        z = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return finished(z, residual, activation)
    x, weight, bias, epilogue = _in_autocast_dtype(
        x, weight, bias, Epilogue(scale, shift, residual, activation)
    )
    unbatched = x.dim() == 3
    if unbatched:
        x = x.unsqueeze(0)
        if residual is not None:
            epilogue = epilogue._replace(residual=epilogue.residual.unsqueeze(0))  # type: ignore[union-attr]
    x, conv = _checked(x, weight, bias, Conv(stride, padding, dilation, groups), epilogue)
    out = convolved(x, weight, bias, conv, epilogue)
    return out.squeeze(0) if unbatched else out


def prepared(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Conv
) -> tuple[Tensor, Tensor, Tensor | None, Conv]:
    """The arguments of :func:`conv2d` checked, cast under autocast and padded if needed; ``x`` is 4-dimensional."""
    x, weight, bias, epilogue = _in_autocast_dtype(x, weight, bias, Epilogue())
    x, conv = _checked(x, weight, bias, options, epilogue)
    return x, weight, bias, conv


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, epilogue: Epilogue = _NO_EPILOGUE
) -> Tensor:
    """:func:`conv2d` with the arguments that :func:`prepared` returns."""
    scale, shift, residual, act = epilogue
    if is_exported() and scale is None and shift is None:
        return finished(convolution(x, weight, bias, *conv), residual, act)
    if not serves_native(_NAME, x):
        return reference.conv2d(x, weight, bias, *conv, scale, shift, residual, act)
    scale, shift = _with_bias(x, bias, scale, shift)
    tensors = x, weight, scale, shift, residual
    if not needs_grad(*tensors):
        return _forward(x, weight, conv, Epilogue(scale, shift, residual, act))
    if torch.compiler.is_compiling():
        return Conv2dFunction.apply(*tensors, fixed((conv, act)))
    if scale is None and residual is None and _torch_derives_as_well(x, weight, shift, conv, act):
        out = activated(F.conv2d(x, weight, shift, *conv), act, in_place=act.name == "relu")
    else:
        out = _apply_eagerly(*tensors, (conv, act))
    if scale is residual is None and act.code == 0 and _is_made_again(x, weight):
        _lean.offer(
            Kind.PRODUCT,
            out,
            lambda x, weight, shift: _forward(x, weight, conv, Epilogue(None, shift, None, act)),
            x,
            weight,
            shift,
        )
    return out


def _is_made_again(x: Tensor, weight: Tensor) -> bool:
    """Whether backward may compute a convolution again, in lean training: few products make many outputs."""
    outputs, inputs, *size = weight.shape
    return inputs == x.shape[1] < outputs and max(size) == 1 and _lean.makes_again(Kind.PRODUCT)


def convolved_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, candidate: Candidate
) -> tuple[Tensor, Tensor]:
    """As :func:`convolved`, on CUDA, and the statistics of the output, which are not differentiable.

    They are fp32 ``[2, C_out]``, see :func:`.cuda.triton_forward_with_statistics`.
    """
    out, statistics = _apply_with_statistics(
        x, weight, None, bias, None, (conv, IDENTITY), candidate
    )
    if _is_made_again(x, weight):

        def again(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return candidate.run(x, weight, conv, bias)[0]

        _lean.offer(Kind.PRODUCT, out, again, x, weight, bias)
    return out, statistics


def _in_autocast_dtype(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: Epilogue
) -> tuple[Tensor, Tensor, Tensor | None, Epilogue]:
    """The tensors in the dtypes of autocast."""
    scale, shift, residual, act = epilogue
    check_tensors(_NAME, x=x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual)
    if weight is None or x is None:
        raise TypeError(f"{_NAME}: {'x' if x is None else 'weight'} (None) must be a Tensor")
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, weight, bias, epilogue
    # The [C_out] tensors may stay in fp32.
    bias, scale, shift = (
        t if t is None or t.dtype == torch.float32 else cast(t, dtype) for t in (bias, scale, shift)
    )
    residual = None if residual is None else cast(residual, dtype)
    return cast(x, dtype), cast(weight, dtype), bias, Epilogue(scale, shift, residual, act)


def _checked(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: Conv, epilogue: Epilogue
) -> tuple[Tensor, Conv]:
    """``x``, padded if the padding of its two sides differs, and the options as pairs of integers."""
    if x.dim() != 4 or weight.dim() != 4:
        name, t, what = (
            ("weight", weight, "[C_out, C_in / groups, kH, kW]")
            if weight.dim() != 4
            else ("x", x, "[N, C_in, H, W] or [C_in, H, W]")
        )
        raise RuntimeError(f"{_NAME}: {name} (shape {tuple(t.shape)}) must be {what}")
    stride = pair_of(_NAME, "stride", options.stride, 1)
    dilation = pair_of(_NAME, "dilation", options.dilation, 1)
    x, padding = padded_by(_NAME, x, weight, options.padding, stride, dilation)
    conv = Conv(stride, padding, dilation, options.groups)
    _check(x, weight, bias, conv, epilogue)
    return x, conv


_Options = tuple[Conv, Activation]

_op = torch.ops.advdl_ops.conv2d.default
_backward_op = torch.ops.advdl_ops.conv2d_backward.default
_epilogue_backward_op = torch.ops.advdl_ops.batch_norm_act_backward.default


def _forward(x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue) -> Tensor:
    scale, shift, residual, act = epilogue
    # The operator is Python. A direct call, without the dispatcher, takes half of the time.
    if unwatched(x, weight, scale, shift, residual):
        return operators.forward(x, weight, conv, epilogue)
    return _op(x, weight, scale, shift, residual, *conv, act.code, act.param)


def _backward(
    dz: Tensor, x: Tensor, weight: Tensor, conv: Conv, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    if unwatched(dz, x, weight):
        return operators.backward(dz, x, weight, conv, needs)
    return _backward_op(dz, x, weight, *conv, *needs)


def _torch_derives_as_well(
    x: Tensor, weight: Tensor, shift: Tensor | None, conv: Conv, act: Activation
) -> bool:
    """Whether torch's convolution and activation, two autograd nodes in C++, save and compute the same as the Function.

    They do if torch, in the format of ``x``, is the choice for every direction. Half precision and channels_last are
    excluded: there oneDNN is slow for the gradient of a bias, and a weight in another format than ``x`` would determine
    the output's.
    """
    if not x.is_cpu:
        return False
    if not unwatched(x, weight):  # a tracer's sizes may be symbolic, and cannot be a key
        return bool(_is_as_good_as_torchs(x, weight, shift, conv, act))
    key = "torch", call_key(x, weight, conv), shift is None, act.name
    found = choice.plans.get(key)
    if found is None:
        found = _is_as_good_as_torchs(x, weight, shift, conv, act)
        if found is not None:
            choice.keep(key, x, found)
    return bool(found)


def _is_as_good_as_torchs(
    x: Tensor, weight: Tensor, shift: Tensor | None, conv: Conv, act: Activation
) -> bool | None:
    """As :func:`_torch_derives_as_well`; ``None`` if that is still to be measured."""
    return (
        x.dtype not in HALF
        and has_format(x, torch.contiguous_format)
        and has_format(weight, torch.contiguous_format)
        and choice.is_torchs(
            problem_of(FORWARD, x, weight, conv, Epilogue(shift=shift, act=act).name())
        )
        and not sees_nothing(x, weight, *conv[:3])
    )


class Conv2dFunction(torch.autograd.Function):
    """Gradients of ``conv2d``.

    ``saved`` is what backward needs for the pre-activation: nothing without an activation; relu's output; else ``z``,
    the result of the convolution alone, and the residual. ``z`` is also saved if the scale needs a gradient. The
    epilogue is the norm's kernel in evaluation, with mean 0 and variance 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        options: _Options,
    ) -> Tensor:
        conv, act = options
        by_output = act.name == "relu"
        z = saved = None
        ctx.z_source = Z_INPUT
        if ctx.needs_input_grad[2] or not (act.code == 0 or by_output):
            # Keeps the parameter of act: another float would become an input of a compiler's graph.
            alone = IDENTITY._replace(param=act.param)
            z = _forward(x, weight, conv, Epilogue(act=alone))
            out = normalized(z, scale, shift, residual, act)
            if residual is not None and act.code != 0 and not by_output:
                saved, ctx.z_source = residual, Z_RESIDUAL
        else:
            out = _forward(x, weight, conv, Epilogue(scale, shift, residual, act))
        if by_output and (z is None or residual is not None):
            saved, ctx.z_source = out, Z_OUTPUT
        # The shift is saved only if the pre-activation is recomputed from z.
        kept = None if z is None else shift
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.save_for_backward(x, weight, scale, kept, z, saved)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        x, weight, scale, shift, z, saved = ctx.saved_tensors
        (conv, act), needs = ctx.options, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return (*_differentiable_gradients(ctx, dout), None)
        dscale = dshift = None
        dz = dresidual = dout
        if act.code != 0 or scale is not None:
            stats = unit_statistics(weight.shape[0], dout).stats
            # If relu's output is saved, or without an activation, z only matters for the gradient of the scale.
            of_z = z if z is not None else saved if saved is not None else dout
            # Without a scale or without an activation, the two gradients can share a tensor.
            writes_both = needs[4] and scale is not None and act.code != 0
            dz, dresidual, dscale, dshift = _epilogue_backward_op(
                dout, of_z, saved, scale, shift, stats, False, act.code, act.param, ctx.z_source,
                True, writes_both,
            )  # fmt: skip
            if not writes_both:
                dresidual = dz if scale is None else dout
        # Without a scale, the sum of dz is the gradient of the shift.
        wanted = needs[0], needs[1], needs[3] and dshift is None
        dx = dweight = dbias = None
        if any(wanted):
            dx, dweight, dbias = _backward(dz, x, weight, conv, wanted)
        return (
            dx if needs[0] else None,
            gradient_like(dweight, weight) if needs[1] else None,
            gradient_like(dscale, scale) if needs[2] else None,
            _of_shift(ctx, dbias if dshift is None else dshift) if needs[3] else None,
            dresidual if needs[4] else None,
            None,
        )


class Conv2dWithStatisticsFunction(Conv2dFunction):
    """The convolution with only a shift, and the statistics of its output."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: None,
        shift: Tensor | None,
        residual: None,
        options: _Options,
        candidate: Candidate,
    ) -> tuple[Tensor, Tensor]:
        out, statistics = candidate.run(x, weight, options[0], shift)
        ctx.save_for_backward(x, weight, None, None, None, None)
        ctx.options, ctx.z_source = options, Z_INPUT
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return out, statistics

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * 7
        return *Conv2dFunction.backward(ctx, dout), None


def _of_shift(ctx: Any, grad: Tensor | None) -> Tensor:
    """The gradient of the shift in the shift's dtype. The shift itself is not always saved, but its dtype is."""
    assert grad is not None
    return grad if grad.dtype == ctx.shift_dtype else grad.to(ctx.shift_dtype)


# Function.apply without torch's Python wrapper, which checks for functorch transforms, as serves_native has done.
_apply_eagerly = super(torch.autograd.Function, Conv2dFunction).apply
_apply_with_statistics = super(torch.autograd.Function, Conv2dWithStatisticsFunction).apply


def _differentiable_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    """What backward returns under ``create_graph=True``, computed with differentiable torch operators."""
    x, weight, scale, shift, _, saved = ctx.saved_tensors
    conv: Conv = ctx.options[0]
    act = ctx.options[1]
    dout, act, residual = without_relu(dout, act, saved, ctx.z_source)

    def forward(x, weight, scale, shift, residual):
        return reference.conv2d(x, weight, None, *conv, scale, shift, residual, act)

    gradients = gradients_with_graph(forward, (x, weight, scale, shift, residual), dout)
    # Shift and residual that were not saved are added after the remaining activation: their gradients follow from dout.
    if shift is None and ctx.shift_dtype is not None:
        gradients[3] = _of_shift(ctx, dout.sum((0, 2, 3), dtype=acc_dtype(dout.dtype)))
    if residual is None:
        gradients[4] = dout
    needs = ctx.needs_input_grad[:5]
    return tuple(g if n else None for g, n in zip(gradients, needs, strict=True))


def _with_bias(
    x: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Merges the bias into scale and shift, both in one dtype."""
    acc = acc_dtype(x.dtype)
    if bias is not None:
        if scale is None and shift is None:
            return None, bias
        bias = bias.to(acc) if scale is None else bias.to(acc) * scale.to(acc)
        shift = bias if shift is None else shift.to(acc) + bias
    if scale is not None and shift is not None and scale.dtype != shift.dtype:
        scale, shift = scale.to(acc), shift.to(acc)
    return scale, shift


# ---- checks ----


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv, epilogue: Epilogue) -> None:
    (_, padding, dilation, groups), (scale, shift, residual, _) = conv, epilogue
    check_groups(_NAME, groups)
    channels, outputs = x.shape[1], weight.shape[0]
    for of, count in (("channels", channels), ("channels of the output", outputs)):
        if count % groups != 0:
            raise RuntimeError(f"{_NAME}: groups ({groups}) must divide the {of} ({count})")
    if weight.shape[1] * groups != channels:
        raise RuntimeError(
            f"{_NAME}: x (shape {tuple(x.shape)}) must have {weight.shape[1] * groups} channels for "
            f"weight (shape {tuple(weight.shape)}) and groups ({groups})"
        )
    if outputs == 0 or 0 in weight.shape[2:]:
        raise RuntimeError(
            f"{_NAME}: weight (shape {tuple(weight.shape)}) must have an output channel and a kernel of size 1 at least"
        )
    check_floating(_NAME, "x", x)
    if weight.dtype != x.dtype or weight.device != x.device:
        raise RuntimeError(
            f"{_NAME}: weight ({weight.dtype} on {weight.device}) must be of x's dtype and on its device "
            f"({x.dtype} on {x.device})"
        )
    shape = conv2d_shape(x.shape, weight.shape, *conv[:3])
    if shape[2] < 1 or shape[3] < 1:
        raise RuntimeError(
            f"{_NAME}: weight (shape {tuple(weight.shape)}, dilation {dilation}) must not be larger than the padded x "
            f"(shape {tuple(x.shape)}, padding {padding})"
        )
    check_per_channel(_NAME, x, outputs, bias=bias, scale=scale, shift=shift)
    if residual is not None:
        check_residual(_NAME, residual, shape, x.device)
        if residual.dtype != x.dtype:
            raise RuntimeError(
                f"{_NAME}: residual (dtype {residual.dtype}) must be of x's dtype ({x.dtype})"
            )
