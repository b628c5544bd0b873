"""A convolution without its data: everything on which the choice of an implementation depends."""

from __future__ import annotations

import math
import numbers
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import native
from .._schemas import HALF, conv2d_format, conv2d_shape
from ..activation import IDENTITY, Activation
from ..backend import get_convolution, is_traced

# Directions. Each is chosen for itself.
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input_gradient", "weight_gradient"
# A forward in evaluation whose weight, with the norm folded into it, is kept from call to call.
FOLDED = "folded"
# A forward together with the batch norm in training behind it.
WITH_NORM = "forward with norm"

CONTIGUOUS, CHANNELS_LAST, STRIDED = "contiguous", "channels_last", "strided"
# Of one channel or one pixel: both formats at once.
BOTH = "contiguous and channels_last"


class Conv(NamedTuple):
    """The options of a 2-D convolution: pairs (height, width), zero padding on both sides."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Epilogue(NamedTuple):
    """What follows a convolution ``z``: ``act(z * scale + shift + residual)``.

    Attributes:
        scale, shift: ``[C_out]`` or ``None``.
        residual: of the output's shape, or ``None``.
        act: the activation.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    act: Activation = IDENTITY

    def name(self) -> str:
        """Its parts, as a :class:`Problem` holds them."""
        scale, shift, residual, act = self
        parts = [
            part
            for part, t in (("scale", scale), ("shift", shift), ("residual", residual))
            if t is not None
        ]
        if act.code != 0:
            parts.append(act.name)
        return "+".join(parts) or "none"


class Problem(NamedTuple):
    """A convolution without its data.

    Attributes:
        direction: one of ``FORWARD``, ``INPUT_GRADIENT``, ``WEIGHT_GRADIENT``, ``FOLDED``, ``WITH_NORM``.
        x: shape ``[N, C_in, H, W]``.
        weight: shape ``[C_out, C_in / groups, kH, kW]``.
        dtype: of both.
        layout: memory format of x.
        weight_layout: memory format of the weight.
        stride, padding, dilation, groups: as of :class:`Conv`.
        epilogue: :meth:`Epilogue.name`; of a gradient the layout of dz.
        library: whether torch may use oneDNN (on CPU) or cuDNN (on CUDA) for it.
        tf32: on CUDA, whether fp32 may be multiplied in TF32.
        threads: on CPU; 0 on CUDA.
        exact: whether :func:`.use_convolution` excludes a candidate that could otherwise serve it.
    """

    direction: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    weight_layout: str
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    epilogue: str
    library: bool
    tf32: bool
    threads: int
    exact: bool = False

    @property
    def conv(self) -> Conv:
        return Conv(self.stride, self.padding, self.dilation, self.groups)

    @property
    def has_winograd_form(self) -> bool:
        """Whether it has the form that Winograd's minimal filtering computes on CPU."""
        return _has_winograd_form(self.weight, self.conv)

    @property
    def channels_of_group(self) -> tuple[int, int]:
        """Of the input and of the output."""
        return self.weight[1], self.weight[0] // self.groups

    @property
    def is_depthwise(self) -> bool:
        """Every channel by itself, one output for each."""
        return self.groups == self.x[1] == self.weight[0]

    @property
    def is_channels_last(self) -> bool:
        return self.layout in (CHANNELS_LAST, BOTH)

    @property
    def memory_format(self) -> torch.memory_format:
        """That of the result: of x, or for a weight's gradient not of interest."""
        return torch.channels_last if self.layout == CHANNELS_LAST else torch.contiguous_format

    @property
    def x_numel(self) -> int:
        return math.prod(self.x)

    @property
    def weight_numel(self) -> int:
        return math.prod(self.weight)

    @property
    def taps(self) -> int:
        return self.weight[2] * self.weight[3]

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        _, _, height, width = conv2d_shape(self.x, self.weight, *self.conv[:3])
        return height, width

    @property
    def pixels(self) -> int:
        """Of the output, over the whole batch."""
        return self.x[0] * math.prod(self.out_size)


def problem_of(
    direction: str, x: Tensor, weight: Tensor, conv: Conv, epilogue: str = "none"
) -> Problem:
    """The problem of a convolution of ``x`` by ``weight``, on the device of ``x``."""
    settings = _settings_on_cpu(x, weight) if x.is_cpu else _settings_on_cuda(x, weight)
    return Problem(
        direction,
        tuple(x.shape),
        tuple(weight.shape),
        x.dtype,
        layout_of(x),
        layout_of(weight),
        *conv,
        epilogue,
        *settings,
        x.is_cpu and get_convolution() == "exact" and _has_winograd_form(weight.shape, conv),
    )


def _has_winograd_form(weight: Sequence[int], conv: Conv) -> bool:
    return (
        (conv.groups == 1 or weight[1] > 1)
        and tuple(weight[2:]) == (3, 3)
        and conv.stride == (1, 1)
        and all(
            padding <= 2 * rate for padding, rate in zip(conv.padding, conv.dilation, strict=True)
        )
    )


def _settings_on_cpu(x: Tensor, weight: Tensor) -> tuple[bool, bool, int]:
    return _may_use_onednn(x, weight), False, torch.get_num_threads()


def _settings_on_cuda(x: Tensor, weight: Tensor) -> tuple[bool, bool, int]:
    return torch.backends.cudnn.enabled, allows_tf32(), 0


def call_key(x: Tensor, weight: Tensor, conv: Conv) -> tuple[Any, ...]:
    """All that a :class:`Problem` is made of, as it is at hand: quicker than to make one, for what is kept by it."""
    return (
        x.shape, x.stride(), weight.shape, weight.stride(), x.dtype, type(x), type(weight), conv,
        torch._C._get_mkldnn_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads(),
        get_convolution(),
    )  # fmt: skip


def layout_of(t: Tensor) -> str:
    """The memory format of ``t`` ``[N, C, H, W]`` in a word."""
    if t.is_contiguous():
        return BOTH if t.is_contiguous(memory_format=torch.channels_last) else CONTIGUOUS
    return CHANNELS_LAST if t.is_contiguous(memory_format=torch.channels_last) else STRIDED


_PLAIN = (Tensor, torch.nn.Parameter)
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_convolution_pointwise"
)


def _may_use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's own operators may be called: they know no subclass, tracer or autocast."""
    return (
        HAS_ONEDNN
        and torch._C._get_mkldnn_enabled()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not is_traced()
    )


def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch may multiply in ``dtype``, as far as it is known: only x86 is."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    if dtype == torch.float16:
        return _onednn_has_fp16() or _cpu_has("amx_fp16")
    return _cpu_has("avx512_bf16") or _cpu_has("amx_tile")


def _cpu_has(name: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{name}_supported", lambda: False)())


def _onednn_has_fp16() -> bool:
    return HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


# Asked once, at import: a compiler could not trace the questions.
_INSTRUCTIONS = {dtype: _has_instructions(dtype) for dtype in HALF}


def computes_in_float32(dtype: torch.dtype) -> bool:
    """Whether a convolution in half precision is computed in fp32 on this CPU.

    Without instructions that multiply in ``dtype``, torch's takes 4 to 50 times as long as in fp32
    (docs/performance.md).
    """
    return not _INSTRUCTIONS.get(dtype, True)


def allows_tf32() -> bool:
    # Not cudnn.allow_tf32: reading that raises where convolutions and LSTMs are set apart.
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


# ---- memory formats ----


def has_format(t: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether ``t`` ``[N, C, H, W]`` has the strides of ``memory_format``, also for sizes of 1 and 0."""
    return t.stride() == _strides(t.shape, memory_format)


def convert(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """``t`` ``[N, C, H, W]`` with the strides of ``memory_format``, also for sizes of 1 and 0."""
    strides = _strides(t.shape, memory_format)
    if t.stride() == strides:
        return t
    if t.is_contiguous(memory_format=memory_format):  # but for the strides of sizes of 1
        return t.as_strided(t.shape, strides)
    if t.is_cpu and native("cpu"):
        return torch.ops.advdl_ops.convert_layout(t, memory_format == torch.channels_last)
    return t.contiguous(memory_format=memory_format)


def without_data(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A tensor of which only the shape and the format are read."""
    if conv2d_format(t) == memory_format:
        return t
    return torch.empty_like(t, memory_format=memory_format)


def _strides(shape: Any, memory_format: torch.memory_format) -> tuple[int, ...]:
    _, c, h, w = shape
    if memory_format == torch.channels_last:
        return h * w * c, 1, w * c, c
    c, h, w = max(c, 1), max(h, 1), max(w, 1)
    return c * h * w, h * w, w, 1


# ---- options, as passed to a function or a module ----

_PADDINGS = ("same", "valid")


def pair_of(function: str, name: str, value: Any, least: int) -> tuple[int, int]:
    """Height and width of an option that is one number for both, or a sequence of one or two; ``least`` at least."""
    if type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int:
        pair = value  # as modules hold it
    else:
        values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        for v in values:
            if not _is_integer(v):
                raise TypeError(f"{function}: {name} ({value!r}) must be an integer, or two")
        if len(values) not in (1, 2):
            raise RuntimeError(f"{function}: {name} ({value!r}) must be one integer, or two")
        pair = values[0], values[-1]
    if pair[0] < least or pair[1] < least:
        raise RuntimeError(f"{function}: {name} ({value!r}) must be at least {least}")
    return pair


def padded_by(
    function: str,
    x: Tensor,
    weight: Tensor,
    padding: Any,
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, tuple[int, int]]:
    """``x`` ``[N, C, H, W]``, padded here where its two sides differ, and the padding of both sides."""
    if not isinstance(padding, str):
        return x, pair_of(function, "padding", padding, 0)
    if padding not in _PADDINGS:
        raise RuntimeError(
            f"{function}: padding ({padding!r}) must be numbers or one of {', '.join(_PADDINGS)}"
        )
    if padding == "valid":
        return x, (0, 0)
    if stride != (1, 1):
        raise RuntimeError(f"{function}: stride ({stride}) must be 1 with padding 'same'")
    height, width = (
        rate * (kernel - 1) for rate, kernel in zip(dilation, weight.shape[2:], strict=True)
    )
    if height % 2 or width % 2:  # of an even kernel, as torch: one more behind
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return x, (height // 2, width // 2)


def check_groups(function: str, groups: Any) -> None:
    if type(groups) is not int and not _is_integer(groups):
        raise TypeError(f"{function}: groups ({groups!r}) must be an integer")
    if groups < 1:
        raise RuntimeError(f"{function}: groups ({groups}) must be at least 1")


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, torch.SymInt, numbers.Integral))


def pair(value: Any) -> tuple[int, int]:
    """Height and width of an option that is one number for both, or two, or a sequence of one."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1]) if len(values) in (1, 2) else values
