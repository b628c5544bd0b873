"""The bytes that a forward pass leaves held for backward, module by module, counted without running it.

A copy of the model runs on fake tensors, which have sizes and no data. A dispatch mode meets each storage that an
operator allocates, with the module that runs, and keeps a weak reference to it. The storages that are alive after the
forward are those that autograd, recipes or the output hold, whatever way they hold them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._optimize.copies import copy_without_hooks
from ..backend import by_torchs_operators
from ..nn import BatchNormAct2d
from .models import Levels, set_lean
from .recipes import Kind, Recipe, telling

_Module = torch.nn.Module


class Work(NamedTuple):
    """What backward does to make tensors again: ``bytes`` read and written, and ``flops`` of products."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Count:
    """What one forward pass leaves.

    Attributes:
        held: bytes by the name of the module that made them, without those of the modules in it.
        work: what backward does to make tensors again, in the same way.
        order: the names of all modules that ran, by their first call.
        reads: the module that made a tensor, and another one that read it.
    """

    held: dict[str, int]
    work: dict[str, Work]
    order: tuple[str, ...]
    reads: frozenset[tuple[str, str]]

    @property
    def total(self) -> int:
        return sum(self.held.values())


class Counting:
    """A copy of a model, and its input, on fake tensors: :meth:`count` counts it at any level.

    Args:
        model: not changed. Its hooks do not run.
        args: of its forward; tensors may be nested in tuples, lists and dicts. Tensors on the meta device, of the model
            too, are counted as on the CPU.
        caller: what error messages begin with.
    """

    def __init__(self, model: _Module, args: tuple[Any, ...], caller: str) -> None:
        self.caller = caller
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes: dict[int, Any] = {}
        for t in (*model.parameters(), *model.buffers()):
            fakes[id(t)] = self._fake(t)
        self._given = [StorageWeakRef(t.untyped_storage()) for t in fakes.values()]
        self.model = copy_without_hooks(model, fakes)
        self._args = pytree.tree_map_only(Tensor, self._fake, args)
        for t in pytree.tree_leaves(self._args):
            if isinstance(t, Tensor):
                self._given.append(StorageWeakRef(t.untyped_storage()))
        self._running: list[str] = []
        self._order: dict[str, None] = {}
        for name, layer in self.model.named_modules():
            # What torch calls in place of the module's own call, after `Module.compile`. No hook, which would be seen.
            layer.__dict__["_compiled_call_impl"] = functools.partial(self._call, name, layer)
            if isinstance(layer, BatchNormAct2d):
                layer.process_group = None  # keeps the same, and asks no other process

    def count(self, lean: Levels) -> Count:
        """The count of the model at these levels."""
        set_lean(self.model, lean, caller=self.caller)
        return self._count()

    def count_stock(self) -> Count:
        """The count of the same model, computed by torch's own operators one after another."""
        set_lean(self.model, None)
        with by_torchs_operators():
            return self._count()

    def _count(self) -> Count:
        self._order.clear()
        torch.clear_autocast_cache()  # of an autocast around: weights that the count before has cast
        storages = _Storages(self._running, self._given)
        recipes: list[tuple[str, weakref.ref[Recipe], Work]] = []

        def offered(recipe: Recipe, out: Tensor, sources: tuple[Tensor | None, ...]) -> None:
            read = [t for t in sources if t is not None]
            flops = 0
            if recipe.kind is Kind.PRODUCT:
                weight = read[1]
                flops = 2 * out.numel() * weight[0].numel()
            work = Work(sum(t.nbytes for t in (out, *read)), flops)
            recipes.append((self._running[-1], weakref.ref(recipe), work))

        with _without_collection(), _same_random_numbers():
            try:
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    self._mode,
                    storages,
                    telling(offered),
                ):
                    output = self.model(*self._args)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise RuntimeError(
                    f"{self.caller}: model must compute the same operators for all values of its input: {error}"
                ) from error
            finally:
                self._running.clear()
            gc.collect(0)  # the cycles of this forward
            held = storages.alive()
            work: dict[str, Work] = {}
            for name, recipe, of in recipes:
                if recipe() is not None:
                    before = work.get(name, Work(0, 0))
                    work[name] = Work(before.bytes + of.bytes, before.flops + of.flops)
            del output
        return Count(held, work, tuple(self._order), frozenset(storages.reads))

    def _call(self, name: str, layer: _Module, *args: Any, **kwargs: Any) -> Any:
        self._order[name] = None
        self._running.append(name)
        try:
            return layer._call_impl(*args, **kwargs)
        finally:
            self._running.pop()

    def _fake(self, t: Tensor) -> Tensor:
        if not t.is_meta:
            return self._mode.from_tensor(
                t if t.is_leaf else t.detach().requires_grad_(), static_shapes=True
            )
        with self._mode:
            made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")
        if isinstance(t, torch.nn.Parameter):
            return torch.nn.Parameter(made, t.requires_grad)
        return made.requires_grad_(t.requires_grad)


def checked_arguments(model: Any, input: Any, caller: str) -> tuple[Any, ...]:
    """The arguments of the model's forward.

    Raises:
        TypeError: ``model`` is not a module, ``input`` neither a tensor nor a tuple.
        ValueError: a compiler runs the model, or a part of it was made by ``torch.fx`` or ``torch.jit``.
    """
    if not isinstance(model, _Module):
        raise TypeError(f"{caller}: model ({type(model).__name__}) must be a torch.nn.Module")
    if not isinstance(input, (Tensor, tuple)):
        raise TypeError(
            f"{caller}: input ({type(input).__name__}) must be a Tensor, or a tuple of the arguments of model"
        )
    for layer in model.modules():
        if "_orig_mod" in layer._modules or layer._compiled_call_impl is not None:
            raise ValueError(
                f"{caller}: model must not be compiled, because a compiler decides by itself what it keeps"
            )
        if isinstance(layer, (torch.fx.GraphModule, torch.jit.ScriptModule)):
            raise ValueError(
                f"{caller}: model must have no {type(layer).__name__}: a copy of it, which is counted, would not run "
                "the same operators"
            )
    return input if isinstance(input, tuple) else (input,)


class _Storages(TorchDispatchMode):
    """Notes each storage that an operator allocates, and the module that runs."""

    def __init__(self, running: list[str], given: list[StorageWeakRef]) -> None:
        super().__init__()
        self.running = running
        # By address, which is not used again as long as there is a weak reference.
        self.known = {ref.cdata: ref for ref in given}
        self.made: list[tuple[str, int, StorageWeakRef]] = []
        self.makers: dict[int, str] = {}
        self.reads: set[tuple[str, str]] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        running = self.running[-1]
        for t in pytree.arg_tree_leaves(*args, **kwargs):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                maker = self.makers.get(StorageWeakRef(t.untyped_storage()).cdata, running)
                if maker != running:
                    self.reads.add((maker, running))
        out = func(*args, **kwargs)
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in self.known:
                    self.known[ref.cdata] = ref
                    self.makers[ref.cdata] = running
                    self.made.append((running, _allocated(t, storage.nbytes()), ref))
        return out

    def alive(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for name, size, ref in self.made:
            if not ref.expired():
                found[name] += size
        return dict(found)


def _allocated(t: Tensor, size: int) -> int:
    """What the allocator of the device counts for a storage of ``size`` bytes."""
    return -(-size // 512) * 512 if t.is_cuda else size


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """So that what a forward makes stays in the youngest generation, which is collected in no time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _same_random_numbers() -> contextlib.AbstractContextManager[None]:
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    return torch.random.fork_rng(gpus)
