"""Compares compiled and exported modules with the original ones."""

import copy

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from support.accuracy import channels_last, f64


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


def compiled(function, backend="aot_eager"):
    """Refuses graph breaks; the batch is dynamic."""
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=None)


def batch_of(*shape, layout="contiguous", dtype=f64):
    """A leaf ``[N, C, H, W]`` whose number of images is marked as dynamic."""
    x = torch.randn(shape, dtype=dtype)
    x = channels_last(x) if layout == "channels_last" else x
    torch._dynamo.mark_dynamic(x, 0)
    return x.requires_grad_()


def check_dynamic_positions(make, channels, sizes):
    """``make("relu")``, compiled for dynamic sizes, must give the same result as uncompiled."""
    torch.compiler.reset()
    module = make("relu")
    fast = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in sizes:
        x = torch.randn(3, channels, *size, dtype=f64)
        torch.testing.assert_close(fast(x), module(x))


def check_without_gradients(module, batch):
    """In evaluation, the compiled module must give the same result as uncompiled for ``batch(n)``."""
    fast = compiled(module.eval())
    with torch.no_grad():
        for n in (3, 5):
            x = batch(n)
            torch.testing.assert_close(fast(x), module(x))
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), module(x))


def exported(module, arguments, options=None, **more):
    """The module after ``torch.export``, whose graph must have only aten operators."""
    program = torch.export.export(module, arguments, options or {}, **more)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    overloads = [t for t in targets if isinstance(t, torch._ops.OpOverload)]
    assert overloads
    assert all(t.namespace == "aten" for t in overloads), overloads
    return program.module()


def check_export(module, inputs, **dynamic):
    """``module``, exported with ``inputs(3)``, must give the same results and buffers as before.

    Args:
        inputs: makes the arguments for a batch size.
        dynamic: for the name of each ``torch.export.Dim``, the dimension of every argument that is dynamic.
    """
    sizes = {at: torch.export.Dim(name, min=2, max=64) for name, at in dynamic.items()}
    given = inputs(3)
    other = exported(copy.deepcopy(module), given, dynamic_shapes=(sizes,) * len(given))
    for n in (3, 6):
        again = inputs(n)
        torch.testing.assert_close(other(*again), module(*again))
    found = dict(other.named_buffers())
    for name, t in module.named_buffers():
        torch.testing.assert_close(found[name], t)
