"""Steps of the LSTM on the emulation, and the same steps as formulas in torch.

A tensor of rows is a torch tensor [rows, width] whose stride says how far its rows lie apart. What lies between them is
handed over too, and must come back as it was: see :func:`run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import CODES, DTYPES

GUARD = 7.0  # between the rows of a tensor, and in outputs before they are written


@dataclasses.dataclass(frozen=True)
class Step:
    """Fields of LstmStep, ``eps``, and of LstmStepBackward which sequences begin."""

    rows: int
    hidden: int
    projection: int = 0
    dtype: str = "f32"
    time: int = 0
    zoneout_c: float = 0.0
    zoneout_h: float = 0.0
    eps: float = 1e-5
    begun: int = 2**63 - 1
    begin_at_lengths: bool = False

    @property
    def size(self) -> int:
        return self.projection or self.hidden

    @property
    def type(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.dtype == "f64" else torch.float32


def rows_of(value: Tensor, gap: int = 0) -> Tensor:
    """``value`` [rows, width] with ``gap`` elements of GUARD behind each row but the last."""
    wide = torch.full((value.shape[0], value.shape[1] + gap), int(GUARD), dtype=value.dtype)
    wide[:, : value.shape[1]] = value
    return wide[:, : value.shape[1]]


def memory(t: Tensor) -> Tensor:
    """The elements from the first of ``t`` to its last, gaps included."""
    count = (t.shape[0] - 1) * t.stride(0) + t.shape[1] if t.dim() == 2 and len(t) else t.numel()
    return t.as_strided((count,), (1,))


def to_bytes(t: Tensor) -> bytes:
    return memory(t).contiguous().view(torch.uint8).numpy().tobytes()


def run(
    emulator: Any, function: str, step: Step, tensors: Mapping[str, Tensor | None], **settings: Any
) -> dict[str, Any]:
    """One call. Returns what was written, laid out as it was given, and "launches"."""
    given = {name: t for name, t in tensors.items() if t is not None}
    request = dataclasses.asdict(step) | {"dtype": CODES[step.dtype], "packs_from": 1}
    request |= {"function": function} | settings
    for name, t in given.items():
        request[name] = to_bytes(t)
        if t.dim() == 2 and len(t) > 1:
            request[f"{name}_stride"] = t.stride(0)
    result = emulator.call("lstm_step", request)
    for name, t in given.items():
        if name not in result:
            continue
        flat = torch.frombuffer(bytearray(result[name]), dtype=t.dtype) if t.numel() else t
        result[name] = flat.as_strided(t.shape, t.stride())
        between, was = flat.clone(), memory(t).clone()
        between.as_strided(t.shape, t.stride()).fill_(0)
        was.as_strided(t.shape, t.stride()).fill_(0)
        assert torch.equal(between, was), f"{name}: written between its rows"
    return result


# ---- the formulas, in the dtype that the tensors have ----


def normalized(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm with a weight for each row, so that a row's part of its gradient can be asked for."""
    return F.layer_norm(x, x.shape[-1:], None, None, eps) * weight + bias


def keep(mask: Tensor | None, rate: float, like: Tensor) -> Tensor:
    return torch.full_like(like, rate) if mask is None else mask.to(like.dtype)


def zoneout(share: Tensor, before: Tensor, now: Tensor) -> Tensor:
    return share * before + (1 - share) * now


def forward(step: Step, t: dict[str, Tensor], acc: torch.dtype) -> dict[str, Tensor]:
    """gates, c, hidden and, given projected_h where there is a projection, h, fed and y: of sequences that go on."""
    wide = {n: v.to(acc) if v.is_floating_point() else v for n, v in t.items()}
    product = wide["product"]
    if "hh_weight" in wide:
        product = normalized(product, wide["hh_weight"], wide["hh_bias"], step.eps)
    z = wide["projected"] + product
    for bias in ("b_ih", "b_hh"):
        z = z + wide.get(bias, torch.zeros((), dtype=acc))
    i, f, g, o = z.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * wide["c"] + i * g
    seen = cell
    if "c_weight" in wide:
        seen = normalized(cell, wide["c_weight"], wide["c_bias"], step.eps)
    hidden = o * seen.tanh()
    share_c = keep(wide.get("zoneout_c_mask"), step.zoneout_c, cell)
    result = {"gates": torch.cat([i, f, g, o], 1), "hidden_out": hidden}
    result |= {"c": zoneout(share_c, wide["c"], cell)}
    if step.projection:
        if "projected_h" not in wide:
            return result
        hidden = wide["projected_h"]
    share_h = keep(wide.get("zoneout_h_mask"), step.zoneout_h, hidden)
    h = zoneout(share_h, wide["h"], hidden)
    # the mask meets the stored h
    fed = h.to(step.type).to(acc) * wide.get("recurrent_mask", torch.ones((), dtype=acc))
    return result | {"h": h, "y": h, "fed": fed}


def backward(step: Step, t: dict[str, Tensor], acc: torch.dtype) -> dict[str, Tensor]:
    """All that the two functions of backward write, of sequences that go on, by autograd from the saved gates."""
    wide = {n: v.to(acc) if v.is_floating_point() else v for n, v in t.items()}
    one, nothing = torch.ones((), dtype=acc), torch.zeros((), dtype=acc)
    leaf = {n: v.detach().clone().requires_grad_() for n, v in wide.items() if v.dtype == acc}
    i, f, g, o = leaf["gates"].chunk(4, 1)
    cell = f * leaf["cells_before"] + i * g
    seen, extra = cell, {}
    if "c_weight" in wide:
        extra = {
            n: wide[n].expand(step.rows, -1).clone().requires_grad_()
            for n in ("hh_weight", "c_weight", "c_bias")
        }
        seen = normalized(cell, extra["c_weight"], extra["c_bias"], step.eps)
    hidden = o * seen.tanh()
    share_c = keep(wide.get("zoneout_c_mask"), step.zoneout_c, cell)
    c = zoneout(share_c, leaf["cells_before"], cell)
    mask = wide.get("recurrent_mask", one)
    gradient = wide.get("dy", nothing) + wide["dh"] + mask * wide.get("dfed", nothing)
    share_h = keep(wide.get("zoneout_h_mask"), step.zoneout_h, gradient)
    result = {"dh": share_h * gradient, "dprojected": (1 - share_h) * gradient}
    result |= {"fed": wide["h_before"] * mask, "hidden_out": hidden}
    dhidden = wide["dhidden"] if step.projection else result["dprojected"]
    asked = [leaf["gates"], leaf["cells_before"]]
    asked += [extra[n] for n in ("c_weight", "c_bias") if n in extra]
    found = torch.autograd.grad([hidden, c], asked, [dhidden, wide["dc"]])
    slopes = torch.cat([i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)], 1)
    result |= {"dgates": found[0] * slopes, "dc": found[1]}
    if extra:
        result |= {"dc_weight": found[2], "dc_bias": found[3]}
        out = normalized(leaf["products"], extra["hh_weight"], leaf["hh_bias"], step.eps)
        asked = [leaf["products"], extra["hh_weight"]]
        found = torch.autograd.grad(out, asked, result["dgates"])
        result |= {"dproducts": found[0], "dhh_weight": found[1]}
    return {name: value.detach() for name, value in result.items()}
