"""What a traced forward reads of its module and of the modules in it, and the guards that this is as it was.

`trace.py` runs the forward on copies of the modules whose classes record each read. A graph contains the values that
were read as constants. So it is valid only while the attributes have these values, and while the functions and methods
that were looked up are the same. The generated forwards call :func:`holds` and :func:`refers`.
"""

from __future__ import annotations

import functools
import keyword
import math
import zlib
from collections.abc import Callable, Iterable
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from .._watch import is_watched

_Module = torch.nn.Module
_Path = tuple[str, ...]

_RECORD = "_advdl_reads"
_MISSING = object()
# Torch's own attributes of a module. The mode is one that a forward may read.
_TORCHS = set(_Module().__dict__) - {"training"}


class Read(NamedTuple):
    """One attribute that the code has read.

    Attributes:
        path: names of the modules from the owner of the forward to the module that was read.
        name: of the attribute.
        value: its value, ``_MISSING`` if there was none.
    """

    path: _Path
    name: str
    value: Any

    def guard(self) -> str | None:
        """A Python expression over ``self`` that holds while the attribute is the same; ``None`` if there is none."""
        path, name, value = self
        if value is _MISSING:
            return f"lacks(self, {path}, {name!r})"
        text = identity_of(value)
        if text is not None:
            _KNOWN.setdefault(text, _function_of(value))
            return f"refers(self, {path}, {name!r}, {text!r})"
        if not is_plain(value):
            return None
        if path or not name.isidentifier() or keyword.iskeyword(name):
            return f"holds(self, {path}, {name!r}, {value!r})"
        if value is None:
            return f"self.{name} is None"
        # The type is compared too, because a parameter or an array may equal a number.
        return f"type(self.{name}) is {type(value).__name__} and self.{name} == {value!r}"


def guards_of(reads: Iterable[Read]) -> tuple[str, ...]:
    found = {read.guard() for read in reads}
    return tuple(sorted(guard for guard in found if guard is not None))


def record_reads(owner: _Module, copies: dict[int, _Module]) -> list[Read]:
    """Gives the copy of ``owner``, and of each module in it, a class that records reads in the returned list."""
    reads: list[Read] = []
    classes: dict[type, type] = {}
    for name, module in owner.named_modules(remove_duplicate=False):
        copied, path = copies[id(module)], tuple(name.split(".")) if name else ()
        kind = type(copied)
        if _RECORD in copied.__dict__:  # in a further place
            copied.__dict__[_RECORD][0].append(path)
            continue
        if kind not in classes:
            classes[kind] = _recording(kind)
        copied.__dict__[_RECORD] = [path], reads
        object.__setattr__(copied, "__class__", classes[kind])
    return reads


def _recording(kind: type) -> type:
    def record(module: Any, name: str, value: Any) -> Any:
        paths, reads = object.__getattribute__(module, "__dict__")[_RECORD]
        # The mode of the owner is a guard of its own.
        own = name in _TORCHS or hasattr(_Module, name) or (name == "training" and () in paths)
        if not own and not name.startswith("__"):
            reads.extend(Read(path, name, value) for path in paths)
        return value

    class Recording(kind):
        def __getattribute__(self, name: str) -> Any:
            return record(self, name, super().__getattribute__(name))

        def __getattr__(self, name: str) -> Any:
            try:
                return record(self, name, super().__getattr__(name))
            except AttributeError:
                record(self, name, _MISSING)
                raise

    Recording.__name__, Recording.__qualname__ = kind.__name__, kind.__qualname__
    return Recording


def is_plain(value: Any) -> bool:
    """Whether the value's ``repr`` is source code for it."""
    if type(value) is float:
        return math.isfinite(value)
    if type(value) in (tuple, list):
        return all(is_plain(item) for item in value)
    if type(value) is dict:
        return all(is_plain(item) for pair in value.items() for item in pair)
    return value is None or type(value) in (bool, int, str)


def identity_of(value: Any) -> str | None:
    """A text that tells a function, a method or a class from others, also in another process; ``None`` for the rest."""
    if isinstance(value, MethodType):
        value = value.__func__
        if (getattr(value, "__module__", None) or "").startswith("torch.nn.modules."):
            return None  # how a container finds its modules
    if isinstance(value, functools.partial):
        return f"partial of {identity_of(value.func)} {value.args} {value.keywords}"
    if isinstance(value, (BuiltinFunctionType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return _identity_of_function(value) if isinstance(value, FunctionType) else None


@functools.lru_cache(maxsize=4096)
def _identity_of_function(function: FunctionType) -> str:
    text = f"{function.__module__}.{function.__qualname__}"
    if "<" not in function.__qualname__:
        return text
    # Lambdas and functions within functions share their names: by what they do, and what they have around them.
    cells = (_content_of(cell) for cell in function.__closure__ or ())
    around = [
        value.__qualname__
        if isinstance(value, FunctionType)
        else repr(value)
        if is_plain(value)
        else ""
        for value in cells
    ]
    return f"{text} {_checksum_of(function.__code__)} {around}"


def _content_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _checksum_of(code: CodeType) -> int:
    parts = [
        _checksum_of(c) if isinstance(c, CodeType) else repr(c)
        for c in (*code.co_consts, *code.co_names)
    ]
    return zlib.crc32(code.co_code + repr(parts).encode())


# Functions by their text, for a compiler.
_KNOWN: dict[str, Any] = {}


def _function_of(value: Any) -> Any:
    return value.__func__ if isinstance(value, MethodType) else value


# ---- what generated forwards call ----


def _value_at(module: Any, path: _Path, name: str) -> Any:
    for key in path:
        module = module._modules.get(key)
        if module is None:
            return _MISSING
    return getattr(module, name, _MISSING)


def holds(module: _Module, path: _Path, name: str, value: Any) -> bool:
    """Whether the attribute of the module at ``path`` has this value and its type."""
    found = _value_at(module, path, name)
    return type(found) is type(value) and found == value


def refers(module: _Module, path: _Path, name: str, text: str) -> bool:
    """Whether the attribute of the module at ``path`` is the function of which :func:`identity_of` gave this text."""
    found = _value_at(module, path, name)
    if is_compiling():  # which cannot trace how a function is identified
        return _function_of(found) is _KNOWN.get(text, _MISSING)
    same = identity_of(found) == text
    if same:
        _KNOWN.setdefault(text, _function_of(found))
    return same


def lacks(module: _Module, path: _Path, name: str) -> bool:
    """Whether the module at ``path`` has no such attribute."""
    return _value_at(module, path, name) is _MISSING


_DROPOUTS = torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.Dropout3d


def passes(module: _Module, path: _Path) -> bool:
    """Whether the module at ``path`` returns what it is given, and nobody watches it."""
    found: Any = module
    for key in path:
        found = found._modules.get(key)
        if found is None:
            return False
    idle = type(found) is torch.nn.Identity or (type(found) in _DROPOUTS and found.p == 0)
    return idle and not is_watched(found)


CALLED: dict[str, Callable[..., bool]] = {
    "holds": holds, "lacks": lacks, "passes": passes, "refers": refers,
}  # fmt: skip
