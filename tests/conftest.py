"""The conditions of every test: kernels are required, each test has its own seed, GPU tests need a GPU."""

import os
import tempfile
from pathlib import Path

# Set before advdl_ops is imported: a test of kernels must never pass on the reference unnoticed.
os.environ["ADVDL_OPS_REQUIRE_NATIVE"] = "1"
# Set before torch is imported: with several workers (pytest-xdist), a waiting thread must release its core.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import signal
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
CPU_LIBRARY = ROOT / "advdl_ops" / "lib" / "libadvdl_ops_cpu.so"
EXTRA_PARTS = 5


def pytest_configure(config: pytest.Config) -> None:
    # Workers (pytest-xdist) start later and inherit this environment.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        # The common folder may contain code that was compiled for another CPU capability (docs/stock_faults.md).
        folder = tempfile.TemporaryDirectory(
            prefix="advdl_ops_inductor_", ignore_cleanup_errors=True
        )
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
    if "ADVDL_OPS_CACHE" not in os.environ:
        # With the choices that `tune` has stored on this machine, other kernels than a test expects would serve.
        store = tempfile.TemporaryDirectory(prefix="advdl_ops_cache_", ignore_cleanup_errors=True)
        os.environ["ADVDL_OPS_CACHE"] = store.name
        config.add_cleanup(store.cleanup)
    os.environ.setdefault("EXTRA_PART", str(extra_part_of_commit()))
    os.environ["EXTRA_PART"] = str(int(os.environ["EXTRA_PART"]) % EXTRA_PARTS)
    if config.getoption("dist", "no") != "no":  # the process that starts the workers
        config.pluginmanager.register(LostWorkers(), "lost workers")
    if not CPU_LIBRARY.exists():
        pytest.exit(
            "the native library is not built: run `make build` or `python setup.py build_ext --inplace` first",
            returncode=4,
        )


def extra_part_of_commit() -> int:
    """The part of the tests marked `extra` that this commit runs. It is always the same for one commit."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # not a clone
        return 0
    return int(found[:8], 16)


def pytest_report_header() -> str:
    part = os.environ["EXTRA_PART"]
    return f"extra tests: part {part} of 0 to {EXTRA_PARTS - 1}, EXTRA_PART={part} repeats it, `-m extra` runs all"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "extra" not in config.option.markexpr:
        part = int(os.environ["EXTRA_PART"])

        def is_left_out(item: pytest.Item) -> bool:
            is_extra = item.get_closest_marker("extra") is not None
            return is_extra and zlib.crc32(item.nodeid.encode()) % EXTRA_PARTS != part

        config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
        items[:] = [item for item in items if not is_left_out(item)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


class LostWorkers:
    """Reports workers that die after their last test. pytest-xdist itself only reports those that die in a test."""

    def __init__(self) -> None:
        self.processes: dict[str, Any] = {}
        self.latest: dict[str, str] = {}
        self.lost: dict[str, str] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node: Any) -> None:
        self.processes[node.gateway.id] = node.gateway._io.popen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(report, "node"):
            self.latest[report.node.gateway.id] = report.nodeid

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        if error:
            self.lost[node.gateway.id] = str(error)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        yield  # xdist waits for its workers here
        for worker, process in self.processes.items():
            code = process.poll()
            # SIGKILL: xdist kills workers that take too long to end.
            if code not in (None, 0, -signal.SIGKILL):
                how = signal.Signals(-code).name if code < 0 else f"status {code}"
                self.lost.setdefault(worker, f"it ended by {how}")
        if self.lost and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for worker, why in self.lost.items():
            latest = self.latest.get(worker, "none")
            terminalreporter.write_line(
                f"LOST worker {worker}: {why}; the last test that it reported: {latest}", red=True
            )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_native_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for users: the reference may serve if no kernel can."""
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
    """For many small calls on a busy machine. Other tests check that results do not depend on threads."""
    torch.set_num_threads(1)


@pytest.fixture
def formats_unwatched() -> Iterator[None]:
    """Lets hooks tell which memory format would serve without them: normally, they prevent channels_last."""
    from advdl_ops import _watch

    with _watch.formats_unwatched():
        yield


@pytest.fixture
def fresh_compile() -> Iterator[None]:
    """No compiled graphs of earlier tests, and none left for later ones."""
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


@pytest.fixture(params=["fused", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn."""
    import advdl_ops

    with advdl_ops.use_backend(request.param):
        yield request.param
