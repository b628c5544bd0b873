"""The LSTM for the tests: problems, the results of advdl_ops and of stock PyTorch, and the exact results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from advdl_ops import nn
from support.accuracy import acc_dtype, assert_accurate, f64

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """The sizes and options of a call. ``lengths`` are those of a padded x."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    projection: int = 0
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    states: bool = True
    lengths: tuple[int, ...] | None = None

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def size(self) -> int:
        return self.projection or self.hidden

    def module(self, kind: type, **options: Any) -> Any:
        return kind(
            self.inputs,
            self.hidden,
            self.layers,
            self.bias,
            self.batch_first,
            bidirectional=self.bidirectional,
            proj_size=self.projection,
            **options,
        )

    def state_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        cells = self.layers * self.directions
        return (cells, self.batch, self.size), (cells, self.batch, self.hidden)

    def sequence_shape(self, units: int) -> tuple[int, ...]:
        rows = (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)
        return (*rows, units)


@dataclass
class Problem:
    """The inputs of one call and the gradients of its outputs: already rounded to their dtype."""

    case: Case
    x: Tensor
    hx: tuple[Tensor, Tensor] | None
    params: dict[str, Tensor]
    dy: Tensor
    dh_n: Tensor
    dc_n: Tensor

    def to(self, *args: Any) -> Problem:
        """A copy in another dtype or on another device, always in new memory."""

        def moved(t: Tensor) -> Tensor:
            return t.detach().to(*args, copy=True)

        return Problem(
            self.case,
            moved(self.x),
            None if self.hx is None else (moved(self.hx[0]), moved(self.hx[1])),
            {name: moved(t) for name, t in self.params.items()},
            *map(moved, (self.dy, self.dh_n, self.dc_n)),
        )


def make_problem(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)

    def normal(shape: Any) -> Tensor:
        return torch.randn(shape, generator=g, dtype=f64)

    module = case.module(torch.nn.LSTM, device="meta")
    bound = 1.5 / case.hidden**0.5
    params = {
        name: (torch.rand(t.shape, generator=g, dtype=f64) * 2 - 1).mul(bound).to(dtype)
        for name, t in module.named_parameters()
    }
    h_shape, c_shape = case.state_shapes()
    hx = (normal(h_shape).tanh().to(dtype), normal(c_shape).to(dtype)) if case.states else None
    return Problem(
        case,
        normal(case.sequence_shape(case.inputs)).to(dtype),
        hx,
        params,
        normal(case.sequence_shape(case.directions * case.size)).to(dtype),
        normal(h_shape).to(dtype),
        normal(c_shape).to(dtype),
    )


def gradients(p: Problem, run: Callable[..., Any], params: dict[str, Tensor]) -> Results:
    """``run(x, hx)`` and the gradients of x, the states and ``params``."""
    x = p.x.detach().requires_grad_()
    hx = None if p.hx is None else tuple(t.detach().requires_grad_() for t in p.hx)
    y, (h_n, c_n) = run(x, hx)
    leaves = {"dx": x} | {f"d{name}": t for name, t in params.items()}
    if hx is not None:
        leaves |= {"dh0": hx[0], "dc0": hx[1]}
    outs = (y, h_n, c_n)
    outer = [t.to(out) for t, out in zip((p.dy, p.dh_n, p.dc_n), outs, strict=True)]
    found = torch.autograd.grad(outs, list(leaves.values()), outer)
    named = {"y": y.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()}
    return named | dict(zip(leaves, found, strict=True))


def loaded(p: Problem, kind: type, **options: Any) -> Any:
    module = p.case.module(kind, dtype=p.x.dtype, device=p.x.device, **options)
    module.load_state_dict(p.params, strict=False)
    return module


def ours(p: Problem, packed: bool = False) -> Results:
    """The module's results, with lengths of a padded x, or packed."""
    module = loaded(p, nn.LSTM)

    def run(x: Tensor, hx: Any) -> Any:
        if packed:
            return through_packed(module, p.case, x, hx)
        lengths = None if p.case.lengths is None else torch.tensor(p.case.lengths)
        return module(x, hx, lengths=lengths)

    return gradients(p, run, dict(module.named_parameters()))


def stock(p: Problem) -> Results:
    """Stock PyTorch, packed if there are lengths. If it has no kernel for the dtype, computed in fp32 and rounded."""
    if p.x.dtype == torch.float16 and p.x.device.type == "cpu":
        return {name: t.to(p.x.dtype) for name, t in stock(p.to(acc_dtype(p.x.dtype))).items()}
    module = loaded(p, torch.nn.LSTM)
    call = module if p.case.lengths is None else lambda x, hx: through_packed(module, p.case, x, hx)
    return gradients(p, call, dict(module.named_parameters()))


def through_packed(module: Any, case: Case, x: Tensor, hx: Any) -> Any:
    assert case.lengths is not None
    packed = pack_padded_sequence(x, case.lengths, case.batch_first, enforce_sorted=False)
    y, states = module(packed, hx)
    assert isinstance(y, PackedSequence)
    return pad_packed_sequence(y, case.batch_first, total_length=case.steps)[0], states


# ---- the exact results ----


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


class Direction:
    """One layer and direction by its formulas in numpy, forward and backward, for ``x`` [T, B, I]."""

    def __init__(
        self, x: Any, h: Any, c: Any, weights: dict[str, Any], lengths: Any, reverse: bool
    ):
        self.x, self.weights, self.lengths = x, weights, lengths
        self.times = list(reversed(range(len(x)))) if reverse else list(range(len(x)))
        w_ih, w_hh, w_hr = weights["weight_ih"], weights["weight_hh"], weights.get("weight_hr")
        bias = [weights[name] for name in ("bias_ih", "bias_hh") if name in weights]
        self.kept = {}
        self.y = np.zeros((len(x), *h.shape), x.dtype)
        self.z_size = 0.0
        for t in self.times:
            z = x[t] @ w_ih.T + h @ w_hh.T + sum(bias)
            size = abs(x[t]) @ abs(w_ih).T + abs(h) @ abs(w_hh).T + sum(abs(b) for b in bias)
            i, f, g, o = np.split(z, 4, 1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            cell = f * c + i * g
            hidden = o * np.tanh(cell)
            out = hidden if w_hr is None else hidden @ w_hr.T
            self.kept[t] = (h, c, i, f, g, o, cell, hidden, size)
            runs = self.runs(t)
            self.y[t] = np.where(runs, out, 0)
            h, c = np.where(runs, out, h), np.where(runs, cell, c)
            self.z_size = max(self.z_size, size.max(initial=0))
        self.h_n, self.c_n = h, c

    def runs(self, t: int) -> Any:
        return (t < self.lengths)[:, None]

    def backward(self, dy: Any, dh: Any, dc: Any) -> dict[str, tuple[Any, Any]]:
        """Each gradient, and the sizes of its terms."""
        w_ih, w_hh, w_hr = (self.weights.get(f"weight_{k}") for k in ("ih", "hh", "hr"))
        sums: dict[str, Any] = {
            n: (np.zeros_like(w), np.zeros_like(w)) for n, w in self.weights.items()
        }
        dx, dx_size = np.zeros_like(self.x), np.zeros_like(self.x)
        dh_size = abs(dh)

        def add(name: str, term: Any, size: Any) -> None:
            if name in sums:
                sums[name] = sums[name][0] + term, sums[name][1] + size

        for t in reversed(self.times):
            h, c, i, f, g, o, cell, hidden, z_size = self.kept[t]
            runs = self.runs(t)
            dout, kept_h, kept_c = (
                np.where(runs, dy[t] + dh, 0),
                np.where(runs, 0, dh),
                np.where(runs, 0, dc),
            )
            add("weight_hr", dout.T @ hidden, abs(dout).T @ abs(hidden))
            dhidden = dout if w_hr is None else dout @ w_hr
            tanh = np.tanh(cell)
            dcell = np.where(runs, dc, 0) + dhidden * o * (1 - tanh**2)
            dz = np.concatenate(
                [
                    dcell * g * i * (1 - i),
                    dcell * c * f * (1 - f),
                    dcell * i * (1 - g**2),
                    dhidden * tanh * o * (1 - o),
                ],
                1,
            )
            # The rounding errors of the gates' inputs enter the derivatives of the gates.
            size = abs(dz) * (1 + z_size)
            add("weight_ih", dz.T @ self.x[t], size.T @ abs(self.x[t]))
            add("weight_hh", dz.T @ h, size.T @ abs(h))
            for name in ("bias_ih", "bias_hh"):
                add(name, dz.sum(0), size.sum(0))
            dx[t], dx_size[t] = dz @ w_ih, size @ abs(w_ih)
            dh, dc = dz @ w_hh + kept_h, dcell * f + kept_c
            dh_size = np.maximum(dh_size, size @ abs(w_hh))
        return sums | {"x": (dx, dx_size), "h0": (dh, dh_size), "c0": (dc, dh_size)}


def exactly(p: Problem, dtype: Any = np.longdouble) -> tuple[Results, dict[str, float]]:
    """All results by the formulas, and for each the size of the terms that are summed."""
    case = p.case

    def wide(t: Tensor) -> Any:
        return t.detach().cpu().double().numpy().astype(dtype)

    def rows(t: Tensor) -> Any:
        return wide(t.transpose(0, 1) if case.batch_first else t)

    states = p.hx if p.hx is not None else [torch.zeros(s) for s in case.state_shapes()]
    h0, c0, dh_n, dc_n = map(wide, (*states, p.dh_n, p.dc_n))
    lengths = np.array(case.lengths or [case.steps] * case.batch)
    x, cells = rows(p.x), []
    for layer in range(case.layers):
        for direction in range(case.directions):
            k = layer * case.directions + direction
            suffix = f"_l{layer}" + "_reverse" * direction
            weights = {
                n.removesuffix(suffix): wide(t) for n, t in p.params.items() if n.endswith(suffix)
            }
            cells.append((suffix, Direction(x, h0[k], c0[k], weights, lengths, direction == 1)))
        x = np.concatenate([cell.y for _, cell in cells[-case.directions :]], 2)
    z_size = max(cell.z_size for _, cell in cells)
    found: dict[str, Any] = {
        "y": x,
        "h_n": np.stack([cell.h_n for _, cell in cells]),
        "c_n": np.stack([cell.c_n for _, cell in cells]),
    }
    sizes = {name: float(abs(a).max(initial=0) + z_size) for name, a in found.items()}
    dy, of_states = rows(p.dy), {"h0": [], "c0": []}
    for layer in reversed(range(case.layers)):
        dx, dx_size = 0, 0
        for direction in reversed(range(case.directions)):
            k = layer * case.directions + direction
            suffix, cell = cells[k]
            own = dy[:, :, direction * case.size : (direction + 1) * case.size]
            grads = cell.backward(own, dh_n[k], dc_n[k])
            for name, states_of in of_states.items():
                states_of.insert(0, grads.pop(name))
            dx, dx_size = (a + b for a, b in zip((dx, dx_size), grads.pop("x"), strict=True))
            for name, (grad, size) in grads.items():
                found[f"d{name}{suffix}"] = grad
                sizes[f"d{name}{suffix}"] = float(size.max(initial=0))
        dy = dx
    found["dx"], sizes["dx"] = dx, float(dx_size.max(initial=0))
    if p.hx is not None:
        for name, grads_of in of_states.items():
            found[f"d{name}"] = np.stack([grad for grad, _ in grads_of])
            sizes[f"d{name}"] = float(max(size.max(initial=0) for _, size in grads_of))
    if case.batch_first:
        found |= {name: found[name].swapaxes(0, 1) for name in ("y", "dx")}
    return {
        n: torch.from_numpy(np.ascontiguousarray(a, np.float64)) for n, a in found.items()
    }, sizes


def check_problem(p: Problem, *, packed: bool = False, what: Any = "") -> Results:
    """Every result by the rule of support/accuracy.py; returns them."""
    found = ours(p, packed)
    exact, sizes = exactly(p, np.longdouble if p.x.dtype == f64 else np.float64)
    plain = stock(p)
    assert found.keys() == exact.keys() == plain.keys()
    for name, t in found.items():
        assert t.dtype == p.x.dtype, (name, what)
        assert_accurate(
            t.cpu(),
            exact[name],
            plain[name].cpu(),
            sizes[name],
            (name, p.case, str(p.x.dtype), what),
        )
    return found


def with_lengths(case: Case, seed: int = 0) -> Case:
    """Random lengths in no order. If the batch is large enough, they include the full length and 1."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, case.steps + 1, (case.batch,), generator=g)
    if case.batch > 0:
        lengths[-1] = case.steps
    if case.batch > 1:
        lengths[0] = 1
    return replace(case, lengths=tuple(lengths.tolist()))
