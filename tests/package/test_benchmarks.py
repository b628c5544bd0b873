"""What the numbers of the benchmark rest on: no wrong provider is timed, memory counts what is hidden."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from advdl_ops import models
from benchmarks import (
    compare,
    environment,
    extras,
    measure_model,
    measure_op,
    norms,
    plots,
    record,
    registry,
    report,
    runner,
    timing,
)
from benchmarks.cases import batch_norm_act, conv2d, digits, group_norm, lstm, overhead, resnet
from benchmarks.check import wrong_values
from benchmarks.memory import held_and_peak
from benchmarks.session import Session, Settings, run_cases
from benchmarks.stock_resnet import stock_resnet

CPU = torch.device("cpu")
TINY = "batch_norm_relu/train/2x8x4x4/contiguous/float32/cpu"


def tiny_session(**settings: Any) -> tuple[Session, io.StringIO]:
    stream = io.StringIO()
    return Session(
        registry.all_cases()[TINY], "ops", Settings(smoke=True, **settings), stream
    ), stream


def events(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def stock_problem() -> measure_op.Problem:
    """The tiny case with stock PyTorch on both sides."""
    case = registry.all_cases()[TINY]
    problem = batch_norm_act.problem(case)
    problem.functions["advdl_ops"] = batch_norm_act.stock("relu", True)
    return problem


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 1.001


def _wrong_output(function: Callable) -> Callable:
    return lambda inputs, state: function(inputs, state) * 1.0001


def _wrong_gradient(function: Callable) -> Callable:
    return lambda inputs, state: WrongGradient.apply(function(inputs, state))


def _wrong_statistics(function: Callable) -> Callable:
    def wrong(inputs: Any, state: Any) -> torch.Tensor:
        output = function(inputs, state)
        state["running_var"] = state["running_var"] * 1.01
        return output

    return wrong


def _wrong_dtype(function: Callable) -> Callable:
    return lambda inputs, state: function(inputs, state).double()


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (_wrong_output, "output"),
        (_wrong_gradient, "gradient of"),
        (_wrong_statistics, "running_var"),
        (_wrong_dtype, "dtype"),
    ],
)
def test_a_provider_with_wrong_values_is_refused(plant: Callable, name: str) -> None:
    session, stream = tiny_session()
    problem = stock_problem()
    problem.functions["advdl_ops"] = plant(problem.functions["eager"])
    measure_op.measure_op(session.case, session, problem)
    refused = [e for e in events(stream) if e["event"] == "refused"]
    assert [e["provider"] for e in refused] == ["advdl_ops"]
    assert name in refused[0]["why"]
    records = [record.from_dict(e["record"]) for e in events(stream) if e["event"] == "record"]
    assert {r.provider for r in records if not r.why} == {"eager", "floor", "machine"}
    stored = [(r.provider, r.metric, r.mode, r.p50, r.why) for r in records if r.why]
    assert stored == [("advdl_ops", "refused", "-", 0.0, refused[0]["why"])]


def _raises_but_in_fp64(function: Callable) -> Callable:
    def failing(inputs: Any, state: Any) -> torch.Tensor:
        if inputs["x"].dtype is not torch.float64:
            raise RuntimeError("could not create a primitive descriptor\nand a page")
        return function(inputs, state)

    return failing


def test_where_stock_fails_its_next_form_competes_and_the_failure_is_stored() -> None:
    """As the LSTM in bf16 on a CPU without AVX512-BF16."""
    session, stream = tiny_session()
    problem = stock_problem()
    problem.functions["eager other"] = problem.functions["eager"]
    problem.functions["eager"] = _raises_but_in_fp64(problem.functions["eager"])
    assert set(measure_op.providers(problem, session)) == {"eager other", "advdl_ops"}
    items = [record.from_dict(e["record"]) for e in events(stream) if e["event"] == "record"]
    why = "RuntimeError: could not create a primitive descriptor"
    assert [(r.provider, r.metric, r.why) for r in items] == [("eager", "refused", why)]
    problem.functions["eager other"] = problem.functions["eager"]
    with pytest.raises(RuntimeError, match=r"no stock form runs: eager: .*; eager other: "):
        measure_op.providers(problem, session)


@pytest.mark.parametrize("provider", ["torch.compile group_norm", "advdl_ops"])
def test_whatever_was_refused_or_failed_makes_the_exit_status_1(provider: str) -> None:
    case = registry.all_cases()[TINY]
    found = runner.Collector("ops")
    found.see({"event": "done", "case": TINY})
    assert runner.tell([case], found) == 0
    found.see({"event": "refused", "case": TINY, "provider": provider, "why": "wrong"})
    assert runner.tell([case], found) == 1
    found = runner.Collector("ops")
    found.see({"event": "failed", "case": TINY, "why": "the process ended"})
    assert runner.tell([case], found) == 1


def test_a_failure_replaces_the_figures_of_its_case(tmp_path: Any) -> None:
    session, stream = tiny_session()
    session.record("eager", "fwd", "time", "s", [1.0, 2.0])
    session.refuse("advdl_ops", "wrong")
    old, refusal = (e for e in events(stream) if e["event"] == "record")
    found = runner.Collector("ops", tmp_path)
    for event in (old, {"event": "done", "case": TINY}):
        found.see(event)
    file = next(tmp_path.glob("*/ops.jsonl"))
    assert [(r.metric, r.why) for r in record.read(file)] == [("time", "")]
    for event in (refusal, {"event": "failed", "case": TINY, "why": "ended\nby 1"}):
        found.see(event)
    kept = [(r.provider, r.metric, r.why) for r in record.read(file)]
    assert kept == [("advdl_ops", "refused", "wrong"), ("-", "failed", "ended by 1")]
    # It is no measurement: the overview names the reasons, comparison and plot show none.
    assert report.summary(record.read(file)) == "refused: advdl_ops: wrong; failed: ended by 1"
    assert not compare.rows(*[compare.load(file)] * 2, True)
    assert plots.draw(file.parent, "ops").is_file()


def test_records_from_before_the_reason_are_read() -> None:
    session, stream = tiny_session()
    session.record("eager", "fwd", "time", "s", 1.0)
    data = events(stream)[0]["record"]
    assert data.pop("why") == ""
    assert record.from_dict(data).why == ""
    del data["unit"]
    with pytest.raises(ValueError, match=r"missing \['unit'\]"):
        record.from_dict(data)


def test_only_the_figures_of_a_commit_go_into_the_checkouts_results(
    monkeypatch: Any, tmp_path: Any
) -> None:
    monkeypatch.setattr(environment, "commit", lambda: "0123456789-dirty")
    monkeypatch.setattr(environment, "IN_CHECKOUT", True)
    assert not runner.storable(environment.RESULTS)
    assert runner.storable(tmp_path)
    monkeypatch.setattr(environment, "IN_CHECKOUT", False)
    assert runner.storable(environment.RESULTS)
    monkeypatch.setattr(environment, "IN_CHECKOUT", True)
    monkeypatch.setattr(environment, "commit", lambda: "0123456789")
    assert runner.storable(environment.RESULTS)


def _not_compiled(monkeypatch: Any) -> list[dict[str, Any]]:
    """Lets torch.compile return what it is given; the options of each call."""
    calls: list[dict[str, Any]] = []

    def compile(function: Callable, **options: Any) -> Callable:
        calls.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return calls


@pytest.mark.parametrize("ours", [True, False])
def test_stock_is_compiled_in_every_form(ours: bool, monkeypatch: Any) -> None:
    calls = _not_compiled(monkeypatch)
    name = "instance_norm_add_silu/train/2x8x4x4/contiguous/float32/cpu"
    case = dataclasses.replace(registry.all_cases()[name], compile=True, compile_ours=ours)
    problem = group_norm.problem(case)
    found = measure_op.compiled_functions(problem, Session(case, "ops", Settings(), io.StringIO()))
    forms = {f"torch.compile{form}" for form in ("", " group_norm", " layer_norm")}
    assert set(found) == forms | ({"advdl_ops + torch.compile"} if ours else set())
    assert [c["fullgraph"] for c in calls].count(True) == ours  # stock may break its graph
    quick = Session(case, "quick", Settings(), io.StringIO())
    assert not measure_op.compiled_functions(problem, quick)


def test_every_case_on_the_cpu_has_stock_compiled() -> None:
    for case in registry.select("ops", device="cpu"):
        assert case.compile, case.name
    for case in registry.select("models", device="cpu"):
        assert case.compile, case.name
        assert case.compile_ours, case.name


def test_inference_is_compiled_with_freezing(monkeypatch: Any) -> None:
    calls = _not_compiled(monkeypatch)
    case = dataclasses.replace(
        registry.all_cases()[TINY],
        compile=True,
        options={"training": False, "act": "relu", "residual": True},
    )
    problem = batch_norm_act.problem(case)
    session = Session(case, "ops", Settings(), io.StringIO())
    kept = measure_op.providers(problem, session)
    assert "torch.compile freezing" in kept
    assert {"freezing": True} in [c.get("options") for c in calls]
    # Weights and statistics are its own: what is passed later does not count.
    values = kept["torch.compile freezing"].values()["output"].clone()
    for name in ("weight", "bias"):
        problem.inputs[name] = torch.zeros_like(problem.inputs[name])
    torch.testing.assert_close(
        measure_op.Provider(kept["torch.compile freezing"].function, problem).values()["output"],
        values,
    )


@pytest.mark.parametrize("layout", norms.LAYOUTS)
@pytest.mark.parametrize(
    ("op", "forms"),
    [("3x3_to6_d2_bias_relu", ()), ("depthwise_3x3_d2", ("eager zero-stuffed", "eager phases"))],
)
def test_convolutions_compete_with_stock_in_both_layouts(
    op: str, forms: tuple[str, ...], layout: str
) -> None:
    case = registry.all_cases()[f"conv2d_{op}/2x4x6x6/{layout}/float32/cpu"]
    problem = conv2d.problem(case)
    session = Session(case, "ops", Settings(smoke=True), io.StringIO())
    other = next(name for name in norms.LAYOUTS if name != layout)
    kept = measure_op.providers(problem, session)
    assert set(kept) == {"eager", "advdl_ops", f"eager {other}", *forms}
    assert len({provider.forward().stride() for provider in kept.values()}) == 1


@pytest.mark.parametrize(
    "calls",
    [
        overhead.batch_norm_calls,
        overhead.group_norm_calls,
        overhead.conv2d_calls,
        overhead.lstm_cell_calls,
    ],
)
def test_the_cost_of_a_call_is_that_of_functions_too(calls: Any) -> None:
    """Functions and modules, stock's and ours, agree in values and gradients; wrong ones are not timed."""
    session, stream = tiny_session()
    for mode, competing in calls("cpu").items():
        expected = {"eager", "eager functional", "functional", "advdl_ops"}
        assert expected <= set(competing), mode
        names = set(competing)
        overhead._agree(session, competing)
        assert set(competing) == names, events(stream)
        if mode == "full":
            right = competing["eager functional"]
            competing["functional"] = lambda right=right: (*right()[:-1], right()[-1] * 1.01)
            overhead._agree(session, competing)
            assert names - set(competing) == {"functional"}
    assert [e["provider"] for e in events(stream) if e["event"] == "refused"] == ["functional"]


def test_running_statistics_fit_the_timed_images() -> None:
    """Else the values of a deep network grow until rounding is all that is compared."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm2d(3)
    pooled = torch.nn.Sequential(torch.nn.AvgPool2d(16), norm)
    # The variance of a mean of 256 values is 1 / 256 whatever the size; that of a mean over the image is not.
    whole = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.BatchNorm2d(3))
    images = torch.randn(2, 3, 256, 256)
    for model in (pooled, whole):
        measure_model.take_statistics(model, images)
    assert 0.5 < float(norm.running_var.mean()) * 256 < 2
    assert 0.2 < float(whole[1].running_var.mean()) * 128 * 128 < 5
    assert norm.momentum == 0.1


def test_half_precision_lstm_has_a_stock_form_on_every_cpu() -> None:
    case = dataclasses.replace(
        registry.all_cases()["lstm_lengths/train/3x2x4x5/float32/cpu"],
        dtype="bfloat16",
        options={"training": True, "lengths": None},
    )
    problem = lstm.problem(case)
    kept = measure_op.providers(problem, Session(case, "ops", Settings(smoke=True), io.StringIO()))
    assert {"eager float32", "advdl_ops"} <= set(kept)


def test_a_right_provider_is_timed_in_every_mode() -> None:
    session, stream = tiny_session()
    measure_op.measure_op(session.case, session, stock_problem())
    found = events(stream)
    assert not [e for e in found if e["event"] == "refused"]
    records = [record.from_dict(e["record"]) for e in found if e["event"] == "record"]
    times = {(r.provider, r.mode) for r in records if r.metric == "time"}
    assert times == {
        (p, m) for p in ("eager", "advdl_ops", "floor") for m in ("fwd", "bwd", "full")
    }
    # Stock against itself: the same bytes, and no rate without a time.
    held = {r.provider: r.p50 for r in records if r.metric == "held"}
    assert held["eager"] == held["advdl_ops"] > 0


@pytest.mark.parametrize("wrong", ["advdl_ops", "advdl_ops optimize"])
@pytest.mark.parametrize("kind", ["train", "inference"])
def test_a_network_with_wrong_values_is_refused(kind: str, wrong: str) -> None:
    case = registry.all_cases()[f"resnet18/{kind}/2x3x32x32/float32/cpu"]
    stream = io.StringIO()
    providers = ("eager channels_last", "advdl_ops optimize")
    session = Session(case, "models", Settings(smoke=True, providers=providers), stream)
    subject = resnet.subject(case)
    made = measure_model.models(subject, "cpu", kind == "train")
    found = measure_model.networks(subject, session, made)
    # Small enough to pass among rounding errors of fp32 gradients; the comparison in fp64 sees it.
    with torch.no_grad():
        found[wrong].model.get_parameter("layer4.0.bn1.bias").add_(1e-3)
    right = measure_model.check(found, session, measure_model.expected_values(found["eager"]))
    assert set(right) == {"eager", "advdl_ops", *providers} - {wrong}
    refused = [e for e in events(stream) if e["event"] == "refused"]
    assert [e["provider"] for e in refused] == [wrong]


ZOO, NO_ZOO = {"advdl_ops", "advdl_ops optimize"}, {"advdl_ops optimize"}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("torchvision_resnet18/inference/2x3x32x32", ZOO),
        ("unet/train/2x3x35x35", ZOO),
        ("unet/inference/2x3x35x35", ZOO),
        ("ddpm_unet/train/2x3x16x16", NO_ZOO),
        ("ddpm_unet/inference/2x3x16x16", NO_ZOO),
        ("efficientnet_b0/inference/4x3x64x64", NO_ZOO),
        ("deeplabv3_resnet50/inference/2x3x33x33", None),
        ("mobilenet_v2/inference/2x3x32x32", NO_ZOO),
        ("convnext_tiny/inference/2x3x32x32", NO_ZOO),
        pytest.param("torchvision_resnet18/train/2x3x32x32", ZOO, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0/train/4x3x64x64", NO_ZOO, marks=pytest.mark.slow),
        pytest.param("deeplabv3_resnet50/train/4x3x33x33", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_the_networks_are_measured(name: str, ours: set[str] | None, monkeypatch: Any) -> None:
    """Of every builder one small case: whatever competes has the right values and all that is reported."""
    case = registry.all_cases()[f"{name}/float32/cpu"]
    try:
        for module in case.extras:
            extras.require(module)
    except extras.MissingExtra as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(measure_model.ceilings, "ceilings", lambda *arguments: (1.0, 1.0))
    stream = io.StringIO()
    settings = Settings(smoke=True, providers=("advdl_ops optimize",))
    assert run_cases([case.name], "models", settings, stream) == 0, stream.getvalue()
    found = events(stream)
    assert not [e for e in found if e["event"] == "refused"]
    records = [record.from_dict(e["record"]) for e in found if e["event"] == "record"]
    if ours is None:
        ours = ZOO if "deeplabv3_resnet50" in models.list_models() else NO_ZOO
    kinds = {"time", "over_stock", "peak"} | ({"held"} if "/train/" in name else set())
    for provider in {"eager", *ours}:
        assert kinds <= {r.metric for r in records if r.provider == provider}
    # The ratios are over the zoo's network, or over the optimized one where there is none.
    rivals = {r.provider for r in records if r.metric == "speedup"}
    assert rivals == ({"eager", "advdl_ops optimize"} if ours == ZOO else {"eager"})


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d])
def test_flops_of_a_training_step_are_three_times_those_of_inference(
    kind: Any, groups: int
) -> None:
    model = kind(8, 8, 3, groups=groups)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = torch.nn.functional.mse_loss
    target = torch.zeros_like(model(x))
    network = measure_model.Network("eager", model, (x,), target, loss, model, optimizer)
    inference = measure_model.counted_flops(network, False)
    pixels = 36 if kind is torch.nn.ConvTranspose2d else 16
    assert inference == 2 * 2 * pixels * 8 * 8 // groups * 9
    assert measure_model.counted_flops(network, True) == 3 * inference


def test_a_gradient_of_nothing_but_rounding_is_compared_with_zero() -> None:
    truth = measure_model._without_rounding(
        {"loss": torch.ones((), dtype=torch.float64), "zero": torch.full((4,), 1e-17).double()}
    )
    noise = {"loss": truth["loss"], "zero": torch.full((4,), -3e-17).double()}
    assert wrong_values(noise, truth, truth, measure_model.EXACT_SLACK) is None
    noise["zero"] += 1e-3
    assert wrong_values(noise, truth, truth, measure_model.EXACT_SLACK) is not None


def test_a_shape_or_a_nan_is_never_within_the_bound() -> None:
    truth = {"output": torch.ones(4, dtype=torch.float64)}
    stock = {"output": torch.ones(4)}
    assert wrong_values({"output": torch.ones(4)}, stock, truth) is None
    for value in (
        torch.ones(3),
        torch.tensor([1.0, float("nan"), 1.0, 1.0]),
        torch.ones(4) * 1.001,
    ):
        assert "output is" in (wrong_values({"output": value}, stock, truth) or "")
    assert wrong_values({}, stock, truth) == "output is missing"


class HidesTensor(torch.autograd.Function):
    """Keeps a tensor on the context, past save_for_backward: saved-tensor hooks do not see it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.hidden = x * 2
        return x + 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.hidden


def test_held_bytes_count_a_tensor_hidden_on_the_context() -> None:
    x = torch.randn(1000, 100, requires_grad=True)
    gradient = torch.ones(1000, 100)
    size = x.numel() * 4

    def backward(output: torch.Tensor) -> Any:
        return torch.autograd.grad(output, x, gradient)

    held, peak = held_and_peak(lambda: HidesTensor.apply(x), backward, CPU)
    assert held == 2 * size  # output and hidden
    assert peak == 3 * size  # and the gradient
    held, peak = held_and_peak(lambda: x + 1, backward, CPU)
    assert held == size
    # What is freed within the forward is in the peak only.
    held, peak = held_and_peak(lambda: (x.detach() * 2).sum() + x + 1, backward, CPU)
    assert held == size
    assert peak >= 2 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_time_and_bytes_on_a_gpu() -> None:
    device = torch.device("cuda")
    x = torch.randn(1024, 1024, device=device, requires_grad=True)
    gradient = torch.ones_like(x)
    held, peak = held_and_peak(
        lambda: HidesTensor.apply(x), lambda y: torch.autograd.grad(y, x, gradient), device
    )
    assert held == 2 * 4 * 2**20
    assert peak == 3 * 4 * 2**20
    big = torch.empty(1 << 28, device=device)
    calls = {"small": timing.Timed(lambda: x + 1), "big": timing.Timed(lambda: big.zero_())}
    seconds = timing.measure(calls, device, 3, 0.005)
    assert min(seconds["big"]) > 2 * max(seconds["small"]) > 0


def test_rounds_alternate_and_preparation_is_not_timed() -> None:
    order: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: order.append(name)

    calls = {name: timing.Timed(call(name)) for name in ("a", "b", "c")}
    seconds = timing.measure(calls, CPU, 4, 0.0)
    assert {len(values) for values in seconds.values()} == {4}
    runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert "".join(runs) == "abc" + "abcbcacababc"  # warm-up, then four rounds

    slow = timing.Timed(lambda value: value + 1, lambda: time.sleep(0.02) or 1)
    assert max(timing.measure({"a": slow}, CPU, 3, 0.0)["a"]) < 0.01


@pytest.mark.parametrize("passes", range(2, 14))
def test_the_floor_moves_the_stated_passes(passes: int) -> None:
    clones, adds = measure_op._split(passes)
    assert 2 * clones + 3 * adds == passes
    like = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert measure_op.floor_call(like, passes).once().equal(like)


def test_quantiles_are_those_of_the_rounds() -> None:
    assert record.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == (2.0, 3.5, 5.0)
    assert record.quantiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        record.quantiles([])


def test_a_case_is_replaced_as_a_whole(tmp_path: Any) -> None:
    session, stream = tiny_session()
    session.record("eager", "fwd", "time", "s", [1.0, 2.0])
    first = record.from_dict(events(stream)[0]["record"])
    other = dataclasses.replace(first, case="other")
    stale = dataclasses.replace(first, provider="gone")
    record.write(tmp_path / "x.jsonl", [first, stale, other])
    newer = dataclasses.replace(first, p50=9.0)
    record.merge(tmp_path / "x.jsonl", [newer])
    assert record.read(tmp_path / "x.jsonl") == [newer, other]


def test_device_folders_have_plain_names() -> None:
    assert (
        record.slug("Intel(R) Xeon(R) Processor @ 2.50GHz, 2 cores")
        == "intel-xeon-processor-2-50ghz-2-cores"
    )
    assert record.slug("NVIDIA H200") == "nvidia-h200"


def test_a_case_without_its_peer_is_left_out(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    cases = registry.all_cases()
    other, needs = cases[TINY], cases["efficientnet_b0/inference/4x3x64x64/float32/cpu"]
    needs = dataclasses.replace(needs, extras=("timm",))
    assert runner.without_missing_extras([other, needs]) == [other]
    said = "this needs timm, which is not installed: python -m pip install --no-deps timm"
    assert capsys.readouterr().err == f"left out: {needs.name}: {said}\n"
    with pytest.raises(extras.MissingExtra, match=said):
        runner.without_missing_extras([needs])


def test_a_failing_case_does_not_stop_the_next() -> None:
    def explode(case: Any, session: Any) -> None:
        raise RuntimeError("first line\nmany more")

    cases = registry.all_cases()
    bad = dataclasses.replace(cases[TINY], name="bad", run=explode)
    good = dataclasses.replace(cases[TINY], name="good", run=lambda case, session: None)
    stream = io.StringIO()
    cases.update(bad=bad, good=good)
    try:
        assert run_cases(["bad", "good"], "ops", Settings(), stream) == 1
    finally:
        del cases["bad"], cases["good"]
    found = events(stream)
    assert [e["event"] for e in found] == ["start", "failed", "start", "done"]
    assert found[1]["why"] == "RuntimeError: first line"


def test_a_case_that_kills_its_process_is_reported_and_the_next_runs(monkeypatch: Any) -> None:
    code = (
        "import json, os, sys\n"
        "for name in sys.argv[sys.argv.index('--settings') + 2:]:\n"
        "    print(json.dumps({'event': 'start', 'case': name}), flush=True)\n"
        "    if name == 'bad': os.abort()\n"
        "    print(json.dumps({'event': 'done', 'case': name}), flush=True)\n"
    )
    real = runner.subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess,
        "Popen",
        lambda command, **kw: real([sys.executable, "-c", code, *command[3:]], **kw),
    )
    seen: list[tuple[str, str]] = []
    runner.collect(
        ["good", "bad", "last"],
        "ops",
        Settings(),
        60.0,
        lambda e: seen.append((e["event"], e["case"])),
    )
    assert seen == [
        *(("start", "good"), ("done", "good"), ("start", "bad"), ("failed", "bad")),
        *(("start", "last"), ("done", "last")),
    ]


def test_environment_of_measuring_processes(monkeypatch: Any) -> None:
    monkeypatch.delenv("ADVDL_OPS_REQUIRE_NATIVE", raising=False)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    env = environment.worker_environment("cpu")
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        assert int(env[name]) >= 2**28
    assert env["ADVDL_OPS_REQUIRE_NATIVE"] == "1"
    # What is compiled for one capability is not loaded under another.
    folders = {env["TORCHINDUCTOR_CACHE_DIR"]}
    for held in ("avx2", "default"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", held)
        folders.add(environment.worker_environment("cpu")["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 3


def test_curves_that_part_are_an_error() -> None:
    curve = [[2.0, 1.5], [1.0, 0.5]]
    digits.check_curves(curve, [[2.0, 1.5002], [1.01, 0.52]])
    with pytest.raises(digits.Disagreement, match="step 1"):
        digits.check_curves(curve, [[2.0, 1.502], [1.0, 0.5]])
    with pytest.raises(digits.Disagreement, match="epoch 2"):
        digits.check_curves(curve, [[2.0, 1.5], [1.2, 0.65]])
    with pytest.raises(digits.Disagreement):
        digits.check_curves(curve, [[float("nan"), 1.5], [1.0, 0.5]])


def test_a_training_with_another_gradient_is_an_error(monkeypatch: Any) -> None:
    training = digits.example()
    train_set, _ = training.load_digits(0, 96)
    monkeypatch.setattr(digits, "EXACT_STEPS", 2)
    digits.check_exactly(training, train_set, "cpu")
    build = training.build

    def wrong(name: str, backend: str, seed: int, device: str) -> torch.nn.Module:
        model = build(name, backend, seed, device)
        if backend == "fused":
            model.bn1.weight.register_hook(lambda grad: grad * 1.1)
        return model

    monkeypatch.setattr(training, "build", wrong)
    with pytest.raises(digits.Disagreement, match="in fp64"):
        digits.check_exactly(training, train_set, "cpu")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_stock_peer_is_the_same_network(name: str, stem: str) -> None:
    from advdl_ops import use_backend

    torch.manual_seed(0)
    ours = models.create_model(name, num_classes=5, in_channels=1, stem=stem)
    stock = stock_resnet(name, num_classes=5, in_channels=1, stem=stem)
    stock.load_state_dict(ours.state_dict())
    ours, stock = ours.double(), stock.double()
    images = torch.randn(2, 1, 33, 40, dtype=torch.float64)
    with use_backend("reference"):
        torch.testing.assert_close(ours(images), stock(images))
        torch.testing.assert_close(ours.eval()(images), stock.eval()(images))


@pytest.mark.parametrize("layout", norms.LAYOUTS)
@pytest.mark.parametrize("kind", ["group_norm2", "instance_norm", "layer_norm_2d"])
def test_the_group_norms_compete_with_their_stock_forms(kind: str, layout: str) -> None:
    case = registry.all_cases()[f"{kind}_add_silu/train/2x8x4x4/{layout}/float32/cpu"]
    session = Session(case, "ops", Settings(smoke=True), io.StringIO())
    problem = group_norm.problem(case)
    stock = {"eager", *(f"eager {form}" for form in group_norm.forms(case))}
    assert (len(stock) > 1) == (kind != "group_norm2")
    assert set(measure_op.providers(problem, session)) == {*stock, "advdl_ops"}
    problem.functions["advdl_ops"] = lambda inputs, state: inputs["x"] + inputs["residual"]
    assert set(measure_op.providers(problem, session)) == stock


def test_every_case_says_what_it_moves() -> None:
    for case in registry.all_cases().values():
        if "_norm" in case.op and case.bytes:
            size = norms.SIZE[case.dtype] * torch.Size(case.shape).numel()
            assert {mode: moved // size for mode, moved in case.bytes.items()} == dict(case.passes)
    # targets.md: floors of the 16x64x56x56 rows, as passes over 12.8 MB; 8 is the count of design.md for CUDA.
    assert batch_norm_act.passes(True, False, cached=True)["full"] == 5
    assert batch_norm_act.passes(True, False, cached=False)["full"] == 8
    assert batch_norm_act.passes(True, True, cached=True)["full"] == 8


@pytest.mark.parametrize("name", ["lstm_cell/train/2x3x4", "lstm_lengths/train/3x2x4x5"])
def test_the_lstm_competes_with_right_stock_forms(name: str) -> None:
    """Packed, padded and ours agree where they are compared; a padded output past the end is not."""
    case = registry.all_cases()[f"{name}/float32/cpu"]
    problem = lstm.problem(case)
    exact = measure_op.Provider(problem.functions["eager"], problem, torch.float64).values()
    plain = measure_op.Provider(problem.functions["eager"], problem).values()
    for function in problem.functions.values():
        assert wrong_values(measure_op.Provider(function, problem).values(), plain, exact) is None
    if "lengths" in name:
        assert len(problem.functions) == 3
        assert problem.ignored is not None and problem.ignored.any()
        problem.ignored = None
        padded = measure_op.Provider(problem.functions["eager padded"], problem).values()
        assert wrong_values(padded, plain, exact) is not None


@pytest.mark.parametrize(
    ("off", "refused"), [(5e-6, ["advdl_ops"]), (5e-5, ["advdl_ops", "eager twin"])]
)
def test_another_form_of_stock_may_be_less_accurate_and_ours_may_not(
    off: float, refused: list[str]
) -> None:
    session, _ = tiny_session(compile=False)
    x = torch.linspace(1, 2, 64)
    functions = {
        "eager": lambda inputs, state: inputs["x"] * 3,
        "eager twin": lambda inputs, state: inputs["x"] * 3 * (1 + off),
        "advdl_ops": lambda inputs, state: inputs["x"] * 3 * (1 + off),
    }
    kept = measure_op.providers(measure_op.Problem({"x": x}, {}, functions), session)
    assert sorted(set(functions) - set(kept)) == refused
