"""``memory_report`` counts the bytes that a real forward leaves held, without running one."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import advdl_ops
from advdl_ops import memory_report, models
from advdl_ops._lean import LEVELS
from advdl_ops._lean.models import lean_of
from advdl_ops.backend import by_torchs_operators, is_exported
from benchmarks import memory
from benchmarks.stock_resnet import stock_resnet
from benchmarks.stock_unet import StockUNet
from tests.support.torchvision_stub import torchvision_models

Made = tuple[torch.nn.Module, torch.nn.Module, Tensor]


def held(forward: Callable[[], Any]) -> int:
    """The first number of ``held_and_peak``, without the time that the peak takes."""
    forward()
    return memory._profiled(forward)[0]


def resnet18() -> Made:
    return models.create_model("resnet18"), stock_resnet("resnet18"), torch.randn(2, 3, 64, 64)


def resnet50() -> Made:
    return models.create_model("resnet50"), stock_resnet("resnet50"), torch.randn(1, 3, 64, 64)


def unet() -> Made:
    model = models.create_model("unet", base_channels=8)
    return model, StockUNet(3, 2, 8), torch.randn(1, 3, 64, 64)


def optimized(name: str, batch: int) -> Callable[[], Made]:
    def made() -> Made:
        stock = getattr(torchvision_models(), name)()
        return advdl_ops.optimize(stock), stock, torch.randn(batch, 3, 64, 64)

    return made


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(resnet18, id="resnet18"),
        pytest.param(resnet50, id="resnet50"),
        pytest.param(unet, id="unet"),
        pytest.param(optimized("resnet50", 1), id="torchvision resnet50", marks=pytest.mark.extra),
        pytest.param(optimized("densenet121", 2), id="densenet121", marks=pytest.mark.extra),
        pytest.param(optimized("mobilenet_v2", 2), id="mobilenet_v2", marks=pytest.mark.extra),
    ],
)
def test_agrees_with_a_real_forward(make: Callable[[], Made]) -> None:
    model, stock, x = make()
    report = memory_report(model, x)
    assert list(report) == ["stock", "plain", *LEVELS]
    assert report.total("stock") == pytest.approx(held(lambda: stock(x)), rel=0.01)
    for column, level in zip(list(report)[1:], (None, *LEVELS), strict=True):
        advdl_ops.set_lean(model, level)
        assert report.total(column) == pytest.approx(held(lambda: model(x)), rel=0.01), column


def test_agrees_at_levels_of_parts_under_autocast_and_if_a_part_is_frozen() -> None:
    model, _, x = resnet18()
    model.conv1.requires_grad_(False)
    model.layer1.eval().requires_grad_(False)
    advdl_ops.set_lean(model, {"": "block", "layer2": None, "layer4": "deepest"})
    assert memory_report(model, x).total("as set") == pytest.approx(
        held(lambda: model(x)), rel=0.01
    )
    with torch.autocast("cpu", torch.bfloat16):
        report = memory_report(model, x)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert report.total("as set") == pytest.approx(held(forward), rel=0.01)


def test_rows_sum_to_the_total_at_every_depth() -> None:
    model, _, x = resnet18()
    report = memory_report(model, x, depth=1)
    for depth in (1, 2, 3, 9):
        rows = report.rows(depth)
        for column in report:
            assert sum(row[column] for row in rows.values()) == report.total(column)
    assert list(report.rows()) == [
        "", "conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc",
    ]  # fmt: skip
    assert {"layer3.1.conv2", "layer3.1.bn2"} < report.rows(3).keys()


def test_rows_have_what_their_module_made() -> None:
    """Of a 1x1 convolution, norm and ReLU twice, each tensor by hand."""
    layers = [advdl_ops.nn.ConvBNReLU(4, 8, 1), advdl_ops.nn.ConvBNReLU(8, 8, 1)]
    rows = memory_report(torch.nn.Sequential(*layers), torch.empty(2, 4, 8, 8)).rows()
    tensor, statistics = 2 * 8 * 8 * 8 * 4, 2 * 8 * 4
    assert rows["0.conv"] == dict.fromkeys(rows["0.conv"], tensor) | {"deep": 0, "deepest": 0}
    assert rows["1.conv"] == dict.fromkeys(rows["1.conv"], tensor)
    again = dict.fromkeys(LEVELS, statistics)
    plain = tensor + statistics
    assert {**rows["0.bn"], "stock": plain} == {"stock": plain, "plain": plain, **again}
    assert rows["1.bn"]["block"] == plain  # the output


def state(model: torch.nn.Module) -> list[Any]:
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(id(t), t.clone(), t._version, t.grad) for t in tensors],
        [(type(layer), layer.training, sorted(layer.__dict__)) for layer in model.modules()],
        torch.get_rng_state(),
        lean_of(model),
    ]


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_changes_nothing_and_runs_no_hook() -> None:
    model = torch.nn.Sequential(models.create_model("resnet18"), torch.nn.Dropout(0.5))
    advdl_ops.set_lean(model, {"0.layer1": "stage"})
    x = torch.randn(2, 3, 33, 33, requires_grad=True)
    called: list[Any] = []
    model.register_forward_hook(lambda *_: called.append("forward"))
    before = state(model)
    first = memory_report(model, x)
    assert_same(state(model), before)
    assert not called
    assert x.grad is None
    with torch.no_grad():  # a training forward is counted in any case
        assert memory_report(model, x).counts == first.counts


def test_meta_tensors_are_counted_as_on_the_cpu() -> None:
    model, _, x = resnet18()
    expected = memory_report(model, x).counts
    assert memory_report(model, x.to("meta")).counts == expected
    assert memory_report(copy.deepcopy(model).to("meta"), x.to("meta")).counts == expected


def test_larger_than_memory() -> None:
    model = models.create_model("resnet18", features_only=True)
    report = memory_report(model, torch.empty(64, 3, 4096, 4096, device="meta"))
    assert report.total("plain") > 1 << 39
    assert "GiB held" in str(report)


def test_arguments_in_a_tuple() -> None:
    class Two(torch.nn.Module):
        def forward(self, x: Tensor, pair: dict[str, Tensor]) -> Tensor:
            return x.sin() * pair["a"]

    x, a = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    # x.sin() and the product; cos is made in backward.
    assert memory_report(Two(), (x, {"a": a})).rows() == {
        "": dict.fromkeys(["stock", "plain", *LEVELS], 32)
    }


def test_table() -> None:
    model, _, x = resnet18()
    report = memory_report(model, x, depth=1)
    text = str(report)
    lines = {line.split("  ")[0].strip(): line.split()[1:] for line in text.splitlines()}
    assert text.startswith("ResNet, 2x3x64x64 float32: KiB held for backward\n")
    assert lines["module"] == ["stock", "plain", *LEVELS]
    totals = [report.total(column) for column in report]
    assert lines["total"] == [f"{total / 1024:.2f}" for total in totals]
    assert lines["of stock"][1:] == [f"{total / totals[0]:.0%}" for total in totals]
    for name, row in list(report.rows().items())[1:]:
        assert lines[name] == [f"{size / 1024:.2f}" if size else "-" for size in row.values()]
    assert lines["passes of backward"][2:4] == ["-", "-"]
    assert max(len(line) for line in text.splitlines()) < 100  # it fits a terminal


def test_plot(tmp_path: Path) -> None:
    model, _, x = resnet18()
    advdl_ops.set_lean(model, {"layer1": "block"})
    report = memory_report(model, x)
    report.plot(tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    figure = report._figure()
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in axes.get_xticklabels()] == list(report)
    heights = [sum(bars[at].get_height() for bars in axes.containers) for at in range(7)]
    assert heights == pytest.approx([report.total(column) / 1024 for column in report])
    texts = [*axes.texts, *axes.get_xticklabels(), *legend.texts, axes.title, axes.yaxis.label]
    boxes = [text.get_window_extent() for text in texts]
    for at, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
        assert not any(box.overlaps(other) for other in boxes[at + 1 :]), texts[at]


def test_errors() -> None:
    x = torch.randn(2, 3, 8, 8)
    layer = torch.nn.Conv2d(3, 4, 3)
    with pytest.raises(TypeError, match=r"memory_report: model \(int\) must be a torch.nn.Module"):
        memory_report(3, x)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"memory_report: input \(list\) must be a Tensor, or a tuple"
    ):
        memory_report(layer, [x])
    with pytest.raises(ValueError, match=r"memory_report: depth \(0\) must be a positive integer"):
        memory_report(layer, x, depth=0)
    with pytest.raises(ValueError, match="memory_report: model must not be compiled"):
        memory_report(torch.compile(layer), x)  # type: ignore[arg-type]

    class Looks(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(RuntimeError, match="memory_report: model must compute the same operators"):
        memory_report(Looks(), x)


@pytest.mark.parametrize(("module", "call"), [("rich", str), ("matplotlib", lambda r: r.plot("x"))])
def test_what_is_missing_is_named(
    module: str, call: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = memory_report(torch.nn.ReLU(), torch.randn(2))
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {module}, .* pip install {module}"):
        call(report)


def test_torchs_operators_serve_one_thread() -> None:
    with by_torchs_operators(), ThreadPoolExecutor(1) as pool:
        assert is_exported()
        assert not pool.submit(is_exported).result()
    assert not is_exported()


def test_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, advdl_ops\n"
        "assert not {'rich', 'matplotlib', 'advdl_ops._lean.report', 'advdl_ops._lean.fit'} & set(sys.modules)\n"
        "advdl_ops.memory_report, advdl_ops.fit_memory\n"
        "assert not {'rich', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_synchronized_norms_ask_no_other_process():
    model = models.create_model("resnet18")
    expected = memory_report(model, torch.empty(2, 3, 64, 64, device="meta")).total("block")
    advdl_ops.convert_sync_batchnorm(model)
    report = memory_report(model, torch.empty(2, 3, 64, 64, device="meta"))
    assert report.total("block") == expected
    assert model.bn1.process_group == "world"
