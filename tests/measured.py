"""Runs the scripts of `kinds` in clusters, and holds each against one process.

`python tests/measured.py` runs each of them with two workers, and with three: one comes late, and
another one dies without a word and comes back. It prints the table in docs/your-own-model.md: how
many lines a script changes, and how far the weights are from those of one process that gets the
same samples in the same steps.
"""

from __future__ import annotations

import dataclasses
import fcntl
import multiprocessing
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache, partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import kinds  # noqa: E402
from kinds import EPOCHS, KINDS, Kind  # noqa: E402
from whole import LOOPBACK, Run, Served, free_port  # noqa: E402

import workers  # noqa: E402
from paramserver.server.ports import Ports  # noqa: E402
from paramserver.settings import Settings  # noqa: E402
from paramserver.tensors.order import order  # noqa: E402
from workers import living  # noqa: E402
from workers.builtin.models import build as build_model  # noqa: E402
from workers.builtin.own_code import OwnCode  # noqa: E402
from workers.builtin.train import _train  # noqa: E402

BATCH, STEPS = 8, 16
LATE, DEATH, BACK = 3, 5, 7
"""Steps at which a worker comes, at which one dies, and at which that one is back."""
BASE = {"torch": torch, "nn": nn, "F": F}
Round = list[Any]
"""What each contributor's loop got: places of samples or, of its own data, the batch."""


class Died(BaseException):
    """A worker falls silent without a word."""


class Interrupted(BaseException):
    """A person stops a notebook's cell."""


DRAWS = threading.Lock()
"""Threads have one generator of torch's: a script makes its model while no other one does."""


# -------------------------------------------------------------------------------- data of its own


class Stream(IterableDataset[Any]):
    """Samples of one worker's own, divided among the processes of its loader."""

    def __init__(self, number: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.number, self.dtype = number, dtype

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        part, parts = (0, 1) if info is None else (info.id, info.num_workers)
        generator = torch.Generator().manual_seed(1000 * self.number + part)
        for _ in range(BATCH * STEPS // parts):
            x = torch.randn(6, generator=generator, dtype=torch.float32)
            yield x.to(self.dtype), torch.randint(4, (), generator=generator)


def drawn(kind: Kind, number: int, step: int) -> Tensor:
    """A batch of a worker's own at this step."""
    generator = torch.Generator().manual_seed(1000 * number + step)
    if "GPT" in kind.name:
        return torch.randint(12, (4, 9), generator=generator)
    size = int(torch.randint(3, 9, (1,), generator=generator))
    return torch.randn(size, 6, generator=generator).to(torch.get_default_dtype())


class Numbered(Dataset[Any]):
    """Each sample with its place."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index], index


class Apart:
    """Collates samples, beside their places."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        return self.collate([item for item, _ in items]), [place for _, place in items]


def with_places(loader: DataLoader[Any], weights: Any) -> DataLoader[Any]:
    """The same loader; each batch comes with the places of its samples."""
    return DataLoader(
        Numbered(loader.dataset),
        loader.batch_size,
        shuffle=weights is None,
        sampler=weights,
        collate_fn=Apart(loader.collate_fn),
        num_workers=loader.num_workers,
        multiprocessing_context=loader.multiprocessing_context,
    )


@cache
def forkserver() -> BaseContext:
    """A process that has imported torch, and from which those of loaders are forked: in this one
    many threads run. It takes seconds to start, in which a worker would seem to be silent."""
    multiprocessing.set_forkserver_preload(["kinds"])
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=kinds.Rows)
    process.start()
    process.join()
    return context


def loader_of_threads(*given: Any, **more: Any) -> DataLoader[Any]:
    """A DataLoader whose processes come from `forkserver`."""
    if more.get("num_workers"):
        more["multiprocessing_context"] = forkserver()
    return DataLoader(*given, **more)


# --------------------------------------------------------------------------------------- the runs


def run(kind: Kind, count: int, *, hard: bool, dtype: torch.dtype) -> float:
    """The largest difference between the weights of `count` workers and of one process. `hard`: the
    last worker comes late, and worker 1 dies and comes back."""
    if "num_workers" in kind.script:
        forkserver()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Measured(kind, count, hard).run()
    finally:
        torch.set_default_dtype(before)


class Measured:
    """One run of a kind of script, or as many as its server serves."""

    def __init__(self, kind: Kind, count: int, hard: bool) -> None:
        self.kind, self.count, self.hard = kind, count, hard
        self.seen: dict[tuple[int, int, int], Any] = {}
        """What loops got, by worker, trial and step."""
        self.models: dict[int, tuple[int, dict[str, Tensor]]] = {}
        """By worker: its last step, and what it ended with."""
        self.served: list[Served] = []
        self.late, self.dead, self.back, self.again = (threading.Event() for _ in range(4))
        self.gone: set[str] = set()
        """Sessions of the worker that died."""
        self.interrupted = False
        self.trials = int(kind.settings.get("runs", 1))

    def run(self) -> float:
        usual = {"num_epochs": self.kind.epochs, "batch_size": BATCH, "heartbeat_timeout": 20.0}
        settings = {**usual, "timeout": None, **self.kind.settings}
        first = self.count - 1 if self.hard else self.count
        rounds: list[Round] = []
        with ExitStack() as stack:
            port = free_port()
            ports = Ports(Settings(port=port, observer=False), hosts=[LOOPBACK])
            stack.callback(ports.close)
            loops = []
            for trial in range(1, self.trials + 1):
                there = first if trial == 1 else self.count
                served = Served(num_workers=there, ports=ports, port=port, trial=trial, **settings)
                self.served.append(stack.enter_context(served))
                if trial == 1:
                    loops = [served.start(self.work, number) for number in range(1, first + 1)]
                    if self.hard:
                        served.until(self.late.is_set)
                        loops.append(served.start(self.work, self.count))
                        served.until(self.dead.is_set)
                        loops.append(served.start(self.work, 1))
                if trial < self.trials:
                    served.wait(served.end)
                    ports.answer(served.end.result())
            served.wait(*loops, served.end)
            for trial, served in enumerate(self.served, 1):
                rounds += self.rounds(served, trial)
        assert len(self.models) == self.count
        expected = truth(self.kind, rounds)
        last = self.served[-1].closes[-1].step  # who has fewer samples of its own leaves sooner
        return max(
            float((model[name].double() - value.double()).abs().max())
            for step, model in self.models.values()
            for name, value in expected.items()
            if step == last
        )

    def rounds(self, served: Served, trial: int) -> list[Round]:
        """By the log. Where pairs take turns, the first step with each batch tells its samples."""
        first = [c for c in served.closes if c.pair in (None, "", served.closes[0].pair)]
        found = [[self.seen[w, trial, c.step - 1] for w in sorted(c.contributors)] for c in first]
        return [round_ for round_ in found if round_]

    def hold(self, number: int, cluster: workers.Cluster) -> None:
        """Before each batch."""
        served = self.served[cluster.trial - 1]
        peers = served.server.rounds.peers

        def comes(who: int) -> Callable[[], bool]:
            return lambda: any(
                p.id == who and p.join is not None and p.session not in self.gone
                for p in list(peers.values())
            )

        if self.kind.cell and number == 1 and cluster.step >= LATE and not self.interrupted:
            self.gone = {p.session for p in list(peers.values()) if p.id == 1}
            self.interrupted = True
            raise Interrupted
        if self.interrupted and number == 2 and not self.again.is_set():
            self.again.set()  # alone, it could end the run before the cell runs again
            served.until(comes(1))
        if not self.hard or cluster.trial > 1:
            return

        if number == 1 and cluster.step >= LATE and not self.late.is_set():
            self.late.set()
            served.until(comes(self.count))
        if number == 1 and cluster.step >= DEATH and not self.dead.is_set():
            self.gone = {p.session for p in list(peers.values()) if p.id == 1}
            cluster.client.close()
            living.left(cluster)  # its thread may be that of another worker: it is another process
            self.dead.set()
            raise Died
        if number == 2 and cluster.step >= BACK and not self.back.is_set():
            self.back.set()
            served.until(comes(1))

    def noting(self, cluster: workers.Cluster, number: int) -> workers.Cluster:
        """The cluster; what its loop gets is noted."""
        numbered: dict[int, Any] = {}
        real, real_own = cluster.batches, cluster.own_batches

        def batches(given: Any, samples: Any = None, **more: Any) -> Iterator[Any]:
            if id(given) not in numbered:
                loader = isinstance(given, DataLoader)
                numbered[id(given)] = (
                    with_places(given, more.get("weights")) if loader else Numbered(given)
                )
            weight = samples and (lambda batch: samples(batch[0]))
            for batch, places in real(numbered[id(given)], samples=weight, **more):
                self.hold(number, cluster)
                self.seen[number, cluster.trial, cluster.step] = list(map(int, places))
                yield batch

        def own_batches(given: Any, samples: Any = None) -> Iterator[Any]:
            for batch in real_own(given, samples=samples):
                self.hold(number, cluster)
                self.seen[number, cluster.trial, cluster.step] = batch
                yield batch

        cluster.batches, cluster.own_batches = batches, own_batches  # type: ignore
        return cluster

    def work(self, number: int) -> None:
        """A worker: its script, or the built-in training."""
        try:
            if self.kind.script:
                self.script(number)
            else:
                self.built_in(number)
        except Died:
            pass
        except BaseException:
            self.served[-1].stop()  # the others would wait for it
            raise

    def script(self, number: int) -> None:
        joined: list[workers.Cluster] = []
        at: dict[str, Any] = {"port": self.served[0].port, "say": self.served[0].say}

        def take_part(cluster: workers.Cluster) -> workers.Cluster:
            joined.append(self.noting(cluster, number))
            return cluster

        def join() -> workers.Cluster:
            DRAWS.release()  # the model is made
            return take_part(workers.join(LOOPBACK, number, **at))

        def trials(runs: int) -> Iterator[workers.Cluster]:
            DRAWS.release()
            yield from map(take_part, workers.trials(runs, LOOPBACK, number, **at))

        def stream() -> Iterator[Tensor]:
            while joined[-1].step < STEPS:
                yield drawn(self.kind, number, joined[-1].step)

        space = {
            **BASE, "EPOCHS": self.kind.epochs, "BATCH": BATCH, "NUMBER": number,
            "DataLoader": loader_of_threads,
            "Stream": partial(Stream, number, torch.get_default_dtype()),
            "join": join, "trials": trials, "stream": stream,
            "data": None if self.kind.data is None else self.kind.data(),
            "STEP": lambda: joined[-1].step,
            "done": lambda *models: self.models.update(
                {number: (joined[-1].step, copied(models))}
            ),
        }  # fmt: skip
        text = self.kind.clustered
        for name in ("join", "trials"):
            text = text.replace(f"from paramserver import {name}\n", "")
        DRAWS.acquire()
        try:
            exec(text, space)
        except Interrupted:
            again = True
        else:
            again = False
        if again:
            DRAWS.acquire()
            exec(text, space)
        joined[-1].leave()

    def built_in(self, number: int) -> None:
        own = Settings(port=self.served[0].port, allow=["kinds"], threads=1)
        DRAWS.acquire()
        cluster = workers.join(LOOPBACK, number, port=own.port, say=self.served[0].say)
        self.noting(cluster, number)
        real = cluster.attach

        def attach(*given: Any, **more: Any) -> Any:
            DRAWS.release()
            model, optimizer = real(*given, **more)
            trained.append(model)
            return model, optimizer

        trained: list[nn.Module] = []
        cluster.attach = attach  # type: ignore
        _train(cluster, own, {})
        self.models[number] = cluster.step, copied(trained)
        cluster.leave()


def copied(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    states = (model.state_dict() for model in models)
    return {
        f"{place}.{name}": value.detach().clone()
        for place, state in enumerate(states)
        for name, value in state.items()
    }


# -------------------------------------------------------------------------------- the one process


def together(round_: Round) -> list[Any]:
    """The items of these batches, in their order."""
    return [item for batch in round_ for item in batch]


class Truth:
    """One process with the script as it is, whose loader gives it the samples of each round."""

    def __init__(self, kind: Kind, rounds: list[Round]) -> None:
        self.kind, self.left, self.steps = kind, iter(rounds), 0
        self.sizes: list[int] = []
        """Samples of each worker in the round at hand."""
        self.found: dict[str, Tensor] = {}
        self.centres: dict[nn.Module, Tensor] = {}
        """The newest robust average of each model's gradient."""

    def run(self) -> dict[str, Tensor]:
        space = {
            **BASE, "EPOCHS": self.kind.epochs, "BATCH": BATCH,
            "DataLoader": self.loader, "stream": self.stream,
            "Stream": Stream, "each": self.each, "aggregated": self.aggregated,
            "data": None if self.kind.data is None else self.kind.data(),
            "STEP": lambda: self.steps,
            "done": lambda *models: self.found.update(copied(models)),
        }  # fmt: skip
        if self.kind.script:
            exec(self.kind.alone, space)
        else:
            self.built_in()
        assert next(self.left, None) is None, "the script ended sooner than those of the workers"
        return self.found

    def counted(self, batch: Any) -> Iterator[Any]:
        yield batch
        self.steps += 1

    def loader(self, data: Any, size: int, collate_fn: Any = None, **order: Any) -> Any:
        collate = collate_fn or torch.utils.data.default_collate

        class Epochs:
            def __iter__(epochs) -> Iterator[Any]:
                count = 0
                stream = isinstance(data, IterableDataset)
                while (stream or count < len(data)) and (round_ := next(self.left, None)):
                    self.sizes = list(map(len, round_))
                    if stream:
                        parts = zip(*round_, strict=True)
                        yield from self.counted([torch.cat(part) for part in parts])
                        continue
                    places = together(round_)
                    count += len(places)
                    yield from self.counted(collate([data[i] for i in places]))

        return Epochs()

    def stream(self) -> Iterator[Any]:
        for round_ in self.left:
            if "GPT" in self.kind.name:  # its halves are those of the workers
                halves = [batch.chunk(2) for batch in round_]
                round_ = [h[part] for part in (0, 1) for h in halves]
            yield from self.counted(torch.cat(round_))

    def each(self, model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> None:
        """Forward and backward of each worker's part by itself, all from the same buffers; the
        gradients and what is written to buffers are averaged."""
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        after: dict[str, list[Tensor]] = {name: [] for name in before}
        buffers = dict(model.named_buffers())
        for part in zip(*(t.split(self.sizes) for t in batch), strict=True):
            for name, buffer in buffers.items():
                buffer.copy_(before[name])
            share = len(part[0]) / sum(self.sizes)
            (loss(*part) * share).backward()
            for name, buffer in buffers.items():
                after[name].append(buffer.clone() * share if buffer.is_floating_point() else buffer)
        for name, buffer in buffers.items():
            parts = torch.stack(after[name])
            buffer.copy_(parts.sum(0) if buffer.is_floating_point() else parts.amax(0))

    def aggregated(self, model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> None:
        """The gradients of each worker's part by themselves, and of them what docs/robust.md says
        the server makes: this small model's are in one bucket, and all parts weigh the same."""
        assert len(set(self.sizes)) == 1
        parameters = list(model.parameters())
        rows = []
        for part in zip(*(t.split(self.sizes) for t in batch), strict=True):
            rows.append(torch.cat([g.flatten() for g in grad(loss(*part), parameters)]))
        if self.kind.settings["aggregate"] == "trimmed":
            average = trimmed(torch.stack(rows))
        else:
            centre = self.centres.get(model, torch.zeros_like(rows[0]))
            average = self.centres[model] = clipped(torch.stack(rows), centre)
        sizes = [p.numel() for p in parameters]
        for p, gradient in zip(parameters, average.split(sizes), strict=True):
            p.grad = gradient.view_as(p).clone()

    def built_in(self) -> None:
        """What the settings of the built-in training say."""
        settings = self.kind.settings
        model = build_model(settings["model"], Settings().seed, OwnCode(allowed=("kinds",)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        gamma = settings["scheduler"].get("gamma", 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma)
        for _ in range(EPOCHS):
            for x, y in self.loader(kinds.OwnRows(), BATCH):
                optimizer.zero_grad()
                kinds.smooth(model(x), y).backward()
                optimizer.step()
                scheduler.step()
        self.found.update(copied([model]))


def truth(kind: Kind, rounds: list[Round]) -> dict[str, Tensor]:
    return Truth(kind, rounds).run()


def trimmed(rows: Tensor) -> Tensor:
    """The mean of each number [workers, n] without the lowest and the highest, of two without
    none."""
    lost = min(1, (len(rows) - 1) // 2)
    return rows.sort(0).values[lost : len(rows) - lost].mean(0)


def clipped(rows: Tensor, centre: Tensor) -> Tensor:
    """Centered clipping of these gradients [workers, n], at the median of their distances."""
    away = rows - centre
    distances = away.norm(dim=1)
    usual = distances[distances > 0].sort().values
    usual = usual[(len(usual) - 1) // 2]
    return centre + (away * (usual / distances).clamp(max=1.0)[:, None]).mean(0)


# ------------------------------------------------------------------------------------- resumed

RESUMED = "the same, ended in the middle of an epoch, and resumed"
RESUMED_AT = 8  # the batch of each worker in which the run is ended
GATED = """

import fcntl, os
from pathlib import Path
torch.set_default_dtype(torch.{dtype})
batches = 0


class Gated(Own):
    def forward(self, x: Tensor) -> Tensor:
        global batches
        batches += "STANDS" in os.environ
        if batches == {at}:
            print("at the gate", flush=True)
            with Path(__file__).with_name("gate").open() as gate:
                fcntl.flock(gate, fcntl.LOCK_SH)
        return super().forward(x)
"""


def resumed(folder: Path, dtype: torch.dtype) -> float:
    """The largest difference between the weights of a run of two workers, which was ended in the
    middle of an epoch and resumed from its checkpoint, and of one process."""
    name = str(dtype).removeprefix("torch.")
    kind = next(k for k in KINDS if k.settings.get("model"))
    own = Path(kinds.__file__).read_text() + GATED.format(
        dtype=name, at=1 + RESUMED_AT
    )  # one is a trial
    (folder / "kinds.py").write_text(own)
    settings = {"num_epochs": EPOCHS, "batch_size": BATCH, "eval_steps": 0, "num_workers": 2}
    words = [f"{key}={value}" for key, value in settings.items()] + [
        "model.type=kinds:Gated", "dataset={name: 'kinds:OwnRows', val: {samples: 8}}",
        "loss=kinds:smooth", "optimizer={name: SGD, momentum: 0.9}", "learning_rate=0.1",
        "scheduler={name: StepLR, step_size: 4, gamma: 0.9}", "timeout=60", "heartbeat_timeout=20",
    ]  # fmt: skip
    with Run(folder) as run:
        with (folder / "gate").open("w") as gate:
            fcntl.flock(gate, fcntl.LOCK_EX)
            server = run.server(*words)
            at_work = [run.worker(n, "allow=kinds", STANDS="1") for n in (1, 2)]
            for worker in at_work:
                worker.wait_for("^at the gate$")
            server.send(signal.SIGINT)
            server.wait_for("ending the run in order")
        ends = [program.end() for program in (server, *at_work)]
        stopped = run.summary()["steps"]
        assert RESUMED_AT - 1 <= stopped <= RESUMED_AT, (ends, server.output)
        server = run.server(*words, "resume=latest")
        programs = [server, *(run.worker(n, "allow=kinds") for n in (1, 2))]
        assert [program.end() for program in programs] == [0, 0, 0], server.output
        assert run.steps()[0]["step"] == stopped + 1
        found = load_file(run.runs[-1] / "model.safetensors")
    kind = dataclasses.replace(
        kind,
        settings={
            **kind.settings,
            "model": {"type": "kinds:Own", "hidden": 16},
            "scheduler": {"name": "StepLR", "step_size": 4, "gamma": 0.9},
        },
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        count = len(kinds.OwnRows())
        rounds = [
            [half.tolist() for half in places.split(BATCH)]
            for epoch in range(EPOCHS)
            for places in order(count, Settings().seed, epoch).split(2 * BATCH)
        ]
        expected = truth(kind, rounds)
    finally:
        torch.set_default_dtype(before)
    assert len(expected) == len(found)
    return max(
        float((found[name.partition(".")[2]].double() - value.double()).abs().max())
        for name, value in expected.items()
    )


def main() -> None:
    """Print the table; with words, of the kinds that have one of them in their names."""
    torch.set_num_threads(1)
    print("| script | lines: new or other | gone | float64 | float32 |\n|---|---|---|---|---|")
    for kind in KINDS:
        if sys.argv[1:] and not any(word in kind.name for word in sys.argv[1:]):
            continue
        most = {
            dtype: max(run(kind, n, hard=hard, dtype=dtype) for n, hard in ((2, False), (3, True)))
            for dtype in (torch.float64, torch.float32)
        }
        wide, usual = most[torch.float64], most[torch.float32]
        new, gone = kind.changed
        print(f"| {kind.name} | {new} | {gone} | {wide:.0e} | {usual:.0e} |", flush=True)
    if not sys.argv[1:] or any(word in RESUMED for word in sys.argv[1:]):
        found = []
        for dtype in (torch.float64, torch.float32):
            with tempfile.TemporaryDirectory() as folder:
                found.append(resumed(Path(folder), dtype))
        print(f"| {RESUMED} | 0 | 0 | {found[0]:.0e} | {found[1]:.0e} |", flush=True)


if __name__ == "__main__":
    main()
