"""The folder of one run: its paths, and the metrics written while it goes on.

    <run_dir>/2026-11-22_14-05-09/
        config.yaml        the settings as used
        run.json           the run's id and port, and whether it has ended, see `Record`
        server.jsonl       the server's log, and events, see `output.serverlog`
        newest_step        the newest step that the server has published
        metrics.jsonl      one line per step and per evaluation, see `StepLine` and `EvalLine`
        summary.json the run's results, at its end
        curves.png         the same as a picture
        report.html        the same as a page for the browser, in one file
        model.safetensors  the final weights
        ema.safetensors    their average, with the setting `ema`
        checkpoints/       step-00000500.safetensors, ...
        observer.log       the observer's output
        wandb/ tensorboard/

No error here ends a training: where the disk is full or gone, a sentence says so, once.
"""

from __future__ import annotations

import errno
import math
import os
import re
import socket
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from paramserver import drafts, locks
from paramserver.config.schema import flatten
from paramserver.errors import UserError
from paramserver.net import machine
from paramserver.output import stored
from paramserver.rounds.looks import DataSet
from paramserver.rounds.recovery import NOTHING, UNKNOWN
from paramserver.words import shown

NEWEST_RUN = ".newest_run"  # in the folder of run folders: the highest number of a run
NUMBER_LOCK_S = 5.0  # for a lock that is held for a moment
RETRY_S = 1.0  # after a write failed
NOTE_BYTES = 64  # of newest_step: the number of a step and its lineage
MAX_WAITING_BYTES = 4_000_000  # kept while writing fails, some 20,000 lines

_NAME = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:-(\d+))?")
UNREADABLE = (ValueError, RecursionError, msgspec.DecodeError)  # errors of a damaged file
_encode = msgspec.json.Encoder().encode  # writes NaN and infinity as null


class StepLine(msgspec.Struct, frozen=True, gc=False):
    """One step of a run, as a line of metrics.jsonl."""

    step: int
    """The step that the round led to, 1 or more: optimizer steps since the run began."""
    seconds: float
    """Seconds since the first round was opened."""
    loss: float | None
    """Sample-weighted mean over the round's workers."""
    samples: int
    step_s: float
    """Seconds from the round's opening to its close."""
    workers: tuple[int, ...]
    """Ids of the workers whose gradients are in it."""
    late: tuple[int, ...]
    """Ids of the members that missed it, wholly or in part."""
    sent_bytes: int
    """Bytes from the server to all, since the run began."""
    received_bytes: int
    shares: tuple[int, ...] = ()
    """Samples of each of `workers`, in their order."""
    update: int | msgspec.UnsetType = msgspec.UNSET
    """The number of this update of the log, where `step` does not count updates."""

    @property
    def log_step(self) -> int:
        return self.step if isinstance(self.update, msgspec.UnsetType) else self.update


class EvalLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One evaluation of a run, as a line of metrics.jsonl."""

    step: int
    seconds: float
    val_loss: float | None
    val_accuracy: float | None
    """Share of right answers, 0 to 1."""
    metrics: dict[str, float | None] = {}
    """Metrics other than the accuracy, by name."""


class Record(msgspec.Struct, frozen=True):
    """run.json: a server that is started again after it was killed finds its run by this."""

    run: str
    host: str
    port: int
    settings: dict[str, Any]
    """Those that workers are told."""
    host_ip: str | None = None
    """The address beside loopback: it distinguishes hosts with the same name, such as
    namespaces."""
    ended: bool = False
    machine: str = ""
    """`fleet.machine.identity`: stays where the host name changes."""
    number: int = 0
    """The number of the run: higher for later runs in one folder; 0: of an older version."""
    trial: int = 1
    """Its place among the runs that its server serves, one after another."""
    data_set: DataSet | None = None
    """What the workers' data sets have in common, once a round was closed."""


class _Numbered(msgspec.Struct):
    """The field of a `Record` that orders the runs of a folder."""

    number: int = 0


class Past(msgspec.Struct, frozen=True):
    """What metrics.jsonl holds of a run that goes on."""

    steps: int = 0
    samples: int = 0
    last: StepLine | None = None
    workers: dict[int, tuple[int, int, int]] = {}
    """By worker id: rounds, samples, and number of late rounds."""


class RunFolder:
    """The paths of a run folder, and its metrics.

    The constructor touches nothing on disk: `create` makes a new folder, and metrics.jsonl is
    opened when the first lines are written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0  # of a new one
        self.config = path / "config.yaml"
        self.record = path / "run.json"
        self.newest_step = path / "newest_step"
        self.metrics = path / "metrics.jsonl"
        self.server_log = path / "server.jsonl"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.report = path / "report.html"
        self.model = path / "model.safetensors"
        self.average = path / "ema.safetensors"
        self.checkpoints = path / "checkpoints"
        self.observer_log = path / "observer.log"
        self.observer_exit = path / "observer.exit"  # for as long as a run goes on
        self._waiting: list[bytes] = []  # lines
        self._rest = b""  # bytes that were not written; may begin within a line
        self._dropped = 0  # number of lines dropped, because writing failed for too long
        self._flush_at = 0.0
        self._file: int | None = None  # descriptor: no second buffer that fails again at exit
        self._failed = False  # said so already
        self._look_at = -math.inf  # when to see next whether the folder is there
        self._gone = False  # said so already
        self._first: dict[Path, bytes] = {}  # files of the start, to write them again
        self._claim: int | None = None  # descriptor of the folder, locked
        self.locked = False
        """Is the claim a lock, so that no other server can have this folder too?"""
        self._cut_at: int | None = None  # bytes of the whole lines, before a part of one
        self._noted: int | None = None  # descriptor of newest_step
        self._written: Record | None = None

    @classmethod
    def create(cls, parent: Path, now: datetime) -> RunFolder:
        """Make `<parent>/<now>`, with -2, -3, ... where that is taken, and give it a number.

        Raises UserError where `parent` cannot be written to.
        """
        name = now.strftime("%Y-%m-%d_%H-%M-%S")
        path, number = parent / name, 1
        try:
            parent.mkdir(parents=True, exist_ok=True)
            taken = _take_number(parent)
            while True:
                try:
                    path.mkdir()  # fails where it exists: of two servers one gets it
                    folder = cls(path)
                    folder.number = taken
                    folder.claim()
                    return folder
                except FileExistsError:
                    number += 1
                    path = parent / f"{name}-{number}"
        except OSError as error:
            raise UserError(
                f"cannot make a run folder in {parent.absolute()}: {_reason(error)}",
                "choose another one with run_dir=FOLDER",
            ) from None

    def claim(self) -> bool:
        """Claim this folder for this server, until `close` or the end of its process; False where
        another living server has claimed it."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not locks.take(descriptor):
                os.close(descriptor)
                return False
            self.locked = True
        except OSError:
            self.locked = False  # a file system without locks
        self._claim = descriptor
        return True

    def read_record(self) -> Record | None:
        """run.json; None where there is none, or a disk or a person has spoilt it."""
        try:
            return msgspec.json.decode(self.record.read_bytes(), type=Record)
        except (OSError, *UNREADABLE):
            return None

    def write_record(self, record: Record) -> str | None:
        """Write run.json, whole or not at all; returns a sentence where that failed."""
        self._written = record
        self._first[self.record] = _encode(record) + b"\n"
        return _try_to_write(self.record, self._first[self.record])

    def note_data_set(self, data_set: DataSet | None) -> str | None:
        """Write it into run.json, for a server that goes on with this run; returns a sentence where
        that failed."""
        if self._written is None:
            return None
        return self.write_record(msgspec.structs.replace(self._written, data_set=data_set))

    def remember(self, path: Path) -> None:
        """Write this file again where the folder vanishes."""
        with suppress(OSError):
            self._first[path] = path.read_bytes()

    def note(self, step: int, lineage: str) -> str | None:
        """Note the lineage of a step before the server publishes it, so that it is there after a
        kill -9. Does nothing where `open_note` failed; returns a sentence when writing fails for
        the first time.

        It does not map the file into memory: a write would be a SIGBUS where the disk is gone or
        full.
        """
        if self._noted is not None:
            try:
                if os.pwrite(self._noted, _note(step, lineage), 0) < NOTE_BYTES:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                return self._no_note(error)
        return None

    def open_note(self) -> str | None:
        """Make `note` work; returns a sentence where that failed."""
        try:
            self._noted = os.open(self.newest_step, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(self._noted).st_size != NOTE_BYTES:
                os.ftruncate(self._noted, 0)
                os.pwrite(self._noted, _note(0, NOTHING), 0)
        except OSError as error:
            return self._no_note(error)
        return None

    def _no_note(self, error: OSError) -> str:
        """Remove the note, because an older step must not pass for the newest."""
        if self._noted is not None:
            with suppress(OSError):
                os.ftruncate(self._noted, 0)
            os.close(self._noted)
            self._noted = None
        with suppress(OSError):
            self.newest_step.unlink(missing_ok=True)
        return f"{self.newest_step} cannot be written, the run goes on: {_reason(error)}"

    def noted(self) -> str:
        """The lineage of the newest step that was noted, or what `Recovery` takes instead."""
        try:
            step, lineage = self.newest_step.read_text("ascii").split()
            return lineage if int(step) >= 0 else UNKNOWN
        except (OSError, ValueError):
            return UNKNOWN

    def take_up(self, before: float = math.inf) -> Past:
        """Read the lines of the steps before this one. Later lines, and an incomplete last one, are
        cut off before the next line is written."""
        steps = samples = whole = 0
        last, workers = None, dict[int, tuple[int, int, int]]()
        self._cut_at = None
        try:
            with self.metrics.open("rb") as file:
                for text in file:
                    if not text.endswith(b"\n"):
                        self._cut_at = whole
                        break
                    try:
                        line = msgspec.json.decode(text, type=StepLine)
                    except UNREADABLE:  # an evaluation
                        whole += len(text)
                        continue
                    if line.log_step >= before:
                        self._cut_at = whole
                        break
                    whole += len(text)
                    steps += 1 if last is None else line.step - last.step
                    last, samples = line, samples + line.samples
                    _count(workers, line)
        except OSError:
            pass  # there is no file yet, or it cannot be written either
        return Past(steps, samples, last, workers)

    def log(self, line: StepLine | EvalLine) -> None:
        """Note a line for metrics.jsonl; `flush` writes it."""
        self._waiting.append(_encode(line) + b"\n")

    def flush(self, now: float) -> str | None:
        """Write the waiting lines; `now` in seconds of any steady clock.

        Returns a sentence when writing fails for the first time. It tries again, silently, about
        once a second.
        """
        vanished = None
        if now >= self._look_at:
            self._look_at = now + RETRY_S
            vanished = self._vanished()
        if now < self._flush_at:
            return vanished
        problem = self._flush()
        if self._rest:
            self._flush_at = now + RETRY_S
        return vanished or problem

    def _vanished(self) -> str | None:
        """Where the folder is gone (removed, its disk unmounted), make it again, for the lines to
        come. Returns a sentence when it is found to be gone, once until it is there again."""
        if self._claim is None:
            return None
        try:
            if os.path.samestat(os.stat(self.path), os.fstat(self._claim)):
                return None
        except OSError:
            pass
        told = None
        if not self._gone:
            self._gone = True
            told = f"{self.path} has vanished with what was in it: only what comes is kept, there"
        with suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            before, self._claim = self._claim, None
            try:
                if not self.claim():
                    self._claim = before  # another server has made one there, and owns it
                    return told
            except OSError:
                self._claim = before
                raise
            os.close(before)
            self._gone = False
            for descriptor in filter(None, (self._file, self._noted)):
                os.close(descriptor)
            self._file = self._noted = None
            self._cut_at = None
            self.open_note()
            for path, content in self._first.items():
                _try_to_write(path, content)
        return told

    def close(self) -> str | None:
        """Write the waiting lines and close the file; returns what `flush` returns."""
        problem = self._flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None
        if self._noted is not None:
            os.close(self._noted)
            self._noted = None
        return problem

    @property
    def unwritten(self) -> int:
        """Number of lines of metrics.jsonl that could not be written."""
        return self._rest.count(b"\n") + len(self._waiting) + self._dropped

    def write_summary(self, summary: Mapping[str, Any]) -> str | None:
        """Write summary.json, whole or not at all; returns a sentence where that failed."""
        text = msgspec.json.format(_encode(summary), indent=2) + b"\n"
        return _try_to_write(self.summary, text)

    def _flush(self) -> str | None:
        text = self._rest + b"".join(self._waiting)
        self._waiting.clear()
        try:
            if text and self._file is None:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
                self._file = os.open(self.metrics, flags, 0o666)
            if text and self._file is not None and self._cut_at is not None:
                os.ftruncate(self._file, self._cut_at)
                self._cut_at = None
            while text and self._file is not None:
                text = text[os.write(self._file, text) :]
            self._rest = b""
        except OSError as error:
            if len(text) > MAX_WAITING_BYTES:
                kept = text[: text.rindex(b"\n", 0, MAX_WAITING_BYTES) + 1]
                self._dropped += text.count(b"\n") - kept.count(b"\n")
                text = kept
            self._rest = text
            if not self._failed:
                self._failed = True
                return f"{self.metrics} cannot be written, the run goes on: {_reason(error)}"
        return None


def _note(step: int, lineage: str) -> bytes:
    return f"{step:>12} {lineage[:50]:<50}\n".encode()


def _count(workers: dict[int, tuple[int, int, int]], line: StepLine) -> None:
    """Add a step to each worker's rounds, samples and late rounds."""
    for id, samples in zip(line.workers, line.shares, strict=False):
        rounds, before, late = workers.get(id, (0, 0, 0))
        workers[id] = (rounds + 1, before + samples, late)
    for id in line.late:
        rounds, before, late = workers.get(id, (0, 0, 0))
        workers[id] = (rounds, before, late + 1)


def latest(parent: Path) -> RunFolder | None:
    """The newest run folder in `parent`; None where there is none."""
    found = run_folders(parent)
    return RunFolder(found[-1]) if found else None


@dataclass(frozen=True)
class Unended:
    """A run that a server left behind; its folder is claimed."""

    folder: RunFolder
    record: Record
    differs: tuple[str, ...] = ()
    """Empty: it is the run that was asked for. Else the differences to that, in words."""


def unended(
    parent: Path,
    port: int,
    settings: Mapping[str, Any],
    host_ip: str | None = None,
    chosen: Collection[str] = (),
) -> Unended | None:
    """The run that a server of this machine, port and address with these settings goes on with: its
    newest, if that has not ended and no living server has claimed it. Else a newer one that nearly
    fits, with other settings, or of another port, address or machine.

    Settings named in `chosen` may differ: no person chose them, and the run keeps its own.

    No clock and no host name decides, because both may change while a machine is off. The lock on
    the folder shows whether another server lives. On a disk that machines share the lock may not
    hold between them, so there the machine must be the same, too.
    """
    told, near = _without(msgspec.json.decode(_encode(settings)), chosen), None
    for path in reversed(run_folders(parent)):
        folder = RunFolder(path)
        record = folder.read_record()
        if record is None:
            continue
        place = _differences(
            {"port": record.port, "host_ip": record.host_ip}, {"port": port, "host_ip": host_ip}
        )
        try:
            others = _differences(_without(record.settings, chosen), told)
            if not record.ended and not folder.claim():
                continue  # a living server has it, so its port is another one
        except (OSError, *UNREADABLE):
            continue
        if not _is_here(folder, record):
            place.append(f"its machine is {record.host}")
        if not record.ended and not place and not others:
            _close(near)
            return Unended(folder, record)
        if not record.ended and near is None and not (place and others):
            near = Unended(folder, record, (*place, *others))
        else:
            folder.close()
        if not place:
            break  # older runs are over for this server
    return near


def _is_here(folder: RunFolder, record: Record) -> bool:
    """Is it a run of this machine, or on a disk of its own?"""
    own = machine.identity()
    if record.machine and own:
        if record.machine == own:
            return True
    elif record.host == socket.gethostname():
        return True
    return (record.ended or folder.locked) and not machine.is_shared(folder.path)


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The settings that differ, in words."""
    theirs, ours = flatten(there), flatten(here)
    return [
        f"{name} is {shown(theirs.get(name))} there, {shown(ours.get(name))} here"
        for name in (*theirs, *(ours.keys() - theirs.keys()))
        if theirs.get(name) != ours.get(name)
    ]


def _close(found: Unended | None) -> None:
    if found is not None:
        found.folder.close()


def run_folders(parent: Path) -> list[Path]:
    """The run folders in `parent`, oldest first: by their numbers, without one by their names."""
    found = []
    try:
        for path in parent.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((_number(path), match[1], int(match[2] or 1), path))
    except OSError:
        return []
    return [path for *_, path in sorted(found)]


def _number(path: Path) -> int:
    """The number of a run folder; 0 where it has none."""
    try:
        record = RunFolder(path).record.read_bytes()
        return msgspec.json.decode(record, type=_Numbered).number
    except (OSError, *UNREADABLE):
        return 0


def _take_number(parent: Path) -> int:
    """A number higher than that of any run that there is, or was, in `parent`. Raises OSError.

    Numbers order the runs, because a clock may be set back, or start anew on a machine without a
    battery. A file keeps the highest, also when its run folder is removed; servers lock it one
    after the other.
    """
    try:
        fd = os.open(parent / NEWEST_RUN, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:  # another user's file, in a shared folder
        return 1 + max([0, *map(_number, run_folders(parent))])
    try:
        with suppress(OSError):  # a file system without locks
            locks.take(fd, NUMBER_LOCK_S)
        kept = os.pread(fd, 20, 0).strip()
        was = int(kept) if kept.isdigit() else 0
        number = 1 + max([was, *map(_number, run_folders(parent))])
        os.pwrite(fd, f"{number}\n".encode(), 0)  # never shorter than it was
    finally:
        os.close(fd)
    return number


def _try_to_write(path: Path, content: bytes) -> str | None:
    """`drafts.write`; a sentence where that failed."""
    try:
        drafts.write(path, content)
    except OSError as error:
        return f"{path} was not written: {_reason(error)}"
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def find_checkpoint(resume: str, parent: Path) -> Path:
    """The checkpoint that `resume` names: `latest` in `parent`, a run folder, or a file.

    Raises UserError where there is none, and where it is incomplete; the error then names an older
    complete one.
    """
    found = _named_checkpoint(resume, parent)
    try:
        stored.step(found)
    except stored.Broken as error:
        raise UserError(
            f"the checkpoint {found} cannot be resumed: {error}",
            _older_whole(resume, parent, found),
        ) from None
    return found


def _older_whole(resume: str, parent: Path, broken: Path) -> str:
    """A hint how to go on from the newest complete checkpoint, if there is one."""
    places = [broken.parent]
    if resume == "latest":
        folders = (
            f / place for f in reversed(run_folders(parent)) for place in ("checkpoints", "")
        )
        places += [place for place in folders if place != broken.parent]
    for place in places:
        if (whole := stored.newest_whole(place, but=broken)) is not None:
            return f"an older one is whole, of step {stored.step(whole)}: resume={whole}"
    return "no older one that is whole was found beside it"


def _named_checkpoint(resume: str, parent: Path) -> Path:
    if resume == "latest":
        for folder in reversed(run_folders(parent)):
            if found := _newest_checkpoint(folder):
                return found
        raise UserError(
            f"there is no checkpoint to resume in {parent.absolute()}",
            "run_dir=FOLDER tells where run folders are",
        )
    path = Path(resume)
    if path.is_file():
        return path
    found = _newest_checkpoint(path) or _newest_checkpoint(parent / resume)
    if found is None:
        raise UserError(
            f"resume={resume}: there is no checkpoint", "a file, a run folder, or: resume=latest"
        )
    return found


def _newest_checkpoint(folder: Path) -> Path | None:
    for place in (folder / "checkpoints", folder):
        if found := sorted(place.glob("step-*.safetensors")):
            return found[-1]
    return None
