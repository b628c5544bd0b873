"""Runs ``make gpu-check`` on a machine with a CUDA GPU, in at most ten minutes.

Builds for this GPU only, runs the tests marked ``gpu``, runs compute-sanitizer on small shapes if it is installed, and
runs the CUDA benchmark suites, which write ``benchmarks/results/<gpu>/``. Prints a short table at the end. The exit
status is 1 if any step failed or found a wrong value.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 590.0
LAST_CASE_S = 40.0  # time for a benchmark suite to end its current case


@dataclass
class Step:
    name: str
    command: list[str]
    limit_s: float  # of this step; all together stay within LIMIT_S
    budget: bool = False  # the command takes --budget: no new case after this many seconds


@dataclass
class Outcome:
    name: str
    passed: bool
    seconds: float
    note: str


def no_gpu() -> str | None:
    """Why no GPU can be checked here, or None."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} of {sys.executable} was built without CUDA"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False"
    return None


def steps() -> list[Step]:
    python = sys.executable
    plan = [
        Step("build", [python, "setup.py", "--quiet", "build_ext", "--inplace"], 240),
        Step("tests", [python, "-m", "pytest", "-m", "gpu", "-q"], 240),
    ]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=1", python, "tools/gpu_smoke.py"]
        plan.append(Step(tool, [str(word) for word in command], 90))
    for suite, limit in (("ops", 200), ("models", 300)):
        command = [python, "-m", "benchmarks", "run", "--suite", suite, "--device", "cuda"]
        plan.append(Step(f"benchmarks {suite}", command, limit, budget=True))
    return plan


def run(step: Step, environment: dict[str, str], deadline: float) -> Outcome:
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    limit = min(step.limit_s, deadline - start)
    command = step.command
    if step.budget:
        command = [*command, "--budget", f"{limit - LAST_CASE_S:.0f}"]
    tail: list[str] = []
    try:
        process = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=limit,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        output, passed = process.stdout, process.returncode == 0
        tail = [line for line in output.splitlines() if line.strip()]
        note = re.sub(r"^=+ | =+$", "", tail[-1].strip()) if tail else ""
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
        passed, note = False, f"stopped after {limit:.0f} s"
    print(output, flush=True)
    return Outcome(step.name, passed, time.monotonic() - start, note)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    reason = no_gpu()
    if reason is not None:
        print(f"gpu-check needs a CUDA GPU and a torch that can use it: {reason}.", file=sys.stderr)
        return 1

    import torch
    from rich.console import Console
    from rich.table import Table

    major, minor = torch.cuda.get_device_capability()
    environment = {
        **os.environ,
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "ADVDL_OPS_CUDA": "1",
        "ADVDL_OPS_REQUIRE_NATIVE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    deadline = time.monotonic() + LIMIT_S
    outcomes: list[Outcome] = []
    late: list[str] = []
    for step in steps():
        if deadline - time.monotonic() < 2 * LAST_CASE_S:
            late.append(step.name)
            continue
        outcomes.append(run(step, environment, deadline))
        if step.name == "build" and not outcomes[-1].passed:
            break  # without a build the other steps are useless

    table = Table(title=f"gpu-check on {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for column in ("step", "result", "seconds", "last line"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        result = "passed" if outcome.passed else "FAILED"
        table.add_row(outcome.name, result, f"{outcome.seconds:.0f}", outcome.note)
    for name in late:
        table.add_row(name, "not run", "", "no time was left")
    if not any(outcome.name == "memcheck" for outcome in outcomes) and "memcheck" not in late:
        table.add_row("memcheck", "not run", "", "compute-sanitizer is not installed")
    Console().print(table)
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
