"""Models by name: the same weights in every process, and an error for impossible arguments."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from whole import DEADLINE_S

from paramserver.errors import UserError
from workers.builtin.models import ACTIVATIONS, MODELS, build

SIMPLE = {"type": "SimpleNN", "input_dim": 784, "hidden": 128, "out": 10, "activation": "relu"}
WEIGHTS_42 = [0.02730495, 0.02964314, -0.00836687, 0.03280755]


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize("arguments", [SIMPLE, {"type": "SimpleNN"}])
def test_simple_nn_is_784_256_512_10(arguments):
    model = build(arguments, seed=42)
    assert parameter_count(model) == 337_674
    assert shapes(model) == {
        "input.weight": (256, 784),
        "input.bias": (256,),
        "hidden.weight": (512, 256),
        "hidden.bias": (512,),
        "output.weight": (10, 512),
        "output.bias": (10,),
    }
    assert not list(model.buffers())


def test_simple_nn_computes_what_it_says():
    model = build(SIMPLE | {"hidden": 3, "activation": "tanh"}, seed=1)
    images = torch.randn(4, 1, 28, 28)
    w = dict(model.named_parameters())
    x = torch.tanh(images.view(4, 784) @ w["input.weight"].T + w["input.bias"])
    x = torch.tanh(x @ w["hidden.weight"].T + w["hidden.bias"])
    expected = x @ w["output.weight"].T + w["output.bias"]
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", MODELS)
def test_each_model_takes_a_batch_of_digits_and_learns_from_it(name):
    model = build({"type": name}, seed=0)
    images, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 3, 9, 1])
    logits = model(images)
    assert logits.shape == (4, 10)
    nn.functional.cross_entropy(logits, labels).backward()
    # A parameter without a gradient would never be exchanged.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "images"),
    [
        ({"type": "SimpleNN", "input_dim": 12, "out": 3}, (2, 3, 2, 2)),
        ({"type": "CNN", "in_channels": 3, "image_size": 30, "out": 3}, (2, 3, 30, 30)),
        ({"type": "CNN", "batch_norm": True, "dropout": 0.5, "out": 3}, (2, 1, 28, 28)),
        ({"type": "ResNet18", "in_channels": 3, "out": 3}, (2, 3, 32, 32)),
    ],
)
def test_other_images_and_classes(arguments, images):
    assert build(arguments, seed=0)(torch.randn(images)).shape == (2, 3)


def test_cnn_has_neither_batch_statistics_nor_randomness_unless_asked():
    plain = build({"type": "CNN"}, seed=0)
    images = torch.randn(4, 1, 28, 28)
    assert not list(plain.buffers())
    assert torch.equal(plain(images), plain(images))
    normed = build({"type": "CNN", "batch_norm": True}, seed=0)
    assert {name.split(".")[0] for name, _ in normed.named_buffers()} == {"norm1", "norm2"}
    dropping = build({"type": "CNN", "dropout": 0.5}, seed=0)
    assert not torch.equal(dropping(images), dropping(images))


def test_resnet18_is_the_one_for_small_images():
    model = build({"type": "ResNet18"}, seed=0)
    assert parameter_count(model) == 11_172_810
    assert shapes(model)["conv1.weight"] == (64, 1, 3, 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    model = build(SIMPLE | {"activation": activation}, seed=0)
    assert isinstance(model.activation, ACTIVATIONS[activation])


# ----------------------------------------------------------------------------------- the weights


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("name", MODELS)
def test_weights_follow_the_seed_and_only_the_seed(name):
    torch.manual_seed(1)
    first = build({"type": name}, seed=42)
    torch.manual_seed(2)
    assert torch.equal(weights(first), weights(build({"type": name}, seed=42)))
    assert not torch.equal(weights(first), weights(build({"type": name}, seed=43)))


def test_weights_are_the_same_on_every_machine():
    """Written down once: another version, or another machine, must find the same."""
    model = build(SIMPLE, seed=42)
    torch.testing.assert_close(model.input.weight[0, :4].detach(), torch.tensor(WEIGHTS_42))


def test_no_random_generator_of_the_caller_is_touched():
    def states() -> tuple[bytes, object, bytes]:
        numpy_state = np.random.get_state()[1].tobytes()
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy_state

    before = states()
    build(SIMPLE, seed=42)
    with pytest.raises(UserError):
        build({"type": "torch.nn:Linear", "in_features": -1, "out_features": 1}, 42, None)
    assert states() == before


def test_another_default_device_changes_nothing():
    with torch.device("meta"):
        model = build(SIMPLE, seed=42)
    assert torch.equal(weights(model), weights(build(SIMPLE, seed=42)))


def test_torchvision_is_imported_for_resnet18_only():
    program = (
        "import sys; from workers.builtin.models import build; build({'type': 'CNN'}, seed=0);"
        "sys.exit('torchvision' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=DEADLINE_S)


# ------------------------------------------------------------------------ a model of one's own


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with a user's module, as the current one."""
    (tmp_path / "my_nets.py").write_text(
        """
from __future__ import annotations
from torch import Tensor, nn

class Net(nn.Module):
    def __init__(self, width: int, depth: int = 2, *, scale: float = 1.0, **more: object) -> None:
        super().__init__()
        self.layer, self.more = nn.Linear(width, depth), more

class Strict(nn.Module):
    def __init__(self, width: int, names: list[str] | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

class Failing(nn.Module):
    def __init__(self) -> None:
        raise ValueError("no luck today")

class Unresolved(nn.Module):
    def __init__(self, width: Nowhere, depth: int = 1) -> None:
        super().__init__()
        self.width = width

def made(width: int) -> nn.Module:
    return Strict(width)

def lying() -> nn.Module:
    return None

def unannotated(width):
    raise SystemError("must not be called")

def returns_text() -> str:
    raise SystemError("must not be called")

number = 5
"""
    )
    (tmp_path / "my_broken.py").write_text("import my_missing_library\n")
    (tmp_path / "my_typo.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("my_nets", "my_broken", "my_typo"):
        sys.modules.pop(name, None)


def test_a_class_from_the_current_folder(nets):
    model = build(
        {"type": "my_nets:Net", "width": 3, "scale": 2, "extra": [1, 2]}, seed=5, code=None
    )
    assert type(model).__qualname__ == "Net"
    assert model.layer.weight.shape == (2, 3)
    assert model.more == {"extra": [1, 2]}
    again = build({"type": "my_nets:Net", "width": 3}, seed=5, code=None)
    assert torch.equal(model.layer.weight, again.layer.weight)


def test_a_function_that_says_that_it_makes_a_module(nets):
    assert type(build({"type": "my_nets:made", "width": 3}, seed=0, code=None)).__name__ == "Strict"


def test_installed_models(nets):
    assert shapes(
        build({"type": "torch.nn:Linear", "in_features": 3, "out_features": 2}, 0, code=None)
    ) == {
        "weight": (2, 3),
        "bias": (2,),
    }


def test_annotations_that_cannot_be_resolved_are_not_checked(nets):
    assert build({"type": "my_nets:Unresolved", "width": "any"}, seed=0, code=None).width == "any"


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        ({"type": "no_such:Net"}, "there is no module 'no_such'", "on every machine"),
        ({"type": "torch.no_such:Net"}, "there is no module 'torch.no_such'", ""),
        ({"type": "my_broken:Net"}, "importing 'my_broken' failed: ModuleNotFoundError", ""),
        ({"type": "my_broken:Net"}, "my_missing_library", ""),
        ({"type": "my_typo:Net"}, "importing 'my_typo' failed: SyntaxError", ""),
        ({"type": ":Net"}, "importing '' failed", ""),
        ({"type": ".nets:Net"}, "importing '.nets' failed", ""),
        ({"type": "my_nets:Nett"}, "my_nets has no 'Nett'", "did you mean Net?"),
        ({"type": "my_nets:"}, "my_nets has no ''", ""),
        ({"type": "my_nets:Net"}, "model.width is missing", "my_nets:Net takes width: int, depth"),
        (
            {"type": "my_nets:Net", "width": "3"},
            "model.width must be a whole number, not '3'",
            "width: int",
        ),
        ({"type": "my_nets:Strict", "wdth": 3}, "model.wdth is no argument", "did you mean width?"),
        ({"type": "my_nets:Failing"}, "ValueError: no luck today", "takes no arguments"),
        ({"type": "my_nets:Failing", "x": 1}, "model.x is no argument", "takes no arguments"),
        ({"type": "my_nets:lying"}, "returned NoneType, not a torch.nn.Module", ""),
        ({"type": "my_nets:made", "width": -1}, "my_nets:made cannot be built", "takes width: int"),
    ],
)
def test_what_is_wrong_with_a_model_of_ones_own(nets, arguments, problem, hint):
    with pytest.raises(UserError) as told:
        build(arguments, seed=0, code=None)
    assert problem in told.value.problem
    assert hint in told.value.hint


@pytest.mark.parametrize(
    "name",
    ["os:system", "subprocess:Popen", "builtins:eval", "torch.hub:load", "torch:load"]
    + [f"my_nets:{name}" for name in ("number", "unannotated", "returns_text", "nn")],
)
def test_a_server_cannot_have_just_anything_called(nets, name):
    with pytest.raises(UserError, match=r"neither a subclass of torch\.nn\.Module nor"):
        build({"type": name}, seed=0, code=None)


# -------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        ({"hidden": 3}, "model.type must be a name, not null", "known: SimpleNN, CNN, ResNet18"),
        ({"type": 3}, "model.type must be a name, not 3", "known: SimpleNN"),
        ({"type": "simplenn"}, "there is no model 'simplenn'", "did you mean SimpleNN?"),
        ({"type": "ResNet50"}, "there is no model 'ResNet50'", "did you mean ResNet18?"),
        ({"type": "GPT"}, "there is no model 'GPT'", "or package.module:Name"),
        (SIMPLE | {"hiden": 3}, "model.hiden is no argument of SimpleNN", "did you mean hidden?"),
        (SIMPLE | {"x": 3}, "model.x is no argument", "input_dim: int = 784, hidden: int = 128"),
        (
            SIMPLE | {"hidden": 2.5},
            "model.hidden must be a whole number, not 2.5",
            "hidden: int = 128",
        ),
        (SIMPLE | {"hidden": True}, "model.hidden must be a whole number, not true", ""),
        (SIMPLE | {"hidden": None}, "model.hidden must be a whole number, not null", ""),
        (SIMPLE | {"hidden": 0}, "model.hidden must be 1 or more, not 0", ""),
        (SIMPLE | {"input_dim": -1}, "model.input_dim must be 1 or more, not -1", ""),
        (SIMPLE | {"activation": 5}, "model.activation must be text, not 5", ""),
        (SIMPLE | {"activation": "rellu"}, "no activation 'rellu'", "did you mean relu? known:"),
        ({"type": "CNN", "dropout": 1.0}, "model.dropout must be from 0 to below 1", ""),
        ({"type": "CNN", "dropout": -0.1}, "model.dropout must be from 0 to below 1", ""),
        ({"type": "CNN", "dropout": True}, "model.dropout must be a number, not true", ""),
        ({"type": "CNN", "batch_norm": 1}, "model.batch_norm must be true or false, not 1", ""),
        ({"type": "CNN", "image_size": 3}, "model.image_size must be 4 or more, not 3", ""),
        ({"type": "ResNet18", "out": 0}, "model.out must be 1 or more, not 0", ""),
        ({"type": "ResNet18", "hidden": 1}, "model.hidden is no argument of ResNet18", "out: int"),
    ],
)
def test_settings_that_cannot_be(arguments, problem, hint):
    with pytest.raises(UserError) as told:
        build(arguments, seed=0)
    assert problem in told.value.problem
    assert hint in told.value.hint


def test_a_whole_number_will_do_where_a_float_is_meant():
    assert build({"type": "CNN", "dropout": 0}, seed=0).dropout.p == 0


def test_resnet18_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match="ResNet18 needs torchvision"):
        build({"type": "ResNet18"}, seed=0)


def test_the_settings_are_left_as_they_were():
    arguments = dict(SIMPLE)
    build(arguments, seed=0)
    assert arguments == SIMPLE
