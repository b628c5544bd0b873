"""One layer of each kind of the package, for tests that hold for all."""

from advdl_ops import nn

ONE_OF_EACH = [
    nn.Conv2d(3, 4, 3),
    nn.ConvTranspose2d(3, 4, 2),
    nn.BatchNormAct2d(3),
    nn.GroupNorm(1, 3),
    nn.LayerNorm2d(3),
    nn.InstanceNorm2d(3),
    nn.ConvBNReLU(3, 4, 1),
    nn.LSTM(3, 4),
    nn.LSTMCell(3, 4),
]
