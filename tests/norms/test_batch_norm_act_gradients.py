"""batch_norm_act: first and second derivatives, what is saved for them, and determinism."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwd
from support.accuracy import ACTIVATIONS, SMOOTH, in_layout
from support.checks import check_deterministic_mode, check_saved_by_norm, second_gradients
from support.norms import make_problem, ours
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops.functional import batch_norm_act

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])


def function_and_inputs(act, training, residual, layout="contiguous", shape=(3, 2, 2, 2)):
    """A function of the differentiable inputs alone, and fp64 inputs with every |z| well above gradcheck's step."""
    p = make_problem(shape, "fp64", residual=residual)
    if act in ("relu", "relu6", "leaky_relu", "elu", "hardswish", "LeakyReLU(0.2)", "ELU(0.7)"):
        # Kinks lie at 0, at +-3 and at 6: an own generator until none is near.
        for seed in range(1000):
            p = make_problem(shape, "fp64", residual=residual, seed=seed)
            z = ours(p, "none", training, backward=False)["out"].abs()
            if min(z.min(), (z - 3).abs().min(), (z - 6).abs().min()) > 0.02:
                break
        else:
            raise AssertionError("no inputs away from the kinks")
    inputs = [p.x, p.weight, p.bias] + ([p.residual] if residual else [])
    inputs = [in_layout(t, layout) if t.dim() > 1 else t for t in inputs]

    def function(x, weight, bias, residual=None):
        return batch_norm_act(
            x, p.running_mean, p.running_var, weight, bias, training, 0.0,
            residual=residual, act=ACTIVATIONS[act][0],
        )  # fmt: skip

    return function, [t.detach().requires_grad_() for t in inputs]


@TRAINING
@RESIDUAL
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act, residual, training):
    for layout in ("contiguous", "channels_last"):
        function, inputs = function_and_inputs(act, training, residual, layout)
        assert gradcheck(function, inputs)


@TRAINING
@RESIDUAL
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradgradcheck(act, residual, training):
    function, inputs = function_and_inputs(act, training, residual, shape=(3, 2, 2, 1))
    assert gradgradcheck(function, inputs)


@TRAINING
def test_gradgradcheck_without_affine(training):
    p = make_problem((4, 2, 2, 2), "fp64")
    x = p.x.requires_grad_()

    def function(x):
        return batch_norm_act(
            x, p.running_mean, p.running_var, None, None, training, 0.0, act="silu"
        )

    assert gradcheck(function, x)
    assert gradgradcheck(function, x)


@TRAINING
@RESIDUAL
@pytest.mark.parametrize("act", ["relu", *SMOOTH])
def test_create_graph_equals_stock(act, residual, training):
    p = make_problem((3, 4, 5, 3), "fp64", residual=residual)

    def stock(x, weight, bias, residual=None):
        z = torch.nn.functional.batch_norm(
            x, p.running_mean.clone(), p.running_var.clone(), weight, bias, training, 0.1, p.eps
        )
        return ACTIVATIONS[act][1](z if residual is None else z + residual)

    def fused(x, weight, bias, residual=None):
        return batch_norm_act(
            x, p.running_mean.clone(), p.running_var.clone(), weight, bias, training, 0.1, p.eps,
            residual=residual, act=ACTIVATIONS[act][0],
        )  # fmt: skip

    inputs = [p.x, p.weight, p.bias] + ([p.residual] if residual else [])
    ours_, theirs = (second_gradients(call, inputs, p.dout) for call in (fused, stock))
    for found, exact in zip(ours_, theirs, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_first_gradients_are_the_same_with_and_without_a_graph():
    for act, layout in itertools.product(("relu", "silu", None), ("contiguous", "channels_last")):
        p = make_problem((3, 4, 5, 3), "fp64", residual=True).laid(layout)
        leaves = [t.detach().requires_grad_() for t in (p.x, p.weight, p.bias, p.residual)]
        x, weight, bias, residual = leaves
        out = batch_norm_act(x, None, None, weight, bias, True, residual=residual, act=act)
        plain = torch.autograd.grad(out, leaves, p.dout, retain_graph=True)
        graph = torch.autograd.grad(out, leaves, p.dout, create_graph=True)
        torch.testing.assert_close(plain, tuple(t.detach() for t in graph), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_wanted_gradients(wanted):
    p = make_problem((3, 4, 5, 3), residual=True)
    expected = ours(p, "silu")
    names = ("x", "weight", "bias", "residual")
    leaves = {
        n: getattr(p, n).detach().requires_grad_(bool(wanted >> i & 1)) for i, n in enumerate(names)
    }
    out = batch_norm_act(
        leaves["x"], None, None, leaves["weight"], leaves["bias"], True,
        residual=leaves["residual"], act="silu",
    )  # fmt: skip
    out.backward(p.dout)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert torch.equal(leaf.grad, expected["d" + name]), name


@pytest.mark.parametrize("training", [True, False])
def test_frozen_statistics_of_eval_get_no_gradient(training):
    # Stock has none for them either; they may even require grad (functional_call on all of state_dict).
    p = make_problem((3, 4, 5, 3))
    out = batch_norm_act(p.x.requires_grad_(), p.running_mean, p.running_var, training=training)
    out.sum().backward()
    assert p.running_mean.grad is None
    assert not p.running_mean.requires_grad
    assert not p.running_var.requires_grad


@RESIDUAL
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_saved_for_backward(act, residual):
    """x, the [C] tensors, and with a residual and an activation one tensor more: relu's output, else the residual."""
    p = make_problem((4, 8, 6, 6), residual=residual)
    x, weight, bias = (t.requires_grad_() for t in (p.x, p.weight, p.bias))
    if residual:
        p.residual.requires_grad_()

    def call():
        return batch_norm_act(
            x, p.running_mean, p.running_var, weight, bias, True,
            residual=p.residual, act=ACTIVATIONS[act][0],
        )  # fmt: skip

    # The small tensors are weight, bias, mean and rstd.
    check_saved_by_norm(call, x, p.residual, act, 4 * x.shape[1])


def test_input_may_not_change_before_backward():
    p = make_problem((3, 4, 5, 3))
    x = p.x.requires_grad_()
    y = x * 1
    out = batch_norm_act(y, None, None, training=True, act="relu")
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@TRAINING
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mix", ["fp32", "bf16", "fp64"])
def test_two_runs_and_two_thread_counts_are_bitwise_equal(threads, mix, layout, training):
    # Few channels, many channels, and one channel longer than all threads together can hold.
    for shape in [(4, 3, 65, 70), (6, 40, 15, 15), (2, 1, 130, 131), (5000, 6), (2, 600, 4, 4)]:
        p = make_problem(shape, mix, residual=True).laid(layout)
        for act in ("relu", "silu"):
            results = []
            for count in (1, 1, 2, 3):
                torch.set_num_threads(count)
                results.append(ours(p, act, training))
            for other in results[1:]:
                for name, t in results[0].items():
                    assert torch.equal(t, other[name]), (shape, act, name)


def test_deterministic_mode_needs_no_special_case():
    p = make_problem((4, 6, 9, 9), residual=True)
    check_deterministic_mode(lambda: ours(p, "relu"))


def test_inputs_are_left_alone():
    p = make_problem((4, 6, 9, 9), residual=True)
    kept = {n: t.clone() for n, t in vars(p).items() if isinstance(t, torch.Tensor)}
    for act, training in itertools.product(ACTIVATIONS, (True, False)):
        ours(p, act, training)
    for name, t in kept.items():
        assert torch.equal(getattr(p, name), t), name


def test_func_transforms_through_the_reference(no_native_required):
    p = make_problem((3, 4, 5, 3), "fp64")

    def loss(call, x, weight):
        return call(x, None, None, weight, p.bias, True).square().sum().add(x.sum())

    def fused(*args):
        return batch_norm_act(*args, act="silu")

    def stock(*args):
        return torch.nn.functional.silu(torch.nn.functional.batch_norm(*args))

    found = torch.func.grad(lambda *a: loss(fused, *a), (0, 1))(p.x, p.weight)
    exact = torch.func.grad(lambda *a: loss(stock, *a), (0, 1))(p.x, p.weight)
    torch.testing.assert_close(found, exact)
    found = torch.func.jvp(
        lambda x: fused(x, None, None, p.weight, p.bias, True), (p.x,), (p.dout,)
    )
    exact = torch.func.jvp(
        lambda x: stock(x, None, None, p.weight, p.bias, True), (p.x,), (p.dout,)
    )
    torch.testing.assert_close(found, exact)
    per_sample = torch.func.vmap(
        torch.func.grad(
            lambda w, x: fused(x[None], p.running_mean, p.running_var, w, p.bias).sum()
        ),
        in_dims=(None, 0),
    )(p.weight, p.x)
    exact = torch.func.vmap(
        torch.func.grad(
            lambda w, x: stock(x[None], p.running_mean, p.running_var, w, p.bias).sum()
        ),
        in_dims=(None, 0),
    )(p.weight, p.x)
    torch.testing.assert_close(per_sample, exact)


def test_forward_ad_through_the_reference(no_native_required):
    p = make_problem((3, 4, 5, 3), "fp64")
    with fwd.dual_level():
        x = fwd.make_dual(p.x, p.dout)
        found = fwd.unpack_dual(batch_norm_act(x, None, None, training=True, act="silu")).tangent
        exact = torch.nn.functional.silu(
            torch.nn.functional.batch_norm(x, None, None, training=True)
        )
        torch.testing.assert_close(found, fwd.unpack_dual(exact).tangent)
