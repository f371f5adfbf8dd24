"""`up`: starts a run on a list of machines.

Each step runs on all machines at once and reports all faults before the next one: check whether
they can take part, copy the code, make the environment, find the path from each worker's machine to
the server's, start the server, and when it listens the workers. Where a step fails, the processes
that were started are ended again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from paramserver import terminal
from paramserver.config.loading import dump
from paramserver.errors import UserError
from paramserver.fleet import commands, measurements, remote
from paramserver.fleet.attach import Followers, show
from paramserver.fleet.commands import Checked, Trouble
from paramserver.fleet.fetch import tell_where
from paramserver.fleet.lines import Lines
from paramserver.fleet.measurements import Measurement
from paramserver.fleet.processes import machines, refuse, states, stop
from paramserver.fleet.remote import Agent, Failed
from paramserver.fleet.supervisor import State
from paramserver.fleet.user_code import Script, UserCode, absent, find_user_code, place_of
from paramserver.net.hosts import Host
from paramserver.net.interfaces import SPOKEN, Interface, from_json, paths
from paramserver.net.interfaces import Path as Way
from paramserver.net.jointoken import VARIABLE, joined
from paramserver.net.link_watch import FAR_BELOW, Chosen, write
from paramserver.net.link_watch import VARIABLE as CHOSEN
from paramserver.settings import Settings

READY_S = 120.0
ASK_S = 0.5  # between questions whether the server listens
QUICK_S = 0.3  # for each way of a path that is measured before a start
SECRETS = ("WANDB_API_KEY", "WANDB_BASE_URL")
"""Environment variables that go on to the server's machine."""


@dataclass(frozen=True)
class Job:
    """The machines, settings and code of a start."""

    settings: Settings
    hosts: tuple[Host, ...]
    user_code: tuple[UserCode, ...] = ()
    """The user's own modules outside the clone."""
    script: Script | None = None
    """Runs on the workers' machines in place of the built-in training."""
    addresses: tuple[str, ...] = ()
    """Of the server, for the workers of other machines."""
    checked: Mapping[str, Checked] = field(default_factory=dict)
    """What was found on each machine."""

    @property
    def server(self) -> Host:
        return next(host for host in self.hosts if host.serves)

    @property
    def workers(self) -> tuple[Host, ...]:
        return tuple(host for host in self.hosts if host.works)

    @property
    def text(self) -> str:
        """The run's settings for the server, without those of this machine alone."""
        return dump(replace(self.settings, hosts=None, host_ip=None))

    @property
    def stamp(self) -> str:
        """An identifier of this start: the same machines and settings have the same one."""
        told = repr((self.text, self.hosts, self.settings.host_ip, self.script))
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def job(arguments: Sequence[str], script: Script | None = None) -> Job:
    """The job that these settings describe. Raises `UserError`."""
    if script is not None:
        arguments = script.settings(arguments)
    settings, given, hosts = machines(arguments)
    count = sum(len(host.processes) for host in hosts)
    if "num_workers" not in given:  # a file's number is for runs by hand
        if settings.min_workers > count:
            raise UserError(
                f"min_workers is {settings.min_workers}, and the machines have {count} workers",
                "min_workers=1 lets a run begin with one",
            )
        settings = replace(settings, num_workers=count)
    if settings.host_ip == "auto":
        settings = replace(settings, host_ip=None)
    return Job(settings, hosts, script=script)


def up(wanted: Job, arguments: list[str], *, dry: bool = False) -> int:
    """Start a run and show it; returns the server's exit code. Raises `UserError` with all faults.

    `arguments` are the words that the job was made of.
    """
    root = clone()
    wanted = replace(wanted, user_code=find_user_code(wanted.settings, root, wanted.script))
    if dry:
        for command in all_commands(wanted, root):
            terminal.result(str(command))
        return 0
    lines = Lines(wanted.hosts)
    checked = check(wanted.hosts)
    check_modules(wanted, checked, root)
    wanted = replace(wanted, checked=checked)
    running = look(wanted, checked)
    if not running:
        prepare(lines, wanted.hosts, root, wanted.user_code)
    with ExitStack() as stack:
        agents = open_agents(stack, wanted.hosts)
        ways, addresses = choose_ways(lines, wanted, agents)
        wanted = replace(wanted, addresses=tuple(addresses))
        token = join_token(wanted, agents, addresses)
        stack.close()
        with Followers(lines) as followers:
            start(lines, followers, wanted, ways, running, token)
            code = show(followers, lines, arguments, wanted.settings.plain)
        if code is not None:
            tell_where(lines, wanted.settings, wanted.server, arguments)
        return code or 0


def clone() -> Path:
    """The clone that is copied: the one with this file."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "Makefile").is_file() or not (root / "pyproject.toml").is_file():
        raise UserError(
            f"{root} is no clone of the project", "make up copies one to the machines: run it there"
        )
    return root


# -------------------------------------------------------------------------------------- the steps


def check(hosts: Sequence[Host]) -> dict[str, Checked]:
    """Check all machines. Raises `UserError` with all faults."""

    def one(host: Host) -> Checked:
        return commands.read_check(remote.must(host, commands.check(host), "the check"))

    found, troubles = remote.on_all(one, hosts)
    for host in hosts:
        if host.name in found:
            troubles += commands.troubles(host, found[host.name])
    refuse(troubles, _cannot(troubles))
    return found


def check_modules(wanted: Job, checked: Mapping[str, Checked], root: Path) -> None:
    """Raise `UserError` for a module that settings name and that can be nowhere: it is not here,
    and on some machine no environment is yet, in which a person may have installed it."""
    bare = [name for name, found in checked.items() if "environment" not in found.has]
    for module, setting in absent(wanted.settings, root).items() if bare else ():
        raise UserError(
            f"{setting}: there is no module {module!r} here, and nothing is installed on {bare[0]}",
            "its file must be in this folder, or in one that PYTHONPATH names: it is copied",
        )


def _cannot(troubles: Sequence[Trouble]) -> str:
    names = list(dict.fromkeys(trouble.host for trouble in troubles))
    many = len(names) > 1
    return f"{', '.join(names)} cannot take part as {'they are' if many else 'it is'}"


def look(wanted: Job, checked: Mapping[str, Checked]) -> set[tuple[str, str]]:
    """The processes of this same start that run already, as (machine, process): after an
    interrupted start only the others are started. Processes of another start without a server are
    ended; while another server runs this raises `UserError`."""
    ready = [host for host in wanted.hosts if "environment" in checked[host.name].has]
    found, troubles = states(ready)
    refuse(troubles, _cannot(troubles))
    alive = {
        (host, name): state
        for host, kept in found.items()
        for name, state in kept.items()
        if state.alive
    }
    server = alive.get((wanted.server.name, "server"))
    if server is not None and server.up != wanted.stamp:
        since = f"{datetime.fromtimestamp(server.since):%d %b %H:%M}"
        folder = server.run_folder and f", {commands.spoken(wanted.server, server.run_folder)}"
        raise UserError(
            f"another run is under way on {wanted.server.name}, since {since}{folder}",
            "it was started with other settings, machines or arguments than these\n"
            "see it: make attach; end it: make down",
        )
    ours = {key for key, state in alive.items() if server is not None and state.up == wanted.stamp}
    lines = Lines(wanted.hosts)
    for name in ("server", "worker"):
        left = [
            host
            for host in ready
            if any(
                key[0] == host.name and key[1].partition("-")[0] == name for key in {*alive} - ours
            )
        ]
        refuse(stop(lines, left, name), "what is left of an earlier run cannot be ended")
    return ours


def prepare(
    lines: Lines,
    hosts: Sequence[Host],
    root: Path,
    user_code: Sequence[UserCode] = (),
    *,
    quiet: bool = False,
) -> None:
    """Copy the code and make the environments. Raises `UserError`."""
    for own in user_code:
        lines.tell(f"copying {own} to each machine")

    def say(host: Host, line: str) -> None:
        if not quiet:
            lines.say(host.name, line)

    def one(host: Host) -> None:
        began = time.monotonic()
        for command in (commands.copy(host, str(root)), *commands.copy_own(host, user_code)):
            remote.must(host, command, "copying the code")
        remote.must(
            host, commands.environment(host), "making the environment",
            lambda line: say(host, line) if _worth_saying(line) else None,
        )  # fmt: skip
        say(host, f"the code is there ({time.monotonic() - began:.1f} s)")

    _, troubles = remote.on_all(one, hosts)
    refuse(troubles, _cannot(troubles))


def _worth_saying(line: str) -> bool:
    return not line.startswith(("make: ", "make[")) and bool(line.strip())


def open_agents(stack: ExitStack, hosts: Sequence[Host]) -> dict[str, Agent]:
    return {host.name: stack.enter_context(Agent(host)) for host in hosts}


def interfaces(agents: Mapping[str, Agent]) -> dict[str, list[Interface]]:
    """The interfaces of every machine. Raises `UserError`."""

    def one(host: Host) -> list[Interface]:
        return from_json(agents[host.name].ask("look")["interfaces"])

    found, troubles = remote.on_all(one, [agent.host for agent in agents.values()])
    refuse(troubles, _cannot(troubles))
    return found


def choose_ways(
    lines: Lines, wanted: Job, agents: Mapping[str, Agent]
) -> tuple[dict[str, Way], list[str]]:
    """The path that each worker's machine takes to the server's, the fastest that was measured; and
    all addresses of the server that workers may use, those first: where a path falls silent, a
    worker takes another one.

    Raises `UserError` where there is none.
    """
    server, own = wanted.server, interfaces(agents)
    given = server.ip or wanted.settings.host_ip
    if given is not None and given not in {i.address for i in own[server.name]}:
        have = ", ".join(str(i) for i in own[server.name] if i.kind != "loopback")
        raise UserError(f"{server.name} has no address {given}", f"it has {have or 'none'}")
    ways, troubles = {}, []
    others: list[str] = []
    kept = measurements.from_json(agents[server.name].ask("kept").get("measurements", []))
    for host in wanted.workers:
        if host == server:
            continue
        found = paths(
            own[server.name], own[host.name], server_ip=given, worker_ip=host.ip
        )  # fmt: skip
        if not found:
            troubles.append(Trouble(host.name, f"no network leads from here to {server.name}"))
            continue
        tried = [(way, measure(agents, server.name, host.name, way, QUICK_S)) for way in found]
        carrying = [(way, told) for way, told in tried if "problem" not in told]
        for way, told in tried:
            if "problem" in told:
                lines.say(host.name, f"{way} carries nothing: {told['problem']}")
        if not carrying:
            troubles.append(
                Trouble(
                    host.name, f"does not reach {server.name}: {tried[0][1]['problem']}",
                    "make doctor looks closer",
                )
            )  # fmt: skip
            continue
        others += [way.far.address for way, _ in carrying]
        best, told = max(carrying, key=lambda pair: slower(pair[1]))
        lines.say(host.name, f"reaches {server.name} by {said(best, told)}")
        best = replace(best, bytes_per_s=told["up_bytes_per_s"], measured_by="make up")
        ways[host.name] = _as_the_doctor_had_it(lines, host, best, kept)
    refuse(troubles, _cannot(troubles))
    chosen = [way.far.address for way in ways.values()]
    return ways, list(dict.fromkeys(chosen + others))


def _as_the_doctor_had_it(lines: Lines, host: Host, way: Way, kept: Sequence[Measurement]) -> Way:
    """The path with the doctor's speed, if that is higher, because the present one may be the
    fault. Prints a line where the present speed is far below."""
    here = (host.name, way.near and way.near.address, way.far.address)
    for figure in kept:
        if (figure.machine, figure.near, figure.far) != here or way.bytes_per_s is None:
            continue
        if way.bytes_per_s < FAR_BELOW * figure.bytes_per_s:
            lines.say(
                host.name,
                f"warning: {8e-9 * way.bytes_per_s:.2f} Gbit/s come up now, where make doctor had "
                f"measured {8e-9 * figure.bytes_per_s:.2f} on "
                f"{datetime.fromtimestamp(figure.at):%d %b at %H:%M}: a cable, a busy network?",
            )
        if way.bytes_per_s < figure.bytes_per_s:
            return replace(way, bytes_per_s=figure.bytes_per_s, measured_by="make doctor")
    return way


def join_token(wanted: Job, agents: Mapping[str, Agent], addresses: Sequence[str]) -> str:
    """The join token for workers of other machines, with the server's addresses, made from the keys
    on the server's machine; "" where none is needed. Raises `UserError`."""
    if not addresses or wanted.settings.security == "none":
        return ""
    host = joined(addresses)
    answer = agents[wanted.server.name].ask("token", host=host, port=wanted.settings.port)
    if "problem" in answer:
        raise UserError(f"{wanted.server.name}: {answer['problem']}")
    return str(answer["token"])


def measure(
    agents: Mapping[str, Agent], server: str, worker: str, way: Way, seconds: float
) -> dict[str, Any]:
    """The speed of that path (`speed.Speed`), or ``problem`` and ``errno``."""
    listening = agents[server].ask("listen", address=way.far.address)
    if "problem" in listening:
        return listening
    near = way.near.address if way.near else None
    return agents[worker].ask(
        "measure", address=way.far.address, port=listening["port"], near=near, seconds=seconds
    )


def slower(told: Mapping[str, Any]) -> float:
    """Bytes per second of the slower way."""
    return min(float(told["up_bytes_per_s"]), float(told["down_bytes_per_s"]))


def said(way: Way, told: Mapping[str, Any]) -> str:
    """A path and its speed, in words."""
    kind = SPOKEN.get(way.kind, way.kind)
    rate, trip = 8e-9 * slower(told), 1000 * told["round_trip_s"]
    return f"{way}, {kind}: {rate:.2f} Gbit/s, {trip:.2f} ms" + (
        " (as the settings say)" if way.pinned else ""
    )


def start(
    lines: Lines,
    followers: Followers,
    wanted: Job,
    ways: Mapping[str, Way],
    running: set[tuple[str, str]],
    token: str,
) -> None:
    """Start the processes that do not run yet: the server, and when it listens the workers. Where
    that fails, end those that were started. Raises `UserError`."""
    server, begun = wanted.server, False
    try:
        if (server.name, "server") not in running:
            begun = True
            first = _starts(wanted, ways, token)[0]
            remote.must(server, commands.settings_file(server, wanted.text), "writing the settings")
            state = State(**remote.ask(server, first, "starting the server"))
            followers.add(server, "server", state.log_from)
            _wait_until_ready(lines, followers, server)
        else:
            followers.add(server, "server", _kept(server, "server").log_to)
        commands_of: dict[str, list[commands.Command]] = {}
        for command in _starts(wanted, ways, token)[1:]:
            commands_of.setdefault(command.host, []).append(command)

        def one(host: Host) -> list[int]:
            offsets = []
            for process, command in zip(host.processes, commands_of[host.name], strict=True):
                if (host.name, process.name) in running:
                    offsets.append(_kept(host, process.name).log_to)
                else:
                    told = remote.ask(host, command, f"starting worker {process.id}")
                    offsets.append(State(**told).log_from)
            return offsets

        offsets, troubles = remote.on_all(one, wanted.workers)
        refuse(troubles, "not all workers could be started")
        for host in wanted.workers:
            for process, offset in zip(host.processes, offsets[host.name], strict=True):
                followers.add(host, process.name, offset)
    except BaseException as e:
        if begun:
            lines.tell("the start was not finished: ending what was started")
            stop(lines, wanted.workers, "worker")
            stop(lines, [server], "server")
        if isinstance(e, Failed):
            raise UserError(str(e.trouble)) from None
        raise


def _kept(host: Host, name: str) -> State:
    told = {each["name"]: each for each in remote.ask(host, commands.status(host), "status")}
    return State(**told[name])


def _wait_until_ready(lines: Lines, followers: Followers, server: Host) -> None:
    """Wait until the server listens. Raises `UserError` where it does not."""
    until = time.monotonic() + READY_S
    while (now := time.monotonic()) < until:
        for event in followers.events(min(until, now + ASK_S)):
            if event.line is None:
                raise UserError(
                    f"the server did not start on {server.name}", "what it said is above"
                )
            lines.say(server.name, event.line)
        with suppress(Failed):  # the next question makes a broken connection again
            if _kept(server, "server").ready:
                return
    raise UserError(f"the server on {server.name} did not listen within {READY_S:g} s")


def _starts(wanted: Job, ways: Mapping[str, Way], token: str) -> list[commands.Command]:
    """The commands that start the server and each worker, in this order."""
    server, settings = wanted.server, wanted.settings
    addresses = wanted.addresses or tuple({way.far.address: None for way in ways.values()})
    secrets = remote.environment(SECRETS, os.environ)
    argv = commands.server_argv(settings, addresses)
    own = {"PYTHONPATH": commands.own_path(wanted.user_code)} if wanted.user_code else {}
    chosen = [
        Chosen(
            process.id,
            way.near.address if way.near else None,
            way.far.address,
            way.bytes_per_s / host.workers,
            way.measured_by,
        )
        for host in wanted.workers
        for process in host.processes
        if (way := ways.get(host.name)) and way.bytes_per_s
    ]
    told = {CHOSEN: write(chosen)} if chosen else {}
    begun = [commands.start(server, "server", argv, wanted.stamp, secrets, {**own, **told})]
    for host in wanted.workers:
        to = ways[host.name].far.address if host != server else None
        secret = {VARIABLE: token} if to is not None and token else {}
        found = wanted.checked.get(host.name, Checked())
        for process in host.processes:
            share = commands.own_share(host, process, found, wanted.script is not None)
            given, folder = {**own, **share}, ""
            if wanted.script is None:
                argv = commands.worker_argv(host, settings, to, process.id)
            else:
                argv = commands.script_argv(
                    place_of(wanted.script, wanted.user_code, clone()), wanted.script.words
                )
                given |= commands.script_environment(settings, to, process.id)
                if own:
                    given["PYTHONPATH"] = commands.own_path(wanted.user_code, up="")
                folder = ".."
            begun.append(
                commands.start(host, process.name, argv, wanted.stamp, secret, given, folder)
            )
    return begun


def all_commands(wanted: Job, root: Path) -> list[commands.Command]:
    """Every command of a start, in order: what DRY=1 prints. Here a machine's name stands for an
    address that is found by measuring."""
    address = wanted.server.ip or wanted.settings.host_ip or f"<{wanted.server.name}>"
    far = Interface("", "other", address, 0, 0)
    others = [host for host in wanted.workers if host != wanted.server]
    ways = {host.name: Way(far, None) for host in others}
    told = [commands.check(host) for host in wanted.hosts]
    told += [commands.status(host) for host in wanted.hosts]
    for host in wanted.hosts:
        own = commands.copy_own(host, wanted.user_code)
        told += [commands.copy(host, str(root)), *own, commands.environment(host)]
    told += [commands.agent(host) for host in wanted.hosts]
    token = "" if wanted.settings.security == "none" else "***"
    server, *workers = _starts(wanted, ways, token)
    return [*told, commands.settings_file(wanted.server, wanted.text), server, *workers]
