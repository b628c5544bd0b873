"""Tests of several processes, with gloo on loopback."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT_S = 120


def run(folder, worker, *arguments, count=2):
    """``worker(rank, *arguments)`` in ``count`` processes of one process group; raises what one of them raises.

    Args:
        folder: for the file by which they meet; a new one for each call.
        worker: a function at the top of a module.
    """
    init = (folder / "init").as_uri()
    context = torch.multiprocessing.spawn(
        _start, (init, count, worker, arguments), nprocs=count, join=False
    )
    deadline = time.monotonic() + LIMIT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, f"not done after {LIMIT_S} s"
    finally:
        for process in context.processes:
            process.kill()


def _start(rank, init, count, worker, arguments):
    torch.set_num_threads(1)
    limit = timedelta(seconds=LIMIT_S / 2)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=count, timeout=limit)
    worker(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
