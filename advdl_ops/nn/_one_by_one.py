"""Layers called as torch's would be: where somebody watches them, or another layer has taken the place of one."""

from __future__ import annotations

from typing import Any

import torch

from .._watch import is_watched
from ..activation import ACTIVATIONS, IDENTITY, Activation, resolve_activation
from ..reference.activation import activate

Act = str | Activation | torch.nn.Module | None


def one_by_one(
    layers: tuple[torch.nn.Module, ...],
    x: Any,
    residual: Any = None,
    act: Act = None,
    in_place: bool = False,
) -> Any:
    """``act(layers(x) + residual)``, each layer with one argument. ``in_place``: the addition keeps the dtype."""
    for layer in layers:
        x = layer(x)
    if residual is not None:
        if in_place:
            x += residual
        else:
            x = x + residual
    if act is None:
        return x
    if isinstance(act, torch.nn.Module):
        return act(x)
    return activate(x, ACTIVATIONS[act] if isinstance(act, str) else act)


def unobserved(act: Act) -> Activation | None:
    """The activation; ``None`` for a module that must be called itself."""
    if act is None:
        return IDENTITY
    if isinstance(act, Activation):
        return act
    if isinstance(act, str):
        return ACTIVATIONS[act]
    try:
        return None if is_watched(act) else resolve_activation("act", act)
    except TypeError:
        return None


# The attribute of a class that `optimize` made: which layer of this package computes its instances.
LAYER = "_advdl_layer"


def layer_of(layer: torch.nn.Module) -> type:
    """The class of this package that computes the layer; for other layers, their class."""
    kind = type(layer)
    return vars(kind).get(LAYER, kind)


def has_own_parts(layer: Any) -> bool:
    """Whether the parts of a norm of timm, dropout and activation, are what this package computes.

    Somebody may have replaced them, or watch them. Other layers have no parts.
    """
    if layer_of(layer) is type(layer):
        return True
    parts = ((name, unobserved(part)) for name, part in layer._modules.items())
    return all(act is not None and (name == "act" or act == IDENTITY) for name, act in parts)
