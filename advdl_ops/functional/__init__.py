"""Fused ops as functions."""

from .batch_norm_act import batch_norm_act
from .conv2d import conv2d
from .conv_bn_act import conv_bn_act
from .conv_transpose2d import conv_transpose2d
from .group_norm import group_norm, instance_norm, layer_norm_2d
from .lstm import lstm
from .lstm_cell import lstm_cell

__all__ = [
    "batch_norm_act",
    "conv2d",
    "conv_bn_act",
    "conv_transpose2d",
    "group_norm",
    "instance_norm",
    "layer_norm_2d",
    "lstm",
    "lstm_cell",
]
