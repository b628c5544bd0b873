"""The raw operators: opcheck, fake strides, meta tensors; and the memory format of what the op returns."""

import itertools
import math

import pytest
import torch
from support.accuracy import channels_last, in_layout
from support.checks import OPERATOR_TESTS
from support.norms import make_problem
from torch._subclasses.fake_tensor import FakeTensorMode

import advdl_ops
from advdl_ops.functional import batch_norm_act
from advdl_ops.nn import BatchNormAct2d

OPS = torch.ops.advdl_ops
FORWARD = [OPS.batch_norm_act.default, OPS.batch_norm_act_.default]
LAYOUTS = ("contiguous", "channels_last", "strided")
# Where sizes of 1 leave the strides open, and where memory says nothing.
SHAPES = [
    (3, 4),
    (3, 4, 5),
    (3, 4, 5, 2),
    (2, 3, 2, 2, 2),
    (2, 1, 3, 3),
    (2, 3, 1, 1),
    (1, 3, 2, 2),
]
SHAPES += [(0, 3, 2, 2)]


def forward_arguments(shape, layout, mix="fp32", training=True, residual=True, act=1):
    p = make_problem(shape, mix, residual=residual).laid(layout)
    return (
        p.x, p.residual, p.weight, p.bias, p.running_mean, p.running_var, training, 0.1, 1e-5, act, 0.0,
    )  # fmt: skip


def backward_arguments(
    shape, layout, mix="fp32", training=True, act=4, source=0, needs=(True, True)
):
    p = make_problem(shape, mix, residual=True).laid(layout)
    acc = torch.float64 if mix == "fp64" else torch.float32
    stats = torch.stack([torch.zeros(shape[1], dtype=acc), torch.ones(shape[1], dtype=acc)])
    saved = None if source == 0 else p.residual
    return (
        p.dout, p.x, saved, p.weight, p.bias, stats, training, act, 0.0, source, *needs,
    )  # fmt: skip


@pytest.mark.parametrize("op", FORWARD, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_forward(layout, op):
    for shape in SHAPES:
        torch.library.opcheck(op, forward_arguments(shape, layout), test_utils=OPERATOR_TESTS)
    shape = (3, 4, 5, 2)
    for mix, training, residual in itertools.product(
        ("bf16", "fp64"), (True, False), (True, False)
    ):
        arguments = forward_arguments(shape, layout, mix, training, residual)
        torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS)
    x = arguments[0]
    bare = (x, None, None, None, None, None, True, 0.1, 1e-5, 0, 0.0)
    torch.library.opcheck(op, bare, test_utils=OPERATOR_TESTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(layout):
    op = OPS.batch_norm_act_backward.default
    for shape in SHAPES:
        torch.library.opcheck(op, backward_arguments(shape, layout), test_utils=OPERATOR_TESTS)
    shape = (3, 4, 5, 2)
    cases = itertools.product(("bf16", "fp64"), (True, False), ((4, 1), (1, 2)))
    for mix, training, (act, source) in cases:
        arguments = backward_arguments(shape, layout, mix, training, act, source)
        torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS)
    for needs in ((True, False), (False, True), (False, False)):
        arguments = backward_arguments(shape, layout, needs=needs)
        torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_equal_real_ones(layout):
    for shape in [*SHAPES, (1, 1, 1, 1), (1, 4), (4, 1), (2, 3, 0, 2)]:
        for make, op in (
            (forward_arguments, FORWARD[0]),
            (forward_arguments, FORWARD[1]),
            (backward_arguments, OPS.batch_norm_act_backward.default),
        ):
            one_value = math.prod(shape) == shape[1]  # refused in training
            arguments = make(shape, layout, training=not one_value)
            real = op(*arguments)
            with FakeTensorMode() as mode:
                fake = op(
                    *(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments)
                )
            for r, f in zip(real, fake, strict=True):
                assert r.shape == f.shape
                assert r.dtype == f.dtype
                assert r.stride() == f.stride(), (shape, op)


def test_meta_tensors():
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        x = make_problem(shape).laid(layout).x
        expected = batch_norm_act(x, None, None, training=True, act="relu")
        out = batch_norm_act(x.to("meta"), None, None, training=True, act="relu")
        assert out.is_meta
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    with torch.device("meta"):
        module = BatchNormAct2d(4, act="relu")
        x = torch.empty(2, 4, 5, 5, requires_grad=True)
        module(x, torch.empty(2, 4, 5, 5)).sum().backward()
        module.eval()(x)
    assert x.grad.shape == x.shape
    assert module.weight.grad.is_meta


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 2), (2, 3, 2, 4, 2)], ids=str)
def test_memory_format_is_kept(shape, training, backend):
    for layout, other in itertools.product(LAYOUTS[:2], LAYOUTS):
        p = make_problem(shape, residual=True).laid(layout)
        residual = in_layout(p.residual, other).requires_grad_()
        x = p.x.detach().requires_grad_()
        with advdl_ops.use_backend(backend):
            out = batch_norm_act(
                x, p.running_mean, p.running_var, p.weight, training=training,
                residual=residual, act="silu",
            )  # fmt: skip
            out.backward(in_layout(p.dout, other))
        assert out.stride() == x.stride(), (layout, other)
        if backend == "fused":
            assert x.grad.stride() == x.stride(), (layout, other)


def test_output_of_a_strided_input_is_dense():
    x = make_problem((3, 4, 5, 2)).laid("strided").x
    assert not x.is_contiguous()
    out = batch_norm_act(x, None, None, training=True)
    assert out.is_contiguous()


def test_channels_last_module_chain_stays_channels_last():
    bn = BatchNormAct2d(6, act="relu")
    x = channels_last(torch.randn(2, 6, 5, 5)).requires_grad_()
    out = bn(bn(x))
    assert out.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch_returns_no_uninitialised_memory():
    for layout in LAYOUTS:
        arguments = forward_arguments((0, 3, 2, 2), layout)
        junk = [torch.full((3,), float("nan")) for _ in range(500)]
        del junk  # what the allocator hands out next
        _, stats, running = OPS.batch_norm_act(*arguments)
        assert stats.isfinite().all()
        assert torch.equal(running, torch.stack(arguments[4:6]))
        before = running.clone()
        _, stats = OPS.batch_norm_act_(*arguments)
        assert stats.isfinite().all()
        assert torch.equal(torch.stack(arguments[4:6]), before)


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_running_statistics_in_place_equal_those_returned(layout, mix):
    for shape, strided in itertools.product(SHAPES[:4], (False, True)):
        arguments = list(forward_arguments(shape, layout, mix))
        out, stats, running = OPS.batch_norm_act(*arguments)
        for i in (4, 5):
            buffer = arguments[i].clone()
            arguments[i] = buffer.repeat_interleave(2)[::2] if strided else buffer
            assert arguments[i].is_contiguous() != strided
        out_, stats_ = OPS.batch_norm_act_(*arguments)
        assert torch.equal(out, out_)
        assert torch.equal(stats, stats_)
        assert torch.equal(running, torch.stack(arguments[4:6]))


def test_buffers_written_in_place_are_seen_by_autograd():
    x, c = torch.randn(4, 3, 5), torch.zeros(3)
    mean, var = c.clone(), c + 1
    weight = torch.ones(3, requires_grad=True)
    saved = weight * mean
    for grad in (False, True):
        version = mean._version, var._version
        with torch.set_grad_enabled(grad):
            batch_norm_act(x, mean, var, weight, training=True)
        assert mean._version > version[0]
        assert var._version > version[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_raw_operator_checks_its_arguments():
    # Reached past the Python checks: an error, never a read out of bounds.
    x, c = torch.randn(2, 3, 4), torch.zeros(3)

    def forward(
        op, *, x=x, residual=None, weight=None, mean=c, var=c, training=False, act=0, eps=1e-5
    ):
        return op(x, residual, weight, None, mean, var, training, 0.1, eps, act, 0.0)

    for bad in (
        {"x": torch.randn(3)},
        {"x": x.int()},
        {"weight": torch.zeros(2)},
        {"weight": torch.zeros(3, 1)},
        {"mean": torch.zeros(2)},
        {"var": None},
        {"mean": None, "var": None},
        {"var": c.double()},
        {"residual": torch.randn(2, 3, 5)},
        {"residual": x.double()},
        {"x": torch.randn(2, 3, 1, 1, 1, 1)},
        {"weight": c.double()},
        {"weight": c.bfloat16()},
        {"mean": c.half(), "var": c.half()},
        {"residual": torch.randn(2, 3, 4, device="meta")},
        {"weight": torch.zeros(3, device="meta")},
        {"eps": -1e-5},
        {"eps": 0.0, "training": True},
        {"x": x[:1, :, :1], "training": True},
        {"act": 11},
        {"act": -1},
    ):
        for op in FORWARD:
            with pytest.raises(RuntimeError, match="batch_norm_act"):
                forward(op, **bad)
            assert not c.any(), bad
    for op in FORWARD:
        forward(op)

    stats = torch.ones(2, 3)

    def backward(*, dout=x, x=x, saved=None, stats=stats, act=1, source=0):
        return OPS.batch_norm_act_backward(
            dout, x, saved, None, None, stats, True, act, 0.0, source, True, True
        )

    backward()
    for bad in (
        {"dout": torch.randn(2, 3, 5)},
        {"dout": x.double()},
        {"saved": x},
        {"source": 1},
        {"source": 3},
        {"source": 2, "saved": x, "act": 4},
        {"stats": torch.ones(2, 2)},
        {"stats": torch.ones(3, 3)},
        {"stats": torch.ones(3)},
        {"stats": torch.ones(2, 3).double()},
    ):
        with pytest.raises(RuntimeError, match="batch_norm_act"):
            backward(**bad)


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_last_pass_alone_gives_the_same_bits(layout, mix, training):
    # Channels in vectors and beside them, long runs, several chunks, and a size whose output is not kept in cache.
    shapes = [*SHAPES, (2, 19, 7, 9), (4, 3, 40, 40), (3, 70, 33, 5), (2, 64, 130, 129)]
    for shape, act, residual in itertools.product(shapes, (0, 1, 4), (False, True)):
        arguments = forward_arguments(shape, layout, mix, training, residual, act)
        out, stats, _ = OPS.batch_norm_act(*arguments)
        again = OPS.batch_norm_act_apply(*arguments[:4], stats, act, 0.0)
        assert torch.equal(again, out) and again.stride() == out.stride(), (shape, act, residual)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_apply(layout):
    for shape in SHAPES:
        x, residual, weight, bias = forward_arguments(shape, layout)[:4]
        stats = torch.ones(2, shape[1])
        for arguments in ((x, residual, weight, bias), (x, None, None, None)):
            torch.library.opcheck(
                OPS.batch_norm_act_apply.default,
                (*arguments, stats, 1, 0.0),
                test_utils=OPERATOR_TESTS,
            )


def test_apply_refuses_other_statistics():
    x = torch.randn(2, 3, 4, 4)
    for stats in (torch.ones(2, 4), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"stats must be \[2, C\]"):
            OPS.batch_norm_act_apply(x, None, None, None, stats, 0, 0.0)


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments(layout, mix):
    shapes = [*SHAPES, (1, 5, 1, 1), (2, 19, 7, 9), (4, 3, 40, 40), (3, 70, 33, 5), (0, 3, 4, 4)]
    for shape in shapes:
        x = forward_arguments(shape, layout, mix)[0]
        moments = OPS.batch_norm_moments(x)
        values = x.double().movedim(1, 0).flatten(1)
        count = values.shape[1]
        mean = values.mean(1) if count else values.sum(1)
        squares = (values - mean[:, None]).square().sum(1)
        unit = torch.finfo(moments.dtype).eps
        assert moments.dtype == (torch.float64 if mix == "fp64" else torch.float32)
        assert ((moments[0] - mean).abs() <= 4 * unit * (1 + mean.abs())).all(), shape
        assert ((moments[1] - squares).abs() <= 16 * unit * (count + squares)).all(), shape


@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_gradient_by_means_of_a_larger_batch(layout, mix):
    """Of the whole batch's means, the gradient of a part is that part of the whole gradient."""
    shapes = [
        (6, 5, 7, 3),
        (4, 19, 7, 9),
        (4, 3, 40, 40),
        (6, 70, 33, 5),
        (8, 9),
        (2, 64, 130, 129),
    ]
    for shape, act, residual in itertools.product(shapes, (0, 1, 4), (False, True)):
        x, r, weight, bias, *_ = arguments = forward_arguments(
            shape, layout, mix, True, residual, act
        )
        out, stats, _ = OPS.batch_norm_act(*arguments)
        dout = torch.randn_like(x)
        saved, source = (out, 2) if residual and act == 1 else (r if act else None, int(residual))
        source = source if saved is not None else 0
        options = act, 0.0, source
        whole, _, dweight, dbias = OPS.batch_norm_act_backward(
            dout, x, saved, weight, bias, stats, True, *options, True, False
        )
        means = torch.stack([dweight, dbias]) / (x.numel() // x.shape[1])
        half = slice(shape[0] // 2)
        part = OPS.batch_norm_act_input_gradient(
            dout[half], x[half], None if saved is None else saved[half], weight, bias, stats, means, *options
        )  # fmt: skip
        # The formula is the same, with means that were rounded once; its terms are as large as 1 / std.
        unit = torch.finfo(x.dtype).eps
        scale = (stats[1].abs().max() * (1 if weight is None else weight.abs().max())).item()
        torch.testing.assert_close(part, whole[half], rtol=2 * unit, atol=8 * unit * scale)
        assert part.stride() == x[half].contiguous(memory_format=_format(layout, x)).stride()


def _format(layout, x):
    last = layout == "channels_last" and x.dim() == 4
    return torch.channels_last if last else torch.contiguous_format


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_the_parts(layout):
    for shape in SHAPES:
        x, _, weight, bias = forward_arguments(shape, layout)[:4]
        torch.library.opcheck(OPS.batch_norm_moments.default, (x,), test_utils=OPERATOR_TESTS)
        stats = torch.ones(2, shape[1])
        arguments = torch.ones_like(x), x, None, weight, bias, stats, stats, 1, 0.0, 0
        torch.library.opcheck(
            OPS.batch_norm_act_input_gradient.default, arguments, test_utils=OPERATOR_TESTS
        )


def test_input_gradient_refuses_other_means():
    x = torch.randn(2, 3, 4, 4)
    stats = torch.ones(2, 3)
    for means in (torch.ones(2, 4), torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"means must be \[2, C\]"):
            OPS.batch_norm_act_input_gradient(x, x, None, None, None, stats, means, 0, 0.0, 0)
