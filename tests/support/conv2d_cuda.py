"""Replacements for the GPU: launchers that call torch, a tuner with fixed choices; inputs and their truth."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advdl_ops import _schemas, reference, tuning
from advdl_ops._conv import choice, cuda, operators, problem
from advdl_ops._conv.problem import Conv, Epilogue, Problem
from advdl_ops._schemas import acc_dtype
from advdl_ops.activation import ACTIVATIONS, IDENTITY, Activation
from advdl_ops.triton.conv2d import Config

RELU, SILU = ACTIVATIONS["relu"], ACTIVATIONS["silu"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FAST, SLOW = Config(64, 32, 16, 4, 3), Config(128, 128, 32, 8, 2, 4)
NAMES = ["triton 64x32x16 w4 s3", "triton 128x128x32 w8 s2 split_k 4"]


class Case(NamedTuple):
    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def conv(self) -> Conv:
        return Conv(self.stride, self.padding, self.dilation, self.groups)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.weight[0] == self.x[1]


CASES = {
    "3x3": Case((2, 5, 9, 7), (6, 5, 3, 3)),
    "1x1": Case((2, 8, 5, 5), (4, 8, 1, 1), padding=(0, 0)),
    "dilated": Case((2, 4, 13, 12), (6, 4, 3, 3), (1, 2), (4, 0), (3, 1)),
    "groups": Case((2, 6, 8, 5), (9, 2, 3, 3), groups=3),
    "of one position": Case((3, 4, 1, 1), (5, 4, 3, 3)),
    "depthwise": Case((2, 6, 9, 8), (6, 1, 3, 3), groups=6),
    "depthwise 5x3": Case((2, 6, 9, 8), (6, 1, 5, 3), (2, 1), (2, 1), (1, 2), groups=6),
}


class Launchers:
    """The interface of ``advdl_ops.triton.conv2d``, computed by torch. Records the config of each call."""

    FORWARD_CONFIGS = INPUT_GRADIENT_CONFIGS = WEIGHT_GRADIENT_CONFIGS = (FAST, SLOW)

    @staticmethod
    def suitable_configs(configs, dtype):
        return configs

    def __init__(self, depthwise: bool) -> None:
        self.depthwise, self.called = depthwise, []

    def checked(self, conv: Conv, channels: int) -> Conv:
        assert not self.depthwise or conv.groups == channels
        return conv

    def forward(self, x, weight, *, conv, epilogue, config):
        self.called.append(("forward", config))
        return self.computed(x, weight, conv, epilogue)

    def forward_with_statistics(self, x, weight, *, conv, epilogue, config):
        assert not self.depthwise
        self.called.append(("forward with statistics", config))
        out = self.computed(x, weight, conv, epilogue)
        return out, statistics_of(out)

    def computed(self, x, weight, conv, epilogue):
        conv = self.checked(conv, x.shape[1])
        return last(reference.conv2d(x, weight, None, *conv, *epilogue))

    def input_gradient(self, dz, weight, x_shape, *, conv, config):
        self.called.append(("input_gradient", config))
        options = self.checked(conv, x_shape[1])._asdict()
        return last(torch.nn.grad.conv2d_input(x_shape, weight, dz, **options))

    def weight_gradient(self, dz, x, weight_shape, *, conv, config):
        self.called.append(("weight_gradient", config))
        options = self.checked(conv, x.shape[1])._asdict()
        dweight = torch.nn.grad.conv2d_weight(x.float(), weight_shape, dz.float(), **options)
        return last(dweight)


def statistics_of(out: Tensor) -> Tensor:
    """Mean of each channel and sum of squared distances from it: ``[2, C]`` in fp32, or in fp64 for fp64."""
    wide = out.to(acc_dtype(out.dtype))
    mean = wide.mean((0, 2, 3))
    return torch.stack([mean, (wide - mean[:, None, None]).square().sum((0, 2, 3))])


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def serve_as_on_cuda(monkeypatch: Any, dense: Launchers, depthwise: Launchers) -> None:
    """Makes the candidates of CUDA serve CPU tensors, with these launchers in place of the Triton kernels."""

    def chosen(problem: Problem, device: torch.device, trial: Any) -> choice.Candidate:
        found = choice.candidates(problem, torch.device("cuda"))
        return choice._by_measurement(problem, found, device, trial)

    monkeypatch.setattr(choice, "chosen", chosen)
    monkeypatch.setattr(choice, "plans", NothingKept())
    monkeypatch.setattr(choice, "is_torchs", lambda _: False)
    # No cached results of the real launchers, and none of these left afterwards.
    for name in ("_on_cuda", "configs"):
        module = choice if name == "_on_cuda" else cuda
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
    monkeypatch.setattr(problem, "_settings_on_cpu", problem._settings_on_cuda)
    monkeypatch.setattr(
        cuda, "launchers", lambda is_depthwise: depthwise if is_depthwise else dense
    )
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    monkeypatch.setattr(tuning, "_choices", {})
    monkeypatch.setattr(tuning, "_unmeasured", {})


class NothingKept(dict):
    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Tuner:
    """Replaces the measurement: chooses the candidate in ``wish``, and records the calls."""

    def __init__(self) -> None:
        self.wish, self.asked = "", []

    def choose(self, key: Any, candidates: dict[str, Callable[[], Any]], device: Any) -> str:
        self.asked.append((key, list(candidates)))
        for call in candidates.values():
            assert isinstance(call(), Tensor)
        return self.wish if self.wish in candidates else next(iter(candidates))


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor
    dz: Tensor

    def each(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(*map(function, self))


def make_inputs(case: Case, dtype: torch.dtype, layout: str) -> Inputs:
    x, weight = torch.randn(case.x), torch.randn(case.weight) / math.prod(case.weight[1:]) ** 0.5
    out = F.conv2d(x, weight, None, *case.conv)
    residual, dz = torch.randn_like(out), torch.randn_like(out)
    channels = 0.5 + torch.rand(case.weight[0]), torch.randn(case.weight[0])
    x, residual, dz = (with_strides(t.to(dtype), LAYOUTS[layout]) for t in (x, residual, dz))
    return Inputs(x, weight.to(dtype), *channels, residual, dz)


def with_strides(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, memory_format=memory_format).copy_(t)


def forward(case: Case, i: Inputs, act: Activation, epilogue: tuple[str, ...]) -> Tensor:
    extras = [
        getattr(i, name) if name in epilogue else None for name in ("scale", "shift", "residual")
    ]
    return operators.forward(i.x, i.weight, case.conv, Epilogue(*extras, act))


def backward(case: Case, i: Inputs, *needs: bool) -> tuple[Tensor, Tensor, Tensor]:
    return operators.backward(i.dz, i.x, i.weight, case.conv, needs)


def wide(i: Inputs, dtype: torch.dtype) -> Inputs:
    return Inputs(*(t.to(dtype) for t in i))


def exact_forward(case: Case, i: Inputs, act: Activation, epilogue: tuple[str, ...]) -> Tensor:
    extras = [
        getattr(i, name) if name in epilogue else None for name in ("scale", "shift", "residual")
    ]
    return reference.conv2d(i.x, i.weight, None, *case.conv, *extras, act)


def exact_backward(case: Case, i: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.nn.grad.conv2d_input(i.x.shape, i.weight, i.dz, *case.conv),
        torch.nn.grad.conv2d_weight(i.x, i.weight.shape, i.dz, *case.conv),
        i.dz.sum((0, 2, 3)),
    )


def size(case: Case, i: Inputs) -> tuple[float, float, float, float]:
    """The sizes of the terms that are summed to the output and to each gradient."""
    a = Inputs(*(t.double().abs() for t in i))
    every = ("scale", "shift", "residual")
    sums = exact_forward(case, a, IDENTITY, every), *exact_backward(case, a)
    return tuple(t.max().item() for t in sums)


def ways(case: Case, x: Tensor) -> list[str]:
    last = _schemas.conv2d_format(x) == torch.channels_last
    native = "aten" if case.depthwise else "cudnn"
    return [native, *([] if last else [f"{native} channels_last"]), *NAMES]
