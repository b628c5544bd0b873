"""Triton kernels without a GPU: run by Triton's interpreter in a separate process, or compiled and inspected.

Triton decides at import whether it interprets, and other tests import it too. So functions that run kernels on CPU
tensors are sent to a worker process, which has TRITON_INTERPRET=1 from its start and returns plain numbers.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advdl_ops._conv.problem import Epilogue
from advdl_ops.activation import ACTIVATIONS, IDENTITY

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Half of the distance from 1 to the next number: the largest relative error of one rounding.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
FP32 = UNIT[torch.float32]


# --- In the interpreter ---------------------------------------------------------------------------------------------


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """``run(function, *args)`` in a process where Triton interprets. The function must be at a module's top level."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start_interpreting)
    try:
        pool.submit(int).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _start_interpreting() -> None:
    import triton

    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    # Outputs and workspaces start as NaN, so that elements which no program writes are noticed.
    torch.use_deterministic_algorithms(True)
    _mend_bfloat16()


def _mend_bfloat16() -> None:
    """Corrects Triton's interpreter, which stores bf16 as uint16 bits, multiplies these in tl.dot, and rounds down."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = torch.from_numpy(handle.data.copy()).view(torch.bfloat16)
        return TensorHandle(bits.float().numpy(), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def create_fp_trunc(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return truncate(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).to(torch.bfloat16).view(torch.uint16)
        return TensorHandle(rounded.numpy(), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_trunc = create_fp_trunc


def guarded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` in ``dtype`` and channels_last, between NaNs: reads outside of it show in the result."""
    t = t.to(dtype)
    if t.dim() == 4:
        t = t.contiguous(memory_format=torch.channels_last)
    memory = torch.full((t.numel() + 2048,), float("nan"), dtype=dtype)
    inside = memory[1024 : 1024 + t.numel()].as_strided(t.shape, t.stride(), 1024)
    return inside.copy_(t)


class GuardedOutputs:
    """Replaces a launcher's allocation of outputs: they start as NaN, and writes outside of them are noticed."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def empty(self, like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        batch, channels, height, width = shape
        memory = torch.full((math.prod(shape) + 2048,), 7.0, dtype=like.dtype)
        self._memory.append(memory)
        out = memory[1024:-1024].view(batch, height, width, channels).permute(0, 3, 1, 2)
        return out.fill_(float("nan"))

    def beside(self) -> float:
        """0 if nothing was written outside of the outputs, else more than any bound."""
        margins = [m[edge] for m in self._memory for edge in (slice(1024), slice(-1024, None))]
        return 0.0 if margins and all((m == 7).all() for m in margins) else float("inf")


def excess(got: Tensor, truth: Tensor, bound: Tensor) -> float:
    """The largest error as a share of the bound; it should be at most 1. Infinite for NaN or another shape."""
    if got.shape != truth.shape:
        return float("inf")
    ratio = (got.double() - truth).abs() / bound
    return float("inf") if ratio.isnan().any() else ratio.max().item()


def assert_within(found: dict[str, float]) -> None:
    """``found``: values of :func:`excess`, by the name of what was compared. Each must be at most 1."""
    for name, worst in found.items():
        assert worst <= 1, name


def rounded(value: Tensor, off: Tensor, dtype: torch.dtype) -> Tensor:
    """The error bound of a result stored in ``dtype``, if its error before rounding was at most ``off``."""
    return off + UNIT[dtype] * (value.abs() + off) + TINY[dtype]


def with_epilogue(
    name: str, z: Tensor, size: Tensor, off: Tensor, dtype: torch.dtype
) -> tuple[Epilogue, Tensor, Tensor]:
    """An epilogue of random tensors, its result for ``z``, and the bound of the error before rounding.

    Args:
        name: "none", or for example "affine-relu" or "residual-silu" (with a residual).
        z: ``[N, C, H, W]`` in fp64, which a kernel computes in fp32 with errors up to ``off``.
        size: the sum of the magnitudes of the terms of ``z``.
        dtype: the residual's dtype.
    """
    scale = shift = residual = None
    if name != "none":
        scale, shift = (guarded(torch.randn(z.shape[1]), torch.float32) for _ in range(2))
        z, off = z * per_channel(scale) + per_channel(shift), off * per_channel(scale).abs()
        size = size * per_channel(scale).abs() + per_channel(shift).abs()
    if name.startswith("residual"):
        residual = guarded(torch.randn(z.shape), dtype)
        z, size = z + residual.double(), size + residual.double().abs()
    act = act_of(name.rpartition("-")[2].replace("none", "identity"))
    result = Epilogue(scale, shift, residual, act), ACTS[act.name](z)
    return *result, STEEPEST * (off + 8 * FP32 * size)


def refusals(*calls: Callable[[], Any]) -> list[str]:
    """The NotImplementedError of each call as text."""
    errors = []
    for call in calls:
        try:
            call()
        except NotImplementedError as error:
            errors.append(f"NotImplementedError: {error}")
        else:
            errors.append("nothing was raised")
    return errors


def covering(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """A small set of combinations that contains every pair of values of two axes."""
    names = list(axes)
    missing = {
        (a, x, b, y)
        for a, b in combinations(range(len(names)), 2)
        for x in range(len(axes[names[a]]))
        for y in range(len(axes[names[b]]))
    }
    every = [
        (row, {(a, row[a], b, row[b]) for a, b in combinations(range(len(names)), 2)})
        for row in product(*(range(len(values)) for values in axes.values()))
    ]
    chosen = []
    while missing:
        row, pairs = max(every, key=lambda candidate: len(candidate[1] & missing))
        missing -= pairs
        chosen.append({name: axes[name][i] for name, i in zip(names, row, strict=True)})
    return chosen


# --- Compiled -------------------------------------------------------------------------------------------------------


class Compiled(NamedTuple):
    """A kernel for one architecture: bytes of stack (for spilled registers only), registers, shared memory."""

    stack: int
    registers: int
    shared: int
    ptx: str


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: int,
    *,
    num_warps: int,
    num_stages: int = 3,
) -> Compiled:
    """``kernel`` for ``sm_<arch>``. An argument in neither ``types`` nor ``constants`` is None.

    Pointers are aligned and channel counts divisible by 16, as in all but the first layers of networks.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    assert set(types) | set(constants) <= set(names), "not an argument of the kernel"
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {name: constants.get(name) for name in names if name not in types}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in types and ("channels" in name or "group_" in name))
    ]  # fmt: skip
    source = ASTSource(
        kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in aligned}
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"no register count in {usage!r}"
    return Compiled(int(found[2]), int(found[1]), compiled.metadata.shared, compiled.asm["ptx"])


STEEPEST = 1.13  # of silu and gelu
ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
}


def case_id(case: dict[str, Any]) -> str:
    return "-".join(
        "x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in case.values()
    )


def act_of(name: str) -> Any:
    return IDENTITY if name == "identity" else ACTIVATIONS[name]


def per_channel(v: Tensor) -> Tensor:
    return v.double()[:, None, None]
