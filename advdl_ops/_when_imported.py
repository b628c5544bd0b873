"""Calls a function when a module of another package is imported, without importing it."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_Function = Callable[[Any], None]


def when_imported(name: str, function: _Function) -> None:
    """``function(module)``, now or right after the import of the module ``name``."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, function))


class _Finder(MetaPathFinder):
    """Finds the module as Python would, with a loader that calls the function behind it."""

    def __init__(self, name: str, function: _Function) -> None:
        self.name, self.function = name, function
        self.asking = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.name or getattr(self.asking, "value", False):
            return None
        self.asking.value = True  # this thread alone asks the other finders
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking.value = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.finder.function(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)

    def __getattr__(self, name: str) -> Any:  # get_source and others
        return getattr(self.loader, name)
