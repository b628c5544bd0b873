"""``optimize(model)``: the layers of any model by this package's, and fused where they follow each other.

A layer is converted by its class: parameters, buffers, hooks and all attributes stay the objects that they are. Where a
module's own ``forward`` calls a convolution, a norm, an addition and an activation one after another, as ``torch.fx``
finds with every submodule left whole, its class becomes one of a ``forward`` that calls them as one op (`_fuse.py`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import torch

from . import nn
from ._fuse import Fusion, fused_class, original_class, plan_fusions
from .activation import IDENTITY
from .nn.batch_norm_act import BatchNormAct2d

__all__ = ["optimize", "restore"]

_RECORD = "_advdl_optimized"


class Record(NamedTuple):
    """What :func:`optimize` did to one module, kept on it.

    Attributes:
        original: its class before.
        added: attributes that it has got.
        fused: names of the layers of each group that its forward runs as one op, where that was made anew.
        part: whether its parent runs it in such a group.
    """

    original: type
    added: tuple[str, ...] = ()
    fused: tuple[tuple[str, ...], ...] = ()
    part: bool = False


class Counterpart(NamedTuple):
    """The class of this package for a layer of torch, and the attributes that it has beyond."""

    layer: type[torch.nn.Module]
    attributes: dict[str, Any]


_ACT = {"act": IDENTITY}
COUNTERPARTS: dict[type[torch.nn.Module], Counterpart] = {
    torch.nn.Conv2d: Counterpart(nn.Conv2d, _ACT),
    torch.nn.ConvTranspose2d: Counterpart(nn.ConvTranspose2d, _ACT),
    torch.nn.BatchNorm2d: Counterpart(BatchNormAct2d, {**_ACT, "folded": None}),
    torch.nn.GroupNorm: Counterpart(nn.GroupNorm, _ACT),
    torch.nn.InstanceNorm1d: Counterpart(nn.InstanceNorm1d, _ACT),
    torch.nn.InstanceNorm2d: Counterpart(nn.InstanceNorm2d, _ACT),
    torch.nn.InstanceNorm3d: Counterpart(nn.InstanceNorm3d, _ACT),
}


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
        TypeError: ``model`` is no module, or one that ``torch.jit`` or ``torch.compile`` made.
        ValueError: a parameter has no data yet (on the meta device), or a layer is quantized.

    Nothing is changed where an error is raised. :func:`restore` brings torch's layers back. Call it before
    ``torch.compile``, ``DistributedDataParallel`` or ``fully_shard`` wrap the model.
    """
    _check(model)
    if any(_RECORD in layer.__dict__ for layer in model.modules()):
        raise ValueError(f"optimize: model ({type(model).__name__}) must not be optimized already")
    replaced = [layer for layer in model.modules() if why_left(layer) is None]
    fusions = plan_fusions(model, _fusible(model, replaced)) if fuse else []
    made = {id(layer): layer for layer in model.modules()}
    if not inplace:
        made = _twins(model)
    for layer in replaced:
        _convert(made[id(layer)])
    for fusion in fusions:
        _fuse(fusion, made)
    return made[id(model)]


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """``model``, which :func:`optimize` returned, with the classes that its modules had before, in place."""
    for layer in model.modules():
        record = layer.__dict__.pop(_RECORD, None)
        if record is not None:
            layer.__class__ = record.original
            for name in record.added:
                layer.__dict__.pop(name, None)
    return model


def record_of(layer: torch.nn.Module) -> Record | None:
    """What :func:`optimize` did to this module."""
    return layer.__dict__.get(_RECORD)


def why_left(layer: torch.nn.Module) -> str | None:
    """Why a layer of a known kind is not converted, or ``None``: it is. ``"unknown"`` of any other module."""
    kind = type(layer)
    if kind not in COUNTERPARTS:
        known = next((k for k in COUNTERPARTS if isinstance(layer, k)), None)
        if known is None or isinstance(layer, COUNTERPARTS[known].layer):
            return "unknown"
        if torch.nn.utils.parametrize.is_parametrized(layer):
            return "its weight is parametrized"
        return f"a class of its own ({kind.__module__}.{kind.__qualname__})"
    if {"forward", "_conv_forward"} & layer.__dict__.keys():
        return "its forward was replaced"
    if "weight" not in layer._parameters:
        return "its weight is no parameter: pruned, or normalized by a hook"
    return None


def summary(model: torch.nn.Module) -> dict[str, Any]:
    """What runs as one op (``fused``, names), what was converted alone (``replaced``), and ``left``: name -> why."""
    fused: list[str] = []
    replaced: list[str] = []
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        record = record_of(layer)
        if record is None:
            why = why_left(layer)
            if why != "unknown":
                left[name] = why or "optimize was not called"
        elif record.fused:
            prefix = f"{name}." if name else ""
            fused += [prefix + " + ".join(names) for names in record.fused]
        elif not record.part:
            replaced.append(name)
    return {"fused": fused, "replaced": replaced, "left": left}


def _check(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"optimize: model ({type(model).__name__}) must be a torch.nn.Module")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError("optimize: model (torch.compile's) must be optimized before it is compiled")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(f"optimize: model ({name or 'itself'}) must not be scripted or traced")
        if ".quantized" in type(layer).__module__:
            raise ValueError(f"optimize: model ({name or 'itself'}) must not be quantized")
        for key, t in (*layer._parameters.items(), *layer._buffers.items()):
            if t is not None and t.is_meta:
                place = f"{name}.{key}" if name else key
                raise ValueError(
                    f"optimize: model ({place}) must have data, not be on the meta device"
                )


def _fusible(model: torch.nn.Module, replaced: list[torch.nn.Module]) -> set[int]:
    """Of the converted layers those that nothing watches and that stand in one place only, and all activations so."""
    places = Counter(id(layer) for _, layer in model.named_modules(remove_duplicate=False))
    counted = {id(layer) for layer in replaced}
    return {
        id(layer)
        for layer in model.modules()
        if places[id(layer)] == 1 or id(layer) not in counted
        if not (layer._forward_hooks or layer._forward_pre_hooks)
        if not (layer._backward_hooks or layer._backward_pre_hooks)
        if id(layer) in counted or type(layer).__module__ == "torch.nn.modules.activation"
    }


def _twins(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """By the id of each module of ``model`` a new one with the same attributes, whose children are such too."""
    twins: dict[int, torch.nn.Module] = {}
    for layer in model.modules():
        twin = layer.__class__.__new__(layer.__class__)
        twin.__dict__ = {
            # Dicts of its own: what is registered or assigned later is registered there alone.
            # Not a class of its own, as the frozen dict of diffusers' configurations: its copy() may lose something.
            name: value.copy()
            if name.startswith("_") and type(value) in (dict, OrderedDict)
            else value
            for name, value in layer.__dict__.items()
        }
        twins[id(layer)] = twin
    for layer in model.modules():
        children = twins[id(layer)]._modules
        for name, child in layer._modules.items():
            children[name] = None if child is None else twins[id(child)]
    return twins


def _convert(layer: torch.nn.Module) -> None:
    counterpart = COUNTERPARTS[type(layer)]
    layer.__dict__[_RECORD] = Record(type(layer), tuple(counterpart.attributes))
    layer.__dict__.update(counterpart.attributes)
    layer.__class__ = counterpart.layer


def _fuse(fusion: Fusion, made: dict[int, torch.nn.Module]) -> None:
    owner = made[id(fusion.owner)]
    names = tuple(tuple(group.names) for group in fusion.groups)
    owner.__dict__[_RECORD] = Record(type(owner), fused=names)
    owner.__class__ = fused_class(original_class(owner), fusion.source, fusion.names)
    for group in fusion.groups:
        for layer in group.layers:
            twin = made[id(layer)]
            record = twin.__dict__[_RECORD]
            twin.__dict__[_RECORD] = record._replace(part=True)
        # The last layer carries the activation.
        made[id(group.layers[-1])].__dict__["act"] = group.act
