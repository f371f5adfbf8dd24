"""The models that the setting `model` can name; `build` makes a module from that setting.

`model.type` is a name in `MODELS`, or `package.module:Name` for a model of your own; every other
key under `model` is an argument of its constructor. A model of your own is a subclass of
`torch.nn.Module`, or a function that is annotated to return one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from paramserver.errors import UserError
from paramserver.tensors import factories

from . import registry
from .own_code import NOTHING, OwnCode

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
    """torchvision's ResNet-18 with a first layer for small images: 3 x 3, stride 1, no pooling.

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


def build(model: dict[str, Any], seed: int, code: OwnCode | None = NOTHING) -> nn.Module:
    """The model that the setting `model` describes, on the CPU, its first weights drawn by `seed`.

    The weights are the same wherever this runs, up to rounding, and the caller's random generators
    stay as they are. `code` limits the modules that a type may be imported from
    (`workers.builtin.own_code`; None: any). Raises `UserError` for an invalid type or argument.
    """
    arguments = dict(model)
    name = arguments.pop("type", None)
    factory = registry.find("model.type", name, MODELS, nn.Module, "torch.nn.Module", code)
    # Only the CPU's generator is used, saved and put back; torch.manual_seed would seed them all.
    if name in MODELS:
        _check_room(str(name), factory, arguments)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        built = factories.make("model", str(name), factory, arguments)
    if not isinstance(built, nn.Module):
        raise UserError(f"{name} returned {type(built).__name__}, not a torch.nn.Module")
    return built


def check(model: dict[str, Any], *, here: bool = True) -> None:
    """Raise `UserError` for arguments that a model of ours does not take; it is not built. `here`:
    and where this machine has no room for it."""
    arguments = dict(model)
    name = str(arguments.pop("type"))
    if name == "ResNet18":  # torchvision takes seconds
        factories.check("model", name, MODELS[name], arguments)
        _check_sizes(**arguments)
    else:
        _check_room(name, MODELS[name], arguments, here=here)


def _check_room(
    name: str, factory: Callable[..., nn.Module], arguments: dict[str, Any], *, here: bool = True
) -> None:
    """Raise `UserError` where a model of ours is larger than this machine's memory: a typing error,
    or a hostile server, could otherwise end this process, or others on this machine, without a
    message."""
    with torch.device("meta"):
        drawn = factories.make("model", name, factory, arguments)
    size = sum(t.numel() * t.element_size() for t in (*drawn.parameters(), *drawn.buffers()))
    if here and size > psutil.virtual_memory().total:
        raise UserError(
            f"{name} with these arguments takes {size / 2**30:,.0f} GiB, more than this machine has"
        )


def _check_sizes(at_least: int = 1, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < at_least:
            raise UserError(f"model.{name} must be {at_least} or more, not {size}")


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise UserError(
            f"there is no activation {name!r} (model.activation)",
            factories.did_you_mean(name, ACTIVATIONS, f"known: {', '.join(ACTIVATIONS)}"),
        )
    return ACTIVATIONS[name]()
