"""What the settings `optimizer`, `scheduler`, `loss` and `metric` may name of torch's."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
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
FIRST_STEPS = 2  # of a schedule that is tried


def build_scheduler(
    optimizer: Optimizer, setting: Mapping[str, Any], find: Callable[[Any], Any]
) -> LRScheduler:
    """The setting `scheduler`, and what stands in it; `find` gives the class of a name. Raises
    `UserError`."""
    arguments = dict(setting)
    name = arguments.pop("name", None)
    factory = find(name)
    inner = arguments.get("schedulers")
    if isinstance(inner, list) and all(isinstance(i, dict) for i in inner):  # one after another
        arguments["schedulers"] = [build_scheduler(optimizer, i, find) for i in inner]
    first = (optimizer,) if factories.is_given_optimizer(name, factory) else ()
    scheduler: LRScheduler = factories.make("scheduler", str(name), factory, arguments, *first)
    return scheduler


def check_named(settings: Settings) -> None:
    """Raise `UserError` for a name that is neither torch's nor an import path, and for arguments
    that torch's class of that name does not take. Those of a user's own class are not looked at."""
    for setting, group, known in (
        ("optimizer", settings.optimizer, OPTIMIZERS),
        ("loss", settings.loss, LOSSES),
        ("metric", settings.metric, METRICS),
        ("scheduler", settings.scheduler, SCHEDULERS),
    ):
        for each in factories.with_those_within(group):
            name = each.get("name")
            if isinstance(name, str) and ":" not in name and name not in known:
                raise no_such(setting, name, known)
    optimizer = _unfinished_optimizer(settings)
    for setting, group in (("loss", settings.loss), ("metric", settings.metric)):
        if group is not None and not _is_own(group) and group["name"] != "accuracy":
            factories.check_mean(setting, group)
            given = {key: value for key, value in group.items() if key != "name"}
            factories.make(setting, group["name"], LOSSES[group["name"]], given)
    if settings.scheduler is not None:
        _try_scheduler(optimizer, settings.scheduler)


def _is_own(group: Mapping[str, Any]) -> bool:
    return ":" in str(group.get("name"))


class _AreRight(BaseException):
    """An optimizer asks for its parameters: it has checked its other arguments before."""


class _Parameters:
    """What an optimizer is given for its parameters, to be told when it asks for them."""

    def __iter__(self) -> Iterator[Any]:
        raise _AreRight


def _unfinished_optimizer(settings: Settings) -> Optimizer:
    """The optimizer of the settings, with one group without parameters; in place of a user's own
    class a plain one. It is not made to the end: torch would import its compiler for that, which
    takes long. Raises `UserError` for arguments that its class does not take."""
    given = dict(settings.optimizer)
    name = given.pop("name")
    factory: Any = SGD if ":" in name else OPTIMIZERS[name]
    arguments = factories.with_rate(factory, {} if ":" in name else given, settings.learning_rate)
    made: list[Optimizer] = []

    def begin(*args: Any, **kwargs: Any) -> None:
        made.append(factory.__new__(factory))
        factory.__init__(made[0], *args, **kwargs)

    begin.__signature__ = factories.signature_of(factory)  # type: ignore[attr-defined]
    with suppress(_AreRight):
        factories.make("optimizer", name, begin, arguments, _Parameters())
    optimizer = made[0]
    optimizer.param_groups = [{**optimizer.defaults, "params": []}]
    return optimizer


def _try_scheduler(optimizer: Optimizer, setting: Mapping[str, Any]) -> None:
    """Make the schedule and take its first steps: some of torch's fail only there."""
    if any(map(_is_own, factories.with_those_within(setting))):
        for each in factories.with_those_within(setting):
            if not _is_own(each):
                name, arguments = each["name"], {k: v for k, v in each.items() if k != "name"}
                first = int(factories.is_given_optimizer(name, SCHEDULERS[name]))
                factories.check("scheduler", name, SCHEDULERS[name], arguments, first)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step of an optimizer comes before those of a schedule
        scheduler = build_scheduler(optimizer, setting, SCHEDULERS.__getitem__)
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            raise factories.follows_a_metric()
        name = setting["name"]
        try:
            for _ in range(FIRST_STEPS):
                scheduler.step()
        except Exception as fault:  # whatever torch computes with these numbers
            raise UserError(
                f"{name} cannot be stepped with these arguments: {factories.told(fault)}",
                factories.taken_by(name, SCHEDULERS[name]),
            ) from fault
