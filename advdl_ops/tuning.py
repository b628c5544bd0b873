"""Which of several implementations serves a call: measured once, stored on disk, the same in every later run.

A choice comes from this process, else from the file of this device and these versions, else from a measurement of every
candidate. On CUDA a measurement happens at the first call of each kind, unless ``ADVDL_OPS_TUNE=0``; on CPU only with
``ADVDL_OPS_TUNE=1`` or in :func:`advdl_ops.tune`. If a choice is neither stored nor measured, the first candidate
serves.

The file is JSON in the directory ``ADVDL_OPS_CACHE``, else ``$XDG_CACHE_HOME/advdl_ops``, else ``~/.cache/advdl_ops``.
Its name contains the GPU, or the CPU with its instructions and the number of threads, and the versions of torch,
Triton, cuDNN and advdl_ops. If the file is deleted, everything is measured again, and results may differ from earlier
ones in their last digits.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import re
import secrets
import statistics
import threading
import warnings
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    import fcntl
except ImportError:  # no POSIX: of two simultaneous writers the last one wins
    fcntl = None  # type: ignore[assignment]

__all__ = ["Choice", "choose", "find", "is_on", "known", "on", "recall"]

Call = Callable[[], Any]
_FORMAT = 1
_CPU_ROUNDS, _CPU_MARGIN = 3, 0.97


class Choice(NamedTuple):
    """A chosen candidate, and the times that decided.

    Attributes:
        name: name of the candidate.
        seconds: median time of every candidate that ran.
        failed: the error of every candidate that did not run.
    """

    name: str
    seconds: dict[str, float]
    failed: dict[str, str]


# What this process has chosen or read. Entries are never removed, so a choice never changes within a process.
_choices: dict[tuple[torch.device, Hashable], Choice] = {}
# What served on CUDA when measuring was not allowed: for `known` only; every call decides again.
_unmeasured: dict[tuple[torch.device, Hashable], Choice] = {}
# The callbacks of all calls of `on` that are active.
_listeners: list[Callable[[Any, Choice], None]] = []
# One measurement at a time: two at once, such as one of a backward thread, would disturb each other.
_lock = threading.RLock()


def recall(key: Hashable, device: torch.device) -> str | None:
    """The candidate that this process chose for ``key`` on ``device``. Cheap enough for every call."""
    found = _choices.get((device, key))
    return None if found is None else found.name


def find(key: Any, names: Collection[str], device: torch.device) -> Choice | None:
    """The choice among ``names`` for ``key``, from this process or an earlier one. Measures nothing."""
    found = _choices.get((device, key)) or _store_of(device).read().get(_text(key))
    return found if found is not None and found.name in names else None


@contextlib.contextmanager
def on(tell: Callable[[Any, Choice], None] = lambda *_: None) -> Iterator[None]:
    """Inside this context, candidates are measured on every device, whatever ``ADVDL_OPS_TUNE`` says.

    Args:
        tell: called with the key and the choice of every measurement.
    """
    with _lock:
        _listeners.append(tell)
    try:
        yield
    finally:
        with _lock:
            _listeners.remove(tell)


def is_on(device: torch.device) -> bool:
    """Whether a choice that is not stored is measured on ``device``."""
    from . import _environment  # imported here, because the store can be used without the package

    return bool(_listeners) or _environment.flag("ADVDL_OPS_TUNE", device.type == "cuda")


def known() -> list[tuple[torch.device, Any, Choice]]:
    """Every choice of this process as (device, key, choice). Those that were not measured have no times."""
    return [(device, key, choice) for (device, key), choice in (_unmeasured | _choices).items()]


def choose(
    key: Any,
    candidates: Mapping[str, Call],
    device: torch.device,
    *,
    measure: Callable[[Call], float] | None = None,
    store: Store | None = None,
) -> str:
    """The fastest of ``candidates``.

    Args:
        key: everything on which the times depend: a NamedTuple of hashable values.
        candidates: name -> call without arguments. The first serves if measuring is not allowed: where :func:`is_on` is
            False, and under graph capture.
        device: where the candidates run.
        measure: seconds of one call; by default :func:`cuda_seconds` or :func:`cpu_seconds`.
        store: by default the file for ``device``.

    Returns:
        A name of ``candidates``.

    Raises:
        ValueError: no candidate.
        Exception: if every candidate raises, the exception of the first. If only some raise, they are left out.
    """
    if not candidates:
        raise ValueError(f"choose: candidates (none) must be given for {key}")
    found = _choices.get((device, key))
    if found is not None and found.name in candidates:
        return found.name
    with _lock:
        return _choose(key, candidates, device, measure, store or _store_of(device))


def _choose(
    key: Any,
    candidates: Mapping[str, Call],
    device: torch.device,
    measure: Callable[[Call], float] | None,
    store: Store,
) -> str:
    at, text = (device, key), _text(key)
    found = _choices.get(at) or store.read().get(text)
    # A stored name that is no longer among the candidates is from another version of the code, or of another input.
    # Measure again.
    if found is None or found.name not in candidates:
        if len(candidates) > 1 and not _may_measure(device):
            first = next(iter(candidates))
            if device.type == "cuda":
                _unmeasured[at] = Choice(first, {}, {})
            return first
        measure = measure or (cuda_seconds if device.type == "cuda" else cpu_seconds)
        found, lasting = _measured(candidates, device, measure)
        for tell in _listeners:
            tell(key, found)
        if lasting and len(candidates) > 1:
            found = store.add(text, found, candidates)
    _choices[at] = found
    return found.name


def _measured(
    candidates: Mapping[str, Call], device: torch.device, measure: Callable[[Call], float]
) -> tuple[Choice, bool]:
    """The choice, and whether it may be stored on disk. It may not if a candidate ran out of memory."""
    if len(candidates) == 1:
        return Choice(next(iter(candidates)), {}, {}), False
    times: dict[str, list[float]] = {name: [] for name in candidates}
    errors: dict[str, Exception] = {}
    # On CPU the candidates take turns, so that other load on the machine affects all of them.
    rounds = 1 if device.type == "cuda" else _CPU_ROUNDS
    with _on(device):
        for name in [name for _ in range(rounds) for name in candidates]:
            if name not in errors:
                try:
                    times[name].append(measure(candidates[name]))
                except Exception as error:
                    errors[name] = error
    # The minimum, because other load can only increase a time.
    seconds = {name: min(t) for name, t in times.items() if name not in errors}
    if not seconds:
        raise next(iter(errors.values()))
    failed = {name: _in_one_line(error) for name, error in errors.items()}
    lasting = not any(isinstance(error, torch.OutOfMemoryError) for error in errors.values())
    return Choice(_fastest(seconds, device), seconds, failed), lasting


def _fastest(seconds: Mapping[str, float], device: torch.device) -> str:
    fastest = min(seconds, key=seconds.__getitem__)
    first = next(iter(seconds))
    # On CPU the first is what the rules choose. It stays unless another is faster by more than the noise between two
    # runs.
    if device.type == "cpu" and seconds[fastest] > _CPU_MARGIN * seconds[first]:
        return first
    return fastest


def _may_measure(device: torch.device) -> bool:
    if not is_on(device):
        return False
    with _on(device):  # is_current_stream_capturing asks about the current device
        return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cuda_seconds(call: Call) -> float:
    """Median time of ``call`` on the current stream of the current GPU, each time with none of its data in L2."""
    call()  # compiles
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(2 * (l2 or 2**26), dtype=torch.int8, device="cuda")
    times: list[float] = []
    # About 20 ms in total. The first tenth is warm-up.
    for _ in range(55):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Several times, so that the GPU is still busy when the host launches `call`: its launch time must not count.
        for _ in range(8):
            flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
        if len(times) >= 8 and sum(times) > 20e-3:
            break
    return statistics.median(times[max(len(times) // 10, 2) :])


def cpu_seconds(call: Call) -> float:
    """Median time of ``call`` with torch's current number of threads."""
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02).median


class Store:
    """Choices in one file, which any number of processes may read and extend at the same time.

    Args:
        path: the file. If it cannot be read or written, there is one warning, and the process continues without it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._read: dict[str, Choice] = {}

    def read(self) -> dict[str, Choice]:
        """The choices by the text of their key. The file is read again if it has changed."""
        try:
            stat = self.path.stat()
            seen = stat.st_mtime_ns, stat.st_size
            if seen != self._seen:
                self._read, self._seen = _parsed(self.path.read_text(encoding="utf-8")), seen
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            _warn_once(f"{self.path} cannot be read ({_in_one_line(error)}): delete it")
            return {}
        return self._read

    def add(self, text: str, choice: Choice, candidates: Mapping[str, Any]) -> Choice:
        """Store ``choice`` and return the stored one, which is another process's if that was first."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_name(self.path.name + ".lock")):
                try:
                    choices = _parsed(self.path.read_text(encoding="utf-8"))
                except FileNotFoundError:
                    choices = {}
                earlier = choices.get(text)
                if earlier is not None and earlier.name in candidates:
                    return earlier
                choices[text] = choice
                self._write(choices)
        except (OSError, ValueError) as error:
            _warn_once(
                f"{self.path} cannot be written ({_in_one_line(error)}): choices are measured again in every process"
            )
        return choice

    def _write(self, choices: Mapping[str, Choice]) -> None:
        content = {
            "format": _FORMAT,
            "choices": {text: choice._asdict() for text, choice in sorted(choices.items())},
        }
        # A new file replaces the old one, so that readers see either of them and never a part. It has a random name,
        # and mode "x" follows no link. tempfile is not used, because others who share the directory must be able to
        # read the file.
        written = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}")
        with open(written, "x", encoding="utf-8") as file:
            try:
                json.dump(content, file, indent=1)
                file.close()
                os.replace(written, self.path)
            except BaseException:
                written.unlink(missing_ok=True)
                raise


def _parsed(content: str) -> dict[str, Choice]:
    try:
        loaded = json.loads(content)
        if loaded["format"] != _FORMAT:
            raise ValueError(f"format {loaded['format']}, must be {_FORMAT}")
        return {
            text: Choice(
                str(entry["name"]),
                {str(n): float(s) for n, s in entry["seconds"].items()},
                {str(n): str(e) for n, e in entry["failed"].items()},
            )
            for text, entry in loaded["choices"].items()
        }
    except (AttributeError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a file of choices: {error!r}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The name is predictable, so another user may have put a link there: that is an error.
    with open(path, "a", encoding="utf-8", opener=_without_links) as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _store_of(device: torch.device) -> Store:
    return _store(device, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _store(device: torch.device, threads: int) -> Store:
    return Store(_directory() / _file_name(device, threads))


def _directory() -> Path:
    from . import _environment

    if given := _environment.variable("ADVDL_OPS_CACHE"):
        return Path(given)
    if cache := _environment.variable("XDG_CACHE_HOME"):
        return Path(cache) / "advdl_ops"
    try:
        return Path.home() / ".cache" / "advdl_ops"
    except RuntimeError:
        # A user without a home directory, as in some containers: a path in which nothing can be written.
        return Path(os.devnull) / "advdl_ops"


def _file_name(device: torch.device, threads: int) -> str:
    """Made of the device's name and of all versions on which times depend."""
    from . import __version__, _environment, _library

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_environment.cpu_model()}_{_library.cpu_capability()}_{threads}-threads"
    versions: dict[str, Any] = {
        "torch": torch.__version__,
        "advdl_ops": __version__,
    }
    if device.type == "cuda":
        versions["triton"] = _version("triton") or _version("pytorch-triton")
        versions["cudnn"] = torch.backends.cudnn.version()
    parts = [name, *(f"{package}-{version or 'none'}" for package, version in versions.items())]
    return "_".join(re.sub(r"[^A-Za-z0-9_.+-]+", "-", part) for part in parts) + ".json"


def _version(package: str) -> str | None:
    # The package is not imported, because that would take longer than everything else here.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(key: Any) -> str:
    """One line that names every field."""
    fields = key._asdict() if hasattr(key, "_asdict") else {"key": key}
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@functools.cache
def _warn_once(what: str) -> None:
    warnings.warn(f"advdl_ops: {what}", RuntimeWarning, stacklevel=4)
