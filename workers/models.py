"""The models that the setting `model` can name, and the way from that setting to a module.

`model.type` is a name in `MODELS`, or `package.module:Name` for a model of your own; every other
key under `model` is an argument of its constructor. A model of your own is a subclass of
`torch.nn.Module`, or a function that is annotated to return one.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from paramserver.errors import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class SimpleNN(nn.Module):
    """Two hidden layers: input_dim - 256 - 4 * hidden - out. Flattens [b, ...] to [b, input_dim].

    With the defaults 337,674 parameters, for images of 28 x 28.
    """

    def __init__(
        self, input_dim: int = 784, hidden: int = 128, out: int = 10, activation: str = "relu"
    ) -> None:
        super().__init__()
        _check_sizes(input_dim=input_dim, hidden=hidden, out=out)
        # Parameters are logged by these names: gradients/layer_hidden.weight and so on.
        self.input = nn.Linear(input_dim, 256)
        self.hidden = nn.Linear(256, 4 * hidden)
        self.output = nn.Linear(4 * hidden, out)
        self.activation = _activation(activation)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, out]."""
        x = self.activation(self.input(images.flatten(1)))
        x = self.activation(self.hidden(x))
        logits: Tensor = self.output(x)
        return logits


class CNN(nn.Module):
    """Two 3 x 3 convolutions, each halved by max-pooling, and a hidden layer.

    Takes [b, in_channels, image_size, image_size]. `dropout` (a share, before the last layer)
    and `batch_norm` are off by default: without them N workers compute just what one would.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        width: int = 16,
        hidden: int = 128,
        out: int = 10,
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(in_channels=in_channels, width=width, hidden=hidden, out=out)
        _check_sizes(at_least=4, image_size=image_size)
        if not 0 <= dropout < 1:
            raise UserError(f"model.dropout must be from 0 to below 1, not {dropout}")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(2 * width) if batch_norm else nn.Identity()
        self.hidden = nn.Linear(2 * width * (image_size // 4) ** 2, hidden)
        self.output = nn.Linear(hidden, out)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.activation = _activation(activation)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [b, out]."""
        x = self.pool(self.activation(self.norm1(self.conv1(images))))
        x = self.pool(self.activation(self.norm2(self.conv2(x))))
        x = self.activation(self.hidden(x.flatten(1)))
        logits: Tensor = self.output(self.dropout(x))
        return logits


def resnet18(in_channels: int = 1, out: int = 10) -> nn.Module:
    """torchvision's ResNet-18 with the head that small images want: 3 x 3, stride 1, no pooling.

    Its own (7 x 7, stride 2, max-pooling) leaves 7 x 7 of 28 x 28 pixels before the first block.
    """
    _check_sizes(in_channels=in_channels, out=out)
    try:
        from torchvision import models  # here, because it takes seconds
    # Beside a torch that it does not match, torchvision raises RuntimeError or AttributeError.
    except (ImportError, RuntimeError, AttributeError) as fault:
        raise UserError(
            f"model.type=ResNet18 needs torchvision, which cannot be imported: {fault}",
            "install the torchvision that belongs to the installed torch",
        ) from fault
    model: nn.Module = models.resnet18(num_classes=out)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "SimpleNN": SimpleNN,
    "CNN": CNN,
    "ResNet18": resnet18,
}


def build(model: dict[str, Any], seed: int) -> nn.Module:
    """The model that the setting `model` describes, on the CPU, its first weights drawn by `seed`.

    The weights are the same wherever this runs, up to rounding, and no random generator of the
    caller is touched. Raises `UserError` for a type or an argument that cannot be.
    """
    arguments = dict(model)
    name = arguments.pop("type", None)
    if not isinstance(name, str):
        raise UserError(f"model.type must be a name, not {name!r}", _known_types())
    make = _imported(name) if ":" in name else _in_table(name)
    _check_arguments(name, make, arguments)
    # Only the CPU's generator is used, saved and put back; torch.manual_seed would seed them all.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        try:
            built = make(**arguments)
        except UserError:
            raise
        except Exception as fault:  # whatever a constructor does, it is the settings that led to it
            raise UserError(
                f"{name} cannot be built from these arguments: {type(fault).__name__}: {fault}",
                _takes(name, make),
            ) from fault
    if not isinstance(built, nn.Module):
        raise UserError(f"{name} returned {type(built).__name__}, not a torch.nn.Module")
    return built


# -------------------------------------------------------------------------- from name to callable


def _in_table(name: str) -> Callable[..., nn.Module]:
    if name not in MODELS:
        raise UserError(
            f"there is no model {name!r} (model.type)",
            _did_you_mean(name, MODELS) + _known_types(),
        )
    return MODELS[name]


def _imported(name: str) -> Callable[..., nn.Module]:
    """What `module:attribute` names, provided that it makes a module.

    A worker gets this name from its server, so not any callable will do: `os:system` must not.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # an installed command does not look there, `python -m` does
    try:
        module = importlib.import_module(module_name)
    except Exception as fault:  # whatever a user's module may do
        is_absent = isinstance(fault, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{fault.name}."
        )
        problem = (
            f"there is no module {module_name!r}"
            if is_absent
            else f"importing {module_name!r} failed: {type(fault).__name__}: {fault}"
        )
        raise UserError(
            f"model.type={name}: {problem}",
            "its file must be in this folder, or installed, on every machine of the run",
        ) from fault
    make = getattr(module, attribute, None)
    if make is None:
        raise UserError(
            f"model.type={name}: module {module_name} has no {attribute!r}",
            _did_you_mean(attribute, vars(module)),
        )
    made = make
    if inspect.isfunction(make) and (signature := _signature(make)):
        made = signature.return_annotation
    if not (isinstance(made, type) and issubclass(made, nn.Module)):
        raise UserError(
            f"model.type={name} is neither a subclass of torch.nn.Module nor a function "
            "annotated to return one"
        )
    checked: Callable[..., nn.Module] = make
    return checked


def _known_types() -> str:
    return f"known: {', '.join(MODELS)}, or package.module:Name for a model of your own"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    spelled = {name.lower(): name for name in known}
    nearest = get_close_matches(word.lower(), spelled, n=1)
    return f"did you mean {spelled[nearest[0]]}? " if nearest else ""


# ------------------------------------------------------------------------------------- arguments


def _check_arguments(name: str, make: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Compare `arguments` with the signature: unknown, wrong type, missing."""
    signature = _signature(make)
    if signature is None:
        return
    parameters = signature.parameters.values()
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes = _takes(name, make)
    for key, value in arguments.items():
        if key in named:
            kind = named[key].annotation
            if not _fits(value, kind):
                raise UserError(f"model.{key} must be {kind.__name__}, not {value!r}", takes)
        elif not takes_any:
            raise UserError(
                f"model.{key} is no argument of {name}", _did_you_mean(str(key), named) + takes
            )
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise UserError(f"model.{key} is missing", takes)


def _fits(value: object, kind: object) -> bool:
    """Whether `value` may stand where `kind` is annotated; only plain types are checked."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str or kind is bool:
        return isinstance(value, kind)
    return True


def _signature(make: Callable[..., Any]) -> inspect.Signature | None:
    """With annotations as objects if their names can be resolved; None where Python cannot tell."""
    for resolve in (True, False):
        try:
            return inspect.signature(make, eval_str=resolve)
        except Exception:  # annotations are the user's code, and some callables have no signature
            continue
    return None


def _takes(name: str, make: Callable[..., Any]) -> str:
    """A hint: the arguments with their types and defaults."""
    signature = _signature(make)
    if signature is None:
        return ""
    return f"{name} takes {', '.join(map(str, signature.parameters.values())) or 'no arguments'}"


def _check_sizes(at_least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < at_least:
            raise UserError(f"model.{name} must be {at_least} or more, not {size}")


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UserError(
            f"there is no activation {name!r} (model.activation)",
            f"{_did_you_mean(name, ACTIVATIONS)}known: {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[name]()
