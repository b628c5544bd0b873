"""examples/train_classifier.py with what a test asks for in the environment. Runs under torchrun or alone.

    LOSSES   a file; rank 0 appends every loss to it, exactly
    DOUBLE   in fp64, so that no tolerance has to make room for what a network does to rounding errors
    DIE      "step" or "write": rank 1 is killed after step 5, or in the middle of its second checkpoint

`--model resnet10` is half a ResNet-18.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.checkpoint import FileSystemWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import train_classifier as example
from distributed_training import rank

from advdl_ops import models

build, load_digits, train = example.build, example.load_digits, example.train
write = FileSystemWriter.write_data
writes = 0


def die(where: str) -> None:
    if os.environ.get("DIE") == where and rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def watched(*args):
    for step, (epoch, loss) in enumerate(train(*args), 1):
        if rank() == 0:
            with open(os.environ["LOSSES"], "a") as file:
                print(loss.hex(), file=file)
        yield epoch, loss
        if step == 5:
            die("step")


def watched_write(*args):
    global writes
    writes += 1
    written = write(*args)  # the data; the metadata follow
    if writes == 2:
        die("write")
    return written


def double_digits(*args):
    parts = load_digits(*args)
    for part in parts:
        part.tensors = part.tensors[0].double(), part.tensors[1]
    return parts


@models.register_model
def resnet10(**options):
    return models.ResNet(models.BasicBlock, (1, 1, 1, 1), **options)


example.train = watched
FileSystemWriter.write_data = watched_write
if "DOUBLE" in os.environ:
    example.load_digits = double_digits
    example.build = lambda *args: build(*args).double()
sys.exit(example.main())
