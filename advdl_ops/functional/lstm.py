"""Layers and directions of an LSTM over whole sequences.

Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000) and projections (Sak et al. 2014, arXiv:1402.1128);
layer norm by Ba et al. 2016 (arXiv:1607.06450), zoneout by Krueger et al. 2017 (arXiv:1606.01305), recurrent dropout
by Gal & Ghahramani 2016 (arXiv:1512.05287).

:mod:`.lstm_cell` has one step. The raw operators ``lstm`` and ``lstm_backward`` of ``_schemas.py`` run one layer and
direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .. import reference
from .._schemas import LSTMArguments
from ..backend import fixed, is_traced, serves_native, transformed
from ._lstm_arguments import (
    SEQUENCE,
    OptionalTensor,
    Options,
    Sequences,
    States,
    Weights,
    as_lengths,
    cast_all,
    cast_dtype,
    cast_pair,
    grouped,
    pair_of_rates,
    sequence_dtypes,
    unstacked,
)
from ._lstm_checks import REFUSALS, check_rates, check_sequence, raise_named
from ._lstm_export import exported, exports_as_torchs
from ._lstm_gradients import reference_gradients
from ._norm import gradient_like

_sequence_op = torch.ops.advdl_ops.lstm.default
_sequence_backward_op = torch.ops.advdl_ops.lstm_backward.default


def lstm(
    input: Tensor,
    hx: States | None,
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

    Each layer and direction computes, with D directions, hidden size H and output size R (H, or P with a projection):

    .. math::
        i, f, g, o = \sigma, \sigma, \tanh, \sigma\,(W_{ih} x_t + b_{ih} + W_{hh} (m \odot h_{t-1}) + b_{hh}), \quad
        c_t = f c_{t-1} + i g, \quad h_t = W_{hr}\, o \tanh(c_t)

    Args:
        input: x, ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``; with ``batch_sizes`` ``[rows, I]``. T >= 1. fp32,
            fp64, bf16 or fp16.
        hx: ``(h_0, c_0)``, ``[num_layers * D, B, R]`` and ``[num_layers * D, B, H]``; ``None`` for zeros.
        params: for each layer, and in it for each direction: ``w_ih`` ``[4H, I]`` (``I`` is ``D * R`` after the first
            layer), ``w_hh`` ``[4H, R]``, with ``has_biases`` ``b_ih`` and ``b_hh`` ``[4H]``, with a projection
            ``w_hr`` ``[P, H]``, and with ``layer_norm`` weight and bias of the norm of ``w_ih x`` ``[4H]``, of that of
            ``w_hh h`` ``[4H]`` and of that of the cell ``[H]``.
        dropout: in training, the rate of dropout on the output of every layer but the last.
        train: whether dropout, zoneout and recurrent dropout are drawn.
        lengths: of each sequence of a padded ``x``, ``[B]``, 1 to T, in any order: a CPU tensor of int64, or
            integers. Past a sequence's end ``y`` is zero. The final states of a sequence are those at its own end, and
            the reverse direction starts there. Under compile only the operator checks the values.
        batch_sizes: ``[T]``, of a ``PackedSequence`` whose data is ``x``.
        layer_norm: normalize ``w_ih x`` and ``w_hh h`` before they are added, and the cell before its tanh.
        zoneout: the share of units that keep their value in a step; one rate for the cell and ``h``, or a pair
            ``(cell, h)``. In training it is drawn for each step and unit. Otherwise its expectation is used.
        recurrent_dropout: in training, the share of the units of ``h`` that ``w_hh`` does not see: one mask ``m`` for
            all steps, scaled by 1 / (1 - p).
        eps: of the layer norms.

    Returns:
        ``y`` ``[T, B, D * R]`` (``batch_first`` or packed as ``x`` is), and ``h_n``, ``c_n`` of the shapes of ``hx``.
        All in ``x``'s dtype. Under autocast the dtypes are those of torch's own LSTM: on CUDA the autocast dtype; on
        CPU too for whole sequences of fp32 or bf16 without a projection; otherwise the wider of the autocast dtype and
        of ``c_0``'s dtype (``x``'s without ``hx``), but with a projection ``y`` and ``h_n`` in the autocast dtype.

    Raises:
        RuntimeError: shapes that do not fit together, mixed dtypes or devices, T = 0, bad ``lengths`` or
            ``batch_sizes``. A dtype that is not floating raises its subclass ``NotImplementedError``.
        ValueError: a rate outside of 0..1, ``lengths`` together with ``batch_sizes``, a negative ``eps``.
        TypeError: ``hx`` is not a tuple, ``lengths`` are not integers, or a value that must be a tensor is not one.
    """
    x = input
    options = Options(
        has_biases, num_layers, 2 if bidirectional else 1, batch_first, layer_norm, train, dropout,
        *pair_of_rates(zoneout), recurrent_dropout, eps,
    )  # fmt: skip
    check_rates(options)
    try:
        sequences = Sequences(as_lengths(SEQUENCE, lengths), batch_sizes)
        if exports_as_torchs(params, options):
            # A check in a trace would fix the sizes. Under autocast torch's operator casts.
            if not torch.jit.is_tracing() and cast_dtype(x) is None and batch_sizes is None:
                check_sequence(x, hx, params, sequences, options)
            return exported(x, hx, params, sequences, options)
        dtypes = None
        if cast_dtype(x) is not None:
            whole = lengths is None and batch_sizes is None
            projects = grouped(params, options)[0].w_hr is not None
            dtypes = sequence_dtypes(x, hx, whole=whole, projects=projects)
            (x, *params), hx = cast_all([x, *params], dtypes.cell), cast_pair(hx, dtypes.cell)
        # Usually the operator checks the arguments. But no mask may be drawn for a call that it will refuse.
        if (
            options.draw_masks()
            or lengths is not None
            or batch_sizes is not None
            or type(x) is not Tensor
            or x.is_meta
            or torch.compiler.is_compiling()
            or not serves_native(SEQUENCE, x)
        ):
            check_sequence(x, hx, params, sequences, options)
        y, h_n, c_n = _layers(x, hx, params, sequences, options)
        if dtypes is not None:
            y, h_n = y.to(dtypes.hidden), h_n.to(dtypes.hidden)
        return y, h_n, c_n
    except REFUSALS:
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            raise_named(
                lambda: check_sequence(
                    x, hx, params, Sequences(as_lengths(SEQUENCE, lengths), batch_sizes), options
                )
            )
        raise


def _layers(
    x: Tensor, hx: Any, params: Sequence[Tensor], sequences: Sequences, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    weights = grouped(params, options)
    initial_h, initial_c = unstacked(hx, len(weights))
    # The operator requires both to be contiguous, and lengths to be on x's device.
    lengths, batch_sizes = (t if t is None else t.contiguous() for t in sequences)
    if lengths is not None and lengths.device != x.device:
        lengths = lengths.to(x.device, non_blocking=True)
    sequences = Sequences(lengths, batch_sizes)
    final_h, final_c = [], []
    for layer in range(options.num_layers):
        outputs = []
        for direction in range(options.directions):
            k = layer * options.directions + direction
            states = initial_h[k], initial_c[k]
            y, h_n, c_n = _direction(x, states, weights[k], sequences, options, direction == 1)
            outputs.append(y)
            final_h.append(h_n)
            final_c.append(c_n)
        x = outputs[0] if options.directions == 1 else torch.cat(outputs, -1)
        if options.train and options.dropout > 0 and layer < options.num_layers - 1:
            x = _between_layers(x, sequences, options)
    if options.directions == 1 and weights[0].w_hr is not None and x.requires_grad:
        # Backward needs the output. Stock's does not with a projection, so the output may be written.
        x = x.clone()
    # Stacked even if there is only one, because a view could not be detached in place.
    return x, torch.stack(final_h), torch.stack(final_c)


def _between_layers(x: Tensor, sequences: Sequences, options: Options) -> Tensor:
    """Dropout, by the random numbers that torch's LSTM would draw, which has the time first and no padding."""
    rate, lengths = options.dropout, sequences.lengths
    if sequences.batch_sizes is not None or not x.is_cpu or is_traced() or transformed():
        return F.dropout(x, rate, True)
    if lengths is None:
        if not options.batch_first:
            return F.dropout(x, rate, True)
        mask = F.dropout(x.new_ones(x.shape[1], x.shape[0], x.shape[2]), rate, True)
        return x * mask.transpose(0, 1)
    steps = x.shape[1 if options.batch_first else 0]
    packed = pack_padded_sequence(x, lengths, options.batch_first, enforce_sorted=False)
    dropped = packed._replace(data=F.dropout(packed.data, rate, True))
    return pad_packed_sequence(dropped, options.batch_first, total_length=steps)[0]


def _direction(
    x: Tensor,
    states: tuple[OptionalTensor, OptionalTensor],
    weights: Weights,
    sequences: Sequences,
    options: Options,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction: draws the masks, normalizes ``w_ih x`` with ``layer_norm``, calls the operator."""
    w_hh = weights.w_hh
    hidden, size = w_hh.shape[0] // 4, w_hh.shape[1]
    h0, c0 = states
    if sequences.batch_sizes is not None and h0 is None:
        # The operator's fake function takes the number of sequences from h0.
        batch = int(sequences.batch_sizes[0])
        h0, c0 = x.new_zeros(batch, size), x.new_zeros(batch, hidden)
    recurrent_mask = zoneout_c_mask = zoneout_h_mask = None
    if options.train:
        batch = x.shape[0 if options.batch_first else 1] if h0 is None else h0.shape[0]
        recurrent_mask = _dropout_mask(x, (batch, size), options.recurrent_dropout)
        zoneout_c_mask = _zoneout_mask(x, hidden, options.zoneout_c)
        zoneout_h_mask = _zoneout_mask(x, size, options.zoneout_h)
    w_ih: OptionalTensor = weights.w_ih
    if options.layer_norm:
        # The operator gets the normalized product in place of x, and no w_ih.
        product = F.linear(x, weights.w_ih)
        normalized = F.layer_norm(
            product, product.shape[-1:], weights.w_ln_ih, weights.b_ln_ih, options.eps
        )
        x, w_ih = normalized.to(x.dtype), None  # autocast returns fp32
    return _run(
        LSTMArguments(
            x=x,
            h0=h0,
            c0=c0,
            w_ih=w_ih,
            w_hh=w_hh,
            b_ih=weights.b_ih,
            b_hh=weights.b_hh,
            w_hr=weights.w_hr,
            lengths=sequences.lengths,
            batch_sizes=sequences.batch_sizes,
            recurrent_mask=recurrent_mask,
            zoneout_c_mask=zoneout_c_mask,
            zoneout_h_mask=zoneout_h_mask,
            zoneout_c=options.zoneout_c,
            zoneout_h=options.zoneout_h,
            ln_hh_weight=weights.w_ln_hh,
            ln_hh_bias=weights.b_ln_hh,
            ln_c_weight=weights.w_ln_c,
            ln_c_bias=weights.b_ln_c,
            eps=options.eps,
            batch_first=options.batch_first,
            reverse=reverse,
        )
    )


def _zoneout_mask(x: Tensor, units: int, rate: float) -> OptionalTensor:
    """1 where a unit keeps its value, for each step and unit."""
    if rate == 0:
        return None
    return x.new_empty((*x.shape[:-1], units), dtype=torch.uint8).bernoulli_(rate)


def _dropout_mask(x: Tensor, shape: tuple[int, int], rate: float) -> OptionalTensor:
    return None if rate == 0 else F.dropout(x.new_ones(shape), rate, True)


# ---- one layer and direction, differentiably ----


def _run(arguments: LSTMArguments) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, ``h_n`` and ``c_n`` of one layer and direction."""
    if not serves_native(SEQUENCE, arguments.x):
        return reference.lstm(arguments)
    if not torch.is_grad_enabled() or not any(
        t.requires_grad for t in arguments if isinstance(t, Tensor)
    ):
        return _sequence_op(*arguments, False)[:3]
    if torch.compiler.is_compiling():
        return LSTMFunction.apply(*fixed(arguments))
    return _apply_sequence(*arguments)


# The types of the values in LSTMArguments that are not tensors; a bool is an int. isinstance is cheaper for them than
# for Tensor.
_NUMBERS = (float, int)


class LSTMFunction(torch.autograd.Function):
    """Gradients of one layer and direction. Saved: the inputs, the output, the gates and the cells."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``arguments`` are the fields of :class:`LSTMArguments`: autograd sees no tensor within a tuple."""
        y, h_n, c_n, *internal = _sequence_op(*arguments, True)
        tensors = [None if isinstance(value, _NUMBERS) else value for value in arguments]
        ctx.options = [value if isinstance(value, _NUMBERS) else None for value in arguments]
        ctx.save_for_backward(*tensors, y, *internal)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n

    @staticmethod
    def backward(
        ctx: Any, dy: OptionalTensor, dh_n: OptionalTensor, dc_n: OptionalTensor
    ) -> tuple[OptionalTensor, ...]:
        names = LSTMArguments._fields
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * len(names)
        saved = ctx.saved_tensors
        tensors, results = saved[: len(names)], saved[len(names) :]
        a = LSTMArguments(
            *[option if t is None else t for t, option in zip(tensors, ctx.options, strict=True)]
        )
        if torch.is_grad_enabled():
            return reference_gradients(
                lambda *aliases: reference.lstm(LSTMArguments(*aliases)),
                a, ctx.needs_input_grad, (dy, dh_n, dc_n),
            )  # fmt: skip
        need = LSTMArguments(*ctx.needs_input_grad)
        need_dbias = need.b_ih or need.b_hh or need.ln_hh_bias
        dx, dh0, dc0, dw_ih, dw_hh, dbias, dw_hr, dln_hh_weight, dln_c_weight, dln_c_bias = (
            _sequence_backward_op(
                dy, dh_n, dc_n, *a, *results,
                need.x, need.w_ih, need.w_hh, need_dbias, need.w_hr,
            )
        )  # fmt: skip
        grads = {
            "x": dx, "h0": dh0, "c0": dc0, "w_ih": dw_ih, "w_hh": dw_hh, "b_ih": dbias, "b_hh": dbias, "w_hr": dw_hr,
            "ln_hh_weight": dln_hh_weight, "ln_hh_bias": dbias, "ln_c_weight": dln_c_weight, "ln_c_bias": dln_c_bias,
        }  # fmt: skip
        return tuple(
            [
                gradient_like(grads[name], t) if needed else None
                for name, needed, t in zip(names, need, tensors, strict=True)
            ]
        )


# Function.apply without torch's Python wrapper, which checks for functorch transforms, as serves_native has done.
_apply_sequence = super(torch.autograd.Function, LSTMFunction).apply
