"""Residual network for small images: He et al. 2015, Deep Residual Learning for Image Recognition,
https://arxiv.org/abs/1512.03385, section 4.2

Global average pooling before the one linear layer: Lin et al. 2013, Network In Network,
https://arxiv.org/abs/1312.4400. Shortcuts that change size are 1x1 convolutions, as in `resnet18` (the paper's option
B). The defaults are its ResNet-20.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from advdl_ops.models._layers import (
    Layers,
    build,
    check_counts,
    check_entries,
    check_image,
    check_values_per_channel,
    conv,
    conv_norm_relu,
    first_features,
    init_convolutions,
    norm_factory,
    uses_fast_format,
)
from advdl_ops.models._registry import register_model
from advdl_ops.models.resnet import BasicBlock


class ConvNet(torch.nn.Module):
    """Stem, stages of residual blocks, global average pooling, linear: [N, in_channels, H, W] -> [N, num_classes].

    Any height and width from 1 on; contiguous or channels_last. Group norm raises, also in eval mode, if it gets a
    single pixel of one image and a group is one channel.

    Args:
        num_classes: outputs of `fc`.
        in_channels: channels of the input.
        widths: channels of each stage; every one but the first halves height and width.
        blocks: of each stage.
        norm: "batch", or "group" (32 groups, or the largest power of two that divides the channels).

    Raises:
        ValueError: when built, an option out of range; in `forward`, an input of another rank or without a pixel,
            and one value per channel in training (before any statistic changes), or per group of group norm.
        RuntimeError: in `forward`, another channel count, and integers.
        TypeError: in `forward`, an input that is not a tensor.
    """

    name: ClassVar[str] = "convnet"  # what error messages call the model
    last_layers: ClassVar[tuple[str, ...]] = ("fc",)  # read by load_weights

    def __init__(
        self,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 3,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        check_counts(self.name, num_classes=num_classes, in_channels=in_channels, blocks=blocks)
        check_entries(self.name, widths=widths)
        make_norm = norm_factory(self.name, norm)
        self.stem = conv_norm_relu(in_channels, widths[0], 3, make_norm)
        self.stages = torch.nn.Sequential()
        channels = widths[0]
        for index, width in enumerate(widths):
            stage = torch.nn.Sequential()
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                downsample = None
                if stride != 1 or channels != width:
                    downsample = Layers(conv(channels, width, 1, stride), make_norm(width))
                stage.append(BasicBlock(channels, width, stride, downsample, 1, 64, 1, make_norm))
                channels = width
            self.stages.append(stage)
        self.pool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(channels, num_classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(self.name, x, self.stem)
        last = len(self.stages) - 1
        check_values_per_channel(self.name, x, self.stages[last], lambda: 1 << last)
        x = first_features(self.stem, x, uses_fast_format(self, x))
        return self.fc(torch.flatten(self.pool(self.stages(x)), 1))


@register_model
def convnet(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> ConvNet:
    """Residual network for small images; `weights` as in `create_model`, options as in `ConvNet`."""
    return build("convnet", ConvNet, weights, options)
