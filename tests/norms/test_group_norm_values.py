"""The group norms: output, running statistics and gradients against fp64, by the rule of support/accuracy.py.

test_capabilities.py runs this file once more for each CPU capability.
"""

import itertools

import pytest
import torch
from support.accuracy import ACTIVATIONS, LAYOUTS, ULPS, in_layout
from support.group_norm import (
    INSTANCE,
    POSITION,
    call_ours,
    check_problem,
    exactly,
    norms_of,
    ours,
    problem_of,
    stock,
    term_sizes,
)
from support.norms import MIXES

import advdl_ops
from advdl_ops.functional import group_norm, instance_norm, layer_norm_2d

# One position, one channel, batch 1, C = 1, 3 and 300, channels around the 32 elements below which they are no runs of
# their own, more than 64 rows, and more than 512 columns.
SHAPES = [
    (2, 3),
    (5, 1),
    (66, 300),
    (2, 3, 1),
    (1, 1, 1, 2),
    (1, 3, 5, 7),
    (3, 1, 9, 11),
    (2, 300, 3, 5),
    (1, 6, 31),
    (3, 6, 4, 8),
    (2, 5, 33),
    (2, 4, 131),
    (1, 2, 3, 4, 5),
    (2, 9, 1, 3, 2),
    (2, 2060, 3),
]
# Sets and rows beyond a block (4096 elements), several blocks to a chunk, several chunks; folded columns; ragged tiles.
LONG_SHAPES = [
    (1, 2, 182, 183),
    (3, 4, 131, 127),
    (2, 3, 64, 64),
    (1, 6, 105, 107),
    (2, 300, 31),
    (3, 5000, 2),
    (130, 600),
    (1, 300, 150),
    (70, 3, 19),
    (2, 3, 600),
    (1, 68, 147),
]
CASES = [
    ("relu", True),
    ("silu", False),
    ("none", True),
    ("relu", False),
    ("gelu", True),
    ("none", False),
]
pytestmark = pytest.mark.usefixtures("one_thread")


def check_shapes(shapes, mix, layout):
    """Every norm that takes a shape; activation and residual change from one to the next."""
    # Another start for another mix, so that together they meet every case.
    cases = itertools.cycle(CASES)
    for _ in range(list(MIXES).index(mix) + 2 * LAYOUTS.index(layout)):
        next(cases)
    for shape in shapes:
        for norm, (act, residual) in zip(norms_of(shape), cases, strict=False):
            p = problem_of(norm, shape, mix, residual=residual).laid(layout)
            check_problem(p, norm, act, what=(shape, mix, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", MIXES)
def test_dtypes_and_activations(mix, layout):
    shape = (3, 6, 5, 4)
    for act, residual in itertools.product(ACTIVATIONS, (False, True)):
        p = problem_of(2, shape, mix, residual=residual).laid(layout)
        check_problem(p, 2, act, what=residual)
    for norm, (act, residual) in itertools.product((3, 6, POSITION, INSTANCE), CASES):
        p = problem_of(norm, shape, mix, residual=residual).laid(layout)
        check_problem(p, norm, act, what=residual)


@pytest.mark.parametrize("mix", MIXES)
def test_reference(mix):
    with advdl_ops.use_backend("reference"):
        for act, norm in itertools.product(ACTIVATIONS, (2, POSITION)):
            p = problem_of(norm, (3, 6, 5, 4), mix, residual=True).laid("channels_last")
            check_problem(p, norm, act)
        check_shapes(SHAPES, mix, "contiguous")


def test_truth_for_fp64_agrees_with_stock():
    for act, norm, residual in itertools.product(
        ACTIVATIONS, norms_of((3, 6, 5, 4)), (True, False)
    ):
        p = problem_of(norm, (3, 6, 5, 4), "fp64", residual=residual)
        torch.testing.assert_close(exactly(p, norm, act), stock(p, norm, act))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", ["fp32", "fp64", "bf16", "fp16"])
def test_shapes(mix, layout):
    check_shapes(SHAPES, mix, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mix", ["fp32", "fp64", "bf16"])
def test_long_shapes(mix, layout):
    check_shapes(LONG_SHAPES, mix, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_weight_or_bias(backend, layout):
    for shape in [(3, 6, 4, 3), (2, 40, 3, 11)]:
        for norm in norms_of(shape):
            p = problem_of(norm, shape, residual=True, affine=False)
            check_problem(p.laid(layout), norm, "relu", what=shape)
            for missing in ("weight", "bias"):
                p = problem_of(norm, shape)
                setattr(p, missing, None)
                check_problem(p.laid(layout), norm, "silu", what=(shape, missing))


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0])
def test_momentum_and_eps(backend, momentum):
    for norm, eps in itertools.product((1, POSITION, INSTANCE), (0.3, 1e-3, 0.0)):
        p = problem_of(norm, (3, 5, 4, 3))
        p.momentum, p.eps = momentum, eps
        check_problem(p, norm, "relu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", ["fp32", "fp64"])
def test_large_mean_keeps_the_variance(backend, mix, layout):
    # E[x^2] - E[x]^2 in fp32 leaves no digit of the variance here.
    for shape in [(4, 6, 9, 9), (3, 6, 5), (1, 2, 182, 183), (1, 300, 70)]:
        for norm in norms_of(shape):
            p = problem_of(norm, shape, mix, mean=1e4, std=1.0).laid(layout)
            check_problem(p, norm, "none", what=shape)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocks_far_from_the_rest(layout):
    """The variance lies between blocks, chunks and columns, not inside of them."""
    for shape, norm in [((1, 4, 96, 97), 1), ((2, 6, 400), 2), ((2, 700, 9), POSITION)]:
        p = problem_of(norm, shape)
        p.x = torch.full(shape, 0.5)
        p.x[:, 0] = 50.3
        p.x[:, :, :2] = -11.1
        check_problem(p.laid(layout), norm, "none", what=shape)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_of_equal_terms_do_not_drift(layout):
    """Added one after another in fp32 they would."""
    for shape, norm in itertools.product([(1, 2, 16383), (4095, 2, 3)], (1, 2, POSITION)):
        p = problem_of(norm, shape, residual=True).laid(layout)
        p.dout = in_layout(torch.full(shape, 0.1), layout)
        check_problem(p, norm, "none", what=shape)


@pytest.mark.parametrize("layouts", list(itertools.permutations(LAYOUTS, 3)), ids="-".join)
def test_each_input_in_a_layout_of_its_own(layouts):
    for norm, act in itertools.product((3, POSITION, INSTANCE), ("relu", "silu")):
        p = problem_of(norm, (3, 6, 5, 7), residual=True)
        p.x, p.residual, p.dout = map(in_layout, (p.x, p.residual, p.dout), layouts)
        check_problem(p, norm, act)


def test_expanded_gradient_and_sliced_channels(backend):
    for norm in (3, POSITION, INSTANCE):
        p = problem_of(norm, (3, 6, 5, 4))
        p.dout = torch.ones(()).expand(p.x.shape)  # that of out.sum(): all strides 0
        check_problem(p, norm, "silu")
        # Channels innermost, but half of them only: dense in neither layout.
        p.x = problem_of(norm, (3, 12, 5, 4)).laid("channels_last").x[:, :6]
        check_problem(p, norm, "relu")


def test_non_contiguous_parameters(backend):
    for norm in (3, POSITION, INSTANCE):
        p = problem_of(norm, (3, 6, 5, 4))
        for name in ("weight", "bias"):
            wide = torch.full((6, 3), 9.0)
            wide[:, 1] = getattr(p, name)
            setattr(p, name, wide[:, 1])
        check_problem(p, norm, "relu")


def test_running_statistics_that_are_views_are_written(backend):
    table = torch.stack([torch.zeros(4), torch.ones(4)], 1)
    mean, var = table.unbind(1)
    x = torch.randn(3, 4, 5, 5)
    instance_norm(x, mean, var)
    expected = torch.nn.InstanceNorm2d(4, track_running_stats=True)
    expected(x)
    torch.testing.assert_close(table[:, 0], expected.running_mean)
    torch.testing.assert_close(table[:, 1], expected.running_var)


def test_instance_norm_by_running_statistics(backend):
    """Then it is the batch norm of eval mode."""
    for act, layout in itertools.product(("none", "silu"), LAYOUTS):
        p = problem_of(INSTANCE, (3, 5, 4, 3), residual=True).laid(layout)
        x = p.x.detach().requires_grad_()
        statistics = p.running_mean.clone(), p.running_var.clone()
        out = instance_norm(
            x, *statistics, p.weight, p.bias, False, residual=p.residual, act=ACTIVATIONS[act][0]
        )
        exact = ACTIVATIONS[act][1](
            torch.nn.functional.instance_norm(
                x, p.running_mean, p.running_var, p.weight, p.bias, False
            )
            + p.residual
        )
        torch.testing.assert_close(out, exact)
        grads = [torch.autograd.grad(t, x, p.dout)[0] for t in (out, exact)]
        torch.testing.assert_close(*grads)
        assert torch.equal(statistics[0], p.running_mean)
        assert torch.equal(statistics[1], p.running_var)


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_of_another_dtype_promotes(backend, x_dtype, residual_dtype):
    for norm in (3, POSITION, INSTANCE):
        p = problem_of(norm, (2, 3, 4, 4), residual=True)
        x = p.x.to(x_dtype).requires_grad_()
        residual = p.residual.to(residual_dtype).requires_grad_()
        weight = p.weight.requires_grad_()
        # Instance norm without running statistics: stock would not write those of another dtype.
        out = call_ours(norm, x, None, None, weight, p.bias, p, residual=residual, act="relu")
        assert out.dtype == torch.promote_types(x_dtype, residual_dtype)
        out.double().square().sum().backward()
        assert (x.grad.dtype, residual.grad.dtype) == (x_dtype, residual_dtype)
        assert weight.grad.dtype == torch.float32
        p.x, p.residual = x.detach(), residual.detach()
        p.running_mean = p.running_var = None
        exact = stock(p.to(torch.float64), norm, "relu", backward=False)["out"]
        roundings = torch.finfo(out.dtype).eps * term_sizes(p, norm)["out"]
        assert (out.double() - exact).abs().max() <= ULPS * roundings


def elsewhere(shape, norm, at):
    """The elements of a result, and the channels, that the set of the element `at` has no part in."""
    n, c, *positions = at
    elements = torch.ones(shape, dtype=torch.bool)
    channels = torch.ones(shape[1], dtype=torch.bool)
    if norm == POSITION:
        elements[(n, slice(None), *positions)] = False
        channels[:] = False
    else:
        group = 1 if norm == INSTANCE else shape[1] // norm
        own = slice(c // group * group, (c // group + 1) * group)
        elements[n, own] = False
        channels[own] = False
    return {"x": elements, "out": elements, "residual": elements} | dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var"), channels
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_set(backend, layout, value):
    # One vector at most; channels of some vectors; and several blocks.
    for shape in [(2, 6, 3, 3), (2, 6, 5, 8), (3, 2, 70, 70)]:
        at = (1, 1, 0, 1)
        for norm, act in itertools.product(norms_of(shape), ("none", "relu", "silu")):
            clean = problem_of(norm, shape, residual=True).laid(layout)
            before = ours(clean, norm, act)
            for name in ("x", "dout", "residual"):
                dirty = problem_of(norm, shape, residual=True).laid(layout)
                getattr(dirty, name)[at] = value
                after = ours(dirty, norm, act)
                for result, t in after.items():
                    keep = elsewhere(shape, norm, at)[result.removeprefix("d")]
                    what = (name, result, norm, act, shape)
                    assert torch.equal(t[keep], before[result][keep]), what
                if name == "x":
                    expected = stock(dirty, norm, act)
                    assert torch.equal(after["out"].isnan(), expected["out"].isnan()), what
                    assert not after["dx"][at].isfinite()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_in_weight_and_bias_stay_in_their_group(backend, layout, value):
    for shape in [(2, 6, 3, 3), (2, 6, 5, 8), (130, 6)]:
        for norm, name in itertools.product(norms_of(shape), ("weight", "bias")):
            if norm in (1, POSITION):
                continue
            clean = problem_of(norm, shape, residual=True).laid(layout)
            dirty = problem_of(norm, shape, residual=True).laid(layout)
            getattr(dirty, name)[2] = value
            before, after = ours(clean, norm, "silu"), ours(dirty, norm, "silu")
            channels = elsewhere(shape, norm, (0, 2, *[0] * (len(shape) - 2)))["weight"]
            for result, t in after.items():
                what = (result, norm, name, shape)
                dim = 1 if t.dim() > 1 else 0
                others = channels.nonzero().flatten()
                expected = before[result].index_select(dim, others)
                assert torch.equal(t.index_select(dim, others), expected), what


def test_constant_sets():
    """Variance 0: exactly the bias is left, and nothing is divided by zero."""
    for layout, norm in itertools.product(LAYOUTS, (1, 3, POSITION, INSTANCE)):
        p = problem_of(norm, (2, 6, 5, 8)).laid(layout)
        p.x.fill_(3.7)
        out = ours(p, norm)["out"]
        assert torch.equal(out, p.bias.view(1, 6, 1, 1).expand(out.shape)), (layout, norm)


def test_batch_of_zero(backend):
    for layout, shape in itertools.product(LAYOUTS, [(0, 3), (0, 3, 4), (0, 3, 4, 5)]):
        for norm in (1, 3, POSITION, *([INSTANCE] if len(shape) > 2 else [])):
            p = problem_of(norm, shape, residual=True).laid(layout)
            found = ours(p, norm, "relu")
            assert found["out"].shape == found["dx"].shape == found["dresidual"].shape == shape
            assert found["dweight"].eq(0).all()
            assert found["dbias"].eq(0).all()
            if norm == INSTANCE:
                assert torch.equal(found["running_mean"], p.running_mean)
                assert torch.equal(found["running_var"], p.running_var)


def test_no_channels_and_no_positions(backend):
    for norm in (1, 4, POSITION, INSTANCE):
        found = ours(problem_of(norm, (2, 0, 3, 3), residual=True), norm, "relu")
        assert found["out"].shape == found["dx"].shape == (2, 0, 3, 3)
        assert found["dweight"].shape == (0,)
    found = ours(problem_of(POSITION, (2, 3, 0, 5), residual=True), POSITION, "relu")
    assert found["out"].shape == found["dx"].shape == (2, 3, 0, 5)
    assert found["dweight"].eq(0).all()


def test_the_three_functions_agree_where_they_mean_the_same():
    x = torch.randn(3, 4, 6, 7)
    w, b = torch.randn(2, 4)
    assert torch.equal(group_norm(x, 4, w, b), instance_norm(x, None, None, w, b))
    rows = torch.randn(70, 9)
    w, b = torch.randn(2, 9)
    torch.testing.assert_close(group_norm(rows, 1, w, b), layer_norm_2d(rows, w, b))


def test_gradient_of_sets_of_one_value_is_zero():
    for norm, shape in ((3, (4, 3)), (POSITION, (2, 1, 5, 7))):
        p = problem_of(norm, shape)
        found = ours(p, norm)
        assert found["dx"].eq(0).all()
        torch.testing.assert_close(found["dbias"], p.dout.transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize("channels", [8, 16, 32])
def test_few_rows_are_as_accurate_as_stock(channels):
    """The first guess of a mean by one row of few is off by a deviation, and costs twice stock's error."""
    own, others = [], []
    for seed in range(12):
        p = problem_of(POSITION, (4, channels, 10, 12), seed=seed)
        exact = stock(p.to(torch.float64), POSITION)["out"]
        own.append((ours(p, POSITION)["out"] - exact).abs().max().item())
        others.append((stock(p, POSITION)["out"] - exact).abs().max().item())
    assert sum(own) <= 1.3 * sum(others)
