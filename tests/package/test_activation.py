"""Names and modules of activations; their values and derivatives over the whole range."""

import pytest
import torch
from support.accuracy import ACTIVATIONS, ULPS

import advdl_ops
from advdl_ops.activation import ACTIVATIONS as NAMES
from advdl_ops.activation import resolve_activation
from advdl_ops.functional import batch_norm_act


def test_every_name_and_module():
    for name, activation in NAMES.items():
        assert resolve_activation("f", name) is activation
        assert resolve_activation("f", activation) is activation
    nn = torch.nn
    for module, name, param in [
        (nn.ReLU(), "relu", 0.0),
        (nn.ReLU(inplace=True), "relu", 0.0),
        (nn.LeakyReLU(), "leaky_relu", 0.01),
        (nn.LeakyReLU(0.2), "leaky_relu", 0.2),
        (nn.ELU(), "elu", 1.0),
        (nn.ELU(0.7), "elu", 0.7),
        (nn.SiLU(), "silu", 0.0),
        (nn.GELU(), "gelu", 0.0),
        (nn.GELU("tanh"), "gelu_tanh", 0.0),
        (nn.Sigmoid(), "sigmoid", 0.0),
        (nn.Tanh(), "tanh", 0.0),
        (nn.Hardswish(), "hardswish", 0.0),
        (nn.ReLU6(), "relu6", 0.0),
        (nn.ReLU6(inplace=True), "relu6", 0.0),
        (nn.Identity(), "identity", 0.0),
        (None, "identity", 0.0),
    ]:
        found = resolve_activation("f", module)
        assert (found.name, found.param) == (name, param)


def test_codes_are_those_of_the_kernels():
    # csrc/common/tensor_types.h; part of the operator's schema, so never renumbered.
    codes = {name: a.code for name, a in NAMES.items()}
    order = [
        "relu",
        "leaky_relu",
        "elu",
        "silu",
        "gelu",
        "gelu_tanh",
        "sigmoid",
        "tanh",
        "hardswish",
        "relu6",
    ]
    assert codes == {name: i + 1 for i, name in enumerate(order)}


@pytest.mark.parametrize(
    ("act", "error"),
    [("ReLU", ValueError), ("", ValueError), (torch.relu, TypeError), (1, TypeError),
     (torch.nn.PReLU(), TypeError), (torch.nn.Hardtanh(0, 6), TypeError), (torch.nn.ReLU, TypeError)],
    ids=["name", "empty", "function", "number", "module", "base", "class"],
)  # fmt: skip
def test_refused(act, error):
    with pytest.raises(error, match=r"^f: act \(.*\) must be None, "):
        resolve_activation("f", act)


def test_subclass_is_refused():
    class Doubled(torch.nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match=r"^f: act \(Doubled\) must"):
        resolve_activation("f", Doubled())


HALVES, WIDE = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)


def points(dtype):
    """Every fp16 and bf16 number; for the others a sweep over all magnitudes and both signs, and the kinks."""
    if dtype in HALVES:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        return values[values.isfinite()]
    sweep = torch.logspace(-30, 30, 4001, dtype=torch.float64)
    near = torch.linspace(0, 20, 4001, dtype=torch.float64)
    half = torch.cat([sweep, near]).to(dtype)
    return torch.cat([-half, half, torch.tensor([0.0, -0.0, -3.0, 3.0, 6.0], dtype=dtype)])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float32), *(("fused", dtype) for dtype in HALVES + WIDE)],
    ids=str,
)
@pytest.mark.parametrize("through", ["x", "residual"])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_values_and_derivatives(act, through, dtype, backend):
    """An identity norm leaves the activation of x or of the residual. Each point by the rule, against its own size."""
    z = points(dtype)[None, None]
    zero = torch.zeros(1)
    params = (zero, zero + 1) if dtype != torch.float64 else (zero.double(), zero.double() + 1)
    x = torch.zeros_like(z)

    def run(function, values):
        values = values.detach().requires_grad_()
        out = function(values)
        return out.detach(), torch.autograd.grad(out, values, torch.ones_like(out))[0]

    def norm(values):
        inputs = (values, None) if through == "x" else (x, values)
        return batch_norm_act(
            inputs[0], *params, eps=0.0, residual=inputs[1], act=ACTIVATIONS[act][0]
        )

    with advdl_ops.use_backend(backend):
        found = run(norm, z)
    exact = run(ACTIVATIONS[act][1], z.double())
    stock = run(ACTIVATIONS[act][1], z)
    eps = torch.finfo(dtype).eps
    acc = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    tiny = torch.finfo(dtype).smallest_normal
    for what, own, truth, plain in zip(("value", "derivative"), found, exact, stock, strict=True):
        assert not (own.isnan() & ~plain.isnan()).any(), (what, z[own.isnan()][:5])
        # Sums such as 1 + erf cancel for negative z: their terms are of size |z| (value) and 1 (derivative).
        # The derivative of gelu by tanh has the factors 1 - tanh^2 and z (1 + 0.134 z^2).
        bounded = z.double().abs().clamp(max=10)
        terms = bounded if what == "value" else 2 + 0.0 * bounded
        if act == "GELU(tanh)" and what == "derivative":
            terms = terms + bounded + 0.134 * bounded**3
        slack = ULPS * (eps * truth.abs() + acc.eps * terms + tiny)
        limit = (plain.double() - truth).abs() + slack
        representable = truth.abs() <= torch.finfo(dtype).max
        worse = ((own.double() - truth).abs() > limit) & representable & limit.isfinite()
        assert not worse.any(), (what, z[worse][:5], own[worse][:5], truth[worse][:5])


@pytest.mark.parametrize("backend", ["fused", "reference"])
@pytest.mark.parametrize("dtype", HALVES + WIDE, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_goes_through(act, dtype, backend):
    """The derivative of relu and relu6 is 1 there, as in torch but for its vectors, where relu6's is 0."""
    zero = torch.zeros(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for count in (1, 70):
        z = torch.full((1, 1, count), float("nan"), dtype=dtype).requires_grad_()
        with advdl_ops.use_backend(backend):
            out = batch_norm_act(z, zero, zero + 1, eps=0.0, act=ACTIVATIONS[act][0])
        assert out.isnan().all()
        if act == "relu" or (act == "relu6" and (backend == "fused" or count == 1)):
            assert torch.autograd.grad(out.sum(), z)[0].eq(1).all()
