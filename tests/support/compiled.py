"""One step of a module, compiled and not."""

import copy

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def step(module, x, *more):
    """Output, gradients and buffers after one call. The parameters have no gradients afterwards."""
    module.zero_grad()
    out = module(x, *more)
    grads = ()
    if out.requires_grad:
        leaves = [t for t in (x, *more, *module.parameters()) if t.requires_grad]
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    return (out.detach(), *grads, *(b.clone() for b in module.buffers()))


def check_steps(module, run, backend="aot_eager"):
    """The compiled module does the same as the uncompiled one for several batch sizes, with one compilation."""
    other = copy.deepcopy(module)
    counter = CompileCounterWithBackend(backend)
    fast = torch.compile(other, fullgraph=True, backend=counter)
    for n in (3, 4, 7):
        x = run(n)
        again = [t.detach().clone(memory_format=torch.preserve_format) for t in x]
        for a, b in zip(again, x, strict=True):
            torch._dynamo.mark_dynamic(a, 0)
            a.requires_grad_(b.requires_grad)
        for found, expected in zip(step(fast, *again), step(module, *x), strict=True):
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()
    assert counter.frame_count == 1
