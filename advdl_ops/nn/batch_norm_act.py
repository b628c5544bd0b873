"""``torch.nn.BatchNorm2d`` with residual addition and activation in the same pass."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._schemas import acc_dtype
from .._watch import is_proxy, recorded
from ..activation import IDENTITY, Activation, act_repr, resolve_activation
from ..functional._norm import WORLD, check_writable
from ..functional.batch_norm_act import batch_norm_act, batch_norm_act_by
from ._one_by_one import layer_of, one_by_one
from ._quantization import Configuration
from ._script import refuse_script

_Act = str | Activation | torch.nn.Module | None


def check_group(name: str, group: Any) -> None:
    """Refuses, in the name of a layer or function, what is no process group of this process."""
    distributed = torch.distributed
    if group is None or group == WORLD:
        return
    if distributed.is_available():
        if isinstance(group, distributed.ProcessGroup):
            return
        if group == distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name}: process_group must contain this process")
    raise TypeError(
        f"{name}: process_group ({group!r}) must be None, {WORLD!r} or a torch.distributed group"
    )


class _Group:
    """The process group of a layer, and that in which its number of channels was compared.

    Copies of the layer share it: ``torch.distributed`` cannot copy a group, and if one process copies its layer, it
    must not compare again alone.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.agreed_in: str | None = None

    def __deepcopy__(self, memo: Any) -> _Group:
        return self

    def __reduce__(self) -> Any:
        if self.group != WORLD:
            raise TypeError(
                f"a layer with process_group={self.group!r} cannot be saved; save its state_dict, or use 'world'"
            )
        return _Group, (WORLD,)


class _Activate:
    """A forward hook that applies an activation."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def __call__(self, layer: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        return one_by_one((), out, act=self.act)


class _ActivationKeeper(Configuration):
    """Keeps the activation when ``SyncBatchNorm.convert_sync_batchnorm`` replaces a layer, which would lose it.

    That function asks the layer for this attribute, which torch's quantization sets, and copies it. Nothing else tells
    a layer that it is being replaced.
    """

    def __get__(self, layer: Any, kind: Any = None) -> Any:
        if layer is None:
            return self
        own: Any = layer.act
        caller = sys._getframe(1)
        if caller.f_code is _CONVERT.__code__ and layer_of(layer) is type(layer):
            made = caller.f_locals["module_output"]
            if own != IDENTITY and not made._forward_hooks:  # it is asked twice if it is set
                made.register_forward_hook(_Activate(own))
        return super().__get__(layer, kind)


_CONVERT: Any = torch.nn.SyncBatchNorm.convert_sync_batchnorm


class BatchNormAct2d(torch.nn.BatchNorm2d):
    """``act(batch_norm(x) + residual)`` over ``[N, C, H, W]``.

    Arguments, defaults, buffers and ``state_dict`` keys of :class:`torch.nn.BatchNorm2d`, and:

    Args:
        act: ``None``, a name (``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"``, ``"sigmoid"``,
            ``"tanh"``, ``"hardswish"``, ``"relu6"``) or the matching ``torch.nn`` module, whose parameters are
            taken over.
        process_group: training takes the statistics of the batches of all its processes together, whose sizes may
            differ: ``None`` (this process alone), ``"world"`` (all) or a ``torch.distributed`` group. Set
            ``.process_group`` to change it, in all of them; :func:`advdl_ops.convert_sync_batchnorm` sets it in a whole
            model. A batch without images in any process counts in ``num_batches_tracked`` alone.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` gives a ``SyncBatchNorm`` with a forward hook that applies the
    activation. That layer takes no residual.
    """

    qconfig = _ActivationKeeper(torch.nn.BatchNorm2d)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: _Act = None,
        process_group: Any = None,
    ) -> None:
        self.act = resolve_activation(type(self).__name__, act)
        self.process_group = process_group
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # an argument of torch from 2.13 on
            self.register_parameter("bias", None)
        # A cache of nn.conv_bn_act: the convolution with this norm folded in. Dropped whenever its source may have
        # changed.
        self.folded: Any = None

    @property
    def process_group(self) -> Any:
        """Whose batches count as one in training, see the class."""
        return None if self.synchronized is None else self.synchronized.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        check_group(type(self).__name__, group)
        # A group that is set again stays agreed upon.
        if "synchronized" not in self.__dict__ or group != self.process_group:
            self.synchronized = None if group is None else _Group(group)

    def train(self, mode: bool = True) -> BatchNormAct2d:
        self.folded = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> BatchNormAct2d:
        self.folded = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.folded = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "folded": None}

    def forward(self, input: Tensor, residual: Tensor | None = None, act: _Act = None) -> Tensor:
        """``input``, ``residual`` ``[N, C, H, W]`` -> ``[N, C, H, W]``; errors as :func:`.batch_norm_act`.

        Args:
            act: overrides the layer's own activation.
        """
        if is_proxy(input):
            return recorded(self, input, residual=residual, act=act)
        return self.normalized(input, residual, self.act if act is None else act)

    def normalized(
        self, x: Tensor, residual: Tensor | None, act: _Act, statistics: Tensor | None = None
    ) -> Tensor:
        """As :meth:`forward`. ``statistics`` are those of ``x`` if the preceding convolution has computed them."""
        self._check_input_dim(x)
        # Through the dicts: Module.__getattr__ costs more than the kernel of a small input.
        buffers, parameters = self._buffers, self._parameters
        mean, var = buffers["running_mean"], buffers["running_var"]
        counter = buffers["num_batches_tracked"]
        momentum = self.momentum
        training = self.training
        tracks = training and self.track_running_stats
        if training and self.synchronized is not None:
            group = self._group()
            if group.size() > 1:
                return self._forward_synchronized(group, x, residual, act, statistics)
        # Must not fail half way, so it is checked here.
        if tracks and counter is not None and not is_compiling() and counter.is_inference():
            check_writable(type(self).__name__, num_batches_tracked=counter)
        if tracks and momentum is None and mean is not None and counter is not None:
            return self._forward_cumulative(x, residual, act, statistics)
        if training and not tracks:
            mean = var = None
        # A parametrized weight is not in the dict.
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        momentum = 0.0 if momentum is None else momentum
        # Before the op, as in stock: a checkpoint ends its second forward within the op.
        if tracks and counter is not None:
            counter.add_(1)
        try:
            if statistics is None:
                training = training or (mean is None and var is None)
                return batch_norm_act(
                    x,
                    mean,
                    var,
                    weight,
                    bias,
                    training,
                    momentum,
                    self.eps,
                    residual=residual,
                    act=act,
                )
            assert isinstance(act, Activation)
            return batch_norm_act_by(
                statistics, x, mean, var, weight, bias, momentum, self.eps,
                residual=residual, act=act,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError):  # the op was refused
            if tracks and counter is not None:
                counter.sub_(1)
            raise

    def _forward_cumulative(
        self, x: Tensor, residual: Tensor | None, act: _Act, statistics: Tensor | None
    ) -> Tensor:
        """``momentum=None``: the running statistics are the plain mean over all batches."""
        running_mean, running_var, counter = (
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
        )
        assert running_mean is not None and running_var is not None and counter is not None
        # Checked before the counter is written.
        check_writable(type(self).__name__, running_mean=running_mean, running_var=running_var)
        # The op writes the batch's own statistics. The average is a tensor expression that does not
        # read the counter on the host, so that it compiles and never waits for the GPU.
        acc = acc_dtype(running_mean.dtype)
        mean = torch.zeros_like(running_mean, dtype=acc)
        var = torch.zeros_like(mean)
        tensors = x, mean, var, self.weight, self.bias
        counter.add_(1)
        try:
            if statistics is None:
                out = batch_norm_act(*tensors, True, 1.0, self.eps, residual=residual, act=act)
            else:
                assert isinstance(act, Activation)
                out = batch_norm_act_by(
                    statistics, *tensors, 1.0, self.eps, residual=residual, act=act
                )
        except (RuntimeError, TypeError, ValueError):  # the op was refused
            counter.sub_(1)
            raise
        if x.numel() > 0:
            share = counter.to(acc).reciprocal()
            running_mean.copy_(running_mean.to(acc).lerp(mean, share))
            running_var.copy_(running_var.to(acc).lerp(var, share))
        return out

    def _group(self) -> Any:
        # Imported here, because most processes never need torch.distributed.
        from ..functional._sync_batch_norm import group_of

        return group_of(type(self).__name__, self.process_group)

    def _forward_synchronized(
        self, group: Any, x: Tensor, residual: Tensor | None, act: _Act, statistics: Tensor | None
    ) -> Tensor:
        from ..functional._sync_batch_norm import check_agreement, sync_batch_norm_act

        name = type(self).__name__
        tracks = self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracks else (None, None)
        counter = self.num_batches_tracked if tracks else None
        if x.shape[1] != self.num_features:
            raise RuntimeError(
                f"{name}: x (shape {tuple(x.shape)}) must have num_features ({self.num_features}) channels"
            )
        assert self.synchronized is not None
        if self.synchronized.agreed_in != group.group_name:
            check_agreement(name, group, self.num_features, x.device)
            self.synchronized.agreed_in = group.group_name
        momentum: Any = self.momentum
        if counter is not None:
            check_writable(name, num_batches_tracked=counter)
            counter.add_(1)
            if momentum is None:  # the plain mean over all batches, see _forward_cumulative
                momentum = counter.double().reciprocal()
        try:
            return sync_batch_norm_act(
                name, group, x, mean, var, self.weight, self.bias, 0.0 if momentum is None else momentum, self.eps,
                residual=residual, act=act, moments=statistics,
            )  # fmt: skip
        except (RuntimeError, TypeError, ValueError):  # the op was refused
            if counter is not None:
                counter.sub_(1)
            raise

    def extra_repr(self) -> str:
        group = "" if self.process_group is None else f", process_group={self.process_group!r}"
        return super().extra_repr() + act_repr(self.act) + group
