"""LSTM and LSTMCell: first and second derivatives, what is saved for them, and that nothing else changes."""

import importlib
import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwd
from support.accuracy import f64
from support.lstm import Case, gradients, loaded, make_problem, ours, stock
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import pack_padded_sequence

from advdl_ops import nn
from advdl_ops.functional import lstm, lstm_cell

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = Case(3, 2, 2, 3)
# name -> the sizes, and options beyond torch's.
VARIANTS = {
    "plain": (PLAIN, {}),
    "one step": (Case(1, 1, 2, 3), {}),
    "no bias": (Case(3, 2, 2, 3, bias=False), {}),
    "no states": (Case(3, 2, 2, 3, states=False), {}),
    "batch_first": (Case(3, 2, 2, 3, batch_first=True), {}),
    "projection": (Case(3, 2, 2, 3, projection=2), {}),
    "lengths": (Case(3, 3, 2, 2, lengths=(2, 3, 1)), {}),
    "lengths, bidirectional": (Case(2, 2, 2, 2, lengths=(1, 2), bidirectional=True), {}),
    "bidirectional, two layers": (Case(2, 2, 2, 2, bidirectional=True, layers=2), {}),
    "layer norm": (PLAIN, {"layer_norm": True}),
    "layer norm, projection": (
        Case(2, 2, 2, 3, projection=2, lengths=(2, 1)),
        {"layer_norm": True},
    ),
    "layer norm, no bias": (Case(3, 2, 2, 3, bias=False), {"layer_norm": True}),
    "zoneout": (PLAIN, {"zoneout": (0.4, 0.3)}),
    "zoneout of c": (PLAIN, {"zoneout": (0.5, 0.0)}),
    "zoneout, projection": (Case(3, 2, 2, 3, projection=2), {"zoneout": 0.4}),
    "recurrent dropout": (PLAIN, {"recurrent_dropout": 0.4}),
    "dropout": (Case(2, 2, 2, 3, layers=2), {"dropout": 0.4}),
    "all": (
        Case(3, 2, 2, 3, projection=2, bidirectional=True, batch_first=True, lengths=(3, 2)),
        {"layer_norm": True, "zoneout": (0.3, 0.4), "recurrent_dropout": 0.3},
    ),
}
NAMES = pytest.mark.parametrize("name", VARIANTS)
TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def function_and_inputs(name, train=True, packed=False):
    """A function of the differentiable inputs alone, whose masks are the same in every call."""
    case, options = VARIANTS[name]
    p = make_problem(case, f64)
    module = loaded(p, nn.LSTM, **options).train(train)
    # What a norm starts with, 1 and 0, hides mistakes.
    for key, t in module.named_parameters():
        if "_ln_" in key:
            torch.nn.init.uniform_(t, 0.5, 1.5)
    leaves = [p.x, *(p.hx or ()), *module.parameters()]
    names = [n for n, _ in module.named_parameters()]

    def function(x, *others):
        hx, params = (others[:2], others[2:]) if case.states else (None, others)
        torch.manual_seed(1)
        values = dict(zip(names, params, strict=True))
        if packed:
            x = pack_padded_sequence(x, case.lengths, case.batch_first, enforce_sorted=False)
        options = {} if packed else {"lengths": case.lengths}
        y, states = torch.func.functional_call(module, values, (x, hx), options)
        return (y.data if packed else y), *states

    return function, [t.detach().clone().requires_grad_() for t in leaves]


@TRAIN
@NAMES
def test_gradcheck(name, train):
    function, inputs = function_and_inputs(name, train)
    assert gradcheck(function, inputs)


@NAMES
def test_gradgradcheck(name):
    function, inputs = function_and_inputs(name)
    assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", [n for n, (case, _) in VARIANTS.items() if case.lengths])
def test_packed(name):
    function, inputs = function_and_inputs(name, packed=True)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)


@TRAIN
@NAMES
def test_first_gradients_are_the_same_with_and_without_a_graph_and_twice(name, train):
    """With a graph they come from the reference: it draws no masks of its own."""
    function, inputs = function_and_inputs(name, train)
    outs = function(*inputs)
    outer = [torch.randn_like(t) for t in outs]
    plain = torch.autograd.grad(outs, inputs, outer, retain_graph=True)
    again = torch.autograd.grad(outs, inputs, outer, retain_graph=True)
    graph = torch.autograd.grad(outs, inputs, outer, create_graph=True)
    assert all(map(torch.equal, plain, again))
    torch.testing.assert_close(plain, tuple(t.detach() for t in graph), rtol=1e-11, atol=1e-11)
    assert all(t.requires_grad for t in graph[:1])


@pytest.mark.parametrize("option", [{}, {"projection": 2}, {"bidirectional": True, "layers": 2}])
def test_create_graph_equals_stock(option):
    p = make_problem(Case(4, 3, 3, 4, **option), f64)

    def second(module):
        leaves = [t.detach().requires_grad_() for t in (p.x, *p.hx)]
        y, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]))
        every = [*leaves, *module.parameters()]
        outs, outer = (y, h_n, c_n), (p.dy, p.dh_n, p.dc_n)
        first = torch.autograd.grad(outs, every, outer, create_graph=True)
        penalty = sum(g.square().sum() for g in first) + y.square().sum()
        return first, torch.autograd.grad(penalty, every)

    for found, exact in zip(
        second(loaded(p, nn.LSTM)), second(loaded(p, torch.nn.LSTM)), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("given", list(itertools.product((False, True), repeat=3)), ids=str)
def test_missing_gradients_of_outputs_are_zero(given):
    """Any of y, h_n and c_n may go unused."""
    p = make_problem(Case(4, 3, 5, 6, lengths=(4, 2, 3)), f64)
    module = loaded(p, nn.LSTM)
    leaves = [t.detach().requires_grad_() for t in (p.x, *p.hx)]
    every = [*leaves, *module.parameters()]
    y, states = module(leaves[0], tuple(leaves[1:]), lengths=p.case.lengths)
    terms = list(zip((y, *states), (p.dy, p.dh_n, p.dc_n), given, strict=True))
    zeroed = [outer * used for _, outer, used in terms]
    exact = torch.autograd.grad((y, *states), every, zeroed, retain_graph=True)
    used = [(out, outer) for out, outer, used in terms if used]
    if used:
        outs, outer = zip(*used, strict=True)
        found = torch.autograd.grad(outs, every, outer, retain_graph=True)
        assert all(map(torch.equal, found, exact))
        graph = torch.autograd.grad(outs, every, outer, create_graph=True)
        torch.testing.assert_close(graph, exact)
    else:
        assert all(t.eq(0).all() for t in exact)


@pytest.mark.parametrize("option", [{}, {"projection": 4}, {"bias": False}, {"lengths": (5, 2, 3)}])
def test_only_wanted_gradients(option):
    p = make_problem(Case(5, 3, 6, 9, **option))
    expected = ours(p)
    module = loaded(p, nn.LSTM)
    every = ["x", "h0", "c0", *(n for n, _ in module.named_parameters())]
    for wanted in [{name} for name in every] + [{"x", "weight_hh_l0"}, {"c0", "weight_ih_l0"}]:
        for name, t in module.named_parameters():
            t.requires_grad_(name in wanted).grad = None
        leaves = {
            n: t.detach().requires_grad_(n in wanted)
            for n, t in zip(every[:3], (p.x, *p.hx), strict=True)
        }
        x, *hx = leaves.values()
        y, states = module(x, tuple(hx), lengths=p.case.lengths)
        torch.autograd.backward((y, *states), (p.dy, p.dh_n, p.dc_n))
        for name, t in [*leaves.items(), *module.named_parameters()]:
            assert (t.grad is not None) == (name in wanted), name
            if t.grad is not None:
                assert torch.equal(t.grad, expected["d" + name]), (name, wanted)


def test_only_wanted_gradients_of_a_cell():
    x, h, c = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    weights = torch.randn(28, 5), torch.randn(28, 7), torch.randn(28), torch.randn(28)
    tensors = [x, h, c, *weights]

    def run(wanted):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        outs = lstm_cell(leaves[0], (leaves[1], leaves[2]), *leaves[3:])
        sum(out.square().sum() for out in outs).backward()
        return [t.grad for t in leaves]

    every = run(range(7))
    for i in range(7):
        for j, grad in enumerate(run({i})):
            assert (grad is not None) == (i == j)
            assert grad is None or torch.equal(grad, every[j])


@pytest.mark.parametrize("states", [True, False], ids=["", "no states"])
@pytest.mark.parametrize("biases", [True, False], ids=["", "no bias"])
def test_cell_gradcheck(states, biases):
    tensors = [torch.randn(3, 2), torch.randn(12, 2), torch.randn(12, 3)]
    tensors += [torch.randn(3, 3), torch.randn(3, 3)] if states else []
    tensors += [torch.randn(12), torch.randn(12)] if biases else []
    inputs = [t.to(f64).requires_grad_() for t in tensors]

    def function(x, w_ih, w_hh, *others):
        hx = others[:2] if states else None
        return lstm_cell(x, hx, w_ih, w_hh, *others[2 * states :])

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    # One of the two outputs alone.
    for alone in (lambda *t: function(*t)[0], lambda *t: function(*t)[1]):
        assert gradcheck(alone, inputs)
        assert gradgradcheck(alone, inputs)


def test_both_biases_have_gradients_of_their_own():
    """Of the same values; no later step may write one through the other."""
    for module in (nn.LSTM(3, 4), nn.LSTMCell(3, 4)):
        x = torch.randn(2, 2, 3) if isinstance(module, nn.LSTM) else torch.randn(2, 3)
        for _ in range(2):  # accumulated, too
            out = module(x)[0]
            out.sum().backward()
        first, second = [t for n, t in module.named_parameters() if "bias" in n]
        assert torch.equal(first.grad, second.grad)
        first.grad.zero_()
        assert second.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_tensors(dtype):
    p = make_problem(Case(3, 2, 4, 5, projection=3), dtype)
    module = loaded(p, nn.LSTM, layer_norm=True)
    found = gradients(p, module, dict(module.named_parameters()))
    assert all(t.dtype == dtype for t in found.values())
    assert len(found) == 3 + 3 + 5 + 6


def test_saved_for_backward():
    """The inputs, the output, gates and cells of each step; no memory beside what autograd knows of."""
    p = make_problem(Case(6, 4, 8, 16))
    module = loaded(p, nn.LSTM)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    x = p.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = module(x, p.hx)
    inputs = {t.data_ptr() for t in (x, *p.hx, *module.parameters())}
    own = {t.data_ptr(): t.numel() for t in saved if t.data_ptr() not in inputs}
    rows = 6 * 4
    assert own.pop(y.data_ptr()) == rows * 16
    assert sum(own.values()) <= rows * (4 * 16 + 16)
    hidden = [v for v in vars(y.grad_fn).values() if isinstance(v, torch.Tensor)]
    assert not hidden
    hidden = [t for v in vars(y.grad_fn).values() if isinstance(v, tuple) for t in v]
    assert not any(isinstance(t, torch.Tensor) for t in hidden)


def test_input_and_output_may_not_change_before_backward():
    weight = torch.randn(3, 2, 4).requires_grad_()
    x = weight * 1
    module = nn.LSTM(4, 5)
    y, _ = module(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y, _ = module(weight)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_truncated_backpropagation():
    """States detached between windows, in place or not; masked in place between episodes."""
    torch.manual_seed(0)
    for layers in (1, 2):
        own, plain = nn.LSTM(4, 5, layers), torch.nn.LSTM(4, 5, layers)
        plain.load_state_dict(own.state_dict())
        losses = []
        for module in (own, plain):
            torch.manual_seed(1)
            states, total = None, []
            for _ in range(4):
                y, states = module(torch.randn(3, 2, 4), states)
                loss = y.square().mean() + states[1].mean()
                loss.backward()
                for state in states:
                    state.detach_()
                    state.mul_(torch.tensor([1.0, 0.0]).view(1, 2, 1))
                total.append(loss.detach())
            losses.append((total, [t.grad for t in module.parameters()]))
        torch.testing.assert_close(*losses)


def test_the_states_carry_gradients_between_calls():
    """Two halves of a sequence are the whole of it."""
    p = make_problem(Case(6, 3, 4, 5, layers=2), f64)
    module = loaded(p, nn.LSTM)

    def halves(x, hx):
        first, hx = module(x[:2], hx)
        second, hx = module(x[2:], hx)
        return torch.cat([first, second]), hx

    parameters = dict(module.named_parameters())
    torch.testing.assert_close(gradients(p, halves, parameters), stock(p))


def test_inputs_that_depend_on_each_other():
    """Under create_graph the gradient of one input stops there: what made it of another one adds its own."""
    module, cell = nn.LSTM(4, 5, dtype=f64), nn.LSTMCell(4, 5, dtype=f64)
    x = torch.randn(6, 3, 4, dtype=f64, requires_grad=True)
    _, hx = module(x[:2])
    y, _ = module(x[2:], hx)
    state = cell(x[0])
    state = cell(x[1], state)
    for out, weights in ((y, module), (state[0], cell)):
        leaves = [x, *weights.parameters()]
        plain = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        graph = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        torch.testing.assert_close(plain, graph)


def test_missing_gradients_cost_nothing(monkeypatch):
    """The operator is told of them; no zeros are made."""
    calls = []
    for module, name in (("lstm", "_sequence_backward_op"), ("lstm_cell", "_cell_backward_op")):
        functional = importlib.import_module(f"advdl_ops.functional.{module}")
        original = getattr(functional, name)

        def spy(*given, original=original):
            calls.append(given)
            return original(*given)

        monkeypatch.setattr(functional, name, spy)
    y, (h_n, _) = nn.LSTM(4, 5)(torch.randn(3, 2, 4))
    for out in (y, h_n):
        out.sum().backward(retain_graph=True)
    _, c = nn.LSTMCell(4, 5)(torch.randn(2, 4))
    c.sum().backward()
    missing = [[t is None for t in given[:n]] for given, n in zip(calls, (3, 3, 2), strict=True)]
    assert missing == [[False, True, True], [True, False, True], [True, False]]
    assert all(
        given[n + i] is None for given, n in zip(calls, (4, 4, 3), strict=True) for i in (0, 1)
    )


def test_func_transforms_through_the_reference(no_native_required):
    p = make_problem(Case(3, 2, 3, 4), f64)
    params = list(p.params.values())

    def own(x, *params):
        return lstm(x, p.hx, params, True, 1, 0.0, False, False)[0]

    def plain(x, *params):
        return torch.lstm(x, p.hx, params, True, 1, 0.0, False, False, False)[0]

    def loss(call):
        return lambda *t: call(*t).square().sum()

    def tangent(call):
        return torch.func.jvp(lambda x: call(x, *params), (p.x,), (torch.ones_like(p.x),))

    for transform in (lambda call: torch.func.grad(loss(call), (0, 1, 2))(p.x, *params), tangent):
        torch.testing.assert_close(transform(own), transform(plain))
    batch = torch.stack([p.x, p.x + 1])  # which stock refuses
    found = torch.func.vmap(lambda x: own(x, *params))(batch)
    torch.testing.assert_close(found, torch.stack([plain(x, *params) for x in batch]))


def test_forward_ad_through_the_reference(no_native_required):
    x, t = torch.randn(2, 3, 4, dtype=f64)
    module = nn.LSTMCell(4, 5, dtype=f64)
    stock = torch.nn.LSTMCell(4, 5, dtype=f64)
    stock.load_state_dict(module.state_dict())
    with fwd.dual_level():
        found, exact = (m(fwd.make_dual(x, t))[0] for m in (module, stock))
        torch.testing.assert_close(fwd.unpack_dual(found).tangent, fwd.unpack_dual(exact).tangent)


@NAMES
def test_inputs_are_left_alone(name):
    case, options = VARIANTS[name]
    p = make_problem(case)
    module = loaded(p, nn.LSTM, **options)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    given = [p.x, *(p.hx or ()), *module.parameters(), p.dy, p.dh_n, p.dc_n]
    given += [] if lengths is None else [lengths]
    kept = [t.clone() for t in given]
    gradients(p, lambda x, hx: module(x, hx, lengths=lengths), dict(module.named_parameters()))
    assert all(map(torch.equal, given, kept))
