"""Hooks see what they see in stock: as many calls, the same values, the same memory format."""

import copy

import pytest
import torch
from support.torchvision_stub import torchvision_models
from torch import nn as stock
from torch.nn.modules import module as registries

import advdl_ops
from advdl_ops import _memory_format, models

stocks = torchvision_models()

f64 = torch.float64


class Blocks(stock.Module):
    """Every kind of group that is fused, with activations as modules."""

    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = stock.Conv2d(3, 8, 3, padding=1), stock.ReLU()
        self.conv2, self.norm2, self.act2 = (
            stock.Conv2d(8, 8, 3),
            stock.BatchNorm2d(8),
            stock.ReLU(),
        )
        self.norm3, self.act3 = stock.GroupNorm(2, 8), stock.SiLU()
        self.up, self.act4 = stock.ConvTranspose2d(8, 4, 2, 2), stock.LeakyReLU()
        self.conv5, self.norm5, self.act5 = (
            stock.Conv2d(4, 4, 1),
            stock.BatchNorm2d(4),
            stock.ReLU(),
        )

    def forward(self, x):
        x = self.act1(self.conv1(x))
        x = self.act2(self.norm2(self.conv2(x)))
        x = self.act3(self.norm3(x))
        x = self.act4(self.up(x))
        return self.act5(self.norm5(self.conv5(x)) + x)


def paired(make, dtype=f64):
    torch.manual_seed(0)
    model = make().to(dtype)
    return model, advdl_ops.optimize(copy.deepcopy(model))


MODELS = {
    "blocks": (lambda: paired(Blocks), (2, 3, 9, 9)),
    "resnet18": (
        lambda: paired(lambda: stocks.resnet18(num_classes=5)),
        (2, 3, 33, 33),
    ),
}


def zoo(name):
    torch.manual_seed(0)
    original = getattr(stocks, name)(num_classes=5).to(f64)
    ours = models.create_model(name, num_classes=5).to(f64)
    ours.load_state_dict(original.state_dict())
    return original, ours


MODELS["zoo resnet18"] = (lambda: zoo("resnet18"), (2, 3, 33, 33))
MODELS["zoo resnet50"] = (lambda: zoo("resnet50"), (2, 3, 33, 33))


def names_of(model):
    return {id(module): name for name, module in model.named_modules()}


def seen_globally(model, x):
    """What hooks for every module see: names, values and strides, forward and backward."""
    names, seen = names_of(model), []

    def note(kind, tensors):
        def hook(module, *args):
            if id(module) not in names:
                return
            for t in args[-1] if isinstance(args[-1], tuple) else (args[-1],):
                if isinstance(t, torch.Tensor):
                    seen.append((kind, names[id(module)], t.detach().clone(), t.stride()))

        return hook

    handles = [
        registries.register_module_forward_pre_hook(note("pre", 0)),
        registries.register_module_forward_hook(note("forward", 1)),
    ]
    if isinstance(
        model, Blocks
    ):  # torch refuses them where a layer's output is written, as in ResNet
        handles.append(registries.register_module_full_backward_hook(note("backward", 1)))
    try:
        out = model(x)
        if out.requires_grad:
            out.square().sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["training", "gradients", "inference"])
@pytest.mark.parametrize("name", MODELS)
def test_global_hooks(name, mode):
    make, shape = MODELS[name]
    original, ours = make()
    x = torch.randn(shape, dtype=f64)
    found = []
    for model in (original, ours):
        model.train(mode == "training")
        with torch.set_grad_enabled(mode != "inference"):
            found.append(seen_globally(model, x.clone()))
    expected, seen = ({} for _ in range(2))
    for calls, into in zip(found, (expected, seen), strict=True):
        for kind, module, value, strides in calls:
            into.setdefault((kind, module), []).append((value, strides))
    assert set(expected) == set(seen)
    for key, calls in expected.items():
        assert len(calls) == len(seen[key]), key
        for (value, strides), (own, own_strides) in zip(calls, seen[key], strict=True):
            assert strides == own_strides, key
            torch.testing.assert_close(own, value, rtol=1e-8, atol=1e-10, msg=str(key))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.extra] if name == "zoo resnet50" else [])
        for name in MODELS
    ],
)
def test_a_hook_on_each_module_in_turn(name, training):
    """Registered after ``optimize``: the number of calls, the output and its strides."""
    make, shape = MODELS[name]
    original, ours = make()
    x = torch.randn(shape, dtype=f64)
    for module_name, _ in original.named_modules():
        if not module_name:
            continue
        seen = []
        for model in (original, ours):
            model.train(training)
            calls = []
            handle = model.get_submodule(module_name).register_forward_hook(
                lambda _, __, out, calls=calls: calls.append((out.detach().clone(), out.stride()))
            )
            model(x)
            handle.remove()
            seen.append(calls)
        expected, found = seen
        assert len(found) == len(expected), module_name
        for (value, strides), (own, own_strides) in zip(expected, found, strict=True):
            assert own_strides == strides, module_name
            torch.testing.assert_close(own, value, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("stage", ["layer2", "layer4"])
def test_gradcam_reads_contiguous_features(stage, when):
    """A hook that flattens features and their gradient by ``view``, as Grad-CAM's code does."""
    torch.manual_seed(0)
    model = stocks.resnet18(num_classes=5)
    sizes = []

    def watch(net):
        layer = net.get_submodule(stage)
        layer.register_forward_hook(lambda _, __, out: sizes.append(out.view(len(out), -1).shape))
        layer.register_full_backward_hook(
            lambda _, __, grads: sizes.append(grads[0].view(len(grads[0]), -1).shape)
        )

    if when == "before":
        watch(model)
    fast = advdl_ops.optimize(model)
    if when == "after":
        watch(fast)
    ours = models.resnet18(num_classes=5)
    watch(ours)
    for net in (fast, ours):
        sizes.clear()
        net.eval()
        net(torch.randn(2, 3, 64, 64))[:, 1].sum().backward()
        assert len(sizes) == 2, net


def test_unwatched_models_are_fast_again():
    """Removing the hooks brings channels_last back. A hook on the model itself does not prevent it."""
    fast = advdl_ops.optimize(stocks.resnet18(num_classes=5)).eval()
    x = torch.randn(1, 3, 64, 64)
    assert _memory_format.runs_in_channels_last(fast, x)
    handle = fast.layer1[0].register_forward_hook(lambda *_: None)
    assert not _memory_format.runs_in_channels_last(fast, x)
    handle.remove()
    assert _memory_format.runs_in_channels_last(fast, x)
    handle = fast.register_forward_hook(lambda *_: None)  # it sees the model's output alone
    assert _memory_format.runs_in_channels_last(fast, x)
    handle.remove()
