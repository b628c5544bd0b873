"""FCN: Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, https://arxiv.org/abs/1411.4038

`state_dict` keys and numerics of torchvision. It differs from the paper by its network, a ResNet (He et al. 2015,
https://arxiv.org/abs/1512.03385) with dilation in place of the last two strides, and by a single interpolation instead
of several learned steps of upsampling.
"""

from __future__ import annotations

import os
from typing import Any

from advdl_ops.models._layers import build
from advdl_ops.models._registry import register_model
from advdl_ops.models._segmentation import FCNHead, SegmentationModel


class FCN(SegmentationModel):
    __doc__ = SegmentationModel.__doc__
    head = FCNHead


@register_model
def fcn_resnet50(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> FCN:
    """FCN on ResNet-50; `weights` as in `create_model`, options as in `FCN`."""
    name = "fcn_resnet50"
    return build(name, FCN, weights, options, layers=(3, 4, 6, 3), name=name)
