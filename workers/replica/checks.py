"""Checks at `attach` whether a replica can train this, before other workers wait for it.

Between the averaged gradient and the parameters everything must be the same in every replica, and
a function of the log: no closure that computes again, no schedule that follows a local metric, no
scale of this worker's own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from paramserver.errors import UserError
from paramserver.tensors.factories import follows_a_metric

from .state import dtype_name

TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPPED_BY_CLUSTER = "the schedule that attach() was given is stepped with every update"


def check(
    model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None, *, own: bool = False
) -> None:
    """Raise `UserError` for the first thing that a replica cannot do, with what to do instead.
    `own`: the loop may step a schedule of its own."""
    _check_shapes(model)
    _check_parameters(model)
    check_optimizer(optimizer, scheduler, own=own)
    # It may own frozen ones too.
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in owned:
            raise UserError(
                f"{name} requires a gradient, but the optimizer does not have it",
                "give it to the optimizer, or set requires_grad = False",
            )


def check_options(clip_norm: Any, before_step: Any, after_step: Any) -> None:
    """Raise `UserError` for an argument of `attach` that is of another kind."""
    for name, function in (("before_step", before_step), ("after_step", after_step)):
        if function is not None and not callable(function):
            raise UserError(f"{name}={function!r}", "it is a function of the model")
    if clip_norm is None:
        return
    try:
        fits = not isinstance(clip_norm, bool | str) and float(clip_norm) > 0
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError(f"clip_norm={clip_norm!r}", "it is the largest norm, a number above 0")


def _check_shapes(model: nn.Module) -> None:
    """Lazy modules get their shapes with the first batch, the meta device has no numbers."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UserError(
                f"{name} has no shape yet: it belongs to a lazy module",
                "pass one batch through the model before attach(), on every worker: model(images)",
            )
        if tensor.is_meta:
            raise UserError(
                f"{name} is on the meta device, where tensors have no numbers",
                "give it memory and numbers before attach(): model.to_empty(device='cpu'), and "
                "initialise it",
            )


def _check_parameters(model: nn.Module) -> None:
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise UserError("the model has no parameter that requires a gradient", "nothing to train")
    for name, p in trained:
        if p.is_complex():
            raise UserError(
                f"{name} is complex: averages are of real numbers",
                "keep it as a real parameter, and use torch.view_as_complex in forward",
            )
        if p.dtype not in TRAINED:
            raise UserError(
                f"{name} is trained in {dtype_name(p.dtype)}, whose numbers cannot be averaged",
                "train it in float32, bfloat16, float16 or float64",
            )
    for name, module in model.named_modules():
        is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        if is_embedding and module.sparse and module.weight.requires_grad:
            raise sparse(f"{name}.weight" if name else "weight")


def sparse(name: str) -> UserError:
    return UserError(f"{name} has a sparse gradient", "make its embedding with sparse=False")


def check_optimizer(optimizer: Optimizer, scheduler: LRScheduler | None, *, own: bool) -> None:
    """Raise `UserError` where a replica cannot step this optimizer, or its schedule."""
    kind = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(
            f"{kind} computes the loss again and again within a step",
            "use an optimizer whose step() needs no closure",
        )
    if isinstance(optimizer, SparseAdam):
        raise UserError(f"{kind} is for sparse gradients, averages are dense", "use Adam")
    _check_scheduler(optimizer, scheduler, own)


def _check_scheduler(optimizer: Optimizer, scheduler: LRScheduler | None, own: bool) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise follows_a_metric()
    owner = getattr(scheduler, "optimizer", None)
    # It may have been made for the optimizer that `attach` returned in a training before.
    if scheduler is not None and getattr(owner, "wrapped", owner) is not optimizer:
        raise UserError(
            "the scheduler belongs to another optimizer than the one that attach() was given",
            "make it for this one",
        )
    if scheduler is None and not own and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        raise UserError(
            "there is a schedule for this optimizer, but attach() was not given it",
            "attach(..., scheduler=scheduler): it must be stepped in every replica alike; or, with "
            "epoch_barrier=true on the server, step it once in each of cluster.epochs()",
        )


def refuse_step(scheduler: LRScheduler) -> Any:
    """Make a call of `scheduler.step` by the user's loop an error; returns the real method."""
    step = scheduler.step

    def refuse(epoch: object = None) -> None:
        raise UserError(STEPPED_BY_CLUSTER, "leave scheduler.step() out of the loop")

    scheduler.step = refuse  # type: ignore[method-assign]
    return step


def allow_step(scheduler: LRScheduler) -> None:
    """Undo `refuse_step`, for the user of the schedule."""
    scheduler.__dict__.pop("step", None)


def schedule_state(scheduler: LRScheduler) -> dict[str, Any]:
    """Its `state_dict`, without the attribute that `refuse_step` sets."""
    return {name: value for name, value in scheduler.state_dict().items() if name != "step"}


def misfit(own: Any, theirs: Any, where: str, holder: object = None) -> str | None:
    """Why a state from another process cannot replace our own, as a sentence; None where it can,
    which takes values of the same kinds.

    A schedule, the `holder`, sets every entry as an attribute. Entries that are not part of its
    state (its methods, its optimizer) are refused.
    """
    if own is None or theirs is None:
        return None
    if isinstance(own, dict):
        if not isinstance(theirs, dict):
            return f"{where} is no mapping"
        for name in theirs:
            if name not in own and holder is not None and hasattr(holder, str(name)):
                return f"{where}.{str(name)[:80]} is no part of a state"
        pairs = [(own[name], theirs[name], str(name)) for name in theirs if name in own]
    elif isinstance(own, list | tuple):
        if not isinstance(theirs, list | tuple):
            return f"{where} is no list"
        pairs = [(a, b, str(i)) for i, (a, b) in enumerate(zip(own, theirs, strict=False))]
    else:
        number = isinstance(own, int | float)
        is_wrong = (number and not isinstance(theirs, int | float | torch.Tensor)) or (
            isinstance(own, str) and not isinstance(theirs, str)
        )
        return f"{where} is a {type(theirs).__name__}" if is_wrong else None
    for a, b, name in pairs:
        inner = getattr(holder, name, None) if name == "_schedulers" else None
        if isinstance(holder, list | tuple):
            inner = holder[int(name)]
        why = misfit(a, b, f"{where}.{name}", inner)
        if why is not None:
            return why
    return None
