"""A module's own ``forward`` as ``torch.fx`` graphs, each with guards that define the calls for which it is valid.

`convert.py` gets the graphs of every module; `fuse.py`, `aliasing.py` and `memory_format.py` read them. Each
submodule remains a single call, so only the module's own code is traced. A graph is valid for some calls only: in
training or evaluation if the two differ, with certain optional arguments, and with the values of the attributes that
the code has read.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .copies import CONTAINERS, copies_of
from .proxies import OwnCodeTracer, Untraceable, current_modes, names_in, with_own_isinstance
from .reads import CALLED, guards_of, record_reads

_Module = torch.nn.Module


class Variant(NamedTuple):
    """A graph and the calls for which it is valid.

    Attributes:
        graph: takes the arguments ``arguments``, in order.
        guards: Python expressions over the names of the arguments and ``self``; all must hold.
        arguments: names of the arguments that the graph takes.
    """

    graph: fx.Graph
    guards: tuple[str, ...]
    arguments: tuple[str, ...]


def is_torchs(layer: torch.nn.Module) -> bool:
    """Whether the layer's forward is one of ``torch.nn``'s."""
    module = getattr(type(layer).forward, "__module__", None) or ""
    return module.startswith("torch.nn.modules.") and "forward" not in layer.__dict__


# During a trace, fx replaces methods of torch.nn.Module for the whole process.
_lock = threading.RLock()


def variants_of(owner: _Module) -> list[Variant]:
    """Graphs of the module's own forward.

    Raises:
        Untraceable: it has none.
    """
    forward = type(owner).forward
    if "forward" in owner.__dict__ or not inspect.isfunction(forward):
        raise Untraceable("its forward was replaced")
    _check_code(forward.__code__)
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
        # If the code checks the type of an argument, a second graph may serve arguments that are not tensors.
        for tensors in (True, False):
            call = _Call(parameters, given, tensors)
            try:
                with _lock:
                    traced = _trace_both_modes(owner, call)
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


def _check_code(code: CodeType) -> None:
    """Raises for code that a trace would not notice, in the forward and in the functions that it defines."""
    names = names_in(code)
    if names & {"is_grad_enabled", "is_tracing"}:
        raise Untraceable("its forward asks how it is called")
    if names & {"builtins", "__builtins__", "globals"}:  # the traced copy has other globals
        raise Untraceable("its forward uses its globals by other ways than their names")
    opnames = _opnames(code)
    if opnames & {"STORE_GLOBAL", "DELETE_GLOBAL"}:
        raise Untraceable("its forward assigns a global")
    if any(name.startswith("MATCH_") for name in opnames):
        raise Untraceable("its forward matches patterns")


def _opnames(code: CodeType) -> set[str]:
    inner = (_opnames(c) for c in code.co_consts if isinstance(c, CodeType))
    return {i.opname for i in dis.get_instructions(code)}.union(*inner)


def _calls(parameters: list[inspect.Parameter]) -> Iterator[tuple[str, ...]]:
    """The calls to trace, as names of the given arguments: the required ones, and these with all whose default is
    ``None``.

    If there are two of the latter, also with each of them alone.
    """
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    required = tuple(p.name for p in parameters if p.kind in named and p.default is p.empty)
    further = tuple(p.name for p in parameters if p.kind in named and p.default is None)
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        raise Untraceable("its forward takes arguments by position only")
    yield required
    alone = [(name,) for name in further] if len(further) == 2 else []
    for optional in (*alone, further) if further else ():
        yield tuple(p.name for p in parameters if p.name in required + optional)


class _Call(NamedTuple):
    """The arguments of a call.

    Attributes:
        parameters: all parameters of the forward.
        given: names of the arguments that the caller gives. The others have their default.
        tensors: whether the given ones are tensors, if the code checks that.
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
            # The graph is for a value that is not None.
            if not (asked and call.tensors) and len(call.parameters) > 1:
                guards.append(f"{p.name} is not None")
        elif p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            guards.append(f"not {p.name}")
        else:
            guards.append(f"{p.name} is {default_name(p)}")
    return guards


def _structure(owner: _Module, name: str = "self") -> Iterator[str]:
    """Guards on the set of children, also in containers, over which a forward may iterate."""
    yield f"children_of({name}) == {children_of(owner)}"
    for key, child in owner._modules.items():
        if child is not None and type(child).forward in _NEVER_CALLED and key.isidentifier():
            yield from _structure(child, f"{name}.{key}")


# The forwards of containers that are never called themselves.
_NEVER_CALLED = torch.nn.Module.forward, torch.nn.ModuleList.forward, torch.nn.ModuleDict.forward


def children_of(module: _Module) -> tuple[str, ...]:
    return tuple(name for name, child in module._modules.items() if child is not None)


def default_name(parameter: inspect.Parameter) -> str:
    return f"default_of_{parameter.name}"


def has_graph_for(
    module: _Module, variants: list[Variant], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether one of the module's graphs is valid for a call with these arguments, which are from a graph's node."""
    try:
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    except TypeError:
        return False
    given = {}
    for name, value in bound.arguments.items():
        p = bound.signature.parameters[name]
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            return False
        if value is not p.default and value is not module:
            given[name] = value
    are_tensors = {isinstance(value, fx.Node) for value in given.values()}  # most probably
    for variant in variants:
        asks = {
            guard.startswith("isinstance(") for guard in variant.guards if "isinstance(" in guard
        }
        if given.keys() == set(variant.arguments) and (not asks or asks == are_tensors):
            return True
    return False


def has_optional_arguments(module: _Module) -> bool:
    """Whether the module's forward can be called in several ways, some of which may have no graph."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return any(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )


# Names that the source of a new forward uses besides its arguments.
_NAMES = {
    "before", "children_of", "evaluated_in_fast_format", "inside", "in_fast_format", "is_observed", "original",
    "Tensor", *CALLED,
}  # fmt: skip


# ---- one trace ----


class _Traced(NamedTuple):
    graph: fx.Graph
    guards: tuple[str, ...]  # of the attributes that the code has read
    asked: bool  # whether the code checked the type of an argument


def _by_mode(traced: list[_Traced], guards: list[str], given: tuple[str, ...]) -> list[Variant]:
    """One variant for training and evaluation, or one for each if they differ."""
    found = [Variant(t.graph, (*guards, *t.guards), given) for t in traced]
    asks_for_mode = any("'training'" in guard for t in traced for guard in t.guards)
    if _same(found[0].graph, found[1].graph) and not asks_for_mode:
        # The guards may differ: one mode may read an attribute that the other does not.
        return [found[0]._replace(guards=tuple(dict.fromkeys(found[0].guards + found[1].guards)))]
    modes = "self.training", "not self.training"
    return [v._replace(guards=(mode, *v.guards)) for v, mode in zip(found, modes, strict=True)]


def _trace_both_modes(owner: _Module, call: _Call) -> list[_Traced]:
    """The graphs of training and of evaluation."""
    # The second trace sets gradients and autocast the other way around, so that one of the two notices if the code
    # enters such a context.
    training, evaluation = _trace(owner, call, True, True), _trace(owner, call, False, False)
    if _asks_for_classes(type(owner)):
        for traced, mode in ((training, True), (evaluation, False)):
            if not _same(traced.graph, _trace(owner, call, mode, mode, records=False).graph):
                raise Untraceable("it asks for the class of a layer")
    if not _same(training.graph, evaluation.graph) and not _same(
        training.graph, _trace(owner, call, True, False).graph
    ):
        raise Untraceable("it asks how it is called")
    return [training, evaluation]


def _asks_for_classes(kind: type) -> bool:
    """Whether the code of a module may ask for the class of another, which differs where reads are recorded."""
    own = (k for k in kind.__mro__ if not k.__module__.startswith("torch.nn."))
    codes = (getattr(value, "__code__", None) for k in own for value in vars(k).values())
    return any(code is not None and names_in(code) & {"type", "__class__"} for code in codes)


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    return a.python_code("self").src == b.python_code("self").src


def _trace(
    owner: _Module, call: _Call, training: bool, recording: bool, records: bool = True
) -> _Traced:
    """One trace of the forward, on copies of the module and its children, so that its assignments do not reach the
    originals.

    Args:
        training: the mode of all of them.
        recording: gradients on and autocast off; otherwise the other way around.
        records: what is read of the modules, for which they get other classes.
    """
    tracer = OwnCodeTracer(call.tensors)
    try:
        copies = copies_of(owner)
        for copied in copies.values():
            own = copied.__dict__
            own["training"] = training
            for name, value in own.items():
                if type(value) in CONTAINERS:
                    own[name] = value.copy()
                elif isinstance(value, Tensor):  # neither parameter nor buffer
                    own[name] = value.detach().clone()
        reads = record_reads(owner, copies) if records else []
        root = _root(owner, call, copies[id(owner)], tracer)
        before = [_items(copied) for copied in copies.values()]
        with warnings.catch_warnings(), _gradients_and_autocast(recording), _no_random_numbers():
            warnings.simplefilter("ignore")
            tracer.modes = current_modes()
            graph = tracer.trace(root)
        guards = guards_of(reads)
        # A graph would not repeat these assignments, and cannot contain a tensor that belongs to no module.
        for earlier, copied in zip(before, copies.values(), strict=True):
            later = _items(copied)
            if later != earlier:
                changed = sorted(name for name in later if later[name] != earlier.get(name))
                raise Untraceable(
                    f"it assigns self.{(changed or ['?'])[0]}, or makes a tensor of its own"
                )
    except Exception as error:  # code that was not written for proxies may raise any exception
        text = next(iter(str(error).splitlines()), "") or type(error).__name__
        failure = Untraceable(f"its forward cannot be traced: {text}")
        failure.asked = tracer.asked
        raise failure from error
    return _Traced(graph, guards, tracer.asked)


def _root(owner: _Module, call: _Call, copied: _Module, tracer: OwnCodeTracer) -> _Module:
    """The copy of ``owner`` with a forward of the given arguments alone."""

    class Root(type(copied)):  # type: ignore[misc]
        forward = _of_arguments(with_own_isinstance(type(owner).forward, tracer), call)

    Root.__name__, Root.__qualname__ = type(owner).__name__, type(owner).__qualname__
    object.__setattr__(copied, "__class__", Root)
    return copied


@contextlib.contextmanager
def _gradients_and_autocast(recording: bool) -> Iterator[None]:
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
    """Refuses code that draws random numbers, and restores the generators, also after an error."""
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
    """Values that change if an attribute, or an element of it, is assigned."""

    def item(value: Any) -> Any:
        if isinstance(value, Tensor):
            return id(value), value._version
        if type(value) not in CONTAINERS:
            return id(value)
        if isinstance(value, dict):
            return {name: id(part) for name, part in value.items()}
        return [id(part) for part in value]

    return {name: item(value) for name, value in module.__dict__.items()}


def _of_arguments(forward: Callable[..., Any], call: _Call) -> Any:
    """``forward`` as a function of only the given arguments, whose names fx reads from its code."""
    passed = ", ".join(f"{name}={name}" for name in call.given)
    scope: dict[str, Any] = {"forward": forward, "returned": _returned}
    source = f"def call(self, {', '.join(call.given)}): return returned(forward(self, {passed}))"
    exec(source, scope)
    return scope["call"]


def _returned(value: Any) -> Any:
    """A forward's result with plain dicts and lists, as a graph does not know subclasses of them."""
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
