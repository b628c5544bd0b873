"""Convolution, batch norm and activation as one layer; in evaluation as one convolution."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..activation import IDENTITY, Activation, resolve_activation
from ..functional._conv2d_cpu import Conv, is_traced, prepack, uses_onednn
from ..functional.batch_norm_act import check_norm
from ..functional.conv_bn_act import ORDERS, check_conv, conv_act, fold, folds
from ..reference.activation import activate
from .batch_norm_act import BatchNormAct2d
from .conv2d import same_padding


class ConvBNAct(torch.nn.Module):
    """``act(bn(conv(x)) + residual)`` over ``[N, C, H, W]``.

    ``.conv`` is a :class:`torch.nn.Conv2d`, ``.bn`` a :class:`BatchNormAct2d` (timm's names and ``state_dict`` keys).

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
        self.conv = torch.nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            same_padding(kernel_size, dilation) if padding is None else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        inside, outside = (
            (IDENTITY, activation) if order == "conv-bn-act" else (activation, IDENTITY)
        )
        self.inner_act = inside
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
        if self.inner_act.code != 0:
            return self.bn(activate(self.conv(x), self.inner_act), residual)
        return conv_bn_act(self.conv, self.bn, x, residual)

    def extra_repr(self) -> str:
        return (
            "" if self.inner_act.code == 0 else f"order='conv-act-bn', act={self.inner_act.name!r}"
        )


class ConvBNReLU(ConvBNAct):
    """:class:`ConvBNAct` with ``act="relu"``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "act" in kwargs:
            raise TypeError("ConvBNReLU: act is fixed to 'relu'; use ConvBNAct for another one")
        super().__init__(*args, act="relu", **kwargs)


def conv_bn_act(
    conv: torch.nn.Conv2d, bn: BatchNormAct2d, x: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``bn(conv(x), residual)`` for sibling layers; in evaluation without gradients, one folded convolution.

    Args:
        conv, bn: left as they are; hooks on either are honoured by calling the two one after the other.
        x: ``[N, C_in, H, W]``.
        residual: of the output's shape, or ``None``.
    """
    source = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    if (
        bn.training
        or bn.running_mean is None
        or x.dim() != 4
        or (residual is not None and residual.dtype != x.dtype)
        or not _plain(conv, bn)
        or not folds(x, *source, residual)
    ):
        bn.folded = None
        return bn(conv(x), residual)
    options = Conv(conv.stride, conv.padding, conv.dilation, conv.groups)
    if conv.padding_mode != "zeros":
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
        options = options._replace(padding=(0, 0))
    # Read once: another thread may drop it meanwhile.
    folded = bn.folded
    # FSDP gathers a weight anew for each call: kept, the folded one would undo the sharding, and neither the version
    # nor the address of what was gathered says that the shards have changed.
    once = is_traced() or "_is_fsdp_managed_module" in conv.__dict__
    if once or folded is None or not folded.serves(x, source, bn.eps, options):
        folded = FoldedConv(x, source, bn.eps, options)
        if not once:
            bn.folded = folded
    return conv_act(x, folded.weight, folded.bias, options, residual, bn.act)


class FoldedConv:
    """A convolution's weight and bias with the norm folded in, and what they were made from.

    Fused optimizers and writes through ``.data`` move neither version counters nor pointers, so the key also
    holds values: all of the ``[C_out]`` tensors, and of the convolution's weight one value per output channel. A
    write through ``.data`` to single other elements of that weight is not seen: call ``eval()`` after it.
    """

    def __init__(
        self, x: Tensor, source: tuple[Tensor | None, ...], eps: float, options: Conv
    ) -> None:
        weight, bias, running_mean, running_var, bn_weight, bn_bias = source
        assert weight is not None and running_mean is not None and running_var is not None
        check_conv(x, weight, bias)
        check_norm(
            "conv_bn_act",
            x,
            weight.shape[0],
            running_mean,
            running_var,
            bn_weight,
            bn_bias,
            False,
            eps,
        )
        self.weight, self.bias = fold(
            weight, bias, running_mean, running_var, bn_weight, bn_bias, eps
        )
        if torch.compiler.is_compiling():
            return  # made anew in every call: nothing will ask whether it still serves
        self.packed = uses_onednn(x, weight, options)
        if self.packed:
            self.weight = prepack(x, self.weight, options)
        self.identity = _identity(source, eps, options)
        self.sample = _sample(source)

    def serves(
        self, x: Tensor, source: tuple[Tensor | None, ...], eps: float, options: Conv
    ) -> bool:
        """Whether the folded weight still stands for ``source``."""
        return (
            self.packed == uses_onednn(x, self.bias, options)
            and self.identity == _identity(source, eps, options)
            and torch.equal(self.sample, _sample(source))
        )


def _identity(source: tuple[Tensor | None, ...], eps: float, options: Conv) -> tuple[Any, ...]:
    return eps, options, *(None if t is None else (t.data_ptr(), _version(t)) for t in source)


def _version(t: Tensor) -> Any:
    # Inference tensors count no versions: what is folded from one serves one call.
    return object() if t.is_inference() else t._version


def _sample(source: tuple[Tensor | None, ...]) -> Tensor:
    weight = source[0]
    assert weight is not None
    middle = weight.flatten(1)[:, weight[0].numel() // 2]
    return torch.cat([middle, *(t for t in source[1:] if t is not None)])


def _plain(conv: torch.nn.Conv2d, bn: BatchNormAct2d) -> bool:
    """Whether calling ``conv`` and ``bn`` does nothing but their own arithmetic: no hook, no other ``forward``."""
    return (
        type(conv).forward is torch.nn.Conv2d.forward
        and type(conv)._conv_forward is torch.nn.Conv2d._conv_forward
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
