"""The zoo's small residual network in plain PyTorch: the peer of ``advdl_ops.models.convnet``.

He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2, with the ``state_dict`` keys of the zoo's. There is no
initialization, because it gets the weights of the network that it competes with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .stock_resnet import Block, conv


class StockConvNet(nn.Module):
    """[N, in_channels, H, W] -> [N, num_classes]; arguments as of the zoo's."""

    def __init__(
        self, num_classes: int, in_channels: int, widths: Sequence[int], blocks: int
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(
            conv(in_channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential()
        for stage, width in enumerate(widths):
            layers = nn.Sequential()
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Block(channels, width, stride, bottleneck=False))
                channels = width
            self.stages.append(layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.stages(self.stem(x))), 1))
