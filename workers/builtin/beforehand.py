"""Checks what the settings name before a server listens, downloads or makes a folder.

What is ours and torch's is tried with its arguments; a user's own is read, not imported
(`workers.builtin.sources`). What only a model with its samples shows, the observer says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paramserver.settings import Settings
from paramserver.tensors import factories, torch_names

from . import builders, data, models, own_data, sources

IS_A = {
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "torch's LRScheduler",
    "loss": "torch.nn.Module or torch.Tensor",
    "metric": "torch.nn.Module or torch.Tensor",
    "samples": "int",
}


def check(settings: Settings) -> None:
    """Raise `UserError` for the first name or argument that cannot be, and a device that is not
    here."""
    torch_names.check_named(settings)
    _check_model(settings.model)
    _check_dataset(settings.dataset)
    for setting in IS_A:
        group = getattr(settings, setting)
        for each in torch_names.with_those_within(group):
            if ":" in str(each.get("name")):
                _check_own(setting, each, settings.learning_rate)
    builders.choose_device(settings.device)


def _check_model(model: Mapping[str, Any]) -> None:
    name = str(model["type"])
    if ":" not in name:
        models.check(dict(model))
    elif (found := sources.read("model.type", name, "torch.nn.Module")) is not None:
        factories.check("model", name, found, _without(model, "type"))


def _check_dataset(dataset: Mapping[str, Any]) -> None:
    name = str(dataset["name"])
    if ":" not in name:
        data.checked(dict(dataset))
        return
    found = sources.read("dataset.name", name, "torch.utils.data.Dataset")
    if found is not None:
        arguments, val, _ = own_data.parts(found, _without(dataset, "name"))
        factories.check("dataset", name, found, arguments)
        factories.check("dataset", name, found, {**arguments, **(val or {})})


def _check_own(setting: str, group: Mapping[str, Any], learning_rate: float) -> None:
    name, arguments = str(group["name"]), _without(group, "name")
    if setting in ("loss", "metric"):
        torch_names.check_mean(setting, arguments)
    found = sources.read(setting, name, IS_A[setting])
    if found is None:
        return
    first = 1 if setting in ("optimizer", "samples") else 0
    if setting == "optimizer":
        arguments = torch_names.with_rate(found, arguments, learning_rate)
    elif setting == "scheduler":
        first = int(torch_names.is_given_optimizer(name, found))
    elif setting != "samples" and found.returns is not None:
        if "Tensor" not in found.returns:
            return  # it may make a module
        first = 2
    factories.check(setting, name, found, arguments, first)


def _without(group: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != part}
