"""ResNet and its relatives, with torchvision's `state_dict` keys and numerics.

- ResNet: He et al. 2015, Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385
- Wide ResNet: Zagoruyko and Komodakis 2016, Wide Residual Networks, https://arxiv.org/abs/1605.07146
- ResNeXt: Xie et al. 2016, Aggregated Residual Transformations for Deep Neural Networks,
  https://arxiv.org/abs/1611.05431
- dilation in place of stride: Yu et al. 2017, Dilated Residual Networks, https://arxiv.org/abs/1705.09914
- `zero_init_residual`: Goyal et al. 2017, https://arxiv.org/abs/1706.02677

As in torchvision, a bottleneck has its stride in the 3x3 convolution, not in the first 1x1 ("ResNet v1.5"). The modules
are torchvision's, and each can be replaced. A norm, the addition and the ReLU behind it are one pass over memory. In
eval mode the norm is folded into its convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from advdl_ops._conv.problem import pair
from advdl_ops._watch import is_proxy
from advdl_ops.models._feature_info import FeatureInfo, checked_indices
from advdl_ops.models._layers import (
    Layers,
    NormFactory,
    check_counts,
    check_entries,
    check_flags,
    check_image,
    check_values_per_channel,
    conv,
    first_features,
    from_fast_format,
    init_convolutions,
    norm_factory,
    uses_fast_format,
    variant,
)
from advdl_ops.nn.run_as_one import run_as_one


class BasicBlock(torch.nn.Module):
    """Two 3x3 convolutions; the output is [N, width, H / stride, W / stride]."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        downsample: torch.nn.Module | None,
        groups: int,
        width_per_group: int,
        dilation: int,
        norm: NormFactory,
    ) -> None:
        super().__init__()
        if groups != 1 or width_per_group != 64:
            raise ValueError(
                f"BasicBlock: groups ({groups}) must be 1 and width_per_group ({width_per_group}) 64"
            )
        if dilation != 1:
            raise NotImplementedError(f"BasicBlock: dilation ({dilation}) must be 1")
        self.conv1 = conv(channels, width, 3, stride)
        self.bn1 = norm(width)
        self.relu = torch.nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3)
        self.bn2 = norm(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = run_as_one((self.conv1, self.bn1), x, act=self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return run_as_one((self.conv2, self.bn2), out, shortcut, self.relu, in_place=True)

    @property
    def last_norm(self) -> torch.nn.Module:
        return self.bn2


class Bottleneck(torch.nn.Module):
    """1x1, 3x3 and 1x1 convolution; the output is [N, 4 * width, H / stride, W / stride]."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        downsample: torch.nn.Module | None,
        groups: int,
        width_per_group: int,
        dilation: int,
        norm: NormFactory,
    ) -> None:
        super().__init__()
        inner = int(width * (width_per_group / 64.0)) * groups
        out_channels = width * self.expansion
        self.conv1 = conv(channels, inner, 1)
        self.bn1 = norm(inner)
        self.conv2 = conv(inner, inner, 3, stride, groups, dilation)
        self.bn2 = norm(inner)
        self.conv3 = conv(inner, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.relu = torch.nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = run_as_one((self.conv1, self.bn1), x, act=self.relu)
        out = run_as_one((self.conv2, self.bn2), out, act=self.relu)
        shortcut = x if self.downsample is None else self.downsample(x)
        return run_as_one((self.conv3, self.bn3), out, shortcut, self.relu, in_place=True)

    @property
    def last_norm(self) -> torch.nn.Module:
        return self.bn3


class ResNet(torch.nn.Module):
    """Residual network for classification: [N, in_channels, H, W] -> [N, num_classes].

    Any height and width from 1 on; contiguous or channels_last. With the same seed it has the same weights as
    torchvision's model.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: blocks of each of the four stages.
        num_classes: outputs of `fc`.
        in_channels: channels of the input.
        norm: "batch", or "group" (32 groups).
        zero_init_residual: initialize the last norm of each block with weight 0, so that each block is its shortcut.
        groups, width_per_group: of the 3x3 convolutions (`Bottleneck` only).
        replace_stride_with_dilation: for stages 2, 3 and 4, whether to keep the resolution and dilate instead
            (`Bottleneck` only).
        stem: "imagenet" (7x7 stride 2, then 3x3 max-pool stride 2) or "small" (3x3 stride 1, no max-pool, same keys).
            "small" is for images under 64 px, for which "imagenet" reduces the resolution too much.
        name: what error messages call the model.

    Raises:
        ValueError, NotImplementedError: when built, an option out of range; in `forward`, ValueError for an input of
            another rank or without a pixel and for one value per channel in training, before any statistic changes;
            RuntimeError for another channel count and for integers; TypeError for an input that is not a tensor.
    """

    last_layers: ClassVar[tuple[str, ...]] = ("fc",)  # read by load_weights
    feature_extractor: ClassVar[type[ResNetEncoder]]  # for `features_only=True` of `create_model`

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        norm: str = "batch",
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        stem: str = "imagenet",
        name: str = "resnet",
    ) -> None:
        super().__init__()
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = (False, False, False)
        check_entries(
            name, 3, check_flags, replace_stride_with_dilation=replace_stride_with_dilation
        )
        check_entries(name, 4, layers=layers)
        check_counts(
            name,
            num_classes=num_classes,
            in_channels=in_channels,
            groups=groups,
            width_per_group=width_per_group,
        )
        check_flags(name, zero_init_residual=zero_init_residual)
        if stem not in ("imagenet", "small"):
            raise ValueError(f'{name}: stem ({stem!r}) must be "imagenet" or "small"')
        self.name = name
        small = stem == "small"
        make_norm = norm_factory(name, norm)
        self.conv1 = conv(in_channels, 64, 3) if small else conv(in_channels, 64, 7, 2)
        self.bn1 = make_norm(64)
        self.relu = torch.nn.ReLU(inplace=True)
        self.maxpool = torch.nn.Identity() if small else torch.nn.MaxPool2d(3, 2, 1)

        # With dilated stages, training keeps the input's format: convolutions gain nothing (deeplabv3_resnet50: 620
        # against 645 ms), and dropout on images, as in the heads, draws its numbers in memory order.
        self.is_dilated = any(replace_stride_with_dilation)
        stages: list[torch.nn.Sequential] = []
        channels, dilation = 64, 1
        for stage in range(4):
            width = 64 << stage
            stride, first_dilation = (1 if stage == 0 else 2), dilation
            if stage > 0 and replace_stride_with_dilation[stage - 1]:
                # The first block still has the old dilation. It grows from the next block on.
                dilation, stride = dilation * stride, 1
            blocks: list[torch.nn.Module] = []
            for index in range(layers[stage]):
                first = index == 0
                out_channels = width * block.expansion
                downsample = None
                if first and (stride != 1 or channels != out_channels):
                    # Built before its block, although its keys come later, for torchvision's order of random numbers.
                    downsample = Layers(
                        conv(channels, out_channels, 1, stride), make_norm(out_channels)
                    )
                blocks.append(
                    block(
                        channels,
                        width,
                        stride if first else 1,
                        downsample,
                        groups,
                        width_per_group,
                        first_dilation if first else dilation,
                        make_norm,
                    )
                )
                channels = out_channels
            stages.append(torch.nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(channels, num_classes)
        self._init_weights(zero_init_residual)

    def _init_weights(self, zero_init_residual: bool) -> None:
        init_convolutions(self)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, BasicBlock | Bottleneck):
                    torch.nn.init.zeros_(module.last_norm.weight)  # type: ignore[arg-type]

    def _check_input(self, x: Tensor) -> None:
        check_image(self.name, x, self.conv1)
        last = [self.bn1, *self._stages()][-1]
        check_values_per_channel(self.name, x, last, self._pixels_of_one)

    def _pixels_of_one(self) -> int:
        """The largest side of an image that becomes one pixel in the last stage."""
        return _reduction((self.conv1, self.maxpool, *self._stages()))

    def _stages(self) -> list[torch.nn.Module]:
        names = [f"layer{stage}" for stage in range(1, 5)]
        return [self._modules[name] for name in names if name in self._modules]  # type: ignore[misc]

    def _stem(self, x: Tensor) -> Tensor:
        return run_as_one((self.conv1, self.bn1), x, act=self.relu)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        is_fast = uses_fast_format(self, x, not self.is_dilated)
        x = self.maxpool(first_features(self._stem, x, is_fast))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNetEncoder(ResNet):
    """`ResNet` without its classifier, with the same arguments: a list of features, as timm's `features_only=True`.

    `load_weights(model.encoder, "resnet34.pth")` accepts torchvision's file of a classifier.

    Args:
        out_indices: which features, 0 (the stem's) to 4 (the last stage's); negative ones count from the end. Stages
            behind the last of them are left out.

    Attributes:
        feature_info: channels, reduction and module of each feature, see `FeatureInfo`.
    """

    last_layers: ClassVar[tuple[str, ...]] = ()  # read by load_weights: there is none

    def __init__(
        self, *args: Any, out_indices: Sequence[int] = (0, 1, 2, 3, 4), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.feature_info = FeatureInfo(self._describe(), checked_indices(self.name, out_indices))
        every_key = set(self.state_dict())
        del self.avgpool, self.fc
        for stage in range(self.feature_info.out_indices[-1] + 1, 5):
            delattr(self, f"layer{stage}")
        # Read by load_weights: a file may have what was left out.
        self.not_weights = frozenset(every_key - set(self.state_dict()))

    def _describe(self) -> list[dict[str, Any]]:
        parts: dict[str, tuple[torch.nn.Module, ...]] = {
            "relu": (self.conv1,),
            "layer1": (self.maxpool, self.layer1),
        }
        parts |= {f"layer{stage}": (self.get_submodule(f"layer{stage}"),) for stage in (2, 3, 4)}
        reduction, found = 1, []
        for name, stages in parts.items():
            reduction *= _reduction(stages)
            channels = [
                layer.out_channels
                for layer in stages[-1].modules()
                if isinstance(layer, torch.nn.Conv2d)
            ]
            # A block's shortcut comes last among its modules, and has as many.
            found.append({"module": name, "num_chs": channels[-1], "reduction": reduction})
        return found

    def forward(self, x: Tensor, is_fast: bool | None = None) -> list[Tensor]:  # type: ignore[override]
        """[N, in_channels, H, W] -> features at 1/2, 1/4, 1/8, 1/16 and 1/32 of H and W, rounded up.

        Args:
            is_fast: of a part of another model: whether they are in channels_last. None: they have the format of `x`.
        """
        self._check_input(x)
        is_part = not (is_fast is None or is_proxy(x))
        if not is_part:
            is_fast = uses_fast_format(self, x, not self.is_dilated)
        wanted = self.feature_info.out_indices
        out = first_features(self._stem, x, bool(is_fast))
        features = [out]
        out = self.maxpool(out)
        for stage in range(1, wanted[-1] + 1):
            out = getattr(self, f"layer{stage}")(out)
            features.append(out)
        found = [features[index] for index in wanted]
        return found if is_part else [from_fast_format(feature, x) for feature in found]


def _reduction(stages: Sequence[torch.nn.Module]) -> int:
    """By how much the strides of these modules, as they are, reduce height and width."""
    strides = 1
    for stage in stages:
        for name, layer in stage.named_modules():
            if "downsample" not in name and isinstance(layer, torch.nn.Conv2d | torch.nn.MaxPool2d):
                strides *= pair(layer.stride)[0]
    return strides


def encoded(model: torch.nn.Module, encoder: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The features of `x` by `encoder`, a part of `model`.

    The memory format is the model's to choose, because somebody may look at what is behind the encoder.
    """
    if not (isinstance(encoder, ResNetEncoder) and isinstance(x, Tensor)):
        return encoder(x)
    return encoder(x, is_fast=uses_fast_format(model, x, not encoder.is_dilated))


ResNet.feature_extractor = ResNetEncoder


_RESNET50: dict[str, Any] = {"block": Bottleneck, "layers": (3, 4, 6, 3)}

resnet18 = variant("resnet18", "ResNet-18", ResNet, block=BasicBlock, layers=(2, 2, 2, 2))
resnet34 = variant("resnet34", "ResNet-34", ResNet, block=BasicBlock, layers=(3, 4, 6, 3))
resnet50 = variant("resnet50", "ResNet-50", ResNet, **_RESNET50)
resnet101 = variant("resnet101", "ResNet-101", ResNet, block=Bottleneck, layers=(3, 4, 23, 3))
resnet152 = variant("resnet152", "ResNet-152", ResNet, block=Bottleneck, layers=(3, 8, 36, 3))
wide_resnet50_2 = variant(
    "wide_resnet50_2",
    "ResNet-50 with 3x3 convolutions twice as wide",
    ResNet,
    **_RESNET50,
    width_per_group=128,
)
resnext50_32x4d = variant(
    "resnext50_32x4d",
    "ResNeXt-50 with 32 groups of width 4",
    ResNet,
    **_RESNET50,
    groups=32,
    width_per_group=4,
)
