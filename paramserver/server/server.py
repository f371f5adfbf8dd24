"""The server: one thread, one poll loop, that carries out what `rounds` decides.

It holds no model and no optimizer: sockets, the running sums of the open round, and the last few
updates for replicas that fell behind.
"""

from __future__ import annotations

import errno
import hmac
import math
import time
import uuid
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from itertools import chain
from typing import Any, Protocol

import msgspec
import torch
import zmq

from paramserver import trace
from paramserver.errors import PeerError
from paramserver.net.link_watch import Paths
from paramserver.protocol import messages as wire
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
    Start,
    Void,
)
from paramserver.settings import Settings
from paramserver.tensors.bucket import BUCKET_MB, SENT_BYTES, Plan, plan
from paramserver.tensors.codec import fresh
from paramserver.tensors.order import name_samples, places
from paramserver.tensors.reducer import Mean, Release
from paramserver.tensors.whole import BUFFER_BYTES
from paramserver.transport import shm, sockets
from paramserver.transport.handshake import Gate

TICK_S = 0.1
PROBES_APART_S = 0.05  # at least, on PUB: all who follow hear them
PULSES_PER_TIMEOUT = 10
MESSAGES_PER_TURN = 64
FETCH_BYTES = 4 * 2**20
UNREAD_BYTES = 32 * 2**20  # of a snapshot that wait for its joiner, or these pieces
PIECES_UNREAD = 6
FAREWELLS = 3  # heartbeat timeouts that a worker has to say goodbye after the run's end


class Watcher(Protocol):
    """Who looks on: the program's display and run folder. Calls must return at once."""

    def say(self, text: str, warning: bool = False) -> None: ...
    def closing(self, close: wire.Close) -> None: ...  # nobody has been told of it yet
    def closed(self, server: Server, close: wire.Close) -> None: ...
    def reported(self, server: Server, report: wire.Report) -> None: ...
    def problem(self, text: str) -> None: ...  # something was not done that people count on
    def looked(self, server: Server, now: float) -> None: ...


class Update(msgspec.Struct):
    """One update of the log as it is sent: its averages, then its close."""

    step: int
    messages: list[list[Any]]
    bytes: int
    stamp: int
    """Of the first of its blocks in the ring, if there is one."""


class Payload(msgspec.Struct):
    """What came with a push and waits to be added."""

    buffers: list[Any]
    scale: float
    absent: tuple[int, ...]
    release: Release


class History:
    """The newest updates, at least one, at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._updates: deque[Update] = deque()
        self._bytes = 0

    def add(self, update: Update) -> None:
        self._updates.append(update)
        self._bytes += update.bytes
        while self._bytes > self._limit and len(self._updates) > 1:
            self._bytes -= self._updates.popleft().bytes

    def forget_before(self, stamp: int) -> None:
        """Blocks of the ring with a lower stamp have been written over."""
        while self._updates and self._updates[0].stamp < stamp:
            self._bytes -= self._updates.popleft().bytes

    @property
    def reaches_back_to(self) -> int | None:
        """The step from which a replica can follow; None while there is no update."""
        return self._updates[0].step - 1 if self._updates else None

    def after(self, step: int) -> list[Update]:
        """The updates that follow `step`, as many as make a reasonable answer."""
        chosen: list[Update] = []
        size = 0
        for update in self._updates:
            if update.step > step:
                if chosen and size + update.bytes > FETCH_BYTES:
                    break
                chosen.append(update)
                size += update.bytes
        return chosen


class Server:
    """A parameter server, bound to its addresses by the constructor; `run` serves until the end.

    `settings` are the run's; `to_send` is what workers get of them in the welcome. `hosts` are the
    addresses to bind, `guarded` those where only holders of `keys` get in. `observer_key` is what
    the observer that belongs to this server shows.
    `paths` are those that workers were told to take.
    `comeback`: the run's server died, having noted this step (its lineage, see `Comeback`).
    Raises `UserError` where an address cannot be bound.
    """

    def __init__(
        self,
        settings: Settings,
        to_send: dict[str, Any],
        watcher: Watcher,
        *,
        hosts: list[str],
        run: str,
        observer_key: str,
        comeback: str | None = None,
        guarded: Sequence[str] = (),
        keys: sockets.ServerKeys | None = None,
        paths: Paths | None = None,
    ) -> None:
        self.settings = settings
        self._paths = paths
        self._bucket_mb = settings.bucket_mb or BUCKET_MB
        self.run_id = run
        self.nonce = uuid.uuid4().hex
        self.watcher = watcher
        self.sent_bytes = 0
        self.received_bytes = 0
        self.first_open_at: float | None = None
        self.closed_at: float | None = None
        self.plan: Plan | None = None
        self.rounds = Rounds(
            Rules(
                num_workers=settings.num_workers,
                min_workers=settings.min_workers,
                max_workers=settings.max_workers,
                timeout=settings.timeout,
                quorum=settings.quorum,
                heartbeat_timeout=settings.heartbeat_timeout,
                join_timeout=settings.join_timeout,
                idle_timeout=settings.idle_timeout,
                deterministic=settings.deterministic,
                max_norm_ratio=settings.max_norm_ratio,
                max_bad_rounds=settings.max_bad_rounds,
                epochs=settings.num_epochs,
                observer=settings.observer,
            ),
            self.nonce,
            time.monotonic(),
            lambda layout: len(plan(layout, self._bucket_mb).buckets),
            comeback=comeback,
            name_samples=partial(name_samples, seed=settings.seed),
            places=partial(places, seed=settings.seed),
        )
        self._to_send = to_send
        self._observer_key = observer_key
        self._mean: Mean | None = None
        self._history = History(int(settings.history_mb * 2**20))
        self._averages: list[list[Any]] = []  # of the open round, as sent
        self._unpublished: list[tuple[wire.Average, list[Any]]] = []  # of those, the newest
        self._averages_bytes = 0
        self._payloads: dict[tuple[int, int], Payload] = {}
        self._shared = shm.shared_folder() if settings.shared_memory else None
        self._unmapped: set[str] = set()  # sessions whose outbox cannot be used here
        self._ring: shm.Ring | None = None
        self._round_stamp: int | None = None  # of the first block of the open round
        self._outboxes: dict[str, shm.Outbox] = {}  # by session
        self._sharing: set[str] = set()  # sessions of those who read the ring
        self._links: dict[bytes, str] = {}  # routing id -> session
        self._routes: dict[str, bytes] = {}  # session -> routing id of its link
        self._doors: dict[str, bytes] = {}
        self._secrets: dict[str, str] = {}  # by session; never sent to anybody
        self._told: set[bytes] = set()  # who was told that it sends rubbish
        self._unread = sockets.Unread()
        self._deaf_ears: set[str] = set()  # sessions of those who do not read what they ask for
        self._probed: dict[str, float] = {}  # session -> when its probe was last published
        self._stop: tuple[str, bool] | None = None  # why, and whether that is an error
        self._ended_at: float | None = None
        # Sums are bound by memory, and threads that wait for each other on shared cores cost
        # milliseconds each time.
        torch.set_num_threads(settings.threads or 1)
        self._ctx = sockets.context()
        self._gate: Gate | None = None
        self._ipc = sockets.ipc_folder()
        if self._ipc is None:
            watcher.say(
                "peers on this host use TCP and no shared memory, which is slower: no folder for "
                "temporary files (/tmp, TMPDIR) can be written"
            )
        try:
            self._gate = Gate(self._ctx, keys) if keys is not None else None
            self._bind(hosts, guarded, keys)
        except BaseException:
            self.close()
            raise

    def _bind(
        self, hosts: Sequence[str], guarded: Sequence[str], keys: sockets.ServerKeys | None
    ) -> None:
        port = self.settings.port
        bucket_bytes = int(self._bucket_mb * 2**20) + max(SENT_BYTES.values())
        largest = max(bucket_bytes, wire.HEADER_BYTES_MAX, BUFFER_BYTES) + sockets.FRAME_OVERHEAD
        self._most_unread = max(UNREAD_BYTES, PIECES_UNREAD * largest)
        routers = [sockets.tcp(h, port) for h in hosts]
        pubs = [sockets.tcp(h, port + 1) for h in hosts]
        if self._ipc is not None:
            for kind, endpoints in zip(
                sockets.ipc_endpoints(str(self._ipc.path)), (routers, pubs), strict=True
            ):
                endpoints.append(kind)
        s = self.settings
        mark = sockets.mark(s.history_mb, self._bucket_mb)
        self._router = sockets.router(self._ctx, largest)
        self._pub = sockets.publisher(self._ctx, largest, mark)
        for socket, plain, at in ((self._router, routers, port), (self._pub, pubs, port + 1)):
            closed = [sockets.tcp(h, at) for h in guarded]
            if self._gate is not None:
                self._gate.watch(socket, closed)
            sockets.bind(socket, plain, closed, keys)

    @property
    def digests(self) -> dict[str, tuple[int, str]]:
        """By peer: step and digest of its weights when it said goodbye."""
        return {name: (step, digest) for name, step, digest in self.rounds.digests.values()}

    # ------------------------------------------------------------------ the loop

    def stop(self, reason: str, *, error: bool = False) -> None:
        """Ask for an end, in order or by an `error`; safe in a signal handler."""
        self._stop = reason, error

    def run(self) -> wire.End | None:
        """Serve until the run has ended and everybody has said goodbye, or had time to; None where
        it was to go on and did not (`rounds.deserted`, `rounds.put_off`)."""
        poller = zmq.Poller()
        for s in (self._router, *(self._gate.watches if self._gate is not None else ())):
            poller.register(s, zmq.POLLIN)
        next_tick = next_pulse = 0.0
        pulse_every = self.settings.heartbeat_timeout / PULSES_PER_TIMEOUT
        while not self._finished():
            now = time.monotonic()
            due = self.rounds.next_deadline()
            limit = max(0.0, min(next_tick, due if due is not None else next_tick) - now)
            woken = poller.poll(math.ceil(1000 * limit))
            if self._gate is not None and any(s is not self._router for s, _ in woken):
                self._tell_refused(self._gate)
            for _ in range(MESSAGES_PER_TURN):
                if not sockets.readable(self._router):
                    break
                self._receive(sockets.receive(self._router))
            while self._deaf_ears:
                session = self._deaf_ears.pop()
                why = "it does not read what it asks for"
                self._carry_out(self.rounds.leave(session, why, time.monotonic()))
            now = time.monotonic()
            if now >= next_tick or (due is not None and now >= due):
                next_tick = now + TICK_S
                if self._stop is not None:
                    (reason, error), self._stop = self._stop, None
                    self._carry_out(self.rounds.stop(reason, now, error=error))
                self._carry_out(self.rounds.tick(now))
                self.watcher.looked(self, now)
            if now >= next_pulse:
                next_pulse = now + pulse_every
                self._pulse(now)
        return self.rounds.ended

    def _tell_refused(self, gate: Gate) -> None:
        for sentence in gate.refused():
            self.watcher.say(sentence, warning=True)

    def _finished(self) -> bool:
        """Has everybody who is alive said goodbye, or had the time to?"""
        if self._ended_at is None:
            return self.rounds.deserted or self.rounds.put_off
        now = time.monotonic()
        silence = self.settings.heartbeat_timeout
        farewell = {"worker": FAREWELLS * silence, "observer": self.settings.idle_timeout}
        return all(
            now - p.last_seen > silence or now - self._ended_at > farewell[p.role]
            for p in self.rounds.peers.values()
        )

    def close(self) -> None:
        """Release sockets and files; safe to call twice."""
        if self._gate is not None:
            self._gate.close()
        for name in ("_router", "_pub"):
            s = getattr(self, name, None)
            if s is not None:
                s.close(linger=1000)
        self._ctx.term()
        for folder in (self._ipc, self._shared):
            if folder is not None:
                folder.close()

    # ------------------------------------------------------------------ what comes in

    def _receive(self, frames: list[zmq.Frame]) -> None:
        """One message; whatever is wrong with it costs only its sender."""
        sender = frames[0].bytes
        self.received_bytes += sum(map(len, frames[1:]))
        now = time.monotonic()
        try:
            message, buffers = wire.from_frames(frames[1:])
            self._handle(sender, message, buffers, now)
            if self._paths is not None and isinstance(message, wire.Push):
                self._look_at_path(self._paths, sender, message, frames, now)
        except PeerError as e:
            session = self._links.get(sender)
            if sender not in self._told:
                if len(self._told) < 1000:
                    self._told.add(sender)
                peer = self.rounds.peers[session] if session else None
                who = peer.name if peer else "somebody unknown"
                if peer is None or self.rounds.may_say(peer.id, who):
                    self.watcher.say(f"{who} sent what this protocol does not allow: {e}", True)
            self._send_raw(sender, wire.Reject(f"your message was not understood: {e}"))
            if session is not None:
                self._carry_out(self.rounds.leave(session, str(e), now, error=True))

    def _look_at_path(
        self, paths: Paths, sender: bytes, push: wire.Push, frames: list[zmq.Frame], now: float
    ) -> None:
        peer = self.rounds.peers.get(self._links.get(sender, ""))
        if peer is not None:
            address, size = sockets.sender(frames[-1]), sum(map(len, frames[1:]))
            for sentence in paths.pushed(
                peer.id, peer.name, address, push.round, push.ready_s, size, now
            ):
                self.watcher.say(sentence, warning=True)

    def _handle(self, sender: bytes, message: Any, buffers: list[Any], now: float) -> None:
        if isinstance(message, wire.Hello):
            self._greet(sender, message, now)
            return
        if isinstance(message, wire.Beat):
            if self._is_from(message):
                self.rounds.seen(message.session, now)
            else:
                if message.run == self.run_id:
                    self.rounds.beats_unknown(message.nonce, now)
                self._send_raw(sender, wire.Greet(session_known=False))
            return
        if isinstance(message, wire.Probe):
            self._probe(sender, message, now)
            return
        session = self._links.get(sender)
        if session is None:
            self._send_raw(sender, wire.Greet())
            return
        r = self.rounds
        r.seen(session, now)
        match message:
            case wire.Push():
                self._push(session, message, buffers, now)
            case wire.Fetch():
                self._fetch(session, message, now)
            case wire.Join():
                self._share(session, message)
                self._carry_out(r.join(session, message, now))
            case wire.Ready():
                self._carry_out(r.ready(session, message, now))
            case wire.Unreadable():
                self._carry_out(r.unreadable(session, message.round, now))
            case wire.Unready():
                self._carry_out(r.unready(session, now, message.unfinished))
            case wire.Manifest() | wire.Want() | wire.Piece() | wire.Abort():
                if isinstance(message, wire.Want) and self._waits_for(sender) > self._most_unread:
                    return  # it may ask again when it has read what it asked for
                goal, effects = r.route(session, message, now)
                if goal is not None:
                    content = buffers[:1] if isinstance(message, wire.Piece) else ()
                    self._send(goal, message, *content)
                self._carry_out(effects)
            case wire.Digest():
                self._carry_out(r.digest(session, message.step, message.digest, now))
            case wire.Stand():
                self._carry_out(r.stands(session, message.step, now, kept=message.kept))
            case wire.Adopted():
                self._carry_out(r.adopted(session, message.snapshot, now))
            case wire.Report():
                if r.peers[session].role == "observer":
                    self.watcher.reported(self, message)
            case wire.Problem():
                if r.peers[session].role == "observer":
                    self.watcher.problem(message.text)
            case wire.Goodbye():
                said = (message.reason, now, message.step, message.digest)
                m = message
                died = partial(r.leave, failed=m.failed, lease=m.lease, error=m.error)
                self._carry_out(died(session, *said, finished=m.is_done))
            case _:
                raise PeerError(f"a {type(message).__name__} is not for the server")

    def _greet(self, sender: bytes, hello: wire.Hello, now: float) -> None:
        if self.rounds.coming_back and hello.role == "worker" and hello.run is None:
            self._send_raw(sender, wire.Later(self.rounds.phase(now)))
            return  # first comes who holds the run
        refuse, end = "", None
        if hello.protocol != wire.PROTOCOL:
            refuse = f"this server speaks protocol {wire.PROTOCOL}, you speak {hello.protocol}"
        elif self.rounds.ended is not None:
            refuse, end = f"the run has ended: {self.rounds.ended.reason}", self.rounds.ended
        elif hello.role not in ("worker", "observer"):
            refuse = f"there is no role {hello.role!r}"
        elif hello.role == "observer" and not _same(hello.key, self._observer_key):
            refuse = "only the observer that this server started may observe"
        elif hello.run is not None and hello.run != self.run_id:
            refuse = f"this server runs {self.run_id}, you belong to {hello.run}"
        elif self._is_anothers(hello):
            refuse = "another process has greeted with this nonce"
        if refuse:
            self._send_raw(sender, wire.Reject(refuse, end=end))
            return
        known = next((s for s, d in self._doors.items() if d == sender), None)
        session = known or uuid.uuid4().hex
        if known is None or known not in self.rounds.peers:
            peer, why, effects = self.rounds.greet(
                session,
                now,
                role=hello.role,
                id=hello.id,
                nonce=hello.nonce,
                host=hello.host,
                pid=hello.pid,
                returns=hello.run == self.run_id,
                reachable=self._reachable,
            )
            self._carry_out(effects)
            if peer is None:
                self._send_raw(sender, wire.Reject(why, "choose another: make worker ID=..."))
                return
            self._doors[session] = sender
            self._secrets[session] = hello.secret
        welcome = wire.Welcome(
            protocol=wire.PROTOCOL,
            run=self.run_id,
            nonce=self.nonce,
            session=session,
            id=self.rounds.peers[session].id,
            settings=self._to_send,
            pub_port=self.settings.port + 1,
            ipc=None if self._ipc is None else str(self._ipc.path),
            shared=None if self._shared is None else str(self._shared.path),
        )
        self._send_raw(sender, welcome)

    def _probe(self, sender: bytes, probe: wire.Probe, now: float) -> None:
        """Bind a link to its session, and let the peer see that both ways work."""
        if not self._is_from(probe):
            self._send_raw(sender, wire.Greet(session_known=False))
            return
        old = self._routes.get(probe.session)
        self._links[sender] = probe.session
        self._routes[probe.session] = sender
        if old is not None and old != sender:
            self._links.pop(old, None)
            self._carry_out(self.rounds.relinked(probe.session, now))
        self.rounds.seen(probe.session, now)
        if now - self._probed.get(probe.session, -math.inf) >= PROBES_APART_S:
            self._probed[probe.session] = now
            self._publish(wire.Probe(session=probe.session))  # its secret is nothing to the others
        self._send(probe.session, self.rounds.pulse(now))
        if self.rounds.ended is not None:
            self._send(probe.session, self.rounds.ended)

    def _is_from(self, message: wire.Probe | wire.Beat) -> bool:
        """Does it come from the peer of this session? Others may know the session's id."""
        return message.session in self.rounds.peers and _same(
            message.secret, self._secrets.get(message.session, "")
        )

    def _is_anothers(self, hello: wire.Hello) -> bool:
        """Is there a peer of this nonce, which came with another secret?"""
        return any(
            peer.nonce == hello.nonce and not _same(hello.secret, self._secrets.get(session, ""))
            for session, peer in self.rounds.peers.items()
        )

    def _reachable(self, session: str) -> bool:
        """Does this peer's connection still stand? ZeroMQ knows when it was closed."""
        route = self._routes.get(session) or self._doors.get(session)
        return route is not None and self._send_raw(route, self.rounds.pulse(time.monotonic()))

    def _share(self, session: str, join: wire.Join) -> None:
        """A peer on this host: its outbox, and whether it reads the ring."""
        self._outboxes.pop(session, None)
        self._sharing.discard(session)
        self._unmapped.discard(session)
        if self._shared is None:
            return
        if join.sharing:
            self._sharing.add(session)
        if join.outbox:
            path = shm.outbox_path(self._shared.path, session, join.outbox)
            try:
                self._outboxes[session] = shm.Outbox(path)
                path.unlink()  # both have it mapped; nothing is left when they end
            except FileNotFoundError:
                pass  # the worker has joined again meanwhile: that comes next
            except ValueError as e:
                raise PeerError(f"your outbox cannot be used: {e}") from None
            except OSError as e:
                self._unmapped.add(session)  # its Admit will tell
                self.watcher.say(
                    f"{self.rounds.peers[session].name} sends through the socket, which is slower: "
                    f"its shared memory cannot be used: {e.strerror or e}"
                )

    def _push(self, session: str, push: wire.Push, buffers: list[Any], now: float) -> None:
        worker = self.rounds.peers[session].id
        with trace.span(f"bucket of worker {worker}", bucket=push.bucket, round=push.round):
            self._take_push(session, push, buffers, now)

    def _take_push(self, session: str, push: wire.Push, buffers: list[Any], now: float) -> None:
        outbox = self._outboxes.get(session)
        if push.places:
            if outbox is None:
                raise PeerError("you have no outbox")
            try:
                buffers = [outbox.buffer(place) for place in push.places]
            except ValueError as e:
                raise PeerError(str(e)) from None
            self.received_bytes += sum(place[1] for place in push.places)
        release = partial(_free, outbox, push.places)
        why = self.rounds.refusal(session, push)
        if why is not None:
            release()
            self._send(session, wire.Refused(round=push.round, reason=why))
            return
        assert self._mean is not None
        bad, norm = self._mean.check(push.bucket, buffers, push.scale, push.absent)
        if bad is None and norm is not None:
            bad = self.rounds.norms.judge(push.bucket, norm)
        if bad is None:
            worker = self.rounds.peers[session].id
            self._payloads[worker, push.bucket] = Payload(buffers, push.scale, push.absent, release)
        else:
            release()
        self._carry_out(self.rounds.pushed(session, push, now, bad))

    def _fetch(self, session: str, fetch: wire.Fetch, now: float) -> None:
        self._forget_overwritten()
        if not self.rounds.knows(fetch.step, fetch.lineage):
            self._carry_out(self.rounds.behind(session, now))
            return
        self.rounds.fetches(session)
        route = self._routes[session]
        if self._waits_for(route) > FETCH_BYTES:
            return  # an answer is on its way, or lies there unread
        for update in self._history.after(fetch.step):
            for frames in update.messages:
                if not self._send_frames(route, frames, own=self._ring is None):
                    return
        self._send(session, wire.Fetched(step=self.rounds.step, open=self.rounds.open_message()))

    # ------------------------------------------------------------------ what goes out

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Add():
                    assert self._mean is not None
                    p = self._payloads.pop((effect.worker, effect.bucket))
                    self._mean.add(
                        effect.bucket,
                        p.buffers,
                        p.scale,
                        effect.samples,
                        p.release,
                        effect.worker,
                        p.absent,
                    )
                case Finish():
                    self._finish(effect)
                case Closed():
                    self._close_round(effect.close)
                case Publish():
                    if isinstance(effect.message, wire.Open) and self.first_open_at is None:
                        self.first_open_at = time.monotonic()
                    self._publish(effect.message)
                    if isinstance(effect.message, wire.Open):
                        self._prompt(self.rounds.deaf | self.rounds.prompted)
                case Send():
                    message = effect.message
                    if isinstance(message, wire.Admit) and effect.session in self._unmapped:
                        message = msgspec.structs.replace(message, outbox=False)
                    self._send(effect.session, message)
                case Say():
                    self.watcher.say(effect.text, effect.warning)
                case Start():
                    self.plan = plan(effect.layout, self._bucket_mb)
                    s = self.settings
                    self._ring = self._make_ring(self.plan)
                    room = fresh if self._ring is None else self._room
                    down = s.codec_down or s.codec
                    self._mean = Mean(self.plan, s.codec, down, s.topk_ratio, room)
                case Void():
                    self._forget_round(())
                case Remove():
                    self._forget_peer(effect.session)
                case Ended():
                    self._ended_at = time.monotonic()
                    self._publish(effect.end)
                    for session in list(self.rounds.peers):
                        self._send(session, effect.end)
        self._publish_averages()

    def _finish(self, effect: Finish) -> None:
        assert self._mean is not None
        with trace.span("average", bucket=effect.bucket):
            buffers, scale, absent = self._mean.finish(effect.bucket, effect.samples, effect.absent)
        average = wire.Average(
            nonce=self.nonce,
            round=effect.round,
            step=effect.step,
            bucket=effect.bucket,
            absent=absent,
            scale=scale,
        )
        frames = wire.to_frames(average, *buffers)
        self._averages.append(frames)
        self._averages_bytes += sum(map(len, frames))
        self._unpublished.append((average, frames))

    def _publish_averages(self, *closing: list[Any]) -> None:
        """The averages that are due, to those who share the ring and to those who do not; what
        closes their round travels with them."""
        due, self._unpublished = self._unpublished, []
        if not due:
            for frames in closing:
                self._publish_frames(frames)
            return
        messages = [*(frames for _, frames in due), *closing]
        sharing = len(self._sharing) if self._ring is not None else 0
        others = len(self._routes) - sharing
        if self._ring is not None and sharing:
            headers = [
                wire.to_frames(
                    wire.Shared(
                        places=tuple(map(self._ring.place, frames[1:])),
                        **msgspec.structs.asdict(average),
                    )
                )
                for average, frames in due
            ]
            sockets.send(self._pub, wire.join([*headers, *closing]))
        if others > 0 or not sharing:
            sockets.send(self._pub, wire.join(messages), copy=self._ring is not None)
        self.sent_bytes += sum(map(len, chain(*messages))) * (sharing + max(0, others))

    def _make_ring(self, plan: Plan) -> shm.Ring | None:
        """Shared memory for the history, of which the open round takes the oldest, and for two
        updates at least."""
        if self._shared is None:
            return None
        update = plan.nbytes + 2 * shm.ALIGN * (len(plan.buckets) + wire.BUFFERS_MAX)
        kept = max(int(self.settings.history_mb * 2**20), 2 * update)
        whole = (min(b.nbytes, BUFFER_BYTES) for b in plan.buckets if b.kind == "whole")
        open_round = 4 * max([plan.largest_bytes, *whole])
        path = self._shared.path / "ring"
        room = shm.room(self._shared.path) // 2  # the rest is for the workers' outboxes
        size = min(kept + open_round, room)
        least = min(kept, shm.RING_UPDATES * update) + open_round
        try:
            path.unlink(missing_ok=True)
            if size < least:
                raise OSError(
                    errno.ENOSPC, f"{room >> 20} MiB may be taken, {-(-least >> 20)} are needed"
                )
            return shm.Ring(path, size)
        except OSError as e:
            self.watcher.say(
                f"averages go through sockets on this host, which is slower: {shm.SHARED}: "
                f"{e.strerror or e} (in docker: --shm-size=1g)"
            )
            return None

    def _room(self, nbytes: int) -> torch.Tensor:
        assert self._ring is not None
        block = self._ring.room(nbytes)
        if self._round_stamp is None:
            self._round_stamp = self._ring.newest
        return block

    def _forget_overwritten(self) -> None:
        """Let history and rounds know how far back updates are really there."""
        if self._ring is not None:
            self._history.forget_before(self._ring.oldest)
        reach = self._history.reaches_back_to
        if reach is not None:
            self.rounds.forget_before(reach)

    def _close_round(self, close: wire.Close) -> None:
        self.watcher.closing(close)
        frames = wire.to_frames(close)
        self._publish_averages(frames)
        self._history.add(
            Update(
                step=close.step,
                messages=[*self._averages, frames],
                bytes=self._averages_bytes + len(frames[0]),
                stamp=self._round_stamp or 0,
            )
        )
        for session in self.rounds.deaf:
            route = self._routes.get(session)
            if route is not None and self._waits_for(route) <= FETCH_BYTES:
                for message in (*self._averages, frames):
                    self._send_frames(route, message, own=self._ring is None)
        self._prompt(self.rounds.prompted)
        self._forget_overwritten()
        self.closed_at = time.monotonic()
        self._forget_round(close.buckets)
        self.watcher.closed(self, close)

    def _forget_round(self, averaged: tuple[int, ...]) -> None:
        self._averages, self._averages_bytes = [], 0
        self._round_stamp = None
        for p in self._payloads.values():
            p.release()
        self._payloads.clear()
        if self._mean is not None:
            self._mean.close(averaged)

    def _forget_peer(self, session: str) -> None:
        self._doors.pop(session, None)
        self._secrets.pop(session, None)
        self._outboxes.pop(session, None)
        self._sharing.discard(session)
        self._unmapped.discard(session)
        self._probed.pop(session, None)
        route = self._routes.pop(session, None)
        if route is not None:
            self._unread.forget(route)
            self._links.pop(route, None)

    def _pulse(self, now: float) -> None:
        pulse = msgspec.structs.replace(
            self.rounds.pulse(now),
            sent_bytes=self.sent_bytes,
            received_bytes=self.received_bytes,
        )
        self._publish(pulse)
        for session in list(self._routes):
            self._send(session, pulse)
            if self.rounds.ended is not None:  # it may have been out when that was told
                self._send(session, self.rounds.ended)

    def _prompt(self, sessions: Collection[str]) -> None:
        """Tell these on their links that a round is open, as the next pulse would."""
        for session in sessions:
            self._send(session, self.rounds.pulse(time.monotonic()))

    def _publish(self, message: wire.Message) -> None:
        self._publish_frames(wire.to_frames(message))

    def _publish_frames(self, frames: list[Any]) -> None:
        sockets.send(self._pub, frames, copy=len(frames) == 1)
        self.sent_bytes += sum(map(len, frames)) * len(self._routes)

    def _send(self, session: str, message: wire.Message, *buffers: Any) -> None:
        route = self._routes.get(session) or self._doors.get(session)
        if route is not None:
            self._send_frames(route, wire.to_frames(message, *buffers))

    def _send_raw(self, route: bytes, message: wire.Message) -> bool:
        return self._send_frames(route, wire.to_frames(message))

    def _waits_for(self, route: bytes) -> int:
        """Bytes of large frames that wait here for the peer at the other end of this route."""
        return self._unread.waiting(route)

    def _send_frames(self, route: bytes, frames: list[Any], own: bool = True) -> bool:
        """False when that peer is gone; what becomes of it is decided by its silence. One that has
        asked for thousands of messages and reads none is let go. `own`: see `sockets.Unread`."""
        try:
            if len(frames) == 1:
                sockets.send(self._router, [route, *frames], wait=False)
            else:
                self._unread.send(self._router, route, frames, own=own)
        except zmq.ZMQError as e:
            if e.errno == errno.EAGAIN and route in self._links:
                self._deaf_ears.add(self._links[route])
            if e.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        self.sent_bytes += sum(map(len, frames))
        return True


def _same(told: str, kept: str) -> bool:
    """Compare secrets in a time that tells nothing of them."""
    return hmac.compare_digest(told.encode(errors="replace"), kept.encode(errors="replace"))


def _free(outbox: shm.Outbox | None, places: tuple[wire.Place, ...]) -> None:
    """Nothing reads these slots any more. The outbox is the one that they lie in: a worker that has
    joined again meanwhile has another."""
    if outbox is not None:
        for _, _, slot in places:
            outbox.free(slot)
