"""Runs the peers' own tests with this package's layers in their models.

    python tools/peer_tests.py                          # small models, some minutes
    python tools/peer_tests.py timm --models 'convnext*' 'resnet50*'
    python tools/peer_tests.py --all                    # every model: hours

The tests come from sdists of the package index, the peers themselves from this environment. Each test runs on stock
first. Those that pass run again with `torch.nn`'s classes exchanged for ours (`exchange`), and on models that were
converted (`optimize`). What then fails is listed, with the reason if it is known. The exit status is 1 if one is not.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import unittest.mock
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = "PEER_TESTS"  # the environment variable from which the plugin below learns what to do
HOWS = ("exchange", "optimize")
SECONDS_PER_TEST = 120
SMALL = ["convnext_atto", "efficientnet_b0", "mobilenetv3_small_050", "resnet18", "test_*"]


class Peer(NamedTuple):
    sdist: str  # {}: the installed version
    files: str  # those with layers that we replace
    without: str = "nothing"  # as of pytest's -k


PEERS = {
    "timm": Peer(
        "timm=={}",
        "test_models.py test_layers.py test_layers_pool.py test_layers_drop.py test_utils.py test_input_conv.py "
        "test_model_input.py test_prune.py test_task.py test_checkpoint_loading.py",
        # Weights to download, scripting (docs/optimize.md), models without such layers, and what takes long for little.
        "inference or pretrained or torchscript or default_cfgs or naflex or vit or swin or relpos or contract "
        "or mobilenetv5 or mish or swish or hard_sigmoid",
    ),
    # Later sdists have no tests of models. These still fit.
    "segmentation_models_pytorch": Peer("segmentation_models_pytorch==0.3.4", "test_models.py"),
}
# A pattern of a test's name and mode, and why it fails.
KNOWN = {
    "test_convert_splitbn_norm_act exchange": "timm adds a child named act to a subclass of torch.nn.BatchNorm2d. Here "
    "that class has an attribute of this name. On models from optimize it works."
}


# ---- the plugin of pytest, in the process that runs the tests ----


def exchange_classes() -> None:
    import torch

    from advdl_ops._optimize import layers

    for stock, counterpart in layers._TORCH.items():
        ours = counterpart(None).layer
        if ours.__name__ != stock.__name__:  # by which timm finds its own counterpart
            ours = type(stock.__name__, (ours,), {"__module__": "torch.nn"})
        setattr(torch.nn, stock.__name__, ours)


def optimize_models(peer: str) -> None:
    import torch

    import advdl_ops

    def optimized(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make, updated=())
        def made(*args: Any, **options: Any) -> Any:
            model = make(*args, **options)
            # `optimize` refuses models without data.
            on_meta = any(p.is_meta for p in model.parameters())
            return model if on_meta else advdl_ops.optimize(model)

        return made

    module: Any = importlib.import_module(peer)
    if peer == "timm":
        module.create_model = module.models.create_model = optimized(module.create_model)
        return
    module.encoders.get_encoder = optimized(module.encoders.get_encoder)
    for name, kind in list(vars(module).items()):
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            setattr(module, name, optimized(kind))


def pytest_configure(config: Any) -> None:
    config.peer_tests = settings = json.loads(os.environ[SETTINGS])
    sys.path.insert(0, str(ROOT))
    from benchmarks.extras import require

    if settings["how"] == "exchange":
        exchange_classes()
    require("torchvision.models")
    sys.modules.setdefault("mock", unittest.mock)  # the package that became a part of Python
    if settings["how"] == "optimize":
        optimize_models(settings["peer"])


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    models, passed = config.peer_tests["models"], config.peer_tests["passed"]

    def is_wanted(item: Any) -> bool:
        if passed is not None:
            return item.nodeid in passed
        given = item.callspec.params if hasattr(item, "callspec") else {}
        names = [str(given[key]) for key in ("model_name", "encoder_name") if given.get(key)]
        return all(any(fnmatch.fnmatch(name, pattern) for pattern in models) for name in names)

    items[:] = [item for item in items if is_wanted(item)]


def pytest_runtest_setup(item: Any) -> None:
    import torch

    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS_PER_TEST} s")

    torch.manual_seed(0)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_PER_TEST)


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    signal.alarm(SECONDS_PER_TEST if call.when == "setup" else 0)
    if call.when == "call" or call.excinfo is not None:
        why = call.excinfo.exconly() if call.excinfo is not None else ""
        with open(item.config.peer_tests["results"], "a") as file:
            file.write(json.dumps([item.nodeid, why]) + "\n")


# ---- the script ----


def tests_of(name: str, folder: Path) -> Path:
    """The folder of the tests, downloaded and unpacked into ``folder``."""
    sdist = PEERS[name].sdist.format(version(name))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name]
    if subprocess.run([*command, "--dest", str(folder), sdist]).returncode:
        sys.exit(f"{sdist} cannot be downloaded")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (tests,) = folder.glob("*/tests")
    return tests.rename(folder / "tests")  # away from the package: the installed one is tested


def outcomes(tests: Path, settings: dict[str, Any]) -> dict[str, str]:
    """The error of each test, "" if it passed. Skipped tests are left out."""
    results = tests.parent / f"{settings['how']}.jsonl"
    results.touch()
    added = {"PYTHONPATH": str(Path(__file__).parent), "HF_HUB_OFFLINE": "1"}
    added[SETTINGS] = json.dumps({**settings, "results": str(results)})
    peer = PEERS[settings["peer"]]
    command = [sys.executable, "-m", "pytest", *peer.files.split(), "-k", f"not ({peer.without})"]
    command += ["-p", "peer_tests", "-p", "no:cacheprovider", "-qq", "--no-summary", "-W", "ignore"]
    status = subprocess.run(command, cwd=tests, env={**os.environ, **added}).returncode
    if status not in (0, 1):
        print(f"pytest ended with status {status}")
    found = dict(json.loads(line) for line in results.read_text().splitlines())
    return {test: why for test, why in found.items() if not why.startswith("Skipped")}


def check(name: str, models: list[str], hows: list[str]) -> int:
    """Prints what fails, and returns how many failures have no known reason."""
    unknown = 0
    with tempfile.TemporaryDirectory() as folder:
        tests = tests_of(name, Path(folder))
        settings: dict[str, Any] = {"peer": name, "models": models, "passed": None}
        stock = outcomes(tests, {**settings, "how": "stock"})
        passed = [test for test, why in stock.items() if not why]
        print(f"{name}, stock: {len(passed)} passed, {len(stock) - len(passed)} failed", flush=True)
        for how in hows:
            found = outcomes(tests, {**settings, "how": how, "passed": passed})
            failed = {test: found.get(test, "not run, or skipped") for test in passed}
            failed = {test: why for test, why in failed.items() if why}
            print(f"{name}, {how}: {len(passed) - len(failed)} passed, {len(failed)} failed")
            for test, why in failed.items():
                reason = next((r for p, r in KNOWN.items() if re.search(p, f"{test} {how}")), None)
                unknown += reason is None
                print(f"  {test}\n    {reason or why}", flush=True)
    return unknown


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--how", choices=HOWS, nargs="+", default=list(HOWS))
    parser.add_argument("--models", nargs="+", default=SMALL, help="patterns of their names")
    parser.add_argument("--all", action="store_const", dest="models", const=["*"])
    args = parser.parse_args()
    return int(sum([check(name, list(args.models), args.how) for name in args.peers]) > 0)


if __name__ == "__main__":
    sys.exit(main())
