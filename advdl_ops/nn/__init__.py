"""Drop-in layers: ``torch.nn`` names, constructors and ``state_dict`` keys, with fused kernels behind them."""

from .batch_norm_act import BatchNormAct2d
from .conv_bn_act import ConvBNAct, ConvBNReLU, conv_bn_act
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
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LSTM",
    "LSTMCell",
    "LayerNorm2d",
    "conv_bn_act",
]
