"""Names, options and weights files of `create_model`."""

import re
import sys

import pytest
import torch
from support.models import random_input, randomize

from advdl_ops import models
from advdl_ops.models import _registry

RESNETS = {
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
}


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(model, state):
    assert list(model.state_dict()) == list(state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


def small(**options):
    return randomize(models.resnet18(**{"num_classes": 5, **options}), seed=3)


# ---------------------------------------------------------------- names


def test_list_models():
    others = {"convnet", "fcn_dilated", "lstm_classifier", "lstm_lm", "lstm_tagger", "unet"}
    assert set(models.list_models()) >= RESNETS | others
    assert models.list_models() == sorted(models.list_models())
    names = ["deeplabv3_resnet50", "fcn_resnet50", "resnet50", "unet_resnet50", "wide_resnet50_2"]
    assert models.list_models("*resnet50*") == names
    assert models.list_models("nothing*") == []


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet51", "resnet50"),
        ("ResNet18", "resnet18"),
        ("resnext50", "resnext50_32x4d"),
        ("net50", "deeplabv3_resnet50"),
    ],
)
def test_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(
        ValueError, match=rf"^create_model: unknown model '{name}'; did you mean .*{near}"
    ):
        models.create_model(name)


def test_names_that_begin_alike_come_first():
    with pytest.raises(ValueError, match=r"did you mean resnet101 or resnet152 or resnet18\?$"):
        models.create_model("resnet")


@pytest.mark.parametrize("name", ["zzz", "", None, 50])
def test_unknown_name_with_nothing_near(name):
    with pytest.raises(ValueError, match=r"^create_model: unknown model .*list_models\(\)"):
        models.create_model(name)


def test_register_model(monkeypatch):
    monkeypatch.setattr(_registry, "_BUILDERS", dict(_registry._BUILDERS))

    @models.register_model
    def tiny(*, num_classes, in_channels, weights=None, bias=True):
        return torch.nn.Linear(in_channels, num_classes, bias)

    assert "tiny" in models.list_models()
    made = models.create_model("tiny", num_classes=4, in_channels=2, bias=False)
    assert made.weight.shape == (4, 2)
    assert made.bias is None

    def resnet18():
        raise AssertionError

    with pytest.raises(
        ValueError, match=r"^register_model: 'resnet18' is taken by advdl_ops.models.resnet"
    ):
        models.register_model(resnet18)
    assert isinstance(models.create_model("resnet18", num_classes=2), models.ResNet)


def test_function_and_name_build_the_same():
    torch.manual_seed(0)
    by_name = models.create_model("resnet18", num_classes=4, in_channels=1, stem="small")
    torch.manual_seed(0)
    direct = models.resnet18(num_classes=4, in_channels=1, stem="small")
    assert_same_state(by_name, state_of(direct))
    assert by_name.training
    assert by_name.name == "resnet18"


@pytest.mark.parametrize("name", models.list_models())
def test_defaults_are_the_functions(name):
    with torch.device("meta"):
        by_name, direct = models.create_model(name), getattr(models, name)()
    shapes = [
        {key: value.shape for key, value in model.state_dict().items()}
        for model in (by_name, direct)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes (0) must be a positive integer"),
        ({"num_classes": 2.0}, "num_classes (2.0) must be a positive integer"),
        ({"num_classes": True}, "num_classes (True) must be a positive integer"),
        ({"in_channels": -1}, "in_channels (-1) must be a positive integer"),
        ({"norm": "layer"}, 'norm (\'layer\') must be "batch" or "group"'),
        ({"stem": "tiny"}, 'stem (\'tiny\') must be "imagenet" or "small"'),
        ({"zero_init_residual": 1}, "zero_init_residual (1) must be True or False"),
        ({"groups": 0}, "groups (0) must be a positive integer"),
        ({"width_per_group": -64}, "width_per_group (-64) must be a positive integer"),
        (
            {"replace_stride_with_dilation": [True]},
            "replace_stride_with_dilation ([True]) must have 3 entries",
        ),
        (
            {"replace_stride_with_dilation": 3},
            "replace_stride_with_dilation (3) must be a sequence",
        ),
        (
            {"replace_stride_with_dilation": "abc"},
            "replace_stride_with_dilation ('abc') must be a sequence",
        ),
        (
            {"replace_stride_with_dilation": (False, "no", True)},
            "replace_stride_with_dilation[1] ('no') must be True or False",
        ),
    ],
)
def test_bad_option_value(options, message):
    with pytest.raises(ValueError, match=r"^resnet50: " + re.escape(message)):
        models.create_model("resnet50", **options)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, "layers (2) must be a sequence"),
        ((1, 1, 1), "layers ((1, 1, 1)) must have 4 entries"),
        ((1, 0, 1, 1), "layers[1] (0) must be a positive integer"),
        ((1, 1, 1, -2), "layers[3] (-2) must be a positive integer"),
    ],
)
def test_bad_layers(layers, message):
    with pytest.raises(ValueError, match="^" + re.escape(f"resnet: {message}")):
        models.ResNet(models.Bottleneck, layers)


def test_unknown_option():
    with pytest.raises(
        TypeError, match=r"^resnet18: option 'norms' must be one of .*norm, .*weights$"
    ):
        models.create_model("resnet18", norms="batch")
    # What makes the architecture is no option of it.
    with pytest.raises(TypeError, match=r"^resnext50_32x4d: option 'groups' must be one of"):
        models.create_model("resnext50_32x4d", groups=2)


def test_basic_block_has_no_groups_and_no_dilation():
    with pytest.raises(ValueError, match=r"^BasicBlock: groups \(2\) must be 1"):
        models.resnet18(groups=2)
    with pytest.raises(NotImplementedError, match=r"^BasicBlock: dilation \(2\) must be 1"):
        models.resnet18(replace_stride_with_dilation=(False, False, True))


# ---------------------------------------------------------------- weights files


@pytest.fixture(scope="module")
def donor():
    return small()


def save(state, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("file", ["w.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_round_trip(tmp_path, donor, file, as_path):
    path = save(donor.state_dict(), tmp_path / file)
    made = models.create_model("resnet18", num_classes=5, weights=as_path(path))
    assert_same_state(made, state_of(donor))
    assert_same_state(models.resnet18(num_classes=5, weights=path), state_of(donor))
    x = random_input((2, 3, 32, 32), torch.float32)
    assert torch.equal(made.eval()(x), donor.eval()(x))
    # Nothing of the file stays mapped: it may be written over.
    path.write_bytes(b"")
    assert_same_state(made, state_of(donor))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
def test_wrapped_and_prefixed(tmp_path, donor, wrapper, prefix):
    state = {prefix + key: value for key, value in donor.state_dict().items()}
    file = {wrapper: state, "optimizer": {"lr": 0.1}, "epoch": 3} if wrapper else state
    path = save(file, tmp_path / "w.pth")
    assert_same_state(models.create_model("resnet18", num_classes=5, weights=path), state_of(donor))


def test_a_real_ddp_file(tmp_path, donor):
    wrapped = torch.nn.Module()
    wrapped.module = donor  # the keys of DistributedDataParallel(donor)
    path = save({"state_dict": wrapped.state_dict()}, tmp_path / "w.pth")
    assert_same_state(models.create_model("resnet18", num_classes=5, weights=path), state_of(donor))


def test_old_file_format_and_no_counters(tmp_path, donor):
    state = {k: v for k, v in donor.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    made = models.create_model("resnet18", num_classes=5, weights=path)
    for key, value in made.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert value == 0
        else:
            assert torch.equal(value, state[key]), key


def test_half_precision_file_fills_float_model(tmp_path, donor):
    state = {k: v.half() if v.is_floating_point() else v for k, v in donor.state_dict().items()}
    made = models.create_model("resnet18", num_classes=5, weights=save(state, tmp_path / "w.pth"))
    assert made.fc.weight.dtype == torch.float32
    assert torch.equal(made.fc.weight, state["fc.weight"].float())


def test_everything_halved_counters_included(tmp_path, donor):
    state = {key: value.half() for key, value in donor.state_dict().items()}
    made = models.create_model("resnet18", num_classes=5, weights=save(state, tmp_path / "w.pth"))
    assert made.bn1.num_batches_tracked.dtype == torch.int64
    assert made.bn1.num_batches_tracked == 7
    for number in (7.5, float("inf"), float("nan")):
        state["bn1.num_batches_tracked"] = torch.tensor(number)
        path = save(state, tmp_path / "w.pth")
        check_refused(path, "kinds of numbers: bn1.num_batches_tracked torch.float32")


def check_refused(path, *messages, model=None):
    """`load_weights` raises with the messages and leaves the model as it was; `create_model` raises alike."""
    model = small() if model is None else model
    before = state_of(model)
    with pytest.raises(ValueError, match=r"^load_weights: weights ") as raised:
        models.load_weights(model, path)
    assert_same_state(model, before)
    text = str(raised.value)
    assert text.startswith(f"load_weights: weights {path.name!r} ")
    for message in messages:
        assert message in text, text
    with pytest.raises(ValueError, match=r"^create_model: weights "):
        models.create_model("resnet18", num_classes=5, weights=path)
    return text


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_architecture(tmp_path, suffix):
    path = save(models.resnet34(num_classes=5).state_dict(), tmp_path / f"w{suffix}")
    text = check_refused(
        path, "must fit resnet18", "unexpected keys (96): layer1.2.bn1.bias, ", "... and 90 more"
    )
    assert "missing" not in text
    assert len(text) < 500
    path = save(models.resnet50(num_classes=5).state_dict(), tmp_path / f"v{suffix}")
    shape = "layer1.0.conv1.weight [64, 64, 1, 1] (the model: [64, 64, 3, 3])"
    text = check_refused(
        path, "unexpected keys (198): layer1.0.bn3.bias, ", "other shapes (24): ", shape
    )
    assert len(text) < 1500
    foreign = {"features.0.weight": torch.ones(64, 3, 3, 3), "fc.bias": torch.ones(5)}
    path = save(foreign, tmp_path / f"u{suffix}")
    check_refused(
        path,
        "missing keys (101): conv1.weight, bn1.weight, ",
        "... and 95 more; unexpected keys (1): features.0.weight",
    )


def test_missing_and_unexpected_keys(tmp_path, donor):
    state = state_of(donor)
    state["layer1.0.norm1.weight"] = state.pop("layer1.0.bn1.weight")
    state["layer1.0.norm1.bias"] = state.pop("layer1.0.bn1.bias")
    check_refused(
        save(state, tmp_path / "w.pth"),
        "missing keys (2): layer1.0.bn1.weight, layer1.0.bn1.bias; ",
        "unexpected keys (2): layer1.0.norm1.bias, layer1.0.norm1.weight",
    )


def test_one_counter_missing_is_missing(tmp_path, donor):
    state = state_of(donor)
    del state["bn1.num_batches_tracked"]
    check_refused(save(state, tmp_path / "w.pth"), "missing keys (1): bn1.num_batches_tracked")


def test_other_class_count(tmp_path):
    path = save(small(num_classes=7).state_dict(), tmp_path / "w.pth")
    check_refused(
        path, "has 7 classes in fc.weight, num_classes is 5", "num_classes=7", "replace its 'fc'"
    )
    # As the message says:
    model = models.create_model("resnet18", num_classes=7, weights=path)
    model.fc = torch.nn.Linear(512, 5)
    assert model(random_input((2, 3, 32, 32), torch.float32)).shape == (2, 5)


def test_other_class_count_and_more_lists_all(tmp_path):
    path = save(small(num_classes=7, in_channels=1).state_dict(), tmp_path / "w.pth")
    check_refused(
        path,
        "other shapes (3): conv1.weight [64, 1, 7, 7] (the model: [64, 3, 7, 7])",
        "fc.weight [7, 512] (the model: [5, 512])",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state_dict (got list)"),
        ({}, "must hold a state_dict"),
        (
            {"fc.weight": 3.0, "x": torch.zeros(1)},
            "must hold tensors only; these are none: fc.weight",
        ),
        (torch.zeros(3), "must hold a state_dict (got Tensor)"),
    ],
)
def test_file_without_state_dict(tmp_path, content, message):
    check_refused(save(content, tmp_path / "w.pth"), message)


@pytest.mark.parametrize(
    ("convert", "kind"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo, cpu"),
        (lambda weight: weight.to("meta"), "torch.strided, meta"),
    ],
)
def test_tensors_that_cannot_be_copied(tmp_path, donor, convert, kind):
    # `fc` is last: all others would have been copied before.
    state = state_of(donor)
    state["fc.weight"] = convert(state["fc.weight"])
    path = save(state, tmp_path / "w.pth")
    check_refused(path, f"must hold dense tensors with values: fc.weight ({kind})")


def test_integer_weights(tmp_path, donor):
    state = state_of(donor)
    state["conv1.weight"] = state["conv1.weight"].to(torch.int8)
    check_refused(save(state, tmp_path / "w.pth"), "conv1.weight torch.int8")


@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a weights file", b"PK\x03\x04 cut off"])
def test_unreadable_file(tmp_path, file, content):
    if file.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    path = tmp_path / file
    path.write_bytes(content)
    text = check_refused(path, "cannot be read")
    assert "\n" not in text


def test_whole_module_is_not_unpickled(tmp_path, donor):
    check_refused(
        save(donor, tmp_path / "w.pth"), "cannot be read by torch.load(weights_only=True)"
    )


def test_no_file(tmp_path):
    for weights in (tmp_path / "none.pth", tmp_path, "DEFAULT"):
        with pytest.raises(
            FileNotFoundError, match=r"^create_model: weights .* must be a local file"
        ):
            models.create_model("resnet18", weights=weights)
    with pytest.raises(FileNotFoundError, match=r"^resnet18: weights "):
        models.resnet18(weights=tmp_path / "none.pth")
    with pytest.raises(TypeError, match=r"^create_model: weights must be the path .*\(got dict\)"):
        models.create_model("resnet18", weights={})


def test_without_safetensors(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ImportError, match=r"^create_model: weights 'w.safetensors' needs safetensors: pip install"
    ):
        models.create_model("resnet18", weights=path)
