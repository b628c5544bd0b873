"""The run functions of the candidates on CUDA: torch's own (cuDNN), in either memory format, or a Triton kernel.

Signatures are those of ``cpu.py``. cuDNN is called in deterministic mode and without its benchmark mode, which would
choose again in every process. Its fused convolution + bias + relu is not a candidate, because torch calls it with
``deterministic=false``. So after cuDNN the epilogue is another pass, by the kernel of ``batch_norm_act`` in evaluation.
The Triton kernels contain the epilogue.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._schemas import conv2d_format
from ..activation import IDENTITY
from .cpu import Gradients, Needs, sum_of
from .epilogue import epilogue as run_epilogue
from .problem import Conv, Epilogue, allows_tf32, convert, without_data

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- torch's own ----


def by_torch(
    x: Tensor, weight: Tensor, conv: Conv, epilogue: Epilogue, memory_format: torch.memory_format
) -> Tensor:
    # The scale is not folded into the weight, because the pass after the convolution is needed anyway.
    x, weight = convert(x, memory_format), convert(weight, memory_format)
    z = convolution(x, weight, None, conv)
    return run_epilogue(convert(z, memory_format), *epilogue)


def gradients_by_torch(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
) -> Gradients:
    dbias = sum_of(dz) if needs[2] else None
    x = convert(x, memory_format) if needs[1] else without_data(x, memory_format)
    with deterministic():
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            convert(dz, memory_format), x, convert(weight, memory_format), None, *conv[:3],
            False, [0, 0], conv.groups, [*needs[:2], False],
        )  # fmt: skip
    return dx, dweight, dbias


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Conv,
    transposed: bool = False,
    output_padding: Sequence[int] = (0, 0),
) -> Tensor:
    """aten.convolution, deterministic and without cuDNN's benchmark, by arguments and not by flags of the process."""
    return torch.ops.aten._convolution(
        x, weight, bias, *conv[:3], transposed, output_padding, conv.groups,
        False, True, torch.backends.cudnn.enabled, allows_tf32(),
    )  # fmt: skip


# Autograd has a thread for each GPU. If two set the flags at once, the later one would restore what the earlier one
# set.
_flags_lock = threading.Lock()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Sets cuDNN's flags for the process, as backward has no arguments for them. ``cudnn.flags`` would set tf32 too."""
    with _flags_lock:
        before = torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic()
        torch._C._set_cudnn_benchmark(False)
        torch._C._set_cudnn_deterministic(True)
        try:
            yield
        finally:
            torch._C._set_cudnn_benchmark(before[0])
            torch._C._set_cudnn_deterministic(before[1])


# ---- the Triton kernels ----


def triton_forward(
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    epilogue: Epilogue,
    memory_format: torch.memory_format,
    *,
    config: Any,
) -> Tensor:
    return launchers(_is_depthwise(x, weight, conv)).forward(
        x, weight, conv=conv, epilogue=epilogue, config=config
    )


def triton_forward_with_statistics(
    x: Tensor, weight: Tensor, conv: Conv, shift: Tensor | None, *, config: Any
) -> tuple[Tensor, Tensor]:
    """``conv2d(x, weight) + shift`` in ``x``'s memory format, and statistics of this output, fp32 ``[2, C_out]``.

    The statistics are the mean of each channel and the sum of squared distances from it, of the output after rounding.
    """
    out, statistics = launchers(False).forward_with_statistics(
        x, weight, conv=conv, epilogue=Epilogue(None, shift, None, IDENTITY), config=config
    )
    return convert(out, conv2d_format(x)), statistics


def triton_gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    conv: Conv,
    needs: Needs,
    memory_format: torch.memory_format,
    *,
    config: Any,
) -> Gradients:
    kernels = launchers(_is_depthwise(x, weight, conv))
    dx = dweight = None
    if needs[0]:
        dx = kernels.input_gradient(dz, weight, x.shape, conv=conv, config=config)
    if needs[1]:
        dweight = kernels.weight_gradient(dz, x, weight.shape, conv=conv, config=config)
    return dx, dweight, sum_of(dz) if needs[2] else None


def _is_depthwise(x: Tensor, weight: Tensor, conv: Conv) -> bool:
    return conv.groups == x.shape[1] == weight.shape[0]


@functools.cache
def launchers(depthwise: bool) -> ModuleType:
    """The module of ``advdl_ops.triton`` with the launchers."""
    name = "depthwise_conv2d" if depthwise else "conv2d"
    return importlib.import_module(f"advdl_ops.triton.{name}")


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported. This is tried only when needed, as ``import advdl_ops`` works without it."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return True


@functools.cache
def configs(direction: str, depthwise: bool, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """The configs of a Triton kernel that are measured, by name.

    ``tf32``: :func:`.allows_tf32`. Which blocks fit into the registers depends on it.
    """
    if dtype not in TRITON_DTYPES or not has_triton():
        return {}
    kernels = launchers(depthwise)
    found = getattr(kernels, f"{direction.upper()}_CONFIGS")
    return {config_name(config): config for config in kernels.suitable_configs(found, dtype)}


def config_name(config: Any) -> str:
    """For example ``triton 128x64x32 w4 s3``: blocks, warps, stages, and all other fields that are not 0."""
    fields = config._asdict()
    blocks = "x".join(str(v) for name, v in fields.items() if name.startswith("block"))
    short = {"num_warps": "w", "num_stages": "s"}
    others = [
        f"{short.get(name, name + ' ')}{value}"
        for name, value in fields.items()
        if not name.startswith("block") and value
    ]
    return " ".join(["triton", blocks, *others])
