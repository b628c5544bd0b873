"""U-Net on a ResNet encoder, with `state_dict` keys and numerics of segmentation_models_pytorch's
`Unet(encoder_name="resnet34")` (https://github.com/qubvel-org/segmentation_models.pytorch).

- U-Net: Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597
- ResNet: He et al. 2015, https://arxiv.org/abs/1512.03385
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from advdl_ops import nn
from advdl_ops._lean import concatenated
from advdl_ops._watch import is_proxy
from advdl_ops.models._layers import (
    NormFactory,
    check_counts,
    check_entries,
    conv_norm_relu,
    from_fast_format,
    norm_factory,
    variant,
)
from advdl_ops.models.resnet import BasicBlock, Bottleneck, ResNetEncoder, encoded


class DecoderBlock(torch.nn.Module):
    """Nearest upsampling, concatenation with the encoder's feature, two convolutions with norm and ReLU.

    Args:
        channels, skip_channels, out_channels: of the feature to upsample, of the encoder's (0: none), of the output.
        norm: creates the norms.
    """

    def __init__(
        self, channels: int, skip_channels: int, out_channels: int, norm: NormFactory
    ) -> None:
        super().__init__()
        self.conv1 = conv_norm_relu(channels + skip_channels, out_channels, 3, norm)
        self.conv2 = conv_norm_relu(out_channels, out_channels, 3, norm)

    def forward(self, x: Tensor, skip: Tensor | None, size: Sequence[int]) -> Tensor:
        """`x` [N, channels, h, w], `skip` [N, skip_channels, *size] -> [N, out_channels, *size]."""
        x = F.interpolate(x, size=size if is_proxy(x) else tuple(size), mode="nearest")
        if skip is not None:
            x = concatenated(x, skip)
        return self.conv2(self.conv1(x))


class _Decoder(torch.nn.Module):
    def __init__(self, encoder: Sequence[int], decoder: Sequence[int], norm: NormFactory) -> None:
        super().__init__()
        deepest, *skips = reversed(encoder)
        self.blocks = torch.nn.ModuleList(
            DecoderBlock(channels, skip, out, norm)
            for channels, skip, out in zip(
                [deepest, *decoder[:-1]], [*skips, 0], decoder, strict=True
            )
        )

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """The encoder's features, largest first -> [N, C, *size]."""
        x, *rest = reversed(features)
        skips: list[Tensor | None] = [*rest, None]
        for block, skip in zip(self.blocks, skips, strict=True):
            x = block(x, skip, size if skip is None else skip.shape[2:])
        return x


class UNetResNet(torch.nn.Module):
    """U-Net on a ResNet: [N, in_channels, H, W] -> [N, num_classes, H, W], scores before softmax or sigmoid.

    Any height and width from 1 on: each upsampling goes to the size of the encoder's feature. Contiguous or
    channels_last; the output has the same format. Group norm raises, also in eval mode, if it gets a single pixel of
    one image and a group is one channel.

    Args:
        block, layers: of the encoder, as in `ResNet`.
        num_classes: channels of the output.
        in_channels: channels of the input.
        norm: "batch", or "group", as in `ResNet`, in encoder and decoder.
        decoder_channels: outputs of the five blocks, from the smallest image to the largest.
        name: what error messages call the model.

    Raises:
        ValueError, RuntimeError, TypeError: as `ResNet`.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("segmentation_head.0",)  # read by load_weights

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1,
        *,
        in_channels: int = 3,
        norm: str = "batch",
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        name: str = "unet_resnet",
    ) -> None:
        super().__init__()
        check_counts(name, num_classes=num_classes)
        check_entries(name, 5, decoder_channels=decoder_channels)
        self.name = name
        self.encoder = ResNetEncoder(block, layers, in_channels=in_channels, norm=norm, name=name)
        stages = [64, *((64 << stage) * block.expansion for stage in range(4))]
        self.decoder = _Decoder(stages, decoder_channels, norm_factory(name, norm))
        self.segmentation_head = torch.nn.Sequential(
            nn.Conv2d(decoder_channels[-1], num_classes, 3, padding=1)
        )
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.decoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
        head = self.segmentation_head[0]
        torch.nn.init.xavier_uniform_(head.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out = self.segmentation_head(self.decoder(encoded(self, self.encoder, x), x.shape[2:]))
        return from_fast_format(out, x)


unet_resnet18 = variant(
    "unet_resnet18", "U-Net on ResNet-18", UNetResNet, block=BasicBlock, layers=(2, 2, 2, 2)
)
unet_resnet34 = variant(
    "unet_resnet34", "U-Net on ResNet-34", UNetResNet, block=BasicBlock, layers=(3, 4, 6, 3)
)
unet_resnet50 = variant(
    "unet_resnet50", "U-Net on ResNet-50", UNetResNet, block=Bottleneck, layers=(3, 4, 6, 3)
)
