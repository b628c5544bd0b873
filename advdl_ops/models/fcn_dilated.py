"""Segmentation at full resolution by dilated convolutions: Yu and Koltun 2015, Multi-Scale Context Aggregation by
Dilated Convolutions, https://arxiv.org/abs/1511.07122

Their context module with norms, on the image itself instead of the features of another network. The dilation of the 3x3
convolutions doubles from most of them to the next, and nothing is pooled.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from advdl_ops import nn
from advdl_ops.models._layers import (
    build,
    check_counts,
    check_entries,
    check_image,
    check_values_per_channel,
    conv_norm_relu,
    first_features,
    from_fast_format,
    init_convolutions,
    norm_factory,
    uses_fast_format,
)
from advdl_ops.models._registry import register_model


class FCNDilated(torch.nn.Module):
    """3x3 convolutions with norm and ReLU, then 1x1: [N, in_channels, H, W] -> [N, num_classes, H, W], scores before
    softmax or sigmoid.

    Any height and width from 1 on; contiguous or channels_last. Group norm raises, also in eval mode, if it gets a
    single pixel of one image and a group is one channel. A score depends on a window of `1 + 2 * sum(rates)` pixels in
    height and width around it.

    Args:
        num_classes: channels of the output.
        in_channels: channels of the input.
        width: channels between the convolutions.
        rates: dilation of each convolution; the paper's module has (1, 1, 2, 4, 8, 16, 1).
        norm: "batch", or "group" (32 groups, or the largest power of two that divides the channels).

    Raises:
        ValueError: when built, an option out of range; in `forward`, an input of another rank or without a pixel,
            and one value per channel in training (before any statistic changes), or per group of group norm.
        RuntimeError: in `forward`, another channel count, and integers.
        TypeError: in `forward`, an input that is not a tensor.
    """

    name: ClassVar[str] = "fcn_dilated"  # what error messages call the model
    last_layers: ClassVar[tuple[str, ...]] = ("head",)  # read by load_weights

    def __init__(
        self,
        num_classes: int = 2,
        *,
        in_channels: int = 3,
        width: int = 64,
        rates: Sequence[int] = (1, 2, 4),
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_counts(self.name, num_classes=num_classes, in_channels=in_channels, width=width)
        check_entries(self.name, rates=rates)
        make_norm = norm_factory(self.name, norm)
        self.layers = torch.nn.Sequential(
            *(
                conv_norm_relu(width if index else in_channels, width, 3, make_norm, dilation=rate)
                for index, rate in enumerate(rates)
            )
        )
        self.head = nn.Conv2d(width, num_classes, 1)
        init_convolutions(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        first: Any
        first, *others = self.layers
        check_image(self.name, x, first)
        check_values_per_channel(self.name, x, self.layers, lambda: 1)
        out = first_features(first, x, uses_fast_format(self, x))
        for layer in others:
            out = layer(out)
        return from_fast_format(self.head(out), x)


@register_model
def fcn_dilated(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> FCNDilated:
    """Dilated network at full resolution; `weights` as in `create_model`, options as in `FCNDilated`."""
    return build("fcn_dilated", FCNDilated, weights, options)
