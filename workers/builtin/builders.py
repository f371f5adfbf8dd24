"""Builds the parts of the built-in training: device, threads, data, optimizer, loss, evaluation.

Worker and observer build the same things from the same settings. `code` limits the modules that
names in them may be imported from (`workers.builtin.own_code`); None allows any: the observer's
settings are its own user's.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from paramserver.errors import UserError
from paramserver.settings import Settings
from paramserver.tensors import factories, torch_names
from paramserver.tensors.torch_names import LOSSES, OPTIMIZERS, SCHEDULERS

from ..samples import loader
from ..weight import checked
from . import data, registry
from .own_code import NOTHING, OwnCode
from .own_data import OwnData

T = TypeVar("T")

EVALUATION_BATCH = 500
NOT_FUSED = {"fused", "foreach", "differentiable", "capturable"}


def devices_here() -> list[str]:
    """The devices of this machine, the best first: CUDA, then MPS, then CPU."""
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + have
    return have


def choose_device(wanted: str) -> torch.device:
    """The device of that name; `auto`: the best there is. Raises `UserError` if missing."""
    have = devices_here()
    if wanted == "auto":
        return torch.device(have[0])
    if wanted not in (*have, "cuda" if have[0].startswith("cuda") else "cpu"):
        raise UserError(
            f"device={wanted} is not on this machine", f"there is: {', '.join(have)} (or auto)"
        )
    return torch.device(wanted)


def set_threads(wanted: int | None, processes_here: int) -> None:
    """Torch's threads: as wanted, or this machine's cores shared among our processes here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(wanted or max(1, (cores or 1) // max(1, processes_here)))


def load_data(settings: Settings, code: OwnCode | None = NOTHING) -> data.Data | OwnData:
    """The run's training set (`train`) and validation set (`val`). Raises `UserError`."""
    if ":" in str(settings.dataset.get("name")):
        return OwnData(settings.dataset, settings.seed, code)
    return data.load(settings.dataset, settings.seed)


def build_optimizer(
    model: nn.Module, settings: Settings, code: OwnCode | None = NOTHING
) -> Optimizer:
    """The setting `optimizer`; in one kernel for all parameters where torch has that for their
    device. Raises `UserError`."""
    given = dict(settings.optimizer)
    name = given.pop("name")
    factory = registry.find("optimizer", name, OPTIMIZERS, Optimizer, "torch.optim.Optimizer", code)
    arguments = factories.with_rate(factory, given, settings.learning_rate)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if factories.takes(factory, "fused") and not {*arguments} & NOT_FUSED:
        arguments["fused"] = all(
            p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters
        )
    optimizer: Optimizer = factories.make("optimizer", name, factory, arguments, parameters)
    return optimizer


def build_scheduler(
    optimizer: Optimizer, settings: Settings, code: OwnCode | None = NOTHING
) -> LRScheduler | None:
    """The setting `scheduler`. Raises `UserError`."""
    if settings.scheduler is None:
        return None

    def find(name: object) -> Any:
        return registry.find(
            "scheduler", name, SCHEDULERS, LRScheduler, "torch's LRScheduler", code
        )

    return torch_names.build_scheduler(optimizer, settings.scheduler, find)


def build_average(model: nn.Module, settings: Settings) -> AveragedModel | None:
    """The setting `ema`: an average of the weights, on the model's device, whose
    `update_parameters` is called after each update. Buffers are those of the model."""
    if settings.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))


def averaged(average: AveragedModel, model: dict[str, Any]) -> dict[str, Any]:
    """The state of the average. Before its first update that is the model's: a run that is resumed
    from a checkpoint without an average begins one there."""
    return average.module.state_dict() if int(average.n_averaged) else model


@dataclass(frozen=True)
class Criterion:
    """The loss that trains a model and the metric that judges it: functions of (outputs, targets),
    means over a batch.

    `metric` is None where only the loss is reported; `name` is the metric's. `samples(batch)` says
    what loss and metric are means of; None: the samples of the batch.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], Tensor] | None = None
    name: str = "accuracy"
    samples: Callable[[Any], int] | None = None


def build_criterion(
    settings: Settings,
    model: nn.Module,
    samples: Any,
    device: torch.device,
    code: OwnCode | None = NOTHING,
) -> Criterion:
    """The settings `loss`, `metric` and `samples`, tried on two samples before other workers wait
    for this one.

    Without `metric` it is the accuracy where targets are classes. Raises `UserError` where model,
    data set, loss and metric do not fit together.
    """
    loss = _function("loss", settings.loss, LOSSES, device, code)
    batch, outputs, targets = _try("model", lambda: _two(model, samples, device))
    shapes = f"outputs are {_shape(outputs)}, targets {_shape(targets)}"
    value = _try("loss", lambda: loss(outputs, targets), shapes)
    if not isinstance(value, Tensor) or value.dim():
        raise UserError(f"loss={settings.loss['name']} gives no single number", shapes)
    count = _count(settings, batch, code)
    if settings.metric is None:
        usual = accuracy if _are_classes(outputs, targets) else None
        return Criterion(loss, usual, samples=count)
    metric = _function("metric", settings.metric, METRICS, device, code)
    _try("metric", lambda: float(metric(outputs, targets)), shapes)
    module, _, name = settings.metric["name"].rpartition(":")
    is_ours = not module or name not in ("accuracy", "loss")  # these names have a use already
    return Criterion(loss, metric, name if is_ours else f"{module}.{name}", count)


def _count(settings: Settings, batch: Any, code: OwnCode | None) -> Callable[[Any], int] | None:
    """The setting `samples`, tried on this batch."""
    if settings.samples is None:
        return None
    arguments = dict(settings.samples)
    name = arguments.pop("name")
    found = registry.find("samples", name, {}, int, "int", code)
    factories.check("samples", name, found, arguments, first=1)
    count: Callable[[Any], int] = functools.partial(found, **arguments)
    try:
        checked(count(batch))
    except UserError as wrong:
        raise UserError(f"samples={name}: {wrong.problem}", wrong.hint) from None
    except Exception as fault:
        raise UserError(f"samples={name} does not take a batch: {factories.told(fault)}") from fault
    return count


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of right answers: outputs [b, classes, ...], targets [b, ...] of whole numbers."""
    if not _are_classes(outputs, targets):
        raise ValueError("accuracy is of classes: targets [b] of whole numbers, outputs [b, n]")
    return (outputs.argmax(1) == targets).float().mean()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Any,
    device: torch.device,
    criterion: Criterion,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float | None]:
    """Mean loss and mean metric over a set; `between()` runs after every batch."""
    model.eval()
    load = loader(samples, device)
    loss, metric, total = 0.0, 0.0, 0
    for indices in torch.split(torch.arange(len(samples)), EVALUATION_BATCH):
        batch = load(indices)
        outputs, targets = forward(model, batch)
        weight = len(indices) if criterion.samples is None else checked(criterion.samples(batch))
        total += weight
        loss += float(criterion.loss(outputs, targets)) * weight
        if criterion.metric is not None:
            metric += float(criterion.metric(outputs, targets)) * weight
        between()
    return loss / total, metric / total if criterion.metric is not None else None


def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """The outputs for a batch (input, ..., target), and its targets."""
    if not isinstance(batch, list | tuple) or len(batch) < 2:
        raise UserError(
            f"a sample is (input, target), not one {type(batch).__name__}",
            "other data take a loop of your own: docs/your-own-model.md",
        )
    *inputs, targets = batch
    return model(*inputs), targets


@torch.no_grad()
def _two(model: nn.Module, samples: Any, device: torch.device) -> tuple[Any, Any, Any]:
    """A batch of two samples, its outputs and its targets; the model is left as it was."""
    was_training = model.training
    model.eval()
    load = loader(samples, device)
    try:
        batch = load(torch.arange(min(2, len(samples))))
        return batch, *forward(model, batch)
    finally:
        model.train(was_training)


def _try(what: str, function: Callable[[], T], shapes: str = "") -> T:
    try:
        with warnings.catch_warnings():
            # Torch would broadcast every target to every output, and the model learns nothing.
            warnings.filterwarnings("error", "Using a target size")
            return function()
    except UserError:
        raise
    except Exception as fault:
        raise UserError(
            f"this {what} does not take these samples: {factories.told(fault)}", shapes
        ) from fault


def _function(
    group: str,
    setting: dict[str, Any],
    known: dict[str, Any],
    device: torch.device,
    code: OwnCode | None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss or a metric: a module that is built, or a function, with its arguments."""
    arguments = dict(setting)
    name = arguments.pop("name")
    factories.check_mean(group, arguments)
    wanted = "torch.nn.Module or torch.Tensor"
    found = registry.find(group, name, known, nn.Module | Tensor, wanted, code)
    if isinstance(found, type) or registry.returns(found, nn.Module):
        module: nn.Module = factories.make(group, name, found, arguments)
        if group == "loss" and any(True for _ in module.parameters()):
            raise UserError(
                f"loss={name} has parameters of its own, which nobody would train",
                "make them a part of the model",
            )
        return module.to(device)
    factories.check(group, name, found, arguments, first=2)
    return functools.partial(found, **arguments) if arguments else found


def _are_classes(outputs: Any, targets: Any) -> bool:
    """Whether a target is the number of the right one of the outputs."""
    return (
        isinstance(outputs, Tensor)
        and isinstance(targets, Tensor)
        and not (targets.is_floating_point() or targets.is_complex())
        and outputs.dim() >= 2
        and targets.shape == (outputs.shape[0], *outputs.shape[2:])
    )


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


METRICS = {"accuracy": accuracy, **LOSSES}
