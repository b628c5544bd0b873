"""The tool that runs the peers' own tests, on its smallest case."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.torchvision_stub import torchvision_models

TOOL = Path(__file__).parents[2] / "tools" / "peer_tests.py"


@pytest.mark.slow
@pytest.mark.extra
def test_one_encoder_of_segmentation_models_pytorch():
    torchvision_models()
    pytest.importorskip("segmentation_models_pytorch")
    command = [sys.executable, TOOL, "segmentation_models_pytorch", "--models", "resnet18"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if "cannot be downloaded" in ended.stderr:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = [line for line in ended.stdout.splitlines() if " passed, " in line]
    assert [line.rpartition(", ")[2] for line in lines] == ["0 failed"] * 3
    assert len({line.rpartition(":")[2] for line in lines}) == 1 and " 0 passed" not in lines[0]
