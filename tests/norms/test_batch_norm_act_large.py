"""What only large tensors reach in csrc/cpu: outputs past the caches (kStreamBytes), channel groups (kGroupBytes)."""

import pytest
import torch
from support.norms import check_problem, make_problem

from advdl_ops.functional import batch_norm_act


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 64, 224, 224), (2, 61, 233, 229)])
def test_streamed_outputs(shape, layout):
    check_problem(make_problem(shape, residual=True).laid(layout), "relu", True)


# 64 to 300 KB per channel: groups of a few, the last of a thread's share smaller; one or several chunks of blocks.
@pytest.mark.parametrize("shape", [(2, 23, 200, 91), (5, 29, 57, 57), (3, 31, 160, 160)])
@pytest.mark.parametrize("residual", [False, True])
def test_groups_of_channels(shape, residual):
    check_problem(make_problem(shape, residual=residual), "relu", True)


def test_evaluation_in_memory_order():
    check_problem(make_problem((3, 29, 57, 57), residual=True), "relu", False)


# Whole vectors in a run, and one element more: dz of a transcendental derivative waits where dx will lie, or not.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (3, 5, 13, 5), (2, 64, 56, 56)])
@pytest.mark.parametrize("training", [True, False])
def test_dz_kept_in_dx(shape, layout, training):
    for act, mix in (("silu", "fp32"), ("gelu", "fp64"), ("elu", "bf16")):
        check_problem(make_problem(shape, mix).laid(layout), act, training)


def test_long_columns_of_narrow_rows():
    """An odd number of positions cannot be folded: equal terms, added one after another in fp32, would drift."""
    n = 4095
    weight, bias = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    out = batch_norm_act(torch.full((n, 2), 3.1), torch.zeros(2), torch.ones(2), weight, bias)
    out.backward(torch.full((n, 2), 0.1))
    exact = torch.tensor(0.1).double() * n
    assert (bias.grad.double() / exact - 1).abs().max() < 1e-6


def test_a_first_sample_far_from_the_rest():
    x = torch.full((3, 7, 3811), 0.5)
    x[0] = 50.3
    mean, var = torch.zeros(7), torch.zeros(7)
    batch_norm_act(x, mean, var, training=True, momentum=1.0)
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    assert (var.double() / exact - 1).abs().max() < 4e-7
