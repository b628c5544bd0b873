"""nn.ConvTranspose2d: sizes that match, its state, compilation and export."""

import copy
import itertools
import pickle

import pytest
import torch
from support.accuracy import LAYOUTS, in_layout
from torch._dynamo.testing import CompileCounterWithBackend

from advdl_ops.nn import ConvTranspose2d

pytestmark = pytest.mark.usefixtures("one_thread")
f64 = torch.float64


def furthest(size, kernel, stride, padding, dilation):
    """One past the last position of the output that a kernel reaches, by walking: no output padding counts."""
    reached = [i * stride + k * dilation - padding for i in range(size) for k in range(kernel)]
    return max(reached) + 1 - padding


def one_axis(x, weight, stride, padding, dilation, target):
    """What a layer without output padding limits gives on one axis: every product where it falls, zeros beyond."""
    size, kernel = len(x), len(weight)
    out = torch.zeros(target, dtype=x.dtype)
    # The largest output that torch's rule allows; padding also cuts the end.
    least = furthest(size, kernel, stride, padding, dilation)
    most = least + max(stride, dilation) - 1
    for i, k in itertools.product(range(size), range(kernel)):
        at = i * stride + k * dilation - padding
        if 0 <= at < min(target, most):
            out[at] += x[i] * weight[k]
    return out


AXES = list(itertools.product((1, 2, 5), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2, 4)))


def test_match_on_a_grid(backend):
    """Rows and columns with options of their own: out[h, w] = rows[h] * columns[w], for kernels of rank one."""
    cases = [case for case in AXES if furthest(*case) > 0]
    kinds = set()
    g = torch.Generator().manual_seed(0)
    for index, rows in enumerate(cases):
        columns = cases[(index * 37 + 11) % len(cases)]
        for more in (-3, -1, 0, 1, 2, 3, 4):
            sizes = [furthest(*rows) + more, furthest(*columns) + 2 - more]
            if min(sizes) < 1:
                continue
            layer = ConvTranspose2d(
                1, 1, (rows[1], columns[1]), (rows[2], columns[2]), (rows[3], columns[3]),
                dilation=(rows[4], columns[4]), bias=False, dtype=f64,
            )  # fmt: skip
            x = [torch.randn(n, generator=g, dtype=f64) for n in (rows[0], columns[0])]
            w = [torch.randn(n, generator=g, dtype=f64) for n in (rows[1], columns[1])]
            layer.weight.data = torch.outer(*w)[None, None]
            expected = torch.outer(
                *(
                    one_axis(x[d], w[d], *axis[2:], sizes[d])
                    for d, axis in enumerate((rows, columns))
                )
            )
            for match in (tuple(sizes), torch.empty(1, 3, *sizes)):
                out = layer(torch.outer(*x)[None, None], match=match)
                torch.testing.assert_close(out[0, 0], expected, rtol=1e-13, atol=1e-13)
            kinds.add("cut" if more < 0 else "reached" if more < max(rows[2], rows[4]) else "zeros")
    assert kinds == {"cut", "reached", "zeros"}


@pytest.mark.parametrize("act", [None, "sigmoid"])
def test_match_keeps_layout_and_gradients(backend, act):
    layer = ConvTranspose2d(4, 6, 2, 2, act=act, dtype=f64)
    for layout, sizes in itertools.product(
        LAYOUTS[:2], [(9, 7), (10, 8), (11, 9), (12, 13), (13, 5)]
    ):
        x = in_layout(torch.randn(2, 4, 5, 4, dtype=f64), layout).requires_grad_()
        out = layer(x, match=torch.empty(7, 1, *sizes))
        whole = layer(x)
        assert out.shape == (2, 6, *sizes)
        assert out.stride() == in_layout(out, layout).stride()
        h, w = min(sizes[0], 10), min(sizes[1], 8)
        torch.testing.assert_close(out[..., :h, :w], whole[..., :h, :w])
        # Output padding, of at most one row or column here, gives what no kernel reaches: act(bias).
        beyond = torch.zeros_like(out)
        bias = layer.bias if act is None else layer.bias.sigmoid()
        beyond[..., :11, :9] = bias[:, None, None]
        # Zeros, exactly, after that.
        torch.testing.assert_close(out[..., h:, :], beyond[..., h:, :], rtol=1e-13, atol=0)
        torch.testing.assert_close(out[..., w:], beyond[..., w:], rtol=1e-13, atol=0)
        dout = in_layout(torch.randn(out.shape, dtype=f64), layout)
        (dx,) = torch.autograd.grad(out, x, dout)
        (expected,) = torch.autograd.grad(whole[..., :h, :w], x, dout[..., :h, :w])
        torch.testing.assert_close(dx, expected)
        assert dx.stride() == x.stride()


def test_match_of_an_unbatched_image(backend):
    layer = ConvTranspose2d(4, 6, 2, 2, dtype=f64)
    x = torch.randn(4, 5, 6, dtype=f64)
    out = layer(x, match=torch.empty(3, 9, 13))
    assert torch.equal(out, layer(x[None], match=(9, 13))[0])
    assert layer(x, match=[11, 12]).shape == (6, 11, 12)


def test_match_stands_in_place_of_output_padding(backend):
    layer = ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1)
    x = torch.randn(2, 4, 5, 5)
    assert layer(x).shape[2:] == (10, 10)
    assert layer(x, match=(9, 10)).shape[2:] == (9, 10)


def test_output_size_as_torch(backend):
    g = torch.Generator().manual_seed(0)
    for kernel, stride, padding, dilation in itertools.product(
        (2, 3), (1, 2, (3, 2)), (0, 1), (1, 2)
    ):
        own = ConvTranspose2d(4, 6, kernel, stride, padding, dilation=dilation, dtype=f64)
        stock = torch.nn.ConvTranspose2d(
            4, 6, kernel, stride, padding, dilation=dilation, dtype=f64
        )
        stock.load_state_dict(own.state_dict())
        x = torch.randn(2, 4, 5, 6, generator=g, dtype=f64)
        least = stock(x).shape[2:]
        for h, w in itertools.product(range(-1, 4), repeat=2):
            size = [least[0] + h, least[1] + w]
            try:
                expected = stock(x, output_size=size)
            except ValueError:
                with pytest.raises(ValueError, match="ConvTranspose2d: output_size"):
                    own(x, output_size=size)
                continue
            for spelled in (size, (2, 6, *size), expected.shape):
                found = own(x, spelled)
                torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
            unbatched = own(x[0], (6, *size))
            torch.testing.assert_close(unbatched, expected[0], rtol=1e-13, atol=1e-13)


class UNet(torch.nn.Module):
    """Three steps down by rounding, three up, joined by concatenation."""

    def __init__(self, down, dtype=f64):
        super().__init__()
        widths = (3, 4, 6, 8)
        self.down = torch.nn.ModuleList([down(a, b, dtype) for a, b in itertools.pairwise(widths)])
        self.up = torch.nn.ModuleList(
            [
                ConvTranspose2d(2 * a if a < 8 else a, b, 2, 2, act="relu", dtype=dtype)
                for a, b in ((8, 6), (6, 4), (4, 3))
            ]
        )

    def forward(self, x):
        features = [x]
        for layer in self.down:
            features.append(layer(features[-1]))
        x = features.pop()
        for layer in self.up:
            feature = features.pop()
            x = torch.cat([layer(x, match=feature), feature], 1)
        return x


def strided_down(a, b, dtype):
    return torch.nn.Conv2d(a, b, 2, 2, dtype=dtype)


def pooled_down(a, b, dtype):
    return torch.nn.Sequential(
        torch.nn.Conv2d(a, b, 3, padding=1, dtype=dtype), torch.nn.MaxPool2d(2)
    )


@pytest.mark.parametrize("down", [strided_down, pooled_down], ids=["strided", "pooled"])
def test_unet(backend, down):
    net = UNet(down)
    for h, w in itertools.product((8, 9, 13, 15, 23), (8, 11, 14, 31)):
        out = net(torch.randn(2, 3, h, w, dtype=f64))
        assert out.shape == (2, 6, h, w)
        out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_decoder_stays_aligned(backend):
    """A transposed convolution puts each value of the encoder back where it was taken from, whatever was left out."""
    for size, stride in itertools.product(range(4, 18), (2, 3)):
        x = torch.arange(size * size, dtype=f64).view(1, 1, size, size)
        picked = x[..., ::stride, ::stride][..., : size // stride, : size // stride]
        layer = ConvTranspose2d(1, 1, stride, stride, bias=False, dtype=f64)
        layer.weight.data = torch.zeros_like(layer.weight)
        layer.weight.data[0, 0, 0, 0] = 1
        out = layer(picked, match=x)
        mask = layer(torch.ones_like(picked), match=x)
        assert torch.equal(out, x * mask)
        assert mask.sum() == picked.numel()


def test_state_dict_both_ways(backend):
    options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2}
    own = ConvTranspose2d(4, 6, 3, **options, act="relu", dtype=f64)
    stock = torch.nn.ConvTranspose2d(4, 6, 3, **options, dtype=f64)
    assert own.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(2, 4, 5, 6, dtype=f64)
    stock.load_state_dict(own.state_dict())
    torch.testing.assert_close(own(x), stock(x).relu(), rtol=1e-13, atol=1e-13)
    stock.reset_parameters()
    own.load_state_dict(stock.state_dict())
    torch.testing.assert_close(own(x), stock(x).relu(), rtol=1e-13, atol=1e-13)
    assert isinstance(own, torch.nn.ConvTranspose2d)


def test_constructor_as_torch():
    given = (4, 6, (3, 2), (2, 3), (1, 0), (1, 2), 2, False, (2, 1), "zeros", "cpu", f64)
    own, stock = ConvTranspose2d(*given), torch.nn.ConvTranspose2d(*given)
    assert own.extra_repr() == stock.extra_repr()
    assert own.bias is None and own.weight.dtype == f64
    assert own.act.name == "identity"
    own.load_state_dict(stock.state_dict())
    x = torch.randn(2, 4, 5, 6, dtype=f64)
    torch.testing.assert_close(own(x), stock(x), rtol=1e-13, atol=1e-13)
    assert ConvTranspose2d(1, 1, 1, act=torch.nn.SiLU()).extra_repr().endswith(", act='silu'")
    for seed in (0, 1):  # the same random start
        torch.manual_seed(seed)
        a = ConvTranspose2d(4, 6, 3)
        torch.manual_seed(seed)
        b = torch.nn.ConvTranspose2d(4, 6, 3)
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


def test_copies(backend):
    layer = ConvTranspose2d(4, 6, 2, 2, act=torch.nn.LeakyReLU(0.3), dtype=f64)
    x = torch.randn(2, 4, 5, 6, dtype=f64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, match=(11, 11)), layer(x, match=(11, 11)))
        other.weight.data.zero_()
        assert layer.weight.abs().sum() > 0
    double = {name: 2 * p.detach() for name, p in layer.named_parameters()}
    found = torch.func.functional_call(layer, double, (x,), {"match": (11, 12)})
    torch.testing.assert_close(found, 2 * layer(x, match=(11, 12)))


class Joined(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, feature):
        return torch.cat([self.layer(x, match=feature), feature], 1)


OPTIONS = [
    {"act": "relu"},
    {"act": "silu", "groups": 2, "padding": 1},
    {"bias": False},
    {"out_channels": 4, "act": "gelu", "groups": 4},  # depthwise
]


def layer_of(out_channels=8, **options):
    return ConvTranspose2d(4, out_channels, 2, 2, **options, dtype=f64)


def inputs(h, w, more_h, more_w, layout="contiguous"):
    x = in_layout(torch.randn(2, 4, h, w, dtype=f64), layout).requires_grad_()
    return x, in_layout(torch.randn(2, 3, 2 * h + more_h, 2 * w + more_w, dtype=f64), layout)


@pytest.mark.usefixtures("fresh_compile")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compile(options, layout):
    net = Joined(layer_of(**options))
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    for h, w in ((5, 6), (7, 9), (11, 13)):
        for more in ((0, 0), (1, 1), (-1, 3)):
            x, feature = inputs(h, w, *more, layout)
            leaves = (x, *net.parameters())
            found, expected = fast(x, feature), net(x, feature)
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()
            for a, b in zip(
                torch.autograd.grad(found.square().sum(), leaves),
                torch.autograd.grad(expected.square().sum(), leaves),
                strict=True,
            ):
                torch.testing.assert_close(a, b)
    assert counter.frame_count <= 3  # one for each way that the size is reached, not for each size


@pytest.mark.usefixtures("fresh_compile")
def test_compile_output_size():
    layer = ConvTranspose2d(4, 6, 3, 2, act="relu", dtype=f64)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for h, w in ((4, 5), (6, 7)):
        x = torch.randn(2, 4, h, w, dtype=f64)
        size = (2 * h + 2, 2 * w + 1)
        torch.testing.assert_close(fast(x, output_size=size), layer(x, output_size=size))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_export(options, grad):
    net = Joined(layer_of(**options)).eval()
    x, feature = inputs(5, 6, 1, 1)
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(net, (x, feature), dynamic_shapes=({0: rows}, {0: rows}))
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    overloads = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    assert overloads
    assert all(t.namespace == "aten" for t in overloads), overloads
    for n in (2, 5):
        x, feature = torch.randn(n, 4, 5, 6, dtype=f64), torch.randn(n, 3, 11, 13, dtype=f64)
        torch.testing.assert_close(program.module()(x, feature), net(x, feature))


def test_export_of_any_size():
    net = Joined(ConvTranspose2d(4, 8, 2, 2, act="relu", dtype=f64)).eval()
    x, feature = inputs(5, 6, 1, 1)
    h, w = torch.export.Dim("h", min=2, max=64), torch.export.Dim("w", min=2, max=64)
    program = torch.export.export(
        net, (x, feature), dynamic_shapes=({2: h, 3: w}, {2: 2 * h + 1, 3: 2 * w + 1})
    )
    for size in ((5, 6), (7, 9)):
        given = [t.detach() for t in inputs(*size, 1, 1)]
        torch.testing.assert_close(program.module()(*given), net(*given))
