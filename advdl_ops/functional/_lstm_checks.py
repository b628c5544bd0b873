"""What the arguments of the LSTM functions must be. Each error names function, argument, value and what it must be.

The raw operators check their arguments too, but their errors do not name the value. If an operator refused a call, it
is checked here for a better error. A call is checked here first if nothing else would check it, or only too late: on
the reference, under a compiler, and before masks are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._lstm_arguments import CELL, SEQUENCE, OptionalTensor, Options, Sequences, grouped
from ._norm import check_floating, check_tensors

# What a call with wrong arguments may raise: the operator, or Python where a value is not a tensor.
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)


def raise_named(check: Callable[..., None], *arguments: Any) -> None:
    """If ``check`` refuses the arguments, raise its error in place of the exception that is being handled."""
    try:
        check(*arguments)
    except REFUSALS as named:
        raise named from None


def check_cell(x: Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> None:
    check_given(CELL, x=x)
    _check_states(CELL, hx)
    _check_features(CELL, x, w_ih, "[N, I]")
    inputs = x.shape[1]
    hidden = _check_weights(CELL, x, inputs, "", w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh)
    for i, state in enumerate(hx or ()):
        _check_like(CELL, x, **{f"hx[{i}]": state})
        _check_shape(CELL, f"hx[{i}]", state, (x.shape[0], hidden))


def check_sequence(x: Tensor, hx: Any, params: Any, sequences: Sequences, options: Options) -> None:
    lengths, batch_sizes = sequences
    check_given(SEQUENCE, x=x)
    check_tensors(SEQUENCE, lengths=lengths, batch_sizes=batch_sizes)
    if lengths is not None and batch_sizes is not None:
        raise ValueError(f"{SEQUENCE}: lengths must not be given beside batch_sizes")
    cells = grouped(params, options)
    layout = "[B, T, I]" if options.batch_first else "[T, B, I]"
    _check_features(SEQUENCE, x, params[0], layout if batch_sizes is None else "[rows, I]")
    inputs = x.shape[-1]
    for k, weights in enumerate(cells):
        layer, direction = divmod(k, options.directions)
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        size = _check_weights(SEQUENCE, x, inputs, suffix, **weights._asdict())
        if direction == options.directions - 1:
            inputs = options.directions * size
    batch: int | None
    if batch_sizes is None:
        steps, batch = x.shape[:2] if not options.batch_first else (x.shape[1], x.shape[0])
        if steps == 0:
            raise RuntimeError(f"{SEQUENCE}: x (shape {tuple(x.shape)}) must have a step at least")
        if lengths is not None:
            check_lengths(SEQUENCE, lengths, steps, batch)
    else:
        batch = _check_batch_sizes(batch_sizes, x.shape[0])
    _check_states(SEQUENCE, hx)
    if hx is not None:
        hidden = cells[0].w_ih.shape[0] // 4
        for i, (state, units) in enumerate(zip(hx, (size, hidden), strict=True)):
            _check_like(SEQUENCE, x, **{f"hx[{i}]": state})
            rows: Any = state.shape[1] if batch is None and state.dim() > 1 else batch
            _check_shape(SEQUENCE, f"hx[{i}]", state, (len(cells), rows, units))


def check_rate(function: str, name: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"{function}: {name} ({rate!r}) must be a number")
    if not 0 <= rate <= 1:
        raise ValueError(f"{function}: {name} ({rate}) must be within 0 and 1")


def check_rates(options: Options) -> None:
    check_rate(SEQUENCE, "dropout", options.dropout)
    check_rate(SEQUENCE, "zoneout", options.zoneout_c)
    check_rate(SEQUENCE, "zoneout", options.zoneout_h)
    check_rate(SEQUENCE, "recurrent_dropout", options.recurrent_dropout)
    if not options.eps >= 0:
        raise ValueError(f"{SEQUENCE}: eps ({options.eps}) must not be negative")


def check_given(function: str, **tensors: Any) -> None:
    """:func:`.check_tensors`, and none may be ``None``."""
    for name, t in tensors.items():
        if t is None:
            raise TypeError(f"{function}: {name} (None) must be a Tensor")
    check_tensors(function, **tensors)


def _check_states(function: str, hx: Any) -> None:
    if hx is None:
        return
    if not isinstance(hx, tuple | list):
        raise TypeError(f"{function}: hx ({type(hx).__name__}) must be a tuple (h, c)")
    if len(hx) != 2:
        raise RuntimeError(f"{function}: hx ({len(hx)} values) must be a tuple (h, c)")
    for i, state in enumerate(hx):
        if not isinstance(state, Tensor):
            raise TypeError(f"{function}: hx[{i}] ({type(state).__name__}) must be a Tensor")


def _check_shape(function: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise RuntimeError(
            f"{function}: {name} (shape {tuple(t.shape)}) must have the shape {shape}"
        )


def _check_like(function: str, x: Tensor, **tensors: OptionalTensor) -> None:
    """Every tensor must have the dtype and the device of ``x``, and the dtype must be floating."""
    for name, t in tensors.items():
        if t is None:
            continue
        if t.device != x.device:
            raise RuntimeError(
                f"{function}: {name} (device {t.device}) must be on x's device ({x.device})"
            )
        if t.dtype != x.dtype:
            raise RuntimeError(
                f"{function}: {name} (dtype {t.dtype}) must be of x's dtype ({x.dtype})"
            )
    check_floating(function, "x", x)


def _check_weights(function: str, x: Tensor, inputs: int, suffix: str, **weights: Any) -> int:
    """The weights of one cell of ``inputs`` features must fit each other and ``x``.

    Args:
        suffix: errors name a weight as the module does, with this suffix (``weight_ih_l0_reverse``). Empty: they name
            the argument (``w_ih``).

    Returns:
        The size of ``h``.
    """
    kinds = {"w": "weight", "b": "bias"}
    labels = {n: kinds[n[0]] + n[1:] + suffix if suffix else n for n in weights}
    given = {name: t for name, t in weights.items() if t is not None}
    check_given(function, **{labels[name]: weights[name] for name in ("w_ih", "w_hh")})
    check_tensors(function, **{labels[name]: t for name, t in given.items()})
    first, projection = weights["w_ih"], weights.get("w_hr")
    if x.dtype != first.dtype:
        raise RuntimeError(
            f"{function}: x (dtype {x.dtype}) must be of the dtype of {labels['w_ih']} ({first.dtype})"
        )
    _check_like(function, x, **{labels[name]: t for name, t in given.items()})
    if first.dim() != 2 or first.shape[0] % 4 != 0:
        raise RuntimeError(
            f"{function}: {labels['w_ih']} (shape {tuple(first.shape)}) must be [4 * hidden_size, {inputs}]"
        )
    hidden = first.shape[0] // 4
    size = projection.shape[0] if projection is not None and projection.dim() > 0 else hidden
    shapes: dict[str, tuple[int, ...]] = {
        "w_ih": (4 * hidden, inputs),
        "w_hh": (4 * hidden, size),
        "w_hr": (size, hidden),
        "w_ln_c": (hidden,),
        "b_ln_c": (hidden,),
    }
    for name, t in given.items():
        _check_shape(function, labels[name], t, shapes.get(name, (4 * hidden,)))
    if projection is not None and size >= hidden:
        raise RuntimeError(
            f"{function}: {labels['w_hr']} (shape {tuple(projection.shape)}) must have less than {hidden} rows"
        )
    return size


def _check_features(function: str, x: Tensor, w_ih: Any, layout: str) -> None:
    if not layout.count(",") + 1 == x.dim():
        raise RuntimeError(f"{function}: x (shape {tuple(x.shape)}) must be {layout}")
    if isinstance(w_ih, Tensor) and w_ih.dim() == 2 and x.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(
            f"{function}: x (shape {tuple(x.shape)}) must have {w_ih.shape[1]} features"
        )


def _check_integers(function: str, name: str, t: Tensor) -> list[int] | None:
    """``t`` must be a vector of int64 on the CPU. Returns its values, or ``None`` if they are not known (compile)."""
    if t.dtype != torch.int64:
        raise RuntimeError(f"{function}: {name} (dtype {t.dtype}) must be of int64")
    if t.dim() != 1:
        raise RuntimeError(f"{function}: {name} (shape {tuple(t.shape)}) must have one dimension")
    if t.device.type != "cpu":
        raise RuntimeError(f"{function}: {name} (device {t.device}) must be on the CPU")
    return None if torch.compiler.is_compiling() or type(t) is not Tensor else t.tolist()


def check_lengths(function: str, lengths: Tensor, steps: int, batch: int, of: str = "x") -> None:
    """``lengths`` must hold an integer of 1 to ``steps`` for each of the ``batch`` sequences of the argument ``of``."""
    values = _check_integers(function, "lengths", lengths)
    if lengths.shape[0] != batch:
        raise RuntimeError(
            f"{function}: lengths ({lengths.shape[0]} values) must have one for each of the {batch} sequences of {of}"
        )
    for i, n in enumerate(values or ()):
        if n < 1:
            raise RuntimeError(f"{function}: lengths[{i}] ({n}) must be at least 1")
        if n > steps:
            raise RuntimeError(
                f"{function}: lengths[{i}] ({n}) must be at most the {steps} steps of {of}"
            )


def _check_batch_sizes(batch_sizes: Tensor, rows: int) -> int | None:
    """Returns the number of sequences, or ``None`` if it is not known (compile)."""
    values = _check_integers(SEQUENCE, "batch_sizes", batch_sizes)
    if batch_sizes.shape[0] == 0:
        raise RuntimeError(f"{SEQUENCE}: batch_sizes (shape (0,)) must have a step at least")
    if values is None:
        return None
    for t, n in enumerate(values):
        if n < 1 or (t > 0 and n > values[t - 1]):
            raise RuntimeError(
                f"{SEQUENCE}: batch_sizes[{t}] ({n}) must be at least 1, and not grow from step to step"
            )
    if sum(values) != rows:
        raise RuntimeError(
            f"{SEQUENCE}: batch_sizes (sum {sum(values)}) must count the {rows} rows of x"
        )
    return values[0]
