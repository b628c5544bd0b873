"""What the LSTM's autograd functions return under ``create_graph=True``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def reference_gradients(
    forward: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Any],
    need: Sequence[bool],
    given: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``forward(*arguments)``, which can be differentiated again.

    Args:
        forward: a reference function, which consists of torch's own operators.
        arguments: tensors, and options that are passed on as they are.
        need: for each argument, whether its gradient is needed.
        given: for each output, its gradient; ``None`` for zero.

    Returns:
        For each argument its gradient, ``None`` where it is not needed or the output does not depend on it.
    """
    # First-order gradients stop at these aliases. The graph of the gradients themselves reaches the arguments.
    with torch.enable_grad():
        aliases = [_alias(t) if isinstance(t, Tensor) else t for t in arguments]
        outputs = forward(*aliases)
        pairs = [(out, grad) for out, grad in zip(outputs, given, strict=True) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                [t for t, needed in zip(aliases, need, strict=True) if needed],
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
        return tuple([next(found) if needed else None for needed in need])


def _alias(t: Tensor) -> Tensor:
    return t.view_as(t) if t.requires_grad else t.detach()
