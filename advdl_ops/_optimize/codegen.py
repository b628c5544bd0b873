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
from torch import Tensor

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
    texts: list[str] = []
    names: dict[str, Any] = {}
    tests: list[str] = []
    for number, variant in enumerate(variants):
        code = variant.graph.python_code("self")
        texts.append(code.src.replace("def forward(", f"def variant_{number}(", 1))
        used = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", code.src))
        names.update({name: value for name, value in code.globals.items() if name in used})
        call = f"return variant_{number}(self, {', '.join(variant.arguments)})"
        tests.append(f"    if {' and '.join(variant.guards) or 'True'}:\n        {call}\n")
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    heads: list[str] = []
    positional: list[str] = []
    by_name: list[str] = []
    for p in inspect.signature(type(owner).forward).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not any("*" in head for head in heads):
            heads.append("*")
        star = stars.get(p.kind, "")
        heads.append(star + p.name + ("" if p.default is p.empty else f"={default_name(p)}"))
        if p.kind is p.KEYWORD_ONLY:
            by_name.append(f"{p.name}={p.name}")
        else:
            (by_name if star == "**" else positional).append(star + p.name)
    head, passed = ", ".join(heads), ", ".join(positional + by_name)
    texts.append(f"def {called}({head}):\n{''.join(tests)}    return before({passed})\n")
    if through:
        args, kwargs = ", ".join(positional[1:]), ", ".join(by_name)
        conditions = (" and ".join(v.guards) or "True" for v in seen)
        condition = " or ".join(f"({text})" for text in dict.fromkeys(conditions)) or "True"
        texts.append(
            f"def forward({head}):\n"
            f"    if {condition}:\n"
            f"        return {through}(self, {called}, [{args}], dict({kwargs}))\n"
            f"    return {called}({passed})\n"
        )
    return "\n".join(texts), names


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
        **names, **defaults, "before": original.forward, "children_of": children_of, "Tensor": Tensor,
    }  # fmt: skip
    exec(compile(source, file, "exec"), scope)
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)

    # A Python module among the names (torch, if the forward calls torch.flatten) is pickled by its name.
    modules = {name: m.__name__ for name, m in names.items() if isinstance(m, ModuleType)}
    others = {name: value for name, value in names.items() if name not in modules}

    def reduce(self: _Module, protocol: Any) -> Any:
        return _rebuilt, (original, source, others, modules), self.__getstate__()

    attributes = {
        "forward": scope["forward"], "__reduce_ex__": reduce, "__module__": original.__module__,
        "__qualname__": original.__qualname__, "__doc__": original.__doc__, "_advdl_made": True,
    }  # fmt: skip
    made = type(original.__name__, (original,), attributes)
    _classes[original, source] = made
    return made


def _rebuilt(
    original: type[_Module], source: str, others: dict[str, Any], modules: dict[str, str]
) -> Any:
    imported = {name: importlib.import_module(module) for name, module in modules.items()}
    made = fused_class(original, source, {**others, **imported})
    return object.__new__(made)
