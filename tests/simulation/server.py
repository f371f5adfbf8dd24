"""`Rounds` with what `paramserver.server.server` puts around it, without sockets and tensors.

Kept as close to that file as it can be, so that a schedule that fails here names a line there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.rounds import coordinator
from paramserver.rounds.coordinator import Rounds, Rules
from paramserver.rounds.effects import (
    Add,
    Closed,
    Effect,
    Ended,
    Finish,
    Publish,
    Remove,
    Say,
    Send,
    Void,
)
from paramserver.rounds.recovery import NOTHING
from paramserver.rounds.round import REPLICA, Peer, Snapshot

from .book import Book, Broken, Gradient, Sample, samples_of
from .network import Carried, Network, World

PULSES_PER_TIMEOUT = 10
LIAR, LIE = "liar", "a lie"  # host and payloads of one; see `liar`
PIECES_MOST = 1000
TICK_S = 0.25
FETCH_UPDATES = 3  # that make an answer
FAREWELLS = 3


class Update(NamedTuple):
    step: int
    messages: list[Carried]


class Killed(BaseException):
    """The server's process is no more."""


class Server:
    """Carries out what `Rounds` decides, and keeps the book. Killed and started again, it knows no
    more than the disk does: `run`, and `noted`, the newest step that it has told anybody of.

    `publish` hands a message to every SUB; with `through_wire` each message becomes frames and a
    message again on its way. `look` is the program's: it sees to the observer, and tells whether
    one comes. `lost` is told of closed steps that did not survive a restart.
    """

    def __init__(
        self,
        world: World,
        net: Network,
        rules: Rules,
        make_rounds: Callable[..., Rounds],
        *,
        buckets: int,
        history: int,
        through_wire: bool,
    ) -> None:
        self.world, self.net, self.rules, self.buckets = world, net, rules, buckets
        self.layout = wire.Layout(
            tuple(wire.Tensor(f"w{b}", (1,), "float32") for b in range(buckets))
        )
        self.through_wire = through_wire
        self.publish: list[Callable[[Carried], None]] = []
        self.look: Callable[[], bool] = lambda: False
        self.kept = 0  # ends that had to wait for it
        self.disk: set[str] = set()  # lineages of what the observer has written at the end
        self.lost: Callable[[set[str]], None] = lambda lineages: None
        self.deserted: Callable[[], None] = lambda: None
        self.limit = history
        self.boots = self._runs = 0
        self.dies_at: str | None = None
        self.compares = False  # replicas tell digests of their models
        self.givers: dict[str, list[tuple[Peer, bool]]] = {}
        """By the process of a joiner: who gave; was the liar the only one who could?"""
        self._make_rounds = make_rounds
        self._begin_run()

    def _begin_run(self) -> None:
        self._runs += 1
        self.run, self.noted = f"run-{self._runs}", NOTHING
        self.book = Book(self.buckets, self.book.models if self._runs > 1 else {})
        self._boot(None)

    def _boot(self, recovery: str | None) -> None:
        """A new process."""
        self.boots += 1
        self.booted_at = self.world.now
        self.alive, self.stalled = True, False
        self.dies_at = None
        self.ended_at: float | None = None
        self.voids = 0
        self.nonce = f"server-{self.boots}"
        count = self.buckets
        self.rounds = self._make_rounds(
            self.rules, self.nonce, self.world.now, lambda layout: count, recovery=recovery
        )
        self._history: deque[Update] = deque()
        self._averages: list[Carried] = []
        self._sums: dict[int, list[Sample]] = {}
        self._payloads: dict[tuple[int, int], Gradient] = {}
        self._links: dict[int, str] = {}
        self._routes: dict[str, int] = {}
        self._doors: dict[str, int] = {}
        self._secrets: dict[str, str] = {}
        self._models: dict[str, int] = {}  # what each peer's model was when it joined
        self._backlog: deque[tuple[int, Carried]] = deque()
        self._sessions = 0
        self._gave_at = -1  # so many rounds had been opened when the last snapshot began
        self._awaited: dict[int, int] = {}  # by id: rounds in a row that it brought nothing to
        self._passed_on: set[tuple[int, str, int | None]] = set()
        self._told_pieces = (0, 0)  # snapshot, and how many its manifest tells of
        self.world.after(TICK_S, self._tick, self.boots)
        self.world.after(0.0, self._pulse, self.boots)

    # ------------------------------------------------------------------ dying and coming back

    def kill(self) -> None:
        """kill -9. What was published may be under way, what was noted is on disk."""
        if self.alive:
            self.world.say("the server is killed")
            self.alive = False
            self.net.server_died()

    def restart(self) -> None:
        """`make server` again."""
        if not self.alive:
            self.world.say(f"START the server again; step {self.noted} was noted")
            self._boot(self.noted)
            self.net.server_is_back()

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

    def receive(self, route: int, carried: Carried) -> None:
        if not self.alive:
            return
        if self.stalled:
            self._backlog.append((route, carried))
            return
        message, payload = carried
        if self.world.talks and not isinstance(message, wire.Beat):
            session = self._links.get(route)
            who = self.rounds.peers[session].name if session else f"route {route}"
            self.world.say(f"    {who} -> server: {brief(message)}")
        try:
            self._heed(route, message, payload)
        except Killed:
            self.kill()
            return
        self._check_bounds()

    def _heed(self, route: int, message: Any, payload: Any) -> None:
        try:
            self._handle(route, message, payload, self.world.now)
        except PeerError as e:
            session = self._links.get(route)
            self._send_raw(route, wire.Reject(f"your message was not understood: {e}"))
            if session is not None:  # its leaving may close the open round
                self._carry_out(self.rounds.leave(session, str(e), self.world.now))

    def go_on(self) -> None:
        """After a stop, sockets are read before time is looked at."""
        self.stalled = False
        while self._backlog and not self.stalled:
            self.receive(*self._backlog.popleft())

    def _handle(self, route: int, message: Any, payload: Any, now: float) -> None:
        r = self.rounds
        match message:
            case wire.Hello():
                self._greet(route, message, now)
                return
            case wire.Beat():
                if self._is_from(message):
                    r.seen(message.session, now)
                else:
                    if message.run == self.run:
                        r.beats_unknown(message.nonce, now)
                    self._send_raw(route, wire.Greet(session_known=False))
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
                self._models[session] = payload
                self._carry_out(r.join(session, message, now))
            case wire.Ready():
                self._carry_out(r.ready(session, message, now))
            case wire.Unreadable():
                self._carry_out(r.unreadable(session, message.round, now))
            case wire.Unready():
                self._carry_out(r.unready(session, now, message.unfinished))
            case wire.Manifest() | wire.Want() | wire.Piece() | wire.Abort():
                goal, effects = r.route(session, message, now)
                if goal is not None:
                    self._check_passed_on(message)
                    self._send(goal, message, payload)
                self._carry_out(effects)
            case wire.Stand():
                self._carry_out(r.stands(session, message.step, now, kept=message.kept))
            case wire.Adopted():
                before = r.peers[session].state
                self._carry_out(r.adopted(session, message.snapshot, now))
                after = r.peers[session].state
                if before != after == REPLICA and not self._all_passed_on(message.snapshot):
                    raise Broken(f"{r.peers[session].name} holds a snapshot without all its pieces")
            case wire.Goodbye():
                said = (message.reason, now, message.step, message.digest)
                died = {"failed": message.failed, "lease": message.lease, "error": message.error}
                self._carry_out(r.leave(session, *said, **died, finished=message.is_done))
            case wire.Digest():
                self._carry_out(r.digest(session, message.step, message.digest, now))
                self._check_found_wrong()
            case wire.Report():
                pass  # only the observer's is looked at
            case _:
                if r.peers[session].host != LIAR:
                    raise Broken(f"a {type(message).__name__} is not for the server")
                raise PeerError(f"a {type(message).__name__} is not for the server")

    def _greet(self, route: int, hello: wire.Hello, now: float) -> None:
        if self.rounds.coming_back and hello.role == "worker" and hello.run is None:
            self._send_raw(route, wire.Later(self.rounds.phase(now)))
            return
        refuse = ""
        if self.rounds.ended is not None:
            refuse = f"the run has ended: {self.rounds.ended.reason}"
        elif hello.role not in ("worker", "observer"):
            refuse = f"there is no role {hello.role!r}"
        elif hello.role == "observer" and hello.key != self.nonce:
            refuse = "only the observer that this server started may observe"
        elif hello.run is not None and hello.run != self.run:
            refuse = f"this server runs {self.run}, you belong to {hello.run}"
        if refuse:
            self._send_raw(route, wire.Reject(refuse))
            return
        known = next((s for s, d in self._doors.items() if d == route), None)
        if known is None:
            self._sessions += 1
        session = known or f"session-{self.boots}-{self._sessions}"
        if session not in self.rounds.peers:
            peer, why, effects = self.rounds.greet(
                session,
                now,
                role=hello.role,
                id=hello.id,
                nonce=hello.nonce,
                host=hello.host,
                pid=hello.pid,
                returns=hello.run == self.run,
                reachable=self._reachable,
            )
            self._carry_out(effects)
            if peer is None:
                self._send_raw(route, wire.Reject(why))
                return
            self._doors[session] = route
            self._secrets[session] = hello.secret
        self._send_raw(
            route,
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run=self.run,
                nonce=self.nonce,
                session=session,
                id=self.rounds.peers[session].id,
                settings={},
                pub_port=0,
            ),
        )

    def _probe(self, route: int, probe: wire.Probe, now: float) -> None:
        if not self._is_from(probe):
            self._send_raw(route, wire.Greet(session_known=False))
            return
        old = self._routes.get(probe.session)
        self._links[route] = probe.session
        self._routes[probe.session] = route
        if old is not None and old != route:
            self._links.pop(old, None)
            self._carry_out(self.rounds.relinked(probe.session, now))
        self.rounds.seen(probe.session, now)
        self._publish(wire.Probe(session=probe.session))
        self._send(probe.session, self.rounds.pulse(now))
        if self.rounds.ended is not None:
            self._send(probe.session, self.rounds.ended)

    def _is_from(self, message: wire.Probe | wire.Beat) -> bool:
        known = message.session in self.rounds.peers
        return known and message.secret == self._secrets.get(message.session)

    def _reachable(self, session: str) -> bool:
        route = self._routes.get(session) or self._doors.get(session)
        return route is not None and self._send_raw(route, self.rounds.pulse(self.world.now))

    def _push(self, session: str, push: wire.Push, gradient: Gradient, now: float) -> None:
        why = self.rounds.refusal(session, push)
        if why is not None:
            self._send(session, wire.Refused(round=push.round, reason=why))
            return
        if gradient == LIE:  # it counts for what its header says
            assert self.rounds.round is not None
            member = self.rounds.round.members[self.rounds.peers[session].id]
            gradient = (self.book.model, samples_of(member.lease), True)
            if not 0.0 < push.scale < math.inf or push.places:
                raise PeerError("a payload that does not fit")
        bad = None if gradient[2] else f"not all of its numbers are finite (bucket {push.bucket})"
        if bad is None:
            self._payloads[self.rounds.peers[session].id, push.bucket] = gradient
        self._carry_out(self.rounds.pushed(session, push, now, bad))

    def _fetch(self, session: str, fetch: wire.Fetch, now: float) -> None:
        if not self.rounds.knows(fetch.step, fetch.lineage):
            self._carry_out(self.rounds.behind(session, now))
            return
        self.rounds.fetches(session)
        after = [u for u in self._history if u.step > fetch.step]
        for update in after[:FETCH_UPDATES]:
            for carried in update.messages:
                self._send(session, *carried)
        self._send(session, wire.Fetched(self.rounds.step, open=self.rounds.open_message()))

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
            self._carry_out(self.rounds.tick(self.world.now))
        except Killed:
            self.kill()
            return
        self._check_bounds()
        if not self.rounds.coming_back:
            self.rounds.observer_comes = self.look()
        if self.rounds.deserted:
            self._desert()

    def _pulse(self, boot: int) -> None:
        if not self.alive or boot != self.boots:
            return
        self.world.after(self.rules.heartbeat_timeout / PULSES_PER_TIMEOUT, self._pulse, boot)
        if not self.stalled:
            pulse = self.rounds.pulse(self.world.now)
            self._publish(pulse)
            for session in list(self._routes):
                self._send(session, pulse)
                if self.rounds.ended is not None:
                    self._send(session, self.rounds.ended)

    def stop(self, reason: str) -> None:
        if self.alive:
            self._carry_out(self.rounds.stop(reason, self.world.now))
            if self.rounds.put_off:
                self.kill()

    def finished(self) -> bool:
        """Has everybody who is alive said goodbye, or had the time to?"""
        if self.ended_at is None or not self.alive:
            return False
        now, silence = self.world.now, self.rules.heartbeat_timeout
        farewell = {"worker": FAREWELLS * silence, "observer": self.rules.idle_timeout}
        return all(
            now - p.last_seen > silence or now - self.ended_at > farewell[p.role]
            for p in self.rounds.peers.values()
        )

    # ------------------------------------------------------------------ what goes out

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Add():
                    self._add(effect)
                case Finish():
                    self._finish(effect)
                case Closed():
                    self._close_round(effect.close)
                case Publish():
                    self._publish(effect.message)
                    if isinstance(effect.message, wire.Open):
                        self._prompt(self.rounds.deaf | self.rounds.prompted)
                case Send():
                    if isinstance(effect.message, wire.Give):
                        self._check_rounds_go_on()
                        self._note_giver()
                    message = effect.message
                    if isinstance(message, wire.Admit) and message.action == "origin":
                        self._has_origin(message, self._models[effect.session])
                    self._send(effect.session, message)
                case Say():
                    self.world.say(f"        {effect.text}")
                case Void():
                    self.voids += 1
                    self._forget_round()
                case Remove():
                    self._forget_peer(effect.session)
                case Ended():
                    self.ended_at = self.world.now
                    self._check_kept(effect.end)
                    self._publish(effect.end)
                    for session in list(self.rounds.peers):
                        self._send(session, effect.end)

    def _check_kept(self, end: wire.End) -> None:
        """While an observer lives, and somebody holds the last step, the end waits until it is on
        disk."""
        r = self.rounds
        held = any(p.state == REPLICA for p in r.peers.values())
        comes = r.observer_comes or r.observer is not None
        waited_s = self.world.now - r._ending_at
        if r.log_begun and held and comes and waited_s <= self.rules.idle_timeout:
            if end.lineage not in self.disk:
                raise Broken(f"the run ends, but step {end.step} is on no disk")
            self.kept += 1

    def _has_origin(self, admit: wire.Admit, model: int) -> None:
        if not self.book.closes:
            self.book.begin(admit.lineage, model)
        elif gone := self.book.go_on(admit.step, admit.lineage, model):
            self.world.say(f"{len(gone)} closed steps are lost")
            self.lost(gone)

    def _add(self, effect: Add) -> None:
        model, samples, _ = self._payloads.pop((effect.worker, effect.bucket))
        if len(samples) != effect.samples:
            raise Broken(f"{len(samples)} samples of worker {effect.worker} weigh {effect.samples}")
        if model != self.book.model:
            raise Broken(f"a gradient of another model goes into step {self.book.step + 1}")
        self._sums.setdefault(effect.bucket, []).extend(samples)

    def _finish(self, effect: Finish) -> None:
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
        if self._sums or self._payloads:
            raise Broken("something was pushed and taken, but is not in the update")
        self._check_nobody_is_awaited_for_ever(close)
        self.book.close(close, {a.bucket: (a, samples) for a, samples in self._averages})
        self._die_if_due("before a close is noted")
        self.noted = close.lineage
        self._die_if_due("before a close is told")
        self._publish(close)
        for session in self.rounds.deaf:
            for carried in (*self._averages, (close, None)):
                self._send(session, *carried)
        self._prompt(self.rounds.prompted)
        self._die_if_due("after a close is told")
        self._history.append(Update(close.step, [*self._averages, (close, None)]))
        while len(self._history) > self.limit:
            self._history.popleft()
        self.rounds.forget_before(self._history[0].step - 1)
        self._forget_round()

    def _forget_round(self) -> None:
        self._averages = []
        self._payloads.clear()
        self._sums.clear()

    def _forget_peer(self, session: str) -> None:
        self._doors.pop(session, None)
        self._secrets.pop(session, None)
        self._models.pop(session, None)
        route = self._routes.pop(session, None)
        if route is not None:
            self._links.pop(route, None)

    def _prompt(self, sessions: set[str]) -> None:
        for session in sorted(sessions):
            self._send(session, self.rounds.pulse(self.world.now))

    def _publish(self, message: wire.Message, payload: Any = None) -> None:
        carried = self._encoded(message), payload
        for publish in self.publish:
            publish(carried)

    def _send(self, session: str, message: wire.Message, payload: Any = None) -> None:
        route = self._routes.get(session) or self._doors.get(session)
        if route is not None:
            self._send_raw(route, message, payload)

    def _send_raw(self, route: int, message: wire.Message, payload: Any = None) -> bool:
        return self.net.send(route, (self._encoded(message), payload))

    def _encoded(self, message: wire.Message) -> Any:
        return wire.from_frames(wire.to_frames(message))[0] if self.through_wire else message

    # ------------------------------------------------------------------ what is kept

    def _check_rounds_go_on(self) -> None:
        """Between two snapshots, where they can: after one that was in vain it is not clear."""
        r = self.rounds
        could = r.ending is None and r._enough(r._takers(self.world.now), self.world.now)
        if could and r._rounds == self._gave_at and not r._overdue_rounds:
            raise Broken("two snapshots in a row, and a round could go on")
        self._gave_at = r._rounds

    def _note_giver(self) -> None:
        """A snapshot begins."""
        r = self.rounds
        if r.snapshot is not None:
            joiner, giver = r.peers[r.snapshot.joiner], r.peers[r.snapshot.giver]
            only = all(p.host == LIAR for p in r.peers.values() if p.state == REPLICA)
            self.givers.setdefault(joiner.nonce, []).append((giver, only))

    def _check_nobody_is_awaited_for_ever(self, close: wire.Close) -> None:
        """Who brings nothing to rounds that wait for it is left out, where others are enough; those
        two that nobody counts come with a greeting in between."""
        rules, timeout = self.rules, self.rules.timeout or math.inf
        most_s = max(3 * rules.heartbeat_timeout, coordinator.EMPTY_ROUNDS * timeout) + 2 * timeout
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
        kept = (
            ("updates", len(self._history), self.limit),
            ("lineages", len(r._lineages), self.limit + 1),
            ("payloads", len(self._payloads), members * self.buckets),
            ("sums", len(self._sums), self.buckets),
            ("peers", len(r.peers), self.rules.max_workers + 1),
            ("digests of goodbyes", len(r.digests), self.rules.max_workers + 1),
            ("disbelieved", len(r._disbelieved), self.rules.max_workers),
            ("wasted snapshots", len(r._wasted_by), self.rules.max_workers),
            (
                "failed givers",
                max((len(p.failed_by) for p in r.peers.values()), default=0),
                self.rules.max_workers + 1,
            ),
            ("tallies", len(r.tallies), self.rules.max_workers),
            ("sentences", len(r._sentences._told), self.rules.max_workers),
            ("deaf", len(r.deaf | r.prompted), len(r.peers)),
            ("pieces", 0 if r.snapshot is None else len(r.snapshot._wanted), PIECES_MOST),
            ("links", len(self._links), len(r.peers)),
            ("routes", len(self._routes), len(r.peers)),
            ("doors", len(self._doors), len(r.peers)),
        )
        for what, count, most in kept:
            if count > most:
                raise Broken(f"{count} {what} are kept, at most {most} may be")
        if r.ledger is not None:
            leases = len(r.ledger._leased) + len(r.ledger._waiting)
            halves = len(r.ledger._suspects)
            most = coordinator.LEASES_HELD * self.rules.max_workers + halves
            if leases > (8 * most if self.compares else most):  # a liar asks for small ones
                raise Broken(f"the ledger keeps {leases} ranges")


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
