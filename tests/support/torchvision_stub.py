"""torchvision's models, which tests compare with."""

from types import ModuleType

import pytest

from benchmarks.extras import MissingExtra, require


def torchvision_models() -> ModuleType:
    """`torchvision.models`; skips the calling test or module where torchvision is not installed."""
    try:
        return require("torchvision.models")
    except MissingExtra as missing:
        pytest.skip(str(missing), allow_module_level=True)
