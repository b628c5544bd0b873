"""Cases of group_norm, its reference in fp64, and how far a kernel may be from it.

Shared by the tests of the emulated kernels and those on a real GPU; norms.py says how bounds are made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .norms import (
    DTYPES,
    EPS,
    STEPS,
    WHOLE,
    Calls,
    acc_dtype,
    act_slope,
    activated,
    affine,
    case_name,
    from_bytes,
    inputs_of_backward,
    normal_of,
    per_channel,
    request_of,
    roundoff,
    smallest,
)


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    c: int
    s: int
    groups: int = 1
    layout: str = "first"  # [N, C, S]; "last": [N, S, C]
    dtype: str = "f32"
    act: str = "relu"
    residual: bool = False
    weight: bool = True
    bias: bool = True
    param_dtype: str = "f32"  # of weight and bias
    mean: float = 0.5
    offset: int = 0  # elements by which tensors miss 16-byte alignment
    z_output: bool = False  # backward: relu's mask read off the saved output
    want_dx: bool = True
    want_dresidual: bool = False
    want_dweight: bool = True

    def __str__(self) -> str:
        sizes = f"{self.n}x{self.c}x{self.s}", f"g{self.groups}"
        return case_name(self, *sizes, self.layout, self.dtype, self.act, others=7)


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Tensors of a case, [N, C, S]; x, residual, dout in its dtype, weight and bias in its param_dtype."""
    normal = normal_of(case)
    shape = (case.n, case.c, case.s)
    dtype, param = DTYPES[case.dtype], DTYPES[case.param_dtype]
    deviation = torch.linspace(0.5, 2.0, max(case.c, 1), dtype=torch.float64)[None, : case.c, None]
    shift = case.mean * (1 + 0.2 * normal(case.n, case.c, 1)) if case.mean < 100 else case.mean
    inputs = {"x": (normal(*shape) * deviation + shift).to(dtype), "dout": normal(*shape).to(dtype)}
    if case.residual:
        inputs["residual"] = normal(*shape).to(dtype)
    if case.weight:
        inputs["weight"] = (1 + 0.3 * normal(case.c)).to(param)
    if case.bias:
        inputs["bias"] = (0.3 * normal(case.c)).to(param)
    return inputs


def by_set(case: Case, v: Tensor) -> Tensor:
    """[N, C, S] as [N, groups, the rest]."""
    return v.reshape(case.n, case.groups, -1)


def per_set(case: Case, v: Tensor) -> Tensor:
    """[N, groups], or flat, as it meets [N, C, S]."""
    return v.reshape(case.n, case.groups).repeat_interleave(case.c // case.groups, 1)[:, :, None]


def normalized(case: Case, x: Tensor, mean: Tensor, rstd: Tensor, inputs: dict[str, Tensor]):
    """z before the residual, and the sum of the magnitudes that it is made of; mean and rstd meet [N, C, S]."""
    weight, bias = affine(inputs, case.c)
    product = (x - mean) * rstd * per_channel(weight)
    z = product + per_channel(bias)
    return z, z.abs() + product.abs() + per_channel(bias).abs()


def forward_reference(case: Case, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (value in fp64, largest error allowed)."""
    x = inputs["x"].double()
    weight, _ = affine(inputs, case.c)
    unit_acc = roundoff(acc_dtype(case))
    sets = by_set(case, x)
    mean = sets.mean(2)
    var = (sets - mean[:, :, None]).square().mean(2)
    # Every merge rounds the mean once: relative to the mean. The deviations inherit that, squared, and the cross
    # term with a deviation, which averages out over the merges.
    deviation = var.sqrt()
    mean_error = STEPS * unit_acc * (mean.abs() + deviation)
    var_error = STEPS * unit_acc * (var + mean.abs() * deviation) + mean_error**2
    rstd = 1 / (var + EPS).sqrt()
    rstd_error = rstd * (0.5 * var_error / (var + EPS) + 4 * unit_acc)

    centred = (x - per_set(case, mean)).abs()
    z, terms = normalized(case, x, per_set(case, mean), per_set(case, rstd), inputs)
    z_error = STEPS * unit_acc * terms + per_channel(weight.abs()) * (
        per_set(case, rstd * mean_error) + centred * per_set(case, rstd_error)
    )
    if case.residual:
        z = z + inputs["residual"].double()
        z_error = z_error + unit_acc * (z.abs() + inputs["residual"].double().abs())
    return {
        "mean": (mean.flatten(), mean_error.flatten()),
        "var": (var.flatten(), var_error.flatten()),
        "out": activated(case, z, z_error),
    }


def backward_inputs(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs_of_backward(case, inputs, forward_reference(case, inputs), "mean", "var")


def backward_reference(
    case: Case, inputs: dict[str, Tensor], extra: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    x, dout = inputs["x"].double(), inputs["dout"].double()
    weight = per_channel(affine(inputs, case.c)[0])
    mean = per_set(case, extra["mean"].double())
    rstd = per_set(case, 1 / (extra["var"].double() + EPS).sqrt())
    unit, unit_acc = roundoff(DTYPES[case.dtype]), roundoff(acc_dtype(case))
    z, terms = normalized(case, x, mean, rstd, inputs)
    if case.residual:
        z = z + inputs["residual"].double()
        terms = terms + inputs["residual"].double().abs()
    slope, slope_error = act_slope(case, z, STEPS * unit_acc * terms, extra.get("saved"))
    dz = dout * slope
    dz_error = dout.abs() * slope_error + unit_acc * dz.abs()
    xhat = (x - mean) * rstd
    xhat_error = STEPS * unit_acc * xhat.abs()
    product, product_error = dz * xhat, dz_error * xhat.abs() + dz.abs() * xhat_error
    out: dict[str, tuple[Tensor, Tensor]] = {}

    def total(v: Tensor) -> Tensor:
        return v.sum((0, 2))

    if case.want_dweight:
        out["dbias"] = total(dz), total(dz_error) + STEPS * unit_acc * total(dz.abs())
        out["dweight"] = (
            total(product),
            total(product_error) + STEPS * unit_acc * total(product.abs()),
        )
    if case.want_dresidual:
        out["dresidual"] = (dz, dz_error + unit * dz.abs() + smallest(case))
    if case.want_dx:

        def mean_of_set(v: Tensor) -> Tensor:
            return per_set(case, by_set(case, weight.abs() * v).mean(2))

        first = per_set(case, by_set(case, weight * dz).mean(2))
        second = per_set(case, by_set(case, weight * product).mean(2))
        inner = weight * dz - first - xhat * second
        magnitude = (
            (weight * dz).abs() + mean_of_set(dz.abs()) + xhat.abs() * mean_of_set(product.abs())
        )
        inner_error = (
            weight.abs() * dz_error
            + mean_of_set(dz_error)
            + xhat.abs() * mean_of_set(product_error)
            + STEPS * unit_acc * magnitude
        )
        dx = rstd * inner
        out["dx"] = (dx, rstd * inner_error + unit * dx.abs() + smallest(case))
    return out


# ---- to and from the emulation ----


def request(case: Case) -> dict[str, Any]:
    return request_of(case, groups=case.groups, want_dweight=case.want_dweight)


def unpack(case: Case, reply: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {name: reply.pop(name) for name in ("launches", "workspace")}
    for name, raw in reply.items():
        dtype = DTYPES[case.dtype] if name in WHOLE else acc_dtype(case)
        result[name] = from_bytes(case, raw, dtype, name in WHOLE)
    return result


calls = Calls("group_norm_", request, unpack)
run_forward, run_backward, dry_run = calls.run_forward, calls.run_backward, calls.dry_run
