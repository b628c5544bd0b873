"""What train_classifier.py needs to train in several processes: to join them, to share a model, to add up.

All but `wrap` also work in a single process without a process group, where there is nothing to share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


def start(device: str) -> str:
    """Joins the processes that torchrun started, if it did. Returns the device of this process."""
    if "RANK" not in os.environ:
        return device
    backend = "gloo"
    if device.startswith("cuda"):
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if device != "cuda" or index >= torch.cuda.device_count():
            raise SystemExit(
                f"--device {device}: process {index} of this machine takes GPU {index} of "
                f"{torch.cuda.device_count()}; give --device cuda and no more processes than GPUs"
            )
        device = f"cuda:{index}"
        torch.cuda.set_device(index)
        backend = "cpu:gloo,cuda:nccl"  # what is no tensor goes by gloo
    dist.init_process_group(backend)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def end() -> None:
    """Leaves the other processes, when all are done."""
    if not dist.is_initialized():
        return
    barrier()
    # Gloo's threads (torch 2.13) may still drop tensors, for which they need Python's lock. If Python ends meanwhile,
    # the process ends with SIGABRT, in one run of three. destroy_process_group does not wait for them. pytorch#190489
    time.sleep(0.1)
    dist.destroy_process_group()


def gathered(value: Any) -> list[Any]:
    """This value of every process, in the order of their ranks."""
    values = [value] * processes()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def mean(value: Tensor) -> Tensor:
    """The mean over the processes."""
    if dist.is_initialized():
        dist.all_reduce(value)  # gloo has no mean
    return value / processes()


def wrap(
    model: torch.nn.Module, parallel: str, precision: str, device: str, images: Tensor
) -> torch.nn.Module:
    """The model for several processes, as `parallel` says: "ddp" or "fsdp".

    Args:
        model: a ResNet with the same weights in every process.
        precision: "bf16" for weights and activations in bfloat16. Each weight, its gradient's sum and the statistics of
            batch norm stay in fp32. With "fsdp" only.
        images: any batch, for DDP.
    """
    if not dist.is_initialized():
        raise SystemExit(
            f"--parallel {parallel}: the process group is not initialized; start the processes by "
            "torchrun --nproc-per-node 2 examples/train_classifier.py"
        )
    if parallel == "ddp":
        shared = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # DDP sorts its buckets anew after the first backward pass. From three processes on, the place of a gradient in
        # its bucket decides in which order it is summed. So that a resumed training rounds as the one that it
        # continues, that first pass is here. In evaluation, because that leaves the running statistics alone.
        shared.eval()
        shared(images.to(device)).sum().backward()
        shared.zero_grad(set_to_none=True)
        return shared
    mesh = init_device_mesh(torch.device(device).type, (processes(),))
    half: dict[str, Any] = {}
    if precision == "bf16":
        half = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    # One group per block: its weights are whole only while it runs.
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for block in model.get_submodule(stage).children():
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half))
    if half:  # the loss is computed in fp32
        half["output_dtype"] = torch.float32
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half))
    return model


@contextmanager
def gradients_shared(model: torch.nn.Module, now: bool) -> Iterator[None]:
    """The backward pass within sums the gradients over the processes if `now`. If not, each keeps its own for later."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    yield


def share_buffers(model: torch.nn.Module) -> None:
    """Gives every process the running statistics of rank 0. DDP does so before a forward pass, FSDP2 never."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def whole_state(model: torch.nn.Module) -> dict[str, Any]:
    """The state of the whole model on CPU, under the names that it has in a single process. Empty except on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return state if rank() == 0 else {}
