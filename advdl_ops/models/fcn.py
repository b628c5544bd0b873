"""FCN: Long et al. 2015, Fully Convolutional Networks for Semantic Segmentation, https://arxiv.org/abs/1411.4038

`state_dict` keys and numerics of torchvision. It differs from the paper by its network, a ResNet (He et al. 2015,
https://arxiv.org/abs/1512.03385) with dilation in place of the last two strides, and by a single interpolation instead
of several learned steps of upsampling.
"""

from __future__ import annotations

from advdl_ops.models._layers import variant
from advdl_ops.models._segmentation import FCNHead, SegmentationModel


class FCN(SegmentationModel):
    __doc__ = SegmentationModel.__doc__
    head = FCNHead


fcn_resnet50 = variant("fcn_resnet50", "FCN on ResNet-50", FCN, layers=(3, 4, 6, 3))
