"""Writes docs/accuracy.md: the errors of norms, convolution and LSTM against fp64, and those of stock PyTorch.

    python tools/accuracy.py

An error is the largest difference over the largest exact value, for the output and for each gradient. A new norm adds
its rows to `CASES`.
"""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["ADVDL_OPS_REQUIRE_NATIVE"] = "1"

from advdl_ops import functional  # noqa: E402
from advdl_ops._conv import choice  # noqa: E402
from advdl_ops._conv.problem import (  # noqa: E402
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Conv,
    problem_of,
)
from benchmarks import convergence_report, environment  # noqa: E402

SHAPE = (8, 64, 28, 28)
WINOGRAD_DIRECTIONS = FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Mean and deviation of the input.
INPUTS = ((0.5, 2.0), (1e4, 1.0))

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def stock_layer_norm_2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias).movedim(-1, 1)


# name: (ours, stock)
CASES: dict[str, tuple[Function, Function]] = {
    "batch norm + ReLU": (
        lambda x, w, b: functional.batch_norm_act(x, None, None, w, b, training=True, act="relu"),
        lambda x, w, b: F.relu(F.batch_norm(x, None, None, w, b, training=True)),
    ),
    "group norm (32) + SiLU": (
        lambda x, w, b: functional.group_norm(x, 32, w, b, act="silu"),
        lambda x, w, b: F.silu(F.group_norm(x, 32, w, b)),
    ),
    "instance norm + leaky ReLU": (
        lambda x, w, b: functional.instance_norm(x, weight=w, bias=b, act="leaky_relu"),
        lambda x, w, b: F.leaky_relu(F.instance_norm(x, weight=w, bias=b)),
    ),
    "layer norm 2d": (functional.layer_norm_2d, stock_layer_norm_2d),
}


def results(function: Function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def rows() -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for name, (ours, stock) in CASES.items():
        for dtype in DTYPES:
            for mean, deviation in INPUTS:
                if (
                    dtype != torch.float32 and mean > 1
                ):  # half precision has no digits left for the deviation of such an input
                    continue
                for layout, memory_format in LAYOUTS.items():
                    values = [
                        (normal(*SHAPE) * deviation + mean).to(memory_format=memory_format),
                        1 + 0.2 * normal(SHAPE[1]),
                        0.2 * normal(SHAPE[1]),
                    ]
                    inputs = [t.to(dtype) for t in values]
                    grad = normal(*SHAPE).to(memory_format=memory_format, dtype=dtype)
                    # Near a kink, rounding decides the side, and both may have the full error there.
                    exact_inputs, exact_grad = [t.double() for t in inputs], grad.double()
                    before = results(stock, exact_inputs, exact_grad)[0]
                    near = before.abs() < (2e-2 if dtype != torch.float32 else 2e-3)
                    grad, exact_grad = (g.masked_fill(near, 0) for g in (grad, exact_grad))
                    exact = results(stock, exact_inputs, exact_grad)
                    cells = []
                    for own, plain, truth in zip(
                        results(ours, inputs, grad),
                        results(stock, inputs, grad),
                        exact,
                        strict=True,
                    ):
                        errors = [
                            ((t.double() - truth).abs().max() / truth.abs().max()).item()
                            for t in (own, plain)
                        ]
                        cells.append("{:.1e}, {:.1e}".format(*errors))
                    kind = f"{mean:g}, {deviation:g}"
                    yield " | ".join(
                        ["", name, str(dtype).removeprefix("torch."), layout, kind, *cells, ""]
                    ).strip()


# x, weight, dilation, groups
CONVOLUTIONS = (
    ((8, 64, 28, 28), (64, 64, 3, 3), 2, 1),
    ((8, 512, 14, 14), (128, 512, 1, 1), 1, 1),
    ((8, 512, 4, 4), (512, 512, 3, 3), 1, 1),  # few pixels: a kernel of this package
    ((8, 64, 28, 28), (64, 1, 3, 3), 4, 64),
)


def conv_rows() -> Iterator[str]:
    for shape, weight_shape, dilation, groups in CONVOLUTIONS:
        generator = torch.Generator().manual_seed(0)
        padding = dilation * (weight_shape[-1] - 1) // 2
        options = 1, padding, dilation, groups

        def ours(x: Tensor, w: Tensor, b: Tensor, options: tuple[int, ...] = options) -> Tensor:
            return functional.conv2d(x, w, b, *options, act="silu")

        def stock(x: Tensor, w: Tensor, b: Tensor, options: tuple[int, ...] = options) -> Tensor:
            return F.silu(F.conv2d(x, w, b, *options))

        sizes = shape, weight_shape, weight_shape[:1], (shape[0], weight_shape[0], *shape[2:])
        values = [torch.randn(*size, generator=generator) for size in sizes]
        values[1] = values[1] * math.prod(weight_shape[1:]) ** -0.5
        for dtype in DTYPES:
            for layout, memory_format in LAYOUTS.items():
                *inputs, grad = (
                    v.to(dtype).contiguous(memory_format=memory_format)
                    if v.dim() == 4
                    else v.to(dtype)
                    for v in values
                )
                exact = results(stock, [t.double() for t in inputs], grad.double())
                found = results(ours, inputs, grad), results(stock, inputs, grad)
                cells = []
                for own, plain, truth in zip(*found, exact, strict=True):
                    errors = [
                        ((t.double() - truth).abs().max() / truth.abs().max()).item()
                        for t in (own, plain)
                    ]
                    cells.append("{:.1e}, {:.1e}".format(*errors))
                kind = f"{'depthwise ' if groups > 1 else ''}{weight_shape[-1]}x{weight_shape[-1]}"
                kind += f", dilation {dilation}" if dilation > 1 else ""
                yield " | ".join(
                    [
                        "", kind, "x".join(map(str, shape)), str(dtype).removeprefix("torch."), layout,
                        *cells, "",
                    ]
                ).strip()  # fmt: skip


# Shape of x with as many output channels, its mean and deviation, the dilation. Inputs of mean 0.4 are as after ReLU.
WINOGRAD = (
    *((shape, 0.4, 0.58, 1) for shape in (
        (8, 32, 28, 28), (8, 64, 56, 56), (8, 128, 28, 28), (8, 192, 14, 14), (8, 256, 14, 14), (8, 512, 14, 14),
        (8, 512, 7, 7),
    )),
    *(((8, 64, 56, 56), 0.4, 0.58, dilation) for dilation in (2, 4, 12)),
    ((2, 512, 33, 33), 0.4, 0.58, 4),
    ((8, 64, 56, 56), 100.0, 1.0, 1),
    ((8, 256, 14, 14), 100.0, 1.0, 1),
)  # fmt: skip


def winograd_rows() -> Iterator[str]:
    """Errors over the deviation of the exact values, rms and largest, of the convolution alone."""
    for shape, mean, deviation, dilation in WINOGRAD:
        conv = Conv(padding=(dilation, dilation), dilation=(dilation, dilation))
        generator = torch.Generator().manual_seed(0)
        channels = shape[1]
        x = torch.randn(*shape, generator=generator) * deviation + mean
        weight = torch.randn(channels, channels, 3, 3, generator=generator)
        values = [x, weight * (9 * channels) ** -0.5]
        grad = torch.randn(*shape, generator=generator)

        stock = functools.partial(F.conv2d, padding=dilation, dilation=dilation)
        ours = functools.partial(functional.conv2d, padding=dilation, dilation=dilation)
        exact = results(stock, [t.double() for t in values], grad.double())
        for layout, memory_format in LAYOUTS.items():
            *inputs, dz = (t.contiguous(memory_format=memory_format) for t in (*values, grad))
            problems = (problem_of(d, inputs[0], inputs[1], conv) for d in WINOGRAD_DIRECTIONS)
            names = [choice.expected(p).name for p in problems]
            cells = []
            for name, own, plain, truth in zip(
                names, results(ours, inputs, dz), results(stock, inputs, dz), exact, strict=True
            ):
                errors = [(t.double() - truth) / truth.std() for t in (own, plain)]
                numbers = [
                    1e7 * n.item()
                    for e in errors
                    for n in (e.square().mean().sqrt(), e.abs().max())
                ]
                mark = "" if name == choice.WINOGRAD else " (" + name + ")"
                cells.append("{:.1f} / {:.0f}, {:.1f} / {:.0f}".format(*numbers) + mark)
            row = (
                "x".join(map(str, shape)),
                str(dilation),
                f"{mean:g}, {deviation:g}",
                layout,
                *cells,
            )
            yield f"| {' | '.join(row)} |"


# T, B, I, H
LSTM_SHAPES = ((100, 64, 256, 256), (1000, 4, 32, 64))


def lstm_rows() -> Iterator[str]:
    for shape in LSTM_SHAPES:
        steps, batch, features, hidden = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*size, generator=generator)

        sizes = ((4 * hidden, features), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        values = [
            normal(steps, batch, features),
            *(normal(*size) * hidden**-0.5 for size in sizes),
        ]
        grad = normal(steps, batch, hidden)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [t.to(dtype) for t in values]
            errors = []
            exact = results(stock_lstm, [t.double() for t in inputs], grad.to(dtype).double())
            for function in (fused_lstm, stock_lstm):
                found = results(function, inputs, grad.to(dtype))
                errors.append(
                    [
                        ((t.double() - truth).abs().max() / truth.abs().max()).item()
                        for t, truth in zip(found, exact, strict=True)
                    ]
                )
            cells = ["{:.1e}, {:.1e}".format(*pair) for pair in zip(*errors, strict=True)][:5]
            yield " | ".join(
                ["", "x".join(map(str, shape)), str(dtype).removeprefix("torch."), *cells, ""]
            ).strip()


def stock_lstm(x: Tensor, *weights: Tensor) -> Tensor:
    zeros = x.new_zeros(1, x.shape[1], weights[1].shape[1])
    return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, False)[0]


def fused_lstm(x: Tensor, *weights: Tensor) -> Tensor:
    return functional.lstm(x, None, weights, True, 1, 0.0, True, False)[0]


def main() -> None:
    shape, capability = "x".join(map(str, SHAPE)), torch.backends.cpu.get_cpu_capability()
    lines = [
        "# Accuracy",
        "",
        "`python tools/accuracy.py` writes this file; do not edit it. Each cell has two errors: that of `advdl_ops`,",
        "then that of stock PyTorch in the same dtype. An error is the largest difference from the fp64 result",
        f"divided by the largest fp64 value, for one random input of shape {shape} on the CPU (torch",
        f"{torch.__version__}, {capability}).",
        "The tests allow each op, dtype, layout and backend the error of stock plus a few units in the last place",
        "(`tests/support/accuracy.py`).",
        "",
        "| op | dtype | layout | mean, deviation of x | output | gradient of x | of weight | of bias |",
        "|---|---|---|---|---|---|---|---|",
        *rows(),
        "",
        "Convolution with bias and SiLU:",
        "",
        "| kernel | shape of x | dtype | layout | output | gradient of x | of weight | of bias |",
        "|---|---|---|---|---|---|---|---|",
        *conv_rows(),
        "",
        "Winograd's convolution, 3x3, fp32 (docs/kernels.md): rms and largest error over the deviation of the exact",
        "values, times 1e7; `advdl_ops`, then stock in the same layout. A name in brackets is that of the candidate",
        "that serves in its place. With AVX-512, stock is more exact for contiguous images than in channels_last;",
        "there the larger of the two errors is the limit.",
        "",
        "| shape of x | dilation | mean, deviation of x | layout | output | gradient of x | of weight |",
        "|---|---|---|---|---|---|---|",
        *winograd_rows(),
        "",
        "LSTM, one layer; steps, sequences, features and units:",
        "",
        "| shape | dtype | output | gradient of x | of w_ih | of w_hh | of the biases |",
        "|---|---|---|---|---|---|---|",
        *lstm_rows(),
    ]
    path = ROOT / "docs" / "accuracy.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    list(
        convergence_report.write_doc(environment.RESULTS)
    )  # the section on training, from its records
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
