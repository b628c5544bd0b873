"""What only large tensors reach in csrc/cpu: outputs past the caches (kStreamBytes, kStreamStoredBytes)."""

import itertools

import pytest
import torch
from support.accuracy import ULPS
from support.group_norm import POSITION, ours, problem_of
from support.norms import Problem


def samples(p: Problem, first: int, last: int) -> Problem:
    parts = {name: getattr(p, name)[first:last] for name in ("x", "residual", "dout")}
    return Problem(**{**vars(p), **parts})


# Rows whose ends are aligned to vectors, rows of which few are, and runs too short to be rows.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 64, 160, 160), 32), ((4, 61, 163, 167), 1), ((2900, 75, 31), 5)]
)
def test_streamed_outputs_equal_those_of_single_samples(shape, groups, layout):
    """Which do not stream, and which test_group_norm_values.py compares with fp64."""
    n = shape[0]
    for norm, act in itertools.product((groups, POSITION), ("relu", "silu")):
        p = problem_of(norm, shape, residual=True).laid(layout)
        whole = ours(p, norm, act)
        assert whole["out"].nbytes >= 24 << 20
        parts = [ours(samples(p, i * n // 4, (i + 1) * n // 4), norm, act) for i in range(4)]
        assert parts[0]["out"].nbytes < 8 << 20
        for name in ("out", "dx", "dresidual"):
            joined = torch.cat([part[name] for part in parts])
            assert torch.equal(whole[name], joined), (name, norm, act)
        # These sums are cut in other places: a rounding or few at the size of their terms.
        limit = ULPS * torch.finfo(torch.float32).eps * p.dout.abs().sum() / shape[1]
        for name in ("dweight", "dbias"):
            assert (whole[name] - sum(part[name] for part in parts)).abs().max() <= limit, name
