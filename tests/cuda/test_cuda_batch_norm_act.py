"""The CUDA kernels of batch norm by emulation: the last pass alone, with given statistics."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from cuda_emulation import Emulator, batch_norm_act
from cuda_emulation.batch_norm_act_cases import SUITE
from cuda_emulation.norms import kernels

CASES = [
    pytest.param(path, case, id=f"{path}-{case}")
    for path, cases in SUITE.forward.items()
    for case in cases[::3]
]


@pytest.mark.parametrize(("path", "case"), CASES)
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
