"""What FCN and DeepLabV3 share: the dilated ResNet, the model around it and the auxiliary head."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from advdl_ops import nn
from advdl_ops.models._layers import (
    Layers,
    NormFactory,
    check_counts,
    check_flags,
    conv,
    from_fast_format,
    norm_factory,
)
from advdl_ops.models.resnet import Bottleneck, ResNetEncoder, encoded


class FCNHead(Layers):
    """3x3 convolution with norm and ReLU, dropout, 1x1 convolution: [N, channels, h, w] -> [N, num_classes, h, w]."""

    def __init__(self, channels: int, num_classes: int, norm: NormFactory) -> None:
        inner = channels // 4
        super().__init__(
            conv(channels, inner, 3),
            norm(inner),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
            nn.Conv2d(inner, num_classes, 1),
        )


class SegmentationModel(torch.nn.Module):
    """ResNet of dilated bottlenecks with a head of scores on it, or two.

    [N, in_channels, H, W] -> an OrderedDict of [N, num_classes, H, W], scores before softmax, interpolated from 1/8 of
    H and W: "out" and, with `aux_loss`, "aux".

    Any height and width from 1 on, contiguous or channels_last; the outputs have the same format. With the same seed it
    has the same weights as torchvision's model.

    Args:
        layers: blocks of each of the four stages.
        num_classes: channels of the outputs.
        in_channels: channels of the input.
        norm: "batch", or "group" (32 groups).
        aux_loss: adds an `FCNHead` on stage 3, for a separate loss in training (Zhao et al. 2017,
            https://arxiv.org/abs/1612.01105). torchvision's files have it; `model.aux_classifier = None` removes it.
        name: what error messages call the model.

    Raises:
        ValueError, RuntimeError, TypeError: as `ResNet`. ValueError also if `DeepLabV3` gets a batch of 1 in
            training: after its mean over the image, batch norm has one value per channel.
    """

    head: ClassVar[type[torch.nn.Module]]  # of "out": (channels, num_classes, norm) -> module
    # Read by load_weights.
    last_layers: ClassVar[tuple[str, ...]] = ("classifier.4", "aux_classifier.4")
    # Also read by load_weights: without this option a file has too many keys. All of torchvision's files have this
    # part.
    parts_of_options: ClassVar[Mapping[str, str]] = {"aux_classifier.": "aux_loss=True"}

    def __init__(
        self,
        layers: Sequence[int],
        num_classes: int = 21,
        *,
        in_channels: int = 3,
        norm: str = "batch",
        aux_loss: bool = False,
        name: str = "segmentation",
    ) -> None:
        super().__init__()
        check_counts(name, num_classes=num_classes)
        check_flags(name, aux_loss=aux_loss)
        self.name = name
        make_norm = norm_factory(name, norm)
        self.backbone = ResNetEncoder(
            Bottleneck,
            layers,
            in_channels=in_channels,
            norm=norm,
            replace_stride_with_dilation=(False, True, True),
            name=name,
        )
        # Built first, although its keys come last, for the same order of random numbers as torchvision.
        stage3, stage4 = 256 * Bottleneck.expansion, 512 * Bottleneck.expansion
        aux_classifier = FCNHead(stage3, num_classes, make_norm) if aux_loss else None
        self.classifier = self.head(stage4, num_classes, make_norm)
        self.aux_classifier = aux_classifier

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        *_, stage3, stage4 = encoded(self, self.backbone, x)
        scores = OrderedDict(out=self.classifier(stage4))
        if self.aux_classifier is not None:
            scores["aux"] = self.aux_classifier(stage3)
        for key, value in scores.items():
            value = from_fast_format(value, x)
            scores[key] = F.interpolate(value, x.shape[2:], mode="bilinear", align_corners=False)
        return scores
