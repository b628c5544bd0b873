"""The raw operators of the convolution: opcheck, fake strides, meta tensors; and the memory format they return."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, LAYOUTS, assert_accurate, channels_last, in_layout
from support.checks import OPERATOR_TESTS
from support.conv2d import CASES, DTYPES, Case, call_ours, check, make_inputs, term_sizes
from torch._subclasses.fake_tensor import FakeTensorMode

import advdl_ops
from advdl_ops.activation import IDENTITY, resolve_activation
from advdl_ops.nn import Conv2d, DepthwiseConv2d, HybridDilatedConv

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.advdl_ops
ALL = ("bias", "scale", "shift", "residual")
# Beside the cases with numbers for padding: where sizes of 0 and 1 leave the strides open.
SHAPES = {n: c for n, c in CASES.items() if not isinstance(c.padding, str)} | {
    "1x1 of one channel": Case((2, 1, 4, 4), 1, (1, 1)),
    "one output channel": Case((2, 4, 5, 5), 1),
    "one position left": Case((2, 4, 3, 3), 4),
    "empty batch": Case((0, 4, 5, 5), 6, padding=1),
    "empty batch, depthwise": Case((0, 4, 5, 5), 4, padding=1, groups=4),
    "batch 1, channel 1": Case((1, 1, 3, 3), 1, padding=1),
    "one row": Case((2, 4, 1, 7), 4, (1, 3), groups=4),
}


def pair(value):
    return [value, value] if isinstance(value, int) else list(value)


def is_depthwise(case):
    return case.groups == case.x[1] == case.outputs


def options_of(case):
    pairs = pair(case.stride), pair(case.padding), pair(case.dilation)
    return pairs if is_depthwise(case) else (*pairs, case.groups)


def forward_of(case, layout="contiguous", dtype="fp32", with_=ALL, act="silu"):
    """The operator and its arguments."""
    p = make_inputs(case, DTYPES[dtype], with_=with_).laid(layout)
    a = resolve_activation("", ACTIVATIONS[act][0])
    op = OPS.depthwise_conv2d if is_depthwise(case) else OPS.conv2d
    return op.default, (
        p.x, p.weight, p.scale, p.shift, p.residual, *options_of(case), a.code, a.param,
    )  # fmt: skip


def backward_of(case, layout="contiguous", dtype="fp32", needs=(True, True, True)):
    p = make_inputs(case, DTYPES[dtype]).laid(layout)
    op = OPS.depthwise_conv2d_backward if is_depthwise(case) else OPS.conv2d_backward
    return op.default, (p.dout, p.x, p.weight, *options_of(case), *needs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    for name in ("one position left", "depthwise"):
        for make in (forward_of, backward_of):
            op, arguments = make(SHAPES[name], layout)
            torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS)


def test_opcheck_of_dtypes_and_options():
    for name, dtype in (("dilated", "bf16"), ("depthwise", "fp64")):
        op, arguments = forward_of(SHAPES[name], "channels_last", dtype, ("shift",), "relu")
        torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS)
        op, arguments = backward_of(SHAPES[name], "contiguous", dtype, (False, True, False))
        torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS)
    for name in ("empty batch", "empty batch, depthwise"):
        for make in (forward_of, backward_of):
            op, arguments = make(SHAPES[name])
            torch.library.opcheck(op, arguments, test_utils=OPERATOR_TESTS[:3])


def test_opcheck_of_convert_layout():
    for shape, layout, last in itertools.product(
        ((2, 3, 4, 5), (2, 3, 1, 1), (0, 3, 2, 2)), LAYOUTS, (True, False)
    ):
        x = in_layout(torch.randn(shape), layout)
        op = OPS.convert_layout.default
        torch.library.opcheck(op, (x, last), test_utils=OPERATOR_TESTS)
        found = op(x, last)
        assert torch.equal(found, x)
        assert found.data_ptr() != x.data_ptr() or x.numel() == 0
        assert found.is_contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )


def assert_like_fake(op, arguments, what):
    real = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    real, fake = ([t] if isinstance(t, torch.Tensor) else t for t in (real, fake))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), (op, what)
    return real


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_fake_outputs_equal_real_ones(name, layout):
    case = SHAPES[name]
    for dtype, (with_, act) in itertools.product(
        ("fp32", "bf16", "fp64"), (((), "none"), (("shift",), "relu"), (ALL, "elu"))
    ):
        op, arguments = forward_of(case, layout, dtype, with_, act)
        assert_like_fake(op, arguments, (dtype, with_, act))
    for dtype, needs in itertools.product(
        ("fp32", "bf16"), ((True, True, True), (True, False, False), (False, True, False))
    ):
        op, arguments = backward_of(case, layout, dtype, needs)
        assert_like_fake(op, arguments, (dtype, needs))


@pytest.mark.parametrize("name", ["3x3", "multiplier", "depthwise", "dilated"])
def test_no_output_is_an_input(name):
    for layout, make in itertools.product(LAYOUTS, (forward_of, backward_of)):
        op, arguments = make(SHAPES[name], layout)
        found = op(*arguments)
        found = [found] if isinstance(found, torch.Tensor) else found
        inputs = {t.data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
        assert not inputs & {t.data_ptr() for t in found}
        assert len({t.data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("name", ["3x3", "groups", "dilated", "multiplier", "depthwise"])
def test_backward_is_that_of_torch_and_sums_in_fp32(name):
    case = SHAPES[name]
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        p = make_inputs(case, DTYPES[dtype], with_=()).laid(layout)
        op, arguments = backward_of(case, layout, dtype)
        dz, x, weight = arguments[:3]
        dx, dweight, dbias = op(*arguments)
        acc = torch.float64 if dtype == "fp64" else torch.float32
        assert dweight.dtype == dbias.dtype == acc
        assert dx.dtype == x.dtype
        exact, plain = (
            torch.autograd.grad(F.conv2d(*leaves, **case.options), leaves, dz.to(leaves[0].dtype))
            for leaves in (
                [t.detach().to(kind).requires_grad_() for t in (x, weight)]
                for kind in (torch.float64, x.dtype)
            )
        )
        sizes = {n: t.max().item() for n, t in term_sizes(replace(p, dout=dz)).items()}
        what = name, dtype, layout
        assert_accurate(dx, exact[0], plain[0], sizes["dx"], what, acc)
        assert_accurate(dweight.to(x.dtype), exact[1], plain[1], sizes["dweight"], what, acc)
        exact_sum = dz.double().sum((0, 2, 3))
        assert_accurate(dbias, exact_sum, exact_sum, sizes["dbias"], what, acc)


def test_meta_tensors():
    for name, layout, act in itertools.product(CASES, LAYOUTS[:2], (None, "relu", "silu")):
        p = make_inputs(CASES[name], with_=ALL).laid(layout)
        p.bias = None
        given = p.x, p.weight, p.bias, p.scale, p.shift, p.residual
        expected = call_ours(p.case, *given, act or "none")
        on_meta = [None if t is None else t.to("meta").requires_grad_() for t in given]
        out = call_ours(p.case, *on_meta, act or "none")
        assert out.is_meta
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        out.sum().backward()
        assert all(t.grad.shape == t.shape for t in on_meta if t is not None)
    with torch.device("meta"):
        for module in (Conv2d(4, 6, 3, act="relu"), DepthwiseConv2d(4, 3), HybridDilatedConv(4)):
            x = torch.empty(2, 4, 5, 5, requires_grad=True)
            module(x).sum().backward()
            assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize(
    "name", ["3x3", "1x1", "stride", "dilated", "groups", "multiplier", "depthwise"]
)
def test_memory_format_is_kept(name, backend):
    for dtype, layout, other, act in itertools.product(
        ("fp32", "bf16", "fp64"), LAYOUTS[:2], LAYOUTS, ("none", "relu", "elu")
    ):
        memory_format = (
            torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        p = make_inputs(CASES[name], DTYPES[dtype], with_=("bias", "residual")).laid(layout)
        residual = in_layout(p.residual, other).requires_grad_()
        x = p.x.detach().requires_grad_()
        with advdl_ops.use_backend(backend):
            out = call_ours(p.case, x, p.weight, p.bias, None, None, residual, act)
            alone = call_ours(p.case, p.x, p.weight, p.bias, None, None, residual.detach(), act)
            out.backward(in_layout(p.dout, other))
        if backend == "fused":
            assert x.grad.stride() == x.stride(), (layout, other, dtype)
            assert out.is_contiguous(memory_format=memory_format), (layout, other, dtype)
            assert alone.stride() == out.stride()


def test_channels_last_chain_stays_channels_last():
    chain = torch.nn.Sequential(Conv2d(4, 8, 3, act="relu"), DepthwiseConv2d(8, 3, act="silu"))
    for layout, memory_format in (
        (torch.Tensor.contiguous, torch.contiguous_format),
        (channels_last, torch.channels_last),
    ):
        x = layout(torch.randn(2, 4, 9, 9)).requires_grad_()
        out = chain(x)
        assert out.is_contiguous(memory_format=memory_format)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert grad.is_contiguous(memory_format=memory_format)


def test_output_of_a_strided_input_is_dense():
    for name in ("3x3", "depthwise"):
        p = make_inputs(CASES[name]).laid("strided")
        assert not p.x.is_contiguous()
        assert call_ours(p.case, p.x, p.weight, p.bias, None, None, None, "relu").is_contiguous()


def test_empty_batch_returns_no_uninitialised_memory():
    for name, dtype in itertools.product(
        ("empty batch", "empty batch, depthwise"), ("fp32", "bf16")
    ):
        op, arguments = backward_of(SHAPES[name], dtype=dtype)
        junk = [torch.full((6, 4, 3, 3), float("nan")) for _ in range(100)]
        junk += [torch.full((6,), float("nan")) for _ in range(500)]
        del junk  # what the allocator hands out next
        _, dweight, dbias = op(*arguments)
        assert dweight.eq(0).all()
        assert dbias.eq(0).all()


@pytest.mark.parametrize("enabled", [True, False])
def test_onednn_switched_off(enabled):
    case = CASES["dilated"]
    for with_, act in (((), "none"), (("shift", "residual"), "relu"), (ALL, "silu")):
        op, arguments = forward_of(case, with_=with_, act=act)
        with torch.backends.mkldnn.flags(enabled=enabled):
            found = op(*arguments)
        x, weight, scale, shift, residual = (
            None if t is None else t.double() for t in arguments[:5]
        )
        z = F.conv2d(x, weight, **case.options)
        z = z if scale is None else z * scale.view(-1, 1, 1)
        z = z if shift is None else z + shift.view(-1, 1, 1)
        z = z if residual is None else z + residual
        torch.testing.assert_close(found, ACTIVATIONS[act][1](z).float())


def test_scale_is_not_lost_of_a_depthwise_operator():
    """The two operators agree where both can serve."""
    p = make_inputs(CASES["depthwise"], torch.float64, with_=("scale", "shift", "residual"))
    tensors = p.x, p.weight, p.scale, p.shift, p.residual
    options = [1, 1], [1, 1], [1, 1]
    for act in (IDENTITY, resolve_activation("", "elu")):
        torch.testing.assert_close(
            OPS.depthwise_conv2d(*tensors, *options, act.code, act.param),
            OPS.conv2d(*tensors, *options, p.case.groups, act.code, act.param),
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_computed_in_another_format_than_given(layout):
    """A large dilation, which on CPU goes by way of channels_last."""
    case = Case((2, 5, 23, 21), 6, dilation=8, padding=8)
    for dtype, with_, act in itertools.product(
        ("fp32", "bf16"), ((), ALL), ("none", "relu", "elu")
    ):
        op, arguments = forward_of(case, layout, dtype, with_, act)
        assert_like_fake(op, arguments, (dtype, with_, act))
        check(make_inputs(case, DTYPES[dtype], with_=with_).laid(layout), act)
        op, arguments = backward_of(case, layout, dtype)
        assert_like_fake(op, arguments, dtype)


def test_checksum_is_not_traced():
    """It has no fake function: nothing is kept in a graph, so nothing is compared there."""
    with FakeTensorMode() as mode, pytest.raises(Exception, match="checksum"):
        OPS.checksum(mode.from_tensor(torch.randn(3)))
