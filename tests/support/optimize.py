"""What tests of optimize() compare: a model against what it was, over steps of training and in evaluation."""

import torch
from torch import nn as stock

import advdl_ops


def counts(model):
    found = advdl_ops.explain(model, as_dict=True)
    return tuple(len(found[name]) for name in ("fused", "replaced", "left"))


def scores(output):
    """Of a model's outputs the one that is trained."""
    if isinstance(output, dict):
        output = output["out"]
    return output[0] if isinstance(output, tuple) else output


def same(a, b, tolerance=1e-9):
    scale = b.abs().max().clamp_min(1e-6)
    assert (a - b).abs().max() <= tolerance * scale


def randomized(model):
    """Statistics and affine parameters of every norm away from 0 and 1."""
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
    """Output, every gradient and all statistics over some steps of SGD, then evaluation, with and without gradients."""
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
                # Some are sums of nothing but rounding errors.
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
