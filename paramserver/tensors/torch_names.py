"""What the settings `optimizer`, `scheduler`, `loss` and `metric` may name of torch's."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from paramserver.settings import Settings
from paramserver.words import no_such


def _of(module: ModuleType, wanted: type) -> dict[str, Any]:
    """The public subclasses of `wanted` in a module of torch's."""
    return {
        name: found
        for name, found in vars(module).items()
        if isinstance(found, type)
        and issubclass(found, wanted)
        and found is not wanted
        and not name.startswith("_")
    }


def _takes_two(loss: type[nn.Module]) -> bool:
    """Does this loss take outputs and targets? Losses of triplets and pairs do not."""
    return len(inspect.signature(loss.forward).parameters) == 3


OPTIMIZERS = _of(torch.optim, Optimizer)
SCHEDULERS = _of(lr_scheduler, LRScheduler)
LOSSES = {n: kind for n, kind in _of(nn, nn.modules.loss._Loss).items() if _takes_two(kind)}
METRICS = ("accuracy", *LOSSES)


def check_names(settings: Settings) -> None:
    """Raise `UserError` for a name that is neither torch's nor an import path."""
    named: list[tuple[str, Any, Any]] = [
        ("optimizer", settings.optimizer, OPTIMIZERS),
        ("loss", settings.loss, LOSSES),
        ("metric", settings.metric, METRICS),
        ("scheduler", settings.scheduler, SCHEDULERS),
    ]
    for setting, group, known in named:
        if not isinstance(group, dict):
            continue
        name = group.get("name")
        if isinstance(name, str) and ":" not in name and name not in known:
            raise no_such(setting, name, known)
        inner = group.get("schedulers")  # one after another
        named += [(setting, each, known) for each in inner] if isinstance(inner, list) else []
