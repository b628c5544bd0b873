"""DeepLabV3 on ResNet-50 (Chen et al. 2017, https://arxiv.org/abs/1706.05587): torchvision's own against the zoo's."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .. import networks
from ..registry import Case

if TYPE_CHECKING:
    from ..measure_model import Subject


def subject(case: Case) -> Subject:
    from ..extras import require
    from ..measure_model import Subject, from_zoo, random_images, random_labels

    stock = require("torchvision.models").segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=21
    )
    return Subject(
        stock,
        from_zoo("deeplabv3_resnet50", num_classes=21),
        (random_images(case),),
        random_labels(21, (case.shape[0], *case.shape[2:])),
    )


add = functools.partial(networks.add, "deeplabv3_resnet50", subject, extras=("torchvision",))
add(2, 193, training=False)
# Four images, because the branch that pools the whole image normalizes one value of each. Two values would always
# become +-1, with gradients that are only rounding errors.
add(4, 97, training=True)
add(2, 33, training=False, hidden=True)
add(4, 33, training=True, hidden=True)
add(8, 513, training=True, device="cuda", dtype="bfloat16")
add(8, 513, training=False, device="cuda", dtype="bfloat16")
