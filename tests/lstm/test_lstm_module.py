"""LSTM and LSTMCell beside torch.nn's: constructors, modes, state, copies, replaced parameters."""

import copy
import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from support.accuracy import f64, stock_or_none
from support.checks import copies_of
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from advdl_ops import nn

OPTIONS = [
    {},
    {"num_layers": 2},
    {"bidirectional": True},
    {"bias": False},
    {"batch_first": True},
    {"proj_size": 3},
    {
        "num_layers": 2,
        "bidirectional": True,
        "bias": False,
        "batch_first": True,
        "proj_size": 2,
        "dropout": 0.5,
    },
]
EVERY = pytest.mark.parametrize("options", OPTIONS, ids=str)
BEYOND = {
    "layer_norm": True,
    "zoneout": (0.2, 0.3),
    "recurrent_dropout": 0.25,
    "forget_bias": 1.0,
}
I, H = 4, 6  # noqa: E741


def pair(dtype=f64, **options):
    """Ours and stock's, the same weights."""
    own, stock = nn.LSTM(I, H, dtype=dtype, **options), torch.nn.LSTM(I, H, dtype=dtype, **options)
    stock.load_state_dict(own.state_dict())
    return own.eval(), stock.eval()


def inputs(options, steps=5, batch=3, dtype=f64):
    shape = (batch, steps, I) if options.get("batch_first") else (steps, batch, I)
    cells = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    h = torch.randn(cells, batch, options.get("proj_size") or H, dtype=dtype)
    return torch.randn(shape, dtype=dtype), (h, torch.randn(cells, batch, H, dtype=dtype))


def assert_alike(found, expected):
    """Outputs of an LSTM, of packed or padded input."""
    y, states = found
    stock_y, stock_states = expected
    torch.testing.assert_close(states, stock_states)
    assert type(states) is tuple
    assert type(y) is type(stock_y)
    if isinstance(y, PackedSequence):
        for a, b in zip(y, stock_y, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    else:
        torch.testing.assert_close(y, stock_y)


@EVERY
def test_outputs(backend, options):
    own, stock = pair(**options)
    x, hx = inputs(options)
    assert_alike(own(x), stock(x))
    assert_alike(own(x, hx), stock(x, hx))
    assert_alike(own(x, list(hx)), stock(x, list(hx)))
    alone = x[0] if options.get("batch_first") else x[:, 0]
    assert_alike(own(alone), stock(alone))
    hx = hx[0][:, 0], hx[1][:, 0]
    assert_alike(own(alone, hx), stock(alone, hx))


@EVERY
def test_packed(backend, options):
    own, stock = pair(**options)
    x, hx = inputs(options)
    for lengths, is_sorted in (([5, 3, 1], True), ([2, 5, 3], False), ([4, 4, 4], True)):
        packed = pack_padded_sequence(
            x, lengths, options.get("batch_first", False), enforce_sorted=is_sorted
        )
        for states in (None, hx):
            found = own(packed, states)
            assert_alike(found, stock(packed, states))
            # The same by lengths, without packing.
            longest = x[:, : max(lengths)] if options.get("batch_first") else x[: max(lengths)]
            y, padded_states = own(longest, states, lengths=lengths)
            unpacked, _ = pad_packed_sequence(found[0], options.get("batch_first", False))
            torch.testing.assert_close(y, unpacked)
            torch.testing.assert_close(padded_states, found[1])
    rows = pack_sequence([torch.randn(n, I, dtype=f64) for n in (2, 1)], enforce_sorted=False)
    assert_alike(own(rows), stock(rows))


def test_training_with_dropout_between_layers(backend):
    """As torch's: after every layer but the last, and by the same draws."""
    options = {"num_layers": 3, "dropout": 0.4}
    own, stock = pair(torch.float64, **options)
    own.train(), stock.train()
    x, _ = inputs(options)
    torch.manual_seed(7)
    found = own(x)
    torch.manual_seed(7)
    assert_alike(found, stock(x))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nn.LSTM(I, H, dropout=0.4)
        torch.nn.LSTM(I, H, dropout=0.4)
    assert len(caught) == 2
    assert str(caught[0].message) == str(caught[1].message)


def test_dropout_of_every_unit(backend):
    own, stock = pair(num_layers=2, dropout=1.0)
    x, _ = inputs({})
    assert_alike(own.train()(x), stock.train()(x))


@EVERY
def test_parameters_are_torchs(options):
    torch.manual_seed(3)
    own = nn.LSTM(I, H, **options)
    torch.manual_seed(3)
    stock = torch.nn.LSTM(I, H, **options)
    assert list(own.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in own.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for name, t in stock.state_dict().items():
        assert torch.equal(own.state_dict()[name], t), name
    assert repr(own) == repr(stock)
    assert [list(map(id, row)) for row in own.all_weights] == [
        [id(own.get_parameter(n)) for n in row] for row in stock._all_weights
    ]
    stock.load_state_dict(own.state_dict(), strict=True)
    own.load_state_dict(stock.state_dict(), strict=True)


def test_constructors():
    """torch's arguments in torch's order; the others by keyword alone."""
    cell = inspect.signature(torch.nn.LSTMCell).parameters
    own = inspect.signature(nn.LSTMCell).parameters
    assert list(own)[: len(cell)] == list(cell)
    assert all(own[n].default == cell[n].default for n in cell)
    # torch.nn.LSTM takes *args: RNNBase's, but for the mode.
    base = inspect.signature(torch.nn.RNNBase.__init__).parameters
    expected = [n for n in base if n not in ("self", "mode")]
    own = inspect.signature(nn.LSTM).parameters
    assert list(own)[: len(expected)] == expected
    assert all(own[n].default == base[n].default for n in expected)
    for n in list(own)[len(expected) :]:
        assert own[n].kind is inspect.Parameter.KEYWORD_ONLY
    given = (4, 6, 2, False, True, 0.25, True, 3)
    module, stock = nn.LSTM(*given), torch.nn.LSTM(*given)
    assert repr(module) == repr(stock)
    for name in torch.nn.LSTM.__constants__:
        assert getattr(module, name) == getattr(stock, name), name


def test_classes():
    assert issubclass(nn.LSTMCell, torch.nn.LSTMCell)
    assert issubclass(nn.LSTM, torch.nn.RNNBase)
    # Dynamo refuses every instance of that.
    assert not issubclass(nn.LSTM, torch.nn.LSTM)
    assert nn.LSTM(2, 3).mode == "LSTM"


def test_repr():
    assert repr(nn.LSTM(4, 6, **BEYOND)) == (
        "LSTM(4, 6, layer_norm=True, zoneout=(0.2, 0.3), recurrent_dropout=0.25, forget_bias=1.0)"
    )
    assert repr(nn.LSTM(4, 6, 2, zoneout=0.1)) == "LSTM(4, 6, num_layers=2, zoneout=0.1)"
    assert repr(nn.LSTMCell(4, 6)) == repr(torch.nn.LSTMCell(4, 6))
    assert repr(nn.LSTMCell(4, 6, False)) == repr(torch.nn.LSTMCell(4, 6, False))
    assert repr(nn.LSTMCell(4, 6, forget_bias=0.0)) == "LSTMCell(4, 6, forget_bias=0.0)"


@pytest.mark.parametrize("bias", [True, False])
def test_cell(backend, bias):
    torch.manual_seed(1)
    own = nn.LSTMCell(I, H, bias, dtype=f64)
    torch.manual_seed(1)
    stock = torch.nn.LSTMCell(I, H, bias, dtype=f64)
    for name, t in stock.state_dict().items():
        assert torch.equal(own.state_dict()[name], t)
    own.load_state_dict(stock.state_dict())
    x, h, c = (torch.randn(3, n, dtype=f64) for n in (I, H, H))
    for given in ((x,), (x, (h, c)), (x[0],), (x[0], (h[0], c[0]))):
        found = own(*given)
        assert type(found) is tuple
        torch.testing.assert_close(found, stock(*given))
    hx = stock_hx = None
    for step in torch.randn(6, 3, I, dtype=f64):
        hx, stock_hx = own(step, hx), stock(step, stock_hx)
        torch.testing.assert_close(hx, stock_hx)


@pytest.mark.parametrize("options", [{}, BEYOND, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_copies(options):
    module = nn.LSTM(I, H, dtype=f64, **options)
    cell = nn.LSTMCell(I, H, dtype=f64, forget_bias=options.get("forget_bias"))
    x, _ = inputs({})
    for own, given in ((module, x), (cell, x[0])):
        torch.manual_seed(1)
        expected = own(given)
        for name, other in copies_of(own).items():
            assert repr(other) == repr(own)
            torch.manual_seed(1)
            found = other(given)
            torch.testing.assert_close(found, expected)
            # A copy has weights of its own, and uses them.
            with torch.no_grad():
                for t in other.parameters():
                    t.zero_()
            torch.manual_seed(1)
            torch.testing.assert_close(own(given), expected), name
            assert other.eval()(given)[0].eq(0).all(), name
            own.train()


def test_parameters_replaced():
    """As DDP, FSDP, LoRA and users do it: the weights at the time of the call are those that count."""
    x, _ = inputs({})
    own, stock = pair(num_layers=2)
    for kind in ("setattr", "data", "register", "load", "copy_"):
        torch.manual_seed(5)
        for module in (own, stock):
            for name, t in list(module.named_parameters()):
                new = torch.randn(t.shape, dtype=f64, generator=torch.Generator().manual_seed(9))
                if kind == "setattr":
                    setattr(module, name, torch.nn.Parameter(new))
                elif kind == "data":
                    t.data = new * 0.5
                elif kind == "register":
                    module.register_parameter(name, torch.nn.Parameter(new * 0.3))
                elif kind == "load":
                    module.load_state_dict({**module.state_dict(), name: new * 0.7}, assign=True)
                else:
                    with torch.no_grad():
                        t.copy_(new * 0.2)
        stock._init_flat_weights()
        assert_alike(own(x), stock(x))
    # Deleted and set as a plain tensor, as torch.nn.utils.weight_norm and pruning do.
    weight = own.weight_hh_l0.detach() * 2
    with torch.no_grad():
        stock.weight_hh_l0.copy_(weight)
    del own.weight_hh_l0
    own.weight_hh_l0 = weight
    assert_alike(own(x), stock(x))


def test_functional_call():
    own, stock = pair(num_layers=2, bidirectional=True)
    x, _ = inputs({})
    before = own(x)
    other = {n: t.detach() * 0.5 for n, t in own.named_parameters()}
    expected = torch.func.functional_call(stock, other, (x,))
    assert_alike(torch.func.functional_call(own, other, (x,)), expected)
    torch.testing.assert_close(own(x), before)
    cell = nn.LSTMCell(I, H, dtype=f64)
    zeros = {n: torch.zeros_like(t) for n, t in cell.named_parameters()}
    assert torch.func.functional_call(cell, zeros, (x[0],))[0].eq(0).all()
    assert cell(x[0])[0].abs().max() > 0


class Doubled(torch.nn.Module):
    def forward(self, w):
        return 2 * w


def test_parametrizations():
    x, _ = inputs({})
    for make, given in ((nn.LSTM, x), (nn.LSTMCell, x[0])):
        names = [n for n, _ in make(I, H).named_parameters()]
        for chosen in (names[:1], names[1:3], names):
            own, plain = make(I, H, dtype=f64), make(I, H, dtype=f64)
            plain.load_state_dict(own.state_dict())
            with torch.no_grad():
                for name in chosen:
                    plain.get_parameter(name).mul_(2)
            for name in chosen:
                parametrize.register_parametrization(own, name, Doubled())
            torch.testing.assert_close(own(given), plain(given))
            own(given)[0].sum().backward()
            plain(given)[0].sum().backward()
            for name in names:
                if name in chosen:
                    grad = own.parametrizations[name].original.grad
                    torch.testing.assert_close(grad, 2 * plain.get_parameter(name).grad)
            torch.testing.assert_close(copy.deepcopy(own)(given), own(given))
            for name in chosen:
                parametrize.remove_parametrizations(own, name)
            torch.testing.assert_close(own(given), plain(given))


def test_nothing_keeps_replaced_parameters_alive():
    """torch's list of flat weights would."""
    module = nn.LSTM(I, H, layer_norm=True)
    old = {id(t) for t in module.parameters()}
    for name, t in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(t.detach().clone()))
    assert not old & {id(t) for t in module._flat_weights}
    assert "_flat_weights" not in module.__dict__
    module.flatten_parameters()
    module._flat_weights = []
    assert len(module._flat_weights) == 10


def test_to_other_dtypes_and_devices():
    for options in ({}, {"layer_norm": True}):
        module = nn.LSTM(I, H, 2, **options)
        x = torch.randn(3, 2, I)
        for dtype in (f64, torch.bfloat16, torch.float16, torch.float32):
            module.to(dtype)
            y, states = module(x.to(dtype))
            assert y.dtype == states[0].dtype == states[1].dtype == dtype
        y, _ = module.to("meta")(x.to("meta"))
        assert y.is_meta and y.shape == (3, 2, H)
        y.sum().backward()
        assert module.weight_hh_l0.grad.is_meta
    with torch.device("meta"):
        module = nn.LSTM(I, H, **BEYOND)
        cell = nn.LSTMCell(I, H, forget_bias=1.0)
        assert module(torch.empty(3, 2, I))[0].is_meta
        assert cell(torch.empty(2, I))[0].is_meta
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert module(torch.randn(3, 2, I))[0].isfinite().all()
    assert nn.LSTM(I, H, device="meta", dtype=f64, layer_norm=True).weight_ln_c_l0.dtype == f64


def test_shared_memory_and_data_parallel_replicas():
    module = nn.LSTM(I, H, layer_norm=True).share_memory()
    replica = module._replicate_for_data_parallel()
    for name, t in module.named_parameters():
        setattr(replica, name, t.detach() * 0)
    x = torch.randn(3, 2, I)
    assert replica(x)[0].eq(0).all()
    assert module(x)[0].abs().max() > 0


AMP = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


@pytest.mark.parametrize(("dtype", "x_dtype"), AMP, ids=str)
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_returns_torchs_dtypes(backend, dtype, x_dtype, module_dtype):
    own, stock = pair(module_dtype)
    x = torch.randn(5, 3, I).to(x_dtype)
    with torch.autocast("cpu", dtype):
        found = own(x)
        expected, missing = stock_or_none(lambda: stock(x))
        wide = pair(f64)[1]
        wide.load_state_dict(own.state_dict())
    assert [t.dtype for t in (found[0], *found[1])] == [dtype] * 3
    if missing:  # in its place: fp32 on numbers of the autocast dtype
        stand_in = torch.nn.LSTM(I, H).eval()
        stand_in.load_state_dict({n: t.to(dtype).float() for n, t in own.state_dict().items()})
        y, states = stand_in(x.to(dtype).float())
        expected = y.to(dtype), tuple([t.to(dtype) for t in states])
    exact = wide(x.double())
    for own_t, stock_t, exact_t in zip(
        (found[0], *found[1]), (expected[0], *expected[1]), (exact[0], *exact[1]), strict=True
    ):
        assert own_t.dtype == stock_t.dtype
        limit = (stock_t.double() - exact_t).abs().max() + 2 * torch.finfo(dtype).eps
        assert (own_t.double() - exact_t).abs().max() <= limit, missing
    # fp64 is left alone.
    wide = pair(f64)[0]
    with torch.autocast("cpu", dtype):
        assert wide(x.double())[0].dtype == f64


@pytest.mark.parametrize(("dtype", "x_dtype"), AMP, ids=str)
@pytest.mark.parametrize("module_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_a_cell_returns_torchs_dtypes(
    backend, dtype, x_dtype, module_dtype, state_dtype
):
    own, stock = nn.LSTMCell(I, H, dtype=module_dtype), torch.nn.LSTMCell(I, H, dtype=module_dtype)
    stock.load_state_dict(own.state_dict())
    x = torch.randn(3, I).to(x_dtype)
    hx = None if state_dtype is None else (torch.randn(2, 3, H).to(state_dtype)).unbind()
    with torch.autocast("cpu", dtype):
        found, expected = own(x, hx), stock(x, hx)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.05, atol=0.05)


def test_autocast_casts_and_does_no_more(backend):
    """What it computes is what is computed without it of cast tensors: nothing inside is cast again."""
    dtype = torch.bfloat16
    for options in ({"num_layers": 2, "bidirectional": True}, {"proj_size": 3, "zoneout": 0.2}):
        module = nn.LSTM(I, H, **options).eval()
        x = torch.randn(5, 3, I)
        with torch.autocast("cpu", dtype):
            found = module(x)
        if module.proj_size:  # the cell is wider, and so is all arithmetic
            y, (h_n, c_n) = module(x)
            expected = y.to(dtype), (h_n.to(dtype), c_n)
        else:
            expected = copy.deepcopy(module).to(dtype)(x.to(dtype))
        assert_alike(found, expected)
        assert torch.equal(found[0], expected[0])
    cell, x = nn.LSTMCell(I, H), torch.randn(3, I).requires_grad_()
    with torch.autocast("cpu", dtype):
        found = cell(x)
    expected = cell(x)
    assert all(map(torch.equal, found, expected))
    grads = [torch.autograd.grad(out[0].sum(), x)[0] for out in (found, expected)]
    assert torch.equal(*grads)


def test_amp_training(backend):
    """Parameters of fp32 under autocast: gradients of fp32, and a scaler that has nothing to skip."""
    for dtype, options in itertools.product(
        (torch.bfloat16, torch.float16), ({"num_layers": 2}, BEYOND)
    ):
        module = nn.LSTM(I, H, **options)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=64.0)
        before = copy.deepcopy(module.state_dict())
        x = torch.randn(5, 3, I, requires_grad=True)
        with torch.autocast("cpu", dtype):
            y, (h_n, _) = module(x.to(dtype), lengths=[5, 2, 3])
            assert y.dtype == h_n.dtype == dtype
            loss = y.float().square().sum()
        scaler.scale(loss).backward()
        assert x.grad.dtype == torch.float32
        for t in module.parameters():
            assert t.grad.dtype == torch.float32
            assert t.grad.isfinite().all()
        scaler.step(optimizer)
        scaler.update()
        for name, t in module.state_dict().items():
            assert not torch.equal(t, before[name]), name


def test_a_loop_of_truncated_windows_in_eval_and_train():
    """Modes, and states from one window to the next."""
    own, stock = pair(torch.float32, num_layers=2)
    hx = stock_hx = None
    for i in range(4):
        x = torch.randn(3, 2, I)
        with torch.set_grad_enabled(i % 2 == 0):
            y, hx = own.train(i > 1)(x, hx)
            stock_y, stock_hx = stock.train(i > 1)(x, stock_hx)
        torch.testing.assert_close((y, hx), (stock_y, stock_hx))
        hx = tuple(t.detach() for t in hx)
        stock_hx = tuple(t.detach() for t in stock_hx)


def test_arguments_by_torchs_names_and_by_position():
    """torch.onnx.export(dynamo=False) gives the defaults by position."""
    own, stock = pair(torch.float32)
    x, hx = torch.randn(3, 2, I), torch.randn(2, 1, 2, H).unbind()
    torch.testing.assert_close(own(input=x, hx=hx), stock(input=x, hx=hx))
    torch.testing.assert_close(own(x, hx, None), stock(x, hx))
    assert torch.equal(own(x, None, [3, 2])[0], own(x, lengths=[3, 2])[0])
    cell, stock_cell = nn.LSTMCell(I, H), torch.nn.LSTMCell(I, H)
    stock_cell.load_state_dict(cell.state_dict())
    x, hx = x[0], (hx[0][0], hx[1][0])
    torch.testing.assert_close(cell(input=x, hx=hx), stock_cell(input=x, hx=hx))


@pytest.mark.parametrize(
    "kind",
    [
        torch.tensor,
        lambda n: torch.tensor(n, dtype=torch.int32),
        lambda n: torch.tensor(n, dtype=torch.uint8),
        np.array,
        lambda n: np.array(n, dtype=np.int32),
        tuple,
        lambda n: [np.int64(i) for i in n],
        lambda n: [torch.tensor(i) for i in n],
    ],
)
def test_lengths_as_pack_padded_sequence_takes_them(kind):
    layer, x, lengths = nn.LSTM(3, 4), torch.randn(5, 3, 3), [5, 3, 1]
    y, (h, _) = layer(x, lengths=lengths)
    found, (h_found, _) = layer(x, lengths=kind(lengths))
    assert torch.equal(found, y) and torch.equal(h_found, h)
    torch.nn.utils.rnn.pack_padded_sequence(x, kind(lengths))
