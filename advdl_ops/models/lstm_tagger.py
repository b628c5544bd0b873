"""Bidirectional LSTM for tagging: Huang et al. 2015, Bidirectional LSTM-CRF Models for Sequence Tagging,
https://arxiv.org/abs/1508.01991 (their BI-LSTM, without the CRF)

- bidirectional LSTM: Graves and Schmidhuber 2005, Framewise Phoneme Classification with Bidirectional LSTM and Other
  Neural Network Architectures, https://doi.org/10.1016/j.neunet.2005.06.042
- dropout on input and output of the LSTM: Ma and Hovy 2016, End-to-end Sequence Labeling via Bi-directional
  LSTM-CNNs-CRF, https://arxiv.org/abs/1603.01354
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from torch import Tensor

from advdl_ops.models._layers import build
from advdl_ops.models._registry import register_model
from advdl_ops.models._tokens import Lengths, TokenModel


class LSTMTagger(TokenModel):
    """Scores of the classes for each token: `[T, N]` -> `[T, N, num_classes]`, before softmax; options as in
    `TokenModel`.
    """

    name: ClassVar[str] = "lstm_tagger"

    def forward(self, tokens: Tensor, lengths: Lengths = None) -> Tensor:
        """`tokens` `[T, N]`, `lengths` `[N]` -> scores `[T, N, num_classes]`; errors as in `features`.

        Past a sequence's end the scores are the bias of `linear`: exclude them from the loss.
        """
        y, _ = self.features(tokens, lengths)
        return self.linear(self.dropout(y))


@register_model
def lstm_tagger(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> LSTMTagger:
    """Tagger on a bidirectional LSTM; `weights` as in `create_model`, options as in `LSTMTagger`."""
    return build("lstm_tagger", LSTMTagger, weights, options)
