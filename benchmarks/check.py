"""The check of a provider's values against fp64, without which it is not timed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

# The error of a provider may be FACTOR times that of eager PyTorch in the same dtype, plus a few units in the last
# place. The tests of the op are stricter. Here it only matters that a wrong result is never timed.
FACTOR, ULPS = 4.0, 8.0


def error(value: torch.Tensor, truth: torch.Tensor, norm: float = math.inf) -> float:
    """The norm of the difference over that of the truth; inf if the shapes differ or a value is not finite.

    ``norm`` is inf for the largest element, 2 for the root of the sum of squares.
    """
    if value.shape != truth.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    difference = value.detach().to(torch.float64) - truth
    scale = float(torch.linalg.vector_norm(truth, norm)) or 1.0
    return float(torch.linalg.vector_norm(difference, norm)) / scale


def wrong_values(
    values: Mapping[str, torch.Tensor],
    stock: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
    slack: float = 0.0,
    norm: float = math.inf,
    reference: str = "fp64 result",
) -> str | None:
    """Why ``values`` cannot be trusted, or None.

    ``stock`` is eager PyTorch in the same dtype; ``reference`` says what ``truth`` is.
    """
    for name, exact in truth.items():
        if name not in values:
            return f"{name} is missing"
        if values[name].dtype != stock[name].dtype:
            return (
                f"{name} has dtype {values[name].dtype}, stock PyTorch returns {stock[name].dtype}"
            )
        bound = (
            FACTOR * error(stock[name], exact, norm)
            + ULPS * torch.finfo(stock[name].dtype).eps
            + slack
        )
        found = error(values[name], exact, norm)
        if not found <= bound:
            return f"{name} is {found:.2e} off the {reference}, the bound is {bound:.2e}"
    return None
