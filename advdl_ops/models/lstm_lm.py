"""Language model: Zaremba et al. 2014, Recurrent Neural Network Regularization, https://arxiv.org/abs/1409.2329

- tied weights: Press and Wolf 2016, Using the Output Embedding to Improve Language Models,
  https://arxiv.org/abs/1608.05859, and Inan et al. 2016, https://arxiv.org/abs/1611.01462
- initial values: Merity et al. 2017, Regularizing and Optimizing LSTM Language Models, https://arxiv.org/abs/1708.02182

The defaults are Zaremba's medium model.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from advdl_ops.models._layers import build, check_flags
from advdl_ops.models._registry import register_model
from advdl_ops.models._tokens import Lengths, States, TokenModel


class LSTMLM(TokenModel):
    """Scores of the token that follows each one: `[T, N]` -> `[T, N, num_classes]`, before softmax, and the states.

    Args:
        num_classes: the size of the vocabulary, for inputs and predictions.
        tie_weights: `linear` uses the embedding's weight (and has no key `linear.weight`). `embedding_dim` and
            `hidden_size` must then be equal. `linear.weight` itself is then None: code that initializes every
            `torch.nn.Linear` must skip it.
        embedding_dim, hidden_size, num_layers, options: as in `TokenModel`, without `vocabulary` and `bidirectional`.

    Raises:
        ValueError, TypeError: an option out of range, or of another type.
    """

    name: ClassVar[str] = "lstm_lm"

    def __init__(
        self,
        num_classes: int = 10_000,
        *,
        tie_weights: bool = False,
        embedding_dim: int = 650,
        hidden_size: int = 650,
        num_layers: int = 2,
        **options: Any,
    ) -> None:
        check_flags(self.name, tie_weights=tie_weights)
        super().__init__(
            num_classes,
            vocabulary=num_classes,
            embedding_dim=embedding_dim,
            hidden_size=hidden_size,
            num_layers=num_layers,
            bidirectional=False,
            **options,
        )
        self.tie_weights = tie_weights
        if tie_weights:
            if embedding_dim != hidden_size:
                raise ValueError(
                    f"{self.name}: embedding_dim ({embedding_dim}) must be hidden_size ({hidden_size}) with tie_weights"
                )
            # Not the same parameter under two keys: a file of an untied model would silently fill it twice, and
            # safetensors refuses to save it.
            self.linear.register_parameter("weight", None)

    def forward(
        self, tokens: Tensor, hx: States | None = None, lengths: Lengths = None
    ) -> tuple[Tensor, States]:
        """As `torch.nn.LSTM`; errors as in `features`.

        Args:
            tokens: `[T, N]`, with `batch_first` `[N, T]`.
            hx: the states after the preceding tokens, `(h, c)` `[num_layers, N, hidden_size]` each. With one token per
                call they generate text. Detach them to end backpropagation there.
            lengths: of each sequence, `[N]`.

        Returns:
            scores `[T, N, num_classes]`, and the states after each sequence's last token. Past its end the scores are
            the bias of `linear`: exclude them from the loss.
        """
        y, states = self.features(tokens, lengths, hx)
        y = self.dropout(y)
        if self.tie_weights:
            return F.linear(y, self.embedding.weight, self.linear.bias), states
        return self.linear(y), states


@register_model
def lstm_lm(*, weights: str | os.PathLike[str] | None = None, **options: Any) -> LSTMLM:
    """LSTM language model; `weights` as in `create_model`, options as in `LSTMLM`."""
    return build("lstm_lm", LSTMLM, weights, options, without=("vocabulary", "bidirectional"))
