"""What the settings `optimizer`, `scheduler`, `loss` and `metric` may name of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from paramserver.errors import UserError
from paramserver.settings import Settings
from paramserver.tensors import factories
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


def with_rate(
    optimizer: Callable[..., Any], given: Mapping[str, Any], learning_rate: float
) -> dict[str, Any]:
    """The arguments of an optimizer, those that are `given` and its `lr`. Raises `UserError` where
    `lr` is given."""
    if "lr" in given:
        raise UserError("optimizer.lr is a setting of its own", f"learning_rate={given['lr']}")
    rate = {"lr": learning_rate} if factories.takes(optimizer, "lr") else {}
    return {**given, **rate}


def is_given_optimizer(name: object, scheduler: Callable[..., Any]) -> bool:
    """Is the optimizer the first argument of this scheduler? Schedulers of many have theirs."""
    return factories.takes(scheduler, "optimizer") and name != "ChainedScheduler"


def check_mean(group: str, arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for a loss or a metric that is no mean."""
    if arguments.get("reduction", "mean") != "mean":
        raise UserError(
            f"{group}.reduction={arguments['reduction']}: it must be a mean",
            "gradients of workers are averaged by their samples",
        )


def check_named(settings: Settings) -> None:
    """Raise `UserError` for a name that is neither torch's nor an import path, and for arguments
    that torch's class of that name does not take. Those of a user's own class are checked where it
    is imported, and the values of a schedule's where there is an optimizer."""
    named: list[tuple[str, Any, Any]] = [
        ("optimizer", settings.optimizer, OPTIMIZERS),
        ("loss", settings.loss, LOSSES),
        ("metric", settings.metric, METRICS),
        ("scheduler", settings.scheduler, SCHEDULERS),
    ]
    for setting, group, known in named:
        if not isinstance(group, dict):
            continue
        arguments = dict(group)
        name = arguments.pop("name", None)
        if isinstance(name, str) and ":" not in name:
            if name not in known:
                raise no_such(setting, name, known)
            if name != "accuracy":  # ours, known where it is used
                _check_arguments(setting, name, arguments, settings.learning_rate)
        inner = group.get("schedulers")  # one after another
        named += [(setting, each, known) for each in inner] if isinstance(inner, list) else []


class _AreRight(BaseException):
    """An optimizer asks for its parameters: it has checked its other arguments before."""


class _Parameters:
    """What an optimizer is given for its parameters, to be told when it asks for them."""

    def __iter__(self) -> Iterator[Any]:
        raise _AreRight


def _check_arguments(
    setting: str, name: str, given: Mapping[str, Any], learning_rate: float
) -> None:
    """Raise `UserError` where torch's class of that name does not take these arguments."""
    if setting == "optimizer":
        factory = OPTIMIZERS[name]
        arguments = with_rate(factory, given, learning_rate)
        try:  # not made to the end: torch would import its compiler for that, which takes long
            factories.make(setting, name, factory, arguments, _Parameters())
        except _AreRight:
            return
    elif setting == "scheduler":
        factory = SCHEDULERS[name]
        first = int(is_given_optimizer(name, factory))
        factories.check(setting, name, factory, given, first)
    else:
        check_mean(setting, given)
        factories.make(setting, name, LOSSES[name], given)
