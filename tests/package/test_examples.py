"""The example trains, prints an accuracy and saves weights that load again."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from support.examples import run_example

ROOT = Path(__file__).resolve().parents[2]


run = functools.partial(run_example, "train_classifier")


@pytest.mark.parametrize(("backend", "suffix"), [("fused", ".safetensors"), ("stock", ".pth")])
def test_one_epoch_on_a_subset(backend: str, suffix: str, tmp_path: Path) -> None:
    weights = tmp_path / f"digits{suffix}"
    done = run(
        *("--epochs", "1", "--limit", "200", "--batch-size", "32", "--backend", backend),
        *("--output", str(weights)),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1/1: loss \d+\.\d{4}", done.stdout)
    assert re.search(r"test accuracy: \d+\.\d\d% of 40 images", done.stdout)

    from advdl_ops import models

    options = {"num_classes": 10, "in_channels": 1, "stem": "small"}
    model = models.create_model("resnet18", weights=weights, **options)
    fresh = models.create_model("resnet18", **options)
    assert not torch.equal(model.fc.weight, fresh.fc.weight)
    assert model.bn1.num_batches_tracked == 5


def test_help_needs_no_extra() -> None:
    done = run(
        code="import sys; sys.modules['sklearn'] = sys.modules['torch'] = None; sys.path.insert(0, '../examples')\n"
        "import train_classifier\ntrain_classifier.main(['--help'])"
    )
    assert done.returncode == 0, done.stderr
    assert "--backend" in done.stdout


def test_a_missing_extra_is_one_sentence() -> None:
    done = run(
        code="import sys; sys.modules['sklearn'] = None; sys.path.insert(0, '../examples')\n"
        "import train_classifier\ntrain_classifier.main([])"
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("python -m pip install scikit-learn")
    assert "Traceback" not in done.stderr


def test_a_batch_larger_than_the_data_is_said() -> None:
    done = run("--limit", "50", "--batch-size", "64")
    assert done.returncode == 1
    assert "--batch-size 64 is more than the 40 images" in done.stderr
