"""Whether a model may run in channels_last inside, where its convolutions are faster, and the call that does so.

`convert.py` calls :func:`plan_channels_last`; a model's new forward calls :func:`in_fast_format` or
:func:`evaluated_in_fast_format`. `advdl_ops/_memory_format.py` decides when it is faster, as for the zoo.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .._memory_format import in_channels_last, runs_in_channels_last
from .._stock_faults import layer_may_fail
from .._watch import has_hooks
from ..nn.run_as_one import CONVOLUTIONS
from .aliasing import NEW_RESULTS, effect_of, writes, written_by
from .bytecode import is_function, why_format_may_matter
from .plan import LayerPlan, Plan
from .trace import has_graph_for, has_optional_arguments, is_torchs

# Methods and attributes that show, or depend on, the memory format of a tensor.
_METHODS = {
    "as_strided", "data_ptr", "is_contiguous", "numpy", "resize_", "set_", "storage", "storage_offset",
    "stride", "untyped_storage", "view", "view_as", "view_as_complex",
}  # fmt: skip
_ATTRIBUTES = {"data", "layout", "H", "T", "mH", "mT"}
_PACKAGES = {"torch", "advdl_ops", "operator", "_operator", "builtins", "math"}
# Functions outside of torch that are traced as one call.
_FUNCTIONS = {"torchvision.ops.stochastic_depth"}

# Torch's functions that draw a random number for each element, in memory order. `_watch.py` knows its layers.
_RANDOM = {"alpha_dropout", "dropout", "feature_alpha_dropout", "gumbel_softmax", "rrelu"}


def _is_random(name: str) -> bool:
    """Whether torch's function or method of this name draws random numbers, for elements or otherwise."""
    if name in _RANDOM:
        return True
    # The namespace also has attributes that are not operators, such as `name`.
    packet = getattr(torch.ops.aten, name, None)
    return isinstance(packet, torch._ops.OpOverloadPacket) and any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags
        for overload in packet.overloads()
    )


def plan_channels_last(plan: Plan) -> None:
    """Fills in when the model will run in channels_last inside, and a note with that or why it will not.

    Must run before `fuse.py` rewrites the graphs, because its calls are not known here.
    """
    convolves = any(
        layer.counterpart is not None and issubclass(layer.counterpart.layer, CONVOLUTIONS)
        for layer in plan
    )
    if plan[plan.model].counterpart is not None or not convolves:
        return
    told = "channels_last on CPU, whatever it is given"
    why = _why_never(plan)
    if why is None and _draws(plan, "not self.training"):
        why = "it draws random numbers"
    if why is not None:
        plan[plan.model].notes.append(f"not in {told}: {why}")
        return
    plan.channels_last = "always"
    if _draws(plan, "self.training"):
        plan.channels_last = "in evaluation"
        told += ", in evaluation: it draws random numbers"
    plan[plan.model].notes.append(told)


def _why_never(plan: Plan) -> str | None:
    """Why the model may not run in channels_last if its input is contiguous; ``None`` if it may."""
    for layer in plan:
        module = layer.module
        why = None
        if has_hooks(module):
            why = "it has hooks"
        elif layer.counterpart is None and layer_may_fail(module):
            why = "torch computes the gradient of its weight wrongly in channels_last"
        elif layer.counterpart is None and (layer.graphs or not _is_plainly_torchs(module)):
            why = _why_not(plan, layer) or _why_not_called(plan, module)
        if why is not None:
            return f"{layer.name}: {why}" if layer.name else why
    # In channels_last the model would write a copy of its input.
    return "it may write what it is given" if effect_of(plan, plan.model).writes else None


def _is_plainly_torchs(layer: torch.nn.Module) -> bool:
    """Whether the layer's forward, and every method that it may call, is torch's."""
    if not is_torchs(layer):
        return False
    own = itertools.takewhile(
        lambda kind: not kind.__module__.startswith("torch."), type(layer).__mro__
    )
    known = {"__init__", "extra_repr", "reset_parameters"}
    return all(not callable(v) or name in known for kind in own for name, v in vars(kind).items())


def _why_not(plan: Plan, layer: LayerPlan) -> str | None:
    """Why a module's own code forbids channels_last; ``None`` if it does not."""
    if not layer.graphs:
        why = why_format_may_matter(layer.module, _shows)
        return why if why is None else f"its forward has no graph, and {why}"
    for variant in layer.graphs:
        # Nodes whose value is a view or a copy of another one, depending on the memory format.
        either: set[fx.Node] = set()
        for node in variant.graph.nodes:
            if node.op == "call_method" and node.target in _METHODS:
                return f"it calls {node.target}"
            if node.op == "call_function" and not _is_indifferent(node):
                return f"it calls {getattr(node.target, '__name__', node.target)}"
            if _strides(node) and not isinstance(layer.module, _CONVOLUTIONS):
                return "it calls a convolution with a stride, of which torch computes some wrongly in channels_last"
            if any(isinstance(a, torch.memory_format) for a in (*node.args, *node.kwargs.values())):
                return "it names a memory format"
            if writes(plan, node, layer.module) and written_by(node) in either:
                return "it writes what may be a view or a copy"
            of_either = not either.isdisjoint(node.all_input_nodes)
            made = _makes_either(plan, node, layer.module) and not _takes_over(
                plan, node, layer.module
            )
            if made or (of_either and node.target not in NEW_RESULTS):
                either.add(node)
    return None


def _why_not_called(plan: Plan, owner: torch.nn.Module) -> str | None:
    """Why a call in ``owner``'s code without a matching graph of the called module forbids channels_last."""
    traced = [module for module in owner.modules() if plan[module].graphs]
    if plan[owner].graphs:
        calls = [n for v in plan[owner].graphs for n in v.graph.nodes if n.op == "call_module"]
        nodes = [(owner.get_submodule(str(node.target)), node) for node in calls]
        called = [
            module
            for module, node in nodes
            if module in traced
            and not has_graph_for(module, plan[module].graphs, node.args, node.kwargs)
        ]
    else:  # it may call any of them in any way
        called = [module for module in traced if has_optional_arguments(module)]
    for module in called:
        why = why_format_may_matter(module, _shows)
        if why is not None:
            return f"it calls {plan[module].name} in a way that has no graph, and there {why}"
    return None


# Layers that are judged by their class, not by what their forward calls.
_CONVOLUTIONS = torch.nn.Conv2d, torch.nn.ConvTranspose2d
# Functions, and the position of the stride among their arguments.
_CONVOLVES: dict[Any, int] = {torch.conv2d: 3, torch.conv_transpose2d: 3}


def _strides(node: fx.Node) -> bool:
    """Whether it calls one of torch's convolutions with a stride above 1, or one that is known only at run time."""
    place = _CONVOLVES.get(node.target)
    if node.op != "call_function" or place is None:
        return False
    stride = node.kwargs.get("stride", node.args[place] if len(node.args) > place else 1)
    return stride not in (1, (1,), (1, 1), [1], [1, 1])


def _takes_over(plan: Plan, node: fx.Node, owner: torch.nn.Module) -> bool:
    """Whether nothing else reads the memory of its input. Then it does not matter whether the result is a view."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if len(source.users) != 1:
        return False
    if source.op == "call_module":
        return not effect_of(plan, owner.get_submodule(str(source.target))).returns
    return source.target in NEW_RESULTS


def _makes_either(plan: Plan, node: fx.Node, owner: torch.nn.Module) -> bool:
    """Whether its result is a view or a copy, depending on the memory format."""
    if node.op != "call_module":
        return node.target in _VIEW_OR_COPY
    return any(
        isinstance(layer, (torch.nn.Flatten, torch.nn.Unflatten))
        or any(n.target in _VIEW_OR_COPY for v in plan[layer].graphs for n in v.graph.nodes)
        for layer in owner.get_submodule(str(node.target)).modules()
    )


_VIEW_OR_COPY = {
    torch.flatten, torch.reshape, torch.ravel, "flatten", "reshape", "reshape_as", "ravel", "contiguous",
}  # fmt: skip


# Names in code that has no graph.
_SHOWING = (
    _METHODS
    | _ATTRIBUTES
    | {v for v in _VIEW_OR_COPY if isinstance(v, str)}
    | {"channels_last", "contiguous_format", "memory_format", "preserve_format"}
)


def _shows(name: str) -> bool:
    return name in _SHOWING or _is_random(name)


def _is_indifferent(node: fx.Node) -> bool:
    function: Any = node.target
    if function is builtins.getattr:
        return node.args[1] not in _ATTRIBUTES
    if isinstance(function, type):
        return issubclass(function, (tuple, dict))
    module = getattr(function, "__module__", None) or "torch"
    if module in _FUNCTIONS:
        return True
    return (
        module.partition(".")[0] in _PACKAGES
        and is_function(function)
        and getattr(function, "__name__", "") not in _METHODS
    )


def _draws(plan: Plan, mode: str) -> bool:
    """Whether a forward draws random numbers for the elements of a tensor, in memory order.

    Args:
        mode: the guard of this mode, ``"self.training"`` or ``"not self.training"``.
    """
    other = {"self.training": "not self.training", "not self.training": "self.training"}[mode]
    return any(
        node.op in ("call_function", "call_method")
        and _is_random(getattr(node.target, "__name__", node.target))
        # Dropout with training=False draws nothing.
        and not ("dropout" in str(node.target) and _training(node) is False)
        for layer in plan
        for variant in layer.graphs
        if other not in variant.guards
        for node in variant.graph.nodes
    )


def _training(node: fx.Node) -> Any:
    return node.kwargs.get("training", node.args[2] if len(node.args) > 2 else None)


def in_fast_format(
    model: torch.nn.Module, call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """``call(model, ...)`` with images in channels_last if that is faster.

    Returns:
        What the call returns. If an image was converted, the returned tensors are made contiguous, and a returned input
        is the original one.
    """
    given: dict[int, Tensor] = {}  # by the id of the converted tensor

    def convert(value: Any) -> Any:
        if not _is_contiguous_image(value) or not runs_in_channels_last(model, value):
            return value
        converted = in_channels_last(value)
        given[id(converted)] = value
        return converted

    args = [convert(value) for value in args]
    kwargs = {name: convert(value) for name, value in kwargs.items()}
    out = call(model, *args, **kwargs)
    if not given:
        return out

    def restore(value: Tensor) -> Tensor:
        return given[id(value)] if id(value) in given else value.contiguous()

    return pytree.tree_map_only(Tensor, restore, out)


def evaluated_in_fast_format(
    model: torch.nn.Module, call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]
) -> Any:
    """As :func:`in_fast_format` in evaluation of the whole model, else ``call(model, ...)`` without conversion."""
    if any(module.training for module in model.modules()):
        return call(model, *args, **kwargs)
    return in_fast_format(model, call, args, kwargs)


def _is_contiguous_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and value.is_contiguous()
