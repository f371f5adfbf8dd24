"""Handles the server's messages: greeting, links, beats, and the decisions of `rounds`.

`Control` uses no socket, clock, file or tensor. `now` (seconds, any origin) comes in with each
message. Messages go out through a `Transport`, payloads go to `Data`; in the server these are
`paramserver.server.server` and `paramserver.server.data`.
"""

from __future__ import annotations

import hmac
import math
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import msgspec

from paramserver import trace
from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.protocol import versions
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.effects import (
    Add,
    Closed,
    Declined,
    Discard,
    Dismissed,
    Effect,
    Employed,
    Ended,
    Finish,
    PassOn,
    Publish,
    Remove,
    Retired,
    Say,
    Send,
    Spared,
    Start,
    Void,
)
from paramserver.rounds.events import (
    Alive,
    Compared,
    Dropped,
    Event,
    Failed,
    Forgotten,
    Greeted,
    Heard,
    Made,
    Offered,
    Placed,
    Pushed,
    PushRefused,
    Relinked,
    StoodStill,
    Stop,
    Tick,
    Told,
    Works,
)
from paramserver.rounds.states import REPLICA
from paramserver.server.held import Came, Held
from paramserver.server.history import FETCH_BYTES, Frames, Update
from paramserver.server.spread import Data, Spread
from paramserver.server.traffic import Traffic

PROBES_APART_S = 0.05  # between published probes, at least: all peers receive them
GOODBYE_TIMEOUTS = 3  # heartbeat timeouts for a worker's goodbye after the run's end
REFUSED_SENDERS = 1000  # whose invalid messages are logged
NOTHING_EARLIER: Mapping[str, wire.End] = MappingProxyType({})
Finished = tuple[wire.Average, Frames]
MEETS_MAX = 3  # channels to one shard that a session gets, one after the other
METS = 2  # messages about one channel: its keys, and its end
MEET_AGAIN_S = 60.0  # until it gets one more: a port was opened, or a machine is no longer busy
MUTE_TIMEOUTS = 3  # heartbeat timeouts in which a shard sends some of what is asked of it


class Transport(Protocol):
    """Sends messages without waiting. A route leads to one connection of one peer."""

    sent_bytes: int

    @property
    def received_bytes(self) -> int: ...

    def send(self, route: bytes, message: wire.Message, *buffers: Any) -> bool:
        """To one peer; False when that peer is gone."""

    def send_kept(self, route: bytes, frames: Frames) -> bool:
        """The same for a message of an update as `Data` keeps it."""

    def publish(self, message: wire.Message) -> None:
        """Send to all peers that follow the log."""

    def publish_update(self, averages: list[Finished], close: Frames | None) -> None:
        """New averages, and the close of their round if it is over, as one message."""

    def waiting(self, route: bytes) -> int:
        """Bytes of large frames that wait here for the peer at the other end."""

    def forget(self, route: bytes) -> None:
        """No more messages go there: forget the route."""

    def spare(self, session: str, on: bool) -> None:
        """Send this peer no averages with their numbers, because it hears a relay; or again."""

    def costs(self, session: str) -> dict[str, float] | None:
        """What it costs this peer to seal a MiB, by cipher; none where its link is plain. None: it
        may get no keys."""


class Watcher(Protocol):
    """The program's display and run folder. Calls must return at once."""

    def say(self, text: str, warning: bool = False) -> None: ...
    def closing(self, control: Control, close: wire.Close) -> None: ...  # before it is published
    def closed(self, control: Control, close: wire.Close) -> None: ...
    def reported(self, control: Control, report: wire.Report) -> None: ...
    def problem(self, text: str) -> None: ...  # without ending the run
    def looked(self, control: Control, now: float) -> None: ...


class Control:
    """The server between its sockets and its tensors; see the module's docstring.

    `welcome` is the answer to a peer, without its session and id; `observer_key` identifies the
    observer of this server. At most `most_unread` bytes of a snapshot wait for its joiner;
    `new_session` makes a name that cannot be guessed. `earlier`: how the runs ended, by their ids,
    that this server served before.
    """

    def __init__(
        self,
        rounds: Rounds,
        data: Data,
        transport: Transport,
        watcher: Watcher,
        welcome: wire.Welcome,
        *,
        observer_key: str,
        most_unread: int,
        new_session: Callable[[], str] = lambda: uuid.uuid4().hex,
        earlier: Mapping[str, wire.End] = NOTHING_EARLIER,
        make_spread: type[Spread] = Spread,
    ) -> None:
        self.rounds = rounds
        self.watcher = watcher
        self.run_id = welcome.run
        self.first_open_at: float | None = None
        self.closed_at: float | None = None
        self.links: dict[bytes, str] = {}  # route -> session
        self.routes: dict[str, bytes] = {}  # session -> route of its link
        self.doors: dict[str, bytes] = {}  # session -> route on which it greets and beats
        self.traffic = Traffic()
        self._data = make_spread(data, self._order, rounds.nonce)
        self._shards: dict[int, bytes] = {}  # the route of each shard's link
        self._shard_of: dict[bytes, int] = {}
        self._unreachable: set[int] = set()  # shards that have missed an order
        self._retiring: dict[int, float] = {}  # shards whose workers leave, since when
        self._offers: dict[str, bytes] = {}  # by session
        self._met: dict[tuple[str, int], int] = {}  # channels handed out, by session and shard
        self._meet_at: dict[tuple[str, int], float] = {}  # when such a session gets one more
        self._may_reach: set[tuple[str, int]] = set()  # who has been told of a channel
        self._mets: Counter[tuple[str, int]] = Counter()  # messages of these channels to come
        self._spared: dict[str, str] = {}  # sessions that hear a relay -> address of their host
        self._held = Held()  # behind a push whose payload is on its way to a shard
        self._gathering: dict[str, int] = {}  # session -> the step of which it waits for the rest
        self._mute_since: dict[int, float] = {}  # shards that were asked for what they keep
        self._lacking: dict[int, set[str]] = {}  # bucket of the open round -> who waits for it
        self._sent_lacking: set[tuple[str, int]] = set()  # who got which of these
        self._said_what_is_lost = False
        self._transport = transport
        self._welcome = welcome
        self._observer_key = observer_key
        self._most_unread = most_unread
        self._new_session = new_session
        self._unmapped: set[str] = set()  # sessions whose outbox cannot be mapped here
        self._secrets: dict[str, str] = {}  # by session; never sent to another peer
        self._told: set[bytes] = set()  # routes that got a Reject for an invalid message
        self._probed: dict[str, float] = {}  # session -> when its probe was last published
        self._stop: tuple[str, bool] | None = None  # the reason, and whether it is an error
        self._ended_at: float | None = None
        self._ticked_at = math.inf  # before the first time
        self._earlier = dict(earlier)

    @property
    def digests(self) -> dict[str, tuple[int, str]]:
        """By peer: step and digest of its weights when it said goodbye."""
        return {name: (step, digest) for name, step, digest in self.rounds.digests.values()}

    @property
    def sent_bytes(self) -> int:
        return self._transport.sent_bytes

    @property
    def received_bytes(self) -> int:
        return self._transport.received_bytes

    # ------------------------------------------------------------------ time

    def stop(self, reason: str, *, error: bool = False) -> None:
        """Ask for an end, in order or by an `error`, at the next tick; safe in a signal handler.
        The first reason stands: after Ctrl-C a program that started this one may send SIGTERM."""
        if self._stop is None:
            self._stop = reason, error

    def tick(self, now: float) -> None:
        """Check deadlines. Call it from time to time, and at `rounds.next_deadline()`."""
        if self._stop is not None:
            (reason, error), self._stop = self._stop, None
            self._happens(Stop(reason, error), now)
        self._notice_standstill(now)
        self._ticked_at = now
        self._happens(Tick(), now)
        self._give_up_payloads(now)
        self._lose_unreachable(now)
        self._end_retired(now)
        self._lose_mute(now)
        self._introduce_again(now)
        self._release(now)
        self.watcher.looked(self, now)

    def _notice_standstill(self, now: float) -> None:
        """Has this server itself stood still, on a laptop that slept, say? What comes first when it
        goes on must not meet deadlines that passed meanwhile."""
        stood_s = now - self._ticked_at
        if stood_s > self.rounds.rules.heartbeat_timeout / 2:
            self._ticked_at = now
            self._happens(StoodStill(stood_s), now)

    def pulse(self, now: float) -> None:
        """Send the server's sign of life; call it several times in each heartbeat timeout."""
        pulse = msgspec.structs.replace(
            self.rounds.pulse(now), sent_bytes=self.sent_bytes, received_bytes=self.received_bytes
        )
        self._transport.publish(pulse)
        for session in list(self.routes):
            self._send(session, pulse)
            if self.rounds.ended is not None:  # a peer may have missed the End
                self._send(session, self.rounds.ended)

    def finished(self, now: float) -> bool:
        """Has every living peer said goodbye, or had the time to? After a restart, those who have
        not greeted yet have the time to hear how the run ended: else they would wait on."""
        if self._ended_at is None:
            return self.rounds.deserted or self.rounds.put_off
        rules, waited_s = self.rounds.rules, now - self._ended_at
        at_most = GOODBYE_TIMEOUTS * rules.heartbeat_timeout
        if waited_s <= at_most and self.rounds.awaits_returning(now):
            return False
        for peer in self.rounds.peers.values():
            silence, limit = rules.heartbeat_timeout, at_most
            if peer.role == "observer":
                limit = rules.idle_timeout
                if self.rounds.observer_comes:  # a busy machine may keep it from beating for long
                    silence = at_most
            if now - peer.last_seen <= silence and waited_s <= limit:
                return False
        return True

    def release_shards(self) -> None:
        """The server stops serving this run: what shards keep is of no use any more, and workers
        that leave wait for theirs to end."""
        for route in [*self._shards.values(), *self._offers.values()]:
            self._transport.send(route, wire.Greet(session_known=False))

    # ------------------------------------------------------------------ what comes in

    def receive(self, route: bytes, message: Any, buffers: list[Any], now: float) -> None:
        """Handle one message; a fault in it affects only its sender. What a peer says behind a push
        whose payload is on its way to a shard waits until that is there."""
        self._notice_standstill(now)
        if (shard := self._shard_of.get(route)) is not None:
            self._hear_shard(shard, message, buffers, now)
            return
        waits = route in self._held
        if not waits and not self._must_wait(route, message):
            self._take_in(route, message, buffers, now)
            return
        came = Came(message, buffers, None, sum(map(len, buffers)), now)
        if not waits:
            self._held.hold(route, came, now)
        elif self._held.behind(route, came) and self._held.full(route):
            self._lose_payload(route, now)

    def _take_in(self, route: bytes, message: Any, buffers: list[Any], now: float) -> None:
        try:
            self._handle(route, message, buffers, now)
        except PeerError as e:
            self.refuse(route, e, now)

    def _must_wait(self, route: bytes, message: Any) -> bool:
        """Is this a push that may be used, and that its shard has not reported on yet?"""
        session = self.links.get(route)
        if not isinstance(message, wire.Push) or session is None:
            return False
        awaited = self._data.awaits(session, message)
        return awaited and self.rounds.refusal(session, message) is None

    def _release(self, now: float) -> None:
        """Handle what is held and need not wait any more."""
        for route, _ in self._held.since():
            while (first := self._held.first(route)) is not None:
                if self._must_wait(route, first.message):
                    break
                self._held.go_on(route, now)
                self._take_in(route, first.message, first.buffers, now)

    def _give_up_payloads(self, now: float) -> None:
        """Do not wait any longer for payloads that do not come to their shards."""
        patience_s = self.rounds.rules.heartbeat_timeout / 2
        for route, since in self._held.since():
            if now - since > patience_s:
                self._lose_payload(route, now)

    def _lose_payload(self, route: bytes, now: float) -> None:
        """A payload that this peer has sent to a shard is lost: it joins again, as where its link
        was cut, and gets another channel to that shard."""
        held, session = self._held.release(route), self.links.get(route)
        if session is None:
            return
        push = held[0].message
        problem = "what it sends there does not come"
        self._send(session, wire.Channel(shard=push.shard, reason=problem))
        self._reached(session, wire.Reached(shard=push.shard, problem=problem), now)
        self.cut_off(session, now)
        for came in held:
            if not isinstance(came.message, wire.Push):
                self._take_in(route, came.message, came.buffers, now)
            elif (again := self.links.get(route)) is not None:
                self._data.release(again, came.message)

    def refuse(self, route: bytes, error: PeerError, now: float) -> None:
        """The sender of a message that this protocol does not allow gets a Reject, and leaves the
        run."""
        session = self.links.get(route)
        if route not in self._told and len(self._told) < REFUSED_SENDERS:
            self._told.add(route)
            peer = self.rounds.peers[session] if session else None
            who = peer.name if peer else "somebody unknown"
            if peer is None or self.rounds.may_say(peer.id, who):
                self.watcher.say(f"{who} sent what this protocol does not allow: {error}", True)
        self._transport.send(route, wire.Reject(f"your message was not understood: {error}"))
        if session is not None:
            self._happens(Dropped(session, str(error), error=True), now)

    def tell(self, session: str, message: wire.Message) -> bool:
        """Send a message to this peer; False when it is gone."""
        return self._send(session, message)

    def refuse_link(self, route: bytes, probe: wire.Probe, reject: wire.Reject, now: float) -> None:
        """This link may not be a peer's; who owns the session has no place any more."""
        self._transport.send(route, reject)
        if self._is_from(probe):
            self._happens(Dropped(probe.session, reject.reason), now)

    def cut_off(self, session: str, now: float) -> None:
        """What this peer has sent last is lost: it has to join again."""
        if session in self.rounds.peers:
            self._happens(Relinked(session), now)

    def drop(self, session: str, why: str, now: float) -> None:
        """Let a peer go that cannot be served any more."""
        self._happens(Dropped(session, why), now)

    def _handle(self, route: bytes, message: Any, buffers: list[Any], now: float) -> None:
        if isinstance(message, wire.Hello):
            self._greet(route, message, now)
            return
        if isinstance(message, wire.Beat):
            if self._is_from(message):
                if message.vitals is not None:
                    self.traffic.vitals[message.session] = message.vitals
                self._happens(Heard(message.session), now)
            else:
                if message.run == self.run_id:
                    self._happens(Alive(message.nonce), now)
                self._transport.send(route, wire.Greet(session_known=False))
            return
        if isinstance(message, wire.Probe):
            self._probe(route, message, now)
            return
        if isinstance(message, wire.Offer):
            self._hear_offer(route, message, now)
            return
        session = self.links.get(route)
        if session is None:
            self._transport.send(route, wire.Greet())
            return
        peer = self.rounds.peers[session]
        if not isinstance(message, wire.Push):  # which is an event of its own
            self._happens(Heard(session), now)
        match message:
            case wire.Push():
                with trace.span(
                    f"bucket of worker {peer.id}",
                    bucket=message.bucket,
                    round=message.round,
                ):
                    self._push(session, message, buffers, now)
            case wire.Fetch():
                self._fetch(session, message, now)
            case wire.Join():
                self._forget_sent(session)
                self._share(session, message)
                address = self.traffic.addresses.get(session, "")
                self._happens(Placed(session, address), now)
                self._happens(Told(session, message), now)
                for shard in list(self._shards):
                    if (session, shard) not in self._met:
                        self._introduce(session, shard, now)
            case wire.Reached():
                self._reached(session, message, now)
            case wire.Lacks():
                self._happens(Told(session, message), now)
                self._send_lacking(session, message)
            case wire.Want() if self._transport.waiting(route) > self._most_unread:
                pass  # it may ask again when it has read the answer
            case wire.Piece():
                self._happens(Told(session, message), now, buffers[:1])
            case wire.Report():
                if peer.role == "observer":
                    self.watcher.reported(self, message)
            case wire.Problem():
                if peer.role == "observer":
                    self.watcher.problem(message.text)
            case (
                wire.Ready()
                | wire.Unready()
                | wire.Unreadable()
                | wire.NextLease()
                | wire.Evaluating()
                | wire.StopRun()
                | wire.Manifest()
                | wire.Want()
                | wire.Abort()
                | wire.Adopted()
                | wire.Digest()
                | wire.Stand()
                | wire.Goodbye()
                | wire.Holds()
                | wire.HandsOn()
                | wire.Listens()
            ):
                self._happens(Told(session, message), now)
            case _:
                raise PeerError(f"a {type(message).__name__} is not for the server")

    def _greet(self, route: bytes, hello: wire.Hello, now: float) -> None:
        if self.rounds.coming_back and hello.role == "worker" and hello.run is None:
            self._transport.send(route, wire.Later(self.rounds.phase(now)))
            return  # replicas that hold the run come first
        if (why := self._not_yet(hello)) is not None:
            self._transport.send(route, wire.Later(why))
            return
        refuse, hint, end = "", "", None
        if hello.protocol != wire.PROTOCOL:
            refuse = f"this server speaks protocol {wire.PROTOCOL}, you speak {hello.protocol}"
            hint = "install the same version on both machines"
        elif hello.run in self._earlier:
            end = self._earlier[hello.run]
            refuse = f"the run has ended: {end.reason}"
        elif (unfit := versions.misfit(hello.versions, self._welcome.versions)) is not None:
            refuse, hint = f"{hello.host} {unfit[0]}", unfit[1]
        elif self.rounds.ended is not None:
            refuse = f"the run has ended: {self.rounds.ended.reason}"
            # Who belongs to another run must not take this end for its own.
            end = self.rounds.ended if hello.run in (None, self.run_id) else None
        elif hello.role not in ("worker", "observer"):
            refuse = f"there is no role {hello.role!r}"
        elif hello.after == self.run_id and self._welcome.runs > 1:
            refuse = f"this process has left run {self._place}, which is the last one"
        elif hello.role == "observer" and not _same(hello.key, self._observer_key):
            refuse = "only the observer that this server started may observe"
        elif hello.run is not None and hello.run != self.run_id:
            refuse = f"this server runs {self.run_id}, you belong to {hello.run}"
        elif self._is_anothers(hello):
            refuse = "another process has joined under the name of this one"
        if refuse:
            self._transport.send(route, wire.Reject(refuse, hint, end=end))
            return
        known = next((s for s, d in self.doors.items() if d == route), None)
        session = known or self._new_session()
        if known is None or known not in self.rounds.peers:
            greeting = Greeted(
                session,
                hello.role,
                hello.id,
                hello.nonce,
                hello.host,
                hello.pid,
                returns=hello.run == self.run_id,
                trained=hello.after in self._earlier,
            )
            why = self.rounds.declines(greeting, now, partial(self._reachable, now=now))
            if why is not None:
                own = self.run_id if hello.run == self.run_id else ""
                reject = wire.Reject(why, "choose another number: id=...", run=own)
                self._transport.send(route, reject)
                return
            self._happens(greeting, now)
            self.doors[session] = route
            self._secrets[session] = hello.secret
        id = self.rounds.peers[session].id
        welcome = msgspec.structs.replace(self._welcome, session=session, id=id)
        self._transport.send(route, welcome)

    @property
    def _place(self) -> str:
        """Of this run, among those that this server serves."""
        return f"{self._welcome.trial} of {self._welcome.runs}"

    def _not_yet(self, hello: wire.Hello) -> str | None:
        """Why a worker has to wait for the next run; None where it may take part in this one."""
        ended = self.rounds.ended
        if hello.role != "worker" or hello.run is not None or not self.rounds.more:
            return None
        if ended is not None:
            return f"ending run {self._place}, the next one follows"
        if hello.after == self.run_id:
            return f"still in run {self._place}, which this process has left; the next one follows"
        return None

    def _probe(self, route: bytes, probe: wire.Probe, now: float) -> None:
        """Bind a link to its session, and answer the probe on link and PUB."""
        if not self._is_from(probe):
            self._transport.send(route, wire.Greet(session_known=False))
            return
        session = probe.session
        old = self.routes.get(session)
        self.links[route] = session
        self.routes[session] = route
        if old is not None and old != route:
            self.links.pop(old, None)
            self._held.release(old)
            self._happens(Relinked(session), now)
        self._happens(Heard(session), now)
        if now - self._probed.get(session, -math.inf) >= PROBES_APART_S:
            self._probed[session] = now
            self._transport.publish(wire.Probe(session=session))  # others do not see its secret
        self._send(session, self.rounds.pulse(now))
        if self.rounds.ended is not None:
            self._send(session, self.rounds.ended)

    def _is_from(self, message: wire.Probe | wire.Beat) -> bool:
        """Does it come from the peer of this session? Others may know the session's id."""
        return message.session in self.rounds.peers and _same(
            message.secret, self._secrets.get(message.session, "")
        )

    def _is_anothers(self, hello: wire.Hello) -> bool:
        """Is there a peer of this nonce that has another secret?"""
        return any(
            peer.nonce == hello.nonce and not _same(hello.secret, self._secrets.get(session, ""))
            for session, peer in self.rounds.peers.items()
        )

    def _reachable(self, session: str, now: float) -> bool:
        """Is this peer's connection still open? The transport knows when it was closed."""
        return self._send(session, self.rounds.pulse(now))

    def _share(self, session: str, join: wire.Join) -> None:
        """Let a peer on this host use shared memory."""
        self._unmapped.discard(session)
        problem = self._data.share(session, join)
        if problem is not None:
            self._unmapped.add(session)  # its Admit says so
            self.watcher.say(
                f"{self.rounds.peers[session].name} sends through the socket, which is slower: "
                f"its shared memory cannot be used: {problem}"
            )

    def _push(self, session: str, push: wire.Push, buffers: list[Any], now: float) -> None:
        buffers = self._data.located(session, push, buffers)
        self.traffic.came(session, sum(map(len, buffers)))
        why = self.rounds.refusal(session, push)
        if why is not None:
            self._data.release(session, push)
            self._happens(PushRefused(session, push, why), now)
            return
        worker = self.rounds.peers[session].id
        late = self.rounds.is_late(push)
        bad, norm = self._data.push(session, worker, push, buffers, late=late)
        self._happens(Pushed(session, push, bad, norm), now)

    def _fetch(self, session: str, fetch: wire.Fetch, now: float) -> None:
        self._forget_overwritten(now)
        known = self.rounds.may_fetch(session, fetch)
        self._happens(Told(session, fetch), now)
        self._gathering.pop(session, None)
        if not known:
            return
        route = self.routes[session]
        if self._transport.waiting(route) > FETCH_BYTES:
            return  # an answer is on its way, or unread
        updates = self._data.fetch(fetch.step)
        if updates and self._data.recall(updates[0].step):
            self._gathering[session] = updates[0].step  # the answer follows when all is here
            return
        self._send_updates(session, updates)

    def _send_updates(self, session: str, updates: list[Update]) -> None:
        """The answer to a fetch."""
        route = self.routes[session]
        for update in updates:
            for average, buffers in self._data.found(update.step):
                if not self._transport.send(route, average, *buffers):
                    return
            if not self._send_update(route, update):
                return
        self._send(session, wire.Fetched(step=self.rounds.step, open=self.rounds.open_message()))

    # ------------------------------------------------------------------ shards

    def _order(self, shard: int, message: wire.Message, *buffers: Any) -> None:
        """Send a message to a shard. One that has missed an order is of no use any more."""
        route = self._shards.get(shard)
        if route is not None and not self._transport.send(route, message, *buffers):
            self._unreachable.add(shard)

    def _lose_unreachable(self, now: float) -> None:
        while self._unreachable:
            shard = self._unreachable.pop()
            if shard in self._retiring:
                self._dismiss(shard, now)
            else:
                self._happens(Failed(shard, "it cannot be reached"), now)

    def _hear_offer(self, route: bytes, offer: wire.Offer, now: float) -> None:
        """A worker has started a shard, which has a link of its own."""
        if route in self.links:
            raise PeerError("this is the link of a worker, not of its shard")
        if offer.session not in self.rounds.peers or not _same(
            offer.secret, self._secrets.get(offer.session, "")
        ):
            self._transport.send(route, wire.Greet(session_known=False))
            return
        for shard in self.rounds.shards.of(offer.session):
            self._happens(Failed(shard.number, "its link was cut"), now)
        self._offers[offer.session] = route
        self._happens(Offered(offer.session), now)

    def _employ(self, shard: int, session: str, now: float) -> None:
        """The shard takes part: tell it what the run is about, and make it known to all."""
        route = self._offers.pop(session)
        assert self.rounds.layout is not None
        self._shards[shard], self._shard_of[route] = route, shard
        self._data.employ(shard)
        self._order(
            shard,
            wire.Employ(shard=shard, nonce=self.rounds.nonce, layout=self.rounds.layout),
        )
        for other, peer in list(self.rounds.peers.items()):
            if peer.join is not None:
                self._introduce(other, shard, now)
        for spared, address in self._spared.items():
            self._spare(shard, spared, address, on=True)

    def _decline(self, session: str) -> None:
        """The shard that this worker has started is not wanted: its process ends."""
        route = self._offers.pop(session)
        self._transport.send(route, wire.Greet(session_known=False))
        self._transport.forget(route)

    def _spare(self, shard: int, session: str, address: str, on: bool) -> None:
        """Let a shard on another host than this peer's send it no averages, or send them again."""
        live = self.rounds.shards.live.get(shard)  # None: it is about to be dismissed
        if live is not None and live.host != address:
            self._order(shard, wire.Spare(session=session, on=on))

    def _spare_all(self, spared: Spared) -> None:
        session, address = spared.session, spared.address
        if spared.on:
            self._spared[session] = address
        else:
            self._spared.pop(session, None)
        for shard in self._shards:
            self._spare(shard, session, address, spared.on)
        if address:  # on the server's own host they read its ring
            self._transport.spare(session, spared.on)

    def _retire(self, shard: int, now: float) -> None:
        """A shard's worker leaves: the shard may end once what it keeps is here."""
        self._retiring[shard] = now
        self._data.retire(shard, passes_on=self.rounds.ending is None)
        self._end_retired(now)

    def _end_retired(self, now: float) -> None:
        """End the shards from which nothing is to be had any more."""
        patience_s = self.rounds.rules.heartbeat_timeout / 2
        for shard, since in list(self._retiring.items()):
            if self._data.has_taken_over(shard) or now - since > patience_s:
                self._dismiss(shard, now)

    def _dismiss(self, shard: int, now: float) -> None:
        """A shard is gone. Who waits for what it kept has to take a snapshot. Its peers are told,
        in the server's own name: without a host, which `_pass_on` always names."""
        self._retiring.pop(shard, None)
        route = self._shards.pop(shard, None)
        if route is not None:
            self._transport.send(route, wire.Greet(session_known=False))
            del self._shard_of[route]
            self._transport.forget(route)
        for session in sorted(s for s, number in self._met if number == shard):
            self._send(session, wire.Channel(shard=shard, reason="this shard is gone"))
        self._forget_met(shard)
        self._data.dismiss(shard)
        self._forget_overwritten(now)
        for step in set(self._gathering.values()):
            if not self._data.recall(step):
                self._end_gathering(step, now)

    def _reached(self, session: str, message: wire.Reached, now: float) -> None:
        """A peer has a channel to a shard, or none. It has one only where it was told of one since
        it had none: who could say both in turn would change the map of each round."""
        key = session, message.shard
        if not message.problem and key not in self._may_reach:
            return
        self._happens(Told(session, message), now)
        if message.problem and message.shard in self._shards:
            self._may_reach.discard(key)
            self._introduce(session, message.shard, now)

    def _introduce(self, session: str, shard: int, now: float) -> None:
        """Let a shard make a channel for this peer; later, where that has often been in vain."""
        costs = self._transport.costs(session)
        peer = self.rounds.peers.get(session)
        if costs is None or peer is None or shard not in self._shards:
            return
        before = self._met.get((session, shard), 0)
        if before >= MEETS_MAX:
            self._meet_at[session, shard] = now + MEET_AGAIN_S
            return
        self._met[session, shard] = before + 1
        self._mets[session, shard] += METS
        self._may_reach.add((session, shard))
        self._order(shard, wire.Meet(session=session, worker=peer.id, costs=costs))

    def _introduce_again(self, now: float) -> None:
        for (session, shard), at in list(self._meet_at.items()):
            if now >= at:
                del self._meet_at[session, shard]
                self._met[session, shard] = MEETS_MAX - 1
                self._introduce(session, shard, now)

    def _forget_met(self, gone: str | int) -> None:
        """A session, or a shard, is no more."""
        for table in (self._met, self._meet_at, self._mets):
            for key in [key for key in table if gone in key]:
                del table[key]
        self._may_reach = {key for key in self._may_reach if gone not in key}

    def _hear_shard(self, shard: int, message: Any, buffers: list[Any], now: float) -> None:
        """Handle a message of a shard; a fault in it costs the shard its place."""
        self._happens(Works(shard), now)
        try:
            match message:
                case wire.Offer():
                    pass  # its beat
                case wire.Arrived() if message.session in self.rounds.peers:
                    self._data.arrived(shard, message, 4 * self.rounds.buckets + 4)
                    self._release(now)
                case wire.Arrived():
                    pass  # its sender is gone
                case wire.Averaged():
                    if self._data.averaged(shard, message):
                        self._happens(Made(shard, message.round, message.bucket), now)
                case wire.Recalled():
                    self._hear_recalled(shard, message, buffers, now)
                case wire.LeftOut():
                    self._data.left_out(shard, message, buffers)
                    self._end_retired(now)
                case wire.Met() if shard in self.rounds.shards.live:
                    self._pass_on(shard, message)
                case _:
                    raise PeerError(f"a {type(message).__name__} is not for the server")
        except PeerError as e:
            self._happens(Failed(shard, str(e)), now)
        self._lose_unreachable(now)

    def _pass_on(self, shard: int, met: wire.Met) -> None:
        """A shard has made a channel for a peer, or ended it. What it tells without having been
        asked to make one would cost the peer a socket each time; one message more each round is for
        keys in place of those that are worn. The host is always named: see `_dismiss`."""
        key = met.session, shard
        if self._mets[key] <= 0:
            return
        self._mets[key] -= 1
        host = self.rounds.shards.live[shard].host
        self._send(met.session, msgspec.structs.replace(met.channel, shard=shard, host=host))

    def _allow_mets(self) -> None:
        """A round is closed: each shard may have new keys for each of its peers."""
        for key, left in self._mets.items():
            self._mets[key] = max(left, min(left + 1, METS))

    def _hear_recalled(
        self, shard: int, message: wire.Recalled, buffers: list[Any], now: float
    ) -> None:
        """A shard has sent an average that it keeps."""
        current = self.rounds.round
        if current is not None and message.round == current.number:
            average = self._data.made(message.bucket, shard)
            if average is None:
                return
            for session in sorted(self._lacking.pop(message.bucket, ())):
                if message.kept and self._send(session, average, *buffers):
                    self._sent_lacking.add((session, message.bucket))
            return
        self._mute_since.pop(shard, None)
        step = self._data.recalled(shard, message, buffers)
        if step is not None:
            self._forget_overwritten(now)
            self._end_gathering(step, now)
        self._end_retired(now)

    def _lose_mute(self, now: float) -> None:
        """Lose the shards that do not send what they keep, while replicas wait for it."""
        steps = set(self._gathering.values())
        awaited = set[int]().union(*(self._data.awaited(step) for step in steps))
        self._mute_since = {shard: self._mute_since.get(shard, now) for shard in sorted(awaited)}
        limit = MUTE_TIMEOUTS * self.rounds.rules.heartbeat_timeout
        for shard, since in list(self._mute_since.items()):
            if now - since > limit and shard in self.rounds.shards.live:
                why = f"it has sent nothing of what it keeps for {limit:g} s"
                self._happens(Failed(shard, why), now)

    def _end_gathering(self, step: int, now: float) -> None:
        """All that can be had of this update is here: send it to those who wait for it. Where it
        cannot be had, they have to ask again, and are told so."""
        waiting = [s for s, awaited in self._gathering.items() if awaited == step]
        for session in waiting:
            del self._gathering[session]
            if session in self.routes:
                update = [u for u in self._data.fetch(step - 1) if u.step == step]
                self._send_updates(session, update)
        self._data.handed_out(step)

    def _send_lacking(self, session: str, lacks: wire.Lacks) -> None:
        """Get averages of the open round for a peer that has not got them from their shards."""
        current = self.rounds.round
        if current is None or current.number != lacks.round:
            return
        if self.rounds.peers[session].state != REPLICA:
            return
        if self._transport.waiting(self.routes[session]) > FETCH_BYTES:
            return  # what it got is unread
        for bucket in lacks.buckets:
            if (session, bucket) in self._sent_lacking:
                continue  # it is on its way
            waiting = self._lacking.setdefault(bucket, set())
            if waiting or self._data.recall_open(bucket):
                waiting.add(session)
            else:
                del self._lacking[bucket]

    def _forget_sent(self, session: str) -> None:
        """What was on its way to this peer may be lost with its link: it may ask again."""
        self._sent_lacking = {key for key in self._sent_lacking if key[0] != session}

    def _forget_lacking(self) -> None:
        """The open round is over, or void."""
        self._lacking.clear()
        self._sent_lacking.clear()

    # ------------------------------------------------------------------ what goes out

    def _happens(self, event: Event, now: float, content: Sequence[Any] = ()) -> None:
        """Pass an event to `rounds`, and carry out the effects. `content`: the payload of a message
        that may be passed on."""
        self._carry_out(self.rounds.handle(event, now), now, content)

    def _carry_out(self, effects: list[Effect], now: float, content: Sequence[Any] = ()) -> None:
        for effect in effects:
            match effect:
                case Add():
                    self._data.add(effect.worker, effect.bucket, effect.weight, late=effect.late)
                case Discard():
                    self._data.drop(effect.worker, effect.bucket)
                case Finish():
                    self._data.finish(effect)
                case Closed():
                    self._close_round(effect.close, now)
                case Publish():
                    if isinstance(effect.message, wire.Closing):
                        self._publish_due()
                    self._transport.publish(effect.message)
                    if isinstance(effect.message, wire.Open):
                        if self.first_open_at is None:
                            self.first_open_at = now
                        self._prompt(self.rounds.deaf | self.rounds.prompted, now)
                case Send():
                    message = effect.message
                    if isinstance(message, wire.Admit) and effect.session in self._unmapped:
                        message = msgspec.structs.replace(message, outbox=False)
                    self._send(effect.session, message)
                case PassOn():
                    self._send(effect.session, effect.message, *content)
                case Say() if effect.problem:
                    self.watcher.problem(effect.text)
                case Say():
                    self.watcher.say(effect.text, effect.warning)
                case Start():
                    problem = self._data.start(effect.layout)
                    if problem is not None:
                        self.watcher.say(problem)
                case Void():
                    self._data.forget_round(())
                    self._forget_lacking()
                case Employed():
                    self._employ(effect.shard, effect.session, now)
                case Declined():
                    self._decline(effect.session)
                case Dismissed():
                    self._dismiss(effect.shard, now)
                case Spared():
                    self._spare_all(effect)
                case Retired():
                    self._retire(effect.shard, now)
                case Remove():
                    self._forget_peer(effect.session)
                case Ended():
                    self._ended_at = now
                    self._transport.publish(effect.end)
                    for session in list(self.rounds.peers):
                        self._send(session, effect.end)
        self._publish_due()

    def _publish_due(self) -> None:
        """The averages that were made, before what follows from them."""
        due = self._data.due()
        if due:
            self._transport.publish_update(due, None)
        for average in self._data.announced():
            self._transport.publish(average)

    def _close_round(self, close: wire.Close, now: float) -> None:
        self.watcher.closing(self, close)
        self._forget_lacking()
        self._say_what_is_lost()
        self._allow_mets()
        update = self._data.close(close)
        self._transport.publish_update(self._data.due(), update.messages[-1])
        for session in sorted(self.rounds.deaf):
            if self._data.keeps(close.step):
                break  # other shards have a part of it: the deaf fetch it
            route = self.routes.get(session)
            if route is not None and self._transport.waiting(route) <= FETCH_BYTES:
                self._send_update(route, update)
        self._prompt(self.rounds.prompted, now)
        self._forget_overwritten(now)
        self.closed_at = now
        compared = self._data.comparisons()
        if compared:
            self._happens(Compared(compared), now)
        self._data.forget_round(close.buckets)
        self.watcher.closed(self, close)

    def _say_what_is_lost(self) -> None:
        """Once: what a shard has left out of its averages dies with it."""
        codec, lost = self.rounds.rules.leaves_out, len(self._data.lost)
        if lost and not self._said_what_is_lost:
            self._said_what_is_lost = True
            self.watcher.say(
                f"what {codec} had left out of the averages of {lost} of {self.rounds.buckets} "
                "buckets is lost with the shard that made them, as it is each time that one dies"
            )

    def _forget_overwritten(self, now: float) -> None:
        """Report to `rounds` the oldest update that is still there. Void rounds may have written
        over all of them: then only who stands at the newest step can follow."""
        step, reach, own = self.rounds.step, self._data.reaches_back_to(), self._data.own_reach
        event = Forgotten(step if reach is None else reach, step if own is None else own)
        self._happens(event, now)

    def _forget_peer(self, session: str) -> None:
        self.doors.pop(session, None)
        self._secrets.pop(session, None)
        self._unmapped.discard(session)
        self._probed.pop(session, None)
        self.traffic.forget(session)
        self._data.forget(session)
        self._offers.pop(session, None)
        self._spared.pop(session, None)
        self._gathering.pop(session, None)
        self._forget_met(session)
        for waiting in self._lacking.values():
            waiting.discard(session)
        self._forget_sent(session)
        route = self.routes.pop(session, None)
        if route is not None:
            self._transport.forget(route)
            self.links.pop(route, None)
            self._held.release(route)

    def _prompt(self, sessions: Collection[str], now: float) -> None:
        """Send these sessions the open round on their links, before the next pulse does."""
        for session in sorted(sessions):
            self._send(session, self.rounds.pulse(now))

    def _send(self, session: str, message: wire.Message, *buffers: Any) -> bool:
        route = self.routes.get(session) or self.doors.get(session)
        return route is not None and self._transport.send(route, message, *buffers)

    def _send_update(self, route: bytes, update: Update) -> bool:
        return all(self._transport.send_kept(route, frames) for frames in update.messages)


def _same(told: str, kept: str) -> bool:
    """Compare secrets in constant time."""
    return hmac.compare_digest(told.encode(errors="replace"), kept.encode(errors="replace"))
