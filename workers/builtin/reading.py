"""Checks what the settings name by reading: nothing is built or imported, PyTorch neither.

A user's own classes and functions are read from their source files (`workers.builtin.sources`),
ours too. Those of torch stand in `torch_signatures.json`, which `make docs` writes, so that a
machine without PyTorch knows them as well.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from paramserver.settings import Settings
from paramserver.tensors import factories
from paramserver.words import no_such

from . import dataset_setting, sources
from .sources import Source

TABLE = Path(__file__).with_name("torch_signatures.json")
OF_TORCH = {
    "optimizer": "optimizers",
    "scheduler": "schedulers",
    "loss": "losses",
    "metric": "losses",
}
"""The settings that may name a class of torch's, and the part of the table that has them."""
IS_A = {
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "torch's LRScheduler",
    "loss": "torch.nn.Module or torch.Tensor",
    "metric": "torch.nn.Module or torch.Tensor",
    "samples": "int",
}


def check(settings: Settings) -> None:
    """Raise `UserError` for the first name that there is not, and the first argument that is not
    taken, is missing or of another type. What is installed nowhere here may be elsewhere."""
    _check_model_of_ours(settings.model)
    for setting in OF_TORCH:
        for each in factories.with_those_within(getattr(settings, setting)):
            if ":" not in str(each.get("name")):
                _check_of_torch(setting, each, settings.learning_rate)
    check_own(settings, elsewhere=True)


def check_own(settings: Settings, *, elsewhere: bool = False) -> None:
    """Raise `UserError` for what is wrong about the data set, about a user's own classes and
    functions, and their arguments. `elsewhere`: the run is on other machines, which may have what
    this one has not."""
    _check_own_model(settings.model, elsewhere)
    _check_dataset(settings.dataset, elsewhere)
    for setting in IS_A:
        for each in factories.with_those_within(getattr(settings, setting)):
            if ":" in str(each.get("name")):
                _check_own(setting, each, settings.learning_rate, elsewhere)


# ------------------------------------------------------------------------------- ours and torch's


def _check_model_of_ours(model: Mapping[str, Any]) -> None:
    name = str(model["type"])
    if ":" in name:
        return
    found = sources.of_ours("models.py")
    known = {"SimpleNN": "SimpleNN", "CNN": "CNN", "ResNet18": "resnet18"}
    if name not in known:
        raise no_such("model.type", name, known)
    factories.check("model", name, found[known[name]], _without(model, "type"))


def _check_of_torch(setting: str, group: Mapping[str, Any], learning_rate: float) -> None:
    name, arguments = str(group["name"]), _without(group, "name")
    known = of_torch()[OF_TORCH[setting]]
    if name not in known and (setting, name) != ("metric", "accuracy"):
        raise no_such(setting, name, ["accuracy", *known] if setting == "metric" else known)
    if name not in known:
        return
    first = 0
    if setting == "optimizer":
        arguments = factories.with_rate(known[name], arguments, learning_rate)
        first = 1
    elif setting == "scheduler":
        if name == "ReduceLROnPlateau":
            raise factories.follows_a_metric()
        first = int(factories.is_given_optimizer(name, known[name]))
    else:
        factories.check_mean(setting, arguments)
    factories.check(setting, name, known[name], arguments, first)


@cache
def of_torch() -> dict[str, dict[str, Source]]:
    """The classes of torch, by part of the table and name."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    parts = {*OF_TORCH.values()}
    return {
        part: {name: sources.of_text(text) for name, text in table[part].items()} for part in parts
    }


# ----------------------------------------------------------------------- the data set, user's own


def _check_own_model(model: Mapping[str, Any], elsewhere: bool) -> None:
    name = str(model["type"])
    if ":" not in name:
        return
    found = sources.read("model.type", name, "torch.nn.Module", elsewhere=elsewhere)
    if found is not None:
        factories.check("model", name, found, _without(model, "type"))


def _check_dataset(dataset: Mapping[str, Any], elsewhere: bool) -> None:
    name = str(dataset["name"])
    if ":" not in name:
        dataset_setting.checked(dict(dataset))
        return
    found = sources.read("dataset.name", name, "torch.utils.data.Dataset", elsewhere=elsewhere)
    if found is not None:
        arguments, val, _ = dataset_setting.parts(found, _without(dataset, "name"))
        factories.check("dataset", name, found, arguments)
        factories.check("dataset", name, found, {**arguments, **(val or {})})


def _check_own(
    setting: str, group: Mapping[str, Any], learning_rate: float, elsewhere: bool
) -> None:
    name, arguments = str(group["name"]), _without(group, "name")
    if setting in ("loss", "metric"):
        factories.check_mean(setting, arguments)
    found = sources.read(setting, name, IS_A[setting], elsewhere=elsewhere)
    if found is None:
        return
    first = 1 if setting in ("optimizer", "samples") else 0
    if setting == "optimizer":
        arguments = factories.with_rate(found, arguments, learning_rate)
    elif setting == "scheduler":
        first = int(factories.is_given_optimizer(name, found))
    elif setting != "samples" and found.returns is not None:
        if "Tensor" not in found.returns:
            return  # it may make a module
        first = 2
    factories.check(setting, name, found, arguments, first)


def _without(group: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != part}


# -------------------------------------------------------------------------------------- the table


def written() -> str:
    """The table of this machine's PyTorch, as `make docs` writes it."""
    import torch

    from paramserver.tensors import torch_names

    def signatures(classes: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(inspect.signature(found)) for name, found in classes.items()}

    table = {
        "torch": torch.__version__.partition("+")[0],
        "optimizers": signatures(torch_names.OPTIMIZERS),
        "schedulers": signatures(torch_names.SCHEDULERS),
        "losses": signatures(torch_names.LOSSES),
    }
    return json.dumps(table, indent=1) + "\n"


if __name__ == "__main__":
    TABLE.write_text(written(), encoding="utf-8")
