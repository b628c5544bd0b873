"""Batch norm in training, with the statistics of the batches of several processes (Peng et al. 2017, arXiv:1711.07240).

Forward and backward each sum one message of 2 values per channel over the processes. The forward's is in fp64: it has
the sum of squares, which would lose the variance in fp32 if the mean is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._schemas import acc_dtype
from ..activation import Activation, resolve_activation
from ..backend import is_distributed, is_exported, needs_grad, serves_native, transformed
from ..reference.batch_norm_act import batch_stats, normalize_act, per_channel
from ._norm import WORLD, check_writable, norm_gradients, saved_for, to_be_saved
from .batch_norm_act import apply_op, backward_op, batch_norm_act, check, offer

_moments_op = torch.ops.advdl_ops.batch_norm_moments.default
_input_gradient_op = torch.ops.advdl_ops.batch_norm_act_input_gradient.default


def group_of(name: str, group: Any) -> dist.ProcessGroup:
    """The process group that ``group`` stands for. ``RuntimeError``: torch.distributed is not initialized."""
    if not is_distributed():
        raise RuntimeError(
            f"{name}: process_group ({group!r}) needs torch.distributed.init_process_group, which was not called"
        )
    found: Any = dist.group.WORLD if group == WORLD else group
    return found


def check_agreement(name: str, group: dist.ProcessGroup, channels: int, device: Any) -> None:
    """Raises ``ValueError`` in every process if they do not all have the same number of channels.

    Messages of different lengths would hang, or mix channels.
    """
    message = torch.tensor([channels, channels**2], dtype=torch.int64, device=device)
    dist.all_reduce(message, group=group)
    total, squares = message.tolist()
    processes = dist.get_world_size(group)
    if total**2 != processes * squares:  # equal exactly where all summands are (Cauchy-Schwarz)
        raise ValueError(
            f"{name}: num_features ({channels} in this process, {total / processes:g} on average) must be the same in "
            "all processes"
        )


def sync_batch_norm_act(
    name: str,
    group: dist.ProcessGroup,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    *,
    residual: Tensor | None,
    act: Any,
    moments: Tensor | None = None,
) -> Tensor:
    """:func:`.batch_norm_act` in training, as if the batches of all processes were one.

    All processes of the group must call it, each with its own ``x``, which may have no images.

    Args:
        name: who asks, for errors.
        momentum: also as a tensor without dimensions.
        moments: ``[2, C]``, those of ``x`` if they are known: mean and sum of squared distances from it.

    Raises:
        ValueError: one value per channel in all processes together; in every one of them.
    """
    activation = act if type(act) is Activation else resolve_activation(name, act)
    check(x, running_mean, running_var, weight, bias, True, 0.0, eps, residual, alone=False)
    check_writable(name, running_mean=running_mean, running_var=running_var)
    for running in (running_mean, running_var):
        if running is not None and running.stride(0) == 0 and len(running) > 1:
            raise RuntimeError(f"{name}: running statistics that are expanded cannot be written")
    if is_exported() or transformed():
        raise RuntimeError(
            f"{name}: training with a process_group can be neither exported nor transformed"
        )
    if running_mean is not None and running_mean.requires_grad:
        raise RuntimeError(f"{name}: running_mean must not require a gradient in training")
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual, moments = x.to(dtype), residual.to(dtype), None
        weight, bias = (t if t is None else t.to(dtype) for t in (weight, bias))
    native = serves_native(name, x)
    if needs_grad(x, residual, weight, bias):
        x, residual, weight, bias = to_be_saved(x, residual, weight, bias)

    channels = x.shape[1]
    count = x.numel() // max(channels, 1)
    with torch.no_grad():
        if moments is None:
            moments = _moments_op(x) if native else _reference_moments(x)
        total, mean, squares = _of_all_processes(moments, count, group)
    # Read only where it decides: with more than one value here, a GPU is not waited for.
    in_all = total.item() if count <= 1 and channels else None
    if in_all == 1:
        raise ValueError(
            f"{name}: x (shape {tuple(x.shape)} in this process) must have more than 1 value per channel in all "
            "processes together"
        )
    if in_all == 0:
        return batch_norm_act(
            x, running_mean, running_var, weight, bias, True, 0.0, eps, residual=residual, act=activation
        )  # fmt: skip
    if running_mean is not None and running_var is not None:
        written = (running_mean, mean), (running_var, squares / (total - 1))
        with torch.no_grad():
            for running, batch in written:
                old = running.to(batch.dtype)
                running.copy_(old * (1 - momentum) + batch * momentum)
    if not native:
        return _reference(x, residual, weight, bias, eps, activation, group)
    stats = torch.stack([mean, (squares / total + eps).rsqrt()]).to(moments.dtype)
    if not needs_grad(x, residual, weight, bias):
        return apply_op(x, residual, weight, bias, stats, activation.code, activation.param)
    options = stats, total, group, eps, activation
    return SyncBatchNormActFunction.apply(x, residual, weight, bias, *options)


def _of_all_processes(
    moments: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """fp64: the number of values per channel ``[]``, their mean and the sum of squared distances from it, ``[C]``."""
    mean, squares = moments.double().unbind()
    channels = len(mean)
    message = mean.new_empty(1 + 2 * channels)
    total, sums, sums_of_squares = message[0], message[1 : 1 + channels], message[1 + channels :]
    total.fill_(count)
    torch.mul(mean, count, out=sums)
    torch.addcmul(squares, mean, sums, out=sums_of_squares)
    dist.all_reduce(message, group=group)
    mean = sums / total
    return total, mean, torch.addcmul(sums_of_squares, mean, sums, value=-1).clamp_min_(0)


class SyncBatchNormActFunction(torch.autograd.Function):
    """Gradients; saved as by :class:`.BatchNormActFunction`. Those of weight and bias are of this process's batch."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        total: Tensor,
        group: dist.ProcessGroup,
        eps: float,
        act: Activation,
    ) -> Tensor:
        out = apply_op(x, residual, weight, bias, stats, act.code, act.param)
        offer(out, x, residual, weight, bias, stats, act)
        saved, ctx.z_source = saved_for(act, residual, out)
        ctx.save_for_backward(x, saved, weight, bias, stats, total)
        ctx.options = group, eps, act
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        *tensors, total = ctx.saved_tensors
        group, eps, act = ctx.options
        x, saved, weight, bias, stats = tensors

        def forward(x, residual, weight, bias, act):
            return _reference(x, residual, weight, bias, eps, act, group)

        def kernel(need_x: bool, need_residual: bool) -> Sequence[Tensor]:
            options = act.code, act.param, ctx.z_source
            dx, dresidual, dweight, dbias = backward_op(
                dout, *tensors, False, *options, False, need_residual
            )
            if need_x:
                sums = torch.stack([dweight, dbias])
                dist.all_reduce(sums, group=group)
                means = (sums / total).to(sums.dtype)
                dx = _input_gradient_op(dout, x, saved, weight, bias, stats, means, *options)
            return dx, dresidual, dweight, dbias

        return *norm_gradients(ctx, tuple(tensors), dout, forward, kernel), *[None] * 5


# Of torch operators, differentiable any number of times. Every process must differentiate as often.


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each depends on it equally, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        summed = t.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(dout.contiguous(), ctx.group), None


def _reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: Activation,
    group: dist.ProcessGroup,
) -> Tensor:
    values = x.to(acc_dtype(x.dtype))
    dims = [0, *range(2, x.dim())]
    count = values.new_tensor([x.numel() // max(x.shape[1], 1)])
    sums: Tensor = _Sum.apply(torch.cat([values.sum(dims), count]), group)
    mean = sums[:-1] / sums[-1]
    squares: Tensor = _Sum.apply((values - per_channel(mean, x)).square().sum(dims), group)
    rstd = (squares / sums[-1] + eps).rsqrt()
    return normalize_act(x, mean, rstd, weight, bias, residual, act)


def _reference_moments(x: Tensor) -> Tensor:
    mean, var = batch_stats(x)
    return torch.stack([mean, var * (x.numel() // max(x.shape[1], 1))])
