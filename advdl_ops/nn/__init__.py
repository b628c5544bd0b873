"""Layers with fused kernels and the ``state_dict`` keys of ``torch.nn``.

A layer with the name of a ``torch.nn`` layer takes its arguments, with the same defaults, and further keyword
arguments. The docstrings of the other layers list their arguments.
"""

import torch as _torch

from ._quantization import register_fusions as _register_fusions
from ._registries import register_classes as _register_classes
from .batch_norm_act import BatchNormAct2d
from .conv2d import Conv2d, DepthwiseConv2d, DilatedConv2d, HybridDilatedConv
from .conv_bn_act import ConvBNAct, ConvBNReLU, conv_bn_act
from .conv_transpose2d import ConvTranspose2d
from .group_norm import (
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm2d,
)
from .lstm import LSTM, LSTMCell

__all__ = [
    "BatchNormAct2d",
    "ConvBNAct",
    "ConvBNReLU",
    "ConvTranspose2d",
    "Conv2d",
    "DepthwiseConv2d",
    "DilatedConv2d",
    "GroupNorm",
    "HybridDilatedConv",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTM",
    "LSTMCell",
    "LayerNorm2d",
    "conv_bn_act",
]

_OF_TORCHS = {
    _torch.nn.Conv2d: Conv2d,
    _torch.nn.ConvTranspose2d: ConvTranspose2d,
    _torch.nn.BatchNorm2d: BatchNormAct2d,
    _torch.nn.GroupNorm: GroupNorm,
    _torch.nn.InstanceNorm1d: InstanceNorm1d,
    _torch.nn.InstanceNorm2d: InstanceNorm2d,
    _torch.nn.InstanceNorm3d: InstanceNorm3d,
    _torch.nn.LSTM: LSTM,
    _torch.nn.LSTMCell: LSTMCell,
}
_register_fusions(_OF_TORCHS)
_register_classes(_OF_TORCHS)
