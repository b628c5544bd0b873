"""LSTM and LSTMCell: outputs and every gradient against the exact ones, by the rule of support/accuracy.py.

test_capabilities.py runs this file once more for each CPU capability.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from support.accuracy import ULPS, assert_accurate, error, f64, largest, strided
from support.lstm import (
    Case,
    check_problem,
    exactly,
    gradients,
    loaded,
    make_problem,
    ours,
    stock,
    with_lengths,
)

from advdl_ops import nn
from advdl_ops.functional import lstm_cell

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize(
    "dtype", [f32, f64, bf16, f16], ids=["fp32", "fp64", "bf16", "fp16"]
)
pytestmark = pytest.mark.usefixtures("one_thread")

# steps, batch, inputs, hidden: one of each, odd ones, around the widths of vectors and of the blocks of a product.
SIZES = [
    (1, 1, 1, 1),
    (1, 1, 16, 16),
    (2, 1, 3, 5),
    (5, 3, 7, 11),
    (3, 2, 1, 17),
    (4, 9, 33, 8),
    (7, 5, 20, 31),
    (2, 33, 5, 13),
    (3, 4, 65, 64),
    (2, 3, 150, 129),
    (9, 2, 2, 40),
]
CASES = [Case(*sizes) for sizes in SIZES]
OPTIONS = {
    "no bias": {"bias": False},
    "no states": {"states": False},
    "batch_first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "two layers": {"layers": 2},
    "projection": {"projection": 3},
    "all": {
        "batch_first": True,
        "bidirectional": True,
        "layers": 2,
        "projection": 4,
        "bias": False,
    },
}


@DTYPES
def test_sizes(dtype):
    for case in CASES:
        check_problem(make_problem(case, dtype))


@DTYPES
@pytest.mark.parametrize("option", OPTIONS)
def test_options(backend, option, dtype):
    for case in (Case(5, 3, 7, 11), Case(1, 1, 6, 19), Case(3, 10, 9, 16)):
        case = replace(case, **OPTIONS[option])
        check_problem(make_problem(case, dtype))
        case = with_lengths(case)
        for packed in (False, True):
            check_problem(make_problem(case, dtype), packed=packed, what=f"packed: {packed}")


@DTYPES
def test_lengths(dtype):
    for case, bidirectional in itertools.product(CASES, (False, True)):
        case = with_lengths(replace(case, bidirectional=bidirectional))
        for packed in (False, True):
            check_problem(make_problem(case, dtype), packed=packed, what=f"packed: {packed}")


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("option", OPTIONS)
def test_on_cuda(option, dtype):
    for case in (Case(5, 3, 7, 11, **OPTIONS[option]), Case(1, 1, 6, 19, **OPTIONS[option])):
        check_problem(make_problem(case, dtype).to("cuda"))
        for packed in (False, True):
            check_problem(make_problem(with_lengths(case), dtype).to("cuda"), packed=packed)


def test_the_truth_agrees_with_stock():
    for option in OPTIONS:
        case = Case(5, 3, 7, 11, **OPTIONS[option])
        for p in (make_problem(case, f64), make_problem(with_lengths(case), f64)):
            torch.testing.assert_close(exactly(p)[0], stock(p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=["fp32", "bf16"])
def test_a_thousand_steps(dtype, bidirectional):
    check_problem(make_problem(Case(1000, 2, 8, 16, bidirectional=bidirectional), dtype))


def test_the_two_ways_of_lengths_agree(backend):
    """Padded, and packed: the same arithmetic."""
    for option in OPTIONS:
        p = make_problem(with_lengths(Case(6, 5, 7, 12, **OPTIONS[option]), seed=3), f64)
        padded, packed = ours(p), ours(p, packed=True)
        for name, t in padded.items():
            torch.testing.assert_close(t, packed[name], rtol=1e-13, atol=1e-13)


def test_what_lies_past_the_end_does_not_matter(backend):
    """Not even a NaN does; the output there is zero, and so is the gradient."""
    for batch_first, bidirectional in itertools.product((False, True), (False, True)):
        case = Case(
            4,
            3,
            5,
            6,
            batch_first=batch_first,
            bidirectional=bidirectional,
            layers=2,
            lengths=(2, 4, 1),
        )
        p = make_problem(case, f64)
        before = ours(p)
        ends = torch.arange(4)[:, None] >= torch.tensor(case.lengths)
        ends = ends.T if batch_first else ends
        for value in (7.0, float("nan"), float("inf")):
            p.x[ends] = value
            p.dy[ends] = value
            after = ours(p)
            for name, t in before.items():
                assert torch.equal(t, after[name]), (name, value)
        assert after["y"][ends].eq(0).all()
        assert after["dx"][ends].eq(0).all()


def test_sequences_do_not_depend_on_their_neighbours(backend):
    """Each alone gives what it gives in a batch of other lengths."""
    case = Case(6, 4, 5, 9, bidirectional=True, lengths=(3, 6, 1, 5))
    p = make_problem(case, f64)
    module = loaded(p, nn.LSTM)
    y, (h_n, c_n) = module(p.x, p.hx, lengths=list(case.lengths))
    for b, n in enumerate(case.lengths):
        alone = slice(b, b + 1)
        hx = p.hx[0][:, alone], p.hx[1][:, alone]
        own, (own_h, own_c) = module(p.x[:n, alone], hx)
        torch.testing.assert_close(y[:n, alone], own)
        torch.testing.assert_close(h_n[:, alone], own_h)
        torch.testing.assert_close(c_n[:, alone], own_c)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=["fp32", "bf16"])
def test_strides(dtype):
    """Of x, of the states, of the weights, and of the gradients."""
    for case in (Case(4, 3, 6, 10), Case(4, 3, 6, 10, batch_first=True, bidirectional=True)):
        p = make_problem(case, dtype)
        plain = ours(p)
        layouts = {
            "strided": strided,
            "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            "features first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
        }
        for name, laid in layouts.items():
            q = replace(p, x=laid(p.x), dy=laid(p.dy), hx=tuple(laid(t) for t in p.hx))
            q.dh_n, q.dc_n = laid(p.dh_n), laid(p.dc_n)
            module = loaded(p, nn.LSTM)
            for key, t in list(module.named_parameters()):
                view = strided(t.detach()) if t.dim() == 1 else laid(t.detach())
                setattr(module, key, torch.nn.Parameter(view))
            found = gradients(q, module, dict(module.named_parameters()))
            for key, t in plain.items():
                assert torch.equal(t, found[key]), (name, key)


def test_expanded_gradients(backend):
    """Those of y.sum(): all strides 0."""
    p = make_problem(Case(4, 3, 6, 10, bidirectional=True))
    ones = torch.ones(())
    p.dy, p.dh_n, p.dc_n = (ones.expand(t.shape) for t in (p.dy, p.dh_n, p.dc_n))
    check_problem(p)


def test_without_gradients_the_outputs_are_the_same():
    for dtype, case in itertools.product(
        (f32, bf16), (Case(5, 3, 7, 11, layers=2), with_lengths(Case(5, 9, 7, 16, projection=5)))
    ):
        p = make_problem(case, dtype)
        module = loaded(p, nn.LSTM)
        y, (h_n, c_n) = module(p.x, p.hx, lengths=case.lengths)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                again, states = module(p.x, p.hx, lengths=case.lengths)
            assert torch.equal(y, again)
            assert torch.equal(h_n, states[0])
            assert torch.equal(c_n, states[1])


def test_large_and_special_values(backend):
    """Saturated gates, and NaN and infinity that stay in their sequence."""
    p = make_problem(Case(4, 3, 5, 7))
    p.x *= 1e4
    check_problem(p)
    p = make_problem(Case(4, 3, 5, 7))
    before = ours(p)
    for value in (float("nan"), float("inf"), -float("inf")):
        p.x[1, 2, 3] = value
        found = ours(p)
        exact = stock(p)
        for name in ("y", "h_n", "c_n"):
            assert torch.equal(found[name][:, :2], before[name][:, :2]), (name, value)
            assert torch.equal(found[name].isnan(), exact[name].isnan()), (name, value)
        assert torch.equal(found["dx"][:, :2], before["dx"][:, :2])
        assert torch.equal(found["y"][0], before["y"][0])


def test_no_sequence(backend):
    for case in (
        Case(3, 0, 4, 5),
        Case(3, 0, 4, 5, batch_first=True, bidirectional=True, layers=2),
    ):
        p = make_problem(case)
        found = ours(p)
        assert found["y"].shape == p.dy.shape
        assert found["dx"].shape == p.x.shape
        for name, t in found.items():
            if name.startswith(("dweight", "dbias")):
                assert t.eq(0).all(), name


# ---- one step ----


def cell_problem(dtype, batch, inputs, hidden, states, biases):
    """A sequence of one step is the truth for the cell."""
    case = Case(1, batch, inputs, hidden, states=states, bias=any(biases))
    p = make_problem(case, dtype)
    for name, given in zip(("bias_ih_l0", "bias_hh_l0"), biases, strict=True):
        if not given and any(biases):
            p.params[name].zero_()
    return p


def run_cell(p, biases, call=lstm_cell):
    weights = {n: t.detach().requires_grad_() for n, t in p.params.items()}

    def run(x, hx):
        given = [weights.get(n + "_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        for i, wanted in enumerate(biases):
            if not wanted:
                given[2 + i] = None
        h, c = call(x[0], None if hx is None else (hx[0][0], hx[1][0]), *given)
        return h[None], (h[None], c[None])

    used = {n: t for n, t in weights.items() if "bias" not in n or biases["hh" in n]}
    return gradients(p, run, used)


@DTYPES
def test_cell(backend, dtype):
    sizes = [(1, 1, 1), (1, 16, 16), (3, 7, 11), (9, 33, 8), (33, 5, 13), (2, 150, 129)]
    for (batch, inputs, hidden), states, biases in itertools.product(
        sizes, (True, False), ((True, True), (False, False), (True, False), (False, True))
    ):
        p = cell_problem(dtype, batch, inputs, hidden, states, biases)
        found = run_cell(p, biases)
        exact, term_sizes = exactly(p)
        if dtype == f16:
            plain = {n: t.to(f16) for n, t in run_cell(p.to(f32), biases, torchs_cell).items()}
        else:
            plain = run_cell(p, biases, torchs_cell)
        for name, t in found.items():
            what = (name, batch, inputs, hidden, states, biases)
            assert t.dtype == dtype
            assert_accurate(t, exact[name], plain[name], term_sizes[name], what)


def torchs_cell(x, hx, *weights):
    if hx is None:
        zeros = x.new_zeros(x.shape[0], weights[1].shape[1])
        hx = zeros, zeros
    return torch.lstm_cell(x, hx, *weights)


def test_cell_steps_equal_the_sequence():
    """Bitwise they need not be; within a few roundings they must."""
    p = make_problem(Case(20, 3, 6, 10))
    module = loaded(p, nn.LSTM)
    y, _ = module(p.x, p.hx)
    hx = p.hx[0][0], p.hx[1][0]
    steps = []
    for x in p.x:
        hx = lstm_cell(x, hx, *module._flat_weights)
        steps.append(hx[0])
    exact, sizes = exactly(p)
    limit = ULPS * torch.finfo(f32).eps * (largest(y) + sizes["y"])
    assert error(torch.stack(steps).detach(), exact["y"]) <= limit
    assert error(y.detach(), exact["y"]) <= limit


def test_error_of_the_activations():
    """docs/kernels.md states these bounds; the gates that backward keeps are sigmoid and tanh of the bias alone."""
    hidden = 4096
    generator = torch.Generator().manual_seed(0)
    values = torch.cat(
        [torch.randn(hidden // 2, generator=generator) * scale for scale in (1e-3, 1, 3, 10)]
        + [torch.linspace(-87, 87, 2 * hidden)]
    ).repeat(4)
    values = values[torch.randperm(len(values), generator=generator)][: 4 * hidden]
    zero = torch.zeros(4 * hidden, 1)
    x = torch.zeros(1, 1)
    _, _, gates = torch.ops.advdl_ops.lstm_cell(
        x, None, None, zero, torch.zeros(4 * hidden, hidden), values, None, True
    )
    i, f, g, o = gates[0].chunk(4)
    for found, given, exact, bound in (
        (torch.cat([i, f, o]), values.view(4, -1)[[0, 1, 3]].flatten(), torch.sigmoid, 5.4),
        (g, values.view(4, -1)[2], torch.tanh, 2.6),
    ):
        truth = exact(given.double())
        unit = torch.finfo(f32).eps * 2.0 ** truth.abs().log2().floor()
        assert ((found.double() - truth).abs() / unit).max() <= bound
