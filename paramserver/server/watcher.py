"""Shows a run and writes its files while it goes on, for the server's program."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from typing import Any

import msgspec

from paramserver import logs, notify
from paramserver.fleet.plan_watch import PlanWatch
from paramserver.net.mdns import Announcement
from paramserver.output import metrics
from paramserver.output.display import Display, Status, WorkerStatus
from paramserver.output.problems import Problems
from paramserver.output.runfolder import EvalLine, RunFolder, StepLine
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import optimizer_steps
from paramserver.rounds.round import Tally
from paramserver.server.control import Control
from paramserver.server.observer_process import ObserverProcess
from paramserver.settings import Settings

log = logging.getLogger("paramserver")
LOSSES_KEPT = 100
RATE_S = 3.0


class Above(logging.Handler):
    """Shows each record as a line above the drawing."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.say(record.getMessage(), record.levelno >= logging.WARNING)


class Show:
    """The server's watcher: display and run folder."""

    def __init__(
        self, settings: Settings, folder: RunFolder, plan_watch: PlanWatch | None = None
    ) -> None:
        self.settings = settings
        self.folder = folder
        self._plan_watch = plan_watch
        self.display = Display(plain=settings.plain)
        logs.show("paramserver", Above(self.display))
        self.losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)  # (samples, loss)
        self.val: dict[str, float | None] = {}  # of the newest evaluation, of the following step
        self.val_step: int | None = None
        self.problems = Problems()
        self._take_up()
        self._marks: deque[tuple[float, int, int, dict[int, int]]] = deque()  # for the rates
        self._late = ""
        self._step: int | None = None  # of the last close
        self.observer: ObserverProcess | None = None
        self.announcement: Announcement | None = None

    def _take_up(self, before: float = math.inf) -> None:
        """Continue from the run's folder, with its steps before `before`."""
        self.past = self.folder.take_up(before)
        self.samples, self.steps = self.past.samples, self.past.steps

    def say(self, text: str, warning: bool = False) -> None:
        log.log(logging.WARNING if warning else logging.INFO, text)

    def problem(self, text: str) -> None:
        """Show a problem that did not end the run, and keep it for summary.json."""
        if self.problems.note(text):
            self.say(text, warning=True)

    def tell(self, problem: str | None) -> None:
        """A problem, if there is one."""
        if problem is not None:
            self.problem(problem)

    def closing(self, close: wire.Close) -> None:
        self.tell(self.folder.note(close.step, close.lineage))

    def closed(self, control: Control, close: wire.Close) -> None:
        if self.past.last is not None and self._step is None:
            self._compare(self.past.last.log_step, close.step)
        step = optimizer_steps(close.ledger, close.step)
        samples = sum(close.contributors.values())
        self.samples += samples
        self.steps += close.local_steps if self._step is None else step - self._step
        self._step = step
        if close.loss is not None:
            self.losses.append((samples, close.loss))
        if close.reason:
            self._late = close.reason
        elif not close.late:
            self._late = ""
        sent_bytes, received_bytes = self.traffic(control)
        self.folder.log(
            StepLine(
                step=step,
                seconds=self._seconds(control),
                loss=close.loss,
                samples=samples,
                step_s=close.seconds,
                workers=tuple(close.contributors),
                late=tuple(close.late),
                sent_bytes=sent_bytes,
                received_bytes=received_bytes,
                shares=tuple(close.contributors.values()),
                update=msgspec.UNSET if step == close.step else close.step,
            )
        )
        now = time.monotonic()
        self.tell(self.folder.flush(now))  # a server may be killed at any time
        if self._plan_watch is not None:
            workers = len(close.contributors)
            slow = self._plan_watch.closed(workers, samples, close.seconds, now)
            if slow is not None:
                self.say(slow, warning=True)

    def _compare(self, noted: int, first: int) -> None:
        """Compare the last step in a killed server's metrics with the first one of this server."""
        if first <= noted:
            self.tell(f"lost: steps {first} to {noted}, nobody who had seen them came back")
            self._take_up(first)
        elif first > noted + 1:
            self.tell(
                f"metrics.jsonl lacks steps {noted + 1} to {first - 1}: the server was killed"
            )

    def reported(self, control: Control, report: wire.Report) -> None:
        self.val, self.val_step = report.values, report.step
        line = EvalLine(
            step=report.step,
            seconds=self._seconds(control),
            val_loss=report.values.get("val_loss"),
            **metrics.fields(metrics.reported(report.values)),
        )
        if not report.final:
            self.folder.log(line)

    def looked(self, control: Control, now: float) -> None:
        self.tell(self.folder.flush(now))
        if self.observer is not None:
            self.observer.look(control)
        if self.announcement is not None:
            self.tell(self.announcement.problem())
        if self.display.due(now):
            status = self._status(control, now)
            self.display.update(status, now)
            if notify.is_watched():
                notify.show(msgspec.json.encode(status))

    def train_loss(self) -> float | None:
        """Sample-weighted mean over the newest steps."""
        weight = sum(n for n, _ in self.losses)
        return sum(n * loss for n, loss in self.losses) / weight if weight else None

    def traffic(self, control: Control) -> tuple[int, int]:
        """Bytes sent and received in the whole run."""
        last = self.past.last
        before = (last.sent_bytes, last.received_bytes) if last is not None else (0, 0)
        return before[0] + control.sent_bytes, before[1] + control.received_bytes

    def seconds(self, control: Control, now: float) -> float:
        """Seconds of the whole run: since its first round was opened, without the time without a
        server."""
        before = self.past.last.seconds if self.past.last is not None else 0.0
        return before + (now - control.first_open_at if control.first_open_at is not None else 0.0)

    def tallies(self, control: Control) -> dict[int, Tally]:
        """Each worker's rounds and samples in the whole run. The host is unknown for a worker that
        did not come back to a server that was started again."""
        tallies = {i: Tally("", *counts) for i, counts in self.past.workers.items()}
        for i, own in control.rounds.tallies.items():
            before = tallies.get(i, Tally(""))
            tallies[i] = Tally(
                own.host,
                before.rounds + own.rounds,
                before.samples + own.samples,
                before.late + own.late,
            )
        return tallies

    def _seconds(self, control: Control) -> float:
        return self.seconds(control, time.monotonic())

    def _status(self, control: Control, now: float) -> Status:
        r = control.rounds
        per_worker = {i: t.samples for i, t in r.tallies.items()}
        self._marks.append((now, self.steps, self.samples, per_worker))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_S:
            self._marks.popleft()
        since, steps, samples, shares = self._marks[0]
        seconds = now - since
        ledger = r.ledger
        members = max(1, len(r.workers_ready()))
        left = None
        if ledger is not None and ledger.samples:  # else the number of samples is not known
            undone = ledger.total - ledger.counted
            left = -(-undone // (self.settings.batch_size * members))
        rate = (self.steps - steps) / seconds if seconds > 0 else None
        workers = [
            WorkerStatus(
                id=p.id,
                host=p.host,
                samples_per_s=(per_worker.get(p.id, 0) - shares.get(p.id, 0)) / seconds
                if seconds > 0
                else None,
                trouble=_trouble(p, r.round, now),
                share=r.share_of(p.id) if self.settings.shares == "speed" else None,
            )
            for p in sorted(r.peers.values(), key=lambda p: p.id)
            if p.role == "worker"
        ]
        return Status(
            phase=r.phase(now),
            step=r.optimizer_steps,
            total_steps=r.optimizer_steps + left if left is not None else None,
            epoch=min(ledger.epochs, ledger.counted // ledger.samples + 1)
            if left is not None and ledger is not None
            else None,
            num_epochs=self.settings.num_epochs,
            loss=self.train_loss(),
            metrics=metrics.reported(self.val),
            val_step=self.val_step,
            steps_per_s=rate,
            samples_per_s=(self.samples - samples) / seconds if seconds > 0 else None,
            eta_s=left / rate if left is not None and rate else None,
            workers=workers,
            late=self._late,
            shares_of="step" if self.settings.local_steps == 1 else "round",
            trains=r.doing(now) == wire.Phase.TRAINING,
        )


def _trouble(peer: Any, current: Any, now: float) -> str:
    silent = now - peer.last_seen
    if silent > 3:
        return f"silent for {silent:.1f} s"
    if peer.ready is None:
        return "joining"
    if current is not None and current.quorum_at is not None and now - current.quorum_at > 0.5:
        member = current.members.get(peer.id)
        if member is not None and member.out is None and len(member.got) == 0:
            return f"late {now - current.quorum_at:.1f} s"
    return ""
