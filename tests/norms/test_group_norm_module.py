"""GroupNorm, LayerNorm2d and InstanceNorm beside torch.nn's: constructors, modes, state, copies."""

import copy
import inspect
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import ACTIVATIONS, ULPS, channels_last, error, in_layout, largest
from support.checks import check_functional_call, copies_of

from advdl_ops import nn

OWN = {
    "group": (nn.GroupNorm, torch.nn.GroupNorm, (2, 6)),
    "layer": (nn.LayerNorm2d, torch.nn.LayerNorm, (6,)),
    "instance1d": (nn.InstanceNorm1d, torch.nn.InstanceNorm1d, (6,)),
    "instance2d": (nn.InstanceNorm2d, torch.nn.InstanceNorm2d, (6,)),
    "instance3d": (nn.InstanceNorm3d, torch.nn.InstanceNorm3d, (6,)),
}
INSTANCE = {1: "instance1d", 2: "instance2d", 3: "instance3d"}
KINDS = pytest.mark.parametrize("kind", OWN)
OPTIONS = {
    "group": [{}, {"eps": 1e-3}, {"affine": False}],
    "layer": [{}, {"eps": 1e-3}, {"bias": False}, {"elementwise_affine": False}],
}
INSTANCE_OPTIONS = [
    {},
    {"affine": True, "eps": 1e-3},
    {"track_running_stats": True},
    {"affine": True, "track_running_stats": True, "momentum": 0.3},
    {"track_running_stats": True, "momentum": None},
    {"track_running_stats": True, "momentum": 0.0},
]


CASES = [
    pytest.param(kind, options, id=f"{kind}-{options}")
    for kind in OWN
    for options in OPTIONS.get(kind, INSTANCE_OPTIONS)
]


def shape_of(kind, n=3):
    return (n, 6, *(4, 5, 3)[: {"instance1d": 1, "instance3d": 3}.get(kind, 2)])


def pair(kind, dtype=torch.float32, **options):
    """Ours and stock's, the same random weights."""
    own_class, stock_class, arguments = OWN[kind]
    act = {"act": options.pop("act")} if "act" in options else {}
    own = own_class(*arguments, **options, **act, dtype=dtype)
    stock = stock_class(*arguments, **options, dtype=dtype)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.uniform_(0.5, 1.5)
    stock.load_state_dict(own.state_dict())
    return own, stock


def run_stock(stock, x):
    if isinstance(stock, torch.nn.LayerNorm):
        return stock(x.movedim(1, -1)).movedim(-1, 1)
    return stock(x)


def assert_alike(found, stock, exact, what=""):
    assert found.dtype == stock.dtype, what
    eps = torch.finfo(found.dtype).eps
    # The inputs are O(1) with a mean below 10: so are the terms.
    limit = error(stock, exact) + ULPS * eps * max(10.0, largest(exact))
    assert error(found, exact, what) <= limit, what


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_steps_then_eval(backend, layout, kind, options):
    own, stock = pair(kind, **options)
    exact = copy.deepcopy(stock).double()
    for step in range(5):
        if step == 4:
            own.eval(), stock.eval(), exact.eval()
            before = copy.deepcopy(own.state_dict())
        x = in_layout(torch.randn(shape_of(kind)) * (step + 1) + step, layout)
        truth = run_stock(exact, x.double()).detach()
        assert_alike(own(x).detach(), run_stock(stock, x).detach(), truth, step)
        for name, buffer in own.named_buffers():
            of_stock, of_exact = stock.get_buffer(name), exact.get_buffer(name)
            if name == "num_batches_tracked":
                assert buffer.item() == of_stock.item()
            else:
                assert_alike(buffer, of_stock, of_exact, (name, step))
    for name, t in own.state_dict().items():
        assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_modules_and_inputs(backend, dtype):
    for kind, module_dtype in itertools.product(OWN, (torch.float32, dtype)):
        options = {"affine": True, "track_running_stats": True} if "instance" in kind else {}
        own, stock = pair(kind, module_dtype, **options)
        exact = copy.deepcopy(stock).double()
        for _ in range(3):
            x = torch.randn(shape_of(kind)).to(dtype) + 2
            found, plain = own(x).detach(), run_stock(stock, x).detach()
            assert_alike(found, plain, run_stock(exact, x.double()).detach(), kind)
            for name, buffer in own.named_buffers():
                if name != "num_batches_tracked":
                    assert_alike(buffer, stock.get_buffer(name), exact.get_buffer(name), name)


def test_momentum_changed_between_steps():
    own, stock = pair("instance2d", track_running_stats=True)
    for momentum in (0.1, None, 0.5):
        own.momentum = stock.momentum = momentum
        x = torch.randn(3, 6, 4, 5)
        own(x), stock(x)
        torch.testing.assert_close(own.state_dict(), stock.state_dict())


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_and_residual(backend, act):
    for kind in OWN:
        own, stock = pair(kind, torch.float64, act=ACTIVATIONS[act][0])
        x, residual = torch.randn(2, *shape_of(kind), dtype=torch.float64)
        expected = run_stock(stock, x)
        torch.testing.assert_close(own(x), ACTIVATIONS[act][1](expected))
        torch.testing.assert_close(own(x, residual), ACTIVATIONS[act][1](expected + residual))


def test_empty_batch_leaves_statistics(backend):
    own, _ = pair("instance2d", track_running_stats=True)
    own(torch.randn(3, 6, 4, 5))
    before = copy.deepcopy(own.state_dict())
    for mode in (True, False):
        own.train(mode)
        assert own(torch.randn(0, 6, 4, 5)).shape == (0, 6, 4, 5)
        for name, t in own.state_dict().items():
            assert torch.equal(t, before[name]), name


@pytest.mark.parametrize("dims", INSTANCE)
def test_unbatched_instance_norm(backend, dims):
    kind = INSTANCE[dims]
    own, stock = pair(kind, affine=True, track_running_stats=True)
    shape = shape_of(kind)[1:]
    for mode in (True, False):
        own.train(mode), stock.train(mode)
        x, residual = torch.randn(2, *shape)
        torch.testing.assert_close(own(x), stock(x))
        torch.testing.assert_close(own.state_dict(), stock.state_dict())
        torch.testing.assert_close(own(x, residual), own(x[None], residual[None])[0])
        stock.load_state_dict(own.state_dict())


@pytest.mark.parametrize("dims", INSTANCE)
def test_ranks_that_instance_norm_refuses(dims):
    own, stock = pair(INSTANCE[dims])
    for rank in range(1, 7):
        x = torch.randn([6] * rank)
        if rank in (dims + 1, dims + 2):
            own(x)
            continue
        with pytest.raises(ValueError, match="expected") as by_torch:
            stock(x)
        with pytest.raises(ValueError, match="expected") as caught:
            own(x)
        assert str(caught.value) == str(by_torch.value)


def test_other_numbers_of_channels():
    # Without affine torch warns: num_features is not used then.
    own, stock = pair("instance2d")
    x = torch.randn(3, 5, 4, 4)
    with pytest.warns(UserWarning, match="num_features"):
        expected = stock(x)
    with pytest.warns(UserWarning, match=r"InstanceNorm2d: .*num_features \(6\)"):
        found = own(x)
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own(torch.randn(3, 6, 4, 4))
    for options in ({"affine": True}, {"affine": True, "track_running_stats": True}):
        own, stock = pair("instance2d", **options)
        for shape in ((3, 5, 4, 4), (5, 4, 4)):
            with pytest.raises(ValueError, match=r"num_features|channels"):
                stock(torch.randn(shape))
            with pytest.raises(ValueError, match=r"InstanceNorm2d: x \(shape .*\) must have 6 ch"):
                own(torch.randn(shape))
    for kind in ("group", "layer"):
        own, stock = pair(kind)
        with pytest.raises(RuntimeError):
            run_stock(stock, x)
        with pytest.raises(RuntimeError, match=r"(group_norm|LayerNorm2d): .* must"):
            own(x)


@KINDS
def test_is_torchs_module_with_its_constructor(kind):
    own_class, stock_class, arguments = OWN[kind]
    assert isinstance(own_class(*arguments), stock_class)

    def positional(cls):
        return {
            name: p.default
            for name, p in inspect.signature(cls.__init__).parameters.items()
            if p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
        }

    def named(cls):
        found = dict(inspect.signature(cls.__init__).parameters)
        del found["self"]
        return found

    assert positional(own_class) == positional(stock_class)
    assert list(positional(own_class)) == list(positional(stock_class))
    for name, parameter in named(stock_class).items():
        assert named(own_class)[name].default == parameter.default, name
    assert named(own_class)["act"].kind is inspect.Parameter.KEYWORD_ONLY
    own, stock = own_class(*arguments), stock_class(*arguments)
    for name in ("eps", "affine", "momentum", "track_running_stats", "normalized_shape"):
        assert getattr(own, name, None) == getattr(stock, name, None)
    given = {"eps": 1e-3, "device": "meta", "dtype": torch.float64}
    own = own_class(*arguments, **given)
    assert own.eps == 1e-3
    for parameter in own.parameters():
        assert parameter.is_meta
        assert parameter.dtype == torch.float64


@KINDS
def test_repr(kind):
    own_class, stock_class, arguments = OWN[kind]
    plain, stock = own_class(*arguments), stock_class(*arguments)
    assert plain.extra_repr() == stock.extra_repr()
    assert "act='relu'" in repr(own_class(*arguments, act="relu"))


@KINDS
def test_without_bias(kind):
    """An argument of torch's own from 2.13 on, and here under the older torch too."""
    own_class, stock_class, arguments = OWN[kind]
    options = {"affine": True} if "instance" in kind else {}
    own = own_class(*arguments, bias=False, **options)
    assert own.bias is None
    assert list(own.state_dict()) == ["weight"]
    with torch.no_grad():
        own.weight.uniform_(0.5, 1.5)
    x = torch.randn(shape_of(kind))
    stock = stock_class(*arguments, **options)
    stock.load_state_dict({"weight": own.weight, "bias": torch.zeros(6)})
    torch.testing.assert_close(own(x), run_stock(stock, x))
    own(x).sum().backward()
    assert own.weight.grad is not None
    if "bias" in inspect.signature(stock_class.__init__).parameters:
        stock = stock_class(*arguments, bias=False, **options)
        stock.load_state_dict(own.state_dict(), strict=True)
        torch.testing.assert_close(own(x), run_stock(stock, x))


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_state_dict_both_ways(kind, options):
    own, stock = pair(kind, act="relu", **options)
    assert list(own.state_dict()) == list(stock.state_dict())
    assert own.state_dict()._metadata == stock.state_dict()._metadata
    for source, target in ((own, stock), (stock, own)):
        with torch.no_grad():
            for t in source.state_dict().values():
                t.copy_(torch.rand(t.shape) * 9)
        target.load_state_dict(source.state_dict(), strict=True)
        for name, t in source.state_dict().items():
            assert torch.equal(t, target.state_dict()[name]), name


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@KINDS
def test_copies(kind, how):
    options = {"affine": True, "track_running_stats": True} if "instance" in kind else {}
    own, _ = pair(kind, act=torch.nn.LeakyReLU(0.2), **options)
    x = torch.randn(shape_of(kind))
    own(x)
    other = copies_of(own)[how]
    assert torch.equal(other(x), own(x))
    if options:
        assert torch.equal(other.running_var, own.running_var)
        other(x)
        assert not torch.equal(other.running_var, own.running_var)


@KINDS
def test_functional_call(kind):
    options = {"affine": True, "track_running_stats": True} if "instance" in kind else {}
    own, other = pair(kind, act="relu", **options)[0], pair(kind, act="relu", **options)[0]
    x = torch.randn(shape_of(kind))
    check_functional_call(own, other, x)


@KINDS
def test_parametrized_weight(kind):
    class Doubled(torch.nn.Module):
        def forward(self, w):
            return 2 * w

    options = {"affine": True} if "instance" in kind else {}
    own, stock = pair(kind, **options)
    x = torch.randn(shape_of(kind))
    for module in (own, stock):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
        torch.nn.utils.parametrize.register_parametrization(module, "bias", Doubled())
    torch.testing.assert_close(own(x), run_stock(stock, x))
    own(x).square().sum().backward()
    run_stock(stock, x).square().sum().backward()
    for name in ("weight", "bias"):
        found, expected = (m.parametrizations[name].original.grad for m in (own, stock))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layer_norm_2d_takes_one_dimension():
    for size in (6, (6,), [6], torch.Size([6])):
        assert nn.LayerNorm2d(size).normalized_shape == (6,)
    with pytest.raises(ValueError, match=r"LayerNorm2d: normalized_shape \(\(6, 4\)\) must be"):
        nn.LayerNorm2d((6, 4))


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="divisible"):
        nn.GroupNorm(4, 6)


def test_autocast_gives_the_dtypes_of_stock():
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    for kind, x_dtype, residual_dtype in itertools.product(OWN, kinds, (None, *kinds)):
        own, stock = pair(kind, **({"affine": True} if "instance" in kind else {}))
        x = torch.randn(shape_of(kind)).to(x_dtype).requires_grad_()
        residual = None
        if residual_dtype is not None:
            residual = torch.randn(x.shape).to(residual_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = own(x, residual), run_stock(stock, x)
            expected = expected if residual is None else expected + residual
        assert found.dtype == expected.dtype, (kind, x_dtype, residual_dtype)
        found.float().sum().backward()
        assert x.grad.dtype == x_dtype


def test_mixed_precision_training_step():
    """Convolution and norm under autocast, fp32 parameters: gradients of fp32."""
    conv = torch.nn.Conv2d(3, 6, 3)
    for norm in (
        nn.GroupNorm(2, 6, act="relu"),
        nn.LayerNorm2d(6),
        nn.InstanceNorm2d(6, affine=True),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(channels_last(torch.randn(2, 3, 8, 8)))
            out = norm(y)
        assert y.dtype == torch.bfloat16
        out.float().square().mean().backward()
        for parameter in (*conv.parameters(), *norm.parameters()):
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@KINDS
def test_parameters_train_alone(kind):
    own, _ = pair(kind, act="relu", **({"affine": True} if "instance" in kind else {}))
    own.bias.requires_grad_(False)
    own(torch.randn(shape_of(kind))).sum().backward()
    assert own.weight.grad is not None
    assert own.bias.grad is None


@KINDS
def test_gradient_checkpointing_and_inference_mode(kind):
    own, _ = pair(kind, torch.float64, act="relu")
    x = torch.randn(shape_of(kind), dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(own(x).square().sum(), x)
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(own, x, use_reentrant=False).square().sum(), x
    )
    assert torch.equal(plain[0], again[0])
    with torch.inference_mode():
        inside = own(x)
    assert torch.equal(inside, own(x))


def test_one_training_step_moves_as_stock_does():
    for kind in OWN:
        own, stock = pair(kind, torch.float64, **({"affine": True} if "instance" in kind else {}))
        x = torch.randn(shape_of(kind), dtype=torch.float64)
        for module in (own, stock):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            F.silu(run_stock(module, x) if module is stock else module(x)).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(own.state_dict(), stock.state_dict())


@pytest.mark.parametrize("shape", [(2, 8, 0, 6), (2, 8, 0)])
@pytest.mark.parametrize(
    "make",
    [
        lambda owner, shape: owner.GroupNorm(2, 8),
        lambda owner, shape: getattr(owner, f"InstanceNorm{len(shape) - 2}d")(
            8, affine=True, track_running_stats=True
        ),
    ],
    ids=["group", "instance"],
)
def test_an_empty_image_gives_an_empty_result(make, shape, backend):
    stock, layer = make(torch.nn, shape), make(nn, shape)
    x = torch.randn(shape, requires_grad=True)
    for training in (True, False):
        expected, found = stock.train(training)(x), layer.train(training)(x)
        assert found.shape == expected.shape and found.dtype == expected.dtype
        found.sum().backward()
        # Sums over nothing, where stock's group norm has NaN.
        assert (layer.weight.grad == 0).all() and (layer.bias.grad == 0).all()
    for own, other in zip(layer.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(own, other)
