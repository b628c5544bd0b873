"""Problems of batch norm, the results of stock and of advdl_ops, and the truth in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from support.accuracy import ACTIVATIONS, acc_dtype, assert_accurate, bf16, f16, f32, f64, in_layout

MIXES = {
    "fp32": (f32, f32, f32),
    "fp64": (f64, f64, f64),
    "bf16": (bf16, f32, f32),
    "fp16": (f16, f32, f32),
    "all-bf16": (bf16, bf16, bf16),
    "all-fp16": (f16, f16, f16),
    "bf16-weights": (bf16, bf16, f32),
    "bf16-buffers": (bf16, f32, bf16),
}

# The mixes that stock supports on CPU.
STOCK_MIXES = ("fp32", "fp64", "bf16", "fp16", "all-bf16", "all-fp16")


@dataclass
class Problem:
    """The inputs of one call, already rounded to their dtypes, so that fp64 arithmetic on them is the truth."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    residual: Tensor | None
    dout: Tensor
    eps: float = 1e-5
    momentum: float = 0.1

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in ``dtype``, in new memory."""
        return replace(
            self,
            **{
                name: None if t is None else t.detach().to(dtype, copy=True)
                for name, t in vars(self).items()
                if t is None or isinstance(t, Tensor)
            },
        )

    def laid(self, layout: str) -> Problem:
        return replace(
            self,
            x=in_layout(self.x, layout),
            residual=None if self.residual is None else in_layout(self.residual, layout),
            dout=in_layout(self.dout, layout),
        )


def make_problem(
    shape: tuple[int, ...],
    mix: str = "fp32",
    *,
    residual: bool = False,
    affine: bool = True,
    running: bool = True,
    mean: float = 0.5,
    std: float = 1.5,
    seed: int = 0,
) -> Problem:
    """Random inputs of ``shape`` [N, C, ...]. Each channel has its own mean and scale."""
    g = torch.Generator().manual_seed(seed)
    x_dtype, weight_dtype, running_dtype = MIXES[mix]
    c = shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=f64)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(c, generator=g, dtype=f64) * (high - low) + low

    per_channel = [1, c] + [1] * (len(shape) - 2)
    x = normal(*shape) * (std * uniform(0.5, 1.5)).view(per_channel)
    x = x + (mean + 0.3 * normal(c)).view(per_channel)
    return Problem(
        x=x.to(x_dtype),
        weight=(uniform(0.5, 1.5) * normal(c).sign()).to(weight_dtype) if affine else None,
        bias=(0.5 * normal(c)).to(weight_dtype) if affine else None,
        running_mean=(mean + 0.1 * normal(c)).to(running_dtype) if running else None,
        running_var=uniform(1.0, 2.0).to(running_dtype) if running else None,
        residual=normal(*shape).to(x_dtype) if residual else None,
        dout=normal(*shape).to(x_dtype),
    )


def _leaf(t: Tensor | None) -> Tensor | None:
    # detach() keeps the strides. clone() would not keep those of every view.
    return None if t is None else t.detach().requires_grad_()


def collect(p: Problem, call: Callable[..., Tensor], backward: bool = True) -> dict[str, Tensor]:
    """Output, new running statistics and gradients of ``call(x, mean, var, weight, bias, residual)``."""
    x, weight, bias, residual = (_leaf(t) for t in (p.x, p.weight, p.bias, p.residual))
    mean, var = (None if t is None else t.clone() for t in (p.running_mean, p.running_var))
    found: dict[str, Tensor | None] = {}
    if backward:
        out = call(x, mean, var, weight, bias, residual)
        wanted = {"dx": x, "dweight": weight, "dbias": bias, "dresidual": residual}
        wanted = {name: t for name, t in wanted.items() if t is not None}
        grads = torch.autograd.grad(out, list(wanted.values()), p.dout.to(out.dtype))
        found |= zip(wanted, grads, strict=True)
    else:
        with torch.no_grad():
            out = call(x, mean, var, weight, bias, residual)
    found |= {"out": out.detach(), "running_mean": mean, "running_var": var}
    return {name: t for name, t in found.items() if t is not None}


def stock(p: Problem, act: str = "none", training: bool = True, backward: bool = True):
    """The results of stock PyTorch on ``p``, in the dtypes of ``p``."""

    def call(x, mean, var, weight, bias, residual):
        z = F.batch_norm(x, mean, var, weight, bias, training, p.momentum, p.eps)
        return ACTIVATIONS[act][1](z if residual is None else z + residual)

    return collect(p, call, backward)


def ours(p: Problem, act: str = "none", training: bool = True, backward: bool = True):
    """The results of ``advdl_ops.functional.batch_norm_act`` on ``p``."""
    from advdl_ops.functional import batch_norm_act

    def call(x, mean, var, weight, bias, residual):
        return batch_norm_act(
            x, mean, var, weight, bias, training, p.momentum, p.eps,
            residual=residual, act=ACTIVATIONS[act][0],
        )  # fmt: skip

    return collect(p, call, backward)


def exactly(p: Problem, act: str = "none", training: bool = True) -> dict[str, Tensor]:
    """The results by the formulas in numpy's long double: the truth for fp64, where stock has rounding errors too."""

    def rows(t: Tensor | None) -> Any:  # [N * S, C], or [C]
        return (
            None
            if t is None
            else t.movedim(1 if t.dim() > 1 else 0, -1)
            .reshape(-1, p.x.shape[1])
            .numpy()
            .astype(np.longdouble)
        )

    def like_x(a: Any) -> Tensor:
        sizes = [p.x.shape[0], *p.x.shape[2:], p.x.shape[1]]
        return torch.from_numpy(a.astype(np.float64)).reshape(sizes).movedim(-1, 1)

    x, dout, residual = rows(p.x), rows(p.dout), rows(p.residual)
    weight = 1 if p.weight is None else rows(p.weight)
    bias = 0 if p.bias is None else rows(p.bias)
    running_mean, running_var = rows(p.running_mean), rows(p.running_var)
    count = max(len(x), 1)
    if training:
        mean = x.sum(0, keepdims=True) / count
        var = ((x - mean) ** 2).sum(0, keepdims=True) / count
    else:
        mean, var = running_mean, running_var
    rstd = 1 / np.sqrt(var + np.longdouble(p.eps))
    xhat = (x - mean) * rstd
    z = like_x(xhat * weight + bias + (0 if residual is None else residual)).requires_grad_()
    out = ACTIVATIONS[act][1](z)
    dz = rows(torch.autograd.grad(out, z, torch.ones_like(out))[0]) * dout
    dbias, dweight = dz.sum(0, keepdims=True), (dz * xhat).sum(0, keepdims=True)
    dx = dz - (dbias + xhat * dweight) / count if training else dz
    found = {"out": out.detach(), "dx": like_x(dx * rstd * weight)}
    if p.residual is not None:
        found["dresidual"] = like_x(dz)
    channels = {}
    if p.weight is not None:
        channels["dweight"] = dweight
    if p.bias is not None:
        channels["dbias"] = dbias
    if p.running_mean is not None:
        share = p.momentum if training and len(x) else 0
        unbiased = var * (count / np.longdouble(max(count - 1, 1)))
        channels["running_mean"] = running_mean * (1 - np.longdouble(share)) + share * mean
        channels["running_var"] = running_var * (1 - np.longdouble(share)) + share * unbiased
    return found | {n: torch.from_numpy(a[0].astype(np.float64)) for n, a in channels.items()}


def term_sizes(p: Problem, training: bool) -> dict[str, float]:
    """For each result, the size of the terms that are summed. The error of one rounding is relative to it."""
    q = p.to(f64)
    x = q.x.movedim(1, -1).flatten(0, -2)  # [N * S, C]
    count, c = x.shape
    if count == 0 or c == 0:
        return dict.fromkeys(
            ("out", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"), 0.0
        )
    mean, var = (x.mean(0), x.var(0, correction=0)) if training else (q.running_mean, q.running_var)
    rstd = (var + q.eps).rsqrt()
    weight = torch.ones_like(mean) if q.weight is None else q.weight.abs()
    bias = torch.zeros_like(mean) if q.bias is None else q.bias.abs()
    # The mean is rounded too, which matters if it is large compared with the deviation.
    xhat = ((x - mean) * rstd).abs() + mean.abs() * rstd
    z = xhat * weight + bias
    if q.residual is not None:
        z = z + q.residual.movedim(1, -1).flatten(0, -2).abs()
    # The rounding error of z enters the derivative of the activation.
    dz = q.dout.movedim(1, -1).flatten(0, -2).abs() * (1 + z)
    dweight, dbias = (dz * xhat).sum(0), dz.sum(0)
    dx = dz + (xhat * dweight + dbias) / count if training else dz
    sizes = {
        "out": z,
        "dx": dx * weight * rstd,
        "dweight": dweight,
        "dbias": dbias,
        "dresidual": dz,
    }
    if q.running_mean is not None and q.running_var is not None:
        sizes["running_mean"] = q.running_mean.abs() + mean.abs()
        spread = var + var.sqrt() * mean.abs()
        sizes["running_var"] = q.running_var + spread * (count / max(count - 1, 1))
    return {name: t.max().item() for name, t in sizes.items()}


def check_problem(
    p: Problem,
    act: str = "none",
    training: bool = True,
    *,
    stock_runs: bool = True,
    what: Any = "",
) -> dict[str, Tensor]:
    """Every result of ``batch_norm_act`` on ``p`` by the rule; returns them."""
    found = ours(p, act, training)
    in_fp64 = p.x.dtype == f64
    exact = exactly(p, act, training) if in_fp64 else stock(p.to(f64), act, training)
    plain = stock(p if stock_runs else p.to(acc_dtype(p.x.dtype)), act, training)
    check_results(p, found, exact, plain, term_sizes(p, training), (act, training, what))
    return found


def check_results(
    p: Problem,
    found: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    sizes: dict[str, float],
    what: Any,
) -> None:
    """Every result on ``p`` must have the dtype of its input and satisfy the rule. ``plain`` is stock's result."""
    assert found.keys() == exact.keys()
    dtypes = {"weight": p.weight, "bias": p.bias, "running_mean": p.running_mean}
    dtypes |= {"running_var": p.running_var, "out": p.x, "x": p.x, "residual": p.residual}
    for name, value in exact.items():
        expected = dtypes[name.removeprefix("d")]
        assert expected is not None
        assert found[name].dtype == expected.dtype, name
        acc = acc_dtype(p.x.dtype)
        assert_accurate(found[name], value, plain[name], sizes[name], (name, what), acc)
