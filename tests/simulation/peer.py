"""`Follow` with what `client.py`, `cluster.py` and `observe.py` put around it.

Kept as close to those files as it can be, so that a schedule that fails here names a line there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from paramserver.protocol import messages as wire
from workers.link import follow
from workers.link.follow import Follow

from .book import Broken, Sample, after_update, samples_of
from .network import Carried, Network, Together, World
from .process import AT_BOTH, AT_DOOR, AT_LINK, DEAF, Leaves, Process, Waiting
from .server import LIE, Server, brief, pieces_of

BEATS_PER_TIMEOUT = 5
SILENT_TIMEOUTS = 3
HELLO_EVERY_S = 1.0
PROBE_EVERY_S = 0.25
WANTS_IN_FLIGHT = 2
MISSED_MAX = 5
PIECES = 3
SPEEDS = (1.0, 1.0, 2.0, 30.0)
"""Seconds for a sample, of each machine in turn: where shares follow speed."""
LONGEST_S = 2.0  # for a bucket, by a slow machine
DEADLINE_S = 90.0
"""For greeting, and for a silent server: longer than any fault."""


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
        self.forget_averages()

    def state(self) -> State:
        return self.model, self.ledger

    def load(self, state: State, step: int, lineage: str) -> None:
        self.model, self.ledger = state
        self.step, self.lineage = step, lineage
        self.forget_averages()

    def forget_averages(self) -> None:
        self._present = [0] * self._buckets


class Taking:
    """A snapshot that is coming in."""

    def __init__(self, manifest: wire.Manifest, now: float) -> None:
        self.manifest, self.heard_at = manifest, now
        self.pieces: dict[int, State] = {}
        self.wanted: set[int] = set()
        self.next = 0


class Client(Process):
    """A replica's connection to its server; see `workers.link.client`."""

    role = "worker"

    def __init__(
        self,
        world: World,
        net: Network,
        server: Server,
        make_follow: Callable[..., Follow],
        id: int,
        serial: int,
        habits: Habits,
    ) -> None:
        self.server, self.id, self.serial, self.habits = server, id, serial, habits
        self.name = f"worker {id}" if self.role == "worker" else "the observer"
        super().__init__(world, net, server.receive)
        self.sub_room = 2 * server.buckets + 4
        self.replica = Replica(serial, server.buckets)
        self.follow: Follow | None = None
        self.greetings = 0
        self.key = server.nonce if self.role == "observer" else ""
        self._boot = server.boots
        self.process, self._secret = f"process-{serial}", f"secret-{serial}"
        self.goes_adrift = False
        self.adrift = False
        self._make_follow = make_follow
        self._quiet_s = server.rules.heartbeat_timeout / 2
        self.session = ""
        self.run: str | None = None  # to which its state belongs
        self._nonce = ""  # of the server that welcomed it
        self._welcomed_by = ""  # the run
        self._held: deque[Carried] = deque()
        self._joined = False
        self._taking: Taking | None = None
        self._giving: int | None = None
        self._give_later: wire.Give | None = None
        self._over, self._why_missed = 0, ""
        self._ready: wire.Ready | None = None
        self._must_greet = False
        self.left_behind = False
        self._stood = self._kept_step = -1
        self.at_last_step = False

    @property
    def abandoned(self) -> bool:
        """Has the pipe from its server ended? Only the observer has one."""
        gone = not self.server.alive or self.server.boots != self._boot
        return self.role == "observer" and gone

    def heard_at_door(self, message: Any) -> None:
        if isinstance(message, wire.Greet) and not message.session_known:
            self._must_greet = True

    # ------------------------------------------------------------------ coming

    def connect(self) -> Waiting:
        """Say hello until welcomed, then probe until link and SUB work."""
        deadline = self.world.now + DEADLINE_S
        while True:
            self.close_lines()
            self.open_line("door")
            welcome = yield from self._hello(deadline)
            self.session, self._nonce = welcome.session, welcome.nonce
            self._welcomed_by = welcome.run
            self.open_line("link")
            self.open_line("sub")
            beat = wire.Beat(
                session=self.session, run=welcome.run, nonce=self.process, secret=self._secret
            )
            self.beat(beat, 2 * self._quiet_s / BEATS_PER_TIMEOUT)
            if (yield from self._probe()):
                self.greetings += 1
                return

    def _hello(self, deadline: float) -> Waiting:
        """Again and again: a hello may be lost with its connection."""
        hello = wire.Hello(
            protocol=wire.PROTOCOL,
            role=self.role,
            id=self.id,
            nonce=self.process,
            host="host",
            pid=self.serial,
            run=self.run,
            key=self.key,
            secret=self._secret,
        )
        while self.world.now < deadline:
            if self.abandoned:
                raise Leaves("the server is gone")
            self.lines["door"].send((hello, None))
            until = self.world.now + HELLO_EVERY_S
            while self.world.now < until:
                if not self.inbox["door"]:
                    yield until, AT_DOOR
                    continue
                message, _ = self.inbox["door"].popleft()
                if isinstance(message, wire.Welcome):
                    return message
                if isinstance(message, wire.Reject):
                    raise Leaves(f"rejected: {message.reason}")
                if isinstance(message, wire.Later):
                    deadline = self.world.now + DEADLINE_S
        raise Leaves("no server answered")

    def _probe(self) -> Waiting:
        """Do both ways work? No: in time they did not, or the session was forgotten meanwhile."""
        deadline = self.world.now + 2 * self._quiet_s
        seen: set[str] = set()
        while self.world.now < deadline:
            self._send(wire.Probe(session=self.session, secret=self._secret))
            until = self.world.now + PROBE_EVERY_S
            while self.world.now < until and seen != AT_BOTH:
                kind = "sub" if self.inbox["sub"] else "link"
                if not self.inbox[kind]:
                    yield until, AT_BOTH
                    continue
                match self.inbox[kind].popleft()[0]:
                    case wire.Probe(session=session) if session == self.session:
                        seen.add("sub")
                    case wire.Pulse() if kind == "link":
                        seen.add("link")
                    case wire.Greet(session_known=False):
                        return False
                    case wire.Reject() as message:
                        raise Leaves(f"rejected: {message.reason}")
                    case wire.End():
                        raise Leaves("the run has ended")
            if seen == AT_BOTH:
                return True
        return False

    def join(self) -> Waiting:
        self._new_follow()
        self._send_join()
        yield from self._wait_for_admission()
        if self.abandoned and not self._joined:
            raise Leaves("the server is gone")
        if self.ended is not None and not self._joined:
            raise Leaves("the run ended before it could join")

    def _wait_for_admission(self) -> Waiting:
        yield from self.wait(
            lambda: self._joined or self.ended or self._must_greet or self.abandoned
        )

    def _new_follow(self) -> None:
        r = self.replica
        self.follow = self._make_follow(self._nonce, r, self.world.now)

    def _send_join(self) -> None:
        self._joined = self.adrift = self.at_last_step = False
        self._stood = -1  # the server may not have heard it
        r = self.replica
        join = wire.Join(
            layout=self.server.layout,
            step=r.step,
            lineage=r.lineage,
            device="cpu",
            ledger=r.ledger,
        )
        self._send(join, r.model)

    def _join_again(self) -> None:
        """What was on its way may be lost: let the server tell anew where to begin."""
        assert self.follow is not None
        self._taking = self._giving = self._give_later = None
        self._held.clear()
        self.follow.fetching_since = None
        self._send_join()

    def ready(self) -> None:
        self._ready = wire.Ready(samples=self.habits.samples, batch_size=self.habits.batch_size)
        self._send(self._ready)

    def unready(self) -> None:
        self._ready = None
        self._send(wire.Unready())

    @property
    def ended(self) -> wire.End | None:
        """The run's end, once every update before it is applied (or cannot be had any more)."""
        end = self.follow.end if self.follow else None
        if end is None:
            return None
        return end if self.replica.step >= end.step or self.left_behind else None

    def catch_up(self) -> None:
        if self.adrift:
            self._send_join()

    # ------------------------------------------------------------------ the loop

    def poll(self) -> None:
        while self._may_read_sub():
            if not self._held and not self._read_sub():
                return
            if not isinstance(self._held[0][0], wire.Average):
                return
            self._next_published()

    def wait(self, done: Callable[[], Any], timeout_s: float = math.inf) -> Waiting:
        until = self.world.now + timeout_s
        while not done():
            if self._must_greet and not self.abandoned:
                if self.follow is not None and self.follow.end is not None:
                    self._must_greet, self.left_behind = False, True
                    continue
                yield from self._greet_again()
            if self._handle_one():
                continue
            if self.world.now >= until:
                return
            ears = AT_BOTH if self._may_read_sub() else AT_LINK
            yield min(until, self.world.now + self._quiet_s / 4), ears
            self._tick()

    def _tick(self) -> None:
        f, now = self.follow, self.world.now
        assert f is not None
        effect = f.tick(now, self._quiet_s)
        if isinstance(effect, follow.Silent):
            if effect.seconds > DEADLINE_S:
                raise Leaves(f"the server has been silent for {effect.seconds:.0f} s")
            if effect.seconds > SILENT_TIMEOUTS * 2 * self._quiet_s:
                self._must_greet = True
            else:
                self._send(wire.Probe(session=self.session, secret=self._secret))
        elif isinstance(effect, follow.Gap):
            self._fetch()
        if self._taking is not None and now - self._taking.heard_at > 4 * self._quiet_s:
            self._taking = None
            self._send_join()

    def _handle_one(self) -> bool:
        if self._may_read_sub() and (self._held or self._read_sub()):
            self._next_published()
            return True
        if not self.inbox["link"]:
            return False
        self._from_link(*self.inbox["link"].popleft())
        return True

    def _may_read_sub(self) -> bool:
        f = self.follow
        return f is not None and (self._joined or self.adrift) and f.fetching_since is None

    def _read_sub(self) -> bool:
        if not self.inbox["sub"]:
            return False
        carried = self.inbox["sub"].popleft()
        together = isinstance(carried[0], Together)
        self._held.extend(carried[0].messages if together else [carried])
        return True

    def _next_published(self) -> None:
        carried = self._held.popleft()
        if not self._published(*carried):
            self._held.appendleft(carried)
            self._fetch()
        if len(self._held) > self.server.buckets + 1:
            raise Broken(f"{self.name} holds {len(self._held)} messages back")

    # ------------------------------------------------------------------ messages

    def _published(self, message: Any, payload: Any) -> bool:
        f, now = self.follow, self.world.now
        assert f is not None
        if self.world.talks and not isinstance(message, wire.Pulse | wire.Probe):
            self.world.say(f"    {self.name} reads: {brief(message)}")
        if self.adrift:
            self._heard_adrift(message, now)
            return True
        effect: follow.Effect = follow.NOTHING
        match message:
            case wire.Average():
                effect = f.average(message)
            case wire.Close():
                effect = f.close(message)
            case wire.Open():
                effect = f.opened(message)
            case wire.Pulse():
                effect = f.pulse(message, now)
                self._stand(message)
            case wire.End():
                effect = f.ended(message)
        match effect:
            case follow.Take():
                if effect.first:
                    self.replica.forget_averages()
                self.replica.take(effect.average, payload)
            case follow.Apply():
                if effect.first:
                    self.replica.forget_averages()
                self.replica.apply(effect.close)
                self._compare()
                f.applied(effect.close)
                if self.server.compares and self.replica.step % 2 == 0:
                    digest = str(self.replica.model)
                    self._send(wire.Digest(step=self.replica.step, digest=digest))
                if self._give_later is not None:
                    self._give(self._give_later)
            case follow.Diverged():
                self.world.say(f"    {self.name}: {effect.why}")
                self._join_again()
        return not isinstance(effect, follow.Gap)

    def _heard_adrift(self, message: Any, now: float) -> None:
        f = self.follow
        assert f is not None
        if isinstance(message, wire.Close):
            self.missed(message)
        elif isinstance(message, wire.Pulse):
            f.pulse(message, now)
        elif isinstance(message, wire.End):
            f.ended(message)
        if f.ending or f.end is not None:
            self.catch_up()

    def missed(self, close: wire.Close) -> None:
        """A step that this replica does not follow."""

    def _stand(self, pulse: wire.Pulse) -> None:
        f = self.follow
        assert f is not None
        if self.role != "observer" or (pulse.nonce, pulse.step) != (f.nonce, f.step):
            return
        self.at_last_step = pulse.ending and self._joined
        if self._stood != pulse.step:
            self._stood = pulse.step
            self._send(wire.Stand(step=pulse.step, kept=self._kept_step == pulse.step))

    def kept(self) -> None:
        self._kept_step = self.replica.step
        self._send(wire.Stand(step=self._kept_step, kept=True))

    def _fetch(self) -> None:
        assert self.follow is not None
        if self._joined:
            self._send(self.follow.fetch(self.world.now))

    def _from_link(self, message: Any, payload: Any) -> None:
        f, now = self.follow, self.world.now
        assert f is not None
        f.heard(now)
        if self.world.talks and not isinstance(message, wire.Pulse):
            self.world.say(f"    server -> {self.name}: {brief(message)}")
        match message:
            case wire.Average() | wire.Close():
                if self._joined:
                    if f.fetching_since is not None:
                        f.fetching_since = now
                    self._published(message, payload)
            case wire.Fetched():
                if isinstance(f.fetched(message.step, message.open), follow.Gap):
                    self._fetch()
            case wire.Pulse() if self.adrift:
                self._heard_adrift(message, now)
            case wire.Pulse():
                self._stand(message)
                if isinstance(f.pulse(message, now), follow.Gap) and f.fetching_since is None:
                    self._fetch()
            case wire.Admit():
                self._on_admit(message)
            case wire.Reject():
                raise Leaves(f"rejected: {message.reason}")
            case wire.Greet():
                self._on_greet(message)
            case wire.Give():
                self._give(message)
            case wire.Want():
                if self._giving == message.snapshot:
                    piece = wire.Piece(snapshot=message.snapshot, piece=message.piece)
                    self._send(piece, self.replica.state())
                else:
                    self._send(wire.Abort(message.snapshot, "I do not give this snapshot"))
            case wire.Manifest():
                self._taking = Taking(message, now)
                self._want_more()
            case wire.Piece():
                self._take_piece(message, payload)
            case wire.Abort():
                self._on_abort(message)
            case wire.End():
                f.ended(message)
                if not self._joined:
                    self.left_behind = True
                elif f.step < message.step and f.fetching_since is None:
                    self._fetch()

    def _on_greet(self, message: wire.Greet) -> None:
        if not message.session_known:
            self._must_greet = True
        elif message.join:
            if not self.adrift:
                self._join_again()
        else:
            self._send(wire.Probe(session=self.session, secret=self._secret))

    def _on_admit(self, message: wire.Admit) -> None:
        f = self.follow
        assert f is not None
        f.fetching_since = None
        if message.action in ("adopt", "behind"):
            self._joined = False
            self._held.clear()
            if message.action == "adopt":
                if message.missed >= MISSED_MAX:
                    raise Leaves(f"the run's state is not to be had: {self._why_missed}")
                return
            if f.end is not None:
                self.left_behind = True
            elif self.goes_adrift and not f.ending:
                self.adrift = True
            else:
                self._send_join()
            return
        self._joined_now()
        if message.action == "follow" and message.step > f.step:
            self._fetch()

    def _joined_now(self) -> None:
        self._joined = True
        self.run = self._welcomed_by
        if self._ready is not None:
            self._send(self._ready)

    def _greet_again(self) -> Waiting:
        self._must_greet = False
        self.world.say(f"{self.name} greets again")
        self._held.clear()
        self._giving = self._give_later = self._taking = None
        self._over = 0
        yield from self.connect()
        self._new_follow()
        self._send_join()
        yield from self._wait_for_admission()

    # ------------------------------------------------------------------ snapshots

    def _give(self, message: wire.Give) -> None:
        f, r = self.follow, self.replica
        assert f is not None
        self._giving = self._give_later = None
        if f.step == message.step and f.lineage == message.lineage:
            self._giving = message.snapshot
            self._send(
                wire.Manifest(
                    snapshot=message.snapshot,
                    step=r.step,
                    lineage=r.lineage,
                    tree="",
                    tensors=(("uint8", (PIECES,)),),
                    piece_bytes=1,
                )
            )
        elif f.step < message.step:
            self._give_later = message
            if f.fetching_since is None:
                self._fetch()
        else:
            self._send(wire.Abort(message.snapshot, f"I stand at step {f.step}"))

    def _want_more(self) -> None:
        taking = self._taking
        assert taking is not None
        pieces = pieces_of(taking.manifest)
        while len(taking.wanted) < WANTS_IN_FLIGHT and taking.next < pieces:
            taking.wanted.add(taking.next)
            self._send(wire.Want(snapshot=taking.manifest.snapshot, piece=taking.next))
            taking.next += 1
        if not taking.wanted:
            self._adopt(taking)

    def _take_piece(self, message: wire.Piece, state: State) -> None:
        taking = self._taking
        if taking is None or taking.manifest.snapshot != message.snapshot:
            return
        if state == LIE:
            self._refuse_snapshot(message.snapshot, "a piece of another length")
            return
        if message.piece in taking.wanted:
            taking.wanted.discard(message.piece)
            taking.pieces[message.piece] = state
        taking.heard_at = self.world.now
        self._want_more()

    def _adopt(self, taking: Taking) -> None:
        f, m = self.follow, taking.manifest
        assert f is not None
        self._taking = None
        states = list(taking.pieces.values())
        if not states:  # a tree without what belongs there
            self._refuse_snapshot(m.snapshot, "it is not my model")
            return
        if any(state != states[0] for state in states):
            raise Broken(f"{self.name} took a snapshot of several models")
        self.replica.load(states[0], m.step, m.lineage)
        self._compare()
        f.adopted()
        self._send(wire.Adopted(snapshot=m.snapshot, step=m.step, lineage=m.lineage))
        self._joined_now()

    def _on_abort(self, message: wire.Abort) -> None:
        if self._giving == message.snapshot:
            self._giving = None
        elif not self._joined and message.snapshot != self._over:
            self._over, self._taking = message.snapshot, None
            self._why_missed = message.reason
            self._send_join()

    def _refuse_snapshot(self, number: int, why: str) -> None:
        self._send(wire.Abort(number, why))
        self._over, self._taking = number, None
        self._why_missed = why
        self._send_join()

    # ------------------------------------------------------------------ inside

    def _send(self, message: wire.Message, payload: Any = None) -> None:
        self.lines["link"].send((message, payload))

    def _compare(self) -> None:
        self.server.book.compare(self.name, self.replica.lineage, self.replica.model)


class Worker(Client):
    """The loop of `workers.builtin.train` over `workers.cluster`."""

    def main(self) -> Waiting:
        yield from self.connect()
        yield from self.join()
        self.ready()
        self._round, self._greetings = 0, self.greetings
        while (lease := (yield from self._next_lease())) is not None:
            places = self._unread(lease)
            if len(places) == lease[2] - lease[1]:
                self._send(wire.Unreadable(round=self._round))
                yield from self._step()
                continue
            if self.habits.deadly.intersection(samples_of(lease)):
                yield from self._die(lease)
            yield from self._backward(lease, places)
            yield from self._step()
            if self.world.chance(self.habits.leaves):
                self._send(wire.Goodbye(reason="it was stopped"))
                raise Leaves("left")
            if self.world.chance(self.habits.pauses):
                self.unready()
                yield self.world.now + self.world.random.expovariate(1.0), DEAF
                self.ready()
        self._send(wire.Goodbye(reason="finished"))

    def _unread(self, lease: wire.Lease) -> tuple[int, ...]:
        """Places in the lease of what cannot be read."""
        unreadable = self.habits.unreadable
        return tuple(i for i, s in enumerate(samples_of(lease)) if s in unreadable)

    def _die(self, lease: wire.Lease) -> Waiting:
        """Of an error in the middle of a batch; its loop is left before its program ends."""
        yield self.world.now + self.habits.compute_s * self.world.random.random(), DEAF
        if not self.habits.in_silence:
            self._send(wire.Unready(unfinished=True))
            self._send(wire.Goodbye(reason="an error", failed=wire.FORWARD, lease=lease))
        raise Leaves("left: it died of its samples")

    def _next_lease(self) -> Waiting:
        found: tuple[int, wire.Lease] | None = None

        def look() -> bool:
            nonlocal found
            assert self.follow is not None
            if self.greetings != self._greetings:
                self._greetings, self._round = self.greetings, 0
            found = self.follow.lease(self.id, self._round)
            return found is not None or self.ended is not None

        yield from self.wait(look)
        if self.ended is not None:
            return None
        assert found is not None
        self._round, lease = found
        return lease

    def _backward(self, lease: wire.Lease, unread: tuple[int, ...]) -> Waiting:
        """A gradient of the model as it is now, bucket by bucket; nothing is applied meanwhile."""
        world, habits, buckets = self.world, self.habits, self.server.buckets
        model = self.replica.model
        samples = tuple(s for i, s in enumerate(samples_of(lease)) if i not in unread)
        bad = world.random.randrange(buckets) if world.chance(habits.bad) else None
        began, by_speed = world.now, self.server.rules.shares == "speed"
        # Where shares follow speed, more samples take longer, and each machine has a speed.
        part = len(samples) / habits.batch_size * SPEEDS[self.id % len(SPEEDS)] if by_speed else 1.0
        for bucket in range(buckets):
            seconds = max(habits.compute_s, min(habits.compute_s * part, LONGEST_S))
            yield world.now + seconds * (0.5 + world.random.random()), DEAF
            push = wire.Push(
                round=self._round,
                bucket=bucket,
                samples=len(samples),
                unread=unread,
                absent=(bucket,) if world.chance(habits.absent) else (),
                loss=1.0 if bucket == buckets - 1 else None,
                compute_s=world.now - began if by_speed and bucket == buckets - 1 else None,
            )
            self._send(push, (model, samples, bucket != bad))
            self.poll()

    def _step(self) -> Waiting:
        yield from self.wait(
            lambda: (
                self.greetings != self._greetings
                or self.ended is not None
                or (self.follow is not None and self.follow.is_over(self._round))
            )
        )


class Observer(Client):
    """The loop of `workers.observer`: busy with an evaluation now and then, it may go adrift."""

    role = "observer"

    def main(self) -> Waiting:
        self.goes_adrift, self._due = self.world.random.random() < 0.7, False
        self._kept = ""
        yield from self.connect()
        yield from self.join()
        while True:
            next_s = self.world.random.expovariate(0.5)
            yield from self.wait(
                lambda: (
                    (self._due and self._joined)
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
        self._send(wire.Goodbye(reason="finished"))

    def _must_keep(self) -> bool:
        return self.at_last_step and self._kept != self.replica.lineage

    def _keep(self) -> Waiting:
        """To write takes a while, in which this process may die."""
        lineage = self.replica.lineage
        yield self.world.now + self.habits.compute_s, DEAF
        self.server.disk.add(lineage)
        self._kept = lineage
        if self.at_last_step:
            self.kept()

    def missed(self, close: wire.Close) -> None:
        if close.step % 4 == 0:
            self._due = True
            self.catch_up()
