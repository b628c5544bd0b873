"""The LSTM in terms of torch's own operator, for ``torch.export``, ``torch.onnx.export`` and ``torch.jit.trace``.

There a call must end in aten operators. One ``aten.lstm`` stands for any number of steps and sequences; the reference
would be written out step by step. So whatever torch's LSTM can do is given as torch would export it, and ``lengths``
as calls of that operator too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey

from ..backend import is_exported
from ._lstm_arguments import (
    SEQUENCE,
    Options,
    Sequences,
    Weights,
    cast_all,
    cast_dtype,
    cast_pair,
    grouped,
    sequence_dtypes,
)

_Outputs = tuple[Tensor, Tensor, Tensor]
_lock = threading.RLock()


def exports_as_torchs(params: Sequence[Tensor], options: Options) -> bool:
    """Whether this call is being exported or traced, and torch's operator can compute it.

    Raises:
        RuntimeError: ``torch.onnx.export(dynamo=False)`` cannot write it.
    """
    if not is_exported():
        return False
    own = options.layer_norm or options.zoneout_c or options.zoneout_h
    own = own or (options.train and options.recurrent_dropout)
    projects = grouped(params, options)[0].w_hr is not None
    if torch.jit.is_tracing():
        if torch.onnx.is_in_onnx_export() and (own or projects):
            raise RuntimeError(
                f"{SEQUENCE}: torch.onnx.export(dynamo=False) has no projection, layer_norm, zoneout or "
                "recurrent_dropout; export with dynamo=True"
            )
        return not own
    # ONNX's LSTM has no projection, and torch.onnx would write a wrong graph. Within Dynamo nobody knows that it is
    # torch.onnx that exports.
    may_be_onnx = _writes_onnx() or torch.compiler.is_dynamo_compiling()
    return not own and not (projects and may_be_onnx)


def exported(
    x: Tensor, hx: Any, params: Sequence[Tensor], sequences: Sequences, options: Options
) -> _Outputs:
    """:func:`.lstm` for a call that :func:`exports_as_torchs`.

    Raises:
        RuntimeError: ``batch_sizes`` in ``torch.export``, which does not know their values.
    """
    lengths, batch_sizes = sequences
    cells = grouped(params, options)
    if batch_sizes is not None:
        if not torch.jit.is_tracing():
            raise RuntimeError(
                f"{SEQUENCE}: a PackedSequence cannot be exported; export the padded input with lengths= instead"
            )
        hx = _zeros(x, cells, batch_sizes[0]) if hx is None else tuple(hx)
        return torch.lstm(
            x, batch_sizes, hx, list(params), options.has_biases, options.num_layers, float(options.dropout),
            options.train, options.directions == 2,
        )  # fmt: skip
    hx = _zeros(x, cells, x.shape[0 if options.batch_first else 1]) if hx is None else tuple(hx)
    steps = x.shape[1 if options.batch_first else 0]
    if lengths is None and not (_writes_onnx() and isinstance(steps, torch.SymInt)):
        return _torchs(x, hx, params, options)
    if lengths is not None and lengths.device != x.device:
        lengths = lengths.to(x.device)
    if _writes_onnx():
        dtype = cast_dtype(x)
        (x, *params), hx = cast_all([x, *params], dtype), cast_pair(hx, dtype)
        cells = grouped(params, options)
    elif cast_dtype(x) is not None:
        return _padded_in_wider_dtype(x, hx, params, lengths, options)
    x = x.transpose(0, 1) if options.batch_first else x
    by_layer = _onnx_layer if _writes_onnx() else _padded_layer
    final_h, final_c = [], []
    for layer in range(options.num_layers):
        own = slice(layer * options.directions, (layer + 1) * options.directions)
        x, h_n, c_n = by_layer(x, (hx[0][own], hx[1][own]), cells[own], lengths)
        final_h.append(h_n)
        final_c.append(c_n)
        if layer < options.num_layers - 1:
            x = F.dropout(x, options.dropout, options.train)
    return x.transpose(0, 1) if options.batch_first else x, torch.cat(final_h), torch.cat(final_c)


def _padded_in_wider_dtype(
    x: Tensor, hx: tuple[Tensor, Tensor], params: Sequence[Tensor], lengths: Any, options: Options
) -> _Outputs:
    """:func:`exported` with ``lengths`` under autocast, in the dtypes of a call that is not exported."""
    projects = hx[0].shape[2] != hx[1].shape[2]
    cell, hidden = sequence_dtypes(x, hx, whole=False, projects=projects)
    x, h, c, *params = (t.to(cell) for t in (x, *hx, *params))
    with torch.autocast(x.device.type, enabled=False):
        y, h_n, c_n = exported(x, (h, c), params, Sequences(lengths, None), options)
    return y.to(hidden), h_n.to(hidden), c_n


def _writes_onnx() -> bool:
    """Whether ``torch.onnx.export`` records by ``torch.export``, not by ``torch.jit.trace``."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _zeros(x: Tensor, cells: list[Weights], batch: Any) -> tuple[Tensor, Tensor]:
    size, w_hr = cells[0].w_hh.shape[1], cells[0].w_hr
    hidden = size if w_hr is None else w_hr.shape[1]
    return (
        torch.zeros(len(cells), batch, size, dtype=x.dtype, device=x.device),
        torch.zeros(len(cells), batch, hidden, dtype=x.dtype, device=x.device),
    )


# ---- torch's operators ----


def exported_cell(x: Tensor, hx: Any, *weights: Any) -> tuple[Tensor, Tensor]:
    """:func:`.lstm_cell` for a call that is being exported or traced."""
    if hx is None:
        w_hh = weights[1]
        zeros = torch.zeros(x.shape[0], w_hh.shape[1], dtype=x.dtype, device=x.device)
        hx = zeros, zeros
    return torch.lstm_cell(x, tuple(hx), *weights)


def _torchs(
    x: Tensor, hx: tuple[Tensor, Tensor], params: Sequence[Tensor], options: Options
) -> _Outputs:
    with _shapes_alone():
        return torch.lstm(
            x, hx, list(params), options.has_biases, options.num_layers, float(options.dropout), options.train,
            options.directions == 2, options.batch_first,
        )  # fmt: skip


@contextlib.contextmanager
def _shapes_alone() -> Iterator[None]:
    """In it ``torch.export`` gets the shapes of ``aten.lstm`` without a run.

    torch would run the composite kernel on tensors without data, step by step, and fix the number of steps to what it
    was. ``torch.export._patches`` exchanges kernels for the time of an export in the same way.
    """
    if torch.jit.is_tracing() or torch.compiler.is_dynamo_compiling():
        yield
        return
    from torch._decomp import decompositions  # noqa: F401 - it registers Python kernels, not to be done meanwhile
    from torch._dispatch.python import enable_python_dispatcher

    operator = torch.ops.aten.lstm.input
    with _lock:
        before = dict(operator.py_kernels)
        for key in (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd):
            operator.py_kernels[key] = _shapes
        operator._dispatch_cache.clear()
        try:
            with enable_python_dispatcher():
                yield
        finally:
            operator.py_kernels.clear()
            operator.py_kernels.update(before)
            operator._dispatch_cache.clear()


def _shapes(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> _Outputs:
    """Outputs of ``aten.lstm`` without their values; the strides are those of torch's result."""
    steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
    cell, hidden = sequence_dtypes(x, hx, whole=True, projects=hx[0].shape[2] != hx[1].shape[2])
    y = x.new_empty(steps, batch, (1 + bidirectional) * hx[0].shape[2], dtype=hidden)
    y = y.transpose(0, 1) if batch_first else y
    return y, hx[0].new_empty(hx[0].shape, dtype=hidden), hx[1].new_empty(hx[1].shape, dtype=cell)


# ---- padded sequences, one layer of all directions ----

# Opens or closes a gate whatever its other inputs are: its sigmoid is 1 or 0 exactly, in fp16 too.
_FAR = 1e4


def _padded_layer(
    x: Tensor, hx: tuple[Tensor, Tensor], cells: Sequence[Weights], lengths: Any
) -> _Outputs:
    """One layer over padded ``x`` ``[T, B, I]`` by torch's operator, which takes no lengths.

    A further feature is 1 past a sequence's end. It closes the input gate and opens the forget gate there, so that the
    cell remains what it was at the end. The reverse direction runs forward over each sequence reversed in its own
    length.
    """
    times = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    runs = (times < lengths).unsqueeze(2)
    last = (lengths - 1).view(1, -1, 1)
    mirror = torch.where(runs, last - times.unsqueeze(2), times.unsqueeze(2))
    x = torch.where(runs, x, 0)  # it may be NaN there
    ended = (~runs).to(x.dtype)
    outputs, final_h, final_c = [], [], []
    for k, own in enumerate(cells):
        rows = x.gather(0, mirror.expand_as(x)) if k else x
        hidden = own.w_ih.shape[0] // 4
        closing = [
            own.w_ih.new_full((hidden, 1), -_FAR),  # i
            own.w_ih.new_full((hidden, 1), _FAR),  # f
            own.w_ih.new_zeros(2 * hidden, 1),
        ]
        params = [torch.cat([own.w_ih, torch.cat(closing)], 1), *own[1:5]]
        y, _, c_n = _torchs(
            torch.cat([rows, ended], 2),
            (hx[0][k : k + 1], hx[1][k : k + 1]),
            [t for t in params if t is not None],
            Options(own.b_ih is not None, 1, 1, False, False, False, 0.0, 0.0, 0.0, 0.0, 0.0),
        )
        final_h.append(y.gather(0, last.expand(1, -1, y.shape[2])))
        final_c.append(c_n)
        y = torch.where(runs, y, 0)
        outputs.append(y.gather(0, mirror.expand_as(y)) if k else y)
    y = outputs[0] if len(cells) == 1 else torch.cat(outputs, 2)
    return y, torch.cat(final_h), torch.cat(final_c)


def _onnx_layer(
    x: Tensor, hx: tuple[Tensor, Tensor], cells: Sequence[Weights], lengths: Any
) -> _Outputs:
    """One layer as the operator LSTM of ONNX, which takes lengths. ``x`` is ``[T, B, I]``.

    torch.onnx cannot write ``aten.lstm`` for any number of steps.
    """
    hidden = cells[0].w_hh.shape[1]
    steps, batch = x.shape[:2]
    biases = [
        torch.cat([_onnx_order(w.b_ih), _onnx_order(w.b_hh)])
        for w in cells
        if w.b_ih is not None and w.b_hh is not None
    ]
    y, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        [
            x,
            torch.stack([_onnx_order(w.w_ih) for w in cells]),
            torch.stack([_onnx_order(w.w_hh) for w in cells]),
            torch.stack(biases) if biases else None,
            None if lengths is None else lengths.to(torch.int32),
            *hx,
        ],
        {"hidden_size": hidden, "direction": "bidirectional" if len(cells) == 2 else "forward"},
        dtypes=[x.dtype] * 3,
        shapes=[(steps, len(cells), batch, hidden), *[(len(cells), batch, hidden)] * 2],
    )
    return y.transpose(1, 2).flatten(2), h_n, c_n


def _onnx_order(t: Tensor) -> Tensor:
    """The gates in ONNX's order: i, o, f, g. By slices, which torch.onnx computes in advance."""
    hidden = t.shape[0] // 4
    return torch.cat([t[:hidden], t[3 * hidden :], t[hidden : 3 * hidden]])
