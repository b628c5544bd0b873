"""Tables of other packages by a layer's exact class, which get this package's classes when they are imported."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from .._when_imported import when_imported

# Module and table: counters of operations, and captum's rules of layer-wise relevance propagation.
_TABLES = {
    "thop.profile": "register_hooks",
    "ptflops.pytorch_ops": "MODULES_MAPPING",
    "captum.attr._core.lrp": "SUPPORTED_LAYERS_WITH_RULES",
}


def register_classes(ours: Mapping[type[torch.nn.Module], type[torch.nn.Module]]) -> None:
    """Puts each of this package's classes where torch's is.

    Args:
        ours: torch's classes, and this package's that take their place.
    """
    for module, table in _TABLES.items():
        when_imported(module, partial(_register, table=table, ours=ours))


def _register(module: Any, table: str, ours: Mapping[type, type]) -> None:
    entries = getattr(module, table, None)
    if not isinstance(entries, dict):
        return
    for stock, own in ours.items():
        if stock in entries:
            entries.setdefault(own, entries[stock])
