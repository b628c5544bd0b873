"""Checkpoints of a training in one or several processes, from which it continues to the same bits.

A checkpoint is a folder `step_000040`: what `torch.distributed.checkpoint` writes, and `training.json` with the step,
the options of the training, and size and SHA-256 of every other file. It is written as `step_000040.partial` and
renamed when it is whole. `torch.distributed.checkpoint` unpickles what it reads, so load no checkpoint of a stranger.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from distributed_training import barrier, gathered, processes, rank, share_buffers
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

KEPT = 2  # should the newest be damaged later, there is one more
TRAINING = "training.json"

# Without a process group, the functions of torch.distributed.checkpoint say that they assume a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class CheckpointError(RuntimeError):
    """A checkpoint that this training cannot continue from. The training is as before."""


class Checkpoints:
    """Saves and continues one training.

    Args:
        folder: of the checkpoints; made if it is missing.
        every: steps from one checkpoint to the next.
        resume: continue from the newest checkpoint, if there is one. Otherwise there must be none.
        options: what decides the batches and learning rates. A training with other options does not continue this one.
    """

    def __init__(self, folder: str, every: int, resume: bool, options: dict[str, Any]) -> None:
        self.folder, self.every, self.resume = Path(folder), every, resume
        self.options = {**options, "processes": processes()}
        newest = self.newest()
        if newest and not resume:
            raise CheckpointError(
                f"{newest} is of an earlier training: give --resume or another folder"
            )

    def newest(self) -> Path | None:
        """The last whole checkpoint that rank 0 sees."""
        found = self.whole() if rank() == 0 else []
        return gathered(found[-1] if found else None)[0]

    def whole(self) -> list[Path]:
        """The whole checkpoints, the oldest first."""
        found = [p for p in self.folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", p.name)]
        return sorted(found, key=step_of)

    def load(self, model: torch.nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> int:
        """Continues from the newest checkpoint. Returns how many steps it has done.

        Raises:
            CheckpointError: a damaged checkpoint, or one of another training. Nothing has been changed.
        """
        path = self.newest()
        if path is None:
            return 0
        refuse(self.problem(path))
        refuse(other_model(path, model))  # after all files were checked, because it unpickles one
        state = training_state(model, optimizer, schedule)
        dcp.load(state, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        schedule.load_state_dict(state["schedule"])
        random = state["random"][str(rank())]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        return step_of(path)

    def problem(self, path: Path) -> str | None:
        """Why this training cannot continue from `path`. Each process reads its share of the files."""
        try:
            training = json.loads((path / TRAINING).read_text())
            options, files = training["options"], training["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"{path / TRAINING} is missing or torn: {error}"
        for name, value in self.options.items():
            if options.get(name) != value:
                return f"{path} is of another training: {name} was {options.get(name)}, now it is {value}"
        for name in sorted(files)[rank() :: processes()]:
            try:
                found = described(path / name)
            except OSError as error:
                return f"{path / name} cannot be read: {error.strerror}"
            if found["bytes"] != files[name]["bytes"]:
                return f"{path / name} is torn: it has {found['bytes']} of {files[name]['bytes']} bytes"
            if found != files[name]:
                return f"{path / name} is damaged: it is not what was written"
        return None

    def save(
        self, step: int, model: torch.nn.Module, optimizer: Optimizer, schedule: LRScheduler
    ) -> None:
        """Writes the checkpoint of a step, then removes old ones."""
        whole = self.folder / f"step_{step:06d}"
        partial = whole.with_name(whole.name + ".partial")
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # of a training that was interrupted
        share_buffers(model)
        barrier()
        dcp.save(training_state(model, optimizer, schedule), checkpoint_id=partial)
        written = {file.name: described(file) for file in partial.glob(f"__{rank()}_*")}
        every = gathered(written)
        if rank() == 0:
            files = {".metadata": described(partial / ".metadata")}
            for written in every:
                files.update(written)
            training = {"step": step, "options": self.options, "files": files}
            (partial / TRAINING).write_text(json.dumps(training, indent=1))
            partial.rename(whole)
            for old in self.whole()[:-KEPT]:
                shutil.rmtree(old)
        barrier()  # whoever returns from here finds it whole


def refuse(problem: str | None) -> None:
    """Raises the first problem that any process has, in all of them. If one raised alone, the others would wait."""
    for found in gathered(problem):
        if found:
            raise CheckpointError(found)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def training_state(
    model: torch.nn.Module, optimizer: Optimizer, schedule: LRScheduler
) -> dict[str, Any]:
    """All that changes during training. Names and shapes are those of a single process, also of a wrapped model."""
    weights, moments = get_state_dict(model, optimizer)
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        random["cuda"] = torch.cuda.get_rng_state()
    return {
        "model": weights,
        "optimizer": moments,
        "schedule": schedule.state_dict(),
        "random": {str(rank()): random},
    }


def described(file: Path) -> dict[str, Any]:
    """Size and checksum."""
    checksum = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            checksum.update(part)
    return {"bytes": file.stat().st_size, "sha256": checksum.hexdigest()}


def other_model(path: Path, model: torch.nn.Module) -> str | None:
    """How the model of the checkpoint differs from this one in names and shapes."""
    saved = {
        name.removeprefix("model."): tuple(getattr(value, "size", ()))
        for name, value in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items()
        if name.startswith("model.")
    }
    state: dict[str, Any] = get_model_state_dict(model)
    here = {name: tuple(value.shape) for name, value in state.items()}
    differences = [
        f"{name} is {saved.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name)
    ]
    if not differences:
        return None
    more = f"; {len(differences) - 3} more" if len(differences) > 3 else ""
    return f"{path} is of another model: {'; '.join(differences[:3])}{more}"
