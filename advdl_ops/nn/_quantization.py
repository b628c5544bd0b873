"""Layers of this package under ``torch.ao.quantization``, which looks for torch's exact classes: they become torch's.

A layer gets torch's class when it is fused with its neighbours (``fuse_modules``), or when it gets a configuration
(``prepare``, ``prepare_qat``, ``quantize_dynamic``), which are the first steps.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..activation import IDENTITY
from ._one_by_one import layer_of


def torchs_class(layer: torch.nn.Module) -> type[torch.nn.Module]:
    return next(k for k in type(layer).__mro__ if k.__module__.startswith("torch.nn.modules."))


def become_torchs(layer: torch.nn.Module) -> None:
    """Gives a layer torch's class. Subclasses, and layers of other packages, keep theirs.

    Raises:
        RuntimeError: the layer has an activation of its own.
    """
    kind = type(layer)
    if layer_of(layer) is not kind or not kind.__module__.startswith("advdl_ops.nn."):
        return
    if getattr(layer, "act", IDENTITY) != IDENTITY:
        raise RuntimeError(
            f"torch.ao.quantization: {kind.__name__} has an activation of its own, which torch's layer does not have; "
            "put the activation behind the layer"
        )
    object.__setattr__(layer, "__class__", torchs_class(layer))


class Configuration:
    """The attribute ``qconfig``, by which ``torch.ao.quantization`` says how a layer is to be quantized."""

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        if "qconfig" in layer.__dict__:
            return layer.__dict__["qconfig"]
        raise AttributeError(f"{type(layer).__name__} has no attribute 'qconfig'")

    def __set__(self, layer: Any, value: Any) -> None:
        if value is not None:
            become_torchs(layer)
        layer.__dict__["qconfig"] = value

    def __delete__(self, layer: Any) -> None:
        del layer.__dict__["qconfig"]


def register_fusions(ours: dict[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Lets ``fuse_modules`` take this package's layers where it takes torch's.

    Args:
        ours: torch's classes and this package's.
    """
    try:
        from torch.ao.quantization import fuser_method_mappings
    except ImportError:  # torch will leave it to torchao
        return
    known = fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    for kinds, fuse in list(known.items()):
        choices = [(kind, ours[kind]) if kind in ours else (kind,) for kind in kinds]
        for group in itertools.product(*choices):
            known.setdefault(group, _fused_as_torchs(fuse))


def _fused_as_torchs(fuse: Any) -> Any:
    def fuse_layers(is_qat: bool, *layers: torch.nn.Module) -> Any:
        for layer in layers:
            become_torchs(layer)
        return fuse(is_qat, *layers)

    return fuse_layers
