"""optimize(): small models of every kind against what they were, in fp64."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from support.optimize import Block, X, check_as, counts, made, same
from torch import nn as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- small models ----


def group_norm(channels):
    return stock.GroupNorm(2, channels)


BLOCKS = {
    "batch norm, relu": (stock.BatchNorm2d, stock.ReLU(inplace=True), 2),
    "batch norm, silu": (stock.BatchNorm2d, stock.SiLU(), 2),
    "batch norm, relu6": (stock.BatchNorm2d, stock.ReLU6(), 2),
    "group norm, silu": (group_norm, stock.SiLU(), 2),
    "instance norm, leaky relu": (stock.InstanceNorm2d, stock.LeakyReLU(0.2), 2),
}


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


@pytest.mark.parametrize(
    ("act", "taken"),
    [(stock.ReLU6(), "act"), (F.relu6, "relu6"), (F.silu, "silu"), (torch.relu, "relu"), (stock.Hardtanh(0, 6), "")],
    ids=["module", "relu6", "silu", "relu", "hardtanh"],
)  # fmt: skip
def test_which_activations_are_taken_along(act, taken):
    """Of a function the name is the activation's. Hardtanh, whose subclass ReLU6 is, stays behind."""
    block = Block(stock.BatchNorm2d, act).double()
    fast = advdl_ops.optimize(block)
    groups = advdl_ops.explain(fast, as_dict=True)["fused"]
    ending = f" + {taken}" if taken else ""
    assert groups == [f"conv1 + norm1{ending}", f"conv2 + norm2 + add{ending}"]
    check_as(copy.deepcopy(block), fast, X)


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
    assert "it stands in two places" in str(advdl_ops.explain(fast))
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
    text = str(advdl_ops.explain(fast))
    assert "  2  Conv2d\n      left as it was: its weight is no parameter: pruned" in text
    same(fast(X), expected)


class ByMode(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if self.training else 2 * y


class OptionalScale(Block):
    def forward(self, x, scale=None, *, shift=None, **unused):
        y = torch.relu(self.norm1(self.conv1(x)))
        y = y if scale is None else scale * y
        return y if shift is None else y + shift


class OneOrMore(Block):
    def forward(self, x):
        parts = [x] if isinstance(x, torch.Tensor) else x
        return torch.relu(self.norm1(self.conv1(torch.cat(parts, 1))))


class OfValues(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y if x.sum() > 0 else -y


class AsksIntermediates(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y[0] if isinstance(y, tuple) else y


class Counting(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(self.norm1(self.conv1(x)))


class CountsInBuffer(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return torch.relu(self.norm1(self.conv1(x)))


class Keeps(Block):
    def __init__(self, *args):
        super().__init__(*args)
        self.kept = {}

    def forward(self, x):
        self.kept["y"] = torch.relu(self.norm1(self.conv1(x)))
        return self.kept["y"]


class InNoGrad(Block):
    def forward(self, x):
        with torch.no_grad():
            y = torch.relu(self.norm1(self.conv1(x)))
        return y + torch.relu(self.norm2(self.conv2(x)))


class Checkpointed(Block):
    reentrant = False

    def body(self, x):
        return torch.relu(self.norm1(self.conv1(x)))

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant)


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class OfSizes(Block):
    """What takes sizes in C++ must not take a proxy for a tensor."""

    def forward(self, x):
        sizes = x.shape if isinstance(x, torch.Tensor) else x
        return torch.relu(self.norm1(self.conv1(torch.ones(sizes, dtype=torch.float64))))


class OwnConstant(Block):
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return y * torch.tensor(2.0, dtype=x.dtype)


def test_both_modes():
    block = made(ByMode)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    check_as(twin, fast, X)


@pytest.mark.parametrize("grad", [True, False])
def test_optional_arguments(grad):
    block = made(OptionalScale).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    with torch.set_grad_enabled(grad):
        for args, options in [
            ((), {}),
            ((X,), {}),
            ((), {"shift": X}),
            ((), {"scale": X, "shift": X}),
            ((), {"other": 1}),
            ((2.0,), {}),
        ]:
            same(fast(X, *args, **options), twin(X, *args, **options))
    assert fast.forward.__defaults__ == (None,)


def test_one_tensor_or_more():
    block = made(OneOrMore).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    halves = list(X.chunk(2, 1))
    for x in (X, halves):
        same(fast(x), twin(x))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (OfValues, "control flow"),
        (AsksIntermediates, "it asks what something is"),
        (Counting, "it assigns self.calls"),
        (Keeps, "it assigns self.kept"),
        (InNoGrad, "it switches gradients"),
        (Checkpointed, "or checkpoints"),
        (CheckpointedReentrant, "it switches gradients"),
    ],
)
def test_what_a_graph_would_not_hold_keeps_its_forward(kind, why):
    block = made(kind)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (0, 4, 0) and type(fast) is kind
    assert why in str(advdl_ops.explain(fast)).splitlines()[1]
    assert block.__dict__.get("kept", {}) == {}
    check_as(twin, fast, X.clone().requires_grad_())


def test_sizes():
    block = made(OfSizes).eval()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    for x in (X, list(X.shape)):
        same(fast(x), twin(x))


def test_constants_of_its_own():
    block = made(OwnConstant)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    check_as(twin, fast, X)


def test_writes_to_buffers_are_kept():
    block = made(CountsInBuffer)
    fast = advdl_ops.optimize(block)
    assert block.calls == 0
    assert counts(fast) == (1, 2, 0)
    fast(X), fast(X)
    assert fast.calls == 2


class Configured(Block):
    skip = None

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = 1.0
        self.sizes = (1, 2)
        self.down = None

    def forward(self, x):
        y = self.act(self.norm1(self.conv1(x)))
        y = y * self.scale if self.scale != 1.0 and self.sizes == (1, 2) else y
        return y if self.down is None else self.down(y)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", 0.5),
        lambda m: (setattr(m, "scale", 0.5), setattr(m, "sizes", (2, 2))),
        lambda m: setattr(m, "down", stock.ReLU()),
        lambda m: setattr(m, "act", stock.SiLU()),
        lambda m: setattr(m, "act", stock.Mish()),
        lambda m: setattr(m, "norm1", stock.Identity()),
        lambda m: setattr(m, "norm1", stock.InstanceNorm2d(8)),
        lambda m: setattr(m, "conv1", stock.Identity()),
        lambda m: m.norm1.register_forward_hook(lambda _, __, y: 2 * y),
        lambda m: m.act.register_forward_hook(lambda _, __, y: 2 * y),
        lambda m: m.conv1.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
        lambda m: stock.utils.prune.l1_unstructured(m.conv1, "weight", 0.5),
        lambda m: stock.utils.parametrizations.weight_norm(m.conv1),
    ],
)
def test_what_is_changed_afterwards_counts(change):
    block = made(Configured)
    block.act = stock.SiLU()  # twice would be seen
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (1, 2, 0)
    fast = copy.deepcopy(fast)
    change(twin), change(fast)
    check_as(twin, fast, X)


class Sums(Block):
    def forward(self, x, y):
        return self.act(self.norm1(self.conv1(x)) + y) + self.act(self.conv2(x) + y)


@pytest.mark.parametrize(
    "other",
    [
        X,
        X[:, :, :1, :1],
        X[:1],
        X[0, 0, 0, 0],
        torch.cat([X, X], 0)[None],
        X.float(),
        2.5,
    ],
    ids=["alike", "channels", "batch", "scalar", "more", "float", "number"],
)
@pytest.mark.parametrize("train", [True, False])
def test_sums_that_broadcast_or_promote(other, train):
    block = made(Sums).train(train)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert counts(fast) == (2, 1, 0)
    if isinstance(other, torch.Tensor) and other.dim() == 5:
        other = other[:, :2]
    x = X.float() if isinstance(other, torch.Tensor) and other.dtype == torch.float32 else X
    if x.dtype == torch.float32:  # the sum is in double
        twin, fast, other = twin.float(), fast.float(), other.double()
    with torch.set_grad_enabled(train):
        expected, found = twin(x, other), fast(x, other)
    assert found.dtype == expected.dtype
    same(found, expected, 1e-5 if x.dtype == torch.float32 else 1e-9)


class GatedBySigmoid(Block):
    def forward(self, x):
        y = self.norm1(self.conv1(x))
        z = self.norm2(self.conv2(x))
        return y * torch.sigmoid(y) + z.sigmoid() * z + x * self.conv1(x).sigmoid()


def test_silu_by_sigmoid():
    block = made(GatedBySigmoid)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    fused = advdl_ops.explain(fast, as_dict=True)["fused"]
    # conv1 is called twice; its norm alone is fused.
    assert fused == ["norm1 + silu", "conv2 + norm2 + silu"]
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


class Holds(Block):
    """Its layers under other names, and a method, beside what is registered."""

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


def test_attributes_that_hold_modules_hold_the_new_ones():
    block = made(Holds)
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    assert fast.layers[0] is fast.conv1 and fast.last is fast.norm2
    assert block.layers[0] is block.conv1 and block.last is block.norm2
    check_as(twin, fast, X)
    assert not fast.norm1.training and block.norm1.training


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
    in_place = copy.deepcopy(block)
    in_place.compile()
    for compiled in (torch.compile(block), in_place):
        with pytest.raises(TypeError, match="must be optimized before it is compiled, or with inp"):
            advdl_ops.optimize(compiled)
    with pytest.raises(TypeError, match=r"restore: model \(int\) must be a torch\.nn\.Module"):
        advdl_ops.restore(3)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_quantized_models_are_refused():
    model = stock.Sequential(stock.Conv2d(3, 4, 3), stock.LSTM(3, 4))
    quantized = torch.ao.quantization.quantize_dynamic(model, {stock.LSTM})
    with pytest.raises(ValueError, match=r"optimize: model \(1\) must not be quantized"):
        advdl_ops.optimize(quantized, inplace=True)
    assert type(quantized[0]) is stock.Conv2d


def test_in_the_middle_of_a_forward():
    block = made(Block)
    twin = copy.deepcopy(block)
    handle = block.act.register_forward_hook(
        lambda *_: handle.remove() or (advdl_ops.optimize(block, inplace=True) and None)
    )
    same(block(X), twin(X))
    assert counts(block)[0] == 2
    check_as(twin, block, X)


def test_nothing_to_do():
    model = stock.Sequential(stock.Linear(3, 4), stock.ReLU())
    assert counts(advdl_ops.optimize(model)) == (0, 0, 0)
    ours = nn.ConvBNAct(3, 4, 3)
    assert counts(advdl_ops.optimize(ours)) == (0, 0, 0)


# ---- channels_last inside ----


class Chain(stock.Module):
    """Two convolutions and something between them."""

    def __init__(self, between):
        super().__init__()
        self.first = stock.Conv2d(8, 8, 3)
        self.between = between
        self.last = stock.Conv2d(8, 8, 3)

    def forward(self, x, *, y=None):
        x = self.last(self.between(self.first(x)))
        return {"x": x, "y": y, "rows": x.flatten(2)}  # y is the given one


class Views(stock.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1).view(x.shape)


class Shifts(stock.Module):
    """Of contiguous memory, what it is given."""

    def forward(self, x):
        y = x.flatten(1)
        y += 1
        return x


class ShiftsAll(stock.Module):
    def forward(self, x):
        x += 1
        return x


class ShiftsItsInput(Chain):
    def forward(self, x):
        return self.last(self.between(x))


class Halves(stock.Module):
    def forward(self, x):
        return x.mul(0.5)


class Fits(stock.Module):
    """Control flow on sizes: no graph."""

    def __init__(self):
        super().__init__()
        self.down = stock.Conv2d(8, 8, 3, stride=2)
        self.up = stock.ConvTranspose2d(8, 8, 2, stride=2)

    def forward(self, x):
        y = self.up(self.down(x))
        rows, columns = x.size(2) - y.size(2), x.shape[3] - y.shape[3]
        if rows or columns:
            y = torch.nn.functional.pad(y, (0, columns, 0, rows))
        return torch.cat([x, y], dim=1)[:, max(0, 4) : 12] * 2


def branches(source):
    """A layer whose forward has control flow on values, and then this."""
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


@pytest.mark.parametrize(
    "between",
    [
        stock.Identity(),
        stock.ReLU(True),
        Halves(),
        ShiftsAll(),
        Fits(),
        branches("pass"),
        branches("x = x * math.sqrt(2)"),
    ],
)
def test_evaluation_in_channels_last(between):
    model = Chain(copy.deepcopy(between)).double().eval()
    twin, fast = copy.deepcopy(model), advdl_ops.optimize(model)
    assert "\n    channels_last on CPU, whatever it is given\n" in str(advdl_ops.explain(fast))
    seen = formats_of_last(fast)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected, found = twin(X, y=X), fast(X, y=X)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            same(found[name], value)
            assert found[name].stride() == value.stride()
        assert found["y"] is X
    fast.train()(X)
    with torch.no_grad():
        fast.train()(X)
        fast.eval()(X)
    assert seen == [False, True, False, False, True]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Chain(Views()), "between: it calls view"),
        (Chain(Shifts()), "between: it writes what may be a view or a copy"),
        (ShiftsItsInput(ShiftsAll()), "it may write what it is given"),
        (ShiftsItsInput(stock.Sequential(stock.Dropout(), stock.ReLU(True))), "it may write what"),
        (Chain(Holds(group_norm, stock.ReLU())), "between: its forward has no graph"),
    ],
)
def test_what_forbids_channels_last(model, why):
    model = model.double().eval()
    twin, fast = copy.deepcopy(model), advdl_ops.optimize(model)
    assert f"not in channels_last on CPU, whatever it is given: {why}" in str(
        advdl_ops.explain(fast)
    )
    seen = formats_of_last(fast)
    a, b = X.clone(), X.clone()
    with torch.no_grad():
        found, expected = fast(a), twin(b)
    if isinstance(found, dict):
        found, expected = found["x"], expected["x"]
    same(found, expected)
    same(a, b)
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_in_channels_last(dtype):
    """In fp32, with the gradients of before, in the strides of the parameters."""
    model = Chain(stock.ReLU()).to(dtype)
    twin, fast = copy.deepcopy(model), advdl_ops.optimize(model)
    seen = formats_of_last(fast)
    x = X.to(dtype)
    for training in (True, False):
        outputs = []
        for each in (twin, fast):
            inputs = x.clone().requires_grad_()
            out = each.train(training)(inputs, y=x)
            out["x"].square().sum().backward()
            outputs.append((out["x"], inputs.grad, *(p.grad for p in each.parameters())))
            each.zero_grad()
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert a.stride() == b.stride()
    assert seen == [dtype == torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        fast(X.to(torch.float32) if dtype == torch.float32 else x)
    assert seen[2:] == [False]


class Noise(stock.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class Drops(stock.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("between", [stock.Dropout(), stock.RReLU(), Noise(), Drops()])
def test_random_numbers_fall_on_the_same_pixels(between):
    model = Chain(between).train()
    twin, fast = copy.deepcopy(model), advdl_ops.optimize(model)
    seen = formats_of_last(fast)
    x, outputs = X.float(), []
    for each in (twin, fast):
        torch.manual_seed(0)
        outputs.append(each(x)["x"])
    torch.testing.assert_close(*outputs)
    with torch.no_grad():
        fast.eval()(x)
    # What torch's RReLU returns in evaluation is contiguous.
    assert seen == [False, not isinstance(between, stock.RReLU)]


def test_dropout_that_does_nothing_does_not_forbid_channels_last():
    fast = advdl_ops.optimize(Chain(stock.Dropout(0.0))).train()
    seen = formats_of_last(fast)
    fast(X.float())
    fast.between.p = 0.5
    fast(X.float())
    fast.between.eval()
    fast(X.float())
    fast.eval()
    fast.between.train()
    with torch.no_grad():
        fast(X.float())
    assert seen == [True, False, True, False]
    fast = advdl_ops.optimize(Chain(Never())).train()
    seen = formats_of_last(fast)
    fast(X.float())
    assert seen == [True]


class Always(stock.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, True)


class Geometric(stock.Module):
    def forward(self, x):
        return x * torch.zeros_like(x).geometric_(0.5)


class Called(stock.Module):
    """In an order that it names."""

    def forward(self, x):
        y = x.to(memory_format=torch.channels_last)
        y.mul_(2)
        return x + y


class Rows(stock.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x.view(x.shape), weight, bias)


@torch.library.custom_op("advdl_test::rows", mutates_args=())
def rows(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@rows.register_fake
def _(x):
    return torch.empty_like(x)


class Never(stock.Module):
    def forward(self, x):
        return torch.dropout(x, 0.5, False)


class Transposes(stock.Module):
    def forward(self, x):
        return x.mT.mT


class UsersOperator(stock.Module):
    def forward(self, x):
        return torch.ops.advdl_test.rows(x)


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (Always(), "it draws random numbers"),
        (Noise().train(), None),
        (Geometric(), "it draws random numbers"),
        (Called(), "between: it names a memory format"),
        (Rows(8, 8, 1), "between: "),
        (UsersOperator(), "between: it calls "),
        (Transposes(), "between: it calls getattr"),
        (
            stock.Sequential(stock.Flatten(), stock.ReLU(True), stock.Unflatten(1, (8, 7, 6))),
            "it writes",
        ),
    ],
)
def test_more_that_forbids_channels_last(between, why):
    text = str(advdl_ops.explain(advdl_ops.optimize(Chain(between))))
    if why is None:
        assert "channels_last on CPU, whatever it is given, in evaluation: it draws" in text
    else:
        assert "not in channels_last on CPU, whatever it is given: " in text
        assert why in text


class Head(Chain):
    """As torchvision's EfficientNet: what is flattened is written, but nobody else reads it."""

    def __init__(self, keeps):
        super().__init__(stock.AdaptiveAvgPool2d(2))
        self.keeps = keeps
        self.head = stock.Sequential(stock.ReLU(inplace=True), stock.Linear(32, 3))

    def forward(self, x):
        x = self.between(self.last(self.first(x)))
        out = self.head(torch.flatten(x, 1))
        return out, x if self.keeps else None


@pytest.mark.parametrize("keeps", [True, False])
def test_writes_to_what_is_flattened(keeps):
    model = Head(keeps).double().eval()
    fast = advdl_ops.optimize(model)
    forbidden = "it writes what may be a view or a copy" in str(advdl_ops.explain(fast))
    assert forbidden == keeps
    seen = formats_of_last(fast)
    with torch.no_grad():
        for a, b in zip(fast(X), model(X), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-12)
    assert seen == [not keeps]


def test_backward_hooks_forbid_channels_last():
    model = Chain(stock.Identity())
    model.between.register_full_backward_hook(lambda *_: None)
    assert "between: it has hooks" in str(advdl_ops.explain(advdl_ops.optimize(model)))


def test_gradients_of_the_input_lie_as_it_does():
    fast = advdl_ops.optimize(Chain(stock.ReLU())).train()
    seen = formats_of_last(fast)
    x = X.float().requires_grad_()
    (gradient,) = torch.autograd.grad(fast(x)["x"].square().sum(), x, create_graph=True)
    assert gradient.is_contiguous()
    gradient.view(-1).square().sum().backward()
    assert x.grad.is_contiguous()
    assert seen == [True]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("x = x.view(x.shape)", "uses view"),
        ("x = x.flatten(1).unflatten(1, x.shape[1:])", "uses flatten"),
        ("x = torch.reshape(x, x.shape)", "uses reshape"),
        ("x = F.dropout(x, 0.0)", "uses dropout"),
        ("x.add_(1)", "uses add_"),
        ("x = F.relu(x, inplace=True)", "it may write what it is given"),
        ("torch.mul(x, 2, out=x)", "it may write what it is given"),
        ("x += 1", "it may write what it is given"),
        ("x[0] = 1", "it does a STORE_SUBSCR"),
        ("self.y = 1", "it does a STORE_ATTR"),
        ("self.helps(1)", "it may call its own helps"),
        ("self.child.run(x)", "uses child"),
        ("x.to(memory_format=torch.channels_last)", "uses channels_last"),
        ("x = users(x)", "it calls users"),
        ("same(x, x)", "it calls same"),
        ("print()", "it calls print"),
        ("y = [v for v in x]", "it "),
        ("import math", "it does a IMPORT_NAME"),
    ],
)
def test_code_without_a_graph_that_forbids_channels_last(source, why):
    fast = advdl_ops.optimize(Chain(branches(source)).eval())
    assert f"between: its forward has no graph, and {why}" in str(advdl_ops.explain(fast)).replace(
        "it uses", "uses"
    )


def test_hooks_forbid_channels_last():
    model = Chain(stock.Identity()).eval()
    model.between.register_forward_hook(lambda *_: None)
    assert "between: it has hooks" in str(advdl_ops.explain(advdl_ops.optimize(model)))


# ---- recurrent layers ----


class Recurrent(stock.Module):
    def __init__(self):
        super().__init__()
        self.lstm = stock.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=4)
        self.cell = stock.LSTMCell(8, 6)

    def forward(self, x):
        y, _ = self.lstm(x)
        h, c = self.cell(y[-1])
        return torch.cat([h, c], 1)


def test_lstm():
    model = Recurrent().double()
    twin = copy.deepcopy(model)
    fast = advdl_ops.optimize(model)
    assert counts(fast) == (0, 2, 0)
    assert isinstance(fast.lstm, nn.LSTM) and isinstance(fast.cell, nn.LSTMCell)
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    check_as(twin, fast, x)
    packed = stock.utils.rnn.pack_padded_sequence(x, [7, 4, 2])
    same(fast.lstm(packed)[0].data, twin.lstm(packed)[0].data)
    same(fast.lstm(input=x)[0], twin.lstm(input=x)[0])


def test_lstm_restored():
    fast = advdl_ops.optimize(Recurrent())
    fast.double()  # its parameters are others now
    restored = advdl_ops.restore(fast)
    assert type(restored.lstm) is stock.LSTM
    assert all(
        a is b for a, b in zip(restored.lstm._flat_weights, restored.lstm.parameters(), strict=True)
    )
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    check_as(copy.deepcopy(restored), advdl_ops.optimize(restored), x)


# ---- under what wraps a model ----


@pytest.mark.parametrize("fresh", [True, False], ids=["compiled", "and run"])
def test_in_place_after_compile(fresh):
    block = stock.Sequential(made(Block), made(ByMode))
    twin = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    if not fresh:
        compiled(X), twin(X)
    assert advdl_ops.optimize(compiled, inplace=True) is compiled
    assert counts(compiled)[0] == 3
    for mode in (True, False):
        compiled.train(mode), twin.train(mode)
        same(compiled(X), twin(X))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def wrapped_by_ddp(model):
    return stock.parallel.DistributedDataParallel(model)


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", [wrapped_by_ddp, sharded])
@pytest.mark.parametrize("when", ["before", "after"])
def test_wrapped(one_process, wrap, when):
    block = stock.Sequential(made(Block), made(Block))
    twin = copy.deepcopy(block)
    if when == "before":
        model = wrap(advdl_ops.optimize(block))
    else:
        model = wrap(block)
        with pytest.raises(
            ValueError, match=r"must be optimized before \w+ wraps it, or with inplace"
        ):
            advdl_ops.optimize(model)
        assert advdl_ops.optimize(model, inplace=True) is model
    assert counts(model)[0] == 4
    for _ in range(2):
        losses = []
        for network in (twin, model):
            network.zero_grad()
            losses.append(network(X).square().mean())
            losses[-1].backward()
            torch.optim.SGD(network.parameters(), 0.1).step()
        same(losses[1], losses[0])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        same(a.full_tensor() if hasattr(a, "full_tensor") else a, b)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        same(a.double(), b.double())


def test_functional_call_and_export():
    block = stock.Sequential(made(Block), made(ByMode)).eval()
    fast = advdl_ops.optimize(block)
    others = {name: t + 0.1 for name, t in block.state_dict().items() if t.is_floating_point()}
    same(torch.func.functional_call(fast, others, X), torch.func.functional_call(block, others, X))
    program = torch.export.export(fast, (X,))
    same(program.module()(X), block(X))
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten"


@pytest.mark.parametrize("train", [True, False])
def test_autocast_gives_the_dtype_of_before(train):
    block = stock.Sequential(made(Block), Block(group_norm, stock.SiLU())).float().train(train)
    fast = advdl_ops.optimize(block)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
        expected, found = block(X.float()), fast(X.float())
    assert found.dtype == expected.dtype
    same(found.double(), expected.double(), 0.05)
