"""What the tests of all norms share: types, activations, error bounds, and tensors as bytes for the emulation.

Every bound is a count of rounding steps (unit roundoff of the type that the step is done in) times the magnitude of
what is rounded, so it shrinks with the data: nothing here is a tolerance picked to pass.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

DTYPES = {"f32": torch.float32, "f64": torch.float64, "f16": torch.float16, "bf16": torch.bfloat16}
CODES = {"f32": 0, "f64": 1, "f16": 2, "bf16": 3}
# Activation of csrc/common/tensor_types.h: code, parameter, function
ACTS: dict[str, tuple[int, float, Any]] = {
    "identity": (0, 0.0, lambda z: z),
    "relu": (1, 0.0, F.relu),
    "leaky_relu": (2, 0.02, lambda z: F.leaky_relu(z, 0.02)),
    "elu": (3, 0.7, lambda z: F.elu(z, 0.7)),
    "silu": (4, 0.0, F.silu),
    "gelu": (5, 0.0, F.gelu),
    "gelu_tanh": (6, 0.0, lambda z: F.gelu(z, approximate="tanh")),
    "sigmoid": (7, 0.0, torch.sigmoid),
    "tanh": (8, 0.0, torch.tanh),
    "hardswish": (9, 0.0, F.hardswish),
    "relu6": (10, 0.0, F.relu6),
}
SIMPLE = ("identity", "relu")
# Where a derivative jumps: there a rounding of z may choose the other side.
KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0), "relu6": (0.0, 6.0)}
Z_INPUT, Z_RESIDUAL, Z_OUTPUT = 0, 1, 2
EPS = 1e-5
STEPS = 12  # roundings in a row on the way from x to out, and in a sum of sums


class AnyCase(Protocol):
    """What these functions read of a case (the dataclass Case of each norm)."""

    @property
    def n(self) -> int: ...
    @property
    def c(self) -> int: ...
    @property
    def s(self) -> int: ...
    @property
    def layout(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def act(self) -> str: ...
    @property
    def residual(self) -> bool: ...
    @property
    def z_output(self) -> bool: ...
    @property
    def offset(self) -> int: ...


def case_name(case: Any, *head: str, others: int) -> str:
    """``head``, and the fields of a case from number ``others`` on that differ from their default."""
    fields = dataclasses.fields(case)[others:]
    values = ((field.name, field.default, getattr(case, field.name)) for field in fields)
    return "-".join([*head, *(f"{name}={v}" for name, default, v in values if v != default)])


def normal_of(case: AnyCase) -> Callable[..., Tensor]:
    """A function of a shape that returns normal numbers in fp64, from a generator seeded by the case."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def acc_dtype(case: AnyCase) -> torch.dtype:
    return torch.float64 if case.dtype == "f64" else torch.float32


def per_channel(v: Tensor) -> Tensor:
    return v[None, :, None]


def affine(inputs: dict[str, Tensor], c: int) -> tuple[Tensor, Tensor]:
    like = {"dtype": torch.float64, "device": inputs["x"].device}
    one, zero = torch.ones(c, **like), torch.zeros(c, **like)
    return inputs.get("weight", one).double(), inputs.get("bias", zero).double()


def smallest(case: AnyCase) -> float:
    """Half the distance of two subnormal numbers of the dtype, which a rounding may lose."""
    info = torch.finfo(DTYPES[case.dtype])
    return info.smallest_normal * info.eps


def activated(case: AnyCase, z: Tensor, z_error: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) as it is stored, and the largest error allowed."""
    unit, unit_acc = roundoff(DTYPES[case.dtype]), roundoff(acc_dtype(case))
    y = ACTS[case.act][2](z)
    # |act'| is below 1.2 (hardswish 1.5); the activation's own arithmetic: a few roundings of its terms
    y_error = 1.5 * z_error + STEPS * unit_acc * (y.abs() + z.abs()) + unit * y.abs()
    return y, y_error + smallest(case)


def act_slope(
    case: AnyCase, z: Tensor, z_error: Tensor, saved: Tensor | None
) -> tuple[Tensor, Tensor]:
    """act'(z) and the largest error allowed."""
    unit_acc = roundoff(acc_dtype(case))
    if case.z_output:
        assert saved is not None
        slope, z_error = (saved.double() > 0).double(), torch.zeros_like(z)
    else:
        leaf = z.clone().requires_grad_()
        (slope,) = torch.autograd.grad(ACTS[case.act][2](leaf).sum(), leaf)
    slope_error = 1.5 * z_error + STEPS * unit_acc * (slope.abs() + z.abs() + 1) * (
        case.act not in SIMPLE
    )
    if not case.z_output:
        for kink in KINKS.get(case.act, ()):
            slope_error = slope_error + ((z - kink).abs() <= z_error).double()
    return slope, slope_error


def inputs_of_backward(
    case: AnyCase,
    inputs: dict[str, Tensor],
    forward: dict[str, tuple[Tensor, Tensor]],
    *statistics: str,
) -> dict[str, Tensor]:
    """What backward takes beside dout, x, weight and bias: ``statistics`` (rounded as forward returns) and saved."""
    extra = {name: forward[name][0].to(acc_dtype(case)) for name in statistics}
    if case.z_output:
        extra["saved"] = forward["out"][0].to(DTYPES[case.dtype])
    elif case.residual:
        extra["saved"] = inputs["residual"]
    return extra


# ---- to and from the emulation ----


def to_bytes(case: AnyCase, value: Tensor) -> bytes:
    if value.dim() == 3 and case.layout == "last":
        value = value.transpose(1, 2)
    value = value.contiguous().view(-1)
    return value.view(torch.uint8).numpy().tobytes() if value.numel() else b""


def from_bytes(case: AnyCase, raw: bytes, dtype: torch.dtype, whole: bool) -> Tensor:
    shape = (case.n, case.s, case.c) if case.layout == "last" else (case.n, case.c, case.s)
    if not raw:
        return torch.empty((case.n, case.c, case.s) if whole else (0,), dtype=dtype)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype)
    if not whole:
        return flat
    value = flat.view(shape)
    return value.transpose(1, 2) if case.layout == "last" else value


WHOLE = ("out", "dx", "dresidual")


def request_of(case: Any, **more: Any) -> dict[str, Any]:
    """The fields of a request for any norm, and ``more``."""
    return {
        "n": case.n,
        "c": case.c,
        "s": case.s,
        "layout": ["first", "last"].index(case.layout),
        "dtype": CODES[case.dtype],
        "weight_dtype": CODES[case.param_dtype],
        "act": ACTS[case.act][0],
        "act_param": ACTS[case.act][1],
        "eps": EPS,
        "z_source": Z_OUTPUT if case.z_output else Z_RESIDUAL if case.residual else Z_INPUT,
        "want_dx": case.want_dx,
        "want_dresidual": case.want_dresidual,
        **more,
    }


def with_tensors(
    case: AnyCase, request: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    for name, tensor in tensors.items():
        request[name] = to_bytes(case, tensor)
    if case.offset:
        for name in ("x", "residual", "saved", "dout", *WHOLE):
            request[f"{name}_offset"] = case.offset
    return request


@dataclasses.dataclass(frozen=True)
class Calls:
    """The calls of a norm in the emulation.

    Attributes:
        prefix: the first part of their names there.
        request: makes the request for a case, without its tensors.
        unpack: turns a reply into tensors.
    """

    prefix: str
    request: Callable[[Any], dict[str, Any]]
    unpack: Callable[[Any, dict[str, Any]], dict[str, Any]]

    def run_forward(
        self, emulator: Any, case: Any, inputs: dict[str, Tensor], **settings: Any
    ) -> dict[str, Any]:
        tensors = {k: v for k, v in inputs.items() if k != "dout"}
        request = with_tensors(case, self.request(case) | settings, tensors)
        return self.unpack(case, emulator.call(f"{self.prefix}forward", request))

    def run_backward(
        self,
        emulator: Any,
        case: Any,
        inputs: dict[str, Tensor],
        extra: dict[str, Tensor],
        **settings: Any,
    ) -> dict[str, Any]:
        kept = ("x", "dout", "weight", "bias")
        tensors = {**{k: v for k, v in inputs.items() if k in kept}, **extra}
        request = with_tensors(case, self.request(case) | settings, tensors)
        return self.unpack(case, emulator.call(f"{self.prefix}backward", request))

    def dry_run(self, emulator: Any, case: Any, direction: str, **settings: Any) -> dict[str, Any]:
        """The launches and the workspace of "forward" or "backward", which runs nothing: any shape costs the same."""
        saved = case.z_output or (case.residual and direction == "backward")
        names = ["x", "dout", *["residual"] * case.residual, *["saved"] * saved]
        request = with_tensors(case, self.request(case) | settings | {"dry": True}, {})
        return emulator.call(self.prefix + direction, request | dict.fromkeys(names, True))


def kernels(result: dict[str, Any]) -> int:
    """How many kernels a call launched."""
    return sum(is_kernel for is_kernel, *_ in result["launches"])


def assert_within(result: dict[str, Any], reference: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Every output named by the reference is there, finite, and inside its bound."""
    for name, (expected, allowed) in reference.items():
        actual = result[name].double().to(expected.device)
        assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}"
        error = (actual - expected).abs()
        bad = ~(error <= allowed)
        if bool(bad.any()):
            worst = int(torch.where(bad, torch.nan_to_num(error / allowed, nan=1e30), 0.0).argmax())
            raise AssertionError(
                f"{name}: {int(bad.sum())} of {bad.numel()} outside the bound; worst at {worst}: "
                f"{actual.flatten()[worst].item()} for {expected.flatten()[worst].item()} "
                f"(allowed {allowed.expand_as(error).flatten()[worst].item():.3g})"
            )


def assert_order_changes_no_bit(
    family: Any, emulator: Any, case: Any, settings: dict[str, Any]
) -> None:
    """Forward and backward of ``family`` (a module of this package), with blocks and threads in three orders."""
    inputs = family.make_inputs(case)
    extra = family.backward_inputs(case, inputs)

    def outputs(**order: int) -> dict[str, Any]:
        result = family.run_forward(emulator, case, inputs, **settings, **order)
        return result | family.run_backward(emulator, case, inputs, extra, **settings, **order)

    first = outputs()
    for order in ({"order": 1}, {"order": 2, "seed": 7}):
        again = outputs(**order)
        for name, value in first.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, again[name]), name
