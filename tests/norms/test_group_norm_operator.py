"""The raw operators of the group norms: opcheck, fake strides, meta tensors; and the memory format they return."""

import itertools

import pytest
import torch
from support.accuracy import LAYOUTS, channels_last, in_layout
from support.checks import OPERATOR_TESTS
from support.group_norm import INSTANCE, POSITION, call_ours, problem_of
from torch._subclasses.fake_tensor import FakeTensorMode

import advdl_ops
from advdl_ops.functional import group_norm, instance_norm
from advdl_ops.nn import GroupNorm, InstanceNorm2d, LayerNorm2d

OPS = torch.ops.advdl_ops
FORWARD, BACKWARD = OPS.group_norm.default, OPS.group_norm_backward.default
# Where sizes of 1 leave the strides open, and where memory says nothing.
SHAPES = [
    (3, 4),
    (3, 4, 5),
    (3, 4, 5, 2),
    (2, 4, 2, 2, 2),
    (2, 1, 3, 3),
    (2, 4, 1, 1),
    (1, 4, 2, 2),
    (0, 4, 2, 2),
    (2, 4, 2, 1, 3, 2),
]
EACH_POSITION = 0


def groups_of(shape):
    return [1, EACH_POSITION] if shape[1] == 1 else [1, 2, shape[1], EACH_POSITION]


def forward_arguments(shape, layout, groups, mix="fp32", residual=True, act=1):
    p = problem_of(groups, shape, mix, residual=residual).laid(layout)
    return p.x, p.residual, p.weight, p.bias, groups, 1e-5, act, 0.0


def backward_arguments(shape, layout, groups, mix="fp32", act=4, source=0, needs=(True, True)):
    p = problem_of(groups, shape, mix, residual=True).laid(layout)
    acc = torch.float64 if mix == "fp64" else torch.float32
    sets = shape[0] * (groups or torch.Size(shape[2:]).numel())
    stats = torch.stack([torch.zeros(sets, dtype=acc), torch.ones(sets, dtype=acc)])
    saved = None if source == 0 else p.residual
    return (
        p.dout, p.x, saved, p.weight, p.bias, stats, groups, 1e-5, act, 0.0, source, *needs,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_forward(layout):
    for shape in SHAPES:
        for groups in (shape[1], EACH_POSITION):
            arguments = forward_arguments(shape, layout, groups)
            torch.library.opcheck(FORWARD, arguments, test_utils=OPERATOR_TESTS)
    shape = (3, 4, 5, 2)
    for mix, groups in itertools.product(("bf16", "fp64"), (2, EACH_POSITION)):
        arguments = forward_arguments(shape, layout, groups, mix, residual=False)
        torch.library.opcheck(FORWARD, arguments, test_utils=OPERATOR_TESTS)
        x, _, weight, bias, *options = arguments
        for affine in ((None, None), (weight, None), (None, bias)):
            torch.library.opcheck(FORWARD, (x, None, *affine, *options), test_utils=OPERATOR_TESTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(layout):
    for shape in SHAPES:
        for groups in (shape[1], EACH_POSITION):
            arguments = backward_arguments(shape, layout, groups)
            torch.library.opcheck(BACKWARD, arguments, test_utils=OPERATOR_TESTS)
    shape = (3, 4, 5, 2)
    cases = itertools.product(("bf16", "fp64"), (2, EACH_POSITION), ((4, 1), (1, 2)))
    for mix, groups, (act, source) in cases:
        arguments = backward_arguments(shape, layout, groups, mix, act, source)
        torch.library.opcheck(BACKWARD, arguments, test_utils=OPERATOR_TESTS)
        arguments = (*arguments[:3], None, None, *arguments[5:])
        torch.library.opcheck(BACKWARD, arguments, test_utils=OPERATOR_TESTS)
    for needs in ((True, False), (False, True), (False, False)):
        arguments = backward_arguments(shape, layout, 2, needs=needs)
        torch.library.opcheck(BACKWARD, arguments, test_utils=OPERATOR_TESTS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_strides_equal_real_ones(layout):
    for shape in [*SHAPES, (1, 1, 1, 1), (1, 4), (4, 1), (2, 4, 0, 2)]:
        for groups in groups_of(shape):
            for make, op in ((forward_arguments, FORWARD), (backward_arguments, BACKWARD)):
                arguments = make(shape, layout, groups)
                real = op(*arguments)
                with FakeTensorMode() as mode:
                    fake = op(
                        *(
                            mode.from_tensor(a) if isinstance(a, torch.Tensor) else a
                            for a in arguments
                        )
                    )
                for r, f in zip(real, fake, strict=True):
                    assert r.shape == f.shape
                    assert r.dtype == f.dtype
                    assert r.stride() == f.stride(), (shape, groups, op)


def test_meta_tensors():
    for layout, shape in itertools.product(LAYOUTS, SHAPES):
        for norm in (2 if shape[1] > 1 else 1, POSITION, INSTANCE):
            if norm == INSTANCE and torch.Size(shape[2:]).numel() < 2:
                continue
            p = problem_of(norm, shape, running=False).laid(layout)
            expected = call_ours(norm, p.x, None, None, p.weight, p.bias, p, act="relu")
            p = p.to(torch.float32)
            on_meta = (None if t is None else t.to("meta") for t in (p.x, p.weight, p.bias))
            x, weight, bias = on_meta
            out = call_ours(norm, x, None, None, weight, bias, p, act="relu")
            assert out.is_meta
            assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    with torch.device("meta"):
        for module in (
            GroupNorm(2, 4, act="relu"),
            LayerNorm2d(4, act="relu"),
            InstanceNorm2d(4, affine=True, track_running_stats=True, act="relu"),
        ):
            x = torch.empty(2, 4, 5, 5, requires_grad=True)
            module(x, torch.empty(2, 4, 5, 5)).sum().backward()
            module.eval()(x)
            assert x.grad.shape == x.shape
            assert module.weight.grad.is_meta


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    ("shape", "norm"),
    [
        *itertools.product([(3, 4, 5), (3, 4, 5, 2), (2, 4, 2, 4, 2)], [2, POSITION, INSTANCE]),
        *itertools.product([(3, 4)], [2, POSITION]),
    ],
    ids=str,
)
def test_memory_format_is_kept(shape, norm, backend):
    for layout, other, act in itertools.product(LAYOUTS[:2], LAYOUTS, (None, "relu", "silu")):
        p = problem_of(norm, shape, residual=True).laid(layout)
        residual = in_layout(p.residual, other).requires_grad_()
        x = p.x.detach().requires_grad_()
        statistics = p.running_mean, p.running_var
        with advdl_ops.use_backend(backend):
            out = call_ours(norm, x, *statistics, p.weight, None, p, residual=residual, act=act)
            out.backward(in_layout(p.dout, other))
        assert out.stride() == x.stride(), (layout, other)
        if backend == "fused":
            assert x.grad.stride() == x.stride(), (layout, other)


def test_output_of_a_strided_input_is_dense():
    x = problem_of(2, (3, 4, 5, 2)).laid("strided").x
    assert not x.is_contiguous()
    assert group_norm(x, 2).is_contiguous()


def test_channels_last_module_chain_stays_channels_last():
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        norms = torch.nn.Sequential(GroupNorm(2, 6, act="relu"), LayerNorm2d(6))
        x = channels_last(torch.randn(2, 6, *[3] * (rank - 2))).requires_grad_()
        out = norms(x)
        assert out.is_contiguous(memory_format=memory_format)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert grad.is_contiguous(memory_format=memory_format)


def test_empty_batch_returns_no_uninitialised_memory():
    for layout, groups in itertools.product(LAYOUTS, (2, EACH_POSITION)):
        for shape in ((0, 4, 2, 2), (2, 4, 0, 2)):
            arguments = backward_arguments(shape, layout, groups)
            junk = [torch.full((4,), float("nan")) for _ in range(500)]
            del junk  # what the allocator hands out next
            _, _, dweight, dbias = BACKWARD(*arguments)
            assert dweight.eq(0).all()
            assert dbias.eq(0).all()
            _, stats = FORWARD(*forward_arguments(shape, layout, groups))
            assert stats.isfinite().all()


def test_statistics_that_the_operator_returns():
    """Mean and biased variance, [2, N * groups] and [2, N * S]."""
    p = problem_of(2, (3, 4, 5, 7))
    for layout in LAYOUTS:
        x = in_layout(p.x, layout)
        for groups in (2, EACH_POSITION):
            _, stats = FORWARD(x, None, None, None, groups, 1e-5, 0, 0.0)
            rows = p.x.movedim(1, -1).reshape(-1, 4) if groups == 0 else p.x.reshape(6, -1)
            exact = torch.stack([rows.mean(1), rows.var(1, correction=0)])
            torch.testing.assert_close(stats, exact)


def test_running_statistics_do_not_change_the_output():
    """Their way through `_normalize_with_stats` is another one than that without."""
    x, weight = torch.randn(3, 4, 5, 7), torch.randn(4)
    out = instance_norm(x, torch.zeros(4), torch.ones(4), weight, act="relu")
    assert torch.equal(out, instance_norm(x, None, None, weight, act="relu"))


def test_raw_operator_checks_its_arguments():
    # Reached past the Python checks: an error, never a read out of bounds.
    x, c = torch.randn(2, 4, 3), torch.zeros(4)

    def forward(*, x=x, residual=None, weight=c, bias=c, groups=2, act=0, eps=1e-5):
        return FORWARD(x, residual, weight, bias, groups, eps, act, 0.0)

    forward()
    forward(groups=EACH_POSITION)
    for bad in (
        {"x": torch.randn(4)},
        {"x": torch.tensor(1.0)},
        {"x": x.int()},
        {"groups": 3},
        {"groups": 8},
        {"groups": -1},
        {"weight": torch.zeros(2)},
        {"weight": torch.zeros(4, 1)},
        {"bias": torch.zeros(5)},
        {"residual": torch.randn(2, 4, 4)},
        {"residual": x.double()},
        {"residual": torch.randn(2, 4, 3, device="meta")},
        {"weight": c.double(), "bias": c.double()},
        {"weight": c.bfloat16(), "bias": c.bfloat16()},
        {"x": x.bfloat16(), "weight": c.bfloat16()},  # and a bias of fp32
        {"weight": torch.zeros(4, device="meta")},
        {"eps": -1e-5},
        {"eps": float("nan")},
        {"act": 11},
        {"act": -1},
    ):
        with pytest.raises(RuntimeError, match="group_norm"):
            forward(**bad)

    def backward(*, dout=x, x=x, saved=None, weight=c, stats=None, act=1, source=0, groups=2):
        if stats is None:
            stats = torch.ones(2, 2 * (groups or 3))
        return BACKWARD(
            dout, x, saved, weight, None, stats, groups, 1e-5, act, 0.0, source, True, True
        )

    backward()
    backward(groups=EACH_POSITION)
    for bad in (
        {"dout": torch.randn(2, 4, 4)},
        {"dout": x.double()},
        {"saved": x},
        {"source": 1},
        {"source": 3},
        {"source": 2, "saved": x, "act": 4},
        {"source": 1, "saved": torch.randn(2, 4, 4)},
        {"stats": torch.ones(2, 2)},
        {"stats": torch.ones(2, 6)},
        {"stats": torch.ones(4)},
        {"stats": torch.ones(2, 4).double()},
        {"groups": EACH_POSITION, "stats": torch.ones(2, 4)},
        {"groups": 3},
        {"weight": torch.zeros(3)},
    ):
        with pytest.raises(RuntimeError, match="group_norm"):
            backward(**bad)
