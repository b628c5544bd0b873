"""What a training step of ResNet-50 communicates: on paper, and measured over loopback. The figures of docs/scaling.md.

    python tools/scaling.py
    torchrun --nproc-per-node 2 tools/scaling.py --parallel fsdp

Measured are the bytes of the tensors that are handed to each kind of collective, the bytes that the loopback interface
sent meanwhile (of all programs: run nothing else that talks over it), and the time of a step.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from distributed_training import barrier, end, gathered, processes, rank, start, wrap  # noqa: E402

import advdl_ops  # noqa: E402
from advdl_ops import models, nn  # noqa: E402

GPUS = 2, 8, 32, 64, 128, 256
NODE = 8  # GPUs that NVLink connects
# Assumptions, none of them measured. Bytes/s in one direction: NVLink 4 of an H100 (900 GB/s in both), and one port of
# InfiniBand of 400 Gb/s for each GPU. Seconds until a small message has arrived. FLOP/s that a GPU sustains.
BANDWIDTH = {True: 450e9, False: 50e9}
LATENCY = {True: 2e-6, False: 5e-6}
SUSTAINED = 100e12
IMAGES = 32


def resnet50_facts() -> dict[str, float]:
    with torch.device("meta"):
        model = models.create_model("resnet50")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(1, 3, 224, 224))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNormAct2d)]
    weights = sum(p.numel() for p in model.parameters())
    root = sum(
        p.numel() for key, p in model.named_parameters() if not key.startswith("layer")
    )  # these stay whole from forward to backward
    return {
        "weights": weights,
        "outside blocks": root,
        "norms": len(norms),
        "channels": sum(m.num_features for m in norms),
        "buffers": sum(b.nbytes for b in model.buffers()),
        "flops": 3 * counter.get_total_flops(),  # backward costs twice as much as forward
    }


def on_paper() -> None:
    facts = resnet50_facts()
    for name, value in facts.items():
        print(f"{name}: {value:,.0f}")
    seconds = facts["flops"] * IMAGES / SUSTAINED
    print(f"{IMAGES} images at {SUSTAINED / 1e12:.0f} TFLOP/s: {seconds * 1e3:.1f} ms\n")
    columns = "GPUs", "DDP, MB", "FSDP2, MB", "FSDP2 bf16, MB", "DDP, ms", "FSDP2, ms"
    columns += "hops of a ring", "synchronized norms, KB", "synchronized norms, ms"
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    bytes_ = 4 * facts["weights"]
    again = 4 * (facts["weights"] - facts["outside blocks"])  # gathered once more for backward
    for p in GPUS:
        share, inside = (p - 1) / p, p <= NODE
        ddp = 2 * share * bytes_
        fsdp = share * (bytes_ + again + bytes_)
        half = share * ((bytes_ + again) / 2 + bytes_)
        small = (
            2 * share * (8 * (2 * facts["channels"] + facts["norms"]) + 4 * 2 * facts["channels"])
        )
        wait = 2 * facts["norms"] * 2 * math.log2(p) * LATENCY[inside]
        row = [f"{x / 1e6:.0f}" for x in (ddp, fsdp, half)]
        row += [f"{x / BANDWIDTH[inside] * 1e3:.2f}" for x in (ddp, fsdp)]
        row += [str(2 * (p - 1)), f"{small / 1e3:.0f}", f"{wait * 1e3:.1f}"]
        print(f"| {p} | {' | '.join(row)} |")


class Collectives(TorchDispatchMode):
    """Counts calls, and bytes of the whole tensor: what is gathered, or what is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            sizes = [x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            # Of input and output, the larger one is whole. Other calls have a list of tensors.
            whole = max(sizes) if "_base_" in func._schema.name else sum(sizes)
            name = func._schema.name.removeprefix("c10d::").removesuffix("_base_").strip("_")
            self.calls[name] += 1
            self.bytes[name] += whole
        return func(*args, **(kwargs or {}))


def sent_over_loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[8])
    raise SystemExit("there is no interface lo in /proc/net/dev")


def measured(
    parallel: str, precision: str, synchronized: bool, images: int, size: int, steps: int
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x, labels = torch.randn(images, 3, size, size), torch.zeros(images, dtype=torch.long)
    model = models.create_model("resnet50")
    if synchronized:
        model = advdl_ops.convert_sync_batchnorm(model)
    model = wrap(model, parallel, precision, "cpu", x)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> float:
        begin = time.perf_counter()
        cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begin

    model.train()
    step()
    with Collectives() as collectives:
        step()
    barrier()
    before = sent_over_loopback()
    barrier()
    seconds = [step() for _ in range(steps)]
    barrier()
    sent = (sent_over_loopback() - before) / steps / processes()
    slowest = max(statistics.median(each) for each in gathered(seconds))
    if rank() == 0:
        calls = ", ".join(
            f"{count} {name} {collectives.bytes[name] / 1e6:.1f}"
            for name, count in sorted(collectives.calls.items())
        )
        what = f"{parallel} {precision}" + " synchronized" * synchronized
        print(f"| {what} | {processes()} | {calls} | {sent / 1e6:.1f} | {slowest:.2f} |")
    end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--sync-batch-norm", action="store_true")
    parser.add_argument("--images", type=int, default=4, help="per process (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="of an image (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        on_paper()
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    start("cpu")
    measured(
        options.parallel, options.precision, options.sync_batch_norm, options.images, options.size, options.steps
    )  # fmt: skip


if __name__ == "__main__":
    main()
