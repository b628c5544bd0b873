"""``torch.fx`` on the zoo and on optimized models, and ``optimize`` of what it made."""

import copy
import pickle

import pytest
import torch
from support.layers import ONE_OF_EACH
from support.torchvision_stub import torchvision_models
from torch import fx
from torch import nn as stock

import advdl_ops
from advdl_ops import models, nn

stocks = torchvision_models()
extraction = pytest.importorskip("torchvision.models.feature_extraction")
f64 = torch.float64


def resnet(name="resnet18"):
    torch.manual_seed(0)
    return getattr(stocks, name)(num_classes=5).eval()


def zoo(original, name="resnet18"):
    ours = models.create_model(name, num_classes=5).eval()
    ours.load_state_dict(original.state_dict())
    return ours


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("kind", ["optimized", "zoo"])
def test_feature_extractors_find_every_node(kind, name):
    original = resnet(name)
    ours = advdl_ops.optimize(original) if kind == "optimized" else zoo(original, name)
    nodes = extraction.get_graph_node_names(original)
    for own, names in zip(extraction.get_graph_node_names(ours), nodes, strict=True):
        assert sorted(own) == sorted(names)
    wanted = {node: node for node in nodes[0]}
    original, ours, x = original.double(), ours.double(), torch.randn(1, 3, 64, 64, dtype=f64)
    found = extraction.create_feature_extractor(ours, wanted)(x)
    expected = extraction.create_feature_extractor(original, wanted)(x)
    for node in nodes[0]:
        torch.testing.assert_close(found[node], expected[node], rtol=1e-8, atol=1e-9, msg=node)


@pytest.mark.parametrize(
    "name",
    ["unet", "unet_resnet18", "fcn_resnet50", "deeplabv3_resnet50", "convnet", "fcn_dilated"],
)
def test_the_zoo_is_traced(name):
    model = models.create_model(name, num_classes=2).eval()
    x = torch.randn(2, 3, 64, 64)
    found, expected = fx.symbolic_trace(model)(x), model(x)
    out = [o["out"] if isinstance(o, dict) else o for o in (found, expected)]
    torch.testing.assert_close(*out, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3), nn.BatchNormAct2d(4, act="relu"), nn.GroupNorm(2, 4), nn.LayerNorm2d(4),
        nn.InstanceNorm2d(4), nn.ConvTranspose2d(4, 4, 2), nn.ConvBNAct(4, 4, 3, act="silu"),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_a_layer_is_one_node(layer):
    model = stock.Sequential(layer, stock.ReLU()).eval()
    traced = fx.symbolic_trace(model)
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(traced(x), model(x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    inner = ["0.conv", "0.bn"] if isinstance(layer, nn.ConvBNAct) else ["0"]
    assert calls == [*inner, "1"]


def same(found, expected):
    if not isinstance(found, dict):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["symbolic_trace", "extractor"])
def test_optimized_graph_modules(kind):
    if kind == "extractor":  # it replaces its graph when the mode changes
        original = extraction.create_feature_extractor(resnet(), {"layer2": "a", "avgpool": "b"})
    else:
        original = fx.symbolic_trace(resnet())
    for layer in original.modules():  # the two share their statistics
        if isinstance(layer, stock.BatchNorm2d):
            layer.momentum = 0.0
    x = torch.randn(2, 3, 64, 64)
    fast = advdl_ops.optimize(original)
    assert len(advdl_ops.explain(fast, as_dict=True)["fused"]) == 20
    same(fast(x), original(x))
    expected = original(x)
    for mode in (True, False):
        same(fast.train(mode)(x), copy.deepcopy(original).train(mode)(x))
        same(original(x), expected)
    expected = fast(x)
    if kind == "symbolic_trace":
        assert len(advdl_ops.explain(fast, as_dict=True)["fused"]) == 20
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(again.eval()(x), expected)
    same(fast(x), expected)
    fast.recompile()
    same(fast(x), expected)
    assert advdl_ops.explain(fast, as_dict=True)["fused"] == []
    for node in fast.graph.nodes:
        if node.op == "output":
            node.args = ({"a": node.all_input_nodes[0]},)
    fast.recompile()
    assert list(fast(x)) == ["a"]
    restored = advdl_ops.restore(fast)
    assert type(restored.conv1) is stock.Conv2d
    assert list(restored(x)) == ["a"]


@pytest.mark.parametrize("layer", ONE_OF_EACH, ids=lambda layer: type(layer).__name__)
def test_a_layer_by_itself_is_refused(layer):
    with pytest.raises(torch.fx.proxy.TraceError, match="trace a module that holds it"):
        torch.fx.symbolic_trace(layer)
