"""Which implementation serves a convolution: for each device and direction an ordered list of candidates.

A candidate *accepts* the problems that it can compute. Among those, on CPU, the first whose *rule* holds serves; a rule
is a comparison with one of :data:`THRESHOLDS`, which were measured on one machine and may be wrong on another. A
measured choice wins over the rules: :func:`advdl_ops.tune` measures and stores it (``tuning.py``). On CUDA there are no
rules: every problem is measured when it is first met, and the first candidate serves where nothing may be measured.

`python -m benchmarks run --suite choice` measures every candidate at the shapes around each threshold and prints the
thresholds that the records support.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from .. import tuning
from .._library import cpu_capability, native
from .._schemas import HALF
from . import cpu, cuda
from .problem import (
    BOTH,
    CHANNELS_LAST,
    FOLDED,
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    WITH_NORM,
    Problem,
    computes_in_float32,
)
from .winograd import least_lengths, outputs_computed, tile_of


class Thresholds(NamedTuple):
    """Where one CPU implementation overtakes another, in fp32.

    Attributes:
        small: numbers of x up to which torch chooses what computes: a call of oneDNN takes 30 to 50 us.
        few_channels: below, lanes of the dense kernel are empty.
        few_pixels: of the output; below, the dense kernel packs a weight for too few products.
        pixels: the dense kernel serves x in channels_last up to so many output pixels: oneDNN reorders the whole
            weight in every call, which the products of a few pixels do not outweigh.
        pixels_contiguous: the same for contiguous x.
        pixels_contiguous_many: the same for contiguous x and ``many_channels`` or more.
        pixels_weight_last: the same for a weight in channels_last, which is reordered in less time, and any x.
        pixels_strided: the same for a strided gradient of x, for which oneDNN multiplies zeros.
        pixels_dweight: the same for the gradient of a weight of ``many_channels`` or more, x in channels_last.
        pixels_dweight_contiguous: the same, x contiguous.
        pixels_dweight_weight_last: the same, the weight in channels_last.
        pixels_dweight_1x1: the same, a kernel of one tap.
        many_channels: see there.
        pixels_dweight_dilated: the same for the gradient of a weight with ``large_dilation`` or more.
        large_dilation: from this dilation on oneDNN is faster in channels_last by more than two conversions take:
            forward and gradient of x.
        large_dilation_dweight: the same for the gradient of a weight.
        short_row: pixels in a row of the output up to which, contiguous, the depthwise kernel is faster by way of
            channels_last, for x of up to ``depthwise_cached_bytes``.
        short_row_dweight: the same for the gradient of the weight.
        short_row_large: pixels in a row of the output up to which torch is faster with a larger, contiguous x.
        depthwise_cached_bytes: size of x up to which the same holds with a stride of 2.
        depthwise_strided_bytes: size of x up to which, contiguous and above ``depthwise_cached_bytes``, torch's
            depthwise forward with a stride of 2 is faster.
        depthwise_strided_dx_bytes, depthwise_strided_dweight_bytes: the same for the gradients of x and of the weight.
        winograd_channels: Winograd serves groups of so many input and output channels or more: with few, the
            transforms take longer than the products that they save.
        winograd_pixels: and so many output pixels or more, forward and gradient of x with x in channels_last: each
            call transforms the weight.
        winograd_pixels_contiguous: the same for x that is not in channels_last, which is transposed on the way.
        winograd_pixels_kept: the same for a weight that is kept transformed.
        winograd_pixels_dweight: the same for the gradient of the weight.
        winograd_waste: most outputs that the tiles compute, in percent of those that are needed; an output needs the
            products of its taps inside the image.
    """

    small: int
    few_channels: int
    few_pixels: int
    pixels: int
    pixels_contiguous: int
    pixels_contiguous_many: int
    pixels_weight_last: int
    pixels_strided: int
    pixels_dweight: int
    pixels_dweight_contiguous: int
    pixels_dweight_weight_last: int
    pixels_dweight_1x1: int
    many_channels: int
    pixels_dweight_dilated: int
    large_dilation: int
    large_dilation_dweight: int
    short_row: int
    short_row_dweight: int
    short_row_large: int
    depthwise_cached_bytes: int
    depthwise_strided_bytes: int
    depthwise_strided_dx_bytes: int
    depthwise_strided_dweight_bytes: int
    winograd_channels: int
    winograd_pixels: int
    winograd_pixels_contiguous: int
    winograd_pixels_kept: int
    winograd_pixels_dweight: int
    winograd_waste: int


_AVX2 = Thresholds(
    small=65536,
    few_channels=8,
    few_pixels=1,
    pixels=1024,
    pixels_contiguous=1568,
    pixels_contiguous_many=512,
    pixels_weight_last=1024,
    pixels_strided=3136,
    pixels_dweight=3136,
    pixels_dweight_contiguous=3136,
    pixels_dweight_weight_last=3136,
    pixels_dweight_1x1=1024,
    many_channels=128,
    pixels_dweight_dilated=8192,
    large_dilation=4,
    large_dilation_dweight=24,
    short_row=20,
    short_row_dweight=7,
    short_row_large=14,
    depthwise_cached_bytes=4 << 20,
    depthwise_strided_bytes=32 << 20,
    depthwise_strided_dx_bytes=16 << 20,
    depthwise_strided_dweight_bytes=0,
    winograd_channels=8,
    winograd_pixels=196,
    winograd_pixels_contiguous=100,
    winograd_pixels_kept=49,
    winograd_pixels_dweight=392,
    winograd_waste=200,
)
THRESHOLDS: Mapping[str, Thresholds] = {
    "avx512": Thresholds(
        small=65536,
        few_channels=8,
        few_pixels=1,
        pixels=1568,
        pixels_contiguous=512,
        pixels_contiguous_many=392,
        pixels_weight_last=1568,
        pixels_strided=1024,
        pixels_dweight=2048,
        pixels_dweight_contiguous=512,
        pixels_dweight_weight_last=512,
        pixels_dweight_1x1=0,
        many_channels=96,
        pixels_dweight_dilated=2048,
        large_dilation=8,
        large_dilation_dweight=24,
        short_row=20,
        short_row_dweight=10,
        short_row_large=7,
        depthwise_cached_bytes=4 << 20,
        depthwise_strided_bytes=64 << 20,
        depthwise_strided_dx_bytes=16 << 20,
        depthwise_strided_dweight_bytes=0,
        winograd_channels=8,
        winograd_pixels=196,
        winograd_pixels_contiguous=100,
        winograd_pixels_kept=49,
        winograd_pixels_dweight=0,
        winograd_waste=200,
    ),
    "avx2": _AVX2,
    "default": _AVX2,
}
# Where they were measured.
RECORDS: Mapping[str, str] = {
    "avx512": "benchmarks/results/amd-epyc-2-cores-avx512/choice.jsonl",
    "avx2": "benchmarks/results/amd-epyc-2-cores-avx2/choice.jsonl, an AVX-512 machine held to AVX2",
    "default": "not measured: as avx2",
}

Accepts = Callable[[Problem], bool]


class Rule(NamedTuple):
    """Where, measured on another machine, a candidate is the fastest of those that follow it.

    Attributes:
        text: in words, with the values of the thresholds.
        holds: the same as a function.
    """

    text: str
    holds: Callable[[Problem, Thresholds], bool]


class Candidate(NamedTuple):
    """One implementation of one direction.

    Attributes:
        name: as records, the store of choices and ``explain`` have it.
        run: see ``cpu.py``.
        accepts: whether it can compute a problem.
        rule: ``None`` where it always serves.
        memory_format: in which it computes; ``None``: that of x.
        keeps_format: whether the output, and the gradient of x, need no conversion to the format of x.
    """

    name: str
    run: Callable[..., Any]
    accepts: Accepts = lambda _: True
    rule: Rule | None = None
    memory_format: torch.memory_format | None = None
    keeps_format: bool = False


# ---- CPU ----


# The kernels compute with sums of these (csrc/bindings/conv2d.h).
_LARGEST = 1 << 40


def _accepts_depthwise(p: Problem) -> bool:
    reach = (d * k for d, k in zip(p.dilation, p.weight[2:], strict=True))
    return p.is_depthwise and max(*p.stride, *p.padding, *reach) < _LARGEST and native("cpu")


def _accepts_dense(p: Problem) -> bool:
    return (
        p.groups == 1
        and p.dtype == torch.float32
        and p.taps <= 64
        and p.x_numel > 0
        and native("cpu")
    )


def may_use_winograd(p: Problem) -> bool:
    """Whether Winograd's kernel computes problems of this kind, given enough pixels."""
    return (
        p.has_winograd_form
        and not p.exact
        and p.dtype in (torch.float32, *HALF)
        and p.x_numel > 0
        and native("cpu")
    )


def _accepts_winograd(p: Problem) -> bool:
    return may_use_winograd(p) and tile_of(p) is not None


def _is_half(p: Problem) -> bool:
    return p.dtype in HALF


def _accepts_onednn(p: Problem) -> bool:
    return p.library and p.dtype == torch.float32 and p.x_numel > 0


def _is_not_last(p: Problem) -> bool:
    return p.layout not in (CHANNELS_LAST, BOTH)


def _accepts_depthwise_in_last(p: Problem) -> bool:
    return p.layout != CHANNELS_LAST and _accepts_depthwise(p)


def _is_torchs_depthwise(p: Problem, t: Thresholds) -> bool:
    """Contiguous and not cached, with short rows or a stride of 2, where torch is faster."""
    if p.dtype != torch.float32 or p.layout == CHANNELS_LAST or p.x[1] < 16 or _is_cached(p, t):
        return False
    stride = _steps(p)
    if stride == 1:
        return p.out_size[1] <= t.short_row_large
    limit = {
        INPUT_GRADIENT: t.depthwise_strided_dx_bytes,
        WEIGHT_GRADIENT: t.depthwise_strided_dweight_bytes,
    }.get(p.direction, t.depthwise_strided_bytes)
    return stride == 2 and _x_bytes(p) <= limit


def _x_bytes(p: Problem) -> int:
    return p.x_numel * p.dtype.itemsize


def _is_cached(p: Problem, t: Thresholds) -> bool:
    return _x_bytes(p) <= t.depthwise_cached_bytes


def _steps(p: Problem) -> int:
    """The larger stride; over one output on an axis nothing is stepped."""
    return max(s if size > 1 else 1 for s, size in zip(p.stride, p.out_size, strict=True))


def _depthwise_as_it_is(p: Problem, t: Thresholds) -> bool:
    if p.layout == CHANNELS_LAST:
        return True
    stride = _steps(p)
    if stride == 1:
        short_row = t.short_row_dweight if p.direction == WEIGHT_GRADIENT else t.short_row
        return not _is_cached(p, t) or p.out_size[1] > short_row
    return stride <= 4 and (p.x[1] < 16 or (stride == 2 and not _is_cached(p, t)))


def _dense_channels(p: Problem, t: Thresholds) -> bool:
    return min(p.weight[:2]) >= t.few_channels and p.pixels >= t.few_pixels


def _dilates_widely(p: Problem, t: Thresholds) -> bool:
    return p.dtype == torch.float32 and max(p.dilation) >= t.large_dilation


def _few_pixels(p: Problem, t: Thresholds) -> bool:
    return _dense_channels(p, t) and p.pixels <= _limit(
        p, t, p.is_channels_last or _dilates_widely(p, t)
    )


def _limit(p: Problem, t: Thresholds, is_last: bool) -> int:
    """Of :data:`Thresholds`, the limit of output pixels for x in channels_last or not."""
    if p.weight_layout == CHANNELS_LAST:
        return t.pixels_weight_last
    if is_last:
        return t.pixels
    return t.pixels_contiguous_many if _has_many(p, t) else t.pixels_contiguous


def _has_many(p: Problem, t: Thresholds) -> bool:
    return min(p.weight[:2]) >= t.many_channels


def _few_pixels_dx(p: Problem, t: Thresholds) -> bool:
    limit = t.pixels_strided if max(p.stride) > 1 else _limit(p, t, p.is_channels_last)
    return _dense_channels(p, t) and p.pixels <= limit


def _dilates_widely_dweight(p: Problem, t: Thresholds) -> bool:
    return p.dtype == torch.float32 and max(p.dilation) >= t.large_dilation_dweight


def _few_pixels_dweight(p: Problem, t: Thresholds) -> bool:
    limit = t.pixels
    if _dilates_widely(p, t):
        limit = t.pixels_dweight_dilated
    elif _has_many(p, t):
        limit = t.pixels_dweight if p.is_channels_last else t.pixels_dweight_contiguous
        if p.weight_layout == CHANNELS_LAST:
            limit = t.pixels_dweight_weight_last
        limit = t.pixels_dweight_1x1 if p.taps == 1 else limit
    return _dense_channels(p, t) and p.pixels <= limit


def _is_large(p: Problem, t: Thresholds) -> bool:
    # A weight larger than x is reordered in every call of oneDNN: 1x1 of 1x512x7x7 to 2048 channels in channels_last
    # takes twice torch's time.
    return p.x_numel > max(t.small, p.weight_numel)


def winograd_pixels(p: Problem, t: Thresholds) -> int | None:
    """From how many output pixels on Winograd serves; ``None`` if the channels are too few."""
    channels = min(p.channels_of_group)
    if channels < t.winograd_channels or not (
        p.dtype == torch.float32 or computes_in_float32(p.dtype)
    ):
        return None
    if p.direction == FOLDED:
        return t.winograd_pixels_kept
    if p.direction == WEIGHT_GRADIENT:
        least = least_lengths(p.direction, p.dtype, channels, p.is_channels_last, max(p.dilation))
        return max(t.winograd_pixels_dweight, least[0])
    return t.winograd_pixels if p.is_channels_last else t.winograd_pixels_contiguous


def _winograd_pays(p: Problem, t: Thresholds) -> bool:
    least = winograd_pixels(p, t)
    if least is None or p.pixels < least:
        return False
    computed, needed = outputs_computed(p)
    return 100 * computed <= t.winograd_waste * needed


def _winograd_rule(pixels: str) -> Rule:
    return Rule(
        f"groups of {{winograd_channels}} channels or more and {pixels} output pixels or more, of which the tiles "
        "compute up to {winograd_waste} %",
        _winograd_pays,
    )


_WINOGRAD_PACKING = _winograd_rule("{winograd_pixels} (contiguous: {winograd_pixels_contiguous})")
_WINOGRAD_KEPT = _winograd_rule("{winograd_pixels_kept}")
_WINOGRAD_DWEIGHT = _winograd_rule(
    "{winograd_pixels_dweight} (or as many as its error asks for, docs/accuracy.md)"
)
_AS_IT_IS = Rule(
    "channels_last; contiguous rows of more than {short_row} output pixels (gradient of the weight: "
    "{short_row_dweight}) or x above {depthwise_cached_bytes} bytes, with a stride of 2 above "
    "{depthwise_cached_bytes} bytes, with a stride to 4 of less than 16 channels",
    _depthwise_as_it_is,
)
_TORCHS = (
    "not contiguous x above {depthwise_cached_bytes} bytes with rows of up to {short_row_large} output pixels, nor "
    "with a stride of 2 up to {depthwise_strided_bytes} bytes (gradient of x: {depthwise_strided_dx_bytes}, of the "
    "weight: {depthwise_strided_dweight_bytes})"
)
_AS_IT_IS_UNLESS_TORCHS = Rule(
    f"{_AS_IT_IS.text}; {_TORCHS}",
    lambda p, t: _depthwise_as_it_is(p, t) and not _is_torchs_depthwise(p, t),
)
_NOT_TORCHS = Rule(_TORCHS, lambda p, t: not _is_torchs_depthwise(p, t))
_WIDE_DWEIGHT = Rule("dilation of {large_dilation_dweight} or more", _dilates_widely_dweight)
_WIDE = Rule("dilation of {large_dilation} or more", _dilates_widely)
_LARGE = Rule("x of more than {small} numbers, and more than the weight's", _is_large)
_LARGE_AND_WIDE = Rule(
    f"{_WIDE.text}, {_LARGE.text}", lambda p, t: _dilates_widely(p, t) and _is_large(p, t)
)
_DENSE = "{few_channels} channels or more and {few_pixels} output pixels"
_FEW = Rule(
    f"{_DENSE} to {{pixels}} (contiguous: {{pixels_contiguous}}, of {{many_channels}} channels "
    "{pixels_contiguous_many}; weight in channels_last: {pixels_weight_last})",
    _few_pixels,
)
_FEW_DX = Rule(f"{_FEW.text}, strided to {{pixels_strided}}", _few_pixels_dx)
_FEW_DWEIGHT = Rule(
    f"{_DENSE} to {{pixels}}, of {{many_channels}} channels to {{pixels_dweight}} (contiguous: "
    "{pixels_dweight_contiguous}; weight in channels_last: {pixels_dweight_weight_last}; 1x1: {pixels_dweight_1x1}), "
    "dilated by {large_dilation} to {pixels_dweight_dilated}",
    _few_pixels_dweight,
)


def _packing_pays(p: Problem, t: Thresholds) -> bool:
    # oneDNN's fused call answers in channels_last: of contiguous images that are larger than the weight the conversion
    # takes longer than what it saves.
    return p.layout == CHANNELS_LAST or p.weight_numel >= p.x_numel


_IN_FLOAT32 = Rule(
    "half precision that this CPU has no instructions for",
    lambda p, _: computes_in_float32(p.dtype),
)
_PACKING = Rule("channels_last, or a weight as large as x", _packing_pays)

_LAST = torch.channels_last
DEPTHWISE, DENSE, ONEDNN, TORCH = "depthwise kernel", "dense kernel", "onednn", "torch"
PREPACKED = "onednn, prepacked"
WINOGRAD = "winograd"
IN_FLOAT32 = "torch in float32"
# With a norm in training behind it.
APART = "convolution, then norm"


def _by_way_of_last(name: str) -> str:
    return f"{name} in channels_last"


def _gradients_on_cpu(winograd: Rule, few_pixels: Rule, wide: Rule) -> tuple[Candidate, ...]:
    own, torch_ = cpu.depthwise_gradients, cpu.gradients_by_torch
    return (
        Candidate(DEPTHWISE, own, _accepts_depthwise, _AS_IT_IS_UNLESS_TORCHS, None, True),
        Candidate(_by_way_of_last(DEPTHWISE), own, _accepts_depthwise_in_last, _NOT_TORCHS, _LAST),
        Candidate(WINOGRAD, cpu.winograd_gradients, _accepts_winograd, winograd, None, True),
        Candidate(DENSE, cpu.dense_gradients, _accepts_dense, few_pixels, None, True),
        Candidate(IN_FLOAT32, cpu.gradients_by_torch_in_float32, _is_half, _IN_FLOAT32),
        Candidate(_by_way_of_last(TORCH), torch_, _is_not_last, wide, _LAST),
        Candidate(TORCH, torch_),
    )


_DEPTHWISE_FORWARD = (
    Candidate(DEPTHWISE, cpu.depthwise, _accepts_depthwise, _AS_IT_IS_UNLESS_TORCHS, None, True),
    Candidate(
        _by_way_of_last(DEPTHWISE),
        cpu.depthwise,
        _accepts_depthwise_in_last,
        _NOT_TORCHS,
        _LAST,
    ),
)

ON_CPU: Mapping[str, tuple[Candidate, ...]] = {
    FORWARD: (
        *_DEPTHWISE_FORWARD,
        Candidate(WINOGRAD, cpu.winograd, _accepts_winograd, _WINOGRAD_PACKING, None, True),
        Candidate(DENSE, cpu.dense, _accepts_dense, _FEW, None, True),
        Candidate(
            _by_way_of_last(ONEDNN),
            cpu.onednn,
            lambda p: _accepts_onednn(p) and _is_not_last(p),
            _LARGE_AND_WIDE,
            _LAST,
        ),
        Candidate(ONEDNN, cpu.onednn, _accepts_onednn, _LARGE),
        Candidate(IN_FLOAT32, cpu.by_torch_in_float32, _is_half, _IN_FLOAT32),
        Candidate(_by_way_of_last(TORCH), cpu.by_torch, _is_not_last, _WIDE, _LAST),
        Candidate(TORCH, cpu.by_torch),
    ),
    # The weight is kept: with the norm's scale in it, in a layout of oneDNN's own, or transformed. See `folded.py`.
    FOLDED: (
        *_DEPTHWISE_FORWARD,
        Candidate(WINOGRAD, cpu.winograd, _accepts_winograd, _WINOGRAD_KEPT, None, True),
        Candidate(PREPACKED, cpu.prepacked, _accepts_onednn, _PACKING),
        # What is kept is in fp32.
        Candidate(IN_FLOAT32, cpu.by_torch_in_float32, _is_half),
        Candidate(TORCH, cpu.by_torch, lambda p: not _is_half(p)),
    ),
    INPUT_GRADIENT: _gradients_on_cpu(_WINOGRAD_PACKING, _FEW_DX, _WIDE),
    WEIGHT_GRADIENT: _gradients_on_cpu(_WINOGRAD_DWEIGHT, _FEW_DWEIGHT, _WIDE_DWEIGHT),
}


def thresholds() -> Thresholds:
    return THRESHOLDS[cpu_capability()]


# ---- CUDA ----


@functools.cache
def _on_cuda(
    direction: str, depthwise: bool, dtype: torch.dtype, is_last: bool, tf32: bool
) -> tuple[Candidate, ...]:
    if direction == WITH_NORM:
        # Apart the convolution is chosen for itself.
        joined = cuda.configs(FORWARD, depthwise, dtype, tf32)
        run = cuda.triton_forward_with_statistics
        return Candidate(APART, cuda.by_torch), *(
            Candidate(f"{of} with statistics", functools.partial(run, config=config))
            for of, config in joined.items()
        )
    is_forward = direction == FORWARD
    native_run = cuda.by_torch if is_forward else cuda.gradients_by_torch
    triton_run: Any = cuda.triton_forward if is_forward else cuda.triton_gradients
    name = "aten" if depthwise else "cudnn"
    found = [Candidate(name, native_run)]
    if dtype in cuda.TRITON_DTYPES:
        if not is_last:
            found.append(Candidate(f"{name} channels_last", native_run, memory_format=_LAST))
        for of, config in cuda.configs(direction, depthwise, dtype, tf32).items():
            found.append(Candidate(of, functools.partial(triton_run, config=config)))
    return tuple(found)


# ---- the choice ----


def candidates(problem: Problem, device: torch.device) -> tuple[Candidate, ...]:
    """Those that accept, in order."""
    if device.type == "cpu":
        listed = ON_CPU[problem.direction]
        return tuple(candidate for candidate in listed if candidate.accepts(problem))
    is_empty = problem.x_numel == 0
    return _on_cuda(
        problem.direction, problem.is_depthwise, torch.float64 if is_empty else problem.dtype,
        problem.layout == CHANNELS_LAST, problem.tf32,
    )  # fmt: skip


Trial = Callable[[Candidate], Any]

# On CPU, what serves a problem: found once, until :func:`forget`.
_chosen_on_cpu: dict[Problem, Candidate] = {}
# And what a call did, by its tensors' shapes and strides: quicker to look up. Of ``operators.py`` and ``is_torchs``.
plans: dict[Any, Any] = {}
_KEPT_AT_MOST = 4096
_asks_every_direction = False
_CPU = torch.device("cpu")


def chosen(problem: Problem, device: torch.device, trial: Trial) -> Candidate:
    """The candidate that serves.

    Args:
        problem: of the call.
        device: of its tensors.
        trial: one call by a candidate, for a measurement; writes nothing that lasts.
    """
    if device.type != "cpu":
        return _by_measurement(problem, candidates(problem, device), device, trial)
    found = _chosen_on_cpu.get(problem)
    if found is None:
        accepting = candidates(problem, device)
        # What the rules say comes first: it serves where nothing may be measured.
        first = by_rule(problem, accepting)
        ordered = first, *(candidate for candidate in accepting if candidate is not first)
        found = _by_measurement(problem, ordered, device, trial)
        if len(_chosen_on_cpu) >= _KEPT_AT_MOST:
            _chosen_on_cpu.clear()
        _chosen_on_cpu[problem] = found
    return found


def _by_measurement(
    problem: Problem, ordered: tuple[Candidate, ...], device: torch.device, trial: Trial
) -> Candidate:
    """What was measured earlier, or is now; the first where neither may be."""
    if len(ordered) == 1:
        return ordered[0]
    name = tuning.recall(problem, device)
    if name is None:
        calls = {candidate.name: functools.partial(trial, candidate) for candidate in ordered}
        name = tuning.choose(problem, calls, device)
    return next(candidate for candidate in ordered if candidate.name == name)


def by_rule(
    problem: Problem, accepting: tuple[Candidate, ...], t: Thresholds | None = None
) -> Candidate:
    """The first whose rule holds, on CPU; ``t`` in place of the thresholds of this CPU."""
    t = thresholds() if t is None else t
    return next(c for c in accepting if c.rule is None or c.rule.holds(problem, t))


def is_torchs(problem: Problem) -> bool | None:
    """Whether torch serves this forward on CPU and both of its gradients, in the format of x.

    ``None``: it is not known before each of them was measured.
    """
    gradient = problem._replace(epilogue=problem.layout)
    directions = (
        problem,
        *(
            gradient._replace(direction=direction)
            for direction in (INPUT_GRADIENT, WEIGHT_GRADIENT)
        ),
    )
    if _asks_every_direction or (tuning.is_on(_CPU) and any(map(is_open, directions))):
        return None
    forward, *gradients = (expected(p).name for p in directions)
    return forward in (ONEDNN, TORCH) and gradients == [TORCH, TORCH]


def is_open(problem: Problem) -> bool:
    """Whether on CPU there is a choice that nobody has measured."""
    names = [candidate.name for candidate in candidates(problem, _CPU)]
    return len(names) > 1 and tuning.find(problem, names, _CPU) is None


def expected(problem: Problem) -> Candidate:
    """What serves on CPU: measured earlier, or by the rules; nothing is measured."""
    by_name = {candidate.name: candidate for candidate in candidates(problem, _CPU)}
    found = tuning.find(problem, by_name, _CPU)
    return by_rule(problem, tuple(by_name.values())) if found is None else by_name[found.name]


def reason(candidate: Candidate) -> str:
    """Why, of those that accept, ``candidate`` serves on CPU where nothing was measured."""
    if candidate.rule is None:
        return "by rule: none before it applies"
    text = candidate.rule.text.format(**thresholds()._asdict())
    return f"by rule: {text}; {RECORDS[cpu_capability()]}"


def keep(key: Any, x: torch.Tensor, plan: Any) -> Any:
    """``plan``, on CPU kept in :data:`plans` until :func:`forget`."""
    if x.is_cpu:
        if len(plans) >= _KEPT_AT_MOST:
            plans.clear()
        plans[key] = plan
    return plan


def forget() -> None:
    """What serves on CPU is asked for again: of the store, a measurement or the rules."""
    _chosen_on_cpu.clear()
    plans.clear()


@contextlib.contextmanager
def every_direction_asked() -> Iterator[None]:
    """Inside, every problem comes by :func:`chosen`, once; :func:`is_torchs` takes no shortcut past it."""
    global _asks_every_direction
    forget()
    _asks_every_direction = True
    try:
        yield
    finally:
        _asks_every_direction = False
        forget()


def met() -> list[Problem]:
    """The problems that this process has met on CPU since :func:`forget`."""
    return list(_chosen_on_cpu)
