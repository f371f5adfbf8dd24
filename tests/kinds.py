"""Scripts of many kinds: each as a person writes it for one process, and what changes in a cluster.

`tests/measured.py` runs them and holds them against one process.
"""

# ruff: noqa: E501 (scripts are as wide as people write them)

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

EPOCHS = 3
JOIN = "from paramserver import join\ncluster = join()\n"


@dataclass(frozen=True)
class Kind:
    """`script` is for one process; each of `changes` is a piece of it and what stands there in a
    cluster. A script draws from `data`, from `stream()` or `samples()`, and gives its models to
    `done`. Without a script the built-in training has these `settings`."""

    name: str
    data: Callable[[], Dataset[Any]] | None
    script: str
    changes: tuple[tuple[str, str], ...]
    settings: dict[str, Any] = field(default_factory=dict)
    twin: tuple[tuple[str, str], ...] = ()
    """What stands in the script of the one process it is held against."""
    most_lines: int = 5
    cell: bool = False
    """Worker 1 is a notebook: its cell is interrupted, and run again."""

    @property
    def epochs(self) -> int:
        return int(self.settings.get("num_epochs", EPOCHS))

    @property
    def clustered(self) -> str:
        return self._with(self.changes)

    @property
    def alone(self) -> str:
        return self._with(self.twin)

    def _with(self, changes: tuple[tuple[str, str], ...]) -> str:
        text = self.script
        for old, new in changes:
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


class Noise(Dataset[Any]):
    """Samples of a GAN: a real one of 3 numbers, and noise of 2 for a made one."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.real = 1 + torch.randn(96, 3, generator=generator).to(torch.get_default_dtype())
        self.noise = torch.randn(96, 2, generator=generator).to(torch.get_default_dtype())

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: int) -> Any:
        return self.real[index], self.noise[index]


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


class Own(nn.Module):
    """A model of one's own for the built-in training."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class OwnRows(Rows):
    def __init__(self, samples: int = 96) -> None:
        super().__init__(samples)


def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


SCHEDULED_LOOPS = (
    TWO_LOOPS
    + """\
        scheduler.step()
done(model)
"""
)
SCHEDULED_IN_CLUSTER = (
    (
        "loader = Data",
        JOIN
        + "model, optimizer = cluster.attach(model, optimizer, scheduler=scheduler)\nloader = Data",
    ),
    IN_CLUSTER,
    ("        scheduler.step()\n", ""),
)

GAN = """\
torch.manual_seed(1)
G = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
D = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
opt_g = torch.optim.Adam(G.parameters(), lr=2e-3, betas=(0.5, 0.999))
opt_d = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.5, 0.999))
def says(logits, real):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))
loader = DataLoader(data, BATCH, shuffle=True)
for epoch in range(EPOCHS):
    for x, noise in loader:
        opt_d.zero_grad()
        fake = G(noise)
        (says(D(x), 1.0) + says(D(fake.detach()), 0.0)).backward()
        opt_d.step()
        opt_g.zero_grad()
        says(D(fake), 1.0).backward()
        opt_g.step()
done(G, D)
"""
GAN_IN_CLUSTER = (
    (
        "loader = Data",
        JOIN
        + "(G, opt_g), (D, opt_d) = cluster.attach(generator=(G, opt_g), critic=(D, opt_d))\nloader = Data",
    ),
    (
        "for epoch in range(EPOCHS):\n    for x, noise in loader:",
        "for epoch in cluster.epochs():\n    for x, noise in cluster.batches(loader):",
    ),
)
GAN_APART = (
    (
        "(says(D(x), 1.0) + says(D(fake.detach()), 0.0)).backward()",
        "aggregated(D, (x, noise), lambda x, noise: says(D(x), 1.0) + says(D(G(noise).detach()), 0.0))",
    ),
    (
        "says(D(fake), 1.0).backward()",
        "aggregated(G, (x, noise), lambda x, noise: says(D(G(noise)), 1.0))",
    ),
)

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
    Kind(
        "a small ResNet with BatchNorm, OneCycleLR",
        partial(Rows, 96, (1, 8, 8)),
        """\
def conv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))
class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.body = nn.Sequential(conv(i, o, stride), nn.ReLU(), conv(o, o))
        self.skip = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else nn.Identity()
    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))
torch.manual_seed(1)
model = nn.Sequential(conv(1, 4), nn.ReLU(), Block(4, 4, 1), Block(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=100)
loader = DataLoader(data, BATCH, shuffle=True)
"""
        + SCHEDULED_LOOPS,
        SCHEDULED_IN_CLUSTER,
        twin=(
            (
                "F.cross_entropy(model(x), y).backward()",
                "each(model, (x, y), lambda x, y: F.cross_entropy(model(x), y))",
            ),
        ),
    ),
    Kind("GAN: two models, two optimizers", Noise, GAN, GAN_IN_CLUSTER),
    Kind(
        "the same GAN, aggregate=trimmed on the server",
        Noise,
        GAN,
        GAN_IN_CLUSTER,
        {"aggregate": "trimmed"},
        GAN_APART,
    ),
    Kind(
        "the same GAN, aggregate=clipped on the server",
        Noise,
        GAN,
        GAN_IN_CLUSTER,
        {"aggregate": "clipped"},
        GAN_APART,
    ),
    Kind(
        "a stream (IterableDataset) in a loader with two processes",
        None,
        HEAD
        + """\
loader = DataLoader(Stream(), BATCH, num_workers=2)
for x, y in loader:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
done(model)
""",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            ("in loader:", "in cluster.own_batches(loader):"),
        ),
    ),
    Kind(
        "a WeightedRandomSampler",
        Rows,
        HEAD
        + """\
sampler = torch.utils.data.WeightedRandomSampler((data.y + 1).double(), len(data))
loader = DataLoader(data, BATCH, sampler=sampler)
"""
        + TWO_LOOPS
        + "done(model)\n",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            (
                "for epoch in range(EPOCHS):\n    for x, y in loader:",
                "for epoch in cluster.epochs():\n    for x, y in cluster.batches(loader, weights=sampler):",
            ),
        ),
    ),
    Kind(
        "a loader with two processes",
        Rows,
        HEAD
        + "loader = DataLoader(data, BATCH, shuffle=True, num_workers=2)\n"
        + TWO_LOOPS
        + "done(model)\n",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            IN_CLUSTER,
        ),
    ),
    Kind(
        "a long evaluation now and then, early stop, EMA",
        Rows,
        """\
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
"""
        + HEAD
        + """\
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
def evaluate():
    with torch.no_grad():
        return F.cross_entropy(ema(data.x[:48]), data.y[:48]).item()
losses = []
loader = DataLoader(data, BATCH, shuffle=True)
"""
        + TWO_LOOPS
        + """\
        ema.update_parameters(model)
    losses.append(evaluate())
    if len(losses) > 3 and losses[-1] > losses[-4] - 0.1:
        break
done(ema)
""",
        (
            (
                "loader = Data",
                JOIN
                + "model, optimizer = cluster.attach(model, optimizer, after_step=ema.update_parameters)\nloader = Data",
            ),
            IN_CLUSTER,
            ("        ema.update_parameters(model)\n", ""),
            ("with torch.no_grad():", "with cluster.evaluating(), torch.no_grad():"),
            ("        break\n", '        cluster.stop("no better")\n'),
        ),
        {**BARRIER, "num_epochs": 9},
        most_lines=7,
    ),
    Kind(
        "two trainings in one process",
        Rows,
        """\
torch.manual_seed(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
loader = DataLoader(data, BATCH, shuffle=True)
for training in range(2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
done(model)
""",
        (
            (
                "for training in range(2):\n",
                "from paramserver import trials\nfor cluster in trials(2):\n",
            ),
            (
                "    for epoch in range(EPOCHS):\n        for x, y in loader:",
                "    model, optimizer = cluster.attach(model, optimizer)\n    for epoch in cluster.epochs():\n        for x, y in cluster.batches(loader):",
            ),
        ),
        # the one process begins its second training after whole epochs
        {**BARRIER, "runs": 2},
    ),
    Kind(
        "a notebook whose cell is interrupted and run again",
        Rows,
        HEAD + "loader = DataLoader(data, BATCH, shuffle=True)\n" + TWO_LOOPS + "done(model)\n",
        (
            ("loader = Data", ATTACH + "loader = Data"),
            IN_CLUSTER,
        ),
        cell=True,
    ),
    Kind(
        "a schedule of warm-up and cosine, with each batch",
        Rows,
        HEAD
        + """\
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
scheduler = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 40)], [4])
loader = DataLoader(data, BATCH, shuffle=True)
"""
        + SCHEDULED_LOOPS,
        SCHEDULED_IN_CLUSTER,
    ),
    Kind(
        "the built-in training with classes of one's own",
        Rows,
        "",
        (),
        {
            "model": {"type": "kinds:Own", "hidden": 16},
            "dataset": {"name": "kinds:OwnRows", "val": {"samples": 8}},
            "loss": "kinds:smooth",
            "optimizer": {"name": "SGD", "momentum": 0.9},
            "learning_rate": 0.1,
            "scheduler": {"name": "StepLR", "step_size": 4},
        },
    ),
)
"""In each, `EPOCHS`, `BATCH` and `NUMBER` (the worker's) are known, and `STEP()` counts steps."""
