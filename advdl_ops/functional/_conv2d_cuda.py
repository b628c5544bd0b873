"""The raw convolution operators on CUDA: torch's own (cuDNN) or a Triton kernel, whichever was measured to be faster.

Each of forward, gradient of the input and gradient of the weight is chosen for itself, see ``tuning.py``; fp64 and
empty inputs are torch's alone. For a contiguous ``x`` a channels_last convolution competes too, its time including the
conversion there and back; the Triton kernels are channels_last and pay the same.

A convolution before a batch norm in training is chosen once more, together with the norm: a Triton kernel can give the
statistics of its output, and the norm then reads that once instead of twice.

cuDNN is called deterministically and without its own measurement, which would choose anew in every process. Its fused
convolution + bias + relu is no candidate: torch calls it with ``deterministic=false``. So behind cuDNN the epilogue is
one more pass, the kernel of ``batch_norm_act`` in evaluation; the Triton kernels have it inside.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tuning
from .._schemas import _check_devices, _library, conv2d_format
from ..activation import IDENTITY, activation_of
from ..reference.batch_norm_act import acc_dtype
from . import _epilogue
from ._conv2d_cpu import Conv, convert

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input_gradient", "weight_gradient"
DEVICE_TYPE = "cuda"  # a test's is "cpu"
# The choice for a convolution and the norm behind it: its operator in the key, and the way that takes no statistics.
WITH_NORM, APART = "conv_bn_act", "convolution, then norm"


class Family(NamedTuple):
    """An operator: its name, also of the module under ``advdl_ops.triton``, and what torch's own is called."""

    op: str
    native: str


DENSE, DEPTHWISE = Family("conv2d", "cudnn"), Family("depthwise_conv2d", "aten")


class Key(NamedTuple):
    """All that the time of a convolution depends on; ``layout`` is that of x, and in backward of dz behind it."""

    op: str
    direction: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    dtype: str
    layout: str
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    epilogue: str
    tf32: bool
    cudnn: bool


def conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    act: int,
    act_param: float,
) -> Tensor:
    """``act(conv2d(x, weight) * scale + shift + residual)`` in ``x``'s memory format, see ``_schemas.py``."""
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    return _forward(DENSE, x, weight, scale, shift, residual, conv, act, act_param)


def conv2d_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of the weight and of a bias ``[C_out]``, see ``_schemas.py``."""
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    return _backward(DENSE, dz, x, weight, conv, need_dx, need_dweight, need_dbias)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    act: int,
    act_param: float,
) -> Tensor:
    """As :func:`conv2d`, of weight ``[C, 1, kH, kW]``."""
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), x.shape[1])
    return _forward(DEPTHWISE, x, weight, scale, shift, residual, conv, act, act_param)


def depthwise_conv2d_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`conv2d_backward`, of weight ``[C, 1, kH, kW]``."""
    conv = Conv(tuple(stride), tuple(padding), tuple(dilation), x.shape[1])
    return _backward(DEPTHWISE, dz, x, weight, conv, need_dx, need_dweight, need_dbias)


_library.impl("conv2d", conv2d, "CUDA")
_library.impl("conv2d_backward", conv2d_backward, "CUDA")
_library.impl("depthwise_conv2d", depthwise_conv2d, "CUDA")
_library.impl("depthwise_conv2d_backward", depthwise_conv2d_backward, "CUDA")


def _forward(
    family: Family,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    conv: Conv,
    act: int,
    act_param: float,
) -> Tensor:
    _check_devices(family.op, x, weight, scale, shift, residual)
    activation = activation_of(act, act_param)

    def run(how: Any) -> Tensor:
        if isinstance(how, torch.memory_format):
            # No scale is folded into the weight: the pass behind the convolution is there anyway.
            z = _native(convert(x, how), convert(weight, how), conv)
            out = _epilogue.epilogue(convert(z, how), scale, shift, residual, activation)
        else:
            out = _launchers(family).forward(
                x, weight, **_options(family, conv), scale=scale, shift=shift, residual=residual,
                act=activation, config=how,
            )  # fmt: skip
            if family is DENSE:
                out, _ = out  # the statistics were not asked for
        return convert(out, conv2d_format(x))

    parts = {"scale": scale, "shift": shift, "residual": residual}
    epilogue = [name for name, t in parts.items() if t is not None]
    if act != 0:
        epilogue.append(activation.name)
    layout = _layout(x)
    return _fastest(family, FORWARD, x, weight, layout, conv, "+".join(epilogue) or "none", run)


def _backward(
    family: Family,
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    need_dx: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(f"{family.op}_backward", dz, x, weight)
    acc = acc_dtype(x.dtype)
    options = _options(family, conv)

    def input_gradient(how: Any) -> Tensor:
        if isinstance(how, torch.memory_format):
            # Of x nothing but shape and strides is read.
            like = x if conv2d_format(x) == how else torch.empty_like(x, memory_format=how)
            mask = [True, False, False]
            dx = _native_backward(convert(dz, how), like, convert(weight, how), conv, mask)[0]
        else:
            dx = _launchers(family).input_gradient(dz, weight, x.shape, **options, config=how)
        return convert(dx, conv2d_format(x))

    def weight_gradient(how: Any) -> Tensor:
        if isinstance(how, torch.memory_format):
            tensors = convert(dz, how), convert(x, how), convert(weight, how)
            dweight = _native_backward(*tensors, conv, [False, True, False])[1]
        else:
            dweight = _launchers(family).weight_gradient(dz, x, weight.shape, **options, config=how)
        return convert(dweight, conv2d_format(weight)).to(acc)

    layout = f"{_layout(x)}, {_layout(dz)}"
    dx, dweight, dbias = x.new_empty(0), x.new_empty(0, dtype=acc), x.new_empty(0, dtype=acc)
    if need_dx:
        dx = _fastest(family, INPUT_GRADIENT, x, weight, layout, conv, "none", input_gradient)
    if need_dweight:
        dweight = _fastest(
            family, WEIGHT_GRADIENT, x, weight, layout, conv, "none", weight_gradient
        )
    if need_dbias:
        dbias = dz.sum((0, 2, 3), dtype=acc)
    return dx, dweight, dbias


# ---- statistics for the norm behind it ----


def conv2d_with_statistics(
    x: Tensor, weight: Tensor, shift: Tensor | None, conv: Conv, config: Any
) -> tuple[Tensor, Tensor]:
    """``conv2d(x, weight) + shift`` in ``x``'s memory format, and fp32 ``[2, C_out]``.

    Those are the mean of each channel and the sum of its squared distances from it, of the output as stored.
    """
    _check_devices(DENSE.op, x, weight, shift)
    out, statistics = _launchers(DENSE).forward(
        x, weight, **conv._asdict(), scale=None, shift=shift, residual=None,
        act=IDENTITY, with_sums=True, config=config,
    )  # fmt: skip
    return convert(out, conv2d_format(x)), statistics


def statistics_config(
    x: Tensor, weight: Tensor, conv: Conv, parts: Sequence[str], trial: Callable[[Any], Tensor]
) -> Any | None:
    """By which config the convolution gives the norm its statistics, or ``None``: the two ways apart are faster.

    Args:
        x, weight, conv: of the convolution.
        parts: names of what else the time depends on: the tensors and the activation of the norm.
        trial: runs convolution and norm by a config or ``None``, and writes no running statistics.
    """
    tf32 = _allows_tf32()
    configs = implementations(DENSE, FORWARD, x.dtype, conv2d_format(x), tf32)
    # Apart is the first: it serves where nothing is measured. Its convolution is chosen for itself.
    ways = {APART: None} | {
        f"{name} with statistics": config
        for name, config in configs.items()
        if not isinstance(config, torch.memory_format)
    }
    key = _key(WITH_NORM, FORWARD, x, weight, _layout(x), conv, "+".join(parts), tf32)
    return _chosen(key, ways, trial, x.device)


# ---- the choice ----


def _fastest(
    family: Family,
    direction: str,
    x: Tensor,
    weight: Tensor,
    layout: str,
    conv: Conv,
    epilogue: str,
    run: Callable[[Any], Tensor],
) -> Tensor:
    tf32 = _allows_tf32()
    ways = implementations(family, direction, x.dtype, conv2d_format(x), tf32)
    if len(ways) == 1 or x.numel() == 0:
        return run(next(iter(ways.values())))
    key = _key(family.op, direction, x, weight, layout, conv, epilogue, tf32)
    return run(_chosen(key, ways, run, x.device))


def _key(
    op: str,
    direction: str,
    x: Tensor,
    weight: Tensor,
    layout: str,
    conv: Conv,
    epilogue: str,
    tf32: bool,
) -> Key:
    return Key(
        op, direction, tuple(x.shape), tuple(weight.shape), str(x.dtype).removeprefix("torch."),
        layout, *conv, epilogue, tf32, torch.backends.cudnn.enabled,
    )  # fmt: skip


def _chosen(
    key: Key, ways: dict[str, Any], run: Callable[[Any], Tensor], device: torch.device
) -> Any:
    name = tuning.recall(key, device)
    if name is None:
        calls = {name: functools.partial(run, how) for name, how in ways.items()}
        name = tuning.choose(key, calls, device)
    return ways[name]


@functools.cache
def implementations(
    family: Family, direction: str, dtype: torch.dtype, given: torch.memory_format, tf32: bool
) -> dict[str, Any]:
    """By name, the first to serve where nothing is measured: the memory format for torch's own, or a Triton config.

    ``tf32``: :func:`_allows_tf32`, on which it depends which blocks fit into the registers.
    """
    ways: dict[str, Any] = {family.native: given}
    if dtype not in TRITON_DTYPES:
        return ways
    if given != torch.channels_last:
        ways[f"{family.native} channels_last"] = torch.channels_last
    if has_triton():
        launchers = _launchers(family)
        configs = getattr(launchers, f"{direction.upper()}_CONFIGS")
        configs = launchers.suitable_configs(configs, dtype)
        ways.update({config_name(config): config for config in configs})
    return ways


def config_name(config: Any) -> str:
    """``triton 128x64x32 w4 s3``: its blocks, warps, stages, and what else is not 0."""
    fields = config._asdict()
    blocks = "x".join(str(v) for name, v in fields.items() if name.startswith("block"))
    short = {"num_warps": "w", "num_stages": "s"}
    others = [
        f"{short.get(name, name + ' ')}{value}"
        for name, value in fields.items()
        if not name.startswith("block") and value
    ]
    return " ".join(["triton", blocks, *others])


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported, which only now is tried: ``import advdl_ops`` does without it."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@functools.cache
def _launchers(family: Family) -> ModuleType:
    return importlib.import_module(f"advdl_ops.triton.{family.op}")


def _options(family: Family, conv: Conv) -> dict[str, Any]:
    options = conv._asdict()
    if family is DEPTHWISE:
        del options["groups"]
    return options


def _layout(t: Tensor) -> str:
    if conv2d_format(t) == torch.channels_last:
        return "channels_last"
    return "contiguous" if t.is_contiguous() else "strided"


# ---- torch's own ----


def _native(x: Tensor, weight: Tensor, conv: Conv) -> Tensor:
    return native_convolution(x, weight, None, conv)


def native_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    transposed: bool = False,
    output_padding: Sequence[int] = (0, 0),
) -> Tensor:
    """aten.convolution with its flags given, not set for the whole process: deterministic, not measured by cuDNN."""
    return torch.ops.aten._convolution(
        x, weight, bias, conv.stride, conv.padding, conv.dilation, transposed, output_padding, conv.groups,
        False, True, torch.backends.cudnn.enabled, _allows_tf32(),
    )  # fmt: skip


def _native_backward(
    dz: Tensor, x: Tensor, weight: Tensor, conv: Conv, mask: list[bool]
) -> tuple[Tensor, ...]:
    with deterministic():
        return torch.ops.aten.convolution_backward(
            dz, x, weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, mask,
        )  # fmt: skip


# Autograd has a thread for each GPU: of two that set the flags at once the later would restore what the earlier set.
_flags_lock = threading.Lock()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """cuDNN's flags, which backward takes from the process alone. ``torch.backends.cudnn.flags`` would set tf32 too."""
    with _flags_lock:
        before = torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()
        torch._C._set_cudnn_benchmark(False)
        torch._C._set_cudnn_deterministic(True)
        try:
            yield
        finally:
            torch._C._set_cudnn_benchmark(before[0])
            torch._C._set_cudnn_deterministic(before[1])


def _allows_tf32() -> bool:
    # Not cudnn.allow_tf32: reading that raises where convolutions and LSTMs are set apart.
    return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]
