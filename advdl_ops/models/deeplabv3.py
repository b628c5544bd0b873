"""DeepLabV3: Chen et al. 2017, Rethinking Atrous Convolution for Semantic Image Segmentation,
https://arxiv.org/abs/1706.05587

`state_dict` keys and numerics of torchvision: a ResNet (He et al. 2015, https://arxiv.org/abs/1512.03385) of output
stride 8, whose last stage is dilated by 2 and 4 rather than by the paper's multi-grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from advdl_ops import nn
from advdl_ops._lean import concatenated
from advdl_ops._schemas import conv2d_format
from advdl_ops._watch import is_proxy
from advdl_ops.models._layers import (
    Layers,
    NormFactory,
    check_image,
    check_values_per_channel,
    conv,
    conv_norm_relu,
    variant,
)
from advdl_ops.models._segmentation import SegmentationModel


class ImagePooling(Layers):
    """Mean over the image, 1x1 convolution with norm and ReLU: [N, channels, h, w] -> [N, out_channels, h, w].

    Each channel of the output is one number.
    """

    def __init__(self, channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__(
            torch.nn.AdaptiveAvgPool2d(1),
            conv(channels, out_channels, 1),
            norm(out_channels),
            torch.nn.ReLU(),
        )

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input).expand(-1, -1, input.shape[2], input.shape[3])
        # A concatenation is in channels_last only if all its parts are.
        return out if is_proxy(out) else out.contiguous(memory_format=conv2d_format(input))


class ASPP(torch.nn.Module):
    """Atrous spatial pyramid pooling: [N, channels, h, w] -> [N, out_channels, h, w].

    In parallel a 1x1 convolution, a 3x3 one for each dilation of `rates`, and `ImagePooling`. Then a 1x1 convolution of
    all their outputs, and dropout. Each convolution has norm and ReLU.
    """

    def __init__(
        self, channels: int, rates: Sequence[int], norm: NormFactory, out_channels: int = 256
    ) -> None:
        super().__init__()
        self.convs = torch.nn.ModuleList([conv_norm_relu(channels, out_channels, 1, norm)])
        for rate in rates:
            self.convs.append(conv_norm_relu(channels, out_channels, 3, norm, dilation=rate))
        self.convs.append(ImagePooling(channels, out_channels, norm))
        self.project = Layers(
            conv(len(self.convs) * out_channels, out_channels, 1),
            norm(out_channels),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(concatenated(*[branch(x) for branch in self.convs]))


class DeepLabHead(Layers):
    """`ASPP`, 3x3 convolution with norm and ReLU, 1x1 convolution: [N, channels, h, w] -> [N, num_classes, h, w]."""

    def __init__(self, channels: int, num_classes: int, norm: NormFactory) -> None:
        super().__init__(
            ASPP(channels, (12, 24, 36), norm),
            conv(256, 256, 3),
            norm(256),
            torch.nn.ReLU(),
            nn.Conv2d(256, num_classes, 1),
        )


class DeepLabV3(SegmentationModel):
    __doc__ = SegmentationModel.__doc__
    head = DeepLabHead

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        # As in the backbone, but what follows reads the shape.
        check_image(self.name, x, self.backbone.conv1)
        if not is_proxy(x) and x.shape[0] == 1:
            for part in self.classifier.modules():
                if isinstance(part, ImagePooling):
                    check_values_per_channel(self.name, x, part, None)
        return super().forward(x)


deeplabv3_resnet50 = variant(
    "deeplabv3_resnet50", "DeepLabV3 on ResNet-50", DeepLabV3, layers=(3, 4, 6, 3)
)
deeplabv3_resnet101 = variant(
    "deeplabv3_resnet101", "DeepLabV3 on ResNet-101", DeepLabV3, layers=(3, 4, 23, 3)
)
