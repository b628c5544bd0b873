"""What the models for tokens share: embedding, LSTM, a linear layer, and dropout between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from advdl_ops import nn
from advdl_ops._watch import is_proxy
from advdl_ops.functional._lstm_arguments import as_lengths
from advdl_ops.functional._lstm_checks import check_lengths, check_rate
from advdl_ops.models._layers import check_counts, check_flags

States = tuple[Tensor, Tensor]
Lengths = Tensor | Sequence[int] | None


class TokenModel(torch.nn.Module):
    """Embedding, dropout, LSTM, dropout, linear; keys `embedding.*`, `lstm.*` as `torch.nn.LSTM`'s, `linear.*`.

    Embeddings are initialized uniformly in [-0.1, 0.1], all other parameters in +-1 / sqrt(hidden_size), as in Merity
    et al. 2017 (https://arxiv.org/abs/1708.02182).

    Args:
        num_classes: outputs for each token or sequence.
        vocabulary: tokens are 0 to `vocabulary - 1`.
        embedding_dim: features of a token.
        hidden_size, num_layers, bidirectional: of the LSTM.
        dropout: the rate of dropout on embeddings, between layers, and before `linear`, but not within a layer's
            recurrence (Zaremba et al. 2014, https://arxiv.org/abs/1409.2329).
        batch_first: tokens are `[N, T]` instead of `[T, N]`, and so are all other tensors with times. Off by default,
            as in `torch.nn.LSTM`, because a step of the whole batch is then contiguous in memory.
        padding_idx: a token whose embedding starts at zero and is not trained through the LSTM. Not needed for padded
            sequences, whose ends are given by `lengths`.
        layer_norm, zoneout, recurrent_dropout, forget_bias: see `advdl_ops.nn.LSTM`.

    Raises:
        ValueError: an option out of range.
        TypeError: a rate that is not a number.
    """

    name: ClassVar[str]  # what error messages call the model
    last_layers: ClassVar[tuple[str, ...]] = ("linear",)  # read by load_weights

    def __init__(
        self,
        num_classes: int = 2,
        *,
        vocabulary: int = 10_000,
        embedding_dim: int = 200,
        hidden_size: int = 200,
        num_layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.5,
        batch_first: bool = False,
        padding_idx: int | None = None,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(
            self.name,
            num_classes=num_classes,
            vocabulary=vocabulary,
            embedding_dim=embedding_dim,
            hidden_size=hidden_size,
            num_layers=num_layers,
        )
        check_flags(
            self.name,
            bidirectional=bidirectional,
            batch_first=batch_first,
            layer_norm=layer_norm,
        )
        check_rate(self.name, "dropout", dropout)
        if padding_idx is not None and padding_idx not in range(vocabulary):
            raise ValueError(
                f"{self.name}: padding_idx ({padding_idx!r}) must be a token, 0 to {vocabulary - 1}"
            )
        self.embedding = torch.nn.Embedding(vocabulary, embedding_dim, padding_idx)
        with torch.no_grad():
            self.embedding.weight.uniform_(-0.1, 0.1)
            if padding_idx is not None:
                self.embedding.weight[padding_idx].zero_()
        self.dropout = torch.nn.Dropout(dropout)
        self.lstm = nn.LSTM(
            embedding_dim,
            hidden_size,
            num_layers,
            batch_first=batch_first,
            dropout=dropout if num_layers > 1 else 0.0,  # torch warns about a rate without effect
            bidirectional=bidirectional,
            layer_norm=layer_norm,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            forget_bias=forget_bias,
        )
        self.linear = torch.nn.Linear((1 + bidirectional) * hidden_size, num_classes)

    def features(
        self, tokens: Tensor, lengths: Lengths = None, hx: States | None = None
    ) -> tuple[Tensor, States]:
        """Outputs and final states of the LSTM.

        Args:
            tokens: `[T, N]`, with `batch_first` `[N, T]`; int64 or int32. T >= 1.
            lengths: of each sequence, `[N]`, 1 to T in any order: a CPU tensor of int64, or integers. Tokens past a
                sequence's end have no effect, but must be valid.
            hx: initial states, `[num_layers * D, N, hidden_size]` each; zeros by default.

        Returns:
            `y` `[T, N, D * hidden_size]`, with `batch_first` `[N, T, D * hidden_size]`, zero past a sequence's end;
            `(h_n, c_n)` of the shapes of `hx`.

        Raises:
            TypeError: `tokens` is not a tensor, `lengths` are not integers.
            ValueError: `tokens` of another rank.
            RuntimeError: tokens of another dtype, T = 0, bad `lengths` or `hx`.
            IndexError: a token outside of the vocabulary (on CPU; on CUDA a device-side assertion).
        """
        lengths = self._checked_lengths(tokens, lengths)
        x = self.dropout(self.embedding(tokens))
        if lengths is None:
            return self.lstm(x, hx)
        if isinstance(self.lstm, nn.LSTM):
            return self.lstm(x, hx, lengths=lengths)
        # Another layer in its place is called as torch's.
        batch_first = self.lstm.batch_first
        packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        y, states = self.lstm(packed, hx)
        steps = x.shape[1 if batch_first else 0]
        return pad_packed_sequence(y, batch_first, total_length=steps)[0], states

    def _checked_lengths(self, tokens: Tensor, lengths: Lengths) -> Any:
        """`lengths` as a tensor, after checks of them and of the tokens, but for a trace."""
        if is_proxy(tokens) or torch.jit.is_tracing():
            return lengths if is_proxy(lengths) else as_lengths(self.name, lengths)
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{self.name}: tokens ({type(tokens).__name__}) must be a Tensor")
        batch_first = self.lstm.batch_first
        must = f"must be integers of {'[N, T]' if batch_first else '[T, N]'}"
        if tokens.dtype not in (torch.int64, torch.int32):
            raise RuntimeError(
                f"{self.name}: tokens ({tokens.dtype}) {must}, torch.int64 or torch.int32"
            )
        if tokens.dim() != 2:
            raise ValueError(f"{self.name}: tokens (shape {list(tokens.shape)}) {must}")
        steps, batch = tokens.shape[::-1] if batch_first else tokens.shape
        if steps == 0:
            raise RuntimeError(
                f"{self.name}: tokens (shape {list(tokens.shape)}) must have a step at least"
            )
        lengths = as_lengths(self.name, lengths)
        if lengths is not None:
            check_lengths(self.name, lengths, steps, batch, "tokens")
        return lengths
