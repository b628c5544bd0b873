"""``fit_memory`` finds the fastest levels that fit, as a search of all of them does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import advdl_ops
from advdl_ops import fit_memory, memory_report, models
from advdl_ops._lean import LEVELS
from advdl_ops._lean.counts import Counting
from advdl_ops._lean.fit import Choice, Search, front
from advdl_ops._lean.models import lean_of
from advdl_ops.models._layers import Layers, conv, norm_factory
from advdl_ops.models.resnet import BasicBlock, Bottleneck
from benchmarks.memory import held_and_peak

IMAGES = torch.empty(2, 3, 32, 32, device="meta")


class SmallResNet(torch.nn.Module):
    """Two stages. The block at the end of the first hands its sum to the shortcut's convolution of the second."""

    def __init__(self) -> None:
        super().__init__()
        norm = norm_factory("", "batch")
        options: Any = {"groups": 1, "width_per_group": 64, "dilation": 1, "norm": norm}
        self.stem = Layers(conv(3, 16, 3), norm(16), torch.nn.ReLU())
        first = Layers(conv(16, 32, 1), norm(32))
        self.first = torch.nn.Sequential(
            Bottleneck(16, 8, 1, first, **options), Bottleneck(32, 8, 1, None, **options)
        )
        second = Layers(conv(32, 64, 1, 2), norm(64))
        self.second = torch.nn.Sequential(
            Bottleneck(32, 16, 2, second, **options), BasicBlock(64, 64, 1, None, **options)
        )
        self.head = torch.nn.Conv2d(64, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.stem(x))))


Level = str | None
ALL: tuple[Level, ...] = (None, *LEVELS)


def assert_as_a_search_of_all(
    model: torch.nn.Module, names: tuple[str, ...], *levels: tuple[Level, ...]
) -> None:
    """At budgets between the least and the most, the choice costs as little as the best one of all.

    Args:
        names: of the parts.
        levels: of each part, those that are compared.
    """
    search = Search(Counting(model, (IMAGES,), "fit_memory"), 10)
    assert search.names == names
    found = []
    for choice in itertools.product(*levels):
        count = search.count(choice)
        found.append((search.cost(count), count.total))
    least, most = min(held for _, held in found), search.count((None,) * len(names)).total
    assert search.least == least
    for step in range(41):
        budget = least + (most - least) * step // 40
        chosen = search.within(budget)
        assert chosen is not None
        count = search.count(tuple(chosen.values()))
        assert count.total <= budget
        assert search.cost(count) == min(cost for cost, held in found if held <= budget)
    assert search.within(least - 1) is None


@pytest.mark.parametrize(
    "of_rest",
    [
        # The rest and the stem have no blocks.
        pytest.param((None, "block"), id="of stages"),
        pytest.param(ALL, id="all", marks=[pytest.mark.extra, pytest.mark.slow]),
    ],
)
def test_resnet_as_a_search_of_all(of_rest: tuple[Level, ...]) -> None:
    names = "", "stem", "first", "second"
    assert_as_a_search_of_all(SmallResNet(), names, of_rest, of_rest, ALL, ALL)


def test_unet_as_a_search_of_all() -> None:
    """The skips hand tensors to parts that are not the next."""
    model = models.create_model("unet", base_channels=4, depth=2)
    names = "", "inc", "down1", "down2", "up1", "up2"
    assert_as_a_search_of_all(model, names, *[(None, "block")] * len(names))


def test_a_real_forward_holds_no_more() -> None:
    model = models.create_model("resnet18")
    x = torch.randn(2, 3, 64, 64)
    report = memory_report(model, x)
    budget = (report.total("block") + report.total("stage")) // 2
    levels = fit_memory(model, x, budget)
    assert list(levels) == ["", "layer1", "layer2", "layer3", "layer4"]
    assert lean_of(model) == levels
    assert len(set(levels.values())) > 1
    model(x)
    held = held_and_peak(lambda: model(x), lambda out: None, torch.device("cpu"))[0]
    assert held <= budget
    assert held == pytest.approx(memory_report(model, x).total("as set"), rel=0.01)


def test_what_fits_without_a_level_has_none() -> None:
    model = advdl_ops.set_lean(SmallResNet(), "deepest")
    levels = fit_memory(model, IMAGES, 1e12)
    assert set(levels.values()) == {None}
    assert lean_of(model) == {}


def test_nothing_fits() -> None:
    model = advdl_ops.set_lean(SmallResNet(), {"first": "stage"})
    kinds = [type(layer) for layer in model.modules()]
    with pytest.raises(
        ValueError, match=r"fit_memory: bytes \(1000\) must be at least \d+"
    ) as raised:
        fit_memory(model, IMAGES, 1000)
    assert lean_of(model) == {"first": "stage"}
    assert [type(layer) for layer in model.modules()] == kinds
    least = int(str(raised.value).split("at least ")[1].split(",")[0])
    with pytest.raises(ValueError, match=f"must be at least {least}"):
        fit_memory(model, IMAGES, least - 1)
    fit_memory(model, IMAGES, least)
    assert memory_report(model, IMAGES).total("as set") == least


def test_wrong_arguments_change_nothing() -> None:
    model = advdl_ops.set_lean(SmallResNet(), {"first": "stage"})
    for budget in ("1GB", None, True, torch.tensor(3)):
        with pytest.raises(TypeError, match=r"fit_memory: bytes \(.*\) must be a number"):
            fit_memory(model, IMAGES, budget)  # type: ignore[arg-type]
    for amount in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=r"fit_memory: bytes \(.*\) must be positive"):
            fit_memory(model, IMAGES, amount)
    with pytest.raises(TypeError, match=r"fit_memory: input \(list\) must be a Tensor, or a tuple"):
        fit_memory(model, [IMAGES], 1e9)
    with pytest.raises(TypeError, match=r"fit_memory: model \(str\) must be a torch.nn.Module"):
        fit_memory("resnet", IMAGES, 1e9)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="must have 3 channels"):
        fit_memory(model, IMAGES[:, :2], 1e9)
    assert lean_of(model) == {"first": "stage"}


def test_the_parts_of_one_large_child_are_those_of_the_child() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), SmallResNet(), torch.nn.Flatten())
    assert list(fit_memory(model, IMAGES, 1e9)) == ["", "1.stem", "1.first", "1.second"]


def test_a_list_of_modules_is_no_part_but_each_of_them() -> None:
    class Listed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            small = SmallResNet()
            self.stages = torch.nn.ModuleList([small.stem, small.first, small.second])

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
            return x

    assert list(fit_memory(Listed(), IMAGES, 1e9)) == ["", "stages.0", "stages.1", "stages.2"]


def test_a_model_without_parts() -> None:
    layers = [advdl_ops.nn.Conv2d(3, 4, 3), advdl_ops.nn.BatchNormAct2d(4, act="relu")]
    model = torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 4, 3))
    report = memory_report(model, IMAGES)
    assert fit_memory(model, IMAGES, report.total("plain")) == {"": None}
    assert fit_memory(model, IMAGES, report.total("block")) == {"": "block"}


def test_front() -> None:
    choices = [
        Choice(*pair, ()) for pair in ((5, 5.0), (9, 0.0), (9, 1.0), (4, 6.0), (6, 5.0), (4, 7.0))
    ]
    assert [(c.held, c.cost) for c in front(choices)] == [(9, 0.0), (5, 5.0), (4, 6.0)]
    many = front(Choice(10_000 - at, at, ()) for at in range(10_000))
    assert len(many) <= 2_001
    assert many[0].cost == 0
    assert many[-1].held == 1
