"""Runs the example scripts, each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_example(
    name: str, *arguments: str, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs `examples/<name>.py` with ``arguments``, or ``code`` instead of the script."""
    script = str(ROOT / "examples" / f"{name}.py")
    return subprocess.run(
        [sys.executable, *(["-c", code] if code else [script, *arguments])],
        cwd=ROOT / "tests",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
