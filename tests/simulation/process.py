"""A process with its sockets: it runs, sleeps, is woken, stopped, continued and killed.

What a program does is a generator. It yields until when it sleeps and which of its sockets may wake
it; so code that waits reads as it does in the real programs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

from paramserver.protocol import messages as wire

from .network import DOWN, Carried, Line, Network, Together, World

Waiting = Generator[tuple[float, frozenset[str]], None, Any]
"""What a program does: it yields until when it sleeps, and which of its sockets may wake it."""

DEAF, AT_DOOR, AT_LINK = frozenset[str](), frozenset({"door"}), frozenset({"link"})
AT_BOTH = frozenset({"link", "sub"})


class Leaves(Exception):
    """The process ends, as the programs do with a `UserError`."""


class Process:
    """Runs `main`. `to_server(route, message)` is the server's side of its connections."""

    name = "a process"
    address = ""  # of its machine, if that is not the server's

    def __init__(
        self, world: World, net: Network, to_server: Callable[[bytes, Carried], None]
    ) -> None:
        self.world, self.net = world, net
        self.alive, self.stopped = True, False
        self.born_at = world.now
        self.exit = ""
        self.on_exit: Callable[[str], None] = lambda why: None
        self.lines: dict[str, Line] = {}
        self.inbox: dict[str, deque[Carried]] = {k: deque() for k in ("door", "link", "sub")}
        self.sub_room = 0  # messages that wait at SUB, at most
        self.heard: set[type[wire.Message]] | None = None  # kinds that SUB lets through; None: all
        self.lost = 0.0  # share of what is published that does not arrive
        self.ipc = world.chance(0.3)  # on the server's host
        self.reachable_at = world.now  # the last fault that kept it from being heard is over
        self._to_server = to_server
        self.busy_since = self.busy_until = 0.0  # computing: it reads nothing, looks for nobody
        self._life = self._run()
        self._turn = 0  # of its wake-ups only the newest counts
        self._ears = DEAF
        world.at(world.now, self._resume, 0)

    def main(self) -> Waiting:
        """What the program does; at its end the process ends."""
        raise NotImplementedError

    def _run(self) -> Waiting:
        try:
            yield from self.main()
            self._exit("finished")
        except Leaves as e:
            self._exit(str(e))

    def _resume(self, turn: int) -> None:
        if turn != self._turn or not self.alive or self.stopped:
            return
        self._turn += 1
        try:
            until, self._ears = next(self._life)
        except StopIteration:
            return
        if self._ears is DEAF:
            if self.busy_until < self.world.now:
                self.busy_since = self.world.now
            self.busy_until = until
        if until < math.inf:
            self.world.at(until, self._resume, self._turn)

    def _wake(self) -> None:
        self._turn += 1
        self.world.at(self.world.now, self._resume, self._turn)

    def kill(self) -> None:
        """kill -9: nothing is said, the kernel closes the sockets."""
        if self.alive:
            self._exit("killed")

    def stop(self) -> None:
        """SIGSTOP: sockets fill, all threads stand still."""
        self.stopped = True

    def go_on(self) -> None:
        if self.stopped and self.alive:
            self.stopped = False
            self._wake()

    def _exit(self, why: str) -> None:
        self.alive, self.exit = False, why
        self.world.say(f"{self.name} ends: {why}")
        self.close_lines(linger=why != "killed")
        self.on_exit(why)

    # ------------------------------------------------------------------ sockets

    def open_line(self, kind: str, port: int | None = None) -> Line:
        """To `port` of the server's host; by default where the server is."""
        self.inbox[kind].clear()
        ipc = self.ipc and kind != "door"
        line = Line(self.net, kind, self._to_server, self._arrive, ipc=ipc, port=port)
        line.address = self.address
        self.lines[kind] = line
        return line

    def close_lines(self, *, linger: bool = False) -> None:
        for line in self.lines.values():
            line.close(linger=linger)
        self.lines.clear()

    def _arrive(self, line: Line, carried: Carried) -> None:
        if self.lines.get(line.kind) is line:
            self.inbox[line.kind].append(carried)
            if line.kind in self._ears:
                self._wake()

    def publish(self, carried: Carried) -> None:
        """PUB: dropped where there is no connection, no room, or bad luck."""
        first = carried[0].messages[0][0] if isinstance(carried[0], Together) else carried[0]
        if self.heard is not None and type(first) not in self.heard:
            return
        line = self.lines.get("sub")
        if line is None or line.route is None or self.world.chance(self.lost):
            return
        if len(self.inbox["sub"]) < self.sub_room:
            line.carry(DOWN, carried)

    def beat(self, beat: wire.Beat, every_s: float) -> None:
        """The client's second thread, as long as this door is open."""
        self._beat(self.lines["door"], beat, every_s)

    def _beat(self, door: Line, beat: wire.Beat, every_s: float) -> None:
        if self.alive and not door.closed:
            if not self.stopped:
                door.send((beat, None))
                while self.inbox["door"]:
                    self.heard_at_door(self.inbox["door"].popleft()[0])
            self.world.after(every_s, self._beat, door, beat, every_s)

    def heard_at_door(self, message: Any) -> None:
        """What the second thread finds there."""
