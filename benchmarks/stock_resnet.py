"""ResNet in plain PyTorch: the peer that advdl_ops.models is measured against.

He et al. 2015, https://arxiv.org/abs/1512.03385, with torchvision's ``state_dict`` keys, strides and
arithmetic. Activations and additions are in place, as in the fastest stock formulation. There is no
initialization, because it gets the weights of the network that it competes with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride, size // 2, bias=False)


class Block(nn.Module):
    """Basic block (3x3, 3x3), or bottleneck (1x1, 3x3, 1x1 of four times the width)."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        out = width * (4 if bottleneck else 1)
        first, second = (1, stride) if bottleneck else (stride, 1)
        self.conv1 = conv(channels, width, 1 if bottleneck else 3, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, second)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = conv(width, out, 1)
            self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.bottleneck:
            out = self.bn3(self.conv3(self.relu(out)))
        out += shortcut
        return self.relu(out)


class StockResNet(nn.Module):
    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        bottleneck: bool,
        num_classes: int = 1000,
        in_channels: int = 3,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        small = stem == "small"
        self.conv1 = conv(in_channels, 64, 3) if small else conv(in_channels, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            layers = []
            for index in range(count):
                stride = 2 if index == 0 and stage > 0 else 1
                layers.append(Block(channels, width, stride, bottleneck))
                channels = width * (4 if bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


LAYOUTS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}


def stock_resnet(name: str, **options) -> StockResNet:
    """The plain PyTorch twin of ``advdl_ops.models.create_model(name, ...)``; the same keys."""
    if name not in LAYOUTS:
        raise ValueError(f"stock_resnet: name ({name!r}) must be one of {', '.join(LAYOUTS)}")
    return StockResNet(*LAYOUTS[name], **options)
