"""Makes torchvision's Python models importable with a torch that its binary does not fit.

torchvision's wheels are linked to CUDA builds of torch. With a CPU-only torch their operators do not load, and
`import torchvision` then fails at the first operator for which it registers a fake. It is enough to declare those
schemas, because the models do not call these operators.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

NEED_TORCHVISION = ("torchvision", "timm", "diffusers")

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    + "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)
_declared: list[Any] = []  # the schemas live as long as this library object


def _has_own_operators(package: Path) -> bool:
    import torch

    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return True
    return False


def declare_torchvision_operators() -> None:
    """Call this before importing torchvision, or a package that imports it. Does nothing if it is not installed."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    if _declared or spec is None or not spec.submodule_search_locations:
        return
    if not _has_own_operators(Path(spec.submodule_search_locations[0])):
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
