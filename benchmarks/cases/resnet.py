"""ResNet inference and training steps of targets.md: torchvision's architecture in plain PyTorch against the zoo."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Case, register

if TYPE_CHECKING:
    from ..session import Session


def run(case: Case, session: Session) -> None:
    from ..model_flow import measure_model

    measure_model(case, session)


def add(
    model: str,
    batch: int,
    pixels: int,
    *,
    training: bool,
    device: str = "cpu",
    dtype: str = "float32",
    target: str = "",
    rounds: int = 7,
    memory_only: bool = False,
    compile: bool = True,
    hidden: bool = False,
) -> None:
    kind = "memory" if memory_only else "train" if training else "inference"
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
            run=run,
            target=target,
            rounds=rounds,
            compile=compile,
            hidden=hidden,
            options={"model": model, "training": training, "memory_only": memory_only},
        )
    )


add("resnet50", 8, 224, training=False, target=">= 1.0x compile with freezing, >= 1.2x best eager")
add("resnet18", 16, 112, training=True, target=">= 1.1x best stock")
add(
    "resnet50", 8, 112, training=True, memory_only=True, compile=False, target="held <= 0.80x stock"
)
add("resnet18", 2, 32, training=True, compile=False, hidden=True)
add("resnet18", 2, 32, training=False, compile=False, hidden=True)

# targets.md, CUDA
for _dtype in ("bfloat16", "float32"):
    add(
        "resnet50",
        256,
        224,
        training=True,
        device="cuda",
        dtype=_dtype,
        target=">= 1.3x eager, >= 1.1x compile",
    )
    add("resnet50", 128, 224, training=False, device="cuda", dtype=_dtype)
