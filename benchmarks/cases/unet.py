"""milesial's U-Net of targets.md, restated in plain PyTorch, against the zoo's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..networks import add
from ..registry import Case

if TYPE_CHECKING:
    from ..measure_model import Subject


def subject(case: Case) -> Subject:
    from ..measure_model import Subject, from_zoo, random_images, random_labels
    from ..stock_unet import StockUNet

    width = 4 if case.hidden else 64
    return Subject(
        StockUNet(3, 2, width),
        from_zoo("unet", num_classes=2, base_channels=width),
        (random_images(case),),
        random_labels(2, (case.shape[0], *case.shape[2:])),
    )


for _batch, _pixels in ((1, 256), (4, 128)):
    add("unet", subject, _batch, _pixels, training=False, target=">= 1.6x best stock")
    add("unet", subject, _batch, _pixels, training=True, target=">= 1.4x best stock")
add("unet", subject, 2, 35, training=False, hidden=True)
add("unet", subject, 2, 35, training=True, hidden=True)

# targets.md, CUDA
add(
    "unet",
    subject,
    8,
    512,
    training=True,
    device="cuda",
    dtype="bfloat16",
    target=">= 1.25x eager, >= 1.1x compile",
)
add("unet", subject, 8, 512, training=False, device="cuda", dtype="bfloat16")
