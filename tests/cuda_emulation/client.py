"""Starts the worker process and calls the emulated kernels in it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from typing import IO, Any

from . import build


class EmulationError(RuntimeError):
    """What the emulation or a sanitizer reported."""


class Emulator:
    """One worker process. `call("forward", {...})` returns the dictionary that module.cpp describes."""

    def __init__(self) -> None:
        self._command = self.command()
        self._worker: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def command(self) -> list[str]:
        """Of Python. Builds what the worker loads."""
        return ["-S", str(build.HERE / "worker.py"), str(build.build().parent)]

    def _start(self) -> subprocess.Popen[bytes]:
        environment = dict(
            os.environ,
            LD_PRELOAD=" ".join(build.sanitizer_libraries()),
            # Python frees nothing at exit, the fibers' frames live on stacks of their own, and what nobody wrote is NaN
            ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:"
            "max_malloc_fill_size=1000000000:malloc_fill_byte=255",
            UBSAN_OPTIONS="print_stacktrace=1",
            PYTHONMALLOC="malloc",
        )
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close())
        return subprocess.Popen(
            [sys.executable, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )

    def call(self, function: str, request: Any) -> Any:
        """Raises EmulationError with the report if a kernel does what no kernel may."""
        if self._worker is None:
            self._worker = self._start()
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        try:
            pickle.dump((function, request), self._worker.stdin)
            self._worker.stdin.flush()
            status, value = pickle.load(self._worker.stdout)
        except (EOFError, BrokenPipeError):
            raise EmulationError(self._crash()) from None
        if status != "ok":
            raise EmulationError(value)
        return value

    def _crash(self) -> str:
        assert self._worker is not None
        assert self._log is not None
        code = self._worker.wait()
        self._log.seek(0)
        report = self._log.read().decode(errors="replace")
        self.close()
        return f"the emulated kernel ended its process (status {code}):\n{report[:6000]}"

    def close(self) -> None:
        if self._worker is not None:
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe is not None:
                    pipe.close()
            self._worker.wait(timeout=30)
            self._worker = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Emulator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LstmBinding(Emulator):
    """`call("lstm", arguments)` is torch.ops.advdl_ops.lstm on CUDA, of CPU tensors: see lstm_worker.py."""

    def command(self) -> list[str]:
        schemas = build.ROOT / "advdl_ops" / "_schemas.py"
        worker = build.HERE / "lstm_worker.py"
        return [str(worker), str(build.build_lstm_binding()), str(schemas)]
