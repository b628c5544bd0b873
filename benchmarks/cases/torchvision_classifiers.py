"""Classifiers of torchvision that the zoo does not have, optimized.

VGG-16 with batch norm (Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556): nearly all of its multiplications
are in 3x3 convolutions with stride 1, which Winograd's convolution computes. In MobileNetV2 (Sandler et al. 2018,
https://arxiv.org/abs/1801.04381) and ConvNeXt-T (Liu et al. 2022, https://arxiv.org/abs/2201.03545) it has no part.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .. import networks
from ..registry import Case

if TYPE_CHECKING:
    from ..measure_model import Subject

# What makes a classifier deterministic: of dropout and dropped paths no two providers would draw the same.
DETERMINISTIC = {
    "vgg16_bn": {"dropout": 0.0},
    "mobilenet_v2": {"dropout": 0.0},
    "convnext_tiny": {"stochastic_depth_prob": 0.0},
}


def subject(case: Case) -> Subject:
    from ..extras import require
    from ..measure_model import Subject, random_images, random_labels

    model = str(case.options["model"])
    stock = getattr(require("torchvision.models"), model)(weights=None, **DETERMINISTIC[model])
    return Subject(stock, None, (random_images(case),), random_labels(1000, case.shape[:1]))


add = functools.partial(networks.add, subject=subject, extras=("torchvision",))
add("vgg16_bn", batch=2, pixels=224, training=False, target=">= 1.6x best stock")
add("vgg16_bn", batch=2, pixels=224, training=True, target=">= 1.4x best stock")
add("mobilenet_v2", batch=8, pixels=224, training=False, target=">= 1.0x best stock")
add("convnext_tiny", batch=4, pixels=224, training=False, target=">= 1.0x best stock")
for name in DETERMINISTIC:
    add(name, batch=2, pixels=32, training=False, hidden=True)
