"""``explain``: which implementation serves each layer of a model and why, and what ``optimize`` did to it.

The texts come from `served.py` (what serves a layer on the CPU) and `record.py` (what ``optimize`` did).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _library, nn, tuning
from .._conv import choice
from .._conv.choice import APART, WINOGRAD
from .._conv.problem import FOLDED, WITH_NORM, Problem
from .._conv.winograd import packed_numel, tile_of
from .._watch import formats_unwatched
from ..backend import get_backend
from ..nn.group_norm import _InstanceNorm
from ..nn.run_as_one import run_as_one
from . import served as _served
from .copies import copy_without_hooks
from .record import notes, record_of, summary

__all__ = ["Explanation", "Layer", "explain"]

_NORMS = (nn.BatchNormAct2d, nn.GroupNorm, nn.LayerNorm2d, _InstanceNorm)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_RECURRENT = (nn.LSTM, nn.LSTMCell)
_OURS = (*_NORMS, *_CONVOLUTIONS, *_RECURRENT, nn.ConvBNAct)
_NOT_MEASURED = "not measured yet: run a forward"


@dataclass(frozen=True)
class Chosen:
    """What serves one direction of a convolution, and why.

    Attributes:
        problem: the direction, shapes and options, see ``_conv/problem.py``.
        name: name of the candidate that serves.
        why: the rule that decided, and the record that the rule came from; empty if the choice was measured.
        others: the names of the candidates that could serve as well, in order.
        seconds: the median time of each candidate, if measured.
        failed: the errors of the candidates that did not run.
    """

    problem: Problem
    name: str
    why: str
    others: tuple[str, ...]
    seconds: dict[str, float]
    failed: dict[str, str]

    def __str__(self) -> str:
        p = self.problem
        dtype = str(p.dtype).removeprefix("torch.")
        of = f"{p.direction} of {'x'.join(map(str, p.x))} {dtype} {p.layout}, epilogue {p.epilogue}"
        reasons = [self.why] if self.why else []
        reasons += [
            f"{name} {seconds * 1e6:.1f} us"
            for name, seconds in sorted(self.seconds.items(), key=lambda item: item[1])
        ]
        reasons += [f"{name} failed ({why})" for name, why in self.failed.items()]
        if not self.seconds and self.others:
            reasons.append(f"also accepted by {', '.join(self.others)}")
        return f"{of}: {self.name}{self._tiles()} ({'; '.join(reasons) or 'not timed'})"

    def _tiles(self) -> str:
        """For Winograd its tile, and the size of the weight that is kept."""
        if self.name != WINOGRAD:
            return ""
        tile = tile_of(self.problem)
        assert tile is not None
        if self.problem.direction != FOLDED:
            return f", tiles of {tile}"
        of = self.problem
        kept = 4 * packed_numel(tile, of.weight, of.groups) / (of.dtype.itemsize * of.weight_numel)
        return f", tiles of {tile}, which keeps {kept:.1f} times the weight"


def _chosen(problem: Problem) -> Chosen:
    """What serves ``problem`` on CPU."""
    device = torch.device("cpu")
    names = [candidate.name for candidate in choice.candidates(problem, device)]
    candidate, measured = choice.expected(problem), tuning.find(problem, names, device)
    others = tuple(name for name in names if name != candidate.name)
    if measured is not None:
        return Chosen(problem, candidate.name, "", others, measured.seconds, measured.failed)
    return Chosen(problem, candidate.name, choice.reason(candidate), others, {}, {})


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: in the model, as from ``named_modules``.
        kind: its class.
        served_by: the implementation; for the reference with the reason.
        choices: what serves each direction of a convolution, and why; on CPU for the given inputs.
    """

    name: str
    kind: str
    served_by: str
    choices: tuple[Chosen, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name or '(the module itself)'}  {self.kind}: {self.served_by}"]
        return "\n".join([*lines, *(f"    {chosen}" for chosen in self.choices)])


@dataclass(frozen=True)
class Explanation:
    """A row for each layer of advdl_ops in a model. Its text is a tree of these and of what :func:`.optimize` did.

    Attributes:
        layers: the rows.
        notes: what :func:`.optimize` did to each module, or why it did nothing, by name.
        kinds: the class of each module, by name, parents first.
    """

    layers: tuple[Layer, ...]
    notes: dict[str, list[str]]
    kinds: dict[str, str]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        rows = {row.name: row for row in self.layers}
        told = {name for name in self.kinds if name in rows or self.notes.get(name)}
        if not told:
            return "no layer of advdl_ops"
        shown = told | {parent for name in told for parent in _parents(name)}
        lines = []
        for name, kind in self.kinds.items():
            if name not in shown:
                continue
            indent = "  " * len(_parents(name))
            label = name.rpartition(".")[2]
            served = f": {rows[name].served_by}" if name in rows else ""
            lines.append(f"{indent}{label}{'  ' if label else ''}{kind}{served}")
            further = [*self.notes.get(name, ()), *(rows[name].choices if name in rows else ())]
            lines += [f"{indent}    {text}" for text in further]
        return "\n".join(lines)


def _parents(name: str) -> list[str]:
    """Names of the modules that contain this one, the outermost one ("") first."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts))]


def explain(
    module: torch.nn.Module, *inputs: Any, as_dict: bool = False
) -> Explanation | dict[str, Any]:
    """What serves each layer of advdl_ops in ``module``: a kernel, torch's own, or the reference, with the reason.

    Args:
        module: any module. Layers that are not from ``advdl_ops.nn`` are left out.
        inputs: if given, a copy of ``module`` first runs on them, without gradients, so that the choices for their
            shapes are known. ``module`` and the state of the random number generators do not change.
        as_dict: return what :func:`.optimize` did, instead of the rows: ``{"fused": groups that run as one op,
            "replaced": layers that were replaced alone, "left": layers of a known kind that were left, and why}``.

    Returns:
        Rows, printable. Choices are those that this process made for a layer's weight and options, in any module.

    Raises:
        TypeError: ``module`` is not a module.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"explain: module ({type(module).__name__}) must be a torch.nn.Module")
    if as_dict:
        return summary(module)
    default = _device(module) or next(
        (t.device for t in inputs if isinstance(t, Tensor)), torch.device("cpu")
    )
    told, met = _run(module, inputs, default) if inputs else ({}, {})
    layers = (
        _layer(name, layer, _device(layer) or default, told.get(name), met.get(name, ()))
        for name, layer in module.named_modules()
    )
    done = notes(module)
    for owner, at, conv, bn in _fused_pairs(module):
        if _device(conv) == torch.device("cpu") and _why_reference(torch.device("cpu")) is None:
            done[owner][at] += f" ({told.get((owner, at)) or _served.of_pair_in_general(conv, bn)})"
    return Explanation(
        tuple(layer for layer in layers if layer is not None),
        done,
        {name: type(layer).__name__ for name, layer in module.named_modules()},
    )


def _fused_pairs(
    module: torch.nn.Module,
) -> Iterator[tuple[str, int, nn.Conv2d, nn.BatchNormAct2d]]:
    """Each convolution and norm that :func:`.optimize` fused, with their owner's name and the index in its notes."""
    for name, owner in module.named_modules():
        record = record_of(owner)
        for at, names in enumerate(() if record is None else record.fused):
            conv, bn = _child(owner, names[0]), _child(owner, names[1])
            if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNormAct2d):
                yield name, at, conv, bn


def _child(owner: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The submodule of this name; ``None`` for the name of an addition or an activation."""
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None


def _run(
    module: torch.nn.Module, inputs: tuple[Any, ...], default: torch.device
) -> tuple[dict[Any, str], dict[str, dict[Problem, None]]]:
    """Runs a copy of the module without gradients.

    Returns:
        What served each layer on the CPU, by its name, or for a pair that ``optimize`` fused, by the name of its owner
        and its index in the owner's notes. And the problems of each layer's convolutions, by the layer's name.
    """
    found: dict[Any, dict[str, None]] = {}
    met: dict[str, dict[Problem, None]] = {}
    ran = copy_without_hooks(module)
    copies = dict(ran.named_modules())
    originals = {id(copies[name]): (name, layer) for name, layer in module.named_modules()}

    # The hooks on the copy prevent fusing there, so each text is about the original layers.
    def tell(key: Any, of: Callable[..., _served.Told], name: str) -> None:
        def hook(on: torch.nn.Module, args: Any, kwargs: Any) -> None:
            text, problems = of(*args, **kwargs)
            if key == name:
                met.setdefault(name, {}).update(dict.fromkeys(problems))
            norm, residual, act = _joined_norm(on)
            if text is not None and key == name and norm is not None and args:
                behind, bn = originals[id(norm)]
                pair = _served.of_pair(originals[id(on)][1], bn, args[0], residual, act).text
                text += "" if pair == _served.TWO_LAYERS else f"; with {behind} {pair}"
            if text is not None:
                found.setdefault(key, {})[text] = None

        copies[name].register_forward_pre_hook(hook, with_kwargs=True)

    if not any(_is_compiled(layer) for layer in copies.values()):
        for name, layer in originals.values():
            device = _device(layer) or default
            if isinstance(layer, _OURS) and device.type == "cpu" and not _why_reference(device):
                tell(name, functools.partial(_served.of_call, layer), name)
        names = {id(layer): name for name, layer in originals.values()}
        for owner, at, conv, bn in _fused_pairs(module):
            if _device(conv) == torch.device("cpu"):
                tell((owner, at), functools.partial(_served.of_pair, conv, bn), names[id(conv)])
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices), torch.no_grad(), formats_unwatched():
        ran(*inputs)
    return {key: "; in another call ".join(texts) for key, texts in found.items()}, met


def _joined_norm(conv: torch.nn.Module) -> tuple[torch.nn.Module | None, Tensor | None, Any]:
    """Norm, residual and activation of the call of a model's own code that joins this layer with them, or ``None``.

    Without the hook of :func:`_run` it might not have called the layer. A ``ConvBNAct``, and a pair that ``optimize``
    fused, have a row of their own.
    """
    record = record_of(conv)
    if record is not None and record.part:
        return None, None, None
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is nn.ConvBNAct.forward.__code__:
            break
        found = frame.f_locals
        if frame.f_code is nn.conv_bn_act.__code__ and found["conv"] is conv:
            pair = conv, found["bn"]
        elif frame.f_code is run_as_one.__code__ and found["layers"][0] is conv:
            pair = found["layers"]
        else:
            continue
        if len(pair) == 2 and isinstance(pair[1], nn.BatchNormAct2d):
            outer = frame.f_back
            if outer is None or outer.f_code is not nn.ConvBNAct.forward.__code__:
                return pair[1], found["residual"], found["act"]
    return None, None, None


def _is_compiled(layer: torch.nn.Module) -> bool:
    """Whether a compiler runs the layer. It would trace the hooks of :func:`_run` too."""
    return "_orig_mod" in layer._modules or layer._compiled_call_impl is not None


def _device(module: torch.nn.Module) -> torch.device | None:
    for tensors in (module.parameters(), module.buffers()):
        for t in tensors:
            return t.device
    return None


def _layer(
    name: str,
    layer: torch.nn.Module,
    device: torch.device,
    told: str | None = None,
    met: Iterable[Problem] = (),
) -> Layer | None:
    """The row of a layer; ``None`` if it is not from advdl_ops.

    Args:
        told: what served it on the CPU, if there was a run.
        met: the problems of its convolutions, if there was a run.
    """
    kind = type(layer).__name__
    if not isinstance(layer, _OURS):
        return None
    reference = _why_reference(device)
    if reference is not None:
        served = f"the reference, in plain PyTorch: {reference}"
        if isinstance(layer, nn.ConvBNAct) and device.type == "cpu":
            # A folded pair needs none of the kernels.
            pair = _served.of_pair_in_general(layer.conv, layer.bn)
            served = served if pair == _served.TWO_LAYERS else f"{pair}; of those {served}"
        return Layer(name, kind, served)
    if device.type == "meta":
        return Layer(name, kind, "nothing: it has no data")
    if device.type == "cpu":
        chosen = tuple(_chosen(problem) for problem in met)
        return Layer(name, kind, told or _served.of_layer(layer), chosen)
    if isinstance(layer, nn.ConvBNAct):
        joined = tuple(
            c for c in _choices_of(layer.conv, device) if c.problem.direction == WITH_NORM
        )
        names = sorted({c.name for c in joined})
        training = _names(names, joined) if joined else _served.TWO_LAYERS
        evaluation = " " + _served.TWO_LAYERS
        if _served.folds_any(layer.conv, layer.bn):
            evaluation = " without gradients one operator, the norm in the convolution's epilogue"
        return Layer(name, kind, f"in training {training}; in evaluation{evaluation}", joined)
    if isinstance(layer, _RECURRENT):
        return Layer(name, kind, "CUDA C++ kernels, matrix products by torch's own")
    if not isinstance(layer, _CONVOLUTIONS):
        return Layer(name, kind, "CUDA C++ kernel")
    return _measured_layer(name, layer, device)


def _measured_layer(name: str, layer: Any, device: torch.device) -> Layer:
    kind = type(layer).__name__
    if layer.weight.dtype == torch.float64:
        return Layer(name, kind, "cuDNN or torch's own (fp64)")
    if isinstance(layer, nn.ConvTranspose2d) and not _served.is_gradient(layer):
        return Layer(name, kind, "cuDNN or torch's own")
    choices = _choices_of(layer, device)
    if not choices:
        return Layer(name, kind, _NOT_MEASURED)
    # APART: the layer runs apart from its norm, and the choice for the layer alone serves.
    served = sorted({c.name for c in choices} - {APART})
    return Layer(name, kind, _names(served, choices) if served else _NOT_MEASURED, choices)


def _names(names: list[str], choices: tuple[Chosen, ...]) -> str:
    measured = any(c.seconds for c in choices)
    return ", ".join(names) + (", by measurement" if measured else ", nothing was measured")


def _choices_of(layer: Any, device: torch.device) -> tuple[Chosen, ...]:
    return tuple(
        Chosen(key, found.name, "", (), found.seconds, found.failed)
        for on, key, found in tuning.known()
        if on == device and _is_of(key, layer)
    )


def _is_of(key: Any, layer: Any) -> bool:
    """Whether ``key`` fits a layer's weight and options. The padding is not compared, as it may be given by name."""
    dtypes = {layer.weight.dtype}
    if layer.weight.dtype == torch.float32:
        dtypes |= {torch.bfloat16, torch.float16}  # under autocast
    # A transposed convolution is the gradient of the convolution from its output to its input.
    transposed = isinstance(layer, torch.nn.ConvTranspose2d)
    return (
        getattr(key, "weight", None) == tuple(layer.weight.shape)
        and key.x[1] == (layer.out_channels if transposed else layer.in_channels)
        and key.dtype in dtypes
        and (key.stride, key.dilation) == (layer.stride, layer.dilation)
        and key.groups == layer.groups
    )


def _why_reference(device: torch.device) -> str | None:
    if get_backend() == "reference":
        return "it was asked for, by use_backend or ADVDL_OPS_BACKEND"
    if device.type == "meta":
        return None
    if not _library.native(device.type):
        unknown = f"no kernels exist for device type {device.type!r}"
        return _library.status().get(device.type, unknown)
    return _library.unsupported_gpu(device.index or 0) if device.type == "cuda" else None
