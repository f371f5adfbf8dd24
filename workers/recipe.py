"""What the built-in training is made of: device, threads, data, model, optimizer, evaluation.

Worker and observer build the same things from the same settings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from paramserver.errors import UserError
from paramserver.settings import Settings
from workers.data import Samples

EVALUATION_BATCH = 500


def choose_device(wanted: str) -> torch.device:
    """The device of that name; `auto`: CUDA, then MPS, then CPU. Raises `UserError` if missing."""
    have = ["cpu"]
    if torch.backends.mps.is_available():
        have.insert(0, "mps")
    if torch.cuda.is_available():
        have = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + have
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


def tell_downloads(say: Callable[[str], None]) -> None:
    """Let a person see what loading the data set waits for."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    logger = logging.getLogger("workers")
    logger.setLevel(logging.INFO)
    logger.handlers = [Handler()]
    logger.propagate = False


def build_optimizer(model: nn.Module, settings: Settings) -> Optimizer:
    """Adam, in one kernel for all parameters where torch has that for their device."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return Adam(parameters, lr=settings.learning_rate, fused=fused)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    samples: Samples,
    device: torch.device,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """(mean loss, share of right answers) over a set; `between()` runs after every batch."""
    model.eval()
    loss, right = 0.0, 0
    for indices in torch.split(torch.arange(len(samples)), EVALUATION_BATCH):
        images, labels = samples.batch(indices, device)
        outputs = model(images)
        loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
        right += int((outputs.argmax(1) == labels).sum())
        between()
    return loss / len(samples), right / len(samples)
