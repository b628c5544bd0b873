"""A module's own ``forward`` as ``torch.fx`` graphs.

Every submodule stays a single call, so that nothing but the module's own code is traced. A graph holds for some calls
only: for a mode, where the two differ, for optional arguments given or not, for the attributes that the code has looked
at. Each such variant is guarded by what it was made from.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
import inspect
import math
import operator
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ._twins import CONTAINERS, twins_of

_Module = torch.nn.Module


class Untraceable(Exception):
    """Why a forward has no graph, as ``explain`` tells it.

    Attributes:
        asked: whether the code asked what an argument is.
    """

    asked = False


class Variant(NamedTuple):
    """A graph and the calls that it is for.

    Attributes:
        graph: of the arguments ``arguments``, in order.
        guards: Python expressions over the names of the arguments and ``self``; all must hold.
        arguments: names of those that the graph takes.
    """

    graph: fx.Graph
    guards: tuple[str, ...]
    arguments: tuple[str, ...]


def graphs_of(
    model: _Module, known: Collection[int]
) -> tuple[dict[int, list[Variant]], dict[int, str]]:
    """By id of a module the graphs of its own forward, or why it has none.

    Args:
        known: ids of layers that nobody has to look into; nor of those of torch, but for what calls others in order.
    """
    graphs, failures = {}, {}
    with _lock:
        for owner in model.modules():
            in_order = type(owner).forward is torch.nn.Sequential.forward
            if id(owner) in known or (is_torchs(owner) and not in_order):
                continue
            try:
                graphs[id(owner)] = variants_of(owner)
            except Untraceable as error:
                failures[id(owner)] = str(error)
    return graphs, failures


_lock = threading.RLock()  # tracing puts functions of its own in the place of global ones


def is_torchs(layer: torch.nn.Module) -> bool:
    """Whether its forward is one of ``torch.nn``'s."""
    module = getattr(type(layer).forward, "__module__", None) or ""
    return module.startswith("torch.nn.modules.") and "forward" not in layer.__dict__


def variants_of(owner: _Module) -> list[Variant]:
    """Graphs of the module's own forward.

    Raises:
        Untraceable: it has none.
    """
    forward = type(owner).forward
    if "forward" in owner.__dict__ or not inspect.isfunction(forward):
        raise Untraceable("its forward was replaced")
    if {"is_grad_enabled", "is_tracing"} & set(forward.__code__.co_names):
        raise Untraceable("its forward asks how it is called")
    if any(i.opname == "STORE_GLOBAL" for i in dis.get_instructions(forward)):
        raise Untraceable("its forward assigns a global")
    parameters = list(inspect.signature(forward).parameters.values())
    if (
        not parameters
        or parameters.pop(0).name != "self"
        or any(p.name in _NAMES for p in parameters)
    ):
        raise Untraceable("its forward has an argument of a name that is taken")
    found: list[Variant] = []
    why: Untraceable | None = None
    for given in _calls(parameters):
        # Where the code asks what its input is, another graph may serve what is no tensor.
        for tensors in (True, False):
            call = _Call(parameters, given, tensors)
            try:
                traced = _traced(owner, call)
            except Untraceable as error:
                why, asked = why or error, error.asked
            else:
                asked = any(t.asked for t in traced)
                found += _by_mode(
                    traced, [*_argument_guards(call, asked), *_structure(owner)], given
                )
            if not asked:
                break
    if not found:
        assert why is not None
        raise why
    return found


def _calls(parameters: list[inspect.Parameter]) -> Iterator[tuple[str, ...]]:
    """Names of the arguments that are given: the required ones, and those with all that are ``None`` otherwise."""
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    required = tuple(p.name for p in parameters if p.kind in named and p.default is p.empty)
    further = tuple(p.name for p in parameters if p.kind in named and p.default is None)
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise Untraceable("its forward takes arguments by position only")
    yield required
    if further:
        yield tuple(p.name for p in parameters if p.name in required + further)


class _Call(NamedTuple):
    """The arguments of a call.

    Attributes:
        parameters: of the forward.
        given: names of those that are given, and not by their default.
        tensors: whether these are tensors, to code that asks.
    """

    parameters: list[inspect.Parameter]
    given: tuple[str, ...]
    tensors: bool


def _argument_guards(call: _Call, asked: bool) -> list[str]:
    guards = []
    for p in call.parameters:
        if p.name in call.given:
            if asked:
                guards.append(f"{'' if call.tensors else 'not '}isinstance({p.name}, Tensor)")
            # A graph takes whatever is given for something, so None must not pass for it.
            if not (asked and call.tensors) and len(call.parameters) > 1:
                guards.append(f"{p.name} is not None")
        elif p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            guards.append(f"not {p.name}")
        else:
            guards.append(f"{p.name} is {default_name(p)}")
    return guards


def _structure(owner: _Module, name: str = "self") -> Iterator[str]:
    """Guards of which children there are, also in containers, which a forward walks over."""
    yield f"children_of({name}) == {children_of(owner)}"
    for key, child in owner._modules.items():
        if child is not None and type(child).forward in _INERT and key.isidentifier():
            yield from _structure(child, f"{name}.{key}")


# Of containers, which hold and never call.
_INERT = torch.nn.Module.forward, torch.nn.ModuleList.forward, torch.nn.ModuleDict.forward


def children_of(module: _Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


def default_name(parameter: inspect.Parameter) -> str:
    return f"default_of_{parameter.name}"


# What the source of a new forward names beside its arguments.
_NAMES = {
    "before", "children_of", "evaluated_in_fast_format", "inside", "in_fast_format", "Tensor",
}  # fmt: skip


# ---- one trace ----


class _Traced(NamedTuple):
    graph: fx.Graph
    guards: tuple[str, ...]  # of the attributes that the code has looked at
    asked: bool  # whether the code asked what an argument is


def _by_mode(traced: list[_Traced], guards: list[str], given: tuple[str, ...]) -> list[Variant]:
    """One variant for training and evaluation, or, where they differ, one for each."""
    found = [Variant(t.graph, (*guards, *t.guards), given) for t in traced]
    training, evaluation = (variant.graph.python_code("self").src for variant in found)
    if training == evaluation:
        # The guards may differ: of what was looked at in one of the modes alone.
        return [found[0]._replace(guards=tuple(dict.fromkeys(found[0].guards + found[1].guards)))]
    modes = "self.training", "not self.training"
    return [v._replace(guards=(mode, *v.guards)) for v, mode in zip(found, modes, strict=True)]


def _traced(owner: _Module, call: _Call) -> list[_Traced]:
    """The graphs of training and of evaluation."""
    # Each under other circumstances, so that a context that the code enters is seen in one of them.
    training, evaluation = _trace(owner, call, True, True), _trace(owner, call, False, False)
    if not _same(training.graph, evaluation.graph) and not _same(
        training.graph, _trace(owner, call, True, False).graph
    ):
        raise Untraceable("it asks how it is called")
    return [training, evaluation]


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    return a.python_code("self").src == b.python_code("self").src


def _trace(owner: _Module, call: _Call, training: bool, recording: bool) -> _Traced:
    """The forward of a shadow of the module over twins of its children, where whatever it assigns stays.

    Args:
        training: the mode of all of them.
        recording: with gradients and without autocast, or the other way around.
    """
    tracer = _OwnCode(call.tensors)
    try:
        twins = twins_of(owner)
        for twin in twins.values():
            own = twin.__dict__
            own["training"] = training
            for name, value in own.items():
                if type(value) in CONTAINERS:
                    own[name] = value.copy()
                elif isinstance(value, Tensor):  # neither parameter nor buffer
                    own[name] = value.detach().clone()
        shadow, seen = _shadow(owner, call, twins[id(owner)])
        before = [_items(twin) for twin in twins.values()]
        with (
            warnings.catch_warnings(),
            _answering(tracer),
            _circumstances(recording),
            _no_random_numbers(),
        ):
            warnings.simplefilter("ignore")
            tracer.state = _state()
            graph = tracer.trace(shadow)
        # What a graph would leave undone, or holds of no module.
        for earlier, twin in zip(before, twins.values(), strict=True):
            later = _items(twin)
            if later != earlier:
                changed = sorted(name for name in later if later[name] != earlier.get(name))
                raise Untraceable(
                    f"it assigns self.{(changed or ['?'])[0]}, or makes a tensor of its own"
                )
    except Exception as error:  # whatever code that knows no proxies may raise
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        failure = Untraceable(f"its forward cannot be traced: {text}")
        failure.asked = tracer.asked
        raise failure from error
    return _Traced(graph, tuple(_guard(name, seen[name]) for name in sorted(seen)), tracer.asked)


_MISSING = object()


def _shadow(owner: _Module, call: _Call, twin: _Module) -> tuple[_Module, dict[str, Any]]:
    """The twin in a class that remembers what was looked at."""
    seen: dict[str, Any] = {}
    cls = type(owner)

    def recorded(name: str, value: Any) -> Any:
        own = name != "training" and not name.startswith("__") and not hasattr(_Module, name)
        if own and _is_plain(value):
            seen[name] = value
        return value

    class Shadow(cls):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            return recorded(name, super().__getattribute__(name))

        def __getattr__(self, name: str) -> Any:
            try:
                return recorded(name, super().__getattr__(name))
            except AttributeError:
                if not name.startswith("__"):
                    seen[name] = _MISSING
                raise

    Shadow.__name__, Shadow.__qualname__ = cls.__name__, cls.__qualname__
    Shadow.forward = _of_arguments(cls.forward, call)
    object.__setattr__(twin, "__class__", Shadow)
    return twin, seen


def _guard(name: str, value: Any) -> str:
    if value is _MISSING:
        return f"not hasattr(self, {name!r})"
    if value is None:
        return f"self.{name} is None"
    # A parameter or an array that equals a number is something else.
    return f"type(self.{name}) is {type(value).__name__} and self.{name} == {value!r}"


@contextlib.contextmanager
def _circumstances(recording: bool) -> Iterator[None]:
    devices = "cpu", "cuda"
    before = [torch.is_autocast_enabled(device) for device in devices]
    with torch.set_grad_enabled(recording):
        for device in devices:
            torch.set_autocast_enabled(device, not recording)
        try:
            yield
        finally:
            for device, enabled in zip(devices, before, strict=True):
                torch.set_autocast_enabled(device, enabled)


@contextlib.contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Where some are drawn, the generators are as before, also behind an error."""
    ours, pythons = torch.get_rng_state(), random.getstate()
    try:
        yield
    finally:
        drawn = not torch.equal(torch.get_rng_state(), ours) or random.getstate() != pythons
        if drawn:
            torch.set_rng_state(ours)
            random.setstate(pythons)
    if drawn:
        raise Untraceable("it draws random numbers")


def _items(module: _Module) -> dict[str, Any]:
    """What tells whether an attribute was assigned, or something in it."""

    def item(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value._version
        if type(value) not in CONTAINERS:
            return id(value)
        if isinstance(value, dict):
            return {name: id(part) for name, part in value.items()}
        return [id(part) for part in value]

    return {name: item(value) for name, value in module.__dict__.items()}


def _is_plain(value: Any) -> bool:
    """Whether its ``repr`` is it."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) in (tuple, list):
        return all(_is_plain(item) for item in value)
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (bool, int, str)


def _of_arguments(forward: Callable[..., Any], call: _Call) -> Any:
    """``forward`` as a function of the given arguments alone; fx reads their names off its code."""
    passed = ", ".join(f"{name}={name}" for name in call.given)
    scope: dict[str, Any] = {"forward": forward, "returned": _returned}
    source = f"def call(self, {', '.join(call.given)}): return returned(forward(self, {passed}))"
    exec(source, scope)
    return scope["call"]


def _returned(value: Any) -> Any:
    """What a forward returns as a graph may return it: it knows no dicts or lists but Python's own."""
    if isinstance(value, fx.Proxy):
        return value
    if isinstance(value, dict):
        items = {key: _returned(item) for key, item in value.items()}
        if type(value) is dict:
            return items
        proxies = [item for item in items.values() if isinstance(item, fx.Proxy)]
        if type(value) is not OrderedDict or not proxies:
            raise Untraceable(f"it returns a {type(value).__name__}")
        return proxies[0].tracer.create_proxy(
            "call_function", OrderedDict, (list(items.items()),), {}
        )
    if isinstance(value, list):
        if type(value) is not list:
            raise Untraceable(f"it returns a {type(value).__name__}")
        return [_returned(item) for item in value]
    if type(value) is tuple:
        return tuple(_returned(item) for item in value)
    return value


class _Proxy(fx.Proxy):
    """Tells ``x += y`` from ``x = x + y``, and refuses what a graph would not hold."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise Untraceable(f"it assigns {name} of a tensor")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("get", "items", "keys", "pop", "values"):
            raise Untraceable("it takes a dict apart")
        return super().__getattr__(name)

    def __iter__(self) -> Any:
        # What is in it may be None.
        if self.node.op == "placeholder":
            raise Untraceable("it takes an argument apart")
        return super().__iter__()


@contextlib.contextmanager
def _answering(tracer: _OwnCode) -> Iterator[None]:
    """Code that asks what a proxy is gets the answer for what it stands for.

    Not by ``__class__``, which torch's C++ would believe, too.
    """
    before = builtins.isinstance

    def answered(value: Any, kinds: Any) -> bool:
        if type(value) is not _Proxy:
            return before(value, kinds)
        frame = sys._getframe(1)
        asker = frame.f_globals.get("__name__", "")
        inside = asker == __name__ or asker.partition(".")[0] == "torch"
        if inside and frame.f_code.co_name != "is_tensor":
            return before(value, kinds)
        if value.node.op != "placeholder":
            raise Untraceable("it asks what something is")
        tracer.asked = True
        if tracer.tensors:
            return issubclass(Tensor, kinds)
        if kinds is not Tensor:  # which of those that are none, nobody knows
            raise Untraceable("it asks what something is")
        return False

    builtins.isinstance = answered
    try:
        yield
    finally:
        builtins.isinstance = before


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
IN_PLACE_OPERATORS = set(_WRITING.values())


class _OwnCode(fx.Tracer):
    """Keeps every submodule whole.

    Args:
        tensors: what arguments are to code that asks.
    """

    proxy_buffer_attributes = True  # else a write to one would be made, and not recorded

    def __init__(self, tensors: bool) -> None:
        super().__init__()
        self.tensors = tensors
        self.asked = False
        self.state: tuple[Any, ...] = ()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _state() != self.state:  # a graph knows no context
            raise Untraceable("it switches gradients or autocast, or checkpoints")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: _Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )
