"""Checks that the tests of several families share."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

# The tests that torch.library.opcheck runs.
OPERATOR_TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def error_of_type(call, expected):
    """The message of the error that ``call`` raises. Its type must be exactly ``expected``."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    assert type(caught.value) is expected, repr(caught.value)
    return str(caught.value)


def check_refused_call_keeps_nothing_alive(call, shape, *changes):
    """For each of ``changes``, ``call(x=..., **changed)`` must raise an error that does not keep ``x`` alive."""

    def refused(changed):
        x = torch.randn(shape)
        with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
            call(**{"x": x, **changed})
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        del caught
        return weakref.ref(x)

    gc.disable()
    try:
        for changed in changes:
            assert refused(changed)() is None
    finally:
        gc.enable()


def check_refused_module_stays(module, given, expected, stock):
    """``module(*given)`` must raise exactly ``expected`` (``None``: as ``stock`` does) and keep its state."""
    kept = copy.deepcopy(module.state_dict())
    if expected is None:
        with pytest.raises(Exception) as by_torch:  # noqa: PT011
            stock(given[0])
        expected = by_torch.type
    error_of_type(lambda: module(*given), expected)
    for key, t in kept.items():
        assert torch.equal(module.state_dict()[key], t), key


def check_functional_call(own, other, x):
    """``torch.func.functional_call(own, state of other)`` must equal a call of ``other`` and not change ``own``."""
    for mode in (True, False):
        own.train(mode), other.train(mode)
        before = copy.deepcopy(own.state_dict())
        state = {name: t.clone() for name, t in other.state_dict().items()}
        out = torch.func.functional_call(own, state, (x,))
        assert torch.equal(out, other(x))
        for name, t in other.state_dict().items():
            assert torch.equal(state[name], t), name  # the passed tensors are written
        for name, t in before.items():
            assert torch.equal(own.state_dict()[name], t), name


def copies_of(module):
    """Copies of a module by deepcopy, pickle and ``torch.save``."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(file, weights_only=False),
    }


def check_gradients_with_a_graph(out, leaves, dout):
    """Gradients must be the same with and without ``create_graph``, and when computed twice."""
    plain = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    graph = torch.autograd.grad(out, leaves, dout, create_graph=True)
    assert all(map(torch.equal, plain, again))
    torch.testing.assert_close(plain, tuple(t.detach() for t in graph), rtol=1e-12, atol=1e-12)


def second_gradients(call, inputs, dout):
    """The gradients of ``call(*inputs)``, and those of a penalty on them and the output."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = call(*leaves)
    first = torch.autograd.grad(out, leaves, dout, create_graph=True)
    penalty = sum(g.square().sum() for g in first) + out.square().sum()
    return first, torch.autograd.grad(penalty, leaves)


def check_deterministic_mode(call):
    """``call()`` must return the same tensors, by name, under ``torch.use_deterministic_algorithms``."""
    before = call()
    try:
        torch.use_deterministic_algorithms(True)
        after = call()
    finally:
        torch.use_deterministic_algorithms(False)
    for name, t in before.items():
        assert torch.equal(t, after[name]), name


def check_saved_by_norm(call, x, residual, act, most_small):
    """Checks what a norm saves for backward. ``call()`` runs it and returns its output.

    It may save x, one more tensor of that size if there are a residual and an activation (relu's output, otherwise the
    residual), and at most ``most_small`` numbers in smaller tensors. The context must have no tensors as attributes.
    """
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel()}
    allowed = {x.data_ptr()}
    if residual is not None and act == "relu":
        allowed.add(out.data_ptr())
    elif residual is not None and act != "none":
        allowed.add(residual.data_ptr())
    assert large == allowed
    small = {t.data_ptr(): t.numel() for t in saved if t.numel() < x.numel()}
    assert sum(small.values()) <= most_small
    hidden = [v for v in vars(out.grad_fn).values() if isinstance(v, torch.Tensor)]
    assert not hidden


def check_error_is_at_most_that_of_stock(run, dtype):
    """``run(fused, dtype)`` returns tensors. Our error against stock in fp64 may exceed stock's by a quarter ulp."""
    exact, stock, ours = run(False, torch.float64), run(False, dtype), run(True, dtype)
    ulp = torch.finfo(dtype).eps
    for e, s, o in zip(exact, stock, ours, strict=True):
        stock_error, error = ((v.double() - e).norm() / e.norm() for v in (s, o))
        assert error <= stock_error + ulp / 4
