"""For tests of the page: states as the server makes them, metrics, and the page served."""

from __future__ import annotations

import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paramserver.net import jointoken
from paramserver.net.jointoken import JoinToken
from paramserver.output.curves import Tail
from paramserver.page.board import Board
from paramserver.page.web import Web
from paramserver.protocol.messages import Phase
from paramserver.status.value import (
    OBSERVER,
    SERVER,
    Cause,
    Diagnosis,
    Evaluation,
    Event,
    EventKind,
    Link,
    LogLine,
    Machine,
    RoundTimes,
    Samples,
    State,
    Status,
    Times,
)

SECRET = bytes(range(32))
TOKEN = jointoken.encode(JoinToken("10.10.0.1", 65434, bytes(32), SECRET, watches=True))
RUN = "2026-11-22_14-05-09"
KINDS = ("Thunderbolt", "Ethernet 1 Gbit/s", "Wi-Fi")
DEVICES = (("mps", "Apple M4, torch 2.9"), ("cuda", "RTX 4090, torch 2.9"), ("cpu", "Cortex-A76"))


def status(workers: int = 3, step: int = 812, **changed: Any) -> Status:
    """A run of so many workers; the last one is late in two of five rounds."""
    machines = [
        Machine(
            id=SERVER, host="mini1", device="cpu", state=State.TRAINING, memory_bytes=310 * 10**6
        ),
        Machine(
            id=OBSERVER, host="mini1", device="mps", state=State.IDLE, memory_bytes=520 * 10**6
        ),
    ]
    for id in range(1, workers + 1):
        device, kind = DEVICES[(id - 1) % 3]
        late = id == workers
        machines.append(
            Machine(
                id=id,
                host=f"{'pi' if device == 'cpu' else 'mini'}{id}",
                kind=kind,
                device=device,
                state=State.LATE if late else State.TRAINING,
                trouble="late 0.4 s" if late else "",
                samples_per_s=9540.0 / id,
                samples=12_000,
                rounds=400,
                late_rounds=12 if late else 0,
                minute=Times(31, 1.5, 14, 9, 0) if not late else Times(40, 1.5, 4, 2, 9),
                minute_rounds=200,
                minute_late=80 if late else 0,
                memory_bytes=900 * 10**6,
                temperature_c=61.5,
                sent_bytes=10**9,
                sent_bytes_per_s=9e7,
            )
        )
    links = tuple(
        Link(
            machine=id,
            address=f"10.10.0.{id}",
            kind=KINDS[(id - 1) % 3],
            measured_bytes_per_s=2.4e9 / 20 ** ((id - 1) % 3),
        )
        for id in range(1, workers + 1)
    )
    kept = min(60, 960 // max(1, workers))
    rounds = tuple(
        RoundTimes(
            step - kept + at + 1,
            0.04,
            {
                id: Times(0.025 + 0.003 * math.sin(at + id), 0.001, 0.009, 0.004)
                if id < workers or at % 5 > 1
                else Times(0.03, 0.001, 0.0, 0.0, 0.012)
                for id in range(1, workers + 1)
            },
        )
        for at in range(kept)
    )
    at = 1.7951e9
    known: dict[str, Any] = {
        "run": "0123456789abcdef",
        "made_at": at,
        "folder": RUN,
        "model": "SimpleNN",
        "phase": "training",
        "doing": Phase.TRAINING,
        "trains": True,
        "seconds": 42.5,
        "step": step,
        "total_steps": 1120,
        "epoch": 3,
        "num_epochs": 5,
        "steps_per_s": 29.8,
        "samples_per_s": 19_080.0,
        "eta_s": 10.3,
        "loss": 0.2134,
        "learning_rate": 0.001,
        "evaluations": (Evaluation(step=800, loss=0.31, metrics={"accuracy": 0.934}),),
        "sent_bytes": 4 * 10**9,
        "received_bytes": 2 * 10**9,
        "sent_bytes_per_s": 1.1e8,
        "received_bytes_per_s": 6e7,
        "machines": tuple(machines),
        "links": links,
        "rounds": rounds,
        "samples": Samples(
            of_epoch=5000, total=25_000, done=13_000, partly=40, skipped=12, leased=192, returned=64
        ),
        "events": (
            Event(
                kind=EventKind.JOINED,
                step=0,
                at=at - 40,
                text="worker 1 (mini1) is here",
                machine=1,
            ),
            Event(
                kind=EventKind.SNAPSHOT,
                step=210,
                at=at - 30,
                text="worker 3 took a snapshot",
                machine=3,
            ),
            Event(kind=EventKind.CHECKPOINT, step=500, at=at - 15, text="step-00000500"),
            Event(
                kind=EventKind.GONE, step=640, at=at - 9, text="worker 2 (mini2) is gone", machine=2
            ),
        ),
        "lines": (
            LogLine(at=at - 41, text="server at 127.0.0.1:65432"),
            LogLine(at=at - 40, text="worker 1 (mini1) is here"),
            LogLine(
                at=at - 2, text="round 812 closed with 2 of 3: worker 3 (pi3) late", warning=True
            ),
        ),
        "settings": {"batch_size": "64", "dataset.name": "digits", "num_workers": str(workers)},
        "diagnosis": Diagnosis(
            cause=Cause.LATE,
            sentence=f"worker {workers} (pi{workers}) is late in 40 % of the rounds: "
            "without it 1.4 times faster",
            machine=workers,
        ),
    }
    return Status(**(known | changed))


def write_metrics(path: Path, steps: int = 812, every: int = 1, workers: int = 3) -> None:
    """A metrics.jsonl of so many lines, each of `every` steps, with an evaluation at each
    hundredth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for at in range(1, steps + 1):
            step = at * every
            loss = 2.3 * math.exp(-at / (steps / 4)) + 0.2 + 0.1 * math.sin(at * 12.9898)
            line = {"step": step, "seconds": at * 0.04, "loss": loss, "samples": 32 * workers}
            late = [workers] if at % 5 == 0 else []
            line |= {"step_s": 0.04, "workers": [1], "late": late}
            file.write(json.dumps({**line, "sent_bytes": at, "received_bytes": at}) + "\n")
            if at % 100 == 0:
                share = 1 - math.exp(-at / (steps / 4))
                told = {"step": step, "seconds": at * 0.04, "val_loss": loss + 0.1}
                file.write(json.dumps({**told, "val_accuracy": 0.1 + 0.85 * share}) + "\n")


def earlier_run(run_dir: Path, name: str = "2026-11-21_10-00-00", steps: int = 600) -> None:
    """The folder of a run that is over."""
    write_metrics(run_dir / name / "metrics.jsonl", steps)
    summary = {"steps": steps, "samples_per_s": 17_000.5, "val_accuracy": 0.91, "end": "done"}
    (run_dir / name / "summary.json").write_text(json.dumps(summary))
    record = {"run": "r", "host": "h", "port": 1, "settings": {"model": {"type": "SimpleNN"}}}
    (run_dir / name / "run.json").write_text(json.dumps({**record, "ended": True}))


class Served:
    """A page that is served by threads of this process, as the page's own process does."""

    def __init__(self, run_dir: Path, secret: bytes | None = None, port: int = 0) -> None:
        self.board, self.folder = Board(), run_dir / RUN
        self._tail = Tail(self.folder / "metrics.jsonl")
        listening = socket.create_server(("127.0.0.1", port))
        self.web = Web(listening, self.board, run_dir, RUN, secret)
        self.url = f"http://127.0.0.1:{self.web.port}"
        threading.Thread(target=self.web.serve_forever, args=(0.05,), daemon=True).start()

    def show(self, state: Status) -> None:
        while self.board.read(self._tail):
            pass
        self.board.show(state)

    def close(self, why: str = "the run is over") -> None:
        self.board.close(why)
        self.board.everybody_left(5.0)
        self.web.shutdown()
        self.web.server_close()


@contextmanager
def served(run_dir: Path, secret: bytes | None = None, port: int = 0) -> Iterator[Served]:
    page = Served(run_dir, secret, port)
    try:
        yield page
    finally:
        page.close()
