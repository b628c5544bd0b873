"""Cases of batch_norm_act, its reference in fp64, and how far a kernel may be from it.

Shared by the tests of the emulated kernels and those on a real GPU; norms.py says how bounds are made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .norms import (
    ACTS,
    CODES,
    DTYPES,
    EPS,
    SIMPLE,
    STEPS,
    WHOLE,
    Z_INPUT,
    Z_OUTPUT,
    Z_RESIDUAL,
    Calls,
    acc_dtype,
    act_slope,
    activated,
    affine,
    assert_within,
    case_name,
    from_bytes,
    inputs_of_backward,
    normal_of,
    per_channel,
    request_of,
    roundoff,
    smallest,
)

__all__ = ["ACTS", "DTYPES", "EPS", "Z_INPUT", "Z_OUTPUT", "Z_RESIDUAL", "Case", "assert_within"]


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    c: int
    s: int
    layout: str = "first"  # [N, C, S]; "last": [N, S, C]
    dtype: str = "f32"
    act: str = "relu"
    training: bool = True
    residual: bool = False
    affine: bool = True
    running: bool = True
    param_dtype: str = "f32"  # of weight, bias and running statistics
    mean: float = 0.5
    offset: int = 0  # elements by which tensors miss 16-byte alignment
    z_output: bool = False  # backward: relu's mask read off the saved output
    want_dx: bool = True
    want_dresidual: bool = False

    def __str__(self) -> str:
        sizes = f"{self.n}x{self.c}x{self.s}"
        return case_name(self, sizes, self.layout, self.dtype, self.act, others=6)


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Tensors of a case, [N, C, S]; x, residual, dout in its dtype, the per-channel ones in its param_dtype."""
    normal = normal_of(case)
    shape = (case.n, case.c, case.s)
    dtype, param = DTYPES[case.dtype], DTYPES[case.param_dtype]
    deviation = torch.linspace(0.5, 2.0, case.c, dtype=torch.float64)[None, :, None]
    shift = (
        case.mean * (1 + torch.arange(case.c, dtype=torch.float64) / max(case.c, 1))[None, :, None]
    )
    inputs = {
        "x": (normal(*shape) * deviation + shift).to(dtype),
        "dout": normal(*shape).to(dtype),
    }
    if case.residual:
        inputs["residual"] = normal(*shape).to(dtype)
    if case.affine:
        inputs["weight"] = (1 + 0.3 * normal(case.c)).to(param)
        inputs["bias"] = (0.3 * normal(case.c)).to(param)
    if case.running or not case.training:
        inputs["running_mean"] = (case.mean + 0.2 * normal(case.c)).to(param)
        inputs["running_var"] = (1 + 0.3 * normal(case.c).abs()).to(param)
    return inputs


def forward_reference(case: Case, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (value in fp64, largest error allowed); momentum 0.1."""
    x = inputs["x"].double()
    weight, bias = affine(inputs, case.c)
    unit_acc = roundoff(acc_dtype(case))
    unit_param = max(roundoff(DTYPES[case.param_dtype]), unit_acc)
    count = case.n * case.s
    out: dict[str, tuple[Tensor, Tensor]] = {}
    if case.training:
        mean = x.mean((0, 2))
        # Not x.var: it merges in one long row, and in fp64 was up to 20 roundings further off than the kernel.
        var = (x - per_channel(mean)).square().mean((0, 2))
        # Every merge rounds the mean once: relative to the mean. The deviations inherit that, squared, and the
        # cross term with a deviation, which averages out over the merges.
        deviation = var.sqrt()
        mean_error = STEPS * unit_acc * (mean.abs() + deviation)
        var_error = (
            STEPS * unit_acc * var + STEPS * unit_acc * mean.abs() * deviation + mean_error**2
        )
        if case.running:
            for name, value, error in (
                ("running_mean", mean, mean_error),
                ("running_var", var * count / max(count - 1, 1), 2 * var_error),
            ):
                new = 0.9 * inputs[name].double() + 0.1 * value
                out[f"{name}_out"] = (
                    new,
                    0.1 * error + 4 * unit_param * (new.abs() + 0.1 * value.abs()),
                )
    else:
        mean, var = inputs["running_mean"].double(), inputs["running_var"].double()
        mean_error, var_error = unit_acc * mean.abs(), unit_acc * var
    rstd = 1 / (var + EPS).sqrt()
    rstd_error = rstd * (0.5 * var_error / (var + EPS) + 4 * unit_acc)
    out["mean"], out["rstd"] = (mean, mean_error), (rstd, rstd_error)

    scale = per_channel(rstd * weight)
    z = (x - per_channel(mean)) * scale + per_channel(bias)
    z_error = (
        scale.abs() * per_channel(mean_error)
        + (x - per_channel(mean)).abs() * per_channel((rstd_error * weight).abs())
        + STEPS
        * unit_acc
        * (z.abs() + scale.abs() * (x - per_channel(mean)).abs() + per_channel(bias).abs())
    )
    if case.residual:
        z = z + inputs["residual"].double()
        z_error = z_error + unit_acc * (z.abs() + inputs["residual"].double().abs())
    out["out"] = activated(case, z, z_error)
    return out


def backward_inputs(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs_of_backward(case, inputs, forward_reference(case, inputs), "mean", "rstd")


def backward_reference(
    case: Case, inputs: dict[str, Tensor], extra: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    x, dout = inputs["x"].double(), inputs["dout"].double()
    weight, bias = affine(inputs, case.c)
    mean, rstd = per_channel(extra["mean"].double()), per_channel(extra["rstd"].double())
    scale, centred = rstd * per_channel(weight), x - mean
    unit, unit_acc = roundoff(DTYPES[case.dtype]), roundoff(acc_dtype(case))
    z = centred * scale + per_channel(bias)
    terms = z.abs() + (centred * scale).abs() + per_channel(bias).abs()
    if case.residual:
        z = z + inputs["residual"].double()
        terms = terms + inputs["residual"].double().abs()
    z_error = STEPS * unit_acc * terms
    slope, slope_error = act_slope(case, z, z_error, extra.get("saved"))
    dz = dout * slope
    dz_error = dout.abs() * slope_error + unit_acc * dz.abs()
    xhat = centred * rstd
    xhat_error = STEPS * unit_acc * xhat.abs()
    out: dict[str, tuple[Tensor, Tensor]] = {}

    def total(v: Tensor) -> Tensor:
        return v.sum((0, 2))

    dbias, dweight = total(dz), total(dz * xhat)
    dbias_error = total(dz_error) + STEPS * unit_acc * total(dz.abs())
    dweight_error = total(dz_error * xhat.abs() + dz.abs() * xhat_error) + STEPS * unit_acc * total(
        (dz * xhat).abs()
    )
    out["dbias"], out["dweight"] = (dbias, dbias_error), (dweight, dweight_error)
    # Where dz waits in memory for the second pass it is rounded to the dtype: exact for identity and relu.
    stored = 0.0 if case.act in SIMPLE else unit
    if case.want_dresidual:
        out["dresidual"] = (dz, dz_error + unit * dz.abs() + smallest(case))
    if case.want_dx:
        count = case.n * case.s if case.training else 1
        factor = 1.0 if case.training else 0.0
        inner = dz - factor * (per_channel(dbias) + xhat * per_channel(dweight)) / count
        inner_error = dz_error + stored * dz.abs() + smallest(case)
        inner_error = inner_error + factor / count * (
            per_channel(dbias_error) + xhat.abs() * per_channel(dweight_error)
        )
        magnitude = dz.abs() + factor / count * (
            per_channel(dbias).abs() + (xhat * per_channel(dweight)).abs()
        )
        dx = scale * inner
        error = scale.abs() * (inner_error + STEPS * unit_acc * magnitude) + unit * dx.abs()
        out["dx"] = (dx, error + smallest(case))
    return out


# ---- to and from the emulation ----


def request(case: Case) -> dict[str, Any]:
    return request_of(
        case,
        running_dtype=CODES[case.param_dtype],
        training=case.training,
        momentum=0.1,
        in_place=case.c % 2 == 0,  # the running statistics; both ways over the cases
    )


def unpack(case: Case, reply: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {name: reply.pop(name) for name in ("launches", "workspace")}
    for name, raw in reply.items():
        dtype = acc_dtype(case)
        if name in WHOLE:
            dtype = DTYPES[case.dtype]
        elif name.startswith("running"):
            dtype = DTYPES[case.param_dtype]
        result[name] = from_bytes(case, raw, dtype, name in WHOLE)
    return result


calls = Calls("", request, unpack)
run_forward, run_backward, dry_run = calls.run_forward, calls.run_backward, calls.dry_run
