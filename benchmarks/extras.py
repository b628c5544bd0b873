"""Optional packages: imported where they are needed, and one sentence where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

PACKAGES = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "torch": "torch"}


class MissingExtra(RuntimeError):
    pass


def require(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.split(".", 1)[0]
        if error.name is None or error.name.split(".", 1)[0] != top:
            raise
        package = PACKAGES[top]
        raise MissingExtra(
            f"this needs {package}, which is not installed: python -m pip install {package}"
        ) from error
