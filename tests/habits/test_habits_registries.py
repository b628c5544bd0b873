"""Tables of other packages by a layer's exact class: counters of operations, rules of attribution."""

import subprocess
import sys

import pytest
import torch

import advdl_ops
from advdl_ops import nn

STUB = """
import torch
register_hooks = {torch.nn.Conv2d: "convolution", torch.nn.LSTM: "lstm", torch.nn.ReLU: "relu"}
"""
PROGRAM = """
import torch
{first}
{second}
from advdl_ops import nn
table = sys.modules["thop.profile"].register_hooks
assert table[nn.Conv2d] == "convolution" and table[nn.LSTM] == "lstm", table
assert len(table) == 5, table
"""


@pytest.mark.parametrize("ours_first", [True, False])
def test_classes_are_registered(ours_first, tmp_path):
    package = tmp_path / "thop"
    package.mkdir()
    (package / "__init__.py").write_text("from .profile import register_hooks\n")
    (package / "profile.py").write_text(STUB)
    imports = ["import advdl_ops", "import thop"]
    first, second = imports if ours_first else reversed(imports)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + PROGRAM.format(
        first=first, second=second
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_relevance_by_captum():
    attr = pytest.importorskip("captum.attr")
    torch.manual_seed(0)
    stock = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1),
        torch.nn.AdaptiveAvgPool2d(1),
    ).double()  # fmt: skip
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    fast = advdl_ops.optimize(stock)
    assert type(fast[0]) is nn.Conv2d
    found, expected = (attr.LRP(model).attribute(x, target=(1, 0, 0)) for model in (fast, stock))
    torch.testing.assert_close(found, expected)
