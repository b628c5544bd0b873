"""Which features a network returns, and what timm's `feature_info` tells of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class FeatureInfo:
    """What timm's `feature_info` tells of features, by its names.

    Args:
        info: for each feature of the network `module`, `num_chs` and `reduction` of height and width.
        out_indices: which of them the network returns.
    """

    def __init__(self, info: list[dict[str, Any]], out_indices: tuple[int, ...]) -> None:
        self.info = info
        self.out_indices = out_indices

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        return self._get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        return self._get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        return self._get("module", idx)

    def _get(self, key: str, idx: int | Sequence[int] | None) -> Any:
        """Of the features that are returned, or of the ones at `idx` of all."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]


def checked_indices(name: str, out_indices: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(out_indices, Sequence):
        raise TypeError(f"{name}: out_indices ({out_indices!r}) must be a sequence of integers")
    given = [index + 5 if index < 0 else index for index in out_indices]
    if not given or sorted(set(given)) != given or given[0] < 0 or given[-1] > 4:
        raise ValueError(
            f"{name}: out_indices ({tuple(out_indices)}) must be ascending and of 0 to 4, or of -5 to -1"
        )
    return tuple(given)
