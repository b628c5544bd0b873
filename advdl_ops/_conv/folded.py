"""A convolution in evaluation with the batch norm after it folded into weight and bias. Both are kept from call to
call.

Jacob et al. 2018 (arXiv:1712.05877), section 3.2. :func:`advdl_ops.nn.conv_bn_act` stores one in the norm module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._schemas import conv2d_format
from ..activation import Activation
from ..backend import is_traced
from . import choice, cpu
from .choice import PREPACKED, Candidate
from .operators import output
from .problem import FOLDED, Conv, Epilogue, Problem, problem_of

# Weight and bias of the convolution, running mean and variance, weight and bias of the norm.
Source = tuple[Tensor | None, ...]


class FoldedConv:
    """Folded weight and bias, and a key of the tensors that they were made from.

    Fused optimizers and writes through ``.data`` change neither version counters nor pointers. So the key also contains
    values: all of the ``[C_out]`` tensors, and one value per output channel of the convolution's weight. A write
    through ``.data`` to other elements of that weight is not noticed: call ``eval()`` after it.

    Args:
        source: see :data:`Source`.
        scale, shift: ``[C_out]``, the norm as a scale and a shift.
        eps: of the norm.
        conv: options of the convolution.
    """

    def __init__(
        self, source: Source, scale: Tensor, shift: Tensor, eps: float, conv: Conv
    ) -> None:
        weight, bias, *_ = source
        assert weight is not None
        self.weight: Tensor | None = weight * scale.view(-1, 1, 1, 1)
        self.bias = shift if bias is None else torch.addcmul(shift, bias, scale)
        self.conv = conv
        self.identity = _identity(source, eps, conv)
        self.sample = _sample(source)
        # The weight in oneDNN's layout. It replaces `weight`, unless inputs of both memory formats occur and need one
        # each.
        self.prepacked: Tensor | None = None
        self.keeps_both = False

    def serves(self, source: Source, eps: float, conv: Conv) -> bool:
        """Whether this is still valid for ``source``."""
        return self.identity == _identity(source, eps, conv) and torch.equal(
            self.sample, _sample(source)
        )

    def __call__(
        self, problem: Problem, x: Tensor, residual: Tensor | None, act: Activation
    ) -> Tensor:
        """``act(conv(x) + residual)`` in ``x``'s memory format. ``problem`` comes from :func:`problem_of_folded`."""
        epilogue = Epilogue(None, self.bias, residual, act)
        given = conv2d_format(x)

        def run(candidate: Candidate) -> Tensor:
            weight = self._weight_for(candidate, x)
            return output(candidate, given, x, weight, self.conv, epilogue)

        candidate = choice.chosen(problem._replace(epilogue=epilogue.name()), x.device, run)
        out = run(candidate)
        if candidate.name == PREPACKED and not self.keeps_both:
            self.weight = None
        return out

    def _weight_for(self, candidate: Candidate, x: Tensor) -> Tensor:
        # Each attribute is read once, because another thread may set it to None in between.
        weight, prepacked = self.weight, self.prepacked
        if candidate.name == PREPACKED:
            if prepacked is None:
                assert weight is not None
                self.prepacked = prepacked = cpu.prepack(x, weight, self.conv)
            return prepacked
        if weight is None:
            assert prepacked is not None
            self.keeps_both = True
            self.weight = weight = prepacked.to_dense()
        return weight


def problem_of_folded(x: Tensor, weight: Tensor, conv: Conv) -> Problem | None:
    """The problem if a kept weight can serve, that is on CPU in fp32 if oneDNN may be used. Else ``None``."""
    if is_traced():  # nothing may be kept, and all steps must be operators that a compiler fuses
        return None
    if not x.is_cpu or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.dim() != 4:
        return None
    problem = problem_of(FOLDED, x, weight, conv)
    return problem if problem.library and problem.x_numel > 0 else None


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
