"""Fused ops as functions."""

from .batch_norm_act import batch_norm_act
from .blocks import ConvNorm, basic_block, bottleneck, conv_chain
from .conv2d import conv2d
from .conv_bn_act import conv_bn_act
from .conv_transpose2d import conv_transpose2d
from .group_norm import group_norm, instance_norm, layer_norm_2d
from .lstm import lstm
from .lstm_cell import lstm_cell

__all__ = [
    "ConvNorm",
    "basic_block",
    "batch_norm_act",
    "bottleneck",
    "conv2d",
    "conv_bn_act",
    "conv_chain",
    "conv_transpose2d",
    "group_norm",
    "instance_norm",
    "layer_norm_2d",
    "lstm",
    "lstm_cell",
]
