"""Whether the code of a forward without a graph may depend on the memory format of a tensor, from its byte code.

`memory_format.py` calls this. A forward with control flow on sizes has no graph, such as that of a U-Net that pads
features of other sizes. Its code is accepted if each instruction is known to write nothing but local variables, and
each name that it uses is known to be harmless. Anything unknown forbids channels_last, so a new version of Python can
only cost time.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

# Instructions of Python 3.10 to 3.14. Those for arithmetic in Python 3.10 (BINARY_ADD and others) are in _OPERATORS.
_STACK = {
    "CACHE", "COPY", "DUP_TOP", "DUP_TOP_TWO", "EXTENDED_ARG", "NOP", "POP_TOP", "PRECALL", "PUSH_NULL", "RESUME",
    "ROT_FOUR", "ROT_N", "ROT_THREE", "ROT_TWO", "SWAP",
}  # fmt: skip
_LOCALS_AND_CONSTANTS = {
    "DELETE_FAST", "LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT", "LOAD_CONST", "LOAD_FAST", "LOAD_FAST_BORROW",
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_FAST_LOAD_FAST", "LOAD_SMALL_INT", "STORE_FAST",
    "STORE_FAST_LOAD_FAST", "STORE_FAST_STORE_FAST", "UNPACK_EX", "UNPACK_SEQUENCE",
}  # fmt: skip
_JUMPS = {
    "END_FOR", "FOR_ITER", "GET_ITER", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_FORWARD", "JUMP_IF_FALSE_OR_POP",
    "JUMP_IF_TRUE_OR_POP", "NOT_TAKEN", "POP_ITER", "POP_JUMP_BACKWARD_IF_FALSE", "POP_JUMP_BACKWARD_IF_NONE",
    "POP_JUMP_BACKWARD_IF_NOT_NONE", "POP_JUMP_BACKWARD_IF_TRUE", "POP_JUMP_FORWARD_IF_FALSE",
    "POP_JUMP_FORWARD_IF_NONE", "POP_JUMP_FORWARD_IF_NOT_NONE", "POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_IF_FALSE",
    "POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE", "POP_JUMP_IF_TRUE", "RAISE_VARARGS", "RETURN_CONST", "RETURN_VALUE",
}  # fmt: skip
_OPERATORS = {
    "BINARY_ADD", "BINARY_AND", "BINARY_FLOOR_DIVIDE", "BINARY_LSHIFT", "BINARY_MATRIX_MULTIPLY", "BINARY_MODULO",
    "BINARY_MULTIPLY", "BINARY_OR", "BINARY_POWER", "BINARY_RSHIFT", "BINARY_SLICE", "BINARY_SUBSCR",
    "BINARY_SUBTRACT", "BINARY_TRUE_DIVIDE", "BINARY_XOR", "COMPARE_OP", "CONTAINS_OP", "IS_OP", "TO_BOOL",
    "UNARY_INVERT", "UNARY_NEGATIVE", "UNARY_NOT", "UNARY_POSITIVE",
}  # fmt: skip
_NEW_OBJECTS = {
    "BUILD_CONST_KEY_MAP", "BUILD_LIST", "BUILD_MAP", "BUILD_SET", "BUILD_SLICE", "BUILD_STRING", "BUILD_TUPLE",
    "CONVERT_VALUE", "FORMAT_SIMPLE", "FORMAT_VALUE", "FORMAT_WITH_SPEC", "LIST_EXTEND", "LIST_TO_TUPLE",
}  # fmt: skip
# Calls of what other instructions have loaded. Here the names of keyword arguments are a constant. CALL_FUNCTION_EX,
# for `f(*a, **k)`, is not included, because they may be anything there.
_CALLS = {"CALL", "CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_KW", "CALL_METHOD", "KW_NAMES"}
HARMLESS = _STACK | _LOCALS_AND_CONSTANTS | _JUMPS | _OPERATORS | _NEW_OBJECTS | _CALLS
# Instructions that are harmless with these arguments, by the names of `dis`.
HARMLESS_ARGUMENTS = {
    "BINARY_OP": {
        "+", "-", "*", "/", "//", "%", "**", "@", "&", "|", "^", "<<", ">>", "[]",  # not "+=" and similar
    },
    "CALL_INTRINSIC_1": {"INTRINSIC_LIST_TO_TUPLE", "INTRINSIC_UNARY_POSITIVE"},
}  # fmt: skip
# Instructions that are judged by the name that they load.
LOADS = {"LOAD_ATTR", "LOAD_GLOBAL", "LOAD_METHOD"}

_BUILTINS = {
    "abs", "bool", "enumerate", "float", "int", "len", "list", "max", "min", "range", "reversed", "round", "sum",
    "tuple", "zip",
}  # fmt: skip
_WRITING_KEYWORDS = {"inplace", "out"}
_MAY_WRITE = "it may write what it is given"


def why_format_may_matter(layer: torch.nn.Module, shows: Callable[[str], bool]) -> str | None:
    """Why the forward of ``layer`` may depend on a memory format; ``None`` if it does not.

    Args:
        layer: a module whose forward has no graph.
        shows: whether a function, method or attribute of this name depends on the memory format.
    """
    forward = type(layer).forward
    if "forward" in layer.__dict__ or not inspect.isfunction(forward):
        return "it was replaced"
    return next(_reasons(layer, forward, shows), None)


def why_not_harmless(opname: str, argument: str) -> str | None:
    """Why an instruction may do more than compute with local variables; ``None`` if it does not, apart from what it
    loads.

    Args:
        opname: its name in ``dis``.
        argument: ``argrepr`` of ``dis``.
    """
    if opname in HARMLESS or opname in LOADS or argument in HARMLESS_ARGUMENTS.get(opname, ()):
        return None
    if opname.startswith("INPLACE_") or opname == "BINARY_OP":
        return _MAY_WRITE
    return f"it does a {opname}"


def _reasons(layer: torch.nn.Module, forward: Any, shows: Callable[[str], bool]) -> Iterator[str]:
    constants = forward.__code__.co_consts
    for constant in constants:
        if isinstance(constant, CodeType):
            yield "it has functions of its own"
        if isinstance(constant, tuple) and not _WRITING_KEYWORDS.isdisjoint(constant):
            yield _MAY_WRITE
    for instruction in dis.get_instructions(forward):
        why = why_not_harmless(instruction.opname, instruction.argrepr)
        if why is not None:
            yield why
        name = instruction.argval
        if (
            instruction.opname in LOADS
            and _takes_inplace(name)
            and any(c is True for c in constants)
        ):
            yield _MAY_WRITE  # as F.relu(x, True) does
        if instruction.opname == "LOAD_GLOBAL":
            yield from _of_global(name, forward.__globals__, shows)
        elif instruction.opname in LOADS:
            yield from _of_attribute(name, layer, shows)


def _of_global(name: str, scope: dict[str, Any], shows: Callable[[str], bool]) -> Iterator[str]:
    value = scope.get(name, getattr(builtins, name, None))
    if isinstance(value, ModuleType):
        if value is not math and value.__name__.partition(".")[0] != "torch":
            yield f"it uses {name}"
    elif callable(value):
        own = getattr(value, "__name__", name)
        module = getattr(value, "__module__", None) or "torch"
        if module == "builtins":
            known = own in _BUILTINS
        else:
            known = (
                module.partition(".")[0] == "torch"
                and is_function(value)
                and not (shows(own) or own.endswith("_"))
            )
        if not known:
            yield f"it calls {name}"
    elif not isinstance(value, (bool, int, float, str, type(None))):
        yield f"it uses {name}"


def _of_attribute(name: str, layer: torch.nn.Module, shows: Callable[[str], bool]) -> Iterator[str]:
    if shows(name) or name.endswith("_"):
        yield f"it uses {name}"
    if name in layer._modules:
        return
    if any(hasattr(type(m), name) and not hasattr(torch.nn.Module, name) for m in layer.modules()):
        yield f"it may call its own {name}"
    if name in layer.__dict__:
        if not _is_plain(layer.__dict__[name]):
            yield f"it uses its {name}"
    elif not any(hasattr(of, name) for of in (torch.Tensor, torch, torch.nn.functional, math)) and (
        name not in layer._parameters and name not in layer._buffers and name != "nn"
    ):
        yield f"it uses {name}"


def _takes_inplace(name: str) -> bool:
    """Whether torch's function of this name takes an argument ``inplace``, perhaps by position."""
    code = getattr(getattr(torch.nn.functional, name, None), "__code__", None)
    return code is not None and "inplace" in code.co_varnames[: code.co_argcount]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def is_function(value: Any) -> bool:
    """Whether ``value`` is a plain function, and not a custom operator or autograd function in a module of torch."""
    if not isinstance(value, (FunctionType, BuiltinFunctionType)):
        return False
    module = getattr(value, "__module__", None) or "torch"
    return not module.startswith(("torch._ops", "torch._library", "torch.autograd", "torch.jit"))
