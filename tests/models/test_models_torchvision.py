"""The ResNets against torchvision's: keys, outputs, gradients and statistics, in fp64."""

import copy

import pytest
import torch
from support.models import assert_same_state, random_input, randomize, relative_error
from support.torchvision_stub import torchvision_models

from advdl_ops import models

theirs = torchvision_models()

CLASSES = 7
FAST = ["resnet18", "resnet50", "resnext50_32x4d"]
SLOW = ["resnet34", "resnet101", "resnet152", "wide_resnet50_2"]
ALL = FAST + SLOW
TRAINED = [*FAST, *(pytest.param(name, marks=pytest.mark.extra) for name in SLOW)]


def pair(name, **options):
    """Our model and torchvision's, the same random weights, fp64."""
    reference = getattr(theirs, name)(num_classes=CLASSES, **options)
    randomize(reference).double()
    model = models.create_model(name, num_classes=CLASSES, **options).double()
    model.load_state_dict(reference.state_dict(), strict=True)
    return model, reference


def check_eval(model, reference, x, tolerance=1e-10):
    model.eval(), reference.eval()
    expected = reference(x).detach()
    assert expected.abs().max() > 1e-3  # a signal that came through
    assert relative_error(model(x).detach(), expected) < tolerance
    with torch.no_grad():
        assert relative_error(model(x), expected) < tolerance


def check_training(model, reference, x, steps=2):
    """Losses, all gradients and all statistics over some steps of SGD."""
    model.train(), reference.train()
    target = torch.arange(x.shape[0]) % CLASSES
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, reference)
    ]
    for _ in range(steps):
        losses = []
        for network, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(network(x), target)
            loss.backward()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
        twins = dict(reference.named_parameters())
        for key, parameter in model.named_parameters():
            assert twins[key].grad.abs().max() > 0, key
            assert relative_error(parameter.grad, twins[key].grad) < 1e-7, key
        for optimizer in optimizers:
            optimizer.step()
    assert_same_state(model, reference, steps)


@pytest.mark.parametrize("name", ALL)
def test_keys_both_ways_and_eval(name):
    model, reference = pair(name)
    ours, expected = model.state_dict(), reference.state_dict()
    assert list(ours) == list(expected)  # the order too: optimizer states go by it
    assert [v.shape for v in ours.values()] == [v.shape for v in expected.values()]
    assert [v.dtype for v in ours.values()] == [v.dtype for v in expected.values()]
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in reference.named_parameters()]
    check_eval(model, reference, random_input((2, 3, 40, 40)))

    # And back: other weights of ours into theirs.
    randomize(model, seed=1)
    reference.load_state_dict(model.state_dict(), strict=True)
    check_eval(model, reference, random_input((1, 3, 33, 36), seed=1))


@pytest.mark.parametrize("name", TRAINED)
def test_training(name):
    model, reference = pair(name)
    check_training(model, reference, random_input((3, 3, 40, 40)))
    # By now the two have weights of their own.
    check_eval(model, reference, random_input((2, 3, 40, 40), seed=1), tolerance=1e-8)


@pytest.mark.parametrize("name", FAST)
def test_same_seed_same_weights(name):
    for options in ({}, {"zero_init_residual": True}):
        torch.manual_seed(0)
        model = models.create_model(name, num_classes=CLASSES, **options)
        torch.manual_seed(0)
        reference = getattr(theirs, name)(num_classes=CLASSES, **options)
        for key, value in reference.state_dict().items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("dilate", [(False, True, True), (True, False, True)])
def test_replace_stride_with_dilation(dilate):
    model, reference = pair("resnet50", replace_stride_with_dilation=dilate)
    check_eval(model, reference, random_input((2, 3, 40, 40)))
    check_training(model, reference, random_input((2, 3, 40, 40)), steps=1)


def test_groups_and_width():
    model, reference = pair("resnet50", groups=2, width_per_group=16)
    check_eval(model, reference, random_input((2, 3, 40, 40)))


def test_zero_init_residual():
    torch.manual_seed(0)
    model = models.create_model("resnet18", num_classes=CLASSES, zero_init_residual=True).double()
    reference = theirs.resnet18(num_classes=CLASSES).double()
    reference.load_state_dict(model.state_dict())
    model.eval(), reference.eval()
    x = random_input((2, 3, 40, 40))
    assert relative_error(model(x), reference(x)) < 1e-10


@pytest.mark.parametrize("options", [{"in_channels": 1}, {"stem": "small"}])
def test_other_stems(options):
    """Against torchvision's model with its stem exchanged by hand."""
    reference = theirs.resnet18(num_classes=CLASSES)
    if "stem" in options:
        reference.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        reference.maxpool = torch.nn.Identity()
    else:
        reference.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    randomize(reference).double()
    model = models.create_model("resnet18", num_classes=CLASSES, **options).double()
    model.load_state_dict(reference.state_dict(), strict=True)
    x = random_input((2, model.conv1.in_channels, 20, 20))
    check_eval(model, reference, x)
    check_training(model, reference, x, steps=1)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_torchvision_file(tmp_path, suffix):
    reference = randomize(theirs.resnet18(num_classes=CLASSES))
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save(reference.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(reference.state_dict(), path)
    model = models.create_model("resnet18", num_classes=CLASSES, weights=path)
    check_eval(model.double(), reference.double(), random_input((2, 3, 40, 40)))


def test_channels_last():
    model, reference = pair("resnet18")
    model.to(memory_format=torch.channels_last)
    x = random_input((2, 3, 40, 40))
    check_eval(model, reference, x.contiguous(memory_format=torch.channels_last))
    check_training(model, reference, x.contiguous(memory_format=torch.channels_last), steps=1)


def test_float32_is_as_exact_as_torchvision():
    """Error against fp64 in eval and in training gradients, both models in fp32."""
    _, reference = pair("resnet18")
    for train in (False, True):
        exact = copy.deepcopy(reference).train(train)
        stock = copy.deepcopy(reference).float().train(train)
        model = models.create_model("resnet18", num_classes=CLASSES).train(train)
        model.load_state_dict(stock.state_dict())
        x = random_input((4, 3, 40, 40), torch.float32)
        outs = [m(x.to(next(m.parameters()).dtype)) for m in (exact, stock, model)]
        bound = max(relative_error(outs[1], outs[0]), 1e-6)
        assert relative_error(outs[2].detach(), outs[0].detach()) < 2 * bound
        for out in outs:
            torch.nn.functional.cross_entropy(out, torch.arange(4)).backward()
        stock_error, own_error = (
            torch.stack(
                [
                    (p.grad.double() - q.grad).norm() / q.grad.norm()
                    for p, q in zip(m.parameters(), exact.parameters(), strict=True)
                ]
            ).median()
            for m in (stock, model)
        )
        assert own_error < 1.5 * stock_error + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_on_the_gpu(name):
    """fp64 on the GPU against torchvision's on the CPU."""
    model, reference = pair(name)
    model.cuda()
    x = random_input((3, 3, 40, 40))
    target = torch.arange(3)
    for network in (model, reference):
        out = network(x.to(next(network.parameters()).device))
        torch.nn.functional.cross_entropy(out, target.to(out.device)).backward()
    for (key, parameter), twin in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        assert relative_error(parameter.grad.cpu(), twin.grad) < 1e-7, key
    model.eval(), reference.eval()
    with torch.no_grad():
        assert relative_error(model(x.cuda()).cpu(), reference(x)) < 1e-10
