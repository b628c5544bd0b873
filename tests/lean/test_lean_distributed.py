"""DDP and FSDP2 on two processes with gloo: a level changes no bit of a training."""

import copy

import pytest
import torch
from support import processes
from support.lean import counted, held_after, leaned, tiny_net
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from advdl_ops import models, set_lean
from advdl_ops._lean import LEVELS, Kind

pytestmark = pytest.mark.slow


def ddp(net, level):
    return DistributedDataParallel(set_lean(net, level), gradient_as_bucket_view=True)


def sharded(net, level):
    mesh = init_device_mesh("cpu", (2,))  # also where there is a GPU
    for block in net:
        if isinstance(block, models.Bottleneck):
            fully_shard(block, mesh=mesh)
    return set_lean(fully_shard(net, mesh=mesh, reshard_after_forward=True), level)


def whole(t):
    return t.full_tensor() if isinstance(t, DTensor) else t


def trained(net, rank, wrap, level):
    """Losses, gradients and state of three steps, the second of two batches; and what was made again."""
    model = wrap(net, level)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(rank)  # each rank its own batch
    values = []
    with counted() as kinds:
        for turn in range(3):
            optimizer.zero_grad()
            for _ in range(1 + turn % 2):
                loss = model(torch.randn(3, 3, 17, 15)).square().mean()
                loss.backward()
                values.append(loss.detach())
            values += [whole(p.grad).clone() for p in model.parameters()]
            optimizer.step()
    values += [whole(t).clone() for t in model.state_dict().values()]
    held = held_after(lambda: model(torch.randn(3, 3, 17, 15)).square().mean())
    return values, set(kinds), held


def worker(rank, wrap):
    torch.manual_seed(0)
    net = tiny_net()
    expected, kinds, plain = trained(copy.deepcopy(net), rank, wrap, None)
    assert not kinds
    for level in LEVELS:
        found, kinds, held = trained(copy.deepcopy(net), rank, wrap, level)
        assert all(a.equal(b) for a, b in zip(found, expected, strict=True)), level
        assert Kind.PASS in kinds, level
        # Under FSDP2 the weights of another unit are not at hand, so no product is made again.
        assert wrap is ddp or Kind.PRODUCT not in kinds, level
        assert wrap is ddp or held < plain, level
    # A level inside of a wrapper, and one that is set on the wrapper.
    if wrap is ddp:
        model = set_lean(DistributedDataParallel(leaned(net, {"2": "deep"})), "block")
        with counted() as kinds:
            model(torch.randn(3, 3, 17, 15)).sum().backward()
        assert Kind.PASS in kinds


@pytest.mark.parametrize("wrap", [ddp, sharded])
def test_trains_as_without_a_level(wrap, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the host's name resolves to
    processes.run(tmp_path, worker, wrap)
