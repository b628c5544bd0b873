"""optimize(): models of torchvision, timm, segmentation_models_pytorch, diffusers against what they were, in fp64."""

import copy
import warnings

import pytest
import torch
from support.optimize import check_as, counts, randomized, same, scores
from support.torchvision_stub import torchvision_models

import advdl_ops

pytestmark = pytest.mark.usefixtures("one_thread")

torchvision = torchvision_models()  # before timm and others, which import it


def peer(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


def check_model(model, expected, x):
    """Counts, keys, shared parameters, and the values of both trees."""
    randomized(model).double()
    twin = copy.deepcopy(model)
    fast = advdl_ops.optimize(model)
    assert counts(fast) == expected
    assert list(fast.state_dict()) == list(twin.state_dict())
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    check_as(twin, fast, x)
    # The given tree works as before, on the same parameters.
    same(scores(model.eval()(x)).detach(), scores(twin(x)).detach())


def some_extra(names, count):
    """All but the first ``count`` marked as extra: every run takes these."""
    marked = [pytest.param(name, marks=pytest.mark.extra) for name in list(names)[count:]]
    return [*list(names)[:count], *marked]


def image(size=64, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=generator)


# ---- torchvision ----

# Groups that run as one op, layers converted alone, layers left.
TORCHVISION = {
    "resnet18": (20, 0, 0),
    "resnet50": (53, 0, 0),
    "resnext50_32x4d": (53, 0, 0),
    "vgg11_bn": (8, 0, 0),
    "squeezenet1_0": (26, 0, 0),
    "densenet121": (120, 62, 0),
    "mobilenet_v2": (52, 0, 0),
    "mobilenet_v3_small": (43, 9, 0),
    "mnasnet0_5": (52, 0, 0),
    "shufflenet_v2_x0_5": (56, 0, 0),
    "regnet_y_400mf": (85, 0, 0),
    "efficientnet_b0": (81, 0, 0),
    "googlenet": (59, 0, 0),
    "convnext_tiny": (0, 27, 0),
    "segmentation.fcn_resnet50": (55, 2, 0),
    "segmentation.deeplabv3_resnet50": (61, 2, 0),
}
TORCHVISION_SLOW = {
    "resnet34": (36, 0, 0),
    "resnet101": (104, 0, 0),
    "resnet152": (155, 0, 0),
    "wide_resnet50_2": (53, 0, 0),
    "mobilenet_v3_large": (54, 8, 0),
    "resnext101_32x8d": (104, 0, 0),
    "vgg16_bn": (13, 0, 0),
    "densenet201": (200, 102, 0),
    "regnet_x_400mf": (71, 0, 0),
    "segmentation.deeplabv3_resnet101": (112, 2, 0),
    "segmentation.deeplabv3_mobilenet_v3_large": (62, 10, 0),
}


def check_torchvision(name, expected):
    torch.manual_seed(0)
    options = {"num_classes": 5}
    module = torchvision
    if name == "googlenet":
        options["init_weights"] = False  # by scipy, which takes long
    if name.startswith("segmentation."):
        module, name = torchvision.segmentation, name.partition(".")[2]
        options.update(weights_backbone=None, aux_loss=True)
    check_model(getattr(module, name)(**options), expected, image())


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    check_torchvision(name, TORCHVISION[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", some_extra(TORCHVISION_SLOW, 5))
def test_more_of_torchvision(name):
    check_torchvision(name, TORCHVISION_SLOW[name])


def test_groups_of_resnet50_with_their_activations():
    fused = advdl_ops.explain(advdl_ops.optimize(torchvision.resnet50()), as_dict=True)["fused"]
    assert sum(names.endswith("relu") for names in fused) == 49
    assert sum(names.endswith("add + relu") for names in fused) == 16
    assert "layer1.0.conv3 + bn3 + add + relu" in fused
    assert "layer1.0.downsample.0 + 1" in fused


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_compile_whole(name, fresh_compile):
    model = randomized(getattr(torchvision, name)(num_classes=5)).double()
    twin, fast = copy.deepcopy(model), advdl_ops.optimize(model)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    x = image(40)
    for train in (True, False):
        twin.train(train), compiled.train(train)
        twin.zero_grad(), compiled.zero_grad()
        expected, found = twin(x), compiled(x)
        same(found.detach(), expected.detach())
        expected.square().mean().backward(), found.square().mean().backward()
        for a, b in zip(fast.parameters(), twin.parameters(), strict=True):
            same(a.grad, b.grad, 1e-6)


# ---- timm ----

TIMM = {
    "resnet18": (20, 0, 0),
    "resnet26d": (31, 1, 0),
    "resnetv2_50": (48, 23, 0),
    "resnext26ts": (31, 0, 0),
    "resnetblur18": (20, 0, 0),
    "resnet50_gn": (49, 57, 0),
    "resnest14d": (23, 5, 0),
    "res2net50_48w_2s": (53, 0, 0),
    "seresnet18": (36, 0, 0),
    "ecaresnet26t": (31, 1, 0),
    "regnety_002": (70, 0, 0),
    "regnetx_002": (44, 0, 0),
    "regnetz_b16": (112, 0, 0),
    "gernet_s": (45, 0, 0),
    "repvgg_a0": (61, 0, 0),
    "lambda_resnet26t": (28, 12, 0),
    "efficientnet_b0": (81, 0, 0),
    "tf_efficientnet_b0": (76, 5, 5),
    "efficientnet_lite0": (49, 0, 0),
    "tinynet_e": (51, 0, 0),
    "mixnet_s": (51, 106, 0),
    "mobilenetv2_100": (52, 0, 0),
    "mobilenetv3_small_050": (44, 9, 0),
    "mnasnet_050": (52, 0, 0),
    "fbnetc_100": (65, 0, 0),
    "spnasnet_100": (64, 0, 0),
    "hardcorenas_a": (43, 8, 0),
    "lcnet_050": (30, 2, 0),
    "ghostnet_050": (88, 7, 0),
    "repghostnet_050": (88, 39, 0),
    "convnext_atto": (12, 45, 0),
    "convnextv2_atto": (12, 45, 0),
    "edgenext_xx_small": (0, 25, 0),
    "inception_next_atto": (13, 66, 0),
    "mambaout_femto": (0, 23, 0),
    "fasternet_t0": (18, 26, 0),
    "starnet_s1": (35, 46, 0),
    "efficientvit_b0": (38, 12, 0),
    "mobilevit_xxs": (32, 3, 0),
    "poolformer_s12": (12, 41, 0),
    "densenet121": (59, 123, 0),
    "dla34": (37, 1, 0),
    "dpn48b": (17, 106, 0),
    "vovnet39a": (39, 0, 0),
    "cspresnet50": (55, 0, 0),
    "darknet17": (16, 0, 0),
    "hrnet_w18_small": (89, 4, 0),
    "hgnetv2_b0": (43, 0, 0),
}
TIMM_SLOW = {
    "cspdarknet53": (67, 0, 0),
    "xception41": (84, 0, 0),
    "legacy_xception": (28, 80, 0),
    "tresnet_m": (96, 0, 0),
    "ghostnetv2_100": (130, 7, 0),
    "nf_resnet26": (0, 0, 29),
    "fastvit_t8": (68, 24, 0),
    "repvit_m0_9": (126, 23, 0),
    "rdnet_tiny": (21, 93, 0),
    "mobileone_s0": (191, 35, 0),
}


def check_timm(name, expected):
    torch.manual_seed(0)
    check_model(peer("timm").create_model(name, num_classes=5), expected, image())


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    check_timm(name, TIMM[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", some_extra(TIMM_SLOW, 2))
def test_more_of_timm(name):
    check_timm(name, TIMM_SLOW[name])


def test_why_layers_of_timm_are_left():
    left = {}
    for name in ("tf_efficientnet_b0", "nf_resnet26"):
        fast = advdl_ops.optimize(peer("timm").create_model(name))
        left.update(advdl_ops.explain(fast, as_dict=True)["left"])
    assert set(left.values()) == {
        "a class of its own (timm.layers.conv2d_same.Conv2dSame)",
        "a class of its own (timm.layers.std_conv.ScaledStdConv2d)",
    }


def test_timm_norms_with_dropout_or_in_another_dtype_are_left():
    layers = peer("timm").layers
    model = torch.nn.Sequential(
        layers.BatchNormAct2d(4, drop_layer=torch.nn.Dropout),
        layers.BatchNormAct2d(4, act_layer=torch.nn.Mish),
        layers.GroupNormAct(4, 2),
    )
    model[2]._fast_norm = True
    left = advdl_ops.explain(advdl_ops.optimize(model), as_dict=True)["left"]
    for name, why in zip("012", ("drops out by Dropout", "Mish", "fast norm"), strict=True):
        assert why in left[name]


def test_timm_norms_restored():
    norm = peer("timm").layers.BatchNormAct2d(4)
    fast = advdl_ops.optimize(norm)
    assert isinstance(fast, advdl_ops.nn.BatchNormAct2d) and isinstance(fast.act, torch.nn.ReLU)
    restored = advdl_ops.restore(fast)
    assert type(restored) is type(norm) and isinstance(restored.act, torch.nn.ReLU)


# ---- segmentation_models_pytorch ----


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Unet", (30, 1, 0)), ("FPN", (27, 12, 0)), ("DeepLabV3Plus", (29, 11, 0))],
)
def test_segmentation_models_pytorch(name, expected):
    torch.manual_seed(0)
    smp = peer("segmentation_models_pytorch")
    model = getattr(smp, name)("resnet18", encoder_weights=None, classes=5)
    check_model(model, expected, image())


# ---- diffusers ----


class Noise(torch.nn.Module):
    """The U-Net at one time step, as a function of the image alone."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x):
        return self.unet(x, torch.tensor([3, 700]), return_dict=False)[0]


def test_diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = peer("diffusers")
        kind = diffusers.UNet2DModel
    torch.manual_seed(0)
    unet = kind(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    fused = advdl_ops.explain(advdl_ops.optimize(unet), as_dict=True)["fused"]
    assert "down_blocks.0.resnets.0.norm1 + nonlinearity" in fused
    check_model(Noise(unet), (32, 14, 0), image(16))
