"""The shipping `Control` in virtual time: `Server` is its transport, its watcher and its process.

What the server keeps of tensors is kept here as samples, so that the book can say of each of them
where it went: `Samples` stands in for `paramserver.server.data.Data`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count as counter
from typing import Any, NamedTuple

import msgspec

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.disagreement import Comparison
from paramserver.rounds.effects import Finish
from paramserver.rounds.leases import LEASES_HELD
from paramserver.rounds.looks import DataSet
from paramserver.rounds.outliers import NEEDED
from paramserver.rounds.recovery import NOTHING
from paramserver.rounds.roster import Peer
from paramserver.rounds.round import worked_off
from paramserver.rounds.rules import Rules
from paramserver.rounds.snapshots import Snapshot
from paramserver.rounds.states import REPLICA
from paramserver.rounds.waits import EMPTY_ROUNDS
from paramserver.server.control import Control, Finished
from paramserver.server.history import Frames, History, Update

from .book import HUGE, USUAL, Book, Broken, Gradient, Residuals, Sample, samples_of
from .network import Carried, Network, Together, World

PULSES_PER_TIMEOUT = 10
LIAR, LIE = "liar", "a lie"  # host and payloads of one; see `liar`
PIECES_MOST = 1000
TICK_S = 0.25
DIGEST_STEPS = 2
FETCH_UPDATES = 3  # that make an answer
USUAL_AFTER = NEEDED + 4  # of usual ones only another norm is judged


class Gave(NamedTuple):
    """A snapshot that began: who gave; was the liar the only one alive who could; and how many its
    joiner had missed before, as the server counts."""

    giver: Peer
    only: bool
    missed: int


class Killed(BaseException):
    """The server's process is no more."""


class Ring:
    """Shared memory with room for `blocks` averages; the oldest one is written over first."""

    def __init__(self, blocks: int) -> None:
        self._blocks: list[tuple[Sample, ...]] = [()] * blocks
        self.newest = 0

    @property
    def oldest(self) -> int:
        return max(1, self.newest - len(self._blocks) + 1)

    def write(self, samples: tuple[Sample, ...]) -> wire.Place:
        self.newest += 1
        self._blocks[self.newest % len(self._blocks)] = samples
        return self.newest, 0, 0

    def read(self, place: wire.Place) -> tuple[Sample, ...]:
        return self._blocks[place[0] % len(self._blocks)]

    def whole(self, place: wire.Place) -> bool:
        return place[0] >= self.oldest


class Search:
    """Finds the server of a run (None: any) where it is announced, each place once."""

    def __init__(self, server: Server, run: str | None) -> None:
        self._server, self._run = server, run
        self._found: set[int] = set()

    def look(self, now: float) -> Found | None:
        server, port = self._server, self._server.net.port
        if port in self._found or not server.alive or self._run not in (None, server.run):
            return None
        self._found.add(port)
        return Found("host", port, None)

    def close(self) -> None:
        pass


class Found(NamedTuple):
    host: str
    port: int
    keys: None


class Samples:
    """`Data` of samples instead of numbers. Its frames are a message and its payload."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.history = History(server.limit, answer=FETCH_UPDATES)
        self.payloads: dict[tuple[int, int], Gradient] = {}
        self.late: set[tuple[int, int]] = set()  # of these, those of earlier rounds
        self.entered = 0  # buckets of such rounds
        self.sums: dict[int, list[Sample]] = {}
        self._weights: dict[int, float] = {}
        self._residuals = Residuals(server.book)
        self.averages: list[Finished] = []
        self._due: list[Finished] = []
        self.ring: Ring | None = None
        self._places: dict[int, wire.Place] = {}  # by bucket, of the open round
        self._round_stamp: int | None = None
        self._sharing: set[str] = set()
        self.models: dict[str, int] = {}  # what each peer's model was when it joined
        self.voids = 0
        self._closing = False

    def start(self, layout: wire.Layout) -> str | None:
        s = self._server
        if s.shares:
            self.ring = Ring((s.limit + 1) * s.buckets)
        return None

    def share(self, session: str, join: wire.Join) -> str | None:
        self._sharing.discard(session)
        if join.sharing:
            self._sharing.add(session)
        return None

    @property
    def sharing(self) -> int:
        return len(self._sharing) if self.ring is not None else 0

    def located(self, session: str, push: wire.Push, buffers: list[Any]) -> list[Any]:
        return buffers

    def release(self, session: str, push: wire.Push) -> None:
        pass

    def push(
        self, session: str, worker: int, push: wire.Push, buffers: list[Any], *, late: bool
    ) -> tuple[str | None, float | None]:
        [gradient] = buffers
        if gradient == LIE:  # it counts for what its header says
            if not 0.0 < push.scale < math.inf or push.places:
                raise PeerError("a payload that does not fit")
            gradient = self._lie(session, worker, push)
            if push.without:
                self._server.book.withheld.update(gradient[1])
        bad, norm = self._server.judged(push.bucket, gradient)
        if bad is None:
            self.payloads[worker, push.bucket] = gradient
            if late:
                self.late.add((worker, push.bucket))
        return bad, norm

    def _lie(self, session: str, worker: int, push: wire.Push) -> Gradient:
        server = self._server
        carried = server.rounds.peers[session].carried
        if carried is not None:
            return server.book.model_at(carried.step - 1), samples_of(carried.lease), USUAL
        assert server.rounds.round is not None
        of_lease = samples_of(server.rounds.round.members[worker].lease)
        return server.book.model, of_lease[: worked_off(push)], USUAL  # fewer after fewer steps

    def drop(self, worker: int, bucket: int) -> None:
        del self.payloads[worker, bucket]
        self.late.discard((worker, bucket))

    def add(self, worker: int, bucket: int, weight: float, *, late: bool) -> None:
        model, added, norm = self.payloads.pop((worker, bucket))
        self._server.adds(bucket, norm)
        book, most = self._server.book, self._server.rules.max_staleness
        if late != ((worker, bucket) in self.late):
            raise Broken(f"a gradient of worker {worker} is late or not")
        lag = book.lag(model, most if late else 0)
        if abs(weight - len(added) / math.sqrt(1 + lag)) > 1e-9 * weight:
            raise Broken(f"{len(added)} samples of worker {worker} weigh {weight}")
        self.late.discard((worker, bucket))
        self.entered += late
        self._weights[bucket] = self._weights.get(bucket, 0.0) + weight
        self.sums.setdefault(bucket, []).extend(added)

    def finish(self, finish: Finish) -> None:
        samples, weight = self.sums.pop(finish.bucket), self._weights.pop(finish.bucket)
        if abs(weight - finish.weight) > 1e-9 * weight:
            raise Broken(f"a sum of {weight} samples is divided by {finish.weight}")
        self._residuals.average(finish.bucket, counts=True)
        average = wire.Average(
            nonce=self._server.nonce,
            round=finish.round,
            step=finish.step,
            bucket=finish.bucket,
            absent=finish.absent,
        )
        content = tuple(sorted(samples))
        if self.ring is not None:
            self._places[finish.bucket] = self.ring.write(content)
            if self._round_stamp is None:
                self._round_stamp = self.ring.newest
        self.averages.append((average, [average, content]))
        self._due.append(self.averages[-1])

    def leaves_out(self, bucket: int) -> bool:
        return bool(self._server.rules.leaves_out)

    def give_up(self, bucket: int) -> list[Any]:
        return self._residuals.give_up(bucket)

    def check_left_out(self, bucket: int, buffers: list[Any]) -> None:
        pass

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        self._residuals.take_over(bucket, buffers[0])

    def due(self) -> list[Finished]:
        due, self._due = self._due, []
        return due

    def comparisons(self) -> Mapping[int, Comparison]:
        return {}

    def as_shared(self, average: wire.Average) -> Frames:
        places = (self._places[average.bucket],)
        return [wire.Shared(places=places, **msgspec.structs.asdict(average)), None]

    def close(self, close: wire.Close) -> Update:
        self._closing = True
        messages = [*(frames for _, frames in self.averages), [close, None]]
        stamp = self._round_stamp or 0
        update = Update(step=close.step, messages=messages, bytes=1, stamp=stamp)
        self.history.add(update)
        return update

    def forget_round(self, averaged: tuple[int, ...]) -> None:
        self._residuals.settled(averaged)
        self.voids += not self._closing
        self._closing = False
        self.averages, self._round_stamp = [], None
        self.payloads = {key: p for key, p in self.payloads.items() if key in self.late}
        self.sums.clear()
        self._weights.clear()

    def reaches_back_to(self) -> int | None:
        if self.ring is not None:
            self.history.forget_before(self.ring.oldest)
        return self.history.reaches_back_to

    def fetch(self, step: int) -> list[Update]:
        return self.history.after(step)

    def forget(self, session: str) -> None:
        self.models.pop(session, None)
        self._sharing.discard(session)


class Server:
    """One `Control` after the other, and the book. Killed and started again, it knows no more than
    the disk does: `run`, `noted`, the newest step that it has told anybody of, and what it noted of
    the data set.

    `subscribers` get what is published; with `through_wire` each message becomes frames and a
    message again on its way. `look` is the program's: it sees to the observer, and tells whether
    one comes. `lost` is told of closed steps that did not survive a restart; `put_off` is called
    when somebody has stopped it before its run had come back, `leaves` when its process ends after
    the run.
    """

    def __init__(
        self,
        world: World,
        net: Network,
        rules: Rules,
        make_rounds: Callable[..., Rounds],
        make_control: Callable[..., Control],
        *,
        buckets: int,
        history: int,
        through_wire: bool,
        shares: bool,
        compares: bool,
        pairs: tuple[wire.Pair, ...] = (),
    ) -> None:
        self.world, self.net, self.rules, self.buckets = world, net, rules, buckets
        self.layout = wire.Layout(
            tuple(wire.Tensor(f"w{b}", (1,), "float32") for b in range(buckets)), pairs
        )
        self.through_wire = through_wire
        self.shares = shares  # memory, with peers on its host
        self.compares = compares  # replicas tell digests of their models
        self.subscribers: list[Callable[[Carried], None]] = []
        self.shards: dict[int, Any] = {}  # of this boot, by number
        self.relays: dict[str, Any] = {}  # by folder
        self._spared: set[str] = set()  # sessions
        self._elsewhere: dict[
            int, tuple[wire.Average, Any, int]
        ] = {}  # by bucket, of the open round
        self.firewall = ""  # the address of a host whose ports nobody elsewhere reaches
        self.places: Callable[[bytes], str] = lambda route: ""
        self.look: Callable[[], bool] = lambda: False
        self.kept = 0  # ends that had to wait for it
        self.disk: set[str] = set()  # lineages of what the observer has written at the end
        self.unread_by_liar: set[Sample] = set()  # of its own leases, as it says
        self.lost: Callable[[set[str]], None] = lambda lineages: None
        self.holds: Callable[[Any, wire.Close, int], bool] = lambda shard, close, bucket: True
        self.deserted: Callable[[], None] = lambda: None
        self.limit = history
        self.sent_bytes = self.received_bytes = 0
        self.boots = self._runs = 0
        self.averages_elsewhere = self.shared_pushes = self.shared_averages = 0
        self.relayed_averages = 0
        self.over_at: float | None = None  # when its process ended, after the run
        self.put_off: Callable[[], None] = lambda: None
        self.leaves: Callable[[], None] = lambda: None
        self.dies_at: str | None = None
        self.lives: Callable[[str], bool] = lambda process: True  # a server learns of deaths late
        self.gave: dict[str, list[Gave]] = {}
        """By the process of a joiner."""
        self._make_rounds, self._make_control = make_rounds, make_control
        self._begin_run()

    def _begin_run(self) -> None:
        self._runs += 1
        self.run, self.noted = f"run-{self._runs}", NOTHING
        self._data_set: DataSet | None = None
        models = self.book.models if self._runs > 1 else {}
        self.book = Book(self.buckets, models, pairs=bool(self.layout.pairs))
        self._boot(None)

    def _boot(self, recovery: str | None) -> None:
        """A new process."""
        self.boots += 1
        self.booted_at = self.world.now
        self.alive, self.stalled = True, False
        self.shards, self._elsewhere = {}, {}
        self._spared.clear()
        self._added: dict[int, list[float]] = {}  # norms, by bucket
        self.dies_at = None
        self.ended_at: float | None = None
        self.ending_since: float | None = None  # no round is opened any more
        self._mapped = 0  # newest round whose shards were looked at
        self.nonce = f"server-{self.boots}"
        buckets = self.buckets
        self.rounds = self._make_rounds(
            self.rules,
            self.nonce,
            self.world.now,
            lambda layout: buckets,
            run=self.run,
            recovery=recovery,
            data_set=self._data_set,
        )
        self.data = Samples(self)
        sessions: Iterator[int] = counter(1)
        self.control = self._make_control(
            self.rounds,
            self.data,
            self,
            self,
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run=self.run,
                nonce=self.nonce,
                session="",
                id=0,
                settings={"digest_steps": DIGEST_STEPS if self.compares else 0},
                pub_port=0,
                shared="memory" if self.shares else None,
            ),
            observer_key=self.nonce,
            most_unread=0,
            new_session=lambda: f"session-{self.boots}-{next(sessions)}",
        )
        self._backlog: deque[tuple[bytes, Carried]] = deque()
        self._gave_at = -1  # so many rounds had been opened when the last snapshot began
        self._awaited: dict[int, int] = {}  # by id: rounds in a row that it brought nothing to
        self._passed_on: set[tuple[int, str, int | None]] = set()
        self._told_pieces = (0, 0)  # snapshot, and how many its manifest tells of
        self.contributed: set[int] = set()  # whose whole gradients this server took
        self.world.after(TICK_S, self._tick, self.boots)
        self.world.after(0.0, self._pulse, self.boots)

    @property
    def voids(self) -> int:
        return self.data.voids

    # ------------------------------------------------------------------ dying and coming back

    def kill(self) -> None:
        """kill -9. What was published may be under way, what was noted is on disk."""
        if self.alive:
            self.world.say("the server is killed")
            self.alive = False
            self.net.server_died()

    def restart(self, moves: bool = False) -> None:
        """`make server` again; it `moves`: on another port."""
        if not self.alive and self.over_at is None:
            self.net.port += moves
            self.world.say(f"START the server again; step {self.noted} was noted")
            self._boot(self.noted)
            self.net.server_is_back()

    def _exit_if_due(self) -> None:
        """Everybody who is alive has said goodbye, or had the time to: the program ends, and
        answers nobody any more."""
        if self.ended_at is not None and self.control.finished(self.world.now):
            self.world.say("the server ends")
            self.control.release_shards()
            self.leaves()
            self.alive, self.over_at = False, self.world.now
            self.net.server_died(lingers=True)

    def _desert(self) -> None:
        """Nobody came back: a new run begins, on the same port."""
        self.deserted()
        self.world.say("nobody came back: a new run begins")
        self.net.server_died()
        self._begin_run()
        self.net.server_is_back()

    def _die_if_due(self, moment: str) -> None:
        if self.dies_at == moment:
            raise Killed

    # ------------------------------------------------------------------ what comes in

    def receive(self, route: bytes, carried: Carried) -> None:
        if not self.alive:
            return
        if self.stalled:
            self._backlog.append((route, carried))
            return
        message, payload = carried
        session = self.control.links.get(route)
        if isinstance(message, wire.Probe):
            self.control.traffic.linked(message.session, self.places(route))
        if self.world.talks and not isinstance(message, wire.Beat):
            who = self.rounds.peers[session].name if session else f"route {route.decode()}"
            self.world.say(f"    {who} -> server: {brief(message)}")
        peer = self.rounds.peers[session] if session else None
        before = peer.state if peer else None
        if session is not None and isinstance(message, wire.Join):
            self.data.models[session] = payload
        if (
            peer is not None
            and peer.host == LIAR
            and isinstance(message, wire.Unreadable | wire.Push)
        ):
            self._note_lie(peer)
        try:
            buffers = [] if payload is None else [payload]
            self.control.receive(route, message, buffers, self.world.now)
        except Killed:
            self.kill()
            return
        listens = session in self.rounds.shards.relays.listening
        listens &= route not in self.control._held  # else it was not looked at yet
        if isinstance(message, wire.Lacks | wire.Fetch) and peer is not None and listens:
            raise Broken(f"{peer.name} lacks an average, and is to go on with a relay")
        if isinstance(message, wire.Adopted) and peer is not None:
            adopted = before != peer.state == REPLICA
            if adopted and not self._all_passed_on(message.snapshot):
                raise Broken(f"{peer.name} holds a snapshot without all its pieces")
        if isinstance(message, wire.Digest):
            self._check_found_wrong()
        self._check_bounds()
        self._exit_if_due()

    def go_on(self) -> None:
        """After a stop, sockets are read before time is looked at."""
        self.stalled = False
        while self._backlog and not self.stalled:
            self.receive(*self._backlog.popleft())

    # ------------------------------------------------------------------ time

    def _tick(self, boot: int) -> None:
        if not self.alive or boot != self.boots:
            return
        self.world.after(TICK_S, self._tick, boot)
        self._look_at_time(boot)
        due = self.rounds.next_deadline()
        if due is not None and due < self.world.now + TICK_S:
            self.world.at(due, self._look_at_time, boot)

    def _look_at_time(self, boot: int) -> None:
        if self.stalled or not self.alive or boot != self.boots:
            return
        try:
            self.control.tick(self.world.now)
        except Killed:
            self.kill()
            return
        self._check_bounds()
        if self.rounds.put_off:
            self.kill()
            self.put_off()
        elif self.rounds.deserted:
            self._desert()
        else:
            self._exit_if_due()

    def _pulse(self, boot: int) -> None:
        if not self.alive or boot != self.boots:
            return
        self.world.after(self.rules.heartbeat_timeout / PULSES_PER_TIMEOUT, self._pulse, boot)
        if not self.stalled:
            self.control.pulse(self.world.now)

    def search(self, run: str | None, known: tuple[str, int]) -> Search:
        return Search(self, run)

    def stop(self, reason: str) -> None:
        if self.alive:
            self.control.stop(reason)
            self._look_at_time(self.boots)

    # ------------------------------------------------------------------ what goes out

    def send(self, route: bytes, message: wire.Message, *buffers: Any) -> bool:
        session = self.control.links.get(route, "")
        match message:
            case wire.Give():
                self._check_rounds_go_on()
                self._note_giver()
            case wire.Admit(action="origin"):
                self._has_origin(message, self.data.models[session])
            case wire.Manifest() | wire.Want() | wire.Piece():
                self._check_passed_on(message)
            case wire.Reject() if message.reason.startswith("your message was not understood"):
                peer = self.rounds.peers.get(session)
                if peer is None or peer.host != LIAR:
                    raise Broken(f"{peer.name if peer else 'somebody'}: {message.reason}")
        return self.send_kept(route, [message, *(buffers or (None,))])

    def send_kept(self, route: bytes, frames: Frames) -> bool:
        message, payload = frames
        return self.net.send(route, (self._encoded(message), payload))

    def publish(self, message: wire.Message) -> None:
        if isinstance(message, wire.End):
            self.ended_at = self.world.now
            self._check_kept(message)
        elif isinstance(message, wire.Pulse):
            since = self.world.now if self.ending_since is None else self.ending_since
            self.ending_since = since if message.ending else None
        self._check_map(message)
        self._hand_out((self._encoded(message), None))

    def publish_update(self, averages: list[Finished], close: Frames | None) -> None:
        closing = [] if close is None else [close]
        if close is not None:
            self._check_map(close[0])
        sharing = self.data.sharing
        if averages and sharing:
            self._hand_out_as_one([*(self.data.as_shared(a) for a, _ in averages), *closing])
        if averages and self._spared:
            headers: list[Frames] = [
                [wire.Sealed(**msgspec.structs.asdict(a)), None] for a, _ in averages
            ]
            self._hand_out_as_one([*headers, *closing])
        if not averages or not sharing or len(self.control.routes) > sharing:
            self._hand_out_as_one([*(frames for _, frames in averages), *closing])

    def _hand_out_as_one(self, messages: list[Frames]) -> None:
        carried = [(self._encoded(message), payload) for message, payload in messages]
        if carried:
            self._hand_out(carried[0] if len(carried) == 1 else (Together(carried), None))

    def spare(self, session: str, on: bool) -> None:
        (self._spared.add if on else self._spared.discard)(session)

    def waiting(self, route: bytes) -> int:
        return 0

    def costs(self, session: str) -> dict[str, float] | None:
        return {}

    def judged(self, bucket: int, gradient: Gradient) -> tuple[str | None, float | None]:
        """What is wrong with a gradient, and its norm, where norms are judged."""
        norm = gradient[2]
        if math.isnan(norm):
            return f"not all of its numbers are finite (bucket {bucket})", None
        return None, None if self.rules.max_norm_ratio is None else norm

    def adds(self, bucket: int, norm: float) -> None:
        """A gradient of this norm goes into a sum."""
        added = self._added.setdefault(bucket, [])
        if norm == HUGE and len(added) >= USUAL_AFTER and HUGE not in added[:USUAL_AFTER]:
            raise Broken(f"a gradient out of all proportion goes into bucket {bucket}")
        added.append(norm)

    def made_elsewhere(self, divide: wire.Divide, samples: Any, shard: int) -> None:
        """A shard has made an average."""
        self.averages_elsewhere += 1
        average = wire.Average(
            nonce=self.nonce,
            round=divide.round,
            step=divide.step,
            bucket=divide.bucket,
            absent=divide.absent,
        )
        self._elsewhere[divide.bucket] = average, samples, shard

    def forget(self, route: bytes) -> None:
        self._spared.discard(self.control.links.get(route, ""))

    def _check_map(self, message: Any) -> None:
        """A round's shards are reached by all its members when it opens; who comes later under the
        number of a member is none of them."""
        opened = message if isinstance(message, wire.Open) else getattr(message, "open", None)
        if opened is None or opened.round <= self._mapped:
            return
        self._mapped = opened.round
        for number, _ in opened.shards:
            shard, places = self.shards.get(number), self.rounds.shards
            if shard is None or shard.address != self.firewall:
                continue
            for peer in self.rounds.peers.values():
                away = places.address(peer.session) != shard.address and peer.host != LIAR
                if peer.role == "worker" and peer.id in opened.leases and away:
                    raise Broken(f"{peer.name} does not reach shard {number} of its round")

    def _hand_out(self, carried: Carried) -> None:
        for publish in self.subscribers:
            publish(carried)

    def _encoded(self, message: wire.Message) -> Any:
        return wire.from_frames(wire.to_frames(message))[0] if self.through_wire else message

    # ------------------------------------------------------------------ who looks on

    def say(self, text: str, warning: bool = False) -> None:
        self.world.say(f"        {text}")

    def problem(self, text: str) -> None:
        pass

    def reported(self, control: Control, report: wire.Report) -> None:
        pass

    def closing(self, control: Control, close: wire.Close) -> None:
        self._data_set = control.rounds.data_set
        if self.data.sums or self.data.payloads.keys() - self.data.late:
            raise Broken("something was pushed and taken, but is not in the update")
        self.contributed.update(w for w in close.contributors if w not in close.late)
        self._check_nobody_is_awaited_for_ever(close)
        made = {a.bucket: (a, samples) for a, (_, samples) in self.data.averages}
        for bucket, found in self._elsewhere.items():
            if found[0].round == close.round:
                made[bucket] = found[:2]
        self._check_held(close)
        self.book.close(close, made)
        self._die_if_due("before a close is noted")
        self.noted = close.lineage
        self._die_if_due("before a close is told")

    def closed(self, control: Control, close: wire.Close) -> None:
        self._die_if_due("after a close is told")

    def looked(self, control: Control, now: float) -> None:
        if not self.rounds.coming_back:
            self.rounds.observer_comes = self.look()

    # ------------------------------------------------------------------ what is checked

    def _check_held(self, close: wire.Close) -> None:
        """What a shard has made is somewhere else when the round is closed; a process that has said
        so may have died since."""
        for bucket, (average, _, maker) in self._elsewhere.items():
            if average.round != close.round or bucket not in close.buckets:
                continue
            shard = self.shards.get(maker)
            if shard is not None and not self.holds(shard, close, bucket):
                raise Broken(f"round {close.round} is closed, and only a shard has bucket {bucket}")

    def _note_lie(self, liar: Peer) -> None:
        """It may say of the samples that it has to compute that they cannot be read."""
        member = self.rounds.round and self.rounds.round.member_of(liar)
        if member is not None:
            self.unread_by_liar.update(samples_of(member.lease))
        if liar.carried is not None:
            self.unread_by_liar.update(samples_of(liar.carried.lease))

    def _check_kept(self, end: wire.End) -> None:
        """While an observer lives, and somebody holds the last step, the end waits until it is on
        disk."""
        r = self.rounds
        held = any(p.state == REPLICA for p in r.peers.values())
        comes = r.observer_comes or r.observer is not None
        waited_s = self.world.now - r._ending.moved_at
        if r.log_begun and held and comes and waited_s <= self.rules.idle_timeout:
            if end.lineage not in self.disk:
                raise Broken(f"the run ends, but step {end.step} is on no disk")
            self.kept += 1

    def _has_origin(self, admit: wire.Admit, model: int) -> None:
        if not self.book.closes and not self.book.was_closed(admit.lineage):
            self.book.begin(admit.lineage, model)
        elif gone := self.book.go_on(admit.step, admit.lineage, model):
            self.world.say(f"{len(gone)} closed steps are lost")
            self.lost(gone)

    def _check_rounds_go_on(self) -> None:
        """Between two snapshots, where they can: after one that was in vain it is not clear."""
        r = self.rounds
        could = r.ending is None and r._enough(r._waits.takers(self.world.now), self.world.now)
        if could and r._rounds == self._gave_at and not r._waits.overdue_rounds:
            raise Broken("two snapshots in a row, and a round could go on")
        self._gave_at = r._rounds

    def _note_giver(self) -> None:
        """A snapshot begins."""
        r = self.rounds
        if r.snapshot is not None:
            joiner, giver = r.peers[r.snapshot.joiner], r.peers[r.snapshot.giver]
            able = [p for p in r.peers.values() if p.state == REPLICA and self.lives(p.nonce)]
            only = all(p.host == LIAR for p in able)
            self.gave.setdefault(joiner.nonce, []).append(Gave(giver, only, joiner.missed))

    def _check_nobody_is_awaited_for_ever(self, close: wire.Close) -> None:
        """Who brings nothing to rounds that wait for it is left out, where others are enough; those
        two that nobody counts come with a greeting in between."""
        rules, timeout = self.rules, self.rules.timeout or math.inf
        most_s = max(3 * rules.heartbeat_timeout, EMPTY_ROUNDS * timeout) + 2 * timeout
        enough = len(close.contributors) >= max(1, self.rules.min_workers)
        for id in set(self._awaited) | set(close.late):
            why = close.late.get(id, "")
            empty = why.startswith("late") and id not in close.contributors
            if self.rules.timeout is not None and enough and empty:
                self._awaited[id] = self._awaited.get(id, 0) + 1
                if self._awaited[id] * timeout > most_s:
                    raise Broken(f"{self._awaited[id]} rounds in a row waited for worker {id}")
            else:
                self._awaited.pop(id, None)

    def _check_passed_on(self, message: Any) -> None:
        """Each part of a snapshot goes on once."""
        key = (message.snapshot, type(message).__name__, getattr(message, "piece", None))
        if key in self._passed_on:
            raise Broken(f"{brief(message)} is passed on twice")
        self._passed_on = {k for k in self._passed_on if k[0] == message.snapshot} | {key}
        if isinstance(message, wire.Manifest):
            self._told_pieces = message.snapshot, pieces_of(message)

    def _all_passed_on(self, snapshot: int) -> bool:
        passed = sum(n == snapshot and kind == "Piece" for n, kind, _ in self._passed_on)
        return self._told_pieces == (snapshot, passed)

    def _check_found_wrong(self) -> None:
        """Whose weights are right is not told that they are wrong, whatever a liar says."""
        for peer in self.rounds.peers.values():
            if peer.found_wrong and peer.host != LIAR:
                raise Broken(f"{peer.name} was found wrong, and is right")

    def _check_bounds(self) -> None:
        """What is kept is bounded by members, buckets and history."""
        r = self.rounds
        members = len(r.round.members) if r.round else 0
        carried = sum(p.carried is not None for p in r.peers.values())
        kept = (
            ("updates", len(self.data.history), self.limit),
            ("lineages", len(r.log.lineages), self.limit + 1),
            ("payloads", len(self.data.payloads), (members + carried) * self.buckets),
            ("sums", len(self.data.sums), self.buckets),
            ("peers", len(r.peers), self.rules.max_workers + 1),
            ("digests of goodbyes", len(r.digests), self.rules.max_workers + 1),
            ("disbelieved", len(r._snapshots.disbelieved), self.rules.max_workers),
            ("wasted snapshots", len(r._snapshots.waste.by), self.rules.max_workers),
            (
                "failed givers",
                max((len(p.failed_by) for p in r.peers.values()), default=0),
                self.rules.max_workers + 1,
            ),
            ("tallies", len(r.tallies), self.rules.max_workers),
            ("sentences", len(r._out.sentences._told), self.rules.max_workers),
            ("deaf", len(r.deaf | r.prompted), len(r.peers)),
            ("pieces", 0 if r.snapshot is None else len(r.snapshot._wanted), PIECES_MOST),
            ("links", len(self.control.links), len(r.peers)),
            ("routes", len(self.control.routes), len(r.peers)),
            ("doors", len(self.control.doors), len(r.peers)),
        )
        for what, count, most in kept:
            if count > most:
                raise Broken(f"{count} {what} are kept, at most {most} may be")
        if r.ledger is not None:
            leases = len(r.ledger._leased) + self._count_apart(r.ledger._waiting)
            halves = len(r.ledger._suspects)
            rests = self.rules.local_steps != 1  # of the lease of a loop that stops sooner
            most = (LEASES_HELD + rests) * self.rules.max_workers + halves
            if leases > (8 * most if self.compares else most):  # a liar asks for small ones
                raise Broken(f"the ledger keeps {leases} ranges")

    def _count_apart(self, waiting: list[wire.Lease]) -> int:
        """Ranges that wait to be leased again. Neighbours are leased together where leases differ
        in size."""
        if self.rules.shares == "equal" and self.rules.local_steps == 1:
            return len(waiting)
        ends = {(epoch, stop) for epoch, _, stop in waiting}
        return sum((epoch, start) not in ends for epoch, start, _ in waiting)


def pieces_of(manifest: wire.Manifest) -> int:
    snapshot = Snapshot(0, "", "", 0.0)
    snapshot.tells(manifest)
    return snapshot.pieces or 0


def brief(message: Any) -> str:
    """A message on one line, without what is long or the same every time."""
    hidden = {"nonce", "ledger", "layout", "seconds", "device", "settings", "protocol", "host"}
    fields = {f: getattr(message, f) for f in message.__struct_fields__ if f not in hidden}
    told = ", ".join(f"{k}={v!r}" for k, v in fields.items() if v not in (None, "", ()))
    return f"{type(message).__name__}({told})"
