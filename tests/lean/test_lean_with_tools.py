"""Lean training beside checkpoints, hooks, compilers, transforms and other tools that look at a training step."""

import copy
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.lean import (
    LEVELS,
    assert_same_bits,
    assert_same_values,
    counted,
    held_after,
    leaned,
    step,
    tiny_net,
)
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from advdl_ops import models, nn, set_lean, use_backend

f64 = torch.float64


@pytest.fixture
def x():
    return torch.randn(2, 3, 20, 18)


class WithCheckpoint(torch.nn.Module):
    """A checkpoint inside, around a part with each kind of layer that a level changes."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first = nn.ConvBNAct(3, 8, 3, act="relu")
        self.second = nn.ConvBNAct(8, 8, 3, act="relu")
        block = functools.partial(models.Bottleneck, 8, 2, 1, None, 1, 64, 1, nn.BatchNormAct2d)
        self.part = torch.nn.Sequential(
            nn.ConvBNAct(8, 8, 3, act="relu"), torch.nn.MaxPool2d(2), block(), block()
        )
        self.last = nn.ConvBNAct(8, 16, 1, act="relu")
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.second(self.first(x))
        x = checkpoint(self.part, x, use_reentrant=self.use_reentrant)
        return self.last(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
class TestCheckpoint:
    def test_inside_of_a_lean_model(self, use_reentrant, x):
        kinds = assert_same_bits(WithCheckpoint(use_reentrant), x)
        # What the checkpoint computes again leaves no recipes. It keeps its input, which the layer before offered.
        assert all(len(made) <= 3 for made in kinds.values()), kinds

    @pytest.mark.parametrize("level", LEVELS)
    def test_around_a_lean_model(self, use_reentrant, level, x):
        plain = tiny_net()
        lean = leaned(plain, level)
        calls = [
            lambda x, net=net: checkpoint(net, x, use_reentrant=use_reentrant)
            for net in (plain, lean)
        ]
        expected = step(plain, x, calls[0])
        with counted() as kinds:
            found = step(lean, x, calls[1])
        assert_same_values(found, expected)
        # A reentrant checkpoint computes again with gradients, as any forward, and the level holds there.
        assert bool(kinds) == use_reentrant

    @pytest.mark.parametrize("level", ["block", "deepest"])
    def test_parts_at_a_level_inside_of_a_checkpoint_of_a_lean_model(self, use_reentrant, level, x):
        plain = WithCheckpoint(use_reentrant)
        lean = leaned(plain, {"": "block", "part": level})
        assert_same_values(step(lean, x), step(plain, x))


def test_a_checkpoint_inside_keeps_its_input_alone(x):
    """No recipe of its layers is left that would hold what the checkpoint is to drop."""
    held = []
    for level in (None, "block", "deepest"):
        net = leaned(WithCheckpoint(False), level)
        net(x).sum().backward()
        held.append(held_after(lambda net=net: net(x).sum()))
    assert held[1] < held[0] and held[2] <= held[1]


@pytest.mark.parametrize("level", LEVELS)
def test_save_on_cpu_around_and_other_hooks_for_saved_tensors(level, x):
    plain = tiny_net()
    lean = leaned(plain, level)
    expected = step(plain, x)
    seen = []

    def pack(t):
        seen.append(t.shape)
        return t

    for hooks in (
        lambda: torch.autograd.graph.save_on_cpu(),
        lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        with hooks(), counted() as kinds:
            assert_same_values(step(copy.deepcopy(lean), x), expected)
        assert not kinds
    plain_seen, seen[:] = list(seen), []
    with hooks():
        step(plain, x)
    assert plain_seen == seen


@pytest.mark.parametrize("level", LEVELS)
def test_save_on_cpu_inside(level, x):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny_net()

        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                x = self.net[:3](x)
            return self.net[3:](x)

    assert_same_bits(Net(), x, levels=[level])


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_that_may_not_be_set(level, x):
    plain = tiny_net()
    lean = leaned(plain, level)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"), counted() as kinds:
        assert_same_values(step(lean, x), step(plain, x))
    assert not kinds


@pytest.mark.parametrize("level", LEVELS)
def test_hooks_on_inner_modules(level, x):
    """They see the same values, forward and backward; a hook that changes an output changes it as without a level."""
    plain = tiny_net()
    found = []
    for net in (copy.deepcopy(plain), leaned(plain, level)):
        seen = []
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNormAct2d | models.Bottleneck):
                layer.register_forward_hook(
                    lambda _, args, out, name=name, seen=seen: seen.append((name, out.clone()))
                )
        net[3].conv2.register_full_backward_hook(
            lambda _, inputs, outputs, seen=seen: seen.append(("back", outputs[0].clone()))
        )
        net[2].conv1.register_forward_hook(lambda _, args, out: out * 1.5)
        found.append((seen, step(net, x)))
    (expected, values), (seen, others) = found
    assert_same_values(others, values)
    assert [name for name, _ in seen] == [name for name, _ in expected]
    assert len(seen) > 20
    for (name, a), (_, b) in zip(seen, expected, strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("level", LEVELS)
def test_a_hook_that_writes_an_output_in_place(level, x):
    """What it wrote is what counts, although a recipe would make the output as it was."""

    def add_one(_, args, out):
        out[:, ::2].add_(1)

    plain = tiny_net(models.BasicBlock)
    found = []
    for net in (copy.deepcopy(plain), leaned(plain, level)):
        net[0].register_forward_hook(lambda _, args, out: out.mul_(2))
        net[1].register_forward_hook(add_one)
        found.append(step(net, x))
    assert_same_values(found[1], found[0])


@pytest.mark.parametrize("level", LEVELS)
def test_evaluation(level, x):
    """Without gradients, and with them: frozen statistics through the whole network."""
    plain = tiny_net()
    step(plain, x)
    lean = leaned(plain, level)
    plain.eval(), lean.eval()
    assert_same_values(step(lean, x), step(plain, x))
    for context in (torch.no_grad, torch.inference_mode):
        with context(), counted() as kinds:
            assert lean.eval()(x).equal(plain.eval()(x))
            assert lean.train()(x).equal(plain.train()(x))
        assert not kinds


def test_levels_of_single_layers(x):
    """A level on a convolution or a norm alone does not change which operators run."""
    plain = tiny_net()
    step(plain, x)
    names = [name for name, layer in plain.named_modules() if not list(layer.children())]
    lean = leaned(plain, dict.fromkeys(names, "deepest"))
    assert_same_values(step(lean, x), step(plain, x))
    with torch.no_grad():
        plain.eval(), lean.eval()
        torch.testing.assert_close(lean(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lean",
    [
        {"2": "block", "3": "deepest"},
        {"": "deepest", "2": None},
        {"": "stage", "3": "deep", "3.conv1": "block"},
    ],
)
def test_levels_by_parts(lean, x):
    assert_same_bits(tiny_net(), x, levels=[lean])


def test_nested_models(x):
    """A lean model in another one at another level, whose own level holds in it and no longer behind it."""

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_net()[:4]
            self.next = torch.nn.Sequential(
                nn.ConvBNAct(32, 8, 3, act="relu"), nn.ConvBNAct(8, 8, 1)
            )

        def forward(self, x):
            return self.next(self.inner(x))

    plain = Outer()
    for outer in (None, "block", "deepest"):
        for inner in (None, *LEVELS):
            made = leaned(plain, {"": outer, "inner": inner})
            with counted() as kinds:
                assert_same_values(step(made, x), step(copy.deepcopy(plain), x))
            assert bool(kinds) == (outer is not None or inner is not None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.extra)]
)
def test_compile(backend, fresh_compile):
    """Without a graph break, as the plain network; the values are those of the plain network compiled."""
    x = torch.randn(2, 3, 12, 12, dtype=f64)
    plain = tiny_net(blocks=1).to(f64)
    found = []
    for net in (copy.deepcopy(plain), leaned(plain, "deepest")):
        torch.compiler.reset()
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        with counted() as kinds:
            found.append(step(net, x, compiled))
        assert not kinds
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-12, atol=1e-12, msg=key)
    expected = step(plain, x)
    for key, value in expected.items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.slow
def test_a_compiled_part_of_a_lean_model(fresh_compile):
    x = torch.randn(2, 3, 12, 12, dtype=f64)
    plain = tiny_net(blocks=1).to(f64)
    lean = leaned(plain, "deepest")
    lean[2].compile(backend="aot_eager")
    expected, found = step(plain, x), step(lean, x)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-7, atol=1e-9, msg=key)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("level", LEVELS)
def test_tracing_export_and_transforms(level):
    x = torch.randn(2, 3, 12, 12)
    plain = tiny_net(blocks=1)
    lean = leaned(plain, level)
    for make in (
        lambda net: torch.jit.trace(net, x, check_trace=False),
        lambda net: torch.export.export(net, (x,)).module(),
    ):
        assert make(lean)(x).equal(make(copy.deepcopy(plain))(x))


@pytest.mark.parametrize("level", LEVELS)
def test_functional_call_and_transforms(level, no_native_required):
    x = torch.randn(2, 3, 12, 12, dtype=f64)
    plain = tiny_net(blocks=1).to(f64).eval()
    lean = leaned(plain, level)
    found = []
    for net in (plain, lean):
        state = {key: t.detach() for key, t in net.named_parameters()}

        def loss(state, net=net):
            return torch.func.functional_call(net, state, (x,)).square().sum()

        found.append(torch.func.grad(loss)(state))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            found[-1]["jvp"] = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent.detach()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-12, atol=1e-12, msg=key)


def in_threads(train, count):
    """Runs ``train(0)`` to ``train(count - 1)`` at the same time. Raises what one of them raises."""
    with ThreadPoolExecutor(count) as pool:
        for each in [pool.submit(train, index) for index in range(count)]:
            each.result(60)


def test_two_threads_train_two_models():
    """Each at its own level, at the same time. The plain ones run in threads too: torch's sums depend on the thread."""
    nets = [tiny_net(), tiny_net(models.BasicBlock)]
    inputs = [torch.randn(2, 3, 20, 20), torch.randn(3, 3, 17, 17)]
    plain = [copy.deepcopy(net) for net in nets]
    for net, level in zip(nets, ("deepest", "block"), strict=True):
        set_lean(net, level)
    steps = 5

    def run(nets):
        barrier, found = threading.Barrier(2), [[], []]

        def train(index):
            torch.set_num_threads(1)
            net = nets[index]
            for _ in range(steps):
                barrier.wait(30)
                # Not `step`, whose random numbers are of the whole process.
                x = inputs[index].clone().requires_grad_()
                net.zero_grad()
                out = net(x)
                (out.square().mean() + out.sum()).backward()
                values = {f"gradient of {key}": p.grad for key, p in net.named_parameters()}
                found[index].append({**values, "output": out.detach()})

        in_threads(train, 2)
        return found

    for values, others in zip(run(plain), run(nets), strict=True):
        assert len(values) == steps
        for value, other in zip(values, others, strict=True):
            assert_same_values(other, value)


def test_a_forward_in_one_thread_and_its_backward_in_another(x):
    plain = tiny_net()
    lean = leaned(plain, "deepest")

    def elsewhere(loss):
        in_threads(lambda _: loss.backward(), 1)

    expected = step(plain, x, backward=elsewhere)  # torch's sums depend on the thread

    assert_same_values(step(lean, x, backward=elsewhere), expected)


@pytest.mark.parametrize("name", ["lstm_classifier", "convnet"])
def test_networks_without_anything_to_make_again(name):
    """The level brings nothing there, and does no harm."""
    model = models.create_model(name)
    x = torch.randint(0, 10, (5, 2)) if "lstm" in name else torch.randn(2, 3, 32, 32)
    found = []
    for level in (None, *LEVELS):
        net = leaned(model, level)
        torch.manual_seed(0)
        out = net(x)
        out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()
        found.append([out.detach(), *[p.grad for p in net.parameters() if p.grad is not None]])
    for others in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("level", LEVELS)
def test_anomaly_detection(level, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_same_bits(tiny_net(), x, levels=[level])


@pytest.mark.parametrize("level", LEVELS)
def test_tensors_without_data(level):
    """On the meta device, and under ``FakeTensorMode``, with which tools count memory."""
    net = leaned(tiny_net(), level).to("meta")
    net(torch.randn(2, 3, 16, 16, device="meta")).sum().backward()
    assert net[2].conv1.weight.grad.shape == net[2].conv1.weight.shape
    with FakeTensorMode(), counted() as kinds:
        net = set_lean(tiny_net(), level)
        net(torch.randn(2, 3, 16, 16)).sum().backward()
    assert kinds and isinstance(net[2].conv1.weight.grad, FakeTensor)


def test_counted_flops(x):
    """Only the levels that make products again compute more of them, and no more than the forward's."""
    net = tiny_net()
    found = {}
    for level in (None, *LEVELS):
        with FlopCounterMode(display=False) as counter:
            leaned(net, level)(x).sum().backward()
        found[level] = counter.get_total_flops()
    assert found["block"] == found["stage"] == found[None]
    assert found[None] < found["deep"] < 4 / 3 * found[None]
    assert found[None] < found["deepest"] < 4 / 3 * found[None]


@pytest.mark.parametrize("level", LEVELS)
def test_parametrized_weights(level, x):
    """Weights that are not leaves: computed anew in each forward."""
    net = tiny_net()
    torch.nn.utils.parametrizations.weight_norm(net[3].conv3)
    torch.nn.utils.parametrizations.spectral_norm(net[2].downsample[0])
    assert_same_bits(net, x, levels=[level], steps=2)


@pytest.mark.parametrize("level", LEVELS)
def test_empty_batches_and_parameters_as_images(level):
    plain = tiny_net()
    lean = leaned(plain, level)
    for image in (torch.randn(0, 3, 16, 16), torch.randn(2, 3, 16, 16)):
        found = []
        for net in (plain, lean):
            x = torch.nn.Parameter(image.clone())
            net.zero_grad()
            net(x).square().sum().backward()
            found.append({"x": x.grad, **{key: p.grad for key, p in net.named_parameters()}})
        assert_same_values(found[1], found[0])


@pytest.mark.parametrize("level", LEVELS)
def test_the_reference(level, x, no_native_required):
    """Without kernels, the layers are plain PyTorch, which offers nothing; concatenations and max-pooling do."""
    for plain in (tiny_net(), models.UNet(2, base_channels=4, depth=2)):
        lean = leaned(plain, level)
        with use_backend("reference"):
            assert_same_values(step(lean, x), step(plain, x))


class AsksTwice(torch.autograd.Function):
    """A function of a user that reads its saved tensor twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, dout):
        return 3 * ctx.saved_tensors[0] * ctx.saved_tensors[0] * dout


@pytest.mark.parametrize("level", LEVELS)
def test_a_function_that_asks_twice(level, x):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.ConvBNAct(3, 4, 3, act="relu"), nn.ConvBNAct(4, 4, 3)

        def forward(self, x):
            x = self.first(x)
            return AsksTwice.apply(x) + self.second(x)

    assert_same_bits(Net(), x, levels=[level])
