"""``convert_sync_batchnorm``: batch norms that take the statistics of all processes."""

from __future__ import annotations

from typing import Any

import torch

from ..functional._norm import WORLD
from ..nn import BatchNormAct2d
from ..nn.batch_norm_act import check_group
from .layers import Counterpart, Left, convert, counterpart_of

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm
_SyncBatchNorm = torch.nn.SyncBatchNorm


def convert_sync_batchnorm(module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
    """Makes batch norms take the statistics of all processes in training; in place.

    This package's and torch's ``BatchNorm2d`` run on CPU and GPU, and keep parameters, buffers, hooks and identity.
    Torch's other batch norms are replaced by :class:`torch.nn.SyncBatchNorm`, which trains on GPUs alone, as
    :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm` does. They lose their hooks.

    Args:
        module: any module; it keeps its parameters, buffers and ``state_dict`` keys.
        process_group: a ``torch.distributed`` group, ``None`` or ``"world"`` for all processes. It need not be
            initialized yet.

    Returns:
        ``module``, or what replaces it if it is itself one of torch's other batch norms.

    Raises:
        TypeError: ``module`` is not a module, or ``process_group`` is something else.
        ValueError: a ``BatchNorm2d`` may compute something of its own (a subclass, a replaced forward, a parametrized
            weight, an activation without a kernel), or this process is not in the group.

    If an error is raised, nothing is changed.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"convert_sync_batchnorm: module ({type(module).__name__}) must be a torch.nn.Module"
        )
    group = WORLD if process_group is None else process_group
    check_group("convert_sync_batchnorm", group)
    counterparts = [(layer, _counterpart(name, layer)) for name, layer in module.named_modules()]
    for layer, counterpart in counterparts:
        if counterpart is not None and issubclass(counterpart.layer, BatchNormAct2d):
            convert(layer, counterpart)
        if isinstance(layer, BatchNormAct2d):
            layer.process_group = group
    return _to_torchs(module, None if group == WORLD else group)


def _counterpart(name: str, layer: torch.nn.Module) -> Counterpart | None:
    if not isinstance(layer, _BatchNorm) or isinstance(layer, _SyncBatchNorm):
        return None
    try:
        return counterpart_of(layer)
    except Left as reason:
        raise ValueError(
            f"convert_sync_batchnorm: {name or 'module'} ({type(layer).__name__}) cannot be synchronized: {reason}"
        ) from None


def _to_torchs(module: torch.nn.Module, group: Any) -> torch.nn.Module:
    if isinstance(module, (BatchNormAct2d, _SyncBatchNorm)):
        return module
    if isinstance(module, _BatchNorm):
        return _SyncBatchNorm.convert_sync_batchnorm(module, group)
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _to_torchs(child, group)
    return module
