"""EfficientNet-B0 (Tan and Le 2019, https://arxiv.org/abs/1905.11946), timm's own.

It is among the most used of timm's networks with batch norm and SiLU. It has depthwise convolutions and
squeeze-and-excitation, which the ResNets lack, and is small enough for two CPU cores. The zoo does not have it.
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
    stock = require("timm").create_model("efficientnet_b0", drop_rate=0.0, drop_path_rate=0.0)
    return Subject(stock, None, (random_images(case),), random_labels(1000, case.shape[:1]))


add = functools.partial(networks.add, "efficientnet_b0", subject, extras=("torchvision", "timm"))
add(8, 224, training=False)
add(16, 128, training=True)
add(4, 64, training=False, hidden=True)
add(4, 64, training=True, hidden=True)
add(256, 224, training=True, device="cuda", dtype="bfloat16")
add(256, 224, training=False, device="cuda", dtype="bfloat16")
