"""The transposed convolution by its definition, in numpy's long double, and inputs to it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from support.accuracy import ACTIVATIONS

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

# name -> (C_in, C_out, kernel, options)
LAYERS = {
    "double": (4, 6, (2, 2), {"stride": 2}),
    "double-rounding": (4, 6, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1}),
    "overlapping": (4, 6, (4, 4), {"stride": 2, "padding": 1}),
    "plain": (4, 6, (3, 3), {}),
    "one": (4, 6, (1, 1), {"stride": 3, "output_padding": 2}),
    "dilation": (4, 6, (3, 2), {"stride": 2, "dilation": (2, 3), "padding": (1, 2)}),
    "wide": (4, 6, (2, 3), {"dilation": 3, "output_padding": (2, 0)}),
    "groups": (4, 6, (3, 3), {"stride": 2, "groups": 2}),
    "depthwise": (4, 4, (3, 3), {"stride": 2, "padding": 1, "output_padding": 1, "groups": 4}),
    "depthwise-wide": (4, 4, (2, 3), {"dilation": (3, 1), "output_padding": (2, 0), "groups": 4}),
    "multiplier": (4, 8, (3, 3), {"padding": 2, "groups": 4}),
    "uneven": (4, 6, (5, 2), {"stride": (3, 1), "padding": (2, 0), "output_padding": (2, 0)}),
}


def pair(value):
    return (value, value) if isinstance(value, int) else value


def make(name: str, dtype=f64, shape=(2, 5, 4), seed=0) -> dict[str, Tensor]:
    """x, weight and bias of a layer of :data:`LAYERS`; ``shape`` is (N, H, W)."""
    c_in, c_out, kernel, options = LAYERS[name]
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=f64).to(dtype)

    return {
        "x": normal(shape[0], c_in, *shape[1:]),
        "weight": normal(c_in, c_out // options.get("groups", 1), *kernel) / 2,
        "bias": normal(c_out),
    }


class Definition:
    """Adds every input value, times the kernel, to the output at the kernel's position, in long double."""

    def __init__(
        self, x, weight, bias, stride=1, padding=0, output_padding=0, groups=1, dilation=1
    ):
        self.x, self.weight, self.bias = (
            t.detach().double().numpy().astype(np.longdouble) for t in (x, weight, bias)
        )
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        self.groups = groups
        self.canvas = [
            (size - 1) * s + d * (k - 1) + 1 + more
            for size, s, d, k, more in zip(
                x.shape[2:],
                self.stride,
                self.dilation,
                weight.shape[2:],
                pair(output_padding),
                strict=True,
            )
        ]

    def taps(self):
        """Each kernel position, and the slice of the canvas to which it is added."""
        for k in np.ndindex(*self.weight.shape[2:]):
            yield (
                k,
                tuple(
                    slice(i * d, i * d + (size - 1) * s + 1, s)
                    for i, d, s, size in zip(
                        k, self.dilation, self.stride, self.x.shape[2:], strict=True
                    )
                ),
            )

    def split(self):
        """For each group, its slices of the input's and the output's channels."""
        c_in, c_out = self.weight.shape[0] // self.groups, self.weight.shape[1]
        for g in range(self.groups):
            yield slice(g * c_in, (g + 1) * c_in), slice(g * c_out, (g + 1) * c_out)

    def inside(self):
        return (..., *(slice(p, n - p) for p, n in zip(self.padding, self.canvas, strict=True)))

    def forward(self):
        canvas = np.zeros(
            (len(self.x), self.weight.shape[1] * self.groups, *self.canvas), np.longdouble
        )
        for (i, j), (rows, columns) in self.taps():
            for ins, outs in self.split():
                canvas[:, outs, rows, columns] += np.einsum(
                    "nchw,cd->ndhw", self.x[:, ins], self.weight[ins, :, i, j]
                )
        return canvas[self.inside()] + self.bias[:, None, None]

    def gradients(self, dz):
        canvas = np.zeros((*dz.shape[:2], *self.canvas), np.longdouble)
        canvas[self.inside()] = dz
        dx, dweight = np.zeros_like(self.x), np.zeros_like(self.weight)
        for (i, j), (rows, columns) in self.taps():
            for ins, outs in self.split():
                part = canvas[:, outs, rows, columns]
                dx[:, ins] += np.einsum("ndhw,cd->nchw", part, self.weight[ins, :, i, j])
                dweight[ins, :, i, j] += np.einsum("ndhw,nchw->cd", part, self.x[:, ins])
        return {"dx": dx, "dweight": dweight, "dbias": dz.sum((0, 2, 3))}


def as_tensor(a) -> Tensor:
    return torch.from_numpy(np.asarray(a).astype(np.float64))


def exactly(t: dict[str, Tensor], dout: Tensor | None, act="none", **options) -> dict[str, Tensor]:
    """Output and gradients of ``act(conv_transpose2d(x))`` in fp64; the activation's derivative is torch's in fp64."""
    d = Definition(**t, **options)
    z = as_tensor(d.forward()).requires_grad_()
    out = ACTIVATIONS[act][1](z)
    found = {"out": out.detach()}
    if dout is not None:
        dz = torch.autograd.grad(out, z, dout.double())[0].numpy().astype(np.longdouble)
        found |= {name: as_tensor(a) for name, a in d.gradients(dz).items()}
    return found


def term_sizes(t: dict[str, Tensor], dout: Tensor, **options) -> dict[str, float]:
    """The sizes of the terms of each result: the same computation with all terms positive."""
    d = Definition(**{name: v.abs() for name, v in t.items()}, **options)
    z = d.forward()
    # The rounding error of z enters the derivative of the activation.
    dz = dout.double().abs().numpy() * (1 + z)
    sizes = {"out": z, **d.gradients(dz)}
    return {name: float(a.max()) if a.size else 0.0 for name, a in sizes.items()}


def same(z: Tensor) -> Tensor:
    return z


def collect(function, t: dict[str, Tensor], dout: Tensor, then=same, /, **options):
    """Output and gradients of ``then(function(x, weight, bias, **options))``."""
    leaves = {name: v.detach().requires_grad_() for name, v in t.items()}
    out = then(function(*leaves.values(), **options))
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {
        "out": out.detach(),
        **{f"d{name}": g for name, g in zip(leaves, grads, strict=True)},
    }
