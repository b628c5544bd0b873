"""Whether a model may run in channels_last inside, where its convolutions are faster, and the call that does so."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ._code import is_function, why_layout_may_matter
from ._effects import NEW_RESULTS, Effects, written_by
from ._fuse import has_hooks
from ._stock_faults import layer_may_fail
from ._trace import is_torchs
from .functional._norm import needs_grad
from .functional.conv_bn_act import in_channels_last, prefers_channels_last

# What shows, or depends on, how a tensor lies in memory.
_METHODS = {
    "as_strided", "data_ptr", "is_contiguous", "numpy", "resize_", "set_", "storage", "storage_offset",
    "stride", "untyped_storage", "view", "view_as", "view_as_complex",
}  # fmt: skip
_ATTRIBUTES = {"data", "layout", "H", "T", "mH", "mT"}
_PACKAGES = {"torch", "advdl_ops", "operator", "_operator", "builtins", "math"}
# Traced as one call, though none of torch's.
_FUNCTIONS = {"torchvision.ops.stochastic_depth"}

# Of torch's, what draws a random number for each element, in the order in which they lie.
_RANDOM_LAYERS = torch.nn.Dropout, torch.nn.AlphaDropout, torch.nn.RReLU
_RANDOM = {"alpha_dropout", "dropout", "feature_alpha_dropout", "gumbel_softmax", "rrelu"}


def _is_random(name: str) -> bool:
    """Whether torch's function or method of this name draws random numbers, of elements or not."""
    if name in _RANDOM:
        return True
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    )


def why_not_inside(
    model: torch.nn.Module,
    known: Collection[int],
    graphs: Mapping[int, Sequence[fx.Graph]],
    effects: Effects,
) -> str | None:
    """Why ``model`` may not run in channels_last where it is given contiguous memory; ``None``: it may.

    Args:
        known: ids of layers that are as indifferent to the memory format as torch's.
        graphs: by id of a module those of its own forward.
        effects: of its modules.
    """
    for name, layer in model.named_modules():
        why = None
        if has_hooks(layer):
            why = "it has hooks"
        elif id(layer) not in known and layer_may_fail(layer):
            why = "torch computes the gradient of its weight wrongly in channels_last"
        elif id(layer) not in known and (id(layer) in graphs or not _is_plainly_torchs(layer)):
            why = _why_not(layer, graphs, effects)
        if why is not None:
            return f"{name}: {why}" if name else why
    # It would write a copy.
    return "it may write what it is given" if effects.of(model).writes else None


def _is_plainly_torchs(layer: torch.nn.Module) -> bool:
    """Whether its forward, and what that may call of the layer, is one of torch's."""
    if not is_torchs(layer):
        return False
    own = itertools.takewhile(
        lambda kind: not kind.__module__.startswith("torch."), type(layer).__mro__
    )
    known = {"__init__", "extra_repr", "reset_parameters"}
    return all(not callable(v) or name in known for kind in own for name, v in vars(kind).items())


def _why_not(
    layer: torch.nn.Module, all_graphs: Mapping[int, Sequence[fx.Graph]], effects: Effects
) -> str | None:
    graphs = all_graphs.get(id(layer))
    if graphs is None:
        why = why_layout_may_matter(layer, lambda name: name in _SHOWING or _is_random(name))
        return why if why is None else f"its forward has no graph, and {why}"
    for graph in graphs:
        either: set[fx.Node] = (
            set()
        )  # a view of what it was made of, or a copy, by the memory format
        for node in graph.nodes:
            if node.op == "call_method" and node.target in _METHODS:
                return f"it calls {node.target}"
            if node.op == "call_function" and not _is_indifferent(node):
                return f"it calls {getattr(node.target, '__name__', node.target)}"
            if _strides(node) and not isinstance(layer, _CONVOLUTIONS):
                return "it calls a convolution with a stride, of which torch computes some wrongly in channels_last"
            if any(isinstance(a, torch.memory_format) for a in (*node.args, *node.kwargs.values())):
                return "it names a memory format"
            if effects.writes(node, layer) and written_by(node) in either:
                return "it writes what may be a view or a copy"
            of_either = not either.isdisjoint(node.all_input_nodes)
            made = _makes_either(node, layer, all_graphs) and not _takes_over(node, layer, effects)
            if made or (of_either and node.target not in NEW_RESULTS):
                either.add(node)
    return None


# Layers that are judged by what they are, not by what their forward calls.
_CONVOLUTIONS = torch.nn.Conv2d, torch.nn.ConvTranspose2d
# Functions, and the place of their stride among their arguments.
_CONVOLVES: dict[Any, int] = {torch.conv2d: 3, torch.conv_transpose2d: 3}


def _strides(node: fx.Node) -> bool:
    """Whether it calls one of torch's convolutions with a stride, or with one that only the call knows."""
    place = _CONVOLVES.get(node.target)
    if node.op != "call_function" or place is None:
        return False
    stride = node.kwargs.get("stride", node.args[place] if len(node.args) > place else 1)
    return stride not in (1, (1,), (1, 1), [1], [1, 1])


def _takes_over(node: fx.Node, owner: torch.nn.Module, effects: Effects) -> bool:
    """Whether what it is made of is memory of its own that nothing else reads, so that it may well be a view."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if len(source.users) != 1:
        return False
    if source.op == "call_module":
        return not effects.of(owner.get_submodule(str(source.target))).returns
    return source.target in NEW_RESULTS


def _makes_either(
    node: fx.Node, owner: torch.nn.Module, graphs: Mapping[int, Sequence[fx.Graph]]
) -> bool:
    """Whether it gives a view or a copy, by the memory format."""
    if node.op != "call_module":
        return node.target in _VIEW_OR_COPY
    return any(
        isinstance(layer, (torch.nn.Flatten, torch.nn.Unflatten))
        or any(n.target in _VIEW_OR_COPY for g in graphs.get(id(layer), ()) for n in g.nodes)
        for layer in owner.get_submodule(str(node.target)).modules()
    )


_VIEW_OR_COPY = {
    torch.flatten, torch.reshape, torch.ravel, "flatten", "reshape", "reshape_as", "ravel", "contiguous",
}  # fmt: skip


# Names in code that has no graph.
_SHOWING = (
    _METHODS
    | _ATTRIBUTES
    | {v for v in _VIEW_OR_COPY if isinstance(v, str)}
    | {"channels_last", "contiguous_format", "memory_format", "preserve_format"}
)


def _is_indifferent(node: fx.Node) -> bool:
    function: Any = node.target
    if function is builtins.getattr:
        return node.args[1] not in _ATTRIBUTES
    if isinstance(function, type):
        return issubclass(function, (tuple, dict))
    module = getattr(function, "__module__", None) or "torch"
    if module in _FUNCTIONS:
        return True
    return (
        module.partition(".")[0] in _PACKAGES
        and is_function(function)
        and getattr(function, "__name__", "") not in _METHODS
    )


def draws(graphs: Iterable[fx.Graph]) -> bool:
    """Whether a forward draws random numbers, which in another memory format would fall on other elements."""
    return any(
        node.op in ("call_function", "call_method")
        and _is_random(getattr(node.target, "__name__", node.target))
        # Dropout that is told not to.
        and not ("dropout" in str(node.target) and _training(node) is False)
        for graph in graphs
        for node in graph.nodes
    )


def _training(node: fx.Node) -> Any:
    return node.kwargs.get("training", node.args[2] if len(node.args) > 2 else None)


def _layers_draw(model: torch.nn.Module) -> bool:
    """The same of its layers, now."""
    return any(
        isinstance(layer, _RANDOM_LAYERS) and layer.training and getattr(layer, "p", 1) > 0
        for layer in model.modules()
    )


def in_fast_format(
    model: torch.nn.Module, call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """``call(model, ...)`` with images in channels_last where that is faster; what it returns is contiguous then."""
    # The first parameter stands for all: most often either all of them want gradients or none.
    parameter = next(model.parameters(), None)
    given: dict[int, Tensor] = {}  # by the id of what stands for it

    def convert(value: Any) -> Any:
        if not _is_contiguous_image(value):
            return value
        trains = model.training or needs_grad(value, parameter)
        if not prefers_channels_last(value, trains) or _layers_draw(model):
            return value
        converted = in_channels_last(value)
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


def evaluated_in_fast_format(
    model: torch.nn.Module, call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """The same in evaluation alone."""
    if model.training:
        return call(model, *args, **kwargs)
    return in_fast_format(model, call, args, kwargs)


def _is_contiguous_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_contiguous()
