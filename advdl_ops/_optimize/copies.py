"""Copies of a tree of modules: one that shares parameters and buffers, and a deep copy that can be run.

`convert.py` converts a copy of the first kind, unless it works in place. `trace.py` traces one, so that assignments in
a forward do not reach the model. `report.py` and `_tune.py` run a copy of the second kind.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, deque
from types import MethodType
from typing import Any

import torch
from torch import fx

# Only these classes: a copy of a subclass, such as the frozen dict of diffusers' configurations, may lose something.
CONTAINERS = dict, OrderedDict, list, set


def copies_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """A new module with the same attributes for each module of ``model``, by its id. The children are new ones too."""
    copies: dict[int, torch.nn.Module] = {}
    for layer in model.modules():
        copied: Any = object.__new__(_class_of_copy(layer))  # fully_shard replaces __new__
        # Registries are copied, so that a later registration with one module does not reach the other.
        own = {
            name: value.copy() if name.startswith("_") and type(value) in CONTAINERS else value
            for name, value in layer.__dict__.items()
        }
        object.__setattr__(copied, "__dict__", own)
        copies[id(layer)] = copied
    for copied in copies.values():
        own = copied.__dict__
        for name, value in own.items():
            own[name] = _with_copies(value, copies)
        if isinstance(copied, fx.GraphModule):
            graphs: dict[int, Any] = {}  # by id: two attributes may be the same graph
            for name, value in own.items():
                if isinstance(value, fx.Graph):
                    own[name] = graphs.setdefault(id(value), copy.deepcopy(value))
            copied.graph = own["_graph"]  # and its code
    return copies


def _class_of_copy(layer: torch.nn.Module) -> type:
    """Its class. Each GraphModule has one of its own, in which it sets its forward."""
    kind = type(layer)
    if not isinstance(layer, fx.GraphModule):
        return kind
    # torch finds the class below it by this name, too.
    base = next(k for k in kind.__mro__ if not k.__qualname__.endswith("GraphModuleImpl"))
    return type(
        kind.__name__, (base,), {"__qualname__": kind.__qualname__, "__module__": kind.__module__}
    )


def _with_copies(value: Any, copies: dict[int, torch.nn.Module]) -> Any:
    """An attribute, with the modules in it, and those of its bound methods, replaced by their copies."""
    if isinstance(value, torch.nn.Module):
        return copies.get(id(value), value)
    if isinstance(value, MethodType):
        owner = copies.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    kind: Any = type(value)
    if kind is functools.partial:
        function, *args = (_with_copies(part, copies) for part in (value.func, *value.args))
        return functools.partial(function, *args, **_with_copies(value.keywords, copies))
    if kind in (dict, OrderedDict):
        found: Any = [(key, _with_copies(item, copies)) for key, item in value.items()]
        changed = _differ([item for _, item in found], value.values())
        return kind(found) if changed else value
    if kind in (list, tuple, deque):
        items = [_with_copies(item, copies) for item in value]
        return kind(items) if _differ(items, value) else value
    return value


def _differ(a: Any, b: Any) -> bool:
    return any(x is not y for x, y in zip(a, b, strict=True))


def copy_without_hooks(
    model: torch.nn.Module, others: dict[int, Any] | None = None
) -> torch.nn.Module:
    """A deep copy, without the user's hooks, which may write to objects outside of it.

    Args:
        others: by the id of an object: what takes its place instead of a copy.
    """
    copied = copy.deepcopy(model, {} if others is None else dict(others))
    for layer in copied.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        layer._backward_hooks.clear()
        layer._backward_pre_hooks.clear()
    return copied
