"""LSTMs recorded by torch.export, torch.onnx.export and torch.jit.trace: as torch's layer is, for any sizes."""

import warnings

import pytest
import torch
from torch.export import Dim
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import advdl_ops
from advdl_ops import models, nn

f64 = torch.float64
INPUTS, HIDDEN = 3, 4
OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "batch_first": True},
    {"proj_size": 2, "bidirectional": True},
]
FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}


@pytest.fixture(autouse=True)
def without_deprecations():
    """torch.jit and torch.onnx are full of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def pair(dtype=f64, **options):
    """Our layer and torch's, with the same weights, in evaluation."""
    stock = torch.nn.LSTM(INPUTS, HIDDEN, **options, dtype=dtype).eval()
    own = nn.LSTM(INPUTS, HIDDEN, **options, dtype=dtype).eval()
    own.load_state_dict(stock.state_dict())
    return own, stock


def sequences(layer, dtype=f64, sizes=(5, 3)):
    """x, states and lengths for numbers of rows and columns."""
    steps, batch = sizes[::-1] if layer.batch_first else sizes
    cells = layer.num_layers * (1 + layer.bidirectional)
    hx = (
        torch.randn(cells, batch, layer.proj_size or HIDDEN, dtype=dtype),
        torch.randn(cells, batch, HIDDEN, dtype=dtype),
    )
    lengths = torch.randint(1, steps + 1, (batch,))
    lengths[-1] = steps
    return torch.randn(*sizes, INPUTS, dtype=dtype), hx, lengths


def packed(stock, x, hx, lengths):
    """torch's layer over padded sequences."""
    steps = x.shape[1 if stock.batch_first else 0]
    rows = pack_padded_sequence(x, lengths, stock.batch_first, enforce_sorted=False)
    y, states = stock(rows, hx)
    return pad_packed_sequence(y, stock.batch_first, total_length=steps)[0], states


def count(program, name="aten.lstm.input"):
    return sum(str(node.target) == name for node in program.graph.nodes)


# ---- torch.export ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.extra), f64])
def test_exports_as_torchs_for_any_sizes(options, dtype):
    own, stock = pair(dtype, **options)
    x, hx, _ = sequences(own, dtype)
    more_x, more_hx, _ = sequences(own, dtype, (7, 6))
    batch = {0 if own.batch_first else 1: Dim.DYNAMIC}  # torch's own fixes the steps
    expected = torch.export.export(stock, (x,), dynamic_shapes=(batch,))
    program = torch.export.export(own, (x,), dynamic_shapes={"input": FREE})
    assert count(program) == 1
    assert len(program.graph.nodes) == len(expected.graph.nodes)
    torch.testing.assert_close(program.module()(more_x), stock(more_x))
    recorded = next(node.meta["val"] for node in program.graph.nodes if "lstm" in node.name)
    assert recorded[0].is_contiguous() == stock(x)[0].is_contiguous()
    of_states = ({1: Dim.DYNAMIC},) * 2
    program = torch.export.export(own, (x, hx), dynamic_shapes={"input": FREE, "hx": of_states})
    assert count(program) == 1
    torch.testing.assert_close(program.module()(more_x, more_hx), stock(more_x, more_hx))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_exports_lengths_for_any_sizes(options):
    own, stock = pair(**options)
    x, hx, lengths = sequences(own)
    dynamic = {"input": FREE, "lengths": {0: Dim.DYNAMIC}}
    program = torch.export.export(own, (x,), {"lengths": lengths}, dynamic_shapes=dynamic)
    assert count(program) == own.num_layers * (1 + own.bidirectional)
    states = {"hx": ({1: Dim.DYNAMIC},) * 2}
    with_states = torch.export.export(
        own, (x, hx), {"lengths": lengths}, dynamic_shapes=dynamic | states
    )
    x, hx, lengths = sequences(own, sizes=(7, 6))
    found = program.module()(x, lengths=lengths)
    torch.testing.assert_close(found, packed(stock, x, None, lengths))
    torch.testing.assert_close(
        with_states.module()(x, hx, lengths=lengths), packed(stock, x, hx, lengths)
    )
    padding = torch.arange(x.shape[1 if own.batch_first else 0]) >= lengths.unsqueeze(1)
    x[padding if own.batch_first else padding.T] = torch.nan
    again = program.module()(x, lengths=lengths)
    torch.testing.assert_close(again, found)


def test_strict_export():
    for options, number in (({}, 1), ({"proj_size": 2}, 0)):
        own, stock = pair(**options)
        x = torch.randn(5, 3, INPUTS, dtype=f64)
        dynamic = {"input": {1: Dim.DYNAMIC}}
        program = torch.export.export(own, (x,), dynamic_shapes=dynamic, strict=True)
        assert count(program) == number
        x = torch.randn(5, 7, INPUTS, dtype=f64)
        torch.testing.assert_close(program.module()(x), stock(x))


def test_exports_training_with_gradients():
    own, stock = pair(num_layers=2, dropout=0.5)
    x = sequences(own)[0]
    program = torch.export.export(own.train(), (x,), dynamic_shapes={"input": FREE})
    module, x = program.module(), torch.randn(7, 2, INPUTS, dtype=f64)
    results = []
    for layer in (module, stock.train()):
        torch.manual_seed(0)
        y, _ = layer(x)
        y.square().sum().backward()
        results.append((y, [t.grad for _, t in sorted(layer.named_parameters())]))
    torch.testing.assert_close(*results)


def test_exports_optimized_models():
    model = torch.nn.Sequential(torch.nn.Linear(5, INPUTS), torch.nn.LSTM(INPUTS, HIDDEN)).double()
    x, more = torch.randn(5, 3, 5, dtype=f64), torch.randn(8, 2, 5, dtype=f64)
    program = torch.export.export(advdl_ops.optimize(model), (x,), dynamic_shapes=(FREE,))
    assert count(program) == 1
    torch.testing.assert_close(program.module()(more), model(more))


def test_exports_cell():
    cell, x = nn.LSTMCell(INPUTS, HIDDEN, dtype=f64), torch.randn(3, INPUTS, dtype=f64)
    program = torch.export.export(cell, (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert count(program, "aten.lstm_cell.default") == 1
    x = torch.randn(6, INPUTS, dtype=f64)
    torch.testing.assert_close(program.module()(x), cell(x))


def test_exports_what_torchs_layer_does_not_have():
    for options in ({"layer_norm": True}, {"zoneout": 0.1}):
        own = nn.LSTM(INPUTS, HIDDEN, dtype=f64, **options).eval()
        x = torch.randn(5, 3, INPUTS, dtype=f64)
        program = torch.export.export(own, (x,), dynamic_shapes=({1: Dim.DYNAMIC},))
        assert count(program) == 0
        x = torch.randn(5, 7, INPUTS, dtype=f64)
        torch.testing.assert_close(program.module()(x), own(x))
    own = nn.LSTM(INPUTS, HIDDEN, recurrent_dropout=0.2)
    assert count(torch.export.export(own.eval(), (x.float(),))) == 1
    assert count(torch.export.export(own.train(), (x.float(),))) == 0


def test_packed_is_an_error_with_the_way_out():
    class Packs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(INPUTS, HIDDEN)

        def forward(self, x, lengths):
            return self.lstm(pack_padded_sequence(x, lengths))[0].data

    with pytest.raises(RuntimeError, match="lengths="):
        torch.export.export(Packs(), (torch.randn(5, 3, INPUTS), torch.tensor([5, 3, 1])))


@pytest.mark.parametrize("proj_size", [0, 2])
def test_exports_autocast(proj_size):
    own, _ = pair(torch.float32, proj_size=proj_size)

    class Casts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = own

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.lstm(x)

    program = torch.export.export(Casts(), (torch.randn(5, 3, INPUTS),), dynamic_shapes=(FREE,))
    x = torch.randn(7, 2, INPUTS)
    (y, states), (expected, expected_states) = program.module()(x), Casts()(x)
    for a, b in zip((y, *states), (expected, *expected_states), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02)


def test_kernels_of_torch_are_as_before():
    operator = torch.ops.aten.lstm.input
    torch.export.export(nn.LSTM(INPUTS, HIDDEN), (torch.randn(5, 3, INPUTS),))
    before = dict(operator.py_kernels)
    torch.export.export(nn.LSTM(INPUTS, HIDDEN), (torch.randn(5, 3, INPUTS),))
    assert operator.py_kernels == before
    assert all(kernel.__module__.startswith("torch.") for kernel in before.values())


ZOO = [
    ("lstm_classifier", {"pool": "max"}),
    ("lstm_classifier", {"pool": "mean", "batch_first": True}),
    ("lstm_classifier", {"pool": "last"}),
    ("lstm_tagger", {"batch_first": True}),
    ("lstm_lm", {}),
]


def zoo_model(name, options):
    sizes = {"num_classes": 7, "num_layers": 2, "embedding_dim": 6, "hidden_size": 5}
    return models.create_model(name, **sizes, **options).eval()


@pytest.mark.parametrize(("name", "options"), ZOO, ids=str)
def test_zoo_exports_and_traces(name, options):
    model = zoo_model(name, options).double()
    tokens, more = torch.randint(7, (5, 3)), torch.randint(7, (8, 6))
    rows = 0 if options.get("batch_first") else 1
    lengths = torch.randint(1, tokens.shape[1 - rows] + 1, (tokens.shape[rows],))
    more_lengths = torch.randint(1, more.shape[1 - rows] + 1, (more.shape[rows],))
    program = torch.export.export(model, (tokens,), dynamic_shapes={"tokens": FREE})
    assert count(program) == 1
    torch.testing.assert_close(program.module()(more), model(more))
    program = torch.export.export(
        model, (tokens,), {"lengths": lengths},
        dynamic_shapes={"tokens": FREE, "lengths": {0: Dim.DYNAMIC}},
    )  # fmt: skip
    torch.testing.assert_close(
        program.module()(more, lengths=more_lengths), model(more, lengths=more_lengths)
    )
    torch.testing.assert_close(torch.jit.trace(model, (tokens,))(more), model(more))


# ---- torch.jit ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_traces_for_any_sizes(options):
    own, stock = pair(**options)
    x, hx, lengths = sequences(own)
    more_x, more_hx, more_lengths = sequences(own, sizes=(7, 6))

    class Packs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = own

        def forward(self, x, h, c, lengths):
            return packed(self.lstm, x, (h, c), lengths)

    class Pads(Packs):
        def forward(self, x, h, c, lengths):
            return self.lstm(x, (h, c), lengths=lengths)

    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        alone, states = torch.jit.trace(own, (x,)), torch.jit.trace(own, (x, hx))
        padded = torch.jit.trace(Pads(), (x, *hx, lengths))
    in_pack = torch.jit.trace(Packs(), (x, *hx, lengths))
    torch.testing.assert_close(alone(more_x), stock(more_x))
    torch.testing.assert_close(states(more_x, more_hx), stock(more_x, more_hx))
    expected = packed(stock, more_x, more_hx, more_lengths)
    torch.testing.assert_close(padded(more_x, *more_hx, more_lengths), expected)
    torch.testing.assert_close(in_pack(more_x, *more_hx, more_lengths), expected)


def test_a_trace_of_what_torchs_layer_does_not_have_refuses_other_steps():
    own, x = nn.LSTM(INPUTS, HIDDEN, zoneout=0.1).eval(), torch.randn(5, 3, INPUTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(own, (x,))
    torch.testing.assert_close(traced(x), own(x))
    with pytest.raises(RuntimeError, match="Expected 5 elements"):
        traced(torch.randn(6, 3, INPUTS))


def test_traces_cell():
    cell, x = nn.LSTMCell(INPUTS, HIDDEN, dtype=f64), torch.randn(3, INPUTS, dtype=f64)
    traced, x = torch.jit.trace(cell, (x,)), torch.randn(6, INPUTS, dtype=f64)
    torch.testing.assert_close(traced(x), cell(x))


# ---- ONNX ----


@pytest.fixture(scope="module")
def evaluated():
    """Evaluates a file of ONNX. The evaluator of the package does not look at sequence_lens."""
    pytest.importorskip("onnxscript")
    numpy, onnx = pytest.importorskip("numpy"), pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator, ops

    class LSTM(ops.op_lstm.LSTM):
        op_domain = ""

        def _run(self, x, w, r, b=None, lengths=None, h=None, c=None, *_, **options):
            if lengths is None:
                return super()._run(x, w, r, b, None, h, c, **options)
            y = numpy.zeros((x.shape[0], w.shape[0], x.shape[1], r.shape[2]), x.dtype)
            h_n, c_n = numpy.zeros_like(h), numpy.zeros_like(c)
            for k, n in enumerate(lengths):
                own = slice(k, k + 1)
                y[:n, :, own], h_n[:, own], c_n[:, own] = super()._run(
                    x[:n, own], w, r, b, None, h[:, own], c[:, own], **options
                )
            return y, h_n, c_n

    def run(path, *inputs):
        model = onnx.load(path)
        names = [i.name for i in model.graph.input]
        given = dict(zip(names, [t.numpy() for t in inputs], strict=True))
        out = ReferenceEvaluator(model, new_ops=[LSTM]).run(None, given)
        return [torch.from_numpy(a) for a in out], [node.op_type for node in model.graph.node]

    return run


WITHOUT_PROJECTION = [options for options in OPTIONS if "proj_size" not in options]


@pytest.mark.parametrize("options", WITHOUT_PROJECTION, ids=str)
def test_onnx_as_torchs(evaluated, tmp_path, options):
    own, stock = pair(torch.float32, **options)
    x, path = sequences(own, torch.float32)[0], tmp_path / "lstm.onnx"
    batch = {0 if own.batch_first else 1: Dim.DYNAMIC}
    for how in (
        {},
        {"dynamic_shapes": (batch,)},
        {"dynamo": False},
    ):
        nodes = []
        for layer in (own, stock):
            torch.onnx.export(layer, (x,), path, verbose=False, **how)
            out, found = evaluated(path, x)
            nodes.append(found)
            y, states = stock(x)
            for a, b in zip(out, (y, *states), strict=True):
                torch.testing.assert_close(a, b)
        assert len(nodes[0]) == len(nodes[1]), how
        assert nodes[0].count("LSTM") == own.num_layers


@pytest.mark.extra
@pytest.mark.parametrize("options", WITHOUT_PROJECTION, ids=str)
def test_onnx_for_any_sizes(evaluated, tmp_path, options):
    own, stock = pair(torch.float32, **options)
    path = tmp_path / "lstm.onnx"
    x, hx, lengths = sequences(own, torch.float32)
    more_x, more_hx, more_lengths = sequences(own, torch.float32, (7, 6))
    torch.onnx.export(own, (x,), path, verbose=False, dynamic_shapes=(FREE,))
    out, nodes = evaluated(path, more_x)
    assert nodes.count("LSTM") == own.num_layers
    y, states = stock(more_x)
    for a, b in zip(out, (y, *states), strict=True):
        torch.testing.assert_close(a, b)
    dynamic = {"input": FREE, "hx": ({1: Dim.DYNAMIC},) * 2, "lengths": {0: Dim.DYNAMIC}}
    given = {"hx": hx, "lengths": lengths}
    torch.onnx.export(own, (x,), path, kwargs=given, verbose=False, dynamic_shapes=dynamic)
    out, nodes = evaluated(path, more_x, *more_hx, more_lengths)
    assert nodes.count("LSTM") == own.num_layers
    y, states = packed(stock, more_x, more_hx, more_lengths)
    for a, b in zip(out, (y, *states), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.extra
@pytest.mark.parametrize("options", WITHOUT_PROJECTION, ids=str)
def test_onnx_by_a_trace_for_any_sizes(evaluated, tmp_path, options):
    own, stock = pair(torch.float32, **options)
    path = tmp_path / "lstm.onnx"
    x, hx, lengths = sequences(own, torch.float32)
    inputs = x, hx, lengths
    names = ["x", "h", "c", "lengths"]
    free = {"x": {0: "a", 1: "b"}, "h": {1: "n"}, "c": {1: "n"}, "lengths": {0: "n"}}
    torch.onnx.export(own, inputs, path, dynamo=False, input_names=names, dynamic_axes=free)
    x, hx, lengths = sequences(own, torch.float32, (7, 6))
    out, _ = evaluated(path, x, *hx, lengths)
    y, states = packed(stock, x, hx, lengths)
    for a, b in zip(out, (y, *states), strict=True):
        torch.testing.assert_close(a, b)


def test_onnx_of_what_it_does_not_have(evaluated, tmp_path):
    path, x = tmp_path / "lstm.onnx", torch.randn(5, 3, INPUTS)
    for options in ({"proj_size": 2}, {"layer_norm": True}, {"zoneout": 0.1}):
        own = nn.LSTM(INPUTS, HIDDEN, **options).eval()
        torch.onnx.export(own, (x,), path, verbose=False)
        out, nodes = evaluated(path, x)
        assert "LSTM" not in nodes
        y, states = own(x)
        for a, b in zip(out, (y, *states), strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(Exception, match=r"static|constant"):  # not a graph of five steps
            torch.onnx.export(own, (x,), path, verbose=False, dynamic_shapes=(FREE,))
        with pytest.raises(RuntimeError, match="export with dynamo=True"):
            torch.onnx.export(own, (x,), path, dynamo=False)


def test_onnx_of_a_cell(evaluated, tmp_path):
    path, x = tmp_path / "cell.onnx", torch.randn(3, INPUTS)
    own, stock = nn.LSTMCell(INPUTS, HIDDEN), torch.nn.LSTMCell(INPUTS, HIDDEN)
    stock.load_state_dict(own.state_dict())
    for how in ({}, {"dynamo": False}):
        nodes = []
        for layer in (own, stock):
            torch.onnx.export(layer, (x,), path, verbose=False, **how)
            out, found = evaluated(path, x)
            nodes.append(len(found))
            torch.testing.assert_close(tuple(out), stock(x))
        assert nodes[0] == nodes[1]


@pytest.mark.extra
@pytest.mark.parametrize(("name", "options"), ZOO, ids=str)
def test_onnx_of_the_zoo(evaluated, tmp_path, name, options):
    model, path = zoo_model(name, options), tmp_path / "model.onnx"
    tokens, more = torch.randint(7, (5, 3)), torch.randint(7, (8, 6))
    torch.onnx.export(model, (tokens,), path, verbose=False, dynamic_shapes=(FREE,))
    out, nodes = evaluated(path, more)
    assert nodes.count("LSTM") == 2
    expected = model(more)[0] if name == "lstm_lm" else model(more)
    torch.testing.assert_close(out[0], expected)
    torch.onnx.export(model, (tokens,), path, dynamo=False)
    out, nodes = evaluated(path, tokens)
    assert nodes.count("LSTM") == 2
    expected = model(tokens)[0] if name == "lstm_lm" else model(tokens)
    torch.testing.assert_close(out[0], expected)


@pytest.mark.parametrize("proj_size", [0, 3])
def test_exports_lengths_under_autocast(proj_size):
    layer = nn.LSTM(INPUTS, HIDDEN, proj_size=proj_size)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = layer

        def forward(self, x, lengths):
            return self.lstm(x, None, lengths)

    x, lengths = torch.randn(5, 3, INPUTS), torch.tensor([5, 2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        y, states = torch.export.export(Model(), (x, lengths)).module()(x, lengths)
        expected, expected_states = layer(x, None, lengths)
    for found, wanted in zip((y, *states), (expected, *expected_states), strict=True):
        torch.testing.assert_close(found, wanted)
