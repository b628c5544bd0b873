"""Train a small ResNet on scikit-learn's handwritten digits (1,797 images of 8x8), fused or stock.

    python examples/train_classifier.py --epochs 6 --backend fused --output digits.safetensors
    torchrun --nproc-per-node 2 examples/train_classifier.py --warmup 40 --checkpoint runs/digits --resume

The second trains with DDP (or `--parallel fsdp`) in two processes, each on its part of the images, and continues where
an earlier run was interrupted. distributed_training.py and checkpoints.py hold what that needs.

`train` is a generator that yields after every optimizer step, so that a caller can watch it, stop it, or run two
trainings alternately as the benchmark does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from checkpoints import Checkpoints
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader, TensorDataset

# Also runs from a checkout that is built in place, and if it is loaded by its path.
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

REFERENCE_BATCH = 32  # the images per step that --lr is for, if there is a warm-up


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


def build(name: str, backend: str, seed: int, device: str, norm: str = "batch") -> torch.nn.Module:
    """A model of the zoo for 10 classes of small grey images, or its plain PyTorch twin with the same weights."""
    import torch

    from advdl_ops import models

    torch.manual_seed(seed)
    options: dict[str, Any] = {"num_classes": 10, "in_channels": 1, "stem": "small"}
    # Blocks start as their shortcut, so that the first epochs are more stable and two runs stay close for longer.
    model = models.create_model(name, zero_init_residual=True, norm=norm, **options)
    if backend == "stock":
        from benchmarks.stock_resnet import stock_resnet

        stock = stock_resnet(name, **options)
        stock.load_state_dict(model.state_dict())
        model = stock
    return model.to(device)


def loader(dataset: TensorDataset, batch_size: int, seed: int, shuffle: bool = True) -> DataLoader:
    """Batches in order, or shuffled anew in each epoch. Shuffled, each process has its own part of the images."""
    import torch
    from distributed_training import processes, rank
    from torch.utils.data import DataLoader, DistributedSampler

    if not shuffle:
        return DataLoader(dataset, batch_size)
    # The order follows from seed and epoch alone, so that a training continues in the middle of an epoch.
    order: Any = DistributedSampler(dataset, processes(), rank(), seed=seed, drop_last=True)
    # Otherwise each epoch would begin with a draw from torch's generator, and a resumed one draw twice.
    own = torch.Generator().manual_seed(seed)
    # With a last batch of one image, a norm at 1x1 would get one value per channel.
    return DataLoader(dataset, batch_size, sampler=order, drop_last=True, generator=own)


def learning_rates(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, warmup: int, batch: int
) -> LRScheduler:
    """One cycle up to `lr`; with a warm-up the linear scaling rule (Goyal et al. 2017, arXiv:1706.02677).

    By that rule k times the images per step take k times the learning rate. The first steps cannot bear it, so it
    rises from `lr` in even steps. Then it falls along a cosine.
    """
    from torch.optim.lr_scheduler import (
        CosineAnnealingLR,
        LinearLR,
        OneCycleLR,
        SequentialLR,
    )

    if not warmup:
        return OneCycleLR(optimizer, lr, total_steps=steps)
    scale = batch / REFERENCE_BATCH
    for group in optimizer.param_groups:
        group["lr"] = lr * scale
    rise = LinearLR(optimizer, start_factor=min(1.0, 1 / scale), total_iters=warmup)
    fall = CosineAnnealingLR(optimizer, T_max=steps - warmup)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def train(
    model: torch.nn.Module,
    batches: DataLoader,
    epochs: int,
    lr: float,
    device: str,
    amp: bool = False,
    accumulate: int = 1,
    warmup: int = 0,
    checkpoints: Checkpoints | None = None,
) -> Iterator[tuple[int, float]]:
    """SGD with momentum. Yields (epoch, loss) after each step. The loss is the mean over all images of the step.

    Args:
        accumulate: batches of each process in one step. Batch norm still sees them one by one.
        warmup: steps, see `learning_rates`. 0: one cycle.
        checkpoints: where to continue from and to save to.
    """
    import torch
    from distributed_training import gradients_shared, mean, processes
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DistributedSampler

    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    per_epoch = len(batches) // accumulate
    total = epochs * per_epoch
    together = (batches.batch_size or 1) * accumulate * processes()
    schedule = learning_rates(optimizer, lr, total, warmup, together)
    step = checkpoints.load(model, optimizer, schedule) if checkpoints else 0
    model.train()
    while step < total:
        epoch, done = divmod(step, per_epoch)
        if isinstance(batches.sampler, DistributedSampler):
            batches.sampler.set_epoch(epoch)
        rest = islice(batches, done * accumulate, per_epoch * accumulate)
        for _ in range(done, per_epoch):
            losses: list[torch.Tensor] = []
            for images, labels in islice(rest, accumulate):
                images, labels = images.to(device), labels.to(device)
                with gradients_shared(model, now=len(losses) + 1 == accumulate):
                    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                        loss = cross_entropy(model(images), labels, label_smoothing=0.1)
                    (loss / accumulate).backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            if checkpoints and (step % checkpoints.every == 0 or step == total):
                checkpoints.save(step, model, optimizer, schedule)
            yield epoch, mean(torch.stack(losses).mean()).item()


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
    parser.add_argument("--norm", choices=("batch", "group"), default="batch")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument(
        "--batch-size", type=int, default=32, help="of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches per step of each process"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0.01,
        help="peak learning rate (default: %(default)s); with --warmup of "
        f"{REFERENCE_BATCH} images per step, and of more in proportion",
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=0,
        metavar="STEPS",
        help="scale --lr with the images per step, reach it after STEPS, then fall along a cosine",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu, cuda or cuda:N (default: %(default)s); under torchrun cpu or cuda",
    )
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), help="under torchrun (default: ddp there)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "autocast", "bf16"),
        default="fp32",
        help="autocast: to bfloat16; bf16: weights and activations, with --parallel fsdp",
    )
    parser.add_argument(
        "--amp",
        action="store_const",
        const="autocast",
        dest="precision",
        help="--precision autocast",
    )
    parser.add_argument(
        "--sync-batch-norm", action="store_true", help="statistics of the images of all processes"
    )
    parser.add_argument("--backend", choices=("stock", "fused"), default="fused")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only the first LIMIT images")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="save the training there, where all processes see it"
    )
    parser.add_argument(
        "--every", type=int, metavar="STEPS", help="between checkpoints (default: an epoch)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint, if there is one"
    )
    parser.add_argument("--output", metavar="FILE", help="save the weights (.pth or .safetensors)")
    options = parser.parse_args(arguments)
    for name in ("epochs", "batch_size", "accumulate", "every"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.warmup < 0:
        parser.error("--warmup must be 0 or more")
    if options.precision == "bf16" and options.parallel != "fsdp":
        parser.error("--precision bf16 needs --parallel fsdp, which keeps the weights in fp32 too")
    if options.norm == "group" and options.backend == "stock":
        parser.error("--norm group needs --backend fused")
    if (options.resume or options.every) and not options.checkpoint:
        parser.error("--resume and --every need --checkpoint")
    return options


# What decides the batches and the learning rates. A training that is resumed must have the same.
DECISIVE = "seed", "limit", "epochs", "batch_size", "accumulate", "lr", "warmup"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    train_set, test_set = load_digits(options.seed, options.limit)

    import torch.distributed as dist
    from checkpoints import CheckpointError, Checkpoints
    from distributed_training import end, processes, rank, start, whole_state, wrap

    device = start(options.device)
    parallel = options.parallel or ("ddp" if dist.is_initialized() else None)

    def new_model() -> torch.nn.Module:
        return build(options.model, options.backend, options.seed, device, options.norm)

    batches = loader(train_set, options.batch_size, options.seed)
    per_epoch = len(batches) // options.accumulate
    if not per_epoch:
        needed = options.batch_size * options.accumulate * processes()
        asked = f"--batch-size {options.batch_size}"
        if needed > options.batch_size:
            asked += f", {needed} images per step,"
        raise SystemExit(f"{asked} is more than the {len(train_set)} images")
    if options.warmup >= options.epochs * per_epoch:
        raise SystemExit(f"--warmup must be less than all {options.epochs * per_epoch} steps")
    model = new_model()
    if options.sync_batch_norm:
        if not dist.is_initialized():
            raise SystemExit(
                "--sync-batch-norm: the process group is not initialized; use torchrun"
            )
        import advdl_ops

        model = advdl_ops.convert_sync_batchnorm(model)
    if parallel:
        model = wrap(model, parallel, options.precision, device, train_set[:1][0])
    try:
        checkpoints = None
        if options.checkpoint:
            decisive = {name: getattr(options, name) for name in DECISIVE}
            every = options.every or per_epoch
            checkpoints = Checkpoints(options.checkpoint, every, options.resume, decisive)
        steps = train(
            model, batches, options.epochs, options.lr, device, options.precision == "autocast",
            options.accumulate, options.warmup, checkpoints,
        )  # fmt: skip
        for epoch, found in groupby(steps, key=lambda step: step[0]):
            losses = [loss for _, loss in found]
            if rank() == 0:
                print(
                    f"epoch {epoch + 1}/{options.epochs}: loss {sum(losses) / len(losses):.4f}",
                    flush=True,
                )
    except CheckpointError as error:
        raise SystemExit(f"--checkpoint: {error}") from error
    if parallel:
        state = whole_state(model)
        if rank() == 0:
            model = new_model()
            model.load_state_dict(state)
    if rank() == 0:
        tests = loader(test_set, options.batch_size, options.seed, shuffle=False)
        print(f"test accuracy: {accuracy(model, tests, device):.2%} of {len(test_set)} images")
        if options.output:
            save(model, options.output)
            print(f"weights: {options.output}")
    end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
