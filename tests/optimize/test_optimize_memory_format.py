"""optimize(): channels_last inside the model, and what forbids it."""

import copy

import pytest
import torch
from support.optimize import Chain, Holds, Noise, X, branches, formats_of_last, group_norm, same
from torch import nn as stock

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread", "formats_unwatched")


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


def test_hooks_forbid_channels_last():
    model = Chain(stock.Identity()).eval()
    model.between.register_forward_hook(lambda *_: None)
    assert "between: it has hooks" in str(advdl_ops.explain(advdl_ops.optimize(model)))


# ---- calls that no graph is for ----


class ViewsIfTold(stock.Module):
    def forward(self, x, views=False):
        return x.view(x.shape[0], -1).view(x.shape) * 2 if views else x * 2


class Tells(Chain):
    """Calls what is between with an argument."""

    told = (True,)

    def forward(self, x):
        return self.last(self.between(self.first(x), *self.told))


class TellsOfSizes(Chain):
    """The same without a graph."""

    def forward(self, x):
        x = self.first(x)
        return self.last(self.between(x, x.shape[0] > 1) if x.shape[0] > 1 else x)


class ViewsOrNot(Chain):
    def forward(self, x, views=False):
        x = x.view(x.shape) * 2 if views else x
        return self.last(self.between(self.first(x)))


@pytest.mark.parametrize("kind", [Tells, TellsOfSizes])
def test_a_call_that_no_graph_is_for_forbids_channels_last(kind):
    model = kind(ViewsIfTold()).double().eval()
    fast = advdl_ops.optimize(model)
    assert "it calls between in a way that has no graph, and there it uses view" in str(
        advdl_ops.explain(fast)
    )
    seen = formats_of_last(fast)
    with torch.no_grad():
        same(fast(X), model(X))
    assert seen == [False]


@pytest.mark.parametrize("told", [(), (False,)])
def test_a_call_that_a_graph_is_for_allows_channels_last(told):
    kind = type("TellsNothing", (Tells,), {"told": told})
    model = kind(ViewsIfTold()).double().eval()
    fast = advdl_ops.optimize(model)
    seen = formats_of_last(fast)
    with torch.no_grad():
        same(fast(X), model(X))
    assert seen == [True]


def test_the_model_is_called_as_it_was_traced_or_without_channels_last():
    model = ViewsOrNot(stock.Identity()).double().eval()
    fast = advdl_ops.optimize(model)
    seen = formats_of_last(fast)
    with torch.no_grad():
        same(fast(X), model(X))
        same(fast(X, True), model(X, True))
        same(fast(X, views=False), model(X))
    assert seen == [True, False, True]
