"""The floating point operations of every operator for ``torch.utils.flop_counter``, as it counts torch's own.

A convolution counts by torch's formula whatever computes it: Winograd's multiplies less, and is not counted as less.
Norms and activations count nothing there.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from ._schemas import LSTMArguments
from ._when_imported import when_imported

_Shape = Any  # of a tensor: the counter gives sizes in place of tensors


def register_when_needed() -> None:
    """Registers the formulas, now or when the counter is imported, which takes longer than this package's import."""
    when_imported("torch.utils.flop_counter", _register)


def _register(counter: Any) -> None:
    ops = torch.ops.advdl_ops

    def convolution(x: _Shape, weight: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
        return counter.conv_flop_count(x, weight, out_shape)

    def gradients(dz: _Shape, x: _Shape, weight: _Shape, *options: Any, **_: Any) -> int:
        needs = [option for option in options if isinstance(option, bool)][:2]
        return counter.conv_backward_flop(
            dz, x, weight, None, None, None, None, False, None, None, needs, out_val=(x, weight)
        )

    forwards = [ops.conv2d, ops.dense_conv2d, ops.depthwise_conv2d, ops.winograd_conv2d]
    backwards = [
        ops.conv2d_backward, ops.dense_conv2d_backward, ops.depthwise_conv2d_backward,
        ops.winograd_conv2d_backward,
    ]  # fmt: skip
    for formula, operators in (
        (convolution, forwards),
        (gradients, backwards),
        (_cell, [ops.lstm_cell]),
        (_cell_gradients, [ops.lstm_cell_backward]),
        (_sequence, [ops.lstm]),
        (_sequence_gradients, [ops.lstm_backward]),
    ):
        new = [operator for operator in operators if operator not in counter.flop_registry]
        counter.register_flop_formula(new)(formula)


def _cell(x: _Shape, h: _Shape, c: _Shape, w_ih: _Shape, w_hh: _Shape, *_: Any, **__: Any) -> int:
    # torch multiplies a state of zeros too.
    return 2 * x[0] * (prod(w_ih) + prod(w_hh))


def _cell_gradients(
    dh: _Shape,
    dc: _Shape,
    x: _Shape,
    h: _Shape,
    c: _Shape,
    w_ih: _Shape,
    w_hh: _Shape,
    gates: _Shape,
    need_dx: bool,
    need_dw_ih: bool,
    need_dw_hh: bool,
    *_: Any,
    **__: Any,
) -> int:
    products = (need_dx + need_dw_ih) * prod(w_ih) + ((h is not None) + need_dw_hh) * prod(w_hh)
    return 2 * x[0] * products


def _sequence(
    x: _Shape,
    h0: _Shape,
    c0: _Shape,
    w_ih: _Shape,
    w_hh: _Shape,
    b_ih: _Shape,
    b_hh: _Shape,
    w_hr: _Shape,
    *_: Any,
    **__: Any,
) -> int:
    rows = prod(x[:-1])
    return 2 * rows * sum(prod(weight) for weight in (w_ih, w_hh, w_hr) if weight is not None)


def _sequence_gradients(
    dy: _Shape, dh_n: _Shape, dc_n: _Shape, x: _Shape, *arguments: Any, **_: Any
) -> int:
    h0, _c0, w_ih, w_hh, _b_ih, _b_hh, w_hr = arguments[:7]
    need_dx, need_dw_ih, need_dw_hh, _need_dbias, need_dw_hr = arguments[-5:]
    rows = prod(x[:-1])
    products = (1 + need_dw_hh) * prod(w_hh)
    # A first state of zeros has no gradient.
    batch_first = arguments[LSTMArguments._fields.index("batch_first") - 1]
    first = 0 if h0 is not None else x[0 if batch_first else 1] * prod(w_hh)
    if w_ih is not None:
        products += (need_dx + need_dw_ih) * prod(w_ih)
    if w_hr is not None:
        products += (1 + need_dw_hr) * prod(w_hr)
    return 2 * (rows * products - first)
