"""The training of a small ResNet on real images, stock and fused side by side from the same weights.

The loop is that of examples/train_classifier.py. The two trainings take steps alternately. Rounding errors differ, and
training amplifies them a thousandfold within ten steps. So the fp32 curves agree closely at first, and later in their
epoch means. The first steps are repeated in fp64, where they agree to 1e-8.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..environment import ROOT
from ..registry import Case, register

if TYPE_CHECKING:
    from ..session import Session

MODEL, BATCH, EPOCHS, LR, SEED = "resnet18", 32, 6, 0.01, 0
FIRST_STEPS, FIRST_BOUND = 5, 1e-3  # |difference of the losses| in each of the first steps
EPOCH_BOUND = 0.15  # |difference of the mean losses| in every epoch, as a share of stock's
EXACT_STEPS, EXACT_BOUND = 10, 1e-8  # the same in fp64
ACCURACY = 0.97


class Disagreement(RuntimeError):
    """The two trainings differ, or one of them does not learn."""


def example() -> ModuleType:
    """examples/train_classifier.py of this checkout."""
    path = ROOT / "examples" / "train_classifier.py"
    if not path.is_file():
        raise RuntimeError("the training of digits needs a checkout: examples/train_classifier.py")
    spec = importlib.util.spec_from_file_location("train_classifier", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_curves(stock: list[list[float]], fused: list[list[float]]) -> None:
    """Losses per epoch and step must agree within the bounds above."""
    for step, (a, b) in enumerate(zip(stock[0][:FIRST_STEPS], fused[0][:FIRST_STEPS], strict=True)):
        if not abs(a - b) <= FIRST_BOUND:
            raise Disagreement(
                f"step {step}: loss {a:.6f} stock, {b:.6f} fused; bound {FIRST_BOUND}"
            )
    for epoch, (xs, ys) in enumerate(zip(stock, fused, strict=True)):
        a, b = statistics.fmean(xs), statistics.fmean(ys)
        if not abs(a - b) <= EPOCH_BOUND * a:
            raise Disagreement(
                f"epoch {epoch + 1}: mean loss {a:.4f} stock, {b:.4f} fused; bound {EPOCH_BOUND:.0%}"
            )


def check_exactly(training: ModuleType, train_set: Any, device: str) -> None:
    """The first steps of both trainings in fp64, where rounding explains almost no difference."""
    from torch.utils.data import TensorDataset

    images, labels = train_set.tensors
    exact = TensorDataset(images.double(), labels)
    curves = []
    for backend in ("stock", "fused"):
        network = training.build(MODEL, backend, SEED, device).double()
        batches = training.loader(exact, BATCH, SEED)
        steps = training.train(network, batches, EPOCHS, LR, device)
        curves.append([loss for _, loss in itertools.islice(steps, EXACT_STEPS)])
    for step, (a, b) in enumerate(zip(*curves, strict=True)):
        if not abs(a - b) <= EXACT_BOUND:
            raise Disagreement(
                f"step {step} in fp64: loss {a:.12f} stock, {b:.12f} fused; bound {EXACT_BOUND}"
            )


def held_bytes(model: Any, batches: Any, case: Case) -> tuple[int, int]:
    """Bytes held for backward, and the peak, of one step in train mode."""
    import torch
    from torch.nn.functional import cross_entropy

    from .. import memory

    images, labels = (part.to(case.device) for part in next(iter(batches)))
    model.train()

    def forward() -> torch.Tensor:
        return cross_entropy(model(images), labels)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()

    backward(forward())
    return memory.held_and_peak(forward, backward, torch.device(case.device))


def run(case: Case, session: Session) -> None:
    training = example()
    epochs = 1 if session.settings.smoke else EPOCHS
    train_set, test_set = training.load_digits(SEED, 320 if session.settings.smoke else None)
    backends = {"eager": "stock", "advdl_ops": "fused"}
    networks, steps = {}, {}
    for provider, backend in backends.items():
        networks[provider] = training.build(MODEL, backend, SEED, case.device)
        batches = training.loader(train_set, BATCH, SEED)
        steps[provider] = training.train(networks[provider], batches, epochs, LR, case.device)
    total = epochs * len(batches)
    seconds: dict[str, list[float]] = {provider: [] for provider in steps}
    losses: dict[str, list[list[float]]] = {p: [[] for _ in range(epochs)] for p in steps}
    for step in range(total):
        for provider in sorted(steps, reverse=bool(step % 2)):
            begin = time.perf_counter()
            epoch, loss = next(steps[provider])
            seconds[provider].append(time.perf_counter() - begin)
            losses[provider][epoch].append(loss)
        session.progress("train", step + 1, total)

    from ..measure_op import report_times

    warm = total // 10  # the first steps allocate
    session.event(
        "artifact",
        name="digits",
        data={
            "losses": {
                p: [loss for epoch in curve for loss in epoch] for p, curve in losses.items()
            }
        },
    )
    report_times(session, "step", {p: values[warm:] for p, values in seconds.items()})
    for provider, network in networks.items():
        # The accuracy comes first, because a further forward in train mode changes the running statistics.
        tests = training.loader(test_set, BATCH, SEED, shuffle=False)
        right = training.accuracy(network, tests, case.device)
        session.record(provider, "step", "accuracy", "1", right)
        session.record(provider, "step", "final_loss", "1", statistics.fmean(losses[provider][-1]))
        held, peak = held_bytes(network, batches, case)
        session.record(provider, "step", "held", "B", held)
        session.record(provider, "step", "peak", "B", peak)
        if right <= ACCURACY and not session.settings.smoke:
            raise Disagreement(
                f"{provider}: test accuracy {right:.2%} must be above {ACCURACY:.0%}"
            )
    session.progress("the first steps in fp64")
    check_exactly(training, train_set, case.device)
    check_curves(losses["eager"], losses["advdl_ops"])


for _device in ("cpu", "cuda"):
    register(
        Case(
            name=f"digits/{MODEL}/train/{_device}",
            suites=("quick",),
            op=f"{MODEL} on digits",
            modes=("step",),
            dtype="float32",
            layout="contiguous",
            shape=(BATCH, 1, 8, 8),
            device=_device,
            run=run,
            extras=("sklearn",),
            target=f"the same losses, test accuracy > {ACCURACY:.0%}",
        )
    )
