"""U-Net: Ronneberger et al. 2015, U-Net: Convolutional Networks for Biomedical Image Segmentation,
https://arxiv.org/abs/1505.04597

`state_dict` keys and numerics of https://github.com/milesial/Pytorch-UNet. It differs from the paper by zero padding
(the output has the input's size) and batch norm. The dilated bottleneck is that of D-LinkNet (Zhou et al. 2018,
https://openaccess.thecvf.com/content_cvpr_2018_workshops/papers/w4/Zhou_D-LinkNet_LinkNet_With_CVPR_2018_paper.pdf)
without its sums, that is the hybrid dilated convolution of Wang et al. 2018, https://arxiv.org/abs/1702.08502.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from advdl_ops import nn
from advdl_ops._lean import concatenated
from advdl_ops._watch import is_proxy
from advdl_ops.backend import is_traced
from advdl_ops.models._layers import (
    Layers,
    NormFactory,
    build,
    check_counts,
    check_entries,
    check_flags,
    check_image,
    check_values_per_channel,
    conv,
    first_features,
    from_fast_format,
    norm_factory,
    uses_fast_format,
)
from advdl_ops.models._registry import register_model


class DoubleConv(torch.nn.Module):
    """Two times 3x3 convolution, norm and ReLU: [N, channels, H, W] -> [N, out_channels, H, W].

    Args:
        channels, out_channels: of input and output.
        norm: creates the norms.
        mid_channels: between the two convolutions; `out_channels` by default.
    """

    def __init__(
        self, channels: int, out_channels: int, norm: NormFactory, mid_channels: int | None = None
    ) -> None:
        super().__init__()
        mid_channels = out_channels if mid_channels is None else mid_channels
        self.double_conv = Layers(
            conv(channels, mid_channels, 3),
            norm(mid_channels),
            torch.nn.ReLU(inplace=True),
            conv(mid_channels, out_channels, 3),
            norm(out_channels),
            torch.nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(torch.nn.Module):
    """2x2 max-pool, then `DoubleConv`: [N, channels, H, W] -> [N, out_channels, H // 2, W // 2]."""

    def __init__(self, channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.maxpool_conv = torch.nn.Sequential(
            torch.nn.MaxPool2d(2), DoubleConv(channels, out_channels, norm)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(torch.nn.Module):
    """Upsampling by 2, concatenation with the encoder's feature, then `DoubleConv`.

    Args:
        channels: of the concatenation: half from the encoder, half from the upsampling.
        out_channels: of the output.
        bilinear: interpolate, and reduce the channels between the two convolutions. Else a transposed convolution, 2x2
            with stride 2, whose input has all `channels`.
        norm: creates the norms.
    """

    def __init__(self, channels: int, out_channels: int, bilinear: bool, norm: NormFactory) -> None:
        super().__init__()
        half = channels // 2
        self.up: torch.nn.Module
        if bilinear:
            self.up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(channels, half, 2, stride=2)
        self.conv = DoubleConv(channels, out_channels, norm, half if bilinear else None)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`x` [N, channels or channels / 2, h, w], `skip` [N, channels / 2, H, W] -> [N, out_channels, H, W]."""
        return self.conv(concatenated(skip, _padded(self.up(x), skip)))


def _padded(x: Tensor, skip: Tensor) -> Tensor:
    """`x` padded with zeros to the height and width of `skip`.

    `ConvTranspose2d(match=)` is not used, because its additional row and column contain the bias.
    """
    rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
    # Padding by zero pixels makes a copy in eager mode. In a graph it costs nothing, and the comparison would make
    # sizes static.
    if not (is_traced() or is_proxy(x)) and rows == 0 and columns == 0:
        return x
    return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


class UNet(torch.nn.Module):
    """U-Net: [N, in_channels, H, W] -> [N, num_classes, H, W], scores before softmax or sigmoid.

    Any height and width from 2**depth on, contiguous or channels_last; the output has the same format. Group norm
    raises, also in eval mode, if it gets a single pixel of one image and a group is one channel. With the same seed the
    model has the same weights as milesial's.

    Args:
        num_classes: channels of the output.
        bilinear: upsample by interpolation instead of transposed convolutions, with half the channels at the bottom.
        in_channels: channels of the input.
        base_channels: channels of the first stage. Each further stage has twice as many.
        depth: how often the size is halved; 4 in milesial's.
        norm: "batch", or "group" (32 groups, or the largest power of two that divides the channels).
        dilated_bottleneck: adds a `HybridDilatedConv` after the last stage: one 3x3 convolution with ReLU for each of
            `rates`, with the additional keys `bottleneck.*`.
        rates: dilations of the bottleneck.
        name: what error messages call the model.

    Raises:
        ValueError: when built, an option out of range; in `forward`, an input of another rank, a side below 2**depth,
            and one value per channel in training (before any statistic changes), or per group of group norm.
        RuntimeError: in `forward`, another channel count, and integers.
        TypeError: in `forward`, an input that is not a tensor.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("outc.conv",)  # read by load_weights
    # Pixel values of the masks, which milesial's training script saves with the weights.
    not_weights: ClassVar[frozenset[str]] = frozenset({"mask_values"})  # read by load_weights

    def __init__(
        self,
        num_classes: int = 2,
        bilinear: bool = False,
        *,
        in_channels: int = 3,
        base_channels: int = 64,
        depth: int = 4,
        norm: str = "batch",
        dilated_bottleneck: bool = False,
        rates: Sequence[int] = (1, 2, 4),
        name: str = "unet",
    ) -> None:
        super().__init__()
        check_counts(
            name,
            num_classes=num_classes,
            in_channels=in_channels,
            base_channels=base_channels,
            depth=depth,
        )
        check_flags(name, bilinear=bilinear, dilated_bottleneck=dilated_bottleneck)
        check_entries(name, rates=rates)
        self.name = name
        self.depth = depth
        make_norm = norm_factory(name, norm)
        widths = [base_channels << stage for stage in range(depth + 1)]
        # Interpolation does not change the channels, so each level outputs half as many.
        factor = 2 if bilinear else 1
        self.inc = DoubleConv(in_channels, widths[0], make_norm)
        for stage in range(1, depth + 1):
            out = widths[stage] // (factor if stage == depth else 1)
            self.add_module(f"down{stage}", Down(widths[stage - 1], out, make_norm))
        self.bottleneck = (
            _bottleneck(widths[-1] // factor, rates) if dilated_bottleneck else torch.nn.Identity()
        )
        for stage in range(1, depth + 1):
            out = widths[depth - stage] // (1 if stage == depth else factor)
            self.add_module(f"up{stage}", Up(widths[depth - stage + 1], out, bilinear, make_norm))
        self.outc = torch.nn.Sequential(OrderedDict(conv=nn.Conv2d(widths[0], num_classes, 1)))

    def _check_input(self, x: Tensor) -> None:
        check_image(self.name, x, self.inc)
        stride = 1 << self.depth
        if not is_proxy(x) and min(x.shape[2:]) < stride:
            raise ValueError(
                f"{self.name}: input shape {list(x.shape)} must have sides of at least {stride}, which depth "
                f"({self.depth}) halves to 1"
            )
        last = self.get_submodule(f"down{self.depth}")
        check_values_per_channel(self.name, x, last, lambda: 2 * stride - 1)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        out = first_features(self.inc, x, uses_fast_format(self, x))
        skips = []
        for stage in range(1, self.depth + 1):
            skips.append(out)
            out = getattr(self, f"down{stage}")(out)
        out = self.bottleneck(out)
        for stage in range(1, self.depth + 1):
            out = getattr(self, f"up{stage}")(out, skips.pop())
        return from_fast_format(self.outc(out), x)


def _bottleneck(channels: int, rates: Sequence[int]) -> torch.nn.Module:
    layers = nn.HybridDilatedConv(channels, rates)
    # There is no norm between them, and torch's default initialization would shrink the signal in each.
    for layer in layers:
        assert isinstance(layer, torch.nn.Conv2d) and layer.bias is not None
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
    return layers


@register_model
def unet(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> UNet:
    """U-Net; `weights` as in `create_model`, options as in `UNet`."""
    return build("unet", UNet, weights, options)
