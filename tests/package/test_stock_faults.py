"""Convolutions of which torch's own gradients are wrong, or end the process, are right by way of this package.

docs/stock_faults.md names them. Each runs in a process of its own, which may die, where this file is the program.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from advdl_ops import explain, optimize, use_backend
from advdl_ops import functional as F
from advdl_ops._stock_faults import fails_in_channels_last

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import stock_faults as search  # noqa: E402

CALLS = 300

# x, outputs and stride of 1x1 convolutions: two for AVX2, the larger one for AVX-512 too.
SHAPES = (
    ((2, 6, 15, 12), 4, 3),
    ((2, 3, 32, 32), 8, 2),
    ((2, 3, 64, 64), 8, 2),
)


def last(t):
    """In channels_last, a weight of 1x1 too: by the strides of its sizes of 1."""
    return t.to(memory_format=torch.channels_last)


def weight_of(shape, outputs):
    return torch.randn(outputs, shape[1], 1, 1)


def conv2d(shape, outputs, stride):
    x, weight = last(torch.randn(shape)), weight_of(shape, outputs)
    return (x, weight), lambda x, weight: F.conv2d(x, weight, None, stride)


def weight_in_channels_last(shape, outputs, stride):
    x, weight = torch.randn(shape), last(weight_of(shape, outputs))
    return (x, weight), lambda x, weight: F.conv2d(x, weight, None, stride, act="silu")


def conv_bn_act(shape, outputs, stride):
    x, weight = last(torch.randn(shape)), last(weight_of(shape, outputs))

    def call(x, weight):
        return F.conv_bn_act(x, weight, None, None, stride=stride, training=True, act="relu")

    return (x, weight), call


def conv_transpose2d(shape, outputs, stride):
    """Its weight's gradient is that of the convolution from the larger image, here its output."""
    small = (shape[0], outputs, shape[2] // stride, shape[3] // stride)
    x, weight = last(torch.randn(small)), torch.randn(outputs, shape[1], 1, 1)
    return (x, weight), lambda x, weight: F.conv_transpose2d(
        x, weight, None, stride, output_padding=stride - 1
    )


def by_reference(shape, outputs, stride):
    x, weight = last(torch.randn(shape)), weight_of(shape, outputs)

    def call(x, weight):
        with use_backend("reference"):
            return F.conv2d(x, weight, None, stride)

    return (x, weight), call


class Own(torch.nn.Conv2d):
    """What optimize() leaves as it is."""


def optimized(shape, outputs, stride):
    """A model that would run in channels_last inside, but for such a layer of torch's."""
    layers = [Own(shape[1], outputs, 1, stride), torch.nn.Conv2d(outputs, 4, 1)]
    model = optimize(torch.nn.Sequential(*layers))
    return (torch.randn(shape), model[0].weight), lambda x, weight: torch.func.functional_call(
        model.to(x.dtype), {"0.weight": weight}, (x,)
    )


ROUTES = {
    f.__name__: f
    for f in (
        conv2d,
        weight_in_channels_last,
        conv_bn_act,
        conv_transpose2d,
        by_reference,
        optimized,
    )
}


def gradients(call, inputs, dout=None, **options):
    out = call(*inputs)
    dout = torch.ones_like(out) if dout is None else dout.to(out.dtype)
    return torch.autograd.grad(out, inputs, dout, **options), out


def run(route, calls, create_graph):
    """Raises where a gradient is wrong in one of so many calls."""
    for shape in SHAPES:
        torch.manual_seed(0)
        inputs, call = ROUTES[route](*shape)
        inputs = [t.detach().requires_grad_() for t in inputs]
        doubled = [t.detach().double().requires_grad_() for t in inputs]
        exact, out = gradients(call, doubled)
        dout = last(torch.randn(out.shape))
        exact, _ = gradients(call, doubled, dout)
        for number in range(calls):
            found, _ = gradients(call, inputs, dout, create_graph=create_graph)
            for name, one, right in zip(("dx", "dweight"), found, exact, strict=True):
                error = (one.detach() - right).abs().max() / right.abs().max()
                # Garbage is off by more than the largest value; NaN is not below either.
                assert error < 1e-4, (
                    f"{route} {shape}: {name} of call {number} is off by {error:.1e}"
                )


def environment(capability):
    held = search.HELD["avx2"] if capability == "avx2" else {}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **held, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


@pytest.mark.parametrize("capability", ["native", "avx2"])
def test_gradients_of_few_channels(capability):
    done = subprocess.run(
        [sys.executable, __file__, str(CALLS)],
        env={**environment(capability), "MALLOC_PERTURB_": "165"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


class Calls(torch.nn.Module):
    """A convolution without a layer, and one with."""

    def __init__(self, stride):
        super().__init__()
        self.weight, self.stride = torch.nn.Parameter(torch.randn(4, 3, 1, 1)), stride
        self.last = torch.nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.last(torch.nn.functional.conv2d(x, self.weight, None, self.stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_calls_with_a_stride_are_left_in_the_given_format(stride):
    text = str(explain(optimize(Calls(stride))))
    assert ("of which torch computes some wrongly in channels_last" in text) == (stride == 2)
    assert ("\n    channels_last on CPU, whatever it is given\n" in text + "\n") == (stride == 1)


def case(x, outputs, kernel, stride, padding=(0, 0), dilation=(1, 1), groups=1, more=None, **other):
    """``more``: output padding, of a transposed one."""
    fields = {"dtype": "float32", "x_format": "channels_last", "weight_format": "channels_last"}
    return search.Case(
        *x, outputs, kernel, stride, padding, dilation, groups, more is not None, more or (0, 0),
        **{**fields, **other}, grad_format="channels_last",
    )  # fmt: skip


# As docs/stock_faults.md tells them; each is wrong, or ends the process, in stock's of torch 2.13.
KNOWN = [
    case((2, 6, 15, 12), 4, (1, 1), (3, 3)),
    case((2, 3, 32, 32), 16, (1, 1), (2, 2), x_format="contiguous"),
    case((2, 12, 128, 96), 16, (1, 1), (2, 2)),
    case((3, 9, 8, 64), 4, (1, 1), (2, 2), more=(1, 1)),
    case((2, 4, 5, 1), 4, (3, 3), (2, 2), (1, 1), dtype="bfloat16"),
    case((2, 16, 3, 1), 16, (3, 3), (2, 2), (1, 1), dtype="bfloat16", x_format="contiguous"),
    case((2, 8, 9, 9), 12, (3, 3), (1, 1), (2, 2), (2, 2), 4, dtype="bfloat16"),
    case((2, 44, 38, 1), 1, (1, 1), (2, 2), more=(1, 0), dtype="bfloat16"),
    case((3, 37, 64, 1), 116, (2, 1), (5, 4), (12, 2), (10, 10), dtype="bfloat16"),
    case((1, 70, 1, 1), 210, (1, 1), (2, 2), (2, 1), groups=35, weight_format="contiguous"),
    case((2, 8, 3, 2), 8, (3, 1), (2, 4), (1, 2), more=(0, 0), dtype="bfloat16"),
]


def test_a_fault_that_this_cpu_may_not_have_is_routed_around():
    """The gradient of the weight of a bf16 convolution with groups and dilation."""
    x, weight = torch.empty(2, 8, 9, 9), torch.empty(12, 2, 3, 3)
    options = (1, 1), (2, 2)
    for dtype, fails in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
        pair = x.to(dtype), weight.to(dtype)
        assert fails_in_channels_last(*pair, *options, (2, 2), 4) == fails
        assert not fails_in_channels_last(*pair, *options, (1, 1), 4)


NARROW = ((2, 16, 1, 1), (2, 16, 3, 1), (3, 5, 8, 1), (2, 16, 4, 2))


@pytest.mark.parametrize("transposed", [False, True], ids=["conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_images_narrower_than_the_stride_in_half_precision(dtype, layout, backend, transposed):
    """Row 4: in either memory format. Of a transposed convolution the output is the image."""
    for shape, stride in itertools.product(NARROW, (2, 3)):
        if transposed and shape[3] >= stride:
            continue
        torch.manual_seed(0)
        image, weight = torch.randn(shape), torch.randn(12, shape[1], 3, 3)
        like = torch.nn.functional.conv2d(image, weight, None, stride, 1)
        more = [
            size - ((n - 1) * stride + 1) for size, n in zip(shape[2:], like.shape[2:], strict=True)
        ]
        inputs = [like if transposed else image, weight]
        dout = torch.randn_like(image if transposed else like).to(dtype)

        def call(x, weight, stride=stride, more=more):
            if transposed:
                return F.conv_transpose2d(x, weight, None, stride, 1, more)
            return F.conv2d(x, weight, None, stride, 1)

        given = [t.to(dtype).to(memory_format=layout) for t in inputs]
        exact = gradients(call, [t.double().requires_grad_() for t in given], dout)[0]
        for create_graph in (False, True):
            with use_backend(backend):
                leaves = [t.detach().requires_grad_() for t in given]
                found = gradients(call, leaves, dout, create_graph=create_graph)[0]
            for one, right in zip(found, exact, strict=True):
                error = (one.detach() - right).abs().max() / right.abs().max()
                assert error < 0.02, (shape, stride, create_graph)


@pytest.mark.parametrize("capability", ["native", "avx2"])
def test_known_shapes_touch_their_own_memory_alone(tmp_path, capability):
    """Where each tensor ends at memory that cannot be touched, and is full of NaN before it is written."""
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("no C compiler for tools/guarded_memory.c")
    args = search.parser().parse_args(["--isa", capability, "--ours"])
    with search.Children(args, search.build_guard(tmp_path)) as children:
        found = {c: children.run(c) for c in KNOWN}
    assert not any(found.values()), {c: v for c, v in found.items() if v}


if __name__ == "__main__":
    for name in sys.argv[2:] or ROUTES:
        run(name, int(sys.argv[1]), create_graph=False)
    run("conv2d", int(sys.argv[1]) // 3, create_graph=True)
    run("conv_transpose2d", int(sys.argv[1]) // 3, create_graph=True)
