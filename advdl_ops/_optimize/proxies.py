"""The ``torch.fx`` tracer and the proxies with which `trace.py` records one forward.

A proxy stands for a tensor, but is not an instance of it. :func:`with_own_isinstance` still lets the traced forward
call ``isinstance`` on a proxy. If any other code does so, the trace fails.
"""

from __future__ import annotations

import dis
import operator
import sys
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx

_ASKS = "it asks what something is"


class Untraceable(Exception):
    """Why a forward has no graph. ``explain`` shows the text.

    Attributes:
        asked: whether the code checked the type of an argument.
    """

    asked = False


class OwnCodeTracer(fx.Tracer):
    """Records the code of one forward, with each submodule as a single call.

    Args:
        tensors: whether an argument counts as a tensor if the code checks its type.

    Attributes:
        asked: whether the code did check one.
    """

    proxy_buffer_attributes = True  # otherwise a write to a buffer would be done and not recorded

    def __init__(self, tensors: bool) -> None:
        super().__init__()
        self.tensors = tensors
        self.asked = False
        self.modes: tuple[Any, ...] = ()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if current_modes() != self.modes:  # a graph does not record contexts
            raise Untraceable("it switches gradients or autocast, or checkpoints")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_instance(self, value: fx.Proxy, kinds: Any) -> bool:
        """What ``isinstance`` would return for the value that the proxy stands for.

        Raises:
            Untraceable: that is not known.
        """
        if value.node.op != "placeholder":
            raise Untraceable(_ASKS)
        self.asked = True
        if self.tensors:
            return issubclass(Tensor, kinds)
        if kinds is not Tensor:  # it is not a tensor, but its type is unknown
            raise Untraceable(_ASKS)
        return False


def current_modes() -> tuple[Any, ...]:
    """The contexts of torch that change what an operator does."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _Proxy(fx.Proxy):
    """Records ``x += y`` differently from ``x = x + y``, and refuses what a graph cannot contain."""

    _FIELDS = frozenset({"tracer", "node"})

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The proxy's own class, which torch must see.

        Python reads this attribute for ``isinstance``, so the calling frame shows who calls that.
        """
        return _class_for(self, sys._getframe(1))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._FIELDS:
            raise Untraceable(f"it assigns {name} of a tensor")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ("get", "items", "keys", "pop", "values"):
            raise Untraceable("it takes a dict apart")
        return _Attribute(self, name)

    def __iter__(self) -> Any:
        # An item of an argument may be None, which a proxy is not.
        if self.node.op == "placeholder":
            raise Untraceable("it takes an argument apart")
        return super().__iter__()


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a proxy, or a method that is about to be called."""

    _FIELDS = frozenset({"tracer", "root", "attr", "_node"})
    # Not the method above, because fx inspects the code that calls it.
    __iter__ = fx.Proxy.__iter__


def _record_in_place(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


_AUGMENTED = {
    name: getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
}  # fmt: skip
for _name, _function in _AUGMENTED.items():
    setattr(_Proxy, f"__{_name}__", _record_in_place(_function))
IN_PLACE_OPERATORS = set(_AUGMENTED.values())


# ---- isinstance ----


def with_own_isinstance(forward: Callable[..., Any], tracer: OwnCodeTracer) -> Callable[..., Any]:
    """A copy of ``forward`` whose ``isinstance`` asks ``tracer`` about proxies. Everything else it uses is unchanged.

    Nothing is replaced in the process: the copy has its own globals, which contain the other ``isinstance``.
    """
    assert isinstance(forward, FunctionType)

    def answered(value: Any, kinds: Any) -> bool:
        if issubclass(type(value), fx.Proxy):
            return tracer.is_instance(value, kinds)
        return isinstance(value, kinds)

    answered.__dict__[_MARK] = True

    def call(*args: Any, **kwargs: Any) -> Any:
        # Copied at the call, when fx has put its wrappers into the globals.
        before = dict(forward.__globals__)
        own = FunctionType(
            forward.__code__,
            {"isinstance": answered, **before},
            forward.__name__,
            forward.__defaults__,
            forward.__closure__,
        )
        own.__kwdefaults__ = forward.__kwdefaults__
        returned = own(*args, **kwargs)
        for name in names_in(forward.__code__):
            if before.get(name) is not forward.__globals__.get(name):
                raise Untraceable(f"the global {name} changes while it runs")
        return returned

    return call


_MARK = "_advdl_answers"


def names_in(code: CodeType) -> set[str]:
    """The globals and attributes that the code uses, also in functions that it defines."""
    inner = (names_in(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inner)


def _is_own_code(frame: FrameType | None) -> bool:
    """Whether the frame runs the copy that :func:`with_own_isinstance` made, or a function defined in it."""
    answer = None if frame is None else frame.f_globals.get("isinstance")
    return _MARK in getattr(answer, "__dict__", ())


def _class_for(value: _Proxy, frame: FrameType) -> type:
    """The class of a proxy as the code in ``frame`` sees it.

    If C++ code reads it, the frame is that of its Python caller. The names in the frame's code distinguish this from
    ``isinstance``.

    Raises:
        Untraceable: Python code outside of torch and of the traced forward checks the type.
    """
    asker: FrameType | None = frame
    while asker is not None and asker.f_code.co_name == "__instancecheck__":
        asker = asker.f_back  # the code that used an abstract class
    assert asker is not None
    through_torch = asker.f_code is torch.is_tensor.__code__
    if through_torch:
        assert asker.f_back is not None
        asker = asker.f_back
    code, module = asker.f_code, asker.f_globals.get("__name__", "")
    trusted = module.partition(".")[0] == "torch" or module.rpartition(".")[0] == __package__
    if through_torch and (trusted or _is_own_code(asker)):
        tracer = value.tracer
        assert isinstance(tracer, OwnCodeTracer)
        return Tensor if tracer.is_instance(value, Tensor) else type(value)
    if trusted:
        return type(value)
    names = {"__class__"} if _is_own_code(asker) else {"__class__", "isinstance"}
    matches = dis.opname[code.co_code[asker.f_lasti]] == "MATCH_CLASS"
    if through_torch or matches or not names.isdisjoint(code.co_names):
        raise Untraceable(_ASKS)
    return type(value)
