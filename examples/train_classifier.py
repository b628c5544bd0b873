"""Train a small ResNet on scikit-learn's handwritten digits (1,797 images of 8x8), fused or stock.

    python examples/train_classifier.py --epochs 6 --backend fused --output digits.safetensors

`train` is a generator that yields after every optimizer step, so that a caller can watch it, stop it, or run two
trainings alternately as the benchmark does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

# Also runs from a checkout that is built in place.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def load_digits(seed: int = 0, limit: int | None = None) -> tuple[TensorDataset, TensorDataset]:
    """Train and test set: images [1, 8, 8] with mean near zero, labels 0 to 9. One fifth is the test set."""
    try:
        from sklearn.datasets import load_digits as bundled
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise SystemExit(
            "this example needs scikit-learn, which is not installed: python -m pip install scikit-learn"
        ) from error
    import torch
    from torch.utils.data import TensorDataset

    data = bundled()
    images, labels = data.images[:limit], data.target[:limit]
    parts = train_test_split(images, labels, test_size=0.2, random_state=seed, stratify=labels)
    x_train, x_test = (torch.from_numpy(p).float().div(8).sub(1).unsqueeze(1) for p in parts[:2])
    y_train, y_test = (torch.from_numpy(p).long() for p in parts[2:])
    return TensorDataset(x_train, y_train), TensorDataset(x_test, y_test)


def build(name: str, backend: str, seed: int, device: str) -> torch.nn.Module:
    """A model of the zoo for 10 classes of small grey images, or its plain PyTorch twin with the same weights."""
    import torch

    from advdl_ops import models

    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "stem": "small"}
    # Blocks start as their shortcut, so that the first epochs are more stable and two runs stay close for longer.
    model = models.create_model(name, zero_init_residual=True, **options)
    if backend == "stock":
        from benchmarks.stock_resnet import stock_resnet

        stock = stock_resnet(name, **options)
        stock.load_state_dict(model.state_dict())
        model = stock
    return model.to(device)


def loader(dataset: TensorDataset, batch_size: int, seed: int, shuffle: bool = True) -> DataLoader:
    import torch
    from torch.utils.data import DataLoader

    order = torch.Generator().manual_seed(seed)
    # With a last batch of one image, a norm at 1x1 would get one value per channel.
    return DataLoader(dataset, batch_size, shuffle=shuffle, generator=order, drop_last=shuffle)


def train(
    model: torch.nn.Module,
    batches: DataLoader,
    epochs: int,
    lr: float,
    device: str,
    amp: bool = False,
) -> Iterator[tuple[int, float]]:
    """SGD with momentum and a one-cycle schedule. Yields (epoch, loss) after each step."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(batches))
    model.train()
    for epoch in range(epochs):
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                loss = cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield epoch, loss.item()


def accuracy(model: torch.nn.Module, batches: DataLoader, device: str) -> float:
    """Share of the images with the correct label from the model in eval mode."""
    import torch

    model.eval()
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:
            found = model(images.to(device)).argmax(1).cpu()
            right, total = right + int((found == labels).sum()), total + len(labels)
    return right / total


def save(model: torch.nn.Module, path: str) -> None:
    if path.endswith(".safetensors"):
        try:
            from safetensors.torch import save_model
        except ModuleNotFoundError as error:
            raise SystemExit(
                "a .safetensors file needs safetensors, which is not installed: "
                "python -m pip install safetensors"
            ) from error
        save_model(model, path)
    else:
        import torch

        torch.save(model.state_dict(), path)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="resnet18", help="a ResNet of the zoo (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--lr", type=float, default=0.01, help="peak learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--backend", choices=("stock", "fused"), default="fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only the first LIMIT images")
    parser.add_argument("--output", metavar="FILE", help="save the weights (.pth or .safetensors)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    train_set, test_set = load_digits(options.seed, options.limit)
    model = build(options.model, options.backend, options.seed, options.device)
    batches = loader(train_set, options.batch_size, options.seed)
    if not len(batches):
        raise SystemExit(
            f"--batch-size {options.batch_size} is more than the {len(train_set)} images"
        )
    losses: dict[int, list[float]] = {}
    steps = train(model, batches, options.epochs, options.lr, options.device, options.amp)
    for epoch, loss in steps:
        losses.setdefault(epoch, []).append(loss)
        if len(losses[epoch]) == len(batches):
            print(
                f"epoch {epoch + 1}/{options.epochs}: loss {sum(losses[epoch]) / len(batches):.4f}",
                flush=True,
            )
    tests = loader(test_set, options.batch_size, options.seed, shuffle=False)
    print(f"test accuracy: {accuracy(model, tests, options.device):.2%} of {len(test_set)} images")
    if options.output:
        save(model, options.output)
        print(f"weights: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
