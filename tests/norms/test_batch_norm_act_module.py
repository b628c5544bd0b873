"""BatchNormAct2d beside torch.nn.BatchNorm2d: running statistics, modes, state, copies."""

import copy
import itertools

import pytest
import torch
import torch.utils.checkpoint
from support.accuracy import ACTIVATIONS, ULPS, error, in_layout, largest
from support.checks import check_functional_call, copies_of

from advdl_ops.nn import BatchNormAct2d

OPTIONS = [
    {},
    {"momentum": 0.3, "eps": 1e-3},
    {"momentum": None},
    {"momentum": 0.0},
    {"track_running_stats": False},
    {"affine": False},
    {"affine": False, "track_running_stats": False},
    {"affine": False, "momentum": None},
]


def option_id(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def trio(dtype=torch.float32, **options):
    """Ours, stock's, and stock's in fp64: the same weights."""
    own = BatchNormAct2d(5, **options, dtype=dtype)
    stock = torch.nn.BatchNorm2d(5, **options, dtype=dtype)
    if own.affine:
        with torch.no_grad():
            own.weight.uniform_(0.5, 1.5)
            own.bias.uniform_(-1, 1)
    stock.load_state_dict(own.state_dict())
    exact = copy.deepcopy(stock).double()
    return own, stock, exact


def assert_alike(found, stock, exact, what=""):
    eps = torch.finfo(found.dtype).eps
    # The inputs are O(1) with a mean below 10: so are the terms.
    limit = error(stock, exact) + ULPS * eps * max(10.0, largest(exact))
    assert error(found, exact) <= limit, what


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_steps_then_eval(backend, layout, options):
    own, stock, exact = modules = trio(**options)
    for step in range(4):
        x = in_layout(torch.randn(3, 5, 4, 6) * (step + 1) + step, layout)
        results = [m(x.to(m.weight.dtype if m.affine else t)) for m, t in zip(
            modules, (torch.float32, torch.float32, torch.float64), strict=True
        )]  # fmt: skip
        assert_alike(*(t.detach() for t in results), what=step)
        for buffers in zip(*(m.named_buffers() for m in modules), strict=True):
            (name, found), (_, plain), (_, truth) = buffers
            if name == "num_batches_tracked":
                assert found.dtype == torch.int64
                assert found.item() == plain.item() == (step + 1)
            else:
                assert_alike(found, plain, truth, (name, step))
    for m in modules:
        m.eval()
    x = torch.randn(3, 5, 4, 6)
    before = copy.deepcopy(own.state_dict())
    results = [own(x), stock(x), exact(x.double())]
    assert_alike(*(t.detach() for t in results), what="eval")
    for name, t in own.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_momentum_changed_between_steps():
    own, stock, _ = trio()
    for momentum in (0.1, None, 0.5):
        own.momentum = stock.momentum = momentum
        x = torch.randn(3, 5, 4, 6)
        own(x), stock(x)
        torch.testing.assert_close(own.state_dict(), stock.state_dict())


def test_statistics_switched_off_after_construction():
    for settings in ({"running_mean": None, "running_var": None}, {"track_running_stats": False}):
        own, stock, _ = trio()
        for name, value in settings.items():
            setattr(own, name, value), setattr(stock, name, value)
        for mode in (True, False):
            own.train(mode), stock.train(mode)
            x = torch.randn(3, 5, 4, 6)
            torch.testing.assert_close(own(x), stock(x))
            torch.testing.assert_close(own.state_dict(), stock.state_dict())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)])
def test_empty_batches_leave_statistics(backend, shape, momentum):
    own, stock, _ = trio(momentum=momentum)
    first = torch.randn(3, 5, 4, 4)
    own(first), stock(first)
    for mode in (True, False):
        own.train(mode), stock.train(mode)
        out = own(torch.randn(shape))
        assert out.shape == stock(torch.randn(shape)).shape
        torch.testing.assert_close(own.state_dict(), stock.state_dict())
        assert own.running_mean.isfinite().all()


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation_and_residual(backend, act):
    own, stock = trio(torch.float64)[:2]
    own.act = BatchNormAct2d(5, act=ACTIVATIONS[act][0]).act
    x, residual = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    for mode in (True, False):
        own.train(mode), stock.train(mode)
        torch.testing.assert_close(own(x), ACTIVATIONS[act][1](stock(x)))
        torch.testing.assert_close(own(x, residual), ACTIVATIONS[act][1](stock(x) + residual))


@pytest.mark.parametrize("module_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input(backend, x_dtype, module_dtype):
    if module_dtype not in (torch.float32, x_dtype):
        pytest.skip("stock refuses two half types, and so does the op")
    own, stock, exact = trio(module_dtype)
    x = torch.randn(3, 5, 4, 6).to(x_dtype)
    results = [own(x), stock(x), exact(x.double())]
    assert results[0].dtype == x_dtype
    assert_alike(*(t.detach() for t in results))
    for name in ("running_mean", "running_var"):
        assert_alike(getattr(own, name), getattr(stock, name), getattr(exact, name), name)


def test_is_a_batch_norm_with_its_constructor():
    own = BatchNormAct2d(7, 1e-3, 0.2, False, True, torch.device("cpu"), torch.float64)
    assert isinstance(own, torch.nn.BatchNorm2d)
    assert (own.eps, own.momentum, own.affine, own.track_running_stats) == (1e-3, 0.2, False, True)
    assert own.running_mean.dtype == torch.float64
    defaults, stock = BatchNormAct2d(7), torch.nn.BatchNorm2d(7)
    for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
        assert getattr(defaults, name) == getattr(stock, name)
    with pytest.raises(TypeError):
        BatchNormAct2d(7, 1e-5, 0.1, True, True, None, None, "relu")
    assert "act='relu'" in repr(BatchNormAct2d(7, act="relu"))
    assert "act" not in repr(BatchNormAct2d(7))


@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_state_dict_both_ways(options):
    own, stock = BatchNormAct2d(5, act="relu", **options), torch.nn.BatchNorm2d(5, **options)
    assert list(own.state_dict()) == list(stock.state_dict())
    for source, target in ((own, stock), (stock, own)):
        for _ in range(2):
            source(torch.randn(3, 5, 4, 4))
        target.load_state_dict(source.state_dict(), strict=True)
        for name, t in source.state_dict().items():
            assert torch.equal(t, target.state_dict()[name]), name


def test_state_dict_without_the_counter_of_old_versions():
    state = torch.nn.BatchNorm2d(5).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1
    own = BatchNormAct2d(5)
    own.load_state_dict(state, strict=True)
    assert own.num_batches_tracked.item() == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how):
    own = BatchNormAct2d(5, momentum=None, act=torch.nn.LeakyReLU(0.2))
    own(torch.randn(3, 5, 4, 4))
    other = copies_of(own)[how]
    x = torch.randn(3, 5, 4, 4)
    assert torch.equal(other(x), own(x))
    assert torch.equal(other.running_var, own.running_var)
    other(x)
    assert not torch.equal(other.running_var, own.running_var)


def test_functional_call():
    own, other = BatchNormAct2d(5, act="relu"), BatchNormAct2d(5, act="relu")
    with torch.no_grad():
        other.weight.uniform_(0.5, 1.5)
        other.running_mean.uniform_(-1, 1)
    x = torch.randn(3, 5, 4, 4)
    check_functional_call(own, other, x)


def test_autocast_gives_the_dtypes_of_stock():
    own, stock = BatchNormAct2d(5), torch.nn.BatchNorm2d(5)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    for x_dtype, mode, residual_dtype in itertools.product(kinds, (True, False), (None, *kinds)):
        own.train(mode), stock.train(mode)
        x = torch.randn(3, 5, 4, 4).to(x_dtype).requires_grad_()
        residual = None
        if residual_dtype is not None:
            residual = torch.randn(3, 5, 4, 4).to(residual_dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = own(x, residual)
            expected = stock(x)
            expected = expected if residual is None else expected + residual
        assert found.dtype == expected.dtype, (x_dtype, mode, residual_dtype)
        found.float().sum().backward()
        assert x.grad.dtype == x_dtype


def test_parameters_train_alone():
    own = BatchNormAct2d(5, act="relu")
    own.bias.requires_grad_(False)
    own(torch.randn(3, 5, 4, 4)).sum().backward()
    assert own.weight.grad is not None
    assert own.bias.grad is None


def test_gradient_checkpointing_and_inference_mode():
    own = BatchNormAct2d(5, act="relu").double()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(own(x).square().sum(), x)
    again = torch.autograd.grad(
        torch.utils.checkpoint.checkpoint(own, x, use_reentrant=False).square().sum(), x
    )
    assert torch.equal(plain[0], again[0])
    own.eval()
    with torch.inference_mode():
        inside = own(x)
    assert torch.equal(inside, own(x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_counter_under_checkpointing(reentrant):
    """A checkpoint runs the forward twice, and torch counts both."""
    counted = []
    for kind in (torch.nn.BatchNorm2d, BatchNormAct2d):
        layer = kind(4)
        x = torch.randn(2, 4, 3, 3, requires_grad=True)
        checkpoint = torch.utils.checkpoint.checkpoint
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        counted.append(int(layer.num_batches_tracked))
    assert counted[0] == counted[1] == 2


def test_a_refused_batch_is_not_counted():
    layer = BatchNormAct2d(4)
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(2, 5, 3, 3))
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_written_between_forward_and_backward(name):
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    for layer in (torch.nn.BatchNorm2d(4).eval(), BatchNormAct2d(4, act="relu").eval()):
        out = layer(x)
        getattr(layer, name).mul_(4)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
        layer(x).sum().backward()
