"""Which layer of this package each layer of torch, torchvision and timm becomes.

`convert.py` gets the counterpart of every module from here, `record.py` the reason if there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import nn
from .._watch import is_observed
from ..activation import IDENTITY, Activation, qualified_name, resolve_activation
from ..nn._one_by_one import LAYER, has_own_parts


class Left(Exception):
    """Why a layer of a known kind keeps its class. ``explain`` shows the text."""


class Counterpart(NamedTuple):
    """What a layer becomes.

    Attributes:
        layer: the class of this package.
        attributes: those that it needs and the old class does not have, by name.
        act: the activation that the layer applies by itself.
    """

    layer: type[torch.nn.Module]
    attributes: dict[str, Any]
    act: Activation = IDENTITY


def counterpart_of(layer: torch.nn.Module) -> Counterpart | None:
    """What ``layer`` becomes; ``None`` if it is of no known kind.

    Raises:
        Left: it is of a known kind, but may compute something different from this package's layer.
    """
    if isinstance(layer, OURS):
        return None
    kind = type(layer)
    make = _TORCH.get(kind) or _OTHERS.get(qualified_name(kind))
    if make is None:
        if not isinstance(layer, tuple(_TORCH)):
            return None
        if torch.nn.utils.parametrize.is_parametrized(layer):
            raise Left("its weight is parametrized")
        raise Left(f"a class of its own ({qualified_name(kind)})")
    if {"forward", "_conv_forward"} & layer.__dict__.keys():
        raise Left("its forward was replaced")
    for name in getattr(layer, "_flat_weights_names", _WEIGHTS.get(kind, ("weight",))):
        if name not in layer._parameters:
            raise Left(f"its {name} is no parameter: pruned, or normalized by a hook")
        parameter = layer._parameters[name]
        # DTensor is a sharded weight, gathered for the call. It is recognized by name, to avoid importing its module.
        if type(parameter).__name__ not in ("NoneType", "Parameter", "DTensor"):
            raise Left(f"its {name} is a {type(parameter).__name__}")
        if parameter is not None and not parameter.is_floating_point():
            raise Left(f"its {name} is {parameter.dtype}")
    return make(layer)


def _plain(layer: type[torch.nn.Module], **attributes: Any) -> Callable[..., Counterpart]:
    counterpart = Counterpart(layer, attributes)
    return lambda _: counterpart


def _timm_norm(layer: type[torch.nn.Module], **attributes: Any) -> Callable[..., Counterpart]:
    """For timm's norms, which may apply dropout and an activation after the norm."""

    def make(norm: Any) -> Counterpart:
        if getattr(norm, "_fast_norm", False):
            raise Left("timm's fast norm is on: it may compute in another dtype")
        if type(getattr(norm, "drop", None)) not in (type(None), torch.nn.Identity):
            raise Left(f"it drops out by {type(norm.drop).__name__}")
        try:
            act = resolve_activation("optimize", getattr(norm, "act", None))
        except TypeError:
            raise Left(
                f"its activation ({type(norm.act).__name__}) is none of the kernels'"
            ) from None
        own = {} if hasattr(norm, "act") else _ACT
        return Counterpart(layer, {**attributes, **own}, act)

    return make


_ACT = {"act": IDENTITY}
_BATCH_NORM: dict[str, Any] = {"folded": None, "synchronized": None}
_TORCH: dict[type[torch.nn.Module], Callable[..., Counterpart]] = {
    torch.nn.Conv2d: _plain(nn.Conv2d, **_ACT),
    torch.nn.ConvTranspose2d: _plain(nn.ConvTranspose2d, **_ACT),
    torch.nn.BatchNorm2d: _plain(nn.BatchNormAct2d, **_ACT, **_BATCH_NORM),
    torch.nn.GroupNorm: _plain(nn.GroupNorm, **_ACT),
    torch.nn.InstanceNorm1d: _plain(nn.InstanceNorm1d, **_ACT),
    torch.nn.InstanceNorm2d: _plain(nn.InstanceNorm2d, **_ACT),
    torch.nn.InstanceNorm3d: _plain(nn.InstanceNorm3d, **_ACT),
    torch.nn.LSTM: _plain(
        nn.LSTM, layer_norm=False, zoneout=0.0, recurrent_dropout=0.0, forget_bias=None
    ),
    torch.nn.LSTMCell: _plain(nn.LSTMCell, forget_bias=None),
}
# By name, because none of these packages is imported here.
_OTHERS: dict[str, Callable[..., Counterpart]] = {
    "torchvision.models.convnext.LayerNorm2d": _plain(nn.LayerNorm2d, **_ACT),
    "timm.layers.norm.LayerNorm2d": _timm_norm(nn.LayerNorm2d),
    "timm.layers.norm.GroupNorm": _timm_norm(nn.GroupNorm),
    "timm.layers.norm.GroupNorm1": _timm_norm(nn.GroupNorm),
    "timm.layers.norm_act.BatchNormAct2d": _timm_norm(nn.BatchNormAct2d, **_BATCH_NORM),
    "timm.layers.norm_act.GroupNormAct": _timm_norm(nn.GroupNorm),
    "timm.layers.norm_act.GroupNorm1Act": _timm_norm(nn.GroupNorm),
    "timm.layers.norm_act.LayerNormAct2d": _timm_norm(nn.LayerNorm2d),
}
# What computes a converted layer.
OURS = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNormAct2d, nn.GroupNorm, nn.LayerNorm2d, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LSTM, nn.LSTMCell,
)  # fmt: skip


def converted_class(original: Any, layer: Any) -> type:
    """The class of a layer of class ``original`` that is computed by this package's ``layer``.

    A layer remains an instance of its class before, so that everybody who looks for that class finds it.
    """
    if issubclass(layer, original) or original is torch.nn.LSTM:
        return layer
    return _mixed_class(original, layer)


def convert(layer: torch.nn.Module, counterpart: Counterpart) -> None:
    """Makes ``layer`` its counterpart, in place: only its class changes, and attributes are added."""
    layer.__dict__.update(counterpart.attributes)
    object.__setattr__(layer, "__class__", converted_class(type(layer), counterpart.layer))


@functools.cache
def _mixed_class(original: Any, layer: Any) -> type:
    """For layers of timm and torchvision. timm's have their dropout and activation as children, and keep them."""

    def forward(self: Any, input: Any, residual: Any = None, act: Any = None) -> Any:
        alone = residual is None and act is None
        own = has_own_parts(self)
        if self.training and getattr(self, "synchronized", None) is not None:
            if not own:  # the class before would take the statistics of this process alone
                raise RuntimeError(
                    f"{original.__name__}: with a process_group, activation and dropout must be those that were "
                    "converted"
                )
        elif alone and (is_observed(input) or not own):
            return original.forward(self, input)
        return layer.forward(self, input, residual, act=act)

    def reduce(self: Any, protocol: Any) -> Any:
        return _instance_of, (original, layer), self.__getstate__()

    attributes = {
        "forward": forward, "__reduce_ex__": reduce, "__module__": original.__module__,
        "__qualname__": original.__qualname__, "__doc__": original.__doc__, LAYER: layer,
    }  # fmt: skip
    return type(original.__name__, (layer, original), attributes)


def _instance_of(original: Any, layer: Any) -> Any:
    return object.__new__(_mixed_class(original, layer))


_WEIGHTS: dict[type[torch.nn.Module], tuple[str, ...]] = {
    torch.nn.LSTMCell: ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
}
