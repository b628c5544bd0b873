"""``import advdl_ops`` works with less than everything, and says once what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from advdl_ops import _library

ROOT = Path(__file__).resolve().parents[2]

COMPUTE = """
import torch, advdl_ops
x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
layer = advdl_ops.nn.ConvBNAct(3, 5, 3, act="relu").double()
with torch.no_grad():
    layer(x)
layer.eval()
out = layer(x)
want = torch.relu(torch.nn.functional.batch_norm(
    torch.nn.functional.conv2d(x, layer.conv.weight, padding=1),
    layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias))
torch.testing.assert_close(out, want)
print("computed")
"""


def run_python(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with the package at ``path``; ADVDL_OPS_* only as given."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ADVDL_OPS_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=path,
        env={**inherited, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def bare_package(tmp_path: Path) -> Path:
    """A folder with the Python files of the package alone, as if nothing had been built."""
    shutil.copytree(
        ROOT / "advdl_ops",
        tmp_path / "advdl_ops",
        ignore=shutil.ignore_patterns("lib", "*.so", "__pycache__"),
    )
    return tmp_path


def test_without_native_libraries(bare_package: Path) -> None:
    done = run_python("import advdl_ops; " + COMPUTE, bare_package)
    assert done.returncode == 0, done.stderr
    assert "computed" in done.stdout
    assert done.stderr.count("RuntimeWarning") == 1, done.stderr
    assert "the CPU library was not built" in done.stderr


def test_without_native_libraries_is_silent_where_reference_was_asked_for(
    bare_package: Path,
) -> None:
    done = run_python(COMPUTE, bare_package, ADVDL_OPS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr


def test_require_native_refuses_the_reference(bare_package: Path) -> None:
    done = run_python(COMPUTE, bare_package, ADVDL_OPS_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "ADVDL_OPS_REQUIRE_NATIVE=1" in done.stderr
    assert "computed" not in done.stdout


def test_broken_library_is_named(bare_package: Path) -> None:
    library = bare_package / "advdl_ops" / "lib" / "libadvdl_ops_cpu.so"
    library.parent.mkdir()
    library.write_bytes(b"no library")
    done = run_python(COMPUTE, bare_package)
    assert done.returncode == 0, done.stderr
    assert "libadvdl_ops_cpu.so could not be loaded" in done.stderr


@pytest.mark.parametrize("missing", ["triton", "numpy", "advdl_ops._C"])
def test_without_module(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\n" + COMPUTE
    done = run_python(code, ROOT, ADVDL_OPS_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "computed" in done.stdout
    assert "advdl_ops runs without" not in done.stderr


def test_without_gpu() -> None:
    done = run_python(COMPUTE, ROOT, CUDA_VISIBLE_DEVICES="", ADVDL_OPS_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr


@pytest.fixture
def cuda_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pretends a torch with CUDA, a CUDA library and GPUs; call it with the versions of the driver and the toolkit."""
    (tmp_path / "libadvdl_ops_cuda.so").touch()
    monkeypatch.setattr(_library, "_LIB_DIR", tmp_path)
    monkeypatch.setattr(_library, "_load", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")

    class Driver:  # has no other function: one that initialises would fail
        def __init__(self, version: int) -> None:
            self.version = version

        def cuDriverGetVersion(self, pointer) -> int:
            pointer._obj.value = self.version
            return 0

    def pretend(driver: int | None, toolkit: str | None) -> None:
        def open_library(name: str) -> Driver:
            assert name == "libcuda.so.1"
            if driver is None:
                raise OSError(name)
            return Driver(driver)

        info = {"cuda": toolkit, "cuda_architectures": ["8.0", "9.0a", "10.0+PTX"]}
        module = None if toolkit is None else SimpleNamespace(build_info=lambda: info)
        monkeypatch.setitem(sys.modules, "advdl_ops._C", module)
        monkeypatch.setattr(_library.ctypes, "CDLL", open_library)
        _library.unsupported_gpu.cache_clear()

    yield pretend
    _library.unsupported_gpu.cache_clear()


@pytest.mark.parametrize(
    ("driver", "toolkit", "serves"),
    [
        (12080, "13.0.88", False),
        (12080, "12.9.86", True),  # a later minor of the same major
        (13000, "13.0.88", True),
        (14010, "13.0.88", True),
        (None, "13.0.88", True),  # no driver, hence no GPU on which a kernel could fail
        (12080, None, True),  # no _C that would tell
        (12080, "", True),
    ],
)
def test_driver_must_serve_the_toolkit(cuda_machine, driver, toolkit, serves) -> None:
    cuda_machine(driver, toolkit)
    reason = _library._load_cuda()
    assert (reason is None) == serves
    if not serves:
        assert "serves CUDA 12.8" in reason
        assert "compiled by CUDA 13.0" in reason


@pytest.mark.parametrize(
    ("capability", "driver", "serves"),
    [
        ((7, 5), 13010, False),
        ((8, 0), 13000, True),
        ((8, 9), 13000, True),  # runs what was compiled for 8.0
        ((9, 0), 13000, True),
        ((12, 0), 13000, False),  # only as PTX
        ((12, 0), 13010, True),
        ((12, 0), None, True),
    ],
)
def test_older_driver_compiles_no_ptx(
    cuda_machine, monkeypatch, capability, driver, serves
) -> None:
    cuda_machine(driver, "13.1.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert (_library.unsupported_gpu(0) is None) == serves


def test_import_is_light() -> None:
    """Importing pulls in nothing of the extras, no compiler stack and no test tool."""
    heavy = [
        "matplotlib",
        "rich",
        "sklearn",
        "torchvision",
        "triton",
        "torch._inductor",
        "safetensors",
    ]
    code = (
        "import sys, torch; before = set(sys.modules); import advdl_ops, advdl_ops.models; "
        f"print([m for m in {heavy} if m in set(sys.modules) - before])"
    )
    done = run_python(code, ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
