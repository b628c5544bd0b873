"""Every op in plain PyTorch: fp64-capable, twice differentiable, exportable."""

from .batch_norm_act import batch_norm_act
from .conv_bn_act import conv_bn_act

__all__ = ["batch_norm_act", "conv_bn_act"]
