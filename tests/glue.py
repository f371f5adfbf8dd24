"""What `server.py`, `client.py` and `cluster.py` put around the pure halves, without sockets and tensors.

Kept as close to them as it can be, so that a schedule that fails here names a line there. A model
is one number: the hash of all that was applied to it. A gradient is the samples it was made from
(and the model they were shown to), so that a sample that is lost or counted twice is seen at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import msgspec

from paramserver import rounds, wire
from paramserver.rounds import Rounds, Rules
from tests.virtual import Carried, Line, Network, World
from workers import follow
from workers.follow import Follow

PULSES_PER_TIMEOUT = 10
BEATS_PER_TIMEOUT = 5
TICK_S = 0.25
HELLO_EVERY_S = 1.0
PROBE_EVERY_S = 0.25
WANTS_IN_FLIGHT = 2
PIECES = 3
FETCH_UPDATES = 3
FAREWELL_S = 5.0

Sample = tuple[int, int]
"""(epoch, place in its shuffled order)."""

Gradient = tuple[int, tuple[Sample, ...], bool]
"""The model that made it, the samples it was made from, and whether its numbers are finite."""

Waiting = Generator[tuple[float, frozenset[str]], None, Any]
"""What a peer does, as a generator: it yields until when it sleeps, and what may wake it."""

DEAF: frozenset[str] = frozenset()


class Broken(AssertionError):
    """A promise was not kept."""


class Leaves(Exception):
    """The process ends, as the programs do with a `UserError`."""


@dataclass(frozen=True)
class Parts:
    """The halves under test; a planted fault replaces one."""

    rounds: type[Rounds] = Rounds
    follow: type[Follow] = Follow
    worker: type[Worker] | None = None
    observer: type[Observer] | None = None


def samples_of(lease: wire.Lease) -> tuple[Sample, ...]:
    epoch, start, stop = lease
    return tuple((epoch, i) for i in range(start, stop))


def after_update(model: int, buckets: list[tuple[bool, tuple[Sample, ...]]]) -> int:
    """The model after an update: for each bucket whether it had a gradient, and of what samples."""
    return hash((model, tuple(buckets)))


# --------------------------------------------------------------------------- the server


class Update(msgspec.Struct):
    step: int
    messages: list[Carried]


class Server:
    """Carries out what `Rounds` decides, as `paramserver.server` does, and keeps the book.

    The book (`models`, `counted`) is what no real server has: what every step's model must be, and
    which samples went into each bucket.
    """

    def __init__(
        self,
        world: World,
        net: Network,
        rules: Rules,
        parts: Parts,
        *,
        buckets: int,
        history: int,
        through_wire: bool,
    ) -> None:
        self.world, self.net, self.rules = world, net, rules
        self.nonce = "server-1"
        self.buckets = buckets
        self.rounds = parts.rounds(rules, self.nonce, world.now, lambda layout: buckets)
        self.through_wire = through_wire
        self.listeners: list[Peer] = []
        self.stalled = False
        self.closes: list[wire.Close] = []
        self.models: dict[int, int] = {}
        self.counted: list[set[Sample]] = [set() for _ in range(buckets)]
        self.skipped_leases: list[wire.Lease] = []
        self.ended_at: float | None = None
        self._limit = history
        self._history: deque[Update] = deque()
        self._averages: list[Carried] = []
        self._sums: dict[int, list[Sample]] = {}
        self._payloads: dict[tuple[int, int], Gradient] = {}
        self._links: dict[int, str] = {}
        self._routes: dict[str, int] = {}
        self._doors: dict[str, int] = {}
        self._backlog: deque[tuple[int, Carried]] = deque()
        self._sessions = 0
        world.after(TICK_S, self._tick)
        world.after(0.0, self._pulse)

    # ------------------------------------------------------------------ what comes in

    def receive(self, route: int, carried: Carried) -> None:
        if self.stalled:
            self._backlog.append((route, carried))
            return
        message, payload = carried
        if self.world.talks:
            self.world.say(f"    {self._who(route)} -> server: {brief(message)}")
        self._handle(route, message, payload, self.world.now)
        self.check_bounds()

    def go_on(self) -> None:
        """After a stop, sockets are read before time is looked at."""
        self.stalled = False
        while self._backlog:
            self.receive(*self._backlog.popleft())

    def _who(self, route: int) -> str:
        session = self._links.get(route)
        peer = self.rounds.peers.get(session) if session else None
        return peer.name if peer else f"route {route}"

    def _handle(self, route: int, message: Any, payload: Any, now: float) -> None:
        r = self.rounds
        match message:
            case wire.Hello():
                self._greet(route, message, now)
                return
            case wire.Beat():
                r.seen(message.session, now)
                return
            case wire.Probe():
                self._probe(route, message, now)
                return
        session = self._links.get(route)
        if session is None:
            self._send_raw(route, wire.Greet())
            return
        r.seen(session, now)
        match message:
            case wire.Push():
                self._push(session, message, payload, now)
            case wire.Fetch():
                self._fetch(session, message, now)
            case wire.Join():
                self._joining(session, message, payload)
                self._carry_out(r.join(session, message, now))
            case wire.Ready():
                self._carry_out(r.ready(session, message, now))
            case wire.Manifest() | wire.Want() | wire.Piece() | wire.Abort():
                goal, effects = r.route(session, message, now)
                if goal is not None:
                    self._send(goal, message, payload)
                self._carry_out(effects)
            case wire.Adopted():
                self._carry_out(r.adopted(session, message.snapshot, now))
            case wire.Goodbye():
                self._carry_out(r.leave(session, message.reason, now))
            case _:
                raise Broken(f"{type(message).__name__} came to the server")

    def _joining(self, session: str, join: wire.Join, model: int) -> None:
        """The book: remember what each candidate for the first state would bring."""
        self._candidates = {**getattr(self, "_candidates", {}), session: model}

    def _greet(self, route: int, hello: wire.Hello, now: float) -> None:
        if self.rounds.ended is not None:
            self._send_raw(route, wire.Reject(f"the run has ended: {self.rounds.ended.reason}"))
            return
        known = next((s for s, d in self._doors.items() if d == route), None)
        if known is None:
            self._sessions += 1
        session = known or f"session-{self._sessions}"
        if session not in self.rounds.peers:
            peer, why, effects = self.rounds.greet(
                session,
                now,
                role=hello.role,
                id=hello.id,
                nonce=hello.nonce,
                host=hello.host,
                pid=hello.pid,
                reachable=self._reachable,
            )
            self._carry_out(effects)
            if peer is None:
                self._send_raw(route, wire.Reject(why))
                return
            self._doors[session] = route
        self._send_raw(
            route,
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run="run-1",
                nonce=self.nonce,
                session=session,
                id=self.rounds.peers[session].id,
                settings={},
                pub_port=0,
            ),
        )

    def _probe(self, route: int, probe: wire.Probe, now: float) -> None:
        if probe.session not in self.rounds.peers:
            self._send_raw(route, wire.Greet(session_known=False))
            return
        old = self._routes.get(probe.session)
        self._links[route] = probe.session
        self._routes[probe.session] = route
        if old is not None and old != route:
            self._links.pop(old, None)
            self._carry_out(self.rounds.relinked(probe.session, now))
        self.rounds.seen(probe.session, now)
        self._publish(probe)
        self._send(probe.session, self.rounds.pulse(now))
        if self.rounds.ended is not None:
            self._send(probe.session, self.rounds.ended)

    def _reachable(self, session: str) -> bool:
        route = self._routes.get(session) or self._doors.get(session)
        return route is not None and self._send_raw(route, self.rounds.pulse(self.world.now))

    def _push(self, session: str, push: wire.Push, gradient: Gradient, now: float) -> None:
        why = self.rounds.refusal(session, push)
        if why is not None:
            self._send(session, wire.Refused(round=push.round, reason=why))
            return
        bad = None if gradient[2] else f"not all of its numbers are finite (bucket {push.bucket})"
        if bad is None:
            self._payloads[self.rounds.peers[session].id, push.bucket] = gradient
        self._carry_out(self.rounds.pushed(session, push, now, bad))

    def _fetch(self, session: str, fetch: wire.Fetch, now: float) -> None:
        if not self.rounds.knows(fetch.step, fetch.lineage):
            self._carry_out(self.rounds.behind(session, now))
            return
        after = [u for u in self._history if u.step > fetch.step]
        for update in after[:FETCH_UPDATES]:
            for carried in update.messages:
                self._send(session, *carried)
        self._send(session, wire.Fetched(self.rounds.step, open=self.rounds.open_message()))

    # ------------------------------------------------------------------ time

    def _tick(self) -> None:
        self.world.after(TICK_S, self._tick)
        if not self.stalled:
            self._carry_out(self.rounds.tick(self.world.now))
            due = self.rounds.next_deadline()
            if due is not None and due < self.world.now + TICK_S:
                self.world.at(due, self._due)
            self.check_bounds()

    def _due(self) -> None:
        if not self.stalled:
            self._carry_out(self.rounds.tick(self.world.now))

    def _pulse(self) -> None:
        self.world.after(self.rules.heartbeat_timeout / PULSES_PER_TIMEOUT, self._pulse)
        if not self.stalled:
            pulse = self.rounds.pulse(self.world.now)
            self._publish(pulse)
            for session in list(self._routes):
                self._send(session, pulse)

    def finished(self) -> bool:
        """Has everybody who is alive said goodbye?"""
        patience = max(FAREWELL_S, self.rules.heartbeat_timeout)
        return self.ended_at is not None and all(
            self.world.now - p.last_seen > patience for p in self.rounds.peers.values()
        )

    # ------------------------------------------------------------------ what goes out

    def _carry_out(self, effects: list[rounds.Effect]) -> None:
        for effect in effects:
            match effect:
                case rounds.Add():
                    self._add(effect)
                case rounds.Finish():
                    self._finish(effect)
                case rounds.Closed():
                    self._close_round(effect.close)
                case rounds.Publish():
                    self._publish(effect.message)
                case rounds.Send():
                    if isinstance(effect.message, wire.Admit) and effect.message.action == "origin":
                        self.models[effect.message.step] = self._candidates[effect.session]
                    self._send(effect.session, effect.message)
                case rounds.Say():
                    self.world.say(f"        {effect.text}")
                case rounds.Void():
                    self._forget_round()
                case rounds.Remove():
                    self._doors.pop(effect.session, None)
                    route = self._routes.pop(effect.session, None)
                    if route is not None:
                        self._links.pop(route, None)
                case rounds.Ended():
                    self.ended_at = self.world.now
                    self.world.say(f"END at step {effect.end.step}: {effect.end.reason}")
                    self._publish(effect.end)
                    for session in list(self.rounds.peers):
                        self._send(session, effect.end)

    def _add(self, effect: rounds.Add) -> None:
        model, samples, _ = self._payloads.pop((effect.worker, effect.bucket))
        if len(samples) != effect.samples:
            raise Broken(f"{len(samples)} samples of worker {effect.worker} weigh {effect.samples}")
        if model != self.models[len(self.closes)]:
            raise Broken(f"a gradient of another step goes into step {len(self.closes) + 1}")
        self._sums.setdefault(effect.bucket, []).extend(samples)

    def _finish(self, effect: rounds.Finish) -> None:
        samples = self._sums.pop(effect.bucket)
        if len(samples) != effect.samples:
            raise Broken(f"a sum of {len(samples)} samples is divided by {effect.samples}")
        average = wire.Average(
            nonce=self.nonce,
            round=effect.round,
            step=effect.step,
            bucket=effect.bucket,
            absent=effect.absent,
        )
        carried = (average, tuple(sorted(samples)))
        self._averages.append(carried)
        self._publish(*carried)

    def _close_round(self, close: wire.Close) -> None:
        self._publish(close)
        self._book(close)
        self._history.append(Update(close.step, [*self._averages, (close, None)]))
        while len(self._history) > self._limit:
            self._history.popleft()
        self.rounds.forget_before(self._history[0].step - 1)
        self._forget_round()

    def _forget_round(self) -> None:
        self._averages = []
        self._payloads.clear()
        self._sums.clear()

    def _publish(self, message: wire.Message, payload: Any = None) -> None:
        carried = self._encoded(message), payload
        for peer in self.listeners:
            peer.publish(carried)

    def _send(self, session: str, message: wire.Message, payload: Any = None) -> None:
        route = self._routes.get(session) or self._doors.get(session)
        if route is not None:
            self._send_raw(route, message, payload)

    def _send_raw(self, route: int, message: wire.Message, payload: Any = None) -> bool:
        return self.net.send(route, (self._encoded(message), payload))

    def _encoded(self, message: wire.Message) -> Any:
        return wire.from_frames(wire.to_frames(message))[0] if self.through_wire else message

    # ------------------------------------------------------------------ the book

    def _book(self, close: wire.Close) -> None:
        """Note what this update must do to every replica; no sample may be in it twice."""
        if close.step != len(self.closes) + 1 or close.step - 1 not in self.models:
            raise Broken(f"step {close.step} follows step {len(self.closes)}")
        got = {a.bucket: (a, samples) for a, samples in self._averages}
        if set(got) != set(close.buckets) or len(got) != len(self._averages):
            raise Broken(f"the close names buckets {close.buckets}, averaged were {sorted(got)}")
        if self._sums or self._payloads:
            raise Broken("something was pushed and taken, but is not in the update")
        content = []
        for bucket in range(self.buckets):
            average, samples = got.get(bucket, (None, ()))
            content.append((average is not None and bucket not in average.absent, samples))
            twice = self.counted[bucket].intersection(samples)
            if twice or len(set(samples)) < len(samples):
                raise Broken(f"samples {sorted(twice) or samples} twice in bucket {bucket}")
            self.counted[bucket].update(samples)
        self.models[close.step] = after_update(self.models[close.step - 1], content)
        self.closes.append(close)
        self._check_ledger(close.ledger)

    def _check_ledger(self, state: dict[str, Any]) -> None:
        """Done + partly + skipped + what is still to do = all, and as the sums really have it."""
        everywhere = set.intersection(*self.counted)
        anywhere = set.union(*self.counted)
        if state["done"] != len(everywhere):
            raise Broken(f"{state['done']} samples done, {len(everywhere)} in every bucket")
        if state["partly"] != len(anywhere) - len(everywhere):
            raise Broken(f"{state['partly']} samples partly")
        epoch, start = state["head"]
        waiting = [s for lease in state["waiting"] for s in samples_of(tuple(lease))]
        settled = state["done"] + state["partly"] + state["skipped"]
        if settled + len(waiting) != epoch * state["samples"] + start:
            raise Broken(f"the ledger's sums do not agree: {state}")
        if len(set(waiting)) < len(waiting) or anywhere.intersection(waiting):
            raise Broken("samples that were counted wait to be leased again")

    def check_ended(self) -> None:
        """At a regular end every sample was used, or is accounted for."""
        ledger = self.rounds.ledger
        if ledger is None or self.rounds.ended is None or self.rounds.ended.error:
            return
        self._check_ledger(ledger.state())
        if ledger.counted != ledger.total:
            raise Broken(f"{ledger.counted} of {ledger.total} samples were counted")
        missing = ledger.total - len(set.union(*self.counted))
        if missing != ledger.skipped:
            raise Broken(f"{missing} samples are in no bucket, {ledger.skipped} were skipped")

    def check_bounds(self) -> None:
        """What is kept is bounded by members, buckets and history."""
        r = self.rounds
        members = len(r.round.members) if r.round else 0
        kept = {
            "updates": (len(self._history), self._limit),
            "lineages": (len(r._lineages), self._limit + 1),
            "payloads": (len(self._payloads), members * self.buckets),
            "sums": (len(self._sums), self.buckets),
            "peers": (len(r.peers), self.rules.max_workers + 1),
            "links": (len(self._links), len(r.peers)),
            "routes": (len(self._routes), len(r.peers)),
            "doors": (len(self._doors), len(r.peers)),
        }
        if r.ledger is not None:
            most = 2 * self.rules.max_workers
            kept["leases"] = len(r.ledger._leased) + len(r.ledger._waiting), most
        for what, (count, most) in kept.items():
            if count > most:
                raise Broken(f"{count} {what} are kept, at most {most} may be")


# --------------------------------------------------------------------------- peers


class Taking:
    """A snapshot that is coming in."""

    def __init__(self, manifest: wire.Manifest, now: float) -> None:
        self.manifest, self.heard_at = manifest, now
        self.pieces: dict[int, int] = {}
        self.wanted: set[int] = set()
        self.next = 0


class Peer:
    """A process with a replica: `Client` and the program around it, one generator per thread."""

    role = "worker"

    def __init__(
        self,
        world: World,
        net: Network,
        server: Server,
        parts: Parts,
        id: int,
        serial: int,
        on_exit: Callable[[Peer, str], None],
        habits: Habits,
    ) -> None:
        self.world, self.net, self.server, self.parts = world, net, server, parts
        self.id, self.serial, self.habits = id, serial, habits
        self.name = f"worker {id}" if self.role == "worker" else "the observer"
        self.alive, self.stopped = True, False
        self.on_exit = on_exit
        self.exit: str | None = None
        # the replica
        self.model = hash((7, serial))
        self.step = 0
        self.lineage = f"fresh-{serial}"
        self._flat: dict[int, tuple[Sample, ...]] = {}
        self._present: dict[int, int] = {}
        # the client
        self.follow: Follow | None = None
        self.greetings = 0
        self._lines: dict[str, Line] = {}
        self._inbox: dict[str, deque[Carried]] = {k: deque() for k in ("door", "link", "sub")}
        self._held: deque[Carried] = deque()
        self._session = ""
        self._probed: set[str] = set()
        self._joined = False
        self._joined_at = 0.0
        self._admitted: wire.Admit | None = None
        self._taking: Taking | None = None
        self._giving: int | None = None
        self._give_later: wire.Give | None = None
        self._aborted = 0  # newest snapshot that was called off
        self._ready: wire.Ready | None = None
        self._must_greet = False
        # its life
        self._life = self._run()
        self._turn = 0
        self._ears = DEAF
        server.listeners.append(self)
        world.at(world.now, self._resume, 0)

    # ------------------------------------------------------------------ a process

    def _run(self) -> Waiting:
        try:
            yield from self.main()
            self._exit("finished")
        except Leaves as e:
            self._exit(str(e))

    def main(self) -> Waiting:
        raise NotImplementedError

    def _resume(self, turn: int) -> None:
        if turn != self._turn or not self.alive or self.stopped:
            return
        self._turn += 1
        try:
            until, self._ears = next(self._life)
        except StopIteration:
            return
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
        self.stopped = True

    def go_on(self) -> None:
        if self.stopped and self.alive:
            self.stopped = False
            self._wake()

    def _exit(self, why: str) -> None:
        self.alive, self.exit = False, why
        self.world.say(f"{self.name} ends: {why}")
        self._close_lines(linger=why != "killed")
        self.server.listeners.remove(self)
        self.on_exit(self, why)

    # ------------------------------------------------------------------ sockets

    def _open(self, kind: str) -> None:
        self._inbox[kind].clear()
        self._lines[kind] = Line(self.net, kind, self.server.receive, self._arrive)

    def _close_lines(self, *, linger: bool = False) -> None:
        for line in self._lines.values():
            line.close(linger=linger)
        self._lines.clear()

    def _arrive(self, line: Line, carried: Carried) -> None:
        if self._lines.get(line.kind) is line:
            self._inbox[line.kind].append(carried)
            if line.kind in self._ears:
                self._wake()

    def publish(self, carried: Carried) -> None:
        """PUB: dropped where there is no connection, no room, or bad luck."""
        line = self._lines.get("sub")
        if line is None or line.route is None or self.world.chance(self.habits.lost):
            return
        if len(self._inbox["sub"]) < 2 * self.server.buckets + 4:
            line.carry(1, carried)

    def _send(self, message: wire.Message, payload: Any = None) -> None:
        self._lines["link"].send((message, payload))

    def lines(self) -> list[Line]:
        return list(self._lines.values())

    def _beat(self, door: Line, session: str) -> None:
        """The client's second thread."""
        if door.closed or not self.alive:
            return
        if not self.stopped:
            door.send((wire.Beat(session=session), None))
        self.world.after(
            self.server.rules.heartbeat_timeout / BEATS_PER_TIMEOUT, self._beat, door, session
        )

    # ------------------------------------------------------------------ client: coming

    def connect(self, deadline_s: float) -> Waiting:
        """Say hello until welcomed, then probe until link and SUB work."""
        world, start = self.world, self.world.now
        quiet = self.server.rules.heartbeat_timeout
        while True:
            self._close_lines()
            self._open("door")
            welcome = yield from self._hello(start + deadline_s)
            self._session = welcome.session
            self._open("link")
            self._open("sub")
            self._beat(self._lines["door"], self._session)
            self._probed.clear()
            tried, known = world.now, True
            while known and world.now - tried < quiet:
                self._send(wire.Probe(session=self._session))
                until = world.now + PROBE_EVERY_S
                while known and world.now < until and self._probed != {"sub", "link"}:
                    if self._inbox["link"] or self._inbox["sub"]:
                        known = self._read_probe()
                    else:
                        yield until, frozenset({"link", "sub"})
                if self._probed == {"sub", "link"}:
                    self.greetings += 1
                    return welcome

    def _hello(self, deadline: float) -> Waiting:
        """Again and again: a hello may be lost with its connection."""
        inbox = self._inbox["door"]
        while True:
            if self.world.now > deadline:
                raise Leaves("no server answered")
            self._lines["door"].send(
                (
                    wire.Hello(
                        protocol=wire.PROTOCOL,
                        role=self.role,
                        id=self.id,
                        nonce=f"process-{self.serial}",
                        host="host",
                        pid=self.serial,
                    ),
                    None,
                )
            )
            until = self.world.now + HELLO_EVERY_S
            while self.world.now < until:
                if inbox:
                    message, _ = inbox.popleft()
                    if isinstance(message, wire.Welcome):
                        return message
                    if isinstance(message, wire.Reject):
                        raise Leaves(f"rejected: {message.reason}")
                else:
                    yield until, frozenset({"door"})

    def _read_probe(self) -> bool:
        """False when the server has forgotten the session meanwhile."""
        for kind in ("sub", "link"):
            if self._inbox[kind]:
                message, _ = self._inbox[kind].popleft()
                match message:
                    case wire.Probe() if message.session == self._session:
                        self._probed.add("sub")
                    case wire.Pulse() if kind == "link":
                        self._probed.add("link")
                    case wire.Greet():
                        return message.session_known
                    case wire.Reject():
                        raise Leaves(f"rejected: {message.reason}")
                    case wire.End():
                        raise Leaves("the run has ended")
        return True

    def join(self) -> Waiting:
        self.follow = self.parts.follow(self.server.nonce, self.step, self.lineage, self.world.now)
        self._send_join()
        yield from self.wait(lambda: self._joined or self.ended)

    def _send_join(self) -> None:
        self._joined, self._joined_at = False, self.world.now
        self._admitted = None
        layout = wire.Layout((wire.Tensor("w", (1,), "float32"),))
        self._send(
            wire.Join(layout=layout, step=self.step, lineage=self.lineage, device="cpu"),
            self.model,
        )

    def _ready_again(self) -> None:
        if self._ready is not None:
            self._send(self._ready)

    @property
    def ended(self) -> wire.End | None:
        """The run's end, once every update before it is applied; whoever has no state needs none."""
        end = self.follow.end if self.follow else None
        if end is None or (self._joined and self.step < end.step):
            return None
        return end

    # ------------------------------------------------------------------ client: the loop

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
            if self._must_greet:
                yield from self._greet_again()
            if self._handle_one():
                continue
            if self.world.now >= until:
                return
            ears = frozenset({"link", "sub"}) if self._may_read_sub() else frozenset({"link"})
            yield min(until, self.world.now + self.server.rules.heartbeat_timeout / 8), ears
            self._tick()

    def _tick(self) -> None:
        f, now = self.follow, self.world.now
        assert f is not None
        quiet = self.server.rules.heartbeat_timeout / 2
        effect = f.tick(now, quiet)
        if isinstance(effect, follow.Silent):
            if effect.seconds > self.habits.give_up_s:
                raise Leaves(f"the server has been silent for {effect.seconds:.0f} s")
            self._send(wire.Probe(session=self._session))
        elif isinstance(effect, follow.Gap):
            self._fetch()
        if self._taking is not None and now - self._taking.heard_at > 4 * quiet:
            self._taking = None
            self._send_join()

    def _handle_one(self) -> bool:
        if self._may_read_sub() and (self._held or self._read_sub()):
            self._next_published()
            return True
        if not self._inbox["link"]:
            return False
        self._from_link(*self._inbox["link"].popleft())
        return True

    def _may_read_sub(self) -> bool:
        f = self.follow
        return f is not None and self._joined and f.fetching_since is None

    def _read_sub(self) -> bool:
        if not self._inbox["sub"]:
            return False
        self._held.append(self._inbox["sub"].popleft())
        return True

    def _next_published(self) -> None:
        carried = self._held.popleft()
        if not self._published(*carried):
            self._held.appendleft(carried)
            self._fetch()
        if len(self._held) > 1:
            raise Broken(f"{self.name} holds {len(self._held)} messages back")

    # ------------------------------------------------------------------ client: messages

    def heard_on_sub(self) -> None:
        """Nothing: SUB is a connection of its own, and says nothing about the link."""

    def _published(self, message: Any, payload: Any) -> bool:
        f, now = self.follow, self.world.now
        assert f is not None
        self.heard_on_sub()
        if self.world.talks and not isinstance(message, wire.Pulse):
            self.world.say(f"    {self.name} reads: {brief(message)}")
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
            case wire.End():
                effect = f.ended(message)
        match effect:
            case follow.Take():
                self.take(effect, payload)
            case follow.Apply():
                self.apply(effect)
                f.applied(effect.close)
                if self._give_later is not None:
                    self._give(self._give_later)
            case follow.Diverged():
                self.world.say(f"    {self.name}: {effect.why}")
                self._send_join()
        return not isinstance(effect, follow.Gap)

    def _fetch(self) -> None:
        assert self.follow is not None
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
                    self._published(message, payload)
            case wire.Fetched():
                if isinstance(f.fetched(message.step, message.open), follow.Gap):
                    self._fetch()
            case wire.Pulse():
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
                    self._send(piece, self.model)
                else:
                    self._send(wire.Abort(snapshot=message.snapshot, reason="I do not give it"))
            case wire.Manifest():
                self._taking = Taking(message, now)
                self._want_more()
            case wire.Piece():
                self._take_piece(message, payload)
            case wire.Abort():
                self._on_abort(message)
            case wire.End():
                f.ended(message)
                if f.step < message.step and self._joined:
                    self._fetch()

    def _on_greet(self, message: wire.Greet) -> None:
        if not message.session_known:
            self._must_greet = True
        elif getattr(message, "join", False):
            self._send_join()
        else:
            self._send(wire.Probe(session=self._session))

    def _on_admit(self, message: wire.Admit) -> None:
        f = self.follow
        assert f is not None
        self._admitted = message
        if message.action == "adopt":
            self._joined = False
            f.fetching_since = None
            self._held.clear()
            return
        self._joined = True
        self._ready_again()
        if message.action == "follow" and message.step > f.step:
            self._fetch()

    def _greet_again(self) -> Waiting:
        self._must_greet = False
        self.world.say(f"{self.name} greets again")
        self._held.clear()
        self._giving = self._give_later = self._taking = None
        yield from self.connect(self.habits.give_up_s)
        self.follow = self.parts.follow(self.server.nonce, self.step, self.lineage, self.world.now)
        self._send_join()
        yield from self.wait(lambda: self._joined or self._must_greet or self.ended)

    # ------------------------------------------------------------------ client: snapshots

    def _give(self, message: wire.Give) -> None:
        f = self.follow
        assert f is not None
        self._giving = self._give_later = None
        if f.step == message.step and f.lineage == message.lineage:
            self._giving = message.snapshot
            self._send(
                wire.Manifest(
                    snapshot=message.snapshot,
                    step=self.step,
                    lineage=self.lineage,
                    tree="",
                    tensors=(),
                    piece_bytes=1,
                )
            )
        elif f.step < message.step:
            self._give_later = message
            if f.fetching_since is None:
                self._fetch()
        else:
            self._send(wire.Abort(snapshot=message.snapshot, reason=f"I stand at step {f.step}"))

    def _want_more(self) -> None:
        taking = self._taking
        assert taking is not None
        while len(taking.wanted) < WANTS_IN_FLIGHT and taking.next < PIECES:
            taking.wanted.add(taking.next)
            self._send(wire.Want(snapshot=taking.manifest.snapshot, piece=taking.next))
            taking.next += 1
        if not taking.wanted:
            self._adopt(taking)

    def _take_piece(self, message: wire.Piece, model: int) -> None:
        taking = self._taking
        if taking is None or taking.manifest.snapshot != message.snapshot:
            return
        if message.piece in taking.wanted:
            taking.wanted.discard(message.piece)
            taking.pieces[message.piece] = model
        taking.heard_at = self.world.now
        self._want_more()

    def _adopt(self, taking: Taking) -> None:
        f, m = self.follow, taking.manifest
        assert f is not None
        self._taking = None
        models = set(taking.pieces.values())
        self.model = models.pop() if len(models) == 1 else hash(tuple(sorted(models)))
        self.step, self.lineage = m.step, m.lineage
        self.forget_averages()
        self._check()
        f.adopted(m.step, m.lineage)
        self._send(wire.Adopted(snapshot=m.snapshot, step=m.step, lineage=m.lineage))
        self._joined = True
        self._ready_again()

    def _on_abort(self, message: wire.Abort) -> None:
        """One of a snapshot that was over already changes nothing: we have joined again since."""
        if self._giving == message.snapshot:
            self._giving = None
        elif not self._joined and message.snapshot > self._aborted:
            self._aborted = message.snapshot
            self._taking = None
            self._send_join()

    # ------------------------------------------------------------------ the replica

    def take(self, effect: follow.Take, samples: tuple[Sample, ...]) -> None:
        if getattr(effect, "first", False):
            self.forget_averages()
        average = effect.average
        self._flat[average.bucket] = samples
        present = average.bucket not in average.absent
        self._present[average.bucket] = self._present.get(average.bucket, 0) + present

    def apply(self, effect: follow.Apply) -> None:
        if getattr(effect, "first", False):
            self.forget_averages()
        close = effect.close
        self.model = after_update(
            self.model,
            [
                (self._present.get(b, 0) > 0, self._flat[b] if b in close.buckets else ())
                for b in range(self.server.buckets)
            ],
        )
        self.step, self.lineage = close.step, close.lineage
        self.forget_averages()
        self._check()

    def forget_averages(self) -> None:
        self._present.clear()

    def _check(self) -> None:
        if self.model != self.server.models.get(self.step):
            raise Broken(f"{self.name} holds another model of step {self.step} than the log")


class Habits(msgspec.Struct):
    """What a peer is like; faults change it in the middle of a run."""

    compute_s: float = 0.1
    bad: float = 0.0
    """Share of its batches with a bucket of numbers that are not finite."""
    absent: float = 0.0
    """Share of its buckets without a gradient."""
    lost: float = 0.0
    """Share of what is published that does not reach it."""
    leaves: float = 0.0
    """Share of its steps after which it leaves in order."""
    give_up_s: float = 90.0
    samples: int = 1
    batch_size: int = 1


class Worker(Peer):
    """`workers.train` and `workers.cluster` around the client."""

    def main(self) -> Waiting:
        yield from self.connect(60.0)
        yield from self.join()
        self._round = 0
        self._ready = wire.Ready(samples=self.habits.samples, batch_size=self.habits.batch_size)
        if self._joined:
            self._send(self._ready)
        while (lease := (yield from self._next_lease())) is not None:
            yield from self._one_step(lease)
            if self.world.chance(self.habits.leaves):
                self._send(wire.Goodbye(reason="it was stopped"))
                raise Leaves("left")
        self._send(wire.Goodbye(reason="finished"))

    def _next_lease(self) -> Waiting:
        found: tuple[int, wire.Lease] | None = None
        greetings = self.greetings

        def look() -> bool:
            nonlocal found
            assert self.follow is not None
            after = self._round if self.greetings == greetings else 0
            found = self.follow.lease(self.id, after)
            return found is not None or self.ended is not None

        yield from self.wait(look)
        if self.ended is not None:
            return None
        assert found is not None
        self._round, lease = found
        return lease

    def _one_step(self, lease: wire.Lease) -> Waiting:
        """Forward and backward, a bucket at a time; nothing is applied meanwhile."""
        world, habits, model = self.world, self.habits, self.model
        bad = world.random.randrange(self.server.buckets) if world.chance(habits.bad) else None
        for bucket in range(self.server.buckets):
            seconds = habits.compute_s * (0.5 + world.random.random())
            yield world.now + seconds, DEAF
            self._send(
                wire.Push(
                    round=self._round,
                    bucket=bucket,
                    samples=lease[2] - lease[1],
                    absent=(bucket,) if world.chance(habits.absent) else (),
                    loss=1.0 if bucket == self.server.buckets - 1 else None,
                ),
                (model, samples_of(lease), bucket != bad),
            )
            self.poll()
        greetings = self.greetings
        yield from self.wait(
            lambda: (
                self.greetings != greetings
                or self.ended
                or (self.follow is not None and self.follow.is_over(self._round))
            )
        )
        if self.greetings != greetings:
            self._round = 0


class Observer(Peer):
    """`workers.observe`: follows, and is busy with an evaluation now and then."""

    role = "observer"

    def main(self) -> Waiting:
        yield from self.connect(60.0)
        yield from self.join()
        while not self.ended:
            yield from self.wait(lambda: self.ended, timeout_s=self.world.random.expovariate(0.5))
            for _ in range(3):
                yield self.world.now + self.habits.compute_s, DEAF
                yield from self.wait(lambda: self.ended, timeout_s=0)
        self._send(wire.Goodbye(reason="finished"))


def brief(message: Any) -> str:
    """A message on one line, without what is long and the same every time."""
    hidden = {"nonce", "ledger", "layout", "seconds", "device", "settings", "protocol", "host"}
    fields = {f: getattr(message, f) for f in message.__struct_fields__ if f not in hidden}
    told = ", ".join(f"{k}={v!r}" for k, v in fields.items() if v not in (None, "", ()))
    return f"{type(message).__name__}({told})"
