"""Imports optional packages. If one is missing, the error is one sentence that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from .peers import NEED_TORCHVISION, declare_torchvision_operators

# Module -> arguments for pip. torchvision, and timm which depends on it, must not replace torch by another build, so
# they are installed without dependencies, and timm's other dependencies are listed.
PACKAGES = {
    "rich": "rich",
    "matplotlib": "matplotlib",
    "sklearn": "scikit-learn",
    "torch": "torch",
    "torchvision": "--no-deps torchvision",
    "timm": "--no-deps timm",
    "diffusers": "diffusers",
    "huggingface_hub": "huggingface_hub",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "PIL": "pillow",
}


class MissingExtra(RuntimeError):
    pass


def require(module: str) -> ModuleType:
    try:
        if module.split(".", 1)[0] in NEED_TORCHVISION:
            declare_torchvision_operators()
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".", 1)[0]
        if missing not in PACKAGES:
            raise
        package = PACKAGES[missing]
        raise MissingExtra(
            f"this needs {package.split()[-1]}, which is not installed: python -m pip install {package}"
        ) from error
