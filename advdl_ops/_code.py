"""What the code of a forward that has no graph shows: whether how a tensor lies in memory could matter to it.

Control flow on sizes, as in U-Nets that pad what does not fit, has no graph. Read are the instructions: with no writes,
no functions of its own and no calls but of torch and of submodules, every name says what it does.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
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


def why_layout_may_matter(layer: torch.nn.Module, shows: Callable[[str], bool]) -> str | None:
    """Why the forward of ``layer`` may depend on a memory format; ``None``: it does not.

    Args:
        shows: whether a function, method or attribute of this name does.
    """
    forward = type(layer).forward
    if "forward" in layer.__dict__ or not inspect.isfunction(forward):
        return "it was replaced"
    return next(_reasons(layer, forward, shows), None)


def _reasons(layer: torch.nn.Module, forward: Any, shows: Callable[[str], bool]) -> Iterator[str]:
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
            yield from _of_global(instruction.argval, forward.__globals__, shows)
        if name in ("LOAD_ATTR", "LOAD_METHOD"):
            yield from _of_attribute(instruction.argval, layer, shows)


def _of_global(name: str, scope: dict[str, Any], shows: Callable[[str], bool]) -> Iterator[str]:
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
            known = (
                module.partition(".")[0] == "torch"
                and is_function(value)
                and not (shows(own) or own.endswith("_"))
            )
        if not known:
            yield f"it calls {name}"
    elif not isinstance(value, (bool, int, float, str, type(None))):
        yield f"it uses {name}"


def _of_attribute(name: str, layer: torch.nn.Module, shows: Callable[[str], bool]) -> Iterator[str]:
    if shows(name) or name.endswith("_"):
        yield f"it uses {name}"
    if name in layer._modules:
        return
    if any(hasattr(type(m), name) and not hasattr(torch.nn.Module, name) for m in layer.modules()):
        yield f"it may call its own {name}"
    if name in layer.__dict__:
        if not _is_plain(layer.__dict__[name]):
            yield f"it uses its {name}"
    elif not any(hasattr(of, name) for of in (torch.Tensor, torch, torch.nn.functional, math)) and (
        name not in layer._parameters and name not in layer._buffers and name != "nn"
    ):
        yield f"it uses {name}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def is_function(value: Any) -> bool:
    """Whether ``value`` is a function, and no user's operator or autograd function, which may name torch's modules."""
    if not isinstance(value, (FunctionType, BuiltinFunctionType)):
        return False
    module = getattr(value, "__module__", None) or "torch"
    return not module.startswith(("torch._ops", "torch._library", "torch.autograd", "torch.jit"))
