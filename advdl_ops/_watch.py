"""Whether somebody watches a module: by hooks, by a forward of their own, or by recording its calls.

Whatever PyTorch lets one observe must be as without this package. So a call that runs several layers as one op, or an
image in another memory format, steps aside where somebody watches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.nn.modules import module as _registries

from .backend import is_exported


def has_global_hooks() -> bool:
    """Whether hooks are registered for every module, as by ``register_module_forward_hook``."""
    return bool(
        _registries._global_forward_hooks
        or _registries._global_forward_pre_hooks
        or _registries._global_backward_hooks
        or _registries._global_backward_pre_hooks
    )


def has_hooks(layer: torch.nn.Module) -> bool:
    """Whether hooks are registered for this module."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def is_watched(layer: torch.nn.Module) -> bool:
    """Whether the layer has hooks, or its forward was replaced."""
    own = layer.__dict__
    return "forward" in own or "_conv_forward" in own or has_hooks(layer)


_looks = True


@contextlib.contextmanager
def formats_unwatched() -> Iterator[None]:
    """In it hooks do not count for :func:`sees_formats`: those of ``explain``, which tells what runs."""
    global _looks
    before, _looks = _looks, False
    try:
        yield
    finally:
        _looks = before


# Torch's layers that draw a random number for each element, in memory order.
_RANDOM = torch.nn.Dropout, torch.nn.AlphaDropout, torch.nn.RReLU
_KNOWN = "torch.nn.", "advdl_ops."


def sees_formats(model: torch.nn.Module, is_known: bool = True) -> bool:
    """Whether the memory format of a tensor inside of ``model`` would be seen: by a hook, or in the random numbers.

    Hooks of ``model`` itself do not count: they see its input and output alone.

    Args:
        is_known: whether the code of other packages' layers in it was looked at. If not, they may draw random numbers.
    """
    if _looks and has_global_hooks():
        return True
    # Not by `modules()`, which takes several times as long.
    rest = list(model._modules.values())
    for layer in rest:  # it grows meanwhile
        if layer is not None:
            if _looks and has_hooks(layer):
                return True
            if layer.training:
                if isinstance(layer, _RANDOM) and getattr(layer, "p", 1) > 0:
                    return True
                if not (is_known or layer._modules or type(layer).__module__.startswith(_KNOWN)):
                    return True
            if layer._modules:
                rest += layer._modules.values()
    return False


def is_proxy(x: Any) -> bool:
    """Whether ``torch.fx`` traces the call: ``x`` stands for a tensor."""
    return isinstance(x, fx.Proxy)


def is_observed(*values: Any) -> bool:
    """Whether hooks for every module are registered, or ``torch.fx``, ``torch.export`` or ``torch.jit.trace`` records
    a call with these arguments.
    """
    if has_global_hooks() or is_exported():
        return True
    for value in values:  # noqa: SIM110 - a generator would take longer than the look
        if isinstance(value, fx.Proxy):
            return True
    return False


def check_root(layer: torch.nn.Module, x: Any) -> None:
    """Raises where ``torch.fx`` traces the layer by itself, as most of torch's layers do."""
    if getattr(x.tracer, "root", None) is layer:
        raise fx.proxy.TraceError(
            f"{type(layer).__name__}: torch.fx cannot trace this layer by itself; trace a module that holds it"
        )


def recorded(layer: torch.nn.Module, x: Any, **kwargs: Any) -> Any:
    """The call of ``layer`` as one node of the graph that ``torch.fx`` is tracing, as of a layer of ``torch.nn``.

    Args:
        kwargs: of the call. Those that are ``None`` are left out.

    Raises:
        TraceError: ``layer`` itself is traced.
        RuntimeError: it is traced to be quantized, which would look for torch's exact classes.
    """
    check_root(layer, x)
    if type(x.tracer).__module__.startswith("torch.ao.quantization."):
        raise RuntimeError(
            f"torch.ao.quantization: FX graph mode does not know {type(layer).__name__} of advdl_ops: call "
            "advdl_ops.restore(model) before, if advdl_ops.optimize made it; else use fuse_modules and prepare"
        )
    tracer, path = x.tracer, x.tracer.path_of_module(layer)
    given = {name: value for name, value in kwargs.items() if value is not None}
    return tracer.create_proxy("call_module", path, (x,), given)
