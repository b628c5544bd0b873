"""What people do with LSTMs: initialization by class, pickling, compiling, Monte Carlo dropout, autocast, quantization,
torch.fx, another LSTM in the place of ours. test_habits_lstm_export.py has export.
"""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import advdl_ops
from advdl_ops import models as zoo
from advdl_ops import nn


class Tagger(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.lstm, self.head = kind(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


def models():
    return advdl_ops.optimize(Tagger(torch.nn.LSTM)), Tagger(nn.LSTM)


@pytest.mark.parametrize("number", [0, 1])
def test_is_an_instance_of_torchs(number):
    model = models()[number]
    assert isinstance(model.lstm, torch.nn.LSTM) and isinstance(model.lstm, nn.LSTM)
    assert not isinstance(model.lstm, torch.nn.GRU)
    reached = []

    def init(module):
        if isinstance(module, torch.nn.LSTM):
            reached.append(module)
            for name, parameter in module.named_parameters():
                if "bias" in name:
                    torch.nn.init.ones_(parameter)

    model.apply(init)
    assert reached == [model.lstm] and (model.lstm.bias_ih_l0 == 1).all()


@pytest.mark.parametrize("number", [0, 1])
def test_copies_and_pickles(number):
    model, x = models()[number], torch.randn(5, 2, 4)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(again.lstm) is nn.LSTM
        assert torch.equal(again(x), model(x))
    assert "LSTM(4, 6)" in repr(model)


@pytest.mark.parametrize("number", [0, 1])
def test_compiles(number):
    torch._dynamo.reset()
    model, x = models()[number], torch.randn(5, 2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_restored():
    model = advdl_ops.restore(models()[0])
    assert type(model.lstm) is torch.nn.LSTM
    assert model(torch.randn(5, 2, 4)).shape == (5, 2, 3)


# ---- random numbers ----


@pytest.mark.parametrize("kind", ["plain", "unbatched", "packed", "packed unsorted", "lengths"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_draws_the_numbers_of_torchs_layer(kind, batch_first, dtype):
    rows, columns, lengths = (5, 7, [7, 2, 5, 5, 1]) if batch_first else (7, 5, [7, 2, 5, 5, 1])
    for bidirectional, proj_size, grad, rate in itertools.product(
        (False, True), (0, 3), (False, True), (0.5, 1.0)
    ):
        options = {
            "num_layers": 3, "dropout": rate, "batch_first": batch_first, "bidirectional": bidirectional,
            "proj_size": proj_size, "dtype": dtype,
        }  # fmt: skip
        own, stock = nn.LSTM(4, 6, **options), torch.nn.LSTM(4, 6, **options)
        own.load_state_dict(stock.state_dict())
        x = torch.randn(rows, columns, 4, dtype=dtype)

        def run(layer, x=x, grad=grad):
            torch.manual_seed(7)
            with torch.set_grad_enabled(grad):
                if kind == "plain":
                    result = layer(x)
                elif kind == "unbatched":
                    result = layer(x[0])
                elif kind == "lengths" and type(layer) is nn.LSTM:
                    result = layer(x, lengths=lengths)
                else:
                    given = sorted(lengths, reverse=True) if kind == "packed" else lengths
                    rows = pack_padded_sequence(x, given, batch_first, enforce_sorted=False)
                    if kind == "packed":
                        rows = pack_padded_sequence(x, given, batch_first)
                    y, states = layer(rows)
                    result = pad_packed_sequence(y, batch_first, total_length=7)[0], states
            return result, torch.get_rng_state()

        (found, state), (expected, expected_state) = run(own), run(stock)
        torch.testing.assert_close(found, expected)
        assert torch.equal(state, expected_state)


# ---- autocast ----


def dtypes_or_none(layer, *args, **kwargs):
    """The dtypes of y, h_n and c_n; None where torch itself fails."""
    try:
        y, (h_n, c_n) = layer(*args, **kwargs)
    except RuntimeError:
        return None
    return [t.dtype for t in (getattr(y, "data", y), h_n, c_n)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_autocast_returns_torchs_dtypes(dtype, batch_first, bidirectional, proj_size):
    options = {
        "batch_first": batch_first,
        "bidirectional": bidirectional,
        "proj_size": proj_size,
        "num_layers": 2,
    }
    own, stock = nn.LSTM(3, 4, **options), torch.nn.LSTM(3, 4, **options)
    stock.load_state_dict(own.state_dict())
    lengths, compared = [5, 4, 3, 3, 1], 0
    for x_dtype, state_dtype, train, grad, kind in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (None, torch.float32, torch.bfloat16),
        (False, True), (False, True), ("whole", "packed", "lengths"),
    ):  # fmt: skip
        x, hx = torch.randn(5, 5, 3).to(x_dtype), None
        if state_dtype is not None:
            cells = 2 * (1 + bidirectional)
            hx = (
                torch.randn(cells, 5, proj_size or 4).to(state_dtype),
                torch.randn(cells, 5, 4).to(state_dtype),
            )
        packed = pack_padded_sequence(x, lengths, batch_first)
        with torch.autocast("cpu", dtype), torch.set_grad_enabled(grad):
            of_stock, of_own = (x, packed)[kind != "whole"], (x, packed)[kind == "packed"]
            expected = dtypes_or_none(stock.train(train), of_stock, hx)
            given = {"lengths": lengths} if kind == "lengths" else {}
            found = dtypes_or_none(own.train(train), of_own, hx, **given)
        assert found is not None
        if expected is not None:
            assert found == expected, (x_dtype, state_dtype, train, grad, kind)
            compared += 1
    assert compared > 20


def test_autocast_values_and_gradients():
    """As exact as torch's layer where the cell is wider than the autocast dtype."""
    for options in ({"proj_size": 2}, {}):
        own, stock = nn.LSTM(3, 4, **options), torch.nn.LSTM(3, 4, **options)
        stock.load_state_dict(own.state_dict())
        exact = copy.deepcopy(stock).double()
        x = torch.randn(6, 2, 3)
        packed = pack_padded_sequence(x, [6, 4])
        results = []
        for layer in (own, stock):
            with torch.autocast("cpu", torch.bfloat16):
                y, (h_n, c_n) = layer(packed)
            (y.data.float().sum() + c_n.sum()).backward()
            results.append([y.data, h_n, c_n, *[t.grad for t in layer.parameters()]])
        y, (h_n, c_n) = exact(packed._replace(data=packed.data.double()))
        (y.data.sum() + c_n.sum()).backward()
        expected = [y.data, h_n, c_n, *[t.grad for t in exact.parameters()]]
        for a, b, c in zip(*results, expected, strict=True):
            assert a.dtype == b.dtype
            limit = (b.double() - c).abs().max() + torch.finfo(torch.bfloat16).eps * c.abs().max()
            assert (a.double() - c).abs().max() <= limit


# ---- quantization ----


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.cell = torch.nn.LSTM(4, 6, 2), torch.nn.LSTMCell(6, 6)
        self.head = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.cell(self.lstm(x)[0][-1])[0])


def quantized(model, kinds, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, kinds, **options)


def test_dynamic_quantization():
    kinds = {torch.nn.LSTM, torch.nn.LSTMCell, torch.nn.Linear}
    model, x = Words().eval(), torch.randn(5, 2, 4)
    fast = advdl_ops.optimize(model)
    expected, found = quantized(model, kinds), quantized(fast, kinds)
    assert [type(m) for m in found.modules()][1:] == [type(m) for m in expected.modules()][1:]
    assert torch.equal(found(x), expected(x))
    assert type(fast.lstm) is nn.LSTM and type(fast.cell) is nn.LSTMCell  # of the model given
    torch.testing.assert_close(fast(x), model(x))
    found = quantized(fast, {"lstm": torch.ao.quantization.default_dynamic_qconfig})
    assert type(found.lstm) is type(expected.lstm) and type(found.cell) is nn.LSTMCell
    found = quantized(fast, {torch.nn.Linear})
    assert type(found.lstm) is nn.LSTM and type(found.head) is type(expected.head)
    found = quantized(fast, kinds, inplace=True)
    assert torch.equal(found(x), expected(x))


def test_what_torch_cannot_quantize_is_an_error():
    model = torch.nn.Sequential(nn.LSTM(4, 6, layer_norm=True))
    with pytest.raises(RuntimeError, match="LSTM has layer_norm"):
        quantized(model, {torch.nn.LSTM})
    assert type(quantized(model, {torch.nn.Linear})[0]) is nn.LSTM
    assert not hasattr(model[0], "qconfig")


# ---- the zoo ----

ZOO = [
    ("lstm_classifier", {"pool": "max"}),
    ("lstm_classifier", {"pool": "mean", "batch_first": True}),
    ("lstm_classifier", {"pool": "last"}),
    ("lstm_tagger", {"batch_first": True}),
    ("lstm_lm", {}),
]


def zoo_model(name, options):
    sizes = {"num_classes": 7, "num_layers": 2, "embedding_dim": 6, "hidden_size": 5}
    return zoo.create_model(name, **sizes, **options).eval()


def tokens_and_lengths(options):
    tokens = torch.randint(7, (8, 6))
    steps, batch = tokens.shape[:: -1 if options.get("batch_first") else 1]
    lengths = torch.randint(1, steps + 1, (batch,))
    return tokens, lengths


@pytest.mark.parametrize(("name", "options"), ZOO, ids=str)
def test_zoo_is_traceable(name, options):
    model, (tokens, lengths) = zoo_model(name, options), tokens_and_lengths(options)
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["embedding", "dropout", "lstm", "dropout", "linear"]
    assert_equal(traced(tokens), model(tokens))
    assert_equal(traced(tokens, lengths=lengths), model(tokens, lengths=lengths))
    traced = torch.fx.symbolic_trace(model, concrete_args={"lengths": None})
    assert_equal(traced(tokens), model(tokens))


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_layer_alone_is_traced_no_more_than_torchs():
    for own, stock in (
        (nn.LSTM(3, 4), torch.nn.LSTM(3, 4)),
        (nn.LSTMCell(3, 4), torch.nn.LSTMCell(3, 4)),
    ):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(stock)
        with pytest.raises(torch.fx.proxy.TraceError, match="trace a module that holds it"):
            torch.fx.symbolic_trace(own)


@pytest.mark.parametrize(("name", "options"), ZOO, ids=str)
def test_zoo_with_torchs_layer(name, options):
    model, (tokens, lengths) = zoo_model(name, options), tokens_and_lengths(options)
    own = model.lstm
    stock = torch.nn.LSTM(
        own.input_size, own.hidden_size, own.num_layers, batch_first=own.batch_first, bidirectional=own.bidirectional
    )  # fmt: skip
    stock.load_state_dict(own.state_dict())
    other = copy.deepcopy(model)
    other.lstm = stock
    torch.testing.assert_close(other(tokens), model(tokens))
    torch.testing.assert_close(other(tokens, lengths=lengths), model(tokens, lengths=lengths))
    found = quantized(other, {torch.nn.LSTM})(tokens, lengths=lengths)
    expected = quantized(model, {torch.nn.LSTM})(tokens, lengths=lengths)
    assert_equal(found, expected)
