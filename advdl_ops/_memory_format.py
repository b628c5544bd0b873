"""When a network runs in channels_last inside: one rule for the zoo's networks and for ``optimize``.

`models/_layers.py` and `_optimize/memory_format.py` call it with the input images of a network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._watch import is_proxy, sees_formats
from .backend import (
    autocast_dtype,
    get_backend,
    is_exported,
    is_traced,
    needs_grad,
    transformed,
)


def runs_in_channels_last(model: torch.nn.Module, x: Tensor, is_known: bool = True) -> bool:
    """Whether ``model``, in its current mode, should run the image ``x`` in channels_last.

    Convolutions on CPU are faster there. In training, or with gradients, this holds only in fp32, because other dtypes
    were not measured. Hooks in the model must see the format that they would see without this package, and dropout must
    draw the same random numbers. ``is_known`` is that of :func:`.sees_formats`.
    """
    # Contiguous -> channels_last, fp32, 256x256 on one core: unet 790 -> 630 ms, unet_resnet34 140 -> 115,
    # deeplabv3_resnet50 610 -> 395. Training, on two: resnet18 224 -> 204, resnet50 364 -> 339, unet 650 -> 640.
    if is_proxy(x) or not x.is_cpu or get_backend() != "fused":
        return False
    if transformed() or is_traced() or is_exported():
        return False
    if trains(model, x) and (x.dtype != torch.float32 or autocast_dtype(x) is not None):
        return False
    # Looking takes longer than asking whether there is anything to convert.
    is_last = (
        x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()  # as an image of one channel is, too
    )
    return is_last or not sees_formats(model, is_known)


def in_channels_last(x: Tensor) -> Tensor:
    """``x`` ``[N, C, H, W]`` in channels_last. If that is a copy, the gradient is made contiguous, as ``x`` is."""
    out = x.contiguous(memory_format=torch.channels_last)
    if out is not x and out.requires_grad:
        out.register_hook(lambda grad: grad.contiguous())
    return out


def trains(model: torch.nn.Module, x: Tensor) -> bool:
    """Whether ``model`` is in training, or a call with ``x`` records gradients."""
    # The first parameter stands for all. In most models either all parameters need gradients or none.
    return model.training or needs_grad(x, next(model.parameters(), None))
