"""The build's results: what the libraries link, export and weigh, what ptxas reported, the wheel, the pins."""

import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import tomllib
import torch

import advdl_ops

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "advdl_ops" / "lib"
NATIVE = ROOT / "build" / "native"
CUDA_SOURCES = (ROOT / "csrc" / "cuda").glob("*.cu")
KERNELS = sorted(path.stem for path in CUDA_SOURCES if "__global__" in path.read_text())

# torch's stable C interface, and what every Linux process has.
TORCH_SYMBOL = re.compile(r"(aoti_torch|torch)_\w+")
C_LIBRARY = {
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libstdc++.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}


def readelf(*arguments: str | Path) -> str:
    command = ["readelf", "--wide", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def library(device: str) -> Path:
    path = LIB / f"libadvdl_ops_{device}.so"
    if device == "cuda" and not path.exists():
        cache = (NATIVE / "CMakeCache.txt").read_text()
        if (
            "ADVDL_NVCC:FILEPATH=ADVDL_NVCC-NOTFOUND" in cache
            or os.environ.get("ADVDL_OPS_CUDA") == "0"
        ):
            pytest.skip("built without nvcc")
    return path


def undefined_symbols(path: Path) -> dict[str, str]:
    """Symbols that the library takes from others, with the version ("GLIBC_2.2.5") where they have one."""
    found = {}
    for line in readelf("--dyn-syms", path).splitlines():
        columns = line.split()
        if len(columns) >= 8 and columns[6] == "UND":
            name, _, version = columns[7].partition("@")
            found[name] = version.strip("@")
    return found


@pytest.mark.parametrize(
    ("device", "torch_libraries"),
    [("cpu", {"libtorch.so", "libtorch_cpu.so"}), ("cuda", {"libtorch.so", "libtorch_cpu.so"})],
)
def test_needed_libraries(device: str, torch_libraries: set[str]) -> None:
    """Neither one Python nor one build of torch: no libpython, libtorch_python, libtorch_cuda, libcudart."""
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("--dynamic", library(device))))
    assert needed - C_LIBRARY <= torch_libraries
    # libtorch.so must be named: it is what brings libtorch_cuda.so in.
    assert ("libtorch.so" if device == "cuda" else "libtorch_cpu.so") in needed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_run_path(device: str) -> None:
    dynamic = readelf("--dynamic", library(device))
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_takes_only_the_stable_interface(device: str) -> None:
    """Nothing of Python, and nothing of torch but its stable C functions (no C++ symbol of ATen or c10)."""
    symbols = undefined_symbols(library(device))
    assert any(TORCH_SYMBOL.fullmatch(name) for name in symbols)
    foreign = [
        name
        for name, version in symbols.items()
        if not version.startswith(("GLIBC", "GCC", "CXXABI"))  # GLIBC_..., GLIBCXX_...
        and not TORCH_SYMBOL.fullmatch(name)
        and name
        not in {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    ]
    assert foreign == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_exports_nothing_of_its_own(device: str) -> None:
    """Both libraries hold the same names; visible, the second loaded would run the first one's code."""
    exported = [
        line.split()[-1]
        for line in readelf("--dyn-syms", library(device)).splitlines()
        if len(line.split()) >= 8
        and line.split()[4] in ("GLOBAL", "WEAK")
        and line.split()[6] != "UND"
    ]
    # What Python asks of the CPU library by its name is in that alone.
    expected = ["advdl_ops_cpu_capability"] if device == "cpu" else []
    found = [name for name in exported if "advdl_ops" in name or "cuda" in name.lower()]
    assert found == expected


def test_size() -> None:
    total = sum(path.stat().st_size for path in LIB.glob("*.so"))
    assert 0 < total <= 30 * 2**20


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_do_not_spill(kernel: str) -> None:
    library("cuda")
    reports = list(NATIVE.glob(f"**/{kernel}.cu.o.ptxas"))
    assert len(reports) == 1
    spilled, function, functions = [], "", 0
    for line in reports[0].read_text().splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            function = f"{match[1]} ({match[2]})"
            functions += 1
        elif "bytes spill" in line and ", 0 bytes spill stores, 0 bytes spill loads" not in line:
            spilled.append(f"{function}: {line.strip()}")
    assert functions > 0
    assert spilled == [], f"{len(spilled)} of {functions}:\n" + "\n".join(spilled[:10])


def test_error_without_torch_names_the_command() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """One wheel for every Python, with all that belongs in it; unpacked elsewhere, it computes."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run([*command, "-w", tmp_path, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(
        rf"advdl_ops-{re.escape(advdl_ops.__version__)}-py3-none-linux_\w+\.whl", wheel.name
    )

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = {f"advdl_ops/lib/{path.name}" for path in LIB.glob("*.so")}
    for source, target in (("advdl_ops", "advdl_ops"), ("benchmarks", "advdl_ops/benchmarks")):
        for path in (ROOT / source).rglob("*.py"):
            expected.add(f"{target}/{path.relative_to(ROOT / source)}")
    expected.add("advdl_ops/py.typed")
    packed = {name for name in names if ".dist-info/" not in name}
    assert expected <= packed
    assert all(re.fullmatch(r"advdl_ops/_C\.[\w.-]+\.so", name) for name in packed - expected)
    metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
    assert "Requires-Dist: torch>=2.11" in (tmp_path / "site" / metadata).read_text()

    code = (
        "import advdl_ops, torch, advdl_ops.benchmarks.__main__ as bench; "
        "assert 'site' in advdl_ops.__file__, advdl_ops.__file__; "
        "advdl_ops.nn.BatchNormAct2d(3, act='relu')(torch.randn(2, 3, 4, 4)); "
        "assert callable(bench.main)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "ADVDL_OPS_REQUIRE_NATIVE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def build() -> dict[str, Any]:
    """What setup.py defines, without a build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.chdir(ROOT)
        return runpy.run_path("setup.py")


def test_variables_of_the_build(build: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty is none; what is wrong is refused by its name."""
    for name, read, right, wrong in (
        ("MAX_JOBS", build["_jobs"], {"3": 3, "12": 12}, ("0", "-1", "two", "1.5", " ")),
        ("ADVDL_OPS_CUDA", build["_cuda"], {"0": "0", "1": "1"}, ("2", "yes", " ")),
    ):
        monkeypatch.delenv(name, raising=False)
        without = read()
        monkeypatch.setenv(name, "")
        assert read() == without
        for value, expected in right.items():
            monkeypatch.setenv(name, value)
            assert read() == expected
        for value in wrong:
            monkeypatch.setenv(name, value)
            with pytest.raises(SystemExit, match=re.escape(f"{name} ({value!r}) must be")):
                read()


@pytest.mark.parametrize(
    ("option", "gpu", "cpu_alone"),
    [(False, False, False), (True, True, False), (True, False, True)],
)
def test_the_cuda_library_is_left_out_where_there_is_no_gpu(
    option: bool,
    gpu: bool,
    cpu_alone: bool,
    build: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """What `make bench` asks for. The configuration stays the same, so a whole build later compiles the rest."""
    commands: list[tuple[str, ...]] = []
    command = build["CMakeBuild"](setuptools.Distribution())
    command.ensure_finalized()
    command.build_lib, command.for_this_machine = str(tmp_path), option
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(command, "_cmake", lambda *arguments: commands.append(arguments))
    command._build()
    configure, compile_, install = commands
    assert configure[-1] == f"-DADVDL_OPS_CUDA={os.environ.get('ADVDL_OPS_CUDA', '')}"
    assert (compile_[-2:] == ("--target", "cpu")) == cpu_alone
    assert (install[-2:] == ("--component", "cpu")) == cpu_alone
    assert ("torch finds no GPU" in capsys.readouterr().out) == cpu_alone


def test_the_target_of_the_cpu_has_all_but_cuda(build: dict[str, Any]) -> None:
    ninja = [build["_program"]("ninja"), "-C", str(NATIVE), "-t", "commands"]
    whole, cpu = (
        subprocess.run([*ninja, *target], capture_output=True, text=True, check=True).stdout
        for target in ([], ["cpu"])
    )
    assert "libadvdl_ops_cpu.so" in cpu
    assert ("/_C.dir/" in cpu) == ("/_C.dir/" in whole)
    assert "csrc/cuda/" not in cpu
    assert "advdl_ops_cuda" not in cpu


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {name: version for name, equals, version in rows if equals}


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    loose = [x for x in lines if not re.fullmatch(r"#.*|[a-z0-9-]+==[0-9][0-9a-z.]*", x)]
    assert loose == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {
        re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", item)[0]).lower()
        for group in groups
        for item in group
    }  # type: ignore[index]
    assert names <= set(pins())


def test_hooks_use_the_same_versions() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    used = re.findall(r"additional_dependencies: \[([\w-]+)==([\w.]+)\]", text)
    assert {name for name, _ in used} == {"ruff", "clang-format"}
    assert {name: pins()[name] for name, _ in used} == dict(used)


def test_changelog_has_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == "Unreleased"
    assert versions[1] == advdl_ops.__version__


def test_installed_version_is_the_same() -> None:
    try:
        installed = importlib.metadata.version("advdl_ops")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a checkout")
    assert installed == advdl_ops.__version__


def test_readme_links_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
            assert (ROOT / target).exists(), f"{page}: {target}"
