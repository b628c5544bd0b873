"""optimize(): layers that are left as they are and why."""

import pytest
import torch
import torch.nn.utils.prune
from support.optimize import X, same
from torch import nn as stock

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_left_and_why():
    class Own(stock.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    model = stock.Sequential(
        Own(8, 8, 1), stock.Conv2d(8, 8, 1), stock.Conv2d(8, 8, 1), stock.Conv2d(8, 8, 1)
    ).double()
    stock.utils.parametrizations.weight_norm(model[1])
    stock.utils.prune.l1_unstructured(model[2], "weight", 0.5)
    model[3].forward = lambda x: x
    expected, fast = model(X), advdl_ops.optimize(model)
    left = advdl_ops.explain(fast, as_dict=True)["left"]
    assert left.keys() == {"0", "1", "2", "3"}
    for name, why in zip(
        "0123", ("class of its own", "parametrized", "pruned", "replaced"), strict=True
    ):
        assert why in left[name]
    text = str(advdl_ops.explain(fast))
    assert "  2  Conv2d\n      left as it was: its weight is no parameter: pruned" in text
    same(fast(X), expected)


def test_other_kinds_of_numbers_are_left():
    model = stock.Sequential(stock.Conv2d(2, 2, 1, dtype=torch.complex64))
    left = advdl_ops.explain(advdl_ops.optimize(model), as_dict=True)["left"]
    assert left == {"0": "its weight is torch.complex64"}
