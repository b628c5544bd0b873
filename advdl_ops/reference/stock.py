"""Every op as torch's own layers and functions would compute it: the form that is exported and traced.

A graph that others read, by ``torch.export``, ONNX or ``torch.jit.trace``, has the nodes that a model of ``torch.nn``
has. `functional/` takes this form where :func:`.is_exported` holds.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..activation import Activation
from .activation import activate


def finished(z: Tensor, residual: Tensor | None, act: Activation) -> Tensor:
    """``act(z + residual)``."""
    return activate(z if residual is None else z + residual, act)


def batch_norm_act(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """See :func:`advdl_ops.functional.batch_norm_act`. The running statistics are written."""
    z = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return finished(z, residual, act)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """See :func:`advdl_ops.functional.group_norm`. 0 groups normalize each position over its channels."""
    if groups == 0:
        z = F.layer_norm(x.movedim(1, -1), (x.shape[1],), weight, bias, eps).movedim(-1, 1)
    else:
        z = F.group_norm(x, groups, weight, bias, eps)
    return finished(z, residual, act)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """See :func:`advdl_ops.functional.instance_norm`."""
    z = F.instance_norm(x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return finished(z, residual, act)
