"""The raw LSTM operators: opcheck, fake sizes and strides, meta tensors, what they refuse, and determinism."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.accuracy import f64
from support.checks import OPERATOR_TESTS
from support.lstm import Case, make_problem, ours, with_lengths
from support.lstm_operator import VARIANTS, B, H, I, P, T, arguments
from torch._subclasses.fake_tensor import FakeTensorMode

from advdl_ops import nn
from advdl_ops._schemas import LSTMArguments

OPS = torch.ops.advdl_ops
CELL, CELL_BACKWARD = OPS.lstm_cell.default, OPS.lstm_cell_backward.default
SEQUENCE, SEQUENCE_BACKWARD = OPS.lstm.default, OPS.lstm_backward.default
EVERY = pytest.mark.parametrize("name", VARIANTS)


def backward_arguments(given, needs=(True,) * 5, missing=()):
    """Of the backward operator, of what forward returns."""
    y, h_n, c_n, *internal = SEQUENCE(*given.values(), True)
    outer = [torch.randn(t.shape).to(t.dtype) for t in (y, h_n, c_n)]
    outer = [None if i in missing else t for i, t in enumerate(outer)]
    return (*outer, *given.values(), y, *internal, *needs)


def test_the_schemas_list_the_arguments_in_the_order_of_the_tuple():
    forward, backward = (
        [a.name for a in op._schema.arguments] for op in (SEQUENCE, SEQUENCE_BACKWARD)
    )
    names = [*LSTMArguments._fields]
    assert forward == [*names, "save"]
    assert backward[3:-9] == names


@EVERY
def test_opcheck_forward(name):
    given = arguments(**VARIANTS[name])
    for save in (True, False):
        # Past the end of a sequence what is saved is memory as it was: no two calls agree on it.
        compares = given["lengths"] is None or not save
        tests = OPERATOR_TESTS if compares else OPERATOR_TESTS[:-1]
        torch.library.opcheck(SEQUENCE, (*given.values(), save), test_utils=tests)


@EVERY
def test_opcheck_backward(name):
    given = arguments(**VARIANTS[name])
    needs_w_ih = given["w_ih"] is not None
    needs = (True, needs_w_ih, True, True, given["w_hr"] is not None)
    torch.library.opcheck(
        SEQUENCE_BACKWARD, backward_arguments(given, needs), test_utils=OPERATOR_TESTS
    )
    wanted_few = backward_arguments(given, (False,) * 5, missing=(0, 2))
    torch.library.opcheck(SEQUENCE_BACKWARD, wanted_few, test_utils=OPERATOR_TESTS)


def cell_arguments(**changed):
    given = arguments(steps=1, **changed)
    x = given["x"][0]
    return (x, *(given[n] for n in ("h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")))


CELL_VARIANTS = [n for n in VARIANTS if n.split()[0] in ("plain", "bf16", "fp64", "no", "one", "h")]


@pytest.mark.parametrize("name", CELL_VARIANTS)
def test_opcheck_cell(name):
    given = cell_arguments(**{n: v for n, v in VARIANTS[name].items() if n != "steps"})
    for save in (True, False):
        torch.library.opcheck(CELL, (*given, save), test_utils=OPERATOR_TESTS)
    h_out, c_out, gates = CELL(*given, True)
    for outer, needs in (
        ((h_out, c_out), (True,) * 4),
        ((None, c_out), (True, False, True, False)),
        ((h_out, None), (False,) * 4),
    ):
        arguments_back = (*outer, *given[:5], gates, *needs)
        torch.library.opcheck(CELL_BACKWARD, arguments_back, test_utils=OPERATOR_TESTS)


def compare_with_fakes(op, given):
    real = op(*given)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given))
    for r, f in zip(real, fake, strict=True):
        assert r.shape == f.shape
        assert r.dtype == f.dtype
        assert r.stride() == f.stride()


@EVERY
def test_fake_tensors_equal_real_ones(name):
    given = arguments(**VARIANTS[name])
    for save in (True, False):
        compare_with_fakes(SEQUENCE, (*given.values(), save))
    for needs in ((True,) * 5, (False,) * 5):
        needs = tuple(
            need and given[n] is not None
            for need, n in zip(needs, ("x", "w_ih", "w_hh", "x", "w_hr"), strict=True)
        )
        compare_with_fakes(SEQUENCE_BACKWARD, backward_arguments(given, needs))


@EVERY
def test_save_changes_nothing_else(name):
    given = arguments(**VARIANTS[name]).values()
    saved, unsaved = SEQUENCE(*given, True), SEQUENCE(*given, False)
    assert all(map(torch.equal, saved[:3], unsaved[:3]))
    assert all(t.numel() == 0 for t in unsaved[3:])


def test_what_is_saved():
    """Gates, cells and, with layer norm, products, of every step that there is."""
    for norm in (False, True):
        given = arguments(norm=norm, lengths=torch.tensor([2, 4, 1]))
        y, _, c_n, gates, cells, products = SEQUENCE(*given.values(), True)
        assert gates.shape == (T, B, 4 * H)
        assert cells.shape == (T, B, H)
        assert products.shape == ((T, B, 4 * H) if norm else (0,))
        for b, n in enumerate((2, 4, 1)):
            assert torch.equal(cells[n - 1, b], c_n[b])
            i, f, g, o = gates[:n, b].chunk(4, -1)
            for gate in (i, f, o):
                assert gate.min() > 0 and gate.max() < 1
            before = torch.cat([given["c0"][None, b], cells[: n - 1, b]])
            torch.testing.assert_close(cells[:n, b], f * before + i * g)
            if not norm:
                torch.testing.assert_close(y[:n, b], o * cells[:n, b].tanh())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64], ids=str)
def test_two_runs_and_thread_counts_are_bitwise_equal(threads, dtype):
    """One sequence, few of them, more of them than a block, ragged; and layers wide enough to be shared out."""
    cases = [
        Case(9, 1, 40, 200),
        Case(6, 5, 33, 129, bidirectional=True),
        with_lengths(Case(7, 37, 20, 64, projection=24)),
        with_lengths(Case(5, 70, 8, 33, batch_first=True, layers=2)),
        Case(3, 64, 128, 128, bias=False),
    ]
    for case in cases:
        p = make_problem(case, dtype)
        results = []
        for count in (1, 1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(ours(p))
        for other in results[1:]:
            for name, t in results[0].items():
                assert torch.equal(t, other[name]), (name, case)


@pytest.mark.parametrize("batch", [1, 4, 33])
def test_a_cell_on_any_number_of_threads(threads, batch):
    given = [t.requires_grad_() for t in torch.nn.LSTMCell(150, 130).parameters()]
    x, h, c = torch.randn(batch, 150), torch.randn(batch, 130), torch.randn(batch, 130)
    results = []
    for count in (1, 1, 2, 3, 4):
        torch.set_num_threads(count)
        h_out, c_out, gates = CELL(x, h, c, *given, True)
        grads = CELL_BACKWARD(h, c, x, h, c, *given[:2], gates, True, True, True, True)
        results.append((h_out, c_out, gates, *grads))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_deterministic_mode_needs_no_special_case():
    p = make_problem(with_lengths(Case(5, 9, 12, 20, bidirectional=True)))
    before = ours(p)
    try:
        torch.use_deterministic_algorithms(True)
        after = ours(p)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, t in before.items():
        assert torch.equal(t, after[name]), name


def test_what_saved_rows_without_a_step_hold_does_not_matter():
    """Past the end of a sequence the gates and cells are memory as it was."""
    given = arguments(norm=True, lengths=torch.tensor([2, 4, 1]))
    back = list(backward_arguments(given, (True, True, True, True, False)))
    expected = SEQUENCE_BACKWARD(*back)
    ends = torch.arange(T)[:, None] >= given["lengths"]
    start = len(back) - 5 - 3
    for i in range(start, start + 3):  # gates, cells, products
        back[i] = back[i].clone()
        back[i][ends] = float("nan")
    assert all(map(torch.equal, SEQUENCE_BACKWARD(*back), expected))


def test_empty_batch_returns_no_uninitialised_memory():
    for name in ("plain", "projection", "layer norm"):
        given = arguments(**VARIANTS[name], batch=0)
        back = backward_arguments(given, (True, True, True, True, name == "projection"))
        junk = [torch.full((4 * H * H,), float("nan")) for _ in range(300)]
        del junk  # what the allocator hands out next
        for t in SEQUENCE_BACKWARD(*back)[3:]:
            assert t.eq(0).all()
    given = cell_arguments(batch=0)
    h_out, c_out, gates = CELL(*given, True)
    for t in CELL_BACKWARD(h_out, c_out, *given[:5], gates, True, True, True, True)[3:]:
        assert t.eq(0).all()


def test_raw_operator_checks_its_arguments():
    # Reached past the Python checks: an error, never a read out of bounds.
    def forward(**changed):
        return SEQUENCE(*arguments(**changed).values(), True)

    forward()
    x, c = torch.randn(T, B, I), torch.randn(B, H)
    sizes = torch.tensor([3, 3, 2, 1])
    packed = {"batch_sizes": sizes}
    meta = torch.randn(B, H, device="meta")
    for bad in (
        {"x": torch.randn(T, I)},
        {"x": torch.randn(T, B, I + 1)},
        {"x": x.int()},
        {"x": x.double()},
        {"x": x[:0]},
        {"h0": torch.randn(B + 1, H)},
        {"h0": torch.randn(B, H + 1)},
        {"h0": torch.randn(1, B, H)},
        {"h0": c.double()},
        {"h0": meta},
        {"c0": torch.randn(B, H - 1)},
        {"c0": torch.randn(1, H)},
        {"w_ih": torch.randn(4 * H + 4, I)},
        {"w_ih": torch.randn(4 * H)},
        {"w_ih": None, "x": x},
        {"w_hh": torch.randn(4 * H, H + 1)},
        {"w_hh": torch.randn(4 * H + 1, H)},
        {"b_ih": torch.randn(H)},
        {"b_hh": torch.randn(4 * H, 1)},
        {"b_hh": torch.randn(4 * H).bfloat16()},
        {"w_hr": torch.randn(P, H)},
        {"w_hr": torch.randn(H, H)},
        {"lengths": torch.tensor([4, 4])},
        {"lengths": torch.tensor([4, 5, 1])},
        {"lengths": torch.tensor([4, 0, 1])},
        {"lengths": torch.tensor([4, -1, 1])},
        {"lengths": torch.tensor([4, 1, 1], dtype=torch.int32)},
        {"lengths": torch.tensor([[4, 1, 1]])},
        {"lengths": torch.tensor([4, 1, 1], device="meta")},
        {"batch_sizes": torch.tensor([3, 3, 2, 1]), "x": x},
        {**packed, "x": torch.randn(8, I)},
        {**packed, "h0": None},
        {**packed, "h0": torch.randn(2, H)},
        {**packed, "lengths": torch.tensor([4, 3, 2])},
        {"batch_sizes": torch.tensor([3, 2, 3])},
        {"batch_sizes": torch.tensor([3, 3, 0])},
        {"batch_sizes": torch.tensor([2, 2, 2]), "x": torch.randn(6, I)},
        {**packed, "batch_sizes": sizes.int()},
        {"recurrent_mask": torch.ones(B, H + 1)},
        {"recurrent_mask": torch.ones(B, H, dtype=torch.uint8)},
        {"zoneout_c_mask": torch.ones(T, B, H)},
        {"zoneout_c_mask": torch.ones(B, T, H, dtype=torch.uint8)},
        {"zoneout_h_mask": torch.ones(T, B, H + 1, dtype=torch.uint8)},
        {"zoneout_c": 1.5},
        {"zoneout_h": -0.1},
        {"zoneout_h": float("nan")},
        {"norm": True, "ln_hh_bias": None},
        {"ln_c_weight": torch.ones(H)},
        {"norm": True, "ln_c_weight": torch.ones(4 * H)},
        {"norm": True, "ln_hh_weight": torch.ones(H)},
    ):
        with pytest.raises(RuntimeError, match="lstm"):
            forward(**bad)
    with pytest.raises(RuntimeError):
        forward(w_hh=torch.randn(H))

    def backward(**changed):
        names = (
            "dy",
            "dh_n",
            "dc_n",
            *LSTMArguments._fields,
            "y",
            "gates",
            "cells",
            "products",
            *map(str, range(5)),
        )
        given = backward_arguments(arguments(norm=True), (True, True, True, True, False))
        SEQUENCE_BACKWARD(*(dict(zip(names, given, strict=True)) | changed).values())

    backward()
    for bad in (
        {"dy": torch.randn(T, B, H + 1)},
        {"dy": torch.randn(T, B, H).double()},
        {"dy": torch.randn(T * B, H)},
        {"dh_n": torch.randn(B, H - 1)},
        {"dc_n": torch.randn(1, H)},
        {"y": torch.randn(T, B, H + 1)},
        {"gates": torch.randn(T, B, H)},
        {"gates": torch.randn(0)},
        {"cells": torch.randn(T, B, H).bfloat16()},
        {"products": torch.randn(0)},
        {"x": torch.randn(T, B + 1, I)},
    ):
        with pytest.raises(RuntimeError, match="lstm"):
            backward(**bad)


def test_raw_cell_checks_its_arguments():
    names = ("x", "h", "c", "w_ih", "w_hh", "b_ih", "b_hh")
    given = dict(zip(names, cell_arguments(), strict=True))
    for bad in (
        {"x": torch.randn(B, 1, I)},
        {"x": torch.randn(B, I + 1)},
        {"x": torch.randn(B, I).int()},
        {"h": torch.randn(B + 1, H)},
        {"c": torch.randn(B, H).double()},
        {"w_ih": torch.randn(4 * H - 1, I)},
        {"w_hh": torch.randn(4 * H, P)},
        {"b_ih": torch.randn(4)},
        {"b_hh": torch.randn(4 * H, device="meta")},
    ):
        with pytest.raises(RuntimeError, match="lstm_cell"):
            CELL(*(given | bad).values(), True)
    _, _, gates = CELL(*given.values(), True)
    dh = torch.randn(B, H)
    for outer, saved in (
        ((torch.randn(B, H + 1), dh), gates),
        ((dh, dh.double()), gates),
        ((dh, dh), gates[:, :H]),
        ((dh, dh), gates.double()),
        ((dh, dh), gates[:1]),
    ):
        with pytest.raises(RuntimeError, match="lstm"):
            CELL_BACKWARD(*outer, *list(given.values())[:5], saved, True, True, True, True)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"projection": 3}], ids=str)
def test_meta_tensors(options):
    for batch_first, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        case = replace(Case(4, 3, 5, 7, batch_first=batch_first), **options)
        p = make_problem(case, dtype).to("meta")
        module = case.module(nn.LSTM, device="meta", dtype=dtype)
        x = p.x.requires_grad_()
        y, states = module(x, p.hx)
        for t, like in zip((y, *states), (p.dy, p.dh_n, p.dc_n), strict=True):
            assert t.is_meta and t.shape == like.shape and t.dtype == dtype
        assert module(x, p.hx, lengths=[4, 1, 2])[0].shape == y.shape
        y.sum().backward()
        assert x.grad.shape == x.shape
        for t in module.parameters():
            assert t.grad.shape == t.shape and t.grad.dtype == dtype


def test_operator_names_its_own_errors():
    """What Python refuses before it calls, for those who call the operator itself."""
    arguments = [torch.zeros(2, 3, 4), None, None, torch.zeros(20, 4), torch.zeros(20, 5)]
    arguments += [None] * 8 + [0.0, 0.0] + [None] * 4
    call = torch.ops.advdl_ops.lstm
    with pytest.raises(RuntimeError, match="lstm: eps must not be negative"):
        call(*arguments, -1.0, False, False, False)
    arguments[4] = torch.zeros(20)
    with pytest.raises(RuntimeError, match="lstm: w_hh must be"):
        call(*arguments, 1e-5, False, False, False)
    arguments[0] = torch.zeros(4)
    with pytest.raises(RuntimeError, match="lstm: x must have 2 or 3 dimensions"):
        call(*arguments, 1e-5, False, False, False)
