"""DDP and FSDP2 on two processes with gloo: the fused layers train as stock PyTorch does."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import processes
from support.models import randomize, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from advdl_ops import models, nn
from benchmarks.stock_resnet import StockResNet

pytestmark = pytest.mark.slow
f64 = torch.float64


class StockNorm(torch.nn.BatchNorm2d):
    def __init__(self, channels, act=None):
        super().__init__(channels)
        self.act = getattr(F, act) if act else torch.nn.Identity()

    def forward(self, x, residual=None):
        out = super().forward(x)
        return self.act(out if residual is None else out + residual)


class StockConvNorm(torch.nn.Module):
    def __init__(self, channels, out_channels, size, stride=1, act=None):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, out_channels, size, stride, size // 2, bias=False)
        self.bn = StockNorm(out_channels, act)

    def forward(self, x, residual=None):
        return self.bn(self.conv(x), residual)


class Block(torch.nn.Module):
    def __init__(self, layer, norm, channels):
        super().__init__()
        self.first = layer(channels, channels, 3, act="silu")
        self.second = layer(channels, channels, 3, act="relu")
        self.norm = norm(channels, act="gelu")

    def forward(self, x):
        return self.norm(self.second(self.first(x), x), x)


def layers(layer, norm):
    # Five and seven channels do not divide by two.
    return torch.nn.Sequential(
        layer(3, 7, 3, stride=2, act="relu"), Block(layer, norm, 7), layer(7, 5, 1)
    )


NETS = {  # ours, and the same in stock PyTorch
    "layers": lambda: (layers(nn.ConvBNAct, nn.BatchNormAct2d), layers(StockConvNorm, StockNorm)),
    "resnet10": lambda: (
        models.ResNet(models.BasicBlock, (1, 1, 1, 1), 5),
        StockResNet((1, 1, 1, 1), False, 5),
    ),
}


def ddp(net):
    return DistributedDataParallel(net, gradient_as_bucket_view=True)


def sharded(net):
    mesh = init_device_mesh("cpu", (2,))  # also where there is a GPU
    for module in reversed(list(net.modules())):  # inner ones first
        if isinstance(module, Block | models.BasicBlock | nn.ConvBNAct):
            fully_shard(module, mesh=mesh)
    # By default the outermost stays whole after a forward pass, and so misses a step that no backward pass precedes.
    return fully_shard(net, mesh=mesh, reshard_after_forward=True)


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def assert_same(found, expected, what):
    # fp64: no tolerance has to make room for what a network does to rounding errors.
    assert relative_error(whole(found.detach()), expected.detach()) < 1e-9, what


def check_what_is_kept(name, wrap):
    """What is folded from gathered weights is not kept: it would undo the sharding. In fp32: nothing else is."""
    inner = NETS[name]()[0]
    net = wrap(inner).eval()
    with torch.no_grad():
        net(torch.randn(3, 3, 32, 32))
    folded = [m.folded for m in inner.modules() if isinstance(m, nn.BatchNormAct2d)]
    assert any(folded) == (wrap is ddp), name


def check(name, wrap, rank):
    inner, plain = (net.double() for net in NETS[name]())
    plain.load_state_dict(randomize(inner).state_dict())
    net, stock = wrap(inner), ddp(plain) if wrap is ddp else plain
    # Fused: it moves no version counter, by which a folded weight could know that it is stale. A large eps, so that
    # a gradient of zero but for rounding is no step of full length.
    optimizers = [
        torch.optim.AdamW(m.parameters(), 1e-2, eps=1.0, fused=m is net) for m in (net, stock)
    ]
    torch.manual_seed(rank)  # each rank its own batch
    batches = [torch.randn(3, 3, 32, 32, dtype=f64) for _ in range(2)]

    def check_eval(what):
        with torch.no_grad():
            for _ in range(2):  # the second may come from what the first one kept
                assert_same(net(batches[0]), stock(batches[0]), (name, "eval", what))

    for turn, x in enumerate(batches):
        net.train(), stock.train()
        for model, optimizer in zip((net, stock), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
        if wrap is not ddp:
            for p in plain.parameters():
                dist.all_reduce(p.grad)
                p.grad /= 2
        for (key, p), twin in zip(inner.named_parameters(), plain.parameters(), strict=True):
            assert twin.grad.abs().max() > 1e-9, key
            assert_same(p.grad, twin.grad, (name, turn, "gradient", key))
        for optimizer in optimizers:
            optimizer.step()
        net.eval(), stock.eval()
        check_eval(turn)
    for optimizer in optimizers:  # without eval() after it, which drops what is folded
        optimizer.step()
    check_eval("after a step in eval")
    with torch.no_grad():
        for p in [*net.parameters(), *stock.parameters()]:
            if p.dim() == 4:
                (p.to_local() if isinstance(p, DTensor) else p)[:, 0, 0, 0] += 0.1
    check_eval("after a write to single weights")

    for (key, t), twin in zip(inner.state_dict().items(), plain.state_dict().values(), strict=True):
        assert_same(t, twin, (name, "state", key))
    for key, p in inner.named_parameters():
        first = whole(p.detach()).clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, whole(p.detach())), (name, "differs by rank", key)


def worker(rank, wrap):
    for name in NETS:
        torch.manual_seed(0)
        check(name, wrap, rank)
        check_what_is_kept(name, wrap)


@pytest.mark.parametrize("wrap", [ddp, sharded])
def test_trains_as_stock(wrap, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name resolves to
    processes.run(tmp_path, worker, wrap)
