"""The levels of lean training: bytes held for backward, and the time of a step, beside plain training and stock.

Providers are stock in both layouts, compiled, and with each of its blocks under `torch.utils.checkpoint`, which is what
its users do against a lack of memory; and the zoo's network, plain and at each level. A level whose gradients are not
the plain network's to the last bit is refused.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import memory, timing
from .lean_figures import CHECKPOINTED, LEVELS, lean_name
from .measure_model import (
    Network,
    Subject,
    check,
    compiled_networks,
    expected_values,
    models,
    new_network,
)
from .measure_op import report_over_stock, report_times
from .record import CHANNELS_LAST, OURS, STOCK
from .registry import Case
from .session import Refused, Session

BLOCKS = ("Block", "DoubleConv")  # classes of the stock networks


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy that keeps only the inputs of its blocks, and computes each block again in backward."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if type(block).__name__ in BLOCKS:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model


def measure_memory(case: Case, session: Session, subject: Subject) -> None:
    """Records of one network: times of a training step, bytes held and the peak."""
    from advdl_ops import set_lean

    device = torch.device(case.device)
    made = models(subject, case.device, training=True)
    network = functools.partial(new_network, subject, case)
    found = {STOCK + suffix: network(STOCK, made[STOCK], suffix) for suffix in ("", CHANNELS_LAST)}
    found[OURS] = network(OURS, made[OURS], "")
    session.progress("fp64 reference")
    found = check(found, session, expected_values(found[STOCK]))
    if STOCK not in found or OURS not in found:
        raise Refused(f"{case.name}: the plain networks did not return the right values")
    stock = {name: found[name] for name in found if name != OURS}
    compiled = compiled_networks(subject, session, {STOCK: made[STOCK]}, stock)
    found |= check(compiled, session, expected_values(found[STOCK]))
    found[CHECKPOINTED] = network(STOCK, checkpointed(made[STOCK]), CHANNELS_LAST)
    for level in LEVELS:
        lean = network(OURS, set_lean(copy.deepcopy(made[OURS]), level), "")
        why = differing(lean, found[OURS])
        if why:
            session.refuse(lean_name(level), why)
        else:
            found[lean_name(level)] = lean
    del made
    calls = {name: timing.Timed(each.step) for name, each in found.items()}
    seconds = timing.measure(
        calls, device, session.rounds, session.block_seconds, session.each_round("time full")
    )
    report_times(session, "full", seconds, OURS)
    report_over_stock(session, "full", seconds)
    for name, each in found.items():
        session.progress(f"memory of {name}")
        each.step()
        each.model.zero_grad(set_to_none=True)
        held, peak = memory.held_and_peak(each.forward, each.backward, device)
        session.record(name, "full", "held", "B", held)
        session.record(name, "full", "peak", "B", peak)


def differing(lean: Network, plain: Network) -> str | None:
    """Which value of a step is not the plain network's, to the last bit."""
    values: dict[str, Any] = lean.values()
    for name, expected in plain.values().items():
        if not torch.equal(values[name], expected):
            return f"{name} is not that of the plain network to the last bit"
    return None
