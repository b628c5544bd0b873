"""Checks every call of this package's differentiable operators within a training step.

In fp32 the gradients of a whole network can be compared only loosely (``measure_model.py``), and fp64 uses other
kernels. So the :class:`torch.autograd.Function` of each operator is wrapped during one step. Its results, forward and
backward, are compared with plain PyTorch in fp64 on the same input tensors. No mode, hook or subclass is used, because
operators might choose other kernels then: the checked code is the timed code. Torch's own operators in a network are
not checked here, nor is anything that a compiler traced. Those are only compared as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from advdl_ops import reference
from advdl_ops.activation import IDENTITY, Activation
from advdl_ops.reference.activation import activate

from .check import FACTOR, ULPS, error

_Function = type[torch.autograd.Function]


def _conv2d(x, weight, scale, shift, residual, options, *_):
    conv: tuple[Any, Any, Any, int] = options[0]
    act = options[1]
    return (reference.conv2d(x, weight, None, *conv, scale, shift, residual, act),)


def _batch_norm(x, residual, weight, bias, mean, var, options):
    training, momentum, eps, act = options
    how = training, momentum, eps
    return reference.batch_norm_act(x, mean, var, weight, bias, *how, residual, act)


def _batch_norm_by(x, residual, weight, bias, mean, var, options):
    return _batch_norm(x, residual, weight, bias, mean, var, (False, *options[1:]))


def _group_norm(x, residual, weight, bias, options, *_):
    groups, eps, act = options
    return (reference.group_norm(x, groups, weight, bias, eps, residual, act)[0],)


def _conv_transpose2d(x, weight, bias, options, act, *_):
    return (reference.conv_transpose2d(x, weight, bias, options, act),)


# Plain PyTorch functions with the arguments of each Function's forward. They return its first output and the running
# statistics that it writes. Backward needs no such table: with ``create_graph=True`` each Function's own backward is
# plain PyTorch.
FORMULAS: dict[str, Callable[..., Sequence[Tensor | None]]] = {
    "Conv2dFunction": _conv2d,
    "Conv2dWithStatisticsFunction": _conv2d,
    "BatchNormActFunction": _batch_norm,
    "GivenStatisticsFunction": _batch_norm_by,
    "GroupNormFunction": _group_norm,
    "ConvTranspose2dFunction": _conv_transpose2d,
}
# The points where the derivative of an activation jumps.
_KINKS = {"relu": (0,), "leaky_relu": (0,), "elu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}


def functions() -> list[_Function]:
    """Every autograd Function of this package."""
    found: list[_Function] = []
    pending = list(torch.autograd.Function.__subclasses__())
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls.__module__.startswith("advdl_ops."):
            found.append(cls)
    return found


class Calls:
    """Checks calls, and remembers plain PyTorch's error, because fp64 takes as long as four steps in fp32."""

    def __init__(self) -> None:
        self.known: dict[Any, float] = {}
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self.leaves: dict[Tensor, list[Tensor]] = {}

    @contextmanager
    def judged(self) -> Iterator[list[str]]:
        """Checks the calls made inside. The list gets one line for each error."""
        self.wrong, self.counts, self.leaves = [], {}, {}
        before = [
            (cls, name, vars(cls)[name])
            for cls in functions()
            for name in ("forward", "backward")
            if name in vars(cls)
        ]
        for cls, name, method in before:
            wrap = self._forward if name == "forward" else self._backward
            setattr(cls, name, staticmethod(wrap(cls.__name__, method.__func__)))
        try:
            yield self.wrong
        finally:
            for cls, name, method in before:
                setattr(cls, name, method)

    def altered(self, gradients: Mapping[Tensor, Tensor]) -> list[str]:
        """The parameters of the last step whose gradient differs from the checked one, one line each."""
        return [
            f"the gradient of a parameter (shape {tuple(leaf.shape)}) is not what its operator returned"
            for leaf, judged in self.leaves.items()
            if len(judged) == 1 and not torch.equal(gradients[leaf], judged[0])
        ]

    def _forward(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        formula = FORMULAS.get(name)

        def forward(ctx: Any, *given: Any) -> Any:
            if formula is None:
                self.wrong.append(f"{name}: there is no formula to compare it with")
                ctx.judged = False
                return method(ctx, *given)
            # Copies of the running statistics, which the call overwrites.
            first = tuple(
                t.detach().clone() if isinstance(t, Tensor) and t.dim() == 1 else t for t in given
            )
            results = method(ctx, *given)
            ctx.of_tensors = tuple(isinstance(t, Tensor) for t in given)
            out = results[0] if isinstance(results, tuple) else results
            self.counts[name] = self.counts.get(name, 0) + 1
            act = _activation(given)
            of_z = _mapped(first, lambda a: IDENTITY if isinstance(a, Activation) else a)

            def plain(
                dtype: torch.dtype | None, rounded: bool = False, as_given: bool = False
            ) -> list[Tensor | None]:
                x, *others = _mapped(of_z, lambda a: _plain(a, dtype, as_given))
                z, *running = formula(_rounded(x, given[0].dtype) if rounded else x, *others)
                assert z is not None
                pre.append(z)
                return [activate(z, act), *running]

            pre: list[Tensor] = []
            found = [out, *given[4:6]] if formula is _batch_norm else [out]
            bounds = self._judge(name, "output", given, found, plain)
            if act.name in _KINKS and bounds:
                # The gradient is zeroed where rounding may step over a kink, because two correct answers differ there.
                z = pre[0].detach()
                step = 2 * bounds[0] * float(z.abs().max()) if z.numel() else 0.0
                ctx.near = torch.stack([(z - k).abs() <= step for k in _KINKS[act.name]]).any(0)
            return results

        return forward

    def _backward(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Any) -> Any:
            results = method(ctx, *grads)
            if torch.is_grad_enabled() or not getattr(ctx, "judged", True):
                return results
            self.counts[f"{name}Backward"] = self.counts.get(f"{name}Backward", 0) + 1
            into = iter(ctx.next_functions)
            for grad, of_tensor in zip(results, ctx.of_tensors, strict=True):
                leaf = getattr(next(into)[0], "variable", None) if of_tensor else None
                if leaf is not None and grad is not None:
                    self.leaves.setdefault(leaf, []).append(grad)
            near, found = getattr(ctx, "near", None), results
            if near is not None and bool(near.any()):
                grads = tuple(
                    None if g is None else torch.where(near, torch.zeros_like(g), g) for g in grads
                )
                found = method(ctx, *grads)

            def plain(
                dtype: torch.dtype | None, rounded: bool = False, as_given: bool = False
            ) -> list[Tensor | None]:
                def of(value: Any) -> Any:
                    return _plain(value, dtype, as_given)

                douts = [of(g) for g in grads]
                if rounded:
                    douts = [g if g is None else _rounded(g, grads[0].dtype) for g in douts]
                stand_in = SimpleNamespace(**_mapped(vars(ctx), of))
                stand_in.saved_tensors = _mapped(ctx.saved_tensors, of)
                stand_in.needs_input_grad = ctx.needs_input_grad
                with torch.enable_grad():
                    return list(method(stand_in, *douts))

            given = (*grads, *ctx.saved_tensors, vars(ctx), ctx.needs_input_grad)
            self._judge(name, "gradient", given, list(found), plain)
            return results

        return backward

    @torch.no_grad()
    def _judge(
        self,
        name: str,
        kind: str,
        given: Any,
        found: Sequence[Tensor | None],
        plain: Callable[..., Sequence[Tensor | None]],
    ) -> list[float]:
        """Applies the rule of ``check.py`` to each result. Returns the bounds.

        ``plain`` computes the results in plain PyTorch: in a given dtype or that of the tensors, in contiguous memory
        or in the given format (oneDNN's gradient of an image of 512 channels is 10 times less accurate in
        channels_last), and also for ``rounded`` inputs: a value that is 0 up to rounding may be off by as much as such
        a rounding changes it.
        """
        stock = plain(None)
        exact: Sequence[Tensor | None] | None = None
        bounds = []
        for i, value in enumerate(found):
            same = stock[i] if i < len(stock) else None
            if value is None or same is None:
                if same is not None:
                    self.wrong.append(f"{kind} {i} of {name} is missing")
                continue
            key = name, kind, i, _signature(given)
            eps = torch.finfo(value.dtype).eps
            allowed, known = ULPS * eps, self.known.get(key, math.inf)
            # If plain PyTorch's error in the same call was small before, on other values, it is enough to be close to
            # it.
            near = known < eps**0.75 and (
                error(value, same.double()) <= (FACTOR - 1) * known + allowed
            )
            if not near:
                if exact is None:
                    exact = plain(torch.float64)
                truth = exact[i]
                assert truth is not None
                self.known[key] = error(same, truth)
                off, bound = error(value, truth), FACTOR * self.known[key] + allowed
                if not off <= bound:
                    other = plain(None, as_given=True)[i]
                    assert other is not None
                    in_layout = error(other, truth)
                    if in_layout < eps**0.75:  # else it is wrong itself, and justifies nothing
                        self.known[key] = max(self.known[key], in_layout)
                        bound = FACTOR * self.known[key] + allowed
                if not off <= bound:
                    other = plain(torch.float64, True)[i]
                    assert other is not None
                    bound += ULPS * error(other, truth)
                if not off <= bound:
                    self.wrong.append(
                        f"{kind} {i} of {name} (shape {tuple(value.shape)}) is {off:.2e} off the fp64 result, "
                        f"the bound is {bound:.2e}"
                    )
            bounds.append(FACTOR * self.known[key] + allowed)
        return bounds


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """``function`` applied to every leaf of nested tuples and dicts. An activation counts as a leaf."""
    if isinstance(value, dict):
        return {name: _mapped(item, function) for name, item in value.items()}
    if isinstance(value, tuple) and not isinstance(value, Activation):
        items = [_mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return function(value)


def _plain(value: Any, dtype: torch.dtype | None, as_given: bool = False) -> Any:
    """A tensor in ``dtype``, contiguous (where stock is most accurate) or in its own format; a dtype becomes it."""
    if isinstance(value, Tensor):
        value = value.detach() if as_given else value.detach().contiguous()
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value
    return dtype if dtype is not None and isinstance(value, torch.dtype) else value


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 values, each off by up to a unit in the last place of ``dtype``."""
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return value * (1 + torch.finfo(dtype).eps * (2 * noise - 1).to(value.device))


def _activation(value: Any) -> Activation:
    found: list[Activation] = []
    _mapped(value, lambda a: found.append(a) if isinstance(a, Activation) else None)
    return found[0]


def _signature(given: Any) -> str:
    """Everything on which a choice between kernels may depend."""
    return repr(
        _mapped(
            given,
            lambda a: (
                (tuple(a.shape), a.stride(), a.dtype, a.device) if isinstance(a, Tensor) else a
            ),
        )
    )
