"""Loads a checkpoint into a replica, or raises an error that says why it does not fit.

A file may have been changed, or belong to another training. So everything that the first step needs
is checked here, before any worker trains from it.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.optim import Optimizer

from paramserver.errors import UserError
from paramserver.rounds.ledger import Ledger
from paramserver.settings import Settings, outside
from paramserver.words import shown

from . import checkpoint
from .checks import schedule_state
from .replica import Replica


def resume(replica: Replica, path: Path, settings: Settings) -> None:
    """Load the checkpoint into a replica that `settings` have made. Raises `UserError`."""
    saved = checkpoint.load(path)
    before = _settings_of(saved, path)
    for key, theirs, ours in (
        ("optimizer", before.optimizer["name"], settings.optimizer["name"]),
        ("scheduler", before.scheduler, settings.scheduler),
        ("schedule_by", before.schedule_by, settings.schedule_by),
    ):
        if theirs != ours and not (key == "schedule_by" and settings.scheduler is None):
            raise UserError(
                f"{path} was trained with {key}={shown(theirs)}, this run has {shown(ours)}",
                "its state would not fit: resume with the same",
            )
    optimizer = replica.optimizer
    usual = [dict(g) for g in optimizer.param_groups]
    chosen = [
        {k: v for k, v in g.items() if k in settings.optimizer or k in before.optimizer}
        for g in optimizer.param_groups
    ]
    try:
        _check(saved, replica)
        replica.load(saved.state, saved.step, saved.lineage)
        # The optimizer's state brings its old settings; newly chosen ones win.
        if before.optimizer != settings.optimizer:
            for group, own in zip(optimizer.param_groups, chosen, strict=True):
                group.update(own)
        if before.learning_rate != settings.learning_rate:
            replica.change_learning_rate(before.learning_rate, settings.learning_rate)
        replica.by_hand.note()
        _try_optimizer(optimizer, usual)
    except ValueError as e:
        raise UserError(
            f"the checkpoint {path} does not fit this run's model: {e}",
            "resume with the model, optimizer and schedule it was trained with",
        ) from None


def _settings_of(saved: checkpoint.Checkpoint, path: Path) -> Settings:
    """The settings that the state was made with. Raises `UserError`."""
    told = {k: saved.settings[k] for k in {*_Recipe.__struct_fields__} & {*saved.settings}}
    try:
        msgspec.convert(told, _Recipe)
        before = replace(Settings(), **told)
        rate = before.learning_rate
        if not isinstance(before.optimizer.get("name"), str):
            raise ValueError("its optimizer has no name")
        if not math.isfinite(rate) or outside("learning_rate", rate):
            raise ValueError(f"its learning rate is {rate}")
    except (ValueError, TypeError) as e:
        raise UserError(f"the checkpoint {path} cannot be resumed: its settings: {e}") from None
    return before


class _Recipe(msgspec.Struct):
    """The settings that a checkpoint's state is of."""

    learning_rate: float = 1.0
    optimizer: dict[str, Any] = {}
    scheduler: dict[str, Any] | None = None
    schedule_by: str = "step"


def _check(saved: checkpoint.Checkpoint, replica: Replica) -> None:
    """Raise ValueError for the first part of the state that this replica cannot load."""
    state = saved.state
    for part in ("model", "optimizer", "scheduler", "ledger"):
        if not isinstance(state, dict) or part not in state:
            raise ValueError(f"its state has no {part}")
    own = replica.state()
    _alike("model", state["model"], own["model"])
    for name in state["model"]:
        if name not in own["model"]:
            raise ValueError(f"model.{name} is not in this run's")
    _check_optimizer(state["optimizer"], replica.optimizer)
    if replica.scheduler is not None:
        if state["scheduler"] is None:
            raise ValueError("its state has no scheduler")
        there = {k: v for k, v in schedule_state(replica.scheduler).items() if v is not None}
        _alike("scheduler", state["scheduler"], there)
        if not 0 <= state["scheduler"].get("last_epoch", 0) <= checkpoint.STEPS_MAX:
            raise ValueError("its schedule stands nowhere")
    if state["ledger"] is not None:
        if not isinstance(state["ledger"], dict):
            raise ValueError("its ledger cannot be read")
        Ledger.from_state(state["ledger"])
    elif saved.step:
        raise ValueError(f"it is of step {saved.step}, and has no ledger of samples")


def _check_optimizer(saved: Any, optimizer: Optimizer) -> None:
    own = optimizer.state_dict()
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("its optimizer's state cannot be read")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise ValueError("its optimizer has other parameter groups")
    for number, (theirs, ours) in enumerate(zip(groups, own["param_groups"], strict=True)):
        _alike(f"param_groups.{number}", theirs, {"params": ours["params"]})
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(f"its optimizer's group {number} has other parameters")
        if not all(isinstance(i, int) for i in theirs["params"]):
            raise ValueError(f"its optimizer's group {number} does not name parameters")
        rate = theirs.get("lr")
        if not (isinstance(rate, int | float | Tensor) and math.isfinite(float(rate))):
            raise ValueError(f"its optimizer's learning rate is {str(rate)[:40]}")
    known = {i for group in groups for i in group["params"]}
    for index, values in saved["state"].items():
        if index not in known or not isinstance(values, dict):
            raise ValueError("its optimizer's state is of other parameters")


def _alike(where: str, saved: Any, own: Any) -> None:
    """Raise ValueError where `saved` differs from `own` in names, kinds, dtypes or shapes."""
    if isinstance(own, Mapping):
        if not isinstance(saved, Mapping):
            raise ValueError(f"{where} is {_kind(saved)}, not {_kind(own)}")
        for name, value in own.items():
            if name not in saved:
                raise ValueError(f"{where}.{name} is missing")
            _alike(f"{where}.{name}", saved[name], value)
    elif isinstance(own, Tensor):
        if not isinstance(saved, Tensor) or (saved.dtype, saved.shape) != (own.dtype, own.shape):
            raise ValueError(f"{where} is {_kind(saved)}, not {_kind(own)}")
    elif isinstance(own, bool | int | float):
        if not isinstance(saved, bool | int | float | Tensor):
            raise ValueError(f"{where} is {_kind(saved)}, not a number")
    elif own is not None and not (
        isinstance(saved, type(own)) or (isinstance(own, list | tuple) and isinstance(saved, list))
    ):
        raise ValueError(f"{where} is {_kind(saved)}, not {_kind(own)}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {dtype}"
    return f"a {type(value).__name__}"


def _try_optimizer(optimizer: Optimizer, usual: list[dict[str, Any]]) -> None:
    """Step a copy of each parameter with its loaded state. Raises ValueError where that fails but
    succeeds with a fresh state and the `usual` groups."""
    for group, own in zip(optimizer.param_groups, usual, strict=True):
        for p in group["params"]:
            if not p.requires_grad:
                continue
            try:
                _step_alone(optimizer, group, p, copy.deepcopy(optimizer.state.get(p, {})))
            except Exception as e:
                try:
                    _step_alone(optimizer, own, p, {})
                except Exception:
                    return  # an optimizer that takes no single parameter cannot be tried
                raise ValueError(f"its optimizer's state cannot be used: {e}") from None


def _step_alone(optimizer: Optimizer, group: dict[str, Any], p: Tensor, state: Any) -> None:
    alone = torch.nn.Parameter(p.detach().clone())
    alone.grad = torch.zeros_like(alone)
    trial = object.__new__(type(optimizer))
    trial.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
    trial.param_groups = [{**group, "params": [alone]}]
    trial.state = defaultdict(dict, {alone: state} if state else {})
    type(optimizer).step(trial)  # not the instance's, which a schedule has wrapped
