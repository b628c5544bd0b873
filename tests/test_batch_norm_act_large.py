"""Outputs large enough to be written past the caches (kStreamBytes in csrc/cpu), with rows aligned and not."""

import pytest
from helpers import check_problem, make_problem


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 64, 224, 224), (2, 61, 233, 229)])
def test_streamed_outputs(shape, layout):
    check_problem(make_problem(shape, residual=True).laid(layout), "relu", True)
