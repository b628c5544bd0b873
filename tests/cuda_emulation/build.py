"""Builds the emulation: `python tests/cuda_emulation/build.py` prints the paths of the module and of the binding.

The objects are kept under build/cuda_emulation/, named by a digest of all that went into them, so a second
call compiles nothing. Needs g++ with AddressSanitizer, pybind11 and CUDA's headers; a GPU or nvcc is not
needed where the headers are there (triton's wheel brings them too).
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
OUTPUT = ROOT / "build" / "cuda_emulation"
NAME = "cuda_emulated"
BINDING = HERE / "lstm_binding.cpp"
BINDING_FLAGS = [
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # as in CMakeLists.txt
    f"-I{CSRC / 'common'}",
]
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",  # device code reads packs through pointers of other types
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++")


@functools.cache
def cuda_include() -> Path | None:
    """A folder with CUDA's headers: CUDA_HOME, nvcc's own, the usual place, or triton's copy."""
    candidates = [
        Path(os.environ[k]) / "include" for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ
    ]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(Path(nvcc).resolve().parent.parent / "include")
        dry = subprocess.run(
            [nvcc, "-dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
        )
        for line in dry.stderr.splitlines():
            if line.startswith("#$ TOP="):
                candidates.append(Path(line.removeprefix("#$ TOP=").strip()) / "include")
    candidates.append(Path("/usr/local/cuda/include"))
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "include")
    for folder in candidates:
        if (folder / "cuda_bf16.h").is_file() and (folder / "cuda_runtime_api.h").is_file():
            return folder.resolve()
    return None


def sanitizer_libraries() -> list[str]:
    """What must be loaded before Python: AddressSanitizer, and the C++ runtime whose throw it wraps."""
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [str(compiler()), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        paths.append(found if os.path.isabs(found) else "")
    return paths


@functools.cache
def unavailable() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "the CUDA emulation is built on Linux only"
    if compiler() is None:
        return "the CUDA emulation needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA emulation needs pybind11"
    if cuda_include() is None:
        return "the CUDA emulation needs CUDA's headers (set CUDA_HOME)"
    if not all(sanitizer_libraries()):
        return "the CUDA emulation needs g++'s AddressSanitizer (libasan)"
    return None


def sources() -> list[Path]:
    ours = [*HERE.glob("*.cpp"), *HERE.glob("*.cu")]
    return sorted({*ours} - {BINDING}) + sorted((CSRC / "cuda").glob("*.cu"))


def digest(paths: list[Path], extra: str) -> str:
    sha = hashlib.sha256(extra.encode())
    for path in sorted(paths):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()[:16]


def build(verbose: bool = False) -> Path:
    """Compiles what changed and returns the module's path."""
    import pybind11

    folders = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    objects = [(source, folders) for source in sources()]
    return link(objects, f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}", [], verbose)


def build_lstm_binding(verbose: bool = False) -> Path:
    """The LSTM's operators for the dispatch key CUDA, on emulated kernels: a library to load beside torch."""
    import pybind11
    import torch

    # With the flags of build() for what both have, whose objects they share.
    folders = [pybind11.get_include(), sysconfig.get_paths()["include"]]
    root = Path(torch.__file__).parent
    objects = [(HERE / "emulation.cpp", folders), (CSRC / "cuda" / "lstm.cu", folders)]
    objects += [(BINDING, [str(root / "include")])]
    return link(
        objects,
        "lstm_binding.so",
        ["-Wl,-Bsymbolic", str(root / "lib" / "libtorch_cpu.so")],
        verbose,
    )


def link(sources: list[tuple[Path, list[str]]], name: str, flags: list[str], verbose: bool) -> Path:
    """A library of sources, each with the folders of headers that are not ours."""
    version = subprocess.run(
        [str(compiler()), "--version"], capture_output=True, text=True, check=True
    )
    key = " ".join([*FLAGS, version.stdout, platform.machine()])
    ours = [*HERE.glob("**/*.h"), *CSRC.glob("common/*.h"), *CSRC.glob("cuda/*.h")]

    def compile_one(source: Path, folders: list[str]) -> Path:
        includes = [f"-I{HERE / 'include'}"]
        for folder in (str(cuda_include()), *folders):
            includes += ["-isystem", folder]
        headers = ours
        if source.name == "emulation.cpp":
            # it sees none of the kernels' headers: a kernel's change leaves it alone
            headers = list(HERE.glob("**/*.h"))
        elif source == BINDING:
            headers = [*ours, *CSRC.glob("bindings/*.h"), *CSRC.glob("bindings/lstm*.cpp")]
            headers += [Path(folder).parent / "version.py" for folder in folders]  # of torch
            includes += BINDING_FLAGS
        target = (
            OUTPUT / f"{source.stem}-{digest([source, *headers], ' '.join([key, *includes]))}.o"
        )
        if not target.exists():
            for old in OUTPUT.glob(f"{source.stem}-*.o"):
                old.unlink(missing_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            command = [str(compiler()), *FLAGS, *includes, "-x", "c++", "-c", str(source)]
            run([*command, "-o", str(partial)], verbose)
            os.replace(partial, target)
        return target

    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / "lock").open("w") as lock:  # two processes of a test run compile nothing twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda given: compile_one(*given), sources))
        library = OUTPUT / digest(objects, " ".join([key, *flags])) / name
        if not library.exists():
            for old in OUTPUT.glob(f"*/{name}"):
                shutil.rmtree(old.parent, ignore_errors=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}.tmp")
            command = [str(compiler()), *FLAGS, "-shared", *map(str, objects), *flags]
            run([*command, "-o", str(partial)], verbose)
            os.replace(partial, library)
    return library


def run(command: list[str], verbose: bool) -> None:
    if verbose:
        print(" ".join(command), file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA emulation did not compile:\n{done.stderr[-8000:]}")


if __name__ == "__main__":
    reason = unavailable()
    if reason:
        sys.exit(reason)
    print(build(verbose=True))
    print(build_lstm_binding(verbose=True))
