"""What the norms share: argument checks, what backward needs for the activation, dtypes of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._schemas import HALF
from ..activation import IDENTITY, Activation
from ..backend import needs_grad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# ZSource of csrc/common/tensor_types.h.
Z_INPUT, Z_RESIDUAL, Z_OUTPUT = 0, 1, 2

# The process group of all processes.
WORLD = "world"


def to_be_saved(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Any, ...]:
    """The same four tensors, with clones in place of inference tensors, which autograd cannot save.

    Raises:
        RuntimeError: ``x`` or ``weight`` is an inference tensor, and ``x``, ``weight`` or ``bias`` needs a gradient.
            Torch's own norms, which save only ``x`` and ``weight``, raise then too.
    """
    tensors = x, residual, weight, bias
    refused = x.is_inference() or (weight is not None and weight.is_inference())
    if refused and needs_grad(x, weight, bias):
        raise RuntimeError(
            "Inference tensors cannot be saved for backward: x and weight must be made outside of "
            "torch.inference_mode(), or cloned there"
        )
    return tuple([t.clone() if t is not None and t.is_inference() else t for t in tensors])


def saved_for(act: Activation, residual: Tensor | None, out: Tensor) -> tuple[Tensor | None, int]:
    """The tensor that backward needs besides ``x`` for the activation's derivative, and its kind (``Z_...``).

    Without a residual there is none, because the pre-activation is recomputed from ``x``. With a residual, relu needs
    its output, which the next layer saves anyway. The other activations need the residual.
    """
    if residual is None or act.code == 0:
        return None, Z_INPUT
    if act.name == "relu":
        return out, Z_OUTPUT
    return residual, Z_RESIDUAL


def gradient_like(grad: Tensor | None, parameter: Tensor) -> Tensor:
    """``grad``, which kernels sum in at least fp32, in the dtype of its parameter."""
    assert grad is not None
    return grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)


def norm_gradients(
    ctx: Any,
    tensors: tuple[Any, ...],
    dout: Tensor,
    forward: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Activation], Tensor],
    kernel: Callable[[bool, bool], Sequence[Tensor]],
) -> tuple[Tensor | None, ...]:
    """The gradients of ``x``, ``residual``, ``weight`` and ``bias``, for backward; ``None`` for those not needed.

    Args:
        ctx: the Function's context; its options end with the activation.
        tensors: ``ctx.saved_tensors``: ``x``, the tensor of :func:`saved_for`, weight, bias, statistics. They are
            passed because a second access to ``ctx.saved_tensors`` would unpack them again, which a checkpoint refuses.
        dout: the gradient of the output.
        forward: see :func:`differentiable_gradients`.
        kernel: calls the operator for the four gradients. Its two arguments: whether to compute those of ``x`` and of
            the residual.
    """
    x, saved, weight, bias, _ = tensors
    act = ctx.options[-1]
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    if torch.is_grad_enabled():
        dx, dresidual, dweight, dbias = differentiable_gradients(
            forward, dout, x, saved, weight, bias, act, ctx.z_source
        )
    else:
        # Without an activation the residual's gradient is dout itself, so the kernel need not write it.
        passes_dout = act.code == 0
        dx, dresidual, dweight, dbias = kernel(need_x, need_residual and not passes_dout)
        if passes_dout:
            dresidual = dout
    return (
        dx if need_x else None,
        dresidual if need_residual else None,
        gradient_like(dweight, weight) if need_weight else None,
        gradient_like(dbias, bias) if need_bias else None,
    )


def differentiable_gradients(
    forward: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, Activation], Tensor],
    dout: Tensor,
    x: Tensor,
    saved: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    act: Activation,
    z_source: int,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``forward(x, residual, weight, bias, act)``, which consists of differentiable torch operators.

    This is what ``backward`` returns under ``create_graph=True``: for ``x``, ``residual``, ``weight`` and ``bias``.
    """
    dout, act, residual = without_relu(dout, act, saved, z_source)
    dx, dresidual, dweight, dbias = gradients_with_graph(
        lambda x, residual, weight, bias: forward(x, residual, weight, bias, act),
        (x, residual, weight, bias),
        dout,
    )
    # If the residual was not saved, its gradient is dout: the remaining activation is the identity.
    return dx, dout if residual is None else dresidual, dweight, dbias


def without_relu(
    dout: Tensor, act: Activation, saved: Tensor | None, z_source: int
) -> tuple[Tensor, Activation, Tensor | None]:
    """From what :func:`saved_for` saved: the cotangent, the activation still to be differentiated, and the residual."""
    if z_source == Z_OUTPUT:
        # relu's derivative is piecewise constant, so masking the cotangent replaces it.
        assert saved is not None
        return torch.where(saved <= 0, 0, dout), IDENTITY, None
    return dout, act, saved if z_source == Z_RESIDUAL else None


def gradients_with_graph(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor | None], dout: Tensor
) -> list[Tensor | None]:
    """Gradients of ``forward(*inputs)`` for the inputs that are not ``None``. They can be differentiated again."""
    # New aliases: first-order gradients stop here, while the graph of the gradients themselves reaches the inputs.
    with torch.enable_grad():
        aliases = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in inputs
        ]
        given = [t for t in aliases if t is not None]
        found = iter(torch.autograd.grad(forward(*aliases), given, dout, create_graph=True))
        return [None if t is None else next(found) for t in aliases]


def check_tensors(function: str, **tensors: Any) -> None:
    for name, t in tensors.items():
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"{function}: {name} ({type(t).__name__}) must be a Tensor")


def check_floating(function: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        # As torch: NotImplementedError for an x whose dtype has no kernel, RuntimeError for the other tensors.
        error = NotImplementedError if name == "x" else RuntimeError
        raise error(
            f"{function}: {name} (dtype {t.dtype}) must be of float32, float64, bfloat16 or float16"
        )


def check_per_channel(function: str, x: Tensor, channels: int, **tensors: Tensor | None) -> None:
    """The ``[C]`` tensors must fit ``channels`` and the dtype and device of ``x``."""
    dtype, device = x.dtype, x.device
    for name, v in tensors.items():
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != channels:
            raise RuntimeError(
                f"{function}: {name} (shape {tuple(v.shape)}) must have one value for each of the {channels} channels"
            )
        if v.dtype != dtype and not (dtype in HALF and v.dtype == torch.float32):
            raise RuntimeError(
                f"{function}: {name} (dtype {v.dtype}) must be of x's dtype ({dtype})"
                + (" or float32" if dtype in HALF else "")
            )
        if v.device != device:
            raise RuntimeError(
                f"{function}: {name} (device {v.device}) must be on x's device ({device})"
            )


def check_same_dtype(
    function: str, name: str, v: Tensor | None, other: str, w: Tensor | None
) -> None:
    if v is not None and w is not None and v.dtype != w.dtype:
        raise RuntimeError(
            f"{function}: {name} (dtype {v.dtype}) must be of {other}'s dtype ({w.dtype})"
        )


def check_writable(function: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that torch would refuse to write. Under a compiler this is not known, and torch itself refuses."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return
    for name, t in tensors.items():
        if t is not None and t.is_inference():
            raise RuntimeError(
                f"{function}: {name}, made under torch.inference_mode(), can be written only there"
            )


def check_residual(function: str, residual: Tensor, shape: Any, device: torch.device) -> None:
    """``residual`` must have the output's ``shape`` and a floating dtype."""
    if residual.shape != shape:
        raise ValueError(
            f"{function}: residual (shape {tuple(residual.shape)}) must have the shape {tuple(shape)}"
        )
    check_floating(function, "residual", residual)
    if residual.device != device:
        raise RuntimeError(
            f"{function}: residual (device {residual.device}) must be on x's device ({device})"
        )
