"""Tests that every model of the zoo must pass. Subclass `ModelTester`, fill in its attributes, and pytest runs them.

class TestUNet(ModelTester):
    name = "unet"
    input_shape = (2, 3, 32, 32)
    odd_shapes = ((1, 3, 33, 47),)

    def output_shape(self, shape):
        return (shape[0], 5, *shape[2:])
"""

import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import pytest
import torch

from advdl_ops import models


def recorded_calls(monkeypatch):
    """Convolution, norm, residual and activation of every pair that a model runs as one op from now on."""
    calls = []
    module = importlib.import_module("advdl_ops.nn.run_as_one")
    original = module.conv_bn_act

    def recorded(conv, bn, x, residual=None, *, act=None):
        calls.append((conv, bn, residual, act))
        return original(conv, bn, x, residual, act=act)

    monkeypatch.setattr(module, "conv_bn_act", recorded)
    return calls


def randomize(model, seed=0):
    """Random parameters and running statistics, with a scale that preserves the signal in deep networks.

    In a new model every mean is 0 and every variance and norm weight is 1, so that swapped statistics would not be
    noticed.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (values * (high - low) + low).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm):
                module.weight.copy_(uniform(module.weight, 0.3, 0.7))
                module.bias.copy_(uniform(module.bias, -0.3, 0.3))
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.copy_(uniform(module.running_mean, -0.2, 0.2))
                module.running_var.copy_(uniform(module.running_var, 0.5, 1.5))
                module.num_batches_tracked.fill_(7)
            if isinstance(module, torch.nn.Embedding):
                module.weight.copy_(uniform(module.weight, -1, 1))
    return model


def random_input(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(actual, expected):
    """Largest difference over the largest expected magnitude."""
    scale = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return ((actual.double() - expected.double()).abs().max() / scale).item()


def check_compiled(model, x, backend, scores=lambda output: output):
    """Compares the compiled model with the model: outputs, gradients, statistics, in train and eval mode.

    Call it in fp64, where no tolerance is needed for the growth of rounding errors in a deep network.
    """
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for train in (True, False):
        model.train(train), compiled.train(train)
        model.zero_grad(), compiled.zero_grad()
        expected, out = scores(model(x)), scores(compiled(x))
        assert relative_error(out.detach(), expected.detach()) < 1e-9
        expected.square().sum().backward()
        out.square().sum().backward()
        for (key, p), twin in zip(model.named_parameters(), compiled.parameters(), strict=True):
            assert relative_error(twin.grad, p.grad) < 1e-6, key
    for (key, value), twin in zip(model.named_buffers(), compiled.buffers(), strict=True):
        assert relative_error(twin, value) < 1e-9, key
    with torch.no_grad():
        assert relative_error(scores(compiled(x)), scores(model(x))) < 1e-9


class ModelTester:
    name: str
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    input_shape = (2, 3, 40, 40)
    odd_shapes = ((1, 3, 33, 47), (2, 3, 1, 1), (1, 3, 7, 50))
    num_classes = 5

    def output_shape(self, shape):
        """Shape of the output for an input of this shape. By default that of a classifier."""
        return (shape[0], self.num_classes)

    def make(self, dtype=torch.float64, **options):
        torch.manual_seed(0)
        model = models.create_model(
            self.name, num_classes=self.num_classes, **{**self.options, **options}
        )
        return randomize(model).to(dtype)

    def scores(self, output):
        """The tensor to compare if the output is not a tensor."""
        return output

    def input(self, dtype=torch.float64, shape=None):
        return random_input(shape or self.input_shape, dtype)

    @pytest.fixture
    def model(self):
        return self.make()

    def test_listed(self):
        assert self.name in models.list_models()

    def test_shape(self, model):
        out = self.scores(model(self.input()))
        assert out.shape == self.output_shape(self.input_shape)
        assert out.isfinite().all()

    def test_odd_sizes(self, model):
        model.eval()
        for shape in self.odd_shapes:
            with torch.no_grad():
                out = self.scores(model(self.input(shape=shape)))
            assert out.shape == self.output_shape(shape)
            assert out.isfinite().all()

    def test_batch_one_in_eval_is_a_row_of_the_batch(self, model):
        x = self.input()
        model.eval()
        with torch.no_grad():
            whole = self.scores(model(x))
            for row in range(x.shape[0]):
                alone = self.scores(model(x[row : row + 1]))
                assert relative_error(alone, whole[row : row + 1]) < 1e-10

    def test_eval_without_gradients_equals_eval_with(self, model):
        # Without gradients the norms are folded into the convolutions.
        model.eval()
        x = self.input()
        with torch.no_grad():
            folded = self.scores(model(x))
        expected = self.scores(model(x))
        assert expected.requires_grad
        assert not folded.requires_grad
        assert relative_error(folded, expected.detach()) < 1e-10

    def test_folding_sees_new_weights(self, model):
        x = self.input()
        model.eval()
        with torch.no_grad():
            before = self.scores(model(x))
        fresh = randomize(self.make(), seed=1).eval()
        model.load_state_dict(fresh.state_dict())
        with torch.no_grad():
            expected = self.scores(fresh(x))
            assert relative_error(self.scores(model(x)), expected) < 1e-12
            assert relative_error(before, expected) > 1e-3
        # One training step changes parameters and statistics.
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.scores(model(x)).square().mean().backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            folded = self.scores(model(x))
        assert relative_error(folded, self.scores(model(x)).detach()) < 1e-10

    def test_gradient_for_every_parameter(self, model):
        x = self.input().requires_grad_()
        self.scores(model(x)).square().sum().backward()
        for name, parameter in [*model.named_parameters(), ("input", x)]:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name

    def test_state_dict_round_trip(self, model):
        model(self.input())  # statistics of its own
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = randomize(self.make(), seed=1)
        other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        for key, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), key
        model.eval(), other.eval()
        with torch.no_grad():
            expected = self.scores(model(self.input()))
            assert torch.equal(self.scores(other(self.input())), expected)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies(self, model, how):
        x = self.input()
        model.eval()
        with torch.no_grad():
            # Caches of eval mode must not interfere.
            expected = self.scores(model(x))
            other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
            assert torch.equal(self.scores(other(x)), expected)
            for parameter in other.parameters():
                parameter.zero_()
            assert torch.equal(self.scores(model(x)), expected)
        # A copy trains and does not change the original.
        other = copy.deepcopy(model).train()
        self.scores(other(x)).square().sum().backward()
        assert all(p.grad is not None for p in other.parameters())
        assert all(p.grad is None for p in model.parameters())

    def test_channels_last(self, model):
        x = self.input()
        for train in (True, False):
            expected = self.scores(copy.deepcopy(model).train(train)(x))
            other = copy.deepcopy(model).train(train).to(memory_format=torch.channels_last)
            out = self.scores(other(x.contiguous(memory_format=torch.channels_last)))
            assert relative_error(out.detach(), expected.detach()) < 1e-9

    def test_autocast(self):
        model = self.make(torch.float32)
        x = self.input(torch.float32)
        for train in (True, False):
            model.train(train)
            expected = self.scores(copy.deepcopy(model).double()(self.input())).detach()
            with torch.autocast("cpu", torch.bfloat16):
                out = self.scores(model(x))
            assert out.dtype == torch.bfloat16
            assert out.isfinite().all()
            if not train:  # statistics of a small batch magnify the rounding of bf16
                assert relative_error(out.detach(), expected) < 0.1
            out.float().square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.isfinite().all(), name
        model.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert relative_error(self.scores(model(x)), expected) < 0.1

    def test_double_backward(self, model):
        x = self.input().requires_grad_()
        out = self.scores(model(x))
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        assert x.grad.isfinite().all()
        assert x.grad.abs().max() > 0

    def test_compile(self, model):
        # Inductor's own C++ takes minutes for a whole network; fullgraph fails with any backend alike.
        check_compiled(model, self.input(), "aot_eager", self.scores)

    def test_export(self, model):
        model.eval()
        x = self.input()
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        for node in program.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                assert node.target.namespace == "aten", node.target
        for batch in (x, self.input(shape=(3, *self.input_shape[1:]))):
            with torch.no_grad():
                out = self.scores(program.module()(batch))
                assert relative_error(out, self.scores(model(batch))) < 1e-10

    def test_repr_and_functional_call(self, model):
        assert type(model).__name__ in repr(model)
        model.eval()
        other = randomize(self.make(), seed=1).eval()
        x = self.input()
        with torch.no_grad():
            model(x)  # fills the caches of eval mode; the weights passed below must still be used
            out = self.scores(torch.func.functional_call(model, dict(other.state_dict()), (x,)))
            assert relative_error(out, self.scores(other(x))) < 1e-12

    def test_input_stays(self, model):
        x = self.input()
        kept = x.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.scores(model(x)).sum().backward()
            with torch.no_grad():
                model.eval()(x)
        assert torch.equal(x, kept)


class ImageTester(ModelTester):
    """Models whose output has the input's height and width."""

    def output_shape(self, shape):
        return (shape[0], self.num_classes, *shape[2:])


def assert_same(model, reference, shape, train):
    """Output, every gradient and every buffer in fp64."""
    results = []
    for each in (model, reference):
        each.double().train(train)
        x = random_input(shape).requires_grad_()
        out = each(x)
        out.backward(random_input(out.shape, seed=1))
        gradients = {key: p.grad for key, p in each.named_parameters()}
        results.append(
            {"out": out.detach(), "x": x.grad, **gradients, **dict(each.named_buffers())}
        )
    found, expected = results
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] is not None, key
        assert relative_error(found[key], value) < 1e-9, key
    model.eval(), reference.eval()
    x = random_input(shape)
    with torch.no_grad():  # folded
        assert relative_error(model(x), reference(x)) < 1e-10


def group_norms(module):
    """Every BatchNorm2d in `module` replaced by torch's group norm."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.BatchNorm2d):
            groups = min(32, child.num_features)
            setattr(module, name, torch.nn.GroupNorm(groups, child.num_features))
        else:
            group_norms(child)
    return module


def check_export(model, sizes, least, scores=lambda out: out):
    """An exported network must give the same scores for images of all ``sizes``, each at least ``least``."""
    rows, columns = (torch.export.Dim(name, min=least, max=256) for name in ("rows", "columns"))
    program = torch.export.export(
        model, (random_input((2, 3, 13, 18)),), dynamic_shapes=({2: rows, 3: columns},)
    )
    for size in sizes:
        x = random_input((2, 3, *size))
        with torch.no_grad():
            assert relative_error(scores(program.module()(x)), scores(model(x))) < 1e-10


def assert_same_state(model, reference, steps):
    """The states must be equal. The statistics have counted 7 batches before, and ``steps`` more."""
    expected = reference.state_dict()
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            assert relative_error(value, expected[key]) < 1e-8, key
        else:
            assert value.item() == expected[key].item() == 7 + steps, key


def assert_refused(model, x, error, message):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        model(x)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def check_no_images(model):
    for x in (None, [[1.0]]):
        name = type(x).__name__
        assert_refused(model, x, TypeError, rf"^{model.name}: input \({name}\) must be a Tensor$")
    for shape in ((2, 3, 0, 32), (1, 3, 32, 0), (2, 3, 0, 0)):
        message = rf"^{model.name}: input shape .* must have a pixel at least$"
        assert_refused(model, torch.zeros(shape), ValueError, message)
