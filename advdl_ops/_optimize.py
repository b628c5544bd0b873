"""``optimize(model)``: the layers of any model by this package's, and fused where they follow each other.

A layer is converted by its class: parameters, buffers, hooks and all attributes stay the objects that they are. Where a
module's own ``forward`` calls a convolution, a norm, an addition and an activation one after another, as ``torch.fx``
finds with every submodule left whole, its class becomes one of a ``forward`` that calls them as one op (`_fuse.py`).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch

from ._counterparts import OURS, Counterpart, Left, counterpart_of, own_activation
from ._effects import Effects
from ._forward import fused_class, source_of
from ._fuse import CONVOLUTIONS, NORMS, Fusion, Parts, has_parts, is_watched, plan_fusions
from ._layout import draws, evaluated_in_fast_format, in_fast_format, why_not_inside
from ._trace import graphs_of
from ._twins import twins_of
from .activation import IDENTITY, qualified_name, resolve_activation

__all__ = ["optimize", "restore"]

_RECORD = "_advdl_optimized"


class Record(NamedTuple):
    """What :func:`optimize` did to one module, kept on it.

    Attributes:
        original: its class before, where that was changed.
        added: attributes that it has got.
        fused: names of the layers of each group that its forward runs as one op, where that was made anew.
        part: whether its parent runs it in such a group.
        notes: what else there is to tell, as why it is not fused.
    """

    original: type | None = None
    added: tuple[str, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    part: bool = False
    notes: tuple[str, ...] = ()


def optimize(
    model: torch.nn.Module, *, inplace: bool = False, fuse: bool = True
) -> torch.nn.Module:
    """``model`` on this package's layers: the same parameters, buffers, hooks and ``state_dict``, in values the same.

    Args:
        model: any module. Layers of a class of their own, parametrized or pruned ones, and what is called with hooks in
            between are left as they are; :func:`.explain` tells which and why.
        inplace: convert the modules of ``model`` itself; otherwise a new tree of modules, which shares parameters and
            buffers with ``model`` (``copy.deepcopy`` first for an independent one).
        fuse: also run layers that follow each other as one op.

    Returns:
        The optimized model: ``model`` itself with ``inplace``.

    Raises:
        TypeError: ``model`` is no module, one that ``torch.jit`` made, or one that ``torch.compile`` made, without
            ``inplace``.
        ValueError: a parameter has no data yet (on the meta device), a layer is quantized, ``model`` was optimized
            before, or without ``inplace`` it is wrapped by ``DistributedDataParallel`` or ``fully_shard``.

    Nothing is changed where an error is raised. :func:`restore` brings the layers of before back.
    """
    _check(model, inplace)
    counterparts = {}
    for layer in model.modules():
        try:
            found = counterpart_of(layer)
        except Left:
            continue
        if found is not None:
            counterparts[id(layer)] = found
    notes = {key: [f"not fused: {why}"] for key, why in _why_single(model, counterparts).items()}
    fusions: list[Fusion] = []
    through: Callable[..., Any] | None = None  # of the model's own forward
    if fuse:
        graphs, failures = graphs_of(model, counterparts.keys())
        inner = {key: [v.graph for v in variants] for key, variants in graphs.items()}
        effects = Effects(model, counterparts.keys(), inner)
        parts = _parts(model, counterparts, notes.keys(), effects)
        for owner in model.modules():
            if id(owner) in failures and has_parts(owner, parts):
                notes[id(owner)] = [f"not fused: {failures[id(owner)]}"]
        if id(model) not in counterparts and any(
            issubclass(found.layer, CONVOLUTIONS) for found in counterparts.values()
        ):
            why = why_not_inside(model, counterparts.keys(), inner, effects)
            told = "channels_last on CPU, whatever it is given"
            in_training, in_evaluation = (
                draws(v.graph for found in graphs.values() for v in found if other not in v.guards)
                for other in ("not self.training", "self.training")
            )
            if why is None and in_evaluation:
                why = "it draws random numbers"
            if why is None:
                through = evaluated_in_fast_format if in_training else in_fast_format
                if in_training:
                    told += ", in evaluation: it draws random numbers"
            notes.setdefault(id(model), []).append(told if why is None else f"not in {told}: {why}")
        fusions = plan_fusions(model, parts, graphs)
        if through is not None and not any(fusion.owner is model for fusion in fusions):
            fusions.append(Fusion(model, [], []))
    made = {id(layer): layer for layer in model.modules()} if inplace else twins_of(model)
    for key, counterpart in counterparts.items():
        _convert(made[key], counterpart)
    for fusion in fusions:
        _fuse(fusion, made, through if fusion.owner is model else None)
    for key, texts in notes.items():
        own = made[key].__dict__
        own[_RECORD] = own.get(_RECORD, Record())._replace(notes=tuple(texts))
    return made[id(model)]


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """``model``, which :func:`optimize` returned, with the classes that its modules had before, in place.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a layer got another class since, as by ``parametrize`` or ``fully_shard``. Nothing is changed then.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: model ({type(model).__name__}) must be a torch.nn.Module")
    for name, layer in model.named_modules():
        record = record_of(layer)
        made = type(layer) in OURS or "_advdl_made" in vars(type(layer))
        if record is not None and record.original is not None and not made:
            raise ValueError(
                f"restore: model ({name or 'itself'}) must be of the class that optimize gave it, "
                f"not {qualified_name(type(layer))}"
            )
    for layer in model.modules():
        record = layer.__dict__.pop(_RECORD, None)
        if record is None or record.original is None:
            continue
        object.__setattr__(layer, "__class__", record.original)
        for name in record.added:
            layer.__dict__.pop(name, None)
        if isinstance(layer, torch.nn.LSTM):
            layer._init_flat_weights()  # which this package's layer does not keep
    return model


def record_of(layer: torch.nn.Module) -> Record | None:
    """What :func:`optimize` did to this module."""
    return layer.__dict__.get(_RECORD)


def summary(model: torch.nn.Module) -> dict[str, Any]:
    """What runs as one op (``fused``, names), what was converted alone (``replaced``), and ``left``: name -> why."""
    fused: list[str] = []
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        record = record_of(layer)
        if record is None:
            why = why_left(layer)
            if why is not None:
                left[name] = why
        elif record.fused:
            prefix = f"{name}." if name else ""
            fused += [prefix + " + ".join(names) for names in record.fused]
        elif record.added and not record.part:
            replaced.append(name)
    return {"fused": fused, "replaced": replaced, "left": left}


def notes(model: torch.nn.Module) -> dict[str, list[str]]:
    """By the name of a module what :func:`optimize` did to it, or why it did not, for those who read it."""
    found = {}
    for name, layer in model.named_modules():
        record = record_of(layer)
        if record is None:
            why = why_left(layer)
            found[name] = [] if why is None else [f"left as it was: {why}"]
            continue
        found[name] = [f"one op: {' + '.join(names)}" for names in record.fused]
        if record.original is not None and record.added:
            found[name].append(f"was {qualified_name(record.original)}")
        found[name] += record.notes
    return found


def why_left(layer: torch.nn.Module) -> str | None:
    """Why a layer of a known kind is as it was; ``None`` of any other module."""
    try:
        return None if counterpart_of(layer) is None else "optimize was not called"
    except Left as reason:
        return str(reason)


def _check(model: Any, inplace: bool) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"optimize: model ({type(model).__name__}) must be a torch.nn.Module")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(f"optimize: model ({name or 'itself'}) must not be scripted or traced")
        if _RECORD in layer.__dict__:
            raise ValueError(f"optimize: model ({name or 'itself'}) must not be optimized already")
        if not inplace:
            _check_wrapper(name, layer)
        if ".quantized" in type(layer).__module__:
            raise ValueError(f"optimize: model ({name or 'itself'}) must not be quantized")
        for key, t in (*layer._parameters.items(), *layer._buffers.items()):
            if t is not None and t.is_meta:
                place = f"{name}.{key}" if name else key
                raise ValueError(
                    f"optimize: model ({place}) must have data, not be on the meta device"
                )


def _check_wrapper(name: str, layer: torch.nn.Module) -> None:
    """Raises for what holds on to the modules that it was made for: a new tree of modules would not be its."""
    place = f"optimize: model ({name or 'itself'})"
    if isinstance(layer, torch._dynamo.OptimizedModule) or layer._compiled_call_impl is not None:
        raise TypeError(f"{place} must be optimized before it is compiled, or with inplace=True")
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever uses it
    wrappers = (
        torch.nn.parallel.DistributedDataParallel,
        *(getattr(fsdp, kind) for kind in ("FSDPModule", "FullyShardedDataParallel") if fsdp),
    )
    if isinstance(layer, wrappers):
        raise ValueError(
            f"{place} must be optimized before {type(layer).__name__} wraps it, or with inplace=True"
        )


def _why_single(model: torch.nn.Module, counterparts: dict[int, Counterpart]) -> dict[int, str]:
    """By id of a converted layer why no forward may run it together with others."""
    places = Counter(id(layer) for _, layer in model.named_modules(remove_duplicate=False))
    reasons = {}
    for layer in model.modules():
        if id(layer) in counterparts:
            if is_watched(layer):
                reasons[id(layer)] = "it has hooks"
            elif places[id(layer)] > 1:
                reasons[id(layer)] = "it stands in two places"
    return reasons


def _parts(
    model: torch.nn.Module,
    counterparts: dict[int, Counterpart],
    single: Collection[int],
    effects: Effects,
) -> Parts:
    layers: dict[int, tuple[type[torch.nn.Module], str | None]] = {}
    for key, found in counterparts.items():
        if key not in single and issubclass(found.layer, (*CONVOLUTIONS, *NORMS)):
            act = own_activation(found)
            layers[key] = found.layer, None if act == IDENTITY else act.name
    activations = set()
    for layer in model.modules():
        if not is_watched(layer) and not isinstance(layer, torch.nn.Identity):
            try:
                resolve_activation("optimize", layer)
            except TypeError:
                continue
            activations.add(id(layer))
    return Parts(layers, activations, counterparts.keys(), effects)


def _convert(layer: torch.nn.Module, counterpart: Counterpart) -> None:
    layer.__dict__[_RECORD] = Record(type(layer), tuple(counterpart.attributes))
    layer.__dict__.update(counterpart.attributes)
    object.__setattr__(layer, "__class__", counterpart.layer)


def _fuse(
    fusion: Fusion, made: dict[int, torch.nn.Module], through: Callable[..., Any] | None
) -> None:
    owner = made[id(fusion.owner)]
    names = tuple(tuple(group.names) for group in fusion.groups)
    owner.__dict__[_RECORD] = Record(type(owner), fused=names)
    source, objects = source_of(owner, fusion.variants, through.__name__ if through else "")
    if through:
        objects[through.__name__] = through
    object.__setattr__(owner, "__class__", fused_class(type(owner), source, objects))
    for group in fusion.groups:
        for layer in group.layers:
            twin = made[id(layer)].__dict__
            twin[_RECORD] = twin[_RECORD]._replace(part=True)
