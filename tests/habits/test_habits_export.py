"""What ``torch.export``, ONNX and ``torch.jit.trace`` record has the nodes that a model of ``torch.nn`` has."""

import collections

import pytest
import torch
from support.torchvision_stub import torchvision_models

import advdl_ops
from advdl_ops import models, nn

stocks = torchvision_models()
f64 = torch.float64

# ours, torch's, arguments of both, shape of the input
LAYERS = {
    "conv": (nn.Conv2d, torch.nn.Conv2d, (6, 4, 3), (2, 6, 7, 8)),
    "conv same": (nn.Conv2d, torch.nn.Conv2d, (6, 4, 3, 1, "same"), (2, 6, 7, 8)),
    "depthwise": (nn.Conv2d, torch.nn.Conv2d, (6, 6, 3, 2, 1, 1, 6), (2, 6, 7, 8)),
    "conv_transpose": (nn.ConvTranspose2d, torch.nn.ConvTranspose2d, (6, 4, 2, 2), (2, 6, 7, 8)),
    "batch_norm": (nn.BatchNormAct2d, torch.nn.BatchNorm2d, (6,), (2, 6, 7, 8)),
    "group_norm": (nn.GroupNorm, torch.nn.GroupNorm, (3, 6), (2, 6, 7, 8)),
    "instance_norm_1d": (nn.InstanceNorm1d, torch.nn.InstanceNorm1d, (6,), (2, 6, 8)),
    "instance_norm": (nn.InstanceNorm2d, torch.nn.InstanceNorm2d, (6,), (2, 6, 7, 8)),
    "instance_norm_3d": (
        nn.InstanceNorm3d, torch.nn.InstanceNorm3d, (6, 1e-5, 0.1, True, True), (2, 6, 3, 4, 5),
    ),
}  # fmt: skip


def operators(model, *args):
    graph = torch.export.export(model, args).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def pair(name):
    ours, stock, arguments, shape = LAYERS[name]
    torch.manual_seed(0)
    original, layer = stock(*arguments).to(f64), ours(*arguments).to(f64)
    layer.load_state_dict(original.state_dict())
    return original, layer, torch.randn(shape, dtype=f64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, training):
    original, layer, x = pair(name)
    original.train(training)
    layer.train(training)
    assert operators(layer, x) == operators(original, x)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), original(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_traced_layers(name):
    original, layer, x = pair(name)
    traced, expected = torch.jit.trace(layer.eval(), x), torch.jit.trace(original.eval(), x)
    kinds = [
        sorted(node.kind() for node in graph.inlined_graph.nodes() if "aten" in node.kind())
        for graph in (traced, expected)
    ]
    assert kinds[0] == kinds[1]
    larger = torch.cat([x, x])
    torch.testing.assert_close(traced(larger), original(larger))


def zoo(name):
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None} if "_resnet" in name else {}
    owner = stocks.segmentation if "_resnet" in name else stocks
    original = getattr(owner, name)(num_classes=5, **options)
    model = models.create_model(name, num_classes=5)
    model.load_state_dict(original.state_dict())
    return original, model


ZOO = [
    "resnet18",
    *(pytest.param(n, marks=pytest.mark.extra) for n in ("resnet50", "fcn_resnet50")),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_networks(name, training):
    original, model = zoo(name)
    x = torch.randn(2, 3, 64, 64)
    expected = operators(original.train(training), x)
    for made in (model, advdl_ops.optimize(original)):
        assert operators(made.train(training), x) == expected


def test_sizes_are_free():
    _, model = zoo("resnet18")
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=(free,)).module()
    for shape in ((1, 3, 96, 64), (3, 3, 65, 97)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-4)


class Blocks(torch.nn.Module):
    """Layers that ``optimize`` fuses: with activations, an addition and an activation in a norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8)
        self.conv2, self.norm2 = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.InstanceNorm2d(8)
        self.up, self.act = torch.nn.ConvTranspose2d(8, 4, 2, 2), torch.nn.SiLU()

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        return self.act(self.up(self.act(self.norm2(self.conv2(x)) + x)))


def test_fused_layers_are_told_apart():
    original = Blocks()
    x = torch.randn(2, 3, 8, 8)
    assert operators(advdl_ops.optimize(original), x) == operators(original, x)


def counted(graph):
    return collections.Counter(node.op_type for node in graph.node)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("fcn_resnet50", marks=pytest.mark.extra)]
)
def test_onnx(name, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    original, model = zoo(name)
    x = torch.randn(1, 3, 64, 64)
    found = []
    for made in (original.eval(), model.eval(), advdl_ops.optimize(original)):
        file = tmp_path / "model.onnx"
        torch.onnx.export(made, (x,), str(file), dynamo=dynamo, verbose=False)
        found.append(counted(onnx.load(str(file), load_external_data=False).graph))
    assert found[1] == found[0]
    assert found[2] == found[0]
