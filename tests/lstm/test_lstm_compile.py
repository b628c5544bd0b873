"""LSTM and LSTMCell under torch.compile(fullgraph=True) with varying lengths, torch.export, and CUDA graphs' rules."""

import copy
import time

import pytest
import torch
from support.accuracy import f64
from support.compiled import exported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils.rnn import pack_padded_sequence

import advdl_ops
from advdl_ops import nn

pytestmark = pytest.mark.usefixtures("fresh_compile", "one_thread")

I, H = 3, 4  # noqa: E741
OPTIONS = {
    "plain": {},
    "two layers, bidirectional": {"num_layers": 2, "bidirectional": True},
    "projection, no bias": {"proj_size": 2, "bias": False},
    "batch_first": {"batch_first": True},
    "layer norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.2, 0.3)},
    "all": {
        "num_layers": 2,
        "layer_norm": True,
        "zoneout": 0.2,
        "recurrent_dropout": 0.3,
        "dropout": 0.2,
    },
}
NAMES = pytest.mark.parametrize("name", OPTIONS)


def module_of(name, **options):
    return nn.LSTM(I, H, dtype=f64, **OPTIONS[name], **options).eval()


def sequence(steps, batch=2, batch_first=False, mark=True):
    x = torch.randn(steps, batch, I, dtype=f64)
    x = x.transpose(0, 1).contiguous() if batch_first else x
    if mark:
        torch._dynamo.mark_dynamic(x, 1 if batch_first else 0)
    return x.requires_grad_()


def step(module, x, *more, **options):
    """Outputs, and gradients; nothing is left on the module's parameters."""
    y, states = module(x, *more, **options)
    outs = (y, *states)
    if not y.requires_grad:
        return outs
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad(sum(t.square().sum() for t in outs), leaves)
    return (*(t.detach() for t in outs), *grads)


def assert_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


@NAMES
def test_varying_steps_compile_once(name):
    module = module_of(name)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter)
    for steps in (3, 5, 9, 31):
        x = sequence(steps, batch_first=module.batch_first)
        again = x.detach().clone().requires_grad_()
        torch._dynamo.mark_dynamic(again, 1 if module.batch_first else 0)
        assert_alike(step(fast, again), step(module, x))
    assert counter.frame_count == 1


def test_varying_steps_without_a_mark():
    """One compilation for the first length, and one more for all others."""
    module = module_of("two layers, bidirectional")
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, fullgraph=True, backend=counter)
    for steps in (3, 5, 9, 31, 4):
        x = sequence(steps, mark=False)
        torch.testing.assert_close(fast(x), module(x))
    assert counter.frame_count == 2


def test_dynamic_batch_and_steps():
    module = module_of("layer norm")
    fast = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps, batch in ((3, 2), (5, 7), (2, 3)):
        x = sequence(steps, batch, mark=False)
        hx = torch.randn(2, 1, batch, H, dtype=f64).unbind()
        torch.testing.assert_close(fast(x, hx), module(x, hx))


@NAMES
def test_lengths(name):
    """A tensor of them: no value is asked for, so nothing is compiled again."""
    module = module_of(name)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(copy.deepcopy(module), fullgraph=True, backend=counter)
    for lengths in ((3, 1), (2, 5), (9, 9)):
        x = sequence(max(lengths), batch_first=module.batch_first)
        lengths = torch.tensor(lengths)
        assert_alike(step(fast, x, lengths=lengths), step(module, x, lengths=lengths))
    assert counter.frame_count == 1
    fast(x, lengths=[9, 4])


def test_lengths_are_checked_by_the_operator():
    fast = torch.compile(module_of("plain"), fullgraph=True, backend="aot_eager")
    x = sequence(4)
    fast(x, lengths=torch.tensor([4, 1]))
    for bad in ([5, 1], [0, 2], [-1, 3]):
        with pytest.raises(RuntimeError, match="lengths"):
            fast(x, lengths=torch.tensor(bad))


@pytest.mark.parametrize("hx", [False, True])
def test_packed(hx):
    module = module_of("two layers, bidirectional")
    fast = torch.compile(module, fullgraph=True, backend="aot_eager")
    states = torch.randn(2, 4, 2, H, dtype=f64).unbind() if hx else None
    x = torch.randn(5, 2, I, dtype=f64)
    packed = pack_padded_sequence(x, [2, 5], enforce_sorted=False)
    found, found_states = fast(packed, states)
    expected, expected_states = module(packed, states)
    torch.testing.assert_close(found.data, expected.data)
    torch.testing.assert_close(found_states, expected_states)


def test_training_masks_are_drawn_anew():
    """Each call has its own, and a seed reproduces them."""
    for backend in ("aot_eager", "inductor"):
        torch.compiler.reset()
        module = module_of("all").train()
        fast = torch.compile(module, fullgraph=True, backend=backend)
        x = sequence(5, mark=False)
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(fast(x)[0])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[0], outputs[2])
        assert not torch.equal(fast(x)[0], outputs[2])
        outputs[0].square().sum().backward()
        for key, t in module.named_parameters():
            assert t.grad.isfinite().all(), key


@pytest.mark.parametrize("states", [False, True])
def test_cell_in_a_loop(states):
    cell = nn.LSTMCell(I, H, dtype=f64)

    def loop(x, hx):
        outputs = []
        for row in x:
            hx = cell(row, hx)
            outputs.append(hx[0])
        return torch.stack(outputs), hx

    fast = torch.compile(loop, fullgraph=True, backend="aot_eager")
    x = sequence(4, mark=False)
    hx = torch.randn(2, 2, H, dtype=f64).unbind() if states else None
    (y, found), (expected_y, expected) = fast(x, hx), loop(x, hx)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(found, expected)
    leaves = [x, *cell.parameters()]
    grads = [torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected_y)]
    torch.testing.assert_close(*grads)


def test_cell_with_dynamic_batch():
    cell = nn.LSTMCell(I, H, dtype=f64)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(cell, fullgraph=True, backend=counter)
    for batch in (2, 5, 9):
        x = torch.randn(batch, I, dtype=f64)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(fast(x), cell(x))
    assert counter.frame_count == 1


def test_without_gradients():
    for name in OPTIONS:
        torch.compiler.reset()
        module = module_of(name)
        fast = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = sequence(4, mark=False)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), module(x))
        with torch.inference_mode():
            torch.testing.assert_close(fast(x), module(x))


def test_autocast_inside():
    module, cell = nn.LSTM(I, H, 2), nn.LSTMCell(I, H)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            y, states = module(x)
            return y, states, cell(y[-1, :, :I])

    x = torch.randn(4, 2, I)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    expected = call(x)
    torch.testing.assert_close(found, expected)
    assert found[0].dtype == torch.bfloat16


def test_six_layers_compile_in_seconds():
    module = nn.LSTM(8, 16, 6)
    x = torch.randn(50, 4, 8)
    start = time.monotonic()
    fast = torch.compile(module, fullgraph=True)
    y, _ = fast(x)
    y.sum().backward()
    assert time.monotonic() - start < 60  # a loop over 300 steps takes minutes
    torch.testing.assert_close(y, module(x)[0])


def test_refused_while_compiling():
    """In Python, by shapes alone."""
    module, wider = nn.LSTM(I, H), nn.LSTM(I + 1, H)
    cell = nn.LSTMCell(I, H)
    for call in (
        lambda x: wider(x),
        lambda x: module(x, (torch.zeros(1, 3, H), torch.zeros(1, 2, H))),
        lambda x: module(x, lengths=torch.tensor([1, 2, 3])),
        lambda x: module(x[:0]),
        lambda x: cell(x[0], (torch.zeros(3, H), torch.zeros(2, H))),
    ):
        torch.compiler.reset()
        with pytest.raises(Exception, match="must"):
            torch.compile(call, fullgraph=True, backend="aot_eager")(torch.randn(4, 2, I))


@NAMES
def test_export(name):
    """The batch may vary; tests/habits has the number of steps."""
    module = module_of(name)
    dim = 0 if module.batch_first else 1
    batch = torch.export.Dim("batch", min=2, max=64)
    x = sequence(4, 3, module.batch_first, mark=False).detach()
    other = exported(copy.deepcopy(module), (x,), dynamic_shapes={"input": {dim: batch}})
    for n in (3, 5):
        x = sequence(4, n, module.batch_first, mark=False).detach()
        torch.testing.assert_close(other(x), module(x))


def test_export_with_lengths_and_states():
    module = module_of("two layers, bidirectional")
    x, lengths = torch.randn(4, 3, I, dtype=f64), torch.tensor([4, 1, 2])
    hx = torch.randn(2, 4, 3, H, dtype=f64).unbind()
    other = exported(copy.deepcopy(module), (x, hx), {"lengths": lengths})
    for lengths in (torch.tensor([4, 1, 2]), torch.tensor([3, 4, 4])):
        torch.testing.assert_close(other(x, hx, lengths=lengths), module(x, hx, lengths=lengths))


def test_export_of_a_cell():
    cell = nn.LSTMCell(I, H, dtype=f64)
    x, hx = torch.randn(3, I, dtype=f64), torch.randn(2, 3, H, dtype=f64).unbind()
    torch.testing.assert_close(exported(copy.deepcopy(cell), (x, hx))(x, hx), cell(x, hx))
    torch.testing.assert_close(exported(copy.deepcopy(cell), (x,))(x), cell(x))


def test_transforms_under_compile(monkeypatch):
    """The inputs of a transformed function do not say that they need a gradient."""
    monkeypatch.setattr(advdl_ops.backend, "_require_native", False)  # the reference serves them
    module = module_of("layer norm")
    parameters = {n: t.detach() for n, t in module.named_parameters()}
    x = sequence(3, mark=False).detach()

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    for function in (torch.func.grad(loss), torch.func.grad(loss, argnums=1)):
        torch.compiler.reset()
        found = torch.compile(function, fullgraph=True, backend="aot_eager")(parameters, x)
        torch.testing.assert_close(found, function(parameters, x))
