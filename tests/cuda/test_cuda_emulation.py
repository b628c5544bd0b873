"""The host emulation itself: what it must compute, and each fault that it must report."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from cuda_emulation import EmulationError, Emulator, unavailable

pytestmark = pytest.mark.skipif(bool(unavailable()), reason=str(unavailable()))


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    with Emulator() as running:
        yield running


def run(
    emulator: Emulator, name: str, blocks: int = 1, threads: int = 64, **request: int
) -> list[float]:
    request = {"blocks": blocks, "threads": threads, "width": 32, **request}
    raw = emulator.call("selftest", {"name": name, **request})["out"]
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


@pytest.mark.parametrize("width", [32, 8, 4])
def test_shuffles(emulator: Emulator, width: int) -> None:
    threads = 96
    out = run(emulator, "shuffles", threads=threads, width=width)
    for t in range(threads):
        lane, base = t % 32, t - t % 32
        segment = lane // width * width
        xor = lane ^ 5
        expected = (
            xor if xor // width <= lane // width else lane,
            lane + 3 if lane + 3 < segment + width else lane,
            lane - 3 if lane - 3 >= segment else lane,
            segment + 2,
        )
        assert tuple(out[k * threads + t] - base for k in range(4)) == expected


def test_shared_memory_and_barrier(emulator: Emulator) -> None:
    out = run(emulator, "reverse_block", blocks=3, threads=128)
    assert out == [float(127 - t) for _ in range(3) for t in range(128)]


def test_a_missing_barrier_reads_nan(emulator: Emulator) -> None:
    forward = run(emulator, "missing_barrier")
    assert sum(v != v for v in forward) == 32
    backward = run(emulator, "missing_barrier", order=1)
    assert sum(v != v for v in backward) == 32
    # the half that read too early is the other one
    assert all((a != a) != (b != b) for a, b in zip(forward, backward, strict=True))


def test_shared_memory_of_a_block_is_fresh(emulator: Emulator) -> None:
    out = run(emulator, "missing_barrier", blocks=2)
    assert sum(v != v for v in out) == 64


def test_blocks_run_in_the_order_asked_for(emulator: Emulator) -> None:
    assert run(emulator, "turns", blocks=8, threads=32)[:8] == list(range(8))
    assert run(emulator, "turns", blocks=8, threads=32, order=1)[:8] == list(range(7, -1, -1))
    shuffled = run(emulator, "turns", blocks=8, threads=32, order=2, seed=3)[:8]
    assert sorted(shuffled) == list(range(8))
    assert shuffled != list(range(8))


def test_a_dry_run_checks_launches_and_runs_nothing(emulator: Emulator) -> None:
    request = {"blocks": 3, "threads": 64, "width": 32, "dry": True}
    result = emulator.call("selftest", {"name": "global_write_past_the_end", **request})
    assert [launch[:3] for launch in result["launches"]] == [(True, 3, 64)]
    assert "out" not in result
    with pytest.raises(EmulationError, match="too_much_shared: invalid value"):
        emulator.call("selftest", {"name": "too_much_shared", **request})


@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("divergent_barrier", "40 threads at __syncthreads, 0 at a warp operation, 24 finished"),
        ("divergent_shuffle", "31 at a warp operation, 33 finished"),
        ("too_much_shared", "too_much_shared: invalid value"),
        ("shared_past_the_end", "heap-buffer-overflow"),
        ("global_write_past_the_end", "heap-buffer-overflow"),
        ("global_read_past_the_end", "heap-buffer-overflow"),
        ("misaligned_vector", "misaligned address"),
    ],
)
def test_faults_are_reported(emulator: Emulator, name: str, report: str) -> None:
    with pytest.raises(EmulationError, match=report):
        run(emulator, name)
    # and the next call starts from a clean state
    assert run(emulator, "reverse_block") == [float(63 - t) for t in range(64)]
