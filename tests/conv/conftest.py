"""Fixtures of the convolutions' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.triton_kernels import interpreter


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """``interpreted(function, *args)`` runs the function in a process where Triton interprets its kernels."""
    with interpreter() as run:
        yield run
