"""The measurements: what is started for each, and what its figure is.

A part yields groups of `Case`s. Those of a group are compared, so they are measured in turn, A B C
A B C, and whatever else the machine is doing meets all of them.
"""

from __future__ import annotations

import json
import socket
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import contenders
from benchmarks.machine import LOOPBACK, Machine, link_rate
from benchmarks.network import Hosts, free_port, why_no_hosts
from benchmarks.report import ALONE, DDP, GLOO, Row
from benchmarks.team import Team
from paramserver.codec import CODECS
from paramserver.settings import Settings

FLOAT32_BYTES = 4
LAYER = 2**20
DEFAULT = Settings()


def _cut(elements: int) -> list[int]:
    return [LAYER] * (elements // LAYER) + [elements % LAYER]


SIZES: dict[str, list[int]] = {
    "0.1 MB": [25_000],
    "1.35 MB": [200_704, 256, 131_072, 512, 5_120, 10],  # SimpleNN
    "46.8 MB": _cut(11_689_512),  # as many as ResNet-18 has
    "250 MB": _cut(62_500_000),
}
"""Elements of the layers, by the size of all of them as float32."""


def size_bytes(size: str) -> int:
    return FLOAT32_BYTES * sum(SIZES[size])


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    name: str
    minutes: float
    """No new run starts after that."""
    repeats: int
    rounds: dict[str, int]
    """By size: what is exchanged, and how often in one run."""
    workers: tuple[int, ...]
    codecs: tuple[str, ...] = tuple(CODECS)
    training_steps: int = 1000
    training_workers: tuple[int, ...] = (1, 2, 3, 4)
    link_rounds: dict[str, int] | None = None
    link_workers: tuple[int, ...] = (2, 4)
    scale: tuple[int, ...] = (4, 64)
    run_s: float = 120.0
    """How long one run may take."""
    extras: bool = True
    """Also gloo in float16, and tcp where ipc would be used."""


FEW_CODECS = tuple(dict.fromkeys((DEFAULT.codec, "float32", "float16")))
FULL = Effort(
    name="full",
    minutes=120,
    repeats=3,
    rounds={"1.35 MB": 300, "46.8 MB": 20, "250 MB": 6},
    workers=(1, 2, 3, 4),
    link_rounds={"1.35 MB": 40, "46.8 MB": 5},
)
QUICK = Effort(
    name="quick",
    minutes=2.3,
    repeats=2,
    rounds={"1.35 MB": 100, "46.8 MB": 8},
    workers=(2, 4),
    codecs=FEW_CODECS,
    training_steps=300,
    training_workers=(2,),
    link_rounds={"46.8 MB": 3},
    link_workers=(2,),
    run_s=45.0,
    extras=False,
)
TINY = replace(
    QUICK,
    name="tiny",
    repeats=1,
    rounds={"0.1 MB": 5},
    workers=(2,),
    codecs=(DEFAULT.codec,),
    training_steps=20,
    link_rounds={"0.1 MB": 3},
    scale=(2, 4),
)
EFFORTS = {effort.name: effort for effort in (FULL, QUICK, TINY)}


@dataclass
class Case:
    """One way to do something: its row, and how it is measured once: (value, limit)."""

    row: Row
    measure: Callable[[], tuple[float, float | None]]


class Skipped(Exception):
    """This part cannot be measured here; a sentence."""


def alternate(
    cases: list[Case],
    repeats: int,
    go_on: Callable[[], bool],
    failed: Callable[[Row, Exception], None],
) -> None:
    """Measure all cases in turn, `repeats` times, while `go_on()`; a case that fails drops out."""
    broken: set[int] = set()
    for _ in range(repeats):
        for index, case in enumerate(cases):
            if index in broken or not go_on():
                continue
            try:
                value, limit = case.measure()
            except Exception as error:
                broken.add(index)
                failed(case.row, error)
                continue
            case.row.values.append(value)
            if limit is not None:
                case.row.limits.append(limit)


# ------------------------------------------------------------------ an exchange


@dataclass
class Exchange:
    """What one run of rounds took; seconds and bytes of one round."""

    seconds: float
    sent_bytes: float
    received_bytes: float
    alone_s: float
    """Backward without any exchange."""


def exchange_ours(
    effort: Effort,
    size: str,
    workers: int,
    codec: str,
    *,
    rounds: int,
    tcp: bool = False,
    seconds: float = 0.0,
    hosts: Hosts | None = None,
    server_on: str = "host1",
    watch: Callable[[Team], Callable[[], None]] | None = None,
) -> Exchange:
    """Rounds of a server and its workers, as forked processes; on `hosts`, worker k on host k.

    `watch(team)` is called when the server, here the program itself, is up; what it returns is
    called all the time.
    """
    with Team(effort.run_s) as team:
        port = free_port() if hosts is None else 20_000
        runs = team.folder / "runs"
        arguments = server_settings(port, workers, codec, runs)
        meanwhile: Callable[[], None] = lambda: None  # noqa: E731
        if watch is not None:
            team.program("server", "paramserver", *arguments)
            team.until(lambda: _listens(port), "for the server")
            meanwhile = watch(team)
        elif hosts is None:
            team.start("server", contenders.server, *arguments)
        else:
            address = f"host_ip={hosts.address(server_on)}"
            team.start("server", contenders.server, *arguments, address, host=hosts[server_on])
        for number in range(1, workers + 1):
            near = hosts is None or server_on == f"host{number}"
            team.start(
                f"worker-{number}",
                contenders.worker,
                LOOPBACK if hosts is None or near else hosts.address(server_on),
                port,
                number,
                SIZES[size],
                rounds,
                warm_up(rounds),
                seconds=seconds,
                tcp=tcp,
                host=None if hosts is None else hosts[f"host{number}"],
            )
        for number in range(1, workers + 1):
            answer = team.wait(f"worker-{number}", meanwhile)
            first = answer if number == 1 else first
        team.stop("server")
        sent, received = traffic(runs, workers)
    return Exchange(statistics.median(first["seconds"]), sent, received, first["alone"])


def server_settings(port: int, workers: int, codec: str, runs: Path) -> list[str]:
    """What a server of a measurement is told: nobody may be late, nothing but rounds happens."""
    return [
        f"port={port}",
        f"num_workers={workers}",
        f"codec={codec}",
        f"run_dir={runs}",
        "observer=false",
        "batch_size=1",
        "num_epochs=1000",
        "timeout=60",
        "dataset.name=digits",
    ]


def traffic(runs: Path, workers: int) -> tuple[float, float]:
    """Bytes that the server sent and received for one round. All workers must be in each."""
    lines = step_lines(runs)
    if any(len(line["workers"]) != workers for line in lines):
        raise RuntimeError("a round closed without one of its workers")
    count = len(lines) - 1
    return tuple((lines[-1][k] - lines[0][k]) / count for k in ("sent_bytes", "received_bytes"))  # type: ignore[return-value]


def step_lines(runs: Path) -> list[dict[str, Any]]:
    """The steps in the metrics of the one run in this folder."""
    (path,) = runs.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "step_s" in line]


def exchange_gloo(
    effort: Effort,
    size: str,
    ranks: int,
    *,
    rounds: int,
    half: bool = False,
    hosts: Hosts | None = None,
) -> float:
    """Rounds of gloo's all_reduce; seconds of one."""
    with Team(effort.run_s) as team:
        port = free_port() if hosts is None else 20_000
        for rank in range(ranks):
            team.start(
                f"rank-{rank}",
                contenders.all_reduce,
                rank,
                ranks,
                LOOPBACK if hosts is None else hosts.address("host1"),
                port,
                sum(SIZES[size]),
                rounds,
                warm_up(rounds),
                half=half,
                host=None if hosts is None else hosts[f"host{rank + 1}"],
            )
        answers = [team.wait(f"rank-{rank}") for rank in range(ranks)]
    return statistics.median(answers[0]["seconds"])


def warm_up(rounds: int) -> int:
    return max(2, rounds // 10)


def ring_bytes(gradient_bytes: float, ranks: int) -> float:
    """What each rank of a ring all-reduce sends, and receives."""
    return 2 * (ranks - 1) / ranks * gradient_bytes


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
        return True
    return False


# ------------------------------------------------------------------ the parts


def exchange(effort: Effort, machine: Machine) -> Iterator[list[Case]]:
    """The limit: all bytes that go through the kernel, over its measured rate."""
    for size, rounds in effort.rounds.items():
        for workers in effort.workers:
            if size == "250 MB" and workers % 2:
                continue
            cases = []
            for half in (False, True) if effort.extras and workers > 1 else (False,):

                def gloo(half: bool = half) -> tuple[float, float]:
                    one = exchange_gloo(effort, size, workers, rounds=rounds, half=half)
                    wire = workers * ring_bytes(size_bytes(size), workers) / (2 if half else 1)
                    return 1e3 * one, 1e3 * wire / machine.tcp_rate

                how = "gloo float16" if half else GLOO
                cases.append(Case(Row("exchange", size, workers, how, "ms"), gloo))
            ways = [(codec, False) for codec in effort.codecs]
            ways += [(DEFAULT.codec, True)] if effort.extras else []
            for codec, tcp in ways:

                def ours(codec: str = codec, tcp: bool = tcp) -> tuple[float, float]:
                    one = exchange_ours(effort, size, workers, codec, rounds=rounds, tcp=tcp)
                    wire = one.sent_bytes + one.received_bytes
                    rate = machine.tcp_rate if tcp else machine.unix_rate
                    return 1e3 * one.seconds, 1e3 * wire / rate

                how = our_name(codec) + (", tcp" if tcp else "")
                cases.append(Case(Row("exchange", size, workers, how, "ms"), ours))
            yield cases


def our_name(codec: str) -> str:
    return f"paramserver {codec}" + (" (default)" if codec == DEFAULT.codec else "")


def links(effort: Effort) -> Iterator[list[Case]]:
    """The bytes of the busiest link, in its busier direction, over its measured rate."""
    reason = why_no_hosts()
    if reason is not None:
        raise Skipped(reason)
    most = max(effort.link_workers)
    names = [f"host{k}" for k in range(1, most + 1)] + ["server"]
    with Hosts(names) as hosts:
        rate = link_rate(hosts, "host2", "host1")
        for size, rounds in (effort.link_rounds or {}).items():
            for server_on, place in (
                ("host1", "on worker 1's host"),
                ("server", "on a host of its own"),
            ):
                for workers in effort.link_workers:
                    what = f"{size}, {place}"
                    yield _link_cases(effort, hosts, rate, size, rounds, workers, server_on, what)


def _link_cases(
    effort: Effort,
    hosts: Hosts,
    rate: float,
    size: str,
    rounds: int,
    workers: int,
    server_on: str,
    what: str,
) -> list[Case]:
    cases = []
    for half in (False, True) if effort.extras else (False,):

        def gloo(half: bool = half) -> tuple[float, float]:
            one = exchange_gloo(effort, size, workers, rounds=rounds, half=half, hosts=hosts)
            wire = ring_bytes(size_bytes(size), workers) / (2 if half else 1)
            return 1e3 * one, 1e3 * wire / rate

        how = "gloo float16" if half else GLOO
        cases.append(Case(Row("links", what, workers, how, "ms"), gloo))
    for codec in effort.codecs:

        def ours(codec: str = codec) -> tuple[float, float]:
            one = exchange_ours(
                effort, size, workers, codec, rounds=rounds, hosts=hosts, server_on=server_on
            )
            remote = (workers - (server_on != "server")) / workers
            wire = max(one.sent_bytes, one.received_bytes) * remote
            return 1e3 * one.seconds, 1e3 * wire / rate

        cases.append(Case(Row("links", what, workers, our_name(codec), "ms"), ours))
    return cases


def training(effort: Effort) -> Iterator[list[Case]]:
    """Steps per second of N workers with a batch of 32 each; ours with the observer, as for users."""
    ways = {ALONE: "no exchange", DDP: "float32"}
    if effort.extras:
        ways["DDP, gloo float16"] = "float16"
    for workers in effort.training_workers:
        what = "SimpleNN"
        cases = [
            Case(
                Row("training", what, workers, how, "steps/s"),
                lambda way=way, n=workers: (_train_ddp(effort, n, way), None),
            )
            for how, way in ways.items()
            if workers > 1 or way != "float16"
        ]
        alone = cases[0].row
        row = Row("training", what, workers, "paramserver (default)", "steps/s")
        cases.append(Case(row, lambda n=workers, row=row: (_train_ours(effort, n, row), None)))
        yield cases
        for case in cases[1:]:
            case.row.limits = list(alone.values)


def _train_ddp(effort: Effort, ranks: int, way: str) -> float:
    steps = effort.training_steps
    with Team(effort.run_s) as team:
        port = free_port()
        for rank in range(ranks):
            arguments = (rank, ranks, port, steps, warm_up(steps), way)
            team.start(f"rank-{rank}", contenders.ddp_training, *arguments)
        answers = [team.wait(f"rank-{rank}") for rank in range(ranks)]
    return steps / sum(answers[0]["seconds"])


TRAINING_SAMPLES = 4000
"""At most so many of the digits are for training."""


def _train_ours(effort: Effort, workers: int, row: Row) -> float:
    first = warm_up(effort.training_steps)
    samples = (effort.training_steps + first) * workers * DEFAULT.batch_size
    with Team(effort.run_s) as team:
        port = free_port()
        runs = team.folder / "runs"
        team.program(
            "server",
            "paramserver",
            f"port={port}",
            f"num_workers={workers}",
            f"run_dir={runs}",
            "dataset.name=digits",
            f"num_epochs={-(-samples // TRAINING_SAMPLES)}",
        )
        for number in range(1, workers + 1):
            team.program(f"worker-{number}", "workers", f"id={number}", f"port={port}")
        team.wait("server")
        for number in range(1, workers + 1):
            team.wait(f"worker-{number}")
        lines = step_lines(runs)[first:]
    late = sum(len(line["late"]) for line in lines)
    if late:
        row.notes.append(f"{late} times in {len(lines)} rounds a worker came too late")
    seconds = lines[-1]["seconds"] - lines[0]["seconds"]
    return sum(line["samples"] for line in lines[1:]) / (workers * DEFAULT.batch_size) / seconds


COMPUTE_TO_EXCHANGE = 2.0


def exposed(effort: Effort) -> Iterator[list[Case]]:
    """Backward waits twice as long as the exchange takes; what a round takes longer than backward
    without an exchange was not hidden. In percent of the exchange with a backward of no time."""
    sizes = [size for size in effort.rounds if size != "250 MB"]
    for workers in effort.link_workers:
        size = sizes[-1]
        rounds = effort.rounds[size]

        def ddp(ranks: int = workers) -> tuple[float, None]:
            def rounds_of(seconds: float) -> tuple[float, float]:
                with Team(effort.run_s) as team:
                    port = free_port()
                    for rank in range(ranks):
                        arguments = (rank, ranks, port, SIZES[size], rounds, warm_up(rounds))
                        team.start(
                            f"rank-{rank}", contenders.ddp_layers, *arguments, seconds=seconds
                        )
                    answer = [team.wait(f"rank-{rank}") for rank in range(ranks)][0]
                return statistics.median(answer["seconds"]), answer["alone"]

            return share_exposed(rounds_of), None

        def ours(codec: str, n: int = workers) -> tuple[float, None]:
            def rounds_of(seconds: float) -> tuple[float, float]:
                one = exchange_ours(effort, size, n, codec, rounds=rounds, seconds=seconds)
                return one.seconds, one.alone_s

            return share_exposed(rounds_of), None

        yield [
            Case(Row("exposed", size, workers, DDP, "%"), ddp),
            *(
                Case(
                    Row("exposed", size, workers, our_name(codec), "%"),
                    lambda codec=codec: ours(codec),
                )
                for codec in dict.fromkeys((DEFAULT.codec, "float16"))
            ),
        ]


def share_exposed(rounds_of: Callable[[float], tuple[float, float]]) -> float:
    """Percent of an exchange that compute does not hide.

    `rounds_of(seconds)` gives (seconds of a round whose backward waits that long, seconds of that
    backward alone).
    """
    whole, compute = rounds_of(0.0)
    exchange_s = whole - compute
    whole, compute = rounds_of(COMPUTE_TO_EXCHANGE * exchange_s)
    return 100 * (whole - compute) / exchange_s


def memory(effort: Effort) -> Iterator[list[Case]]:
    """The server's resident memory at its highest, less what it was before anybody came."""
    for size in [size for size in effort.rounds if size != "1.35 MB"]:
        cases = []
        for workers in effort.link_workers:

            def ours(n: int = workers, size: str = size) -> tuple[float, float]:
                seen = [0, 0]  # idle, highest

                def watch(team: Team) -> Callable[[], None]:
                    process = psutil.Process(team.pid("server"))
                    seen[:] = [process.memory_info().rss] * 2

                    def look() -> None:
                        with suppress(psutil.Error):
                            seen[1] = max(seen[1], process.memory_info().rss)

                    return look

                rounds = effort.rounds[size]
                exchange_ours(effort, size, n, DEFAULT.codec, rounds=rounds, watch=watch)
                allowed = 3 * size_bytes(size) / 1e6 + DEFAULT.history_mb * 2**20 / 1e6
                return (seen[1] - seen[0]) / 1e6, allowed

            row = Row("memory", size, workers, our_name(DEFAULT.codec), "MB")
            cases.append(Case(row, ours))
        yield cases


PROCESSES_OF_WORKERS = 4


def scale(effort: Effort) -> Iterator[list[Case]]:
    """The same number of processes holds few workers or many."""
    size = next(iter(effort.rounds))
    cases = []
    for workers in effort.scale:

        def ours(n: int = workers) -> tuple[float, None]:
            rounds = max(10, 4 * effort.rounds[size] // n)
            with Team(effort.run_s) as team:
                port = free_port()
                arguments = server_settings(port, n, DEFAULT.codec, team.folder / "runs")
                team.start("server", contenders.server, *arguments)
                names = []
                for part in range(min(PROCESSES_OF_WORKERS, n)):
                    numbers = list(range(1, n + 1))[part::PROCESSES_OF_WORKERS]
                    names.append(f"workers-{part}")
                    team.start(
                        names[-1],
                        contenders.simulated_workers,
                        port,
                        numbers,
                        sum(SIZES[size]),
                        rounds,
                        warm_up(rounds),
                    )
                answers = [team.wait(name) for name in names]
                team.stop("server")
            return 1e3 * statistics.median(answers[0]["seconds"]) / n, None

        how = our_name(DEFAULT.codec)
        cases.append(Case(Row("scale", size, workers, how, "ms per worker"), ours))
    yield cases

