"""The folded convolution that evaluation keeps: used again, dropped in time, and never stale."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.prune
from torch.profiler import profile

from advdl_ops._conv import choice
from advdl_ops._conv.choice import PREPACKED
from advdl_ops._conv.folded import SCALED
from advdl_ops._conv.winograd import TILES, Tile
from advdl_ops.nn import BatchNormAct2d, ConvBNAct
from advdl_ops.nn import conv_bn_act as siblings

pytestmark = pytest.mark.usefixtures("one_thread")
f32, f64 = torch.float32, torch.float64
# In fp32 the weight with the norm in it is kept, in oneDNN's layout but for depthwise layers; or it is transformed for
# Winograd's tiles. In fp64 nothing is kept.
KINDS = {"packed": {}, "plain": {"dtype": f64}, "depthwise": {"groups": 6}, "winograd": {}}
KIND = pytest.mark.parametrize("kind", KINDS)
CHANNELS = {"packed": (4, 6), "plain": (4, 6), "depthwise": (6, 6), "winograd": (65, 32)}


@pytest.fixture(autouse=True)
def _winograd_serves_its_kind(monkeypatch):
    """Whatever the size of the image."""
    t = choice.thresholds()._replace(
        winograd_channels=16, winograd_pixels_kept=1, winograd_waste=10_000
    )
    monkeypatch.setattr(choice, "thresholds", lambda: t)
    choice.forget()
    yield
    choice.forget()


def make(kind="packed", **options):
    """A layer in eval with statistics of its own, and an input."""
    options = {"bias": True, "act": "silu", **KINDS[kind], **options}
    channels, outputs = CHANNELS[kind]
    layer = ConvBNAct(channels, outputs, 3, **options)
    with torch.no_grad():
        layer.bn.running_mean.normal_()
        layer.bn.running_var.uniform_(0.5, 2)
        layer.bn.weight.uniform_(0.5, 1.5)
        layer.bn.bias.normal_()
    # Outputs of about the same size for any number of channels.
    x = torch.randn(2, channels, 7, 9, dtype=options.get("dtype")) * (4 / channels) ** 0.5
    return layer.eval(), x


def unfolded(layer, x):
    """What the layer must give: a copy with nothing cached, under gradients, where nothing is folded."""
    with torch.enable_grad():
        fresh = copy.deepcopy(layer)
        assert fresh.bn.folded is None
        return fresh(x).detach()


def assert_fresh(layer, x):
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(x), copy.deepcopy(layer)(x))
            if x.dtype in (f32, f64):  # in half precision what is not folded is rounded in between
                torch.testing.assert_close(layer(x), unfolded(layer, x))


def fill(layer, x):
    with torch.no_grad():
        out = layer(x)
    assert (layer.bn.folded is not None) == (x.dtype == f32)
    if layer.conv.in_channels == CHANNELS["winograd"][0]:
        assert [type(form) for form in layer.bn.folded.kept] == [Tile]
    return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@KIND
def test_reused(kind, layout):
    layer, x = make(kind)
    x = x.contiguous(memory_format=layout)
    first = fill(layer, x)
    kept = layer.bn.folded
    with torch.no_grad():
        assert torch.equal(layer(x), first)
        other = torch.randn(5, x.shape[1], 9, 9, dtype=x.dtype)
        layer(other.contiguous(memory_format=layout))  # another size
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), first)
    assert layer.bn.folded is kept


@KIND
def test_other_sizes_and_layouts_from_the_same_cache(kind):
    layer, x = make(kind)
    fill(layer, x)
    for n, height, width in [(1, 3, 3), (7, 12, 9), (0, 7, 5), (2, 1, 1)]:
        other = torch.randn(n, x.shape[1], height, width, dtype=x.dtype)
        assert_fresh(layer, other)
        assert_fresh(layer, other.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_call_copies_nothing_of_the_weights_size(memory_format):
    """To look for changes takes a few values: in channels_last it once copied every weight, 8 % of a ResNet-50."""
    layer, x = make()
    layer.to(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    fill(layer, x)
    with torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        layer(x)
    weight = list(layer.conv.weight.shape)
    copied = [e for e in profile.events() if e.name in ("aten::copy_", "aten::clone")]
    assert not [e for e in copied if weight in e.input_shapes]


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name_is_kept_too(padding):
    layer, x = make(padding=padding, dilation=2)
    fill(layer, x)
    assert_fresh(layer, x)


def test_padding_of_two_different_sides_is_not_kept():
    layer = ConvBNAct(4, 6, 4, padding="same").eval()
    x = torch.randn(2, 4, 7, 9)
    assert_fresh(layer, x)
    assert layer.bn.folded is None


def test_a_weight_in_one_layout_is_given_back_in_the_other():
    """Prepacked for channels_last, and plain where a contiguous image is larger than the weight."""
    layer, _ = make()
    large = torch.randn(2, 4, 20, 20)
    last = large.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        first, plain = layer(last), copy.deepcopy(layer)(large)
        folded = layer.bn.folded
        assert list(folded.kept) == [PREPACKED]
        assert torch.equal(layer(large), plain)
        assert layer.bn.folded is folded
        assert list(folded.kept) == [SCALED]
        assert torch.equal(layer(last), first)
        assert set(folded.kept) == {SCALED, PREPACKED}  # both are asked for
        assert torch.equal(layer(large), plain)
    assert set(folded.kept) == {SCALED, PREPACKED}


def test_a_weight_for_each_tile_that_is_asked_for_again():
    layer, x = make("winograd")
    wide = torch.randn(1, 65, 40, 40)
    with torch.no_grad():
        first, second = layer(x), layer(wide)
        folded = layer.bn.folded
        assert list(folded.kept) == [TILES[1]]  # that of x is dropped
        packed = folded.kept[TILES[1]]
        assert torch.equal(layer(x), first)
        assert torch.equal(layer(wide), second)
    assert layer.bn.folded is folded and set(folded.kept) == set(TILES[:2])
    assert folded.kept[TILES[1]] is packed


def test_a_transformed_weight_is_all_that_is_kept_and_is_made_once():
    layer, x = make("winograd")
    with profile() as made:
        fill(layer, x)
    with profile() as used:
        fill(layer, x)
    packs = [[e.name for e in p.events()].count("advdl_ops::winograd_pack") for p in (made, used)]
    assert packs == [1, 0]
    kept = [t for t in vars(layer.bn.folded).values() if isinstance(t, torch.Tensor)]
    assert all(t.dim() == 1 for t in kept)  # scale, shift and the sample: no weight


DROPS = {
    "train": lambda layer, x: layer.train(),
    "eval": lambda layer, x: layer.eval(),
    "bn.train": lambda layer, x: layer.bn.train(),
    "load_state_dict": lambda layer, x: layer.load_state_dict(layer.state_dict()),
    "load_state_dict, assign": lambda layer, x: layer.load_state_dict(
        {k: v.clone() for k, v in layer.state_dict().items()}, assign=True
    ),
    "to(dtype)": lambda layer, x: layer.to(torch.bfloat16),
    "half": lambda layer, x: layer.half(),
    "to(memory_format)": lambda layer, x: layer.to(memory_format=torch.channels_last),
    "_apply": lambda layer, x: layer._apply(lambda t: t),
    "forward with gradients": lambda layer, x: layer(x),
    "forward in training": lambda layer, x: layer.train()(x),
}


@KIND
@pytest.mark.parametrize("drop", DROPS)
def test_dropped(drop, kind):
    layer, x = make(kind)
    fill(layer, x)
    DROPS[drop](layer, x)
    assert layer.bn.folded is None
    layer.eval()
    assert_fresh(layer, x.to(layer.conv.weight.dtype))


@pytest.mark.parametrize("what", ["x", "conv.weight", "bn.weight", "residual"])
def test_gradients_on_one_tensor_alone(what):
    layer, x = make()
    layer.requires_grad_(False)
    residual = torch.randn_like(fill(layer, x))
    tensors = {"x": x, "conv.weight": layer.conv.weight, "bn.weight": layer.bn.weight}
    leaf = (tensors | {"residual": residual})[what].requires_grad_()
    out = layer(x, residual)
    assert out.requires_grad
    assert layer.bn.folded is None
    out.sum().backward()
    assert leaf.grad.abs().max() > 0


def frozen_needs_no_no_grad():
    layer, x = make()
    layer.requires_grad_(False)
    layer(x)
    return layer


def test_frozen_layer_folds_with_gradients_enabled():
    assert frozen_needs_no_no_grad().bn.folded is not None


def optimizer_step(kind, **options):
    def change(layer, x):
        optimizer = kind(layer.parameters(), **options)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return change


def ema(layer, x):
    for parameter in layer.parameters():
        parameter.data.copy_(parameter.data * 0.9 + 0.1)


def assign(name, value):
    def change(layer, x):
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner), attribute, value(layer))

    return change


@torch.no_grad()
def in_place(layer, x):
    layer.conv.weight.mul_(1.5)


@torch.no_grad()
def in_place_between_samples(layer, x):
    # One value that the cache's sample of the weight does not hold: its version counter tells.
    layer.conv.weight[0, 0, 0, 0] += 5
    layer.conv.weight[5, -1, 2, 2] -= 5


@torch.no_grad()
def foreach(layer, x):
    torch._foreach_mul_(list(layer.parameters()), 1.25)


def numpy_write(layer, x):
    layer.bn.bias.detach().numpy()[2] = 3.0


def set_data(name):
    def change(layer, x):
        owner, attribute = name.split(".")
        tensor = getattr(getattr(layer, owner), attribute)
        tensor.data = tensor.data * 2 + 1

    return change


# Those beyond version counters and pointers: fused steps and writes through .data or numpy.
CHANGES = {
    "AdamW, fused": optimizer_step(torch.optim.AdamW, fused=True, lr=0.1),
    "AdamW": optimizer_step(torch.optim.AdamW, lr=0.1),
    "AdamW, foreach": optimizer_step(torch.optim.AdamW, foreach=True, lr=0.1),
    "SGD": optimizer_step(torch.optim.SGD, lr=0.1),
    "SGD, fused": optimizer_step(torch.optim.SGD, fused=True, lr=0.1),
    "EMA": ema,
    "in place": in_place,
    "in place, two values": in_place_between_samples,
    "foreach": foreach,
    "running_mean.add_": lambda layer, x: layer.bn.running_mean.add_(1),
    "running_var.data": lambda layer, x: layer.bn.running_var.data.mul_(2),
    "running_mean.data, one value": lambda layer, x: layer.bn.running_mean.data[3:4].add_(1),
    "bn.weight.data": lambda layer, x: layer.bn.weight.data.__setitem__(slice(None), 2.0),
    "bn.weight.data, one value": lambda layer, x: layer.bn.weight.data.__setitem__(1, -3.0),
    "bn.bias.data": lambda layer, x: layer.bn.bias.data.__setitem__(0, 9.0),
    "bn.bias by numpy": numpy_write,
    "conv.bias.data": lambda layer, x: layer.conv.bias.data.__setitem__(5, 9.0),
    "pruned output channel": lambda layer, x: layer.conv.weight.data.__setitem__(4, 0.0),
    "scaled output channel": lambda layer, x: layer.conv.weight.data[2].mul_(1.01),
    "conv.weight.data replaced": set_data("conv.weight"),
    "bn.running_var.data replaced": set_data("bn.running_var"),
    "new conv.weight": assign(
        "conv.weight", lambda layer: torch.nn.Parameter(layer.conv.weight.detach() * 2)
    ),
    "new bn.running_mean": assign("bn.running_mean", lambda layer: layer.bn.running_mean + 1),
    "no conv.bias": assign("conv.bias", lambda layer: None),
    "bn.bias None": assign("bn.bias", lambda layer: None),
    "eps": assign("bn.eps", lambda layer: 0.5),
    "stride": assign("conv.stride", lambda layer: (2, 2)),
    "padding_mode": assign("conv.padding_mode", lambda layer: "circular"),
    "act": assign("act", lambda layer: BatchNormAct2d(1, act="tanh").act),
    "act of the norm": assign("bn.act", lambda layer: BatchNormAct2d(1, act="relu").act),
    "training steps between": lambda layer, x: (layer.train()(x), layer.eval()),
    "init": lambda layer, x: torch.nn.init.uniform_(layer.conv.weight),
    "reset_running_stats": lambda layer, x: layer.bn.reset_running_stats(),
    "conv.load_state_dict": lambda layer, x: layer.conv.load_state_dict(
        {k: v * 2 for k, v in layer.conv.state_dict().items()}
    ),
    "swap": lambda layer, x: layer.bn.load_state_dict(
        BatchNormAct2d(layer.bn.num_features).state_dict()
    ),
}


@KIND
@pytest.mark.parametrize("change", CHANGES)
def test_never_stale(change, kind):
    layer, x = make(kind)
    before = fill(layer, x).clone()
    CHANGES[change](layer, x)
    assert_fresh(layer, x)
    with torch.no_grad():
        after = layer(x)
    if change != "training steps between":
        assert after.shape != before.shape or not torch.equal(after, before), "nothing was changed"


def test_stale_never_over_many_fused_steps():
    layer, x = make()
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True, lr=1e-2)
    for _ in range(3):
        layer(x).square().mean().backward()
        fill(layer, x)
        optimizer.step()
        optimizer.zero_grad()
        assert_fresh(layer, x)


def test_swapped_statistics_of_the_same_values_elsewhere():
    # A weight freed and another allocated at its address must not be taken for the first.
    layer, x = make()
    for _ in range(5):
        fill(layer, x)
        layer.conv.weight = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
        assert_fresh(layer, x)


def test_parametrized_weight():
    layer, x = make()
    torch.nn.utils.parametrizations.weight_norm(layer.conv)
    assert_fresh(layer, x)
    with torch.no_grad():
        layer.conv.parametrizations.weight.original0.mul_(2)
    assert_fresh(layer, x)


def test_pruned_by_torch():
    layer, x = make()
    fill(layer, x)
    torch.nn.utils.prune.random_unstructured(layer.conv, "weight", amount=0.5)
    assert_fresh(layer, x)
    torch.nn.utils.prune.remove(layer.conv, "weight")
    assert_fresh(layer, x)


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "global", "patched"])
@pytest.mark.parametrize("owner", ["conv", "bn"])
def test_hooks_are_honoured(owner, kind):
    layer, x = make()
    fill(layer, x)
    module = getattr(layer, owner)
    seen = []
    if kind == "forward":
        handle = module.register_forward_hook(lambda m, args, out: (seen.append(m), out * 2)[1])
    elif kind == "forward_pre":
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(m))
    elif kind == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda m, args, out: seen.append(m) if m is module else None
        )
    else:
        handle = None
        original = module.forward
        module.forward = lambda *a: (seen.append(module), original(*a))[1]
    with torch.no_grad():
        hooked = layer(x)
    assert seen == [module]
    if handle is not None:
        handle.remove()
        with torch.no_grad():
            plain = layer(x)
        assert seen == [module]
        assert torch.allclose(hooked, plain, rtol=1e-4, atol=1e-5) == (kind != "forward")


def test_subclass_with_its_own_forward_is_honoured():
    class Doubled(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    conv, bn = Doubled(4, 6, 3, dtype=f64), BatchNormAct2d(6, dtype=f64).eval()
    x = torch.randn(2, 4, 5, 5, dtype=f64)
    with torch.no_grad():
        torch.testing.assert_close(siblings(conv, bn, x), bn(conv(x)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@KIND
def test_copies_with_a_filled_cache(kind, how):
    layer, x = make(kind)
    expected = fill(layer, x)
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert other.bn.folded is None
    with torch.no_grad():
        assert torch.equal(other(x), expected)
        other.bn.bias.add_(1)
        assert not torch.allclose(other(x), expected)
        assert torch.equal(layer(x), expected)


def test_cache_is_no_state():
    layer, x = make()
    keys = list(layer.state_dict())
    fill(layer, x)
    assert list(layer.state_dict()) == keys
    assert len(list(layer.buffers())) == 3
    assert "folded" not in repr(layer)


def test_functional_call_uses_what_is_passed():
    layer, x = make()
    other, _ = make()
    expected = fill(other, x)
    before = fill(layer, x)
    with torch.no_grad():
        out = torch.func.functional_call(layer, dict(other.state_dict()), (x,))
        torch.testing.assert_close(out, expected)
        assert torch.equal(layer(x), before)


def test_cache_made_in_inference_mode_serves_outside():
    layer, x = make()
    with torch.inference_mode():
        inside = layer(x)
    assert_fresh(layer, x)
    torch.testing.assert_close(layer(x).detach(), inside)
    layer(x).sum().backward()
    assert layer.conv.weight.grad is not None


def test_layer_made_in_inference_mode():
    with torch.inference_mode():
        layer, x = make()
        expected = layer(x)
        torch.testing.assert_close(layer(x), expected)
        layer.bn.bias.add_(1)
        assert not torch.allclose(layer(x), expected)


def test_one_norm_behind_two_convolutions():
    bn = BatchNormAct2d(6, dtype=f64).eval()
    convs = [torch.nn.Conv2d(4, 6, 3, dtype=f64) for _ in range(2)]
    x = torch.randn(2, 4, 5, 5, dtype=f64)
    with torch.no_grad():
        for _ in range(2):
            for conv in convs:
                torch.testing.assert_close(siblings(conv, bn, x), bn(conv(x)))


def test_onednn_switched_off_between_calls():
    layer, x = make()
    before = fill(layer, x)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        torch.testing.assert_close(layer(x), before)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before)


def test_module_is_left_as_it_was():
    layer, x = make()
    kept = {k: v.clone() for k, v in layer.state_dict().items()}
    versions = {k: v._version for k, v in layer.state_dict(keep_vars=True).items()}
    fill(layer, x)
    fill(layer, x)
    for key, t in layer.state_dict(keep_vars=True).items():
        assert torch.equal(t, kept[key]), key
        assert t._version == versions[key], key
