"""What the code of a forward that has no graph shows: whether how a tensor lies in memory could matter to it.

Control flow on sizes, as in U-Nets that pad what does not fit, has no graph. Read are the instructions: with no writes,
no functions of its own and no calls but of torch and of submodules, every name says what it does.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
from collections.abc import Collection, Iterator
from types import CodeType, ModuleType
from typing import Any

import torch

_REFUSED = {
    "STORE_ATTR", "STORE_GLOBAL", "STORE_NAME", "STORE_SUBSCR", "STORE_SLICE", "DELETE_ATTR", "DELETE_SUBSCR",
    "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_CLOSURE", "LOAD_FROM_DICT_OR_DEREF", "MAKE_FUNCTION", "IMPORT_NAME",
    "SETUP_WITH", "BEFORE_WITH", "YIELD_VALUE",
}  # fmt: skip
_BUILTINS = {
    "abs", "bool", "enumerate", "float", "int", "len", "list", "max", "min", "range", "reversed", "round", "sum",
    "tuple", "zip",
}  # fmt: skip
_WRITING_KEYWORDS = {"inplace", "out"}


def why_layout_may_matter(layer: torch.nn.Module, names: Collection[str]) -> str | None:
    """Why the forward of ``layer`` may depend on a memory format; ``None``: it does not.

    Args:
        names: of functions, methods and attributes that do.
    """
    forward = type(layer).forward
    if "forward" in layer.__dict__ or not inspect.isfunction(forward):
        return "it was replaced"
    return next(_reasons(layer, forward, names), None)


def _reasons(layer: torch.nn.Module, forward: Any, names: Collection[str]) -> Iterator[str]:
    for constant in forward.__code__.co_consts:
        if isinstance(constant, CodeType):
            yield "it has functions of its own"
        if isinstance(constant, tuple) and not _WRITING_KEYWORDS.isdisjoint(constant):
            yield "it may write what it is given"
    for instruction in dis.get_instructions(forward):
        name = instruction.opname
        if name in _REFUSED:
            yield f"it does a {name}"
        if name.startswith("INPLACE_") or (
            name == "BINARY_OP" and instruction.argrepr.endswith("=")
        ):
            yield "it may write what it is given"
        if name == "LOAD_GLOBAL":
            yield from _of_global(instruction.argval, forward.__globals__, names)
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            yield from _of_attribute(instruction.argval, layer, names)


def _of_global(name: str, scope: dict[str, Any], names: Collection[str]) -> Iterator[str]:
    value = scope.get(name, getattr(builtins, name, None))
    if isinstance(value, ModuleType):
        if value is not math and value.__name__.partition(".")[0] != "torch":
            yield f"it uses {name}"
    elif callable(value):
        own = getattr(value, "__name__", name)
        module = getattr(value, "__module__", None) or "torch"
        if module == "builtins":
            known = own in _BUILTINS
        else:
            known = module.partition(".")[0] == "torch" and not (own in names or own.endswith("_"))
        if not known:
            yield f"it calls {name}"
    elif not isinstance(value, (bool, int, float, str, type(None))):
        yield f"it uses {name}"


def _of_attribute(name: str, layer: torch.nn.Module, names: Collection[str]) -> Iterator[str]:
    if name in names or name.endswith("_"):
        yield f"it uses {name}"
    elif hasattr(type(layer), name) and not hasattr(torch.nn.Module, name):
        yield f"it calls its own {name}"
    elif callable(layer.__dict__.get(name)):
        yield f"it calls its {name}"
