"""Drop-in layers: ``torch.nn`` names, constructors and ``state_dict`` keys, with fused kernels behind them."""

from .batch_norm_act import BatchNormAct2d
from .conv_bn_act import ConvBNAct, ConvBNReLU, conv_bn_act

__all__ = ["BatchNormAct2d", "ConvBNAct", "ConvBNReLU", "conv_bn_act"]
