"""Layers of this package under ``torch.ao.quantization``, which looks for torch's exact classes: they become torch's.

A layer gets torch's class when it is fused with its neighbours (``fuse_modules``), or when it gets a configuration
(``prepare``, ``prepare_qat``, ``quantize_dynamic``), which are the first steps.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..activation import IDENTITY
from ._one_by_one import layer_of


class Configuration:
    """The attribute ``qconfig``, by which ``torch.ao.quantization`` says how a layer is to be quantized.

    Args:
        original: torch's class, which the layer gets with a configuration.
    """

    def __init__(self, original: type[torch.nn.Module]) -> None:
        self.original = original

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        if "qconfig" in layer.__dict__:
            return layer.__dict__["qconfig"]
        caller: Any = sys._getframe(1)
        if caller.f_code.co_name == "__get__":  # of a subclass
            caller = caller.f_back
        if caller.f_code.co_name == "_propagate_qconfig_helper":
            # It has looked for type(layer) and asks for the layer's own. A layer's name comes before its class.
            asked = caller.f_locals.get("qconfig_dict", {})
            name = caller.f_locals.get("prefix")
            if self.original in asked and name not in asked:
                return asked[self.original]
        raise AttributeError(f"{type(layer).__name__} has no attribute 'qconfig'")

    def __set__(self, layer: Any, value: Any) -> None:
        if value is not None:
            become_torchs(layer)
        layer.__dict__["qconfig"] = value

    def __delete__(self, layer: Any) -> None:
        del layer.__dict__["qconfig"]


def become_torchs(layer: Any) -> None:
    """Gives a layer torch's class. Layers of other packages, and subclasses outside of this package, keep theirs.

    Raises:
        RuntimeError: the layer computes what torch's does not.
    """
    kind = type(layer)
    if layer_of(layer) is not kind or not kind.__module__.startswith("advdl_ops.nn."):
        return
    beyond = _beyond_torch(layer)
    if beyond:
        raise RuntimeError(
            f"torch.ao.quantization: {kind.__name__} has {beyond}, which torch's layer does not have; set its qconfig "
            "to None to leave it as it is"
        )
    original = kind.qconfig.original
    object.__setattr__(layer, "__class__", original)
    if original is torch.nn.LSTM:
        layer._init_flat_weights()  # this package's layer does not maintain them


def _beyond_torch(layer: Any) -> str:
    """The options in use that torch's layer does not have."""
    own = {
        "an activation of its own": getattr(layer, "act", IDENTITY) != IDENTITY,
        "a process_group": getattr(layer, "synchronized", None) is not None,
        "layer_norm": getattr(layer, "layer_norm", False),
        "zoneout": getattr(layer, "zoneout", 0) not in (0, (0, 0), [0, 0]),
        "recurrent_dropout": layer.training and getattr(layer, "recurrent_dropout", 0) > 0,
    }
    return " and ".join(name for name, used in own.items() if used)


def register_fusions(ours: Mapping[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
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
