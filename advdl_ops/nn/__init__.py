"""Layers with fused kernels and the ``state_dict`` keys of ``torch.nn``.

A layer with the name of a ``torch.nn`` layer takes its arguments, with the same defaults, and further keyword
arguments. The docstrings of the other layers list their arguments.
"""

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
