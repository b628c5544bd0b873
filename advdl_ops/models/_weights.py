"""Loads weights from a local file into a model, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

# Keys under which training scripts store a state_dict, and prefixes that DDP and torch.compile add to the keys.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_COUNTER = "num_batches_tracked"
_SHOWN = 6


def load_weights(
    model: torch.nn.Module, path: str | os.PathLike[str], *, caller: str = "load_weights"
) -> None:
    """Copies the weights in a file into `model`. Every key must be there, with its shape.

    The file is a `.safetensors`, or a file that `torch.load(weights_only=True)` reads (`.pth`, `.pt`): a `state_dict`,
    directly or under "state_dict", "model" or "model_state_dict", with or without the `module.` of DDP. Everything is
    checked before anything is copied. If this raises, the model is unchanged.

    Args:
        model: the module to fill. Its dtypes and devices do not change.
        path: a local file.
        caller: the name at the start of errors.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a `.safetensors` file, and safetensors is not installed.
        ValueError: the file cannot be read, or its keys, shapes or kinds of tensors differ from the model's.
        TypeError: `path` is not a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"{caller}: weights must be the path of a local file (got {type(path).__name__})"
        )
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{caller}: weights {path!r} must be a local file (nothing is downloaded)"
        )
    where = f"{caller}: weights {os.path.basename(path)!r}"
    state = _unwrap(_read(path, where), where, getattr(model, "not_weights", ()))
    _check(model, state, where)
    # A plain dict, so that version numbers in the file have no effect.
    model.load_state_dict(dict(state), strict=True)


def _read(path: str, where: str) -> Any:
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f"{where} needs safetensors: pip install safetensors") from error
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{where} cannot be read: {_first_line(error)}") from error
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # files older than torch 1.6 cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise ValueError(
            f"{where} cannot be read by torch.load(weights_only=True): {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _unwrap(state: Any, where: str, ignored: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """The tensors in `state` by their keys without prefixes, except those that the model ignores (`not_weights`)."""
    for key in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{where} must hold a state_dict (got {type(state).__name__})")
    state = {key: value for key, value in state.items() if key not in ignored}
    odd = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ValueError(
            f"{where} must hold tensors only; these are none: {_shorten(map(str, odd))}"
        )
    # Copying one of these would fail after others have been copied.
    odd = [
        f"{key} ({value.layout}, {value.device.type})"
        for key, value in state.items()
        if value.layout != torch.strided or value.is_nested or value.is_meta
    ]
    if odd:
        raise ValueError(f"{where} must hold dense tensors with values: {_shorten(odd)}")
    keys = dict(zip(state, map(str, state), strict=True))
    while prefix := next(
        (p for p in _PREFIXES if all(k.startswith(p) for k in keys.values())), None
    ):
        keys = {old: new[len(prefix) :] for old, new in keys.items()}
    return {new: state[old] for old, new in keys.items()}


def _check(model: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Raises unless `state` has the keys, shapes and kinds of numbers of `model`; adds counters that old files lack."""
    own = model.state_dict()
    if not any(key.endswith(_COUNTER) for key in state):
        # Batch norm has counted batches since torch 0.4.1. Torch itself accepts older files and starts at zero.
        state.update({k: torch.zeros_like(v) for k, v in own.items() if k.endswith(_COUNTER)})
    missing = [key for key in own if key not in state]
    unexpected = sorted(key for key in state if key not in own)
    shapes = {
        key: f"{key} {list(state[key].shape)} (the model: {list(own[key].shape)})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    }
    options = {
        option: tuple(key for key in unexpected if key.startswith(prefix))
        for prefix, option in getattr(model, "parts_of_options", {}).items()
    }
    options = {option: keys for option, keys in options.items() if keys}
    others = set(unexpected).difference(*options.values())
    head = _classifier_mismatch(model, state, own, where, list(options))
    if head and not missing and not others and all(key.startswith(head[0]) for key in shapes):
        raise ValueError(head[1])
    problems = [
        f"{title} ({len(found)}): {_shorten(found)}"
        for title, found in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("other shapes", list(shapes.values())),
        )
        if found
    ]
    if problems:
        hint = f": create the model with {' and '.join(options)}" if options else ""
        raise ValueError(f"{where} must fit {_name(model)}; {'; '.join(problems)}{hint}")
    kinds = [
        f"{key} {state[key].dtype}"
        for key in own
        if own[key].is_floating_point() != state[key].is_floating_point()
        and not (key.endswith(_COUNTER) and _is_whole(state[key]))
    ]
    if kinds:
        raise ValueError(f"{where} must hold the model's kinds of numbers: {_shorten(kinds)}")


def _is_whole(counter: torch.Tensor) -> bool:
    # If all entries of a state_dict were converted to half precision, so were the counters. (Above 65504 they are
    # infinite.)
    values = counter.double()
    return bool((values.isfinite() & (values == values.trunc())).all())


def _classifier_mismatch(
    model: torch.nn.Module,
    state: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor],
    where: str,
    options: list[str],
) -> tuple[tuple[str, ...], str] | None:
    """(key prefixes, message) if only the number of classes of the last layers differs.

    `model.last_layers` names them: the classifier, and others with the same number of classes. (The attribute is not
    called `classifier`, which is a layer in some models.) `options` are the other options of the file's model.
    """
    known = own.keys() | state.keys()
    layers = [name for name in getattr(model, "last_layers", ()) if f"{name}.weight" in known]
    if not layers:
        return None
    key = f"{layers[0]}.weight"
    if key not in state or key not in own or own[key].shape[1:] != state[key].shape[1:]:
        return None
    ours, theirs = own[key].shape[0], state[key].shape[0]
    if ours == theirs:
        return None
    return tuple(f"{layer}." for layer in layers), (
        f"{where} has {theirs} classes in {key}, num_classes is {ours}: create the model with "
        f"{' and '.join([f'num_classes={theirs}', *options])}, then replace its {' and '.join(map(repr, layers))}"
    )


def _name(model: torch.nn.Module) -> str:
    return str(getattr(model, "name", type(model).__name__))


def _shorten(items: Iterable[str]) -> str:
    items = list(items)
    more = f", ... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
