"""Lean training: bytes held for backward at each level, and what a step takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Case, register
from . import resnet, unet

if TYPE_CHECKING:
    from ..session import Session


def run(case: Case, session: Session) -> None:
    import torch

    from ..measure_memory import measure_memory

    torch.manual_seed(0)  # the first weights
    subject = unet.subject if case.options["model"] == "unet" else resnet.subject
    measure_memory(case, session, subject(case))


def _add(model: str, batch: int, pixels: int, device: str = "cpu", hidden: bool = False) -> None:
    dtype = "float32" if device == "cpu" else "bfloat16"
    register(
        Case(
            name=f"memory/{model}/{batch}x3x{pixels}x{pixels}/{dtype}/{device}",
            suites=("memory",),
            op=f"{model} memory",
            modes=("full",),
            dtype=dtype,
            layout="either",
            shape=(batch, 3, pixels, pixels),
            device=device,
            run=run,
            rounds=9,
            compile=not hidden,
            hidden=hidden,
            options={"model": model, "training": True},
        )
    )


# Targets: benchmarks/lean_figures.py
_add("resnet50", 8, 224)
_add("resnet50", 8, 112)
_add("resnet18", 8, 224)
_add("unet", 1, 256)
_add("resnet18", 2, 32, hidden=True)
_add("unet", 2, 35, hidden=True)

# targets.md, CUDA: peak of eager: block <= 0.80x, stage <= 0.65x
_add("resnet50", 256, 224, device="cuda")
_add("unet", 8, 512, device="cuda")
