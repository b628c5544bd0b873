"""What ``optimize`` did to a module, stored in the module itself, and the texts about it for the report.

`convert.py` writes the records. `report.py` and ``restore`` read them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..activation import qualified_name
from .layers import Left, counterpart_of

RECORD = "_advdl_optimized"


class Record(NamedTuple):
    """What ``optimize`` did to one module.

    Attributes:
        original: its previous class; ``None`` if that was not changed.
        converted: whether it became a layer of this package.
        added: names of the attributes that it got.
        fused: for each group that its new forward runs as one op, the names of the layers and of the fused addition and
            activation.
        part: whether its parent runs it in such a group.
        layers: the names of its children that became layers of this package, with the activation of their own.
        notes: further remarks, such as why it is not fused.
    """

    original: type | None = None
    converted: bool = False
    added: tuple[str, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    part: bool = False
    layers: tuple[tuple[str, str | None], ...] = ()
    notes: tuple[str, ...] = ()


def record_of(layer: torch.nn.Module) -> Record | None:
    """What ``optimize`` did to this module; ``None`` if nothing."""
    return layer.__dict__.get(RECORD)


def update_record(layer: torch.nn.Module, **changed: Any) -> None:
    layer.__dict__[RECORD] = (record_of(layer) or Record())._replace(**changed)


def summary(model: torch.nn.Module) -> dict[str, Any]:
    """``explain(model, as_dict=True)``: the groups, the layers replaced alone, and those left, with reasons."""
    fused: list[str] = []
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        record = record_of(layer)
        if record is None:
            why = _why_left(layer)
            if why is not None:
                left[name] = why
        elif record.fused:
            prefix = f"{name}." if name else ""
            fused += [prefix + " + ".join(names) for names in record.fused]
        elif record.converted and not record.part:
            replaced.append(name)
    return {"fused": fused, "replaced": replaced, "left": left}


def notes(model: torch.nn.Module) -> dict[str, list[str]]:
    """What ``optimize`` did to each module, or why it did nothing, by name. Groups come first."""
    found = {}
    for name, layer in model.named_modules():
        record = record_of(layer)
        if record is None:
            why = _why_left(layer)
            found[name] = [] if why is None else [f"left as it was: {why}"]
            continue
        found[name] = [f"one op: {' + '.join(names)}" for names in record.fused]
        if record.original is not None and record.converted:
            found[name].append(f"was {qualified_name(record.original)}")
        found[name] += [*record.notes, *_exchanged(layer, record)]
    return found


def _exchanged(owner: torch.nn.Module, record: Record) -> list[str]:
    """Warnings about children that somebody has put in the place of converted ones."""
    found = []
    for name, act in record.layers:
        layer = owner._modules.get(name)
        if layer is not None and RECORD in layer.__dict__:
            continue
        if type(layer).__module__.startswith("torch.ao."):  # fused by `fuse_modules`
            continue
        kind = "nothing" if layer is None else type(layer).__name__
        lost = (
            act is not None
            and not hasattr(layer, "act")
            and not getattr(layer, "_forward_hooks", ())
        )
        found.append(
            f"warning: {name} was exchanged since; it is {kind} now, and runs by itself"
            + (f". The activation of the layer before it ({act}) is lost" if lost else "")
        )
    return found


def _why_left(layer: torch.nn.Module) -> str | None:
    """Why a layer of a known kind was not changed; ``None`` for any other module."""
    try:
        return None if counterpart_of(layer) is None else "optimize was not called"
    except Left as reason:
        return str(reason)
