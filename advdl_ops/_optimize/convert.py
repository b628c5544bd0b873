"""``optimize`` and ``restore``: replace the layers of any model by this package's, and back.

First a plan is made. The model is changed only when the whole plan is known to work. Converting a layer only changes
its class: parameters, buffers, hooks and all attributes remain the same objects. If a module's own ``forward`` calls a
convolution, a norm, an addition and an activation one after another, the module gets a class with a new ``forward``
that runs them as one op.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch

from .._lean.models import Levels, checked, plain_class, set_lean
from .._watch import is_watched
from ..activation import IDENTITY, qualified_name, resolve_activation
from ..nn import BatchNormAct2d
from ..nn._one_by_one import layer_of
from .aliasing import find_effects
from .codegen import fused_class, source_of
from .copies import copies_of
from .fuse import has_parts, plan_fusions
from .layers import OURS, Counterpart, Left, convert, counterpart_of
from .memory_format import evaluated_in_fast_format, in_fast_format, plan_channels_last
from .plan import LayerPlan, Plan
from .proxies import Untraceable
from .record import RECORD, record_of, update_record
from .trace import is_torchs, variants_of

__all__ = ["optimize", "restore"]


def optimize(
    model: torch.nn.Module, *, inplace: bool = False, fuse: bool = True, lean: Levels = None
) -> torch.nn.Module:
    """``model`` with this package's layers, and the same parameters, buffers, hooks and ``state_dict``.

    It computes the same as ``model``, up to rounding.

    Args:
        model: any module. Subclasses of torch's layers and parametrized or pruned layers are left unchanged. Layers
            with hooks between them are not fused. :func:`.explain` shows which, and why.
        inplace: convert the modules of ``model`` itself. Otherwise build a new tree of modules, which shares parameters
            and buffers with ``model`` (``copy.deepcopy`` first for an independent one).
        fuse: also run consecutive layers as one op.
        lean: less memory in training, at the same gradients: ``None``, ``"block"``, ``"stage"``, ``"deep"`` or
            ``"deepest"``, or a dict of these by names of modules; see ``docs/lean_training.md``.

    Returns:
        The optimized model: ``model`` itself with ``inplace``.

    Raises:
        TypeError: ``model`` is not a module, was made by ``torch.jit``, or was made by ``torch.compile`` and
            ``inplace`` is not set.
        ValueError: an unknown level, a parameter has no data yet (on the meta device), a layer is quantized, ``model``
            was optimized before, or without ``inplace`` it is wrapped by ``DistributedDataParallel`` or
            ``fully_shard``.

    If an error is raised, nothing is changed. :func:`restore` brings the previous layers back.
    """
    _check(model, inplace)
    levels = checked(model, lean, "optimize")
    plan = plan_of(model, fuse)
    copies = {} if inplace else copies_of(model)
    for layer in plan:
        made = copies.get(id(layer.module), layer.module)
        if layer.counterpart is not None:
            _convert(made, layer.counterpart)
    for layer in plan:
        made = copies.get(id(layer.module), layer.module)
        through = plan.channels_last if layer.module is model else "never"
        if layer.forward or through != "never":
            _set_forward(made, layer, through)
        for part in (part for group in layer.groups for part in group.layers):
            update_record(copies.get(id(part), part), part=True)
        if layer.notes:
            update_record(made, notes=tuple(layer.notes))
        converted = _converted_children(plan, layer.module)
        if converted:
            update_record(made, layers=converted)
    made = copies.get(id(model), model)
    return set_lean(made, levels) if levels else made


def plan_of(model: torch.nn.Module, fuse: bool = True) -> Plan:
    """What :func:`optimize` would do to ``model``, which is not changed. ``print`` shows it."""
    plan = Plan(model)
    # Two paths of a nested tree may lead to one place.
    places = Counter(id(layer) for owner in model.modules() for layer in owner._modules.values())
    for layer in plan:
        _plan_layer(layer, places[id(layer.module)])
    if fuse:
        for layer in plan:
            _find_graphs(layer)
        find_effects(plan)
        for layer in plan:
            if layer.untraceable is not None and has_parts(plan, layer.module):
                layer.notes = [f"not fused: {layer.untraceable}"]
        plan_channels_last(plan)
        plan_fusions(plan)
    return plan


def _plan_layer(layer: LayerPlan, places: int) -> None:
    """Fills in what the module becomes, and whether a group may take it.

    Args:
        places: the number of places in the model where it occurs.
    """
    module = layer.module
    try:
        layer.counterpart = counterpart_of(module)
    except Left as reason:
        layer.left = str(reason)
    if layer.counterpart is not None:
        if is_watched(module):
            layer.alone = "it has hooks"
        elif places > 1:
            layer.alone = "it stands in two places"
        if layer.alone is not None:
            layer.notes.append(f"not fused: {layer.alone}")
    if not is_watched(module) and not isinstance(module, torch.nn.Identity):
        try:
            resolve_activation("optimize", module)
        except TypeError:
            return
        layer.is_activation = True


def _find_graphs(layer: LayerPlan) -> None:
    """Traces the module's forward, unless the module is a layer that is converted or one of torch's."""
    module = layer.module
    calls_others = type(module).forward is torch.nn.Sequential.forward
    if layer.counterpart is not None or (is_torchs(module) and not calls_others):
        return
    try:
        layer.graphs = variants_of(module)
    except Untraceable as error:
        layer.untraceable = str(error)


def _converted_children(plan: Plan, owner: torch.nn.Module) -> tuple[tuple[str, str | None], ...]:
    found = []
    for name, child in owner._modules.items():
        counterpart = None if child is None else plan[child].counterpart
        if counterpart is not None:
            act = counterpart.act
            found.append((name, None if act == IDENTITY else act.name))
    return tuple(found)


def _convert(layer: torch.nn.Module, counterpart: Counterpart) -> None:
    update_record(layer, original=type(layer), converted=True, added=tuple(counterpart.attributes))
    convert(layer, counterpart)


def _set_forward(owner: torch.nn.Module, planned: LayerPlan, channels_last: str) -> None:
    """Gives ``owner`` a class with the planned forward."""
    through = {
        "always": in_fast_format, "in evaluation": evaluated_in_fast_format, "never": None,
    }[channels_last]  # fmt: skip
    names = tuple(tuple(group.names) for group in planned.groups)
    update_record(owner, original=type(owner), fused=names)
    source, objects = source_of(
        owner, planned.forward, through.__name__ if through else "", planned.graphs
    )
    if through:
        objects[through.__name__] = through
    object.__setattr__(owner, "__class__", fused_class(type(owner), source, objects))


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes :func:`optimize` in place: the modules of ``model`` get their previous classes back.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a layer has got another class since then, for example by ``parametrize`` or ``fully_shard``, or a
            ``process_group``, which its class before cannot have. Nothing is changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore: model ({type(model).__name__}) must be a torch.nn.Module")
    for name, layer in model.named_modules():
        record = record_of(layer)
        kind = plain_class(type(layer))
        made = layer_of(layer) in OURS or "_advdl_made" in vars(kind)
        # A GraphModule goes back to its class by itself when its graph changes.
        made = made or (record is not None and kind is record.original)
        if record is not None and record.original is not None and not made:
            raise ValueError(
                f"restore: model ({name or 'itself'}) must be of the class that optimize gave it, "
                f"not {qualified_name(type(layer))}"
            )
        if record is not None and isinstance(layer, BatchNormAct2d) and layer.synchronized:
            raise ValueError(
                f"restore: process_group of {name or 'the model'} must be None first: "
                f"{qualified_name(record.original or type(layer))} is not synchronized"
            )
    if any(record_of(layer) is not None for layer in model.modules()):
        set_lean(model, None)
    for layer in model.modules():
        record = layer.__dict__.pop(RECORD, None)
        if record is None or record.original is None:
            continue
        object.__setattr__(layer, "__class__", record.original)
        for name in record.added:
            layer.__dict__.pop(name, None)
        if isinstance(layer, torch.nn.LSTM):
            layer._init_flat_weights()  # this package's layer does not maintain them
    return model


def _check(model: Any, inplace: bool) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"optimize: model ({type(model).__name__}) must be a torch.nn.Module")
    for name, layer in model.named_modules():
        if isinstance(layer, torch.jit.ScriptModule):
            raise TypeError(f"optimize: model ({name or 'itself'}) must not be scripted or traced")
        if RECORD in layer.__dict__:
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
    """Raises for a wrapper that holds references to the modules: it would continue to use the old ones."""
    place = f"optimize: model ({name or 'itself'})"
    if isinstance(layer, torch._dynamo.OptimizedModule) or layer._compiled_call_impl is not None:
        raise TypeError(f"{place} must be optimized before it is compiled, or with inplace=True")
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if it is not imported, nobody uses it
    wrappers = (
        torch.nn.parallel.DistributedDataParallel,
        *(getattr(fsdp, kind) for kind in ("FSDPModule", "FullyShardedDataParallel") if fsdp),
    )
    if isinstance(layer, wrappers):
        raise ValueError(
            f"{place} must be optimized before {type(layer).__name__} wraps it, or with inplace=True"
        )
