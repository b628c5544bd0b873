"""Fused ops as functions."""

from .batch_norm_act import batch_norm_act
from .conv_bn_act import conv_bn_act
from .group_norm import group_norm, instance_norm, layer_norm_2d
from .lstm import lstm, lstm_cell

__all__ = [
    "batch_norm_act",
    "conv_bn_act",
    "group_norm",
    "instance_norm",
    "layer_norm_2d",
    "lstm",
    "lstm_cell",
]
