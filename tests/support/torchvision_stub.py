"""torchvision's models, which tests compare with."""

from types import ModuleType

import pytest

from benchmarks.extras import MissingExtra, require


def torchvision_models() -> ModuleType:
    """`torchvision.models`. Skips the calling test or module if torchvision is not installed."""
    try:
        return require("torchvision.models")
    except MissingExtra as missing:
        pytest.skip(str(missing), allow_module_level=True)
