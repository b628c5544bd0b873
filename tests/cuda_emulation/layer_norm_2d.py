"""Cases of layer_norm_2d, its reference in fp64, and how far a kernel may be from it: as batch_norm_act.py."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .batch_norm_act import Case as NormCase
from .batch_norm_act import make_inputs as norm_inputs
from .batch_norm_act import request as norm_request
from .batch_norm_act import unpack
from .norms import (
    ACTS,
    DTYPES,
    EPS,
    SIMPLE,
    STEPS,
    Calls,
    acc_dtype,
    act_slope,
    activated,
    affine,
    assert_within,
    inputs_of_backward,
    per_channel,
    roundoff,
    smallest,
)

__all__ = ["ACTS", "DTYPES", "SIMPLE", "Case", "assert_within"]


@dataclasses.dataclass(frozen=True)
class Case(NormCase):
    act: str = "identity"
    running: bool = False
    bias: bool = True  # beside weight
    want_dweight: bool = True


def make_inputs(case: Case) -> dict[str, Tensor]:
    """As batch norm's, but one mean for all channels: its distance from zero is that of every position."""
    inputs = norm_inputs(dataclasses.replace(case, mean=0.0))
    inputs["x"] = (inputs["x"].double() + case.mean).to(DTYPES[case.dtype])
    if not case.bias:
        inputs.pop("bias", None)
    return inputs


def per_position(v: Tensor) -> Tensor:
    return v[:, None, :]


def statistics(case: Case, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and variance [N, S] of x (fp64), and their largest errors."""
    unit = roundoff(acc_dtype(case))
    mean = x.mean(1)
    var = (x - per_position(mean)).square().mean(1)
    deviation = var.sqrt()
    mean_error = STEPS * unit * (mean.abs() + deviation)
    var_error = STEPS * unit * var + STEPS * unit * mean.abs() * deviation + mean_error**2
    return mean, var, mean_error, var_error


def forward_reference(case: Case, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (value in fp64, largest error allowed)."""
    x = inputs["x"].double()
    weight, bias = (per_channel(v) for v in affine(inputs, case.c))
    unit_acc = roundoff(acc_dtype(case))
    mean, var, mean_error, var_error = statistics(case, x)
    rstd = 1 / (var + EPS).sqrt()
    rstd_error = rstd * (0.5 * var_error / (var + EPS) + 4 * unit_acc)
    scale, centred = per_position(rstd) * weight, x - per_position(mean)
    z = centred * scale + bias
    z_error = (
        scale.abs() * per_position(mean_error)
        + centred.abs() * per_position(rstd_error) * weight.abs()
        + STEPS * unit_acc * (z.abs() + (scale * centred).abs() + bias.abs())
    )
    if case.residual:
        residual = inputs["residual"].double()
        z = z + residual
        z_error = z_error + unit_acc * (z.abs() + residual.abs())
    return {
        "mean": (mean.flatten(), mean_error.flatten()),
        "var": (var.flatten(), var_error.flatten()),
        "out": activated(case, z, z_error),
    }


def backward_inputs(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return inputs_of_backward(case, inputs, forward_reference(case, inputs), "mean", "var")


def gradient_of_z(
    case: Case, inputs: dict[str, Tensor], extra: dict[str, Tensor], xhat: Tensor
) -> tuple[Tensor, Tensor]:
    """dz, and its largest error."""
    weight, bias = (per_channel(v) for v in affine(inputs, case.c))
    unit_acc = roundoff(acc_dtype(case))
    dout = inputs["dout"].double()
    z = xhat * weight + bias
    terms = z.abs() + (xhat * weight).abs() + bias.abs()
    if case.residual and not case.z_output:
        residual = inputs["residual"].double()
        z, terms = z + residual, terms + residual.abs()
    slope, slope_error = act_slope(case, z, STEPS * unit_acc * terms, extra.get("saved"))
    dz = dout * slope
    return dz, dout.abs() * slope_error + unit_acc * dz.abs() * (case.act not in SIMPLE)


def backward_reference(
    case: Case, inputs: dict[str, Tensor], extra: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    x = inputs["x"].double()
    weight = per_channel(affine(inputs, case.c)[0])
    mean, var = (extra[k].double().view(case.n, 1, case.s) for k in ("mean", "var"))
    unit, unit_acc = roundoff(DTYPES[case.dtype]), roundoff(acc_dtype(case))
    rounding = STEPS * unit_acc
    rstd = 1 / (var + EPS).sqrt()
    xhat = (x - mean) * rstd
    dz, dz_error = gradient_of_z(case, inputs, extra, xhat)
    product = dz * xhat
    product_error = dz_error * xhat.abs() + rounding * product.abs()
    out: dict[str, tuple[Tensor, Tensor]] = {}
    if case.want_dweight:
        out["dbias"] = (dz.sum((0, 2)), (dz_error + rounding * dz.abs()).sum((0, 2)))
        error = (product_error + rounding * product.abs()).sum((0, 2))
        out["dweight"] = (product.sum((0, 2)), error)
    if case.want_dresidual:
        out["dresidual"] = (dz, dz_error + unit * dz.abs() + smallest(case))
    if case.want_dx:

        def average(v: Tensor) -> Tensor:
            return v.mean(1, keepdim=True)

        shift, slope = average(weight * dz), average(weight * product)
        shift_error = average(weight.abs() * (dz_error + rounding * dz.abs()))
        slope_error = average(weight.abs() * (product_error + rounding * product.abs()))
        inner = weight * dz - (shift + xhat * slope)
        magnitude = (weight * dz).abs() + shift.abs() + (xhat * slope).abs()
        error = weight.abs() * dz_error + shift_error + xhat.abs() * slope_error
        dx = rstd * inner
        out["dx"] = (
            dx,
            rstd * (error + rounding * magnitude) + unit * dx.abs() + smallest(case),
        )
    return out


# ---- to and from the emulation ----


def request(case: Case) -> dict[str, Any]:
    # kEachPosition of csrc/common/group_norm.h
    return norm_request(case) | {"groups": 0, "want_dweight": case.want_dweight}


calls = Calls("group_norm_", request, unpack)
run_forward, run_backward, dry_run = calls.run_forward, calls.run_backward, calls.dry_run
