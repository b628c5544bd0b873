"""What autograd may ask of a graph that keeps recipes: twice, in part, again with a graph, or never."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from support.lean import LEVELS, assert_same_values, counted, leaned, step, tiny_net
from torch.autograd import gradcheck, gradgradcheck

from advdl_ops import models, nn, set_lean
from advdl_ops._lean import recipes
from benchmarks import memory

f64 = torch.float64
levels = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture
def x():
    return torch.randn(2, 3, 20, 18)


@pytest.fixture
def no_gc():
    """What is not freed by counting references stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def pair(level, **options):
    plain = tiny_net(**options)
    return plain, leaned(plain, level)


def gradients(net):
    return {key: None if p.grad is None else p.grad.clone() for key, p in net.named_parameters()}


# ---- once more, and in part ----


@levels
def test_a_graph_that_is_retained(level, x):
    plain, lean = pair(level)
    found = []
    for net in (plain, lean):
        loss = net(x).square().sum()
        seen = []
        for turn in range(3):
            loss.backward(retain_graph=turn < 2)
            seen.append(gradients(net))
        found.append(seen)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for expected, others in zip(*found, strict=True):
        assert_same_values(others, expected)


@levels
def test_accumulated_gradients(level):
    plain, lean = pair(level)
    for net in (plain, lean):
        torch.manual_seed(2)
        losses = [net(torch.randn(2, 3, 16, 16)).square().sum() for _ in range(3)]
        # The graphs of all three are alive at once, and the first is not the first to go.
        for index in (1, 0, 2):
            losses[index].backward()
    assert_same_values(gradients(lean), gradients(plain))


@levels
def test_gradients_of_some_parameters(level, x):
    """Some readers of a recipe never ask for the tensor, and others ask more than once."""
    plain, lean = pair(level)
    names = [key for key, _ in plain.named_parameters()]
    for wanted in (names[:1], names[-1:], names[6:9], names[::3], names[1::2]):
        found = []
        for net in (plain, lean):
            out = net(x).square().sum()
            inputs = [dict(net.named_parameters())[key] for key in wanted]
            first = torch.autograd.grad(out, inputs, retain_graph=True)
            every = torch.autograd.grad(out, list(net.parameters()), retain_graph=True)
            again = torch.autograd.grad(out, inputs)
            found.append((*first, *every, *again))
        assert all(a.equal(b) for a, b in zip(*found, strict=True)), wanted


@levels
@pytest.mark.parametrize("frozen", ["stem", "stage", "norms", "convolutions", "head alone"])
def test_frozen_parameters(frozen, level, x):
    kinds = {"norms": torch.nn.BatchNorm2d, "convolutions": torch.nn.Conv2d}
    plain = tiny_net()
    for name, layer in plain.named_modules():
        index = int((name or "9").split(".")[0])
        if isinstance(layer, kinds.get(frozen, torch.nn.Module)) and (
            frozen in kinds
            or index in {"stem": (0,), "stage": (2, 3), "head alone": range(8)}[frozen]
        ):
            layer.requires_grad_(False)
    lean = leaned(plain, level)
    for needs in (True, False):  # of the image
        found = []
        for net in (plain, lean):
            image = x.clone().requires_grad_(needs)
            net.zero_grad()
            net(image).square().sum().backward()
            found.append({**gradients(net), "image": image.grad})
        assert_same_values(found[1], found[0])


@levels
def test_weights_that_are_shared(level, x):
    """One block that runs three times."""
    plain = torch.nn.Sequential(*tiny_net()[:3], *[tiny_net()[3]] * 3)
    assert_same_values(step(leaned(plain, level), x), step(plain, x))


@levels
def test_outputs_of_several_parts(level, x):
    """A second head in the middle, whose gradient comes first, later, alone or not at all."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            middle = self.net[:4](x)
            return self.net[4:](middle), middle

    plain = Net()
    lean = leaned(plain, level)
    for which in ((0,), (1,), (0, 1), (1, 0)):
        found = []
        for net in (plain, lean):
            net.zero_grad()
            outputs = net(x)
            for turn in which:
                outputs[turn].square().sum().backward(retain_graph=turn != which[-1])
            found.append(gradients(net))
        assert_same_values(found[1], found[0])


# ---- second derivatives ----


@levels
def test_gradients_with_a_graph(level, x):
    plain, lean = pair(level)
    found = []
    for net in (plain, lean):
        image = x.to(f64).requires_grad_()
        net.to(f64)
        out = net(image).square().sum()
        first = torch.autograd.grad(out, [image, *net.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        found.append((*first, *torch.autograd.grad(penalty, [image, *net.parameters()])))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))


@levels
def test_a_gradient_penalty_inside_of_a_forward(level, x):
    """A backward, with a graph, while the level holds."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            out = self.net(x)
            (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            return out.sum(1) + gradient.square().sum((1, 2, 3))

    plain = Net().to(f64)
    assert_same_values(step(leaned(plain, level), x.to(f64)), step(plain, x.to(f64)))


@levels
def test_finite_differences(level):
    net = leaned(tiny_net(blocks=1, width=2).to(f64), level)
    # Without kinks between x and x + eps: smooth pooling, activations far from 0.
    net[1] = torch.nn.AvgPool2d(2)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.weight.data.fill_(0.2)
            layer.bias.data.copy_(
                torch.tensor([1.0, -1.0]).repeat(layer.num_features)[: layer.num_features]
            )
    parameters = [*[p for p in net.parameters() if p.dim() == 4][1:3], net[2].bn2.bias]
    x = torch.randn(2, 3, 8, 8, dtype=f64, requires_grad=True)

    def call(x, *_):
        return net(x)

    assert gradcheck(call, (x, *parameters), fast_mode=True)
    assert gradgradcheck(call, (x, *parameters), fast_mode=True)


# ---- tensors that are written ----


def test_a_kept_tensor_that_is_written_is_an_error(x):
    """Of those that backward needs; with torch's words."""
    for level in LEVELS:
        for name in ("0.conv.weight", "2.bn1.weight", "2.bn1.bias", "3.conv3.weight"):
            plain, lean = pair(level)
            for net in (plain, lean):
                loss = net(x).sum()
                with torch.no_grad():
                    net.get_parameter(name).mul_(2)
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


@levels
def test_the_output_of_a_convolution_that_is_written_is_an_error(level, x):
    plain, lean = pair(level)
    for net in (plain, lean):
        outputs = []
        handle = net[3].conv2.register_forward_hook(lambda *args, o=outputs: o.append(args[-1]))
        loss = net(x).sum()
        handle.remove()
        with torch.no_grad():
            outputs[0].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@levels
def test_an_activation_that_is_written_never_gives_wrong_gradients(level, x):
    """Stock raises an error. A level that makes the activation again need not: its gradients are right then."""
    plain, lean = pair(level)
    expected = step(plain, x)
    for at in (0, 2, 3):
        net, outputs = copy.deepcopy(lean), []
        net[at].register_forward_hook(lambda *args, o=outputs: o.append(args[-1]))

        def write(loss, outputs=outputs):
            with torch.no_grad():
                outputs[0].mul_(2)
            loss.backward()

        try:
            found = step(net, x, backward=write)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017
        else:
            assert_same_values(found, expected)


@levels
def test_a_source_that_is_written_behind_its_reader_is_an_error(level):
    """A recipe's own source: the error names shape and versions."""
    conv, norm = torch.nn.Conv2d(4, 4, 3, padding=1), nn.BatchNormAct2d(4, act="relu")
    y = torch.randn(2, 4, 5, 5, requires_grad=True)
    with recipes.saving(level):
        z = y * 1
        out = conv(norm(z)).sum()
    z.data.add_(0)  # not counted, as in stock
    with torch.no_grad():
        z.add_(1)
    with pytest.raises(RuntimeError, match=r"\[2, 4, 5, 5\].* is at version 1; expected version 0"):
        out.backward()


@levels
def test_statistics_may_be_written(level, x):
    """Those of the batch are kept apart from the running ones, which the next forward writes."""
    plain, lean = pair(level)
    for net in (plain, lean):
        first = net(x).square().sum()
        second = net(2 * x).square().sum()
        for buffer in net.buffers():
            buffer.zero_()
        (first + second).backward()
    assert_same_values(gradients(lean), gradients(plain))


# ---- weights that change during backward ----


@levels
def test_an_optimizer_in_backward(level):
    """Each weight is stepped as soon as its gradient is there. Nobody needs it any more then."""
    plain, lean = pair(level, blocks=3)
    curves = []
    for net in (plain, lean):
        for p in net.parameters():
            optimizer = torch.optim.SGD([p], 0.05, momentum=0.9)

            def take(p, optimizer=optimizer):
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(take)
        torch.manual_seed(3)
        losses = []
        for _ in range(4):
            loss = net(torch.randn(2, 3, 16, 16)).square().mean()
            loss.backward()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0] == curves[1]
    assert len(set(curves[0])) == 4
    for (key, t), other in zip(plain.state_dict().items(), lean.state_dict().values(), strict=True):
        assert t.equal(other), key


@levels
def test_an_optimizer_between_forward_and_backward(level, x):
    """As in stock, an error."""
    for net in pair(level):
        loss = net(x).square().mean()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        torch.optim.SGD(net.parameters(), 0.1).step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# ---- depth ----


class Residual(torch.nn.Module):
    def __init__(self, channels=2):
        super().__init__()
        self.conv = nn.ConvBNAct(channels, channels, 1, act="relu")

    def forward(self, x):
        return self.conv(x, x)


@pytest.mark.parametrize("level", ["stage", "deepest"])
def test_a_chain_of_600_blocks(level):
    """One stage: the last output is made from the first input. Neither that nor the end of the graph recurses."""
    plain = torch.nn.Sequential(nn.ConvBNAct(3, 2, 1), *[Residual() for _ in range(600)])
    lean = leaned(plain, level)
    x = torch.randn(2, 3, 3, 3, dtype=f64)
    found = [step(net.to(f64), x) for net in (plain, lean)]
    assert_same_values(found[1], found[0])
    loss = lean(x).sum()
    del loss  # without backward


# ---- what is freed ----


def refs_of_recipes(monkeypatch):
    """Weak references of all recipes and of all tensors that they keep."""
    found = []
    make = recipes.Recipe.__init__

    def noted(self, kind, function, sources, like):
        make(self, kind, function, sources, like)
        found.append(weakref.ref(self))
        found.extend(
            weakref.ref(source[0])
            for source in sources
            if type(source) is tuple and not source[0].requires_grad
        )

    monkeypatch.setattr(recipes.Recipe, "__init__", noted)
    return found


@levels
@pytest.mark.parametrize("how", ["backward", "dropped", "in part"])
def test_everything_is_freed_without_garbage_collection(how, level, x, no_gc, monkeypatch):
    net = set_lean(tiny_net(), level)
    found = refs_of_recipes(monkeypatch)
    image = x.clone().requires_grad_()
    loss = net(image).square().sum()
    alive = [ref for ref in found if ref() is not None]
    assert len(alive) > 10
    if how == "backward":
        loss.backward()
    elif how == "in part":
        torch.autograd.grad(loss, net[8].weight, retain_graph=True)
        torch.autograd.grad(loss, net[3].conv1.weight, retain_graph=True)
        del loss
    else:
        del loss
    left = [ref() for ref in found if ref() is not None and ref() is not image]
    assert not [each for each in left if isinstance(each, recipes.Recipe)]
    assert not [
        t.shape for t in left if isinstance(t, torch.Tensor) and t.dim() == 4 and len(t) == 2
    ]


def test_backward_frees_as_it_goes():
    """What backward makes again lives no longer than it is needed: the peak falls nearly as what is held."""
    plain = torch.nn.Sequential(*[nn.ConvBNAct(8, 8, 3, act="relu") for _ in range(8)])
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    found = []
    for net in (plain, leaned(plain, "block")):

        def backward(loss, net=net):
            loss.backward()
            net.zero_grad()

        backward(net(x).sum())
        found.append(
            memory.held_and_peak(lambda net=net: net(x).sum(), backward, torch.device("cpu"))
        )
    (held, peak), (lean_held, lean_peak) = found
    image = x.numel() * 4
    assert held - lean_held >= 6.9 * image
    assert peak - lean_peak >= 4.9 * image


@pytest.mark.parametrize("level", ["block", "stage", "deepest"])
def test_what_was_made_again_is_dropped_by_its_last_reader(level, x, monkeypatch):
    """Also where the graph is retained, and the recipes with it."""
    net = set_lean(tiny_net(), level)
    found = refs_of_recipes(monkeypatch)
    loss = net(x).square().sum()
    for _ in range(2):
        with counted() as kinds:
            loss.backward(retain_graph=True)
        alive = [ref() for ref in found if isinstance(ref(), recipes.Recipe)]
        assert len(alive) >= len(kinds) > 5
        assert not [each.kind for each in alive if each.made is not None]


@levels
def test_recipes_that_nobody_needs_are_freed_with_the_forward(level, x, no_gc, monkeypatch):
    """Without a reader, a recipe ends with the forward, though what it was made of lives on."""
    found = refs_of_recipes(monkeypatch)
    norm = set_lean(nn.BatchNormAct2d(3, act="relu"), level)
    out = norm(x * 1)
    assert found and all(ref() is None for ref in found if not isinstance(ref(), torch.Tensor))
    out.sum().backward()


# ---- errors on the way ----


class Failing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fails = False

    def forward(self, x):
        if self.fails:
            raise KeyError("here")
        return x


@levels
def test_a_forward_that_raises(level, x):
    """The next forward works, and so does another model's."""
    plain = tiny_net()
    plain.insert(4, Failing())
    lean, other = leaned(plain, level), tiny_net()
    lean[4].fails = True
    for _ in range(2):
        with pytest.raises(KeyError, match="here"):
            lean(x)
        assert recipes._local.saving is None
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        with counted() as kinds:
            other(x).sum().backward()
        assert not kinds
    lean[4].fails = False
    for net in (plain, lean):
        for layer in net.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_running_stats()
    assert_same_values(step(lean, x), step(plain, x))


@levels
def test_a_part_that_raises_inside_of_a_model_that_goes_on(level, x):
    """The level of the outer model holds again behind a part at another one."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.part = tiny_net(), torch.nn.Sequential(nn.ConvBNAct(3, 8, 3), Failing())

        def forward(self, x):
            with contextlib.suppress(KeyError):
                self.part(x)
            return self.net(x)

    plain = Net()
    plain.part[1].fails = True
    lean = leaned(plain, {"": level, "part": None})
    with counted() as kinds:
        found = step(lean, x)
    assert kinds
    assert_same_values(found, step(plain, x))


@levels
def test_a_backward_that_raises(level, x):
    """A hook that fails in the middle; the same graph then gives the right gradients."""
    plain, lean = pair(level)
    found = []
    for net in (plain, lean):
        loss = net(x).square().sum()
        fails = [True]

        def fail(gradient, fails=fails):
            if fails:
                raise KeyError("here")

        handle = net[3].conv2.weight.register_hook(fail)
        with pytest.raises(KeyError, match="here"):
            loss.backward(retain_graph=True)
        handle.remove()
        net.zero_grad()
        loss.backward()
        found.append(gradients(net))
    assert_same_values(found[1], found[0])


@levels
def test_gradients_that_are_stopped(level, x):
    """``detach``, ``no_grad`` and ``inference_mode`` in the middle of a model at a level."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            x = self.net[:2](x)
            with torch.no_grad():
                target = self.net[2](x)
            with torch.inference_mode():
                scale = self.net[2](x).mean().item()
            return self.net[3:](self.net[2](x) - target.detach() * scale + target)

    plain = Net()
    assert_same_values(step(leaned(plain, level), x), step(plain, x))


def test_models_of_basic_blocks_too(x):
    plain = tiny_net(models.BasicBlock)
    for level in LEVELS:
        net = leaned(plain, level)
        loss = net(x).square().sum()
        loss.backward(retain_graph=True)
        first = gradients(net)
        net.zero_grad()
        loss.backward()
        assert_same_values(gradients(net), first)
