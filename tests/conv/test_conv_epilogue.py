"""What the convolutions keep between calls; when they go past the dispatcher, or past their own autograd Function."""

import importlib
import threading
from collections import Counter

import pytest
import torch
from support.accuracy import channels_last
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from advdl_ops._conv import epilogue as _epilogue
from advdl_ops._conv import problem
from advdl_ops._conv.epilogue import unit_statistics
from advdl_ops.backend import unwatched
from advdl_ops.functional import conv2d

# The name in the package is the function's.
CONV2D = importlib.import_module("advdl_ops.functional.conv2d")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    found = {}
    monkeypatch.setattr(_epilogue, "_kept", found)
    return found


def inputs(dtype=torch.float32):
    """x, weight and a scale that needs a gradient, by which the epilogue is a pass of its own."""
    scale = torch.ones(3, dtype=dtype).requires_grad_()
    return torch.randn(2, 4, 5, 6, dtype=dtype), torch.randn(3, 4, 3, 3, dtype=dtype), scale


def scaled(x, weight, scale):
    return conv2d(x, weight, scale=scale, act="silu")


def check_step():
    """A step through the epilogue and its derivative."""
    x, weight, scale = inputs()
    scaled(x, weight, scale).sum().backward()
    z = torch.nn.functional.conv2d(x, weight)
    sigmoid = z.sigmoid()
    exact = (z * (sigmoid + z * sigmoid * (1 - sigmoid))).sum((0, 2, 3))
    torch.testing.assert_close(scale.grad, exact, rtol=1e-5, atol=1e-4)


def test_statistics_are_kept_by_channels_and_dtype(kept):
    like = torch.empty(2, 3)
    unit = unit_statistics(3, like)
    assert unit_statistics(3, like.bfloat16()) is unit
    others = unit_statistics(4, like), unit_statistics(3, like.double())
    assert len(kept) == 3 and others[0].stats.dtype != others[1].stats.dtype
    for channels, (stats, mean, var) in zip((3, 4, 3), (unit, *others), strict=True):
        assert torch.equal(stats, torch.stack([mean, var]))
        assert mean.tolist() == [0] * channels and var.tolist() == [1] * channels


def test_no_more_are_kept_than_said(kept, monkeypatch):
    monkeypatch.setattr(_epilogue, "_KEPT_AT_MOST", 2)
    for channels in range(1, 6):
        assert unit_statistics(channels, torch.empty(1)).var.shape == (channels,)
    assert [key[1] for key in kept] == [1, 2]


def test_made_in_inference_mode_and_used_under_autograd(kept, monkeypatch):
    monkeypatch.setattr(problem, "_INSTRUCTIONS", {})  # as if the CPU had those for bf16
    with torch.inference_mode():
        scaled(*inputs(torch.bfloat16))  # in fp32, as in half precision no scale is folded
    assert len(kept) == 1
    (unit,) = kept.values()
    assert not any(t.is_inference() or t.requires_grad for t in unit)
    weight = torch.ones(3, requires_grad=True)
    (weight * unit.var).sum().backward()
    assert torch.equal(weight.grad, torch.ones(3))
    check_step()
    assert len(kept) == 1


def test_what_a_tracer_makes_is_not_kept(kept, fresh_compile):
    x, weight, scale = inputs()
    torch.compile(scaled, fullgraph=True, backend="aot_eager")(x, weight, scale).sum().backward()
    assert not kept
    make_fx(lambda x: unit_statistics(3, x).stats + 0)(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert type(unit_statistics(3, fake).stats) is not torch.Tensor
    torch.func.vmap(lambda x: x + unit_statistics(3, x).var.sum())(x)
    torch.func.grad(lambda x: unit_statistics(3, x).var.sum() + x.sum())(x)
    assert not kept
    check_step()
    assert len(kept) == 1


def test_two_threads_get_one(kept, monkeypatch):
    made, barrier, found = _epilogue._made, threading.Barrier(2, timeout=30), []

    def made_at_once(channels, like):
        barrier.wait()  # neither has put it away yet
        return made(channels, like)

    monkeypatch.setattr(_epilogue, "_made", made_at_once)
    threads = [
        threading.Thread(target=lambda: found.append(unit_statistics(3, torch.empty(1))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] is found[1]
    assert list(kept.values()) == found[:1]


# ---- past the dispatcher, past the Function ----


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[str(function)] += 1
        return function(*args, **(kwargs or {}))


class Watching(torch.Tensor):
    """A subclass without any method: what it computes on is not known to be plain."""


def test_who_watches_sees_the_operators():
    x, weight, scale = inputs()
    with Recorded() as recorded:
        assert not unwatched(x)
        scaled(x, weight, scale).sum().backward()
    assert recorded.names["advdl_ops.conv2d.default"] == 1
    assert unwatched(x, None, torch.nn.Parameter(x))
    assert not unwatched(x, x.as_subclass(Watching))
    assert torch.func.vmap(lambda x: x * unwatched())(x).abs().sum() == 0


@pytest.mark.parametrize("act", [None, "relu", "silu", "elu"])
@pytest.mark.parametrize("shape", [(1, 4, 5, 6), (4, 16, 17, 15)])
def test_whoever_derives_the_gradients_are_the_same(act, shape, monkeypatch):
    """Torch's own nodes where they are as good, else the Function."""
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(6, shape[1], 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)

    def call(x):
        return conv2d(x, weight, bias, padding=1, act=act)

    def gradients():
        out = call(x)
        return out.grad_fn.name(), (out, *torch.autograd.grad(out.sin().sum(), (x, weight, bias)))

    name, found = gradients()
    assert "Conv2dFunction" not in name
    assert "Conv2dFunction" in call(channels_last(x)).grad_fn.name()
    for given in ({"padding": 8, "dilation": 8}, {"scale": bias}, {"groups": 2}):
        w = weight[:, : shape[1] // 2].contiguous() if "groups" in given else weight
        name = conv2d(x, w, bias, **{"padding": 1, **given}).grad_fn.name()
        assert ("Conv2dFunction" in name) == ("groups" not in given), given
    monkeypatch.setattr(CONV2D, "_torch_derives_as_well", lambda *_: False)
    name, expected = gradients()
    assert "Conv2dFunction" in name
    for own, e in zip(found, expected, strict=True):
        torch.testing.assert_close(own, e, rtol=1e-4, atol=1e-4)
        assert own.stride() == e.stride()


@pytest.mark.parametrize("shape", [(2, 1, 5, 6), (2, 4, 1, 1), (2, 1, 1, 1)])
def test_the_format_where_sizes_leave_it_open(shape):
    """Torch goes by the strides, also where a size of 1 makes them say nothing."""

    def both(t):
        last = torch.empty(t.shape, memory_format=torch.channels_last).copy_(t)
        return t.requires_grad_(), last.requires_grad_()

    for x in both(torch.randn(shape)):
        for weight in both(torch.randn(6, shape[1], 3, 3)):
            out = conv2d(x, weight, padding=1, act="relu")
            (dx,) = torch.autograd.grad(out.sum(), x)
            for t in (out, dx):
                assert t.stride() == torch.empty(t.shape).stride(), (x.stride(), weight.stride())
