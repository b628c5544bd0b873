"""optimize(): random numbers in a model that could run in channels_last."""

import copy

import pytest
import torch
from support.optimize import Chain, Noise, X, formats_of_last
from torch import nn as stock

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread", "formats_unwatched")


class Drops(stock.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("between", [stock.Dropout(), stock.RReLU(), Noise(), Drops()])
def test_random_numbers_fall_on_the_same_pixels(between):
    model = Chain(between).train()
    twin, fast = copy.deepcopy(model), advdl_ops.optimize(model)
    seen = formats_of_last(fast)
    x, outputs = X.float(), []
    for each in (twin, fast):
        torch.manual_seed(0)
        outputs.append(each(x)["x"])
    torch.testing.assert_close(*outputs)
    with torch.no_grad():
        fast.eval()(x)
    # What torch's RReLU returns in evaluation is contiguous.
    assert seen == [False, not isinstance(between, stock.RReLU)]


class Never(stock.Module):
    def forward(self, x):
        return torch.dropout(x, 0.5, False)


def test_dropout_that_does_nothing_does_not_forbid_channels_last():
    fast = advdl_ops.optimize(Chain(stock.Dropout(0.0))).train()
    seen = formats_of_last(fast)
    fast(X.float())
    fast.between.p = 0.5
    fast(X.float())
    fast.between.eval()
    fast(X.float())
    fast.eval()
    fast.between.train()
    with torch.no_grad():
        fast(X.float())
    assert seen == [True, False, True, False]
    fast = advdl_ops.optimize(Chain(Never())).train()
    seen = formats_of_last(fast)
    fast(X.float())
    assert seen == [True]
