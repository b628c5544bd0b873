"""Every op in plain PyTorch: fp64-capable, twice differentiable, exportable."""

from .batch_norm_act import batch_norm_act
from .conv2d import conv2d
from .conv_transpose2d import conv_transpose2d
from .group_norm import group_norm
from .lstm import lstm, lstm_cell

__all__ = [
    "batch_norm_act",
    "conv2d",
    "conv_transpose2d",
    "group_norm",
    "lstm",
    "lstm_cell",
]
