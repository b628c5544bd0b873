"""optimize(): models of torchvision and small ones of every kind against what they were, in fp64."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch import nn as stock
from torchvision_stub import torchvision_models

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")

theirs = torchvision_models()

# Groups that run as one op, layers converted alone, layers left.
COUNTS = {
    "resnet18": (20, 0, 0),
    "resnet50": (53, 0, 0),
    "resnext50_32x4d": (53, 0, 0),
    "vgg11_bn": (8, 0, 0),
    "squeezenet1_0": (26, 0, 0),
    "mobilenet_v2": (52, 0, 0),
    "mnasnet0_5": (52, 0, 0),
    "shufflenet_v2_x0_5": (56, 0, 0),
    "regnet_y_400mf": (85, 0, 0),
    "mobilenet_v3_small": (43, 9, 0),
    "efficientnet_b0": (81, 0, 0),
}
SLOW = {
    "resnet34": (36, 0, 0),
    "resnet101": (104, 0, 0),
    "wide_resnet50_2": (53, 0, 0),
    "densenet121": (4, 236, 0),
    "vgg16_bn": (13, 0, 0),
    "convnext_tiny": (0, 22, 0),
}


def counts(model):
    found = advdl_ops.explain(model, as_dict=True)
    return tuple(len(found[name]) for name in ("fused", "replaced", "left"))


def first(output):
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
        if isinstance(layer, stock.BatchNorm2d):
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
            out = first(network(x))
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
    expected = first(reference(x)).detach()
    same(first(model(x)).detach(), expected)
    with torch.no_grad():
        same(first(model(x)), expected)


def check_model(name, expected):
    torch.manual_seed(0)
    model = randomized(getattr(theirs, name)(num_classes=5)).double()
    twin = copy.deepcopy(model)
    fast = advdl_ops.optimize(model)
    assert counts(fast) == expected
    assert list(fast.state_dict()) == list(twin.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    check_as(twin, fast, x)
    # The given tree works as before, on the same parameters.
    same(first(model.eval()(x)).detach(), first(twin(x)).detach())


@pytest.mark.parametrize("name", COUNTS)
def test_torchvision(name):
    check_model(name, COUNTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_of_torchvision(name):
    check_model(name, SLOW[name])


def test_groups_of_resnet50_with_their_activations():
    fused = advdl_ops.explain(advdl_ops.optimize(theirs.resnet50()), as_dict=True)["fused"]
    assert sum(names.endswith("relu") for names in fused) == 49
    assert sum(names.endswith("add + relu") for names in fused) == 16
    assert "layer1.0.conv3 + bn3 + add + relu" in fused
    assert "layer1.0.downsample.0 + 1" in fused


# ---- small models ----


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


def group_norm(channels):
    return stock.GroupNorm(2, channels)


BLOCKS = {
    "batch norm, relu": (stock.BatchNorm2d, stock.ReLU(inplace=True), 2),
    "batch norm, silu": (stock.BatchNorm2d, stock.SiLU(), 2),
    "batch norm, relu6": (stock.BatchNorm2d, stock.ReLU6(), 2),
    "group norm, silu": (group_norm, stock.SiLU(), 2),
    "instance norm, leaky relu": (stock.InstanceNorm2d, stock.LeakyReLU(0.2), 2),
}
X = torch.randn(2, 8, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, inplace):
    norm, act, groups = BLOCKS[name]
    block = Block(norm, act).double()
    twin = copy.deepcopy(block)
    fast = advdl_ops.optimize(block, inplace=inplace)
    assert (fast is block) == inplace
    assert len(advdl_ops.explain(fast, as_dict=True)["fused"]) == groups
    check_as(twin, fast, X)
    assert isinstance(fast, Block)


@pytest.mark.parametrize("name", BLOCKS)
def test_restore(name):
    norm, act, _ = BLOCKS[name]
    block = Block(norm, act).double()
    classes = [type(layer) for layer in block.modules()]
    attributes = [set(vars(layer)) for layer in block.modules()]
    fast = advdl_ops.restore(advdl_ops.optimize(block))
    assert [type(layer) for layer in fast.modules()] == classes
    assert [set(vars(layer)) for layer in fast.modules()] == attributes
    assert [type(layer) for layer in block.modules()] == classes
    check_as(copy.deepcopy(block), fast, X)


def test_without_fusion():
    fast = advdl_ops.optimize(Block(stock.BatchNorm2d, stock.ReLU()), fuse=False)
    assert counts(fast) == (0, 4, 0)
    assert type(fast) is Block


class NamesTorch(Block):
    """Its fused forward has the module `torch` among its names."""

    def forward(self, x):
        return torch.flatten(self.act(self.norm1(self.conv1(x))), 1)


@pytest.mark.parametrize("kind", [Block, NamesTorch])
def test_copies_and_pickles(kind):
    block = kind(stock.BatchNorm2d, stock.ReLU()).double()
    twin = copy.deepcopy(block)
    fast = advdl_ops.optimize(block)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ):
        assert counts(other) == counts(fast)
        check_as(copy.deepcopy(twin), other, X)


def test_compiled_whole():
    block = stock.Sequential(
        Block(stock.BatchNorm2d, stock.ReLU()), Block(group_norm, stock.SiLU())
    ).double()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    same(compiled(X), twin(X))
    with torch.no_grad():
        same(compiled.eval()(X), twin.eval()(X))


def test_a_layer_in_two_places_is_not_fused():
    block = Block(stock.BatchNorm2d, stock.ReLU()).double()
    block.norm2 = block.norm1
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (0, 3, 0)
    check_as(twin, fast, X)


def test_hooks_are_called():
    block, called = Block(stock.BatchNorm2d, stock.ReLU()).double(), []
    block.norm1.register_forward_hook(lambda *_: called.append("norm1"))
    block.register_forward_hook(lambda *_: called.append("block"))
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    # conv1 alone has nothing to be fused with; conv2, norm2, addition and relu have.
    assert counts(fast) == (1, 2, 0)
    check_as(twin, fast, X)
    called.clear()
    fast(X)
    assert called == ["norm1", "block"]


def test_what_is_left_and_why():
    class Own(stock.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = stock.Sequential(
        Own(8, 8, 1), stock.Conv2d(8, 8, 1), stock.Conv2d(8, 8, 1), stock.Conv2d(8, 8, 1)
    ).double()
    stock.utils.parametrizations.weight_norm(model[1])
    stock.utils.prune.l1_unstructured(model[2], "weight", 0.5)
    model[3].forward = lambda x: x
    expected, fast = model(X), advdl_ops.optimize(model)
    left = advdl_ops.explain(fast, as_dict=True)["left"]
    assert left.keys() == {"0", "1", "2", "3"}
    for name, why in zip(
        "0123", ("class of its own", "parametrized", "pruned", "replaced"), strict=True
    ):
        assert why in left[name]
    assert "left as it was: 2: its weight is no parameter" in str(advdl_ops.explain(fast))
    same(fast(X), expected)


class ByMode(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if self.training else 2 * y


class Optional(Block):
    def forward(self, x, scale=None):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if scale is None else scale * y


class OfValues(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if x.sum() > 0 else -y


class Counting(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(self.norm1(self.conv1(x)))


@pytest.mark.parametrize("kind", [ByMode, Optional, OfValues])
def test_what_depends_on_more_than_the_input_keeps_its_forward(kind):
    block = kind(stock.BatchNorm2d, stock.ReLU()).double()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (0, 4, 0) and type(fast) is kind
    check_as(twin, fast, X)


def test_tracing_leaves_the_model_as_it_is():
    block = Counting(stock.BatchNorm2d, stock.ReLU()).eval()
    advdl_ops.optimize(block)
    assert block.calls == 0 and not block.training


class AddsToItsInput(Block):
    def forward(self, x):
        x += self.norm1(self.conv1(x))
        return x


class WritesItsInput(Block):
    def forward(self, x):
        x = x + 1
        y = self.conv1(x)
        z = x.mul_(2)
        return torch.relu(self.norm1(y) + z)


class WritesAnother(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = x * 2
        z += y
        return torch.relu(self.norm2(self.conv2(y))) + z


@pytest.mark.parametrize("kind", [AddsToItsInput, WritesItsInput, WritesAnother])
def test_writes_are_kept(kind):
    block = kind(stock.BatchNorm2d, stock.ReLU()).double()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    for mode in (True, False):
        block.train(mode), twin.train(mode), fast.train(mode)
        a, b = X.clone(), X.clone()
        with torch.no_grad():
            same(fast(a), twin(b))
        assert torch.equal(a, X) == (kind is not AddsToItsInput)
        same(a, b)


def test_the_given_tree_is_left_as_it_is():
    block = Block(stock.BatchNorm2d, stock.ReLU())
    before = [(type(layer), dict(vars(layer))) for layer in block.modules()]
    fast = advdl_ops.optimize(block)
    fast.conv1.register_forward_hook(lambda *_: None)
    fast.eval()
    fast.conv1 = stock.Conv2d(8, 8, 1)
    after = [(type(layer), dict(vars(layer))) for layer in block.modules()]
    assert [kind for kind, _ in after] == [kind for kind, _ in before]
    for (_, a), (_, b) in zip(after, before, strict=True):
        assert a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    assert block.training and not block.conv1._forward_hooks


class Frozen(dict):
    """As diffusers has it: a copy() of it is none of its kind."""


def test_attributes_that_are_dicts_of_their_own_kind_are_shared():
    block = Block(stock.BatchNorm2d, stock.ReLU())
    block._config = Frozen(channels=8)
    assert advdl_ops.optimize(block)._config is block._config


def test_optimizers_go_on():
    model = stock.Sequential(Block(stock.BatchNorm2d, stock.ReLU())).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    advdl_ops.optimize(model, inplace=True)
    before = model[0].conv1.weight.clone()
    model(X).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].conv1.weight, before)


# ---- bad input ----


def test_errors():
    block = Block(stock.BatchNorm2d, stock.ReLU())
    with pytest.raises(TypeError, match=r"optimize: model \(int\) must be a torch\.nn\.Module"):
        advdl_ops.optimize(3)
    with pytest.raises(TypeError, match="must be optimized before it is compiled"):
        advdl_ops.optimize(torch.compile(block))
    with pytest.raises(ValueError, match=r"optimize: model \(0\.conv1\.weight\) must have data"):
        advdl_ops.optimize(stock.Sequential(copy.deepcopy(block).to("meta")))
    with pytest.raises(ValueError, match="must not be optimized already"):
        advdl_ops.optimize(advdl_ops.optimize(block))
    assert type(block.conv1) is stock.Conv2d


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_models_are_refused():
    scripted = torch.jit.script(stock.Sequential(stock.Conv2d(3, 4, 3)))
    with pytest.raises(TypeError, match="must not be scripted or traced"):
        advdl_ops.optimize(stock.Sequential(scripted))


def test_nothing_to_do():
    model = stock.Sequential(stock.Linear(3, 4), stock.ReLU())
    assert counts(advdl_ops.optimize(model)) == (0, 0, 0)
    ours = nn.ConvBNAct(3, 4, 3)
    assert counts(advdl_ops.optimize(ours)) == (0, 0, 0)
