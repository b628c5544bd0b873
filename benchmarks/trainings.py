"""The two trainings of ``benchmarks convergence``: digits by a small residual network, shapes by a U-Net.

Everything random comes from a seed. The images are the same in every run; a run's seed gives the initial weights and
the order of the images.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from advdl_ops import models
from advdl_ops._conv import choice

from .cases.digits import example
from .convergence import DIRECTIONS
from .stock_convnet import StockConvNet
from .stock_unet import StockUNet

Datasets = tuple[TensorDataset, TensorDataset]
Networks = tuple[nn.Module, nn.Module]
Score = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Training:
    """What one training is made of.

    Attributes:
        datasets: images and labels for training, and those that the result is scored with.
        networks: the zoo's and the stock one, in train mode, each with weights of its own.
        score: of predicted and true labels, 1 at best.
        batch: images per step.
        lr: the highest learning rate of the one-cycle schedule.
    """

    datasets: Callable[[], Datasets]
    networks: Callable[[], Networks]
    score: Score
    batch: int
    lr: float


# ---- digits ----


def digits() -> Datasets:
    """scikit-learn's digits, from 8x8 to 16x16: at 8x8, only the first stage has enough pixels for Winograd."""
    train, test = (
        TensorDataset(interpolate(images, size=16, mode="bilinear"), labels)
        for images, labels in (part.tensors for part in example().load_digits(0))
    )
    return train, test


def convnets() -> Networks:
    widths, blocks = (64, 128), 1
    return (
        models.create_model("convnet", in_channels=1, widths=widths, blocks=blocks),
        StockConvNet(10, 1, widths, blocks),
    )


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return (predicted == labels).double().mean().item()


# ---- shapes ----

CLASSES = 3  # background, disc, rectangle
SIDE, TRAIN_IMAGES, TEST_IMAGES = 64, 48, 24
NOISE = 0.5  # standard deviation


def shapes(images: int, seed: int) -> TensorDataset:
    """Three bright discs or dark rectangles in each, in noise: [images, 1, SIDE, SIDE], and labels."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    x = torch.zeros(images, 1, SIDE, SIDE)
    labels = torch.zeros(images, SIDE, SIDE, dtype=torch.long)
    for image, label in zip(x[:, 0], labels, strict=True):
        for _ in range(3):  # a later one hides an earlier one
            down, right = rows - uniform(8, SIDE - 8), columns - uniform(8, SIDE - 8)
            if uniform(0, 1) < 0.5:
                inside, kind, sign = down**2 + right**2 <= uniform(6, 14) ** 2, 1, 1
            else:
                inside = (down.abs() <= uniform(4, 13)) & (right.abs() <= uniform(4, 13))
                kind, sign = 2, -1
            image[inside] = sign * uniform(0.5, 1.5)
            label[inside] = kind
    return TensorDataset(x + NOISE * torch.randn(x.shape, generator=generator), labels)


def unets() -> Networks:
    width = 48  # enough for Winograd in every direction
    return (
        models.create_model("unet", num_classes=CLASSES, in_channels=1, base_channels=width),
        StockUNet(1, CLASSES, width),
    )


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Intersection over union, the mean over the classes."""
    shares = []
    for kind in range(CLASSES):
        found, true = predicted == kind, labels == kind
        shares.append((found & true).sum().item() / max((found | true).sum().item(), 1))
    return sum(shares) / CLASSES


TRAININGS: Mapping[str, Training] = {
    "digits": Training(digits, convnets, accuracy, batch=64, lr=0.05),
    "unet": Training(
        lambda: (shapes(TRAIN_IMAGES, 1), shapes(TEST_IMAGES, 2)),
        unets,
        mean_iou,
        batch=8,
        lr=0.05,
    ),
}


# ---- one run ----


def networks(training: Training, seed: int) -> Networks:
    """The zoo's and the stock network with the same initial weights, which the seed gives."""
    torch.manual_seed(seed)
    ours, stock = training.networks()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def digest(model: nn.Module) -> str:
    """Of all parameters and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def train(
    model: nn.Module, training: Training, data: TensorDataset, epochs: int, seed: int
) -> Iterator[tuple[int, float]]:
    """SGD with momentum and a one-cycle schedule. Yields (epoch, loss) after each step."""
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(data, training.batch, shuffle=True, generator=order, drop_last=True)
    optimizer = torch.optim.SGD(
        model.parameters(), training.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.lr, total_steps=epochs * len(batches)
    )
    model.train()
    for epoch in range(epochs):
        for images, labels in batches:
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            yield epoch, loss.item()


def trained(
    model: nn.Module, training: Training, data: TensorDataset, epochs: int, seed: int, steps: int
) -> list[list[float]]:
    """The losses of each epoch, of up to ``steps`` steps in all (0: of every step)."""
    losses: list[list[float]] = [[] for _ in range(epochs)]
    run = train(model, training, data, epochs, seed)
    for epoch, loss in itertools.islice(run, steps or None):
        losses[epoch].append(loss)
    return losses


def scores(model: nn.Module, training: Training, data: TensorDataset) -> tuple[float, float]:
    """Of the model in eval mode; and of the most frequent label, predicted everywhere."""
    model.eval()
    labels = data.tensors[1]
    with torch.inference_mode():
        predicted = torch.cat(
            [model(images).argmax(1) for images, _ in DataLoader(data, training.batch)]
        )
    constant = torch.full_like(labels, int(labels.flatten().mode().values))
    return training.score(predicted, labels), training.score(constant, labels)


def forget_choices() -> None:
    choice.forget()


def served_by_winograd() -> dict[str, int]:
    """By direction, the number of different convolutions that Winograd served since :func:`forget_choices`."""
    found = [p.direction for p in choice.met() if choice.expected(p).name == choice.WINOGRAD]
    return {name: found.count(name) for name in DIRECTIONS}
