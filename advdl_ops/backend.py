"""Which implementation serves: the kernels, or the reference in plain PyTorch; how the kernels convolve; how a kept
weight is compared.

It also has queries of torch's state: whether torch records gradients, casts, traces or transforms a call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, ClassVar

import torch

from . import _environment, _library

__all__ = [
    "get_backend", "get_convolution", "get_weight_check", "use_backend", "use_convolution", "use_weight_check",
]  # fmt: skip

# The first of each is the default.
_BACKENDS = ("fused", "reference")
_CONVOLUTIONS = ("default", "exact")
_WEIGHT_CHECKS = ("default", "full")


def _from_environment(variable: str, names: tuple[str, ...]) -> str:
    name = _environment.variable(variable) or names[0]
    if name not in names:
        raise ValueError(f"advdl_ops: {variable} ({name!r}) must be one of {', '.join(names)}")
    return name


_backend = _from_environment("ADVDL_OPS_BACKEND", _BACKENDS)
_convolution = _from_environment("ADVDL_OPS_CONVOLUTION", _CONVOLUTIONS)
_weight_check = _from_environment("ADVDL_OPS_WEIGHT_CHECK", _WEIGHT_CHECKS)
_require_native = _environment.flag("ADVDL_OPS_REQUIRE_NATIVE", False)


def get_backend() -> str:
    """``"fused"`` or ``"reference"``."""
    return _backend


def get_convolution() -> str:
    """``"default"`` or ``"exact"``, see :class:`use_convolution`."""
    return _convolution


def get_weight_check() -> str:
    """``"default"`` or ``"full"``, see :class:`use_weight_check`."""
    return _weight_check


class _Use:
    """Sets a variable of this module: a call sets it, a ``with`` block restores it."""

    _variable: ClassVar[str]
    _names: ClassVar[tuple[str, ...]]

    def __init__(self, name: str) -> None:
        if name not in self._names:
            raise ValueError(
                f"{type(self).__name__}: name ({name!r}) must be one of {', '.join(self._names)}"
            )
        self._previous = globals()[self._variable]
        globals()[self._variable] = name

    def __enter__(self) -> _Use:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        globals()[self._variable] = self._previous


class use_backend(_Use):
    """Choose the implementation for the whole process: a call sets it, a ``with`` block restores it.

    Args:
        name: ``"fused"`` (the kernels, if they are loaded) or ``"reference"`` (plain PyTorch).

    Raises:
        ValueError: another name.
    """

    _variable = "_backend"
    _names = _BACKENDS


class use_convolution(_Use):
    """Choose how convolutions are computed on CPU, for the whole process: a call sets it, a ``with`` block restores it.

    It holds from the next call on. What :func:`.tune` stored for the other name is kept, and does not serve.

    Args:
        name: ``"default"``, or ``"exact"``: every output is a direct sum of products. By default Winograd's minimal
            filtering (Lavin & Gray 2015, arXiv:1509.09308) may serve 3x3 convolutions with stride 1. It multiplies
            less, and rounds differently: an error is relative to the largest number of a tile of pixels, which matters
            where one is larger than its neighbours by many orders.

    Raises:
        ValueError: another name.
    """

    _variable = "_convolution"
    _names = _CONVOLUTIONS


class use_weight_check(_Use):
    """Choose what of a convolution's weight is compared in evaluation with the one that a kept weight was made from.

    In evaluation without gradients, a layer keeps its weight with the norm folded in, or in the layout of its kernel.
    It notices every change that PyTorch counts. Writes through ``.data`` or numpy it notices by values.

    Args:
        name: ``"default"``: one value of each output channel, and a checksum of the weight where that takes less than 3
            % of the layer's time (from 1,024 output pixels and 50 million products on). ``"full"``: every value, with a
            copy of the weight; for fault injection, or a search over single weights.

    Raises:
        ValueError: another name.
    """

    _variable = "_weight_check"
    _names = _WEIGHT_CHECKS


def serves_native(function: str, x: torch.Tensor) -> bool:
    """Whether a kernel serves this call; False means that the reference does.

    The reference serves if ``use_backend`` chose it, and always in export and tracing (which must end in aten
    operators), under forward-mode and functorch transforms, and on devices without kernels.

    Raises:
        RuntimeError: ``ADVDL_OPS_REQUIRE_NATIVE=1`` is set and the reference would stand in for a kernel.
    """
    if _backend == "reference" or is_exported():
        return False
    if x.is_cpu and _library.native("cpu") and not transformed():
        return True  # a shortcut to the answer below, in half of the time
    device = x.device.type
    # Meta tensors have no data: the fake function of the operator gives the shapes.
    if (_library.native(device) or device == "meta") and not transformed():
        if device != "cuda" or torch.compiler.is_compiling():
            return True
        reason = _library.unsupported_gpu(x.device.index)
        if reason is None:
            return True
    else:
        reason = _library.status().get(device, f"no kernels exist for device type {device!r}")
    if _require_native:
        raise RuntimeError(
            f"{function}: ADVDL_OPS_REQUIRE_NATIVE=1 is set, but the reference would serve: "
            f"{reason or 'a functorch or forward-mode transform is active'}"
        )
    if device == "cuda" and reason is not None and not torch.compiler.is_compiling():
        _library.warn_once(f"CUDA: {reason}")
    return False


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records operations on these tensors."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


# Autocast casts these dtypes. It leaves fp64 as it is.
AUTOCAST_FROM = (torch.float32, torch.bfloat16, torch.float16)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of the active autocast on ``x``'s device; ``None`` if there is none."""
    device = x.device.type
    if device == "meta" or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def cast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``t`` as autocast would pass it to an operator. Functions cast before they save tensors, to keep no fp32 copy."""
    return t.to(dtype) if t.dtype in AUTOCAST_FROM else t


def transformed() -> bool:
    """Whether a functorch or forward-mode transform is active, which needs differentiable aten operators.

    This works under compile too, where the inputs of a transformed function do not have ``requires_grad``.
    """
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def is_traced() -> bool:
    """Whether a compiler or tracer records this call. Then nothing is cached, and all steps must be aten operators."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether ``torch.export``, ONNX or ``torch.jit.trace`` records this call, into a graph of torch's operators.

    Also in :func:`by_torchs_operators`.
    """
    if _torchs_thread is not None and _torchs_thread == threading.get_ident():
        return True
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


_torchs_thread: int | None = None
_torchs_lock = threading.RLock()


@contextlib.contextmanager
def by_torchs_operators() -> Iterator[None]:
    """In it the calls of this thread run torch's own operators, as in an exported graph, and keep what those keep."""
    global _torchs_thread
    with _torchs_lock:
        before, _torchs_thread = _torchs_thread, threading.get_ident()
        try:
            yield
        finally:
            _torchs_thread = before


def is_distributed() -> bool:
    """Whether ``torch.distributed.init_process_group`` was called."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_fake(x: Any) -> bool:
    """Whether ``x`` has sizes and strides, and no data."""
    return type(x) is not torch.Tensor and isinstance(x, torch._subclasses.FakeTensor)


def unwatched(*tensors: torch.Tensor | None) -> bool:
    """Whether this is a plain call on plain tensors: no tracer, dispatch mode or transform must see its operators.

    Only then may a tensor be kept for later calls, or an operator's Python function be called without the dispatcher.
    """
    if is_traced() or torch._C._len_torch_dispatch_stack() > 0 or transformed():
        return False
    for t in tensors:
        if t is not None and type(t) is not torch.Tensor and type(t) is not torch.nn.Parameter:
            return False
    return True


def fixed(options: Any) -> Any:
    """``options``, a nested tuple, with its floats as constants if a compiler traces this call.

    Under ``dynamic=True`` Dynamo makes a float an input of the graph, and raises if a second autograd.Function gets the
    same one. A float computed from its numerator and denominator is not made an input.
    """
    if not torch.compiler.is_compiling():
        return options
    if isinstance(options, float):
        numerator, denominator = options.as_integer_ratio()
        return numerator / denominator
    if isinstance(options, tuple):
        values = [fixed(value) for value in options]
        return type(options)(*values) if hasattr(options, "_fields") else tuple(values)
    return options
