"""The group norms: first and second derivatives, what is saved for them, and determinism."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwd
from support.accuracy import ACTIVATIONS, SMOOTH, in_layout
from support.checks import (
    check_deterministic_mode,
    check_gradients_with_a_graph,
    check_saved_by_norm,
    second_gradients,
)
from support.group_norm import INSTANCE, POSITION, call_ours, call_stock, ours, problem_of
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops.functional import group_norm, instance_norm

NORMS = pytest.mark.parametrize("norm", [1, 2, 4, POSITION, INSTANCE])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
KINKED = [a for a in ACTIVATIONS if a not in SMOOTH]


def function_and_inputs(norm, act, residual, layout="contiguous", shape=(2, 4, 3, 2)):
    """A function of the differentiable inputs alone, and fp64 inputs with every |z| well above gradcheck's step."""
    p = problem_of(norm, shape, "fp64", residual=residual)
    if act in KINKED:
        # Kinks lie at 0, at +-3 and at 6: an own generator until none is near.
        for seed in range(1000):
            p = problem_of(norm, shape, "fp64", residual=residual, seed=seed)
            z = ours(p, norm, backward=False)["out"].abs()
            if min(z.min(), (z - 3).abs().min(), (z - 6).abs().min()) > 0.005:
                break
        else:
            raise AssertionError("no inputs away from the kinks")
    inputs = [p.x, p.weight, p.bias] + ([p.residual] if residual else [])
    inputs = [in_layout(t, layout) if t.dim() > 1 else t for t in inputs]
    statistics = p.running_mean, p.running_var

    def function(x, weight, bias, residual=None):
        # Finite differences call it often: what running statistics do is no matter here.
        return call_ours(
            norm, x, *statistics, weight, bias, p, residual=residual, act=ACTIVATIONS[act][0]
        )

    return function, [t.detach().requires_grad_() for t in inputs]


@NORMS
@RESIDUAL
def test_gradcheck(norm, residual):
    for act, layout in itertools.product(("none", "relu", "silu"), ("contiguous", "channels_last")):
        function, inputs = function_and_inputs(norm, act, residual, layout)
        assert gradcheck(function, inputs)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck_of_every_activation(act):
    for norm, layout in ((2, "contiguous"), (2, "channels_last"), (POSITION, "contiguous")):
        function, inputs = function_and_inputs(norm, act, True, layout)
        assert gradcheck(function, inputs)


@NORMS
@RESIDUAL
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_gradgradcheck(norm, act, residual):
    for layout in ("contiguous", "channels_last"):
        function, inputs = function_and_inputs(norm, act, residual, layout, shape=(2, 4, 2, 1))
        assert gradgradcheck(function, inputs)


@NORMS
@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
def test_without_weight_or_bias(norm, given):
    p = problem_of(norm, (2, 4, 3, 1), "fp64", running=False)
    x, v = p.x.requires_grad_(), (p.bias if given == "bias" else p.weight).requires_grad_()

    def function(x, v):
        weight, bias = v if given == "weight" else None, v if given == "bias" else None
        return call_ours(norm, x, None, None, weight, bias, p, act="silu")

    inputs = (x, v) if given != "neither" else (x, None)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@NORMS
@RESIDUAL
@pytest.mark.parametrize("act", ["none", "relu", "silu", "GELU(tanh)"])
def test_create_graph_equals_stock(norm, act, residual):
    p = problem_of(norm, (3, 4, 5, 3), "fp64", residual=residual)

    def stock(x, weight, bias, residual=None):
        z = call_stock(norm, x, None, None, weight, bias, p)
        return ACTIVATIONS[act][1](z if residual is None else z + residual)

    def fused(x, weight, bias, residual=None):
        options = {"residual": residual, "act": ACTIVATIONS[act][0]}
        return call_ours(norm, x, None, None, weight, bias, p, **options)

    inputs = [p.x, p.weight, p.bias] + ([p.residual] if residual else [])
    ours_, theirs = (second_gradients(call, inputs, p.dout) for call in (fused, stock))
    for found, exact in zip(ours_, theirs, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@NORMS
def test_first_gradients_are_the_same_with_and_without_a_graph_and_twice(norm):
    for act, layout in itertools.product(("relu", "silu", None), ("contiguous", "channels_last")):
        p = problem_of(norm, (3, 4, 5, 3), "fp64", residual=True).laid(layout)
        leaves = [t.detach().requires_grad_() for t in (p.x, p.weight, p.bias, p.residual)]
        x, weight, bias, residual = leaves
        out = call_ours(norm, x, None, None, weight, bias, p, residual=residual, act=act)
        check_gradients_with_a_graph(out, leaves, p.dout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@NORMS
def test_only_wanted_gradients(norm, layout):
    names = ("x", "weight", "bias", "residual")
    for act, shape in itertools.product((None, "relu", "silu"), ((3, 4, 5, 3), (3, 4, 9, 5))):
        p = problem_of(norm, shape, residual=True, running=False).laid(layout)
        expected = ours(p, norm, act or "none")
        for wanted in range(1, 16):
            leaves = {
                n: getattr(p, n).detach().requires_grad_(bool(wanted >> i & 1))
                for i, n in enumerate(names)
            }
            x, weight, bias, residual = leaves.values()
            out = call_ours(norm, x, None, None, weight, bias, p, residual=residual, act=act)
            out.backward(p.dout)
            for name, leaf in leaves.items():
                assert (leaf.grad is not None) == leaf.requires_grad
                if leaf.grad is not None:
                    assert torch.equal(leaf.grad, expected["d" + name]), (name, act, wanted)


@NORMS
@RESIDUAL
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
def test_saved_for_backward(norm, act, residual):
    """x, small tensors, and with a residual and an activation one tensor more: relu's output, else the residual."""
    p = problem_of(norm, (4, 8, 6, 6), residual=residual)
    x, weight, bias = (t.requires_grad_() for t in (p.x, p.weight, p.bias))
    if residual:
        p.residual.requires_grad_()

    def call():
        options = {"residual": p.residual, "act": ACTIVATIONS[act][0]}
        return call_ours(norm, x, p.running_mean, p.running_var, weight, bias, p, **options)

    sets = {POSITION: 4 * 36, INSTANCE: 4 * 8}.get(norm) or 4 * norm
    # The small tensors are weight, bias, mean and variance.
    check_saved_by_norm(call, x, p.residual, act, 2 * 8 + 2 * sets)


def test_input_may_not_change_before_backward():
    y = torch.randn(3, 4, 5, 3).requires_grad_() * 1
    out = group_norm(y, 2, act="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_buffers_written_are_seen_by_autograd():
    x, mean, var = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
    weight = torch.ones(3, requires_grad=True)
    saved = weight * mean
    for grad in (False, True):
        version = mean._version, var._version
        with torch.set_grad_enabled(grad):
            instance_norm(x, mean, var, weight)
        assert mean._version > version[0]
        assert var._version > version[1]
    assert not mean.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


# Few sets, whose chunks are shared out: one, three; one sample; ragged chunks; rows and sets in chunks of their own.
SHARED = [
    ((1, 2, 182, 183), (1, 2, POSITION, INSTANCE)),
    ((3, 4, 131, 127), (1, 2, POSITION)),
    ((1, 6, 211, 107), (1, 3, 6, POSITION)),
    ((1, 70, 48, 49), (1, 35, POSITION)),
    ((3, 2200, 31), (1, 11, POSITION)),
    ((130, 600), (1, 3, POSITION)),
    ((5, 300, 11, 13), (30, POSITION)),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp64"])
def test_two_runs_and_thread_counts_are_bitwise_equal(threads, mix, layout):
    for shape, norms in SHARED:
        for norm, act in zip(norms, itertools.cycle(("relu", "silu")), strict=False):
            p = problem_of(norm, shape, mix, residual=True).laid(layout)
            results = []
            for count in (1, 1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(ours(p, norm, act))
            for other in results[1:]:
                for name, t in results[0].items():
                    assert torch.equal(t, other[name]), (shape, norm, act, name)


def test_deterministic_mode_needs_no_special_case():
    p = problem_of(INSTANCE, (4, 6, 9, 9), residual=True)
    check_deterministic_mode(lambda: ours(p, INSTANCE, "relu"))


@NORMS
def test_inputs_are_left_alone(norm):
    for layout, shape in itertools.product(
        ("contiguous", "channels_last"), [(4, 8, 3, 3), (4, 8, 9, 9)]
    ):
        p = problem_of(norm, shape, residual=True).laid(layout)
        kept = {n: t.clone() for n, t in vars(p).items() if isinstance(t, torch.Tensor)}
        for act in ("none", "relu", "silu"):
            ours(p, norm, act)
        for name, t in kept.items():
            assert torch.equal(getattr(p, name), t), name


@pytest.mark.parametrize("norm", [2, POSITION, INSTANCE])
def test_func_transforms_through_the_reference(no_native_required, norm):
    p = problem_of(norm, (3, 4, 5, 3), "fp64", running=False)
    silu = torch.nn.functional.silu

    def fused(x, weight):
        return call_ours(norm, x, None, None, weight, p.bias, p, act="silu")

    def stock(x, weight):
        return silu(call_stock(norm, x, None, None, weight, p.bias, p))

    def loss(call):
        return lambda x, weight: call(x, weight).square().sum().add(x.sum())

    def per_sample(call):
        gradient = torch.func.grad(lambda w, x: call(x[None], w).square().sum())
        return torch.func.vmap(gradient, in_dims=(None, 0))(p.weight, p.x)

    for transform in (
        lambda call: torch.func.grad(loss(call), (0, 1))(p.x, p.weight),
        lambda call: torch.func.jvp(lambda x: call(x, p.weight), (p.x,), (p.dout,)),
        per_sample,
    ):
        torch.testing.assert_close(transform(fused), transform(stock))


@pytest.mark.parametrize("norm", [2, POSITION, INSTANCE])
def test_forward_ad_through_the_reference(no_native_required, norm):
    p = problem_of(norm, (3, 4, 5, 3), "fp64", running=False)
    with fwd.dual_level():
        x = fwd.make_dual(p.x, p.dout)
        found = call_ours(norm, x, None, None, p.weight, p.bias, p, act="silu")
        exact = call_stock(norm, x, None, None, p.weight, p.bias, p)
        exact = torch.nn.functional.silu(exact)
        torch.testing.assert_close(fwd.unpack_dual(found).tangent, fwd.unpack_dual(exact).tangent)
