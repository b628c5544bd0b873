"""The language model trains on the text that Python brings along, fused as stock, and writes a sample."""

from __future__ import annotations

import functools
import itertools
import math
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.examples import run_example

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--epochs", "2", "--limit", "100", "--batch-size", "16"),
    *("--hidden-size", "24", "--sample", "30"),
]


run = functools.partial(run_example, "train_charlm")


@pytest.fixture
def charlm(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_charlm

    return train_charlm


# ---- the text ----


def test_the_text_is_the_same_every_time_and_in_every_process(charlm: ModuleType) -> None:
    sentences = charlm.corpus()
    assert len(sentences) > 1000
    assert len(set(sentences)) == len(sentences)
    assert charlm.corpus() == sentences
    assert charlm.corpus(50) == sentences[:50]
    done = run(
        code="import sys; sys.path.insert(0, '../examples')\n"
        "import train_charlm\nprint(*train_charlm.corpus(50), sep='\\n')"
    )
    assert done.stdout.splitlines() == sentences[:50], done.stderr


def test_batches_hold_every_sentence_unsorted_and_padded(charlm: ModuleType) -> None:
    train_set, validation_set = charlm.load(200)
    assert (len(train_set), len(validation_set)) == (180, 20)
    batches = list(charlm.loader(train_set, 32, seed=1))
    found = []
    for characters, following, lengths in batches:
        assert characters.shape == following.shape == (lengths.max(), len(lengths))
        assert len(lengths.unique()) > 5
        assert lengths.tolist() != sorted(lengths.tolist(), reverse=True)
        for b, n in enumerate(lengths.tolist()):
            assert (characters[n:, b] == charlm.PADDING).all()
            assert (following[n:, b] == charlm.PADDING).all()
            assert torch.equal(characters[1:n, b], following[: n - 1, b])
            found.append([*characters[:n, b].tolist(), int(following[n - 1, b])])
    assert sorted(found) == sorted(s.tolist() for s in train_set)
    again = charlm.loader(train_set, 32, seed=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


# ---- the model ----


def test_fused_and_stock_have_the_same_losses(charlm: ModuleType) -> None:
    """In fp64, where rounding cannot grow to anything within a few steps."""
    train_set, validation_set = charlm.load(120)
    losses, perplexities, texts = [], [], []
    for backend in ("fused", "stock"):
        model = charlm.build(backend, 3, "cpu", 24, 0.0).double()
        steps = charlm.train(model, charlm.loader(train_set, 16, 3), 1, 0.01, "cpu")
        losses.append([loss for _, loss in itertools.islice(steps, 6)])
        perplexities.append(
            charlm.perplexity(model, charlm.loader(validation_set, 5, shuffle=False), "cpu")
        )
        texts.append(charlm.generate(model, "The ", 40, 0.7, 0, "cpu"))
    assert len(losses[0]) == 6
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-12)
    assert texts[0] == texts[1]


def test_perplexity_counts_characters_and_no_padding(charlm: ModuleType) -> None:
    model = charlm.build("fused", 0, "cpu", 16, 0.0)
    with torch.no_grad():
        model["linear"].weight.zero_()
        model["linear"].bias.zero_()
    _, validation_set = charlm.load(100)
    batches = charlm.loader(validation_set, 3, shuffle=False)
    assert charlm.perplexity(model, batches, "cpu") == pytest.approx(charlm.VOCABULARY, rel=1e-5)


@pytest.mark.parametrize("backend", ["fused", "stock"])
def test_padding_changes_neither_logits_nor_states(charlm: ModuleType, backend: str) -> None:
    model = charlm.build(backend, 0, "cpu", 16, 0.3).double().eval()
    train_set, _ = charlm.load(12)
    characters, _, lengths = charlm.collate(train_set)
    h, c = (torch.randn(2, len(lengths), 16, dtype=torch.float64) for _ in range(2))
    logits, states = charlm.predict(model, characters, lengths, (h, c))
    assert logits.shape == (*characters.shape, charlm.VOCABULARY)
    for b, n in enumerate(lengths.tolist()):
        own = h[:, b : b + 1].contiguous(), c[:, b : b + 1].contiguous()
        alone, ends = charlm.predict(model, characters[:n, b : b + 1], None, own)
        torch.testing.assert_close(logits[:n, b], alone[:, 0])
        for state, end in zip(states, ends, strict=True):
            torch.testing.assert_close(state[:, b], end[:, 0])


@pytest.mark.parametrize("backend", ["fused", "stock"])
def test_a_step_trains_on_the_characters_with_clipped_gradients(
    charlm: ModuleType, backend: str
) -> None:
    train_set, _ = charlm.load(20)
    batches = charlm.loader(train_set, len(train_set))
    losses = {}
    for clip in (1.0, 1e-12):
        model = charlm.build(backend, 0, "cpu", 16, 0.0).double()
        before = charlm.perplexity(model, batches, "cpu")
        assert not model.training
        steps = charlm.train(model, batches, 2, 0.01, "cpu", clip=clip)
        first, second = next(steps), next(steps)
        assert model.training
        assert (first[0], second[0]) == (0, 1)
        assert first[1] == pytest.approx(math.log(before), rel=1e-12)
        losses[clip] = second[1] / first[1]
    assert losses[1.0] < 0.99
    # Far below what AdamW adds to its denominator: what is left is the decay of the weights.
    assert losses[1e-12] == pytest.approx(1, abs=1e-3)


def test_gradients_of_one_step_are_gone_in_the_next(charlm: ModuleType) -> None:
    train_set, _ = charlm.load(20)
    model = charlm.build("fused", 0, "cpu", 16, 0.0).double()
    steps = charlm.train(
        model, charlm.loader(train_set, len(train_set)), 2, 1e-30, "cpu", clip=math.inf
    )
    next(steps)
    first = model["linear"].weight.grad.clone()
    next(steps)
    torch.testing.assert_close(model["linear"].weight.grad, first)


@pytest.mark.parametrize("backend", ["fused", "stock"])
def test_perplexity_is_that_of_each_sentence_alone(charlm: ModuleType, backend: str) -> None:
    model = charlm.build(backend, 0, "cpu", 16, 0.3).double()
    _, validation_set = charlm.load(100)
    found = charlm.perplexity(model, charlm.loader(validation_set, 4, shuffle=False), "cpu")
    total = 0.0
    for sentence in validation_set:
        logits, _ = charlm.predict(model, sentence[:-1, None])
        total += torch.nn.functional.cross_entropy(
            logits[:, 0], sentence[1:], reduction="sum"
        ).item()
    count = sum(len(s) - 1 for s in validation_set)
    assert found == pytest.approx(math.exp(total / count), rel=1e-12)


@pytest.mark.parametrize("backend", ["fused", "stock"])
def test_characters_generated_singly_are_those_of_one_call(
    charlm: ModuleType, backend: str
) -> None:
    model = charlm.build(backend, 0, "cpu", 24, 0.3).double()
    text = charlm.generate(model, "The ", 25, 0.0, 0, "cpu")
    assert len(text) == 4 + 25
    assert text == charlm.generate(model, "The ", 25, 0.0, 1, "cpu")
    logits, _ = charlm.predict(model, charlm.encode("\n" + text).unsqueeze(1))
    logits[..., charlm.PADDING] = -math.inf
    greedy = [charlm.ALPHABET[i - 1] for i in logits[:, 0].argmax(-1).tolist()]
    assert "".join(greedy[4:-1]) == text[4:]
    drawn = [charlm.generate(model, "The ", 25, 1.0, seed, "cpu") for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


# ---- the command ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "suffix"),
    [
        (("--backend", "fused"), ".safetensors"),
        (("--backend", "stock"), ".pth"),
        (("--layer-norm", "--zoneout", "0.05", "--recurrent-dropout", "0.1"), ".pth"),
        (("--amp",), ".pth"),
    ],
    ids=["fused", "stock", "extras", "amp"],
)
def test_a_tiny_run(
    charlm: ModuleType, extra: tuple[str, ...], suffix: str, tmp_path: Path
) -> None:
    weights = tmp_path / f"charlm{suffix}"
    done = run(*TINY, *extra, "--output", str(weights))
    assert done.returncode == 0, done.stderr
    epochs = re.findall(
        r"epoch \d/2 \w+: loss ([\d.]+), validation perplexity ([\d.]+)", done.stdout
    )
    (first, before), (last, after) = [tuple(map(float, found)) for found in epochs]
    assert last < first < math.log(charlm.VOCABULARY) + 0.5
    assert after < before < charlm.VOCABULARY
    assert re.search(r"sample of \w+:\n  The ", done.stdout)

    options = charlm.parse(list(extra))
    kinds = {name: getattr(options, name) for name in charlm.EXTRAS}
    model = charlm.build(options.backend, 0, "cpu", 24, 0.1, **kinds)
    if suffix == ".pth":
        loaded = torch.load(weights)
    else:
        from safetensors.torch import load_file

        loaded = load_file(weights)
    assert not torch.equal(loaded["linear.weight"], model["linear"].weight)
    model.load_state_dict(loaded)
    _, held_out = charlm.load(100)
    found = charlm.perplexity(model, charlm.loader(held_out, 16, shuffle=False), "cpu")
    assert f"validation perplexity {found:.3f} per character" in done.stdout.split("epoch 2/2")[1]


@pytest.mark.slow
def test_compare_prints_both_and_their_ratio() -> None:
    done = run(*TINY, "--compare", "--dropout", "0")
    assert done.returncode == 0, done.stderr
    rows = re.findall(
        r"^ *([12]) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) *$", done.stdout, re.M
    )
    assert [row[0] for row in rows] == ["1", "2"]
    for _, fused, stock, fused_ms, stock_ms, ratio in rows:
        assert float(fused) == pytest.approx(float(stock), rel=1e-3)
        assert float(ratio) == pytest.approx(float(stock_ms) / float(fused_ms), rel=0.05)
    assert re.search(r"^ *all +[\d.]+ +[\d.]+ +[\d.]+ *$", done.stdout, re.M)
    assert "sample of fused:" in done.stdout and "sample of stock:" in done.stdout


def without(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(
        code=f"import sys; sys.modules[{module!r}] = None; sys.path.insert(0, '../examples')\n"
        f"import train_charlm\ntrain_charlm.main({list(arguments)!r})"
    )


def test_help_needs_no_torch() -> None:
    done = without("torch", "--help")
    assert done.returncode == 0, done.stderr
    assert "--backend" in done.stdout


@pytest.mark.parametrize(
    ("module", "arguments", "end"),
    [
        ("rich", ("--compare",), "python -m pip install rich"),
        ("pydoc_data", (), "which this Python was installed without"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(
    module: str, arguments: tuple[str, ...], end: str
) -> None:
    done = without(module, *arguments)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(end)
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--epochs 0", "--epochs 0 must be at least 1"),
        ("--batch-size -3", "--batch-size -3 must be at least 1"),
        ("--limit 9", "--limit 9 must be at least 10, of which one is for the validation"),
        ("--lr 0", "--lr 0.0 must be more than 0 and finite"),
        ("--lr nan", "--lr nan must be more than 0 and finite"),
        ("--lr inf", "--lr inf must be more than 0 and finite"),
        ("--clip 0", "--clip 0.0 must be more than 0"),
        ("--dropout 1.5", "--dropout 1.5 must be within 0 and 1"),
        ("--recurrent-dropout -1", "--recurrent-dropout -1.0 must be within 0 and 1"),
        ("--temperature -1", "--temperature -1.0 must be 0 or more"),
        ("--device tpu", "--device tpu must be cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99 is a GPU that torch does not find"),
        ("--layer-norm --backend stock", "--layer-norm is not in torch.nn.LSTM"),
        ("--zoneout 0.1 --compare", "--zoneout is not in torch.nn.LSTM"),
        ("--compare --output a.pth", "--output is for the weights of one model"),
        ("--output no/such/a.pth", "--output no/such/a.pth must be in a folder that exists"),
    ],
)
def test_bad_arguments_are_one_sentence(charlm: ModuleType, arguments: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        charlm.main(arguments.split())
    assert str(stopped.value).startswith(sentence)
    assert "\n" not in str(stopped.value)


def test_a_training_that_diverges_is_said(charlm: ModuleType) -> None:
    with pytest.raises(
        SystemExit, match=r"^the loss of fused became (nan|inf): a smaller --lr may help$"
    ):
        charlm.main([*TINY, "--lr", "1e30"])
