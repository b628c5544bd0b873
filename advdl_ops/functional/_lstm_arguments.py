"""How the LSTM functions read their arguments: options, weights, states, lengths, and the casts of autocast."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import AUTOCAST_FROM, autocast_dtype, cast

# The functions' names in errors and for the backend.
CELL, SEQUENCE = "lstm_cell", "lstm"

OptionalTensor = Tensor | None
States = tuple[Tensor, Tensor]


class Options(NamedTuple):
    """Every option of :func:`.lstm` that is not a tensor."""

    has_biases: bool
    num_layers: int
    directions: int
    batch_first: bool
    layer_norm: bool
    train: bool
    dropout: float
    zoneout_c: float
    zoneout_h: float
    recurrent_dropout: float
    eps: float

    def draw_masks(self) -> bool:
        """Whether the call changes the state of the random number generator."""
        rates = self.dropout, self.zoneout_c, self.zoneout_h, self.recurrent_dropout
        return self.train and any(rate > 0 for rate in rates)


class Sequences(NamedTuple):
    """How long each sequence is: ``lengths`` of a padded ``x``, or ``batch_sizes`` of a packed one."""

    lengths: OptionalTensor
    batch_sizes: OptionalTensor


class Weights(NamedTuple):
    """The weights of one layer and direction, in the order of ``params``."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: OptionalTensor
    b_hh: OptionalTensor
    w_hr: OptionalTensor
    w_ln_ih: OptionalTensor
    b_ln_ih: OptionalTensor
    w_ln_hh: OptionalTensor
    b_ln_hh: OptionalTensor
    w_ln_c: OptionalTensor
    b_ln_c: OptionalTensor


def grouped(params: Sequence[Tensor], options: Options) -> list[Weights]:
    """``params`` split into the weights of each layer and direction.

    Raises:
        RuntimeError: the number of tensors is wrong.
    """
    cells = options.num_layers * options.directions
    least = 2 + 2 * options.has_biases + 6 * options.layer_norm
    size, rest = divmod(len(params), cells)
    if rest or size - least not in (0, 1):
        raise RuntimeError(
            f"{SEQUENCE}: params ({len(params)} tensors) must be {least}, with a projection {least + 1}, for each of "
            f"the {cells} layers and directions"
        )
    missing: list[Any] = [None] * 6
    groups = []
    for first in range(0, len(params), size):
        own = list(params[first : first + size])
        biases = own[2:4] if options.has_biases else missing[:2]
        w_hr = own[2 + 2 * options.has_biases] if size > least else None
        norms = own[-6:] if options.layer_norm else missing
        groups.append(Weights._make([*own[:2], *biases, w_hr, *norms]))
    return groups


def is_pair(hx: Any) -> bool:
    return isinstance(hx, tuple | list) and len(hx) == 2


def unstacked(hx: Any, count: int) -> tuple[Sequence[OptionalTensor], Sequence[OptionalTensor]]:
    """The initial ``h`` and ``c`` of each of the ``count`` layers and directions.

    Raises:
        RuntimeError: ``hx`` is not a pair, or does not hold ``count`` states.
    """
    if hx is None:
        return (None,) * count, (None,) * count
    if not is_pair(hx) or hx[0].shape[0] != count or hx[1].shape[0] != count:
        raise RuntimeError(f"{SEQUENCE}: hx must hold the states of {count} layers and directions")
    return hx[0].unbind(0), hx[1].unbind(0)


def as_lengths(function: str, lengths: Any) -> OptionalTensor:
    """``lengths`` as a tensor of int64, from whatever ``pack_padded_sequence`` takes; ``None`` stays.

    Raises:
        TypeError: ``lengths`` is neither a tensor nor a sequence of integers.
    """
    if lengths is None:
        return None
    if isinstance(lengths, Tensor):
        # Other dtypes are refused later, with a name.
        return lengths.to(torch.int64) if lengths.dtype in _INTEGERS else lengths
    if isinstance(lengths, str) or not hasattr(lengths, "__iter__"):
        raise TypeError(
            f"{function}: lengths ({type(lengths).__name__}) must be a Tensor or a list of integers"
        )
    values = []
    for i, n in enumerate(lengths):
        if isinstance(n, bool):
            raise TypeError(f"{function}: lengths[{i}] ({n!r}) must be an integer")
        if isinstance(n, (int, torch.SymInt)):
            values.append(n)
            continue
        try:
            values.append(operator.index(n))
        except TypeError:
            raise TypeError(f"{function}: lengths[{i}] ({n!r}) must be an integer") from None
    return torch.tensor(values, dtype=torch.int64)


_INTEGERS = torch.int8, torch.int16, torch.int32, torch.uint8, torch.int64


def pair_of_rates(zoneout: Any) -> tuple[float, float]:
    """``zoneout`` as the rates of the cell and of ``h``.

    Raises:
        ValueError: a tuple or list that is not a pair.
    """
    if isinstance(zoneout, tuple | list):
        if len(zoneout) != 2:
            raise ValueError(f"{SEQUENCE}: zoneout ({zoneout!r}) must be a rate or a pair of them")
        return zoneout[0], zoneout[1]
    return zoneout, zoneout


# ---- autocast ----


def cast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the active autocast; ``None`` if there is none or if it does not cast ``x``."""
    dtype = autocast_dtype(x)
    return dtype if x.dtype in AUTOCAST_FROM else None


class Dtypes(NamedTuple):
    """The dtypes of a call: of the arithmetic and ``c_n``, and of ``y`` and ``h_n``."""

    cell: torch.dtype
    hidden: torch.dtype


def sequence_dtypes(x: Tensor, hx: Any, *, whole: bool, projects: bool) -> Dtypes:
    """The dtypes of torch's LSTM, also under autocast.

    cuDNN and oneDNN get all tensors in the autocast dtype. Elsewhere torch multiplies in it, and adds the product to a
    cell that may be wider; here everything is then computed in the wider dtype.

    Args:
        whole: all sequences have the length of ``x``: it is not packed, and no ``lengths`` are given.
    """
    dtype = cast_dtype(x)
    if dtype is None:
        return Dtypes(x.dtype, x.dtype)
    if not x.is_cpu or (whole and not projects and _onednn_takes(x)):
        return Dtypes(dtype, dtype)
    cell = hx[1] if is_pair(hx) and isinstance(hx[1], Tensor) else x
    wider = torch.promote_types(dtype, cell.dtype)
    return Dtypes(wider, dtype if projects else wider)


def _onednn_takes(x: Tensor) -> bool:
    if x.dtype == torch.float16:
        return _ONEDNN_FP16 and not torch.is_grad_enabled()
    return x.dtype == torch.float32 or _ONEDNN_BF16


# Not asked at a call, which a compiler could not trace.
_ONEDNN_BF16, _ONEDNN_FP16 = (
    torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, name)()
    for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")
)


def cast_all(tensors: Sequence[Any], dtype: torch.dtype | None) -> list[Any]:
    """The same list, with its tensors cast to ``dtype`` if one is given."""
    return [t if dtype is None or not isinstance(t, Tensor) else cast(t, dtype) for t in tensors]


def cast_pair(hx: Any, dtype: torch.dtype | None) -> Any:
    return tuple(cast_all(hx, dtype)) if is_pair(hx) else hx
