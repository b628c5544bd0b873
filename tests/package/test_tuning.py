"""The measured choice: where it is looked up, how it is stored, what happens when that fails. Times are fakes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from advdl_ops import tuning
from advdl_ops.tuning import Choice, Store, choose

CPU = torch.device("cpu")


class Key(NamedTuple):
    op: str
    shape: tuple[int, ...]


KEY = Key("conv2d", (2, 3, 4, 5))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    new_process(monkeypatch)
    monkeypatch.setenv("ADVDL_OPS_TUNE", "1")  # on CPU nothing is measured otherwise
    monkeypatch.setattr(tuning, "_CPU_ROUNDS", 1)
    yield
    tuning._warn_once.cache_clear()


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered but what is on disk."""
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_unmeasured", {})
    tuning._warn_once.cache_clear()
    tuning._store.cache_clear()


class Clock:
    """Candidates that return their time, and the measure that reads it off; counts what it measured."""

    def __init__(self, **seconds: float | Exception) -> None:
        self.seconds, self.measured = seconds, 0

    def candidates(self) -> dict[str, Callable[[], float]]:
        return {name: self._call(value) for name, value in self.seconds.items()}

    def _call(self, value: float | Exception) -> Callable[[], float]:
        def call() -> float:
            if isinstance(value, Exception):
                raise value
            return value

        return call

    def measure(self, call: Callable[[], Any]) -> float:
        self.measured += 1
        return call()

    def choose(self, store: Store, key: Any = KEY) -> str:
        return choose(key, self.candidates(), CPU, measure=self.measure, store=store)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache" / "gpu.json")


def test_the_fastest_is_chosen_and_measured_once(store: Store) -> None:
    clock = Clock(first=3.0, second=1.0, third=2.0)
    assert tuning.recall(KEY, CPU) is None
    assert [clock.choose(store) for _ in range(3)] == ["second"] * 3
    assert clock.measured == 3
    assert tuning.recall(KEY, CPU) == "second"
    assert tuning.known() == [
        (CPU, KEY, Choice("second", {"first": 3.0, "second": 1.0, "third": 2.0}, {}))
    ]


def test_of_equal_times_the_first_is_chosen(store: Store) -> None:
    assert Clock(first=1.0, second=1.0).choose(store) == "first"


def test_another_key_is_measured_for_itself(store: Store) -> None:
    assert Clock(a=1.0, b=2.0).choose(store) == "a"
    assert Clock(a=2.0, b=1.0).choose(store, KEY._replace(shape=(2, 3, 4, 6))) == "b"


def test_another_process_reads_the_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(a=2.0, b=1.0).choose(store)
    new_process(monkeypatch)
    clock = Clock(a=1.0, b=2.0)  # would choose otherwise
    assert clock.choose(Store(store.path)) == "b"
    assert clock.measured == 0
    assert tuning.known()[0][2].seconds == {"a": 2.0, "b": 1.0}


def test_the_file_says_why(store: Store) -> None:
    Clock(a=2.0, b=1.0, c=RuntimeError("out of\nresources")).choose(store)
    content = json.loads(store.path.read_text())
    assert content["choices"] == {
        "op=conv2d shape=2x3x4x5": {
            "name": "b",
            "seconds": {"a": 2.0, "b": 1.0},
            "failed": {"c": "RuntimeError: out of resources"},
        }
    }


def test_a_stored_name_that_is_no_candidate_is_measured_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(old=1.0, other=2.0).choose(store)
    new_process(monkeypatch)
    assert Clock(a=2.0, b=1.0).choose(store) == "b"
    new_process(monkeypatch)
    assert Clock(a=1.0, b=2.0).choose(store) == "b"


def test_of_two_processes_that_measured_the_first_to_write_decides(store: Store) -> None:
    clock = Clock(a=2.0, b=1.0)

    def measure(call: Callable[[], Any]) -> float:
        if not store.path.exists():  # meanwhile in the other process
            Store(store.path).add(tuning._text(KEY), Choice("a", {}, {}), clock.candidates())
        return call()

    assert choose(KEY, clock.candidates(), CPU, measure=measure, store=store) == "a"
    assert tuning.recall(KEY, CPU) == "a"


def test_one_candidate_is_not_measured(store: Store) -> None:
    clock = Clock(only=1.0)
    assert clock.choose(store) == "only"
    assert clock.measured == 0 and not store.path.exists()


def test_no_candidate(store: Store) -> None:
    with pytest.raises(ValueError, match="choose: candidates"):
        choose(KEY, {}, CPU, store=store)


# ---- candidates that fail ----


def test_a_candidate_that_raises_is_left_out(store: Store) -> None:
    assert Clock(a=RuntimeError("no such kernel"), b=2.0, c=3.0).choose(store) == "b"
    assert tuning.known()[0][2].failed == {"a": "RuntimeError: no such kernel"}


def test_where_all_raise_the_first_error_is_raised(store: Store) -> None:
    clock = Clock(a=KeyError("first"), b=RuntimeError("second"))
    with pytest.raises(KeyError, match="first"):
        clock.choose(store)
    assert tuning.known() == [] and not store.path.exists()


def test_a_choice_made_short_of_memory_is_not_stored(store: Store) -> None:
    clock = Clock(a=torch.OutOfMemoryError("out of memory"), b=1.0)
    assert clock.choose(store) == "b"
    assert tuning.recall(KEY, CPU) == "b" and not store.path.exists()


# ---- where nothing may be measured ----


def test_without_tuning_the_first_serves(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVDL_OPS_TUNE", "0")
    clock = Clock(a=2.0, b=1.0)
    assert clock.choose(store) == "a"
    assert clock.measured == 0 and tuning.recall(KEY, CPU) is None and not store.path.exists()
    monkeypatch.delenv("ADVDL_OPS_TUNE")
    assert clock.choose(store) == "a"  # on CPU it must be asked for
    with tuning.on():
        assert clock.choose(store) == "b"


def test_on_cpu_the_first_stays_unless_another_is_clearly_faster(store: Store) -> None:
    clock = Clock(a=1.0, b=0.98)
    assert clock.choose(store) == "a"
    gpu = torch.device("cuda", 1)
    assert tuning._fastest({"a": 1.0, "b": 0.98}, gpu) == "b"
    assert tuning._fastest({"a": 1.0, "b": 0.96}, CPU) == "b"


def test_on_cpu_candidates_take_turns_and_the_least_counts(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_CPU_ROUNDS", 3)
    times = iter([1.0, 2.0, 9.0, 0.5, 1.0, 2.0])  # a, b, a, b, a, b
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}

    def measure(call: Callable[[], Any]) -> float:
        call()
        return next(times)

    assert choose(KEY, calls, CPU, measure=measure, store=store) == "b"
    assert "".join(order) == "ababab"
    assert store.read()[tuning._text(KEY)].seconds == {"a": 1.0, "b": 0.5}


def test_what_is_measured_is_told(store: Store) -> None:
    told: list[Any] = []
    with tuning.on(lambda key, choice: told.append((key, choice.name))):
        Clock(a=2.0, b=1.0).choose(store)
        Clock(a=2.0, b=1.0).choose(store)
    assert told == [(KEY, "b")]


def test_find_measures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADVDL_OPS_CACHE", str(tmp_path))
    assert tuning.find(KEY, ["a", "b"], CPU) is None
    choose(KEY, Clock(a=2.0, b=1.0).candidates(), CPU, measure=lambda call: call())
    new_process(monkeypatch)
    found = tuning.find(KEY, ["a", "b"], CPU)
    assert found is not None and found.name == "b"
    assert tuning.find(KEY, ["a", "c"], CPU) is None


def test_without_tuning_what_is_stored_serves(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(a=2.0, b=1.0).choose(store)
    new_process(monkeypatch)
    monkeypatch.setenv("ADVDL_OPS_TUNE", "0")
    assert Clock(a=2.0, b=1.0).choose(store) == "b"


def test_under_graph_capture_the_first_serves(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[torch.device] = []

    def on(device: torch.device) -> contextlib.AbstractContextManager[None]:
        entered.append(device)
        return contextlib.nullcontext()

    monkeypatch.setattr(tuning, "_on", on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(entered))
    clock, gpu = Clock(a=2.0, b=1.0), torch.device("cuda", 1)
    assert choose(KEY, clock.candidates(), gpu, measure=clock.measure, store=store) == "a"
    assert clock.measured == 0 and entered == [gpu]
    # Known, but not remembered: the next call asks again.
    assert tuning.known() == [(gpu, KEY, tuning.Choice("a", {}, {}))]
    assert tuning.recall(KEY, gpu) is None


# ---- the file ----


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"format": 0, "choices": {}}', '{"format": 1, "choices": {"k": {}}}',
     '{"format": 1, "choices": {"k": {"name": "a", "seconds": {"a": "fast"}, "failed": {}}}}'],
)  # fmt: skip
def test_a_corrupt_file_is_said_once_and_left_alone(store: Store, content: str) -> None:
    store.path.parent.mkdir()
    store.path.write_text(content)
    clock = Clock(a=2.0, b=1.0)
    with pytest.warns(RuntimeWarning, match=r"gpu\.json cannot be") as warned:
        assert clock.choose(store) == "b"
    assert len({str(w.message) for w in warned}) == len(warned)
    assert clock.choose(store) == "b"
    assert clock.measured == 2 and store.path.read_text() == content


DEEP = "[" * 100_000 + "]" * 100_000
FILES = st.one_of(
    st.binary(),
    st.text().map(str.encode),
    # JSON of any form, with the keys that the reader looks for.
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["format", "choices", "name", "seconds", "failed"]) | st.text(),
                st.just(tuning._FORMAT) | inner,
                max_size=5,
            )
        ),
        max_leaves=30,
    ).map(lambda value: json.dumps(value).encode()),
    # Nearly right.
    st.dictionaries(
        st.text(),
        st.fixed_dictionaries(
            {
                "name": st.text() | st.none(),
                "seconds": st.dictionaries(st.text(), st.floats() | st.just(10**400) | st.text()),
                "failed": st.dictionaries(st.text(), st.text()) | st.lists(st.text()),
            }
        ),
        max_size=3,
    ).map(lambda c: json.dumps({"format": tuning._FORMAT, "choices": c}).encode()),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(FILES)
@example(DEEP.encode())
@example(f'{{"format": 1, "choices": {DEEP}}}'.encode())
@example(b'{"format": 1, "choices": {"k": {"name": "a", "seconds": {"a": 1' + b"0" * 400 + b"}}}}")
@example(b"\xff\xfe")
def test_no_file_stops_a_reader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "gpu.json"
    path.write_bytes(content)
    tuning._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [Store(path).read() for _ in range(2)]
    assert len(caught) <= 1
    assert all(type(choice) is Choice for choices in found for choice in choices.values())
    if caught:
        assert found == [{}, {}]
        assert "gpu.json cannot be read" in str(caught[0].message)
    else:  # it was such a file, and what is added to it stays readable
        assert json.loads(content)["format"] == tuning._FORMAT
        Store(path).add("added", Choice("a", {"a": 1.0}, {}), ["a"])
        assert Store(path).read().keys() == {*found[0], "added"}


def test_deeply_nested_json_does_not_stop_a_choice(store: Store) -> None:
    store.path.parent.mkdir()
    store.path.write_text(DEEP)
    with pytest.warns(RuntimeWarning, match=r"gpu\.json cannot be"):
        assert Clock(a=2.0, b=1.0).choose(store) == "b"
    assert store.path.read_text() == DEEP


def test_planted_links_are_not_followed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by what is written beside the file, under whatever names that follow from it, nor by its lock."""
    victim = store.path.parent.parent / "victim"
    victim.write_text("precious")
    store.path.parent.mkdir()
    guessed = f"{store.path.name}.{os.getpid()}.{threading.get_ident()}"
    store.path.with_name(guessed).symlink_to(victim)
    Clock(a=2.0, b=1.0).choose(store)
    assert victim.read_text() == "precious"
    assert json.loads(store.path.read_text())["choices"]
    # Nor where the name was guessed nevertheless.
    monkeypatch.setattr(secrets, "token_hex", lambda count: "guessed")
    store.path.with_name(f"{store.path.name}.guessed").symlink_to(victim)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        Clock(a=2.0, b=1.0).choose(store, KEY._replace(op="other"))
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    # The file itself is replaced.
    store.path.unlink()
    store.path.symlink_to(victim)
    lock = store.path.with_name(f"{store.path.name}.lock")
    lock.unlink()
    lock.symlink_to(victim.with_name("made by the lock"))
    with pytest.warns(RuntimeWarning, match="cannot be"):
        Clock(a=2.0, b=1.0).choose(store, KEY._replace(op="third"))
    assert victim.read_text() == "precious" and not lock.exists()


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ADVDL_OPS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.warns(RuntimeWarning, match="measured again in every process"):
        assert Clock(a=2.0, b=1.0).choose(tuning._store_of(CPU)) == "b"


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "gpu.json")
    with pytest.warns(RuntimeWarning, match="measured again in every process"):
        assert Clock(a=2.0, b=1.0).choose(store) == "b"
    assert Clock(a=2.0, b=1.0).choose(store) == "b"


def test_a_write_that_fails_leaves_the_file_as_it_was(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(a=2.0, b=1.0).choose(store)
    before = store.path.read_text()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.warns(RuntimeWarning, match="disk full"):
        Clock(a=2.0, b=1.0).choose(store, KEY._replace(op="other"))
    assert store.path.read_text() == before
    left = sorted(path.name for path in store.path.parent.iterdir())
    assert left == ["gpu.json", "gpu.json.lock"]


def test_others_may_read_the_file(store: Store) -> None:
    before = os.umask(0o022)
    try:
        Clock(a=2.0, b=1.0).choose(store)
    finally:
        os.umask(before)
    assert store.path.stat().st_mode & 0o777 == 0o644


def test_processes_at_once_lose_nothing(tmp_path: Path) -> None:
    path, count, each = tmp_path / "gpu.json", 3, 20
    program = (
        "import sys, pathlib, importlib.util as u\n"
        f"spec = u.spec_from_file_location('tuning', {tuning.__file__!r})\n"
        "tuning = u.module_from_spec(spec); sys.modules['tuning'] = tuning; spec.loader.exec_module(tuning)\n"
        "store = tuning.Store(pathlib.Path(sys.argv[1]))\n"
        f"for i in range({each}):\n"
        "    store.add(f'{sys.argv[2]} {i}', tuning.Choice('a', {'a': 1.0}, {}), ['a'])\n"
        "    assert f'{sys.argv[2]} {i}' in store.read()\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(n)]) for n in range(count)
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * count
    stored = Store(path).read()
    assert sorted(stored) == sorted(f"{n} {i}" for n in range(count) for i in range(each))


def test_where_the_file_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADVDL_OPS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning._directory() == tmp_path / "xdg" / "advdl_ops"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning._directory() == tmp_path / ".cache" / "advdl_ops"
    monkeypatch.setenv("ADVDL_OPS_CACHE", str(tmp_path / "own"))
    assert tuning._store_of(CPU).path.parent == tmp_path / "own"


def test_the_file_is_of_one_gpu_and_of_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB/HBM3")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    name = tuning._file_name(torch.device("cuda", 0), 0)
    assert name.startswith(f"NVIDIA-H100-80GB-HBM3_torch-{torch.__version__}_advdl_ops-")
    assert "_triton-" in name and name.endswith("_cudnn-91002.json")
    names = {name}
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91003)
    names.add(tuning._file_name(torch.device("cuda", 0), 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    names.add(tuning._file_name(torch.device("cuda", 0), 0))
    monkeypatch.setattr(tuning, "_version", lambda package: "9.9")
    names.add(tuning._file_name(torch.device("cuda", 0), 0))
    assert len(names) == 4


def test_the_file_is_of_one_cpu_its_instructions_and_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from advdl_ops import _environment, _library

    monkeypatch.setattr(_environment, "cpu_model", lambda: "AMD EPYC 9B14")
    monkeypatch.setattr(_library, "cpu_capability", lambda: "avx2")
    name = tuning._file_name(CPU, 2)
    assert name.startswith(f"AMD-EPYC-9B14_avx2_2-threads_torch-{torch.__version__}_advdl_ops-")
    assert tuning._file_name(CPU, 4) != name
    monkeypatch.setattr(_library, "cpu_capability", lambda: "avx512")
    assert tuning._file_name(CPU, 2) != name


@pytest.mark.gpu
def test_cuda_seconds_orders_by_work() -> None:
    x = torch.zeros(2**28, device="cuda")
    small, large = tuning.cuda_seconds(x[: 2**26].add_(1).sum), tuning.cuda_seconds(lambda: x + 1)
    assert 0 < small < large < 0.1
