"""What the models share: layers that run as one op, and the checks that name the model."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from advdl_ops import nn
from advdl_ops._memory_format import in_channels_last, runs_in_channels_last, trains
from advdl_ops._schemas import conv2d_format
from advdl_ops._watch import is_proxy
from advdl_ops.backend import is_exported
from advdl_ops.models._registry import register_model
from advdl_ops.models._weights import load_weights
from advdl_ops.nn._one_by_one import unobserved
from advdl_ops.nn.run_as_one import CONVOLUTIONS, NORMS, run_as_one

NormFactory = Callable[[int], torch.nn.Module]


def _batch_norm(channels: int) -> torch.nn.Module:
    return nn.BatchNormAct2d(channels)


def _group_norm(channels: int) -> torch.nn.Module:
    # 32 groups as in Wu and He 2018 (https://arxiv.org/abs/1803.08494), fewer if 32 does not divide the width.
    return nn.GroupNorm(math.gcd(32, channels), channels)


def norm_factory(name: str, norm: str) -> NormFactory:
    """channels -> layer, for the option `norm` of the model `name`."""
    if norm == "batch":
        return _batch_norm
    if norm != "group":
        raise ValueError(f'{name}: norm ({norm!r}) must be "batch" or "group"')
    return _group_norm


def conv(
    channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """Convolution before a norm: [N, channels, H, W] -> [N, out_channels, H / stride, W / stride], rounded up."""
    padding = dilation * (size // 2)
    return nn.Conv2d(channels, out_channels, size, stride, padding, dilation, groups, bias=False)


class Layers(torch.nn.Sequential):
    """`torch.nn.Sequential` that runs a convolution, the norm and the activation behind it as one op."""

    def forward(self, input: Tensor) -> Tensor:
        x, rest = input, list(self)
        while rest:
            first, *following = rest
            group = [first]
            if isinstance(first, torch.nn.Conv2d) and following and isinstance(following[0], NORMS):
                group.append(following.pop(0))
            fuses = isinstance(group[-1], (*CONVOLUTIONS, *NORMS))
            if fuses and following and unobserved(following[0]) is not None:
                x = run_as_one(tuple(group), x, act=following.pop(0))
            else:
                x = run_as_one(tuple(group), x)
            rest = following
        return x


def conv_norm_relu(
    channels: int, out_channels: int, size: int, norm: NormFactory, dilation: int = 1
) -> Layers:
    """Convolution, norm and ReLU, with the keys `0`, `1` and `2`."""
    return Layers(
        conv(channels, out_channels, size, dilation=dilation),
        norm(out_channels),
        torch.nn.ReLU(inplace=True),
    )


def uses_fast_format(model: torch.nn.Module, x: Tensor, also_trains: bool = True) -> bool:
    """Whether `model`, the outermost one, should run `x` [N, C, H, W] in channels_last, where convolutions are faster.

    Args:
        also_trains: whether they are faster in training too.
    """
    if is_proxy(x) or (not also_trains and trains(model, x)):
        return False
    return runs_in_channels_last(model, x, is_known=False)


def first_features(first: Callable[[Tensor], Tensor], x: Tensor, is_fast: bool) -> Tensor:
    """`first(x)`, in the memory format of all later layers.

    Args:
        first: the first layers of a network, which convolve.
        x: [N, C, H, W], the input of the network.
        is_fast: `uses_fast_format` of the network.
    """
    if not is_fast:
        return first(x)
    # Converted twice, because an image of one channel has both formats, and convolutions treat it as contiguous.
    return in_channels_last(first(in_channels_last(x)))


def from_fast_format(out: Tensor, x: Tensor) -> Tensor:
    """`out` [N, C, H, W] in the memory format of the model's input `x`, whatever format was used in between."""
    if is_proxy(x) or is_exported():
        return out
    return out.contiguous(memory_format=conv2d_format(x))


def init_convolutions(model: torch.nn.Module) -> None:
    """Initializes convolutions as in He et al. 2015 (https://arxiv.org/abs/1502.01852)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def check_counts(name: str, **counts: Any) -> None:
    """Raises ValueError unless each option is an integer from 1 on."""
    for label, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {label} ({value!r}) must be a positive integer")


def check_flags(name: str, **flags: Any) -> None:
    """Raises ValueError unless each option is a bool: "no" would count as True."""
    for label, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {label} ({value!r}) must be True or False")


def check_entries(
    name: str,
    length: int | None = None,
    check: Callable[..., None] = check_counts,
    /,
    **sequences: Any,
) -> None:
    """Raises ValueError unless each option is a sequence of `length` entries that `check` passes.

    Args:
        length: any from 1 on if None.
    """
    for label, values in sequences.items():
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise ValueError(f"{name}: {label} ({values!r}) must be a sequence")
        if len(values) == 0 if length is None else len(values) != length:
            number = "an entry at least" if length is None else f"{length} entries"
            raise ValueError(f"{name}: {label} ({values!r}) must have {number}")
        check(name, **{f"{label}[{index}]": value for index, value in enumerate(values)})


def check_image(name: str, x: Tensor, first: torch.nn.Module) -> None:
    """Raises unless `x` is floating point and [N, C, H, W] with at least one pixel.

    Args:
        first: the part that takes `x`. The weight of its first layer tells C, as somebody may have replaced it.
    """
    if is_proxy(x):
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: input ({type(x).__name__}) must be a Tensor")
    channels = None
    while first._modules:  # to the first layer of a container
        first = next(iter(first.children()))
    weight = first._parameters.get("weight")  # not if it is parametrized
    if isinstance(first, torch.nn.Conv2d) and weight is not None and weight.dim() == 4:
        channels = weight.shape[1] * first.groups
    # The exception types are those of torch's own layers.
    shape = f"{name}: input shape {list(x.shape)} must be [N, {channels or 'C'}, H, W]"
    if x.dim() != 4:
        raise ValueError(shape)
    if channels is not None and x.shape[1] != channels:
        raise RuntimeError(shape)
    if 0 in x.shape[2:]:
        raise ValueError(f"{name}: input shape {list(x.shape)} must have a pixel at least")
    if not x.is_floating_point():
        raise RuntimeError(f"{name}: input dtype {x.dtype} must be floating point")


def check_values_per_channel(
    name: str,
    x: Tensor,
    stage: torch.nn.Module,
    largest: Callable[[], int] | None,
) -> None:
    """Raises ValueError if a batch norm of `stage` would get one value per channel in training.

    The norm itself would raise too, but only after earlier norms have updated their statistics.

    Args:
        largest: tells the largest side of `x` that becomes one pixel there; None if any side does.
    """
    if is_proxy(x) or x.shape[0] != 1:
        return
    # The mode of each norm counts: a part of a model in eval mode may train, and the other way round. This test comes
    # before that of the sides, so that a compiled model in eval mode has no guard on them.
    if not any(m.training for m in stage.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        return
    most = None if largest is None else largest()
    if most is None or max(x.shape[2:]) <= most:
        side = "" if most is None else f" or a side over {most}"
        raise ValueError(
            f"{name}: input shape {list(x.shape)} leaves one value per channel in training; "
            f"it must have a batch over 1{side}"
        )


_Model = TypeVar("_Model", bound=torch.nn.Module)


def build(
    name: str,
    model: type[_Model],
    weights: str | os.PathLike[str] | None,
    options: dict[str, Any],
    /,
    without: Collection[str] = (),
    **fixed: Any,
) -> _Model:
    """`model(**options, **fixed)` with the weights of a file, for `create_model`.

    Args:
        without: keywords of a base class that `model` itself sets.

    Raises:
        TypeError: an option that the constructor does not have, or that is among `fixed` or `without`.
    """
    known = _keywords(model) - {"name", *fixed, *without}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(
            f"{name}: option {unknown[0]!r} must be one of {', '.join(sorted(known))}, weights"
        )
    made = model(**options, **fixed)
    if weights is not None:
        load_weights(made, weights, caller=name)
    return made


def variant(name: str, title: str, model: type[_Model], **fixed: Any) -> Callable[..., _Model]:
    """Makes and registers the function `name`, which builds one variant of a class of networks.

    Args:
        title: the first words of its docstring.
        fixed: the options of `model` that define the variant. `name` is passed too.
    """

    def create(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> _Model:
        kind: type[_Model] = model
        if hasattr(model, "feature_extractor") and options.pop("features_only", False):
            kind = model.feature_extractor  # type: ignore[attr-defined]
        return build(name, kind, weights, options, name=name, **fixed)

    create.__name__ = create.__qualname__ = name
    create.__module__ = model.__module__
    create.__annotations__["return"] = model
    create.__doc__ = f"{title}; `weights` as in `create_model`, options as in `{model.__name__}`."
    return register_model(create)


def _keywords(model: type[torch.nn.Module]) -> set[str]:
    """The keywords of the constructor and, if it passes `**options` on, of the base classes' constructors."""
    known: set[str] = set()
    for kind in model.__mro__:
        if "__init__" in vars(kind):
            parameters = inspect.signature(kind).parameters.values()
            known.update(p.name for p in parameters if p.kind != p.VAR_KEYWORD)
            if all(p.kind != p.VAR_KEYWORD for p in parameters):
                break
    return known
