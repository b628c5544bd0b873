"""A second tree of modules over the same parameters and buffers."""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from types import MethodType
from typing import Any

import torch

# Not classes of their own, as the frozen dict of diffusers' configurations: their copy may lose something.
CONTAINERS = dict, OrderedDict, list, set


def twins_of(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """By the id of each module of ``model`` a new one with the same attributes, whose children are such too."""
    twins: dict[int, torch.nn.Module] = {}
    for layer in model.modules():
        twin = object.__new__(type(layer))  # fully_shard has a __new__ of its own
        # Registries of its own: what is registered or assigned later is registered there alone.
        own = {
            name: value.copy() if name.startswith("_") and type(value) in CONTAINERS else value
            for name, value in layer.__dict__.items()
        }
        object.__setattr__(twin, "__dict__", own)
        twins[id(layer)] = twin
    for twin in twins.values():
        own = twin.__dict__
        for name, value in own.items():
            own[name] = _of_twins(value, twins)
    return twins


def _of_twins(value: Any, twins: dict[int, torch.nn.Module]) -> Any:
    """An attribute, with the twins in place of modules that it holds, and of those that its methods are of."""
    if isinstance(value, torch.nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, MethodType):
        owner = twins.get(id(value.__self__))
        return value if owner is None else MethodType(value.__func__, owner)
    kind: Any = type(value)
    if kind is functools.partial:
        function, *args = (_of_twins(part, twins) for part in (value.func, *value.args))
        return functools.partial(function, *args, **_of_twins(value.keywords, twins))
    if kind in (dict, OrderedDict):
        found: Any = [(key, _of_twins(item, twins)) for key, item in value.items()]
        changed = _differ([item for _, item in found], value.values())
        return kind(found) if changed else value
    if kind in (list, tuple, deque):
        items = [_of_twins(item, twins) for item in value]
        return kind(items) if _differ(items, value) else value
    return value


def _differ(a: Any, b: Any) -> bool:
    return any(x is not y for x, y in zip(a, b, strict=True))
