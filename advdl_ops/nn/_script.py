"""``torch.jit.script``, which cannot compile layers that choose their kernel in Python."""

from __future__ import annotations

from typing import NoReturn

import torch


def refuse_script(layer: torch.nn.Module) -> NoReturn:
    """For ``__prepare_scriptable__``, by which ``torch.jit.script`` asks a module for what it shall compile.

    To return torch's layer would not do: ``torch.jit.script`` would leave that in the caller's model.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile {type(layer).__name__} of advdl_ops: call advdl_ops.restore(model) before, "
        "if advdl_ops.optimize made it; else use torch.jit.trace or torch.export"
    )
