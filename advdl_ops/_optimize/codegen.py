"""The class of a module with a new ``forward``: one function per graph, called if the graph's guards hold.

`convert.py` gives a module this class. A call without a matching graph runs the module's previous forward.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from .._watch import is_observed
from .reads import CALLED
from .record import RECORD, Record
from .trace import Variant, children_of, default_name

_Module = torch.nn.Module


def source_of(
    owner: _Module, variants: list[Variant], through: str = "", seen: Sequence[Variant] = ()
) -> tuple[str, dict[str, Any]]:
    """Source of the new ``forward``, and the objects that it uses, by name, besides those of :func:`fused_class`.

    Args:
        owner: the module, with its previous class.
        variants: the graphs, and the guards under which each is called.
        through: the name of a function ``(module, forward, args, kwargs)`` that calls the forward; "": none.
        seen: the graphs for whose calls ``through`` is used. If there are none, as for a forward of ``torch.nn``, it is
            used for every call.
    """
    called = "inside" if through else "forward"
    parameters = list(inspect.signature(type(owner).forward).parameters.values())
    head, (by_position, by_name) = _head_of(parameters), _passed_on(parameters)
    passed = ", ".join(by_position + by_name)
    seen_by = ", ".join(_stars(p) + p.name for p in parameters[1:] if p.kind is not p.VAR_KEYWORD)
    # The previous forward may have been replaced in its class since. Whoever observes the call sees that forward.
    always = "original.forward is before", f"not is_observed({seen_by})"
    texts: list[str] = []
    names: dict[str, Any] = {}
    tests: list[str] = []
    for number, variant in enumerate(variants):
        code = variant.graph.python_code("self")
        texts.append(code.src.replace("def forward(", f"def variant_{number}(", 1))
        used = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", code.src))
        names.update({name: value for name, value in code.globals.items() if name in used})
        call = f"return variant_{number}(self, {', '.join(variant.arguments)})"
        tests.append(f"    if {' and '.join((*always, *variant.guards))}:\n        {call}\n")
    asked = sorted({g for v in (*variants, *seen) for g in v.guards if g.startswith("refers(")})
    if asked:
        texts.append(f"def asked(self):\n    return {', '.join(asked)}\n")
    previous = f"original.forward({passed})"
    texts.append(f"def {called}({head}):\n{''.join(tests)}    return {previous}\n")
    if through:
        args, kwargs = ", ".join(by_position[1:]), ", ".join(by_name)
        conditions = (" and ".join(v.guards) or "True" for v in seen)
        condition = " or ".join(f"({text})" for text in dict.fromkeys(conditions)) or "True"
        texts.append(
            f"def forward({head}):\n"
            f"    if {condition}:\n"
            f"        return {through}(self, {called}, [{args}], dict({kwargs}))\n"
            f"    return {called}({passed})\n"
        )
    return "\n".join(texts), names


def _head_of(parameters: Sequence[inspect.Parameter]) -> str:
    """The parameters of a function, with their defaults by :func:`default_name`."""
    heads: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not any("*" in head for head in heads):
            heads.append("*")
        default = "" if p.default is p.empty else f"={default_name(p)}"
        heads.append(_stars(p) + p.name + default)
    return ", ".join(heads)


def _passed_on(parameters: Sequence[inspect.Parameter]) -> tuple[list[str], list[str]]:
    """The arguments of a call that passes them all on: those by position, and those by name."""
    by_name = [f"{p.name}={p.name}" for p in parameters if p.kind is p.KEYWORD_ONLY]
    further = [f"**{p.name}" for p in parameters if p.kind is p.VAR_KEYWORD]
    named = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    by_position = [_stars(p) + p.name for p in parameters if p.kind not in named]
    return by_position, [*by_name, *further]


def _stars(parameter: inspect.Parameter) -> str:
    stars: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    return stars.get(parameter.kind, "")


_classes: dict[tuple[type, str], type[_Module]] = {}


def fused_class(original: type[_Module], source: str, names: dict[str, Any]) -> type[_Module]:
    """``original`` with the forward of this source. Modules of equal class and source share one class."""
    found = _classes.get((original, source))
    if found is not None:
        return found
    file = f"<advdl_ops.optimize {len(_classes)}: {original.__qualname__}>"
    defaults = {
        default_name(p): p.default for p in inspect.signature(original.forward).parameters.values()
    }
    scope = {
        **names, **defaults, **CALLED, "original": original, "before": original.forward,
        "children_of": children_of, "is_observed": is_observed, "Tensor": Tensor,
    }  # fmt: skip
    exec(compile(source, file, "exec"), scope)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)

    # A Python module among the names (torch, if the forward calls torch.flatten) is pickled by its name.
    modules = {name: m.__name__ for name, m in names.items() if isinstance(m, ModuleType)}
    others = {name: value for name, value in names.items() if name not in modules}

    def reduce(self: _Module, protocol: Any) -> Any:
        return _rebuilt, (original, source, others, modules), self.__getstate__()

    def set_state(self: _Module, state: Any) -> None:
        original.__setstate__(self, state)
        # So that a compiler, which cannot ask, knows the functions in a new process too.
        if "asked" in scope:
            scope["asked"](self)

    attributes = {
        "forward": scope["forward"], "__reduce_ex__": reduce, "__setstate__": set_state,
        "__module__": original.__module__, "__qualname__": original.__qualname__,
        "__doc__": original.__doc__, "_advdl_made": True,
    }  # fmt: skip
    if issubclass(original, fx.GraphModule):
        attributes |= {
            "recompile": _recompile,
            "__reduce_ex__": _reduce_graph_module,
            "_advdl_original": original,
        }
    made = type(original.__name__, (original,), attributes)
    _classes[original, source] = made
    return made


# A GraphModule has a class of its own, in which it replaces the forward when its graph changes, and is pickled as its
# graph.


def _recompile(self: Any) -> Any:
    """The graph may have changed: the new forward of ``optimize`` is dropped, and the layers remain."""
    object.__setattr__(self, "__class__", type(self)._advdl_original)
    self.__dict__[RECORD] = Record(notes=("not fused any more: its graph has changed",))
    return self.recompile()


def _reduce_graph_module(self: Any, protocol: Any) -> Any:
    # In a class of its own, because a GraphModule sets its class's forward when it is pickled.
    original = type(self)._advdl_original
    plain: Any = object.__new__(type(original.__name__, (original,), {}))
    plain.__dict__.update(self.__dict__)
    plain.__dict__.pop(RECORD, None)
    return plain.__reduce__()


def _rebuilt(
    original: type[_Module], source: str, others: dict[str, Any], modules: dict[str, str]
) -> Any:
    imported = {name: importlib.import_module(module) for name, module in modules.items()}
    made = fused_class(original, source, {**others, **imported})
    return object.__new__(made)
