"""``torch.nn.ConvTranspose2d`` with an activation, and an output whose size can match another tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._watch import is_proxy, recorded
from ..activation import Activation, act_repr, resolve_activation
from ..functional.conv_transpose2d import conv_transpose2d, unpadded_size
from ._quantization import Configuration
from ._script import refuse_script

_NAME = "ConvTranspose2d"


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """``act(conv_transpose2d(x))`` over ``[N, C_in, H, W]`` or ``[C_in, H, W]``.

    Arguments, defaults, parameters and ``state_dict`` keys of :class:`torch.nn.ConvTranspose2d`, and:

    Args:
        act: ``None``, a name (``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"``, ``"sigmoid"``,
            ``"tanh"``, ``"hardswish"``, ``"relu6"``) or the matching ``torch.nn`` module, whose parameters are
            taken over.
    """

    qconfig = Configuration(torch.nn.ConvTranspose2d)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | Activation | torch.nn.Module | None = None,
    ) -> None:
        self.act = resolve_activation(type(self).__name__, act)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias,
            dilation, padding_mode, device, dtype,
        )  # fmt: skip

    def forward(
        self,
        input: Tensor,
        output_size: Sequence[int] | None = None,
        match: Tensor | Sequence[int] | None = None,
        act: str | Activation | torch.nn.Module | None = None,
    ) -> Tensor:
        """``input`` ``[N, C_in, H, W]``, ``[C_in, H, W]`` -> the same with ``C_out`` channels and ``H_out``, ``W_out``.

        Args:
            output_size: height and width of the output, or its whole shape, as in :class:`torch.nn.ConvTranspose2d`. It
                must be a size that the layer can give with some output padding less than the stride.
            match: a tensor of ``input``'s rank whose height and width the output shall have (such as the encoder's
                feature with which the output is concatenated), or that height and width. Any size is possible. It is
                reached by output padding if that is enough. Otherwise the output is cut, or padded with zeros (after
                the activation), at the bottom and on the right: an encoder that rounds down leaves out pixels at these
                ends.
            act: overrides the layer's own activation.

        ``output_size`` and ``match`` override the layer's ``output_padding``. At most one of them may be given.

        Raises:
            ValueError: both are given, ``output_size`` cannot be reached or has another length, ``match`` of another
                rank or length, or a size below 1.
            TypeError: ``match`` or ``output_size`` has another type.

        And as :func:`.conv_transpose2d`.
        """
        if is_proxy(input):
            return recorded(self, input, output_size=output_size, match=match, act=act)
        output_padding, more = self.padding_of(input, output_size, match)
        out = conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            act=self.act if act is None else act,
        )
        # Negative padding cuts. Both keep the memory format.
        return out if more == (0, 0) else F.pad(out, (0, more[1], 0, more[0]))

    def padding_of(
        self,
        x: Tensor,
        output_size: Sequence[int] | None = None,
        match: Tensor | Sequence[int] | None = None,
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The output padding of a call, and how many rows and columns are added at the end (negative: cut)."""
        if match is not None:
            if output_size is not None:
                raise ValueError(
                    f"{_NAME}: output_size ({tuple(output_size)}) must be None where match is given"
                )
            return self._padding_to_match(x, match)
        if output_size is not None:
            return self._padding_to_reach(x, output_size), (0, 0)
        return self.output_padding, (0, 0)

    def _unpadded_sizes(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the output without output padding."""
        if x.dim() not in (3, 4):
            raise RuntimeError(
                f"{_NAME}: x (shape {tuple(x.shape)}) must be [N, C_in, H, W] or [C_in, H, W]"
            )
        options: Any = self.kernel_size, self.stride, self.padding, self.dilation
        height, width = (unpadded_size(*axis) for axis in zip(x.shape[-2:], *options, strict=True))
        return height, width

    def _padding_to_match(
        self, x: Tensor, match: Tensor | Sequence[int]
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        """The output padding, and how many rows and columns are to be added after it (negative: cut)."""
        sizes = _matched_sizes(x, match)
        missing = [size - least for size, least in zip(sizes, self._unpadded_sizes(x), strict=True)]
        padding = [
            min(max(m, 0), max(stride, dilation) - 1)
            for m, stride, dilation in zip(missing, self.stride, self.dilation, strict=True)
        ]
        return (padding[0], padding[1]), (missing[0] - padding[0], missing[1] - padding[1])

    def _padding_to_reach(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        sizes, least = tuple(output_size), self._unpadded_sizes(x)
        if len(sizes) == x.dim():
            sizes = sizes[-2:]
        if len(sizes) != 2:
            raise ValueError(
                f"{_NAME}: output_size ({tuple(output_size)}) must have 2 or {x.dim()} elements for a {x.dim()}-D x"
            )
        for size, low, stride in zip(sizes, least, self.stride, strict=True):
            if size < low or size >= low + stride:
                most = tuple(low + s - 1 for low, s in zip(least, self.stride, strict=True))
                raise ValueError(
                    f"{_NAME}: output_size ({tuple(output_size)}) must be from {least} to {most} for an x of "
                    f"height and width {tuple(x.shape[-2:])}"
                )
        return tuple(size - low for size, low in zip(sizes, least, strict=True))

    def extra_repr(self) -> str:
        return super().extra_repr() + act_repr(self.act)


def _matched_sizes(x: Tensor, match: Tensor | Sequence[int]) -> tuple[int, int]:
    if isinstance(match, Tensor):
        if match.dim() != x.dim():
            raise ValueError(
                f"{_NAME}: match (shape {tuple(match.shape)}) must have the rank of x (shape {tuple(x.shape)})"
            )
        height, width = match.shape[-2:]
    elif isinstance(match, (tuple, list)):
        if len(match) != 2:
            raise ValueError(f"{_NAME}: match ({tuple(match)}) must be a height and a width")
        height, width = match
        if not all(isinstance(size, (int, torch.SymInt)) for size in match):
            raise TypeError(f"{_NAME}: match ({tuple(match)}) must be two integers")
    else:
        raise TypeError(
            f"{_NAME}: match ({type(match).__name__}) must be a Tensor, or a height and a width"
        )
    if height < 1 or width < 1:
        raise ValueError(f"{_NAME}: match ({height}, {width}) must have sizes of at least 1")
    return height, width
