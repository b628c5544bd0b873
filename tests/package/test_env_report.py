"""``python -m advdl_ops``: what a bug report needs."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import advdl_ops
from advdl_ops import __main__ as env_report

ROOT = Path(__file__).resolve().parents[2]


def run_report(*arguments: str, path: Path = ROOT, **environment: str) -> str:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ADVDL_OPS_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "advdl_ops", *arguments],
        cwd=path,
        env={**inherited, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_json() -> None:
    values = json.loads(run_report("--json", ADVDL_OPS_BACKEND="reference", SECRET_TOKEN="x"))
    assert values["versions"]["advdl_ops"] == advdl_ops.__version__
    assert values["versions"]["torch"] == torch.__version__
    assert platform.python_version() in values["versions"]["python"]
    assert values["native"]["backend"] == "reference"
    assert values["native"]["cpu"] == "loaded"
    assert values["cpu"]["model"]
    assert values["cpu"]["torch_threads"] >= 1
    assert len(values["gpu"]) == torch.cuda.device_count()
    assert values["environment"]["ADVDL_OPS_BACKEND"] == "reference"
    assert "SECRET_TOKEN" not in values["environment"]


def test_text_names_everything() -> None:
    text = run_report(ADVDL_OPS_CPU_CAPABILITY="default")
    for expected in (
        f"torch: {torch.__version__}",
        f"advdl_ops: {advdl_ops.__version__}",
        "cpu: loaded",
        "ADVDL_OPS_CPU_CAPABILITY: default",
        "gpu",
    ):
        assert expected in text, expected


def test_forced_capability_is_the_one_reported() -> None:
    pytest.importorskip("advdl_ops._C")
    values = json.loads(run_report("--json", ADVDL_OPS_CPU_CAPABILITY="default"))
    assert values["cpu"]["kernel_capability"] == "default"


def test_says_why_nothing_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "advdl_ops",
        tmp_path / "advdl_ops",
        ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"),
    )
    text = run_report(path=tmp_path)
    assert "the CPU library was not built" in text
    assert "_C was not built" in text


def test_gpu_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"name": "Some GPU", "capability": "9.0", "driver": None}
    monkeypatch.setattr(env_report, "_gpus", lambda: [gpu, gpu])
    assert env_report.main([]) == 0
    text = capsys.readouterr().out
    assert "gpu 0:\n  name: Some GPU\n  capability: 9.0\n  driver: none\ngpu 1:" in text


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        env_report.main(["--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out
