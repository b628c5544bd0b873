"""Group norm, layer norm 2d and instance norm for the tests: ours, stock PyTorch's, and the exact results.

A `Norm` is a number of groups, POSITION (layer norm 2d) or INSTANCE.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advdl_ops.functional import group_norm, instance_norm, layer_norm_2d
from support.accuracy import ACTIVATIONS, f64
from support.norms import Problem, check_results, collect, make_problem

Norm = int | str
POSITION, INSTANCE = "position", "instance"


def norms_of(shape: tuple[int, ...]) -> list[Norm]:
    """All norms for this shape: one group, one channel per group, numbers of groups in between, and the other two."""
    n, c, positions = shape[0], shape[1], torch.Size(shape[2:]).numel()
    groups = sorted({1, c, *(g for g in (2, 3, 5, 32) if c % g == 0)})
    norms: list[Norm] = [g for g in groups if n * c // g * positions != 1]
    return [*norms, POSITION, *([INSTANCE] if positions > 1 and len(shape) > 2 else [])]


def problem_of(norm: Norm, shape: tuple[int, ...], mix: str = "fp32", **options: Any) -> Problem:
    """As `make_problem`, with running statistics for instance norm only."""
    return make_problem(shape, mix, **{"running": norm == INSTANCE, **options})


def call_ours(
    norm: Norm, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, p: Problem, **options: Any
) -> Tensor:
    if norm == POSITION:
        return layer_norm_2d(x, weight, bias, p.eps, **options)
    if norm == INSTANCE:
        return instance_norm(x, mean, var, weight, bias, True, p.momentum, p.eps, **options)
    assert isinstance(norm, int)
    return group_norm(x, norm, weight, bias, p.eps, **options)


def call_stock(
    norm: Norm, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, p: Problem
) -> Tensor:
    if weight is None and bias is not None:  # torch 2.13's backward fails
        weight = torch.ones_like(bias)
    if norm == POSITION:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, p.eps).movedim(-1, 1)
    if norm == INSTANCE:
        return F.instance_norm(x, mean, var, weight, bias, True, p.momentum, p.eps)
    assert isinstance(norm, int)
    return F.group_norm(x, norm, weight, bias, p.eps)


def ours(p: Problem, norm: Norm, act: str = "none", backward: bool = True) -> dict[str, Tensor]:
    def call(x, mean, var, weight, bias, residual):
        options = {"residual": residual, "act": ACTIVATIONS[act][0]}
        return call_ours(norm, x, mean, var, weight, bias, p, **options)

    return collect(p, call, backward)


def stock(p: Problem, norm: Norm, act: str = "none", backward: bool = True) -> dict[str, Tensor]:
    if norm == INSTANCE:  # torch 2.13's gradient is wrong for a channels_last dout of one sample
        p = p.laid("contiguous")

    def call(x, mean, var, weight, bias, residual):
        z = call_stock(norm, x, mean, var, weight, bias, p)
        return ACTIVATIONS[act][1](z if residual is None else z + residual)

    return collect(p, call, backward)


class Sets:
    """`p` as arrays [N, C, S] and [C, 1] of `dtype`, and the mean over sets."""

    def __init__(self, p: Problem, norm: Norm, dtype: Any) -> None:
        self.shape, self.norm, self.dtype = p.x.shape, norm, dtype
        n, c = p.x.shape[:2]
        self.size = (n, c, p.x.shape[2:].numel())
        self.x, self.dout, self.residual = map(self.wide, (p.x, p.dout, p.residual))
        self.weight, self.bias, self.running_mean, self.running_var = map(
            self.wide, (p.weight, p.bias, p.running_mean, p.running_var)
        )

    def wide(self, t: Tensor | None) -> Any:
        if t is None:
            return None
        array = t.detach().double().numpy().astype(self.dtype)
        return array.reshape(self.size if t.dim() > 1 else (-1, 1))

    def mean(self, a: Any) -> Any:
        """For each element, the mean over its set."""
        if a.size == 0:
            return a
        groups = {POSITION: self.size[2], INSTANCE: self.size[1]}.get(self.norm, self.norm)
        # Sets along the last dimension.
        rows = a.swapaxes(1, 2) if self.norm == POSITION else a
        spread = rows.reshape(self.size[0], groups, -1)
        spread = np.broadcast_to(spread.mean(2, keepdims=True), spread.shape).reshape(rows.shape)
        return spread.swapaxes(1, 2) if self.norm == POSITION else spread

    def unbiased(self, var: Any) -> Any:
        return var * (self.size[2] / self.dtype(self.size[2] - 1))

    def tensor(self, a: Any) -> Tensor:
        return torch.from_numpy(a.astype(np.float64)).reshape(self.shape)

    @staticmethod
    def per_channel(a: Any) -> Tensor:
        return torch.from_numpy(a.astype(np.float64)).flatten()


def exactly(p: Problem, norm: Norm, act: str = "none") -> dict[str, Tensor]:
    """The results by the formulas in numpy's long double: the truth for fp64, where stock has rounding errors too."""
    q = Sets(p, norm, np.longdouble)
    weight = np.longdouble(1) if q.weight is None else q.weight
    mean = q.mean(q.x)
    var = q.mean((q.x - mean) ** 2)
    rstd = 1 / np.sqrt(var + np.longdouble(p.eps))
    xhat = (q.x - mean) * rstd
    z = q.tensor(
        xhat * weight
        + (0 if q.bias is None else q.bias)
        + (0 if q.residual is None else q.residual)
    ).requires_grad_()
    out = ACTIVATIONS[act][1](z)
    dz = q.wide(torch.autograd.grad(out, z, torch.ones_like(out))[0]) * q.dout
    along = dz * weight
    dx = rstd * (along - q.mean(along) - xhat * q.mean(along * xhat))
    found = {"out": out.detach(), "dx": q.tensor(dx)}
    if p.residual is not None:
        found["dresidual"] = q.tensor(dz)
    if p.weight is not None:
        found["dweight"] = q.per_channel((dz * xhat).sum((0, 2)))
    if p.bias is not None:
        found["dbias"] = q.per_channel(dz.sum((0, 2)))
    if p.running_mean is not None:
        share = np.longdouble(p.momentum)
        for name, old, new in (
            ("running_mean", q.running_mean, mean),
            ("running_var", q.running_var, q.unbiased(var)),
        ):
            # Every position of a channel has the value of its set.
            batch = new[:, :, 0].mean(0)[:, None]
            found[name] = q.per_channel(old * (1 - share) + share * batch)
    return found


def term_sizes(p: Problem, norm: Norm) -> dict[str, float]:
    """As `norms.term_sizes`: for each result, the size of the terms that are summed."""
    q = Sets(p, norm, np.float64)
    if q.x.size == 0:
        names = ("out", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var")
        return dict.fromkeys(names, 0.0)
    weight = 1.0 if q.weight is None else abs(q.weight)
    mean = q.mean(q.x)
    var = q.mean((q.x - mean) ** 2)
    rstd = 1 / np.sqrt(var + p.eps)
    # The mean is rounded too, which matters if it is large compared with the deviation.
    xhat = (abs(q.x - mean) + abs(mean)) * rstd
    z = xhat * weight + (0 if q.bias is None else abs(q.bias))
    z = z + (0 if q.residual is None else abs(q.residual))
    # The rounding error of z enters the derivative of the activation.
    dz = abs(q.dout) * (1 + z)
    along = dz * weight
    sizes = {
        "out": z,
        "dx": (along + q.mean(along) + xhat * q.mean(along * xhat)) * rstd,
        "dweight": (dz * xhat).sum((0, 2)),
        "dbias": dz.sum((0, 2)),
        "dresidual": dz,
    }
    if p.running_mean is not None:
        sizes["running_mean"] = abs(q.running_mean) + abs(mean)
        spread = var + np.sqrt(var) * abs(mean)
        sizes["running_var"] = q.running_var + q.unbiased(spread)
    return {name: float(a.max()) for name, a in sizes.items()}


def check_problem(
    p: Problem, norm: Norm, act: str = "none", *, what: Any = ""
) -> dict[str, Tensor]:
    """Every result on `p` by the rule of support/accuracy.py; returns them."""
    found = ours(p, norm, act)
    exact = exactly(p, norm, act) if p.x.dtype == f64 else stock(p.to(f64), norm, act)
    check_results(p, found, exact, stock(p, norm, act), term_sizes(p, norm), (norm, act, what))
    return found
