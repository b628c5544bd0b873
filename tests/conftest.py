"""What every test runs under: kernels or nothing, a seed of its own, no GPU tests without a GPU."""

import os

# Before advdl_ops is imported: a test of kernels must never pass on the reference unnoticed.
os.environ["ADVDL_OPS_REQUIRE_NATIVE"] = "1"
# And before torch is: beside another worker (pytest-xdist) a thread that waits must leave its core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

CPU_LIBRARY = Path(__file__).parents[1] / "advdl_ops" / "lib" / "libadvdl_ops_cpu.so"


def pytest_configure(config: pytest.Config) -> None:
    if not CPU_LIBRARY.exists():
        pytest.exit(
            "the native library is not built: run `make build` or `python setup.py build_ext --inplace` first",
            returncode=4,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_native_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user runs: the reference may stand in where no kernel can serve."""
    from advdl_ops import backend

    monkeypatch.setattr(backend, "_require_native", False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads, for a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """For many small calls on a busy machine; that results do not depend on threads has tests of its own."""
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compile() -> Iterator[None]:
    """No graph compiled for an earlier test, and none left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(params=["default", "avx2", "avx512"])
def cpu(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The kernels without torch, each capability of this machine in turn."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("this Python has no headers, so _C was not built")
    from advdl_ops._C import cpu as kernels

    before = kernels.capability()
    try:
        kernels.set_capability(request.param)
    except ValueError:
        assert request.param != "default"
        pytest.skip(f"this CPU has no {request.param}")
    assert kernels.capability() == request.param
    yield kernels
    kernels.set_capability(before)
