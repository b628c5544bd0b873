"""Lean training: of the tensors that backward needs, keep those that are costly to compute, and make the others again.

Stock PyTorch keeps the output of each convolution, for the norm's backward, and the output of each activation, for the
next convolution's. The second is one pass over the first. While a model runs inside of :func:`saving`, the operators
that make such tensors leave a *recipe* (:func:`offer`): a function, and the tensors that it needs. If autograd saves a
tensor that has a recipe, it keeps the recipe, whatever operator saves it. Backward makes the tensor again, once for all
who saved it, by the kernel that made it first. All kernels of this package are deterministic, so the gradients are
those of a training that keeps everything, to the last bit.

Recomputation instead of memory: Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174; for
norm and activation: Rota Bulo et al. 2018, In-Place Activated BatchNorm, arXiv:1712.02616.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..backend import is_distributed, is_exported, needs_grad, transformed

LEVELS = ("block", "stage", "deep", "deepest")


class Kind(Enum):
    """What a recipe makes again; its value: the levels that do."""

    # One pass over tensors that are kept in any case.
    PASS = frozenset(LEVELS)
    # The output of a residual block: needs that of the block before.
    SUM = frozenset({"stage", "deepest"})
    # A convolution of 1x1 that has more outputs than inputs.
    PRODUCT = frozenset({"deep", "deepest"})


# A tensor that is kept, and its version, as autograd's own saved tensors know it. It is a tuple because every saved
# tensor makes one: an object costs three times as much.
Kept = tuple[Tensor, int]


def kept(t: Tensor) -> Kept:
    # Detached, because an operator's own output would hold the operator alive, and with it itself.
    return (t if t.is_leaf else t.detach(), t._version)


def _get(source: Any) -> Any:
    """The tensor of a :data:`Kept` or of a :class:`Recipe`; ``None`` of ``None``."""
    if type(source) is tuple:
        t, version = source
        if t._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{t.type()} {list(t.shape)}] is at version {t._version}; expected version {version} instead"
            )
        return t
    return source and source.get()


class Recipe:
    """How to make a tensor again.

    Args:
        kind: what it is.
        function: called with the sources, without gradients.
        sources: what it needs.
        like: the tensor; it is not kept.
    """

    __slots__ = (
        "__weakref__",
        "done",
        "function",
        "kind",
        "made",
        "of",
        "readers",
        "sources",
        "version",
    )

    def __init__(
        self,
        kind: Kind,
        function: Callable[..., Tensor],
        sources: tuple[Kept | Recipe | None, ...],
        like: Tensor,
    ) -> None:
        self.kind, self.function, self.sources = kind, function, sources
        self.of = weakref.ref(like)
        self.version = like._version
        # Those who will ask for the tensor, and those who did since it was made.
        self.readers = self.done = 0
        self.made: Tensor | None = None

    def add_reader(self) -> None:
        """Tells of one more who will ask for the tensor. With the first one, this recipe asks for its sources."""
        self.readers += 1
        if self.readers == 1:
            for source in self.sources:
                if type(source) is Recipe:
                    source.add_reader()

    def get(self) -> Tensor:
        """The tensor. It is held until all its readers have asked for it."""
        made = self.made
        if made is None:
            # A backward may run under another autocast than the forward.
            if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
                with torch.no_grad(), torch._C._DisableAutocast():
                    made = self._make()
            else:
                made = self._make()
        self.done += 1
        if self.done >= self.readers:
            self.made, self.done = None, 0
        return made

    def _make(self) -> Tensor:
        # Not by recursion: a stage may have hundreds of blocks, each of which needs the one before.
        waiting = [self]
        while waiting:
            recipe = waiting[-1]
            missing = [s for s in recipe.sources if type(s) is Recipe and s.made is None]
            if missing:
                waiting += missing
                continue
            waiting.pop()
            if recipe.made is None:
                recipe.made = recipe.function(*map(_get, recipe.sources))
        assert self.made is not None
        return self.made


class _Saving:
    """A forward pass in :func:`saving`: its level, and the recipes of the tensors that it has made so far."""

    def __init__(self, level: str | None) -> None:
        self.level = level
        # By id of the tensor, which the recipe refers to weakly.
        self.recipes: dict[int, Recipe] = {}

    def recipe_of(self, t: Tensor) -> Recipe | None:
        recipe = self.recipes.get(id(t))
        if recipe is None or recipe.of() is not t or recipe.version != t._version:
            return None
        return recipe

    def source(self, t: Tensor | None) -> Kept | Recipe | None:
        if t is None:
            return None
        if t.dim() == 1 and is_distributed():
            # A sharded parameter is freed after the forward, and gathered again for its own layer alone.
            return kept(t.detach().clone())
        return self.recipe_of(t) or kept(t)

    def packs(self) -> bool:
        """Whether autograd passes here what it saves. Inside of other hooks it does not, such as a checkpoint's."""
        autograd: Any = torch._C._autograd
        hooks = autograd._top_saved_tensors_default_hooks(False)
        return hooks is not None and hooks[0] == self.pack

    def pack(self, t: Tensor) -> Kept | Recipe:
        recipe = self.recipe_of(t)
        if recipe is None:
            return kept(t)
        recipe.add_reader()
        return recipe


Offered = Callable[[Recipe, Tensor, tuple[Tensor | None, ...]], None]


class _Local(threading.local):
    saving: _Saving | None = None
    offered: Offered | None = None  # called with each recipe, the tensor and its sources


_local = _Local()


def makes_again(kind: Kind) -> bool:
    """Whether this forward pass wants recipes of this kind."""
    if torch.compiler.is_compiling():
        return False
    saving = _local.saving
    return saving is not None and saving.level in kind.value and saving.packs()


def offer(
    kind: Kind, out: Tensor, function: Callable[..., Tensor], *sources: Tensor | None
) -> None:
    """Tells that ``function(*sources)`` makes ``out`` again, to the same bits. Called if :func:`makes_again` holds."""
    saving = _local.saving
    assert saving is not None
    found = tuple([saving.source(t) for t in sources])
    if kind is Kind.PRODUCT:
        # A product of a block's output would need all blocks before it, through all stages: that output is kept.
        found = tuple(
            [
                kept(t) if t is not None and type(s) is Recipe and s.kind is Kind.SUM else s
                for t, s in zip(sources, found, strict=True)
            ]
        )
    saving.recipes[id(out)] = recipe = Recipe(kind, function, found, out)
    if _local.offered is not None:
        _local.offered(recipe, out, sources)


@contextlib.contextmanager
def telling(offered: Offered) -> Iterator[None]:
    """In it ``offered(recipe, out, sources)`` is called with each recipe of this thread. For counts."""
    before, _local.offered = _local.offered, offered
    try:
        yield
    finally:
        _local.offered = before


def concatenated(*tensors: Tensor) -> Tensor:
    """``[N, C_i, H, W]`` each -> ``[N, sum of C_i, H, W]``. In lean training the parts are kept, or made again."""
    out = torch.cat(tensors, 1)
    if makes_again(Kind.PASS) and needs_grad(*tensors):
        offer(Kind.PASS, out, lambda *parts: torch.cat(parts, 1), *tensors)
    return out


def saving(level: str | None, *, overrides: bool = True) -> contextlib.AbstractContextManager[None]:
    """In it, autograd keeps recipes of what operators make, as the level says.

    It steps aside where gradients are off, under compile, export and transforms, and inside of other hooks for saved
    tensors: those of ``torch.utils.checkpoint`` keep less, and ``save_on_cpu`` looks at each tensor.

    Args:
        overrides: whether the level also holds inside of another ``saving``.
    """
    # A compiler decides by itself what it keeps.
    if torch.compiler.is_compiling() or not (overrides or _local.saving is None):
        return contextlib.nullcontext()
    return _saving(level)


@contextlib.contextmanager
def _saving(level: str | None) -> Iterator[None]:
    outer = _local.saving
    if outer is not None:
        before, outer.level = outer.level, level
        try:
            yield
        finally:
            outer.level = before
    elif level is None or not _may_save():
        yield
    else:
        _local.saving = own = _Saving(level)
        try:
            with torch.autograd.graph.saved_tensors_hooks(own.pack, _get):
                yield
        finally:
            _local.saving = None
            own.recipes.clear()  # autograd holds `own` as long as the graph, but each recipe only until it has served


def _may_save() -> bool:
    autograd: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and not (torch.jit.is_tracing() or is_exported() or transformed())
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(False) is None
    )
