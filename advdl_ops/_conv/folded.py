"""A convolution in evaluation with the batch norm after it folded in. What is made of its weight is kept from call to
call.

Jacob et al. 2018 (arXiv:1712.05877), section 3.2. :func:`advdl_ops.nn.conv_bn_act` stores one in the norm module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import native
from .._schemas import conv2d_format
from ..activation import Activation
from ..backend import get_weight_check, is_fake, is_traced
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
    values: all of the ``[C_out]`` tensors, and of the convolution's weight one value per output channel and what
    :func:`compared` says. Other writes through ``.data`` are not noticed: call ``eval()`` after them.

    Args:
        what: :func:`compared`.
        source: see :data:`Source`.
        scale, shift: ``[C_out]``, the norm as a scale and a shift.
        eps: of the norm.
        conv: options of the convolution.
    """

    def __init__(
        self, what: str, source: Source, scale: Tensor, shift: Tensor, eps: float, conv: Conv
    ) -> None:
        bias = source[1]
        self.scale = scale
        self.bias = shift if bias is None else torch.addcmul(shift, bias.to(shift.dtype), scale)
        self.conv = conv
        self.identity = _identity(source, eps, conv)
        self.sample = _sample(source)
        weight = source[0]
        assert weight is not None
        self.checksum = _checksum(weight) if native("cpu") else None
        self.bits = _bits(weight).clone() if what == ALL else None
        # The form of the last call alone, unless one is asked for again after another: then all that are asked for.
        self.kept: dict[Form, Tensor] = {}
        self.keeps_all = False
        self._met: set[Form] = set()

    def serves(self, what: str, source: Source, eps: float, conv: Conv) -> bool:
        """Whether this is still valid for ``source``."""
        if self.identity != _identity(source, eps, conv):
            return False
        if not torch.equal(self.sample, _sample(source)):
            return False
        weight = source[0]
        assert weight is not None
        if what == ALL:
            return self.bits is not None and torch.equal(self.bits, _bits(weight))
        return what == NOTHING or self.checksum == _checksum(weight)

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
    # Nothing may be kept, and all steps must be operators that a compiler fuses. A fake weight has no values.
    if is_traced() or is_fake(x):
        return None
    if not x.is_cpu or weight.dtype != x.dtype or x.dim() != 4:
        return None
    is_depthwise = conv.groups == x.shape[1] == weight.shape[0]
    if x.dtype != torch.float32 and (is_depthwise or not computes_in_float32(x.dtype)):
        return None
    problem = problem_of(FOLDED, x, weight, conv)
    return problem if problem.library and problem.x_numel > 0 else None


# What of the weight a call compares, beside a value of each output channel.
NOTHING, CHECKSUM, ALL = "nothing", "checksum", "all"
# From so many output pixels and products on, the checksum takes less than 3 % of the layer's time
# (docs/performance.md).
_PIXELS = 1024
_PRODUCTS = 48 << 20


def compared(problem: Problem) -> str:
    """What a call compares: of :data:`NOTHING`, :data:`CHECKSUM`, :data:`ALL`."""
    if get_weight_check() == "full":
        return ALL
    # Without the borders, which takes less time to compute.
    n, _, h, w = problem.x
    pixels = n * h * w // (problem.stride[0] * problem.stride[1])
    if pixels < _PIXELS or pixels * problem.weight_numel < _PRODUCTS or not native("cpu"):
        return NOTHING
    return CHECKSUM


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


def _bits(weight: Tensor) -> Tensor:
    """Its values as integers, so that NaN equals itself."""
    return weight.detach().view(torch.int32 if weight.element_size() == 4 else torch.int16)


def _checksum(weight: Tensor) -> int:
    dense = weight if has_format(weight, torch.channels_last) else weight.contiguous()
    return torch.ops.advdl_ops.checksum.default(dense.detach())
