"""A convolution in evaluation with the batch norm after it folded in. What is made of its weight is kept from call to
call.

Jacob et al. 2018 (arXiv:1712.05877), section 3.2. :func:`advdl_ops.nn.conv_bn_act` stores one in the norm module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._schemas import conv2d_format
from ..activation import Activation
from ..backend import get_weight_check, is_traced
from . import choice, cpu
from .choice import PREPACKED, WINOGRAD, Candidate
from .cpu import Transformed
from .operators import output
from .problem import (
    FOLDED,
    Conv,
    Epilogue,
    Problem,
    computes_in_float32,
    has_format,
    problem_of,
)
from .winograd import Tile, tile_of

# Weight and bias of the convolution, running mean and variance, weight and bias of the norm.
Source = tuple[Tensor | None, ...]
# What the weight is made into: one of the two names, or transformed for a tile.
SCALED = "scaled"
Form = str | Tile


class FoldedConv:
    """The norm as scale and shift, what was made of the weight, and a key of the tensors that all was made from.

    The weight is made into the form that the serving candidate takes, when it is first asked for: with the scale in it,
    the same in oneDNN's layout, or transformed for a tile of Winograd's, without the scale. No other copy of the weight
    is kept.

    Fused optimizers and writes through ``.data`` change neither version counters nor pointers. So the key also contains
    values: all of the ``[C_out]`` tensors, and of the convolution's weight one value per output channel, and the sum of
    all where :func:`sums_weight` says so. Other writes through ``.data`` are not noticed: call ``eval()`` after them.

    Args:
        source: see :data:`Source`.
        scale, shift: ``[C_out]``, the norm as a scale and a shift.
        eps: of the norm.
        conv: options of the convolution.
    """

    def __init__(
        self, source: Source, scale: Tensor, shift: Tensor, eps: float, conv: Conv
    ) -> None:
        bias = source[1]
        self.scale = scale
        self.bias = shift if bias is None else torch.addcmul(shift, bias.to(shift.dtype), scale)
        self.conv = conv
        self.identity = _identity(source, eps, conv)
        self.sample = _sample(source)
        self.sum = _sum_of(source)
        # The form of the last call alone, unless one is asked for again after another: then all that are asked for.
        self.kept: dict[Form, Tensor] = {}
        self.keeps_all = False
        self._met: set[Form] = set()

    def serves(self, problem: Problem, source: Source, eps: float, conv: Conv) -> bool:
        """Whether this is still valid for ``source``."""
        return (
            self.identity == _identity(source, eps, conv)
            and torch.equal(self.sample, _sample(source))
            and (not sums_weight(problem) or self.sum == _sum_of(source))
        )

    def __call__(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        act: Activation,
    ) -> Tensor:
        """``act(conv(x) + residual)`` in ``x``'s memory format.

        Args:
            problem: of :func:`problem_of_folded`.
            x, residual, act: of the call.
            weight: the convolution's own, of a source for which :meth:`serves` holds.
        """
        epilogue = Epilogue(None, self.bias, residual, act)
        problem = problem._replace(epilogue=epilogue.name())
        given = conv2d_format(x)

        def run(candidate: Candidate, form: Form, made: Tensor) -> Tensor:
            if not isinstance(form, Tile):
                return output(candidate, given, x, made, self.conv, epilogue)
            of_norm, taken = epilogue._replace(scale=self.scale), Transformed(weight, made, form)
            return output(candidate, given, x, taken, self.conv, of_norm)

        tried: dict[Form, Tensor] = {}

        def trial(candidate: Candidate) -> Tensor:
            form = _form(candidate, problem)
            if form not in tried:
                tried[form] = self._made(form, x, weight)
            return run(candidate, form, tried[form])

        candidate = choice.chosen(problem, x.device, trial)
        form = _form(candidate, problem)
        return run(candidate, form, self._kept(form, x, weight))

    def _kept(self, form: Form, x: Tensor, weight: Tensor) -> Tensor:
        # Read once, and replaced as a whole: if another thread does so in between, a form is made once more.
        kept = self.kept
        made = kept.get(form)
        if made is None:
            made = self._made(form, x, weight)
            self.keeps_all = self.keeps_all or form in self._met
            self._met.add(form)
            self.kept = {**(kept if self.keeps_all else {}), form: made}
        return made

    def _made(self, form: Form, x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(form, Tile):
            return cpu.winograd_pack(weight, self.conv.groups, form)
        scaled = weight * self.scale.view(-1, 1, 1, 1)  # in fp32
        return cpu.prepack(x, scaled, self.conv) if form == PREPACKED else scaled


def _form(candidate: Candidate, problem: Problem) -> Form:
    """What ``candidate`` takes as the weight."""
    if candidate.name == WINOGRAD:
        tile = tile_of(problem)
        assert tile is not None  # else the choice does not accept Winograd
        return tile
    return PREPACKED if candidate.name == PREPACKED else SCALED


def problem_of_folded(x: Tensor, weight: Tensor, conv: Conv) -> Problem | None:
    """The problem if a kept weight can serve: on CPU, computed in fp32, if oneDNN may be used. Else ``None``."""
    if is_traced():  # nothing may be kept, and all steps must be operators that a compiler fuses
        return None
    if not x.is_cpu or weight.dtype != x.dtype or x.dim() != 4:
        return None
    is_depthwise = conv.groups == x.shape[1] == weight.shape[0]
    if x.dtype != torch.float32 and (is_depthwise or not computes_in_float32(x.dtype)):
        return None
    problem = problem_of(FOLDED, x, weight, conv)
    return problem if problem.library and problem.x_numel > 0 else None


# From so many output pixels and products on, the sum of the weight takes less than 3 % of the layer's time
# (docs/performance.md).
_SUMMED_PIXELS = 1024
_SUMMED_PRODUCTS = 8 << 20


def sums_weight(problem: Problem) -> bool:
    """Whether every call compares the sum of the weight."""
    return get_weight_check() == "full" or (
        problem.pixels >= _SUMMED_PIXELS
        and problem.pixels * problem.weight_numel >= _SUMMED_PRODUCTS
    )


def _identity(source: Source, eps: float, conv: Conv) -> tuple[Any, ...]:
    return eps, conv, *(None if t is None else (t.data_ptr(), _version(t)) for t in source)


def _version(t: Tensor) -> Any:
    # Inference tensors have no version counter, so what is folded from one serves only one call.
    return object() if t.is_inference() else t._version


def _sample(source: Source) -> Tensor:
    weight = source[0]
    assert weight is not None
    # By index, because flattening a weight in channels_last would copy all of it.
    channel, row, column = (size // 2 for size in weight.shape[1:])
    middle = weight[:, channel, row, column]
    return torch.cat([middle, *(t for t in source[1:] if t is not None)])


def _sum_of(source: Source) -> int:
    """Of the weight's bits as integers, modulo 2**64, so that no change of a value is lost in rounding."""
    weight = source[0]
    assert weight is not None
    dense = weight if has_format(weight, torch.channels_last) else weight.contiguous()
    flat = dense.detach().as_strided((dense.numel(),), (1,))
    for dtype in (torch.int64, torch.int32, torch.int16):  # the widest that fits
        ratio = dtype.itemsize // weight.element_size()
        if flat.numel() % ratio == 0 and flat.storage_offset() % ratio == 0:
            return int(flat.view(dtype).sum())
    raise AssertionError(weight.dtype)
