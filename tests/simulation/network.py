"""Virtual time, and a network in it that loses what ZeroMQ over TCP may lose.

A `World` is a queue of what happens when; nothing waits and nothing is random but by its seed. A
`Line` is one connection between a peer and the server, in both directions first in, first out:

* while it is down, what the peer sends waits in its socket, as with DEALER; what the server sends
  is refused, as by a ROUTER with `ROUTER_MANDATORY`, once it has noticed (until then it is lost);
* a cut loses what is under way, and the server knows the next connection by a new routing id;
* a server that is killed takes all lines with it: what it had sent arrives whole, in part or not at
  all; started again it is found anew over TCP, never over ipc, whose names are others then;
* held (a cable out for a moment), it delays and loses nothing, in one direction or in both.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Carried = tuple[Any, Any]
"""A message and its payload."""


@dataclass(frozen=True)
class Together:
    """Messages that are sent as one: all of them arrive, or none."""

    messages: list[Carried]


RECONNECTS_S = 1.0  # RECONNECT_IVL_MAX of `paramserver.transport.sockets`

UP, DOWN = 0, 1
"""Directions: to the server, to the peer."""


class World:
    """What time it is, and what happens next."""

    def __init__(self, seed: int, tell: Callable[[str], None] | None = None) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.events = 0
        self._tell = tell
        self.seed = seed
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self._count += 1
        heapq.heappush(self._queue, (max(when, self.now), self._count, call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, call, *args)

    def run(self, done: Callable[[], bool], limit: float) -> bool:
        """Let time pass until `done()`; False if it is not at time `limit`."""
        while not done():
            if not self._queue or self._queue[0][0] > limit:
                return False
            self.now, _, call, args = heapq.heappop(self._queue)
            self.events += 1
            call(*args)
        return True

    def chance(self, share: float) -> bool:
        return share > 0 and self.random.random() < share

    @property
    def talks(self) -> bool:
        return self._tell is not None

    def say(self, text: str) -> None:
        if self._tell is not None:
            self._tell(f"{self.now:9.4f}  {text}")


class Network:
    """The lines that stand, by routing id, and how long a message takes."""

    def __init__(self, world: World, delay_s: float, jitter_s: float) -> None:
        self.world = world
        self.delay_s, self.jitter_s = delay_s, jitter_s
        self.routes: dict[bytes, Line] = {}
        self.repeats = 0.0  # share of the messages to the server that come twice
        self.lines: set[Line] = set()  # that are open at the peer's end
        self.server_is_up = True
        self.port = 1  # where the server listens
        self._number = 0

    def count(self) -> int:
        self._number += 1
        return self._number

    def new_route(self, line: Line) -> bytes:
        route = b"%d" % self.count()
        self.routes[route] = line
        return route

    def delay(self) -> float:
        rng = self.world.random
        jitter = self.jitter_s if rng.random() < 0.2 else self.jitter_s / 20
        return self.delay_s * (0.5 + rng.random()) + jitter * rng.random()

    def send(self, route: bytes, message: Carried) -> bool:
        """From the server to a peer; False when it knows of no such connection."""
        line = self.routes.get(route)
        if line is None:
            return False
        if line.route == route:
            line.carry(DOWN, message)
        return True

    def server_died(self, *, lingers: bool = False) -> None:
        """Its kernel closes every connection; what was sent still arrives where it `lingers`."""
        self.server_is_up = False
        self.routes.clear()
        rng = self.world.random
        for line in sorted(self.lines, key=lambda line: line.number):
            arrives_s = rng.choice((0.0, rng.uniform(0.0, 2 * self.delay_s), 1e9))
            line.server_died(1e9 if lingers else arrives_s)

    def server_is_back(self) -> None:
        """Peers find it again, each in its time."""
        self.server_is_up = True
        for line in sorted(self.lines, key=lambda line: line.number):
            self.world.after(self.world.random.uniform(0.0, RECONNECTS_S), line.connect)


class Line:
    """One connection of a peer; `to_server(route, message)`, `to_peer(line, message)` receive."""

    def __init__(
        self,
        net: Network,
        kind: str,
        to_server: Callable[[bytes, Carried], None],
        to_peer: Callable[[Line, Carried], None],
        *,
        ipc: bool = False,
        port: int | None = None,
    ) -> None:
        self.net, self.kind = net, kind
        self.ipc, self._port = ipc, net.port if port is None else port
        self.number = net.count()
        self.address = ""  # of the peer's end, as the other end sees it
        self.route: bytes | None = None
        self.closed = False
        self._cut_until = 0.0
        self._delivered: dict[bytes, float] = {}  # until when what a dead server sent arrives
        self._receive = (to_server, to_peer)
        self._last = [0.0, 0.0]
        self._held_until = [0.0, 0.0]
        self._waiting: deque[Carried] = deque()  # sent by the peer while the line is down
        net.lines.add(self)
        self.connect()

    def connect(self) -> None:
        cut = self.net.world.now < self._cut_until
        there = self.net.server_is_up and self._port == self.net.port
        if self.route is None and not self.closed and there and not cut:
            self.route = self.net.new_route(self)
            while self._waiting:
                self.carry(UP, self._waiting.popleft())

    def send(self, message: Carried) -> None:
        """From the peer to the server."""
        if self.closed:
            return
        if self.route is None:
            self._waiting.append(message)
            return
        self.carry(UP, message)
        if self.net.world.chance(self.net.repeats) and may_repeat(message):
            self.carry(UP, message)

    def carry(self, way: int, message: Carried) -> None:
        world = self.net.world
        when = max(world.now + self.net.delay(), self._held_until[way], self._last[way])
        self._last[way] = when
        world.at(when, self._arrive, self.route, way, message)

    def _arrive(self, route: bytes, way: int, message: Carried) -> None:
        if route != self.route and self.net.world.now > self._delivered.get(route, -1.0):
            return  # lost with its connection
        if way == UP:
            self._receive[UP](route, message)
        else:
            self._receive[DOWN](self, message)

    def hold(self, until: float, ways: tuple[int, ...]) -> None:
        for way in ways:
            self._held_until[way] = max(self._held_until[way], until)

    def cut(self, back_s: float, noticed_s: float) -> None:
        """The connection is lost; a new one stands after `back_s`."""
        world = self.net.world
        self._cut_until = max(self._cut_until, world.now + back_s)
        world.at(self._cut_until, self.connect)
        if self.route is not None:
            world.after(noticed_s, self.net.routes.pop, self.route, None)
            self.route = None

    def server_died(self, delivers_s: float) -> None:
        """What it had sent within `delivers_s` from now still arrives; no ipc comes back."""
        if self.route is not None:
            self._delivered[self.route] = self.net.world.now + delivers_s
            self.route = None
        if self.ipc:
            self._cut_until = math.inf

    def close(self, *, linger: bool = False) -> None:
        """The peer closes it, or died: what is under way may still come with `linger`."""
        self.closed = True
        self.net.lines.discard(self)
        self._waiting.clear()
        if self.route is None:
            return
        route = self.route
        if linger:
            self.net.world.at(max(self._last) + 0.001, self._gone, route)
        else:
            self._gone(route)

    def _gone(self, route: bytes) -> None:
        self.net.routes.pop(route, None)
        if self.route == route:
            self.route = None


def may_repeat(message: Carried) -> bool:
    """What a peer may be seen to say twice: it asks again, or a socket sends again."""
    return type(message[0]).__name__ in REPEATED


REPEATED = {"Hello", "Probe", "Beat", "Push", "Fetch", "Want", "Adopted", "Goodbye"}
