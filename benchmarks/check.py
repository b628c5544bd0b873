"""No provider is timed before its values were compared with fp64."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# A provider may be this much worse than eager PyTorch in the same dtype, plus a few units in the last place;
# the tests of the op are stricter. Here it only matters that a wrong result is never timed.
FACTOR, ULPS = 4.0, 8.0


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of the truth; inf where shape or finiteness differ."""
    if value.shape != truth.shape or not bool(torch.isfinite(value).all()):
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    scale = float(truth.abs().max()) or 1.0
    return float((value.detach().to(torch.float64) - truth).abs().max()) / scale


def wrong_values(
    values: Mapping[str, torch.Tensor],
    stock: Mapping[str, torch.Tensor],
    truth: Mapping[str, torch.Tensor],
    slack: float = 0.0,
) -> str | None:
    """Why ``values`` cannot be trusted, or None. ``stock`` is eager PyTorch in the same dtype."""
    for name, exact in truth.items():
        if name not in values:
            return f"{name} is missing"
        if values[name].dtype != stock[name].dtype:
            return (
                f"{name} has dtype {values[name].dtype}, stock PyTorch returns {stock[name].dtype}"
            )
        bound = (
            FACTOR * error(stock[name], exact) + ULPS * torch.finfo(stock[name].dtype).eps + slack
        )
        found = error(values[name], exact)
        if not found <= bound:
            return f"{name} is {found:.2e} off the fp64 result, the bound is {bound:.2e}"
    return None
