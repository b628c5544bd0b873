"""optimize(): LSTM and LSTMCell."""

import copy

import pytest
import torch
from support.optimize import check_as, counts, same
from torch import nn as stock

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Recurrent(stock.Module):
    def __init__(self):
        super().__init__()
        self.lstm = stock.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=4)
        self.cell = stock.LSTMCell(8, 6)

    def forward(self, x):
        y, _ = self.lstm(x)
        h, c = self.cell(y[-1])
        return torch.cat([h, c], 1)


def test_lstm():
    model = Recurrent().double()
    twin = copy.deepcopy(model)
    fast = advdl_ops.optimize(model)
    assert counts(fast) == (0, 2, 0)
    assert isinstance(fast.lstm, nn.LSTM) and isinstance(fast.cell, nn.LSTMCell)
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    check_as(twin, fast, x)
    packed = stock.utils.rnn.pack_padded_sequence(x, [7, 4, 2])
    same(fast.lstm(packed)[0].data, twin.lstm(packed)[0].data)
    same(fast.lstm(input=x)[0], twin.lstm(input=x)[0])


def test_lstm_restored():
    fast = advdl_ops.optimize(Recurrent())
    fast.double()  # its parameters are others now
    restored = advdl_ops.restore(fast)
    assert type(restored.lstm) is stock.LSTM
    assert all(
        a is b for a, b in zip(restored.lstm._flat_weights, restored.lstm.parameters(), strict=True)
    )
    x = torch.randn(7, 3, 5, dtype=torch.float64)
    check_as(copy.deepcopy(restored), advdl_ops.optimize(restored), x)
