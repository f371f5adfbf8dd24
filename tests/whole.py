"""Whole runs for tests: programs with their output, a monitor, and a server in a thread.

Nothing here sleeps. A test waits for an event (a line of output, a closed round, a state of the
server, an exit code), and each wait has a deadline that is far beyond what a busy machine needs.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import forked
import psutil
import zmq

from benchmarks.network import free_port
from paramserver import logs
from paramserver.config.loading import to_wire
from paramserver.keys import Keys
from paramserver.net.address import keys_of
from paramserver.net.jointoken import decode
from paramserver.protocol import messages as wire
from paramserver.rounds.states import WAITING
from paramserver.server.control import Control
from paramserver.server.overview import Overview, Totals
from paramserver.server.ports import Ports
from paramserver.server.server import Server
from paramserver.settings import Settings
from paramserver.status.value import to_json
from workers.cluster import Cluster
from workers.link.client import Client

CLONE = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
DEADLINE_S = 300.0
PATIENCE_S = 60.0
"""How long rounds wait for a worker where a test is not about that: a busy machine may let a thread
or a process stand for seconds."""

NEWEST = 12
"""Lines of a program that tell how it stands."""

ENDLESS = 10**6
"""Epochs of a run that goes on until its test has seen what it waits for, on any machine."""
ENOUGH = "the test has seen enough"

T = TypeVar("T")


# ----------------------------------------------------------------------------------- programs


class Program:
    """A process whose lines (stdout and stderr) are read as they come."""

    def __init__(
        self,
        name: str,
        command: list[str],
        folder: Path,
        *,
        forks: bool = False,
        host: str | None = None,
        **environment: str,
    ) -> None:
        """In the network namespace `host`, if one is named. With `forks`, what would be a new
        Python is forked from one that has imported torch."""
        self.name = name
        self.lines: list[str] = []
        self._new: queue.Queue[str | None] = queue.Queue()
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        own = {"PYTHONPATH": str(CLONE), "PYTHONUNBUFFERED": "1"}
        environment = {**inherited, **own, **environment}
        self.process: subprocess.Popen[str] | forked.Process
        if forks:
            self.process = forked.start(command[1:], folder, environment, host)
        else:
            self.process = subprocess.Popen(
                [*(["ip", "netns", "exec", host] if host else []), *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        self._reader = threading.Thread(target=self._read, name=f"output of {name}")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._new.put(line.rstrip("\n"))
        self._new.put(None)

    @property
    def output(self) -> str:
        """All lines that were waited for or, after `end`, all there were."""
        return "\n".join(self.lines)

    @property
    def newest(self) -> str:
        """The last lines so far, waited for or not."""
        with self._new.mutex:
            waiting = [line for line in self._new.queue if line is not None]
        return "\n".join([*self.lines, *waiting][-NEWEST:])

    def wait_for(self, sentence: str) -> str:
        """The next line in which the pattern `sentence` is found."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                line = self._new.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise self._missed(sentence, f"in {DEADLINE_S:g} s") from None
            if line is None:
                self._new.put(None)
                raise self._missed(sentence, "before its output ended")
            self.lines.append(line)
            if re.search(sentence, line):
                return line

    def _missed(self, sentence: str, when: str) -> AssertionError:
        return AssertionError(f"{self.name} did not say {sentence!r} {when}:\n{self.output}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for the end: the exit code (negative: the signal that killed it)."""
        try:
            code = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end:\n{self.output}") from None
        self.drain()
        return code

    def kill(self) -> None:
        """End it at once, with what it started."""
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
        self.process.kill()
        self.process.wait()
        self.drain()

    def drain(self) -> None:
        """Take in what an ended one said."""
        self._reader.join(DEADLINE_S)
        while (line := self._new.get()) is not None:
            self.lines.append(line)
        self._new.put(None)
        assert self.process.stdout is not None
        self.process.stdout.close()


def children(program: Program) -> list[psutil.Process]:
    """The processes that a program has started, without those that wait for that."""
    found = []
    for child in psutil.Process(program.process.pid).children():
        with suppress(psutil.Error):  # it may be gone
            if child.name() != forked.SPARE:
                found.append(child)
    return found


def shards_of(workers: Iterable[Program]) -> list[psutil.Process]:
    """The processes of the shards that these workers have started."""
    found = []
    for worker in workers:
        with suppress(psutil.Error):  # they may be gone
            for child in psutil.Process(worker.process.pid).children(recursive=True):
                if "paramserver.shard" in child.cmdline():
                    found.append(child)
    return found


class Run:
    """Programs of one run on loopback, with the run folder in `folder`/runs; as a `with` block.

    What still runs at its end is killed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._programs: list[Program] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        for program in self._programs:
            if program.process.poll() is None:
                program.kill()
            else:
                program.drain()
            if error is not None:
                print(f"--- {program.name}:\n{program.output}")

    def start(
        self,
        name: str,
        *command: str,
        host: str | None = None,
        folder: Path | None = None,
        fresh: bool = False,
        **environment: str,
    ) -> Program:
        """A Python program: `command` is what follows `python`; in the network namespace `host`,
        if one is named, and in that folder instead of the run's. `fresh`: in a new Python, not in
        a forked one (`forked`), which has loaded its libraries already."""
        forks = forked.USABLE and not fresh and "LD_PRELOAD" not in environment
        words = [sys.executable, *command]
        folder = folder or self.folder
        program = Program(name, words, folder, forks=forks, host=host, **environment)
        self._programs.append(program)
        return program

    def server(
        self,
        *settings: str,
        host: str | None = None,
        folder: Path | None = None,
        fresh: bool = False,
        **environment: str,
    ) -> Program:
        """`python -m paramserver`, on small real data, without a logging service."""
        small = ["dataset.name=digits", "model.hidden=16", "wandb.mode=disabled"]
        ours = [f"port={self.port}", "run_dir=runs", "plain=true", "track_gradients=false"]
        words = ["-m", "paramserver", *small, *ours, *settings]
        return self.start(
            "the server", *words, host=host, folder=folder, fresh=fresh, **environment
        )

    def worker(
        self,
        number: int,
        *settings: str,
        host: str | None = None,
        fresh: bool = False,
        **environment: str,
    ) -> Program:
        """`python -m workers`; with one thread, since two mostly wait for each other where a
        machine is busy."""
        words = ["-m", "workers", f"id={number}", f"port={self.port}", "threads=1", *settings]
        return self.start(f"worker {number}", *words, host=host, fresh=fresh, **environment)

    @property
    def runs(self) -> list[Path]:
        """The run folders, oldest first: by their numbers, as the clocks of some tests lie."""
        found = []
        for path in (self.folder / "runs").glob("2*"):
            with suppress(OSError, ValueError, KeyError):
                found.append((int(json.loads((path / "run.json").read_text())["number"]), path))
        return [path for _, path in sorted(found)]

    def summary(self) -> dict[str, Any]:
        """summary.json of the newest run."""
        summary: dict[str, Any] = json.loads((self.runs[-1] / "summary.json").read_text())
        return summary

    def steps(self) -> list[dict[str, Any]]:
        """The step lines of the newest run's metrics.jsonl."""
        lines = (self.runs[-1] / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if "samples" in line]


def private_folders(program: Program) -> set[Path]:
    """The folders that a running server has made, for its unix sockets and its shared memory."""
    pid = program.process.pid
    sockets = [str(s.laddr) for s in psutil.Process(pid).net_connections(kind="unix")]
    ipc = {Path(path).parent for path in sockets if path.startswith("/")}
    shared = set(Path("/dev/shm").glob(f"paramserver-{pid}-*"))
    return {path for path in ipc | shared if path.name.startswith("paramserver-")}


GATED = '''
"""A model whose workers wait at one of their batches while the gate is closed."""
import fcntl
import sys
from pathlib import Path

from workers.builtin.models import SimpleNN

GATE = Path(__file__).with_name("gate")
batches = 0


class Net(SimpleNN):
    def forward(self, images):
        global batches
        if self.training and "observe" not in sys.argv[0]:
            batches += 1
            if batches == AT:
                print("at the gate", flush=True)
                with GATE.open() as gate:
                    fcntl.flock(gate, fcntl.LOCK_SH)
        return super().forward(images)
'''


class Gate:
    """Where built-in workers stand in the middle of a run, for what is to happen there.

    Those that are started in `folder`, with these `settings` of their server, stop in the forward
    of their batch `at`, counted from 1, until the gate is opened. The model is SimpleNN. As a
    `with` block.
    """

    settings = ("model.type=gated:Net",)

    def __init__(self, folder: Path, at: int) -> None:
        self.at = at
        (folder / "gated").mkdir()
        (folder / "gated/__init__.py").write_text(GATED.replace("AT:", f"{at}:"))
        self._file = (folder / "gated/gate").open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def wait(self, *workers: Program) -> None:
        """Until they all stand there: the run is at step `at` - 1."""
        for worker in workers:
            worker.wait_for("^at the gate$")

    def open(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.open()


def data_in(report: str) -> str:
    """The JSON that a report.html shows."""
    return report.partition('<script id="data" type="application/json">')[2].partition("</script>")[
        0
    ]


class Monitor:
    """Reads the closes that a server publishes; as a `with` block."""

    def __init__(self, port: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.linger = 0
        self._sub.setsockopt(zmq.RECONNECT_IVL, 50)
        for kind in (wire.Average, wire.Shared, wire.Close):  # a close travels with averages
            self._sub.subscribe(wire.topic(kind))
        self._sub.connect(f"tcp://{LOOPBACK}:{port + 1}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._sub.close()
        self._context.term()

    def until(self, wanted: Callable[[wire.Close], Any]) -> wire.Close:
        """The next close that is `wanted`."""
        deadline = time.monotonic() + DEADLINE_S
        while self._sub.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            for frames in wire.split(self._sub.recv_multipart()):
                close, _ = wire.from_frames(frames)
                if isinstance(close, wire.Close) and wanted(close):
                    return close
        raise AssertionError(f"no such close in {DEADLINE_S:g} s")

    def step_with(self, *contributors: int) -> wire.Close:
        """The next close of just these workers."""
        return self.until(lambda close: set(close.contributors) == set(contributors))


# ------------------------------------------------------------------------- a server in a thread


class Served:
    """A real server in a thread of this process, without an observer; as a `with` block.

    It is the server's watcher too: `said` are its sentences, `closes` the log of updates. At the
    end of the block every thread that began in it must have ended.
    """

    def __init__(
        self,
        *,
        keys: Keys | None = None,
        guarded: str = LOOPBACK,
        recovery: str | None = None,
        watched: bool = False,
        port: int | None = None,
        ports: Ports | None = None,
        trial: int = 1,
        **settings: Any,
    ) -> None:
        """With `keys`, only peers that have them are admitted, on loopback too, or only where
        another address is `guarded`. `watched`: the run can be watched. The servers of several runs
        have the same `ports`. Nobody is late on a busy machine, unless `timeout` is given."""
        self._threads = set(threading.enumerate())
        self.port = port or free_port()
        if not settings.get("deterministic"):  # where rounds wait for everybody anyway
            settings = {"timeout": PATIENCE_S, **settings}
        self.settings = Settings(port=self.port, observer=False, **settings)
        self.said: list[str] = []
        self.closes: list[wire.Close] = []
        self.problems: list[str] = []
        self._waits: list[tuple[Callable[[], Any], threading.Event]] = []
        self.server = Server(
            self.settings,
            to_wire(self.settings),
            self,
            hosts=[] if keys and guarded == LOOPBACK else [LOOPBACK],
            run="test" if trial == 1 else f"test {trial}",
            observer_key="",
            guarded=[guarded] if keys else [],
            keys=keys.for_server() if keys else None,
            recovery=recovery,
            status=self._status if watched else None,
            ports=ports,
            trial=trial,
        )
        self._overview = Overview(self.settings, "test", "folder", "here")
        self._keys = keys_of(decode(keys.token(LOOPBACK, self.port))) if keys else None
        self._pool = ThreadPoolExecutor(16)
        self._futures: list[Future[Any]] = []
        self.end = self.start(self._serve)

    @property
    def watched_at(self) -> int:
        """The port."""
        return self.settings.port_of_watchers

    def _serve(self) -> wire.End:
        try:
            return self.server.run()
        finally:
            self.server.close()

    def start(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> Future[T]:
        """Call it in a thread that is waited for at the end of the block."""
        future = self._pool.submit(function, *args, **kwargs)
        self._futures.append(future)
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.stop("the test is over")
        if error is None:
            self.end.result(DEADLINE_S)
            for future in self._futures:
                future.exception(DEADLINE_S)
            self._pool.shutdown()
            for thread in set(threading.enumerate()) - self._threads:
                if thread.name == forked.LISTENER:  # the first process was forked in this block
                    continue
                thread.join(DEADLINE_S)
                assert not thread.is_alive(), f"the thread {thread.name} goes on"
        else:
            print("--- the server:", *self.said, sep="\n")
            self._pool.shutdown(wait=False)

    def join(
        self, number: int, say: Callable[[str], None], join_timeout: float = DEADLINE_S
    ) -> Cluster:
        """Take part as this worker, with the keys if there are any."""
        client = Client(
            LOOPBACK, self.port, id=number, keys=self._keys, log=logs.to(say, "workers")
        )
        try:
            client.connect(join_timeout)
        except BaseException:
            client.close()
            raise
        return Cluster(client)

    def wait(self, *futures: Future[Any]) -> None:
        """Until they are done; raises at once what went wrong in one of them or in the server."""
        deadline = time.monotonic() + DEADLINE_S
        pending = set(futures)
        while pending:
            watched = pending if self.end.done() else {*pending, self.end}
            left = max(0.0, deadline - time.monotonic())
            done, _ = wait(watched, left, return_when=FIRST_COMPLETED)
            if not done:
                raise AssertionError("this took too long; the server said:\n" + self.text)
            for future in done:
                future.result()
            pending -= done

    # What the server calls, in its thread.

    def _status(self, control: Control, now: float) -> bytes:
        totals = Totals(len(self.closes), seconds=1.0)
        made = self._overview.status(
            control.rounds, totals, control.traffic, None, "", now, time.time()
        )
        return to_json(made)

    def say(self, text: str, warning: bool = False) -> None:
        self.said.append(text)

    def closing(self, control: Control, close: wire.Close) -> None:
        self.closes.append(close)  # before a worker can know of it

    def closed(self, control: Control, close: wire.Close) -> None:
        self._look()

    def reported(self, control: Control, report: wire.Report) -> None:
        pass

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def looked(self, control: Control, now: float) -> None:
        self._look()

    def _look(self) -> None:
        for waiting in list(self._waits):
            wanted, event = waiting
            if wanted():
                self._waits.remove(waiting)
                event.set()

    # What tests and their workers call.

    def until(self, wanted: Callable[[], Any]) -> None:
        """Wait until `wanted()` is true, as seen from the server's thread."""
        event = threading.Event()
        self._waits.append((wanted, event))
        self.end.add_done_callback(lambda end: event.set())
        assert event.wait(DEADLINE_S), "it did not come to pass; the server said:\n" + self.text
        if self.end.done():
            self.end.result()

    def until_said(self, sentence: str) -> None:
        self.until(lambda: any(re.search(sentence, line) for line in self.said))

    def until_waits(self, number: int) -> None:
        """Until this worker waits for a snapshot, which comes before the next round."""
        peers = self.server.rounds.peers
        self.until(
            lambda: any(
                p.id == number and p.join is not None and p.state == WAITING
                for p in list(peers.values())
            )
        )

    def until_contributes(self, number: int) -> None:
        """Until there is an update of which this worker has a part."""
        self.until(lambda: any(number in close.contributors for close in self.closes))

    def stop(self) -> None:
        """End a run that would not end by itself."""
        self.server.stop(ENOUGH)

    @property
    def text(self) -> str:
        return "\n".join(self.said)

    @property
    def samples(self) -> tuple[int, int, int]:
        """(done, partly, skipped), as the ledger has them."""
        ledger = self.server.rounds.ledger
        assert ledger is not None
        return ledger.done, ledger.partly, ledger.skipped

    def digests(self) -> set[str]:
        """Of the replicas that left at the last step."""
        step = self.end.result(DEADLINE_S).step
        return {digest for at, digest in self.server.digests.values() if at == step}
