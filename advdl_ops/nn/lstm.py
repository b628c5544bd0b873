"""``torch.nn``'s LSTM and LSTMCell on fused kernels, with layer norm, zoneout and recurrent dropout."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .._watch import is_proxy, recorded
from ..functional._lstm_checks import check_rate
from ..functional.lstm import lstm
from ..functional.lstm_cell import lstm_cell
from ._quantization import Configuration
from ._script import refuse_script

_States = tuple[Tensor, Tensor]


class LSTMCell(torch.nn.LSTMCell):
    """One step of an LSTM: ``[N, input_size]`` or ``[input_size]`` -> ``(h, c)``.

    It has the arguments, defaults and ``state_dict`` keys of :class:`torch.nn.LSTMCell`, and:

    Args:
        forget_bias: the initial value of the forget gate's bias (Gers et al. 2000; Jozefowicz et al. 2015 recommend 1).
            It goes into ``bias_ih``; ``bias_hh`` starts at 0. ``None`` initializes as torch does.

    Raises:
        ValueError: ``forget_bias`` with ``bias=False``.
    """

    qconfig = Configuration(torch.nn.LSTMCell)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
    ) -> None:
        _check_forget_bias("LSTMCell", forget_bias, bias)
        self.forget_bias = forget_bias
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.forget_bias is not None:
            _set_forget_bias(self.bias_ih, self.bias_hh, self.forget_bias)

    def forward(self, input: Tensor, hx: _States | None = None) -> _States:
        """``input`` ``[N, I]``, states ``[N, H]``, or ``[I]``, ``[H]`` -> ``(h, c)``; errors as :func:`.lstm_cell`.

        Raises:
            ValueError: ``input`` or a state has neither one nor two dimensions.
        """
        if is_proxy(input):
            return recorded(self, input, hx=hx)
        x = input
        # Read from the dict, because Module.__getattr__ would add to the time of a small step.
        own = self._parameters
        weights: tuple[Any, ...]
        if "weight_ih" in own and "weight_hh" in own and "bias_ih" in own and "bias_hh" in own:
            weights = own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"]
        else:  # one is parametrized
            weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if not isinstance(x, Tensor) or x.dim() == 2:
            try:
                return lstm_cell(x, hx, *weights)
            except RuntimeError:
                _check_cell_dims("hx", hx)
                raise
        _check_cell_dims("x", (x,))
        _check_cell_dims("hx", hx)
        if _is_pair(hx):
            hx = hx[0].unsqueeze(0), hx[1].unsqueeze(0)
        h, c = lstm_cell(x.unsqueeze(0), hx, *weights)
        return h.squeeze(0), c.squeeze(0)

    def extra_repr(self) -> str:
        return super().extra_repr() + _repr_of(forget_bias=self.forget_bias)


class LSTM(torch.nn.RNNBase):
    """Layers and directions of an LSTM over whole sequences. :func:`.functional.lstm` has the formula.

    It has the arguments, defaults, ``state_dict`` keys and outputs of :class:`torch.nn.LSTM`. ``isinstance`` takes it
    for one, but it is no subclass of that, because ``torch.compile`` refuses every instance. Further arguments, off by
    default:

    Args:
        layer_norm: Ba et al. 2016 (arXiv:1607.06450): normalizes ``w_ih x``, ``w_hh h`` and the cell before its tanh.
            Parameters ``weight_ln_ih_l0``, ``bias_ln_ih_l0``, ``weight_ln_hh_l0``, ``bias_ln_hh_l0`` ``[4H]``,
            ``weight_ln_c_l0``, ``bias_ln_c_l0`` ``[H]``, and so on for each layer and direction.
        zoneout: Krueger et al. 2017 (arXiv:1606.01305): the rate at which units keep their value in a step; one rate
            for the cell and ``h``, or a pair ``(cell, h)``. Evaluation takes the expectation.
        recurrent_dropout: Gal & Ghahramani 2016 (arXiv:1512.05287): in training, the rate of dropout on ``h`` before
            ``w_hh``, with one mask for all steps.
        forget_bias: the initial value of the forget gates' biases. It goes into ``bias_ih``; ``bias_hh`` starts at 0.
            ``None`` initializes as torch does.

    Raises:
        ValueError: ``proj_size`` not below ``hidden_size``, a rate outside of 0..1, ``forget_bias`` with
            ``bias=False``; and what torch raises.
        TypeError: a rate that is not a number; and what torch raises.

    ``torch.export``, ``torch.onnx.export`` and ``torch.jit.trace`` record one ``aten.lstm`` as of torch's layer, for
    any number of steps and sequences, and with ``lengths`` one for each layer and direction. In strict mode and after
    ``run_decompositions`` the number of steps is fixed, as torch's layer has it. ``layer_norm``, ``zoneout`` and, in
    training, ``recurrent_dropout`` are recorded step by step, for the given number of steps; so is ``proj_size`` in
    ONNX. A ``PackedSequence`` can be traced, not exported: give ``lengths``.

    Under ``torch.ao.quantization`` it becomes torch's layer, and ``layer_norm`` and ``zoneout`` raise an error.
    """

    qconfig = Configuration(torch.nn.LSTM)
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        layer_norm: bool = False,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        name = "LSTM"
        for rate in zoneout if isinstance(zoneout, tuple | list) else (zoneout,):
            check_rate(name, "zoneout", rate)
        if isinstance(zoneout, tuple | list) and len(zoneout) != 2:
            raise ValueError(f"{name}: zoneout ({zoneout!r}) must be a rate or a pair of them")
        check_rate(name, "recurrent_dropout", recurrent_dropout)
        _check_forget_bias(name, forget_bias, bias)
        if (
            isinstance(proj_size, int)
            and isinstance(hidden_size, int)
            and 0 < hidden_size <= proj_size
        ):
            raise ValueError(
                f"{name}: proj_size ({proj_size}) must be smaller than hidden_size ({hidden_size})"
            )
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout
        self.forget_bias = forget_bias
        # False until the parameters exist, because RNNBase's constructor calls reset_parameters.
        self.layer_norm = False
        super().__init__(
            name, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype,
        )  # fmt: skip
        if layer_norm:
            self._add_layer_norms(device, dtype)
        self.layer_norm = layer_norm

    @property
    def __class__(self) -> Any:
        """What ``isinstance`` asks beside the type: ``torch.nn.LSTM``, but for the compiler.

        Code that reads this attribute by its name gets the type.
        """
        asker = sys._getframe(1)
        compiles = asker.f_globals.get("__name__", "").startswith("torch._dynamo")
        return type(self) if compiles or "__class__" in asker.f_code.co_names else torch.nn.LSTM

    @__class__.setter
    def __class__(self, kind: type) -> None:
        object.__dict__["__class__"].__set__(self, kind)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle refuses a __class__ that is not the type.
        return object.__new__, (type(self),), self.__getstate__()

    def _add_layer_norms(self, device: Any, dtype: torch.dtype | None) -> None:
        """Parameters for each layer and direction, after torch's own, in the order that functional.lstm takes."""
        sizes = {"ih": 4 * self.hidden_size, "hh": 4 * self.hidden_size, "c": self.hidden_size}
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for kind, size in sizes.items():
                for role, fill in (("weight", torch.ones), ("bias", torch.zeros)):
                    parameter = torch.nn.Parameter(fill(size, device=device, dtype=dtype))
                    names.append(f"{role}_ln_{kind}{suffix}")
                    self.register_parameter(names[-1], parameter)
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()  # RNNBase counts one reference for each name

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for names in self._all_weights:
            own = {name.rpartition("_l")[0]: getattr(self, name) for name in names}
            if self.layer_norm:
                for kind in ("ih", "hh", "c"):
                    torch.nn.init.ones_(own[f"weight_ln_{kind}"])
                    torch.nn.init.zeros_(own[f"bias_ln_{kind}"])
            if self.forget_bias is not None:
                _set_forget_bias(own["bias_ih"], own["bias_hh"], self.forget_bias)

    # RNNBase keeps a list of the parameters. It would be stale after they are replaced, parametrized or passed to a
    # call.
    @property
    def _flat_weights(self) -> list[Any]:
        own = self._parameters
        # A parametrized weight is not in the dict.
        return [
            own[name] if name in own else getattr(self, name, None)
            for name in self._flat_weights_names
        ]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Does nothing: no kernel needs the weights in one block of memory."""

    def forward(
        self, input: Any, hx: _States | None = None, lengths: Tensor | list[int] | None = None
    ) -> tuple[Any, _States]:
        """As :class:`torch.nn.LSTM`; with ``lengths`` also over padded sequences. Errors are those of :func:`.lstm`.

        Args:
            input: ``[T, B, I]``, with ``batch_first`` ``[B, T, I]``, unbatched ``[T, I]``, or a ``PackedSequence``.
            hx: ``(h_0, c_0)``, ``[num_layers * D, B, R]`` and ``[num_layers * D, B, H]``, unbatched without ``B``; with
                a ``PackedSequence`` in the order of its batch.
            lengths: of each sequence of a padded ``input``, see :func:`.lstm`.

        Returns:
            ``y, (h_n, c_n)``; ``y`` ``[T, B, D * R]`` in the form of ``input``.

        Raises:
            ValueError: ``input`` has neither two nor three dimensions, or outside of autocast another dtype than the
                weights; ``lengths`` together with a ``PackedSequence``.
        """
        if is_proxy(input):
            return recorded(self, input, hx=hx, lengths=lengths)
        x = input
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, hx, lengths)
        batched = not isinstance(x, Tensor) or x.dim() == 3
        if not batched:
            if x.dim() != 2:
                raise ValueError(
                    f"LSTM: x (shape {tuple(x.shape)}) must have 3 dimensions, or unbatched 2"
                )
            x = x.unsqueeze(0 if self.batch_first else 1)
            hx = self._batched_states(hx)
        weight = self._flat_weights[0]
        # torch raises a ValueError here too. For packed data, as in torch, the arithmetic raises the error.
        if (
            isinstance(x, Tensor)
            and x.dtype != weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        ):
            raise ValueError(
                f"LSTM: x (dtype {x.dtype}) must be of the dtype of the weights ({weight.dtype})"
            )
        y, states = self._run(x, hx, lengths=lengths)
        if batched:
            return y, states
        return y.squeeze(0 if self.batch_first else 1), (states[0].squeeze(1), states[1].squeeze(1))

    def _forward_packed(
        self, x: PackedSequence, hx: _States | None, lengths: Any
    ) -> tuple[PackedSequence, _States]:
        data, batch_sizes, to_sorted, to_unsorted = x
        if lengths is not None:
            raise ValueError("LSTM: lengths must not be given beside a PackedSequence")
        if to_sorted is not None and _is_pair(hx):
            for i, t in enumerate(hx):
                if t.dim() != 3 or t.shape[1] != to_sorted.shape[0]:
                    raise RuntimeError(
                        f"LSTM: hx[{i}] (shape {tuple(t.shape)}) must hold the states of {to_sorted.shape[0]} sequences"
                    )
            hx = hx[0].index_select(1, to_sorted), hx[1].index_select(1, to_sorted)
        y, (h_n, c_n) = self._run(data, hx, batch_sizes=batch_sizes)
        if to_unsorted is not None:
            h_n, c_n = h_n.index_select(1, to_unsorted), c_n.index_select(1, to_unsorted)
        return PackedSequence(y, batch_sizes, to_sorted, to_unsorted), (h_n, c_n)

    def _run(self, x: Tensor, hx: Any, **sequences: Any) -> tuple[Tensor, _States]:
        y, h_n, c_n = lstm(
            x,
            hx,
            self._flat_weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            layer_norm=self.layer_norm,
            zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout,
            **sequences,
        )
        return y, (h_n, c_n)

    @staticmethod
    def _batched_states(hx: Any) -> Any:
        if not _is_pair(hx):
            return hx
        for i, t in enumerate(hx):
            if t.dim() != 2:
                raise RuntimeError(
                    f"LSTM: hx[{i}] (shape {tuple(t.shape)}) must have 2 dimensions, as an unbatched x has"
                )
        return hx[0].unsqueeze(1), hx[1].unsqueeze(1)

    def extra_repr(self) -> str:
        own = _repr_of(
            layer_norm=self.layer_norm or None,
            zoneout=self.zoneout or None,
            recurrent_dropout=self.recurrent_dropout or None,
            forget_bias=self.forget_bias,
        )
        return super().extra_repr() + own


def _is_pair(hx: Any) -> TypeGuard[_States]:
    """Whether ``hx`` is a pair of tensors. :func:`.lstm` refuses anything else."""
    return isinstance(hx, tuple | list) and len(hx) == 2 and all(isinstance(t, Tensor) for t in hx)


def _repr_of(**options: Any) -> str:
    return "".join(f", {name}={value}" for name, value in options.items() if value is not None)


def _check_forget_bias(name: str, forget_bias: float | None, bias: bool) -> None:
    if forget_bias is not None and not bias:
        raise ValueError(f"{name}: forget_bias ({forget_bias}) must be None when bias is False")


def _set_forget_bias(b_ih: Tensor, b_hh: Tensor, value: float) -> None:
    """Sets the forget gate's part of both biases, which are added. It is the second of the four gates."""
    for bias, fill in ((b_ih, value), (b_hh, 0.0)):
        hidden = bias.shape[0] // 4
        with torch.no_grad():
            bias[hidden : 2 * hidden].fill_(fill)


def _check_cell_dims(name: str, tensors: Any) -> None:
    """Raises torch's own error type for a rank that is neither one nor two."""
    for i, t in enumerate(tensors if isinstance(tensors, tuple | list) else ()):
        if isinstance(t, Tensor) and t.dim() not in (1, 2):
            part = name if name == "x" else f"{name}[{i}]"
            raise ValueError(
                f"LSTMCell: {part} (shape {tuple(t.shape)}) must have 2 dimensions, or unbatched 1"
            )
