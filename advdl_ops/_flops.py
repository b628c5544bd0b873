"""The floating point operations of every operator for ``torch.utils.flop_counter``, as it counts torch's own.

A convolution counts by torch's formula whatever computes it: Winograd's multiplies less, and is not counted as less.
Norms and activations count nothing there.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

from ._schemas import LSTMArguments

_COUNTER = "torch.utils.flop_counter"
_Shape = Any  # of a tensor: the counter gives sizes in place of tensors


def register_when_needed() -> None:
    """Registers the formulas, now or when the counter is imported.

    Not by importing it, which takes longer than the import of this package.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the counter as Python would, with a loader that registers the formulas behind it."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)

    def __getattr__(self, name: str) -> Any:  # get_source and others
        return getattr(self.loader, name)


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
