"""One run of one thing: what is started for it, and the figures that come out.

All seconds and bytes are those of one round, unless they say otherwise.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import contenders
from benchmarks.network import Hosts, free_port
from benchmarks.team import Team
from paramserver.settings import Settings

LOOPBACK = "127.0.0.1"
HOST_PORT = 20_000
DEFAULT = Settings()
FLOAT32_BYTES = 4
LAYER = 2**20


def _cut(elements: int) -> list[int]:
    return [LAYER] * (elements // LAYER) + [elements % LAYER]


SIZES: dict[str, list[int]] = {
    "0.01 MB": [2_500],
    "0.1 MB": [25_000],
    "0.4 MB": _cut(100_000),
    "1.35 MB": [200_704, 256, 131_072, 512, 5_120, 10],  # SimpleNN
    "5 MB": _cut(1_250_000),
    "46.8 MB": _cut(11_689_512),  # as many as ResNet-18 has
    "250 MB": _cut(62_500_000),
}
"""Elements of the layers, by the size of all of them as float32."""


def size_bytes(size: str) -> int:
    return FLOAT32_BYTES * sum(SIZES[size])


def warm_up(rounds: int) -> int:
    """Rounds that come before those that count."""
    return max(2, rounds // 10)


@dataclass(frozen=True)
class Limits:
    """How long one run may take, and how many rounds it has."""

    seconds: float
    rounds: int

    @property
    def both(self) -> tuple[int, int]:
        return self.rounds, warm_up(self.rounds)


@dataclass(frozen=True)
class Place:
    """Where server and workers are: all on this host, or worker k on host k of `hosts`."""

    hosts: Hosts | None = None
    server_on: str = "host1"

    def host(self, name: str) -> str | None:
        return None if self.hosts is None else self.hosts[name]

    def address(self, name: str) -> str:
        return LOOPBACK if self.hosts is None else self.hosts.address(name)

    def port(self) -> int:
        return free_port() if self.hosts is None else HOST_PORT

    def dialled_by(self, worker: int) -> str:
        """The server's address; a worker on its host takes loopback, as a user's does."""
        return LOOPBACK if self.server_on == f"host{worker}" else self.address(self.server_on)


HERE = Place()


@dataclass(frozen=True)
class Exchange:
    seconds: float
    sent_bytes: float
    """By the server; and what it received."""
    received_bytes: float
    alone_s: float
    """Backward without any exchange."""
    workers_s: float = 0.0
    """Processor time of all workers."""
    server_s: float = 0.0
    """Processor time of the server, with its start and end, divided by the rounds."""
    busy: float = 0.0
    """Share of this machine's cores that was busy."""


# ------------------------------------------------------------------ this project


def exchange(
    limits: Limits,
    size: str,
    workers: int,
    codec: str,
    place: Place = HERE,
    *,
    tcp: bool = False,
    guarded: bool = False,
    backward_s: float = 0.0,
    shards: int | None = 1,
    averaging: int | None = None,
    observed: bool = False,
    paths: str = "",
    more_settings: Sequence[str] = (),
    meanwhile: Callable[[Team], None] = lambda team: None,
) -> Exchange:
    """Rounds of a server and its workers, whose backward takes `backward_s`; `guarded`: with keys
    and encryption, on loopback too. So many `shards` average, the server is one of them; where the
    run chooses (None), or cables are unequal, `averaging`. `observed`: with an observer beside the
    server. `paths`, `more_settings` are for the server. `meanwhile` is called again and again."""
    with Team(limits.seconds) as team:
        port = place.port()
        settings = server_settings(port, workers, codec, team)
        if place.hosts is not None:
            settings.append(f"host_ip={place.address(place.server_on)}")
        security = "curve" if guarded else "none"
        settings += [f"security={security}", f"shards={'null' if shards is None else shards}"]
        settings += _observer(size) if observed else []
        at = place.host(place.server_on)
        keys = {"keys_in": str(team.folder / "keys"), "guarded": guarded and place.hosts is None}
        settings += more_settings
        team.start("server", contenders.server, *settings, host=at, paths=paths, **keys)
        keys["security"] = security
        more = {"tcp": tcp, "seconds": backward_s, "shards": averaging or shards or 1, **keys}
        more["meanwhile"] = partial(meanwhile, team)
        return _rounds(team, limits, size, workers, port, place, **more)


def local(
    limits: Limits,
    size: str,
    workers: int,
    codec: str,
    place: Place,
    steps: int,
    backward_s: float,
    *,
    overlap: bool = False,
) -> float:
    """Seconds of an optimizer step, on average, where so many local steps make a round."""
    with Team(limits.seconds) as team:
        port = place.port()
        settings = server_settings(port, workers, codec, team)
        settings += [f"local_steps={steps}", f"overlap={overlap}", "security=none"]
        if place.hosts is not None:
            settings.append(f"host_ip={place.address(place.server_on)}")
        team.start("server", contenders.server, *settings, host=place.host(place.server_on))
        counted = limits.rounds * steps
        for k in range(1, workers + 1):
            team.start(
                f"worker-{k}",
                contenders.worker,
                *(place.dialled_by(k), port, k, SIZES[size], counted, steps),
                seconds=backward_s,
                host=place.host(f"host{k}"),
            )
        answers = [team.wait(f"worker-{k}") for k in range(1, workers + 1)]
        team.stop("server")
        traffic(step_lines(_runs(team)), workers)  # nobody missed a round
    return float(sum(answers[0]["seconds"])) / counted


@dataclass(frozen=True)
class Shared:
    """A run of workers of unlike speed."""

    samples_per_s: float
    """Of all its rounds but the first, which waits for processes to start."""
    seconds: list[float]
    """Of each round."""


def shared(
    limits: Limits,
    speeds: Sequence[float],
    sample_s: float,
    *settings: str,
    batch_size: int = 32,
    slower_after: int = 0,
    stutters_every: int = 0,
) -> Shared:
    """So many rounds of workers that wait `sample_s` for each sample at speed 1. The last one
    becomes four times slower `slower_after` so many steps, or is so in every so many of its
    batches."""
    with Team(limits.seconds) as team:
        port, workers = free_port(), len(speeds)
        given = [w for w in server_settings(port, workers, "float32", team) if "batch" not in w]
        given = [w for w in given if not w.startswith(("num_epochs", "timeout"))]
        given += [f"batch_size={batch_size}", "num_epochs=1", *settings]
        team.start("server", contenders.server, *given)
        samples = limits.rounds * workers * batch_size
        for k, speed in enumerate(speeds, 1):
            slow = {"slower_after": slower_after, "stutters_every": stutters_every}
            more = {**slow, "slower": 4.0} if k == workers else {}
            team.start(
                f"worker-{k}",
                contenders.waiting_worker,
                *(port, k, SIZES["0.1 MB"], samples, sample_s / speed),
                **more,
            )
        for k in range(1, workers + 1):
            team.wait(f"worker-{k}")
        team.wait("server")
        lines = step_lines(_runs(team))
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    rate = sum(line["samples"] for line in lines[1:]) / seconds
    return Shared(rate, [line["step_s"] for line in lines])


def _rounds(
    team: Team,
    limits: Limits,
    size: str,
    workers: int,
    port: int,
    place: Place = HERE,
    *,
    meanwhile: Callable[[], None] = lambda: None,
    **more: Any,
) -> Exchange:
    """Workers for a team's server, and what they saw. `more` is for them."""
    for k in range(1, workers + 1):
        team.start(
            f"worker-{k}",
            contenders.worker,
            *(place.dialled_by(k), port, k, SIZES[size], *limits.both),
            **more,
            host=place.host(f"host{k}"),
        )
    answers = [team.wait(f"worker-{k}", meanwhile) for k in range(1, workers + 1)]
    server = team.stop("server")
    sent, received = traffic(step_lines(_runs(team)), workers)
    return Exchange(
        median(answers[0]["seconds"]),
        sent,
        received,
        answers[0]["alone"],
        sum(answer["processor_s"] for answer in answers),
        server["processor_s"] / sum(limits.both) if server else 0.0,
        answers[0]["busy"],
    )


def server_settings(port: int, workers: int, codec: str, team: Team) -> list[str]:
    """What a server is told where only rounds shall happen, and nobody be late."""
    return [
        f"port={port}",
        f"num_workers={workers}",
        f"codec={codec}",
        f"run_dir={_runs(team)}",
        "observer=false",
        "batch_size=1",
        "num_epochs=1000",
        "timeout=60",
        "dataset.name=digits",
    ]


def _observer(size: str) -> list[str]:
    """What a server is told for an observer that does no more than follow."""
    return [
        "observer=true",
        "eval_steps=1000000",
        "checkpoint_steps=0",
        "wandb.mode=disabled",
        "model.type=benchmarks.contenders:Watched",
        f"model.shapes={SIZES[size]}",
        "optimizer.name=benchmarks.contenders:Idle",
    ]


def _runs(team: Team) -> Path:
    return team.folder / "runs"


def step_lines(runs: Path) -> list[dict[str, Any]]:
    """The steps in the metrics of the one run in this folder."""
    (path,) = runs.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "step_s" in line]


def traffic(lines: list[dict[str, Any]], workers: int) -> tuple[float, float]:
    """Bytes that the server sent and received in a round. Raises if a worker missed one."""
    if any(len(line["workers"]) != workers for line in lines):
        raise RuntimeError("a round closed without one of its workers")
    first, last, count = lines[0], lines[-1], len(lines) - 1
    sent, received = ((last[k] - first[k]) / count for k in ("sent_bytes", "received_bytes"))
    return sent, received


def server_memory(limits: Limits, size: str, workers: int, codec: str) -> float:
    """Bytes of the server's resident memory at its highest, above those before anybody came."""
    with Team(limits.seconds) as team:
        port = free_port()
        team.program("server", "paramserver", *server_settings(port, workers, codec, team))
        team.until(lambda: _listens(port), "for the server")
        process = psutil.Process(team.pid("server"))
        seen = [process.memory_info().rss]

        def look() -> None:
            with suppress(psutil.Error):
                seen.append(process.memory_info().rss)

        _rounds(team, limits, size, workers, port, meanwhile=look)
    return max(seen) - seen[0]


LOOK_EVERY_S = 0.25  # reading the memory of a process takes milliseconds
ROLES = ("server", "shard", "worker", "observer")


def memory_by_role(
    limits: Limits, size: str, workers: int, codec: str, place: Place, shards: int
) -> dict[str, float]:
    """Bytes that the largest process of each of `ROLES` has at its highest, where so many shards
    average and an observer follows. What several processes share is divided among them."""
    found, next_look = dict.fromkeys(ROLES, 0.0), 0.0

    def look(team: Team) -> None:
        nonlocal next_look
        if time.monotonic() < next_look:
            return
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if (role := _role(team, process)) in found:
                    found[role] = max(found[role], process.memory_full_info().pss)
        next_look = time.monotonic() + LOOK_EVERY_S

    runs_of = partial(exchange, limits, size, workers, codec, place, shards=shards)
    runs_of(observed=True, meanwhile=look)
    return found


def _role(team: Team, process: psutil.Process) -> str:
    """One of `ROLES`; else it is no process of a run."""
    words = process.cmdline()
    for role, module in (("shard", "paramserver.shard"), ("observer", "workers.observer.observer")):
        if module in words:
            return role
    return (team.name(process.pid) or "").partition("-")[0]


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
        return True
    return False


PROCESSES_OF_WORKERS = 4


def many_workers(limits: Limits, size: str, workers: int, codec: str) -> float:
    """Seconds of a round with simulated workers, in an equal number of processes for all."""
    with Team(limits.seconds) as team:
        port = free_port()
        team.start("server", contenders.server, *server_settings(port, workers, codec, team))
        names = []
        for part in range(min(PROCESSES_OF_WORKERS, workers)):
            numbers = list(range(1, workers + 1))[part::PROCESSES_OF_WORKERS]
            names.append(f"workers-{part}")
            arguments = (port, numbers, SIZES[size], *limits.both)
            team.start(names[-1], contenders.simulated_workers, *arguments)
        answers = [team.wait(name) for name in names]
        team.stop("server")
    return float(median(answers[0]["seconds"]))


TRAINING_SAMPLES = 4000
"""So many of the digits, or a few more, are for training."""


@dataclass(frozen=True)
class Training:
    steps_per_s: float
    """Of all workers together: samples over a full step's."""
    late: int
    """How often a worker missed a round."""
    steps: int


def training(limits: Limits, workers: int, *settings: str) -> Training:
    """The programs as users start them: server, observer and workers."""
    steps, first = limits.both
    full_step = workers * DEFAULT.batch_size
    epochs = -(-(steps + first) * full_step // TRAINING_SAMPLES)
    with Team(limits.seconds) as team:
        port = f"port={free_port()}"
        digits = ("dataset.name=digits", f"num_epochs={epochs}")
        team.program(
            "server",
            "paramserver",
            port,
            f"num_workers={workers}",
            *digits,
            *settings,
            f"run_dir={_runs(team)}",
        )
        for k in range(1, workers + 1):
            team.program(f"worker-{k}", "workers", f"id={k}", port)
        team.wait("server")
        for k in range(1, workers + 1):
            team.wait(f"worker-{k}")
        lines = [line for line in step_lines(_runs(team)) if line["step"] > first]
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    samples = sum(line["samples"] for line in lines[1:])
    late = sum(len(line["late"]) for line in lines)
    return Training(samples / full_step / seconds, late, len(lines))


def accuracy(seconds: float, dataset: dict[str, Any], codec: str, seed: int, epochs: int) -> float:
    """`contenders.accuracy` for two workers."""
    with Team(seconds) as team:
        team.start("training", contenders.accuracy, dataset, codec, seed, epochs, 2)
        return float(team.wait("training"))


def local_accuracy(
    seconds: float, dataset: dict[str, Any], steps: int, seed: int, epochs: int, workers: int
) -> float:
    """`contenders.local_accuracy`; with one local step `contenders.accuracy`."""
    with Team(seconds) as team:
        if steps == 1:
            team.start("training", contenders.accuracy, dataset, "float32", seed, epochs, workers)
        else:
            team.start("training", contenders.local_accuracy, dataset, steps, seed, epochs, workers)
        return float(team.wait("training"))


# ------------------------------------------------------------------ torch.distributed with gloo


def _ranks(
    limits: Limits,
    function: Callable[..., Any],
    ranks: int,
    *arguments: Any,
    place: Place = HERE,
    **more: Any,
) -> dict[str, Any]:
    """Run `function(rank, ranks, address, port, ...)` everywhere; what rank 0 saw."""
    with Team(limits.seconds) as team:
        meeting = (ranks, place.address("host1"), place.port())
        for rank in range(ranks):
            host = place.host(f"host{rank + 1}")
            team.start(f"rank-{rank}", function, rank, *meeting, *arguments, host=host, **more)
        answers: list[dict[str, Any]] = [team.wait(f"rank-{rank}") for rank in range(ranks)]
    return answers[0]


def all_reduce(
    limits: Limits, size: str, ranks: int, place: Place = HERE, *, half: bool = False
) -> float:
    """Seconds of an average of one flat tensor by gloo."""
    arguments = (sum(SIZES[size]), *limits.both)
    seen = _ranks(limits, contenders.all_reduce, ranks, *arguments, place=place, half=half)
    return float(median(seen["seconds"]))


def ring_bytes(gradient_bytes: float, ranks: int) -> float:
    """What each rank of a ring all-reduce sends, and receives."""
    return 2 * (ranks - 1) / ranks * gradient_bytes


def ddp_exchange(limits: Limits, size: str, ranks: int, backward_s: float) -> tuple[float, float]:
    """Seconds of a round of DDP whose backward takes `backward_s`, and of that backward alone."""
    seen = _ranks(
        limits, contenders.ddp_layers, ranks, SIZES[size], *limits.both, seconds=backward_s
    )
    return float(median(seen["seconds"])), float(seen["alone"])


def ddp_steps(limits: Limits, size: str, ranks: int, backward_s: float, place: Place) -> float:
    """Seconds of a step of DDP whose backward takes `backward_s`."""
    arguments = (SIZES[size], *limits.both)
    seen = _ranks(limits, contenders.ddp_layers, ranks, *arguments, place=place, seconds=backward_s)
    return float(median(seen["seconds"]))


def ddp_training(limits: Limits, ranks: int, way: str) -> float:
    """Steps per second of `contenders.ddp_training`."""
    seen = _ranks(limits, contenders.ddp_training, ranks, *limits.both, way)
    return limits.rounds / float(sum(seen["seconds"]))
