"""The models of tokens: what every model must do, and each restated on torch.nn.LSTM to compare with."""

import copy
import re
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import f64
from support.models import ModelTester, check_compiled, randomize, relative_error
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from advdl_ops import models

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 11
SMALL = {"embedding_dim": 7, "hidden_size": 6}


def random_tokens(*shape, vocabulary=VOCABULARY, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


class TokenTester(ModelTester):
    """Tokens have no gradient, no channels and no dtype of their own."""

    input_shape = (3, 6)  # rows are sequences, as the tests of every model expect it
    odd_shapes = ((1, 1), (2, 1), (1, 17), (0, 4))
    test_channels_last = None

    def input(self, dtype=None, shape=None):
        return random_tokens(*(shape or self.input_shape), vocabulary=self.num_classes)

    def test_gradient_for_every_parameter(self, model):
        self.scores(model(self.input())).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_double_backward(self, model):
        weight = model.embedding.weight
        out = self.scores(model(self.input()))
        (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        grad.square().sum().backward()
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().max() > 0


class TestLSTMClassifier(TokenTester):
    name = "lstm_classifier"
    options: ClassVar = {**SMALL, "vocabulary": 5, "dropout": 0.0, "batch_first": True}


class TestLSTMClassifierLast(TestLSTMClassifier):
    """The last states, two layers, one direction, layer norm: all at once."""

    options: ClassVar = {
        **TestLSTMClassifier.options,
        "pool": "last",
        "num_layers": 2,
        "bidirectional": False,
        "layer_norm": True,
        "forget_bias": 1.0,
    }


class TestLSTMTagger(TokenTester):
    name = "lstm_tagger"
    options: ClassVar = TestLSTMClassifier.options

    def output_shape(self, shape):
        return (*shape, self.num_classes)


class TestLSTMLM(TestLSTMTagger):
    name = "lstm_lm"
    options: ClassVar = {**SMALL, "dropout": 0.0, "batch_first": True}

    def scores(self, output):
        return output[0]


class TestLSTMLMTied(TestLSTMLM):
    options: ClassVar = {
        **TestLSTMLM.options,
        "tie_weights": True,
        "embedding_dim": 6,
        "num_layers": 1,
        "padding_idx": 0,
    }


# ---------------------------------------------------------------- restated on torch.nn.LSTM


class Reference(torch.nn.Module):
    """Embedding, packed torch.nn.LSTM, linear; called as the model that it restates, whose weights it takes."""

    def __init__(self, of):
        super().__init__()
        vocabulary, features = of.embedding.weight.shape
        self.embedding = torch.nn.Embedding(vocabulary, features, of.embedding.padding_idx)
        options = {name: getattr(of.lstm, name) for name in ("batch_first", "bidirectional")}
        self.lstm = torch.nn.LSTM(features, of.lstm.hidden_size, of.lstm.num_layers, **options)
        self.linear = torch.nn.Linear(of.linear.in_features, of.linear.out_features)
        self.rate, self.pool = of.dropout.p, getattr(of, "pool", None)
        self.gives_states = isinstance(of, models.LSTMLM)
        self.tied = "linear.weight" not in of.state_dict()
        if self.tied:
            del self.linear.weight
        self.load_state_dict(of.state_dict())
        self.double()

    def forward(self, tokens, hx=None, *, lengths):
        batch_first = self.lstm.batch_first
        x = F.dropout(self.embedding(tokens), self.rate, self.training)
        packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        y, states = self.lstm(packed, hx)
        steps = tokens.shape[1 if batch_first else 0]
        y, _ = pad_packed_sequence(y, batch_first, total_length=steps)
        if self.pool == "last":
            y = torch.cat(tuple(states[0].unflatten(0, (self.lstm.num_layers, -1))[-1]), 1)
        elif self.pool is not None:
            rows = zip(y if batch_first else y.unbind(1), lengths, strict=True)
            mean = self.pool == "mean"
            y = torch.stack([r[:n].mean(0) if mean else r[:n].max(0).values for r, n in rows])
        y = F.dropout(y, self.rate, self.training)
        weight = self.embedding.weight if self.tied else self.linear.weight
        scores = F.linear(y, weight, self.linear.bias)
        return (scores, states) if self.gives_states else scores


def built(name, **options):
    sizes = {} if name == "lstm_lm" else {"vocabulary": VOCABULARY}
    classes = VOCABULARY if name == "lstm_lm" else 4
    torch.manual_seed(0)
    model = models.create_model(name, num_classes=classes, **{**SMALL, **sizes, **options})
    return randomize(model).double()


KINDS = [
    ("lstm_classifier", {"pool": "max"}),
    ("lstm_classifier", {"pool": "mean"}),
    ("lstm_classifier", {"pool": "last"}),
    ("lstm_classifier", {"pool": "last", "bidirectional": False}),
    ("lstm_tagger", {}),
    ("lstm_tagger", {"padding_idx": 3}),
    ("lstm_lm", {}),
    ("lstm_lm", {"tie_weights": True, "embedding_dim": 6}),
]
EVERY = pytest.mark.parametrize(
    ("name", "options"), KINDS, ids=[f"{n[5:]}-{'-'.join(map(str, o.values()))}" for n, o in KINDS]
)
LENGTHS = [4, 9, 1, 6]


def example(batch_first, lengths=LENGTHS):
    """Tokens of every length, with other tokens where they have ended."""
    tokens = random_tokens(max(lengths), len(lengths))
    return tokens.T.contiguous() if batch_first else tokens


def random_like(t, seed=1):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def assert_close(found, expected, what=""):
    assert found.shape == expected.shape, what
    assert relative_error(found, expected) < 1e-10, what


@EVERY
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
def test_equals_torch(name, options, num_layers, batch_first):
    """Scores, states, every gradient and the parameters after a step; with dropout where all of it can be alike."""
    dropout = 0.4 if num_layers == 1 else 0.0  # the two draw other masks between layers
    options = {**options, "num_layers": num_layers, "batch_first": batch_first, "dropout": dropout}
    model = built(name, **options)
    language = name == "lstm_lm"
    hx = [torch.randn(2, num_layers, 4, 6, dtype=f64).unbind()] if language else []
    results = []
    for each in (model, Reference(model)):
        torch.manual_seed(1)
        out = each(example(batch_first), *hx, lengths=LENGTHS)
        outs = [out[0], *out[1]] if language else [out]
        sum((t * random_like(t)).sum() for t in outs).backward()
        found = {f"output {i}": t.detach() for i, t in enumerate(outs)}
        found |= {f"gradient of {key}": p.grad for key, p in each.named_parameters()}
        torch.optim.SGD(each.parameters(), 0.1).step()
        results.append(found | {key: p.detach() for key, p in each.named_parameters()})
    found, expected = results
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert_close(found[key], value, key)


def test_dropout_is_where_the_paper_has_it():
    """Between layers where there are several; on embeddings and outputs `test_equals_torch` sees it."""
    for layers, between in ((1, 0.0), (3, 0.3)):
        model = built("lstm_tagger", dropout=0.3, num_layers=layers)
        assert (model.dropout.p, model.lstm.dropout) == (0.3, between)
    tokens = example(False)
    torch.manual_seed(0)
    first, second = model(tokens), model(tokens)
    assert relative_error(first.detach(), second.detach()) > 1e-3
    assert torch.equal(model.eval()(tokens), model(tokens))


# ---------------------------------------------------------------- padding


def parts(model, tokens, lengths=None, hx=None):
    """The model's scores `[N, ...]` of each sequence, cut to its length, and its states as `[N, ...]`."""
    more = (hx,) if isinstance(model, models.LSTMLM) else ()
    out = model(tokens, *more, lengths=lengths)
    scores, states = out if more else (out, ())
    if not isinstance(model, models.LSTMClassifier):
        scores = scores if model.lstm.batch_first else scores.transpose(0, 1)
        scores = [row[:n] for row, n in zip(scores, lengths or [scores.shape[1]], strict=True)]
    return scores, [t.transpose(0, 1) for t in states]


@EVERY
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("extras", [{}, {"layer_norm": True, "zoneout": 0.2, "num_layers": 2}])
def test_padding_changes_nothing(name, options, batch_first, extras):
    """A padded batch is each of its sequences alone: scores, states and the sum of all gradients."""
    model = built(name, **options, **extras, batch_first=batch_first).eval()
    tokens = example(batch_first)
    hx = torch.randn(2, extras.get("num_layers", 2), 4, 6, dtype=f64)
    if name == "lstm_lm" and not extras:
        hx = hx[:, : model.lstm.num_layers]
    padded, padded_states = parts(model, tokens, LENGTHS, tuple(hx))
    outers = [random_like(t, seed) for seed, t in enumerate(padded)]
    sum((row * outer).sum() for row, outer in zip(padded, outers, strict=True)).backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    model.zero_grad()
    for b, n in enumerate(LENGTHS):
        own = tokens[b : b + 1, :n] if batch_first else tokens[:n, b : b + 1]
        alone, states = parts(model, own, None, tuple(hx[:, :, b : b + 1].contiguous()))
        assert_close(padded[b], alone[0], b)
        for t, end in zip(padded_states, states, strict=True):
            assert_close(t[b], end[0], b)
        (alone[0] * outers[b]).sum().backward()
    for key, p in model.named_parameters():
        assert_close(gradients[key], p.grad, key)


@EVERY
def test_the_tokens_of_the_padding_are_never_seen(name, options):
    model = built(name, **options, dropout=0.0)
    tokens = example(False)
    other = tokens.clone()
    for b, n in enumerate(LENGTHS):
        other[n:, b] = (other[n:, b] + 1) % VOCABULARY
    results = []
    for each in (tokens, other):
        model.zero_grad()
        scores, states = parts(model, each, LENGTHS)
        sum(row.square().sum() for row in scores).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([*(row.detach() for row in scores), *states, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EVERY
def test_lengths_of_all_steps_are_none(name, options):
    model = built(name, **options).eval()
    tokens = random_tokens(5, 3)
    plain, padded = parts(model, tokens, [5] * 3)[0], model(tokens)
    padded = padded[0] if name == "lstm_lm" else padded
    if name != "lstm_classifier":
        plain = torch.stack(plain, 1)
    assert_close(plain, padded)


def test_padding_idx():
    model = models.lstm_tagger(vocabulary=5, **SMALL, padding_idx=2, dropout=0.0)
    weight = model.embedding.weight
    assert (weight[2] == 0).all()
    assert (weight[[0, 1, 3, 4]] != 0).all()
    model(torch.arange(5).unsqueeze(1)).square().sum().backward()
    assert (weight.grad[2] == 0).all()
    assert weight.grad[3].abs().max() > 0


# ---------------------------------------------------------------- the language model


@pytest.mark.parametrize("batch_first", [False, True])
def test_one_token_a_call_is_the_whole(batch_first):
    model = built("lstm_lm", batch_first=batch_first, layer_norm=True).eval()
    tokens = random_tokens(2, 7) if batch_first else random_tokens(7, 2)
    time = 1 if batch_first else 0
    whole, ends = model(tokens)
    states, steps = None, []
    for t in tokens.split(1, time):
        scores, states = model(t, states)
        steps.append(scores)
    assert_close(torch.cat(steps, time), whole)
    for state, end in zip(states, ends, strict=True):
        assert_close(state, end)


@pytest.mark.parametrize("tie_weights", [False, True])
def test_it_learns_a_sentence_and_says_it(tie_weights):
    torch.manual_seed(0)
    model = models.lstm_lm(
        num_classes=20, embedding_dim=24, hidden_size=24, num_layers=1, dropout=0.0, tie_weights=tie_weights,
    )  # fmt: skip
    sentence = torch.tensor([1, 5, 7, 5, 2, 9, 5, 3, 19, 0])
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        scores, _ = model(sentence[:-1, None])
        F.cross_entropy(scores[:, 0], sentence[1:]).backward()
        optimizer.step()
    said, states = [sentence[0]], None
    for _ in sentence[1:]:
        scores, states = model(said[-1].view(1, 1), states)
        said.append(scores[0, 0].argmax())
    assert torch.equal(torch.stack(said), sentence)


def test_tied_weights_are_one_parameter_with_both_gradients():
    model = built("lstm_lm", tie_weights=True, embedding_dim=6, dropout=0.0)
    untied = built("lstm_lm", embedding_dim=6, dropout=0.0)
    shared = model.embedding.weight.detach().clone()
    untied.load_state_dict({**model.state_dict(), "linear.weight": shared})
    tokens = random_tokens(4, 2)
    for each in (model, untied):
        each(tokens)[0].square().sum().backward()
    both = untied.embedding.weight.grad + untied.linear.weight.grad
    assert_close(model.embedding.weight.grad, both)
    assert untied.linear.weight.grad.abs().max() > 0
    assert len(list(untied.parameters())) == len(list(model.parameters())) + 1


@pytest.mark.parametrize("tie_weights", [False, True])
def test_states_and_lengths_compiled(tie_weights):
    """One graph, whatever the lengths."""
    options = {"tie_weights": tie_weights, "embedding_dim": 6}
    model = built("lstm_lm", **options).eval()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    states = tuple(torch.randn(2, 2, 4, 6, dtype=f64))
    for lengths in (LENGTHS, [9, 9, 2, 5]):
        given = example(False), states
        scores, ends = compiled(*given, lengths=torch.tensor(lengths))
        expected, expected_ends = model(*given, lengths=torch.tensor(lengths))
        assert_close(scores, expected)
        for a, b in zip(ends, expected_ends, strict=True):
            assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_pooling_compiled_with_lengths(pool):
    model = built("lstm_classifier", pool=pool, dropout=0.0)
    check_compiled(Fixed(model, torch.tensor(LENGTHS)), example(False), "aot_eager")
    torch._dynamo.reset()


class Fixed(torch.nn.Module):
    """A model with its lengths."""

    def __init__(self, model, lengths):
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, tokens):
        return self.model(tokens, lengths=self.lengths)


# ---------------------------------------------------------------- keys, first values, weights files


LAYER = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
LINEAR = ["linear.weight", "linear.bias"]


def lstm_keys(*suffixes):
    return ["embedding.weight", *(f"lstm.{key}_{suffix}" for suffix in suffixes for key in LAYER)]


@pytest.mark.parametrize(
    ("name", "options", "keys"),
    [
        ("lstm_classifier", {}, [*lstm_keys("l0", "l0_reverse"), *LINEAR]),
        ("lstm_classifier", {"bidirectional": False}, [*lstm_keys("l0"), *LINEAR]),
        ("lstm_tagger", {}, [*lstm_keys("l0", "l0_reverse"), *LINEAR]),
        ("lstm_lm", {}, [*lstm_keys("l0", "l1"), *LINEAR]),
        ("lstm_lm", {"tie_weights": True}, [*lstm_keys("l0", "l1"), "linear.bias"]),
    ],
)
def test_keys(name, options, keys):
    with torch.device("meta"):
        assert list(models.create_model(name, **options).state_dict()) == keys


def test_parameter_count():
    """Zaremba's medium model of the Penn Treebank: "20M parameters"."""
    with torch.device("meta"):
        model = models.create_model("lstm_lm", num_classes=10_000)
        tied = models.create_model("lstm_lm", num_classes=10_000, tie_weights=True)
    assert sum(p.numel() for p in model.parameters()) == 19_780_400
    assert sum(p.numel() for p in tied.parameters()) == 13_280_400


def test_first_values():
    torch.manual_seed(0)
    model = models.lstm_lm(num_classes=300, embedding_dim=50, hidden_size=64, forget_bias=1.0)
    assert 0.099 < model.embedding.weight.abs().max() <= 0.1
    assert 0.124 < model.linear.weight.abs().max() <= 0.125
    assert 0.124 < model.lstm.weight_hh_l1.abs().max() <= 0.125
    assert (model.lstm.bias_ih_l0[64:128] == 1).all()


def test_extras_are_those_of_nn_lstm():
    extras = {"layer_norm": True, "zoneout": (0.1, 0.2), "recurrent_dropout": 0.3, "num_layers": 2}
    for name in ("lstm_classifier", "lstm_tagger", "lstm_lm"):
        lstm = built(name, **extras).lstm
        assert {key: getattr(lstm, key) for key in extras} == extras
        assert "weight_ln_c_l1" in dict(lstm.named_parameters())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@EVERY
def test_weights_file(tmp_path, name, options, suffix):
    model = built(name, **options).float()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    sizes = {} if name == "lstm_lm" else {"vocabulary": VOCABULARY}
    classes = model.linear.out_features
    loaded = models.create_model(
        name, num_classes=classes, **{**SMALL, **sizes, **options}, weights=path
    )
    assert list(loaded.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "tagger.pth"
    torch.save(built("lstm_tagger").state_dict(), path)
    with pytest.raises(ValueError, match=r"has 4 classes in linear\.weight, num_classes is 7"):
        models.lstm_tagger(num_classes=7, vocabulary=VOCABULARY, **SMALL, weights=path)
    # A model whose weights are tied has one for both: the file of another has one too many.
    path = tmp_path / "lm.pth"
    torch.save(built("lstm_lm", embedding_dim=6).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"must fit lstm_lm; unexpected keys \(1\): linear\.weight"
    ):
        models.lstm_lm(
            num_classes=VOCABULARY, embedding_dim=6, hidden_size=6, tie_weights=True, weights=path
        )


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["lstm_classifier", "lstm_tagger", "lstm_lm"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes (0) must be a positive integer"),
        ({"embedding_dim": 1.0}, ValueError, "embedding_dim (1.0) must be a positive integer"),
        ({"hidden_size": -1}, ValueError, "hidden_size (-1) must be a positive integer"),
        ({"num_layers": 0}, ValueError, "num_layers (0) must be a positive integer"),
        ({"batch_first": 1}, ValueError, "batch_first (1) must be True or False"),
        ({"layer_norm": "no"}, ValueError, "layer_norm ('no') must be True or False"),
        ({"dropout": 1.5}, ValueError, "dropout (1.5) must be within 0 and 1"),
        ({"dropout": None}, TypeError, "dropout (None) must be a number"),
        ({"num_classes": 5, "padding_idx": -1}, ValueError, "padding_idx (-1) must be a token, 0 "),
        ({"in_channels": 3}, TypeError, "option 'in_channels' must be one of batch_first, "),
        ({"dropouts": 0.1}, TypeError, "option 'dropouts' must be one of batch_first, "),
    ],
)
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=re.escape(f"{name}: {message}")):
        models.create_model(name, **options)


def test_bad_options_of_one():
    with pytest.raises(
        ValueError, match=r'^lstm_classifier: pool \(\'sum\'\) must be "max", "mean'
    ):
        models.lstm_classifier(pool="sum")
    with pytest.raises(
        ValueError, match=r"^lstm_lm: embedding_dim \(4\) must be hidden_size \(5\)"
    ):
        models.lstm_lm(num_classes=3, embedding_dim=4, hidden_size=5, tie_weights=True)
    with pytest.raises(ValueError, match=r"^lstm_lm: tie_weights \(None\) must be True or False"):
        models.lstm_lm(tie_weights=None)
    with pytest.raises(ValueError, match=r"^lstm_tagger: bidirectional \(2\) must be True or Fal"):
        models.lstm_tagger(bidirectional=2)
    with pytest.raises(ValueError, match=r"^lstm_tagger: vocabulary \(0\) must be a positive"):
        models.lstm_tagger(vocabulary=0)
    with pytest.raises(
        ValueError, match=r"^lstm_tagger: padding_idx \(5\) must be a token, 0 to 4"
    ):
        models.lstm_tagger(vocabulary=5, padding_idx=5)
    for option in ("vocabulary", "bidirectional", "pool"):
        with pytest.raises(TypeError, match=rf"^lstm_lm: option '{option}' must be .* tie_weights"):
            models.create_model("lstm_lm", **{option: 5})
    with pytest.raises(ValueError, match=r"^LSTM: zoneout \(2\) must be within 0 and 1"):
        models.lstm_lm(zoneout=2)


@pytest.mark.parametrize("name", ["lstm_classifier", "lstm_tagger", "lstm_lm"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_input(name, batch_first):
    model = built(name, batch_first=batch_first).train()
    layout = "[N, T]" if batch_first else "[T, N]"
    tokens = torch.zeros(3, 3, dtype=torch.int64)
    empty = torch.zeros((2, 0) if batch_first else (0, 2), dtype=torch.int64)
    assert torch.is_tensor(model.embedding(tokens.int()))
    before = torch.get_rng_state()
    for error, message, *given in (
        (RuntimeError, f"tokens (torch.float32) must be integers of {layout}", tokens.float()),
        (RuntimeError, f"tokens (torch.uint8) must be integers of {layout}", tokens.byte()),
        (ValueError, f"tokens (shape [3]) must be integers of {layout}", tokens[0]),
        (TypeError, "tokens (list) must be a Tensor", [[1, 2]]),
        (RuntimeError, f"tokens (shape {list(empty.shape)}) must have a step at least", empty),
        (RuntimeError, "lengths[1] (0) must be at least 1", tokens, [1, 0, 1]),
        (RuntimeError, "lengths[2] (4) must be at most the 3 steps of tokens", tokens, [1, 1, 4]),
        (RuntimeError, "lengths (2 values) must have one for each of the 3 ", tokens, [1, 1]),
        (RuntimeError, "lengths (dtype torch.float32) must be of", tokens, torch.ones(3)),
        (TypeError, "lengths[0] (1.0) must be an integer", tokens, [1.0, 1, 1]),
        (TypeError, "lengths (str) must be a Tensor or a list", tokens, "abc"),
    ):
        lengths = given[1] if len(given) > 1 else None
        with pytest.raises(error, match=re.escape(f"{name}: {message}")):
            model(given[0], lengths=lengths)
        assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(IndexError):
        model(tokens + VOCABULARY)
    assert model(tokens.int(), lengths=[1, 2, 3]) is not None
