"""The native build: ``build_ext`` runs CMake (CMakeLists.txt) with Ninja. Metadata is in pyproject.toml."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / "native"


class CMakeExtension(Extension):
    """All native libraries of the package: what CMake builds and installs below ``package``."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package}._C", sources=[], optional=False)
        self.package = package


class CMakeBuild(build_ext):
    """Configure, build and install into the package: the source's own with ``--inplace``."""

    user_options = [  # noqa: RUF012
        *build_ext.user_options,
        ("for-this-machine", None, "leave the CUDA library out where torch finds no GPU"),
    ]
    boolean_options = [*build_ext.boolean_options, "for-this-machine"]  # noqa: RUF012

    def initialize_options(self) -> None:
        super().initialize_options()
        self.for_this_machine = False

    def run(self) -> None:
        if importlib.util.find_spec("torch") is None:
            raise SystemExit(
                "advdl_ops: torch was not found by the build. Its headers are needed, and pip's isolated build "
                "would not see the torch that you have. Install torch, then run:\n\n"
                "    pip install --no-build-isolation .\n"
            )
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        with (BUILD_DIR / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Ninja itself does not mind a second build beside it
            self._build()

    def _build(self) -> None:
        self._cmake(
            "-S", str(ROOT), "-B", str(BUILD_DIR), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DADVDL_OPS_CUDA={_cuda()}",
        )  # fmt: skip
        cpu_alone = bool(self.for_this_machine) and not _has_gpu()
        if cpu_alone:
            print(
                "advdl_ops: torch finds no GPU here, so only the CPU library is built; "
                "`make build` builds the CUDA library too, where there is nvcc",
                flush=True,
            )
        # The configuration stays that of a whole build: another one would delete what that has compiled.
        target = ["--target", "cpu"] if cpu_alone else []
        self._cmake("--build", str(BUILD_DIR), "--parallel", str(_jobs()), *target)
        package = self._package_dir()
        for library in package.glob("lib/*.so"):
            if not (BUILD_DIR / library.name).exists():  # the CUDA library of a build that had nvcc
                library.unlink()
        component = ["--component", "cpu"] if cpu_alone else []
        self._cmake("--install", str(BUILD_DIR), "--prefix", str(package), *component)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "advdl_ops"
        return [str(path) for path in [*package.glob("_C.*.so"), *package.glob("lib/*.so")]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in place, the libraries are built where they are used

    def _package_dir(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).resolve()) / "advdl_ops"

    def _cmake(self, *arguments: str) -> None:
        command = [_program("cmake"), *arguments]
        # Ninja's progress, with the seconds since its start. On a terminal it rewrites one line.
        environment = {"NINJA_STATUS": "[%f/%t, %e s] ", **os.environ}
        if subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(f"advdl_ops: this command failed: {' '.join(command)}")


class Wheel(bdist_wheel):
    """One wheel serves every Python: the operator libraries hold no Python symbol, and ``_C`` is optional."""

    def run(self) -> None:
        # Whatever an earlier build left there would be packed too.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _program(name: str) -> str:
    """The program of this Python's environment, also where that is not activated, or the one on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"advdl_ops: {name} was not found; run: pip install {name}")
    return found


def _cuda() -> str:
    value = os.environ.get("ADVDL_OPS_CUDA", "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"advdl_ops: ADVDL_OPS_CUDA ({value!r}) must be 0, 1 or empty")
    return value


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _jobs() -> int:
    """MAX_JOBS, or as many as there are cores and 2 GiB of free memory (what an nvcc may take) for each."""
    given = os.environ.get("MAX_JOBS")
    if given:
        if not given.isdecimal() or int(given) < 1:
            raise SystemExit(f"advdl_ops: MAX_JOBS ({given!r}) must be a number of 1 or more")
        return int(given)
    cores = len(os.sched_getaffinity(0))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, free >> 31))


# The benchmark lives at the root of the repository, and is installed as advdl_ops.benchmarks.
benchmarks = ["benchmarks", *(f"benchmarks.{name}" for name in find_packages("benchmarks"))]

setup(
    packages=find_packages(include=["advdl_ops", "advdl_ops.*"])
    + [f"advdl_ops.{name}" for name in benchmarks],
    package_dir={f"advdl_ops.{name}": name.replace(".", "/") for name in benchmarks},
    ext_modules=[CMakeExtension("advdl_ops")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
