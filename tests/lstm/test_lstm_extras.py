"""What nn.LSTM has beyond torch's: layer norm, zoneout, recurrent dropout, forget bias.

Each against the same step by step in a text of its own, `by_steps`, which is given the masks that were drawn.
"""

import importlib
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import assert_accurate, f64
from support.lstm import Case, exactly, gradients, make_problem

import advdl_ops
from advdl_ops import nn

# Not the function of the same name.
functional = importlib.import_module("advdl_ops.functional.lstm")

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "plain": Case(5, 4, 6, 9),
    "one step": Case(1, 1, 3, 5),
    "projection": Case(4, 3, 5, 17, projection=6),
    "no bias": Case(4, 3, 5, 17, bias=False, states=False),
    "bidirectional": Case(4, 5, 6, 8, bidirectional=True, layers=2, batch_first=True),
    "lengths": Case(6, 5, 6, 8, bidirectional=True, lengths=(4, 6, 1, 3, 6)),
}
OPTIONS = {
    "layer norm": {"layer_norm": True},
    "zoneout": {"zoneout": 0.35},
    "zoneout of c": {"zoneout": (0.4, 0.0)},
    "zoneout of h": {"zoneout": (0.0, 0.4)},
    "recurrent dropout": {"recurrent_dropout": 0.4},
    "all": {"layer_norm": True, "zoneout": (0.3, 0.2), "recurrent_dropout": 0.3},
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)
EVERY_OPTION = pytest.mark.parametrize("option", OPTIONS)
TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@pytest.fixture
def drawn(monkeypatch):
    """The masks of each call, in the order of layers and directions: recurrent, of the cell, of h."""
    found = []
    for name in ("_dropout_mask", "_zoneout_mask"):
        original = getattr(functional, name)

        def spy(*arguments, original=original):
            found.append(original(*arguments))
            return found[-1]

        monkeypatch.setattr(functional, name, spy)
    return found


def make_module(case, options, dtype, train, kind=nn.LSTM):
    module = case.module(kind, dtype=dtype, **options)
    # What a norm starts with, 1 and 0, hides mistakes.
    for name, t in module.named_parameters():
        if "_ln_" in name:
            torch.nn.init.uniform_(t, 0.5, 1.5)
    return module.train(train)


def by_steps(module, case, x, hx, masks, eps=1e-5):
    """One sequence after another, one step after another: nothing is shared with the package."""
    weights = dict(module.named_parameters())
    rates = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout,) * 2
    x = x if case.batch_first else x.transpose(0, 1)
    finals = [[], []]
    for layer in range(case.layers):
        sides = []
        for direction in range(case.directions):
            k = layer * case.directions + direction
            w = {
                n.removesuffix("_reverse").rpartition("_l")[0]: t
                for n, t in weights.items()
                if n.endswith(f"_l{layer}" + "_reverse" * direction)
            }
            states = [x.new_zeros(case.batch, n) for n in (case.size, case.hidden)]
            if hx is not None:
                states = [hx[0][k], hx[1][k]]
            own = masks[3 * k : 3 * k + 3] if masks else (None,) * 3
            rows, last = [], []
            for b in range(case.batch):
                length = case.lengths[b] if case.lengths else case.steps
                given = x[b], states[0][b], states[1][b], w, rates, own, b, length, direction == 1
                y, h, c = sequence(*given, case, eps)
                rows.append(y)
                last.append((h, c))
            sides.append(torch.stack(rows))
            for i in range(2):
                finals[i].append(torch.stack([pair[i] for pair in last]))
        x = torch.cat(sides, 2)
    y = x if case.batch_first else x.transpose(0, 1)
    return y, (torch.stack(finals[0]), torch.stack(finals[1]))


def sequence(x, h, c, w, rates, masks, b, length, reverse, case, eps):
    recurrent, *keeps = masks
    outputs = [torch.zeros_like(h)] * len(x)
    for t in reversed(range(length)) if reverse else range(length):
        seen = h if recurrent is None else h * recurrent[b]
        own, fed = w["weight_ih"] @ x[t], w["weight_hh"] @ seen
        if "weight_ln_ih" in w:
            own = F.layer_norm(own, own.shape, w["weight_ln_ih"], w["bias_ln_ih"], eps)
            fed = F.layer_norm(fed, fed.shape, w["weight_ln_hh"], w["bias_ln_hh"], eps)
        z = own + fed + w.get("bias_ih", 0) + w.get("bias_hh", 0)
        i, f, g, o = z.view(4, -1)
        cell = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = cell
        if "weight_ln_c" in w:
            shown = F.layer_norm(cell, cell.shape, w["weight_ln_c"], w["bias_ln_c"], eps)
        hidden = torch.sigmoid(o) * torch.tanh(shown)
        hidden = w["weight_hr"] @ hidden if "weight_hr" in w else hidden
        at = (b, t) if case.batch_first else (t, b)
        news = []
        for old, new, rate, keep in zip((c, h), (cell, hidden), rates, keeps, strict=True):
            share = rate if keep is None else keep[at].to(new)
            news.append(share * old + (1 - share) * new)
        c, h = news
        outputs[t] = h
    return torch.stack(outputs), h, c


def run(module, case, p):
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    parameters = dict(module.named_parameters())
    return gradients(p, lambda x, hx: module(x, hx, lengths=lengths), parameters)


@TRAIN
@EVERY_OPTION
@EVERY_CASE
def test_step_by_step(backend, drawn, case, option, train):
    case = CASES[case]
    p = make_problem(case, f64)
    module = make_module(case, OPTIONS[option], f64, train)
    found = run(module, case, p)
    masks = list(drawn)
    assert len(masks) == (3 * case.layers * case.directions if train else 0)
    exact = gradients(
        p, lambda x, hx: by_steps(module, case, x, hx, masks), dict(module.named_parameters())
    )
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EVERY_OPTION
def test_rounding(drawn, option, dtype):
    """The error is at most that of the text step by step in the same dtype, plus a few roundings."""
    for case in (CASES["plain"], CASES["projection"], CASES["lengths"]):
        p = make_problem(case, dtype)
        module = make_module(case, OPTIONS[option], dtype, True)
        drawn.clear()
        found = run(module, case, p)
        masks = list(drawn)
        wide = make_module(case, OPTIONS[option], f64, True)
        wide.load_state_dict(module.state_dict())
        # In wider arithmetic the same masks: those of recurrent dropout as they were rounded.
        exact = gradients(
            p.to(f64),
            lambda x, hx, m=wide, c=case, k=masks: by_steps(m, c, x, hx, [to64(t) for t in k]),
            dict(wide.named_parameters()),
        )
        plain = gradients(
            p,
            lambda x, hx, m=module, c=case, k=masks: by_steps(m, c, x, hx, k),
            dict(module.named_parameters()),
        )
        sizes = exactly(p)[1]
        widest = max(sizes.values())
        for name, t in found.items():
            assert t.dtype == dtype
            size = sizes.get(name, widest)
            assert_accurate(t, exact[name], plain[name], size, (name, option, case))


def to64(mask):
    return mask.to(f64) if mask is not None and mask.is_floating_point() else mask


def test_off_is_off(backend, drawn):
    """With every rate 0 nothing is drawn, and the generator stays where it is."""
    module = nn.LSTM(
        4, 5, 2, zoneout=0.0, recurrent_dropout=0.0, layer_norm=False, forget_bias=None
    )
    x = torch.randn(3, 2, 4)
    state = torch.get_rng_state()
    module(x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(mask is None for mask in drawn)
    assert module.state_dict().keys() == torch.nn.LSTM(4, 5, 2).state_dict().keys()


def test_evaluation_draws_nothing():
    module = nn.LSTM(4, 5, 2, dropout=0.5, zoneout=0.3, recurrent_dropout=0.3).eval()
    x = torch.randn(3, 2, 4)
    state = torch.get_rng_state()
    first, again = module(x)[0], module(x)[0]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    # Dropout is the identity in evaluation.
    module.dropout = module.recurrent_dropout = 0.0
    assert torch.equal(first, module(x)[0])


def test_a_seed_reproduces_the_masks(backend):
    module = nn.LSTM(4, 6, 2, dropout=0.3, zoneout=0.3, recurrent_dropout=0.3, bidirectional=True)
    x = torch.randn(5, 3, 4)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(module(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_both_backends_draw_the_same_masks():
    module = nn.LSTM(4, 6, 2, dropout=0.3, zoneout=0.3, recurrent_dropout=0.3, dtype=f64)
    x = torch.randn(5, 3, 4, dtype=f64)
    outputs = []
    for name in ("fused", "reference"):
        torch.manual_seed(1)
        with advdl_ops.use_backend(name):
            outputs.append(module(x))
    torch.testing.assert_close(*outputs)


def spread(rate, count):
    """Five standard deviations of the share of `count` draws."""
    return 5 * (rate * (1 - rate) / count) ** 0.5


@pytest.mark.parametrize("rates", [(0.1, 0.6), (0.5, 0.25)])
def test_statistics_of_the_masks(drawn, rates):
    case = Case(20, 16, 3, 64, projection=32, batch_first=True)
    module = case.module(nn.LSTM, zoneout=rates, recurrent_dropout=0.3)
    module(torch.randn(16, 20, 3))
    recurrent, of_c, of_h = drawn
    assert recurrent.shape == (16, 32)
    assert of_c.shape == (16, 20, 64)
    assert of_h.shape == (16, 20, 32)
    assert of_c.dtype == of_h.dtype == torch.uint8
    for mask, rate in zip((of_c, of_h), rates, strict=True):
        assert mask.max() <= 1
        kept = mask.double()
        assert abs(kept.mean() - rate) < spread(rate, mask.numel())
        # Each step, each sequence and each unit has draws of its own.
        for dim in range(3):
            axis = kept.mean([d for d in range(3) if d != dim])
            assert (axis - rate).abs().max() < spread(rate, mask.numel() / mask.shape[dim])
            assert not torch.equal(kept.select(dim, 0), kept.select(dim, 1))
    values = recurrent.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    dropped = recurrent.eq(0).double()
    assert abs(dropped.mean() - 0.3) < spread(0.3, recurrent.numel())
    assert not torch.equal(dropped[0], dropped[1])


def test_zoneout_kept_units(drawn):
    """A unit of h that is kept has the very value of the step before."""
    module = nn.LSTM(3, 8, zoneout=(0.0, 0.5))
    y, _ = module(torch.randn(6, 4, 3))
    keep = drawn[2].bool()
    before = torch.cat([torch.zeros(1, 4, 8), y[:-1]])
    assert torch.equal(y[keep], before[keep])
    assert not (y == before)[~keep].any()


def test_recurrent_dropout_is_one_mask_for_all_steps(drawn):
    """A unit that is dropped never reaches the next step: its column of w_hh gets no gradient."""
    module = nn.LSTM(3, 8, recurrent_dropout=0.5)
    y, _ = module(torch.randn(6, 1, 3))
    y.sum().backward()
    dropped = drawn[0][0] == 0
    assert 0 < dropped.sum() < 8
    columns = module.weight_hh_l0.grad.abs().sum(0)
    assert torch.equal(columns == 0, dropped)


@TRAIN
@pytest.mark.parametrize("rate", [1.0, 1])
def test_rates_of_one(backend, rate, train):
    """Zoneout keeps the initial states; recurrent dropout leaves the input alone."""
    x, hx = torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    module = nn.LSTM(3, 5, zoneout=rate).train(train)
    y, (h, c) = module(x, hx)
    assert torch.equal(h, hx[0])
    assert torch.equal(c, hx[1])
    assert torch.equal(y, hx[0].expand(4, 2, 5))
    module = nn.LSTM(3, 5, recurrent_dropout=rate).train(train)
    y, _ = module(x, hx)
    assert y.isfinite().all()
    if train:
        with torch.no_grad():
            module.weight_hh_l0.fill_(9)
        assert torch.equal(y, module(x, hx)[0])


def test_the_expectation_of_zoneout():
    """Of one step it is exact: the mean over masks is what evaluation returns."""
    module = nn.LSTM(3, 5, zoneout=(0.3, 0.6), dtype=f64)
    x = torch.randn(1, 1, 3, dtype=f64)
    hx = torch.randn(2, 1, 1, 5, dtype=f64).unbind()
    count = 40000
    many = [t.expand(1, count, -1) for t in (x, *hx)]
    _, states = module(many[0], (many[1], many[2]))
    _, expected = module.eval()(x, hx)
    for found, exact in zip(states, expected, strict=True):
        deviation = found.std(1) / count**0.5
        assert ((found.mean(1) - exact[:, 0]).abs() < 5 * deviation).all()


def test_zoneout_of_packed_sequences(backend):
    """Rows of the masks are those of the packed data; in evaluation it is as with lengths."""
    case = replace(CASES["lengths"], layers=2)
    module = make_module(case, OPTIONS["all"], f64, False)
    p = make_problem(case, f64)
    padded, states = module(p.x, p.hx, lengths=case.lengths)
    packed = torch.nn.utils.rnn.pack_padded_sequence(p.x, case.lengths, enforce_sorted=False)
    y, packed_states = module(packed, p.hx)
    unpacked, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
    torch.testing.assert_close(unpacked, padded)
    torch.testing.assert_close(packed_states, states)
    torch.manual_seed(1)
    first = module.train()(packed, p.hx)[0].data
    torch.manual_seed(1)
    assert torch.equal(first, module(packed, p.hx)[0].data)


def test_zoneout_packed_by_steps(drawn):
    """Packed, with masks: each row against the text for its sequence."""
    case = Case(4, 3, 3, 5, lengths=(4, 3, 1), states=False)
    module = make_module(case, {"zoneout": 0.4}, f64, True)
    p = make_problem(case, f64)
    packed = torch.nn.utils.rnn.pack_padded_sequence(p.x, case.lengths)
    y, states = module(packed)
    masks = [None]
    for mask in drawn[1:3]:
        rows = torch.nn.utils.rnn.PackedSequence(mask, packed.batch_sizes)
        masks.append(torch.nn.utils.rnn.pad_packed_sequence(rows)[0])
    expected, expected_states = by_steps(module, case, p.x, None, masks)
    torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(y)[0], expected)
    torch.testing.assert_close(states, expected_states)


@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 3}]
)
def test_parameters_of_layer_norm(options):
    module = nn.LSTM(4, 5, layer_norm=True, **options)
    plain = torch.nn.LSTM(4, 5, **options)
    of_torch = plain.state_dict()
    state = module.state_dict()
    suffixes = [n.removeprefix("weight_ih") for n in of_torch if n.startswith("weight_ih")]
    expected = {
        f"{role}_ln_{kind}{suffix}": size
        for suffix in suffixes
        for kind, size in (("ih", 20), ("hh", 20), ("c", 5))
        for role in ("weight", "bias")
    }
    assert state.keys() == of_torch.keys() | expected.keys()
    for name, size in expected.items():
        fill = 1.0 if name.startswith("weight") else 0.0
        assert torch.equal(state[name], torch.full((size,), fill)), name
    # Torch's own come first, and are drawn as without.
    assert list(state)[: len(of_torch)] == list(of_torch)
    torch.manual_seed(3)
    plain.reset_parameters()
    torch.manual_seed(3)
    again = nn.LSTM(4, 5, layer_norm=True, **options)
    for name, t in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    for t in module.parameters():
        torch.nn.init.constant_(t, 7)
    module.reset_parameters()
    for name, size in expected.items():
        fill = 1.0 if name.startswith("weight") else 0.0
        assert torch.equal(module.state_dict()[name], torch.full((size,), fill)), name
    assert [t.shape for t in module._flat_weights] == [
        t.shape for own in module.all_weights for t in own
    ]


def forget(t):
    return t.view(4, -1)[1]


@pytest.mark.parametrize("value", [1.0, 0.0, -2.5, 1])
def test_forget_bias(value):
    torch.manual_seed(5)
    module = nn.LSTM(4, 5, 2, bidirectional=True, forget_bias=value)
    torch.manual_seed(5)
    plain = torch.nn.LSTM(4, 5, 2, bidirectional=True)
    cell = nn.LSTMCell(4, 5, forget_bias=value)
    for own in (module, cell):
        for _ in range(2):
            names = [n for n, _ in own.named_parameters() if n.startswith("bias")]
            assert names
            for name in names:
                fill = float(value) if "ih" in name else 0.0
                assert torch.equal(forget(own.get_parameter(name)), torch.full((5,), fill)), name
            torch.nn.init.constant_(own.get_parameter(names[0]), 3)
            own.reset_parameters()
    # The rest is torch's; and loaded weights stay as they are.
    torch.manual_seed(5)
    module.reset_parameters()
    for name, t in plain.state_dict().items():
        own = module.get_parameter(name).detach().clone()
        if name.startswith("bias"):
            forget(own).copy_(forget(t))
        assert torch.equal(own, t), name
    module.load_state_dict(plain.state_dict())
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(module(x), plain(x))


def test_layer_norm_makes_the_scale_of_the_weights_no_matter():
    """What it is for: w_ih and w_hh may be of any size."""
    module = nn.LSTM(4, 6, layer_norm=True, dtype=f64)
    x = torch.randn(5, 2, 4, dtype=f64)
    before = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.mul_(50)
        module.weight_ih_l0.mul_(20)
    torch.testing.assert_close(module(x)[0], before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_eps_reaches_every_norm(backend, eps):
    """eps is functional.lstm's own argument."""
    case = Case(3, 2, 4, 5)
    module = make_module(case, {"layer_norm": True}, f64, False)
    p = make_problem(case, f64)
    weights = module._flat_weights

    def run(x, hx):
        y, *states = functional.lstm(
            x, hx, weights, True, 1, 0.0, False, False, layer_norm=True, eps=eps
        )
        return y, tuple(states)

    parameters = dict(module.named_parameters())
    exact = gradients(p, lambda x, hx: by_steps(module, case, x, hx, None, eps), parameters)
    torch.testing.assert_close(gradients(p, run, parameters), exact)


def test_all_options_in_every_dtype_and_layout(backend):
    for dtype, batch_first, packed in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True)
    ):
        case = replace(CASES["lengths"], batch_first=batch_first, layers=2, projection=3)
        module = make_module(case, {**OPTIONS["all"], "forget_bias": 1.0}, dtype, True)
        p = make_problem(case, dtype)
        if packed:
            x = torch.nn.utils.rnn.pack_padded_sequence(
                p.x, case.lengths, batch_first, enforce_sorted=False
            )
            y = module(x, p.hx)[0].data
        else:
            y = module(p.x, p.hx, lengths=case.lengths)[0]
        y.float().square().sum().backward()
        for name, t in module.named_parameters():
            assert t.grad.isfinite().all(), name
            assert t.grad.dtype == dtype
