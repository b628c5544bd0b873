"""ConvNeXt-T (Liu et al. 2022, https://arxiv.org/abs/2201.03545): torchvision's own, optimized.

It has layer norm, and no 3x3 convolution: none is Winograd's. The zoo has none.
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

    # Dropped paths are random, so that no two providers would compute the same.
    stock = require("torchvision.models").convnext_tiny(weights=None, stochastic_depth_prob=0.0)
    return Subject(stock, None, (random_images(case),), random_labels(1000, case.shape[:1]))


add = functools.partial(networks.add, "convnext_tiny", subject, extras=("torchvision",))
add(4, 224, training=False, target=">= 1.0x best stock")
add(2, 32, training=False, hidden=True)
