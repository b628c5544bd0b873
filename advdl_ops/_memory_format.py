"""When a network runs in channels_last inside: the one rule of the zoo's networks and of ``optimize``.

`models/_layers.py` and `_optimize/memory_format.py` call it with the images that a network is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional._norm import needs_grad
from .functional.conv_bn_act import prefers_channels_last


def runs_in_channels_last(model: torch.nn.Module, x: Tensor) -> bool:
    """Whether ``model``, in the mode that it is in, should run the image ``x`` in channels_last."""
    # As it came -> in channels_last, fp32, 256x256 on one core: unet 790 -> 630 ms, unet_resnet34 140 -> 115,
    # deeplabv3_resnet50 610 -> 395. Training, on two: resnet18 224 -> 204, resnet50 364 -> 339, unet 650 -> 640.
    return prefers_channels_last(x, trains(model, x))


def trains(model: torch.nn.Module, x: Tensor) -> bool:
    """Whether ``model`` is in training, or a call with ``x`` records gradients."""
    # The first parameter stands for all: most often either all of them want gradients or none.
    return model.training or needs_grad(x, next(model.parameters(), None))
