"""The folder of one run: where everything lies, and the metrics written while it goes on.

    <run_dir>/2026-11-22_14-05-09/
        config.yaml        the settings that were really used
        run.json           the run's id and port, and whether it has ended, see `Record`
        metrics.jsonl      one line per step and per evaluation, see `StepLine` and `EvalLine`
        summary.json       the run in figures, at its end
        curves.png         the same as a picture
        model.safetensors  the final weights
        checkpoints/       step-00000500.safetensors, ...
        observer.log       what the observer printed
        wandb/ tensorboard/

Nothing here ends a training: where the disk is full or gone, a sentence says so, once.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from paramserver.errors import UserError

RETRY_S = 1.0  # after the disk took nothing
MAX_WAITING_BYTES = 4_000_000  # kept while the disk takes nothing, some 20,000 lines

_NAME = re.compile(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)(?:-(\d+))?")
_encode = msgspec.json.Encoder().encode  # writes NaN and infinity as null


class StepLine(msgspec.Struct, frozen=True, gc=False):
    """One step of a run, as a line of metrics.jsonl."""

    step: int
    """The step that the round led to, 1 or more."""
    seconds: float
    """Since the first round was opened."""
    loss: float | None
    """Sample-weighted mean over the round's workers."""
    samples: int
    step_s: float
    """From the round's opening to its close."""
    workers: tuple[int, ...]
    """Ids of those whose gradients are in it."""
    late: tuple[int, ...]
    """Ids of those that did not make it."""
    sent_bytes: int
    """By the server to all, since the run began."""
    received_bytes: int


class EvalLine(msgspec.Struct, frozen=True, gc=False):
    """One evaluation of a run, as a line of metrics.jsonl."""

    step: int
    seconds: float
    val_loss: float | None
    val_accuracy: float | None
    """Share of right answers, 0 to 1."""


class Record(msgspec.Struct, frozen=True):
    """run.json: by this a server that was killed and is started again knows its run."""

    run: str
    host: str
    port: int
    settings: dict[str, Any]
    """Those that workers are told."""
    host_ip: str | None = None
    """Where it listened beside loopback: hosts of one name, as namespaces are, differ by it."""
    ended: bool = False


class Past(msgspec.Struct, frozen=True):
    """What metrics.jsonl tells of a run that goes on."""

    steps: int = 0
    samples: int = 0
    last: StepLine | None = None


class RunFolder:
    """The paths of a run folder, and its metrics.

    Making one touches nothing on disk: `create` makes a new folder, and metrics.jsonl is opened
    when the first lines are written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.record = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.curves = path / "curves.png"
        self.model = path / "model.safetensors"
        self.checkpoints = path / "checkpoints"
        self.observer_log = path / "observer.log"
        self._waiting: list[bytes] = []  # lines
        self._rest = b""  # what the disk did not take; may begin within a line
        self._flush_at = 0.0
        self._file: int | None = None  # descriptor: no second buffer that fails again at exit
        self._failed = False  # said so already
        self._claim: int | None = None  # descriptor of the folder, locked
        self._cut_at: int | None = None  # bytes of whole lines, where another server tore the last

    @classmethod
    def create(cls, parent: Path, now: datetime) -> RunFolder:
        """Make `<parent>/<now>`, with -2, -3, ... where that is taken.

        Raises UserError where `parent` cannot be written to.
        """
        name = now.strftime("%Y-%m-%d_%H-%M-%S")
        path, number = parent / name, 1
        try:
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                try:
                    path.mkdir()  # fails where it exists: of two servers one gets it
                    folder = cls(path)
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
        """Make this folder one server's own, until `close` or its process ends in any way; False
        where it is another's that lives."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError:
            pass  # a file system without locks
        self._claim = descriptor
        return True

    def write_record(self, record: Record) -> str | None:
        """Write run.json, whole or not at all; returns a sentence where that failed."""
        return _try_to_write(self.record, _encode(record) + b"\n")

    def take_up(self) -> Past:
        """What was noted before; a last line that is torn is cut off before the next is written."""
        steps = samples = whole = 0
        last = None
        try:
            with self.metrics.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        self._cut_at = whole
                        break
                    whole += len(line)
                    with suppress(msgspec.DecodeError):  # an evaluation
                        last = msgspec.json.decode(line, type=StepLine)
                        steps, samples = steps + 1, samples + last.samples
        except OSError:
            pass  # there is none yet, or it cannot be written either
        return Past(steps, samples, last)

    def log(self, line: StepLine | EvalLine) -> None:
        """Note a line for metrics.jsonl; `flush` writes it."""
        self._waiting.append(_encode(line) + b"\n")

    def flush(self, now: float) -> str | None:
        """Write what is waiting; `now` in seconds of any steady clock.

        Returns a sentence when writing fails for the first time. It is tried again, silently, about
        once a second.
        """
        if now < self._flush_at:
            return None
        problem = self._flush()
        if self._rest:
            self._flush_at = now + RETRY_S
        return problem

    def close(self) -> str | None:
        """Write what is waiting and close the file; returns what `flush` returns."""
        problem = self._flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None
        return problem

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
                if self._cut_at is not None:
                    os.ftruncate(self._file, self._cut_at)
                    self._cut_at = None
            while text and self._file is not None:
                text = text[os.write(self._file, text) :]
            self._rest = b""
        except OSError as error:
            if len(text) > MAX_WAITING_BYTES:
                text = text[: text.rindex(b"\n", 0, MAX_WAITING_BYTES) + 1]
            self._rest = text
            if not self._failed:
                self._failed = True
                return f"{self.metrics} cannot be written, the run goes on: {_reason(error)}"
        return None


def latest(parent: Path) -> RunFolder | None:
    """The newest run folder in `parent`, by name; None where there is none."""
    found = _run_folders(parent)
    return RunFolder(found[-1]) if found else None


def unended(
    parent: Path, port: int, settings: Mapping[str, Any], host_ip: str | None = None
) -> tuple[RunFolder, Record] | None:
    """The newest run of this host, port and address, if it has not ended, has the same settings,
    and no server that lives is at it; it is claimed then."""
    for path in reversed(_run_folders(parent)):
        folder = RunFolder(path)
        try:
            record = msgspec.json.decode(folder.record.read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            continue
        if (record.host, record.port, record.host_ip) == (socket.gethostname(), port, host_ip):
            if not record.ended and not folder.claim():
                continue  # of a server that lives, so its port is not this one's
            if not record.ended and record.settings == msgspec.json.decode(_encode(settings)):
                return folder, record
            folder.close()
            return None
    return None


def _run_folders(parent: Path) -> list[Path]:
    """The run folders in `parent`, oldest first."""
    found = []
    try:
        for path in parent.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_dir():
                found.append((match[1], int(match[2] or 1), path))
    except OSError:
        return []
    return [path for _, _, path in sorted(found)]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that under its name there is never half of it. Raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _try_to_write(path: Path, content: bytes) -> str | None:
    """`write_whole`; a sentence where that failed."""
    try:
        write_whole(path, content)
    except OSError as error:
        return f"{path} was not written: {_reason(error)}"
    return None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def find_checkpoint(resume: str, parent: Path) -> Path:
    """The checkpoint that `resume` names: `latest` in `parent`, a run folder, or a file.

    Raises UserError where there is none.
    """
    if resume == "latest":
        for folder in reversed(_run_folders(parent)):
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
