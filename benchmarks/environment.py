"""The conditions of a measurement: the device, the versions, the commit."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import subprocess
import tempfile
import zlib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
IN_CHECKOUT = (ROOT / "advdl_ops").is_dir() and (ROOT / "benchmarks").is_dir()
RESULTS = PACKAGE / "results" if IN_CHECKOUT else Path("advdl_ops_results")


def _cpu_info(*fields: str) -> str:
    """The first of these fields in /proc/cpuinfo; empty if there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(fields)), "")


def cpu_name() -> str:
    """Model, cores and vector units. On a virtual machine the model's name may not show the generation."""
    import torch

    from advdl_ops._environment import cpu_model

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_model()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: str) -> str:
    if device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name()


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@functools.cache
def commit() -> str:
    """Short hash of the checkout, with ``-dirty`` when a tracked source differs; else the version."""

    if IN_CHECKOUT:
        try:
            changed = _git(
                *("status", "--porcelain", "--untracked-files=no", "--"),
                *(":!benchmarks/results", ":!README.md", ":!docs"),  # what `report` writes
            )
            return _git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
        except (OSError, subprocess.CalledProcessError):
            pass
    try:
        return importlib.metadata.version("advdl_ops")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@functools.cache
def commits_between(old: str, new: str) -> int:
    """The number of commits from one to the other; 0 if git does not know them."""
    names = [name.removesuffix("-dirty") for name in (old, new)]
    if not IN_CHECKOUT or names[0] == names[1]:
        return 0
    try:
        return int(_git("rev-list", "--count", "..".join(names), "--"))
    except (OSError, subprocess.CalledProcessError):
        return 0


@functools.cache
def versions() -> dict[str, str | None]:
    import torch

    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {"torch": torch.__version__, "triton": triton, "cuda": torch.version.cuda}


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def inductor_cache() -> str:
    """Folder for Inductor's compiled code, one for each set of CPU instructions. Inductor's default folder mixes them.

    See docs/stock_faults.md. A temporary folder may later be used on another CPU, for which its code was not compiled.
    """
    instructions = _cpu_info("flags", "Features")  # x86, ARM
    which = zlib.crc32(f"{instructions} {os.environ.get('ATEN_CPU_CAPABILITY')}".encode())
    return str(Path(tempfile.gettempdir()) / f"advdl_ops_inductor_{os.getuid()}_{which:08x}")


def worker_environment(device: str) -> dict[str, str]:
    """Environment of a measuring process.

    By default glibc returns freed memory to the kernel and maps large blocks again. The page faults change a
    memory-bound time by up to 2x. These settings keep the memory. They are read before main().
    The native kernels are required, because a benchmark of the reference by mistake would be useless.
    """
    env = dict(os.environ)
    env.update(
        MALLOC_MMAP_MAX_="0",
        MALLOC_MMAP_THRESHOLD_="4294967296",
        MALLOC_TRIM_THRESHOLD_="17179869184",
        MALLOC_TOP_PAD_="268435456",
        MALLOC_ARENA_MAX="1",
    )
    env.setdefault("ADVDL_OPS_REQUIRE_NATIVE", "1")
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", inductor_cache())
    if device == "cpu":
        # An empty folder, as for a new user, whatever `tune` has stored here. Not on CUDA, where every run would
        # measure again.
        env["ADVDL_OPS_CACHE"] = str(
            Path(tempfile.gettempdir()) / f"advdl_ops_untuned_{os.getpid()}"
        )
    if IN_CHECKOUT:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env
