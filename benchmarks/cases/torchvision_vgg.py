"""VGG-16 with batch norm (Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556): torchvision's own, optimized.

The zoo has none. Nearly all of its multiplications are in 3x3 convolutions with stride 1.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .. import networks
from ..registry import Case

if TYPE_CHECKING:
    from ..measure_model import Subject


def subject(case: Case) -> Subject:
    from ..extras import require
    from ..measure_model import Subject, random_images, random_labels

    # Without dropout, whose random numbers would differ between the providers.
    stock = require("torchvision.models").vgg16_bn(weights=None, dropout=0.0)
    return Subject(stock, None, (random_images(case),), random_labels(1000, case.shape[:1]))


add = functools.partial(networks.add, "vgg16_bn", subject, extras=("torchvision",))
add(2, 224, training=False, target=">= 1.6x best stock")
add(2, 224, training=True, target=">= 1.4x best stock")
add(2, 32, training=False, hidden=True)
