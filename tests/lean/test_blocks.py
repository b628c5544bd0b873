"""``functional.basic_block``, ``bottleneck`` and ``conv_chain``: against stock torch, at every level."""

import pytest
import torch
import torch.nn.functional as F
from support.lean import LEVELS, counted
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops._lean import Kind, saving
from advdl_ops.functional import ConvNorm, basic_block, bottleneck, conv_chain

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LEANS = (None, *LEVELS)


def unit(inputs, outputs, size=3, dtype=f64, grad=True, **options):
    """A unit with all its tensors, and running statistics."""
    order = options.get("order", "conv-bn-act")
    normed = inputs if order == "bn-act-conv" else outputs
    groups = options.get("groups", 1)

    def new(*shape, low=-1.0, high=1.0):
        return torch.empty(shape, dtype=dtype).uniform_(low, high)

    made = ConvNorm(
        new(outputs, inputs // groups, size, size) / size,
        new(normed),
        new(normed, low=0.5, high=2.0),
        new(normed, low=0.3, high=1.5),
        new(normed),
        **{"padding": size // 2, "eps": 1e-3, "momentum": 0.3, **options},
    )
    leaves = [t.requires_grad_() for t in (made.weight, made.bn_weight, made.bn_bias) if grad]
    if made.bias is not None and grad:
        made.bias.requires_grad_()
        leaves.append(made.bias)
    return made, leaves


def fresh(units):
    """The same units with their own running statistics."""
    return [
        u if u is None or u.running_mean is None
        else u._replace(running_mean=u.running_mean.clone(), running_var=u.running_var.clone())
        for u in units
    ]  # fmt: skip


# ---- the same in stock torch ----


ACTS = {"relu": F.relu, "silu": F.silu, "leaky_relu": F.leaky_relu, None: lambda x: x}


def stock_unit(x, u, residual, training):
    def norm(x):
        return F.batch_norm(
            x, u.running_mean, u.running_var, u.bn_weight, u.bn_bias, training, u.momentum, u.eps
        )

    def conv(x):
        return F.conv2d(x, u.weight, u.bias, u.stride, u.padding, u.dilation, u.groups)

    def plus(x):
        return x if residual is None else x + residual

    act = ACTS[u.act]
    if u.order == "bn-act-conv":
        return plus(conv(act(norm(x))))
    if u.order == "conv-act-bn":
        return plus(norm(act(conv(x))))
    return act(plus(norm(conv(x))))


def stock_chain(x, units, residual=None, *, training=False):
    x = x if isinstance(x, torch.Tensor) else torch.cat(x, 1)
    for u in units[:-1]:
        x = stock_unit(x, u, None, training)
    return stock_unit(x, units[-1], residual, training)


def stock_block(x, *units, training=False):
    *units, downsample = units
    shortcut = x
    if downsample is not None:
        shortcut = stock_unit(x, downsample._replace(act=None), None, training)
    return stock_chain(x, units, shortcut, training=training)


# ---- cases: a function, its peer, its units with their leaves ----


def of_basic_block(downsample):
    stride = 2 if downsample else 1
    made = [
        unit(4, 6 if downsample else 4, stride=stride),
        unit(6 if downsample else 4, 6 if downsample else 4),
    ]
    made.append(unit(4, 6, 1, stride=2) if downsample else (None, []))
    return basic_block, stock_block, made


def of_bottleneck(downsample):
    out = 8 if downsample else 4
    made = [unit(4, 3, 1), unit(3, 3, 3, groups=3, dilation=2, padding=2), unit(3, out, 1)]
    made.append(unit(4, 8, 1) if downsample else (None, []))
    return bottleneck, stock_block, made


def of_chain(order, act, bias=False, several=False):
    def own(outputs):
        return {"bias": torch.randn(outputs, dtype=f64)} if bias else {}

    made = [
        unit(8 if several else 4, 6, 1, order=order, act=act, **own(6)),
        unit(6, 6, 3, order=order, act=act, **own(6)),
        unit(6, 4, 1, order=order, act=act, **own(4)),
    ]

    def ours(x, *units, **options):
        return conv_chain((x, 2 * x) if several else x, units, x, **options)

    def stock(x, *units, **options):
        return stock_chain((x, 2 * x) if several else x, units, x, **options)

    return ours, stock, made


CASES = {
    "basic block": lambda: of_basic_block(False),
    "basic block, downsampled": lambda: of_basic_block(True),
    "bottleneck": lambda: of_bottleneck(False),
    "bottleneck, downsampled": lambda: of_bottleneck(True),
    "chain": lambda: of_chain("conv-bn-act", "relu"),
    "chain with bias": lambda: of_chain("conv-bn-act", "silu", bias=True),
    "chain, pre-activation": lambda: of_chain("bn-act-conv", "relu"),
    "chain, activation first": lambda: of_chain("conv-act-bn", "leaky_relu", bias=True),
    "chain of several images": lambda: of_chain("bn-act-conv", "relu", several=True),
    "chain without activations": lambda: of_chain("conv-bn-act", None),
}


def case(name):
    ours, stock, made = CASES[name]()
    return ours, stock, [u for u, _ in made], [leaf for _, leaves in made for leaf in leaves]


def run(function, units, leaves, x, dtype=None, **options):
    """Output, gradients and running statistics."""
    x = x.detach().requires_grad_()
    units = fresh(units)
    out = function(x, *units, **options)
    dout = torch.linspace(-1, 2, out.numel(), dtype=f64).reshape(out.shape).to(out.dtype)
    found = [out.detach(), *torch.autograd.grad(out, [x, *leaves], dout)]
    return [*found, *[t for u in units if u is not None for t in (u.running_mean, u.running_var)]]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_values_of_stock(name, layout, training):
    """fp64; and from level to level to the last bit."""
    ours, stock, units, leaves = case(name)
    for shape in ((2, 4, 7, 5), (3, 4, 1, 2), (1, 4, 8, 8)):
        x = torch.randn(shape, dtype=f64).contiguous(memory_format=layout)
        expected = run(stock, units, leaves, x, training=training)
        plain = run(ours, units, leaves, x, training=training, lean=None)
        for a, b in zip(plain, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
        for lean in LEVELS:
            found = run(ours, units, leaves, x, training=training, lean=lean)
            assert all(a.equal(b) for a, b in zip(found, plain, strict=True)), (shape, lean)


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("name", CASES)
def test_bits_in_other_dtypes(name, dtype):
    ours, _, units, _ = case(name)
    units = [
        u and ConvNorm(*[t.detach().to(dtype) if isinstance(t, torch.Tensor) else t for t in u])
        for u in units
    ]
    leaves = [t.requires_grad_() for u in units if u for t in (u.weight, u.bn_weight, u.bn_bias)]
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        x = torch.randn(2, 4, 9, 8).to(dtype).contiguous(memory_format=layout)
        plain = run(ours, units, leaves, x, training=True, lean=None)
        for lean in LEVELS:
            found = run(ours, units, leaves, x, training=True, lean=lean)
            assert all(a.equal(b) for a, b in zip(found, plain, strict=True)), lean


@pytest.mark.parametrize("lean", LEANS)
@pytest.mark.parametrize(
    "name", ["basic block, downsampled", "bottleneck", "chain of several images"]
)
def test_gradients(name, lean):
    """Smooth activations, so that no difference crosses a kink."""
    ours, _, units, leaves = case(name)
    units = [u and u._replace(act="silu", running_mean=None, running_var=None) for u in units]
    x = torch.randn(2, 4, 4, 4, dtype=f64, requires_grad=True)

    def call(x, *_):
        return ours(x, *units, training=True, lean=lean)

    assert gradcheck(call, (x, *leaves), fast_mode=True)
    assert gradgradcheck(call, (x, *leaves), fast_mode=True)


def test_what_each_level_makes_again():
    ours, _, units, leaves = case("bottleneck, downsampled")
    x = torch.randn(2, 4, 6, 6, dtype=f64)
    found = {}
    for lean in LEANS:
        with counted() as kinds:
            run(ours, units, leaves, x, training=True, lean=lean)
        found[lean] = set(kinds)
    assert not found[None]
    assert found["block"] == {Kind.PASS}
    assert found["stage"] == {Kind.PASS, Kind.SUM}
    assert found["deep"] == {Kind.PASS, Kind.PRODUCT}
    assert found["deepest"] >= {Kind.PASS, Kind.SUM}


def test_the_default_level():
    """``"block"``, as documented."""
    ours, _, units, leaves = case("bottleneck")
    with counted() as kinds:
        run(ours, units, leaves, torch.randn(2, 4, 6, 6, dtype=f64), training=True)
    assert set(kinds) == {Kind.PASS}


@pytest.mark.parametrize("outer", LEVELS)
@pytest.mark.parametrize("inner", LEANS)
def test_the_level_of_a_model_holds(outer, inner):
    """Inside of a lean model, a function's own ``lean`` is not asked."""
    ours, _, units, leaves = case("basic block")
    x = torch.randn(2, 4, 6, 6, dtype=f64)
    kinds = []
    for own in (outer, inner):
        with counted() as found, saving(outer):
            run(ours, units, leaves, x, training=True, lean=own)
        kinds.append(found)
    assert kinds[0] == kinds[1] != []


def test_without_norm_weights_and_statistics():
    x = torch.randn(2, 4, 6, 6, dtype=f64)
    weights = [torch.randn(4, 4, 3, 3, dtype=f64, requires_grad=True) for _ in range(2)]
    units = [ConvNorm(weight, None, None, padding=1) for weight in weights]
    expected = torch.autograd.grad(stock_block(x, *units, None, training=True).sin().sum(), weights)
    for lean in LEANS:
        out = basic_block(x, *units, training=True, lean=lean)
        found = torch.autograd.grad(out.sin().sum(), weights)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_without_gradients():
    """Nothing is saved or made again, also in evaluation, where the norms are folded."""
    ours, stock, units, _ = case("bottleneck, downsampled")
    x = torch.randn(2, 4, 6, 6, dtype=f64)
    for training in (True, False):
        expected = stock(x, *fresh(units), training=training)
        with torch.no_grad(), counted() as kinds:
            out = ours(x, *fresh(units), training=training, lean="deepest")
        torch.testing.assert_close(out, expected.detach(), rtol=1e-9, atol=1e-10)
        assert not kinds


@pytest.mark.slow
def test_compiled(fresh_compile):
    ours, _, units, leaves = case("bottleneck, downsampled")
    x = torch.randn(2, 4, 6, 6, dtype=f64)

    def call(x, *units):
        return ours(x, *units, training=True, lean="deepest")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, units, leaves, x), run(call, units, leaves, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# ---- errors ----


def test_errors_name_the_function_and_the_value():
    (first, _), (second, _), (third, _) = unit(4, 4), unit(4, 4), unit(4, 4)
    x = torch.randn(2, 4, 5, 5, dtype=f64)
    calls = {
        "basic_block": lambda *changed, **options: basic_block(x, first, *changed, **options),
        "bottleneck": lambda *changed, **options: bottleneck(x, first, third, *changed, **options),
        "conv_chain": lambda *changed, **options: conv_chain(x, [first, *changed], **options),
    }
    for function, call in calls.items():
        for lean in ("blocks", "", 3):
            with pytest.raises(
                ValueError,
                match=rf"^{function}: lean \({lean!r}\) must be None or one of block, stage",
            ):
                call(second, lean=lean)
        with pytest.raises(
            ValueError, match=rf"^{function}: order \('act-bn'\) must be one of conv-bn-act, "
        ):
            call(second._replace(order="act-bn"))
    with pytest.raises(ValueError, match=r"^conv_chain: units must have one at least$"):
        conv_chain(x, [])


@pytest.mark.parametrize("lean", LEANS)
def test_refused_arguments_leave_the_next_call_right(lean):
    """A residual or an image that does not fit, inside of the level."""
    (first, leaves), (second, _) = unit(4, 4), unit(4, 4)
    x = torch.randn(2, 4, 5, 5, dtype=f64)
    expected = run(basic_block, [first, second], leaves, x, training=True, lean=lean)
    for call in (
        lambda: conv_chain(x, [first, second], x[:1], training=True, lean=lean),
        lambda: basic_block(x, first, unit(4, 5)[0], training=True, lean=lean),
        lambda: basic_block(x[:, :3], first, second, training=True, lean=lean),
        lambda: basic_block(x, *fresh([first]), second._replace(act="nothing"), lean=lean),
    ):
        state = fresh([first, second])
        with pytest.raises((ValueError, RuntimeError)):
            call()
        for u, kept in zip((first, second), state, strict=True):
            u.running_mean.copy_(kept.running_mean), u.running_var.copy_(kept.running_var)
    found = run(basic_block, [first, second], leaves, x, training=True, lean=lean)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lean", LEANS)
def test_a_residual_that_is_written_never_gives_wrong_gradients(lean):
    """Stock does not need it. A level that makes the sum again does, and then says so."""
    (first, leaves), _ = unit(4, 4), unit(4, 4)
    x, residual = (torch.randn(2, 4, 5, 5, dtype=f64) for _ in range(2))
    found = []
    for is_written in (False, True):
        r = residual.clone().requires_grad_() * 1
        out = conv_chain(x, fresh([first]), r, training=True, lean=lean)
        if is_written:
            r.detach().add_(1)
        if is_written and lean in ("stage", "deepest"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out.square().sum(), leaves)
            return
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
