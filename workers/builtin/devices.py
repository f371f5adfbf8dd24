"""`python -m workers.builtin.devices`: tries each device of this machine, alone and with a server.

On each one a small network trains 50 steps by itself, and the same 50 steps through a server on
this machine. What comes of it is held against the CPU's. It prints one JSON object for each device:

    device         its name for the setting `device`
    name           what it is
    step_ms        a step by itself
    exchange_ms    what the exchange adds to a step
    first, last    losses of the first and of the last step
    off            how far its weights are from the CPU's, as a share of the way of the training
    off_exchanged  how far those of the training through the server are from its own, likewise
    problem        what is wrong, as a sentence; empty if nothing is

Figures that there are not are null.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from paramserver import terminal
from paramserver.errors import UserError
from paramserver.net.address import LOOPBACK, free_port
from paramserver.program import command, exit_on_user_error

from ..cluster import join
from ..generators import forked
from . import builders

STEPS, BATCH, CLASSES = 50, 32, 10
WARM_UP = 10  # first steps, which are not timed
JOIN_S = 120.0
OFF_MAX = 0.05  # of the way that training took: GPUs round products to fewer bits
OFF_EXCHANGED_MAX = 1e-3

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tried:
    """What came of one device; see the module's head."""

    device: str
    name: str
    step_ms: float = math.nan
    exchange_ms: float = math.nan
    first: float = math.nan
    last: float = math.nan
    off: float = math.nan
    off_exchanged: float = math.nan
    problem: str = ""


@dataclass(frozen=True)
class Trained:
    """Weights on the CPU [n], losses of all steps, and the median of a step's seconds."""

    weights: Tensor
    losses: list[float]
    step_s: float


def main() -> None:
    with exit_on_user_error():
        builders.set_threads(None, 1)
        for tried in try_all(builders.devices_here()):
            told = {k: None if v != v else v for k, v in asdict(tried).items()}  # NaN is no JSON
            terminal.result(json.dumps(told))


def try_all(devices: Iterable[str]) -> Iterator[Tried]:
    """Each device in turn, the CPU first: the others are held against it."""
    torch.manual_seed(1)
    start = _weights(network())
    reference = train(torch.device("cpu"))
    for name in sorted(devices, key=lambda device: device != "cpu"):
        device = torch.device(name)
        tried = Tried(name, named(device))
        try:
            alone = reference if name == "cpu" else train(device)
            through = train_through_a_server(device)
        except Exception as error:  # of a device that cannot what a network needs
            text = " ".join(str(error).split())
            yield replace(tried, problem=f"{type(error).__name__}: {text[:300]}")
            continue
        way = float((reference.weights - start).norm())
        yield judged(
            replace(
                tried,
                step_ms=1000 * alone.step_s,
                exchange_ms=1000 * max(0.0, through.step_s - alone.step_s),
                first=alone.losses[0],
                last=alone.losses[-1],
                off=float((alone.weights - reference.weights).norm()) / way,
                off_exchanged=float((through.weights - alone.weights).norm()) / way,
            )
        )


def judged(tried: Tried) -> Tried:
    """With the problem, if its figures show one."""
    if not tried.last < tried.first / 2:  # NaN too
        return replace(tried, problem="it does not learn")
    if not tried.off < OFF_MAX:
        return replace(tried, problem="it learns something else than the CPU")
    if not tried.off_exchanged < OFF_EXCHANGED_MAX:
        return replace(tried, problem="the exchange changes what it learns")
    return tried


def named(device: torch.device) -> str:
    """What the device is, for people."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpu = platform.processor() or platform.machine()
    return f"{cpu} (GPU)" if device.type == "mps" else f"{cpu}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------------------- training


def network() -> nn.Module:
    """A convolution, a normalisation and a linear layer, with the same first weights always."""
    with forked():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, CLASSES),
        )


def batches(device: torch.device) -> list[Batch]:
    """Images [b, 1, 28, 28] of noise around one picture for each class, and their classes [b]."""
    drawn = torch.Generator().manual_seed(5)
    pictures = torch.randn(CLASSES, 1, 28, 28, generator=drawn)
    made = []
    for _ in range(STEPS):
        classes = torch.randint(CLASSES, (BATCH,), generator=drawn)
        noise = torch.randn(BATCH, 1, 28, 28, generator=drawn)
        made.append(((pictures[classes] + noise).to(device), classes.to(device)))
    return made


def train(device: torch.device) -> Trained:
    """By itself."""
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    return _loop(device, model, optimizer, batches(device))


def train_through_a_server(device: torch.device) -> Trained:
    """The same, with a server on this machine that averages the gradients of this one worker."""
    with _server() as port:
        cluster = join(LOOPBACK, 1, port=port, timeout_s=JOIN_S, say=lambda line: None)
        with cluster:
            model = network().to(device)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
            model, attached = cluster.attach(model, optimizer)
            given = cluster.own_batches(batches(device))
            return _loop(device, model, attached, given)


def _loop(
    device: torch.device, model: nn.Module, optimizer: Any, given: Iterable[Batch]
) -> Trained:
    losses: list[Tensor] = []
    times = [time.perf_counter()]
    for images, classes in given:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), classes)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        _wait_for(device)
        times.append(time.perf_counter())
    if len(losses) != STEPS:
        raise UserError(f"the run ended after {len(losses)} of {STEPS} steps")
    step_s = median(after - before for before, after in pairwise(times[WARM_UP:]))
    return Trained(_weights(model), [float(x) for x in losses], step_s)


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().cpu().reshape(-1) for p in model.parameters()])


def _wait_for(device: torch.device) -> None:
    """Until the device has computed all that it was given."""
    waits: dict[str, Callable[[], None]] = {
        "cuda": torch.cuda.synchronize,
        "mps": torch.mps.synchronize,
    }
    if device.type in waits:
        waits[device.type]()


@contextmanager
def _server() -> Iterator[int]:
    """A server on loopback; its port."""
    with tempfile.TemporaryDirectory(prefix="paramserver-devices-") as folder:
        port = free_port()
        words = [f"port={port}", "host_ip=127.0.0.1", "observer=false", "num_workers=1"]
        words += ["plain=true", "min_workers=1", f"run_dir={folder}/runs"]
        with open(Path(folder, "server.log"), "wb") as log:
            server = subprocess.Popen(
                command("paramserver", *words), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            yield port
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
