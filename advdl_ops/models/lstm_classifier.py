"""Sentence classifier: Conneau et al. 2017, Supervised Learning of Universal Sentence Representations from Natural
Language Inference Data, https://arxiv.org/abs/1705.02364, section 3.2

The paper's encoders with an LSTM: the bidirectional one pooled by maximum, which they found best, or by mean, and the
last states. Dropout as in Zaremba et al. 2014, https://arxiv.org/abs/1409.2329
"""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from advdl_ops.models._layers import build
from advdl_ops.models._registry import register_model
from advdl_ops.models._tokens import Lengths, TokenModel


class LSTMClassifier(TokenModel):
    """Scores of the classes for each sequence: `[T, N]` -> `[N, num_classes]`, before softmax.

    Args:
        num_classes: outputs for each sequence.
        pool: "max" or "mean" over the outputs of each sequence, or "last": the last layer's state at the end of each
            direction.
        options: as in `TokenModel`.

    Raises:
        ValueError, TypeError: an option out of range, or of another type.
    """

    name: ClassVar[str] = "lstm_classifier"

    def __init__(self, num_classes: int = 2, *, pool: str = "max", **options: Any) -> None:
        super().__init__(num_classes, **options)
        if pool not in ("max", "mean", "last"):
            raise ValueError(f'{self.name}: pool ({pool!r}) must be "max", "mean" or "last"')
        self.pool = pool

    def forward(self, tokens: Tensor, lengths: Lengths = None) -> Tensor:
        """`tokens` `[T, N]`, `lengths` `[N]` -> scores `[N, num_classes]`; errors as in `features`."""
        y, (h_n, _) = self.features(tokens, lengths)
        if self.pool == "last":
            directions = 1 + self.lstm.bidirectional
            pooled = h_n[-directions:].transpose(0, 1).flatten(1)
        else:
            pooled = _pooled(y, lengths, self.pool, self.lstm.batch_first)
        return self.linear(self.dropout(pooled))


@fx.wrap  # lengths may be None for a call of a traced model, and not for another
def _pooled(y: Tensor, lengths: Lengths, pool: str, batch_first: bool) -> Tensor:
    """Maximum or mean over the times of each sequence: `[N, D * hidden_size]`."""
    y = y.transpose(0, 1) if batch_first else y
    if lengths is None:
        return y.amax(0) if pool == "max" else y.mean(0)
    ends = torch.as_tensor(lengths, device=y.device).unsqueeze(1)
    if pool == "mean":
        return y.sum(0) / ends  # y is zero past a sequence's end
    times = torch.arange(y.shape[0], device=y.device).view(-1, 1, 1)
    return y.masked_fill(times >= ends, -math.inf).amax(0)


@register_model
def lstm_classifier(
    *, weights: str | os.PathLike[str] | None = None, **options: Any
) -> LSTMClassifier:
    """Classifier on an LSTM; `weights` as in `create_model`, options as in `LSTMClassifier`."""
    return build("lstm_classifier", LSTMClassifier, weights, options)
