"""server.jsonl in a run folder: the newest lines of the server's log, and the newest events.

A server that goes on with the run of a killed one takes them up, so that status, page and report
still have what was before it. The file is bounded: it is written anew, without the oldest, when it
has grown too large. A disk that is full or gone ends nothing here, and is told for metrics.jsonl.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from paramserver import drafts
from paramserver.status.value import EVENTS_MAX, LINES_KEPT, Event, LogLine

FILE_BYTES = 2**22  # some times what is kept of it
LINE_BYTES = 2**16  # a longer line is none of ours
_encode = msgspec.json.Encoder().encode


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the file: the one or the other."""

    line: LogLine | None = None
    event: Event | None = None


_decode = msgspec.json.Decoder(Entry).decode


class Entries(msgspec.Struct, frozen=True):
    """The newest of a file, each kind in its order."""

    lines: list[LogLine]
    events: list[Event]


class ServerLog:
    """The file at `path`. Nothing is written before the first entry, and no method raises an
    OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._torn = False  # the file ends within a line

    def take_up(self) -> list[LogLine | Event]:
        """The newest entries of the file, in their order; older ones are gone from it then."""
        found = self._read()
        if found:
            text = b"".join(map(_line, found))
            with suppress(OSError):
                drafts.write(self._path, text, synced=False)
                self._torn = False
        return found

    def add(self, entry: LogLine | Event) -> None:
        """Write an entry; the file is opened each time, because its folder may vanish."""
        text = b"\n" * self._torn + _line(entry)
        try:
            with self._path.open("ab", buffering=0) as file:
                self._torn = file.write(text) < len(text)
                size = file.tell()
        except OSError:
            return
        if size > FILE_BYTES:
            self.take_up()

    def _read(self) -> list[LogLine | Event]:
        found, self._torn = _read(self._path)
        return found


def newest(path: Path) -> Entries:
    """The newest entries of such a file, for whoever only looks; none where there is no file."""
    found, _ = _read(path)
    return Entries(
        [entry for entry in found if isinstance(entry, LogLine)],
        [entry for entry in found if isinstance(entry, Event)],
    )


def _read(path: Path) -> tuple[list[LogLine | Event], bool]:
    """The newest entries in their order; does the file end within a line?"""
    lines: deque[tuple[int, LogLine]] = deque(maxlen=LINES_KEPT)
    events: deque[tuple[int, Event]] = deque(maxlen=EVENTS_MAX)
    part = b""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2 * FILE_BYTES))
            for place, part in enumerate(iter(partial(file.readline, LINE_BYTES), b"")):
                try:
                    entry = _decode(part)
                except (msgspec.DecodeError, ValueError, RecursionError):
                    continue  # torn, or spoilt
                if entry.line is not None:
                    lines.append((place, entry.line))
                if entry.event is not None:
                    events.append((place, entry.event))
    except OSError:
        pass  # what was read before counts
    both: list[tuple[int, LogLine | Event]] = [*lines, *events]
    kept = [entry for _, entry in sorted(both, key=lambda found: found[0])]
    return kept, bool(part) and not part.endswith(b"\n")


def _line(entry: LogLine | Event) -> bytes:
    told = Entry(event=entry) if isinstance(entry, Event) else Entry(line=entry)
    return _encode(told) + b"\n"
