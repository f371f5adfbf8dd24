"""`python -m paramserver.launch ray`: server, observer and workers as actors of a Ray cluster.

It uses the cluster of RAY_ADDRESS or of this machine's `ray start`, else it starts one here for
this run. The server, with its observer, goes to this machine's node, so that the run folder is
where the command was typed; workers go one to each node, and round again where there are more of
them. Ray copies the code to the nodes (`working_dir`): they need only the packages that it imports.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from paramserver import terminal
from paramserver.config.loading import dump, load
from paramserver.config.schema import allowed
from paramserver.errors import UserError
from paramserver.fleet import commands
from paramserver.fleet.user_code import find_user_code
from paramserver.launch.ray_actor import Actor
from paramserver.net.jointoken import VARIABLE
from paramserver.settings import Settings
from paramserver.typed import installing

ACTOR_START_S = 120.0  # until Ray has started an actor, and a server listens
LAST_WORDS_S = 10.0
SHOW_S = 0.25
RESTARTS = 3
RUN_END_S = 120.0  # an orderly end takes the observer's last evaluation and upload
ACTORS_END_S = 15.0
GIVEN = ("WANDB_API_KEY", "WANDB_BASE_URL")  # go on to the server
LAST_WORDS = 15


@dataclass(frozen=True)
class Node:
    """A machine of the Ray cluster."""

    id: str
    address: str
    name: str
    gpus: int = 0


@dataclass
class Member:
    """An actor of this run, as seen from the launcher."""

    name: str
    node: Node
    actor: Any
    ran: Any = None  # Ray's reference to what `run` will return
    born: str = ""
    seen: int = 0
    asked: Any = None  # Ray's reference to its next output
    asked_at: float = 0.0
    lines: list[str] = field(default_factory=list)  # its last lines
    ready: bool = False
    code: int | None = None
    ended: bool = False


def ray(arguments: list[str]) -> int:
    """Run on a Ray cluster, and show the run until its end; returns the server's exit code."""
    loaded = load(arguments, "server")
    settings = replace(loaded.settings, plain=True, hosts=None)
    engine = _engine()
    with tempfile.TemporaryDirectory(prefix="paramserver-ray-") as folder:
        pack(settings, Path(folder))
        _connect(engine, folder, settings.num_workers)
    try:
        nodes = _nodes(engine)
        if "num_workers" not in loaded.given:  # a file's number is for runs by hand
            settings = replace(settings, num_workers=len(nodes))
        run = RayRun(engine, _absolute(settings), nodes)
        try:
            return run.run()
        finally:
            run.close()
    finally:
        engine.shutdown()  # this also ends a cluster that was started here


def pack(settings: Settings, folder: Path) -> None:
    """Copy the code for the nodes into a folder: this project, and the user's own modules that
    settings name."""
    here = Path(__file__).resolve().parents[1]
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package in ("paramserver", "workers", "conf"):
        if (here.parent / package).is_dir():
            shutil.copytree(here.parent / package, folder / package, ignore=leave)
    for own in find_user_code(settings, folder):
        terminal.say(f"copying {own} to each node")
        for name in own.names:
            source, target = own.folder / name, folder / name
            if target.exists():
                raise UserError(f"{source} has the name of something of this project's")
            if source.is_dir():
                shutil.copytree(source, target, ignore=leave)
            else:
                shutil.copy(source, target)


def place(nodes: Sequence[Node], count: int) -> list[Node]:
    """The node of each worker: one on each, then round again."""
    return list(islice(cycle(nodes), count))


def _absolute(settings: Settings) -> Settings:
    """Make relative paths absolute, because actors work in a folder of Ray's; paths in the home
    folder begin with `~`, which may be elsewhere on other nodes."""
    root = Path(os.path.expanduser(str(settings.dataset.get("root", "data")))).absolute()
    with suppress(ValueError, RuntimeError):
        root = Path("~") / root.relative_to(Path.home())
    return replace(
        settings,
        run_dir=str(Path(os.path.expanduser(settings.run_dir)).absolute()),
        resume=_resumed(settings.resume),
        dataset={**settings.dataset, "root": str(root)},
    )


def _resumed(resume: str | None) -> str | None:
    return str(Path(resume).absolute()) if resume and Path(resume).exists() else resume


# --------------------------------------------------------------------------------- Ray's own side


def _engine() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports to Ray's makers
    try:
        import ray as engine
    except ImportError as missing:
        raise UserError(
            f"Ray cannot be imported: {missing}", installing("pip install 'ray>=2.40'")
        ) from None
    return engine


def _connect(engine: Any, folder: str, workers: int) -> None:
    """Connect to the cluster that is there, else to a new one, with room for `workers` workers.
    Raises `UserError`."""
    wanted: dict[str, Any] = {
        "runtime_env": {"working_dir": folder},
        "logging_level": "ERROR",
        "log_to_driver": False,
    }
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        engine.init(address="auto", **wanted)
    except ConnectionError as error:
        if address := os.environ.get("RAY_ADDRESS"):
            raise UserError(
                f"there is no Ray cluster at RAY_ADDRESS={address}: {str(error).splitlines()[0]}",
                "see it: ray status; without RAY_ADDRESS one is started here for the run",
            ) from None
        terminal.say("no Ray cluster is here: starting one for this run")
        room = max(workers, os.cpu_count() or 1)
        engine.init(address="local", num_cpus=room, include_dashboard=False, **wanted)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _nodes(engine: Any) -> list[Node]:
    """The living nodes, this machine's first."""
    own = engine.get_runtime_context().get_node_id()
    found = [
        Node(
            each["NodeID"],
            each["NodeManagerAddress"],
            each.get("NodeManagerHostname") or each["NodeManagerAddress"],
            int(each["Resources"].get("GPU", 0)),
        )
        for each in engine.nodes()
        if each["Alive"]
    ]
    return sorted(found, key=lambda node: (node.id != own, node.address, node.id))


# -------------------------------------------------------------------------------------- the actors


class RayRun:
    """One run as actors of Ray: the server and its workers."""

    def __init__(self, ray: Any, settings: Settings, nodes: Sequence[Node]) -> None:
        self.ray, self.settings = ray, settings
        self.patience_s = ACTORS_END_S
        home = nodes[0]
        placed = place(nodes, settings.num_workers)
        self.far = {node.address for node in placed} - {home.address}
        self.server = self._member("the server", home, cpus=0)
        self.workers = [
            self._member(f"worker {number}", node, cpus=1) for number, node in enumerate(placed, 1)
        ]

    def _member(self, name: str, node: Node, cpus: int) -> Member:
        # The server reserves no processor in Ray, so that the smallest node has room for it.
        near = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        is_worker = cpus > 0
        remote = self.ray.remote(
            max_restarts=RESTARTS,
            max_task_retries=0,
            max_concurrency=4,  # `run` takes one as long as its program lives
            num_cpus=cpus,
            num_gpus=1 if is_worker and node.gpus else 0,
            # A worker whose node is gone may go on elsewhere; the run folder is on the server's.
            scheduling_strategy=near(node.id, soft=is_worker),
        )(Actor)
        return Member(name, node, remote.remote())

    def run(self) -> int:
        """Start everything, show it, and end it in order at Ctrl-C; returns the server's exit
        code."""
        try:
            self._start()
            return self._watch(math.inf)
        except KeyboardInterrupt:
            terminal.say("ending the run in order; Ctrl-C again: at once")
        if self.server.ran is None:
            return 130
        try:
            self.server.actor.stop.remote()  # it ends its run, and with it the workers
            return self._watch(time.monotonic() + RUN_END_S)
        except KeyboardInterrupt:
            self.patience_s = 0.0
            return 130

    def close(self) -> None:
        """Leave nothing running: kill programs that do not end now, with their actors."""
        left = [m for m in (self.server, *self.workers) if m.ran is not None and not m.ended]
        for member in left:
            member.actor.stop.remote()
        if left and self.patience_s:
            running = [member.ran for member in left]
            self.ray.wait(running, num_returns=len(running), timeout=self.patience_s)
        for member in (self.server, *self.workers):
            self.ray.kill(member.actor, no_restart=True)

    # ------------------------------------------------------------------ starting

    def _start(self) -> None:
        s, home = self.settings, self.server.node
        said = ", ".join(f"{w.name} on {w.node.name}" for w in self.workers)
        terminal.say(f"Ray: the server on {home.name}, {said}")
        host_ip = home.address if self.far else None
        token = ""
        if self.far and s.security != "none":
            token = self._ask(self.server, self.server.actor.token.remote(home.address, s.port))
        given = {name: os.environ[name] for name in GIVEN if os.environ.get(name)}
        server = dump(replace(s, hosts=None, host_ip=host_ip))
        self._begin(self.server, ["paramserver"], server, given, ["resume=null"])
        self._until_ready()
        for number, worker in enumerate(self.workers, 1):
            far = worker.node.address != home.address
            words = [
                "workers", f"id={number}", f"port={s.port}", f"join_timeout={s.join_timeout:g}",
                f"dataset.root={s.dataset['root']}", f"device={s.device}", f"security={s.security}",
                f"host_ip={home.address if far else 'null'}", "" if token else "join=null",
                f"threads={s.threads}" if s.threads else "",
                f"allow={','.join(names)}" if (names := allowed(s)) else "",
            ]  # fmt: skip
            secret = {VARIABLE: token} if token else {}  # on the server's node, too: without ipc
            self._begin(worker, [word for word in words if word], "", secret, [])

    def _begin(
        self,
        member: Member,
        words: list[str],
        settings: str,
        environment: Mapping[str, str],
        restarted: list[str],
    ) -> None:
        again = commands.AGAIN["server" if member is self.server else "worker"]
        run = member.actor.run.options(max_task_retries=-1)
        member.ran = run.remote(words, settings, environment, again, restarted)

    def _ask(self, member: Member, reference: Any) -> Any:
        try:
            return self.ray.get(reference, timeout=ACTOR_START_S)
        except self.ray.exceptions.GetTimeoutError:
            raise UserError(
                f"Ray has not started {member.name} on {member.node.name} in {ACTOR_START_S:g} s",
                "is there room? See: ray status",
            ) from None
        except self.ray.exceptions.RayError as error:
            raise UserError(
                f"{member.name} cannot be started on {member.node.name}: {_first_line(error)}",
                "the nodes need this project and what it needs: pip install . in a clone of it",
            ) from None

    def _until_ready(self) -> None:
        deadline = time.monotonic() + ACTOR_START_S
        while not self.server.ready:
            self._look()
            if self.server.ended:
                raise SystemExit(self.server.code or 1)
            if time.monotonic() > deadline:
                where = self.server.node.name
                raise UserError(f"the server on {where} did not listen in {ACTOR_START_S:g} s")

    # ------------------------------------------------------------------ watching

    def _watch(self, deadline: float) -> int:
        """Show the output until the server has ended; returns its exit code, but not 0 where all
        workers failed: then the server was asked to end."""
        failed = False
        while not self.server.ended:
            self._look()
            if all(worker.ended and worker.code != 0 for worker in self.workers):
                failed = True
                self.server.actor.stop.remote()
            if time.monotonic() > deadline:
                terminal.say(f"the server did not end within {RUN_END_S:g} s", error=True)
                return 1
        return (1 if self.server.code is None else self.server.code) or int(failed)

    def _look(self) -> None:
        """Show the next output of the members, and the end of those that have ended."""
        now = time.monotonic()
        members = [m for m in (self.server, *self.workers) if m.ran is not None and not m.ended]
        for member in members:
            if member.asked is None:
                member.asked = member.actor.said.remote(member.born, member.seen)
                member.asked_at = now
        every = [member.ran for member in members] + [member.asked for member in members]
        self.ray.wait(every, num_returns=len(every), timeout=SHOW_S)
        done, _ = self.ray.wait(every, num_returns=len(every), timeout=0)
        for member in members:
            if member.asked in done:
                self._take(member)
            elif now - member.asked_at > ACTOR_START_S:
                member.asked_at = math.inf  # shown once
                said = f"{member.name} says nothing on {member.node.name} since {ACTOR_START_S:g} s"
                terminal.say(f"{said}: is there room? See: ray status", error=True)
            if member.ran in done:
                self._ended(member)

    def _take(self, member: Member) -> None:
        """Take the output that a member has sent."""
        asked, member.asked = member.asked, None
        with suppress(self.ray.exceptions.RayError):  # it is being restarted, or dead
            self._tell(member, *self.ray.get(asked))

    def _tell(self, member: Member, born: str, seen: int, lines: list[str], ready: bool) -> None:
        if member.born not in ("", born):
            terminal.say(f"{member.name} died: Ray has started it again")
        member.born, member.seen, member.ready = born, seen, ready
        member.lines = [*member.lines, *lines][-LAST_WORDS:]
        if member is self.server:
            for line in lines:
                terminal.say(line)

    def _ended(self, member: Member) -> None:
        member.ended = True
        try:
            member.code = self.ray.get(member.ran)
            last = member.actor.said.remote(member.born, member.seen)
            self._tell(member, *self.ray.get(last, timeout=LAST_WORDS_S))
        except self.ray.exceptions.RayError as error:
            member.code = 1 if member.code is None else member.code
            terminal.say(f"{member.name} is gone: {_first_line(error)}", error=True)
        if member is not self.server and member.code != 0:
            words = "\n".join(member.lines)
            terminal.say(f"{member.name} failed (exit code {member.code}):\n{words}", error=True)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
