"""examples/train_classifier.py in several processes: DDP, FSDP2, checkpoints, and what interrupts them."""

import copy
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from advdl_ops import models, nn
from benchmarks.stock_resnet import StockResNet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import checkpoints as saving  # noqa: E402
import distributed_training  # noqa: E402
import train_classifier as example  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
LIMIT_S = 120
SMALL = "--model", "resnet10", "--limit", "64"  # 51 images to train with


def run(processes, losses, *options, **environment):
    """The example under torchrun, or alone. Returns the finished process, and the losses of all runs with this file."""
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)
    script = str(ROOT / "tests" / "support" / "watched_training.py")
    done = subprocess.run(
        [sys.executable, *(torchrun if processes else ()), script, *SMALL, *options],
        env={
            **os.environ,
            "GLOO_SOCKET_IFNAME": "lo",  # whatever the host's name resolves to
            "LOSSES": str(losses),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    return done, [float.fromhex(x) for x in losses.read_text().split()] if losses.exists() else []


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of a single process with batches of 16, by norm."""
    found = {}

    def losses(norm):
        if norm not in found:
            file = tmp_path_factory.mktemp("alone") / "losses"
            options = "--norm", norm, "--batch-size", "16", "--epochs", "2", "--warmup", "2"
            done, found[norm] = run(0, file, *options, DOUBLE="1")
            assert done.returncode == 0, done.stderr
        return found[norm]

    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "options"),
    [
        pytest.param("group", ("--parallel", "ddp", "--batch-size", "8"), marks=pytest.mark.extra),
        ("group", ("--parallel", "ddp", "--batch-size", "4", "--accumulate", "2")),
        ("group", ("--parallel", "fsdp", "--batch-size", "4", "--accumulate", "2")),
        ("batch", ("--sync-batch-norm", "--batch-size", "8")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value).replace("--", ""),
)
def test_two_processes_train_as_one_with_their_images(norm, options, alone, tmp_path):
    """In fp64. Losses of seven steps see an error of any gradient, weight, learning rate or order of the images."""
    everywhere = "--norm", norm, "--epochs", "2", "--warmup", "2"
    done, losses = run(2, tmp_path / "losses", *everywhere, *options, DOUBLE="1")
    assert done.returncode == 0, done.stderr
    assert losses == pytest.approx(alone(norm), rel=1e-9)
    assert len(losses) == 6 and losses[0] != losses[3]


def whole(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".partial")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "precision", "processes", "death", "newest"),
    [("ddp", "fp32", 3, "write", "step_000002"), ("fsdp", "bf16", 2, "step", "step_000004")],
)
def test_a_rank_that_dies_costs_no_bit(parallel, precision, processes, death, newest, tmp_path):
    """Three processes with DDP, where the order of a sum shows. Batch norm, whose running statistics differ by rank."""
    folder, never = tmp_path / "checkpoints", tmp_path / "never interrupted"
    options = "--parallel", parallel, "--batch-size", str(16 // processes), "--epochs", "2"
    options += "--every", "2", "--precision", precision
    weights = [tmp_path / f"{name}.pth" for name in ("expected", "found")]
    done, expected = run(
        processes, tmp_path / "expected", *options, "--checkpoint", str(never), "--output", str(weights[0])
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(expected) == 6
    assert whole(never) == ["step_000004", "step_000006"]  # older ones are removed

    options += "--checkpoint", str(folder), "--resume"
    done, before = run(processes, tmp_path / "before", *options, DIE=death)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert whole(folder)[-1] == newest
    assert (folder / "step_000004.partial").exists() == (death == "write")
    done, after = run(processes, tmp_path / "after", *options, "--output", str(weights[1]))
    assert done.returncode == 0, done.stderr
    assert before + after[-(6 - len(before)) :] == expected  # to the last bit
    assert after == expected[int(newest[-1]) :]
    states = [torch.load(file, weights_only=True) for file in weights]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key

    if parallel == "fsdp":
        torn = folder / "step_000006" / "__1_0.distcp"
        torn.write_bytes(torn.read_bytes()[:-100])
        done, losses = run(processes, tmp_path / "nothing", *options)
        assert done.returncode != 0
        assert f"{torn} is torn" in done.stderr and "CheckpointError" not in done.stderr
        assert not losses


def bf16_worker(rank, init):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=init, rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT_S / 2)
    )
    sizes = (1, 1, 1, 1), 10, 1, "small"
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)

    stock = StockResNet(sizes[0], False, *sizes[1:])
    stock = distributed_training.wrap(stock, "fsdp", "bf16", "cpu", images)
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        stock(images)

    net = models.ResNet(
        models.BasicBlock, sizes[0], sizes[1], in_channels=sizes[2], stem=sizes[3]
    )  # fmt: skip
    names = {module: name for name, module in net.named_modules()}
    seen = {}

    def watch(norm, inputs):
        seen[norm] = inputs[0].detach()
        assert inputs[0].dtype == norm.weight.dtype == torch.bfloat16, names[norm]

    net = distributed_training.wrap(net, "fsdp", "bf16", "cpu", images)
    hooks = [
        module.register_forward_pre_hook(watch)
        for module in net.modules()
        if isinstance(module, nn.BatchNormAct2d)
    ]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    losses = []
    for step in range(3):
        before = {norm: copy.deepcopy(dict(norm.named_buffers())) for norm in names}
        seen.clear()
        out = net(images)
        assert out.dtype == torch.float32
        losses.append(cross_entropy(out, labels))
        losses[-1].backward()
        assert len(seen) == len(hooks) == 12
        for norm, x in seen.items():
            # The statistics of the bfloat16 images, computed and kept in fp32.
            var, mean = torch.var_mean(x.double(), (0, 2, 3))
            for key, batch in ("running_mean", mean), ("running_var", var):
                found = norm.get_buffer(key)
                expected = 0.9 * before[norm][key].double() + 0.1 * batch
                assert found.dtype == torch.float32
                limit = 1e-5 * expected.abs().max()  # bfloat16: 4e-3
                assert (found - expected).abs().max() < limit, (step, names[norm], key)
        for parameter in net.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    distributed_training.end()


@pytest.mark.slow
def test_weights_in_bf16_with_statistics_in_fp32(tmp_path, monkeypatch):
    """FSDP2 casts the weights of a batch norm, not its buffers. Stock's does not take both."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(bf16_worker, ((tmp_path / "init").as_uri(),), nprocs=2)


# ---- in this process ----


def network(channels=4, layers=1):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        nn.ConvBNAct(1, channels, 3, act="relu"),
        *[nn.ConvBNAct(channels, channels, 3, act="relu") for _ in range(layers)],
        torch.nn.Flatten(),
        torch.nn.Dropout(0.5),  # draws random numbers
        torch.nn.Linear(channels * 64, 10),
    )


def batches():
    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(26, 1, 8, 8), torch.arange(26) % 10)
    return example.loader(data, 4, seed=0)


def training(folder, resume, net, steps=None):
    """The losses of three epochs of three steps each, or of the first `steps`."""
    kept = saving.Checkpoints(str(folder), 2, resume, {"seed": 0}) if folder else None
    options = {"accumulate": 2, "warmup": 2, "checkpoints": kept}
    found = example.train(net, batches(), 3, 0.1, "cpu", **options)
    return [loss for _, loss in itertools.islice(found, steps)]


def test_one_process_resumes_to_the_same_bits(tmp_path):
    expected = training(None, False, network())
    assert len(expected) == 9  # three steps per epoch
    assert training(tmp_path, False, network()) == expected
    assert whole(tmp_path) == ["step_000008", "step_000009"]
    shutil.rmtree(tmp_path)
    assert training(tmp_path, True, network(), 5) == expected[:5]
    assert training(tmp_path, True, network()) == expected[4:]
    assert training(tmp_path, True, network()) == []  # it is done


@pytest.mark.parametrize("rank", [0, 1])
def test_every_epoch_has_each_image_once_in_another_order(rank, monkeypatch):
    monkeypatch.setattr(distributed_training, "rank", lambda: rank)
    monkeypatch.setattr(distributed_training, "processes", lambda: 2)
    data = torch.utils.data.TensorDataset(torch.arange(24.0).view(-1, 1), torch.arange(24) % 10)
    loader = example.loader(data, 4, seed=0)
    monkeypatch.undo()
    net, seen = torch.nn.Linear(1, 10), []
    net.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten().tolist()))
    list(example.train(net, loader, 2, 1e-9, "cpu"))
    first, second = (list(itertools.chain(*part)) for part in (seen[:3], seen[3:]))
    assert len(set(first)) == len(set(second)) == 12  # of 24, the other process has the rest
    assert first != second
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    assert first == order[rank::2]


def tear(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def no_change(file):
    pass


@pytest.mark.parametrize(
    ("file", "change", "net", "options", "message"),
    [
        ("__0_0.distcp", tear, {}, {}, r"__0_0.distcp is torn: it has \d+ of \d+ bytes"),
        ("__0_0.distcp", flip, {}, {}, "__0_0.distcp is damaged"),
        ("__0_0.distcp", Path.unlink, {}, {}, "__0_0.distcp cannot be read: No such file"),
        (".metadata", tear, {}, {}, ".metadata is torn"),
        (".metadata", flip, {}, {}, ".metadata is damaged"),
        ("training.json", tear, {}, {}, "training.json is missing or torn"),
        ("training.json", Path.unlink, {}, {}, "training.json is missing or torn"),
        ("", no_change, {"channels": 6}, {},
         r"step_000009 is of another model: 0.bn.bias is \(4,\) there, \(6,\) here; .*; \d+ more"),
        ("", no_change, {"layers": 2}, {}, r"of another model: 2.bn.bias is missing there, \(4,\) here"),
        ("", no_change, {"layers": 0}, {}, r"of another model: 1.bn.bias is \(4,\) there, missing here"),
        ("", no_change, {}, {"seed": 1}, "step_000009 is of another training: seed was 0, now it is 1"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_changes_nothing(
    file, change, net, options, message, tmp_path, monkeypatch
):
    training(tmp_path, False, network())
    change(tmp_path / "step_000009" / file)
    net = network(**net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    schedule = example.learning_rates(optimizer, 0.1, 9, 2, 8)
    cross_entropy(net(torch.randn(2, 1, 8, 8)), torch.arange(2)).backward()
    optimizer.step()
    kept = saving.Checkpoints(str(tmp_path), 2, True, {"seed": 0, **options})

    def state():
        parts = net.state_dict(), optimizer.state_dict(), schedule.state_dict()
        gradients = {key: p.grad for key, p in net.named_parameters()}
        return copy.deepcopy((*parts, gradients, torch.get_rng_state()))

    before = state()
    with pytest.raises(saving.CheckpointError, match=message) as raised:
        kept.load(net, optimizer, schedule)
    assert str(tmp_path) in str(raised.value)
    torch.testing.assert_close(state(), before, rtol=0, atol=0)


def test_a_new_training_does_not_write_into_an_old_one(tmp_path):
    training(tmp_path, False, network())
    with pytest.raises(
        saving.CheckpointError, match="step_000009 is of an earlier training: give --resume"
    ):
        training(tmp_path, False, network())
    assert json.loads((tmp_path / "step_000009" / "training.json").read_text())["step"] == 9


def test_linear_scaling_with_warmup():
    """Goyal et al. 2017, section 2.2: from the learning rate of a small batch, in even steps to k times as much."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], 0.1)
    schedule = example.learning_rates(optimizer, 0.1, steps=50, warmup=10, batch=256)
    found = []
    for _ in range(50):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rise = [0.1 + (0.8 - 0.1) * step / 10 for step in range(10)]
    fall = [0.8 * (1 + math.cos(math.pi * step / 40)) / 2 for step in range(40)]
    assert found == pytest.approx(rise + fall)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parallel", "ddp"), "--parallel ddp: the process group is not initialized; start"),
        (("--parallel", "fsdp"), "--parallel fsdp: the process group is not initialized; start"),
        (("--sync-batch-norm",), "--sync-batch-norm: the process group is not initialized"),
        (("--precision", "bf16"), "--precision bf16 needs --parallel fsdp"),
        (("--accumulate", "0"), "--accumulate must be at least 1"),
        (("--resume",), "--resume and --every need --checkpoint"),
        (("--warmup", "6"), "--warmup must be less than all 6 steps"),
        (("--accumulate", "2"), "64 images per step, is more than the 51 images"),
    ],
)
def test_bad_options_are_said(options, message, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as raised:
        example.main(["--limit", "64", *options])
    assert message in str(raised.value) + capsys.readouterr().err
