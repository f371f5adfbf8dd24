"""A Ray actor of a run: it keeps one program, the same as when started by hand.

Actor and program end together: where the program dies the actor ends itself, and where the actor is
killed the program dies too (`paramserver.launch.die_with_parent`). Ray restarts the actor, which
starts the program again. So a server goes on with its run, and a worker greets again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from paramserver import notify

KEPT_LINES = 10_000  # of the program's output, until the launcher asks for them


class Actor:
    """One program; another process calls the methods, `run` at the same time as the others."""

    def __init__(self) -> None:
        self.born = uuid.uuid4().hex
        """An id that changes with each restart."""
        self._lines: list[str] = []
        self._first = 0  # the number of the first kept line
        self._keeping = threading.Lock()  # the lines and their number change together
        self._process: subprocess.Popen[str] | None = None
        self._notify: Path | None = None  # the file of `paramserver.notify`
        self._stopping = threading.Event()

    def token(self, host: str, port: int) -> str:
        """The join token for a server on this machine."""
        from paramserver.keys import load_or_make

        return load_or_make()[0].token(host, port)

    def run(
        self,
        words: Sequence[str],
        settings: str,
        environment: Mapping[str, str],
        again: Sequence[int],
        restarted: Sequence[str],
    ) -> int:
        """Run `python -m WORDS` to its end; returns the exit code. Where there are `settings` they
        are a file, given as ``cluster=``. After a signal, or one of the exit codes in `again`, the
        actor ends, for Ray to restart it; `restarted` are words that are added then."""
        words = list(words)
        folder = Path(tempfile.mkdtemp(prefix="paramserver-ray-"))
        self._notify = folder / "notify"
        if settings:
            file = folder / "settings.yaml"
            file.write_text(settings)
            words.append(f"cluster={file}")
        if _is_restarted():
            words += restarted
        self._process = subprocess.Popen(
            [sys.executable, "-m", "paramserver.launch.die_with_parent", *words],
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                **environment,
                notify.VARIABLE: str(self._notify),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        if self._stopping.is_set():
            self._process.terminate()
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._keeping:
                self._lines.append(line.rstrip("\n"))
                if len(self._lines) > KEPT_LINES:
                    del self._lines[0]
                    self._first += 1
        code = self._process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        if (code < 0 or code in again) and not self._stopping.is_set():
            os._exit(1)
        return code

    def said(self, born: str, seen: int) -> tuple[str, int, list[str], bool]:
        """This actor's id, the number of the program's lines, the lines after the first `seen` (all
        of them if `born` is not this actor's id), and whether the program is ready."""
        start = seen if born == self.born else 0
        with self._keeping:  # a line that came between the two would be counted and never told
            lines = self._lines[max(0, start - self._first) :]
            number = self._first + len(self._lines)
        ready = self._notify is not None and notify.read(self._notify).ready != ""
        return self.born, number, lines, ready

    def stop(self) -> None:
        """Ask the program to end in order."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def _is_restarted() -> bool:
    import ray

    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
