"""``set_lean``, ``create_model(lean=)`` and ``optimize(lean=)``: copies, files, classes, names and errors."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from support.checks import copies_of
from support.lean import LEVELS, assert_same_values, counted, step, tiny_net

import advdl_ops
from advdl_ops import models, set_lean
from advdl_ops._lean.models import lean_of

f64 = torch.float64


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


class Stock(torch.nn.Module):
    """A model for ``optimize``; found by its name, so it can be pickled."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.relu = torch.nn.ReLU()
        self.middle = torch.nn.Conv2d(8, 8, 1)
        self.pool = torch.nn.MaxPool2d(2)
        self.last = torch.nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.last(self.pool(self.middle(self.relu(self.norm(self.conv(x))))))


def makes_again(model, x):
    """The kinds that a step makes again."""
    with counted() as kinds:
        step(model, x)
    return kinds


# ---- what a level changes of a model, and what it does not ----


@pytest.mark.parametrize("lean", [*LEVELS, {"2": "block", "3.conv1": "deepest", "": None}])
def test_classes_names_and_keys(lean):
    plain = tiny_net()
    model = copy.deepcopy(plain)
    assert set_lean(model, lean) is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    for layer, other in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(layer, type(other))
        assert type(layer).__name__ == type(other).__name__
        assert type(layer).__module__.startswith(("torch.", "advdl_ops."))
    assert type(model).__doc__ == type(plain).__doc__
    assert lean_of(model) == (lean if isinstance(lean, dict) else {"": lean})


def test_a_class_in_a_function():
    class Local(Stock):
        """Its documentation."""

        def forward(self, x, *, scale: float = 1.0):
            """Its forward's."""
            return super().forward(x) * scale

    made = type(set_lean(Local(), "block"))
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(made, name) == getattr(Local, name)
    assert made.forward.__doc__ == "Its forward's."
    assert inspect.signature(made.forward) == inspect.signature(Local.forward)


@pytest.mark.parametrize("lean", [None, {}, {"": None}, {"2": None}])
def test_no_level_restores_the_classes(lean, x):
    model, expected = tiny_net(), [type(layer) for layer in tiny_net().modules()]
    attributes = [sorted(vars(layer)) for layer in model.modules()]
    set_lean(model, {"": "deepest", "1": "block", "2.bn1": None})
    set_lean(model, lean)
    assert [type(layer) for layer in model.modules()] == expected
    assert [sorted(vars(layer)) for layer in model.modules()] == attributes
    assert not makes_again(model, x) and lean_of(model) == {}


def test_the_last_call_counts(x):
    """Levels of an earlier call do not stay, and classes do not pile up."""
    model = tiny_net()
    for lean in ("block", {"2": "stage"}, {"3": "deep", "": "block"}, "deepest", {"3": "block"}):
        set_lean(model, lean)
        assert lean_of(model) == (lean if isinstance(lean, dict) else {"": lean})
        for layer in model.modules():
            assert len([c for c in type(layer).__mro__ if "_advdl_plain" in vars(c)]) <= 1
    assert 0 < len(makes_again(model, x)) <= 2  # of the last block alone


def test_one_class_for_all_models_of_a_class():
    first, second = set_lean(tiny_net(), "block"), set_lean(tiny_net(), "deepest")
    assert type(first) is type(second)
    assert lean_of(first) == {"": "block"} and lean_of(second) == {"": "deepest"}
    assert type(tiny_net()) is torch.nn.Sequential


def test_modules_with_two_names(x):
    """A part that is in the model twice has the level of either name."""
    block = tiny_net()[2:4]
    model = torch.nn.ModuleDict({"stem": tiny_net()[:2], "a": block, "b": block})
    set_lean(model, {"b": "block"})
    assert len(makes_again(model["b"], torch.randn(2, 8, 8, 8))) > 2
    assert lean_of(model) == {"a": "block"}


# ---- copies and files ----


@pytest.mark.parametrize("lean", [*LEVELS, {"down1": "block", "up2": "deepest"}])
def test_copies(lean, x):
    model = models.create_model("unet", base_channels=4, depth=2, lean=lean)
    level = lean_of(model)
    for name, made in {**copies_of(model), "copy": copy.copy(model)}.items():
        assert lean_of(made) == level, name
        assert type(made) is type(model), name
        assert [type(a) for a in made.modules()] == [type(a) for a in model.modules()], name
        assert makes_again(made, x), name
        set_lean(made, None)
        assert type(made) is models.UNet, name
        if name == "copy":
            set_lean(model, level)


def test_copies_of_copies(x):
    """Twice through each way; the values are those of the first."""
    model = set_lean(tiny_net(), {"": "deepest", "2": "block"})
    expected = step(copy.deepcopy(model), x)
    made = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(model), 2)))
    made = pickle.loads(pickle.dumps(made))
    assert lean_of(made) == {"": "deepest", "2": "block"}
    assert_same_values(step(made, x), expected)


def test_copies_of_optimized_models(x):
    made = advdl_ops.optimize(Stock(), lean="block")
    expected = step(copy.deepcopy(made), x)
    for name, each in copies_of(made).items():
        assert lean_of(each) == {"": "block"}, name
        assert_same_values(step(each, x), expected, name)
        assert len(makes_again(each, x)) == 1, name


def test_state_dicts(x):
    """Files of weights pass between models with and without a level, read with ``weights_only``."""
    plain, lean = tiny_net(), set_lean(tiny_net(), "deepest")
    for source, target in ((plain, lean), (lean, plain)):
        step(source, x)
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True), strict=True)
        for key, t in source.state_dict().items():
            assert t.equal(target.state_dict()[key]), key
    assert_same_values(step(lean, x), step(plain, x))


def test_moved_and_converted_models(x):
    model = set_lean(tiny_net(), "block")
    assert lean_of(model.to(f64)) == {"": "block"}
    assert makes_again(model, x.to(f64))
    model.to(torch.float32, memory_format=torch.channels_last)
    assert makes_again(model, x)
    assert lean_of(model.eval().train()) == {"": "block"}


# ---- create_model and optimize ----


@pytest.mark.parametrize("level", LEVELS)
def test_create_model(level):
    torch.manual_seed(0)
    plain = models.create_model("resnet18", num_classes=3)
    torch.manual_seed(0)
    lean = models.create_model("resnet18", num_classes=3, lean=level)
    assert lean_of(lean) == {"": level} and isinstance(lean, models.ResNet)
    x = torch.randn(2, 3, 33, 33)
    assert_same_values(step(lean, x), step(plain, x))


def test_create_model_by_parts_and_with_weights(tmp_path):
    weights = models.create_model("resnet18", num_classes=3).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    levels = {"": "block", "layer4": "deepest"}
    made = models.create_model(
        "resnet18", num_classes=3, weights=tmp_path / "weights.pth", lean=levels
    )
    assert lean_of(made) == levels
    assert all(t.equal(made.state_dict()[key]) for key, t in weights.items())
    assert lean_of(models.create_model("resnet18")) == {}


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_optimize_and_restore(inplace, fuse, x):
    original = Stock()
    classes = [type(layer) for layer in original.modules()]
    expected = step(copy.deepcopy(original), x)
    made = advdl_ops.optimize(original, inplace=inplace, fuse=fuse, lean="block")
    assert (made is original) == inplace
    assert lean_of(made) == {"": "block"} and isinstance(made, Stock)
    assert inplace or [type(layer) for layer in original.modules()] == classes
    plain = advdl_ops.optimize(copy.deepcopy(Stock()), fuse=fuse)
    plain.load_state_dict(made.state_dict())
    with counted() as kinds:
        found = step(made, x)
    assert bool(kinds) == fuse
    assert_same_values(found, step(plain, x))
    assert advdl_ops.restore(made) is made
    assert [type(layer) for layer in made.modules()] == classes
    assert expected.keys() == step(made, x).keys()


def test_optimize_by_parts(x):
    model = torch.nn.Sequential(Stock(), torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1)))
    made = advdl_ops.optimize(model, lean={"0": "block"})
    assert lean_of(made) == {"0": "block"} and lean_of(model) == {}
    assert len(makes_again(made, x)) == 1


def test_optimized_twice_and_restored_after_set_lean():
    made = advdl_ops.optimize(Stock())
    set_lean(made, "deepest")
    with pytest.raises(ValueError, match="optimize: "):
        advdl_ops.optimize(made, lean="block")
    assert lean_of(made) == {"": "deepest"}
    advdl_ops.restore(made)
    assert type(made) is Stock and type(made.pool) is torch.nn.MaxPool2d and lean_of(made) == {}


def test_explain_of_a_model_at_a_level():
    """What it says of a model, a level does not change."""
    x = torch.randn(2, 3, 16, 16)
    model = models.create_model("unet", base_channels=4, depth=2)
    expected = str(advdl_ops.explain(model, x))
    assert str(advdl_ops.explain(set_lean(model, "block"), x)) == expected


# ---- errors ----

CALLS = {
    "set_lean": lambda lean: set_lean(tiny_net(), lean),
    "create_model": lambda lean: models.create_model("convnet", lean=lean),
    "optimize": lambda lean: advdl_ops.optimize(tiny_net(), lean=lean),
}


@pytest.mark.parametrize("caller", CALLS)
def test_errors_name_the_caller_and_the_value(caller):
    call = CALLS[caller]
    for level in ("blocks", "", "Block"):
        with pytest.raises(
            ValueError,
            match=rf"^{caller}: lean \('{level}'\) must be None or one of block, stage, deep, deepest$",
        ):
            call(level)
    for lean, value in ((1, "1"), (True, "True"), (["block"], r"\['block'\]")):
        with pytest.raises(
            TypeError, match=rf"^{caller}: lean \({value}\) must be a level, or a dict"
        ):
            call(lean)
    for lean in ({"": "lean"}, {"": "block", "0": "lean"}, {"": 1}):
        with pytest.raises(
            ValueError, match=rf"^{caller}: lean \(('lean'|1)\) must be None or one of"
        ):
            call(lean)
    with pytest.raises(
        ValueError, match=rf"^{caller}: lean \('nothing like it'\) must name a module of the model$"
    ):
        call({"nothing like it": "block"})


def test_the_nearest_name():
    model = models.create_model("resnet18", num_classes=3)
    for name, near in (
        ("layer5", "layer[1-4]"),
        ("layer4.2", r"layer4\.[01]"),
        ("maxpol", "maxpool"),
    ):
        with pytest.raises(
            ValueError, match=rf"lean \('{name}'\) must name .*; did you mean '{near}'\?"
        ):
            set_lean(model, {"": "block", name: "block"})


def test_an_error_changes_nothing(x):
    model = set_lean(tiny_net(), {"2": "block", "": "stage"})
    classes = [type(layer) for layer in model.modules()]
    for lean in ("no level", {"0": "block", "9": "block"}, {"0": "deep", "1": "no level"}, 3):
        with pytest.raises((ValueError, TypeError)):
            set_lean(model, lean)
        assert lean_of(model) == {"2": "block", "": "stage"}
        assert [type(layer) for layer in model.modules()] == classes
    stock = Stock()
    with pytest.raises(ValueError, match="optimize: lean"):
        advdl_ops.optimize(stock, inplace=True, lean="no level")
    assert [type(layer) for layer in stock.modules()] == [
        type(layer) for layer in Stock().modules()
    ]
    assert not [name for layer in stock.modules() for name in vars(layer) if "advdl" in name]


# ---- what can have no level, or has it by others ----


def small():
    return torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 1)
    )


def replaced():
    model = small()
    model.forward = model.forward
    return model


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.fx.symbolic_trace(small()), "torch.fx"),
        (lambda: torch.jit.trace(small().eval(), torch.randn(1, 8, 5, 5)), "torch.jit"),
        (replaced, "replaced on the instance"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(8, 8, 1)), "parametrized"),
    ],
    ids=["fx", "jit", "replaced", "parametrized"],
)  # fmt: skip
def test_a_module_whose_class_is_made_by_others_has_no_level(make, why):
    inner = make()
    with pytest.raises(TypeError, match=why):
        set_lean(inner, "block")
    model = torch.nn.Sequential(advdl_ops.optimize(small()), torch.nn.MaxPool2d(1), inner)
    with pytest.raises(TypeError, match=why):
        set_lean(model, {"0": "block", "2": "block"})
    assert lean_of(model) == {} and type(model[1]) is torch.nn.MaxPool2d
    assert lean_of(set_lean(model, "block")) == {"": "block"}
    x = torch.randn(2, 8, 7, 7)
    if why in ("torch.fx", "torch.jit"):
        for function in (advdl_ops.memory_report, lambda *args: advdl_ops.fit_memory(*args, 1e9)):
            with pytest.raises(ValueError, match="copy"):
                function(model, x)


def test_a_container_gives_its_level_to_what_is_in_it():
    model = models.create_model("resnet18")
    parts = torch.nn.ModuleDict({"a": torch.nn.ModuleList(model.layer1), "b": model.layer2})
    set_lean(parts, {"": "stage", "a.1": None, "b": "deep"})
    assert lean_of(parts) == {"a.0": "stage", "a.1": None, "b": "deep"}
    set_lean(parts, None)
    assert lean_of(parts) == {} and type(parts["a"][0]) is type(parts["a"][1])


def test_a_module_with_two_names():
    model = torch.nn.Module()
    model.a = advdl_ops.optimize(small())
    model.b = model.a
    kind = type(model.a)
    with pytest.raises(ValueError, match="two levels"):
        set_lean(model, {"a": "block", "b": "deepest"})
    assert type(model.a) is kind
    set_lean(model, {"a": "block", "b": "block"})
    pickle.loads(pickle.dumps(model))
    assert type(set_lean(model, None).a) is kind


@pytest.mark.parametrize("model", [3, None, torch.nn.Conv2d], ids=str)
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match="model"):
        set_lean(model, "block")
