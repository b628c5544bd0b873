"""use_backend, its environment variables, and what ADVDL_OPS_REQUIRE_NATIVE forbids."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import advdl_ops
from advdl_ops import backend, get_backend, get_convolution, use_backend, use_convolution
from advdl_ops.functional import batch_norm_act

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _restore():
    before = get_backend()
    yield
    use_backend(before)


@pytest.fixture
def calls(monkeypatch):
    """Which of the two implementations a call of batch_norm_act reached."""
    seen = []
    reference = advdl_ops.reference.batch_norm_act

    def spy(*args, **kwargs):
        seen.append("reference")
        return reference(*args, **kwargs)

    monkeypatch.setattr(advdl_ops.reference, "batch_norm_act", spy)
    return seen


def call():
    return batch_norm_act(torch.randn(2, 3, 4), None, None, training=True)


def test_setter(calls):
    assert get_backend() == "fused"
    call()
    assert calls == []
    use_backend("reference")
    assert get_backend() == "reference"
    call()
    assert calls == ["reference"]
    use_backend("fused")
    call()
    assert calls == ["reference"]


def test_context_manager(calls):
    with use_backend("reference"):
        assert get_backend() == "reference"
        with use_backend("fused"):
            assert get_backend() == "fused"
            call()
        assert get_backend() == "reference"
        call()
    assert get_backend() == "fused"
    assert calls == ["reference"]


def test_context_manager_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        1 / 0  # noqa: B018
    assert get_backend() == "fused"


def test_the_convolution_is_set_and_restored_alike():
    assert get_convolution() == "default"
    with use_convolution("exact"):
        assert (get_convolution(), get_backend()) == ("exact", "fused")
        with use_convolution("default"):
            assert get_convolution() == "default"
        assert get_convolution() == "exact"
    assert get_convolution() == "default"
    with pytest.raises(ZeroDivisionError), use_convolution("exact"):
        1 / 0  # noqa: B018
    with pytest.raises(
        ValueError, match=r"use_convolution: name \('fused'\) must be one of default, exact"
    ):
        use_convolution("fused")
    assert get_convolution() == "default"
    setting = use_convolution("exact")
    assert get_convolution() == "exact"
    setting.__exit__(None, None, None)
    assert get_convolution() == "default"


def test_unknown_name_changes_nothing():
    with pytest.raises(
        ValueError, match=r"use_backend: name \('cuda'\) must be one of fused, reference"
    ):
        use_backend("cuda")
    assert get_backend() == "fused"


def run_python(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ADVDL_OPS_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_chooses():
    code = "import advdl_ops; print(advdl_ops.get_backend())"
    assert run_python(code, ADVDL_OPS_BACKEND="reference").stdout == "reference\n"
    assert run_python(code).stdout == "fused\n"


@pytest.mark.parametrize(
    ("variable", "names"), [("BACKEND", "fused, reference"), ("CONVOLUTION", "default, exact")]
)
def test_environment_with_an_unknown_name(variable, names):
    done = run_python("import advdl_ops", **{f"ADVDL_OPS_{variable}": "fast"})
    assert done.returncode != 0
    assert f"ADVDL_OPS_{variable} ('fast') must be one of {names}" in done.stderr


EMPTY = {
    f"ADVDL_OPS_{name}": ""
    for name in ("BACKEND", "CONVOLUTION", "REQUIRE_NATIVE", "TUNE", "CACHE", "CPU_CAPABILITY")
}


def test_an_empty_variable_is_none():
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, advdl_ops; from advdl_ops import _environment, backend, tuning\n"
        "from advdl_ops.functional import batch_norm_act\n"
        "batch_norm_act(torch.randn(2, 3, 4), None, None, training=True)\n"
        "print(advdl_ops.get_backend(), advdl_ops.get_convolution(), backend._require_native,\n"
        "      tuning.is_on(torch.device('cuda')), tuning._directory())"
    )
    empty, none = run_python(code, **EMPTY), run_python(code)
    assert empty.stdout.startswith("fused default False True /")
    assert (empty.stdout, empty.stderr) == (none.stdout, none.stderr) == (none.stdout, "")


@pytest.mark.parametrize("name", ["REQUIRE_NATIVE", "TUNE"])
def test_what_is_neither_0_nor_1_is_ignored_and_said(name):
    code = (
        "import torch, advdl_ops; from advdl_ops import backend, tuning\n"
        "print(backend._require_native, [tuning.is_on(torch.device('cuda')) for _ in range(2)])"
    )
    done = run_python(code, **{f"ADVDL_OPS_{name}": "no"})
    assert done.stdout == "False [True, True]\n"
    assert done.stderr.count(f"ADVDL_OPS_{name} ('no') must be 0 or 1; it is ignored") == 1
    opposite = {"REQUIRE_NATIVE": ("1", "True [True, True]"), "TUNE": ("0", "False [False, False]")}
    value, expected = opposite[name]
    done = run_python(code, **{f"ADVDL_OPS_{name}": value})
    assert (done.stdout.strip(), done.stderr) == (expected, "")


def test_require_native_refuses_transforms():
    x = torch.randn(2, 3, 4)
    with pytest.raises(
        RuntimeError, match="batch_norm_act: ADVDL_OPS_REQUIRE_NATIVE=1 is set, but"
    ):
        torch.func.grad(lambda x: batch_norm_act(x, None, None, training=True).sum())(x)
    with pytest.raises(RuntimeError, match="transform is active"):
        torch.func.vmap(lambda x: batch_norm_act(x, None, None, training=True))(
            torch.randn(2, 2, 3, 4)
        )


def test_require_native_refuses_an_unloaded_library(monkeypatch, calls):
    monkeypatch.setitem(advdl_ops._library._status, "cpu", "it fell off the shelf")
    with pytest.raises(RuntimeError, match="it fell off the shelf"):
        call()
    assert calls == []
    monkeypatch.setattr(backend, "_require_native", False)
    call()
    assert calls == ["reference"]


def test_require_native_leaves_an_asked_for_reference(calls):
    with use_backend("reference"):
        call()
    assert calls == ["reference"]


def test_tests_run_with_require_native():
    assert backend._require_native


def test_kernel_runs_where_fused_is_asked_for():
    with torch.profiler.profile() as profile:
        call()
    names = {event.key for event in profile.key_averages()}
    assert "advdl_ops::batch_norm_act_" in names
    with torch.profiler.profile() as profile, use_backend("reference"):
        call()
    assert "advdl_ops::batch_norm_act_" not in {event.key for event in profile.key_averages()}
