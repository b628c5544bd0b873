"""Imports torchvision's Python models beside a torch that its binary does not fit.

torchvision's wheels are linked to CUDA builds of torch. Beside a CPU-only torch their operators do not load, and
`import torchvision` then stops at the first operator it registers a fake for. Declaring those schemas is enough: the
models call none of them.
"""

import importlib
import importlib.util
import pathlib
from types import ModuleType

import pytest
import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
    + "int pooled_width, int sampling_ratio, bool aligned) -> Tensor",
)
_declared: list[torch.library.Library] = []  # the schemas live as long as this object


def _has_own_operators(package: pathlib.Path) -> bool:
    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return True
    return False


def torchvision_models() -> ModuleType:
    """`torchvision.models`; skips the calling test or module where torchvision is not installed."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("torchvision is not installed", allow_module_level=True)
    if not _declared and not _has_own_operators(pathlib.Path(spec.submodule_search_locations[0])):
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _declared.append(library)
    return importlib.import_module("torchvision.models")
