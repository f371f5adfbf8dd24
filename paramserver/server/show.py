"""Shows a run and writes its files while it goes on, for the server's program."""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from paramserver import logs, notify
from paramserver.config import schedule
from paramserver.fleet.plan_watch import PlanWatch
from paramserver.net import machine
from paramserver.net.mdns import Announcement
from paramserver.output import metrics
from paramserver.output.display import Display
from paramserver.output.problems import Problems
from paramserver.output.runfolder import EvalLine, RunFolder, StepLine
from paramserver.output.serverlog import ServerLog
from paramserver.page.process import Page
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import optimizer_steps
from paramserver.rounds.looks import DataSet
from paramserver.rounds.round import Tally
from paramserver.server.control import Control
from paramserver.server.observer_process import ObserverProcess
from paramserver.server.overview import Overview, Totals
from paramserver.settings import Settings
from paramserver.status.value import Cause, Diagnosis, Event, EventKind, Status, to_json

log = logging.getLogger("paramserver")
LOSSES_KEPT = 100
STATUS_S = 0.2  # between two statuses
LOOK_S = 2.0  # between looks at this machine and the run's folder


class Above(logging.Handler):
    """Shows each record as a line above the drawing, and to those who watch."""

    def __init__(self, display: Display, overview: Overview) -> None:
        super().__init__()
        self._display, self._overview = display, overview

    def emit(self, record: logging.LogRecord) -> None:
        text, warning = record.getMessage(), record.levelno >= logging.WARNING
        self._display.say(text, warning)
        self._overview.said(text, time.time(), warning=warning)


class Show:
    """The display and the run folder of one run."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        plan_watch: PlanWatch | None = None,
        run: str = "",
        kind_of: Callable[[str], str] = lambda address: "",
        trial: int = 1,
    ) -> None:
        """`kind_of`, `trial`: see `Overview`."""
        self.settings = settings
        self.folder = folder
        self._plan_watch = plan_watch
        self.display = Display(plain=settings.plain)
        host = socket.gethostname()
        kept = ServerLog(folder.server_log)
        self.overview = Overview(settings, run, folder.path.name, host, kind_of, trial, kept.add)
        self._checkpoints: set[str] = set()
        for entry in kept.take_up():
            self.overview.recall(entry)
            if isinstance(entry, Event) and entry.kind == EventKind.CHECKPOINT:
                self._checkpoints.add(entry.text)
        self._status: tuple[float, Status] | None = None  # with the time when it was made
        self._look_at = -math.inf
        self._vitals: wire.Vitals | None = None
        logs.show("paramserver", Above(self.display, self.overview))
        self.losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)  # (samples, loss)
        self.val: dict[str, float | None] = {}  # of the newest evaluation, of the following step
        self.val_step: int | None = None
        self.problems = Problems()
        self._take_up()
        self._late = ""
        self._soon: deque[str] = deque()
        self._step: int | None = None  # of the last close
        self._data_set: DataSet | None = None  # as it was noted
        self.observer: ObserverProcess | None = None
        self.announcement: Announcement | None = None
        self.page: Page | None = None
        self.diagnosis: Diagnosis | None = None  # of the newest minute of training

    def _take_up(self, before: float = math.inf) -> None:
        """Continue from the run's folder, with its steps before `before`."""
        self.past = self.folder.take_up(before)
        self.samples, self.steps = self.past.samples, self.past.steps

    def say(self, text: str, warning: bool = False) -> None:
        log.log(logging.WARNING if warning else logging.INFO, text)

    def say_soon(self, text: str) -> None:
        """The same for a signal handler, which may come in the middle of a line."""
        self._soon.append(text)

    def problem(self, text: str) -> None:
        """Show a problem that did not end the run, and keep it for summary.json."""
        if self.problems.note(text):
            self.say(text, warning=True)

    def tell(self, problem: str | None) -> None:
        """A problem, if there is one."""
        if problem is not None:
            self.problem(problem)

    def closing(self, control: Control, close: wire.Close) -> None:
        if control.rounds.data_set is not self._data_set:
            self._data_set = control.rounds.data_set
            self.tell(self.folder.note_data_set(self._data_set))
        self.tell(self.folder.note(close.step, close.lineage))

    def closed(self, control: Control, close: wire.Close) -> None:
        if self.past.last is not None and self._step is None:
            self._compare(self.past.last.log_step, close.step)
        if self._step is None and schedule.known_samples(self.settings) is None:
            ledger = control.rounds.ledger
            if short := schedule.too_short(self.settings, ledger.samples if ledger else None):
                self.say(short, warning=True)
        step = optimizer_steps(close.ledger, close.step)
        samples = sum(close.contributors.values())
        self.samples += samples
        self.steps += close.local_steps if self._step is None else step - self._step
        self._step = step
        if close.loss is not None:
            self.losses.append((samples, close.loss))
        self.overview.closed(step, close.loss)
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
            slow = self._plan_watch.closed(workers, samples, close.seconds, now, close.local_steps)
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
        self.overview.evaluated(
            report.step, report.values.get("val_loss"), metrics.reported(report.values)
        )
        line = EvalLine(
            step=report.step,
            seconds=self._seconds(control),
            val_loss=report.values.get("val_loss"),
            **metrics.fields(metrics.reported(report.values)),
        )
        if not report.final:
            self.folder.log(line)

    def looked(self, control: Control, now: float) -> None:
        while self._soon:
            self.say(self._soon.popleft())
        self.tell(self.folder.flush(now))
        if self.observer is not None:
            self.observer.look(control)
        if self.announcement is not None:
            self.tell(self.announcement.problem())
        if self.page is not None:
            self.page.look(now)
        if self.display.due(now):
            status = self.status(control, now)
            self.display.update(status, now)
            if notify.is_watched():
                notify.show(to_json(status))

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

    def status(self, control: Control, now: float) -> Status:
        """The status of the run, made anew where the last one is not of this moment."""
        ended = control.rounds.ended is not None and not (self._status and self._status[1].end)
        if self._status is None or ended or now - self._status[0] >= STATUS_S:
            self._look_around(now)
            sent_bytes, received_bytes = self.traffic(control)
            tallies = self.tallies(control)
            totals = Totals(
                steps=self.steps,
                samples=self.samples,
                seconds=self.seconds(control, now),
                sent_bytes=sent_bytes,
                received_bytes=received_bytes,
                loss=self.train_loss(),
                tallies={i: (t.rounds, t.samples, t.late) for i, t in tallies.items()},
            )
            made = self.overview.status(
                control.rounds, totals, control.traffic, self._vitals, self._late, now, time.time()
            )
            self._status = now, made
            if made.diagnosis.cause not in (Cause.UNKNOWN, Cause.NOT_TRAINING):
                self.diagnosis = made.diagnosis
        return self._status[1]

    def status_json(self, control: Control, now: float) -> bytes:
        """The same for those who watch."""
        return to_json(self.status(control, now))

    def _look_around(self, now: float) -> None:
        """Now and then: memory and temperature here, and new checkpoints."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        self._vitals = machine.vitals()
        with suppress(OSError):
            there = {path.name for path in self.folder.checkpoints.glob("step-*.safetensors")}
            for name in sorted(there - self._checkpoints):
                step = int("".join(filter(str.isdigit, name)) or 0)
                self.overview.event(EventKind.CHECKPOINT, step, time.time(), name)
            self._checkpoints = there
