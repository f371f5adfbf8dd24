"""A shard in virtual time: the shipping `Adder` between its link to the server and its channels.

`Lane` is a channel: ZeroMQ does not connect it again, so it is dead once it was cut, which its ends
notice late or never. The sums are samples, as the server's are (`server.Samples`). A shard may
share memory with peers on its host: it has a `Ring`, as the server does, and each worker an
`Outbox`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.shard.adder import Adder, Payload, Waiting
from paramserver.transport import shm

from .book import Broken, Gradient, Residuals
from .network import DOWN, UP, Carried, Line, Network, World
from .server import Ring

if TYPE_CHECKING:
    from .peer import Client

BEATS_PER_TIMEOUT = 5
BIND, PUSH, AVERAGE = "bind", "push", "average"


SLOTS = 2  # of an outbox: fewer than some rounds have buckets


class Cell:
    """A slot of an outbox: what lies in it, and who has it."""

    FREE, WORKER, SHARD = "free", "worker", "shard"

    def __init__(self) -> None:
        self.content: Any = None
        self.owner = Cell.FREE


class Slot(shm.Slot):
    def fill(self, content: Any) -> None:
        self.tensor.content = content  # type: ignore[attr-defined]

    def copy(self) -> Any:
        return self.tensor.content  # type: ignore[attr-defined]


class Outbox:
    """Shared memory for pushes: a worker takes a slot, its shard frees it."""

    def __init__(self) -> None:
        self.cells = [Cell() for _ in range(SLOTS)]

    def room(self, nbytes: int) -> shm.Slot | None:
        for number, cell in enumerate(self.cells):
            if cell.owner == Cell.FREE:
                cell.owner, cell.content = Cell.WORKER, None
                return Slot(cell, (number, nbytes, number))  # type: ignore[arg-type]
        return None

    @property
    def full(self) -> bool:
        return all(cell.owner != Cell.FREE for cell in self.cells)

    def free(self, slot: int) -> None:
        if self.cells[slot].owner == Cell.FREE:
            raise Broken("a slot is freed twice")
        self.cells[slot].owner = Cell.FREE


class Block(msgspec.Struct, frozen=True):
    """An average in a ring."""

    ring: Ring
    place: wire.Place

    @property
    def whole(self) -> bool:
        return self.ring.whole(self.place)

    def read(self) -> Any:
        if not self.whole:
            raise Broken("an average is read that was written over")
        return self.ring.read(self.place)


def content(buffer: Any) -> Any:
    """What lies in this memory now."""
    if isinstance(buffer, Block):
        return buffer.read()
    return buffer.content if isinstance(buffer, Cell) else buffer


class Record(msgspec.Struct, frozen=True):
    """What a lane carries, beside numbers. The first ones of its ends say which memory they share:
    the peer's, what it is ready to use."""

    kind: str
    session: str = ""
    number: int = 0
    push: wire.Push | None = None
    round: int = 0
    bucket: int = 0
    ring: Ring | bool | None = None
    outbox: Outbox | None = None


class Lane(Line):
    """One channel between a peer and a shard, for the peer's session."""

    dead = False

    def connect(self) -> None:
        if not self.dead:
            super().connect()
            self.dead = self.route is None

    def cut(self, back_s: float, noticed_s: float) -> None:
        self.dead = True
        super().cut(math.inf, noticed_s)

    def server_died(self, delivers_s: float) -> None:
        self.dead = True
        super().server_died(delivers_s)

    def send(self, message: Carried) -> None:
        if not self.closed and self.route is not None:
            self.carry(UP, message)


class Added(msgspec.Struct):
    """A gradient in a sum of a shard."""

    worker: int
    gradient: Gradient
    weight: float
    late: bool


class ShardSamples:
    """The sums of a shard. What is in one is looked at when it is divided for the open round: a
    shard that stood still works off orders for rounds that are void."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self.sums: dict[int, list[Added]] = {}
        self._residuals = Residuals(shard.server.book)

    @property
    def newest(self) -> int:
        ring = self._shard.ring
        return 0 if ring is None else ring.newest + 1

    @property
    def oldest(self) -> int:
        ring = self._shard.ring
        return 0 if ring is None else ring.oldest

    def check(self, push: wire.Push, buffers: list[Any]) -> tuple[str | None, float | None]:
        return self._shard.server.judged(push.bucket, content(buffers[0]))

    def add(self, payload: Payload, worker: int, weight: float, *, late: bool) -> None:
        push, [buffer] = payload.push, payload.buffers
        if isinstance(buffer, Cell) and buffer.owner != Cell.SHARD:
            raise Broken("a slot is read that its worker may write to")
        added = Added(worker, content(buffer), weight, late)
        self.sums.setdefault(push.bucket, []).append(added)
        payload.release()

    def finish(self, divide: wire.Divide) -> tuple[list[Any], float, tuple[int, ...]]:
        added, current = self.sums.pop(divide.bucket), self._shard.server.rounds.round
        counts = self._shard.counts and current is not None and current.number == divide.round
        if counts:
            self._look_at(divide, added)
        self._residuals.average(divide.bucket, counts=counts)
        samples = [sample for each in added for sample in each.gradient[1]]
        average: Any = tuple(sorted(samples))
        ring = self._shard.ring
        if ring is not None:
            average = Block(ring, ring.write(average))
        return [average], 1.0, divide.absent

    def _look_at(self, divide: wire.Divide, added: list[Added]) -> None:
        """The sum that becomes an average of the open round must be right."""
        server = self._shard.server
        most, book = server.rules.max_staleness, server.book
        for each in added:
            model, samples, norm = each.gradient
            lag = book.lag(model, most if each.late else 0)
            if abs(each.weight - len(samples) / math.sqrt(1 + lag)) > 1e-9 * each.weight:
                raise Broken(f"{len(samples)} samples of worker {each.worker} weigh {each.weight}")
            server.adds(divide.bucket, norm)
        weight = sum(each.weight for each in added)
        if abs(weight - divide.weight) > 1e-9 * weight:
            raise Broken(f"a sum of {weight} samples is divided by {divide.weight}")
        order = [each.worker for each in added]
        if server.rules.deterministic and order != sorted(order):
            raise Broken(f"a shard added the gradients of workers {order} in this order")

    def give_up(self, bucket: int) -> list[Any]:
        return self._residuals.give_up(bucket)

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        self._residuals.take_over(bucket, buffers[0])

    def close(self, averaged: tuple[int, ...]) -> None:
        if averaged and self.sums:
            raise Broken("a shard has sums that are not in the update")
        self._residuals.settled(averaged)
        self.sums.clear()


class Shard:
    """The process that a worker starts. It ends with the worker."""

    def __init__(self, world: World, owner: Client, adder: type[Adder]) -> None:
        self.world, self.owner, self.server = world, owner, owner.server
        assert owner.welcome is not None
        self._session, self._secret = owner.welcome.session, owner.secret
        self.alive, self.stopped = True, False
        self.number = 0
        self.address = owner.address
        self.net = Network(world, owner.net.delay_s, owner.net.jitter_s)
        self._make_adder = adder
        self.adder: Adder | None = None
        self.sums = ShardSamples(self)
        self._backlog: list[tuple[Any, Any, Any]] = []
        self.ring: Ring | None = None
        self._maps = world.random.random() < 0.8  # it can use shared memory
        self._routes: dict[str, bytes] = {}  # by session: of the lane that is bound
        self._outboxes: dict[bytes, Outbox] = {}  # by route
        self._readers: set[bytes] = set()  # of the ring
        self._met: set[str] = set()
        self._spared: set[str] = set()  # sessions that hear a relay
        self._sent = 0
        self._arrived = 0  # the number of the newest payload that it has reported
        self.link = Line(
            owner.net, "shard", self.server.receive, self._from_server, ipc=False, port=owner.port
        )
        world.say(f"START a shard beside {owner.name}")
        self._beat()

    def _beat(self) -> None:
        if not self.alive:
            return
        if not self.stopped:
            offer = wire.Offer(session=self._session, secret=self._secret)
            self.link.send((offer, None))
        self.world.after(self.server.rules.heartbeat_timeout / BEATS_PER_TIMEOUT, self._beat)

    @property
    def counts(self) -> bool:
        """Does the server still give it orders?"""
        server = self.server
        return server.shards.get(self.number) is self and self.number in server.rounds.shards.live

    # ------------------------------------------------------------------ its life

    def kill(self) -> None:
        if self.alive:
            self.world.say(f"the shard beside {self.owner.name} is killed")
            self.alive = False
            self.link.close()
            self.net.server_died()

    def stop(self) -> None:
        self.stopped = True

    def go_on(self) -> None:
        self.stopped = False
        backlog, self._backlog = self._backlog, []
        for call, *args in backlog:
            if self.alive:
                call(*args)

    # ------------------------------------------------------------------ what comes in

    def _from_server(self, line: Line, carried: Carried) -> None:
        if not self.alive:
            return
        if self.stopped:
            self._backlog.append((self._from_server, line, carried))
            return
        message, payload = carried
        match message:
            case wire.Employ():
                self._employed(message)
            case wire.Meet():
                self._meet(message)
            case wire.Spare():
                (self._spared.add if message.on else self._spared.discard)(message.session)
            case wire.Greet():
                self.kill()  # its worker greets again, and starts another one when it is asked to
            case _ if self.adder is not None:
                try:
                    self.adder.order(message, () if payload is None else (payload,))
                except PeerError as e:
                    raise Broken(f"shard {self.number} cannot do what it is told: {e}") from None
                if isinstance(message, wire.Part):
                    self._routes.pop(message.session, None)
                    self._spared.discard(message.session)
                self._check_slots()

    def _employed(self, message: wire.Employ) -> None:
        self.number = message.shard
        self._routes.clear()
        self._outboxes.clear()
        self._readers.clear()
        self._met.clear()
        self._spared.clear()
        if self._maps:
            self.ring = Ring(2 * self.server.buckets)  # less than its history
        self.sums = ShardSamples(self)
        self.server.shards[self.number] = self
        buckets = self.server.buckets
        self.adder = self._make_adder(
            self.sums,
            most=2 * buckets + 2,
            limit=self.server.limit * buckets,
            tell=self._tell,
            send=self._send,
            size=lambda buffer: 1,
        )

    def _meet(self, meet: wire.Meet) -> None:
        self._met.add(meet.session)
        channel = wire.Channel(port=1, shard=self.number)
        self._tell(wire.Met(session=meet.session, channel=channel))

    def receive(self, route: bytes, carried: Carried) -> None:
        """A record of a channel."""
        if not self.alive:
            return
        if self.stopped:
            self._backlog.append((self.receive, route, carried))
            return
        record, payload = carried
        if record.kind == BIND:
            if record.session in self._met:
                self._bind(route, record)
            return
        if self._routes.get(record.session) != route or self.adder is None:
            return
        assert record.push is not None
        release: Callable[[], None] = lambda: None  # noqa: E731
        if record.push.places:
            [(_, _, slot)] = record.push.places
            outbox = self._outboxes[route]
            payload, release = outbox.cells[slot], partial(outbox.free, slot)
            payload.owner = Cell.SHARD
            self.server.shared_pushes += 1
        waiting = self.adder._waiting.get(record.session, Waiting())
        expected = record.number > waiting.newest and record.number not in waiting.unneeded
        self._arrived = 0
        try:
            self.adder.came(record.session, record.number, record.push, [payload], release)
        except PeerError as e:
            if "wait for the server's word" not in str(e):
                raise Broken(f"shard {self.number}: {e}") from None
            self._lose_channel(record.session, route)  # its link is slower than its channel
            return
        if expected and self._arrived != record.number:
            raise Broken(f"shard {self.number} drops payload {record.number} without a word")
        if self.adder.waiting > 2 * self.server.buckets * (self.server.rules.max_workers + 1):
            raise Broken(f"shard {self.number} keeps {self.adder.waiting} payloads")

    def _lose_channel(self, session: str, route: bytes) -> None:
        self._routes.pop(session, None)
        self._outboxes.pop(route, None)
        self._readers.discard(route)
        for lane in [line for line in self.net.lines if line.route == route]:
            lane.cut(0.0, 0.0)

    def _bind(self, route: bytes, record: Record) -> None:
        self._routes[record.session] = route
        ring = self.ring if record.ring else None
        outbox = record.outbox if self._maps else None
        if ring is not None:
            self._readers.add(route)
        if outbox is not None:
            self._outboxes[route] = outbox
        self.net.send(route, (Record(BIND, ring=ring, outbox=outbox), None))

    def _check_slots(self) -> None:
        """What came through an outbox waits for an order, or its slot is free."""
        assert self.adder is not None
        waiting = self.adder._waiting.values()
        kept = {id(b) for w in waiting for p in w.payloads.values() for b in p.buffers}
        for outbox in self._outboxes.values():
            if any(c.owner == Cell.SHARD and id(c) not in kept for c in outbox.cells):
                raise Broken("a slot that nobody reads is not freed")

    # ------------------------------------------------------------------ what goes out

    def _tell(self, message: wire.Message, *buffers: Any) -> None:
        if isinstance(message, wire.Arrived):
            self._arrived = message.number
        self.link.send((message, content(buffers[0]) if buffers else None))

    def _send(self, divide: wire.Divide, buffers: list[Any]) -> int:
        self._sent += 1
        record = Record(AVERAGE, number=self._sent, round=divide.round, bucket=divide.bucket)
        [average] = buffers
        for session, route in self._routes.items():
            if session in self._spared:
                continue
            shared = route in self._readers
            self.net.send(route, (record, average if shared else content(average)))
        if self.counts:
            self.server.made_elsewhere(divide, content(average), self.number)
        return self._sent


__all__ = ["AVERAGE", "BIND", "DOWN", "PUSH", "Block", "Cell", "Lane", "Outbox", "Record", "Shard"]
