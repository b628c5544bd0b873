"""The LSTM: one step, and one layer over whole sequences, of one length or of many.

Stock is ``torch.lstm_cell``, also compiled, and ``torch.lstm``. Sequences are not compiled: Inductor unrolls
``torch.lstm`` step by step (five steps took minutes on a busy machine), and for ``nn.LSTM`` Dynamo breaks the graph
and runs the same as ``eager``. In half precision stock also runs in fp32 with conversions (``eager float32``), because
in bf16 it raises on a CPU without AVX512-BF16 (pytorch#88136), which is stored as refused. For sequences of different
lengths, stock either packs them (``eager``, the same results) or computes all with the largest length (``eager
padded``: its output past the ends is arbitrary, and only the part before the ends is compared).

Flops are those of the matrix products: forward 2 * 4H * (I + H) for each time of each sequence, backward twice that.
Bytes: the tensors of the call, each read or written once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from ..norms import SIZE, run
from ..norms import Random as RandomTensors
from ..registry import Case, register

if TYPE_CHECKING:
    import torch

    from ..measure_op import Function, Problem, Tensors

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def sequence_lengths(shape: tuple[int, ...], bounds: tuple[int, int]) -> list[int]:
    """Random lengths, uniform between the bounds. The first sequence has every step."""
    random = Random(0)
    return [shape[0], *(random.randint(*bounds) for _ in range(shape[1] - 1))]


def _rows(shape: tuple[int, ...], bounds: tuple[int, int] | None) -> int:
    """The number of times of all sequences together."""
    if bounds:
        return sum(sequence_lengths(shape, bounds))
    return shape[0] * (shape[1] if len(shape) == 4 else 1)


def stock(inputs: Tensors, state: Tensors) -> torch.Tensor:
    import torch

    x, weights = inputs["x"], [inputs[name] for name in WEIGHTS]
    if x.dim() == 2:
        h, c = torch.lstm_cell(x, (inputs["h"], inputs["c"]), *weights)
        return torch.cat((h, c))
    zeros = x.new_zeros(1, x.shape[1], inputs["w_hh"].shape[1])
    return torch.lstm(x, (zeros, zeros), weights, True, 1, 0.0, True, False, False)[0]


def in_float32(inputs: Tensors, state: Tensors) -> torch.Tensor:
    """Stock on half-precision tensors, computed in fp32. In bf16 itself, it raises on a CPU without AVX512-BF16."""
    wide = {name: tensor.float() for name, tensor in inputs.items()}
    return stock(wide, state).to(inputs["x"].dtype)


def fused(lengths: torch.Tensor | None) -> Function:
    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        import torch

        from advdl_ops import functional

        x, weights = inputs["x"], [inputs[name] for name in WEIGHTS]
        if x.dim() == 2:
            h, c = functional.lstm_cell(x, (inputs["h"], inputs["c"]), *weights)
            return torch.cat((h, c))
        return functional.lstm(x, None, weights, True, 1, 0.0, True, False, False, lengths=lengths)[
            0
        ]

    return function


def packed(lengths: torch.Tensor) -> Function:
    def function(inputs: Tensors, state: Tensors) -> torch.Tensor:
        import torch
        from torch.nn.utils import rnn

        x, weights = inputs["x"], [inputs[name] for name in WEIGHTS]
        data, sizes, order, _ = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        zeros = x.new_zeros(1, x.shape[1], inputs["w_hh"].shape[1])
        y, _, _ = torch.lstm(data, sizes, (zeros, zeros), weights, True, 1, 0.0, True, False)
        back = rnn.PackedSequence(y, sizes, order, rnn.invert_permutation(order))
        return rnn.pad_packed_sequence(back, total_length=x.shape[0])[0]

    return function


def problem(case: Case) -> Problem:
    import torch

    from ..measure_op import Problem

    random, dtype = RandomTensors(case), getattr(torch, case.dtype)
    training = case.options["training"]
    *outer, features, hidden = case.shape

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return random.normal(*shape, scale=scale).to(dtype).requires_grad_(bool(training))

    bound = 1 / math.sqrt(hidden)
    inputs = {"x": tensor(*outer, features)}
    if len(outer) == 1:
        inputs |= {name: tensor(outer[0], hidden) for name in ("h", "c")}
    inputs |= {
        "w_ih": tensor(4 * hidden, features, scale=bound),
        "w_hh": tensor(4 * hidden, hidden, scale=bound),
        "b_ih": tensor(4 * hidden, scale=bound),
        "b_hh": tensor(4 * hidden, scale=bound),
    }
    bounds = case.options["lengths"]
    assert bounds is None or isinstance(bounds, tuple)
    counted = None if bounds is None else torch.tensor(sequence_lengths(case.shape, bounds))
    functions: dict[str, Function] = {"eager": stock}
    if counted is not None:
        functions = {"eager": packed(counted), "eager padded": stock}
    if dtype is not torch.float32:
        functions["eager float32"] = in_float32
    made = Problem(inputs, {}, {**functions, "advdl_ops": fused(counted)})
    if len(outer) == 1:
        made.frozen = WEIGHTS
    else:
        made.uncompiled = tuple(functions)
    if training:
        made.grad = random.normal(*((2 * outer[0],) if len(outer) == 1 else outer), hidden).to(
            dtype
        )
    if counted is not None:
        past = torch.arange(outer[0])[:, None] >= counted
        made.ignored = past.unsqueeze(2).to(case.device)
        if made.grad is not None:
            made.grad.masked_fill_(made.ignored, 0)
    return made


def _bytes(shape: tuple[int, ...], rows: int, size: int) -> Mapping[str, int]:
    features, hidden = shape[-2:]
    weights = 4 * hidden * (features + hidden)
    forward = rows * (features + hidden) + weights
    backward = rows * (2 * features + 2 * hidden) + 2 * weights
    return {"fwd": forward * size, "bwd": backward * size, "full": (forward + backward) * size}


def add(
    shape: tuple[int, ...],
    *,
    lengths: tuple[int, int] | None = None,
    training: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    suites: tuple[str, ...] = ("ops",),
    modes: tuple[str, ...] = ("fwd", "full"),
    target: str = "",
    rounds: int = 11,
    hidden: bool = False,
) -> None:
    """``shape``: (T, B, I, H), or (B, I, H) of a cell."""
    op = "lstm_cell" if len(shape) == 3 else "lstm_lengths" if lengths else "lstm"
    kind = "train" if training else "eval"
    modes = modes if training else ("fwd",)
    rows = _rows(shape, lengths)
    product = 2 * 4 * shape[-1] * (shape[-2] + shape[-1]) * rows
    register(
        Case(
            name="/".join([op, kind, "x".join(map(str, shape)), dtype, device]),
            suites=suites,
            op=op,
            modes=modes,
            dtype=dtype,
            layout="contiguous",
            shape=shape,
            device=device,
            run=run(problem),
            bytes={mode: _bytes(shape, rows, SIZE[dtype])[mode] for mode in modes},
            flops={mode: {"fwd": 1, "bwd": 2, "full": 3}[mode] * product for mode in modes},
            target=target,
            rounds=rounds,
            compile=not hidden,
            hidden=hidden,
            options={"training": training, "lengths": lengths},
        )
    )


# targets.md, CPU
add((64, 256, 256), target=">= 1.3x eager, >= 1.0x compile / >= 1.4x eager")
add((64, 256, 256), training=False)
add(
    (100, 64, 256, 256),
    suites=("quick", "ops"),
    target="fwd + bwd >= 1.2x, stretch 1.3x",
)
add((100, 64, 256, 256), training=False)
add((200, 32, 128, 256), lengths=(20, 200), target=">= 2x packed, >= 1.4x padded")
add((200, 32, 128, 256), lengths=(20, 200), training=False)
# One sequence, a small model, many units, few sequences of a language model; half precision.
add((100, 1, 256, 256), modes=("full",))
add((30, 8, 64, 64), modes=("full",))
add((20, 64, 1024, 1024), modes=("full",))
add((35, 20, 650, 650), modes=("full",))
add((100, 64, 256, 256), dtype="bfloat16", modes=("full",))
add((16, 256, 256), modes=("full",))
add((1, 1024, 1024), modes=("full",))

# targets.md, CUDA
add((1024, 16, 768, 768), dtype="bfloat16", device="cuda", target="beside cuDNN: 2.01 / 5.19 ms")
add(
    (512, 32, 512, 512),
    lengths=(50, 512),
    dtype="bfloat16",
    device="cuda",
    target=">= 5x packed",
)
add((64, 256, 256), dtype="bfloat16", device="cuda")

# For tests of the benchmark itself.
add((2, 3, 4), hidden=True)
add((3, 2, 4, 5), lengths=(1, 3), hidden=True)
