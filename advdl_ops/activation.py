"""The activations that the fused ops apply: names, parameters, and the ways to specify them."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Activation", "resolve_activation"]


class Activation(NamedTuple):
    """An activation in the form that the operators take.

    Attributes:
        name: one of :data:`ACTIVATIONS`.
        code: its number in the kernels (``csrc/common/tensor_types.h``).
        param: ``negative_slope`` of leaky_relu, ``alpha`` of elu, else 0.
    """

    name: str
    code: int
    param: float = 0.0


IDENTITY = Activation("identity", 0)

# Values are part of the operator schema, see csrc/common/tensor_types.h: append only.
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation("relu", 1),
    "leaky_relu": Activation("leaky_relu", 2, 0.01),
    "elu": Activation("elu", 3, 1.0),
    "silu": Activation("silu", 4),
    "gelu": Activation("gelu", 5),
    "gelu_tanh": Activation("gelu_tanh", 6),
    "sigmoid": Activation("sigmoid", 7),
    "tanh": Activation("tanh", 8),
    "hardswish": Activation("hardswish", 9),
    "relu6": Activation("relu6", 10),
}

_BY_CODE = {a.code: a for a in (IDENTITY, *ACTIVATIONS.values())}


def activation_of(code: int, param: float) -> Activation:
    """The activation for the two numbers that an operator takes."""
    found = _BY_CODE[code]
    return found if found.param == param else found._replace(param=param)


_MODULES: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
    torch.nn.Hardswish: "hardswish",
    torch.nn.ReLU6: "relu6",
}
# timm's own classes, which take `inplace` where torch's do not. They are found by name, as timm is not imported.
_TIMM = {
    f"timm.layers.activations{kind}": name
    for kind, name in {
        ".Swish": "silu",
        ".Sigmoid": "sigmoid",
        ".Tanh": "tanh",
        ".HardSwish": "hardswish",
        ".GELU": "gelu",
        ".GELUTanh": "gelu_tanh",
        "_me.SwishMe": "silu",
        "_me.HardSwishMe": "hardswish",
    }.items()
}


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def resolve_activation(function: str, act: str | Activation | torch.nn.Module | None) -> Activation:
    """The :class:`Activation` meant by ``act``.

    Args:
        function: name of the caller, for the error.
        act: ``None``, a name of :data:`ACTIVATIONS`, an :class:`Activation`, or a ``torch.nn`` module
            (``ReLU``, ``LeakyReLU``, ``ELU``, ``SiLU``, ``GELU``, ``Sigmoid``, ``Tanh``, ``Hardswish``, ``ReLU6``,
            ``Identity``).

    Raises:
        ValueError: an unknown name.
        TypeError: an object that is none of the above; a subclass of those modules may compute
            something else and is refused too.
    """
    if act is None:
        return IDENTITY
    if isinstance(act, str):
        found = ACTIVATIONS.get(act)
        if found is None:
            raise ValueError(
                f"{function}: act ({act!r}) must be None, one of {', '.join(ACTIVATIONS)}, "
                "or the matching torch.nn module"
            )
        return found
    if isinstance(act, Activation):
        return act
    kind = type(act)
    name = _MODULES.get(kind) or _TIMM.get(qualified_name(kind))
    if name is not None:
        return ACTIVATIONS[name]
    if kind is torch.nn.Identity:
        return IDENTITY
    if kind is torch.nn.LeakyReLU:
        return ACTIVATIONS["leaky_relu"]._replace(
            param=float(act.negative_slope)  # type: ignore[arg-type]
        )
    if kind is torch.nn.ELU:
        return ACTIVATIONS["elu"]._replace(
            param=float(act.alpha)  # type: ignore[arg-type]
        )
    if kind is torch.nn.GELU:
        return ACTIVATIONS["gelu_tanh" if act.approximate == "tanh" else "gelu"]
    raise TypeError(
        f"{function}: act ({kind.__name__}) must be None, a name ({', '.join(ACTIVATIONS)}) "
        "or the matching torch.nn module"
    )


def act_repr(act: str | Activation | torch.nn.Module | None) -> str:
    """The end of a module's ``extra_repr``. ``act`` may have any form that :func:`resolve_activation` takes."""
    try:
        name = resolve_activation("act", act).name
    except TypeError:  # a module that is called
        name = type(act).__name__
    return "" if name == "identity" else f", act={name!r}"
