"""Bad input to LSTM and LSTMCell: torch's exception types, one form of message, and nothing changed."""

import copy
import re

import pytest
import torch
from support.checks import check_refused_call_keeps_nothing_alive, error_of_type
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from advdl_ops import nn
from advdl_ops.functional import lstm, lstm_cell

BY_TORCH = None  # its own type
T, B, I, H = 5, 3, 4, 6  # noqa: E741


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def assert_refused(call, expected, pattern):
    text = error_of_type(call, expected)
    assert re.match(pattern, text, re.S), text


def type_by_torch(call):
    with pytest.raises(Exception) as by_torch:  # noqa: PT011
        call()
    return by_torch.type


# ---- one step ----

CELL = {
    "input": torch.randn(B, I),
    "hx": (torch.randn(B, H), torch.randn(B, H)),
    "w_ih": torch.randn(4 * H, I),
    "w_hh": torch.randn(4 * H, H),
    "b_ih": torch.randn(4 * H),
    "b_hh": torch.randn(4 * H),
}
# What is wrong -> (the change, the argument that the message names, the exception where it is not torch's)
CELL_CASES = {
    "features": ({"input": zeros(B, I + 1)}, "x", BY_TORCH),
    "rank 1": ({"input": zeros(I)}, "x", RuntimeError),
    "rank 3": ({"input": zeros(1, B, I)}, "x", RuntimeError),
    "x of fp64": ({"input": zeros(B, I, dtype=torch.float64)}, "x", BY_TORCH),
    "x of integers": ({"input": zeros(B, I, dtype=torch.int64)}, "x", BY_TORCH),
    "x no tensor": ({"input": [[1.0]]}, "x", BY_TORCH),
    "x on meta": ({"input": zeros(B, I, device="meta")}, "w_ih", BY_TORCH),
    "hx a tensor": ({"hx": zeros(2, B, H)}, "hx", BY_TORCH),
    "hx of one": ({"hx": (zeros(B, H),)}, "hx", BY_TORCH),
    "hx of three": ({"hx": (zeros(B, H),) * 3}, "hx", BY_TORCH),
    "h no tensor": ({"hx": (None, zeros(B, H))}, r"hx\[0\]", BY_TORCH),
    "c no tensor": ({"hx": (zeros(B, H), 0.0)}, r"hx\[1\]", BY_TORCH),
    "batch of h": ({"hx": (zeros(B + 1, H), zeros(B, H))}, r"hx\[0\]", BY_TORCH),
    "batch of c": ({"hx": (zeros(B, H), zeros(1, H))}, r"hx\[1\]", BY_TORCH),
    "size of h": ({"hx": (zeros(B, H + 1), zeros(B, H))}, r"hx\[0\]", BY_TORCH),
    "size of c": ({"hx": (zeros(B, H), zeros(B, H + 1))}, r"hx\[1\]", BY_TORCH),
    "rank of h": ({"hx": (zeros(H), zeros(B, H))}, r"hx\[0\]", BY_TORCH),
    "h of fp64": ({"hx": (zeros(B, H, dtype=torch.float64), zeros(B, H))}, r"hx\[0\]", BY_TORCH),
    "c of fp64": ({"hx": (zeros(B, H), zeros(B, H).double())}, r"hx\[1\]", RuntimeError),
    "h on meta": ({"hx": (zeros(B, H, device="meta"), zeros(B, H))}, r"hx\[0\]", BY_TORCH),
    "w_ih": ({"w_ih": zeros(4 * H, I + 1)}, "x", BY_TORCH),
    "gates of w_ih": ({"w_ih": zeros(4 * H + 1, I)}, "w_ih", BY_TORCH),
    "rank of w_ih": ({"w_ih": zeros(4 * H)}, "w_ih", RuntimeError),
    "w_hh": ({"w_hh": zeros(4 * H, H + 1)}, "w_hh", BY_TORCH),
    "w_hh for proj_size": ({"w_hh": zeros(4 * H, 2)}, "w_hh", BY_TORCH),
    "gates of w_hh": ({"w_hh": zeros(4 * H + 4, H)}, "w_hh", BY_TORCH),
    "b_ih": ({"b_ih": zeros(4 * H - 1)}, "b_ih", BY_TORCH),
    "b_hh to broadcast": ({"b_hh": zeros(1)}, "b_hh", RuntimeError),
    "rank of b_hh": ({"b_hh": zeros(1, 4 * H)}, "b_hh", RuntimeError),
    "w_hh of fp64": ({"w_hh": zeros(4 * H, H).double()}, "w_hh", BY_TORCH),
    "b_ih of bf16": ({"b_ih": zeros(4 * H).bfloat16()}, "b_ih", BY_TORCH),
    "w_ih no tensor": ({"w_ih": None}, "x|w_ih", BY_TORCH),
    "b_hh no tensor": ({"b_hh": 0.0}, "b_hh", BY_TORCH),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", CELL_CASES)
def test_cell_refuses_as_torch_does(backend, name, grad):
    changed, argument, expected = CELL_CASES[name]
    given = {n: copy.deepcopy(v) for n, v in CELL.items()} | changed
    if expected is BY_TORCH:
        expected = type_by_torch(lambda: torch.lstm_cell(*given.values()))
    if grad and isinstance(given["w_hh"], torch.Tensor):
        given["w_hh"].requires_grad_()
    kept = copy.deepcopy({n: v for n, v in given.items() if n not in changed})
    assert_refused(
        lambda: lstm_cell(**given), expected, rf"lstm_cell: ({argument})( \(.+\))? must (?!$)"
    )
    for n, v in kept.items():
        for t, before in zip(
            v if n == "hx" else (v,), given[n] if n == "hx" else (given[n],), strict=True
        ):
            assert torch.equal(t, before), n


MODULE_CELL_CASES = {
    "features": (zeros(B, I + 1), None),
    "rank 3": (zeros(1, B, I), None),
    "rank 0": (zeros(), None),
    "features unbatched": (zeros(I + 1), None),
    "state of rank 3": (zeros(B, I), (zeros(1, B, H),) * 2),
    "state of rank 0": (zeros(B, I), (zeros(B, H), zeros())),
    "unbatched state": (zeros(B, I), (zeros(H),) * 2),
    "batched state": (zeros(I), (zeros(B, H),) * 2),
    "size of c": (zeros(I), (zeros(H), zeros(H + 1))),
    "fp64": (zeros(B, I).double(), None),
    "a tensor as states": (zeros(B, I), zeros(2, B, H)),
}


@pytest.mark.parametrize("name", MODULE_CELL_CASES)
def test_cell_module_refuses_as_torchs(backend, name):
    x, hx = MODULE_CELL_CASES[name]
    expected = type_by_torch(lambda: torch.nn.LSTMCell(I, H)(x, hx))
    assert_refused(
        lambda: nn.LSTMCell(I, H)(x, hx), expected, r"(LSTMCell|lstm_cell): \S+ \(.+must "
    )


# ---- sequences ----


def sequence_arguments(**changed):
    module = torch.nn.LSTM(I, H)
    given = {
        "input": torch.randn(T, B, I),
        "hx": (torch.randn(1, B, H), torch.randn(1, B, H)),
        "params": [t.detach() for t in module.parameters()],
        "has_biases": True,
        "num_layers": 1,
        "dropout": 0.0,
        "train": True,
        "bidirectional": False,
        "batch_first": False,
    }
    return given | changed


def with_parameter(i, t):
    params = sequence_arguments()["params"]
    params[i] = t
    return {"params": params}


PACKED = {"input": zeros(9, I), "batch_sizes": torch.tensor([3, 3, 2, 1])}
LENGTHS = torch.tensor([5, 3, 1])
# What is wrong -> (the change, what the message says after "lstm: ", the exception)
SEQUENCE_CASES = {
    "features": ({"input": zeros(T, B, I + 1)}, r"x \(shape \(5, 3, 5\)\) must have 4 features", RuntimeError),
    "rank 2": ({"input": zeros(T, I)}, r"x \(.+must be \[T, B, I\]", RuntimeError),
    "rank 4": ({"input": zeros(1, T, B, I)}, r"x \(.+must be \[T, B, I\]", RuntimeError),
    "no step": ({"input": zeros(0, B, I)}, r"x \(shape \(0, 3, 4\)\) must have a step", RuntimeError),
    "x of integers": ({"input": zeros(T, B, I).long()}, r"x \(dtype", RuntimeError),
    "x of fp64": ({"input": zeros(T, B, I).double()}, r"x \(dtype", RuntimeError),
    "x no tensor": ({"input": [1.0]}, r"x \(list\) must be a Tensor", TypeError),
    "x on meta": ({"input": zeros(T, B, I, device="meta")}, r"weight_ih_l0 \(device", RuntimeError),
    "hx a tensor": ({"hx": zeros(2, 1, B, H)}, r"hx \(\w*Tensor\) must be a tuple", TypeError),
    "hx of one": ({"hx": (zeros(1, B, H),)}, r"hx \(1 values\) must be a tuple", RuntimeError),
    "hx of three": ({"hx": (zeros(1, B, H),) * 3}, r"hx \(3 values\)", RuntimeError),
    "h None": ({"hx": (None, zeros(1, B, H))}, r"hx\[0\] \(NoneType\) must", TypeError),
    "batch of h": (
        {"hx": (zeros(1, B + 1, H), zeros(1, B, H))},
        r"hx\[0\] \(shape \(1, 4, 6\)\) must have the shape \(1, 3, 6\)",
        RuntimeError,
    ),
    "layers of h": ({"hx": (zeros(2, B, H), zeros(1, B, H))}, r"hx\[0\] \(shape", RuntimeError),
    "layers of c": ({"hx": (zeros(1, B, H), zeros(2, B, H))}, r"hx\[1\] \(shape", RuntimeError),
    "size of c": ({"hx": (zeros(1, B, H), zeros(1, B, H - 1))}, r"hx\[1\] \(shape", RuntimeError),
    "rank of states": ({"hx": (zeros(B, H), zeros(B, H))}, r"hx\[0\] \(shape", RuntimeError),
    "rank of states, one row": ({"hx": (zeros(1, H),) * 2}, r"hx\[0\] \(shape", RuntimeError),
    "h of fp64": ({"hx": (zeros(1, B, H).double(), zeros(1, B, H))}, r"hx\[0\] \(dtype", RuntimeError),
    "c on meta": (
        {"hx": (zeros(1, B, H), zeros(1, B, H, device="meta"))},
        r"hx\[1\] \(device",
        RuntimeError,
    ),
    "three params": ({"params": sequence_arguments()["params"][:3]}, r"params \(3 tensors\) must", RuntimeError),
    "no params": ({"params": []}, r"params \(0 tensors\) must", RuntimeError),
    "params of one layer": ({"num_layers": 2, "hx": None}, r"params \(4 tensors\)", RuntimeError),
    "bias left out": ({"has_biases": False}, r"params \(4 tensors\)", RuntimeError),
    "w_ih": (with_parameter(0, zeros(4 * H + 4, I)), r"weight_hh_l0 \(shape", RuntimeError),
    "gates of w_ih": (with_parameter(0, zeros(4 * H + 1, I)), r"weight_ih_l0 \(shape", RuntimeError),
    "w_hh": (with_parameter(1, zeros(4 * H, H - 1)), r"weight_hh_l0 \(shape", RuntimeError),
    "b_ih": (with_parameter(2, zeros(H)), r"bias_ih_l0 \(shape \(6,\)\) must have the shape \(24,\)", RuntimeError),
    "b_hh": (with_parameter(3, zeros(4 * H).double()), r"bias_hh_l0 \(dtype", RuntimeError),
    "a projection of hidden_size": (
        {"params": [*sequence_arguments()["params"], zeros(H, H)]},
        r"weight_hr_l0 \(shape \(6, 6\)\) must",
        RuntimeError,
    ),
    "states for the projection": (
        {"params": [zeros(24, I), zeros(24, 2), zeros(24), zeros(24), zeros(2, H)]},
        r"hx\[0\] \(shape \(1, 3, 6\)\) must have the shape \(1, 3, 2\)",
        RuntimeError,
    ),
    "length 0": ({"lengths": [5, 0, 1]}, r"lengths\[1\] \(0\) must be at least 1$", RuntimeError),
    "negative length": ({"lengths": [5, 3, -1]}, r"lengths\[2\] \(-1\) must be at least 1$", RuntimeError),
    "length beyond": (
        {"lengths": [5, 3, 7]},
        r"lengths\[2\] \(7\) must be at most the 5 steps of x$",
        RuntimeError,
    ),
    "length beyond, in a tensor": (
        {"lengths": torch.tensor([6, 3, 5])},
        r"lengths\[0\] \(6\) must be at most the 5 steps of x$",
        RuntimeError,
    ),
    "length beyond, batch_first": (
        {"lengths": [5] * 5, "batch_first": True, "hx": None},
        r"lengths\[0\] \(5\) must be at most the 3 steps of x$",
        RuntimeError,
    ),
    "lengths of floats": ({"lengths": LENGTHS.float()}, r"lengths \(dtype", RuntimeError),
    "a float among lengths": ({"lengths": [5, 3.0, 1]}, r"lengths\[1\] \(3.0\) must be an integer", TypeError),
    "booleans as lengths": ({"lengths": [True] * 3}, r"lengths\[0\] \(True\) must be an integer", TypeError),
    "lengths a number": ({"lengths": 3}, r"lengths \(int\) must be a Tensor or a list", TypeError),
    "two lengths": ({"lengths": [5, 3]}, r"lengths \(2 values\) must have one for each of the 3", RuntimeError),
    "four lengths": ({"lengths": [5, 3, 1, 1]}, r"lengths \(4 values\) must", RuntimeError),
    "lengths of rank 2": ({"lengths": LENGTHS[None]}, r"lengths \(shape \(1, 3\)\) must have one dim", RuntimeError),
    "lengths on meta": ({"lengths": LENGTHS.to("meta")}, r"lengths \(device meta\) must be on the CPU", RuntimeError),
    "lengths and batch_sizes": (
        {**PACKED, "lengths": LENGTHS},
        r"lengths must not be given beside batch_sizes",
        ValueError,
    ),
    "padded x with batch_sizes": ({"batch_sizes": PACKED["batch_sizes"]}, r"x \(.+must be \[rows, I\]", RuntimeError),
    "sum of batch_sizes": (
        {**PACKED, "batch_sizes": torch.tensor([3, 3, 2])},
        r"batch_sizes \(sum 8\) must count the 9 rows of x",
        RuntimeError,
    ),
    "growing batch_sizes": (
        {**PACKED, "batch_sizes": torch.tensor([3, 2, 4])},
        r"batch_sizes\[2\] \(4\) must",
        RuntimeError,
    ),
    "batch size 0": ({**PACKED, "batch_sizes": torch.tensor([3, 3, 3, 0])}, r"batch_sizes\[3\] \(0\)", RuntimeError),
    "no batch_sizes": (
        {"input": zeros(0, I), "batch_sizes": LENGTHS[:0]},
        r"batch_sizes \(shape \(0,\)\) must",
        RuntimeError,
    ),
    "batch_sizes of int32": ({**PACKED, "batch_sizes": PACKED["batch_sizes"].int()}, r"batch_sizes \(dt", RuntimeError),
    "batch_sizes no tensor": ({**PACKED, "batch_sizes": [3, 3, 2, 1]}, r"batch_sizes \(list\) must be a T", TypeError),
    "states of another batch": (
        {**PACKED, "hx": (zeros(1, 2, H), zeros(1, 2, H))},
        r"hx\[0\] \(shape \(1, 2, 6\)\) must have the shape \(1, 3, 6\)",
        RuntimeError,
    ),
    "negative zoneout": ({"zoneout": -0.1}, r"zoneout \(-0.1\) must be within 0 and 1$", ValueError),
    "zoneout beyond 1": ({"zoneout": (0.1, 1.5)}, r"zoneout \(1.5\) must be within 0 and 1$", ValueError),
    "zoneout NaN": ({"zoneout": float("nan")}, r"zoneout \(nan\) must", ValueError),
    "zoneout of three": ({"zoneout": (0.1, 0.1, 0.1)}, r"zoneout \(.+must be a rate or a pair", ValueError),
    "zoneout a word": ({"zoneout": "0.1"}, r"zoneout \('0.1'\) must be a number", TypeError),
    "zoneout None": ({"zoneout": (0.1, None)}, r"zoneout \(None\) must be a number", TypeError),
    "recurrent dropout": ({"recurrent_dropout": 1.01}, r"recurrent_dropout \(1.01\) must be within", ValueError),
    "negative recurrent dropout": ({"recurrent_dropout": -1}, r"recurrent_dropout \(-1\) must be w", ValueError),
    "dropout": ({"dropout": 2.0}, r"dropout \(2.0\) must be within 0 and 1$", ValueError),
    "eps": ({"eps": -1e-5}, r"eps \(-1e-05\) must not be negative$", ValueError),
    "norms left out": ({"layer_norm": True}, r"params \(4 tensors\) must be 10", RuntimeError),
}  # fmt: skip


def test_missing_bias_is_no_mistake(backend):
    """torch's cell takes one bias of the two; the sequence does here."""
    given = sequence_arguments(**with_parameter(3, None))
    zeroed = sequence_arguments(params=[*given["params"][:3], zeros(4 * H)])
    zeroed |= {"input": given["input"], "hx": given["hx"]}
    torch.testing.assert_close(lstm(**given), lstm(**zeroed))


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", SEQUENCE_CASES)
def test_sequence_refuses(backend, name, grad):
    changed, pattern, expected = SEQUENCE_CASES[name]
    given = sequence_arguments(**changed)
    if grad and given["params"]:
        given["params"] = [t.clone().requires_grad_() for t in given["params"]]
    kept = copy.deepcopy([t.detach() for t in given["params"]])
    state = torch.get_rng_state()
    assert_refused(lambda: lstm(**given), expected, "lstm: " + pattern)
    assert all(map(torch.equal, kept, given["params"]))
    assert torch.equal(state, torch.get_rng_state())


OF_VALUES = (
    "length 0",
    "length beyond",
    "negative length",
    "sum of batch_sizes",
    "growing",
    "batch size 0",
    "states of another",
)


@pytest.mark.parametrize(
    "name", [n for n in SEQUENCE_CASES if "meta" not in n and not n.startswith(OF_VALUES)]
)
def test_sequence_refuses_fake_tensors_too(name):
    """Where the operator's fake function serves, and no value is known."""
    changed, pattern, expected = SEQUENCE_CASES[name]

    def faked(v):
        if isinstance(v, list | tuple):
            return type(v)([faked(t) for t in v])
        return mode.from_tensor(v) if isinstance(v, torch.Tensor) else v

    with FakeTensorMode() as mode:
        given = {n: faked(v) for n, v in sequence_arguments(**changed).items()}
        assert_refused(lambda: lstm(**given), expected, "lstm: " + pattern)


def test_masks_are_not_drawn_before_a_refusal(backend):
    """Also where the operator is what refuses."""
    for changed in ({"hx": (zeros(1, B, H), zeros(1, B, H + 1))}, with_parameter(2, zeros(H))):
        given = sequence_arguments(**changed, zoneout=0.5, recurrent_dropout=0.5)
        state = torch.get_rng_state()
        with pytest.raises(RuntimeError):
            lstm(**given)
        assert torch.equal(state, torch.get_rng_state())


MODULE_CASES = {
    "features": (zeros(T, B, I + 1), None),
    "rank 1": (zeros(I), None),
    "rank 4": (zeros(1, T, B, I), None),
    "no step": (zeros(0, B, I), None),
    "no step unbatched": (zeros(0, I), None),
    "fp64": (zeros(T, B, I).double(), None),
    "integers": (zeros(T, B, I).long(), None),
    "on meta": (zeros(T, B, I, device="meta"), None),
    "h": (zeros(T, B, I), (zeros(1, B + 1, H), zeros(1, B, H))),
    "c": (zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H + 1))),
    "unbatched states": (zeros(T, B, I), (zeros(1, H), zeros(1, H))),
    "batched states": (zeros(T, I), (zeros(1, B, H), zeros(1, B, H))),
    "three states": (zeros(T, B, I), (zeros(1, B, H),) * 3),
    "states of fp64": (zeros(T, B, I), (zeros(1, B, H).double(),) * 2),
    "packed, features": (pack_padded_sequence(zeros(T, B, I + 1), [5, 2, 1]), None),
    "packed, fp64": (pack_padded_sequence(zeros(T, B, I).double(), [5, 2, 1]), None),
    "packed, states": (
        pack_padded_sequence(zeros(T, B, I), [5, 2, 1]),
        (zeros(1, 2, H), zeros(1, 2, H)),
    ),
    "packed wrongly": (PackedSequence(zeros(5, I), torch.tensor([2, 2])), None),
}


@pytest.mark.parametrize("name", MODULE_CASES)
def test_module_refuses_as_torchs(backend, name):
    x, hx = MODULE_CASES[name]
    expected = type_by_torch(lambda: torch.nn.LSTM(I, H)(x, hx))
    own = nn.LSTM(I, H)
    kept = copy.deepcopy(own.state_dict())
    assert_refused(lambda: own(x, hx), expected, r"(LSTM|lstm): \S+ \(.+must ")
    for key, t in kept.items():
        assert torch.equal(own.state_dict()[key], t)


def test_module_refuses_what_torch_does_by_accident(backend):
    """torch raises an AttributeError or an IndexError of its own code, or nothing."""
    module, x = nn.LSTM(I, H), zeros(T, B, I)
    assert_refused(lambda: module([1.0]), TypeError, r"lstm: x \(list\) must be a Tensor")
    assert_refused(lambda: module(None), TypeError, r"lstm: x")
    assert_refused(lambda: module(x, zeros(1, B, H)), TypeError, r"lstm: hx \(Tensor\) must be")
    assert_refused(lambda: module(x, (None, None)), TypeError, r"lstm: hx\[0\] \(NoneType\) must")
    assert_refused(lambda: module(x, (zeros(1, B, H),)), RuntimeError, r"lstm: hx \(1 values\)")
    assert_refused(lambda: module(x[:, 0], zeros(1, H)), TypeError, r"lstm: hx \(Tensor\)")


def test_states_of_an_unsorted_packed_sequence(backend):
    """torch takes those of a larger batch, and leaves the rest out."""
    packed = pack_padded_sequence(zeros(T, B, I), [1, 2, 5], enforce_sorted=False)
    for bad in (zeros(1, 4, H), zeros(1, 2, H), zeros(B, H)):
        for hx in ((bad, zeros(1, B, H)), (zeros(1, B, H), bad)):
            assert_refused(
                lambda hx=hx: nn.LSTM(I, H)(packed, hx),
                RuntimeError,
                r"LSTM: hx\[\d\] \(shape .+\) must hold the states of 3 sequences",
            )


def test_lengths_beside_a_packed_sequence():
    packed = pack_padded_sequence(zeros(T, B, I), [5, 2, 1])
    assert_refused(
        lambda: nn.LSTM(I, H)(packed, lengths=[5, 2, 1]),
        ValueError,
        r"LSTM: lengths must not be given beside a PackedSequence",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 1.5},
        {"dropout": True},
        {"hidden_size": 0},
        {"hidden_size": 2.0},
        {"input_size": 0},
        {"num_layers": 0},
        {"bias": 1},
        {"batch_first": 1},
        {"proj_size": -1},
        {"proj_size": H},
        {"proj_size": H + 1},
    ],
    ids=str,
)
def test_constructor_refuses_as_torchs(options):
    given = {"input_size": I, "hidden_size": H, **options}
    expected = type_by_torch(lambda: torch.nn.LSTM(**given))
    with pytest.raises(expected) as caught:
        nn.LSTM(**given)
    assert type(caught.value) is expected


def test_constructor_refuses():
    for make, expected, message in (
        (lambda: nn.LSTM(I, H, proj_size=H), ValueError, r"LSTM: proj_size \(6\) must be smaller than hidden_size"),
        (lambda: nn.LSTM(I, H, zoneout=1.5), ValueError, r"LSTM: zoneout \(1.5\) must be within 0 and 1"),
        (lambda: nn.LSTM(I, H, zoneout=(0.1, -1)), ValueError, r"LSTM: zoneout \(-1\) must"),
        (lambda: nn.LSTM(I, H, zoneout=(0.1,)), ValueError, r"LSTM: zoneout \(\(0.1,\)\) must be a rate or a pair"),
        (lambda: nn.LSTM(I, H, zoneout=True), TypeError, r"LSTM: zoneout \(True\) must be a number"),
        (lambda: nn.LSTM(I, H, recurrent_dropout=-0.5), ValueError, r"LSTM: recurrent_dropout \(-0.5\) must"),
        (lambda: nn.LSTM(I, H, recurrent_dropout=None), TypeError, r"LSTM: recurrent_dropout \(None\) must"),
        (lambda: nn.LSTM(I, H, bias=False, forget_bias=1.0), ValueError, r"LSTM: forget_bias \(1.0\) must be None"),
        (lambda: nn.LSTMCell(I, H, False, forget_bias=1.0), ValueError, r"LSTMCell: forget_bias \(1.0\) must be None"),
    ):  # fmt: skip
        assert_refused(make, expected, message)
    with pytest.raises(TypeError):
        nn.LSTM(I, H, 1, True, False, 0.0, False, 0, None, None, True)  # by keyword alone


def test_a_refused_call_keeps_nothing_alive():
    def call(**changed):
        lstm(**sequence_arguments(**changed))

    check_refused_call_keeps_nothing_alive(
        call, (T, B, I), with_parameter(2, zeros(H)), dict(lengths=[9, 9, 9])
    )


def test_what_is_no_mistake(backend):
    """At the edges of what is refused."""
    module = nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    plain = module(x)
    torch.testing.assert_close(module(x, lengths=[T] * B), plain)
    torch.testing.assert_close(module(x, lengths=(T, T, T)), plain)
    spaced = torch.full((2 * B,), T)[::2]
    torch.testing.assert_close(module(x, lengths=spaced), plain)
    assert module(x[:1], lengths=[1] * B)[0].shape == (1, B, H)
    states = [torch.zeros(1, B, H), torch.zeros(1, B, H)]
    torch.testing.assert_close(module(x, states), plain)
    torch.testing.assert_close(module(x[:, 0], lengths=[T])[0], plain[0][:, 0])
    assert nn.LSTMCell(I, H)(zeros(0, I))[0].shape == (0, H)
    cell = nn.LSTMCell(I, H)
    hx = [torch.zeros(B, H), torch.zeros(B, H)]
    torch.testing.assert_close(cell(x[0], hx), cell(x[0]))
    batch_sizes = torch.full((2 * T,), B)[::2]
    packed = PackedSequence(x.reshape(-1, I), batch_sizes)
    torch.testing.assert_close(module(packed)[0].data, plain[0].reshape(-1, H))


@pytest.mark.gpu
def test_two_devices():
    given = sequence_arguments()
    for name, value in {
        "input": given["input"].cuda(),
        "hx": tuple(t.cuda() for t in given["hx"]),
        "lengths": LENGTHS.cuda(),
    }.items():
        changed = sequence_arguments(**{name: value})
        with pytest.raises(RuntimeError, match=r"lstm: .+ must be on"):
            lstm(**changed)
