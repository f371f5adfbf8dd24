"""`attach`: shows a run that goes on on several machines, as `up` does after its start."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from paramserver import notify
from paramserver.errors import PeerError, UserError
from paramserver.fleet.commands import Trouble
from paramserver.fleet.lines import Lines
from paramserver.fleet.processes import machines, only, states
from paramserver.fleet.remote import STATUS_OF, Follower
from paramserver.net.hosts import Host
from paramserver.output.display import Display
from paramserver.status.value import from_json
from paramserver.typed import typed

RECONNECT_S = 60.0  # how long to try a machine again after its connection broke
RETRY_S = 2.0
CONNECTED_S = 20.0  # a connection that lived longer was made: ssh gives up sooner
FAREWELL_S = 60.0  # for the workers' end, after the server's
LOOK_S = 0.2
NO_WORKER = (
    "no worker is left, and the server waits for one: correct what failed, then "
    f"{typed('down')}, and start again: {typed('up')}"
)

Key = tuple[str, str]  # machine, process


@dataclass(frozen=True)
class Event:
    """A line of a process; without a line, its log is at its end: the process has ended, well or
    not, or the connection is lost."""

    host: Host
    name: str
    line: str | None = None
    code: int | None = None


class Followers:
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

    def __enter__(self) -> Followers:
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
            "no run is going on",
            f"start one: {typed('up')}; how the last one went: {typed('logs')}",
        )
    with Followers(lines) as followers:
        for host, process, state in alive:
            followers.add(host, process, state.log_to)
        return show(followers, lines, arguments, settings.plain or name is not None)


def of_process(host: Host, name: str, line: str) -> str:
    """A line of a machine's process, with its name where that machine has several workers."""
    own = f"[{host.spoken(name)}] "
    return own + line if host.workers > 1 and name != "server" and own.strip() not in line else line


def typed_too(arguments: Sequence[str]) -> str:
    """What of a command line has to be typed with the next command, too."""
    words = [word for word in arguments if word.startswith(("hosts=", "cluster="))]
    words = [word.replace("hosts=", "HOSTS=", 1) for word in words]
    return f"; each with {' '.join(words)}" if words else ""


def show(
    followers: Followers, lines: Lines, arguments: Sequence[str], plain: bool = False
) -> int | None:
    """Show the run until it is over, or Ctrl-C; returns the server's exit code, None after Ctrl-C.

    On a terminal that is the display of a run that was started by hand, and the lines of all
    machines above it; elsewhere, or with `plain`, the lines of all.
    """
    screen = Display(plain=plain)
    if not screen.live or not followers.add_status():
        return _show(followers, lines, arguments)
    lines.display = screen
    try:
        return _show(followers, lines, arguments)
    finally:
        lines.display = None
        screen.close()


def _show(followers: Followers, lines: Lines, arguments: Sequence[str]) -> int | None:
    code, until = 0, math.inf
    ended: dict[Key, int] = {}  # workers, with their exit codes
    try:
        while True:
            for event in followers.events(until):
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
                    lines.say(
                        event.host.name,
                        f"{name} has failed. Why: {typed('status')}, {typed('logs')}",
                    )
                if event.name != "server":
                    ended[event.host.name, event.name] = event.code or 0
                    if all(ended.values()) and followers.follows == {"server"}:
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
            f"the run goes on. Look again: {typed('attach')}, {typed('status')}. "
            f"End it: {typed('down')}" + typed_too(arguments)
        )
        return None
    for trouble in followers.troubles:
        lines.tell_as_it_is(str(trouble))
    return 1 if followers.troubles else code
