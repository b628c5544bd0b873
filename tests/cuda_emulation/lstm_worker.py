"""The process that runs the LSTM's CUDA binding (lstm_binding.cpp) on CPU tensors: as worker.py, but with torch.

A request names an operator and has its arguments, the reply is what it returns. What AddressSanitizer cannot see, as
torch is not compiled with it, is checked here: the matrices that are multiplied, and that no argument is written.
"""

import os
import pickle
import runpy
import sys

import torch

replies = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # nothing that prints may land between the replies
library, schemas = sys.argv[1:]
kept = runpy.run_path(schemas)  # not the package, whose own kernels these replace
torch.ops.load_library(library)
torch.set_num_threads(1)
assert torch.empty(8).isnan().all(), (
    "memory that nobody wrote must be NaN: ASAN_OPTIONS of client.py"
)
aten = torch.library.Library("aten", "IMPL")


def check_inside(t):
    """A matrix made of a pointer, sizes and strides, which torch takes on trust."""
    last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    end = t.untyped_storage().nbytes() // t.element_size()
    if t.numel() and (min(t.storage_offset(), *t.stride()) < 0 or last >= end):
        raise RuntimeError(f"mm: {tuple(t.shape)} by {t.stride()} ends at {last} of {end} elements")


def multiply(a, b, *, out):
    """As cuBLAS: the sums in fp32 at least, rounded once."""
    for t in (a, b, out):
        check_inside(t)
    if out.shape != (a.shape[0], b.shape[1]) or a.dtype != b.dtype:
        raise RuntimeError(f"mm: {a.shape} {a.dtype} by {b.shape} {b.dtype} into {out.shape}")
    acc = torch.promote_types(a.dtype, torch.float32)
    return out.copy_(torch.mm(a.to(acc), b.to(acc)))


def multiply_wide(a, b, dtype, *, out):
    if out.dtype != dtype or dtype != torch.float32 or a.element_size() != 2:
        raise RuntimeError(f"mm: {a.dtype} to {dtype} into {out.dtype}")
    return multiply(a, b, out=out)


aten.impl("mm.out", multiply, "CPU")
aten.impl("mm.dtype_out", multiply_wide, "CPU")  # torch has it for CUDA alone
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def call(name, arguments):
    memory = [t.untyped_storage() for t in arguments if isinstance(t, torch.Tensor)]
    before = [bytes(storage) for storage in memory]
    found = getattr(torch.ops.advdl_ops, name).default.redispatch(cuda, *arguments)
    if before != [bytes(storage) for storage in memory]:
        raise RuntimeError(f"{name} wrote an argument")
    return found


while True:
    try:
        request = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        reply = ("ok", call(*request))
    except Exception as error:
        reply = ("error", f"{type(error).__name__}: {error}")
    pickle.dump(reply, replies)
    replies.flush()
