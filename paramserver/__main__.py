"""`python -m paramserver learning_rate=0.01`: the server, and the observer beside it."""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from zmq.utils import z85

from paramserver import paths, runfolder, stored, terminal, trace, wire
from paramserver.address import LOOPBACK, listen
from paramserver.bucket import BUCKET_MB, LINKED_BUCKET_MB
from paramserver.config import exit_on_user_error, from_wire, load, save, to_wire
from paramserver.discover import Announcement
from paramserver.display import Display, Status, WorkerStatus
from paramserver.errors import UserError
from paramserver.fleet import machine
from paramserver.fleet.keeper import MARK
from paramserver.keys import load_or_make
from paramserver.keys import path as keys_path
from paramserver.members import Tally
from paramserver.problems import Problems
from paramserver.runfolder import EvalLine, Record, RunFolder, StepLine, Unended
from paramserver.server import Server
from paramserver.settings import Settings
from paramserver.sockets import allow_connections, is_loopback

OBSERVER_RESTARTS = 3
OBSERVER_PROVEN_S = 60.0  # one that ran for so long is started again as if it was the first
OBSERVER_PATIENCE_S = 90.0
OBSERVER_PAUSE_S = 5.0  # until it is tried again to make its process
LOG_LINES, LOG_BYTES = 5, 4096  # of the observer's log, to say why it ended
MISSING = 3  # exit code
LOSSES_KEPT = 100
PERSON_S = 30.0  # to a question at the start; the workers wait longer for their server
RATE_S = 3.0


class Show:
    """The server's watcher: display and run folder."""

    def __init__(self, settings: Settings, folder: RunFolder) -> None:
        self.settings = settings
        self.folder = folder
        self.display = Display(plain=settings.plain)
        self.losses: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)  # (samples, loss)
        self.val: dict[str, float | None] = {}  # of the newest evaluation, which was of this step:
        self.val_step: int | None = None
        self.problems = Problems()
        self._take_up()
        self._marks: deque[tuple[float, int, int, dict[int, int]]] = deque()  # for the rates
        self._late = ""
        self.observer: ObserverProcess | None = None
        self.announcement: Announcement | None = None

    def _take_up(self, before: float = math.inf) -> None:
        """Go on with what the run's folder tells of its steps before this one."""
        self.past = self.folder.take_up(before)
        self.samples, self.steps = self.past.samples, self.past.steps

    def say(self, text: str, warning: bool = False) -> None:
        self.display.say(text, warning)

    def problem(self, text: str) -> None:
        """Something was not done that people count on: say it, and keep it for summary.json."""
        if self.problems.note(text):
            self.say(text, warning=True)

    def tell(self, problem: str | None) -> None:
        """A problem, if there is one."""
        if problem is not None:
            self.problem(problem)

    def closing(self, close: wire.Close) -> None:
        self.tell(self.folder.note(close.step, close.lineage))

    def closed(self, server: Server, close: wire.Close) -> None:
        if self.past.last is not None and self.steps == self.past.steps:
            self._compare(self.past.last.step, close.step)
        samples = sum(close.contributors.values())
        self.samples += samples
        self.steps += 1
        if close.loss is not None:
            self.losses.append((samples, close.loss))
        if close.reason:
            self._late = close.reason
        elif not close.late:
            self._late = ""
        sent_bytes, received_bytes = self.traffic(server)
        self.folder.log(
            StepLine(
                step=close.step,
                seconds=self._seconds(server),
                loss=close.loss,
                samples=samples,
                step_s=close.seconds,
                workers=tuple(close.contributors),
                late=tuple(close.late),
                sent_bytes=sent_bytes,
                received_bytes=received_bytes,
                shares=tuple(close.contributors.values()),
            )
        )
        self.tell(
            self.folder.flush(time.monotonic())
        )  # at once: a server may be killed at any time

    def _compare(self, noted: int, first: int) -> None:
        """The last step in a killed server's metrics, and the first one of this server."""
        if first <= noted:
            self.tell(f"lost: steps {first} to {noted}, nobody who had seen them came back")
            self._take_up(first)
        elif first > noted + 1:
            self.tell(
                f"metrics.jsonl lacks steps {noted + 1} to {first - 1}: the server was killed"
            )

    def reported(self, server: Server, report: wire.Report) -> None:
        self.val, self.val_step = report.values, report.step
        line = EvalLine(
            step=report.step,
            seconds=self._seconds(server),
            val_loss=report.values.get("val_loss"),
            val_accuracy=report.values.get("val_accuracy"),
            metrics=_metrics(report.values),
        )
        if not report.final:
            self.folder.log(line)

    def looked(self, server: Server, now: float) -> None:
        self.tell(self.folder.flush(now))
        if self.observer is not None:
            self.observer.look(server)
        if self.announcement is not None:
            self.tell(self.announcement.problem())
        if self.display.due(now):
            self.display.update(self._status(server, now), now)

    def train_loss(self) -> float | None:
        """Sample-weighted mean over the newest steps."""
        weight = sum(n for n, _ in self.losses)
        return sum(n * loss for n, loss in self.losses) / weight if weight else None

    def traffic(self, server: Server) -> tuple[int, int]:
        """Bytes sent and received in the whole run."""
        last = self.past.last
        before = (last.sent_bytes, last.received_bytes) if last is not None else (0, 0)
        return before[0] + server.sent_bytes, before[1] + server.received_bytes

    def seconds(self, server: Server, now: float) -> float:
        """Of the whole run: since its first round was opened, but for the time without a server."""
        before = self.past.last.seconds if self.past.last is not None else 0.0
        return before + (now - server.first_open_at if server.first_open_at is not None else 0.0)

    def tallies(self, server: Server) -> dict[int, Tally]:
        """What each worker did in the whole run. Of one that did not come back to a server that was
        started again, the host is not known."""
        tallies = {i: Tally("", *counts) for i, counts in self.past.workers.items()}
        for i, own in server.rounds.tallies.items():
            before = tallies.get(i, Tally(""))
            tallies[i] = Tally(
                own.host,
                before.rounds + own.rounds,
                before.samples + own.samples,
                before.late + own.late,
            )
        return tallies

    def _seconds(self, server: Server) -> float:
        return self.seconds(server, time.monotonic())

    def _status(self, server: Server, now: float) -> Status:
        r = server.rounds
        per_worker = {i: t.samples for i, t in r.tallies.items()}
        self._marks.append((now, self.steps, self.samples, per_worker))
        while len(self._marks) > 2 and now - self._marks[1][0] > RATE_S:
            self._marks.popleft()
        since, steps, samples, shares = self._marks[0]
        seconds = now - since
        ledger = r.ledger
        members = max(1, len(r.workers_ready()))
        left = None
        if ledger is not None and ledger.samples:  # else nobody knows how many will come
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
            )
            for p in sorted(r.peers.values(), key=lambda p: p.id)
            if p.role == "worker"
        ]
        return Status(
            phase=r.phase(now),
            step=r.step,
            total_steps=r.step + left if left is not None else None,
            epoch=min(ledger.epochs, ledger.counted // ledger.samples + 1)
            if left is not None and ledger is not None
            else None,
            num_epochs=self.settings.num_epochs,
            loss=self.train_loss(),
            val_accuracy=self.val.get("val_accuracy"),
            metrics=_metrics(self.val),
            val_step=self.val_step,
            steps_per_s=rate,
            samples_per_s=(self.samples - samples) / seconds if seconds > 0 else None,
            eta_s=left / rate if left is not None and rate else None,
            workers=workers,
            late=self._late,
        )


def _metrics(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """What an observer told beside loss and accuracy, by its name."""
    known = ("val_loss", "val_accuracy")
    return {name.removeprefix("val_"): v for name, v in values.items() if name not in known}


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


class ObserverProcess:
    """The observer beside the server: started, looked after, started again when it dies."""

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        run: str,
        key: str,
        resume: Path | None,
        problem: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._problem = problem
        self._orders = {
            "host": LOOPBACK,
            "port": settings.port,
            "key": key,
            "run": run,
            "folder": str(folder.path),
            "settings": asdict(settings),
            "resume": None if resume is None else str(resume),
        }
        self._deaths = 0  # in a row, but for what ran well in between
        self._started_at = 0.0
        self._again_at = 0.0  # not before: there was no room for a process
        self._here_at: float | None = None  # when this process was last known to the server
        self.problem: UserError | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._started_at, self._here_at = time.monotonic(), None
        with self._open_log() as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers.observe"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the server, which tells its observer
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it may die at once; `look` tells
            process.stdin.write(msgspec.json.encode(self._orders) + b"\n")
            process.stdin.flush()  # and stays open: its end tells that the server is gone
        return process

    def _open_log(self) -> BinaryIO:
        try:
            return open(self._log, "ab")
        except OSError as error:
            self._problem(f"{self._log} cannot be written, the observer runs without: {error}")
            return open(os.devnull, "ab")

    def look(self, server: Server) -> None:
        """Has it ended? Then start it again, or end the run where that cannot help."""
        now, ended = time.monotonic(), server.rounds.ended is not None
        if self._process is None:
            awaited = server.rounds.coming_back  # those who hold the run come first
            if not awaited and not ended and self.problem is None and now >= self._again_at:
                self._begin(server, now)
            return
        here = server.rounds.observer
        if here is not None and here.pid == self._process.pid:  # not of one that is dead
            self._here_at = now
        elif server.rounds.ending and not ended and self._hangs(now, server):
            server.watcher.say("the observer does not answer: it is ended", True)
            self._process.kill()
            self._process.wait()
        code = self._process.poll()
        server.rounds.observer_comes = code is None
        if code is None or ended or self.problem is not None:
            return
        well = now - self._started_at > OBSERVER_PROVEN_S
        self._deaths = 1 if well else self._deaths + 1
        if code == 2:
            self._cannot(server, "the observer could not start", _last_error(self._log))
        elif self._deaths > OBSERVER_RESTARTS:
            why = f"the observer ended {self._deaths} times in a row, the last time {_how(code)}"
            last_chance = server.rounds.log_begun and server.rounds.ending is None
            self._cannot(
                server, "the observer cannot be kept running", (why, _last_lines(self._log))
            )
            if last_chance:  # workers hold the last step until the end: one more, to keep that
                self._begin(server, now)
        else:
            server.watcher.say(f"the observer ended ({_how(code)}): starting it again", True)
            self._begin(server, now)

    def _begin(self, server: Server, now: float) -> None:
        """Start a process; where the system has no room for one, try again in a while."""
        if server.rounds.log_begun:
            self._orders["resume"] = None  # others hold what follows: it takes a snapshot
        server.rounds.observer_comes = True
        try:
            self._process = self._start()
        except OSError as error:  # no memory, or too many processes
            self._process, self._again_at = None, now + OBSERVER_PAUSE_S
            self._deaths += 1
            why = f"the observer cannot be started: {error.strerror or error}"
            if self.problem is None and self._deaths <= OBSERVER_RESTARTS:
                server.watcher.say(f"{why}: trying again", True)
                return
            server.rounds.observer_comes = False
            if self.problem is None:
                self._cannot(server, why, (why, "end other programs, or use observer=false"))

    def _hangs(self, now: float, server: Server) -> bool:
        """Was it there, and is silent for so long that the last step is not left to it?"""
        silence = server.settings.heartbeat_timeout
        return self._here_at is not None and now - self._here_at > silence

    def _cannot(self, server: Server, reason: str, problem: tuple[str, str]) -> None:
        """No observer can be had: the run ends, or goes on ending without it."""
        self.problem = UserError(*problem)
        self._problem(f"{reason}: {problem[0]}")
        server.stop(reason, error=True)

    @property
    def _log(self) -> Path:
        return self._folder.observer_log

    def finish(self) -> None:
        """Wait for its end, which may take its loggers' last upload; kill it after that."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        # A thread wakes up when it ends; `wait` with a limit looks again and again instead.
        waiting = threading.Thread(target=self._process.wait, name="observer's end", daemon=True)
        waiting.start()
        waiting.join(OBSERVER_PATIENCE_S)
        if waiting.is_alive():
            self._process.kill()
            waiting.join()


def _last_error(log: Path) -> tuple[str, str]:
    """Problem and hint that an observer printed before it exited with code 2."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    if not starts:
        return "the observer could not start", f"see {log}"
    first = lines[starts[-1]].removeprefix("error: ")
    return first, "\n".join(line.strip() for line in lines[starts[-1] + 1 :])


def _how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    memory = ", perhaps since memory was short" if -code == signal.SIGKILL else ""
    return f"exit code {code}: {name}{memory}"


def _last_lines(log: Path) -> str:
    """The end of an observer's log, as a hint."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        lines = []
    told = [line.rstrip() for line in lines if line.strip()][-LOG_LINES:]
    return "\n".join([*told, f"see {log}"])


def summarize(server: Server, show: Show, end: wire.End) -> dict[str, Any]:
    """What summary.json holds. Figures of an evaluation stand there only if it was of the last
    step; `last_evaluation` has the newest one with its own step."""
    seconds = show.seconds(server, server.closed_at or server.first_open_at or 0.0)
    sent_bytes, received_bytes = show.traffic(server)
    ledger = server.rounds.ledger
    values = show.val if show.val_step == end.step else {}
    tallies = show.tallies(server)
    digests = {name: d for name, (step, d) in server.digests.items() if step == end.step}
    reference = digests.get("the observer") or next(iter(digests.values()), None)
    return {
        "steps": end.step,
        "samples": show.samples,
        "seconds": seconds,
        "steps_per_s": show.steps / seconds if seconds else None,
        "samples_per_s": show.samples / seconds if seconds else None,
        "val_accuracy": values.get("val_accuracy"),
        "val_loss": values.get("val_loss"),
        "metrics": _metrics(values),
        "last_evaluation": None if show.val_step is None else {"step": show.val_step, **show.val},
        "train_loss": show.train_loss(),
        "workers": len(tallies),
        "sent_bytes": sent_bytes,
        "received_bytes": received_bytes,
        "digest": reference,
        "replicas_equal": len(set(digests.values())) == 1 if len(digests) > 1 else None,
        "digests": digests,
        "samples_done": ledger.done if ledger else 0,
        "samples_partly": ledger.partly if ledger else 0,
        "samples_skipped": ledger.skipped if ledger else 0,
        "samples_lost": server.rounds.lost_by_name(),
        "per_worker": [
            {"id": i, "host": t.host, "samples": t.samples, "rounds": t.rounds, "late": t.late}
            for i, t in sorted(tallies.items())
        ],
        "end": end.reason,
        "problems": show.problems.all(),
        "run": server.run_id,
    }


def serve(settings: Settings) -> int:
    """Run a server with its observer to the end of the run; the exit code.

    Where the newest run of this port has not ended (its server was killed) and has the same
    settings, it goes on, if anybody comes back to it.
    """
    trace.begin("server")
    allow_connections()
    host_ip, chosen = machine.settle(settings)
    hosts, guarded = listen(host_ip, settings.security)
    linked = not all(map(is_loopback, (*hosts, *guarded)))
    default = LINKED_BUCKET_MB if linked else BUCKET_MB
    settings = replace(settings, bucket_mb=settings.bucket_mb or default)
    at = Listening(hosts, guarded, chosen)
    parent, told = Path(settings.run_dir), to_wire(settings)
    here = Record(
        run=secrets.token_hex(8),
        host=socket.gethostname(),
        port=settings.port,
        settings=told,
        host_ip=settings.host_ip,
        machine=machine.identity(),
    )
    resume, before, said = None, None, ""
    if settings.resume is not None:
        if not settings.observer:
            raise UserError(
                f"resume={settings.resume} with observer=false: nobody would load the checkpoint",
                "the observer does that: leave observer=false out, or load the checkpoint in your "
                "own script before attach()",
            )
        resume = runfolder.find_checkpoint(settings.resume, parent)
    else:
        before = runfolder.unended(parent, settings.port, told, settings.host_ip)
    if before is not None:
        as_it_is, said = _going_on(before, settings)
        if as_it_is is not None:
            record = msgspec.structs.replace(
                before.record, host=here.host, host_ip=here.host_ip, machine=here.machine
            )
            code = _serve(as_it_is, at, before.folder, record, comeback=True)
            if code is not None:
                return code
        before.folder.close()
    folder = RunFolder.create(parent, datetime.now())
    record = msgspec.structs.replace(here, number=folder.number)
    code = _serve(settings, at, folder, record, resume=resume, said=said)
    assert code is not None
    return code


def _going_on(before: Unended, settings: Settings) -> tuple[Settings | None, str]:
    """The settings to go on with it, None for a new run; and what is to be said of it then.

    Where it is only nearly the run that was asked for a person decides, if one is there.
    """
    if not before.differs:
        return settings, ""
    path, port = before.folder.path, before.record.port
    said = f"{path} has not ended, and is nearly this run: {', '.join(before.differs)}"
    rest = f"a new run begins; resume={path} would go on from its last checkpoint"
    try:
        as_it_is = replace(from_wire(settings, before.record.settings), port=port)
    except UserError:  # of another version
        return None, f"{said}; {rest}"
    if not settings.plain and terminal.somebody_answers():
        terminal.say(said)
        question = f"go on with it as it is there, y, or begin a new run, N ({PERSON_S:g} s)? "
        return (as_it_is, "") if terminal.asked(question, PERSON_S) else (None, rest)
    return None, f"{said}; started with that it would go on, {rest}"


@dataclass(frozen=True)
class Listening:
    """Where a server listens: for all, and for holders of its keys only; why, if it chose."""

    hosts: list[str]
    guarded: list[str]
    why: str


def _serve(
    settings: Settings,
    at: Listening,
    folder: RunFolder,
    record: Record,
    *,
    resume: Path | None = None,
    comeback: bool = False,
    said: str = "",
) -> int | None:
    """Run the server of one run; None where it was to go on and nobody came back to it. `said`:
    what is to be told of another run."""
    hosts, guarded = at.hosts, at.guarded
    keys, new_keys = None, False
    show = Show(settings, folder)
    noted = folder.noted() if comeback else None
    run, key = record.run, secrets.token_hex(16)
    try:
        if guarded:
            keys, new_keys = load_or_make()
        server = Server(
            settings, record.settings, show,
            hosts=hosts, run=run, observer_key=key, comeback=noted,
            guarded=guarded, keys=None if keys is None else keys.for_server(),
            paths=paths.read(os.environ),
        )  # fmt: skip
    except UserError:
        folder.close()
        if not comeback:
            folder.path.rmdir()  # nothing is in it
        raise
    for number in terminal.ending_signals():
        signal.signal(number, lambda n, _: _stop(server, n))
    observer = None
    try:
        if not comeback:
            _save_config(settings, folder)
        folder.remember(folder.config)
        show.tell(folder.write_record(record))
        show.tell(folder.open_note())
        where = ", ".join(f"{h}:{settings.port}" for h in (*hosts, *guarded))
        if said:
            show.say(said, warning=True)
        if at.why:
            show.say(at.why)
        show.say(f"server at {where}, run folder {folder.path}")
        if keys is not None:
            if new_keys:
                show.say(f"made the keys of this cluster: {keys_path()}")
            if MARK in os.environ:  # the workers have it from `make up`, and a log is a file
                command = f"make keys host_ip={guarded[0]}"
                show.say(f"the join token, for further machines: {command}, in {Path.cwd()}")
            else:
                token = keys.token(guarded[0], settings.port)
                show.say(f"other machines join with: {_join_command(token)}")
        elif exposed := [h for h in hosts if not is_loopback(h)]:
            show.say(
                f"security=none: whoever reaches {', '.join(exposed)} can read the model and "
                "spoil the training"
            )
        if comeback:
            show.say(
                "this run has not ended: waiting for its replicas to come back "
                f"(a new one begins if nobody does in {settings.heartbeat_timeout:g} s)"
            )
        public = None if keys is None else z85.decode(keys.for_server().public)
        show.announcement = Announcement(guarded or hosts, settings.port, run, public)
        if settings.observer:
            observer = show.observer = ObserverProcess(
                settings, folder, run, key, resume, show.problem
            )
            observer.look(server)
        end = server.run()
    finally:
        server.close()
        if show.announcement is not None:
            show.announcement.close()
        if observer is not None:
            observer.finish()
        show.tell(folder.close())
        show.display.close() if sys.exc_info()[0] else None
    if server.rounds.put_off:
        show.say("stopped before the run went on: its workers wait, start the server again")
        show.display.close()
        return 1
    show.tell(folder.write_record(msgspec.structs.replace(record, ended=True)))
    if end is None:
        show.say(
            f"nobody came back: a new run begins (resume={folder.path} would go on from the last "
            "checkpoint of the old one)"
        )
        show.display.close()
        return None
    if observer is not None and observer.problem is not None and not server.rounds.log_begun:
        show.display.close()
        raise observer.problem
    missing = missing_results(show, end) if settings.observer and server.rounds.log_begun else []
    whole = _write_results(server, show, end, missing)
    if end.error:
        return 1
    return 0 if whole else MISSING


def _save_config(settings: Settings, folder: RunFolder) -> None:
    """The first file of a run: where it cannot be written, nothing else could be kept either."""
    try:
        save(settings, folder.config)
    except OSError as error:
        with suppress(OSError):
            folder.config.unlink(missing_ok=True)
            folder.path.rmdir()
        raise UserError(
            f"{folder.config} cannot be written: {error.strerror or error}",
            "make room, or choose another disk with run_dir=FOLDER",
        ) from None


def missing_results(show: Show, end: wire.End) -> list[str]:
    """What this run should have left and did not, as far as its files show; nobody is believed."""
    folder, missing = show.folder, []
    try:
        at = stored.step(folder.model, stored.MODEL_FORMAT)
        if at != end.step:
            missing.append(f"{folder.model.name} (there is one of step {at})")
    except stored.Broken:
        missing.append(folder.model.name)
    try:
        stored.step(folder.checkpoints / stored.name(end.step))
    except stored.Broken:
        newest = stored.newest_whole(folder.checkpoints)
        there = "" if newest is None else f" (the newest whole one is {newest.name})"
        missing.append(f"the last checkpoint{there}")
    if show.val_step != end.step:
        there = "" if show.val_step is None else f" (the newest is of step {show.val_step})"
        missing.append(f"the last evaluation{there}")
    return missing


def _join_command(token: str) -> str:
    """How a worker is started in the way that this server was."""
    if "MAKELEVEL" in os.environ:
        return f"make worker ID=2 JOIN={token}"
    installed = Path(sys.argv[0]).name == "paramserver-server"
    return f"{'paramserver-worker' if installed else 'python -m workers'} id=2 join={token}"


def _write_results(server: Server, show: Show, end: wire.End, missing: list[str]) -> bool:
    """Summary, picture and table; whether nothing is missing."""
    folder = show.folder
    if folder.unwritten:
        missing = [*missing, f"{folder.unwritten} lines of {folder.metrics.name}"]
    if missing:
        show.problem(f"the run ended, but a result of it is missing: {', '.join(missing)}")
    told = len(show.problems.all())
    problem = folder.write_summary(summarize(server, show, end))
    show.tell(problem)
    if show.steps:
        from paramserver import curves

        title = f"run {folder.path.name}"
        show.tell(curves.draw(folder.metrics, folder.curves, title))
    summary = summarize(server, show, end)
    if problem is None and len(show.problems.all()) > told:
        folder.write_summary(summary)  # with that; where it fails the first one stays
    show.say(f"the run is over at step {end.step}: {end.reason}")
    show.display.summary({**summary, "workers": summary["per_worker"]}, str(folder.path))
    show.display.close()
    return not missing and problem is None


def _stop(server: Server, number: int) -> None:
    # A second one ends the server at once; but a shell and the system may both send SIGHUP.
    signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
    server.stop(f"stopped by {signal.Signals(number).name}")


def main(argv: Sequence[str] | None = None) -> None:
    """The server program. Exit codes: 0 ended in order, 1 ended early, 2 a person's mistake, 3 the
    run ended, but a result of it is missing (the last checkpoint, model.safetensors, the last
    evaluation, summary.json, lines of metrics.jsonl): the last warning names it."""
    with exit_on_user_error():
        settings = load(list(sys.argv[1:] if argv is None else argv), "server").settings
        code = serve(settings)
    sys.exit(code)


if __name__ == "__main__":
    main()
