"""When a network runs in channels_last inside: one rule for the zoo's networks and for ``optimize``.

`models/_layers.py` and `_optimize/memory_format.py` call it with the input images of a network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional._norm import needs_grad
from .functional.conv_bn_act import prefers_channels_last


def runs_in_channels_last(model: torch.nn.Module, x: Tensor) -> bool:
    """Whether ``model``, in its current mode, should run the image ``x`` in channels_last."""
    # Contiguous -> channels_last, fp32, 256x256 on one core: unet 790 -> 630 ms, unet_resnet34 140 -> 115,
    # deeplabv3_resnet50 610 -> 395. Training, on two: resnet18 224 -> 204, resnet50 364 -> 339, unet 650 -> 640.
    return prefers_channels_last(x, trains(model, x))


def trains(model: torch.nn.Module, x: Tensor) -> bool:
    """Whether ``model`` is in training, or a call with ``x`` records gradients."""
    # The first parameter stands for all. In most models either all parameters need gradients or none.
    return model.training or needs_grad(x, next(model.parameters(), None))
