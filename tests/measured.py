"""Scripts of many kinds, as a person writes them for one process and as they are for a cluster.

`python tests/measured.py` runs each of them with two and three workers, one of which comes late and
another of which dies without a word, and prints the table in docs/your-own-model.md: how many lines
a script changes, and how far the weights are from those of one process that gets the same samples
in the same steps.
"""

# ruff: noqa: E501 (scripts are as wide as people write them)

from __future__ import annotations

import difflib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from whole import DEADLINE_S, LOOPBACK, Served  # noqa: E402

import workers  # noqa: E402

JOIN = "from paramserver import join\ncluster = join()\n"


@dataclass(frozen=True)
class Kind:
    """`script` is for one process; each of `changes` is a piece of it and what stands there in a
    cluster. A script draws from `data`, or from `stream()`, and gives its model to `done`."""

    name: str
    data: Callable[[], Dataset[Any]] | None
    script: str
    changes: tuple[tuple[str, str], ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def clustered(self) -> str:
        text = self.script
        for old, new in self.changes:
            assert text.count(old) == 1, (self.name, old)
            text = text.replace(old, new)
        return text

    @property
    def changed(self) -> tuple[int, int]:
        """Lines that are new or other, and lines that go without another one in their place."""
        before, after = self.script.splitlines(), self.clustered.splitlines()
        blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        sizes = [(b - a, d - c) for what, a, b, c, d in blocks if what != "equal"]
        return sum(new for _, new in sizes), sum(max(0, old - new) for old, new in sizes)


class Rows(Dataset[Any]):
    """Inputs of 6 numbers and one of 4 classes; `shape` makes pictures of them."""

    def __init__(self, samples: int = 96, shape: tuple[int, ...] = (6,)) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, *shape, generator=generator).to(torch.get_default_dtype())
        self.y = torch.randint(4, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class Dicts(Rows):
    def __getitem__(self, index: int) -> Any:
        return {"input": self.x[index], "label": self.y[index]}


class Sentences(Dataset[Any]):
    """Sequences of 2 to 9 words."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        lengths = torch.randint(2, 10, (96,), generator=generator).tolist()
        self.words = [torch.randint(1, 12, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> Tensor:
        return self.words[index]


HEAD = """\
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
"""
ATTACH = JOIN + "model, optimizer = cluster.attach(model, optimizer)\n"
STEP = """\
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
"""
TWO_LOOPS = "for epoch in range(EPOCHS):\n    for x, y in loader:\n" + STEP
IN_CLUSTER = ("for epoch in range(EPOCHS):\n    for x, y in loader:", "for epoch in cluster.epochs():\n    for x, y in cluster.batches(loader):")  # fmt: skip
BARRIER = {"epoch_barrier": True}

KINDS = (
    Kind(
        "CNN with epochs, a test after each, StepLR",
        partial(Rows, 96, (1, 8, 8)),
        """\
torch.manual_seed(1)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
loader = DataLoader(data, BATCH, shuffle=True)
"""
        + TWO_LOOPS
        + """\
    scheduler.step()
    with torch.no_grad():
        right = (model(data.x).argmax(1) == data.y).sum()
done(model)
""",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            IN_CLUSTER,
        ),
        BARRIER,
    ),
    Kind(
        "character GPT: own batches, learning rate by hand, accumulation, clipping",
        None,
        """\
torch.manual_seed(1)
model = nn.Sequential(nn.Embedding(12, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), nn.Linear(8, 12))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-5)
step = 0
for batch in stream():
    for group in optimizer.param_groups:
        group["lr"] = 0.01 / (1 + step)
    optimizer.zero_grad()
    for part in batch.chunk(2):
        logits = model(part[:, :-1])
        (F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()) / 2).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    step += 1
done(model)
""",
        (
            (
                "step = 0\n",
                JOIN
                + "model, optimizer = cluster.attach(model, optimizer, clip_norm=0.5, accumulate=2)\n",
            ),
            ("in stream():", "in cluster.own_batches(stream()):"),
            ("(1 + step)", "(1 + cluster.step)"),
            ("    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)\n", ""),
            ("    step += 1\n", ""),
        ),
    ),
    Kind(
        "LSTM over packed sequences, a mean over words",
        Sentences,
        """\
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(12, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 12)
    def forward(self, batch, lengths):
        packed = pack_padded_sequence(self.words(batch), lengths, batch_first=True, enforce_sorted=False)
        return self.out(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])
def collate(words):
    return pad_sequence(words, batch_first=True), torch.tensor([len(w) - 1 for w in words])
torch.manual_seed(1)
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
loader = DataLoader(data, BATCH, shuffle=True, collate_fn=collate)
for epoch in range(EPOCHS):
    for batch, lengths in loader:
        optimizer.zero_grad()
        logits = model(batch[:, :-1], lengths)
        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=0).backward()
        optimizer.step()
done(model)
""",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            (
                "for epoch in range(EPOCHS):\n    for batch, lengths in loader:",
                "for epoch in cluster.epochs():\n    for batch, lengths in cluster.batches(loader, samples=lambda batch: int(batch[1].sum())):",
            ),
        ),
        BARRIER,
    ),
    Kind(
        "branches that are used now and then, samples and outputs as dicts",
        Dicts,
        """\
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.often, self.seldom, self.never = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
    def forward(self, input, label):
        logits = self.often(input)
        if STEP() % 3 == 0:
            logits = logits + self.seldom(input)
        return {"logits": logits, "loss": F.cross_entropy(logits, label)}
torch.manual_seed(1)
model = Model()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
loader = DataLoader(data, BATCH, shuffle=True)
for epoch in range(EPOCHS):
    for batch in loader:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
done(model)
""",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            (
                "for epoch in range(EPOCHS):\n    for batch in loader:",
                "for epoch in cluster.epochs():\n    for batch in cluster.batches(loader):",
            ),
        ),
    ),
    Kind(
        "EMA, OneCycleLR with each batch",
        Rows,
        """\
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
"""
        + HEAD
        + """\
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=200)
loader = DataLoader(data, BATCH, shuffle=True)
"""
        + TWO_LOOPS
        + """\
        ema.update_parameters(model)
        scheduler.step()
done(ema)
""",
        (
            (
                "loader = Data",
                JOIN
                + "model, optimizer = cluster.attach(model, optimizer, scheduler=scheduler, after_step=ema.update_parameters)\nloader = Data",
            ),
            IN_CLUSTER,
            ("        ema.update_parameters(model)\n        scheduler.step()\n", ""),
        ),
        BARRIER,
    ),
    Kind(
        "rollouts of unlike size",
        None,
        HEAD
        + """\
for rollout in stream():
    optimizer.zero_grad()
    F.mse_loss(model(rollout), rollout[:, :4]).backward()
    optimizer.step()
done(model)
""",
        (
            (
                "for rollout in stream():",
                ATTACH + "for rollout in cluster.own_batches(stream(), samples=len):",
            ),
        ),
    ),
    Kind(
        "fine-tuning: a frozen backbone and an adapter",
        Rows,
        """\
torch.manual_seed(1)
backbone = nn.Sequential(nn.Linear(6, 16), nn.Tanh()).requires_grad_(False)
model = nn.Sequential(backbone, nn.Linear(16, 2), nn.Linear(2, 16), nn.Linear(16, 4))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
loader = DataLoader(data, BATCH, shuffle=True)
"""
        + TWO_LOOPS
        + "done(model)\n",
        (
            (
                "loader = Data",
                JOIN
                + "model, optimizer = cluster.attach(model, optimizer, first=NUMBER == 1)\nloader = Data",
            ),
            IN_CLUSTER,
        ),
    ),
)
"""In each, `EPOCHS`, `BATCH` and `NUMBER` (the worker's) are known, and `STEP()` counts steps."""


def drawn(kind: Kind, number: int, step: int) -> Tensor:
    """What a worker's own stream gives it at this step."""
    generator = torch.Generator().manual_seed(1000 * number + step)
    if "GPT" in kind.name:
        return torch.randint(12, (4, 9), generator=generator)
    rows = int(torch.randint(3, 9, (1,), generator=generator))
    return torch.randn(rows, 6, generator=generator).to(torch.get_default_dtype())


def together(batches: list[Any]) -> list[Any]:
    """The items of these batches, in their order; padding is cut off."""
    return [item for batch in batches for item in batch]


EPOCHS, BATCH, STEPS = 3, 8, 16
LATE, DEATH = 3, 6  # steps at which a worker comes, and at which one dies
BASE = {"torch": torch, "nn": nn, "F": F, "EPOCHS": EPOCHS, "DataLoader": DataLoader}


def run(kind: Kind, count: int, *, hard: bool, dtype: torch.dtype) -> float:
    """The largest difference between the weights of `count` workers and of one process. `hard`: the
    last worker comes late, and worker 1 dies."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return _run(kind, count, hard)
    finally:
        torch.set_default_dtype(before)


class Died(BaseException):
    pass


DRAWS = threading.Lock()
"""Threads have one generator of torch's: a script makes its model while no other one does."""


def _run(kind: Kind, count: int, hard: bool) -> float:
    seen: dict[tuple[int, int], Any] = {}
    models: dict[int, dict[str, Tensor]] = {}
    late = threading.Event()
    settings = {"num_epochs": EPOCHS, "heartbeat_timeout": 2.0, "timeout": None, **kind.settings}
    first = count - 1 if hard else count

    def hold(number: int, cluster: workers.Cluster) -> None:
        """Before each batch."""
        if not hard:
            return
        if number == 1 and cluster.step == LATE and not late.is_set():
            late.set()
            served.until(
                lambda: any(
                    peer.id == count and peer.join is not None
                    for peer in served.server.rounds.peers.values()
                )
            )
        if number == 1 and cluster.step >= DEATH:
            cluster.client.close()
            raise Died

    def noting(real: Any, number: int, cluster: workers.Cluster) -> Any:
        """`cluster.batches` or `own_batches`, noting what the loop gets."""
        numbered: dict[int, DataLoader[Any]] = {}

        def batches(given: Any, samples: Any = None) -> Iterator[Any]:
            if not isinstance(given, DataLoader):
                for batch in real(given, samples=samples):
                    hold(number, cluster)
                    seen[number, cluster.step] = batch
                    yield batch
                return
            loader = numbered.setdefault(id(given), with_places(given))
            weight = samples and (lambda batch: samples(batch[0]))
            for batch, places in real(loader, samples=weight):
                hold(number, cluster)
                seen[number, cluster.step] = places
                yield batch

        return batches

    def work(number: int) -> None:
        joined: list[workers.Cluster] = []

        def join() -> workers.Cluster:
            DRAWS.release()  # the model is made
            cluster = workers.join(LOOPBACK, number, port=served.port, say=served.say)
            joined.append(cluster)
            for name in ("batches", "own_batches"):
                setattr(cluster, name, noting(getattr(cluster, name), number, cluster))
            return cluster

        def stream() -> Iterator[Tensor]:
            while joined[0].step < STEPS:
                yield drawn(kind, number, joined[0].step)

        space = {
            **BASE, "BATCH": BATCH, "NUMBER": number, "join": join, "stream": stream,
            "data": None if kind.data is None else kind.data(),
            "STEP": lambda: joined[0].step,
            "done": lambda model: models.update({number: copied(model)}),
        }  # fmt: skip
        DRAWS.acquire()
        try:
            exec(kind.clustered.replace("from paramserver import join\n", ""), space)
        except Died:
            return
        joined[0].leave()

    with Served(num_workers=first, **settings) as served:
        ends = [served.start(work, number) for number in range(1, first + 1)]
        if first < count:
            assert late.wait(DEADLINE_S)
            ends.append(served.start(work, count))
        served.wait(*ends, served.end)
        closes = list(served.closes)
    rounds = [[seen[w, c.step - 1] for w in sorted(c.contributors)] for c in closes]
    expected = truth(kind, [r for r in rounds if r])
    return max(
        float((model[name].double() - value.double()).abs().max())
        for model in models.values()
        for name, value in expected.items()
    )


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def with_places(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader; each batch comes with the places of its samples."""
    collate = loader.collate_fn
    numbered = Numbered(loader.dataset)
    return DataLoader(
        numbered,
        loader.batch_size,
        shuffle=True,
        collate_fn=lambda items: (collate([item for item, _ in items]), [n for _, n in items]),
    )


class Numbered(Dataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index], index


def truth(kind: Kind, rounds: list[list[Any]]) -> dict[str, Tensor]:
    """One process with the script as it is, whose loader gives the samples of each round."""
    steps, found = [0], {}

    def counted(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            steps[0] += 1

    data = None if kind.data is None else kind.data()
    left = iter(rounds)

    def loader(data: Any, size: int, shuffle: bool, collate_fn: Any = None) -> Any:
        collate = collate_fn or torch.utils.data.default_collate

        class Epochs:
            def __iter__(self) -> Iterator[Any]:
                count = 0
                while count < len(data):
                    round_ = next(left, None)
                    if round_ is None:
                        return
                    places = together(round_)
                    count += len(places)
                    yield from counted([collate([data[i] for i in places])])

        return Epochs()

    def whole() -> Iterator[Any]:
        for round_ in rounds:
            if "GPT" in kind.name:  # its halves are those of the workers
                halves = [batch.chunk(2) for batch in round_]
                yield from counted([torch.cat([h[part] for part in (0, 1) for h in halves])])
            else:
                yield from counted([torch.cat(round_)])

    space = {
        **BASE, "DataLoader": loader, "BATCH": BATCH, "data": data, "stream": whole,
        "STEP": lambda: steps[0], "done": lambda model: found.update(copied(model)),
    }  # fmt: skip
    exec(kind.script, space)
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| script | lines: new or other | gone | float64 | float32 |\n|---|---|---|---|---|")
    for kind in KINDS:
        most = {
            dtype: max(run(kind, n, hard=hard, dtype=dtype) for n, hard in ((2, False), (3, True)))
            for dtype in (torch.float64, torch.float32)
        }
        wide, usual = most[torch.float64], most[torch.float32]
        new, gone = kind.changed
        print(f"| {kind.name} | {new} | {gone} | {wide:.0e} | {usual:.0e} |", flush=True)


if __name__ == "__main__":
    main()
