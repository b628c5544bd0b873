"""The plan that optimize() makes before it changes anything, and its text."""

import pytest
from support.optimize import Block, Chain, Counting, Noise, made
from torch import nn as stock

import advdl_ops
from advdl_ops._optimize.convert import plan_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Own(stock.Conv2d):
    """Of an unknown class."""


def test_the_text_of_a_plan():
    model = stock.Sequential(made(Block), made(Counting), Own(8, 8, 1))
    conv, norm = (
        "becomes advdl_ops.nn.conv2d.Conv2d",
        "becomes advdl_ops.nn.batch_norm_act.BatchNormAct2d",
    )
    assert str(plan_of(model)).splitlines() == [
        "(the model itself)  Sequential: not in channels_last on CPU, whatever it is given: "
        "1: its forward has no graph, and it may call its own calls",
        "0  Block: one op: conv1 + norm1 + act; one op: conv2 + norm2 + add + act",
        f"0.conv1  Conv2d: {conv}",
        f"0.norm1  BatchNorm2d: {norm}",
        "0.act  ReLU: kept",
        f"0.conv2  Conv2d: {conv}",
        f"0.norm2  BatchNorm2d: {norm}",
        "1  Counting: not fused: its forward cannot be traced: it assigns self.calls, or makes a tensor of its own",
        f"1.conv1  Conv2d: {conv}",
        f"1.norm1  BatchNorm2d: {norm}",
        "1.act  ReLU: kept",
        f"1.conv2  Conv2d: {conv}",
        f"1.norm2  BatchNorm2d: {norm}",
        f"2  Own: left as it was: a class of its own ({Own.__module__}.Own)",
        "channels_last inside on CPU: never",
    ]


@pytest.mark.parametrize(
    ("between", "when"), [(stock.ReLU(), "always"), (Noise(), "in evaluation")]
)
def test_when_a_model_will_run_in_channels_last(between, when):
    plan = plan_of(Chain(between))
    assert str(plan).endswith(f"\nchannels_last inside on CPU: {when}")


def test_a_plan_changes_nothing():
    model = stock.Sequential(made(Block), made(Counting))
    before = [(type(layer), dict(vars(layer))) for layer in model.modules()]
    plan_of(model)
    assert [(type(layer), dict(vars(layer))) for layer in model.modules()] == before


def test_a_plan_knows_a_module_in_two_places_by_its_first_name():
    model = made(Block)
    model.norm2 = model.norm1
    plan = plan_of(model)
    assert plan[model.norm2] is plan[model.norm1]
    assert plan[model.norm2].name == "norm1"
    assert plan[model.norm1].alone == "it stands in two places"


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_planned_is_done(inplace):
    model = made(Block)
    plan = plan_of(model)
    planned = {
        layer.name: layer.counterpart.layer for layer in plan if layer.counterpart is not None
    }
    fused = [" + ".join(group.names) for layer in plan for group in layer.groups]
    fast = advdl_ops.optimize(model, inplace=inplace)
    assert {name: type(fast.get_submodule(name)) for name in planned} == planned
    assert advdl_ops.explain(fast, as_dict=True)["fused"] == fused
