"""ResNet of targets.md: torchvision's architecture in plain PyTorch, which needs no torchvision, against the zoo.

The hidden cases of `torchvision_resnet18` check that `optimize` also works on torchvision's own class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..networks import add
from ..registry import Case

if TYPE_CHECKING:
    from ..measure_model import Subject


def subject(case: Case) -> Subject:
    from ..extras import require
    from ..measure_model import Subject, from_zoo, random_images, random_labels
    from ..stock_resnet import stock_resnet

    name = str(case.options["model"])
    if name.startswith("torchvision_"):
        name = name.removeprefix("torchvision_")
        stock, zoo = getattr(require("torchvision.models"), name)(), from_zoo(name)
    else:
        stock, zoo = stock_resnet(name), from_zoo(name)
        assert zoo is not None
        stock.load_state_dict(zoo.state_dict())  # the plain one has no initialization of its own
    return Subject(stock, zoo, (random_images(case),), random_labels(1000, case.shape[:1]))


add(
    "resnet50",
    subject,
    8,
    224,
    training=False,
    target=">= 1.0x compile with freezing, >= 1.2x best eager",
)
add("resnet50", subject, 8, 112, training=True, target="held <= 0.80x stock")
add("resnet50", subject, 8, 224, training=True, target=">= 1.15x best stock")
add("resnet18", subject, 16, 112, training=True, target=">= 1.1x best stock")
for _model in ("resnet18", "resnet34"):
    add(_model, subject, 8, 224, training=False, target=">= 1.5x best stock")
    add(_model, subject, 8, 224, training=True, target=">= 1.3x best stock")
add("resnet18", subject, 1, 224, training=False, target=">= 1.5x best stock")
add("resnet50", subject, 1, 224, training=False, target=">= 1.2x best stock")
# Held to AVX2; with AVX512-BF16 it is torch's own. One image, as stock then takes a second for it.
add("resnet18", subject, 1, 224, training=False, dtype="bfloat16", target=">= 2x best stock")
for _training in (False, True):
    add("resnet18", subject, 2, 32, training=_training, hidden=True)
    add(
        "torchvision_resnet18",
        subject,
        2,
        32,
        training=_training,
        hidden=True,
        extras=("torchvision",),
    )

# targets.md, CUDA
for _dtype in ("bfloat16", "float32"):
    add(
        "resnet50",
        subject,
        256,
        224,
        training=True,
        device="cuda",
        dtype=_dtype,
        target=">= 1.3x eager, >= 1.1x compile",
    )
    add("resnet50", subject, 128, 224, training=False, device="cuda", dtype=_dtype)
add("resnet18", subject, 256, 224, training=True, device="cuda", dtype="bfloat16")
add("resnet18", subject, 128, 224, training=False, device="cuda", dtype="bfloat16")
