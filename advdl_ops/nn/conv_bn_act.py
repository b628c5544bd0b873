"""Convolution, batch norm and activation as one layer; in evaluation as one op."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .._schemas import conv2d_format, conv2d_shape
from .._stock_faults import sees_nothing
from ..activation import IDENTITY, Activation, resolve_activation
from ..functional._conv2d_cpu import Conv, convert, onednn_conv_act, pair, prepack, uses_onednn
from ..functional._epilogue import epilogue
from ..functional._norm import check_per_channel, check_residual
from ..functional.conv_bn_act import ORDERS, folds, may_give_statistics, scale_and_shift
from ..functional.conv_bn_act import conv_bn_act as functional_conv_bn_act
from .batch_norm_act import BatchNormAct2d
from .conv2d import Conv2d, padded_input, same_padding


class ConvBNAct(torch.nn.Module):
    """``act(bn(conv(x)) + residual)`` over ``[N, C, H, W]``.

    ``.conv`` is a :class:`Conv2d`, ``.bn`` a :class:`BatchNormAct2d` (timm's names and ``state_dict`` keys).

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, padding_mode: as :class:`torch.nn.Conv2d`.
        padding: ``None`` keeps height and width at stride 1 (odd kernels): ``dilation * (kernel_size - 1) // 2``.
        bias: the convolution's own; off, as the norm takes it away again.
        act: see :class:`BatchNormAct2d`.
        order: ``"conv-bn-act"``, or ``"conv-act-bn"`` for ``bn(act(conv(x))) + residual``.
        eps, momentum, affine, track_running_stats: as :class:`torch.nn.BatchNorm2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | str | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | Activation | torch.nn.Module | None = None,
        order: str = "conv-bn-act",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
    ) -> None:
        name = type(self).__name__
        activation = resolve_activation(name, act)
        if order not in ORDERS:
            raise ValueError(f"{name}: order ({order!r}) must be one of {', '.join(ORDERS)}")
        super().__init__()
        inside, outside = (
            (IDENTITY, activation) if order == "conv-bn-act" else (activation, IDENTITY)
        )
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            same_padding(name, kernel_size, dilation) if padding is None else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            act=inside,
        )
        self.bn = BatchNormAct2d(
            out_channels,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            act=outside,
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` ``[N, C_in, H, W]``, ``residual`` of the output's shape -> ``[N, C_out, H_out, W_out]``."""
        return conv_bn_act(self.conv, self.bn, x, residual)

    def extra_repr(self) -> str:
        return "" if self.conv.act.code == 0 else "order='conv-act-bn'"


class ConvBNReLU(ConvBNAct):
    """:class:`ConvBNAct` with ``act="relu"``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "act" in kwargs:
            raise TypeError("ConvBNReLU: act is fixed to 'relu'; use ConvBNAct for another one")
        super().__init__(*args, act="relu", **kwargs)


def conv_bn_act(
    conv: torch.nn.Conv2d,
    bn: BatchNormAct2d,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    act: str | Activation | torch.nn.Module | None = None,
) -> Tensor:
    """``bn(conv(x), residual)`` for sibling layers; in evaluation without gradients, one convolution.

    Args:
        conv, bn: left as they are; hooks on either, and an activation of ``conv``, are honoured by calling the two one
            after the other.
        x: ``[N, C_in, H, W]``.
        residual: of the output's shape, or ``None``.
        act: in place of ``bn``'s own.
    """
    # `explain` finds a call of this function, and by these names what it was given.
    activation = resolve_activation("conv_bn_act", bn.act if act is None else act)
    if (
        (bn.training or bn.running_mean is None)
        and isinstance(conv, Conv2d)
        and _plain(conv, bn)
        and may_give_statistics(x, conv.weight, conv.bias, conv.groups)
    ):
        bn.folded = None
        return bn.forward_by(
            functools.partial(_convolved_and_normalized, conv), x, residual, activation
        )
    source = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    if bn.training or not evaluates_as_one(conv, bn, x, residual, source):
        bn.folded = None
        # A layer of another class put here, which knows no activation, has none to pass over.
        further = {} if act is None else {"act": activation}
        return bn(conv(x), residual, **further)
    x, options = _padded(conv, x)
    if not _packs(conv, x, options):
        return functional_conv_bn_act(
            x, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, bias=conv.bias,
            **options._asdict(), eps=bn.eps, residual=residual, act=activation,
        )  # fmt: skip
    # Read once: another thread may drop it meanwhile.
    folded = bn.folded
    if folded is None or not folded.serves(x, source, bn.eps, options):
        bn.folded = folded = FoldedConv(x, source, bn.eps, options)
    return folded(x, residual, activation)


def evaluates_as_one(
    conv: torch.nn.Conv2d,
    bn: BatchNormAct2d,
    x: Tensor,
    residual: Tensor | None,
    source: tuple[Tensor | None, ...],
) -> bool:
    """Whether in evaluation the norm becomes part of the convolution; ``source``: the tensors of both."""
    return (
        bn.running_mean is not None
        and x.dim() == 4
        and _plain(conv, bn)
        and folds(x, conv.weight, conv.groups, residual, *source)
    )


def _padded(conv: torch.nn.Conv2d, x: Tensor) -> tuple[Tensor, Conv]:
    """What the functional convolution takes: zero padding alone is left to it."""
    x, padding = padded_input(conv, x)
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if isinstance(padding, str) and left == right and top == bottom:
        padding = top, left
    return x, Conv(conv.stride, padding, conv.dilation, conv.groups)


def _convolved_and_normalized(
    conv: Conv2d,
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    **extras: Any,
) -> Tensor:
    """``conv`` and then :func:`.functional.batch_norm_act`, whose arguments follow ``x``, the input of ``conv``."""
    x, options = _padded(conv, x)
    return functional_conv_bn_act(
        x, conv.weight, mean, var, weight, bias, bias=conv.bias, **options._asdict(),
        training=training, momentum=momentum, eps=eps, **extras,
    )  # fmt: skip


def _packs(conv: torch.nn.Conv2d, x: Tensor, options: Conv) -> bool:
    """Whether oneDNN serves, whose weight has the norm's scale in it and a layout of its own: worth keeping.

    FSDP gathers a weight anew for each call: kept, the folded one would undo the sharding, and neither the version nor
    the address of what was gathered says that the shards have changed.
    """
    if not uses_onednn(x, conv.weight, options) or "_is_fsdp_managed_module" in conv.__dict__:
        return False
    if sees_nothing(x, conv.weight, *options[:3]):
        return False
    if not conv.groups == conv.in_channels == conv.out_channels:
        return True
    # The depthwise kernel is faster, but for short rows in contiguous memory. Packed -> own, in us on one core with
    # AVX-512, 3x3 and relu: contiguous 8x64x56x56: 5655 -> 1764, 8x256x14x14: 705 -> 466, 8x256x10x10: 362 -> 359,
    # 8x512x7x7: 414 -> 538; channels_last 8x64x56x56 with silu: 2236 -> 2212, 8x256x14x14: 275 -> 253.
    short = x.shape[3] <= _SHORT_ROW * pair(conv.stride)[1]
    return short and conv2d_format(x) == torch.contiguous_format


_SHORT_ROW = 8


class FoldedConv:
    """A convolution of oneDNN with the norm folded into its weight and bias, and what it was made from.

    Fused optimizers and writes through ``.data`` move neither version counters nor pointers, so the key also
    holds values: all of the ``[C_out]`` tensors, and of the convolution's weight one value per output channel. A
    write through ``.data`` to single other elements of that weight is not seen: call ``eval()`` after it.
    """

    def __init__(
        self, x: Tensor, source: tuple[Tensor | None, ...], eps: float, options: Conv
    ) -> None:
        weight, bias, running_mean, running_var, bn_weight, bn_bias = source
        assert weight is not None
        scale, shift = scale_and_shift(
            x, weight.shape[0], running_mean, running_var, bn_weight, bn_bias, eps
        )
        check_per_channel("conv_bn_act", x, weight.shape[0], bias=bias)
        self.packed = _packing_pays(x, weight)
        self.weight = weight * scale.view(-1, 1, 1, 1)
        if self.packed:
            self.weight = prepack(x, self.weight, options)
        self.bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        self.options = options
        self.identity = _identity(source, eps, options)
        self.sample = _sample(source)

    def serves(
        self, x: Tensor, source: tuple[Tensor | None, ...], eps: float, options: Conv
    ) -> bool:
        """Whether the folded weight still stands for ``source``, in the form that ``x`` asks for."""
        assert source[0] is not None
        return (
            self.packed == _packing_pays(x, source[0])
            and self.identity == _identity(source, eps, options)
            and torch.equal(self.sample, _sample(source))
        )

    def __call__(self, x: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
        """``act(conv(x) + residual)`` in ``x``'s memory format.

        As in what Inductor makes of a frozen network, oneDNN's relu and relu6, where the weight is packed, give 0 for
        NaN.
        """
        if residual is not None:
            stride, padding, dilation = (pair(option) for option in self.options[:3])
            shape = conv2d_shape(x, self.weight.shape, stride, padding, dilation)
            check_residual("conv_bn_act", residual, shape, x.device)
        if self.packed:
            out = onednn_conv_act(x, self.weight, self.bias, self.options, residual, act)
        else:
            stride, padding, dilation, groups = self.options
            z = torch.nn.functional.conv2d(
                x, self.weight, self.bias, stride, padding, dilation, groups
            )
            out = epilogue(z, None, None, residual, act)
        return convert(out, conv2d_format(x))


def _packing_pays(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's fused call is the faster one.

    It answers in channels_last: of contiguous images that are larger than the weight, the conversion takes longer than
    what it saves. ResNet-50's 53 layers at 8x3x224x224, contiguous, 2 threads: 304 ms by it, 277 by torch's call; in
    channels_last 239.
    """
    return conv2d_format(x) == torch.channels_last or weight.numel() >= x.numel()


def _identity(source: tuple[Tensor | None, ...], eps: float, options: Conv) -> tuple[Any, ...]:
    return eps, options, *(None if t is None else (t.data_ptr(), _version(t)) for t in source)


def _version(t: Tensor) -> Any:
    # Inference tensors count no versions: what is folded from one serves one call.
    return object() if t.is_inference() else t._version


def _sample(source: tuple[Tensor | None, ...]) -> Tensor:
    weight = source[0]
    assert weight is not None
    # By its indices: to flatten a weight in channels_last would copy all of it.
    channel, row, column = (size // 2 for size in weight.shape[1:])
    middle = weight[:, channel, row, column]
    return torch.cat([middle, *(t for t in source[1:] if t is not None)])


def _plain(conv: torch.nn.Conv2d, bn: BatchNormAct2d) -> bool:
    """Whether calling ``conv`` and ``bn`` does nothing but their own arithmetic: no hook, no other ``forward``."""
    return (
        _is_convolution_alone(conv)
        and type(bn).forward is BatchNormAct2d.forward
        and not {"forward", "_conv_forward"} & conv.__dict__.keys()
        and "forward" not in bn.__dict__
        # Parametrized weights are made anew in every call.
        and "weight" in conv._parameters
        and "weight" in bn._parameters
        and not (conv._forward_hooks or conv._forward_pre_hooks)
        and not (bn._forward_hooks or bn._forward_pre_hooks)
        and not (_global_forward_hooks or _global_forward_pre_hooks)
    )


def _is_convolution_alone(conv: torch.nn.Conv2d) -> bool:
    if type(conv).forward is Conv2d.forward:
        own = type(conv)._conv_forward is Conv2d._conv_forward
        return own and isinstance(conv, Conv2d) and conv.act.code == 0
    return (
        type(conv).forward is torch.nn.Conv2d.forward
        and type(conv)._conv_forward is torch.nn.Conv2d._conv_forward
    )
