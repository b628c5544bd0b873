"""Every class that is replaced, on the samples with which PyTorch tests its own (``module_db``)."""

import copy
import unittest.mock
import warnings

import pytest
import torch
from support.checks import copies_of
from torch.utils._pytree import tree_leaves, tree_map_only

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = {
    torch.nn.Conv2d: nn.Conv2d,
    torch.nn.ConvTranspose2d: nn.ConvTranspose2d,
    torch.nn.BatchNorm2d: nn.BatchNormAct2d,
    torch.nn.GroupNorm: nn.GroupNorm,
    torch.nn.InstanceNorm1d: nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d: nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d: nn.InstanceNorm3d,
    torch.nn.LSTM: nn.LSTM,
    torch.nn.LSTMCell: nn.LSTMCell,
}
# What the samples lack: most of them are about one option.
MORE = {
    torch.nn.Conv2d: [
        ((4, 6, 3), {"stride": 2, "padding": 1, "bias": False}, (2, 4, 7, 6)),
        ((4, 8, 3), {"groups": 4, "padding": "same", "padding_mode": "circular"}, (2, 4, 7, 6)),
        ((4, 6, (3, 1)), {"dilation": (2, 1), "padding_mode": "reflect", "padding": 1}, (4, 7, 6)),
        ((4, 6, 3), {"padding": 1}, (0, 4, 7, 6)),
    ],
    torch.nn.ConvTranspose2d: [
        ((4, 6, 3), {"stride": 2, "output_padding": 1, "groups": 2}, (2, 4, 5, 3)),
        ((4, 6, (2, 3)), {"dilation": 2, "padding": 1, "bias": False}, (2, 4, 5, 3)),
    ],
    torch.nn.LSTM: [
        ((3, 4), {"num_layers": 2, "bidirectional": True}, (5, 2, 3)),
        ((3, 4), {"batch_first": True, "proj_size": 2}, (2, 5, 3)),
    ],
    torch.nn.LSTMCell: [((3, 4), {"bias": False}, (2, 3))],
}
HOWS = ("exchange", "optimize", "sequential")
each_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
each_how = pytest.mark.parametrize("how", HOWS)


@pytest.fixture(scope="module")
def infos():
    """PyTorch's description of each class. Its import must not change the process for other tests."""
    with (
        warnings.catch_warnings(),
        unittest.mock.patch.object(torch.backends, "disable_global_flags"),
    ):
        modules = pytest.importorskip(
            "torch.testing._internal.common_modules", reason="needs expecttest"
        )
    return {info.module_cls: info for info in modules.module_db if info.module_cls in CLASSES}


def samples(infos, kind, dtype, training=True):
    """For each sample: the arguments of the constructor, stock's layer with random parameters, and those of a call."""
    torch.manual_seed(0)
    made = infos[kind].module_inputs_func(
        infos[kind], device="cpu", dtype=dtype, requires_grad=True, training=training
    )
    calls = [(s.constructor_input, s.forward_input) for s in made]
    found = [((c.args, c.kwargs), f.args, f.kwargs) for c, f in calls]
    for args, options, shape in MORE.get(kind, ()):
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        found.append(((args, options), (x,), {}))
    assert len(found) >= 2
    for made_with, args, options in found:
        layer = kind(*made_with[0], **made_with[1]).to(dtype)
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(torch.randn_like(p), alpha=0.3)
        yield made_with, layer.train(training), args, options


def ours_of(how, layer, made_with):
    """The counterpart of stock's ``layer``, which remains as it is."""
    if how == "exchange":
        ours = CLASSES[type(layer)](*made_with[0], **made_with[1])
        ours.load_state_dict(layer.state_dict(), assign=True)
        return copy.deepcopy(ours).train(layer.training)
    layer = copy.deepcopy(layer)
    return advdl_ops.optimize(torch.nn.Sequential(layer) if how == "sequential" else layer)


def results(layer, args, options, change=lambda t: t):
    """Outputs, gradients of inputs and parameters, and buffers after a call of ``layer`` with changed inputs."""
    args, options = tree_map_only(
        torch.Tensor, lambda t: change(t.detach()).requires_grad_(), (args, options)
    )
    layer.zero_grad()
    outputs = tree_leaves(layer(*args, **options))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
    torch.autograd.backward(outputs, weights)
    inputs = [t.grad for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor)]
    gradients = [p.grad for p in layer.parameters()]
    return [*(t.detach() for t in outputs), *inputs, *gradients, *layer.buffers()]


# Of the largest element, in addition to stock's error. In fp64 that is not known, and up to 36 in these samples.
UNITS = {torch.float32: 32, torch.float64: 256, torch.bfloat16: 2, torch.float16: 2}


def check_same(found, expected, exact):
    """The error may be that of stock and some units in the last place of the largest element."""
    assert len(found) == len(expected)
    for ours, stock, e in zip(found, expected, exact, strict=True):
        if stock is None:
            assert ours is None
            continue
        assert ours.shape == stock.shape and ours.dtype == stock.dtype
        if stock.numel():
            units = UNITS.get(stock.dtype, 0)  # 0: num_batches_tracked
            eps = torch.finfo(stock.dtype).eps if units else 0
            allowed = (stock - e).abs().max() + units * eps * e.abs().max()
            assert (ours - e).abs().max() <= allowed


def channels_last(t):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats.get(t.dim(), torch.contiguous_format))


def check_values(infos, kind, how, dtype, training, change=lambda t: t, change_layer=lambda m: m):
    for made_with, layer, args, options in samples(infos, kind, dtype, training):
        if how == "sequential" and (len(args) != 1 or options):
            continue
        layer = change_layer(layer)
        fast = change_layer(ours_of(how, layer, made_with))
        doubled = copy.deepcopy(layer).double()
        exact = results(doubled, args, options, lambda t: change(t.double()))
        found, expected = (results(m, args, options, change) for m in (fast, layer))
        check_same(found, expected, exact)
        if change is channels_last:  # kept where stock drops it, as by instance norm
            continue
        for ours, stock in zip(found, expected, strict=True):
            assert stock is None or ours.is_contiguous() or not stock.is_contiguous()


@each_class
@each_how
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_values(infos, kind, how, dtype, training):
    check_values(infos, kind, how, dtype, training)


@pytest.mark.extra
@each_how
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(infos, how, dtype):
    assert dtype in infos[torch.nn.GroupNorm].supported_dtypes("cpu")
    check_values(infos, torch.nn.GroupNorm, how, dtype, training=True)


def every_second(t):
    """The same values, with something between them."""
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] if t.dim() else t


def noncontiguous(layer):
    for p in layer.parameters():
        p.data = every_second(p.data)
    return layer


@each_class
@each_how
@pytest.mark.parametrize("of", ["inputs", pytest.param("both", marks=pytest.mark.extra)])
def test_noncontiguous_tensors(infos, kind, how, of):
    change_layer = noncontiguous if of == "both" else lambda m: m
    check_values(infos, kind, how, torch.float32, True, every_second, change_layer)


def channels_last_layer(layer):
    for p in layer.parameters():
        p.data = channels_last(p.data)
    return layer


@each_class
@each_how
@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.extra)], ids=["training", "evaluation"]
)
@pytest.mark.parametrize("of", ["both", pytest.param("inputs", marks=pytest.mark.extra)])
def test_memory_formats(infos, kind, how, training, of):
    change_layer = channels_last_layer if of == "both" else lambda m: m
    check_values(infos, kind, how, torch.float32, training, channels_last, change_layer)


@each_class
@each_how
def test_copies(infos, kind, how):
    for made_with, layer, args, options in samples(infos, kind, torch.float32, training=False):
        if how == "sequential" and (len(args) != 1 or options):
            continue
        fast = ours_of(how, layer, made_with)
        expected = tree_leaves(fast(*args, **options))
        for name, made in copies_of(fast).items():
            found = tree_leaves(made(*args, **options))
            assert all(map(torch.equal, found, expected)), name
            assert repr(made) == repr(fast), name


@each_class
def test_repr(infos, kind):
    for made_with, layer, *_ in samples(infos, kind, torch.float32):
        stock = repr(layer).partition("(")[2]
        for how in ("exchange", "optimize"):
            assert repr(ours_of(how, layer, made_with)).partition("(")[2].startswith(stock[:-1])


@each_class
def test_device_and_dtype(infos, kind):
    for (args, options), layer, *_ in samples(infos, kind, torch.float32):
        for device, dtype in (("cpu", torch.float64), ("meta", torch.float32)):
            ours = CLASSES[kind](*args, **options, device=device, dtype=dtype)
            stock = kind(*args, **options, device=device, dtype=dtype).state_dict()
            assert list(ours.state_dict()) == list(stock)
            for name, t in ours.state_dict().items():
                assert (t.dtype, t.device, t.shape) == (
                    stock[name].dtype, stock[name].device, stock[name].shape,
                )  # fmt: skip
        empty = ours.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict())
        assert all(map(torch.equal, empty.parameters(), layer.parameters()))


@each_class
def test_conversion_by_swapped_parameters(infos, kind):
    for made_with, layer, args, options in samples(infos, kind, torch.float32):
        ours = ours_of("optimize", layer, made_with)
        args, options = tree_map_only(torch.Tensor, lambda t: t.double(), (args, options))
        before = list(ours.parameters())
        try:
            torch.__future__.set_swap_module_params_on_conversion(True)
            ours.double(), layer.double()
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert all(a is b for a, b in zip(ours.parameters(), before, strict=True))
        expected = results(layer, args, options)
        check_same(results(ours, args, options), expected, expected)


def error_of(call):
    try:
        call()
    except Exception as error:
        return error
    return None


@each_class
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_errors(infos, kind, training):
    """The error is of stock's type, and there is one where stock has one."""
    if infos[kind].module_error_inputs_func is None:
        return
    for dtype in (torch.float32, torch.float64):
        cases = infos[kind].module_error_inputs_func(
            infos[kind], device="cpu", dtype=dtype, requires_grad=True, training=training
        )
        for case in cases:
            made, given = case.module_error_input.constructor_input, case.module_error_input
            if "CONSTRUCTION" in str(case.error_on):
                with pytest.raises(case.error_type):
                    CLASSES[kind](*made.args, **made.kwargs)
                continue
            layer = kind(*made.args, **made.kwargs).train(training)
            if "dtype" not in made.kwargs:
                layer.to(dtype)
            call = given.forward_input
            expected = error_of(lambda m=layer, call=call: m(*call.args, **call.kwargs))
            assert expected is not None or not training
            for how in ("exchange", "optimize"):
                ours = ours_of(how, layer, (made.args, made.kwargs))
                error = error_of(lambda m=ours, call=call: m(*call.args, **call.kwargs))
                assert (error is None) == (expected is None), (how, error)
                assert expected is None or isinstance(error, type(expected)), (how, error)


@pytest.mark.extra
@each_class
@pytest.mark.parametrize("how", ["exchange", "optimize"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"]
)
def test_gradients(infos, kind, how, training, check):
    for made_with, layer, args, options in samples(infos, kind, torch.float64, training):
        ours = ours_of(how, layer, made_with)
        leaves = [t for t in tree_leaves((args, options)) if isinstance(t, torch.Tensor)]
        if not leaves[0].numel():
            continue
        names = list(dict(ours.named_parameters()))

        def call(*tensors, args=args, options=options, ours=ours, names=names, leaves=leaves):
            place = {id(t): new for t, new in zip(leaves, tensors, strict=False)}
            given = tree_map_only(torch.Tensor, lambda t: place[id(t)], (args, options))
            state = dict(zip(names, tensors[len(leaves) :], strict=True))
            # Buffers are copied, because a call in training changes them.
            state.update({name: t.clone() for name, t in ours.named_buffers()})
            return tuple(tree_leaves(torch.func.functional_call(ours, state, *given)))

        assert check(call, (*leaves, *ours.parameters()), fast_mode=True)
