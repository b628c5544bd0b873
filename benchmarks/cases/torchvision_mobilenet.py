"""MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381): torchvision's own, optimized.

Its convolutions are pointwise and depthwise: none is Winograd's. The zoo has none.
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
    stock = require("torchvision.models").mobilenet_v2(weights=None, dropout=0.0)
    return Subject(stock, None, (random_images(case),), random_labels(1000, case.shape[:1]))


add = functools.partial(networks.add, "mobilenet_v2", subject, extras=("torchvision",))
add(8, 224, training=False, target=">= 1.0x best stock")
add(2, 32, training=False, hidden=True)
