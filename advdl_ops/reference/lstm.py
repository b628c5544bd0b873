"""The LSTM in plain PyTorch: one step, and one layer and direction over whole sequences.

Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000), and the variants that csrc/common/lstm.h describes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._schemas import LSTMArguments, acc_dtype


def lstm_cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`advdl_ops.functional.lstm_cell`; ``None`` for ``h`` or ``c`` means zeros."""
    wide = _widened(x)
    with _without_autocast(x):
        zeros = wide(x.new_zeros(x.shape[0], w_hh.shape[1]))
        # The product with zeros is computed too, so that the gradient of w_hh is zero and not missing.
        product = F.linear(zeros if h is None else wide(h), wide(w_hh))
        z = _projected(wide, x, w_ih, b_ih, b_hh) + product
        hidden, cell = _step(z, zeros if c is None else wide(c), lambda state: state)
    return hidden.to(x.dtype), cell.to(x.dtype)


def lstm(arguments: LSTMArguments) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction, as the raw operator ``lstm``.

    A compiler unrolls the loop over the steps and reads the values of ``batch_sizes``, so both are static there.

    Returns:
        ``y`` with rows as ``x``, ``h_n`` ``[B, R]`` and ``c_n`` ``[B, H]``.
    """
    a = arguments
    wide = _widened(a.x)
    hidden_size, size = a.w_hh.shape[0] // 4, a.w_hh.shape[1]
    dim = 0 if a.batch_sizes is not None or not a.batch_first else 1  # the time dimension, if any
    batch = batch_of(a)

    def steps(rows: Tensor | None) -> tuple[Any, ...]:
        """A tensor of rows as one tensor for each step."""
        if rows is None:
            return (None,) * count
        return rows.unbind(dim) if a.batch_sizes is None else rows.split(a.batch_sizes.tolist())

    count = a.x.shape[dim] if a.batch_sizes is None else a.batch_sizes.shape[0]
    with _without_autocast(a.x):
        weight, weight_hr = wide(a.w_hh), None if a.w_hr is None else wide(a.w_hr)
        in_product = _normalization(a.ln_hh_weight, a.ln_hh_bias, a.eps, wide)
        in_cell = _normalization(a.ln_c_weight, a.ln_c_bias, a.eps, wide)
        mask = None if a.recurrent_mask is None else wide(a.recurrent_mask)
        known = a.x if a.lengths is None else _without_padding(a.x, a.lengths, dim)
        projected = steps(_projected(wide, known, a.w_ih, a.b_ih, a.b_hh))
        keeps_c, keeps_h = steps(a.zoneout_c_mask), steps(a.zoneout_h_mask)
        h = weight.new_zeros(batch, size) if a.h0 is None else wide(a.h0)
        c = weight.new_zeros(batch, hidden_size) if a.c0 is None else wide(a.c0)
        outputs: list[Any] = [None] * count
        for t in reversed(range(count)) if a.reverse else range(count):
            # A packed step has only the sequences that reach it.
            rows = projected[t].shape[0]
            last_h, last_c = (h, c) if a.batch_sizes is None else (h[:rows], c[:rows])
            fed = last_h if mask is None else last_h * mask[:rows]
            z = projected[t] + in_product(F.linear(fed, weight))
            now_h, now_c = _step(z, last_c, in_cell)
            if weight_hr is not None:
                now_h = F.linear(now_h, weight_hr)
            now_c = _zoneout(keeps_c[t], a.zoneout_c, last_c, now_c)
            now_h = _zoneout(keeps_h[t], a.zoneout_h, last_h, now_h)
            outputs[t] = now_h
            if a.lengths is not None:
                runs = (t < a.lengths).unsqueeze(1)
                outputs[t] = torch.where(runs, now_h, 0)
                now_h, now_c = torch.where(runs, now_h, last_h), torch.where(runs, now_c, last_c)
            h = now_h if a.batch_sizes is None else torch.cat([now_h, h[rows:]])
            c = now_c if a.batch_sizes is None else torch.cat([now_c, c[rows:]])
        y = torch.stack(outputs, dim) if a.batch_sizes is None else torch.cat(outputs)
    return y.to(a.x.dtype), h.to(a.x.dtype), c.to(a.x.dtype)


def batch_of(a: LSTMArguments) -> int:
    """The number of sequences. It reads the value of ``batch_sizes[0]``."""
    if a.batch_sizes is not None:
        return int(a.batch_sizes[0])
    return a.x.shape[0 if a.batch_first else 1]


def _without_padding(x: Tensor, lengths: Tensor, dim: int) -> Tensor:
    """``x`` with zeros past each sequence's end: a NaN there would reach the gradients of the weights as 0 * NaN."""
    times = torch.arange(x.shape[dim], device=x.device)
    runs = times[:, None] < lengths if dim == 0 else times < lengths[:, None]
    return torch.where(runs.unsqueeze(2), x, 0)


def _projected(
    wide: Callable[[Tensor], Tensor],
    x: Tensor,
    w_ih: Tensor | None,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Tensor:
    """The part of the pre-activations that does not depend on ``h``. Without ``w_ih``, ``x`` is the product already."""
    z = wide(x) if w_ih is None else F.linear(wide(x), wide(w_ih))
    for bias in (b_ih, b_hh):
        if bias is not None:
            z = z + wide(bias)
    return z


def _step(z: Tensor, c: Tensor, in_cell: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Pre-activations ``[N, 4H]`` and ``c`` ``[N, H]`` -> hidden state, before a projection, and cell."""
    i, f, g, o = z.chunk(4, 1)
    cell = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * in_cell(cell).tanh(), cell


def _zoneout(keep: Tensor | None, rate: float, before: Tensor, now: Tensor) -> Tensor:
    """Zoneout (Krueger et al. 2017): by the mask of this step, or without a mask by its expectation."""
    if keep is not None:
        return torch.where(keep != 0, before, now)
    return now if rate == 0 else rate * before + (1 - rate) * now


def _normalization(
    weight: Tensor | None, bias: Tensor | None, eps: float, wide: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Layer norm over the last dimension; the identity without a weight."""
    if weight is None or bias is None:
        return lambda t: t
    wide_weight, wide_bias = wide(weight), wide(bias)
    return lambda t: F.layer_norm(t, t.shape[1:], wide_weight, wide_bias, eps)


def _widened(x: Tensor) -> Callable[[Tensor], Tensor]:
    acc = acc_dtype(x.dtype)
    return lambda t: t.to(acc)


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disables autocast, which would multiply in half precision. If it is off, a traced graph gets no extra node."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)
