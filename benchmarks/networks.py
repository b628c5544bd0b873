"""The cases of whole networks: `add` registers one. Files in `cases/` call it and build the Subject.

Torch is imported only inside functions, as there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from .registry import Case, register

if TYPE_CHECKING:
    from .measure_model import Subject
    from .session import Session


def run(subject: Callable[[Case], Subject], case: Case, session: Session) -> None:
    import torch

    from .measure_model import measure_model

    torch.manual_seed(0)  # the first weights
    measure_model(case, session, subject(case))


def add(
    model: str,
    subject: Callable[[Case], Subject],
    batch: int,
    pixels: int,
    *,
    training: bool,
    device: str = "cpu",
    dtype: str = "float32",
    target: str = "",
    rounds: int = 7,
    compile: bool = True,
    hidden: bool = False,
    extras: tuple[str, ...] = (),
) -> None:
    """Registers one network at one size. ``hidden`` ones are for tests, small and not compiled."""
    kind = "train" if training else "inference"
    register(
        Case(
            name=f"{model}/{kind}/{batch}x3x{pixels}x{pixels}/{dtype}/{device}",
            suites=("models",),
            op=f"{model} {kind}",
            modes=("full",) if training else ("fwd",),
            dtype=dtype,
            layout="either",
            shape=(batch, 3, pixels, pixels),
            device=device,
            run=functools.partial(run, subject),
            target=target,
            rounds=rounds,
            compile=compile and not hidden,
            hidden=hidden,
            extras=extras,
            options={"model": model, "training": training},
        )
    )
