"""One step of an LSTM: Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000).

:mod:`.lstm` has whole sequences. The raw operators are ``lstm_cell`` and ``lstm_cell_backward`` of ``_schemas.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backend import is_exported, needs_grad, serves_native
from ._lstm_arguments import (
    CELL,
    OptionalTensor,
    States,
    cast_all,
    cast_dtype,
    cast_pair,
    is_pair,
)
from ._lstm_checks import REFUSALS, check_cell, check_given, raise_named
from ._lstm_export import exported_cell
from ._lstm_gradients import reference_gradients
from ._norm import gradient_like

_cell_op = torch.ops.advdl_ops.lstm_cell.default
_cell_backward_op = torch.ops.advdl_ops.lstm_cell_backward.default


def lstm_cell(
    input: Tensor,
    hx: States | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> States:
    r"""One step of an LSTM; arguments in the order of :func:`torch.lstm_cell`.

    .. math::
        i, f, g, o = \sigma, \sigma, \tanh, \sigma\,(W_{ih} x + b_{ih} + W_{hh} h + b_{hh}), \quad
        c' = f c + i g, \quad h' = o \tanh(c')

    Args:
        input: x, ``[N, I]``; fp32, fp64, bf16 or fp16.
        hx: ``(h, c)``, each ``[N, H]``; ``None`` for zeros.
        w_ih, w_hh: ``[4H, I]`` and ``[4H, H]``, the gates in the order i, f, g, o.
        b_ih, b_hh: ``[4H]`` or ``None``.

    Returns:
        ``(h', c')``, each ``[N, H]``, in ``x``'s dtype. Under autocast the dtype is that of torch's own cell: on CUDA
        the autocast dtype; on CPU the wider of the autocast dtype and of ``c``'s dtype (``x``'s without ``hx``), and
        the whole step is computed in it.

    Raises:
        RuntimeError: shapes that do not fit together, or mixed dtypes or devices. A dtype that is not floating raises
            its subclass ``NotImplementedError``.
        TypeError: ``hx`` is not a tuple, or a value that must be a tensor is not one.
    """
    x = input
    try:
        if (
            type(x) is Tensor
            and (hx is None or type(hx) is tuple)
            and not x.is_meta
            and not (x.is_cuda and torch.is_autocast_enabled("cuda"))
            and serves_native(CELL, x)
            and not torch.compiler.is_compiling()
        ):
            h: OptionalTensor
            c: OptionalTensor
            h, c = (None, None) if hx is None else hx
            if hx is not None and (h is None or c is None):
                raise TypeError  # the operator itself takes h without c
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
    except REFUSALS:
        if not (isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type)):
            raise_named(check_cell, x, hx, w_ih, w_hh, b_ih, b_hh)
            raise
    return _general_cell(x, hx, w_ih, w_hh, b_ih, b_hh)


def _general_cell(x: Tensor, hx: Any, *weights: Any) -> States:
    """:func:`lstm_cell` with the arguments checked first.

    Used under a compiler, on the reference, under autocast, and for meta tensors and subclasses.
    """
    check_given(CELL, x=x)
    dtype = cast_dtype(x)
    if is_exported():
        # A check in a trace would fix the sizes. Under autocast torch's operator casts.
        if not torch.jit.is_tracing() and dtype is None:
            check_cell(x, hx, *weights)
        return exported_cell(x, hx, *weights)
    if dtype is not None and not x.is_cuda:
        # torch multiplies in half precision, and adds the result to a c that may be wider.
        added = hx[1] if is_pair(hx) and isinstance(hx[1], Tensor) else x
        dtype = torch.promote_types(dtype, added.dtype)
    x, w_ih, w_hh, b_ih, b_hh = cast_all([x, *weights], dtype)
    hx = cast_pair(hx, dtype)
    check_cell(x, hx, w_ih, w_hh, b_ih, b_hh)
    h, c = (None, None) if hx is None else hx
    tensors = x, h, c, w_ih, w_hh, b_ih, b_hh
    if not serves_native(CELL, x):
        return reference.lstm_cell(*tensors)
    if needs_grad(*tensors):
        return LSTMCellFunction.apply(*tensors)
    return _cell_op(*tensors, False)[:2]


class LSTMCellFunction(torch.autograd.Function):
    """Gradients of one step. Saved: the inputs, and the gates ``[N, 4H]``."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> States:
        h, c, gates = _cell_op(*tensors, True)
        ctx.save_for_backward(*tensors, gates)
        ctx.set_materialize_grads(False)
        return h, c

    @staticmethod
    def backward(ctx: Any, dh: OptionalTensor, dc: OptionalTensor) -> tuple[OptionalTensor, ...]:
        if dh is None and dc is None:
            return (None,) * 7
        *tensors, gates = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return reference_gradients(reference.lstm_cell, tensors, need, (dh, dc))
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


# Function.apply without torch's Python wrapper, which checks for functorch transforms, as serves_native has done.
_apply_cell = super(torch.autograd.Function, LSTMCellFunction).apply
