"""The level of lean training of a model, and of parts of it."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..backend import is_distributed
from .max_pool2d import MaxPool2d
from .recipes import LEVELS, saving

_Module = torch.nn.Module
Levels = str | None | Mapping[str, str | None]

# Of a class that `set_lean` made: the class before. Of an instance: its level.
_PLAIN, _LEVEL = "_advdl_plain", "_advdl_lean"


def set_lean(model: _Module, lean: Levels = "block", *, caller: str = "set_lean") -> _Module:
    """Sets what backward makes again instead of keeping it; in place.

    Args:
        model: of this package's layers: from ``create_model``, or from ``optimize``.
        lean: ``None`` (nothing), ``"block"``, ``"stage"``, ``"deep"`` or ``"deepest"`` for the whole model, or a dict
            of these by the names of modules (``""``: the model). A part without an entry has the level of what it is
            in. A level of a ``ModuleList`` or ``ModuleDict`` is one of the modules in it. A module whose forward the
            model does not call keeps what it would keep without a level.

    Returns:
        ``model``. Its gradients are the same at every level, to the last bit.

    Raises:
        ValueError: an unknown level, a name that no module has, or two levels for one module. Nothing is changed then.
        TypeError: ``lean`` is neither a string, nor ``None``, nor a mapping; or a level is given to a module whose
            forward was made by ``torch.fx`` or ``torch.jit`` or was replaced on the instance, or to a parametrized one.
            A module around it can have a level.
    """
    levels = checked(model, lean, caller)
    for layer in model.modules():
        layer.__dict__.pop(_LEVEL, None)
        object.__setattr__(layer, "__class__", plain_class(type(layer)))
        if levels and type(layer) is torch.nn.MaxPool2d:
            object.__setattr__(layer, "__class__", MaxPool2d)
    for name, level in levels.items():
        layer = model.get_submodule(name)
        layer.__dict__[_LEVEL] = level
        object.__setattr__(layer, "__class__", _lean_class(type(layer)))
    return model


def lean_of(model: _Module) -> dict[str, str | None]:
    """The levels that :func:`set_lean` set, by the names of modules."""
    return {
        name: layer.__dict__[_LEVEL]
        for name, layer in model.named_modules()
        if _LEVEL in layer.__dict__
    }


def plain_class(kind: type) -> type:
    """The class before :func:`set_lean`."""
    kind = vars(kind).get(_PLAIN, kind)
    return torch.nn.MaxPool2d if kind is MaxPool2d else kind


def checked(model: _Module, lean: Any, caller: str) -> dict[str, str | None]:
    """``lean`` as a dict by the names of modules with a forward, each module once; without what changes nothing."""
    if not isinstance(model, _Module):
        raise TypeError(f"{caller}: model ({model!r}) must be a torch.nn.Module")
    if lean is None or isinstance(lean, str):
        lean = {"": lean}
    if not isinstance(lean, Mapping):
        raise TypeError(f"{caller}: lean ({lean!r}) must be a level, or a dict of levels by names")
    names = dict(model.named_modules(remove_duplicate=False))
    for name, level in lean.items():
        if level is not None and level not in LEVELS:
            raise ValueError(
                f"{caller}: lean ({level!r}) must be None or one of {', '.join(LEVELS)}"
            )
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{caller}: lean ({name!r}) must name a module of the model{hint}")
    if set(lean.values()) <= {None}:
        return {}
    given = {name: level for name, level in lean.items() if _has_forward(names[name])}
    for name, level in lean.items():
        if name not in given:
            inner = _with_forward(name, names[name])
            given = {each: level for each in inner if each not in lean} | given
    first: dict[_Module, str] = {}
    for name, level in given.items():
        _check_class(names[name], name, caller)
        other = first.setdefault(names[name], name)
        if given[other] != level:
            raise ValueError(
                f"{caller}: lean gives two levels ({given[other]!r}, {level!r}) to one module ({other!r}, {name!r})"
            )
    return {name: given[name] for name in first.values()}


def _has_forward(layer: _Module) -> bool:
    # The class of a ScriptModule has no forward that could be asked for.
    if isinstance(layer, torch.jit.ScriptModule):
        return True
    return type(layer).forward is not _Module.forward or "forward" in layer.__dict__


def _with_forward(name: str, container: _Module) -> list[str]:
    """The names of the outermost modules with a forward in a ``ModuleList`` or the like."""
    found = []
    for child, layer in container.named_children():
        full = f"{name}.{child}" if name else child
        found += [full] if _has_forward(layer) else _with_forward(full, layer)
    return found


def _check_class(layer: _Module, name: str, caller: str) -> None:
    """Refuses a module whose class somebody else makes anew, or whose forward is not its class's."""
    what = ""
    if isinstance(layer, torch.fx.GraphModule):
        what = "whose forward torch.fx makes anew"
    elif isinstance(layer, torch.jit.ScriptModule):
        what = "made by torch.jit"
    elif "forward" in layer.__dict__:
        what = "whose forward was replaced on the instance"
    elif torch.nn.utils.parametrize.is_parametrized(layer):
        what = "which is parametrized"
    if what:
        raise TypeError(
            f"{caller}: lean cannot give a level to {name or 'the model'} ({type(layer).__name__}), {what}; "
            "give it to a module around it"
        )


_classes: dict[type[_Module], type[_Module]] = {}


def _lean_class(kind: type[_Module]) -> type[_Module]:
    """``kind`` with a forward that runs at the level of the module."""
    if kind in _classes:
        return _classes[kind]

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with saving(_level_of(self)):
            return kind.forward(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # This class is not found by its name, so it is made again of `kind`.
        reduced: Any = kind.__reduce_ex__(self, protocol)
        make, args, *rest = reduced
        return _rebuilt, (make, tuple([kind if a is made else a for a in args])), *rest

    attributes = {
        "forward": forward, "__reduce_ex__": reduce, _PLAIN: kind,
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
    }  # fmt: skip
    made = _classes[kind] = type(kind.__name__, (kind,), attributes)
    return made


def _level_of(layer: _Module) -> str | None:
    if torch.compiler.is_compiling():
        return None
    level = layer.__dict__.get(_LEVEL)
    if level in ("deep", "deepest") and is_sharded(layer):
        # The weight of a convolution is gathered for its own backward alone.
        return "block" if level == "deep" else "stage"
    return level


def is_sharded(model: _Module) -> bool:
    """Whether ``fully_shard`` manages parameters of the model."""
    if not is_distributed():
        return False
    return any("_is_fsdp_managed_module" in layer.__dict__ for layer in model.modules())


def _rebuilt(make: Any, args: tuple[Any, ...]) -> _Module:
    layer = make(*args)
    object.__setattr__(layer, "__class__", _lean_class(type(layer)))
    return layer
