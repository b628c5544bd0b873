"""Models by name: `register_model`, `create_model`, `list_models`."""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from advdl_ops._lean.models import Levels, set_lean
from advdl_ops.models._weights import load_weights

_Builder = TypeVar("_Builder", bound=Callable[..., torch.nn.Module])
_BUILDERS: dict[str, Callable[..., torch.nn.Module]] = {}


def register_model(builder: _Builder) -> _Builder:
    """Decorator: makes `builder` known to `create_model` under its own name.

    The builder takes `weights` and the model's options as keywords, each with a default: among them `num_classes`, and
    `in_channels` if its inputs are images.

    Raises:
        ValueError: another builder has this name.
    """
    name = builder.__name__
    known = _BUILDERS.get(name)
    # The same function again means that its module was reloaded, which is not a conflict.
    if known is not None and known.__module__ != builder.__module__:
        raise ValueError(f"register_model: {name!r} is taken by {known.__module__}")
    _BUILDERS[name] = builder
    return builder


def list_models(pattern: str | None = None) -> list[str]:
    """Names that `create_model` takes, sorted; `pattern` is a shell pattern such as `"*resnet*"`."""
    names = sorted(_BUILDERS)
    return names if pattern is None else fnmatch.filter(names, pattern)


def _nearest(name: str) -> list[str]:
    # A prefix ("resnext50") comes first, then any part of a name, then names with a few changed letters.
    longer = [known for known in list_models() if name and name in known]
    longer.sort(key=lambda known: not known.startswith(name))
    close = difflib.get_close_matches(name, list_models(), n=3, cutoff=0.5)
    return list(dict.fromkeys(longer + close))[:3]


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    lean: Levels = None,
    **options: Any,
) -> torch.nn.Module:
    """Builds a model of the zoo.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the last layer (in a language model the vocabulary). Default: the model's own.
        in_channels: channels of images. Default: the model's own (3, for RGB). Models of tokens have no such option.
        weights: a local `.pth`, `.pt` or `.safetensors` file; see `load_weights`. Nothing is downloaded.
        lean: less memory in training, at the same gradients: ``None``, "block", "stage", "deep" or "deepest", or a dict
            of these by names of modules; see `docs/lean_training.md`.
        options: the model's own keywords, such as `zero_init_residual` of `ResNet`. ResNets also take timm's
            `features_only=True`, with which they return a list of features, `out_indices`, and have `feature_info`.

    Returns:
        The model in train mode, fp32, on torch's default device.

    Raises:
        ValueError: unknown name (the message has the nearest names), bad option values, an unknown level, or a weights
            file that does not fit.
        TypeError: an option that the model does not have.
        FileNotFoundError: `weights` is not a file.
    """
    builder = _BUILDERS.get(name) if isinstance(name, str) else None
    if builder is None:
        near = _nearest(name.lower()) if isinstance(name, str) else []
        hint = f"did you mean {' or '.join(near)}?" if near else "list_models() has the names"
        raise ValueError(f"create_model: unknown model {name!r}; {hint}")
    # Options left out are not passed on, so that the builder's defaults apply.
    given = {"num_classes": num_classes, "in_channels": in_channels}
    options.update({key: value for key, value in given.items() if value is not None})
    if options.get("features_only") is False:  # as timm's callers pass it
        del options["features_only"]
    model = builder(**options)
    set_lean(model, lean, caller="create_model")
    if weights is not None:
        load_weights(model, weights, caller="create_model")
    return model
