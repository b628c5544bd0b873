"""A parent's forward reads what its children have, or looks up methods, and these change after ``optimize``."""

import copy
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import advdl_ops


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.on, self.function = 2.0, True, F.relu

    def gated(self, x):
        return x * self.scale

    def forward(self, x):
        return x


class Reads(nn.Module):
    """Each reading is of a child, or of a method."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.bn = nn.BatchNorm2d(4)
        self.gate = Gate()
        self.drop = nn.Dropout(0.0)
        self.stages = nn.ModuleList([Gate(), Gate()])
        self.function = F.leaky_relu
        with torch.no_grad():
            self.bn.running_mean.normal_()

    def helper(self, x):
        return x + 1

    def forward(self, x):
        x = self.act(self.norm(self.conv(x)))
        bn = self.bn
        x = F.batch_norm(
            x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, 0.1, bn.eps
        )
        x = self.gate.gated(x)
        if self.gate.on:
            x = self.gate.function(x)
        x = F.dropout(x, self.drop.p, self.drop.training) if self.drop.p else x
        for stage in self.stages:
            if stage.on:
                x = x * stage.scale
        return self.function(self.helper(x) - 2)


def edit_method_of_class(model):
    kind = type(model.gate)
    patched = types.MethodType(lambda self, x: x * 7, model.gate)
    assert kind is Gate
    model.gate.gated = patched


EDITS = {
    "child.training": lambda m: m.bn.eval(),
    "child.eps": lambda m: setattr(m.bn, "eps", 0.7),
    "child's number": lambda m: setattr(m.gate, "scale", -3.0),
    "child's flag": lambda m: setattr(m.gate, "on", False),
    "child's function": lambda m: setattr(m.gate, "function", torch.tanh),
    "in a list": lambda m: setattr(m.stages[1], "on", False),
    "in a list, number": lambda m: setattr(m.stages[0], "scale", 5),
    "child's method": edit_method_of_class,
    "own function": lambda m: setattr(m, "function", F.gelu),
    "own lambda": lambda m: setattr(m, "function", lambda x: x * 3),
    "own method": lambda m: setattr(m, "helper", types.MethodType(lambda self, x: x - 5, m)),
    "child replaced": lambda m: setattr(m, "gate", Other()),
}


class Other(nn.Module):
    scale, on, function = 4, True, torch.sigmoid

    def gated(self, x):
        return x - self.scale


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_a_change_after_optimize(edit, training):
    torch.manual_seed(0)
    model = Reads().double().train(training)
    fast = advdl_ops.optimize(copy.deepcopy(model))
    assert advdl_ops.explain(fast, as_dict=True)["fused"] == ["conv + norm + act"]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fast(x), model(x))
    before = model(x)
    fast(x)
    for each in (model, fast):
        EDITS[edit](each)
    after = model(x)
    if edit != "child.training" or training:
        assert not torch.equal(before, after)
    torch.testing.assert_close(fast(x), after)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(fast.get_buffer(name), buffer)


def test_frozen_statistics_are_not_written():
    model = Reads()
    fast = advdl_ops.optimize(model).train()
    fast.bn.eval()
    mean = fast.bn.running_mean.clone()
    fast(torch.randn(2, 3, 8, 8))
    assert torch.equal(fast.bn.running_mean, mean)


def test_a_class_is_patched(monkeypatch):
    model = Reads().eval()
    fast = advdl_ops.optimize(model)
    x = torch.randn(2, 3, 8, 8)
    before = fast(x)
    monkeypatch.setattr(Reads, "helper", lambda self, x: x * 9)
    torch.testing.assert_close(fast(x), model(x))
    assert not torch.equal(before, fast(x))
    monkeypatch.setattr(Reads, "forward", lambda self, x: self.conv(x))
    torch.testing.assert_close(fast(x), model.conv(x))


def test_the_class_of_a_child_is_patched(monkeypatch):
    model = Reads().eval()
    fast = advdl_ops.optimize(model)
    x = torch.randn(2, 3, 8, 8)
    before = fast(x)
    monkeypatch.setattr(Gate, "gated", lambda self, x: x * 9)
    assert not torch.equal(before, fast(x))
    torch.testing.assert_close(fast(x), model(x))


def test_guards_survive_pickling():
    fast = advdl_ops.optimize(Reads().double()).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    again = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(again(x), fast(x))
    again.gate.scale = 11.0
    fast.gate.scale = 11.0
    torch.testing.assert_close(again(x), fast(x))


def test_compiles():
    torch._dynamo.reset()
    fast = advdl_ops.optimize(Reads()).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), fast(x))
    fast.gate.scale = 5.0
    torch.testing.assert_close(compiled(x), fast(x))


def test_a_function_that_refers_to_itself():
    def make():
        def doubled(x):
            return x * 2 if doubled else x

        return doubled

    model = Reads().eval()
    fast = advdl_ops.optimize(model)
    fast.function = model.function = make()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), model(x))


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()


class ByClass(Unit):
    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.act(x) if type(self.act) is nn.ReLU else x - 100


def test_a_forward_that_asks_for_a_class():
    model = ByClass().eval()
    fast = advdl_ops.optimize(model)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), model(x))


class Twice(Unit):
    def __init__(self):
        super().__init__()
        self.a = self.b = Gate()

    def forward(self, x):
        return self.act(self.norm(self.conv(x))) * self.b.scale


def test_a_child_in_two_places():
    model = Twice().eval()
    fast = advdl_ops.optimize(model)
    for each in (model, fast):
        each.b = Gate()
        each.b.scale = 7.0
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fast(x), model(x))


NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.relu

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))
"""
SAVE = "import advdl_ops; torch.save(advdl_ops.optimize(net.Net()), 'net.pt')"
COMPILE = """
model, graphs = torch.load('net.pt', weights_only=False), []
def backend(graph, inputs):
    graphs.append(graph.print_readable(print_output=False))
    return graph.forward
torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 3, 4, 4))
assert "torch.relu(" not in graphs[0], graphs[0]  # it is fused
"""


@pytest.mark.extra
def test_a_compiler_knows_the_functions_in_a_new_process(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    for program in (SAVE, COMPILE):
        program = f"import sys; sys.path.insert(0, '.'); import net, torch\n{program}"
        root = str(Path(__file__).parents[2])
        environment = {**os.environ, "PYTHONPATH": root}
        subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
