"""``torch.nn.Conv2d`` with residual addition and activation in the same op; dilated and depthwise by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._conv.problem import pair
from .._schemas import conv2d_format
from .._watch import is_proxy, recorded
from ..activation import Activation, act_repr, resolve_activation
from ..backend import is_exported
from ..functional.conv2d import conv2d
from ._one_by_one import one_by_one
from ._quantization import Configuration
from ._script import refuse_script

_Act = str | Activation | torch.nn.Module | None
_Size = int | tuple[int, int]
_PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Conv2d(torch.nn.Conv2d):
    """``act(conv2d(x) + residual)`` over ``[N, C_in, H, W]`` or ``[C_in, H, W]``.

    Arguments, defaults and ``state_dict`` keys of :class:`torch.nn.Conv2d`, and:

    Args:
        act: ``None``, a name (``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"``, ``"sigmoid"``,
            ``"tanh"``, ``"hardswish"``, ``"relu6"``) or the matching ``torch.nn`` module, whose parameters are
            taken over.
    """

    qconfig = Configuration(torch.nn.Conv2d)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size = 0,
        dilation: _Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: _Act = None,
    ) -> None:
        self.act = resolve_activation(type(self).__name__, act)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip

    def forward(self, input: Tensor, residual: Tensor | None = None, act: _Act = None) -> Tensor:
        """``input``, ``residual`` (of the output's shape) -> ``[N, C_out, H_out, W_out]``; errors as :func:`.conv2d`.

        Args:
            act: overrides the layer's own activation.
        """
        if is_proxy(input):
            return recorded(self, input, residual=residual, act=act)
        # Calls torch's _conv_forward, which subclasses override, possibly without these two arguments.
        further = () if residual is None and act is None else (residual, act)
        return self._conv_forward(input, self.weight, self.bias, *further)

    def _conv_forward(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        act: _Act = None,
    ) -> Tensor:
        if isinstance(self.padding, str) and is_exported():  # torch's operator is told "same"
            z = super()._conv_forward(input, weight, bias)
            return one_by_one((), z, residual, self.act if act is None else act)
        x, padding = padded_input(self, input)
        return conv2d(
            x, weight, bias, self.stride, padding, self.dilation, self.groups,
            act=self.act if act is None else act, residual=residual,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + act_repr(self.act)


class DilatedConv2d(Conv2d):
    """:class:`Conv2d` whose kernel has ``dilation - 1`` holes between its taps (Yu & Koltun 2016, arXiv:1511.07122).

    ``dilation`` follows directly after ``kernel_size``. The kernel covers ``dilation * (kernel_size - 1) + 1``
    positions with ``kernel_size`` weights on each axis.

    Args:
        in_channels, out_channels, kernel_size, stride, groups, bias, padding_mode, device, dtype, act: as
            :class:`Conv2d`.
        dilation: one number or (height, width).
        padding: as :class:`Conv2d`; ``None`` keeps height and width at stride 1: ``dilation * (kernel_size - 1) / 2``.

    Raises:
        ValueError: ``padding=None`` with an odd ``dilation * (kernel_size - 1)``; else as :class:`torch.nn.Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _Size,
        dilation: _Size = 2,
        stride: _Size = 1,
        padding: str | _Size | None = None,
        groups: int = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: _Act = None,
    ) -> None:
        if padding is None:
            padding = same_padding(type(self).__name__, kernel_size, dilation)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype, act=act,
        )  # fmt: skip


class DepthwiseConv2d(Conv2d):
    """:class:`Conv2d` that filters each channel separately (Howard et al. 2017, arXiv:1704.04861).

    Args:
        channels: of the input. The output has ``channels * multiplier``; the outputs of one input channel are adjacent.
        kernel_size, stride, dilation, bias, padding_mode, device, dtype, act: as :class:`Conv2d`.
        padding: as :class:`Conv2d`; ``None`` keeps height and width at stride 1: ``dilation * (kernel_size - 1) / 2``.
        multiplier: filters for each channel.

    Raises:
        ValueError: ``multiplier`` below 1, ``padding=None`` with an odd ``dilation * (kernel_size - 1)``; else as
            :class:`torch.nn.Conv2d`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: _Size,
        stride: _Size = 1,
        padding: str | _Size | None = None,
        dilation: _Size = 1,
        bias: bool = True,
        padding_mode: _PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        multiplier: int = 1,
        act: _Act = None,
    ) -> None:
        name = type(self).__name__
        if multiplier < 1:
            raise ValueError(f"{name}: multiplier ({multiplier}) must be at least 1")
        if padding is None:
            padding = same_padding(name, kernel_size, dilation)
        super().__init__(
            channels, channels * multiplier, kernel_size, stride, padding, dilation, channels, bias,
            padding_mode, device, dtype, act=act,
        )  # fmt: skip


class HybridDilatedConv(torch.nn.Sequential):
    """A stack of :class:`DilatedConv2d` whose rates leave no holes in the receptive field.

    Wang et al. 2018 (arXiv:1702.08502, section 3.2). With equal rates r an output depends only on a grid of every r-th
    position ("gridding"). With :math:`M_n = r_n` and

    .. math:: M_i = \\max[M_{i+1} - 2 r_i,\\; 2 r_i - M_{i+1},\\; r_i]

    for the largest distance between two taps that are not zero, the condition is :math:`M_2 \\le K`. In addition the
    whole stack must see every position of its receptive field, so the rates must not have a common divisor.

    Args:
        channels: of the input, of the output and in between.
        rates: dilation of each layer, first to last.
        kernel_size: K of all layers, odd.
        act: after every layer, as in :class:`Conv2d`.
        bias: whether every layer has a bias.

    Height and width do not change.

    Raises:
        ValueError: rates that leave holes, no rate, a rate below 1, an even ``kernel_size``.
    """

    def __init__(
        self,
        channels: int,
        rates: Sequence[int] = (1, 2, 4),
        kernel_size: int = 3,
        *,
        act: _Act = "relu",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        if kernel_size % 2 == 0:
            raise ValueError(f"{name}: kernel_size ({kernel_size}) must be odd")
        _check_rates(name, tuple(rates), kernel_size)
        super().__init__(
            *(
                DilatedConv2d(
                    channels, channels, kernel_size, rate, bias=bias, device=device, dtype=dtype,
                    act=act,
                )
                for rate in rates
            )
        )  # fmt: skip


def _check_rates(name: str, rates: tuple[int, ...], kernel_size: int) -> None:
    if not rates or min(rates) < 1:
        raise ValueError(f"{name}: rates ({rates}) must be numbers from 1 on, at least one")
    distance = rates[-1]
    for rate in reversed(rates[1:-1]):
        distance = max(distance - 2 * rate, 2 * rate - distance, rate)
    if len(rates) > 1 and distance > kernel_size:
        raise ValueError(
            f"{name}: rates ({rates}) must leave no holes (gridding): the largest distance between taps, "
            f"M_2 ({distance}), must not exceed kernel_size ({kernel_size})"
        )
    # M_2 does not show whether the first rate fills the holes that the others leave.
    half = kernel_size // 2
    seen = {0}
    for rate in rates:
        seen = {at + rate * tap for at in seen for tap in range(-half, half + 1)}
    holes = [at for at in range(max(seen)) if at not in seen]
    if holes:
        raise ValueError(
            f"{name}: rates ({rates}) must leave no holes (gridding): an output would not see position {holes[0]} "
            "beside its own"
        )


def padded_input(layer: torch.nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    """``x``, padded in its memory format unless the layer pads with zeros, and the padding left to the convolution."""
    if layer.padding_mode == "zeros":
        return x, layer.padding
    padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
    # Circular padding always returns contiguous memory.
    return padded if x.dim() != 4 else padded.contiguous(memory_format=conv2d_format(x)), (0, 0)


def same_padding(name: str, kernel_size: _Size, dilation: _Size) -> tuple[int, int]:
    """The padding that keeps height and width at stride 1.

    Raises:
        ValueError: there is none that is equal on both sides, as with an even kernel.
    """
    reach = [r * (k - 1) for k, r in zip(pair(kernel_size), pair(dilation), strict=True)]
    if reach[0] % 2 or reach[1] % 2:
        raise ValueError(
            f"{name}: kernel_size ({kernel_size}) must be odd or dilation ({dilation}) even where padding is None, "
            "or padding be given"
        )
    return reach[0] // 2, reach[1] // 2
