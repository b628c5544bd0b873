"""Layers that a module's own forward calls one after another, found with ``torch.fx``, and the forward that fuses them.

One module at a time: every submodule stays a single call, so that nothing but the module's own code is traced, and what
cannot be traced, or depends on the mode, or on what it is called with, keeps its forward.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import operator
import re
import warnings
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

from .activation import ACTIVATIONS, IDENTITY, Activation, resolve_activation
from .nn.conv_bn_act import conv_bn_act

_CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
_NORMS = (
    torch.nn.BatchNorm2d,
    torch.nn.GroupNorm,
    torch.nn.InstanceNorm1d,
    torch.nn.InstanceNorm2d,
    torch.nn.InstanceNorm3d,
)
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Functions and methods that are an activation without arguments of their own.
_ACTIVATIONS = {
    torch.relu: "relu", torch.relu_: "relu", F.relu: "relu", "relu": "relu", "relu_": "relu",
    F.silu: "silu", F.hardswish: "hardswish", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid", torch.tanh: "tanh", "tanh": "tanh",
}  # fmt: skip


class Group(NamedTuple):
    """Layers that run as one op: convolution, norm or both, then an addition and an activation, if they follow.

    Attributes:
        layers: convolution, norm, or both.
        names: of the layers, and of what else is fused.
        act: the activation behind them.
        nodes: of the graph, first to last.
        residual: the node that is added, or ``None``.
    """

    layers: list[torch.nn.Module]
    names: list[str]
    act: Activation
    nodes: list[fx.Node]
    residual: fx.Node | None


class Fusion(NamedTuple):
    """A module whose forward is made anew.

    Attributes:
        owner: the module.
        groups: what it runs as one op each.
        source: of the function ``forward``.
        names: the objects that the source names.
    """

    owner: torch.nn.Module
    groups: list[Group]
    source: str
    names: dict[str, Any]


def plan_fusions(model: torch.nn.Module, fusible: set[int]) -> list[Fusion]:
    """What can be fused in ``model``, which stays as it is; ``fusible``: ids of the layers that may take part."""
    found = (_plan(owner, fusible) for owner in model.modules() if len(owner._modules) > 1)
    return [fusion for fusion in found if fusion is not None]


def _plan(owner: torch.nn.Module, fusible: set[int]) -> Fusion | None:
    if not any(id(child) in fusible for child in owner.children()):
        return None
    graph = _traced(owner)
    if graph is None:
        return None
    calls = {
        node: owner.get_submodule(str(node.target))
        for node in graph.nodes
        if node.op == "call_module"
    }
    times = Counter(id(layer) for layer in calls.values())
    usable = {
        node: layer
        for node, layer in calls.items()
        if id(layer) in fusible
        if times[id(layer)] == 1 or not isinstance(layer, (*_CONVOLUTIONS, *_NORMS))
    }
    groups = _Search(list(graph.nodes), usable, owner).groups()
    if not groups:
        return None
    for group in groups:
        _rewrite(graph, group)
    graph.lint()
    code = graph.python_code("self")
    used = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", code.src))
    names = {name: value for name, value in code.globals.items() if name in used}
    return Fusion(owner, groups, code.src, names)


class _Proxy(fx.Proxy):
    """Tells ``x += y`` from ``x = x + y``."""


def _in_place(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


_WRITING = {
    name: getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
}  # fmt: skip
for _name, _function in _WRITING.items():
    setattr(_Proxy, f"__{_name}__", _in_place(_function))


class _OwnCode(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _traced(owner: torch.nn.Module) -> fx.Graph | None:
    """The graph of the module's own forward, or ``None`` where it says nothing about every call."""
    forward = type(owner).forward
    if "forward" in owner.__dict__ or not inspect.isfunction(forward):
        return None
    parameters = inspect.signature(forward).parameters.values()
    kinds = {p.kind for p in parameters}
    optional = any(p.default is not p.empty for p in parameters)
    # A proxy is none of the things that these ask for.
    asks = {"isinstance", "is_grad_enabled", "is_scripting", "is_tracing"} & set(
        forward.__code__.co_names
    )
    if kinds != {inspect.Parameter.POSITIONAL_OR_KEYWORD} or optional or asks:
        return None
    sources, graphs = [], []
    for training in (True, False):
        # A shadow: what its forward assigns stays there.
        shadow = type(owner).__new__(type(owner))
        shadow.__dict__ = {**owner.__dict__, "training": training}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graphs.append(_OwnCode().trace(shadow))
        except Exception:  # whatever code that knows no proxies may raise
            return None
        sources.append(graphs[-1].python_code("self").src)
    return graphs[0] if sources[0] == sources[1] else None


class _Search(NamedTuple):
    """Where groups are looked for: the graph in order, the layers that may take part, the module."""

    nodes: list[fx.Node]
    layers: dict[fx.Node, torch.nn.Module]
    owner: torch.nn.Module

    def groups(self) -> list[Group]:
        groups: list[Group] = []
        taken: set[fx.Node] = set()
        for node in self.nodes:
            layer = self.layers.get(node)
            if node in taken or not isinstance(layer, (*_CONVOLUTIONS, *_NORMS)):
                continue
            if _one_argument(node):
                group = self.group(node, layer)
                if len(group.nodes) > 1:
                    groups.append(group)
                    taken.update(group.nodes)
        return groups

    def group(self, node: fx.Node, layer: torch.nn.Module) -> Group:
        """The longest group that begins with ``node``."""
        nodes, members, names, residual, act = [node], [layer], [str(node.target)], None, IDENTITY
        following = self.next_of(nodes)
        norm = None if following is None else self.layers.get(following)
        if (
            following is not None
            and isinstance(layer, torch.nn.Conv2d)
            and isinstance(norm, torch.nn.BatchNorm2d)
            and _one_argument(following)
        ):
            nodes.append(following)
            members.append(norm)
            names.append(str(following.target))
            following = self.next_of(nodes)
        if following is not None and not isinstance(members[-1], torch.nn.ConvTranspose2d):
            residual = _added(following, nodes[-1])
            if residual is not None:
                nodes.append(following)
                names.append("add")
                following = self.next_of(nodes)
        if following is not None:
            found = _activation(following, nodes[-1], self.layers)
            if found is not None:
                act = found
                nodes.append(following)
                named = following.op == "call_module"
                names.append(str(following.target) if named else act.name)
        return Group(members, names, act, nodes, residual)

    def next_of(self, nodes: list[fx.Node]) -> fx.Node | None:
        """The only reader of the last node, if the first one might as well be run where that stands.

        What is written in between might be what the first one reads, by another name too.
        """
        if len(nodes[-1].users) != 1:
            return None
        following = next(iter(nodes[-1].users))
        between = self.nodes[self.nodes.index(nodes[0]) + 1 : self.nodes.index(following)]
        writes = any(_writes(node, self.owner) for node in between if node not in nodes)
        return None if writes else following


def _one_argument(node: fx.Node) -> bool:
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _added(node: fx.Node, term: fx.Node) -> fx.Node | None:
    """What ``node`` adds to ``term``, where it does nothing else."""
    if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    other = right if left is term else left
    if not isinstance(other, fx.Node) or other is term:
        return None
    # In place it would write what others still read.
    writes = node.target in (operator.iadd, "add_") and left is other
    return None if writes and (len(other.users) > 1 or other.op == "placeholder") else other


def _activation(
    node: fx.Node, of: fx.Node, layers: dict[fx.Node, torch.nn.Module]
) -> Activation | None:
    if not node.args or node.args[0] is not of:
        return None
    if node.op == "call_module":
        layer = layers.get(node)
        if layer is None or len(node.args) > 1 or node.kwargs:
            return None
        try:
            return resolve_activation("optimize", layer)
        except (TypeError, ValueError):
            return None
    name = _ACTIVATIONS.get(node.target) if node.op in ("call_function", "call_method") else None
    plain = len(node.args) == 1 and set(node.kwargs) <= {"inplace"}
    return ACTIVATIONS[name] if name is not None and plain else None


def _writes(node: fx.Node, owner: torch.nn.Module) -> bool:
    """Whether the node writes one of its inputs; of a module that says so by ``inplace``."""
    if node.op == "call_module":
        return bool(getattr(owner.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    named = getattr(node.target, "__name__", "")
    return bool(
        node.kwargs.get("inplace") or node.kwargs.get("out") or named.endswith("_")
        or node.target in _WRITING.values()
    )  # fmt: skip


def _rewrite(graph: fx.Graph, group: Group) -> None:
    first, last = group.nodes[0], group.nodes[-1]
    with graph.inserting_before(last), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if len(group.layers) == 2:
            modules = [graph.get_attr(str(node.target)) for node in group.nodes[:2]]
            made = graph.call_function(conv_bn_act, (*modules, first.args[0], group.residual))
        else:
            args = (first.args[0],) if group.residual is None else (first.args[0], group.residual)
            made = graph.call_module(str(first.target), args)
    last.replace_all_uses_with(made)
    for node in reversed(group.nodes):
        graph.erase_node(node)


# ---- the class of a module whose forward is made anew ----


def original_class(owner: torch.nn.Module) -> type[torch.nn.Module]:
    return getattr(type(owner), "_advdl_original", type(owner))


_classes: dict[tuple[type, str], type[torch.nn.Module]] = {}


def fused_class(
    original: type[torch.nn.Module], source: str, names: dict[str, Any]
) -> type[torch.nn.Module]:
    """``original`` with the forward of this source; the same for all modules of the same source."""
    found = _classes.get((original, source))
    if found is not None:
        return found
    file = f"<advdl_ops.optimize {len(_classes)}: {original.__qualname__}>"
    scope = dict(names)
    exec(compile(source, file, "exec"), scope)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)

    # Modules, as torch where the forward calls torch.flatten, cannot be pickled or copied: they go by name.
    modules = {
        name: value.__name__ for name, value in names.items() if isinstance(value, ModuleType)
    }
    others = {name: value for name, value in names.items() if name not in modules}

    def reduce(self: torch.nn.Module, protocol: Any) -> Any:
        return _rebuilt, (original, source, others, modules), self.__getstate__()

    attributes = {
        "forward": scope["forward"], "__reduce_ex__": reduce, "__module__": original.__module__,
        "__qualname__": original.__qualname__, "__doc__": original.__doc__, "_advdl_original": original,
    }  # fmt: skip
    made = type(original.__name__, (original,), attributes)
    _classes[original, source] = made
    return made


def _rebuilt(
    original: type[torch.nn.Module], source: str, others: dict[str, Any], modules: dict[str, str]
) -> Any:
    names = {name: importlib.import_module(module) for name, module in modules.items()}
    made = fused_class(original, source, {**others, **names})
    return made.__new__(made)
