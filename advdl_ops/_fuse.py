"""Layers that a module's own forward calls one after another, and the forward that runs them as one op."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import nn
from ._effects import NEW_RESULTS, Effects
from ._schemas import conv2d_shape
from ._trace import Variant, is_torchs
from .activation import ACTIVATIONS, IDENTITY, Activation, resolve_activation
from .functional.conv_bn_act import result_dtype
from .reference.activation import activate

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
NORMS = (
    nn.BatchNormAct2d,
    nn.GroupNorm,
    nn.LayerNorm2d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_ADDITIONS_IN_PLACE = {operator.iadd, "add_"}
_ADDITIONS = {operator.add, torch.add, "add", *_ADDITIONS_IN_PLACE}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, "sigmoid"}
# Functions and methods that are an activation without arguments of their own.
_ACTIVATIONS: dict[Any, str] = {
    torch.relu: "relu", torch.relu_: "relu", F.relu: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.hardswish: "hardswish", F.relu6: "relu6", torch.tanh: "tanh", "tanh": "tanh",
    **dict.fromkeys(_SIGMOIDS, "sigmoid"),
}  # fmt: skip


class Group(NamedTuple):
    """Layers that run as one op: convolution, norm or both, then an addition and an activation, if they follow.

    Attributes:
        layers: convolution, norm, or both.
        names: of the layers, and of what else is fused.
        nodes: of the graph, first to last.
        residual: the node that is added, or ``None``.
        in_place: whether it is added in place, which keeps the dtype.
        act: the name of the activation, or the node of its module; ``None`` if none follows.
    """

    layers: list[torch.nn.Module]
    names: list[str]
    nodes: list[fx.Node]
    residual: fx.Node | None
    in_place: bool
    act: str | fx.Node | None


class Fusion(NamedTuple):
    """A module whose forward is made anew.

    Attributes:
        owner: the module.
        groups: what it runs as one op each.
        variants: of its forward, with the groups in place.
    """

    owner: torch.nn.Module
    groups: list[Group]
    variants: list[Variant]


class Parts(NamedTuple):
    """What may take part.

    Attributes:
        layers: by id the class that a convolution or norm becomes, and the name of its own activation, if any.
        activations: ids of modules that are an activation.
        known: ids of all layers that are converted.
        effects: of the model's modules.
    """

    layers: dict[int, tuple[type[torch.nn.Module], str | None]]
    activations: set[int]
    known: Collection[int]
    effects: Effects


def plan_fusions(
    model: torch.nn.Module, parts: Parts, graphs: dict[int, list[Variant]]
) -> list[Fusion]:
    """What can be fused in ``model``; the graphs, by id of their modules, are written anew, ``model`` is not."""
    found = (
        _plan(owner, graphs[id(owner)], parts)
        for owner in model.modules()
        if id(owner) in graphs and has_parts(owner, parts)
    )
    return [fusion for fusion in found if fusion is not None]


def has_parts(owner: torch.nn.Module, parts: Parts) -> bool:
    children = list(owner.children())
    return len(children) > 1 and any(id(child) in parts.layers for child in children)


def _plan(owner: torch.nn.Module, variants: list[Variant], parts: Parts) -> Fusion | None:
    found: dict[tuple[str, ...], Group] = {}
    changed = []
    for variant in variants:
        groups = _Search(variant.graph, owner, parts).groups()
        made: dict[fx.Node, fx.Node] = {}
        for group in groups:
            _rewrite(variant.graph, group, made)
            found.setdefault(tuple(group.names), group)
        if groups:
            variant.graph.lint()
            changed.append(variant)
    if not changed:
        return None
    return Fusion(owner, list(found.values()), changed)


class _Search:
    """Looks for groups in a graph of ``owner``'s forward."""

    def __init__(self, graph: fx.Graph, owner: torch.nn.Module, parts: Parts) -> None:
        _join_silu(graph, owner, parts.effects)
        self.nodes = list(graph.nodes)
        self.owner = owner
        self.activations = parts.activations
        self.known = parts.known
        self.effects = parts.effects
        calls = {n: owner.get_submodule(str(n.target)) for n in self.nodes if n.op == "call_module"}
        times = Counter(id(layer) for layer in calls.values())
        self.modules = calls
        self.taken: set[fx.Node] = set()  # by groups that were found
        self.layers = {
            node: (layer, *parts.layers[id(layer)])
            for node, layer in calls.items()
            if id(layer) in parts.layers and times[id(layer)] == 1 and _one_argument(node)
        }

    def groups(self) -> list[Group]:
        groups: list[Group] = []
        for node in self.layers:
            if node not in self.taken:
                group = self.group(node)
                if len(group.nodes) > 1:
                    groups.append(group)
                    self.taken.update(group.nodes)
        return groups

    def group(self, node: fx.Node) -> Group:
        """The longest group that begins with ``node``."""
        layer, kind, own_act = self.layers[node]
        nodes, members, names = [node], [layer], [str(node.target)]
        residual, in_place, act = None, False, None
        following = self.next_of(nodes)
        if following is not None and issubclass(kind, nn.Conv2d) and following in self.layers:
            norm, norm_kind, norm_act = self.layers[following]
            if issubclass(norm_kind, nn.BatchNormAct2d):
                nodes.append(following)
                members.append(norm)
                names.append(str(following.target))
                own_act = norm_act
                following = self.next_of(nodes)
        if own_act is not None:
            return Group(members, [*names, own_act], nodes, None, False, None)
        if following is not None and not issubclass(kind, nn.ConvTranspose2d):
            residual = self.added(following, nodes[-1])
            if residual is not None:
                nodes.append(following)
                names.append("add")
                in_place = following.target in _ADDITIONS_IN_PLACE
                following = self.next_of(nodes)
        if following is not None:
            act = self.activation(following, nodes[-1])
            if act is not None:
                nodes.append(following)
                names.append(act if isinstance(act, str) else str(following.target))
        return Group(members, names, nodes, residual, in_place, act)

    def added(self, node: fx.Node, term: fx.Node) -> fx.Node | None:
        """What ``node`` adds to ``term``, where it does nothing else."""
        if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        other = right if left is term else left
        if not isinstance(other, fx.Node) or other is term:
            return None
        if node.target in _ADDITIONS_IN_PLACE and left is other:
            # It may be an input, a buffer, or a view of either, and then has to be written.
            return other if self.is_read_here_alone(other) else None
        return other

    def is_read_here_alone(self, node: fx.Node) -> bool:
        """Whether the node's result is memory of its own, which nothing reads but its one user."""
        if len(node.users) != 1:
            return False
        layer = self.modules.get(node)
        if node.target in NEW_RESULTS or id(layer) in self.known:
            return True
        source = node.args[0] if node.args else None
        # As nn.Identity, which hands it on.
        handed_on = layer is not None and is_torchs(layer)
        return handed_on and isinstance(source, fx.Node) and self.is_read_here_alone(source)

    def activation(self, node: fx.Node, of: fx.Node) -> str | fx.Node | None:
        """What ``node`` applies to ``of``: the name of an activation, or the node itself, of a module."""
        if not node.args or node.args[0] is not of:
            return None
        if node.op == "call_module":
            known = id(self.modules[node]) in self.activations
            return node if known and _one_argument(node) else None
        if node.op not in ("call_function", "call_method"):
            return None
        plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
        return _ACTIVATIONS.get(node.target) if plain else None

    def next_of(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The only reader of the last node, if the first one might as well be run where that stands.

        What is written in between might be what the first one reads, by another name too; what is read, a norm's
        statistics.
        """
        if len(nodes[-1].users) != 1:
            return None
        following = next(iter(nodes[-1].users))
        if following in self.taken:
            return None
        between = self.nodes[self.nodes.index(nodes[0]) + 1 : self.nodes.index(following)]
        others = [node for node in between if node not in nodes]
        if any(self.effects.writes(node, self.owner) or _is_of(node, nodes) for node in others):
            return None
        return following


def _is_of(node: fx.Node, layers: list[fx.Node]) -> bool:
    """Whether the node is a parameter or buffer of one of the layers."""
    own = tuple(f"{layer.target}." for layer in layers if layer.op == "call_module")
    return node.op == "get_attr" and str(node.target).startswith(own)


def _join_silu(graph: fx.Graph, owner: torch.nn.Module, effects: Effects) -> None:
    """``x * sigmoid(x)`` as ``silu(x)``, in values the same but for rounding."""
    for node in list(graph.nodes):
        gate = next((n for n in node.all_input_nodes if _is_sigmoid(n)), None)
        if gate is None or node.target not in _PRODUCTS or len(gate.users) != 1:
            continue
        x = gate.args[0]
        if node.kwargs or set(node.args) != {x, gate}:
            continue
        between = list(graph.nodes)
        between = between[between.index(x) + 1 : between.index(node)]
        in_place = effects.writes(node, owner)
        if any(effects.writes(n, owner) for n in between) or (in_place and x is not node.args[0]):
            continue
        with graph.inserting_before(node):
            made = graph.call_function(F.silu, (x,), {"inplace": True} if in_place else {})
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        graph.erase_node(gate)


def _is_sigmoid(node: fx.Node) -> bool:
    """Of a function; a module's forward, hooks and successor are its own."""
    return (
        _one_argument(node)
        and node.op in ("call_function", "call_method")
        and node.target in _SIGMOIDS
    )


def _one_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _rewrite(graph: fx.Graph, group: Group, made: dict[fx.Node, fx.Node]) -> None:
    """Puts one call in the place of the group; ``made``: such calls by the last node that each stands for."""
    first, last = group.nodes[0], group.nodes[-1]
    given: list[Any] = [first.args[0], group.residual]
    x, residual = (made.get(node, node) for node in given)
    with graph.inserting_before(last), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [graph.get_attr(str(node.target)) for node in group.nodes[: len(group.layers)]]
        act = group.act
        if isinstance(act, fx.Node):
            act = graph.get_attr(str(act.target))
        call = graph.call_function(run_as_one, (x, residual, group.in_place, act, *modules))
    made[last] = call
    last.replace_all_uses_with(call)
    for node in reversed(group.nodes):
        graph.erase_node(node)


def run_as_one(
    x: Tensor,
    residual: Tensor | None,
    in_place: bool,
    act: str | torch.nn.Module | None,
    *layers: torch.nn.Module,
) -> Tensor:
    """``act(norm(conv(x)) + residual)``, where the layers are a convolution, a norm, or both in this order.

    Args:
        in_place: ``+=``.
    """
    activation = IDENTITY if act is None else _resolved(act)
    first, last = layers[0], layers[-1]
    if activation is not None and all(_takes(layer, act) for layer in layers):
        own = None if act is None else activation
        if residual is not None and not _fits(residual, x, first):
            x, layers = run_as_one(x, None, False, None, *layers), ()
        elif len(layers) == 2:
            if type(first) is nn.Conv2d and type(last) is nn.BatchNormAct2d:
                return nn.conv_bn_act(first, last, x, residual, act=own)
        elif type(first) is nn.ConvTranspose2d:
            return first(x, act=own)
        else:
            return first(x, residual, act=own)
    # Something else was put in the place of one of them, or is to be called between them.
    for layer in layers:
        x = layer(x)
    if residual is not None:
        if in_place:
            x += residual
        else:
            x = x + residual
    if isinstance(act, torch.nn.Module):
        return act(x)
    return x if act is None else activate(x, ACTIVATIONS[act])


def _resolved(act: str | torch.nn.Module) -> Activation | None:
    """``None`` for a module that must be called itself."""
    if isinstance(act, str):
        return ACTIVATIONS[act]
    try:
        return None if is_watched(act) else resolve_activation("optimize", act)
    except TypeError:
        return None


def _takes(layer: Any, act: Any) -> bool:
    """Whether ``layer`` is as it was converted, and applies ``act`` in place of nothing."""
    ours = type(layer) in CONVOLUTIONS or type(layer) in NORMS
    return ours and not is_watched(layer) and (act is None or layer.act == IDENTITY)


def has_hooks(layer: torch.nn.Module) -> bool:
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
    )


def is_watched(layer: torch.nn.Module) -> bool:
    """Whether something else is to be called with it, or in place of its forward."""
    replaced = "forward" in layer.__dict__ or "_conv_forward" in layer.__dict__
    return has_hooks(layer) or replaced


def _fits(residual: Any, x: Tensor, first: Any) -> bool:
    """Whether a sum with what the layers make of ``x`` neither broadcasts nor changes the dtype."""
    if not isinstance(residual, Tensor) or residual.dtype != result_dtype(x):
        return False
    if not isinstance(first, nn.Conv2d):
        return residual.shape == x.shape
    if x.dim() != 4:
        return False
    # Not from the weight, which may be made anew each time that it is read.
    weight_shape = (first.out_channels, 0, *first.kernel_size)
    return residual.shape == conv2d_shape(
        x, weight_shape, first.stride, _paddings(first), first.dilation
    )


def _paddings(conv: nn.Conv2d) -> Any:
    if not isinstance(conv.padding, str):
        return conv.padding
    if conv.padding == "valid":
        return 0, 0
    return tuple(d * (k - 1) / 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
