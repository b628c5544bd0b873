"""optimize(): with torch.compile, DDP, fully_shard, functional_call, export, autocast, and during a forward."""

import copy

import pytest
import torch
from support.optimize import Block, ByMode, X, check_as, counts, group_norm, made, same
from torch import nn as stock
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")


def test_compiled_whole():
    block = stock.Sequential(
        Block(stock.BatchNorm2d, stock.ReLU()), Block(group_norm, stock.SiLU())
    ).double()
    twin, fast = copy.deepcopy(block), advdl_ops.optimize(block)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    same(compiled(X), twin(X))
    with torch.no_grad():
        same(compiled.eval()(X), twin.eval()(X))


@pytest.mark.parametrize("fresh", [True, False], ids=["compiled", "and run"])
def test_in_place_after_compile(fresh):
    block = stock.Sequential(made(Block), made(ByMode))
    twin = copy.deepcopy(block)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    if not fresh:
        compiled(X), twin(X)
    assert advdl_ops.optimize(compiled, inplace=True) is compiled
    assert counts(compiled)[0] == 3
    for mode in (True, False):
        compiled.train(mode), twin.train(mode)
        same(compiled(X), twin(X))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def wrapped_by_ddp(model):
    return stock.parallel.DistributedDataParallel(model)


def sharded(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", [wrapped_by_ddp, sharded])
@pytest.mark.parametrize("when", ["before", "after"])
def test_wrapped(one_process, wrap, when):
    block = stock.Sequential(made(Block), made(Block))
    twin = copy.deepcopy(block)
    if when == "before":
        model = wrap(advdl_ops.optimize(block))
    else:
        model = wrap(block)
        with pytest.raises(
            ValueError, match=r"must be optimized before \w+ wraps it, or with inplace"
        ):
            advdl_ops.optimize(model)
        assert advdl_ops.optimize(model, inplace=True) is model
    assert counts(model)[0] == 4
    for _ in range(2):
        losses = []
        for network in (twin, model):
            network.zero_grad()
            losses.append(network(X).square().mean())
            losses[-1].backward()
            torch.optim.SGD(network.parameters(), 0.1).step()
        same(losses[1], losses[0])
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        same(a.full_tensor() if hasattr(a, "full_tensor") else a, b)
    for a, b in zip(model.buffers(), twin.buffers(), strict=True):
        same(a.double(), b.double())


def test_functional_call_and_export():
    block = stock.Sequential(made(Block), made(ByMode)).eval()
    fast = advdl_ops.optimize(block)
    others = {name: t + 0.1 for name, t in block.state_dict().items() if t.is_floating_point()}
    same(torch.func.functional_call(fast, others, X), torch.func.functional_call(block, others, X))
    program = torch.export.export(fast, (X,))
    same(program.module()(X), block(X))
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target.namespace == "aten"


@pytest.mark.parametrize("train", [True, False])
def test_autocast_gives_the_dtype_of_before(train):
    block = stock.Sequential(made(Block), Block(group_norm, stock.SiLU())).float().train(train)
    fast = advdl_ops.optimize(block)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(train):
        expected, found = block(X.float()), fast(X.float())
    assert found.dtype == expected.dtype
    same(found.double(), expected.double(), 0.05)


def test_in_the_middle_of_a_forward():
    block = made(Block)
    twin = copy.deepcopy(block)
    handle = block.act.register_forward_hook(
        lambda *_: handle.remove() or (advdl_ops.optimize(block, inplace=True) and None)
    )
    same(block(X), twin(X))
    assert counts(block)[0] == 2
    check_as(twin, block, X)
