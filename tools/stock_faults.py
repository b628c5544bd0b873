"""Searches for 2-D convolutions that torch computes wrongly on CPU, or that read or write outside of their memory.

    python tools/stock_faults.py --seconds 600 --isa avx2          # stock's
    python tools/stock_faults.py --seconds 600 --isa avx2 --ours   # this package's

It draws random shapes, options, dtypes and memory formats. The output and every gradient are compared with fp64, and
two calls with each other. The shapes run in child processes, in which each tensor ends at inaccessible memory and
starts full of NaN (guarded_memory.c, built with the installed C compiler). If a child dies, the parent prints the shape
and the implementation that oneDNN ran, and continues with the next shape. The last lines count each kind of failure by
implementation. docs/stock_faults.md has the results.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = ("float32", "float32", "bfloat16", "float16")
DIRECTIONS = ("out", "dx", "dweight", "dbias")
HELD = {
    "avx2": {
        "ADVDL_OPS_CPU_CAPABILITY": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
    },
    "native": {},
}


class Case(NamedTuple):
    """A convolution, or a transposed one."""

    n: int
    channels: int
    height: int
    width: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    transposed: bool
    output_padding: tuple[int, int]
    dtype: str
    x_format: str
    weight_format: str
    grad_format: str

    def options(self) -> tuple[Any, ...]:
        """The options in the order of torch.ops.aten.convolution."""
        return (
            self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups,
        )  # fmt: skip


def draw(rng: random.Random) -> Case:
    """A random case that torch accepts."""
    while True:
        groups = rng.choices((1, 2, 3, rng.randint(2, 40)), (6, 1, 1, 1))[0]
        few, many = 130 // groups, 64 // groups
        per_group = rng.choice((rng.randint(1, 17), rng.randint(1, max(1, few))))
        per_output = rng.choice((rng.randint(1, 17), rng.randint(1, max(1, few)), 1))
        if groups * max(per_group, per_output) > 400:
            continue
        sizes = [rng.choice((rng.randint(1, 16), rng.randint(1, 40), 1, many or 1)) for _ in "hw"]
        if rng.random() < 0.1:
            sizes = [rng.choice((64, 96, 128)), rng.choice((64, 96, 128))]
            groups, per_group, per_output = 1, min(per_group, 20), min(per_output, 20)
        kernel = rng.choice(((1, 1), (3, 3), _two(rng, 1, 5), _two(rng, 1, 9)))
        if rng.random() < 0.03:
            kernel = rng.choice(((rng.randint(1, 130), 1), (1, rng.randint(1, 130))))
        stride = rng.choice(((1, 1), (2, 2), (rng.randint(1, 4),) * 2, _two(rng, 1, 5)))
        dilation = rng.choice(((1, 1), (1, 1), (rng.randint(2, 18),) * 2, _two(rng, 1, 18)))
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        same = (reach[0] // 2, reach[1] // 2)
        padding = rng.choice(
            ((0, 0), same, (rng.randint(0, reach[0] + 2), rng.randint(0, reach[1] + 2)))
        )
        transposed = rng.random() < 0.25
        more = (0, 0)
        if transposed:
            more = (rng.randrange(stride[0]), rng.randrange(stride[1]))
            out = [
                (i - 1) * s - 2 * p + r + m + 1
                for i, s, p, r, m in zip(sizes, stride, padding, reach, more, strict=True)
            ]
        else:
            out = [
                (i + 2 * p - r - 1) // s + 1
                for i, s, p, r in zip(sizes, stride, padding, reach, strict=True)
            ]
        n = rng.randint(1, 3)
        channels, outputs = groups * per_group, groups * per_output
        work = n * channels * per_output * kernel[0] * kernel[1]
        work *= sizes[0] * sizes[1] if transposed else max(out[0], 1) * max(out[1], 1)
        if min(out) < 1 or work > 3e6:
            continue
        formats = [rng.choice(tuple(FORMATS)) for _ in range(3)]
        return Case(
            n, channels, *sizes, outputs, kernel, stride, padding, dilation, groups, transposed, more,
            rng.choice(DTYPES), *formats,
        )  # fmt: skip


def _two(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    return rng.randint(low, high), rng.randint(low, high)


# ---- the child: computes and compares ----


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)

    def normal(shape: Any, layout: str) -> Tensor:
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.to(memory_format=FORMATS[layout])

    rows, columns = case.channels, case.outputs // case.groups
    if not case.transposed:
        rows, columns = case.outputs, case.channels // case.groups
    x = normal((case.n, case.channels, case.height, case.width), case.x_format)
    weight = normal((rows, columns, *case.kernel), case.weight_format)
    bias = torch.randn(case.outputs, generator=generator).to(dtype)
    shape = torch.ops.aten.convolution(
        x.to("meta"), weight.to("meta"), bias.to("meta"), *case.options()
    ).shape
    return x, weight, bias, normal(shape, case.grad_format)


def stock(case: Case, direction: str, given: tuple[Tensor, ...]) -> Tensor:
    x, weight, bias, dout = given
    if direction == "out":
        return torch.ops.aten.convolution(x, weight, bias, *case.options())
    mask = [direction == d for d in DIRECTIONS[1:]]
    return torch.ops.aten.convolution_backward(
        dout, x, weight, [case.outputs], *case.options(), mask
    )[mask.index(True)]


def ours(case: Case, direction: str, given: tuple[Tensor, ...]) -> Tensor:
    from advdl_ops import functional

    x, weight, bias, dout = given
    wanted = {"dx": x, "dweight": weight, "dbias": bias}.get(direction)
    if wanted is not None:
        wanted.requires_grad_()
    if case.transposed:
        out = functional.conv_transpose2d(
            x, weight, bias, case.stride, case.padding, case.output_padding, case.groups, case.dilation
        )  # fmt: skip
    else:
        out = functional.conv2d(
            x, weight, bias, case.stride, case.padding, case.dilation, case.groups
        )
    if wanted is None:
        return out
    (grad,) = torch.autograd.grad(out, wanted, dout)
    wanted.requires_grad_(False)
    return grad


def exact(case: Case, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """All directions in fp64."""
    x, weight, bias, dout = (t.double() for t in given)
    out = torch.ops.aten.convolution(x, weight, bias, *case.options())
    return out, *torch.ops.aten.convolution_backward(
        dout, x, weight, [case.outputs], *case.options(), [True] * 3
    )


def serve(repeats: int, function: Any) -> None:
    """Reads cases, one per line. Prints each direction before it runs, and what was wrong with it."""
    for line in sys.stdin:
        case = Case(*(tuple(v) if isinstance(v, list) else v for v in json.loads(line)))
        given = tensors(case)
        expected = exact(case, given)
        # An error is relative to the sum of absolute terms, which covers any order of the terms and any rounding
        # between them.
        sums = exact(case, tuple(t.abs() for t in given))
        for direction, right, of in zip(DIRECTIONS, expected, sums, strict=True):
            print("start", direction, flush=True)
            signal.alarm(120)  # ends the process
            try:
                fault = compare(case, direction, function, repeats, given, right, of)
            except RuntimeError as error:
                fault = f"raises {str(error).splitlines()[0]}"
            if fault is not None:
                print("fault", direction, fault, flush=True)
        signal.alarm(0)
        print("done", flush=True)


def compare(
    case: Case,
    direction: str,
    function: Any,
    repeats: int,
    given: tuple[Tensor, ...],
    right: Tensor,
    of: Tensor,
) -> str | None:
    """What is wrong with one direction, or None."""
    dtype = given[0].dtype
    terms = given[3].numel() if direction == "dbias" else given[0].numel()
    allowed = (8 + terms**0.5 * (dtype == torch.float32)) * torch.finfo(dtype).eps * of + 1e-6
    first = None
    for _ in range(repeats):
        found = function(case, direction, given)
        if found.isnan().any():
            return "NaN"
        error = (found.double() - right).abs()
        if not (error <= allowed).all():
            return f"off by {float(error.amax() / of.amax()):.1e} of the largest"
        if first is None:
            first = found
        elif not torch.equal(found, first):
            return "two calls differ"
    return None


# ---- the parent: sends cases, and notices when a child dies ----


class Children:
    """A child process that computes, replaced by a new one if it dies."""

    def __init__(self, args: argparse.Namespace, guard: Path | None) -> None:
        self.args, self.guard = args, guard
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def environment(self, guard: Path | None) -> dict[str, str]:
        held = {
            "OMP_NUM_THREADS": str(self.args.threads),
            "MALLOC_PERTURB_": "165",
            **HELD[self.args.isa],
        }
        if guard is not None:
            held["LD_PRELOAD"] = str(guard)
        return {**os.environ, **held}

    def command(self, repeats: int) -> list[str]:
        flags = ["--ours"] if self.args.ours else []
        return [sys.executable, __file__, "--child", "--repeats", str(repeats), *flags]

    def run(self, case: Case) -> list[tuple[str, str]]:
        """(direction, what is wrong) of each fault."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command(self.args.repeats),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self.environment(self.guard),
            )
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        found, direction = [], "none"
        try:
            process.stdin.write(json.dumps(case) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        while True:
            words = process.stdout.readline().split(None, 2)
            if not words:
                ended = signal.Signals(-process.wait()).name
                found.append((direction, f"ends the process by {ended}"))
                self.process = None
                return found
            if words[0] == "done":
                return found
            direction = words[1]
            if words[0] == "fault":
                found.append((direction, words[2].strip()))

    def again(self, case: Case, verbose: bool) -> subprocess.CompletedProcess[str]:
        """``case`` in a separate process: 100 calls without the guard, or one call with oneDNN's verbose output."""
        environment = self.environment(self.guard if verbose else None)
        if verbose:
            environment["ONEDNN_VERBOSE"] = "profile"
        return subprocess.run(
            self.command(1 if verbose else 100), input=json.dumps(case) + "\n", env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip


def implementation(verbose: str, direction: str) -> str:
    """The last primitive that oneDNN created for ``direction``, which may have died there; "torch" if there is none."""
    made = "none"
    reached = False
    for line in verbose.splitlines():
        if line.startswith("start"):
            reached = line.split()[1] == direction
            made = "torch" if reached else made
        found = re.search(r"create:cache_\w+,cpu,(?:de)?convolution,([^,]+),(\w+)", line)
        if found and reached:
            made = f"{found[1]} {found[2]}"
    return made


def build_guard(folder: str | Path) -> Path | None:
    guard = Path(folder, "guarded_memory.so")
    source = Path(__file__).with_name("guarded_memory.c")
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-o", str(guard), str(source)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no guard ({error}): MALLOC_PERTURB_ alone", file=sys.stderr)
        return None
    return guard


def search(args: argparse.Namespace) -> int:
    rng = random.Random(args.seed)
    kinds: collections.Counter[str] = collections.Counter()
    count, failed, end = 0, 0, time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        guard = None if args.no_guard else build_guard(folder)
        children = stack.enter_context(Children(args, guard))
        while time.monotonic() < end:
            case = draw(rng)
            count += 1
            found = children.run(case)
            if not found:
                continue
            failed += 1
            verbose = children.again(case, verbose=True).stdout
            for direction, what in found:
                by = implementation(verbose, direction)
                kind = re.sub(r"[\d.e+-]{3,} of", "much of", what)
                kinds[f"{direction} {case.dtype}: {kind}, {by}"] += 1
                record = {"direction": direction, "what": what, "by": by, **case._asdict()}
                if "process" in what:
                    plain = children.again(case, verbose=False)
                    last = [v for v in plain.stdout.splitlines() if v.startswith("fault")]
                    record["without the guard"] = (
                        "; ".join(last) or f"exit status {plain.returncode}"
                    )
                print(json.dumps(record), flush=True)
    print(
        f"{count} shapes with seed {args.seed}, {failed} with faults; torch {torch.__version__}, {args.isa}"
    )
    for kind, times in kinds.most_common():
        print(f"{times:6} {kind}")
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="how long to search (default: 600)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--isa", choices=HELD, default="native", help="avx2: hold everything to AVX2"
    )
    parser.add_argument("--ours", action="store_true", help="this package's functions, not torch's")
    parser.add_argument(
        "--repeats", type=int, default=2, help="calls of each direction (default: 2)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-guard", action="store_true", help="without guarded_memory.c")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = parser().parse_args()
    if args.child:
        serve(args.repeats, ours if args.ours else stock)
        return 0
    return search(args)


if __name__ == "__main__":
    sys.exit(main())
