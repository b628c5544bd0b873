"""The emulated GPU of the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cuda_emulation import Emulator, unavailable


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    if unavailable():
        pytest.skip(str(unavailable()))
    with Emulator() as running:
        yield running
