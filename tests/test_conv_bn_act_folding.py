"""Where folding a norm into a convolution must stand back: what it cannot see, differentiate or compute."""

import pytest
import torch

from advdl_ops import backend, functional, nn

X = (2, 3, 9, 9)


def block(**options):
    torch.manual_seed(0)
    layer = nn.ConvBNAct(3, 8, 3, **options)
    torch.nn.init.uniform_(layer.bn.running_mean)
    torch.nn.init.uniform_(layer.bn.running_var, 0.5, 2)
    return layer.eval().requires_grad_(False)


def unfolded(layer, x):
    return layer.bn(layer.conv(x))


@pytest.fixture
def reference_allowed(monkeypatch):
    monkeypatch.setattr(backend, "_require_native", False)


def test_forward_mode_derivative(reference_allowed):
    layer = block(act="silu")
    x, v = torch.randn(X), torch.randn(X)
    out, tangent = torch.func.jvp(layer, (x,), (v,))
    expected = (layer(x + 1e-3 * v) - layer(x - 1e-3 * v)) / 2e-3
    assert tangent.abs().max() > 0.1
    torch.testing.assert_close(tangent, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(out, unfolded(layer, x), rtol=1e-4, atol=1e-5)


def test_vmap(reference_allowed):
    layer = block(act="relu")
    x = torch.randn(4, *X)
    torch.testing.assert_close(
        torch.func.vmap(layer)(x), torch.stack([layer(y) for y in x]), rtol=1e-4, atol=1e-5
    )
    assert layer.bn.folded is None or not torch._C._functorch.is_batchedtensor(layer.bn.folded.bias)


def test_own_conv_forward_is_called():
    class Silent(torch.nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight * 0, bias)

    layer = block()
    layer.conv.__class__ = Silent
    x = torch.randn(X)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), unfolded(layer, x))
        assert layer(x).std((0, 2, 3)).max() == 0


def test_parametrized_weight_is_never_stale():
    class Double(torch.nn.Module):
        def forward(self, weight):
            return weight * 2

    layer = block()
    torch.nn.utils.parametrize.register_parametrization(layer.conv, "weight", Double())
    x = torch.randn(X)
    with torch.no_grad():
        for _ in range(3):
            layer.conv.parametrizations.weight.original[:, 0, 0, 0] += 1
            torch.testing.assert_close(layer(x), unfolded(layer, x))


def test_inference_mode_parameters_are_never_stale():
    with torch.inference_mode():
        layer = block()
        x = torch.randn(X)
        for _ in range(2):
            layer.conv.weight[:, 0, 0, 0] += 1
            torch.testing.assert_close(layer(x), unfolded(layer, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(8, 3, 3)}, "weight"),
        ({"bias": torch.ones(1)}, "bias"),
        ({"bias": torch.ones(8, dtype=torch.float64)}, "bias"),
        ({"bias": torch.ones(8, device="meta")}, "bias"),
        ({"residual": torch.ones(2, 8, 1, 7)}, "residual"),
    ],
)
def test_folding_refuses_what_a_convolution_refuses(change, message):
    arguments = {"x": torch.randn(X), "weight": torch.randn(8, 3, 3, 3), **change}
    with pytest.raises((RuntimeError, ValueError), match=rf"^conv_bn_act: {message} \("):
        functional.conv_bn_act(
            running_mean=torch.zeros(8), running_var=torch.ones(8), act="relu", **arguments
        )


def test_unbatched_image_is_refused_alike_with_and_without_gradients():
    for grad in (True, False):
        weight = torch.randn(8, 3, 3, 3, requires_grad=grad)
        with pytest.raises(ValueError, match="must be"):
            functional.conv_bn_act(torch.randn(3, 10, 9), weight, torch.zeros(8), torch.ones(8))


def test_stride_as_a_sequence_of_one():
    x, weight = torch.randn(X), torch.randn(8, 3, 3, 3)
    statistics = torch.zeros(8), torch.ones(8)
    residual = torch.randn(2, 8, 4, 4)
    out = functional.conv_bn_act(x, weight, *statistics, stride=(2,), residual=residual)
    expected = functional.conv_bn_act(x, weight, *statistics, stride=2, residual=residual)
    torch.testing.assert_close(out, expected)
