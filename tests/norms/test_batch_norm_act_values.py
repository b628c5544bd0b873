"""batch_norm_act: output, running statistics and gradients against fp64, by the rule of support/accuracy.py.

test_capabilities.py runs this file once more for each CPU capability.
"""

import itertools

import pytest
import torch
from support.accuracy import ACTIVATIONS, LAYOUTS, in_layout
from support.norms import MIXES, STOCK_MIXES, check_problem, exactly, make_problem, ours, stock

import advdl_ops
from advdl_ops.functional import batch_norm_act

# Odd sizes, one position, batch 1, C = 1, 3 and 300, runs shorter and longer than any vector.
SHAPES = [
    (2, 3),
    (5, 1),
    (64, 300),
    (2, 3, 1),
    (3, 5, 17),
    (1, 1, 1, 2),
    (2, 3, 1, 1),
    (1, 3, 5, 7),
    (3, 1, 9, 11),
    (2, 300, 3, 5),
    (5, 33, 7, 3),
    (8, 64, 4, 4),
    (1, 2, 3, 4, 5),
    (2, 17, 1, 3, 2),
]
# Longer than one block of the statistics (4096 elements), and enough elements for several chunks of partial sums.
LONG_SHAPES = [
    (1, 2, 67, 73),
    (9, 2, 65, 65),
    (3, 1, 8209),
    (40000, 2),
    (33, 3, 30, 31),
    (130, 300, 1, 3),
    (130, 520),
]
pytestmark = pytest.mark.usefixtures("one_thread")
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", MIXES)
def test_dtypes_and_activations(mix, layout):
    for act, residual, training in itertools.product(ACTIVATIONS, (False, True), (False, True)):
        p = make_problem((3, 7, 5, 3), mix, residual=residual).laid(layout)
        check_problem(p, act, training, stock_runs=mix in STOCK_MIXES)


@pytest.mark.parametrize("mix", MIXES)
def test_reference_dtypes_and_activations(mix):
    with advdl_ops.use_backend("reference"):
        for act, training in itertools.product(ACTIVATIONS, (False, True)):
            p = make_problem((3, 7, 5, 3), mix, residual=training).laid("channels_last")
            check_problem(p, act, training, stock_runs=mix in STOCK_MIXES)


def test_truth_for_fp64_agrees_with_stock():
    for act, training, residual in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        p = make_problem((3, 7, 5, 3), "fp64", residual=residual)
        torch.testing.assert_close(exactly(p, act, training), stock(p, act, training))


@TRAINING
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", ["fp32", "fp64", "bf16", "fp16"])
def test_shapes(mix, layout, training):
    for shape in SHAPES:
        for act, residual in (("relu", True), ("relu", False), ("silu", True), ("none", False)):
            p = make_problem(shape, mix, residual=residual).laid(layout)
            check_problem(p, act, training, what=shape)


@TRAINING
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mix", ["fp32", "fp64", "bf16"])
def test_long_shapes(mix, layout, training):
    for shape in LONG_SHAPES:
        for act, residual in (("relu", True), ("gelu", False)):
            p = make_problem(shape, mix, residual=residual).laid(layout)
            check_problem(p, act, training, what=shape)


def test_reference_shapes():
    with advdl_ops.use_backend("reference"):
        for shape, training in itertools.product(SHAPES, (True, False)):
            check_problem(make_problem(shape, residual=True), "relu", training, what=shape)


@TRAINING
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weight_bias_and_running_statistics(backend, layout, training):
    for shape in [(3, 5, 4, 3), (2, 40, 3, 3)]:
        for running in (True, False) if training else (True,):
            p = make_problem(shape, residual=True, affine=False, running=running)
            check_problem(p.laid(layout), "relu", training, what=(shape, running))
        for missing in ("weight", "bias"):
            p = make_problem(shape)
            setattr(p, missing, None)
            check_problem(p.laid(layout), "silu", training, what=(shape, missing))


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_and_eps(backend, momentum):
    p = make_problem((3, 5, 4, 3))
    p.momentum, p.eps = momentum, 0.3
    check_problem(p, "relu")
    p.eps = 1e-3
    check_problem(p, "relu", training=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", ["fp32", "fp64"])
def test_large_mean_keeps_the_variance(backend, mix, layout):
    # E[x^2] - E[x]^2 in fp32 leaves no digit of the variance here.
    for shape in [(4, 6, 9, 9), (2, 3, 70, 70)]:
        p = make_problem(shape, mix, mean=1e4, std=1.0).laid(layout)
        check_problem(p, "none", what=shape)


@TRAINING
@pytest.mark.parametrize("layouts", list(itertools.permutations(LAYOUTS, 3)), ids="-".join)
def test_each_input_in_a_layout_of_its_own(layouts, training):
    p = make_problem((3, 6, 5, 4), residual=True)
    p.x, p.residual, p.dout = map(in_layout, (p.x, p.residual, p.dout), layouts)
    check_problem(p, "relu", training)
    check_problem(p, "silu", training)


def test_expanded_gradient(backend):
    p = make_problem((3, 6, 5, 4))
    p.dout = torch.ones(()).expand(p.x.shape)  # that of out.sum(): all strides 0
    check_problem(p, "silu")
    p.x = channels_last_sliced()
    p.dout = torch.ones(()).expand(p.x.shape)
    check_problem(p, "relu")


def channels_last_sliced():
    """Channels innermost, but half of them only: dense in neither layout."""
    return make_problem((3, 12, 5, 4)).x.contiguous(memory_format=torch.channels_last)[:, :6]


def test_non_contiguous_parameters(backend):
    p = make_problem((3, 6, 5, 4))
    for name in ("weight", "bias", "running_mean", "running_var"):
        wide = torch.full((6, 3), 9.0)
        wide[:, 1] = getattr(p, name)
        setattr(p, name, wide[:, 1])
    p.running_mean, p.running_var = p.running_mean.contiguous(), p.running_var.contiguous()
    check_problem(p, "relu", True)
    check_problem(p, "relu", False)


def test_running_statistics_that_are_views_are_written(backend):
    table = torch.stack([torch.zeros(4), torch.ones(4)], 1)
    mean, var = table.unbind(1)
    p = make_problem((3, 4, 5, 5))
    batch_norm_act(p.x, mean, var, training=True)
    expected = torch.nn.BatchNorm2d(4)
    expected(p.x)
    torch.testing.assert_close(table[:, 0], expected.running_mean)
    torch.testing.assert_close(table[:, 1], expected.running_var)


def test_wider_residual_in_a_half_precision_model(backend):
    bf16 = torch.bfloat16
    x, residual = torch.randn(4, 3, 5, 5).to(bf16), torch.randn(4, 3, 5, 5)
    norm = torch.nn.BatchNorm2d(3).to(bf16)
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    out = batch_norm_act(x, mean, var, norm.weight, norm.bias, True, residual=residual, act="relu")
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    exact = (exact + residual.double()).relu()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    norm(x)
    assert mean.dtype == var.dtype == bf16
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_of_another_dtype_promotes(backend, x_dtype, residual_dtype):
    x = torch.randn(2, 3, 4, 4).to(x_dtype).requires_grad_()
    residual = torch.randn(2, 3, 4, 4).to(residual_dtype).requires_grad_()
    weight = torch.rand(3).requires_grad_()
    bias, mean, var = torch.randn(3), torch.zeros(3), torch.ones(3)
    out = batch_norm_act(x, mean, var, weight, bias, True, residual=residual, act="relu")
    assert out.dtype == torch.promote_types(x_dtype, residual_dtype)
    out.float().square().sum().backward()
    assert (x.grad.dtype, residual.grad.dtype) == (x_dtype, residual_dtype)
    exact = torch.nn.functional.batch_norm(
        x.double(), None, None, weight.double(), bias.double(), True
    )
    exact = torch.relu(exact + residual.double()).detach()
    eps = torch.finfo(out.dtype).eps
    assert (out.double() - exact).abs().max() <= eps * exact.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_channel(backend, layout, value):
    # Both sizes: one vector at most, and several blocks.
    for shape, act, training in itertools.product(
        [(2, 5, 3, 3), (2, 3, 70, 70)],
        ("none", "relu", "relu6", "silu", "hardswish"),
        (True, False),
    ):
        clean = make_problem(shape, residual=True).laid(layout)
        dirty = make_problem(shape, residual=True).laid(layout)
        at = (1, 2, 0, 1)
        dirty.x[at] = value
        before, after = ours(clean, act, training), ours(dirty, act, training)
        others = torch.tensor([c for c in range(shape[1]) if c != 2])
        for name, t in after.items():
            dim = 1 if t.dim() > 1 else 0
            untouched = before[name].index_select(dim, others)
            assert torch.equal(t.index_select(dim, others), untouched), (name, act, training, shape)
        expected = stock(dirty, act, training)
        assert torch.equal(after["out"].isnan(), expected["out"].isnan()), (act, training, shape)
        if training:
            assert not after["running_mean"][2].isfinite()
            assert not after["running_var"][2].isfinite()
        else:  # one position of the channel, and no other; the gradient of a frozen norm needs no x
            # Of the others stock's answer depends on the place in a vector.
            if act not in ("relu6", "hardswish"):
                assert torch.equal(after["dx"].isnan(), expected["dx"].isnan()), (act, shape)
            for name in ("out", "dx", "dresidual"):
                after[name][at] = before[name][at]
                assert torch.equal(after[name], before[name]), (name, act, shape)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_to_nearest_even(dtype, layout):
    """Under an identity norm the sum is exact in fp32: every bit of the output is known."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = in_layout(bits.view(16, 64, 64).contiguous(), layout)
    zero, one = torch.zeros(64), torch.ones(64)
    for residual in (torch.zeros_like(bits), bits.flip(0), bits[torch.randperm(bits.numel())]):
        residual = in_layout(residual.view(16, 64, 64), layout)
        out = batch_norm_act(x, zero, one, eps=0.0, residual=residual)
        exact = (x.float() + residual.float()).to(dtype)
        assert torch.equal(out.isnan(), exact.isnan())
        keep = ~exact.isnan()
        assert torch.equal(out[keep].view(torch.int16), exact[keep].view(torch.int16))


def test_batch_of_zero(backend):
    for layout, shape in itertools.product(
        LAYOUTS, [(0, 3), (0, 3, 4), (0, 3, 4, 5), (2, 3, 0, 5)]
    ):
        for training in (True, False):
            p = make_problem(shape, residual=True).laid(layout)
            found = check_problem(p, "relu", training, what=(shape, layout))
            assert torch.equal(found["running_mean"], p.running_mean)
            assert found["dweight"].eq(0).all()
            assert found["dbias"].eq(0).all()


def test_no_channels(backend):
    # Stock's backward raises an IndexError here.
    p = make_problem((2, 0, 3, 3), residual=True)
    for training in (True, False):
        found = ours(p, "relu", training)
        assert found["out"].shape == found["dx"].shape == (2, 0, 3, 3)
        assert found["dweight"].shape == (0,)
