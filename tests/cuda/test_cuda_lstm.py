"""Values of csrc/cuda/lstm.cu on machines without a GPU: single steps; test_cuda_lstm_steps.py has sequences."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cuda_emulation import EmulationError, Emulator
from cuda_emulation import lstm as steps
from cuda_emulation.lstm import CODES, DTYPES, GUARD, Step, rows_of
from support.accuracy import assert_accurate
from torch import Tensor

HIDDEN = (1, 3, 8, 33, 64, 130)


@dataclasses.dataclass(frozen=True)
class Case:
    """What a step has beside its sizes."""

    step: Step
    norm: bool = False
    biases: str = "both"  # "ih", "hh", "none"
    recurrent_mask: bool = False
    masks: bool = False  # zoneout by masks
    lengths: bool = False
    save: bool = True
    optional: bool = True  # backward: dy, dfed and what is not always wanted
    gap: int = 0  # elements between rows
    offset: int = 0  # of all pointers, from 16 bytes

    def __str__(self) -> str:
        values = dataclasses.asdict(self)
        values |= values.pop("step")
        usual = dataclasses.asdict(Case(Step(0, 0)))
        usual |= usual.pop("step")
        return "-".join(f"{n}={v}" for n, v in values.items() if v != usual[n])


def cases() -> list[Case]:
    """Each size in each dtype, with and without layer norm; everything else takes turns."""
    turn = itertools.count()
    result = []
    for hidden, dtype, norm in itertools.product(HIDDEN, DTYPES, (False, True)):
        i = next(turn)
        pack = {"f32": 4, "f64": 2}.get(dtype, 8)
        for k, projection in enumerate((0, 8 if hidden > 8 else max(hidden - 1, 0))):
            j = i + 7 * k
            if k and not projection:
                continue
            rate = j % 3 == 1
            step = Step(
                rows=(1, 3, 5)[j % 3],
                hidden=hidden,
                projection=projection,
                dtype=dtype,
                time=2,
                zoneout_c=0.25 if rate else 0.0,
                zoneout_h=0.125 if rate else 0.0,
            )
            result.append(
                Case(
                    step,
                    norm=norm,
                    biases=("both", "ih", "none", "hh", "both")[j % 5],
                    recurrent_mask=j % 4 in (1, 2),
                    masks=j % 3 == 2,
                    lengths=j % 2 == 0,
                    save=j % 7 != 5,
                    optional=j % 5 != 3,
                    gap=(0, pack, 3)[j % 3],
                    offset=1 if j % 11 == 10 else 0,
                )
            )
    # packs of units: every option beside every other, in each of their dtypes
    for dtype, norm, (k, hidden) in itertools.product(
        ("f32", "f16", "bf16"), (False, True), enumerate((8, 64, 520))
    ):
        pack = 4 if dtype == "f32" else 8
        step = Step(
            4, hidden, projection=pack * (k == 1), dtype=dtype, time=2, zoneout_h=0.5 * (k == 2)
        )
        result.append(
            Case(step, norm, recurrent_mask=True, masks=k < 2, lengths=k > 0, gap=pack * k)
        )
    return sorted(set(result), key=str)


def offsets(case: Case) -> dict[str, int]:
    names = (
        "projected product b_ih b_hh c gates cells products hidden_out recurrent_mask h fed y "
        "projected_h hh_weight cells_before dy dh dc dgates dfed dprojected zoneout_c_mask"
    )
    return {f"{name}_offset": case.offset for name in names.split()} if case.offset else {}


def common(case: Case, g: torch.Generator) -> dict[str, Tensor]:
    step = case.step

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(step.type)

    def bits(width: int) -> Tensor:
        return torch.randint(0, 2, (step.rows, width), generator=g, dtype=torch.uint8)

    t = {}
    if case.norm:
        t |= {"hh_weight": 1 + 0.5 * normal(4 * step.hidden), "hh_bias": normal(4 * step.hidden)}
        t |= {"c_weight": 1 + 0.5 * normal(step.hidden), "c_bias": normal(step.hidden)}
    if case.recurrent_mask:
        t["recurrent_mask"] = (bits(step.size) * 1.5).to(step.type)
    if case.masks:
        t |= {"zoneout_c_mask": bits(step.hidden), "zoneout_h_mask": bits(step.size)}
    if case.lengths:
        t["lengths"] = torch.tensor(
            [3, 2, 9, 1, 4][: step.rows]
        )  # time is 2: 3 goes on, 2 does not
    return t


def laid(case: Case, t: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """``t`` with rows apart where they may be."""
    masks = ("zoneout_c_mask", "zoneout_h_mask")
    apart = (*names, *masks) if case.gap else ()
    return {n: rows_of(v, case.gap) if n in apart else v for n, v in t.items()}


def going_on(case: Case) -> Tensor:
    lengths = torch.tensor([3, 2, 9, 1, 4][: case.step.rows])
    return lengths > case.step.time if case.lengths else lengths > 0


def check(
    case: Case,
    names: list[str],
    result: dict[str, Any],
    formula: Any,
    t: dict[str, Tensor],
    ended: dict[str, Any],
) -> None:
    """Rows that go on, against the formula in fp64; those that have ended, against ``ended``."""
    exact, plain = (formula(case.step, t, acc) for acc in (torch.float64, case.step.acc))
    size = max(v.abs().max().item() for v in t.values() if v.is_floating_point() and v.numel())
    if case.norm:  # its own rounding is rstd times that of what it normalizes
        rows = [t[n].double() for n in ("product", "products") if n in t]
        variance = min(v.var(1, correction=0).min().item() for v in rows)
        size *= max(1.0, (variance + case.step.eps) ** -0.5)
        if "gates" in t and case.step.hidden > 1:
            i, f, g, _ = t["gates"].double().chunk(4, 1)
            cell = f * t["cells_before"].double() + i * g
            size *= max(1.0, (cell.var(1, correction=0).min().item() + case.step.eps) ** -0.5)
    runs = going_on(case)
    for name in names:
        found = result[name]
        stock = plain[name].to(found.dtype)
        assert_accurate(
            found[runs], exact[name][runs], stock[runs], size, (name, str(case)), case.step.acc
        )
        expected = ended[name] if isinstance(ended[name], Tensor) else torch.tensor(ended[name])
        expected = expected.to(found.dtype).expand_as(found)
        assert torch.equal(found[~runs], expected[~runs]), (name, str(case), "ended")


# ---- forward ----


def forward_inputs(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(case.step.hidden)
    step, h = case.step, case.step.hidden

    def normal(*size: int, dtype: torch.dtype = step.type) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    t = common(case, g)
    t |= {"projected": normal(step.rows, 4 * h), "product": 2 * normal(step.rows, 4 * h) + 1}
    if case.biases in ("both", "ih"):
        t["b_ih"] = normal(4 * h)
    if case.biases in ("both", "hh"):
        t["b_hh"] = normal(4 * h)
    t |= {"c": normal(step.rows, h, dtype=step.acc), "h": normal(step.rows, step.size)}
    return t


def untouched(case: Case, width: int, gap: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    return rows_of(torch.full((case.step.rows, width), GUARD, dtype=dtype or case.step.type), gap)


def run_forward(
    emulator: Emulator, case: Case, t: dict[str, Tensor], **settings: Any
) -> dict[str, Any]:
    """One step, with its projection where it has one: by the mean of neighbours, for want of a product."""
    step, gap = case.step, case.gap
    given = laid(case, t, "projected") | {"y": untouched(case, step.size, gap)}
    if case.save:
        given |= {"gates": untouched(case, 4 * step.hidden, gap)}
        given |= {"cells": untouched(case, step.hidden, gap)}
        if case.norm:
            given |= {"products": untouched(case, 4 * step.hidden, gap)}
    if case.recurrent_mask:
        given["fed"] = untouched(case, step.size)
    if step.projection:
        given["hidden_out"] = untouched(case, step.hidden)
    settings = offsets(case) | settings
    result = steps.run(emulator, "forward", step, given, **settings)
    if not step.projection:
        return result
    for name in ("h", "y", "fed"):
        assert name not in given or torch.equal(result[name], given[name]), name
    t["projected_h"] = (result["hidden_out"][:, : step.size] * 0.75).contiguous()
    given["projected_h"] = t["projected_h"]
    later = steps.run(emulator, "output", step, given, **settings)
    for name in ("c", "gates", "cells", "products", "hidden_out"):
        assert name not in later or torch.equal(later[name], given[name]), name
    result |= {name: later[name] for name in ("h", "y", "fed") if name in later}
    return result | {"launches": result["launches"] + later["launches"]}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_forward(emulator: Emulator, case: Case) -> None:
    t = forward_inputs(case)
    result = run_forward(emulator, case, t)
    names = ["c", "h", "y"] + ["gates"] * case.save + ["fed"] * case.recurrent_mask
    names += ["hidden_out"] * (case.step.projection > 0)
    ended = {"c": t["c"], "h": t["h"], "y": 0.0, "gates": GUARD, "fed": GUARD, "hidden_out": 0.0}
    check(case, names, result, steps.forward, t, ended)
    runs = going_on(case)
    if case.recurrent_mask:  # of h as it is stored: backward has no other
        fed = result["h"].to(case.step.acc) * t["recurrent_mask"].to(case.step.acc)
        assert torch.equal(result["fed"][runs], fed.to(case.step.type)[runs])
    if case.save:
        assert torch.equal(result["cells"][runs], result["c"][runs].to(case.step.type))
        assert bool((result["cells"][~runs] == GUARD).all())
        if case.norm:
            assert torch.equal(result["products"][runs], t["product"][runs])
            assert bool((result["products"][~runs] == GUARD).all())


@pytest.mark.parametrize(("dtype", "hidden"), [("f64", 600), ("bf16", 2056)])
def test_rows_longer_than_a_block(emulator: Emulator, dtype: str, hidden: int) -> None:
    """Layer norm with more units, or packs of them, than a block has threads."""
    case = Case(Step(2, hidden, dtype=dtype), norm=True)
    t = forward_inputs(case)
    result = run_forward(emulator, case, t)
    unchecked = dict.fromkeys(("gates", "c", "h", "y"), 0.0)  # no sequence has ended
    check(case, list(unchecked), result, steps.forward, t, unchecked)
    assert [block for *_, block, _ in result["launches"]] == [512 if dtype == "f64" else 256]
    t = backward_inputs(case)
    result = run_backward(emulator, case, t)
    check(case, backward_names(case), result, steps.backward, t, ended_backward(case, t))


def test_no_product_is_zero(emulator: Emulator) -> None:
    for norm, dtype in itertools.product((False, True), DTYPES):
        case = Case(Step(3, 24, dtype=dtype), norm=norm)
        t = forward_inputs(case)
        t["product"] = torch.zeros_like(t["product"])
        expected = run_forward(emulator, case, t)
        result = run_forward(emulator, case, {n: v for n, v in t.items() if n != "product"})
        for name in ("gates", "c", "h", *["products"] * norm):
            assert torch.equal(result[name], expected[name]), name


def test_gates_may_be_where_projected_was(emulator: Emulator) -> None:
    for norm, dtype in itertools.product((False, True), DTYPES):
        case = Case(Step(3, 24, dtype=dtype, time=2), norm=norm, lengths=True)
        t = forward_inputs(case)
        apart = run_forward(emulator, case, t)
        given = {n: v for n, v in t.items() if n != "projected"} | {"gates": t["projected"]}
        given["y"] = untouched(case, 24)
        result = steps.run(emulator, "forward", case.step, given, in_place=True)
        runs = going_on(case)
        assert torch.equal(result["gates"][runs], apart["gates"][runs])
        assert torch.equal(result["gates"][~runs], t["projected"][~runs])
        assert torch.equal(result["y"], apart["y"])


def test_output_begins_a_sequence(emulator: Emulator) -> None:
    """h and h * recurrent_mask of h0: without y."""
    for dtype in DTYPES:
        case = Case(Step(3, 16, dtype=dtype), recurrent_mask=True)
        t = forward_inputs(case)
        given = {"projected_h": t["h"], "recurrent_mask": t["recurrent_mask"]}
        given |= {"h": untouched(case, 16), "fed": untouched(case, 16)}
        result = steps.run(emulator, "output", case.step, given)
        assert torch.equal(result["h"], t["h"])
        assert torch.equal(result["fed"], t["h"] * t["recurrent_mask"])


# ---- backward ----


def backward_inputs(case: Case) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(case.step.hidden + 1)
    step, h = case.step, case.step.hidden

    def normal(width: int, dtype: torch.dtype = step.type) -> Tensor:
        return torch.randn(step.rows, width, generator=g, dtype=torch.float64).to(dtype)

    t = common(case, g)
    i, f, gate, o = normal(4 * h).chunk(4, 1)
    t["gates"] = torch.cat([i.sigmoid(), f.sigmoid(), gate.tanh(), o.sigmoid()], 1)
    t |= {"cells_before": normal(h), "h_before": normal(step.size)}
    if case.norm:
        t["products"] = 2 * normal(4 * h) + 1
    if case.optional:
        t |= {"dy": normal(step.size), "dfed": normal(step.size)}
    t |= {"dh": normal(step.size, step.acc), "dc": normal(h, step.acc)}
    if step.projection:
        t["dhidden"] = normal(h)
    return t


def run_backward(
    emulator: Emulator, case: Case, t: dict[str, Tensor], **settings: Any
) -> dict[str, Any]:
    step, gap = case.step, case.gap
    rows = ("gates", "cells_before", "products", "h_before", "dy")
    given = laid(case, t, *rows) | {"dgates": untouched(case, 4 * step.hidden, gap)}
    if case.norm:
        given["dproducts"] = untouched(case, 4 * step.hidden, gap)
    if case.optional:
        given["fed"] = untouched(case, step.size, gap)
        given["hidden_out"] = untouched(case, step.hidden, gap)
        if case.norm:
            given["dhh_weight"] = untouched(case, 4 * step.hidden, gap)
            given |= {n: untouched(case, step.hidden, gap) for n in ("dc_weight", "dc_bias")}
    settings = offsets(case) | settings
    if not step.projection:
        return steps.run(emulator, "backward", step, given, **settings)
    written = ("dgates", "dproducts", "hidden_out", "dhh_weight", "dc_weight", "dc_bias", "dc")
    before = {n: v for n, v in given.items() if n != "dhidden"}
    before["dprojected"] = untouched(case, step.size)
    first = steps.run(emulator, "backward_output", step, before, **settings)
    for name in written:
        assert name not in before or torch.equal(first[name], before[name]), name
    second = steps.run(emulator, "backward", step, given, **settings)
    for name in ("dh", "fed"):
        assert name not in given or torch.equal(second[name], given[name]), name
    result = first | {name: second[name] for name in written if name in second}
    return result | {"launches": first["launches"] + second["launches"]}


def backward_names(case: Case) -> list[str]:
    names = ["dh", "dc", "dgates"] + ["dprojected"] * (case.step.projection > 0)
    names += ["dproducts"] * case.norm + ["fed", "hidden_out"] * case.optional
    return names + ["dhh_weight", "dc_weight", "dc_bias"] * (case.norm and case.optional)


def ended_backward(case: Case, t: dict[str, Tensor]) -> dict[str, Any]:
    """Zeros, but dc stays, and dh takes dfed in: only in reverse is there any."""
    zero = torch.zeros((), dtype=case.step.acc)
    dfed = t.get("dfed", zero).to(case.step.acc)
    dfed = dfed * t["recurrent_mask"].to(case.step.acc) if case.recurrent_mask else dfed
    return dict.fromkeys(backward_names(case), 0.0) | {"dc": t["dc"], "dh": t["dh"] + dfed}


@pytest.mark.parametrize("case", cases(), ids=str)
def test_backward(emulator: Emulator, case: Case) -> None:
    t = backward_inputs(case)
    result = run_backward(emulator, case, t)
    check(case, backward_names(case), result, steps.backward, t, ended_backward(case, t))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("by_length", [False, True])
def test_sequences_that_begin(emulator: Emulator, norm: bool, zero: bool, by_length: bool) -> None:
    """Rows from `begun` on, or where the length is the next time, had the states of the beginning."""
    for dtype, projection in itertools.product(("f64", "bf16"), (0, 8)):
        step = Step(5, 16, projection, dtype, time=2)
        step = dataclasses.replace(
            step, **({"begin_at_lengths": True} if by_length else {"begun": 3})
        )
        case = Case(step, norm, lengths=by_length)
        t = backward_inputs(case)
        begins = (t["lengths"] == 3 if by_length else torch.arange(5) >= 3).unsqueeze(1)
        states = {"c_begin": t["cells_before"] + 1, "h_begin": t["h_before"] + 1}
        expected = t | {
            f"{name}_before": torch.where(begins, 0 if zero else states[begin], t[f"{name}_before"])
            for name, begin in (("cells", "c_begin"), ("h", "h_begin"))
        }
        result = run_backward(emulator, case, t if zero else t | states)
        ended = ended_backward(case, t)
        check(case, backward_names(case), result, steps.backward, expected, ended)


def test_gradient_of_the_first_state(emulator: Emulator) -> None:
    """Without zoneout and dy, dprojected is dh + recurrent_mask * dfed in the dtype of h0."""
    for dtype in DTYPES:
        case = Case(Step(3, 16, dtype=dtype), recurrent_mask=True)
        t = {
            n: v for n, v in backward_inputs(case).items() if n in ("dh", "dfed", "recurrent_mask")
        }
        given = t | {"dprojected": untouched(case, 16)}
        result = steps.run(emulator, "backward_output", case.step, given)
        acc = case.step.acc
        expected = t["dh"] + t["recurrent_mask"].to(acc) * t["dfed"].to(acc)
        assert torch.equal(result["dprojected"], expected.to(case.step.type))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "gap", "out_gap"), [(8, 0, 8), (8, 8, 0), (8, 2, 8), (8, 8, 2), (5, 3, 11), (1, 0, 0)]
)
def test_without_padding(
    emulator: Emulator, dtype: str, width: int, gap: int, out_gap: int
) -> None:
    """[batch, steps, width] with times or sequences next to each other; NaN in the padding of x.

    Four rows two elements off the grid of packs are on it again: one of the two strides is off it, the other is not.
    """
    lengths = torch.tensor([3, 0, 4, 9])
    ends = torch.arange(4) >= lengths[:, None]
    for inner, outer in itertools.permutations((0, 1)):
        x = torch.randn(4, 4, width).to(DTYPES[dtype])
        expected = x.masked_fill(ends[:, :, None], 0)
        x[ends] = torch.nan
        laid_x = rows_of(x.transpose(0, outer).reshape(16, width), gap)
        laid_out = rows_of(torch.full((16, width), GUARD, dtype=x.dtype), out_gap)
        request: dict[str, Any] = {"function": "padding", "steps": 4, "rows": 4, "width": width}
        request |= {"dtype": CODES[dtype], "lengths": steps.to_bytes(lengths)}
        for name, value in (("x", laid_x), ("out", laid_out)):
            strides = {0: 4 * value.stride(0), 1: value.stride(0)}
            request |= {name: steps.to_bytes(value), f"{name}_batch": strides[outer]}
            request |= {f"{name}_time": strides[inner]}
        result = emulator.call("lstm_step", request)
        found = torch.frombuffer(bytearray(result["out"]), dtype=x.dtype)
        rows = found.as_strided((16, width), (width + out_gap, 1)).reshape(4, 4, width)
        assert torch.equal(rows.transpose(0, outer), expected)
        assert result["x"] == request["x"]
        between = found.as_strided((15, out_gap), (width + out_gap, 1), width)
        assert bool((between == int(GUARD)).all())
        pack = 16 // x.element_size()
        packs = all(size % pack == 0 for size in (width, gap, out_gap))
        units = width // pack if packs else width * x.element_size() // 2
        assert result["launches"] == [(True, -(-16 * units // 128), 128, 0)]


# ---- packs, orders, limits ----


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("projection", [0, 8])
def test_packs_change_no_bit(emulator: Emulator, dtype: str, projection: int) -> None:
    """Without layer norm nothing is summed up; how many threads a step has shows which kernel ran."""
    pack = 4 if dtype == "f32" else 8
    case = Case(
        Step(5, 520, projection, dtype, time=2, zoneout_h=0.5),
        recurrent_mask=True, lengths=True, gap=8,
    )  # fmt: skip
    for run, inputs in ((run_forward, forward_inputs), (run_backward, backward_inputs)):
        t = inputs(case)
        packs = run(emulator, case, t)
        for settings in ({"packs_from": 10**9}, {"y_offset": 1, "dgates_offset": 1, "h_offset": 1}):
            single = run(emulator, case, t, **settings)
            for name, value in packs.items():
                assert not isinstance(value, Tensor) or torch.equal(value, single[name]), name
        for result, units in ((packs, pack), (run(emulator, case, t, packs_from=10**9), 1)):
            grids = [grid for _, grid, _, _ in result["launches"]]
            whole = -(-5 * 520 // units // 128)
            assert sorted(grids) == ([1, whole] if projection else [whole])


@pytest.mark.parametrize("what", ["nothing", "gap", "mask", "mask_gap"])
def test_no_packs_off_their_grid(emulator: Emulator, what: str) -> None:
    """A stride or mask that is no multiple of the pack: single units."""
    step = Step(8, 32, dtype="f16", time=2)
    case = Case(step, masks="mask" in what, gap=4 if what == "gap" else 0)
    settings = {"zoneout_c_mask_offset": 1} if what == "mask" else {}
    for run, inputs in ((run_forward, forward_inputs), (run_backward, backward_inputs)):
        t = inputs(case)
        if what == "mask_gap":
            t["zoneout_h_mask"] = rows_of(t["zoneout_h_mask"], 4)
        (launch,) = run(emulator, case, t, **settings)["launches"]
        assert launch[1] == (1 if what == "nothing" else 2)


def test_no_packs_of_part_of_a_row(emulator: Emulator) -> None:
    """36 units are no whole packs, though all rows with strides are on their grid."""
    case = Case(Step(8, 36, dtype="f16"), save=False)
    t = forward_inputs(case)
    given = t | {"y": rows_of(untouched(case, 36), 4)}
    (launch,) = steps.run(emulator, "forward", case.step, given)["launches"]
    assert launch[1] == 3


FORWARD_POINTERS = "projected product b_ih b_hh c gates cells h y recurrent_mask fed"
BACKWARD_POINTERS = (
    "gates cells_before h_before c_begin h_begin dy dfed recurrent_mask dh dc dgates fed hidden_out"
)
NORM_POINTERS = "hh_weight hh_bias c_weight c_bias products"


@pytest.mark.parametrize(
    ("norm", "projection", "forward", "backward"),
    [
        (False, 0, FORWARD_POINTERS, BACKWARD_POINTERS),
        (False, 64, "hidden_out projected_h", "dprojected dhidden"),
        (True, 0, NORM_POINTERS, f"{NORM_POINTERS} dproducts dhh_weight dc_weight dc_bias"),
    ],
    ids=["plain", "projection", "norm"],
)
def test_no_packs_where_a_pointer_is_off_their_grid(
    emulator: Emulator, norm: bool, projection: int, forward: str, backward: str
) -> None:
    """Each pointer in turn: blocks of other sizes, or more of them."""
    case = Case(Step(8, 128, projection, "bf16"), norm, recurrent_mask=True)
    t = backward_inputs(case)
    t |= {"c_begin": t["cells_before"], "h_begin": t["h_before"]}
    for run, inputs, names in (
        (run_forward, forward_inputs(case), forward),
        (run_backward, t, backward),
    ):
        packs = run(emulator, case, inputs)
        for name in names.split():
            single = run(emulator, case, inputs, **{f"{name}_offset": 1})
            assert single["launches"] != packs["launches"], name


@pytest.mark.parametrize(("rows", "blocks"), [(1055, 1055), (1056, 132)])
def test_packs_from_a_full_gpu_on(emulator: Emulator, rows: int, blocks: int) -> None:
    """By default packs of 16 bytes need a block of 128 of them for each of 132 multiprocessors."""
    request = dataclasses.asdict(Step(rows, 128)) | {"dtype": 3, "function": "forward", "dry": True}
    names = ("projected", "product", "c", "h", "y")
    (launch,) = emulator.call("lstm_step", request | dict.fromkeys(names, True))["launches"]
    assert launch[1] == blocks


def test_no_sequences_no_launch(emulator: Emulator) -> None:
    for function in ("forward", "output", "backward", "backward_output"):
        assert steps.run(emulator, function, Step(0, 8), {})["launches"] == []


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_order_changes_no_bit(emulator: Emulator, dtype: str) -> None:
    """Threads and blocks in three orders."""
    case = Case(Step(3, 264, dtype=dtype, time=2), norm=True, recurrent_mask=True)
    for run, inputs in ((run_forward, forward_inputs), (run_backward, backward_inputs)):
        t = inputs(case)
        first = run(emulator, case, t)
        for order in ({"order": 1}, {"order": 2, "seed": 7}):
            again = run(emulator, case, t, **order)
            for name, value in first.items():
                assert not isinstance(value, Tensor) or torch.equal(value, again[name]), name


def test_far_means_cost_layer_norm_no_digits(emulator: Emulator) -> None:
    """A product whose mean is 1000 of its deviations: E[x^2] - E[x]^2 would have no digit left."""
    for hidden in (33, 64):
        case = Case(Step(3, hidden), norm=True)
        t = forward_inputs(case)
        t["product"] = t["product"] + 2000
        check(case, ["gates"], run_forward(emulator, case, t), steps.forward, t, {"gates": GUARD})


def test_a_row_that_no_block_can_keep(emulator: Emulator) -> None:
    case = Case(Step(1, 264), norm=True)
    small = {"shared_limit": 2 * 1024}
    with pytest.raises(EmulationError, match=f"lstm: layer norm keeps {264 * 8 + 5 * 24} bytes"):
        run_forward(emulator, case, forward_inputs(case), **small)
    with pytest.raises(EmulationError, match="lstm: layer norm keeps"):
        run_backward(emulator, case, backward_inputs(case), **small)
