"""Whether a model may run in channels_last inside, where its convolutions are faster, and the call that does so."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ._trace import is_torchs, writes
from .functional.conv_bn_act import prefers_channels_last

# What shows, or depends on, how a tensor lies in memory.
_METHODS = {
    "as_strided", "data_ptr", "is_contiguous", "numpy", "resize_", "set_", "storage", "storage_offset",
    "stride", "untyped_storage", "view", "view_as",
}  # fmt: skip
_ATTRIBUTES = {"data", "layout", "H", "T", "mH", "mT"}
_PACKAGES = {"torch", "advdl_ops", "operator", "_operator", "builtins", "math"}
# Traced as one call, though none of torch's.
_FUNCTIONS = {"torchvision.ops.stochastic_depth"}


class Inside:
    """Judges ``model``.

    Args:
        known: ids of layers that are as indifferent to the memory format as torch's, and write none of their arguments.
        graphs: by id of a module those of its own forward.

    Attributes:
        why_not: why it may not run in channels_last where it is given contiguous memory; ``None``: it may.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        known: Collection[int],
        graphs: Mapping[int, Sequence[fx.Graph]],
    ) -> None:
        self.known = known
        self.graphs = graphs
        self.effects: dict[int, _Effects] = {}
        self.why_not: str | None = None
        for name, layer in model.named_modules():
            why = self._why_not(layer)
            if why is not None:
                self.why_not = f"{name}: {why}" if name else why
                return
        # It would write a copy.
        if self._effects_of(model).writes:
            self.why_not = "it may write what it is given"

    def _why_not(self, layer: torch.nn.Module) -> str | None:
        if layer._forward_hooks or layer._forward_pre_hooks:
            return "it has hooks"
        if id(layer) in self.known or is_torchs(layer):
            return None
        if id(layer) not in self.graphs:
            return "its forward has no graph"
        for graph in self.graphs[id(layer)]:
            either: set[fx.Node] = (
                set()
            )  # a view of what it was made of, or a copy, by the memory format
            for node in graph.nodes:
                if node.op == "call_method" and node.target in _METHODS:
                    return f"it calls {node.target}"
                if node.op == "call_function" and not _is_indifferent(node):
                    return f"it calls {getattr(node.target, '__name__', node.target)}"
                if self._writes(node, layer) and _written(node) in either:
                    return "it writes what may be a view or a copy"
                of_either = not either.isdisjoint(node.all_input_nodes)
                if node.target in _VIEW_OR_COPY or (of_either and node.target not in _NEW):
                    either.add(node)
        return None

    def _writes(self, node: fx.Node, layer: torch.nn.Module) -> bool:
        if node.op == "call_module":
            return self._effects_of(layer.get_submodule(str(node.target))).writes
        return writes(node, layer, self.known)

    def _effects_of(self, layer: torch.nn.Module) -> _Effects:
        key = id(layer)
        if key not in self.effects:
            self.effects[key] = _Effects(True, True)  # of a module within itself
            found = [self._effects_in(graph, layer) for graph in self.graphs.get(key, ())]
            if key in self.known:
                found = [_Effects(False, False)]
            elif not found:
                package = type(layer).__module__.rpartition(".")[2]
                new = is_torchs(layer) and package in _NEW_MODULES
                inplace = bool(getattr(layer, "inplace", False))
                found = [_Effects(inplace or not is_torchs(layer), inplace or not new)]
            self.effects[key] = _Effects(*(any(parts) for parts in zip(*found, strict=True)))
        return self.effects[key]

    def _effects_in(self, graph: fx.Graph, layer: torch.nn.Module) -> _Effects:
        given: set[fx.Node] = set()  # what may be an argument, under whatever name
        written = returned = False
        for node in graph.nodes:
            of_given = [source for source in node.all_input_nodes if source in given]
            if node.op == "placeholder":
                given.add(node)
            elif node.op == "output":
                returned = bool(of_given)
            elif node.op == "call_module":
                effects = self._effects_of(layer.get_submodule(str(node.target)))
                written |= bool(of_given) and effects.writes
                if of_given and effects.returns:
                    given.add(node)
            elif of_given:
                written |= self._writes(node, layer) and _written(node) in of_given
                if node.target not in _NEW:
                    given.add(node)
        return _Effects(written, returned)


class _Effects(NamedTuple):
    writes: bool  # whether the forward may write an argument
    returns: bool  # whether what it returns may be an argument, or a view of one


def _written(node: fx.Node) -> fx.Node | None:
    target = node.kwargs.get("out", node.args[0] if node.args else None)
    return target if isinstance(target, fx.Node) else None


_VIEW_OR_COPY = {
    torch.flatten, torch.reshape, torch.ravel, "flatten", "reshape", "reshape_as", "ravel", "contiguous",
}  # fmt: skip
# Whose result is memory of its own.
_NEW = {
    operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.cat,
    torch.relu, torch.sigmoid, "add", "sub", "mul", "div", "relu", "sigmoid", "mean", "sum",
}  # fmt: skip
_NEW_MODULES = {
    "activation", "batchnorm", "conv", "linear", "normalization", "pooling", "upsampling",
}  # fmt: skip


def _is_indifferent(node: fx.Node) -> bool:
    function: Any = node.target
    if function is builtins.getattr:
        return node.args[1] not in _ATTRIBUTES
    if isinstance(function, type):
        return issubclass(function, tuple)
    module = getattr(function, "__module__", None) or "torch"
    known = module.partition(".")[0] in _PACKAGES or module in _FUNCTIONS
    return known and getattr(function, "__name__", "") not in _METHODS


def in_fast_format(
    model: torch.nn.Module, call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """``call(model, ...)`` with images in channels_last where that is faster; what it returns is contiguous then."""
    if model.training:
        return call(model, *args, **kwargs)
    # The first parameter stands for all: most often either all of them want gradients or none.
    parameter = next(model.parameters(), None)
    given: dict[int, Tensor] = {}  # by the id of what stands for it

    def convert(value: Any) -> Any:
        if not _is_contiguous_image(value) or not prefers_channels_last(value, parameter):
            return value
        converted = value.contiguous(memory_format=torch.channels_last)
        given[id(converted)] = value
        return converted

    args = [convert(value) for value in args]
    kwargs = {name: convert(value) for name, value in kwargs.items()}
    out = call(model, *args, **kwargs)
    if not given:
        return out

    def restore(value: Tensor) -> Tensor:
        return given[id(value)] if id(value) in given else value.contiguous()

    return pytree.tree_map_only(Tensor, restore, out)


def _is_contiguous_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_contiguous()
