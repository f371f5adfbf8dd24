"""`python -m paramserver.launch demo`: a whole cluster on this machine, for a first look; `script
train.py`: the same for a user's own training script; `ray`: on the nodes of a Ray cluster
(`paramserver.launch.ray`)."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from paramserver import terminal, trace
from paramserver.config.loading import load
from paramserver.config.schema import allowed, scope
from paramserver.errors import UserError
from paramserver.fleet.user_code import Script
from paramserver.keys import load_or_make
from paramserver.launch.machines import behind_dashes
from paramserver.net import machine
from paramserver.net.address import LOOPBACK, listen
from paramserver.net.jointoken import VARIABLE
from paramserver.output.runfolder import latest
from paramserver.program import command as program
from paramserver.program import interrupt
from paramserver.settings import Settings
from paramserver.transport.sockets import ipc_folder

DEMO = {
    "host_ip": LOOPBACK, "dataset.name": "digits", "num_epochs": "15", "num_workers": "2",
    "eval_steps": "100",
}  # fmt: skip
"""What the demo sets, unless the command line says otherwise."""
WORKERS_PATIENCE_S = 10.0
PARTS_OF_A_STEP = ("load", "compute", "encode", "send", "wait", "decode", "optimizer")
SCRIPT_S = 600.0  # for a script's work after its run: an evaluation, a sample
CTRL_C_S = 1.0  # that a server has to hear of it by itself
PATIENCE_S = 120.0  # an orderly end takes the observer's last evaluation and upload


def demo(arguments: list[str]) -> int:
    """Run server, observer and workers on loopback; returns the server's exit code. Leaves nothing
    running."""
    given = {a.partition("=")[0] for a in arguments}
    arguments = [f"{k}={v}" for k, v in DEMO.items() if k not in given] + arguments
    settings = load(arguments, "server").settings  # show mistakes before anything starts
    local = [a for a in arguments if _for_workers(a.partition("=")[0])]
    # not the cluster that workers of this machine usually join
    secret = _secret(settings)
    local += ["host_ip=null"] if secret else ["join=null", "host_ip=null"]
    local += [f"allow={','.join(names)}"] if (names := allowed(settings)) else []
    if settings.num_workers > 16:
        raise UserError(
            f"{settings.num_workers} workers are too many for one machine",
            "num_workers=2 is enough",
        )

    def worker(number: int) -> tuple[list[str], dict[str, str]]:
        return program("workers", f"id={number}", *local), {**os.environ, **secret}

    with _on_this_machine(settings, arguments, worker) as started:
        try:
            return _watch(started)
        except KeyboardInterrupt:
            return started.interrupt()


def _secret(settings: Settings) -> dict[str, str]:
    """What the environment of the workers beside this server must hold, for nobody else to read:
    the join token, where the server listens for other machines and its own user's peers cannot show
    by ipc that they are."""
    guarded = listen(machine.settle(settings)[0], settings.security)[1]
    ipc = ipc_folder() if guarded else None
    if ipc is not None:
        ipc.close()
    if ipc is not None or not guarded:
        return {}
    return {VARIABLE: load_or_make()[0].token(guarded[0], settings.port)}


@dataclass(frozen=True)
class Started:
    """A server, its workers, and the folder with their logs."""

    server: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]]
    logs: Path
    shown: dict[int, str] = field(default_factory=dict)
    """By worker that has failed: the end of its output, which was shown."""
    runs: int = 1
    """That the server serves, one after another."""

    def words(self, number: int) -> str:
        """The output of this worker."""
        path = self.logs / f"worker-{number}.log"
        try:
            return path.read_text(errors="replace").strip()
        except OSError as error:  # a clean-up of /tmp
            return f"{path} cannot be read: {error.strerror or error}"

    def interrupt(self) -> int:
        """Let the server end the run in order, and the workers with it; returns its exit code."""
        if terminal.has_foreground():  # Ctrl-C goes to the server, too, which tells it from SIGTERM
            with suppress(subprocess.TimeoutExpired):
                return self.server.wait(CTRL_C_S)
        self.server.terminate()
        return self.server.wait()


@contextmanager
def _on_this_machine(
    settings: Settings,
    arguments: list[str],
    worker: Callable[[int], tuple[list[str], dict[str, str]]],
) -> Iterator[Started]:
    """A server with these arguments and `num_workers` workers: `worker(number)` is the command line
    and the environment of one. Leaves nothing running: a first Ctrl-C raises KeyboardInterrupt, a
    second one kills them all."""
    logs = _log_folder(Path(settings.run_dir))
    processes: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        for process in processes:
            process.kill()

    interrupt(at_once=kill)
    server = subprocess.Popen(
        program("paramserver", *arguments),
        stdin=subprocess.DEVNULL,  # it must not ask a person: its workers are being started
    )
    processes.append(server)
    started = Started(server, [], logs, runs=settings.runs)
    try:
        for number in range(1, settings.num_workers + 1):
            words, environment = worker(number)
            with open(started.logs / f"worker-{number}.log", "wb") as log:
                process = subprocess.Popen(
                    words,
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is for the server
                )
            processes.append(process)
            started.workers.append(process)
        yield started
    finally:
        _end([server], PATIENCE_S)
        _end(started.workers, WORKERS_PATIENCE_S)
        _keep(started.logs, Path(settings.run_dir))


def _log_folder(run_dir: Path) -> Path:
    """A folder for the workers' output, until there is a run folder. Raises `UserError`."""
    prefix = "paramserver-workers-"
    try:
        return Path(tempfile.mkdtemp(prefix=prefix))
    except OSError:  # no folder for temporary files can be written
        pass
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{prefix}", dir=run_dir))
    except OSError as error:
        raise UserError(
            f"there is no folder for the workers' logs: {error.strerror or error}: {run_dir}",
            "choose one that can be written, with TMPDIR=FOLDER or run_dir=FOLDER",
        ) from None


def _end(processes: list[subprocess.Popen[bytes]], patience_s: float) -> None:
    """End them all: first in order, then by force."""
    deadline = time.monotonic() + patience_s
    for p in processes:
        if p.poll() is None:
            p.terminate()
    for p in processes:
        try:
            p.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


def _for_workers(name: str) -> bool:
    """Is this a setting of one process that the workers of a demo share with the server?"""
    if name in ("cluster", "model"):
        return True  # their files may hold such settings
    return scope(name) == "local" and name not in ("id", "run_dir", "plain", "host_ip", "join")


def _watch(started: Started) -> int:
    """Wait for the server; show the last lines of a worker that fails. Returns the server's exit
    code, but not 0 where all workers failed: then the server was asked to end."""
    told, alone_since = started.shown, 0.0
    while started.server.poll() is None:
        for number, worker in enumerate(started.workers, 1):
            if worker.poll() not in (None, 0) and number not in told:
                words = started.words(number)[-2000:]
                alike = next((other for other, said in told.items() if said == words), None)
                told[number] = words
                text = f":\n{words}" if alike is None else f" in the same way as worker {alike}"
                terminal.say(f"worker {number} failed{text}", error=True)
                if len(told) == len(started.workers):
                    started.server.terminate()
        if started.runs > 1 and all(w.poll() is not None for w in started.workers):
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > WORKERS_PATIENCE_S:  # it waits for the next run's
                terminal.say("every worker has ended: so does the server")
                started.server.terminate()
                alone_since = math.inf
        time.sleep(0.1)
    return started.server.returncode or int(len(told) == len(started.workers))


def profile(arguments: list[str]) -> int:
    """A short demo that is traced: a table of where a worker's step goes, and trace.json."""
    given = {a.partition("=")[0] for a in arguments}
    chosen = {"num_epochs": "5", "eval_steps": "0", "wandb.mode": "disabled"}
    arguments = [f"{k}={v}" for k, v in chosen.items() if k not in given] + arguments
    with tempfile.TemporaryDirectory(prefix="paramserver-trace-") as traces:
        os.environ[trace.VARIABLE] = traces
        code = demo(arguments)
        parts = [json.loads(p.read_text()) for p in sorted(Path(traces).glob("*.json"))]
    folder = latest(Path(load(arguments, "server").settings.run_dir))
    if code == 0 and folder is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="milliseconds of a step, by what they went into")
        table.add_column("process")
        for name in PARTS_OF_A_STEP:
            table.add_column(name, justify="right")
        for events in parts:
            process = events[0]["args"]["name"]
            if process.startswith("worker"):
                times = trace.own_times(events)
                steps = sum(e["name"] == "wait" for e in events) or 1
                row = [f"{1000 * times.get(n, 0.0) / steps:.3f}" for n in PARTS_OF_A_STEP]
                table.add_row(process, *row)
        console = Console()
        with console.capture() as drawn:
            console.print(table)
        terminal.write(drawn.get())
        path = folder.path / "trace.json"
        path.write_text(json.dumps({"traceEvents": [e for events in parts for e in events]}))
        terminal.say(f"every span of every process: {path} (open it at ui.perfetto.dev)")
    return code


def ray(arguments: list[str]) -> int:
    """A run on a Ray cluster."""
    from paramserver.launch.ray import ray as on_ray

    interrupt(times=2)  # the second one ends the run's processes at once
    return on_ray(arguments)


def script(arguments: list[str]) -> int:
    """Run a server and `num_workers` processes of a user's training script, all on this machine.

    The settings in a YAML file beside the script, of the same name, come first; what follows `--`
    is the script's own. Each process finds the server in its environment (`join()` without an
    address). The output of the first one is printed at the end, because the progress has the
    terminal until then.
    """
    arguments, behind = behind_dashes(arguments)
    if not arguments or "=" in arguments[0]:
        raise UserError(
            "which script?",
            "python -m paramserver.launch script train.py [key=value] [-- the script's arguments]",
        )
    own, arguments = Script.find(arguments[0], behind), arguments[1:]
    if not any(a.startswith("host_ip=") for a in arguments):
        arguments = [f"host_ip={LOOPBACK}", *arguments]
    arguments = own.settings(arguments)
    settings = load(arguments, "server").settings
    place = {"PARAMSERVER_HOST": LOOPBACK, "PARAMSERVER_PORT": str(settings.port)}
    place |= _secret(settings)
    cores = max(1, (os.cpu_count() or 1) // settings.num_workers)
    usual = {"OMP_NUM_THREADS": str(cores), "PYTHONUNBUFFERED": "1"}

    def worker(number: int) -> tuple[list[str], dict[str, str]]:
        return (
            [sys.executable, str(own.path), *own.words],
            {**usual, **os.environ, **place, "PARAMSERVER_ID": str(number)},
        )

    with _on_this_machine(settings, arguments, worker) as started:
        try:
            failed = _watch(started) != 0
            failed = not _all_well(started.workers) or failed
        except KeyboardInterrupt:
            return started.interrupt()
        words = started.words(1)
        if started.shown.get(1) != words:
            terminal.say(words)
        return int(failed)


def _all_well(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Wait for the scripts, which may have work after the run; did all of them end well?"""
    deadline = time.monotonic() + SCRIPT_S
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    return all(p.returncode == 0 for p in processes)


def _keep(logs: Path, run_dir: Path) -> None:
    """Move the workers' output into the run's folder."""
    folder = latest(run_dir)
    if folder is not None:
        try:
            for words in logs.iterdir():
                shutil.move(words, folder.path / words.name)
        except (OSError, shutil.Error) as error:
            terminal.say(f"what the workers said is in {logs} only: {error}", error=True)
            return
    shutil.rmtree(logs, ignore_errors=True)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "demo": demo,
    "profile": profile,
    "script": script,
    "ray": ray,
}
