"""Max-pooling whose backward keeps positions of 2 or 4 bytes, where torch's keeps 8 bytes and the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._schemas import conv2d_format
from ..backend import is_fake, needs_grad, unwatched
from .recipes import Kind, makes_again

_op = torch.ops.aten.max_pool2d_with_indices.default
_backward_op = torch.ops.aten.max_pool2d_with_indices_backward.default


class MaxPool2d(torch.nn.MaxPool2d):
    """The class that :func:`.set_lean` gives to layers of ``torch.nn.MaxPool2d``."""

    def forward(self, input: Tensor) -> Tensor:
        # `memory_report` counts with fake tensors.
        is_plain = unwatched(input) or is_fake(input)
        is_served = is_plain and not self.return_indices and input.dim() == 4
        if not (is_served and makes_again(Kind.PASS) and needs_grad(input)):
            return super().forward(input)
        return MaxPool2dFunction.apply(
            input,
            (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode),
        )


class MaxPool2dFunction(torch.autograd.Function):
    """Saved: for each output, the position of its maximum in the plane of the input ``[H, W]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: tuple[Any, ...]) -> Tensor:
        options = tuple([_pair(option) for option in options[:4]]) + options[4:]
        out, positions = _op(x, *options)
        pixels = x.shape[2] * x.shape[3]
        ctx.save_for_backward(positions.to(torch.uint16 if pixels <= 1 << 16 else torch.int32))
        ctx.shape, ctx.format, ctx.options = x.shape, conv2d_format(x), options
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (positions,) = ctx.saved_tensors
        # Torch's operator takes sizes and memory format of it, and reads none of its values.
        like = torch.empty(
            ctx.shape, dtype=dout.dtype, device=dout.device, memory_format=ctx.format
        )
        return _backward_op(dout, like, *ctx.options, positions.to(torch.int64)), None


def _pair(option: Any) -> list[int]:
    return [option, option] if isinstance(option, int) else list(option)
