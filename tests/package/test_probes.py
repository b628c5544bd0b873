"""`_C`: build information and the roofline probes."""

import platform
import sysconfig
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest

import advdl_ops


@pytest.fixture(scope="module")
def native() -> ModuleType:
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        pytest.skip("this Python has no headers, so _C was not built")
    from advdl_ops import _C

    return _C


def test_build_info(native: ModuleType) -> None:
    info = native.build_info()
    assert info["version"] == advdl_ops.__version__
    assert info["python"] == platform.python_version()
    assert info["cpu_capabilities"][0] == "default"
    if platform.machine() == "x86_64":
        assert info["cpu_capabilities"] == ["default", "avx2", "avx512"]
    assert "-O3" in info["flags"]
    assert "-ffast-math" not in info["flags"]
    assert info["compiler"]
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 11)
    assert bool(info["cuda"]) == bool(info["cuda_architectures"])


def test_copy_bandwidth(native: ModuleType) -> None:
    """Between 0.1 GB/s and 100 TB/s; a buffer in cache is not slower by far than one that is not."""
    large = native.copy_bandwidth(64 << 20, 1)
    assert 1e8 < large < 1e14
    assert native.copy_bandwidth(64 << 10, 1) > 0.5 * large
    assert 1e8 < native.copy_bandwidth(8 << 20, 2) < 1e14
    assert native.copy_bandwidth(4097, 3) > 0  # neither lines nor threads divide it


def test_peak_flops(native: ModuleType) -> None:
    """Between 0.1 GFLOP/s and 10 TFLOP/s per thread; threads do not add up to less than one of them."""
    one = native.peak_flops(1)
    assert 1e8 < one < 1e13
    assert 0.5 * one < native.peak_flops(2) < 2 * 1e13


def test_releases_the_gil(native: ModuleType) -> None:
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    ticker = threading.Thread(target=count)
    ticker.start()
    before = ticks
    native.copy_bandwidth(64 << 20, 1)
    during = ticks - before
    done.set()
    ticker.join()
    assert during > 3


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("copy_bandwidth", (0, 1), r"copy_bandwidth: bytes \(0\) must lie in 4096"),
        ("copy_bandwidth", (-1, 1), r"bytes \(-1\)"),
        ("copy_bandwidth", (1 << 20, 0), r"copy_bandwidth: threads \(0\) must lie in 1"),
        ("peak_flops", (0,), r"peak_flops: threads \(0\)"),
        ("peak_flops", (100_000,), r"threads \(100000\)"),
    ],
)
def test_bad_arguments(
    native: ModuleType, function: str, arguments: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(native, function)(*arguments)
