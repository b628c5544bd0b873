"""Arguments of the raw operator ``lstm``, in many variants."""

import torch

from advdl_ops._schemas import LSTMArguments
from support.accuracy import f64, strided

T, B, I, H, P = 4, 3, 5, 7, 2  # noqa: E741

# The changes to a plain call.
VARIANTS = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp64": {"dtype": f64},
    "no states": {"h0": None, "c0": None},
    "h alone": {"c0": None},
    "no bias": {"b_ih": None, "b_hh": None},
    "one bias": {"b_hh": None},
    "batch_first": {"batch_first": True},
    "reverse": {"reverse": True},
    "multiplied": {"w_ih": None},
    "projection": {"projection": True},
    "lengths": {"lengths": torch.tensor([2, 4, 1])},
    "lengths, reverse, batch_first": {
        "lengths": torch.tensor([2, 4, 1]),
        "reverse": True,
        "batch_first": True,
    },
    "packed": {"batch_sizes": torch.tensor([3, 3, 2, 1])},
    "packed, reverse": {"batch_sizes": torch.tensor([3, 2, 1, 1]), "reverse": True},
    "zoneout": {"zoneout_c": 0.2, "zoneout_h": 0.3},
    "masks": {"masks": True},
    "masks, projection, packed": {
        "masks": True,
        "projection": True,
        "batch_sizes": torch.tensor([3, 3, 2, 1]),
    },
    "layer norm": {"norm": True},
    "layer norm, projection, lengths": {
        "norm": True,
        "projection": True,
        "lengths": torch.tensor([2, 4, 1]),
    },
    "strided": {"layout": strided},
    "all": {
        "norm": True,
        "projection": True,
        "masks": True,
        "lengths": torch.tensor([4, 1, 2]),
        "batch_first": True,
        "reverse": True,
        "w_ih": None,
    },
    "one step": {"steps": 1},
    "no sequence": {"batch": 0},
}


def arguments(
    *,
    dtype=torch.float32,
    projection=False,
    masks=False,
    norm=False,
    layout=None,
    steps=T,
    batch=B,
    **changed,
):
    """The fields of LSTMArguments by name, in their order."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=f64).mul(0.5).to(dtype)

    size = P if projection else H
    rows = (batch, steps) if changed.get("batch_first") else (steps, batch)
    if changed.get("batch_sizes") is not None:
        rows = (int(changed["batch_sizes"].sum()),)
    features = 4 * H if "w_ih" in changed else I
    found = dict.fromkeys(LSTMArguments._fields)
    found |= {
        "x": normal(*rows, features),
        "h0": normal(batch, size),
        "c0": normal(batch, H),
        "w_ih": normal(4 * H, I),
        "w_hh": normal(4 * H, size),
        "b_ih": normal(4 * H),
        "b_hh": normal(4 * H),
        "w_hr": normal(P, H) if projection else None,
        "zoneout_c": 0.0,
        "zoneout_h": 0.0,
        "eps": 1e-5,
        "batch_first": False,
        "reverse": False,
    }
    if masks:
        found["recurrent_mask"] = torch.rand(batch, size, generator=g).lt(0.7).to(dtype) / 0.7
        found["zoneout_c_mask"] = torch.rand(*rows, H, generator=g).lt(0.3).byte()
        found["zoneout_h_mask"] = torch.rand(*rows, size, generator=g).lt(0.3).byte()
    if norm:
        found |= {f"ln_hh_{n}": normal(4 * H) + 1 for n in ("weight", "bias")}
        found |= {f"ln_c_{n}": normal(H) + 1 for n in ("weight", "bias")}
    if layout is not None:
        for n in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih"):
            found[n] = layout(found[n])
    return found | changed
