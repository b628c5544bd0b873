"""Convolution, batch norm and activation as one layer, and in evaluation as one op if the norm can be folded."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .._conv.folded import FoldedConv, Source, compared, problem_of_folded
from .._conv.problem import Conv, Problem
from .._schemas import conv2d_shape
from .._watch import check_root, has_global_hooks, is_observed, is_proxy, is_watched
from ..activation import IDENTITY, Activation, act_repr, resolve_activation
from ..functional._norm import check_per_channel, check_residual
from ..functional.conv_bn_act import (
    ORDERS,
    Norm,
    asks_for_statistics,
    convolution_before,
    folds,
    gives_statistics,
    scale_and_shift,
)
from ..functional.conv_bn_act import conv_bn_act as functional_conv_bn_act
from ._one_by_one import Act, has_own_parts, layer_of, one_by_one, unobserved
from .batch_norm_act import BatchNormAct2d
from .conv2d import Conv2d, padded_input, same_padding


class ConvBNAct(torch.nn.Module):
    """``act(bn(conv(x)) + residual)`` over ``[N, C, H, W]``.

    ``.conv`` is a :class:`Conv2d`, ``.bn`` a :class:`BatchNormAct2d` (timm's names and ``state_dict`` keys). The
    activation is this module's, in ``.act``: what takes the place of ``.conv`` or ``.bn`` is called with one argument,
    and addition and activation still happen.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, padding_mode: as :class:`torch.nn.Conv2d`.
        padding: ``None`` keeps height and width at stride 1 (odd kernels): ``dilation * (kernel_size - 1) // 2``.
        bias: the convolution's own. Off by default, because the norm subtracts it again.
        act: see :class:`BatchNormAct2d`. A module that is assigned to ``.act`` later may be any.
        order: ``"conv-bn-act"``, or ``"conv-act-bn"`` for ``bn(act(conv(x))) + residual``.
        eps, momentum, affine, track_running_stats: as :class:`torch.nn.BatchNorm2d`.
        process_group: of the norm, see :class:`BatchNormAct2d`.
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
        process_group: Any = None,
    ) -> None:
        name = type(self).__name__
        activation = resolve_activation(name, act)
        if order not in ORDERS:
            raise ValueError(f"{name}: order ({order!r}) must be one of {', '.join(ORDERS)}")
        super().__init__()
        self.act: Act = activation
        self.order = order
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
        )
        self.bn = BatchNormAct2d(
            out_channels,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            process_group=process_group,
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``x`` ``[N, C_in, H, W]``, ``residual`` of the output's shape -> ``[N, C_out, H_out, W_out]``."""
        if is_proxy(x):
            check_root(self, x)
        if self.order == "conv-act-bn" and unobserved(self.act) != IDENTITY:
            return self._activated_first(x, residual)
        return conv_bn_act(self.conv, self.bn, x, residual, act=self.act)

    def _activated_first(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv, bn, act = self.conv, self.bn, unobserved(self.act)
        if is_observed(x) or act is None:
            return one_by_one((bn,), one_by_one((conv,), x, act=self.act), residual)
        own = type(conv) is Conv2d and not is_watched(conv) and unobserved(conv.act) == IDENTITY
        out = conv(x, act=act) if own else one_by_one((conv,), x, act=act)
        own = type(bn) is BatchNormAct2d and not is_watched(bn) and unobserved(bn.act) == IDENTITY
        return bn(out, residual) if own else one_by_one((bn,), out, residual)

    def extra_repr(self) -> str:
        act = "" if isinstance(self.act, torch.nn.Module) else act_repr(self.act).removeprefix(", ")
        return (
            act if self.order == "conv-bn-act" else f"{act}, order='conv-act-bn'".removeprefix(", ")
        )


class ConvBNReLU(ConvBNAct):
    """:class:`ConvBNAct` with ``act="relu"``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "act" in kwargs:
            raise TypeError("ConvBNReLU: act is fixed to 'relu'; use ConvBNAct for another one")
        super().__init__(*args, act="relu", **kwargs)


def conv_bn_act(
    conv: torch.nn.Conv2d,
    bn: torch.nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    act: Act = None,
) -> Tensor:
    """``act(bn(conv(x)) + residual)`` for two layers; in evaluation without gradients, one convolution.

    Args:
        conv, bn: not modified. They may be any layers. Those with hooks, and those of another class, are called one
            after the other, with one argument; addition and activation follow.
        x: ``[N, C_in, H, W]``.
        residual: of the output's shape, or ``None``.
        act: an activation behind the addition. ``None``: the activation that a :class:`BatchNormAct2d` has by itself is
            behind the addition too.
    """
    # `explain` finds a call of this function by its code, and reads the arguments by these names.
    own = unobserved(bn.act) if isinstance(bn, BatchNormAct2d) and has_own_parts(bn) else None
    activation = own if act is None else unobserved(act)
    is_plain = layer_of(bn) is BatchNormAct2d and not (is_watched(bn) or is_observed(x))
    if own is None or activation is None or not (is_plain and (act is None or own == IDENTITY)):
        if act is None and residual is not None and own not in (None, IDENTITY):
            return bn(conv(x), residual)  # its activation is behind the addition
        return one_by_one((conv, bn), x, residual, act)
    assert isinstance(bn, BatchNormAct2d)
    if not bn.training and _is_convolution_alone(conv):
        source = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        if evaluates_as_one(conv, bn, x, residual, source):
            return _folded(conv, bn, x, residual, activation, source)
    bn.folded = None
    uses_batch = bn.training or bn.running_mean is None
    # Only on CUDA, where the convolution may compute the statistics for the norm.
    if uses_batch and asks_for_statistics(x) and isinstance(conv, Conv2d) and _plain(conv, bn):
        running = (bn.running_mean, bn.running_var) if bn.track_running_stats else (None, None)
        norm = Norm(*running, bn.weight, bn.bias, residual, activation)
        if gives_statistics(norm, x, conv.weight, conv.bias, conv.groups):
            x, options = _padded(conv, x)
            z, statistics = convolution_before(norm, x, conv.weight, conv.bias, options)
            return bn.normalized(z, residual, activation, statistics)
    # The forward of a subclass may take no activation, so it is passed only if one was given.
    further = {} if act is None else {"act": activation}
    return bn(conv(x), residual, **further)


def evaluates_as_one(
    conv: torch.nn.Conv2d,
    bn: BatchNormAct2d,
    x: Tensor,
    residual: Tensor | None,
    source: Source,
) -> bool:
    """Whether the norm is folded into the convolution in evaluation. ``source``: the tensors of both."""
    return (
        bn.running_mean is not None
        and x.dim() == 4
        and _plain(conv, bn)
        and folds(x, conv.weight, conv.groups, residual, *source)
    )


def _folded(
    conv: torch.nn.Conv2d,
    bn: BatchNormAct2d,
    x: Tensor,
    residual: Tensor | None,
    act: Activation,
    source: Source,
) -> Tensor:
    x, options = _padded(conv, x)
    problem = problem_of_kept(conv, x, options)
    if problem is None:
        return functional_conv_bn_act(
            x, conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias, bias=conv.bias,
            **options._asdict(), eps=bn.eps, residual=residual, act=act,
        )  # fmt: skip
    if residual is not None:
        shape = conv2d_shape(x.shape, conv.weight.shape, *options[:3])
        check_residual("conv_bn_act", residual, shape, x.device)
    # Read once, because another thread may set it to None in between.
    folded = bn.folded
    what = compared(problem)
    if folded is None or not folded.serves(what, source, bn.eps, options):
        check_per_channel("conv_bn_act", x, conv.out_channels, bias=conv.bias)
        scale, shift = scale_and_shift(
            x, conv.out_channels, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps
        )
        bn.folded = folded = FoldedConv(what, source, scale, shift, bn.eps, options)
    return folded(problem, x, conv.weight, residual, act)


def _padded(conv: torch.nn.Conv2d, x: Tensor) -> tuple[Tensor, Conv]:
    """``x`` and the options for the functional convolution, which only does padding by zeros itself."""
    stride: Any = conv.stride
    dilation: Any = conv.dilation
    x, padding = padded_input(conv, x)
    left, right, top, bottom = conv._reversed_padding_repeated_twice
    if isinstance(padding, str) and left == right and top == bottom:
        padding = top, left
    return x, Conv(stride, padding, dilation, conv.groups)


def problem_of_kept(conv: torch.nn.Conv2d, x: Tensor, options: Conv) -> Problem | None:
    """The problem if the folded weight and bias are kept from call to call, else ``None``.

    Nothing is kept under FSDP, which gathers the weight for each call. A kept folded weight would undo the sharding,
    and neither the version nor the address of the gathered weight shows that the shards have changed.
    """
    if isinstance(options.padding, str) or "_is_fsdp_managed_module" in conv.__dict__:
        return None
    return problem_of_folded(x, conv.weight, options)


def _plain(conv: torch.nn.Conv2d, bn: BatchNormAct2d) -> bool:
    """Whether calling ``conv`` and ``bn`` does nothing but their own arithmetic: no hook, no other ``forward``."""
    return (
        _is_convolution_alone(conv)
        and layer_of(bn) is BatchNormAct2d
        and not (is_watched(conv) or is_watched(bn) or has_global_hooks())
        and "weight" in bn._parameters  # parametrized ones are computed in each call
    )


def _is_convolution_alone(conv: torch.nn.Module) -> bool:
    """Whether its call is a convolution by its own weight, which is not computed in each call."""
    if not isinstance(conv, torch.nn.Conv2d) or "weight" not in conv._parameters:
        return False
    if type(conv).forward is Conv2d.forward:
        own = type(conv)._conv_forward is Conv2d._conv_forward
        return own and isinstance(conv, Conv2d) and unobserved(conv.act) == IDENTITY
    return (
        type(conv).forward is torch.nn.Conv2d.forward
        and type(conv)._conv_forward is torch.nn.Conv2d._conv_forward
    )
