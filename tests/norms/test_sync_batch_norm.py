"""Batch norm over several processes: three with gloo on loopback, one of which has no images."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.distributed as dist
from support import processes
from torch import nn as stock

import advdl_ops
from advdl_ops import models, nn
from advdl_ops.nn._quantization import _beyond_torch
from benchmarks.extras import require

pytestmark = pytest.mark.slow
SIZES = (3, 0, 2)  # images of each process


@pytest.fixture
def in_three_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name resolves to
    return lambda worker: processes.run(tmp_path, worker, count=3)


def part(t, rank):
    return t.split(SIZES)[rank]


def summed(t):
    t = t.clone()
    dist.all_reduce(t)
    return t


def error(pairs):
    """The largest difference in units of the larger value, or of 1."""
    return max(
        ((a.double() - b.double()).abs().max() / max(1, b.double().abs().max())).item()
        for a, b in pairs
        if a.numel()
    )


def of_joined_batch(layer, synced, x, residual, dout, rank):
    """Runs both layers, and returns pairs: what this process has, and the same of the joined batch."""
    whole = [t if t is None else t.clone().requires_grad_() for t in (x, residual)]
    mine = [t if t is None else part(t, rank).clone().requires_grad_() for t in (x, residual)]
    expected, found = layer(*whole), synced(*mine)
    expected.backward(dout)
    found.backward(part(dout, rank))
    pairs = [(found, part(expected, rank))]
    for a, b in zip(mine, whole, strict=True):
        if a is not None:
            pairs.append((a.grad, part(b.grad, rank)))
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        if parameter is not None:
            pairs.append((summed(getattr(synced, name).grad), parameter.grad))
            parameter.grad = getattr(synced, name).grad = None
    pairs += zip(synced.buffers(), layer.buffers(), strict=True)
    return pairs


def values_worker(rank):
    torch.manual_seed(0)
    # Long and short rows of memory, with channels in vectors and beside them.
    shapes = (5, 6, 7, 5), (5, 19, 3, 2), (5, 3, 40, 33), (5, 40, 1, 1)
    layouts = torch.contiguous_format, torch.channels_last
    for shape, layout, act in itertools.product(shapes, layouts, (None, "relu", "silu")):
        for with_residual, momentum, affine in (
            (False, 0.1, True),
            (True, None, True),
            (True, 0.3, False),
        ):
            x, residual, dout = (
                torch.randn(shape).double().to(memory_format=layout) for _ in range(3)
            )
            x = x * 2 + 3
            layer = nn.BatchNormAct2d(
                shape[1], momentum=momentum, affine=affine, act=act, dtype=torch.float64
            )
            for parameter in layer.parameters():
                stock.init.normal_(parameter)
            synced = copy.deepcopy(layer)
            synced.process_group = "world"
            for _ in range(2):  # the running statistics change each time
                pairs = of_joined_batch(
                    layer, synced, x, residual if with_residual else None, dout, rank
                )
                assert error(pairs) < 1e-13, (shape, layout, act, with_residual)
            assert synced.num_batches_tracked == 2

    # A mean of 1000 standard deviations: fp32 loses as much of it as in a single process.
    x, dout = torch.randn(5, 6, 7, 5) + 1000, torch.randn(5, 6, 7, 5)
    for dtype, limit in ((torch.float32, 2e-3), (torch.bfloat16, 0.05)):
        layer = nn.BatchNormAct2d(6, act="relu")
        synced = nn.BatchNormAct2d(6, act="relu", process_group=dist.group.WORLD)
        given = x if dtype == torch.float32 else x - 998
        pairs = of_joined_batch(layer, synced, given.to(dtype), None, dout.to(dtype), rank)
        assert error(pairs) < limit, (dtype, error(pairs))

    # A residual of another dtype, statistics of half precision.
    layer = nn.BatchNormAct2d(6, dtype=torch.bfloat16)
    synced = copy.deepcopy(layer)
    synced.process_group = "world"
    pairs = of_joined_batch(
        layer,
        synced,
        torch.randn(5, 6, 2, 2).bfloat16(),
        torch.randn(5, 6, 2, 2),
        dout[..., :2, :2],
        rank,
    )
    assert error(pairs) < 0.02 and pairs[0][0].dtype == torch.float32

    with advdl_ops.use_backend("reference"):
        layer = nn.BatchNormAct2d(6, act="silu", dtype=torch.float64)
        synced = copy.deepcopy(layer)
        synced.process_group = "world"
        x, residual, dout = torch.randn(3, 5, 6, 3, 3, dtype=torch.float64)
        assert error(of_joined_batch(layer, synced, x, residual, dout, rank)) < 1e-13


def test_values_are_those_of_the_joined_batch(in_three_processes):
    in_three_processes(values_worker)


def differentiation_worker(rank):
    torch.manual_seed(0)
    x, residual, dout = torch.randn(3, 5, 4, 3, 2, dtype=torch.float64)
    # Gradients of a gradient: through the statistics, which all processes share.
    for act, r in (("silu", None), ("relu", residual), ("gelu", residual)):
        layer = nn.BatchNormAct2d(4, act=act, dtype=torch.float64)
        stock.init.normal_(layer.weight)
        synced = copy.deepcopy(layer)
        synced.process_group = "world"
        found = []
        for each, take in ((layer, lambda t: t), (synced, lambda t: part(t, rank))):
            a, d = (take(t).clone().requires_grad_() for t in (x, dout))
            out = each(a, r if r is None else take(r))
            gradient, weight = torch.autograd.grad(out, (a, each.weight), d, create_graph=True)
            (gradient.pow(3).sum() + (weight.sum() * 2)).backward()
            found.append((a.grad, d.grad, each.weight.grad))
        (whole_x, whole_d, whole_weight), (mine_x, mine_d, mine_weight) = found
        pairs = [(mine_x, part(whole_x, rank)), (mine_d, part(whole_d, rank))]
        assert error([*pairs, (summed(mine_weight), whole_weight)]) < 1e-12, act

    # Nothing needs a gradient but the residual, or nothing at all.
    layer = nn.BatchNormAct2d(4, act="relu", dtype=torch.float64, process_group="world")
    layer.requires_grad_(False)
    r = part(residual, rank).clone().requires_grad_()
    layer(part(x, rank), r).sum().backward()
    assert r.grad.shape == r.shape
    with torch.no_grad():
        assert not layer(part(x, rank)).requires_grad
    with torch.inference_mode():
        nn.BatchNormAct2d(4, dtype=torch.float64, process_group="world")(part(x, rank).clone())

    # Evaluation asks nobody: each process calls it another number of times.
    layer.eval()
    for _ in range(rank):
        layer(part(x, rank))


def test_double_backward_and_evaluation(in_three_processes):
    in_three_processes(differentiation_worker)


def compile_worker(rank):
    torch.manual_seed(0)
    model = stock.Sequential(
        nn.ConvBNAct(3, 4, 3, act="relu", process_group="world"),
        stock.Flatten(),
        stock.LazyLinear(2),
    )
    x = part(torch.randn(5, 3, 6, 6), rank)
    model(x)
    found = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        out = call(x)
        out.square().sum().backward()
        found.append([out.detach(), *[p.grad for p in model.parameters()]])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.extra
def test_compile(in_three_processes):
    in_three_processes(compile_worker)


def misuse_worker(rank):
    def state(layer):
        return {k: v.clone() for k, v in layer.state_dict().items()}

    def refuses(layer, x, match):
        before = state(layer)
        with pytest.raises((ValueError, RuntimeError), match=match):
            layer(x)
        for key, value in before.items():
            assert torch.equal(layer.state_dict()[key], value), key

    layer = nn.BatchNormAct2d(3 + (rank == 2), process_group="world")
    refuses(layer, torch.randn(2, layer.num_features, 4, 4), "must be the same in all processes")
    refuses(layer, torch.randn(2, layer.num_features, 4, 4), "must be the same in all processes")
    layer = nn.BatchNormAct2d(3, process_group="world")
    refuses(layer, torch.randn(int(rank == 1), 3, 1, 1), "more than 1 value per channel")
    refuses(layer, torch.randn(2, 4, 5, 5), "num_features")
    # It works after that, with two values in all; and without any, where a batch norm writes nothing.
    layer(torch.randn(int(rank > 0), 3, 1, 1))
    assert layer.num_batches_tracked == 1
    running = layer.running_var.clone()
    assert layer(torch.randn(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert torch.equal(layer.running_var, running)

    # One process alone copies its layer: the others would not answer if it compared again.
    copied = copy.deepcopy(layer) if rank == 0 else layer
    copied(torch.randn(2, 3, 4, 4))

    group = dist.new_group([0, 1])
    layer = nn.BatchNormAct2d(3, process_group="world")
    if rank == 2:
        with pytest.raises(ValueError, match="must contain this process"):
            layer.process_group = group
        assert layer.process_group == "world"
    else:
        layer.process_group = group
        layer(torch.randn(2 - rank, 3, 4, 4))
        assert copy.deepcopy(layer).process_group is group
        with pytest.raises(TypeError, match="cannot be saved"):
            pickle.dumps(layer)
    alone = [dist.new_group([i]) for i in range(3)][rank]  # the same bits as without a group
    x = torch.randn(4, 3, 5, 5)
    layer.process_group = alone
    plain = nn.BatchNormAct2d(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x)) and torch.equal(layer.running_var, plain.running_var)


def test_misuse(in_three_processes):
    in_three_processes(misuse_worker)


class Stock(stock.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = stock.Conv2d(3, 8, 3), stock.BatchNorm2d(8), stock.ReLU()
        self.head = stock.Linear(8, 4)

    def forward(self, x):
        return self.head(self.act(self.bn(self.conv(x))).mean((2, 3)))


def network(kind):
    torch.manual_seed(0)
    if kind == "zoo":
        return models.create_model("resnet18", num_classes=4, in_channels=3)
    if kind == "lean":
        return models.create_model("resnet18", num_classes=4, in_channels=3, lean="stage")
    model = Stock()
    return advdl_ops.optimize(model) if kind == "optimized" else model


def networks_worker(rank):
    torch.manual_seed(0)
    x, labels = torch.randn(5, 3, 40, 32, dtype=torch.float64), torch.arange(5) % 4
    for kind in ("zoo", "lean", "stock", "optimized"):
        model = network(kind).double()
        synced = advdl_ops.convert_sync_batchnorm(copy.deepcopy(model))
        assert synced.state_dict().keys() == model.state_dict().keys()
        if kind == "stock":
            synced = advdl_ops.optimize(synced)
            assert synced.bn.process_group == "world"
        # Without gradients of its own batch, DDP averages over the processes; the loss is the sum here.
        wrapped = stock.parallel.DistributedDataParallel(synced)
        loss = stock.functional.cross_entropy(
            wrapped(part(x, rank)), part(labels, rank), reduction="sum"
        )
        loss.backward()
        expected = stock.functional.cross_entropy(model(x), labels, reduction="sum")
        expected.backward()
        pairs = [
            (3 * a.grad, b.grad)
            for a, b in zip(synced.parameters(), model.parameters(), strict=True)
        ]
        pairs += zip(synced.buffers(), model.buffers(), strict=True)
        pairs.append((summed(loss.detach()), expected.detach()))
        assert error(pairs) < 1e-10, kind


def test_networks_under_ddp(in_three_processes):
    in_three_processes(networks_worker)


# ---- in this process ----


def test_without_torch_distributed_it_says_so():
    layer = nn.ConvBNAct(3, 4, 3, act="relu", process_group="world")
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"needs torch\.distributed\.init_process_group"):
        layer(torch.randn(2, 3, 5, 5))
    for key, value in before.items():
        assert torch.equal(layer.state_dict()[key], value)
    assert "process_group='world'" in repr(layer)
    layer.eval()(torch.randn(2, 3, 5, 5))
    restored = pickle.loads(pickle.dumps(layer))
    assert restored.bn.process_group == "world"


@pytest.mark.parametrize("group", ["everyone", 3, dist])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(TypeError, match="process_group"):
        nn.BatchNormAct2d(3, process_group=group)
    model = stock.Sequential(stock.Conv2d(3, 3, 1), stock.BatchNorm2d(3))
    with pytest.raises(TypeError, match="process_group"):
        advdl_ops.convert_sync_batchnorm(model, group)
    assert type(model[1]) is stock.BatchNorm2d
    with pytest.raises(TypeError, match="module"):
        advdl_ops.convert_sync_batchnorm([model])


def test_what_becomes_of_other_norms():
    model = stock.Sequential(
        stock.BatchNorm1d(3), stock.BatchNorm2d(3), nn.BatchNormAct2d(3, act="relu"), stock.GroupNorm(1, 3)
    )  # fmt: skip
    hook = model[1].register_forward_hook(lambda *_: None)
    weights = [p for p in model.parameters()]
    made = advdl_ops.convert_sync_batchnorm(model)
    assert made is model
    kinds = [type(layer) for layer in model]
    assert kinds == [
        stock.SyncBatchNorm,
        nn.BatchNormAct2d,
        nn.BatchNormAct2d,
        stock.GroupNorm,
    ]
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))
    assert hook.id in model[1]._forward_hooks and model[2].act.name == "relu"
    assert type(advdl_ops.convert_sync_batchnorm(stock.BatchNorm1d(3))) is stock.SyncBatchNorm
    again = advdl_ops.convert_sync_batchnorm(model)
    assert [type(layer) for layer in again] == kinds


class Own(stock.BatchNorm2d):
    pass


def test_norms_that_may_compute_something_else_are_refused():
    parametrized = torch.nn.utils.parametrizations.weight_norm(stock.BatchNorm2d(3), dim=0)
    for norm in (Own(3), parametrized):
        model = stock.Sequential(stock.BatchNorm2d(3), norm)
        with pytest.raises(ValueError, match=r"1 .*cannot be synchronized"):
            advdl_ops.convert_sync_batchnorm(model)
        assert type(model[0]) is stock.BatchNorm2d


def test_timms_norms():
    require("timm")
    from timm.layers import BatchNormAct2d

    def both(model):
        return advdl_ops.convert_sync_batchnorm(advdl_ops.convert_sync_batchnorm(model))

    for convert in (
        both,
        lambda model: both(advdl_ops.optimize(model)),
        lambda model: advdl_ops.optimize(both(model)),
    ):
        model = convert(stock.Sequential(stock.Conv2d(3, 3, 1), BatchNormAct2d(3)))
        assert model[1].process_group == "world" and isinstance(model[1], BatchNormAct2d)
        for hooked in (False, True):  # whoever looks on, it is not normalized alone
            if hooked:
                model[1].act.register_forward_hook(lambda *_: None)
            with pytest.raises(RuntimeError, match=r"init_process_group|must be those"):
                model(torch.randn(2, 3, 4, 4))
        model.eval()(torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match="cannot be synchronized"):
        advdl_ops.convert_sync_batchnorm(BatchNormAct2d(3, act_layer=stock.Mish))


def test_quantization_loses_no_group():
    assert _beyond_torch(nn.BatchNormAct2d(3, process_group="world")) == "a process_group"


def test_restore_loses_no_group():
    model = advdl_ops.optimize(stock.Sequential(stock.Conv2d(3, 3, 1), stock.BatchNorm2d(3)))
    advdl_ops.convert_sync_batchnorm(model)
    with pytest.raises(ValueError, match="process_group of 1 must be None first"):
        advdl_ops.restore(model)
    assert type(model[0]) is nn.Conv2d
    model[1].process_group = None
    assert type(advdl_ops.restore(model)[1]) is stock.BatchNorm2d
    assert "synchronized" not in model[1].__dict__
