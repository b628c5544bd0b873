"""The CUDA kernels of batch norm by emulation: parts of a call alone.

The last pass of the forward, with given statistics; the statistics; the input's gradient, with given means.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_emulation import Emulator, batch_norm_act
from cuda_emulation.batch_norm_act_cases import SUITE
from cuda_emulation.norms import EPS, acc_dtype, assert_within, kernels


def cases(direction: str, paths: tuple[str, ...], step: int) -> Any:
    found = [
        pytest.param(path, case, id=f"{path}-{case}")
        for path in paths
        for case in getattr(SUITE, direction)[path][::step]
    ]
    return pytest.mark.parametrize(("path", "case"), found)


@cases("forward", ("fused", "split", "eval"), 5)
def test_last_pass_alone_gives_the_same_bits(emulator: Emulator, path: str, case: Any) -> None:
    inputs = batch_norm_act.make_inputs(case)
    settings = SUITE.settings[path]
    whole = batch_norm_act.run_forward(emulator, case, inputs, **settings)
    given = {name: t for name, t in inputs.items() if not name.startswith("running")}
    given |= {"mean": whole["mean"], "rstd": whole["rstd"]}
    case = dataclasses.replace(case, training=False, running=False)
    again = batch_norm_act.run_forward(emulator, case, given, **settings)
    assert kernels(again) == 1 and again["workspace"] == 0
    assert torch.equal(again["out"], whole["out"])


@cases("forward", ("split",), 4)
def test_statistics_alone(emulator: Emulator, path: str, case: Any) -> None:
    case = dataclasses.replace(case, running=False)
    inputs = batch_norm_act.make_inputs(case)
    result = batch_norm_act.run_forward(emulator, case, inputs, moments_only=True)
    assert kernels(result) == 2 and "out" not in result
    reference = batch_norm_act.forward_reference(case, inputs)
    variance = result["rstd"].double() / (case.n * case.s)
    found = {"mean": result["mean"], "rstd": (variance + EPS).rsqrt()}
    assert_within(found, {name: reference[name] for name in found})


@cases("backward", ("split",), 4)
def test_input_gradient_by_means_of_a_larger_batch(
    emulator: Emulator, path: str, case: Any
) -> None:
    case = dataclasses.replace(case, want_dx=True, want_dresidual=False)
    inputs = batch_norm_act.make_inputs(case)
    extra = batch_norm_act.backward_inputs(case, inputs)
    reference = batch_norm_act.backward_reference(case, inputs, extra)
    for name, mean in (("dweight", "mean_dz_xhat"), ("dbias", "mean_dz")):
        extra[mean] = (reference[name][0] / (case.n * case.s)).to(acc_dtype(case))
    result = batch_norm_act.run_backward(emulator, case, inputs, extra, means_given=True)
    assert kernels(result) == 1 and result["workspace"] == 0
    assert_within({"dx": result["dx"]}, {"dx": reference["dx"]})
    # Other means change each value by as much as the formula says: none is taken from this batch.
    doubled = extra | {name: 2 * extra[name] for name in ("mean_dz_xhat", "mean_dz")}
    again = batch_norm_act.run_backward(emulator, case, inputs, doubled, means_given=True)
    assert not torch.equal(again["dx"], result["dx"])
