"""Small networks at each level of lean training, and the comparison with the same network without a level."""

import contextlib
import copy
import gc
from unittest import mock

import torch

from advdl_ops import models, nn, set_lean
from advdl_ops._lean import LEVELS, recipes
from advdl_ops.models._layers import Layers
from benchmarks import memory

__all__ = [
    "LEVELS",
    "assert_same_bits",
    "assert_same_values",
    "counted",
    "differing",
    "held_after",
    "leaned",
    "step",
    "tiny_net",
]


def tiny_net(kind=models.Bottleneck, blocks=2, width=8, classes=3, norm=nn.BatchNormAct2d):
    """Two stages of residual blocks behind a stem with max-pooling: each kind of recipe occurs."""
    layers = [nn.ConvBNAct(3, width, 3, act="relu"), torch.nn.MaxPool2d(3, 2, 1)]
    channels = width
    for stage in range(2):
        inner = width << stage
        for index in range(blocks):
            stride = 2 if stage > index == 0 else 1
            out, downsample = inner * kind.expansion, None
            if stride != 1 or channels != out:
                conv = nn.Conv2d(channels, out, 1, stride, bias=False)
                downsample = Layers(conv, norm(out))
            layers.append(kind(channels, inner, stride, downsample, 1, 64, 1, norm))
            channels = out
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, classes)
    return torch.nn.Sequential(*layers, *head)


def leaned(model, lean):
    """A copy at a level."""
    return set_lean(copy.deepcopy(model), lean)


def held_after(call):
    """Bytes that a call leaves allocated while its result is alive; in half of the time of `held_and_peak`."""
    gc.collect()  # what others left is not freed in the call
    return memory._profiled(call)[0]


def tensors_of(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values for t in tensors_of(value)]


def step(model, x, forward=None, backward=torch.Tensor.backward):
    """The values of one step of training by name: outputs, gradients of the input and the parameters, buffers."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(1)  # of dropout
    outputs = tensors_of((forward or model)(x))
    backward(sum(out.float().square().mean() + out.sum() for out in outputs))
    values = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    values["random number"] = torch.rand(())
    values["gradient of the input"] = x.grad
    values |= {f"gradient of {key}": p.grad for key, p in model.named_parameters()}
    values |= {key: buffer.clone() for key, buffer in model.named_buffers()}
    return values


def differing(found, expected):
    """The names of the values that are not equal to the last bit."""
    assert found.keys() == expected.keys()
    return [
        key
        for key, value in expected.items()
        if (found[key] is None) != (value is None)
        or (value is not None and not _same(found[key], value))
    ]


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)


def assert_same_values(found, expected, what=None):
    assert not differing(found, expected), what
    assert all(value is None or value.isfinite().all() for value in expected.values()), what


@contextlib.contextmanager
def counted():
    """A list, to which each tensor that is made again adds its kind."""
    made = []
    original = recipes.Recipe._make

    def make(recipe):
        made.append(recipe.kind)
        return original(recipe)

    with mock.patch.object(recipes.Recipe, "_make", make):
        yield made


def assert_same_bits(model, x, *, levels=LEVELS, steps=1, context=contextlib.nullcontext):
    """At each level, the values of ``steps`` steps must be those of the model without a level, to the last bit.

    Returns the kinds of what each level made again: a level that does nothing would pass.
    """
    torch.manual_seed(0)
    plain = copy.deepcopy(model)
    with context():
        expected = [step(plain, x) for _ in range(steps)]
    kinds = {}
    for level in levels:
        lean = leaned(model, level)
        with counted() as made, context():
            for turn in range(steps):
                assert_same_values(step(lean, x), expected[turn], (level, turn))
        assert made, f"{level} made nothing again"
        kinds[str(level)] = made
    return kinds
