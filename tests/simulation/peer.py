"""The shipping `Session`, `Pushes` and `ServerSearch` in virtual time.

`Client` does here what `workers.link.client` and `workers.link.connection` do with sockets: it
greets, hands messages and time to the session, and carries out what that says. `Observer` is the
loop of its program around it; that of workers is in `worker`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from paramserver.protocol import sharding
from paramserver.shard.adder import Adder
from paramserver.shard.orders import LINGER_S
from paramserver.transport import sealing
from workers.link import actions
from workers.link.connection import RunOver, ServerSearch
from workers.link.follow import Follow
from workers.link.pushes import Pushes
from workers.link.relays import Relays
from workers.link.session import Session
from workers.local_rounds import LocalRounds

from .book import Broken, Sample, after_update
from .network import Carried, Line, Network, Together, World
from .process import AT_BOTH, AT_DOOR, AT_LINK, DEAF, Leaves, Process, Waiting
from .relay import Plan, Relay, Source
from .server import LIE, Ring, Server, brief, pieces_of
from .shard import BIND, PUSH, Block, Cell, Lane, Outbox, Record, Shard, content

BEATS_PER_TIMEOUT = 5
HELLO_EVERY_S = 1.0
CHANNEL_S = 5.0
SEARCH_AFTER_S = 2.0
PROBE_EVERY_S = 0.25
PIECES = 6
DEADLINE_S = 90.0
"""For greeting, and for a silent server: longer than any fault."""
UNANSWERED = "no server answered"
ON_ITS_WAY = object()


class Habits(msgspec.Struct):
    """What a peer is like; faults change it in the middle of a run."""

    samples: int
    batch_size: int
    compute_s: float
    """For one bucket, or one batch of an evaluation."""
    absent: float = 0.0
    """Share of its buckets without a gradient."""
    bad: float = 0.0
    """Share of its batches with a bucket of numbers that are not finite."""
    leaves: float = 0.0
    """Share of its steps after which it leaves in order."""
    pauses: float = 0.0
    """Share of its steps after which it leaves its loop for a while, and takes nothing in."""
    deadly: frozenset[Sample] = frozenset()
    """Whoever computes on one of them dies,"""
    in_silence: bool = False
    """without a word."""
    unreadable: frozenset[Sample] = frozenset()
    sooner: float = 0.0
    """Share of its local steps after which it leaves its loop, and pushes those that it made."""
    stutters: float = 0.0
    """Share of its batches that it begins with a pause of several batches."""
    hangs_s: float = 0.0
    """Its next batch takes so much longer."""
    own: int = 0
    """So many batches of its own are a worker's part; 0: all share one set."""


State = tuple[int, dict[str, Any] | None]
"""What a snapshot holds: the model and the ledger."""


class Replica:
    """A model, and how an update is applied to it, as in `workers.replica.replica`."""

    def __init__(self, serial: int, buckets: int) -> None:
        self.model = hash((7, serial))  # its own first weights
        self.step = 0
        self.lineage = f"fresh-{serial}"
        self._buckets = buckets
        self.ledger: dict[str, Any] | None = None
        self.local = False
        self._ahead = False
        self._flat: list[tuple[Sample, ...]] = [()] * buckets
        self._present = [0] * buckets

    def take(self, average: wire.Average, samples: tuple[Sample, ...]) -> None:
        self._flat[average.bucket] = samples
        self._present[average.bucket] += average.bucket not in average.absent

    def apply(self, close: wire.Close) -> None:
        content = [
            (self._present[b] > 0, self._flat[b] if b in close.buckets else ())
            for b in range(self._buckets)
        ]
        self.model = after_update(self.model, content)
        self.step, self.lineage, self.ledger = close.step, close.lineage, close.ledger
        if not self._ahead or close.local_steps == 1:
            self.come_back()
        self._ahead = False
        self.forget_averages()

    def state(self) -> State:
        return self.model, self.ledger

    def load(self, state: State, step: int, lineage: str) -> None:
        self.model, self.ledger = state
        self.step, self.lineage = step, lineage
        self.come_back()
        self.forget_averages()

    def forget_averages(self) -> None:
        self._present = [0] * self._buckets

    # Of local steps only is known whether there are any: what they come to is their samples.

    def begin_local(self) -> Replica:
        self.local = True
        return self

    def step_locally(self) -> None:
        pass

    def run_ahead(self) -> None:
        self._ahead = True

    def come_back(self) -> None:
        self.local = self._ahead = False


@dataclass(frozen=True)
class Shipping:
    """What a peer is made of."""

    session: type[Session] = Session
    follow: type[Follow] = Follow
    pushes: type[Pushes] = Pushes
    search: type[ServerSearch] = ServerSearch
    local: type[LocalRounds] = LocalRounds
    adder: type[Adder] = Adder
    relays: type[Relays] = Relays


class Channel:
    """A peer's end of its channel to a shard."""

    def __init__(self, lane: Lane, now: float) -> None:
        self.lane, self.since = lane, now
        self.bound = False
        self.newest = 0
        self.payloads: dict[int, Any] = {}
        self.unread: list[Carried] = []
        self.outbox: Outbox | None = None


class Log:
    """What a peer tells people."""

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name

    def info(self, text: str) -> None:
        self._world.say(f"    {self._name}: {text}")


class Client(Process):
    """A replica at its connection; see the module's head."""

    role = "worker"
    goes_adrift = False

    def __init__(
        self,
        world: World,
        net: Network,
        server: Server,
        parts: Shipping,
        id: int,
        serial: int,
        habits: Habits,
    ) -> None:
        self.server, self.id, self.serial, self.habits = server, id, serial, habits
        self.name = f"worker {id}" if self.role == "worker" else "the observer"
        super().__init__(world, net, server.receive)
        self.sub_room = 3 * server.buckets + 6
        self.address = "" if self.ipc else f"10.0.0.{max(1, id) // (1 + world.seed % 3 // 2)}"
        self.channels: dict[int, Channel] = {}  # by shard
        self.leaving: dict[int, Channel] = {}  # ended by the server, and still read
        self._pushed = 0  # payloads, to any shard
        self._awaited: dict[int, tuple[int, float]] = {}  # by shard: payload, since when
        self.shard: Shard | None = None  # that it has started
        self.relays = parts.relays(
            self,  # type: ignore[arg-type]
            Relay,  # type: ignore[arg-type]
            Source,  # type: ignore[arg-type]
        )
        self._follows_pub = False  # numbers of the server's averages come from there
        self.replica = Replica(serial, server.buckets)
        self.session: Session | None = None
        self._window = 1 + serial % 2  # small, since rounds have few buckets
        self.pushes = parts.pushes(
            self._window, self._shard_of, self._outbox_of, size=lambda buffer: 1
        )
        self.welcome: wire.Welcome | None = None
        self.run: str | None = None  # to which its state belongs
        self.turned_away = False  # by a server that it found, and took for another one
        self.has_end = False  # it has come to one of its sockets
        self.greetings = 0
        self.key = server.nonce if self.role == "observer" else ""
        self.host, self.port = "host", net.port
        self.found_at = -math.inf  # the server, at another port
        self.log = Log(world, self.name)
        self.server_search = parts.search(self, server.search)  # type: ignore[arg-type]
        self.process, self.secret = f"process-{serial}", f"secret-{serial}"
        self._boot = server.boots
        self._parts = parts
        self._timeout_s = server.rules.heartbeat_timeout
        self._maps = serial % 5 > 0  # where it may, it can use shared memory
        self._shares = False  # with the server that welcomed it
        self._ring: Ring | None = None
        self._must_greet = False
        self._end_at_door: wire.End | None = None

    @property
    def abandoned(self) -> bool:
        """Has the pipe from its server ended? Only the observer has one."""
        gone = not self.server.alive or self.server.boots != self._boot
        return self.role == "observer" and gone

    @property
    def follow(self) -> Follow | None:
        return None if self.session is None else self.session.follow

    @property
    def ended(self) -> wire.End | None:
        return None if self.session is None else self.session.ended

    def move(self, host: str, port: int, keys: Any) -> tuple[str, int, Any]:
        before = self.host, self.port, None
        self.host, self.port = host, port
        self.found_at = self.world.now
        return before

    def heard_at_door(self, message: Any) -> None:
        if isinstance(message, wire.Greet) and not message.session_known:
            self._must_greet = True
        elif isinstance(message, wire.End):
            self._end_at_door = message

    def _exit(self, why: str) -> None:
        self._close_channels()
        self.relays.close()
        super()._exit(why)
        if self.shard is not None:  # its pipe ends
            self.world.after(LINGER_S, self.shard.kill)

    def _arrive(self, line: Line, carried: Carried) -> None:
        super()._arrive(line, carried)
        self.has_end |= isinstance(carried[0], wire.End) and self.lines.get(line.kind) is line

    # ------------------------------------------------------------------ its connection

    def connect(self) -> Waiting:
        """Say hello until welcomed, then probe until link and SUB work."""
        deadline = self.world.now + DEADLINE_S
        while True:
            welcome = self.welcome = yield from self._hello(deadline)
            self._shares = self._maps and self.ipc and welcome.shared is not None
            self._ring = None
            self.open_line("link")
            self.open_line("sub")
            self.heard = {wire.Close, wire.Open, wire.Pulse, wire.Probe, wire.End}
            self.heard |= {wire.Sharded, wire.Closing}
            self._must_greet, self._end_at_door = False, None
            beat = wire.Beat(
                session=welcome.session,
                run=welcome.run,
                nonce=self.process,
                secret=self.secret,
            )
            self.beat(beat, self._timeout_s / BEATS_PER_TIMEOUT)
            if (yield from self._probed(welcome.session)):
                self.server_search.over()
                self.greetings += 1
                return

    def _hello(self, deadline: float) -> Waiting:
        """Again and again: a hello may be lost with its connection, and the server may move."""
        hello = wire.Hello(
            protocol=wire.PROTOCOL,
            role=self.role,
            id=self.id,
            nonce=self.process,
            host="host",
            pid=self.serial,
            run=self.run,
            key=self.key,
            secret=self.secret,
        )
        self._open_door()
        search_at = self.world.now + self._search_after_s
        while self.world.now < deadline:
            if self.abandoned:
                raise Leaves("the server is gone")
            if self.world.now >= search_at and self.server_search.found(self.world.now):
                self._open_door()
            self.lines["door"].send((hello, None))
            until = self.world.now + HELLO_EVERY_S
            while self.world.now < until:
                if not self.inbox["door"]:
                    yield until, AT_DOOR
                    continue
                match self.inbox["door"].popleft()[0]:
                    case wire.Welcome() as welcome:
                        return welcome
                    case wire.Reject(reason=reason, end=end) as reject:
                        if self.server_search.was_wrong(reject):
                            self.turned_away = True
                            self._open_door()
                        elif end is not None and self.session is not None:
                            raise RunOver(end)
                        else:
                            raise Leaves(f"rejected: {reason}")
                    case wire.Later():
                        deadline = self.world.now + DEADLINE_S
                        search_at = self.world.now + self._search_after_s
        raise Leaves(UNANSWERED)

    def _open_door(self) -> None:
        self.close_lines()
        self._close_channels()
        self.relays.close()
        if self.shard is not None:
            self.shard.kill()  # another server, or session, asks for another one
            self.shard = None
        self.open_line("door", port=self.port)

    def _probed(self, session: str) -> Waiting:
        """Do both ways work? No: in time they did not, or the session was forgotten meanwhile."""
        deadline, heard_at = self.world.now + self._timeout_s, self.world.now
        seen: set[str] = set()
        while self.world.now < deadline:
            self._probe()
            until = self.world.now + PROBE_EVERY_S
            while seen != AT_BOTH:
                kind = "sub" if self.inbox["sub"] else "link"
                if not self.inbox[kind]:
                    if self.world.now >= until:  # what has come is read first, however late it is
                        break
                    yield until, AT_BOTH
                    continue
                heard_at = self.world.now
                match self.inbox[kind].popleft()[0]:
                    case wire.Probe(session=whose) if whose == session:
                        seen.add("sub")
                    case wire.Pulse() if kind == "link":
                        seen.add("link")
                    case wire.Greet(session_known=False):
                        return False
                    case wire.Reject() as message:
                        raise Leaves(f"rejected: {message.reason}")
                    case wire.End() if self.session is None:
                        raise Leaves("the run has ended")
                    case wire.End() as end:
                        raise RunOver(end)
            end = self._end_at_door
            if end is not None and self.session is None:
                raise Leaves("the run has ended")
            if end is not None:
                raise RunOver(end)
            if self._must_greet:
                return False
            if seen == AT_BOTH:
                return True
            silent_s = self.world.now - heard_at
            if silent_s >= self._search_after_s and self.server_search.found(self.world.now):
                return False
        return False

    @property
    def _search_after_s(self) -> float:
        return min(SEARCH_AFTER_S, self._timeout_s / 2)

    def _probe(self) -> None:
        assert self.welcome is not None
        self.send(wire.Probe(session=self.welcome.session, secret=self.secret))

    def send(self, message: wire.Message, payload: Any = None) -> None:
        if "link" in self.lines:  # else the run is over
            self.lines["link"].send((message, payload))

    # ------------------------------------------------------------------ coming

    def join(self) -> Waiting:
        session = self.session = self._parts.session(
            self.replica, self.role, drifts=self.goes_adrift, make_follow=self._parts.follow
        )
        self._greeted()
        yield from self._wait_for_admission()
        if self.abandoned and not session.joined:
            raise Leaves("the server is gone")
        if self.ended is not None and not session.joined:
            raise Leaves("the run ended before it could join")

    def _greeted(self) -> None:
        session, welcome = self.session, self.welcome
        assert session is not None and welcome is not None
        steps = welcome.settings["digest_steps"]
        self._do(
            session.greeted(
                welcome.nonce,
                self.world.now,
                timeout_s=self._timeout_s,
                digest_steps=steps,
                run=welcome.run,
            )
        )

    def _wait_for_admission(self) -> Waiting:
        session = self.session
        assert session is not None
        yield from self.wait(
            lambda: session.joined or session.ended or self._must_greet or self.abandoned
        )

    def _greet_again(self) -> Waiting:
        session = self.session
        assert session is not None
        self._must_greet = False
        self.world.say(f"{self.name} greets again")
        self.pushes.without_outbox()
        session.unknown()
        try:
            yield from self.connect()
        except RunOver as e:
            session.follow.end = e.end
            self._do(session.stay_behind())
            return
        self._greeted()
        yield from self._wait_for_admission()

    def _send_join(self) -> None:
        r = self.replica
        self.relays.plan = Plan.of(self.server.buckets)
        self.relays.stop()
        self.pushes.begin(None, self._window)
        join = wire.Join(
            layout=self.server.layout,
            step=r.step,
            lineage=r.lineage,
            device="cpu",
            kind="a number",
            ledger=r.ledger,
            sharing=self._shares,
        )
        self.send(join, r.model)

    def _hear(self, admit: wire.Admit) -> None:
        session = self.session
        assert session is not None
        if self._hear_averages():
            self._do(session.admitted(admit, self.world.now))
        else:
            self._do(session.join_again())

    def _hear_averages(self) -> bool:
        """From the server's ring, or through SUB; False where the ring cannot be used."""
        self._ring = self.server.data.ring if self._shares else None
        self._follows_pub = self._ring is None
        if self._ring is not None:
            self.heard.add(wire.Shared)
        self.relayed()
        if self._ring is not None and self.serial % 7 == 0:
            self._shares, self._ring = False, None
            return False
        return True

    # ------------------------------------------------------------------ what a relay brings

    def relayed(self) -> None:
        """As `Payloads.relayed`."""
        if not self._follows_pub or self.heard is None:
            return
        wanted = {wire.Average: not self.relays.announced, wire.Sealed: self.relays.from_server}
        for kind, heard in wanted.items():
            (self.heard.add if heard else self.heard.discard)(kind)

    def forgive(self, missing: int) -> None:
        """Channels of the simulation are not given up for what is missing."""

    def hears_relay(self) -> None:
        if "sub" in self._ears:
            self._wake()

    # ------------------------------------------------------------------ taking part

    def ready(self) -> None:
        assert self.session is not None
        h = self.habits
        if h.own:
            told = wire.Ready(samples=0, batch_size=1, own=True)
        else:
            told = wire.Ready(samples=h.samples, batch_size=h.batch_size)
        self._do(self.session.ready(told))

    def unready(self, unfinished: bool = False) -> None:
        assert self.session is not None
        self.session.unready()
        if self.ended is None:
            self.send(wire.Unready(unfinished=unfinished))

    def push(self, push: wire.Push, payload: Any) -> None:
        assert self.session is not None
        self.session.took_part = True
        room: Any = self.pushes.room(push.bucket, 1)
        if isinstance(room, Cell):
            room.content, payload = payload, room
        self.pushes.add(push, [payload], self.world.now)
        self._send_due()

    def _outbox_of(self, shard: int) -> Any:
        channel = self.channels.get(shard)
        return channel.outbox if channel is not None and channel.bound else None

    def _send_due(self) -> None:
        for push, buffers in self.pushes.due(self.world.now):
            payload = content(buffers[0]) if buffers else None
            if not push.shard:
                self.send(push, payload)
                continue
            self._pushed += 1
            push = msgspec.structs.replace(push, sealed=self._pushed)
            channel = self.channels.get(push.shard)
            if channel is not None:
                assert self.welcome is not None
                session = self.welcome.session
                record = Record(PUSH, session=session, number=push.sealed, push=push)
                channel.lane.send((record, payload))
            self.send(msgspec.structs.replace(push, places=()))

    def _shard_of(self, bucket: int) -> int:
        current = None if self.follow is None else self.follow.open
        if current is None:
            return 0
        sizes = (1,) * self.server.buckets
        return sharding.owners(sizes, current.shards, frozenset())[bucket]

    # ------------------------------------------------------------------ shards

    def _carry(self) -> None:
        """The server wants a shard beside this worker."""
        if self.shard is None or not self.shard.alive:
            self.world.after(0.05, self._start_shard, self.greetings)

    def _start_shard(self, greetings: int) -> None:
        if self.alive and greetings == self.greetings and self.welcome is not None:
            self.shard = Shard(self.world, self, self._parts.adder)
            self.started_shard()

    def started_shard(self) -> None:
        """Its worker has started one."""

    def _told_channel(self, told: wire.Channel) -> None:
        if not told.port:
            self._end_channel(told.shard)
            return
        shard = self.server.shards.get(told.shard)
        before = self.channels.pop(told.shard, None)
        if before is not None:
            before.lane.close()
        if shard is None:
            return
        lane = Lane(shard.net, f"shard {told.shard}", shard.receive, self._from_shard)
        if shard.address == self.server.firewall != self.address:
            lane.cut(math.inf, 0.0)
        self.channels[told.shard] = Channel(lane, self.world.now)
        assert self.welcome is not None
        near = self._maps and self.address == shard.address
        outbox = Outbox() if near and self.role == "worker" else None
        session = self.welcome.session
        lane.send((Record(BIND, session=session, ring=near, outbox=outbox), None))
        self.world.after(CHANNEL_S, self._look_at_channel, told.shard, self.channels[told.shard])

    def _look_at_channel(self, number: int, channel: Channel) -> None:
        if self.alive and self.channels.get(number) is channel and not channel.bound:
            self._channel_lost(number, "nothing comes through it")

    def _channel_lost(self, number: int, why: str) -> None:
        channel = self.channels.pop(number, None)
        self._awaited.pop(number, None)
        self._close_leaving(number)
        if channel is not None:
            channel.lane.close()
            self.send(wire.Reached(shard=number, problem=why))

    def _end_channel(self, number: int) -> None:
        """The server has ended it. As `Shards`, which reads from it for a while."""
        channel = self.channels.pop(number, None)
        if channel is None:
            return
        if not channel.bound:
            channel.lane.close()
            return
        self._close_leaving(number)
        self.leaving[number] = channel
        self.world.after(self._timeout_s / 2, self._look_at_leaving, number, channel)

    def _look_at_leaving(self, number: int, channel: Channel) -> None:
        if self.leaving.get(number) is not channel:
            return
        if self.follow is not None and number in self.follow.makers:
            self.world.after(self._timeout_s / 2, self._look_at_leaving, number, channel)
        else:
            self._close_leaving(number)

    def _close_leaving(self, number: int) -> None:
        channel = self.leaving.pop(number, None)
        if channel is not None:
            channel.lane.close()

    def _close_channels(self) -> None:
        for channel in [*self.channels.values(), *self.leaving.values()]:
            channel.lane.close()
        self.channels.clear()
        self.leaving.clear()

    def _from_shard(self, line: Line, carried: Carried) -> None:
        number = int(line.kind.split()[1])
        found = self.channels.get(number), self.leaving.get(number)
        channel = next((c for c in found if c is not None and c.lane is line), None)
        if channel is None or not self.alive:
            return
        record, _ = carried
        if record.kind == BIND:
            channel.bound, channel.outbox = True, record.outbox
            self.send(wire.Reached(shard=number))
            return
        channel.unread.append(carried)
        if "sub" in self._ears:
            self._wake()

    def _complete(self) -> bool:
        """Is the first message of `held` here as a whole? As `Client._complete`."""
        session = self.session
        assert session is not None
        asked: set[int] = set()
        for place in range(session.may_be_next):
            message, payload = session.held[place]
            if isinstance(message, wire.Sealed | wire.Sharded) and payload is None:
                shard = message.shard if isinstance(message, wire.Sharded) else 0
                if shard in asked:
                    continue
                asked.add(shard)
                if session.wants(message):
                    payload = self._payload(message)
                    if payload is ON_ITS_WAY:
                        continue
            session.goes_first(place, payload)
            return True
        return False

    def _has_next(self) -> bool:
        session = self.session
        assert session is not None
        while not self._complete():
            if not (session.reads_on and self._read_sub()):
                return False
        return True

    def _payload(self, average: wire.Sealed | wire.Sharded) -> Any:
        """What has come of an average; None: it does not come. As `Client._payload`."""
        relayed = self.relays.payload(average)
        if relayed is not None:
            self.server.relayed_averages += 1
            return relayed[0]  # type: ignore[index]
        patient = self.relays.brings(average)
        found = None
        if isinstance(average, wire.Sharded):
            found = self._payload_of_shard(average, patient)
        return ON_ITS_WAY if patient and found is None else found

    def _read(self, shard: int, channel: Channel) -> None:
        unread, channel.unread = channel.unread, []
        for record, payload in unread:
            channel.newest = max(channel.newest, record.number)
            channel.payloads[record.number] = payload
            kind = sealing.Kind.SHARED if isinstance(payload, Block) else sealing.Kind.AVERAGE
            self.relays.opened(
                shard,
                sealing.Payload(kind, record.round, record.bucket, record.number, [payload]),
            )

    def _payload_of_shard(self, average: wire.Sharded, patient: bool) -> Any:
        number, lost = average.number, True
        for table in (self.leaving, self.channels):
            channel = table.get(average.shard)
            if channel is None:
                continue
            self._read(average.shard, channel)
            for older in [n for n in channel.payloads if n < number]:
                del channel.payloads[older]
            if number in channel.payloads:
                self._awaited.pop(average.shard, None)
                return channel.payloads.pop(number)
            lost = lost and channel.newest > number
        if lost:
            return None
        if patient:
            return ON_ITS_WAY
        if self._awaited.get(average.shard, (0, 0.0))[0] != number:
            self._awaited[average.shard] = number, self.world.now
        if self.world.now - self._awaited[average.shard][1] > self._timeout_s / 2:
            self._channel_lost(average.shard, "an average does not come through it")
            return None
        return ON_ITS_WAY

    def goodbye(self, reason: str, **more: Any) -> None:
        step, digest = 0, ""
        if self.session is not None and self.session.joined:
            step, digest = self.replica.step, str(self.replica.model)
        self._probe()
        self.send(wire.Goodbye(reason=reason, step=step, digest=digest, **more))

    def kept(self) -> None:
        assert self.session is not None
        self._do(self.session.kept())

    def catch_up(self) -> None:
        assert self.session is not None
        self._do(self.session.catch_up())

    # ------------------------------------------------------------------ the loop

    def poll(self) -> None:
        session = self.session
        assert session is not None
        while session.hears and self._has_next():
            if not isinstance(session.held[0][0], wire.Average | wire.Pulse | wire.Closing):
                break
            self._next_published()
        self._send_due()

    def wait(self, done: Callable[[], Any], timeout_s: float = math.inf) -> Waiting:
        session = self.session
        assert session is not None
        until = self.world.now + timeout_s
        while not done():
            if self._must_greet and not self.abandoned:
                self._look_for_end()
                if session.follow.end is not None:
                    self._must_greet = False
                    self._do(session.stay_behind())
                    continue
                yield from self._greet_again()
                continue
            if self._handle_one():
                continue
            if self.world.now >= until:
                return
            ears = AT_BOTH if session.hears else AT_LINK
            yield min(until, self.world.now + self._timeout_s / 8), ears
            self._tick()

    def _look_for_end(self) -> None:
        session = self.session
        assert session is not None
        arrived = [*session.held, *self.inbox["link"], *self.inbox["sub"]]
        self.inbox["link"].clear()
        self.inbox["sub"].clear()
        for message, _ in arrived:
            if isinstance(message, wire.End):
                session.follow.ended(message)

    def _tick(self) -> None:
        session, now = self.session, self.world.now
        assert session is not None
        self._send_due()
        self.relays.tick()
        if now - session.follow.heard_at <= self._timeout_s / 2:
            self.server_search.over()
        elif self.server_search.found(now):
            self._must_greet = True
            return
        self._do(session.tick(now))

    def _handle_one(self) -> bool:
        session = self.session
        assert session is not None
        if session.hears and self._has_next():
            self._next_published()
            return True
        if not self.inbox["link"]:
            return False
        message, payload = self.inbox["link"].popleft()
        if self.world.talks and not isinstance(message, wire.Pulse):
            self.world.say(f"    server -> {self.name}: {brief(message)}")
        if isinstance(message, wire.Channel):
            self._told_channel(message)
            return True
        if isinstance(message, wire.Carry):
            self._carry()
            return True
        if isinstance(message, wire.HandOn):
            self.relays.hand_on(message)
            return True
        if isinstance(message, wire.Listen):
            self.relays.listen(message)
            return True
        try:
            self._do(session.received(message, payload, self.world.now))
        except UserError as e:
            rejected = "rejected: " if isinstance(message, wire.Reject) else ""
            raise Leaves(f"{rejected}{e.problem}") from None
        return True

    def _read_sub(self) -> bool:
        session = self.session
        assert session is not None
        if not self.inbox["sub"]:
            return False
        carried: Carried = self.inbox["sub"].popleft()
        together = isinstance(carried[0], Together)
        came = carried[0].messages if together else [carried]
        for message, payload in came:
            self.relays.published(message, [] if payload is None else [payload])
        session.held.extend(came)
        return True

    def _next_published(self) -> None:
        session = self.session
        assert session is not None
        message = session.held[0][0]
        if self.world.talks and not isinstance(message, wire.Pulse | wire.Probe):
            self.world.say(f"    {self.name} reads: {brief(message)}")
        self._do(session.next(self.world.now))
        # On the way from one channel to another it hears each average twice, and the close once.
        if len(session.held) > 2 * self.server.buckets + 1:
            raise Broken(f"{self.name} holds {len(session.held)} messages back")

    # ------------------------------------------------------------------ carrying out

    def _do(self, found: list[actions.Action]) -> None:
        session, replica = self.session, self.replica
        assert session is not None
        for action in found:
            match action:
                case actions.Take():
                    self._take(action)
                case actions.Apply():
                    if action.first:
                        replica.forget_averages()
                    replica.apply(action.close)
                    self._compare()
                    self._do(session.applied(action.close, self.world.now))
                case actions.Closed():
                    self.closed(action.close)
                case actions.Send():
                    self.send(action.message)
                case actions.Compare():
                    self.send(wire.Digest(step=action.step, digest=str(replica.model)))
                case actions.Missed():
                    self.missed(action.close)
                case actions.Join():
                    self._send_join()
                case actions.Hear():
                    self._hear(action.admit)
                case actions.Joined():
                    assert self.welcome is not None
                    self.run = self.welcome.run
                case actions.Greet():
                    self._must_greet = True
                case actions.Silent():
                    if action.seconds > DEADLINE_S:
                        raise Leaves(f"the server has been silent for {action.seconds:.0f} s")
                case actions.Probe():
                    self._probe()
                case actions.Say():
                    self.log.info(action.text)
                case actions.Give():
                    self._give(action.snapshot)
                case actions.SendPiece():
                    piece = wire.Piece(snapshot=action.snapshot, piece=action.piece)
                    self.send(piece, replica.state())
                case actions.Begin():
                    m, room = action.manifest, dict[int, State]()
                    self._do(session.takes(m, room, pieces_of(m), self.world.now))
                case actions.TakePiece():
                    self._take_piece(action)
                case actions.Adopt():
                    self._adopt(list(action.room.values()), action.manifest)

    def _take(self, action: actions.Take) -> None:
        session, average, samples = self.session, action.average, action.payload
        assert session is not None
        if action.first:
            self.replica.forget_averages()
        if isinstance(average, wire.Shared):
            if not self._still_there(average):
                session.lost(average)
                return
            assert self._ring is not None
            samples = self._ring.read(average.places[0])
        if isinstance(average, wire.Sealed | wire.Sharded) and samples is None:
            session.lost(average)
            return
        if isinstance(samples, Block):
            self.server.shared_averages += 1
            if not samples.whole:
                session.lost(average)
                return
            samples = samples.read()
        self.replica.take(average, samples)
        self.pushes.averaged(average.bucket, self.world.now)
        self._send_due()

    def _still_there(self, average: wire.Shared) -> bool:
        return self._ring is not None and self._ring.whole(average.places[0])

    def _give(self, snapshot: int) -> None:
        session, r = self.session, self.replica
        assert session is not None
        session.given_from(snapshot, None)
        self.send(
            wire.Manifest(
                snapshot=snapshot,
                step=r.step,
                lineage=r.lineage,
                tree="",
                tensors=(("uint8", (PIECES,)),),
                piece_bytes=1,
            )
        )

    def _take_piece(self, action: actions.TakePiece) -> None:
        session = self.session
        assert session is not None
        if action.payload == LIE:
            self._do(session.refuse(action.snapshot, "a piece of another length"))
            return
        action.room[action.piece] = action.payload
        self._do(session.took(action.piece, self.world.now))

    def _adopt(self, states: list[State], manifest: wire.Manifest) -> None:
        session, m = self.session, manifest
        assert session is not None
        if not states:  # a tree without what belongs there
            why = "it is not my model"
            self._do(session.refuse(m.snapshot, why, misfit=why))
            return
        if any(state != states[0] for state in states):
            raise Broken(f"{self.name} took a snapshot of several models")
        self.replica.load(states[0], m.step, m.lineage)
        self._compare()
        self._do(session.adopted(m))

    def _compare(self) -> None:
        """With the book."""
        self.server.book.compare(self.name, self.replica.lineage, self.replica.model)

    def missed(self, close: wire.Close) -> None:
        """A step that this replica does not follow."""

    def closed(self, close: wire.Close) -> None:
        """A step that it has applied."""


class Observer(Client):
    """The loop of `workers.observer`: busy with an evaluation now and then, it may go adrift."""

    role = "observer"

    def main(self) -> Waiting:
        self.goes_adrift, self._due = self.world.random.random() < 0.7, False
        self._kept = ""
        yield from self.connect()
        yield from self.join()
        session = self.session
        assert session is not None
        while True:
            next_s = self.world.random.expovariate(0.5)
            yield from self.wait(
                lambda: (
                    (self._due and session.joined)
                    or self._must_keep()
                    or self.ended
                    or self.abandoned
                ),
                next_s,
            )
            if self.abandoned:
                raise Leaves("the server is gone")
            if self.ended is not None:
                break
            if self._must_keep():
                yield from self._keep()
            self._due = False
            for _ in range(3):
                yield self.world.now + self.habits.compute_s, DEAF
                yield from self.wait(lambda: self.ended is not None, timeout_s=0)
                if self._must_keep():
                    yield from self._keep()
        if self._kept != self.replica.lineage:
            yield from self._keep()
        self.goodbye(wire.FINISHED, finished=True)

    def _must_keep(self) -> bool:
        assert self.session is not None
        return self.session.at_last_step and self._kept != self.replica.lineage

    def _keep(self) -> Waiting:
        """To write takes a while, in which this process may die."""
        assert self.session is not None
        lineage = self.replica.lineage
        yield self.world.now + self.habits.compute_s, DEAF
        self.server.disk.add(lineage)
        self._kept = lineage
        if self.session.at_last_step:
            self.kept()

    def missed(self, close: wire.Close) -> None:
        if close.step % 4 == 0:
            self._due = True
            self.catch_up()
