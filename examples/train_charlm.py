"""Train a small character language model on Python's own documentation, with a fused LSTM, a stock one or both.

    python examples/train_charlm.py --output charlm.safetensors
    python examples/train_charlm.py --compare

Sentences of different lengths are padded to one batch, in any order. The fused LSTM takes their `lengths`, the stock
one a PackedSequence. `train` is a generator that yields after every optimizer step, so that a caller can watch it,
stop it, or run two trainings alternately as `--compare` does.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import DataLoader

# Also runs from a checkout that is built in place.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHORTEST, LONGEST = 20, 200  # characters of a sentence
PADDING, END = 0, "\n"  # every sentence begins and ends with END
ALPHABET = END + "".join(map(chr, range(32, 127)))  # the first character has number 1
VOCABULARY = 1 + len(ALPHABET)
EXTRAS = "layer_norm", "zoneout", "recurrent_dropout"  # options of advdl_ops.nn.LSTM only


# ---- the text ----


def corpus(limit: int | None = None) -> list[str]:
    """Different sentences from the topics of Python's `help`, shuffled, always in the same order."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise SystemExit(
            "this example reads Python's own documentation (pydoc_data), which this Python was installed without"
        ) from error

    found: dict[str, None] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for sentence in re.split(r"(?<=[.!?:;]) ", " ".join(paragraph.split())):
                ruled = re.search(r"([^\w\s.])\1\1", sentence)  # a heading or a table
                plain = sentence.isascii() and sentence.isprintable() and not ruled
                if plain and SHORTEST <= len(sentence) <= LONGEST:
                    found[sentence] = None
    sentences = list(found)
    random.Random(0).shuffle(sentences)
    return sentences[:limit]


def encode(text: str) -> Tensor:
    import torch

    return torch.tensor([1 + ALPHABET.index(character) for character in text])


def load(limit: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Training and validation set. One tenth of the sentences is for validation."""
    sentences = [encode(END + sentence + END) for sentence in corpus(limit)]
    held_out = len(sentences) // 10
    return sentences[held_out:], sentences[:held_out]


def collate(sentences: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Characters and their following characters, both padded to `[T, B]`, and the lengths `[B]`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    characters = pad_sequence([s[:-1] for s in sentences], padding_value=PADDING)
    following = pad_sequence([s[1:] for s in sentences], padding_value=PADDING)
    return characters, following, torch.tensor([len(s) - 1 for s in sentences])


def loader(
    sentences: list[Tensor], batch_size: int, seed: int = 0, shuffle: bool = True
) -> DataLoader:
    import torch
    from torch.utils.data import DataLoader

    order = torch.Generator().manual_seed(seed)
    data: Any = sentences  # a list works, although the annotation asks for a Dataset
    return DataLoader(data, batch_size, shuffle=shuffle, generator=order, collate_fn=collate)


# ---- the model ----


def build(
    backend: str, seed: int, device: str, hidden_size: int, dropout: float, **extras: Any
) -> torch.nn.ModuleDict:
    """Embedding, two layers of LSTM, linear. With the same seed, the stock and the fused model have the same weights.

    Args:
        extras: `EXTRAS` by name, for the fused model.
    """
    import torch

    from advdl_ops.nn import LSTM

    torch.manual_seed(seed)
    sizes = hidden_size, hidden_size, 2
    parts: dict[str, torch.nn.Module] = {
        "embedding": torch.nn.Embedding(VOCABULARY, hidden_size, padding_idx=PADDING),
        "lstm": LSTM(*sizes, dropout=dropout, forget_bias=1.0, **extras),
        "linear": torch.nn.Linear(hidden_size, VOCABULARY),
    }
    if backend == "stock":
        stock = torch.nn.LSTM(*sizes, dropout=dropout)
        stock.load_state_dict(parts["lstm"].state_dict())
        parts["lstm"] = stock
    return torch.nn.ModuleDict(parts).to(device)


def predict(
    model: torch.nn.ModuleDict,
    characters: Tensor,
    lengths: Tensor | None = None,
    states: Any = None,
) -> tuple[Tensor, Any]:
    """Logits `[T, B, VOCABULARY]` for the character after each of `characters` `[T, B]`, and the final states."""
    import torch
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    x, lstm = model["embedding"](characters), model["lstm"]
    if lengths is None:
        y, states = lstm(x, states)
    elif isinstance(lstm, torch.nn.LSTM):
        packed, states = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), states)
        y, _ = pad_packed_sequence(packed, total_length=len(x))
    else:
        y, states = lstm(x, states, lengths=lengths)
    return model["linear"](y), states


def train(
    model: torch.nn.ModuleDict,
    batches: DataLoader,
    epochs: int,
    lr: float,
    device: str,
    amp: bool = False,
    clip: float = 1.0,
) -> Iterator[tuple[int, float]]:
    """AdamW with gradients clipped to a norm. Yields (epoch, loss per character) after each step."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for epoch in range(epochs):
        for characters, following, lengths in batches:
            model.train()  # in each step, because the caller may have evaluated it in between
            characters, following = characters.to(device), following.to(device)
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
                logits, _ = predict(model, characters, lengths)
                loss = cross_entropy(
                    logits.flatten(0, 1), following.flatten(), ignore_index=PADDING
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            yield epoch, loss.item()


def perplexity(model: torch.nn.ModuleDict, batches: DataLoader, device: str) -> float:
    """Perplexity per character of the model in eval mode: the exponential of its mean cross entropy."""
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for characters, following, lengths in batches:
            logits, _ = predict(model, characters.to(device), lengths)
            wanted = following.to(device).flatten()
            losses = cross_entropy(
                logits.flatten(0, 1), wanted, ignore_index=PADDING, reduction="sum"
            )
            total, count = total + losses.item(), count + int(lengths.sum())
    # If training diverges, it may exceed the range of a float.
    return math.exp(total / count) if total / count < 700 else math.inf


def generate(
    model: torch.nn.ModuleDict, start: str, length: int, temperature: float, seed: int, device: str
) -> str:
    """`start` and `length` more characters, one for each step. With temperature 0, always the likeliest one."""
    import torch

    model.eval()
    draws = torch.Generator().manual_seed(seed)
    text = start
    with torch.inference_mode():
        # The beginning in one call, then one character per call with the states passed on.
        logits, states = predict(model, encode(END + start).unsqueeze(1).to(device))
        for _ in range(length):
            scores = logits[-1, 0].float().cpu()
            scores[PADDING] = -math.inf
            if temperature > 0:
                chosen = torch.multinomial((scores / temperature).softmax(0), 1, generator=draws)
            else:
                chosen = scores.argmax().view(1)
            text += ALPHABET[int(chosen) - 1]
            logits, states = predict(model, chosen.view(1, 1).to(device), None, states)
    return text


# ---- one training, or two alternating ----


class Epoch(NamedTuple):
    """One epoch of one model: mean loss, perplexity of the validation set, seconds of each step."""

    loss: float
    perplexity: float
    seconds: list[float]


def run(options: argparse.Namespace) -> dict[str, list[Epoch]]:
    """Trains the chosen backend, or both with alternating steps, and prints every epoch and a sample."""
    train_set, validation_set = load(options.limit)
    extras = {name: getattr(options, name) for name in EXTRAS}
    backends = ("fused", "stock") if options.compare else (options.backend,)
    models, trainings = {}, {}
    for backend in backends:
        models[backend] = build(
            backend, options.seed, options.device, options.hidden_size, options.dropout, **extras
        )
        # A loader for each, so that both get the same batches.
        batches = loader(train_set, options.batch_size, options.seed)
        trainings[backend] = train(
            models[backend], batches, options.epochs, options.lr, options.device, options.amp, options.clip,
        )  # fmt: skip
    held_out = loader(validation_set, options.batch_size, shuffle=False)
    characters = sum(len(s) - 1 for s in train_set)
    print(
        f"{len(train_set)} sentences of {characters} characters, {len(validation_set)} more for the validation"
    )

    history: dict[str, list[Epoch]] = {backend: [] for backend in backends}
    for epoch in range(options.epochs):
        losses: dict[str, list[float]] = {backend: [] for backend in backends}
        seconds: dict[str, list[float]] = {backend: [] for backend in backends}
        for _ in range(math.ceil(len(train_set) / options.batch_size)):
            for backend, steps in trainings.items():
                start = time.perf_counter()
                _, loss = next(steps)
                seconds[backend].append(time.perf_counter() - start)
                if not math.isfinite(loss):
                    raise SystemExit(
                        f"the loss of {backend} became {loss}: a smaller --lr may help"
                    )
                losses[backend].append(loss)
        for backend, model in models.items():
            done = Epoch(
                statistics.fmean(losses[backend]),
                perplexity(model, held_out, options.device),
                seconds[backend],
            )
            history[backend].append(done)
            print(
                f"epoch {epoch + 1}/{options.epochs} {backend}: loss {done.loss:.4f}, "
                f"validation perplexity {done.perplexity:.3f} per character, "
                f"{statistics.median(done.seconds) * 1e3:.1f} ms per step",
                flush=True,
            )
    for backend, model in models.items():
        text = generate(
            model, "The ", options.sample, options.temperature, options.seed, options.device
        )
        print(f"sample of {backend}:", *text.splitlines(), sep="\n  ")
    if options.output:
        from train_classifier import save

        save(models[options.backend], options.output)
        print(f"weights: {options.output}")
    return history


def print_table(history: dict[str, list[Epoch]]) -> None:
    """Prints perplexities of both backends, the median time of a step and the ratio, for each epoch and in total."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table("epoch", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("perplexity", "ms per step"):
        for backend in history:
            grid.add_column(f"{title}\n{backend}", justify="right")
    grid.add_column("time\nstock / fused", justify="right")

    def add(label: str, perplexities: list[str], seconds: list[list[float]]) -> None:
        medians = dict(zip(history, map(statistics.median, seconds), strict=True))
        shown = [f"{median * 1e3:.1f}" for median in medians.values()]
        grid.add_row(label, *perplexities, *shown, f"{medians['stock'] / medians['fused']:.2f}")

    for epoch, done in enumerate(zip(*history.values(), strict=True), 1):
        add(str(epoch), [f"{d.perplexity:.3f}" for d in done], [d.seconds for d in done])
    every = [[s for done in epochs for s in done.seconds] for epochs in history.values()]
    add("all", [""] * len(history), every)
    Console().print(grid)


# ---- arguments ----


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.005, help="default: %(default)s")
    parser.add_argument(
        "--clip",
        type=float,
        default=1.0,
        help="largest norm of the gradients (default: %(default)s)",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.1,
        help="between the layers (default: %(default)s); the two backends draw different masks, so that only at 0 "
        "do they see the same losses",
    )
    parser.add_argument("--layer-norm", action="store_true", help="in the cells, fused only")
    parser.add_argument("--zoneout", type=float, default=0.0, metavar="P", help="fused only")
    parser.add_argument(
        "--recurrent-dropout", type=float, default=0.0, metavar="P", help="fused only"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--backend", choices=("stock", "fused"), default="fused")
    parser.add_argument(
        "--compare", action="store_true", help="train both side by side and print a table"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only LIMIT sentences")
    parser.add_argument(
        "--sample",
        type=int,
        default=200,
        help="characters to write at the end (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        help="of the sample, 0 for the likeliest characters (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", help="save the weights (.pth or .safetensors)")
    options = parser.parse_args(arguments)
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Exits with one sentence about the first invalid argument, before anything is trained."""
    limits = [
        *(("at least 1", name, 1, math.inf) for name in ("epochs", "batch_size", "hidden_size")),
        ("at least 10, of which one is for the validation", "limit", 10, math.inf),
        *(("0 or more", name, 0, math.inf) for name in ("sample", "temperature")),
        ("within 0 and 2^63 - 1", "seed", 0, 2**63 - 1),
        ("more than 0 and finite", "lr", math.ulp(0), sys.float_info.max),
        ("more than 0", "clip", math.ulp(0), math.inf),
        *(("within 0 and 1", name, 0, 1) for name in ("dropout", "zoneout", "recurrent_dropout")),
    ]
    for must, name, least, most in limits:
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise SystemExit(f"--{name.replace('_', '-')} {value} must be {must}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        raise SystemExit(f"--device {options.device} must be cpu, cuda or cuda:N")
    given = [f"--{name.replace('_', '-')}" for name in EXTRAS if getattr(options, name)]
    if given and (options.compare or options.backend == "stock"):
        raise SystemExit(f"{given[0]} is not in torch.nn.LSTM: leave out --compare and stock")
    if options.output and options.compare:
        raise SystemExit("--output is for the weights of one model: leave out --compare")
    if options.output and not Path(options.output).parent.is_dir():
        raise SystemExit(f"--output {options.output} must be in a folder that exists")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.compare:
        try:
            import rich  # noqa: F401
        except ModuleNotFoundError as error:
            raise SystemExit(
                "the table needs rich, which is not installed: python -m pip install rich"
            ) from error
    if options.device != "cpu":
        import torch

        index = int(options.device.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise SystemExit(f"--device {options.device} is a GPU that torch does not find")
    history = run(options)
    if options.compare:
        print_table(history)
    return 0


if __name__ == "__main__":
    sys.exit(main())
