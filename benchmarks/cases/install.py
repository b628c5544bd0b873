"""The import and the native build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..environment import IN_CHECKOUT, ROOT
from ..registry import Case, register

if TYPE_CHECKING:
    from ..session import Session

IMPORTS = """
import time
begin = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - begin
begin = time.perf_counter()
{second}
print(torch_seconds, time.perf_counter() - begin)
"""


def run_import(case: Case, session: Session) -> None:
    """``import advdl_ops`` after ``import torch``, each time in a new process and from bytecode, as for users."""
    # With this variable the package would be compiled at each import, but not torch, which pip has compiled.
    variables = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"}
    found: dict[str, list[float]] = {"torch": [], "advdl_ops": []}
    for turn in range(-1, session.rounds):  # the first writes the bytecode
        for second in ("pass", "import advdl_ops"):
            done = subprocess.run(
                [sys.executable, "-c", IMPORTS.format(second=second)],
                capture_output=True,
                text=True,
                check=False,
                cwd=ROOT if IN_CHECKOUT else None,
                env=variables,
            )
            if done.returncode:
                raise RuntimeError(f"{second}: {done.stderr.strip().splitlines()[-1]}")
            if turn < 0:
                continue
            first_seconds, second_seconds = map(float, done.stdout.split())
            found["torch"].append(first_seconds)
            if second != "pass":
                found["advdl_ops"].append(second_seconds)
        session.progress("import", turn + 1, session.rounds)
    session.record("import torch", "import", "time", "s", found["torch"])
    session.record("advdl_ops", "import", "time", "s", found["advdl_ops"])


def run_build(case: Case, session: Session) -> None:
    """``python setup.py build_ext --inplace`` in a copy of the tracked files, without any build folder."""
    if not IN_CHECKOUT:
        raise RuntimeError("the native build is measured in a checkout only")
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, check=True, text=True
    ).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="advdl_ops_build_") as folder:
        for name in filter(None, names):
            if (ROOT / name).is_file():
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        session.progress("build")
        # No compiler cache, as the time of a clean build is measured.
        env = {**os.environ, "CCACHE_DISABLE": "1", "SCCACHE_RECACHE": "1"}
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - begin
        if done.returncode:
            raise RuntimeError("the build failed: " + done.stderr[-2000:])
        session.record("advdl_ops", "build", "time", "s", seconds)
        for library in sorted((Path(folder) / "advdl_ops").rglob("*.so")):
            session.record(library.name, "build", "size", "B", library.stat().st_size)


def _register(
    name: str, run, modes: tuple[str, ...], target: str, rounds: int, opt_in: str = ""
) -> None:
    register(
        Case(
            name=name,
            # With a switch, the case is in every suite: `run --include-build` alone means the quick one.
            suites=("quick", "ops", "models") if opt_in else ("ops",),
            op=name,
            modes=modes,
            dtype="-",
            layout="-",
            shape=(),
            device="cpu",
            run=run,
            target=target,
            rounds=rounds,
            opt_in=opt_in,
        )
    )


_register("import", run_import, ("import",), "<= 50 ms beyond torch", 7)
_register("build", run_build, ("build",), "<= 4 min on 2 cores, <= 30 MB", 1, "build")
