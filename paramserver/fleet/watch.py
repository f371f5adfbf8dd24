"""`status`, `logs`, `attach` and `down`: look at a run on all its machines, and end it."""

from __future__ import annotations

import io
import math
import queue
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console
from rich.text import Text

from paramserver import notify, terminal
from paramserver.config.loading import load
from paramserver.errors import PeerError, UserError
from paramserver.fleet import commands, remote
from paramserver.fleet.commands import Trouble
from paramserver.fleet.remote import STATUS_OF, Follower
from paramserver.fleet.supervisor import State, died
from paramserver.net import hosts as fleet
from paramserver.net.hosts import Host
from paramserver.output.display import Display, Paper
from paramserver.settings import Settings
from paramserver.status.value import from_json
from paramserver.words import printable

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "bright_red", "bright_cyan")
LOG_LINES = 100
RECONNECT_S = 60.0  # how long to try a machine again after its connection broke
RETRY_S = 2.0
CONNECTED_S = 20.0  # a connection that lived longer was made: ssh gives up sooner
FAREWELL_S = 60.0  # for the workers' end, after the server's
LOOK_S = 0.2
NO_WORKER = (
    "no worker is left, and the server waits for one: correct what failed, then make down and make "
    "up again"
)


def machines(arguments: Sequence[str]) -> tuple[Settings, dict[str, object], tuple[Host, ...]]:
    """The settings, those that were typed, and the machines: those of ``hosts=a,b``, or else all
    that the file names. Raises `UserError` without machines."""
    typed = [word for word in arguments if re.match(r"hosts=[^\[{]", word)]
    loaded = load([word for word in arguments if word not in typed], "server")
    entries = loaded.settings.hosts
    hosts = fleet.read(fleet.choose(typed[-1].partition("=")[2], entries) if typed else entries)
    if not hosts:
        raise UserError(
            "no machines are named",
            "name them in conf/cluster.yaml:\n"
            "hosts:\n"
            "  - {name: mini1, ssh: mini1, role: both}\n"
            "  - {name: mini2, ssh: user@mini2.local}\n"
            "or here: make up HOSTS=mini1,user@mini2.local\n"
            "docs/cluster.md tells more",
        )
    return loaded.settings, loaded.given, hosts


def only(hosts: tuple[Host, ...], name: str | None) -> tuple[Host, ...]:
    """The machine of that name, or all. Raises `UserError` for an unknown name."""
    chosen = tuple(host for host in hosts if name in (None, "", host.name))
    if not chosen:
        known = ", ".join(host.name for host in hosts)
        raise UserError(f"there is no machine {name}", f"the machines: {known}")
    return chosen


class Lines:
    """Lines of all machines on one terminal, each with its machine's name and colour."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._console = Console(
            file=Paper(sys.stdout or io.StringIO()), highlight=False, soft_wrap=True
        )
        self._width = max((len(host.name) for host in hosts), default=0)
        self._colours = {h.name: COLOURS[i % len(COLOURS)] for i, h in enumerate(hosts)}
        self.display: Display | None = None
        """Where a run is drawn, lines are above the drawing."""

    def say(self, host: str, line: str) -> None:
        head = Text(f"{host:<{self._width}} | ", style=self._colours.get(host, ""))
        self.print(head + Text(printable(line)))

    def tell(self, line: str) -> None:
        """Print a line of this program."""
        self.print(Text(printable(line)))

    def tell_as_it_is(self, text: str) -> None:
        """Print several lines of this program, unchanged."""
        self.print(Text("\n".join(printable(line) for line in text.split("\n"))))

    def print(self, renderable: Any) -> None:
        with self._console.capture() as drawn:
            self._console.print(renderable)
        if self.display is not None:
            self.display.above(drawn.get())
        else:
            terminal.write(drawn.get())


Key = tuple[str, str]  # machine, process


@dataclass(frozen=True)
class Event:
    """A line of a process; without a line, its log is at its end: the process has ended, well or
    not, or the connection is lost."""

    host: Host
    name: str
    line: str | None = None
    code: int | None = None


class Watch:
    """The logs of several processes in one stream; a context manager.

    It makes a broken connection again, from where it broke, for `RECONNECT_S`.
    """

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._new: queue.Queue[tuple[str, str, str]] = queue.Queue()
        self._followers: dict[Key, Follower] = {}
        self._read_to: dict[Key, int] = {}
        self._broken: dict[Key, tuple[Host, float]] = {}  # with the time of the next try
        self._silent_since: dict[Key, float] = {}
        self.troubles: list[Trouble] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for follower in self._followers.values():
            follower.close()

    def add(self, host: Host, name: str, offset: int) -> None:
        """Follow this process, too, from `offset` in its log."""
        self._read_to[host.name, name] = offset
        self._followers[host.name, name] = Follower(
            host, name, offset, lambda *line: self._new.put(line)
        )

    @property
    def follows(self) -> set[str]:
        """The kinds of processes that are followed: server, worker."""
        names = {name for _, name in (*self._followers, *self._broken)}
        return {name.partition("-")[0] for name in names if not name.startswith(STATUS_OF)}

    def add_status(self) -> bool:
        """Follow the server's status, too; returns whether there is a server to follow."""
        for (_, name), follower in list(self._followers.items()):
            if name == "server":
                self.add(follower.host, f"{STATUS_OF}{name}", 0)
                return True
        return False

    def events(self, until: float = math.inf) -> Iterator[Event]:
        """Events, until no process is followed any more or `until` (monotonic) has passed."""
        while (self._followers or self._broken) and time.monotonic() < until:
            with suppress(queue.Empty):
                host, name, line = self._new.get(timeout=LOOK_S)
                yield Event(self._followers[host, name].host, name, line)
                continue
            for key, follower in list(self._followers.items()):
                if follower.code is not None and self._new.empty():
                    follower.close()
                    del self._followers[key]
                    self._read_to[key] += follower.seen_bytes
                    if follower.lost is None:
                        yield Event(follower.host, key[1], code=follower.code)
                    else:
                        self._broke(key, follower, follower.lost)
            for key, (again, at) in list(self._broken.items()):
                if time.monotonic() >= at:
                    del self._broken[key]
                    self.add(again, key[1], self._read_to[key])

    def _broke(self, key: Key, follower: Follower, why: Trouble) -> None:
        now = time.monotonic()
        if now - follower.began > CONNECTED_S or key not in self._silent_since:
            self._silent_since[key] = now
            if not key[1].startswith(STATUS_OF):  # its log's connection says so
                self._lines.say(key[0], f"the connection broke: {why.problem}")
        if now - self._silent_since[key] > RECONNECT_S:
            if key[1].startswith(STATUS_OF):
                return
            self.troubles.append(why)
            self._lines.say(key[0], f"not reached for {RECONNECT_S:g} s: no longer followed")
        else:
            self._broken[key] = (follower.host, now + RETRY_S)


# --------------------------------------------------------------------------------------- looking


def states(
    hosts: Sequence[Host], *, hasty: bool = False
) -> tuple[dict[str, dict[str, State]], list[Trouble]]:
    """The states of the processes of each machine, by name; and the machines that do not answer."""

    def look(host: Host) -> dict[str, State]:
        told = remote.ask(host, commands.status(host, hasty=hasty), "status")
        return {each["name"]: State(**each) for each in told}

    return remote.on_all(look, hosts)


def status(arguments: list[str]) -> int:
    """Print a table of all machines, and the newest warning of each process; returns 1 where a
    machine does not answer or a process failed."""
    _, _, hosts = machines(arguments)
    found, troubles = states(hosts, hasty=True)
    rows: list[tuple[tuple[str, ...], str, str]] = []  # cells, style of the third, last words
    wrong = bool(troubles)
    warnings: list[tuple[str, str]] = []
    missing = {trouble.host: trouble for trouble in troubles}
    for host in hosts:
        if host.name in missing:
            rows.append(((host.name, "", "not reached", "", ""), "red", ""))  # reason: below
            continue
        kept = of_last_start(found[host.name])
        if not kept:
            rows.append(((host.name, "", "nothing was started here", "", ""), "", ""))
        for name, state in kept.items():
            wrong |= state.phase == "failed"
            warnings += [(host.name, state.warning)] if state.warning else []
            style = {"failed": "red", "running": "green"}.get(state.phase, "")
            since = f"since {datetime.fromtimestamp(state.since):%d %b %H:%M:%S}"
            again = f"started again: {state.restarts}" if state.restarts else ""
            row = (host.name, host.spoken(name), in_words(state), since, again)
            rows.append((row, style, state.last))
    lines = Lines(hosts)
    widths = [max(len(cells[column]) for cells, _, _ in rows) for column in range(5)]
    for cells, style, last in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        line = Text.assemble("  ".join(padded[:2]), "  ", (padded[2], style), "  ")
        line.append("  ".join(padded[3:]))
        line.rstrip()
        lines.print(line)
        if last:
            lines.print(Text(f"  {printable(last)}", style="dim"))
    if warnings:
        lines.tell("")
        lines.tell("the newest warnings:")
    for name, warning in warnings:
        lines.say(name, warning)
    for trouble in troubles:
        lines.tell_as_it_is(str(trouble))
    return int(wrong)


def of_last_start(kept: Mapping[str, State]) -> dict[str, State]:
    """Without the processes that ended before the newest start there."""
    newest = max(kept.values(), key=lambda state: state.since, default=None)
    return {
        name: state
        for name, state in kept.items()
        if state.alive or newest is None or state.up == newest.up
    }


def in_words(state: State) -> str:
    """The state of a process, in a few words."""
    if state.phase == "failed":
        return f"failed ({died(state.code)})" if state.code is not None else "failed: it was killed"
    if state.phase == "running":
        return f"running for {timedelta(seconds=round(max(0.0, time.time() - state.since)))}"
    return "starts again" if state.phase == "pausing" else state.phase


def logs(arguments: list[str], name: str | None = None) -> int:
    """Print the last lines of every log; returns 1 where a machine does not answer."""
    _, _, hosts = machines(arguments)
    lines = Lines(hosts)
    chosen = only(hosts, name)
    found, troubles = states(chosen)

    def read(host: Host) -> list[str]:
        told: list[str] = []
        for kept in found.get(host.name, {}):
            text = remote.must(
                host, commands.supervisor(host, "log", kept, str(LOG_LINES)), "reading logs"
            )
            told += text.splitlines()
        return told

    texts, more = remote.on_all(read, [host for host in chosen if host.name in found])
    for host in chosen:
        for line in texts.get(host.name, []):
            lines.say(host.name, line)
    for trouble in troubles + more:
        lines.tell_as_it_is(str(trouble))
    return int(bool(troubles or more))


def _draw(display: Display | None, line: str | None) -> None:
    """Draw the status in this line of JSON; None: draw none any more."""
    if display is None:
        return
    if line is None:
        display.clear()
        return
    with suppress(PeerError):  # half a line, or of another version
        display.update(from_json(line), time.monotonic())


def attach(arguments: list[str], name: str | None = None) -> int | None:
    """Follow a run that is going on, or the machine of this name; returns the server's exit code,
    None after Ctrl-C."""
    settings, _, hosts = machines(arguments)
    hosts = only(hosts, name)
    found, troubles = states(hosts)
    lines = Lines(hosts)
    for trouble in troubles:
        lines.tell_as_it_is(str(trouble))
    alive = [
        (host, process, state)
        for host in hosts
        for process, state in found.get(host.name, {}).items()
        if state.alive
    ]
    if not alive:
        raise UserError(
            "no run is going on", "start one: make up; how the last one went: make logs"
        )
    with Watch(lines) as watch:
        for host, process, state in alive:
            watch.add(host, process, state.log_to)
        return show(watch, lines, arguments, settings.plain or name is not None)


def of_process(host: Host, name: str, line: str) -> str:
    """A line of a machine's process, with its name where that machine has several workers."""
    own = f"[{host.spoken(name)}] "
    return own + line if host.workers > 1 and name != "server" and own.strip() not in line else line


def typed_too(arguments: Sequence[str]) -> str:
    """What of a command line has to be typed with the next command, too."""
    words = [word for word in arguments if word.startswith(("hosts=", "cluster="))]
    words = [word.replace("hosts=", "HOSTS=", 1) for word in words]
    return f"; each with {' '.join(words)}" if words else ""


def show(watch: Watch, lines: Lines, arguments: Sequence[str], plain: bool = False) -> int | None:
    """Show the run until it is over, or Ctrl-C; returns the server's exit code, None after Ctrl-C.

    On a terminal that is the display of a run that was started by hand, and the lines of all
    machines above it; elsewhere, or with `plain`, the lines of all.
    """
    screen = Display(plain=plain)
    if not screen.live or not watch.add_status():
        return _show(watch, lines, arguments)
    lines.display = screen
    try:
        return _show(watch, lines, arguments)
    finally:
        lines.display = None
        screen.close()


def _show(watch: Watch, lines: Lines, arguments: Sequence[str]) -> int | None:
    code, until = 0, math.inf
    ended: dict[Key, int] = {}  # workers, with their exit codes
    try:
        while True:
            for event in watch.events(until):
                if event.name.startswith(STATUS_OF):
                    _draw(lines.display, event.line)
                    continue
                if event.line is not None:
                    if lines.display is not None and notify.PROGRESS.match(event.line):
                        continue  # it is drawn
                    if lines.display is not None and event.name == "server":
                        lines.tell(event.line)
                    else:
                        lines.say(event.host.name, of_process(event.host, event.name, event.line))
                    continue
                if event.code:
                    name = event.host.spoken(event.name)
                    lines.say(event.host.name, f"{name} has failed: make status, make logs")
                if event.name != "server":
                    ended[event.host.name, event.name] = event.code or 0
                    if all(ended.values()) and watch.follows == {"server"}:
                        lines.tell(NO_WORKER)
                if event.name == "server":
                    code = event.code or 0
                    _draw(lines.display, None)
                    until = time.monotonic() + FAREWELL_S
                    break  # to go on with the new deadline
            else:
                break
    except KeyboardInterrupt:
        _draw(lines.display, None)
        lines.tell("")  # below the terminal's ^C
        lines.tell(
            "the run goes on. Look again: make attach, make status. End it: make down"
            + typed_too(arguments)
        )
        return None
    for trouble in watch.troubles:
        lines.tell_as_it_is(str(trouble))
    return 1 if watch.troubles else code


# ---------------------------------------------------------------------------------------- ending


def down(arguments: list[str]) -> int:
    """End the run in order, then every process that is left; returns 1 where a machine does not
    answer or a process could not be ended."""
    _, _, hosts = machines(arguments)
    lines = Lines(hosts)
    server = next(host for host in hosts if host.serves)
    others = [host for host in hosts if host != server]
    troubles = stop(lines, [server], "server")  # it ends the run for the workers, too
    troubles += stop(lines, hosts, "worker")
    troubles += stop(lines, others, "server")  # where the roles have changed
    for trouble in {trouble.host: trouble for trouble in troubles}.values():
        lines.tell_as_it_is(str(trouble))
    clean = [host.name for host in hosts if host.name not in {t.host for t in troubles}]
    if clean:
        lines.tell(f"nothing of the run is left on {', '.join(clean)}")
    return int(bool(troubles))


def stop(lines: Lines, hosts: Sequence[Host], name: str) -> list[Trouble]:
    """End the processes of that name; returns the faults."""

    def end(host: Host) -> list[Trouble]:
        answer = remote.ask(host, commands.stop(host, name), f"stopping the {name}")
        for line in answer["killed"]:
            lines.say(host.name, f"had to be killed: {line}")
        for state in answer.get("ended", [answer["state"]] if answer["ran"] else []):
            if state is not None:
                code = state["code"]
                how = "in order" if code in (0, 1) else "by force" if code is None else died(code)
                told = host.spoken(state["name"]).replace("server", "the server")
                lines.say(host.name, f"{told} has ended, {how}")
                if folder := state.get("run_folder"):
                    there = commands.spoken(host, folder)
                    lines.say(host.name, f"its run folder: {there}; its results here: make fetch")
        if answer["left"]:
            left = ", ".join(str(pid) for pid in answer["left"])
            return [Trouble(host.name, f"processes that cannot be ended: {left}")]
        return []

    told, troubles = remote.on_all(end, hosts)
    return troubles + [trouble for each in told.values() for trouble in each]


def refuse(troubles: Sequence[Trouble], what: str) -> None:
    """Raise one `UserError` with all faults, if there are any."""
    if troubles:
        raise UserError(what, "\n".join(str(trouble) for trouble in troubles))
