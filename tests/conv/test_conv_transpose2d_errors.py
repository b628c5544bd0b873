"""conv_transpose2d and ConvTranspose2d: bad input is refused as torch refuses it, before anything is computed."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F

import advdl_ops
from advdl_ops.functional import conv_transpose2d
from advdl_ops.nn import ConvTranspose2d

X = (2, 4, 5, 6)


def arguments(**changed):
    found = {
        "input": torch.randn(X),
        "weight": torch.randn(4, 6, 3, 3),
        "bias": torch.zeros(6),
        "stride": 2,
    }
    return found | changed


# id -> (what is changed, the argument that the message names)
CASES = {
    "rank 2": ({"input": torch.randn(4, 6)}, "x"),
    "rank 5": ({"input": torch.randn(2, 4, 1, 5, 6)}, "x"),
    "rank of weight": ({"weight": torch.randn(4, 6, 3)}, "weight"),
    "channels of x": ({"input": torch.randn(2, 5, 5, 6)}, "x"),
    "channels of an unbatched x": ({"input": torch.randn(5, 5, 6)}, "x"),
    "x of no height": ({"input": torch.randn(2, 4, 0, 6)}, "x"),
    "no output": ({"padding": 8}, "x"),
    "x of fp64": ({"input": torch.randn(X).double()}, "weight"),
    "x of integers": ({"input": torch.ones(X, dtype=torch.int64)}, "x"),
    "weight of bf16": ({"weight": torch.randn(4, 6, 3, 3).bfloat16()}, "weight"),
    "bias of fp64": ({"bias": torch.zeros(6).double()}, "bias"),
    "empty kernel": ({"weight": torch.randn(4, 6, 0, 3)}, "weight"),
    "no output channels": ({"weight": torch.randn(4, 0, 3, 3), "bias": None}, "weight"),
    "length of bias": ({"bias": torch.zeros(5)}, "bias"),
    "rank of bias": ({"bias": torch.zeros(6, 1)}, "bias"),
    "bias of groups": ({"groups": 2}, "bias"),
    "groups do not divide": ({"groups": 3}, "groups"),
    "groups 0": ({"groups": 0}, "groups"),
    "groups -2": ({"groups": -2}, "groups"),
    "groups of float": ({"groups": 1.5}, "groups"),
    "stride 0": ({"stride": 0}, "stride"),
    "stride of one axis": ({"stride": (2, 0)}, "stride"),
    "stride of three": ({"stride": (1, 1, 1)}, "stride"),
    "stride of none": ({"stride": ()}, "stride"),
    "stride of float": ({"stride": 1.5}, "stride"),
    "stride of bool": ({"stride": True}, "stride"),
    "negative padding": ({"padding": (0, -1)}, "padding"),
    "padding by name": ({"padding": "same"}, "padding"),
    "dilation 0": ({"dilation": 0}, "dilation"),
    "negative output_padding": ({"output_padding": -1}, "output_padding"),
    "output_padding of stride": ({"output_padding": 2}, "output_padding"),
    "output_padding of one axis": ({"stride": (3, 1), "output_padding": 1}, "output_padding"),
    "output_padding of dilation": ({"dilation": (4, 3), "output_padding": 3}, "output_padding"),
    "array for x": ({"input": torch.randn(X).numpy()}, "x"),
    "None for weight": ({"weight": None}, "weight"),
    "list for bias": ({"bias": [0.0] * 6}, "bias"),
}
# Stock reads memory that is not its own.
OWN_CASES = {
    "weight elsewhere": (
        {"weight": torch.randn(4, 6, 3, 3, device="meta")}, RuntimeError, "weight",
    ),
    "bias elsewhere": ({"bias": torch.zeros(6, device="meta")}, RuntimeError, "bias"),
    "act": ({"act": "mish"}, ValueError, "act"),
    "act module": ({"act": torch.nn.Softplus()}, TypeError, "act"),
}  # fmt: skip


@pytest.fixture(params=list(itertools.product(["fused", "reference"], [True, False])), ids=str)
def _path(request):
    backend, grad = request.param
    with advdl_ops.use_backend(backend), torch.set_grad_enabled(grad):
        yield


@pytest.fixture
def _nothing_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed before all was checked")

    monkeypatch.setattr(F, "conv_transpose2d", refuse)


def refused(call, expected, pattern):
    with pytest.raises(expected) as found:
        call()
    assert re.match(pattern, str(found.value), re.S), str(found.value)
    return found.type


@pytest.mark.usefixtures("_path")
@pytest.mark.parametrize("name", CASES)
def test_as_torch_refuses(name):
    changed, argument = CASES[name]
    given = arguments(**changed)
    with pytest.raises(Exception) as stock:  # noqa: PT011
        F.conv_transpose2d(given["input"], given["weight"], given["bias"], **{
            key: value for key, value in given.items() if key not in ("input", "weight", "bias")
        })  # fmt: skip
    pattern = rf"conv_transpose2d: {argument} \(.+\) must "
    found = refused(lambda: conv_transpose2d(**given, act="relu"), Exception, pattern)
    # Integers are a NotImplementedError here, which torch raises for some of them: one kind of its RuntimeError.
    assert issubclass(found, stock.type) if name == "x of integers" else found is stock.type


@pytest.mark.usefixtures("_path", "_nothing_runs")
@pytest.mark.parametrize("name", [*CASES, *OWN_CASES])
def test_before_anything_runs(name):
    expected, argument = Exception, None
    if name in CASES:
        changed, argument = CASES[name]
    else:
        changed, expected, argument = OWN_CASES[name]
    given = arguments(**changed)
    pattern = rf"conv_transpose2d: {argument} \(.+\) must "
    found = refused(lambda: conv_transpose2d(**given), expected, pattern)
    assert expected in (Exception, found)
    with pytest.raises(AssertionError, match="computed"):
        conv_transpose2d(**arguments())


# id -> (of forward, the type, the argument)
FORWARD = {
    "both": ({"output_size": (10, 12), "match": (10, 12)}, ValueError, "output_size"),
    "match of rank 3": ({"match": torch.randn(4, 10, 12)}, ValueError, "match"),
    "match of rank 5": ({"match": torch.randn(2, 4, 1, 10, 12)}, ValueError, "match"),
    "match of a shape": ({"match": (2, 4, 10, 12)}, ValueError, "match"),
    "match of one": ({"match": (10,)}, ValueError, "match"),
    "match of a number": ({"match": 10}, TypeError, "match"),
    "match of an array": ({"match": torch.randn(X).numpy()}, TypeError, "match"),
    "match of floats": ({"match": (10.0, 12.0)}, TypeError, "match"),
    "match of nothing": ({"match": (0, 12)}, ValueError, "match"),
    "match of a negative size": ({"match": (10, -3)}, ValueError, "match"),
    "x of rank 2": ({"input": torch.randn(4, 6), "match": torch.randn(4, 6)}, RuntimeError, "x"),
    "x of rank 2, sizes": ({"input": torch.randn(4, 6), "match": (4, 6)}, RuntimeError, "x"),
}
# What torch refuses too.
OUTPUT_SIZES = [
    (10, 14), (13, 14), (11, 12), (11, 15), (11,), (4, 11, 14), (2, 6, 1, 11, 14), (0, 0), (11, -1),
]  # fmt: skip


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    given, expected, argument = FORWARD[name]
    layer = ConvTranspose2d(4, 6, 3, 2, act="relu")
    pattern = rf"ConvTranspose2d: {argument} \(.+\) must "
    found = refused(lambda: layer(**{"input": torch.randn(X), **given}), expected, pattern)
    assert found is expected


@pytest.mark.usefixtures("_nothing_runs")
@pytest.mark.parametrize("size", OUTPUT_SIZES, ids=str)
def test_output_size(size):
    layer, stock = ConvTranspose2d(4, 6, 3, 2), torch.nn.ConvTranspose2d(4, 6, 3, 2)
    with pytest.raises(ValueError, match=r"output.size"):
        stock(torch.randn(X), output_size=list(size))
    pattern = r"ConvTranspose2d: output_size \(.+\) must "
    refused(lambda: layer(torch.randn(X), list(size)), ValueError, pattern)
    with pytest.raises(AssertionError, match="computed"):
        layer(torch.randn(X), (12, 13))


def test_constructor():
    with pytest.raises(ValueError, match=r"ConvTranspose2d: act \('rellu'\) must be"):
        ConvTranspose2d(4, 6, 3, act="rellu")
    for bad in ({"groups": 3}, {"groups": 0}, {"padding_mode": "reflect"}):
        with pytest.raises(ValueError) as stock:  # noqa: PT011
            torch.nn.ConvTranspose2d(4, 6, 3, **bad)
        with pytest.raises(ValueError) as found:  # noqa: PT011
            ConvTranspose2d(4, 6, 3, **bad)
        assert str(found.value) == str(stock.value)


def test_layer_refuses_what_the_function_refuses():
    layer = ConvTranspose2d(4, 6, 3, 2, act="relu")
    for x in (torch.randn(2, 5, 5, 6), torch.randn(X).double(), torch.ones(X, dtype=torch.int32)):
        refused(lambda x=x: layer(x), RuntimeError, r"conv_transpose2d: (x|weight) \(.+\) must ")
        refused(lambda x=x: layer(x, match=(11, 13)), RuntimeError, r"conv_transpose2d: .* must ")
