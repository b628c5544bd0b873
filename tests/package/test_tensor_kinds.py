"""Tensors made under inference_mode, and tensors with the negative bit: every op does as stock's, or better.

Stock does not save every argument for backward, so it takes more tensors made under inference_mode than one op that
saves them all would.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.accuracy import f64
from torch import Tensor

from advdl_ops import functional, nn

X = (2, 4, 6, 5)
PER_CHANNEL = {"weight": (4,), "bias": (4,)}
STATISTICS = {"running_mean": (4,), "running_var": (4,)}
CELL = {"h": (2, 4), "c": (2, 4), "w_ih": (16, 3), "w_hh": (16, 4), "b_ih": (16,), "b_hh": (16,)}
SEQUENCE = CELL | {"h": (1, 2, 4), "c": (1, 2, 4)}


class Op(NamedTuple):
    """The same call of ours and of stock's, and the shapes of its tensors."""

    own: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    # The error names what stock refuses to save; of the others it is autograd's own, of more tensors than stock's.
    as_stock: bool = True


def norm(
    own: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    statistics: bool,
    as_stock: bool = True,
) -> Op:
    def plain(residual: Tensor, **tensors: Tensor) -> Tensor:
        return F.silu(stock(**tensors) + residual)

    shapes = {"x": X, "residual": X} | PER_CHANNEL | (STATISTICS if statistics else {})
    return Op(lambda x, **tensors: own(x, **tensors, act="silu"), plain, shapes, as_stock)


def batch_norms(training: bool) -> Op:
    def stock(x, weight, bias, running_mean, running_var):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training)

    return norm(
        lambda x, **tensors: functional.batch_norm_act(x, **tensors, training=training), stock, True
    )


def instance_norms(own_statistics: bool) -> Op:
    def own(x, **tensors):
        return functional.instance_norm(x, **tensors, use_input_stats=own_statistics)

    def stock(x, weight, bias, running_mean, running_var):
        return F.instance_norm(x, running_mean, running_var, weight, bias, own_statistics)

    return norm(own, stock, True, as_stock=False)


def layer_norm_2d(x, weight, bias):
    return F.layer_norm(x.movedim(1, -1), (4,), weight, bias).movedim(-1, 1).contiguous()


def conv_bn_acts(training: bool) -> Op:
    def own(x, w, running_mean, running_var, **tensors):
        names = {"bn_weight": tensors.pop("weight"), "bn_bias": tensors.pop("bias")}
        return functional.conv_bn_act(
            x, w, running_mean, running_var, **names, **tensors, padding=1, training=training
        )

    def stock(x, w, weight, bias, running_mean, running_var):
        z = F.conv2d(x, w, padding=1)
        return F.batch_norm(z, running_mean, running_var, weight, bias, training)

    op = norm(own, stock, True)
    return op._replace(shapes=op.shapes | {"w": (4, 4, 3, 3)})


def convolutions(groups: int) -> Op:
    options: Any = {"padding": 1, "groups": groups}

    def own(x, **tensors):
        return functional.conv2d(x, **tensors, **options, act="silu")

    def stock(x, weight, bias, residual):
        return F.silu(F.conv2d(x, weight, bias, **options) + residual)

    shapes = {"x": X, "residual": X, "weight": (4, 4 // groups, 3, 3), "bias": (4,)}
    return Op(own, stock, shapes, as_stock=False)


def lstms(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def call(x, h, c, **weights):
        return function(x, (h, c), tuple(weights.values()), True, 1, 0.0, True, False, False)[0]

    return call


def cells(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x, h, c, **weights: function(x, (h, c), *weights.values())[0]


OPS = {
    "batch_norm_act, training": batch_norms(True),
    "batch_norm_act, evaluation": batch_norms(False),
    "group_norm": norm(
        lambda x, **tensors: functional.group_norm(x, num_groups=2, **tensors),
        lambda x, weight, bias: F.group_norm(x, 2, weight, bias),
        False,
    ),
    "layer_norm_2d": norm(functional.layer_norm_2d, layer_norm_2d, False),
    "instance_norm": instance_norms(True),
    "instance_norm, evaluation": instance_norms(False),
    "conv_bn_act, training": conv_bn_acts(True),
    "conv_bn_act, evaluation": conv_bn_acts(False),
    "conv2d": convolutions(1),
    "depthwise conv2d": convolutions(4),
    "conv_transpose2d": Op(
        lambda x, **tensors: functional.conv_transpose2d(x, **tensors, stride=2, act="silu"),
        lambda x, weight, bias: F.silu(F.conv_transpose2d(x, weight, bias, stride=2)),
        {"x": X, "weight": (4, 4, 2, 2), "bias": (4,)},
        as_stock=False,
    ),
    "lstm": Op(lstms(functional.lstm), lstms(torch.lstm), {"x": (5, 2, 3)} | SEQUENCE),
    "lstm_cell": Op(
        cells(functional.lstm_cell), cells(torch.lstm_cell), {"x": (2, 3)} | CELL, as_stock=False
    ),
}
of_every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def made(op: Op, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        name: (torch.rand(shape, generator=g, dtype=f64) + 0.5).to(dtype)
        for name, shape in op.shapes.items()
    }


def under_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def with_negative_bit(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def outcome(
    call: Callable[..., Tensor], tensors: dict[str, Tensor], wanted: str | None
) -> dict[str, Tensor] | tuple[type[Exception], list[str]]:
    """Output, gradient and statistics; or the error's type, and the statistics that were written by then."""
    before = {name: tensors[name].clone() for name in STATISTICS if name in tensors}
    try:
        out = call(**tensors)
    except RuntimeError as error:
        written = [name for name, value in before.items() if not torch.equal(tensors[name], value)]
        return type(error), written
    found = {"out": out} | {name: tensors[name].clone() for name in before}
    if wanted is not None:
        g = torch.Generator().manual_seed(2)
        dout = torch.rand(out.shape, generator=g).to(out.dtype)
        found["gradient"] = torch.autograd.grad(out, tensors[wanted], dout)[0]
    return found


def changed(
    op: Op, names: tuple[str, ...], kind: Callable[[Tensor], Tensor], wanted: str | None
) -> dict[str, Tensor]:
    tensors = made(op)
    tensors |= {name: kind(tensors[name]) for name in names}
    if wanted is not None:
        tensors[wanted].requires_grad_()
    return tensors


def exact(op: Op, wanted: str | None) -> dict[str, Tensor]:
    tensors = made(op, f64)
    if wanted is not None:
        tensors[wanted].requires_grad_()
    found = outcome(op.stock, tensors, wanted)
    assert isinstance(found, dict)
    return found


def assert_right(found: Any, truth: dict[str, Tensor], what: Any) -> None:
    assert isinstance(found, dict), (what, found)
    for name, value in truth.items():
        torch.testing.assert_close(
            found[name].to(f64), value, rtol=1e-4, atol=1e-5, msg=f"{what}: {name}"
        )


def cases(op: Op) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Which tensors are of a kind, and which needs a gradient."""
    groups = [(name,) for name in op.shapes] + [tuple(op.shapes)]
    if "running_mean" in op.shapes:
        groups.append(("running_mean", "running_var"))
    for names in groups:
        for wanted in (None, *op.shapes):
            if wanted not in STATISTICS and wanted not in names:
                yield names, wanted


@of_every_op
def test_negative_bit(backend, op):
    for names, wanted in cases(op):
        found = outcome(op.own, changed(op, names, with_negative_bit, wanted), wanted)
        assert_right(found, exact(op, wanted), (names, wanted))


@of_every_op
def test_inference_mode(backend, op):
    """Where stock computes, so do we, and right; where it raises, nothing may have been written."""
    for names, wanted in cases(op):
        found = outcome(op.own, changed(op, names, under_inference_mode, wanted), wanted)
        if isinstance(found, dict):
            assert_right(found, exact(op, wanted), (names, wanted))
            continue
        assert found == (RuntimeError, []), (names, wanted)
        stock = outcome(op.stock, changed(op, names, under_inference_mode, wanted), wanted)
        if wanted is None or (op.as_stock and backend == "fused"):
            refused = isinstance(stock, tuple)
            # The reference writes statistics by torch's own operators, which stock does not.
            of_inference = [name for name in names if name in STATISTICS]
            assert refused or (backend == "reference" and of_inference), (names, wanted)


def test_negative_gradient(backend):
    """What reaches backward."""
    for op in OPS.values():
        tensors = made(op)
        x = tensors["x"].requires_grad_()
        out = op.own(**tensors)
        dout = torch.rand_like(out)
        found, expected = (
            torch.autograd.grad(out, x, d, retain_graph=True)[0]
            for d in (with_negative_bit(dout), dout)
        )
        torch.testing.assert_close(found, expected)


def test_expanded_statistics_with_the_negative_bit_are_refused():
    x, mean = torch.randn(X), torch.zeros(4)
    for which in ("running_mean", "running_var"):
        statistics = {"running_mean": mean, "running_var": torch.ones(4)}
        statistics[which] = with_negative_bit(torch.ones(1)).expand(4)
        with pytest.raises(RuntimeError, match="expanded cannot be written"):
            functional.batch_norm_act(x, **statistics, training=True)
        assert mean.eq(0).all()


@pytest.mark.parametrize("which", ["running_mean", "running_var"])
def test_a_plain_mean_of_a_statistic_made_under_inference_mode(backend, which):
    """Neither the counter nor the other statistic is written."""
    module = nn.BatchNormAct2d(4, momentum=None)
    with torch.inference_mode():
        setattr(module, which, getattr(module, which).clone())
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"inference"):
        module(torch.randn(X))
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_an_error_of_a_kernel_is_raised_as_it_is(monkeypatch):
    """Not taken for one about what cannot be saved."""

    def fails(*tensors):
        raise torch.OutOfMemoryError("no memory")

    module = sys.modules["advdl_ops.functional.group_norm"]
    monkeypatch.setattr(module, "_forward", fails)
    with torch.inference_mode(), pytest.raises(torch.OutOfMemoryError, match="no memory"):
        functional.group_norm(torch.randn(X), 2)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("layer", [nn.BatchNormAct2d, torch.nn.BatchNorm2d])
def test_a_layer_made_under_inference_mode(backend, layer, momentum):
    """Its counter may not be written elsewhere: then nothing is."""
    with torch.inference_mode():
        module = layer(4, momentum=momentum)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    x = torch.randn(X)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"inference"):
        module(x)
    if layer is nn.BatchNormAct2d:  # stock has counted by then
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    with torch.inference_mode():
        module(x)
    assert module.num_batches_tracked >= 1
    assert not module.running_mean.eq(0).any()
