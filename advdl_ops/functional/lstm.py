"""The LSTM: one step, and layers and directions over whole sequences.

Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000) and projections (Sak et al. 2014, arXiv:1402.1128);
layer norm by Ba et al. 2016 (arXiv:1607.06450), zoneout by Krueger et al. 2017 (arXiv:1606.01305), recurrent dropout
by Gal & Ghahramani 2016 (arXiv:1512.05287).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backend import fixed, serves_native
from ._norm import check_floating, check_tensors, gradient_like

_CELL, _SEQUENCE = "lstm_cell", "lstm"
_cell_op = torch.ops.advdl_ops.lstm_cell.default
_cell_backward_op = torch.ops.advdl_ops.lstm_cell_backward.default
_sequence_op = torch.ops.advdl_ops.lstm.default
_sequence_backward_op = torch.ops.advdl_ops.lstm_backward.default

_Optional = Tensor | None
_States = tuple[Tensor, Tensor]
# What autocast casts; numbers of fp64 it leaves.
_CAST = (torch.float32, torch.bfloat16, torch.float16)
# What refuses wrong input before `_check` finds a name for it: the operator, and Python of what is no tensor.
_REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError)


# ---- one step ----


def lstm_cell(
    x: Tensor,
    hx: _States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> _States:
    r"""One step of an LSTM; arguments in the order of :func:`torch.lstm_cell`.

    .. math::
        i, f, g, o = \sigma, \sigma, \tanh, \sigma\,(W_{ih} x + b_{ih} + W_{hh} h + b_{hh}), \quad
        c' = f c + i g, \quad h' = o \tanh(c')

    Args:
        x: ``[N, I]``; fp32, fp64, bf16 or fp16.
        hx: ``(h, c)``, each ``[N, H]``; ``None`` for zeros.
        w_ih, w_hh: ``[4H, I]`` and ``[4H, H]``, the gates in the order i, f, g, o.
        b_ih, b_hh: ``[4H]`` or ``None``.

    Returns:
        ``(h', c')``, each ``[N, H]``, in ``x``'s dtype. Under autocast in stock's: on CUDA the autocast dtype, on CPU
        the wider of that and of ``c``'s (``x``'s without ``hx``), in which all is computed then.

    Raises:
        RuntimeError: shapes that do not fit together, mixed dtypes or devices; of a dtype that is not floating its
            subclass ``NotImplementedError``.
        TypeError: ``hx`` is no tuple, or a tensor is none.
    """
    try:
        if (
            type(x) is Tensor
            and (hx is None or type(hx) is tuple)
            and not x.is_meta
            and not (x.is_cuda and torch.is_autocast_enabled("cuda"))
            and serves_native(_CELL, x)
            and not torch.compiler.is_compiling()
        ):
            h: _Optional
            c: _Optional
            h, c = (None, None) if hx is None else hx
            if hx is not None and (h is None or c is None):
                raise TypeError  # the operator takes one of them alone
            if torch.is_grad_enabled() and (
                w_ih.requires_grad
                or x.requires_grad
                or w_hh.requires_grad
                or (h is not None and h.requires_grad)
                or (c is not None and c.requires_grad)
                or (b_ih is not None and b_ih.requires_grad)
                or (b_hh is not None and b_hh.requires_grad)
            ):
                return _apply_cell(x, h, c, w_ih, w_hh, b_ih, b_hh)
            return _cell_op(x, h, c, w_ih, w_hh, b_ih, b_hh, False)[:2]
    except _REFUSALS:
        if not (isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)):
            _raise_named(_check_cell, x, hx, w_ih, w_hh, b_ih, b_hh)
            raise
    return _general_cell(x, hx, w_ih, w_hh, b_ih, b_hh)


def _general_cell(x: Tensor, hx: Any, *weights: Any) -> _States:
    """As :func:`lstm_cell` where a check comes first: a compiler, the reference, autocast, meta tensors, subclasses."""
    _check_given(_CELL, x=x)
    dtype = _autocast_dtype(x)
    if dtype is not None and not x.is_cuda:
        # Stock multiplies in half precision, and adds what that is made of to a wider c.
        added = hx[1] if _is_pair(hx) and isinstance(hx[1], Tensor) else x
        dtype = torch.promote_types(dtype, added.dtype)
    x, hx = _cast(x, dtype), _cast_pair(hx, dtype)
    w_ih, w_hh, b_ih, b_hh = _cast_all(weights, dtype)
    _check_cell(x, hx, w_ih, w_hh, b_ih, b_hh)
    h, c = (None, None) if hx is None else hx
    tensors = x, h, c, w_ih, w_hh, b_ih, b_hh
    if not serves_native(_CELL, x):
        return reference.lstm_cell(*tensors)
    if _needs_grad(tensors):
        return LSTMCellFunction.apply(*tensors)
    return _cell_op(*tensors, False)[:2]


class LSTMCellFunction(torch.autograd.Function):
    """Gradients of one step. Saved: the inputs, and the gates ``[N, 4H]``."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> _States:
        h, c, gates = _cell_op(*tensors, True)
        ctx.save_for_backward(*tensors, gates)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, dh: _Optional, dc: _Optional) -> tuple[_Optional, ...]:
        if dh is None and dc is None:
            return (None,) * 7
        *tensors, gates = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _reference_gradients(reference.lstm_cell, tensors, need, (dh, dc))
        x, h, c, w_ih, w_hh, b_ih, b_hh = tensors
        need_x, need_h, need_c, need_w_ih, need_w_hh, need_b_ih, need_b_hh = need
        dx, dh0, dc0, dw_ih, dw_hh, dbias = _cell_backward_op(
            dh, dc, x, h, c, w_ih, w_hh, gates, need_x, need_w_ih, need_w_hh, need_b_ih or need_b_hh
        )
        return (
            dx if need_x else None,
            dh0 if need_h else None,
            dc0 if need_c else None,
            gradient_like(dw_ih, w_ih) if need_w_ih else None,
            gradient_like(dw_hh, w_hh) if need_w_hh else None,
            gradient_like(dbias, b_ih) if need_b_ih else None,
            gradient_like(dbias, b_hh) if need_b_hh else None,
        )


# Function.apply without torch's wrapper of it, which looks for functorch transforms: serves_native has.
_apply_cell = super(torch.autograd.Function, LSTMCellFunction).apply


# ---- whole sequences ----


def lstm(
    x: Tensor,
    hx: _States | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    batch_sizes: Tensor | None = None,
    layer_norm: bool = False,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Layers and directions of an LSTM over whole sequences; arguments in the order of :func:`torch.lstm`.

    Of each layer and direction, with D directions, hidden size H and output size R (H, or P with a projection):

    .. math::
        i, f, g, o = \sigma, \sigma, \tanh, \sigma\,(W_{ih} x_t + b_{ih} + W_{hh} (m \odot h_{t-1}) + b_{hh}), \quad
        c_t = f c_{t-1} + i g, \quad h_t = W_{hr}\, o \tanh(c_t)

    Args:
        x: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``; with ``batch_sizes`` ``[rows, I]``. T >= 1. fp32, fp64,
            bf16 or fp16.
        hx: ``(h_0, c_0)``, ``[num_layers * D, B, R]`` and ``[num_layers * D, B, H]``; ``None`` for zeros.
        params: of each layer, and in it of each direction: ``w_ih`` ``[4H, I]`` (``I`` is ``D * R`` after the first
            layer), ``w_hh`` ``[4H, R]``, with ``has_biases`` ``b_ih``, ``b_hh`` ``[4H]``, with a projection ``w_hr``
            ``[P, H]``, and with ``layer_norm`` weight and bias of the norms of ``w_ih x`` ``[4H]``, of ``w_hh h``
            ``[4H]`` and of the cell ``[H]``.
        dropout: in training, the rate of dropout on the output of every layer but the last.
        train: whether dropout, zoneout and recurrent dropout are drawn.
        lengths: of each sequence of a padded ``x``, ``[B]``, 1 to T, in any order: a CPU tensor of int64, or
            integers. Past a sequence's end ``y`` is zero; its final states are those of its own end, and the reverse
            direction starts there. Under compile the values are checked by the operator alone.
        batch_sizes: ``[T]``, of a ``PackedSequence``: ``x`` is its data.
        layer_norm: normalize ``w_ih x`` and ``w_hh h`` before they are added, and the cell before its tanh.
        zoneout: the share of the units of the cell and of ``h`` that keep their value in a step, one for both or
            ``(cell, h)``: drawn for each step and unit in training, by its expectation otherwise.
        recurrent_dropout: in training, the share of the units of ``h`` that ``w_hh`` does not see: one mask ``m`` for
            all steps, scaled by 1 / (1 - p).
        eps: of the layer norms.

    Returns:
        ``y`` ``[T, B, D * R]`` (as ``x``: ``batch_first``, or packed), ``h_n``, ``c_n`` of the shapes of ``hx``; in
        ``x``'s dtype, under autocast in the autocast dtype.

    Raises:
        RuntimeError: shapes that do not fit together, mixed dtypes or devices, T = 0, bad ``lengths`` or
            ``batch_sizes``; of a dtype that is not floating its subclass ``NotImplementedError``.
        ValueError: a rate outside of 0..1, ``lengths`` beside ``batch_sizes``, a negative ``eps``.
        TypeError: ``hx`` is no tuple, ``lengths`` are no integers, or a tensor is none.
    """
    kind = _Kind(
        has_biases, num_layers, 2 if bidirectional else 1, batch_first, layer_norm, train, dropout,
        *_pair_of_rates(zoneout), recurrent_dropout, eps,
    )  # fmt: skip
    _check_rates(kind)
    try:
        dtype = _autocast_dtype(x)
        if dtype is not None:
            x, hx, params = _cast(x, dtype), _cast_pair(hx, dtype), _cast_all(params, dtype)
        sequences = _Sequences(as_lengths(_SEQUENCE, lengths), batch_sizes)
        # As for one step the operator checks shapes and dtypes of plain tensors, and `_check` names what it refused;
        # but no mask may be drawn for what it will refuse.
        if (
            _draws(kind)
            or lengths is not None
            or batch_sizes is not None
            or type(x) is not Tensor
            or x.is_meta
            or torch.compiler.is_compiling()
            or not serves_native(_SEQUENCE, x)
        ):
            _check(x, hx, params, sequences, kind)
        return _layers(x, hx, params, sequences, kind)
    except _REFUSALS:
        if not torch.compiler.is_compiling():
            _raise_named(
                lambda: _check(
                    x, hx, params, _Sequences(as_lengths(_SEQUENCE, lengths), batch_sizes), kind
                )
            )
        raise


def _draws(kind: _Kind) -> bool:
    """Whether the call moves the state of the random number generator."""
    rates = kind.dropout, kind.zoneout_c, kind.zoneout_h, kind.recurrent_dropout
    return kind.train and any(rate > 0 for rate in rates)


class _Kind(NamedTuple):
    """Every option of :func:`lstm` that is no tensor."""

    has_biases: bool
    num_layers: int
    directions: int
    batch_first: bool
    layer_norm: bool
    train: bool
    dropout: float
    zoneout_c: float
    zoneout_h: float
    recurrent_dropout: float
    eps: float


class _Sequences(NamedTuple):
    """Which sequences have which times: of a padded or of a packed ``x``."""

    lengths: _Optional
    batch_sizes: _Optional


class _Weights(NamedTuple):
    """Of one layer and direction, in the order of ``params``."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: _Optional
    b_hh: _Optional
    w_hr: _Optional
    w_ln_ih: _Optional
    b_ln_ih: _Optional
    w_ln_hh: _Optional
    b_ln_hh: _Optional
    w_ln_c: _Optional
    b_ln_c: _Optional


class _Options(NamedTuple):
    """Of one layer and direction, for the operator."""

    zoneout_c: float
    zoneout_h: float
    eps: float
    batch_first: bool
    reverse: bool


def _layers(
    x: Tensor, hx: Any, params: Sequence[Tensor], sequences: _Sequences, kind: _Kind
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _grouped(params, kind)
    initial_h, initial_c = _unstacked(hx, len(weights))
    # The operator reads both as memory without gaps.
    lengths, batch_sizes = (t if t is None else t.contiguous() for t in sequences)
    if lengths is not None and lengths.device != x.device:
        lengths = lengths.to(x.device, non_blocking=True)
    sequences = _Sequences(lengths, batch_sizes)
    final_h, final_c = [], []
    for layer in range(kind.num_layers):
        outputs = []
        for direction in range(kind.directions):
            k = layer * kind.directions + direction
            states = initial_h[k], initial_c[k]
            y, h_n, c_n = _direction(x, states, weights[k], sequences, kind, direction == 1)
            outputs.append(y)
            final_h.append(h_n)
            final_c.append(c_n)
        x = outputs[0] if kind.directions == 1 else torch.cat(outputs, -1)
        if kind.train and kind.dropout > 0 and layer < kind.num_layers - 1:
            x = F.dropout(x, kind.dropout, True)
    # Stacked where there is one too: a view could not be detached in place.
    return x, torch.stack(final_h), torch.stack(final_c)


def _direction(
    x: Tensor,
    states: tuple[_Optional, _Optional],
    weights: _Weights,
    sequences: _Sequences,
    kind: _Kind,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction: draws its masks, multiplies ``w_ih x`` where that is normalized, calls the operator."""
    w_ih, w_hh, b_ih, b_hh, w_hr, w_ln, b_ln, *norms = weights
    hidden, size = w_hh.shape[0] // 4, w_hh.shape[1]
    h0, c0 = states
    if sequences.batch_sizes is not None and h0 is None:
        # The operator's fake function takes the number of sequences from h0.
        batch = int(sequences.batch_sizes[0])
        h0, c0 = x.new_zeros(batch, size), x.new_zeros(batch, hidden)
    masks: list[_Optional] = [None, None, None]
    if kind.train:
        batch = x.shape[0 if kind.batch_first else 1] if h0 is None else h0.shape[0]
        masks = [
            _dropout_mask(x, (batch, size), kind.recurrent_dropout),
            _zoneout_mask(x, hidden, kind.zoneout_c),
            _zoneout_mask(x, size, kind.zoneout_h),
        ]
    multiplied: _Optional = w_ih
    if kind.layer_norm:
        # Autocast normalizes in fp32, and would return it.
        product = F.linear(x, w_ih)
        x = F.layer_norm(product, product.shape[-1:], w_ln, b_ln, kind.eps).to(x.dtype)
        multiplied = None
    options = _Options(kind.zoneout_c, kind.zoneout_h, kind.eps, kind.batch_first, reverse)
    tensors = (x, h0, c0, multiplied, w_hh, b_ih, b_hh, w_hr, *norms)
    return _run(tensors, (*sequences, *masks), options)


def _zoneout_mask(x: Tensor, units: int, rate: float) -> _Optional:
    """1 where a unit keeps its value, for each step and unit."""
    if rate == 0:
        return None
    return x.new_empty((*x.shape[:-1], units), dtype=torch.uint8).bernoulli_(rate)


def _dropout_mask(x: Tensor, shape: tuple[int, int], rate: float) -> _Optional:
    return None if rate == 0 else F.dropout(x.new_ones(shape), rate, True)


# ---- one layer and direction, differentiably ----

# x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, and weight and bias of the norms of w_hh h and of the cell
_DIFFERENTIABLE = 12
# lengths, batch_sizes, recurrent_mask, zoneout_c_mask, zoneout_h_mask
_CONSTANT = 5


def _arguments(
    tensors: Sequence[Any], constants: Sequence[Any], options: _Options
) -> tuple[Any, ...]:
    """In the order of the operator."""
    rates, others = options[:2], options[2:]
    return (*tensors[:8], *constants, *rates, *tensors[8:], *others)


def _run(
    tensors: tuple[Any, ...], constants: tuple[Any, ...], options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``h_n`` and ``c_n`` of one layer and direction."""
    if not serves_native(_SEQUENCE, tensors[0]):
        return reference.lstm(*_arguments(tensors, constants, options))
    if not _needs_grad(tensors):
        return _sequence_op(*_arguments(tensors, constants, options), False)[:3]
    if torch.compiler.is_compiling():
        return LSTMFunction.apply(fixed(options), *tensors, *constants)
    return _apply_sequence(options, *tensors, *constants)


class LSTMFunction(torch.autograd.Function):
    """Gradients of one layer and direction. Saved: the inputs, the output, the gates and the cells."""

    @staticmethod
    def forward(ctx: Any, options: _Options, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        tensors, constants = given[:_DIFFERENTIABLE], given[_DIFFERENTIABLE:]
        y, h_n, c_n, *internal = _sequence_op(*_arguments(tensors, constants, options), True)
        ctx.save_for_backward(*given, y, *internal)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return y, h_n, c_n

    @staticmethod
    def backward(
        ctx: Any, dy: _Optional, dh_n: _Optional, dc_n: _Optional
    ) -> tuple[_Optional, ...]:
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (1 + _DIFFERENTIABLE + _CONSTANT)
        saved, options = ctx.saved_tensors, ctx.options
        tensors = saved[:_DIFFERENTIABLE]
        constants = saved[_DIFFERENTIABLE : _DIFFERENTIABLE + _CONSTANT]
        results = saved[_DIFFERENTIABLE + _CONSTANT :]
        need = ctx.needs_input_grad[1 : 1 + _DIFFERENTIABLE]
        if torch.is_grad_enabled():

            def forward(*tensors):
                return reference.lstm(*_arguments(tensors, constants, options))

            found = _reference_gradients(forward, tensors, need, (dy, dh_n, dc_n))
            return (None, *found, *(None,) * _CONSTANT)
        need_x, _, _, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr, _, need_ln, *_ = need
        dx, dh0, dc0, dw_ih, dw_hh, dbias, dw_hr, dln_hh, dln_c_weight, dln_c_bias = (
            _sequence_backward_op(
                dy, dh_n, dc_n, *_arguments(tensors, constants, options), *results,
                need_x, need_w_ih, need_w_hh, need_b_ih or need_b_hh or need_ln, need_w_hr,
            )
        )  # fmt: skip
        grads = (
            dx, dh0, dc0, dw_ih, dw_hh, dbias, dbias, dw_hr, dln_hh, dbias, dln_c_weight, dln_c_bias,
        )  # fmt: skip
        return (
            None,
            *(
                gradient_like(grad, t) if needed else None
                for grad, t, needed in zip(grads, tensors, need, strict=True)
            ),
            *(None,) * _CONSTANT,
        )


_apply_sequence = super(torch.autograd.Function, LSTMFunction).apply


def _needs_grad(tensors: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _reference_gradients(
    forward: Callable[..., Sequence[Tensor]],
    tensors: Sequence[_Optional],
    need: Sequence[bool],
    given: Sequence[_Optional],
) -> tuple[_Optional, ...]:
    """What ``backward`` returns under ``create_graph=True``: gradients of ``forward(*tensors)``, differentiable too.

    Args:
        given: the gradients of its outputs, ``None`` for zero.
    """
    # Fresh aliases, so that the first-order gradients stop here while their own graph reaches the tensors.
    with torch.enable_grad():
        aliases = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in tensors
        ]
        outputs = forward(*aliases)
        wanted: list[Any] = [t for t, needed in zip(aliases, need, strict=True) if needed]
        pairs = [(out, grad) for out, grad in zip(outputs, given, strict=True) if grad is not None]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
        return tuple([next(found) if needed else None for needed in need])


# ---- autocast ----


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """That of the active autocast, ``None`` without one or where it leaves ``x`` alone."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype not in _CAST:
        return None
    return torch.get_autocast_dtype(device)


def _cast(t: Any, dtype: torch.dtype | None) -> Any:
    return t.to(dtype) if dtype is not None and isinstance(t, Tensor) and t.dtype in _CAST else t


def _cast_all(tensors: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    return [_cast(t, dtype) for t in tensors]


def _cast_pair(hx: Any, dtype: torch.dtype | None) -> Any:
    return tuple(_cast_all(hx, dtype)) if _is_pair(hx) else hx


# ---- what arguments must be ----


def _is_pair(hx: Any) -> bool:
    return isinstance(hx, tuple | list) and len(hx) == 2


def _unstacked(hx: Any, count: int) -> tuple[Sequence[_Optional], Sequence[_Optional]]:
    """The initial states of each layer and direction."""
    if hx is None:
        return (None,) * count, (None,) * count
    if not _is_pair(hx) or hx[0].shape[0] != count or hx[1].shape[0] != count:
        raise RuntimeError(f"{_SEQUENCE}: hx must hold the states of {count} layers and directions")
    return hx[0].unbind(0), hx[1].unbind(0)


def _grouped(params: Sequence[Tensor], kind: _Kind) -> list[_Weights]:
    cells = kind.num_layers * kind.directions
    least = 2 + 2 * kind.has_biases + 6 * kind.layer_norm
    size, rest = divmod(len(params), cells)
    if rest or size - least not in (0, 1):
        raise RuntimeError(
            f"{_SEQUENCE}: params ({len(params)} tensors) must be {least}, with a projection {least + 1}, for each of "
            f"the {cells} layers and directions"
        )
    missing: list[Any] = [None] * 6
    groups = []
    for first in range(0, len(params), size):
        own = list(params[first : first + size])
        biases = own[2:4] if kind.has_biases else missing[:2]
        w_hr = own[2 + 2 * kind.has_biases] if size > least else None
        norms = own[-6:] if kind.layer_norm else missing
        groups.append(_Weights._make([*own[:2], *biases, w_hr, *norms]))
    return groups


def as_lengths(function: str, lengths: Any) -> _Optional:
    """``lengths`` as a tensor, of a list of integers too."""
    if lengths is None or isinstance(lengths, Tensor):
        return lengths
    if not isinstance(lengths, list | tuple):
        raise TypeError(
            f"{function}: lengths ({type(lengths).__name__}) must be a Tensor or a list of integers"
        )
    for i, n in enumerate(lengths):
        if isinstance(n, bool) or not isinstance(n, int | torch.SymInt):
            raise TypeError(f"{function}: lengths[{i}] ({n!r}) must be an integer")
    return torch.tensor(lengths, dtype=torch.int64)


def _pair_of_rates(zoneout: Any) -> tuple[float, float]:
    if isinstance(zoneout, tuple | list):
        if len(zoneout) != 2:
            raise ValueError(f"{_SEQUENCE}: zoneout ({zoneout!r}) must be a rate or a pair of them")
        return zoneout[0], zoneout[1]
    return zoneout, zoneout


def check_rate(function: str, name: str, rate: Any) -> None:
    if isinstance(rate, bool) or not isinstance(rate, int | float):
        raise TypeError(f"{function}: {name} ({rate!r}) must be a number")
    if not 0 <= rate <= 1:
        raise ValueError(f"{function}: {name} ({rate}) must be within 0 and 1")


def _check_rates(kind: _Kind) -> None:
    check_rate(_SEQUENCE, "dropout", kind.dropout)
    check_rate(_SEQUENCE, "zoneout", kind.zoneout_c)
    check_rate(_SEQUENCE, "zoneout", kind.zoneout_h)
    check_rate(_SEQUENCE, "recurrent_dropout", kind.recurrent_dropout)
    if not kind.eps >= 0:
        raise ValueError(f"{_SEQUENCE}: eps ({kind.eps}) must not be negative")


def _check_given(function: str, **tensors: Any) -> None:
    """As :func:`.check_tensors`, of what must not be ``None`` either."""
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


def _check_like(function: str, x: Tensor, **tensors: _Optional) -> None:
    """Every tensor must be of the dtype and on the device of ``x``; and that dtype a floating one."""
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
    """The weights of one cell of ``inputs`` features must fit each other and ``x``; returns its size of ``h``.

    ``suffix`` is that of the module's names, ``_l0_reverse``; empty where the arguments' own are meant.
    """
    kinds = {"w": "weight", "b": "bias"}
    labels = {n: kinds[n[0]] + n[1:] + suffix if suffix else n for n in weights}
    given = {name: t for name, t in weights.items() if t is not None}
    _check_given(function, **{labels[name]: weights[name] for name in ("w_ih", "w_hh")})
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


def _check_cell(x: Tensor, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> None:
    _check_given(_CELL, x=x)
    _check_states(_CELL, hx)
    _check_features(_CELL, x, w_ih, "[N, I]")
    inputs = x.shape[1]
    hidden = _check_weights(_CELL, x, inputs, "", w_ih=w_ih, w_hh=w_hh, b_ih=b_ih, b_hh=b_hh)
    for i, state in enumerate(hx or ()):
        _check_like(_CELL, x, **{f"hx[{i}]": state})
        _check_shape(_CELL, f"hx[{i}]", state, (x.shape[0], hidden))


def _raise_named(check: Callable[..., None], *arguments: Any) -> None:
    """Raises the error that ``check`` has for the input, if it has one, in place of the one that is being handled."""
    try:
        check(*arguments)
    except _REFUSALS as named:
        raise named from None


def _check(x: Tensor, hx: Any, params: Any, sequences: _Sequences, kind: _Kind) -> None:
    lengths, batch_sizes = sequences
    _check_given(_SEQUENCE, x=x)
    check_tensors(_SEQUENCE, lengths=lengths, batch_sizes=batch_sizes)
    if lengths is not None and batch_sizes is not None:
        raise ValueError(f"{_SEQUENCE}: lengths must not be given beside batch_sizes")
    cells = _grouped(params, kind)
    layout = "[B, T, I]" if kind.batch_first else "[T, B, I]"
    _check_features(_SEQUENCE, x, params[0], layout if batch_sizes is None else "[rows, I]")
    inputs = x.shape[-1]
    for k, weights in enumerate(cells):
        layer, direction = divmod(k, kind.directions)
        suffix = f"_l{layer}" + ("_reverse" if direction else "")
        size = _check_weights(_SEQUENCE, x, inputs, suffix, **weights._asdict())
        if direction == kind.directions - 1:
            inputs = kind.directions * size
    batch: int | None
    if batch_sizes is None:
        steps, batch = x.shape[:2] if not kind.batch_first else (x.shape[1], x.shape[0])
        if steps == 0:
            raise RuntimeError(f"{_SEQUENCE}: x (shape {tuple(x.shape)}) must have a step at least")
        if lengths is not None:
            check_lengths(_SEQUENCE, lengths, steps, batch)
    else:
        batch = _check_batch_sizes(batch_sizes, x.shape[0])
    _check_states(_SEQUENCE, hx)
    if hx is not None:
        hidden = cells[0].w_ih.shape[0] // 4
        for i, (state, units) in enumerate(zip(hx, (size, hidden), strict=True)):
            _check_like(_SEQUENCE, x, **{f"hx[{i}]": state})
            rows: Any = state.shape[1] if batch is None and state.dim() > 1 else batch
            _check_shape(_SEQUENCE, f"hx[{i}]", state, (len(cells), rows, units))


def _check_integers(function: str, name: str, t: Tensor) -> list[int] | None:
    """A vector of int64 on the CPU; returns its values, ``None`` where they are not known, as under compile."""
    if t.dtype != torch.int64:
        raise RuntimeError(f"{function}: {name} (dtype {t.dtype}) must be of int64")
    if t.dim() != 1:
        raise RuntimeError(f"{function}: {name} (shape {tuple(t.shape)}) must have one dimension")
    if t.device.type != "cpu":
        raise RuntimeError(f"{function}: {name} (device {t.device}) must be on the CPU")
    return None if torch.compiler.is_compiling() or type(t) is not Tensor else t.tolist()


def check_lengths(function: str, lengths: Tensor, steps: int, batch: int, of: str = "x") -> None:
    """``of`` is the argument that has the ``batch`` sequences."""
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
    """Returns the number of sequences, ``None`` where it is not known, as under compile."""
    values = _check_integers(_SEQUENCE, "batch_sizes", batch_sizes)
    if batch_sizes.shape[0] == 0:
        raise RuntimeError(f"{_SEQUENCE}: batch_sizes (shape (0,)) must have a step at least")
    if values is None:
        return None
    for t, n in enumerate(values):
        if n < 1 or (t > 0 and n > values[t - 1]):
            raise RuntimeError(
                f"{_SEQUENCE}: batch_sizes[{t}] ({n}) must be at least 1, and not grow from step to step"
            )
    if sum(values) != rows:
        raise RuntimeError(
            f"{_SEQUENCE}: batch_sizes (sum {sum(values)}) must count the {rows} rows of x"
        )
    return values[0]
