"""Comparisons for tests of optimize(): a model against the original, over training steps and in evaluation."""

import math

import torch
from torch import nn as stock

import advdl_ops


def counts(model):
    found = advdl_ops.explain(model, as_dict=True)
    return tuple(len(found[name]) for name in ("fused", "replaced", "left"))


def scores(output):
    """The output of a model that is trained."""
    if isinstance(output, dict):
        output = output["out"]
    return output[0] if isinstance(output, tuple) else output


def same(a, b, tolerance=1e-9):
    scale = b.abs().max().clamp_min(1e-6)
    assert (a - b).abs().max() <= tolerance * scale


def randomized(model):
    """Sets statistics and affine parameters of every norm to values other than 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for t, low in (
                (layer.weight, 0.5),
                (layer.bias, -0.2),
                (layer.running_mean, -0.2),
                (layer.running_var, 0.5),
            ):
                if t is not None:
                    t.data.uniform_(low, low + 1.0, generator=generator)
    return model


def check_as(reference, model, x, steps=2):
    """Compares outputs, gradients and statistics over some steps of SGD, then evaluation with and without gradients."""
    networks = reference, model
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in networks]
    for network in networks:
        network.train()
    for _ in range(steps):
        outputs = []
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(0)  # dropout
            out = scores(network(x))
            out.square().mean().backward()
            outputs.append(out.detach())
        same(outputs[1], outputs[0])
        gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
        largest = max(g.abs().max() for g in gradients.values())
        for name, p in model.named_parameters():
            assert (p.grad is None) == (name not in gradients), name
            if p.grad is not None:
                expected = gradients[name]
                # Some gradients are only sums of rounding errors.
                error = (p.grad - expected).abs().max()
                assert error <= 1e-8 * expected.abs().max() + 1e-12 * largest, name
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        same(a.double(), b.double())
    for network in networks:
        network.eval()
    expected = scores(reference(x)).detach()
    same(scores(model(x)).detach(), expected)
    with torch.no_grad():
        found = scores(model(x))
    same(found, expected)
    assert found.is_contiguous() == expected.is_contiguous()


class Block(stock.Module):
    """A residual block over any norm and activation."""

    def __init__(self, norm, act, channels=8):
        super().__init__()
        self.conv1 = stock.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.act = act
        self.conv2 = stock.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        return self.act(x + self.norm2(self.conv2(y)))


X = torch.randn(2, 8, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(kind):
    return kind(stock.BatchNorm2d, stock.ReLU()).double()


def group_norm(channels):
    return stock.GroupNorm(2, channels)


class Counting(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(self.norm1(self.conv1(x)))


class Holds(Block):
    """A block that also stores its layers under other names, and a method."""

    def __init__(self, *args):
        super().__init__(*args)
        self.layers = [self.conv1, self.norm1]
        object.__setattr__(self, "last", self.norm2)
        self.run = self.body

    def body(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(self.conv2(x))

    def forward(self, x):
        return self.run(x) if x.sum() > 0 else self.run(-x)


class Chain(stock.Module):
    """Two convolutions and something between them."""

    def __init__(self, between):
        super().__init__()
        self.first = stock.Conv2d(8, 8, 3)
        self.between = between
        self.last = stock.Conv2d(8, 8, 3)

    def forward(self, x, *, y=None):
        x = self.last(self.between(self.first(x)))
        return {"x": x, "y": y, "rows": x.flatten(2)}  # y is returned unchanged


def branches(source):
    """A layer whose forward has control flow on values, followed by ``source``."""
    scope = {
        "torch": torch,
        "stock": stock,
        "users": torch.autograd.Function.apply,
        "F": torch.nn.functional,
        "math": math,
        "same": same,
    }
    text = "".join(f"    {line}\n" for line in ("if x.sum() > 1e9: x = -x", *source.split("; ")))
    exec(f"def forward(self, x):\n{text}    return x\n", scope)
    return type("Branches", (stock.Module,), {"forward": scope["forward"], "helps": abs})()


def formats_of_last(fast):
    seen = []
    fast.last.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].is_contiguous(memory_format=torch.channels_last)) and None
    )
    return seen


class Noise(stock.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


BLOCKS = {
    "batch norm, relu": (stock.BatchNorm2d, stock.ReLU(inplace=True), 2),
    "batch norm, silu": (stock.BatchNorm2d, stock.SiLU(), 2),
    "batch norm, relu6": (stock.BatchNorm2d, stock.ReLU6(), 2),
    "group norm, silu": (group_norm, stock.SiLU(), 2),
    "instance norm, leaky relu": (stock.InstanceNorm2d, stock.LeakyReLU(0.2), 2),
}


class ByMode(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if self.training else 2 * y


class AsksForTuple(Block):
    def forward(self, x):
        if isinstance(x, tuple):
            x = torch.cat(x, 1)
        return self.act(self.norm1(self.conv1(x)))
