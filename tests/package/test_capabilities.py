"""The value tests once more for each CPU capability that the library would not choose here by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IGNORED = "it is ignored"  # what the library prints where this CPU lacks the capability


def others():
    """What this machine has beside the capability that a process chooses: `_C` chooses as the library does."""
    kernels = pytest.importorskip("advdl_ops._C", reason="_C was not built").cpu
    chosen = kernels.capability()
    found = []
    for name in ("default", "avx2", "avx512"):
        try:
            kernels.set_capability(name)
        except ValueError:
            continue
        found.append(name)
    kernels.set_capability(chosen)
    return [name for name in found if name != chosen]


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        "norms/test_batch_norm_act_values.py",
        "norms/test_group_norm_values.py",
        "conv/test_dense_conv2d_values.py",
        "conv/test_depthwise_conv2d_values.py",
        "conv/test_winograd_conv2d_values.py",
        "lstm/test_lstm_values.py",
    ],
)
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_values(capability, values):
    if capability not in others():
        pytest.skip("the other tests run it, or this CPU has it not")
    environment = {
        **os.environ,
        "ADVDL_OPS_CPU_CAPABILITY": capability,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "not reference", f"tests/{values}"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_unknown_capability_is_named():
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import torch, advdl_ops; advdl_ops.functional.batch_norm_act("
            "torch.zeros(2, 3), None, None, training=True)",
        ],
        cwd=ROOT,
        env={**os.environ, "ADVDL_OPS_CPU_CAPABILITY": "avx3"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ADVDL_OPS_CPU_CAPABILITY (avx3) must be default, avx2 or avx512" in done.stderr
    assert IGNORED in done.stderr
