"""optimize(): the trace is seen by nobody but the traced forward."""

import threading

import pytest
from support.optimize import Block, counts, made

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_threads_at_once():
    found = []
    model = made(Block)
    threads = [
        threading.Thread(target=lambda: found.append(counts(advdl_ops.optimize(model))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(2, 0, 0)] * 4
