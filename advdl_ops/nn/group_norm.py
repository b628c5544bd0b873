"""``torch.nn``'s group, layer (2d) and instance norms with residual addition and activation in the same pass."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .._watch import is_proxy, recorded
from ..activation import Activation, act_repr, resolve_activation
from ..functional.group_norm import group_norm, instance_norm, layer_norm_2d
from ._quantization import Configuration
from ._script import refuse_script

_Act = str | Activation | torch.nn.Module | None


class GroupNorm(torch.nn.GroupNorm):
    """``act(group_norm(x) + residual)`` over ``[N, C, ...]`` (Wu & He 2018, arXiv:1803.08494).

    Arguments, defaults and ``state_dict`` keys of :class:`torch.nn.GroupNorm`, and:

    Args:
        act: ``None``, a name (``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"``, ``"gelu"``, ``"sigmoid"``,
            ``"tanh"``, ``"hardswish"``, ``"relu6"``) or the matching ``torch.nn`` module, whose parameters are
            taken over.
    """

    qconfig = Configuration(torch.nn.GroupNorm)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: _Act = None,
    ) -> None:
        self.act = resolve_activation(type(self).__name__, act)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:  # an argument of torch from 2.13 on
            self.register_parameter("bias", None)

    def forward(self, input: Tensor, residual: Tensor | None = None, act: _Act = None) -> Tensor:
        """``input``, ``residual`` ``[N, C, ...]`` -> ``[N, C, ...]``; errors as :func:`.group_norm`.

        Args:
            act: overrides the layer's own activation.
        """
        if is_proxy(input):
            return recorded(self, input, residual=residual, act=act)
        # Through the dict: Module.__getattr__ costs as much as the kernel of a small input.
        parameters = self._parameters
        return group_norm(
            input,
            self.num_groups,
            # A parametrized weight is not in the dict.
            parameters["weight"] if "weight" in parameters else self.weight,  # noqa: SIM401
            parameters["bias"] if "bias" in parameters else self.bias,  # noqa: SIM401
            self.eps,
            act=self.act if act is None else act,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + act_repr(self.act)


class LayerNorm2d(torch.nn.LayerNorm):
    """``act(layer_norm(x) + residual)`` over the channels of each position of ``[N, C, ...]`` (Ba et al. 2016).

    timm's and torchvision's layer of that name, which ConvNeXt uses. Arguments, defaults and ``state_dict`` keys of
    :class:`torch.nn.LayerNorm` (timm's default ``eps`` is 1e-6), and:

    Args:
        normalized_shape: the number of channels.
        act: as :class:`GroupNorm`.

    Raises:
        ValueError: more than one normalized dimension.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: _Act = None,
    ) -> None:
        self.act = resolve_activation(type(self).__name__, act)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"LayerNorm2d: normalized_shape ({tuple(self.normalized_shape)}) must be the number of channels"
            )

    def forward(self, input: Tensor, residual: Tensor | None = None, act: _Act = None) -> Tensor:
        """``input``, ``residual`` ``[N, C, ...]`` -> ``[N, C, ...]``; errors as :func:`.layer_norm_2d`.

        Args:
            act: overrides the layer's own activation.
        """
        if is_proxy(input):
            return recorded(self, input, residual=residual, act=act)
        x = input
        if x.dim() > 1 and x.shape[1] != self.normalized_shape[0]:
            raise RuntimeError(
                f"LayerNorm2d: x (shape {tuple(x.shape)}) must have {self.normalized_shape[0]} channels"
            )
        return layer_norm_2d(
            x,
            self.weight,
            self.bias,
            self.eps,
            act=self.act if act is None else act,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + act_repr(self.act)


class _InstanceNorm(torch.nn.modules.instancenorm._InstanceNorm):
    """The forward pass of the three instance norms (Ulyanov et al. 2016, arXiv:1607.08022)."""

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        act: _Act = None,
    ) -> None:
        self.act = resolve_activation(type(self).__name__, act)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # an argument of torch from 2.13 on
            self.register_parameter("bias", None)

    def forward(self, input: Tensor, residual: Tensor | None = None, act: _Act = None) -> Tensor:
        """``input``, ``residual`` ``[N, C, ...]`` or ``[C, ...]`` -> the same; errors as :func:`.instance_norm`.

        Args:
            act: overrides the layer's own activation.
        """
        if is_proxy(input):
            return recorded(self, input, residual=residual, act=act)
        x = input
        self._check_input_dim(x)
        unbatched = x.dim() == self._get_no_batch_dim()
        channels = x.shape[0 if unbatched else 1]
        if channels != self.num_features:
            name = type(self).__name__
            if self.affine:
                raise ValueError(
                    f"{name}: x (shape {tuple(x.shape)}) must have {self.num_features} channels"
                )
            warnings.warn(
                f"{name}: x has {channels} channels, num_features ({self.num_features}) is not used without affine",
                stacklevel=2,
            )
        if unbatched:
            added = None if residual is None else residual.unsqueeze(0)
            return self._normalize(x.unsqueeze(0), added, act).squeeze(0)
        return self._normalize(x, residual, act)

    def _normalize(self, x: Tensor, residual: Tensor | None, act: _Act) -> Tensor:
        return instance_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            act=self.act if act is None else act,
            residual=residual,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + act_repr(self.act)


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """``act(instance_norm(x) + residual)`` over ``[N, C, L]`` or ``[C, L]``.

    Arguments, defaults, buffers and ``state_dict`` keys of :class:`torch.nn.InstanceNorm1d`, and ``act`` as
    :class:`GroupNorm`.
    """

    qconfig = Configuration(torch.nn.InstanceNorm1d)


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """``act(instance_norm(x) + residual)`` over ``[N, C, H, W]`` or ``[C, H, W]``.

    Arguments, defaults, buffers and ``state_dict`` keys of :class:`torch.nn.InstanceNorm2d`, and ``act`` as
    :class:`GroupNorm`.
    """

    qconfig = Configuration(torch.nn.InstanceNorm2d)


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """``act(instance_norm(x) + residual)`` over ``[N, C, D, H, W]`` or ``[C, D, H, W]``.

    Arguments, defaults, buffers and ``state_dict`` keys of :class:`torch.nn.InstanceNorm3d`, and ``act`` as
    :class:`GroupNorm`.
    """

    qconfig = Configuration(torch.nn.InstanceNorm3d)
