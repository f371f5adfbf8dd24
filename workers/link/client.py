"""A replica at its connection: follows the log, pushes, gives and takes snapshots.

The mirror of `paramserver.server.server`: what to do with a message is decided by
`workers.link.session`, here it is carried out, in the thread of the training loop, inside `poll`
and `wait`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
import torch
import zmq

from paramserver import trace
from paramserver.errors import PeerError, RunLost, UserError
from paramserver.net.address import Address
from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import WINDOW
from paramserver.protocol.sharding import SERVER
from paramserver.settings import RunSettings
from paramserver.transport import shm, sockets
from paramserver.words import host_port

from ..replica.replica import Replica
from ..replica.state import unflatten
from . import actions
from .channel import Lost
from .connection import Connection, RunOver
from .follow import Follow
from .pushes import WAIT_S, Pushes
from .session import Session
from .snapshot import Giving, Taking, most_bytes

SAY_WAITING_AFTER_S = 3.0
OUTBOX_LOOK_S = 0.0001
SPIN_S = 0.006
SPIN_BYTES = 2**24  # of a model: to wake up is a small part of the exchange of a larger one
WINDOW_OF_SHARD = shm.OUTBOX_SLOTS  # buckets under way to each of several shards


class Client:
    """One replica and its server. Call `connect`, then `join`, then the rest.

    Waits raise `RunLost` when the server was silent past the run's idle timeout, and `UserError`
    when it refuses this peer.
    """

    def __init__(self, host: str, port: int, **options: Any) -> None:
        """`options` are those of `Connection`."""
        self.connection = Connection(host, port, **options)
        self.replica: Replica | None = None
        self.session: Session | None = None
        self.device = "cpu"
        self.on_close: Callable[[wire.Close], None] | None = None
        """Called after each applied update."""
        self.on_missed: Callable[[wire.Close], None] | None = None
        """If set before `join`, this replica may go adrift (see `Session`); it is called for each
        update that it misses then."""
        self.first = False
        """This replica's weights are to be the first ones of the run."""
        self.compares = True  # there are others, whose data set must be the same
        self.rest_s = 0.0
        """How long `wait` leaves messages lying where nobody waits for this replica: a batch of
        updates costs less than as many single ones, here and to whoever shares the processor."""
        self._slept_s = math.inf  # until something came, the last time
        self._may_spin = False
        self.waited_s = 0.0
        """Seconds spent in `wait`, without those in which updates were applied."""
        self._applied_s = 0.0  # seconds in which updates were applied
        outbox_of = self.connection.shards.outbox
        self._pushes = Pushes(owner_of=self._owner, outbox_of=outbox_of)
        self._outboxes = 0
        self._ring: shm.Ring | None = None
        self._slower: set[str] = set()  # what was said to go through sockets
        self._left = False  # goodbye was said

    # ------------------------------------------------------------------ its connection

    @property
    def host(self) -> str:
        return self.connection.host

    @property
    def port(self) -> int:
        return self.connection.port

    @property
    def welcome(self) -> wire.Welcome | None:
        """The server's last welcome."""
        return self.connection.welcome

    @property
    def settings(self) -> RunSettings:
        """The run's settings in that welcome."""
        return self.connection.settings

    @property
    def greetings(self) -> int:
        """How often this peer was welcomed: a wait for a round of an earlier time is void."""
        return self.connection.greetings

    @property
    def abandoned(self) -> threading.Event:
        """Set by another thread: do not go on connecting and joining."""
        return self.connection.abandoned

    @property
    def log(self) -> logging.Logger:
        """Gets sentences for a person."""
        return self.connection.log

    def connect(self, deadline_s: float) -> wire.Welcome:
        """See `Connection.connect`."""
        return self.connection.connect(deadline_s)

    def renew(self, outside: Address) -> None:
        """See `Connection.renew`."""
        self.connection.renew(outside)

    def close(self) -> None:
        """Close every socket; safe to call twice."""
        self._let_go()
        self.connection.close()

    def _let_go(self) -> None:
        """Let go of the memory that is shared with the server."""
        self._pushes.without_outbox()
        self._ring = None

    # ------------------------------------------------------------------ coming

    def join(self, replica: Replica) -> str:
        """Stand where the log stands: as its origin, by following, or by a snapshot.

        Returns how: origin, follow or adopt.
        """
        self.replica = replica
        role, drifts = self.connection.hello.role, self.on_missed is not None
        session = self.session = Session(replica, role, drifts=drifts)
        self._greeted()
        self._wait_for_admission()
        if self.abandoned.is_set() and not session.joined:
            raise RunLost("the run was over before this replica could join")
        if session.ended is not None and not session.joined:
            raise RunLost(f"the run ended before this replica could join: {session.ended.reason}")
        return "" if session.admit is None else session.admit.action

    def _greeted(self) -> None:
        """The server has welcomed this peer: report where the replica stands."""
        session, welcome = self.session, self.welcome
        assert session is not None and welcome is not None
        self.connection.payloads.greeted()
        self._do(
            session.greeted(
                welcome.nonce,
                time.monotonic(),
                timeout_s=self.settings.heartbeat_timeout,
                digest_steps=self.settings.digest_steps,
                run=welcome.run,
            )
        )

    def _wait_for_admission(self) -> None:
        session, connection = self.session, self.connection
        assert session is not None
        self.wait(
            lambda: (
                session.joined
                or session.ended
                or connection.must_greet
                or connection.abandoned.is_set()
            ),
            "to be admitted",
        )

    def _greet_again(self) -> None:
        """The server does not know this session any more: it was silent for too long, or is a new
        one. Say hello again, and stand where the log stands."""
        connection, session = self.connection, self.session
        assert connection.welcome is not None and session is not None
        silent_s = time.monotonic() - session.follow.heard_at
        if silent_s > session.SILENT_TIMEOUTS * connection.heartbeat_timeout:
            self.log.info(f"the server has been silent for {silent_s:.0f} s: greeting it again")
        elif not connection.server_search.moved:
            self.log.info("the server does not know this worker any more: greeting it again")
        self._let_go()
        connection.close_sockets()
        connection.must_greet = False  # the thread that sets it has ended
        hello = connection.hello
        own = connection.welcome.id if hello.role == "worker" else None  # leases carry it
        connection.hello = msgspec.structs.replace(hello, run=connection.run, id=own)
        session.unknown()
        try:
            connection.connect(connection.give_up_s, session.replica.step)
        except RunOver as e:
            session.follow.end = e.end
            self._do(session.stay_behind())
            return
        except UserError as e:
            raise RunLost(e.problem, e.hint) from None
        self._greeted()
        self._wait_for_admission()

    def _send_join(self) -> None:
        replica, connection = self.replica, self.connection
        assert replica is not None
        if connection.hello.role == "worker":
            connection.shards.slot_bytes = replica.plan.largest_bytes
            self._may_spin = replica.plan.nbytes <= SPIN_BYTES
        connection.relays.plan = replica.plan
        connection.relays.stop()
        outbox = self._make_outbox()
        self._pushes.begin(outbox, self._window())
        connection.send(
            wire.Join(
                layout=replica.layout,
                step=replica.step,
                lineage=replica.lineage,
                device=self.device,
                kind=replica.kind(),
                recipe=replica.recipe(),
                ledger=replica.ledger,
                sharing=connection.shared is not None,
                outbox=0 if outbox is None else self._outboxes,
                first=self.first,
            )
        )

    def _window(self) -> int:
        """Buckets under way. A worker that goes on computing looks at averages between its steps
        only: so many that all have left when half of these are made. Each shard is to have a push
        that it averages, and others on their way."""
        steps, replica = self.settings.local_steps, self.replica
        usual = max(WINDOW, WINDOW_OF_SHARD * self.shards)
        if not self.settings.overlap or not isinstance(steps, int) or replica is None:
            return usual
        return max(usual, math.ceil(2 * len(replica.plan.buckets) / steps))

    def _make_outbox(self) -> shm.Outbox | None:
        """Shared memory for pushes, for a server on this host; None: pushes go through the
        socket."""
        shared = self.connection.shared
        if shared is None or self.connection.hello.role != "worker":
            return None
        assert self.welcome is not None and self.replica is not None
        session, number = self.welcome.session, self._outboxes
        shm.outbox_path(shared, session, number).unlink(missing_ok=True)
        self._outboxes += 1
        path = shm.outbox_path(shared, session, self._outboxes)
        slot_bytes = self.replica.plan.largest_bytes
        try:
            shm.check(shm.outbox_bytes(slot_bytes), shared)
            return shm.Outbox(path, slot_bytes)
        except OSError as e:
            self._say_slower("gradients", e)
            return None

    def _hear(self, admit: wire.Admit) -> None:
        """The server admits this peer: receive its averages."""
        session = self.session
        assert session is not None
        if not admit.outbox:
            self._pushes.without_outbox()
        if self._hear_averages():
            self._do(session.admitted(admit, time.monotonic()))
        else:
            self._do(session.join_again())

    def _hear_averages(self) -> bool:
        """Receive averages from the server's ring, if it shares one with us, or through SUB. False
        where the ring cannot be used: then this peer must join again without it, because the server
        sends it nothing through SUB."""
        connection = self.connection
        assert connection.sub is not None
        ring = None if connection.shared is None else shm.ring_path(connection.shared)
        self._ring = None
        if ring is not None and ring.exists():
            try:
                self._ring = shm.Ring(ring)
            except OSError as e:
                self._say_slower("averages", e)
                connection.shared = None
                return False
            sockets.subscribe(connection.sub, wire.topic(wire.Shared))
        else:
            connection.payloads.hear()
        return True

    def _say_slower(self, what: str, error: OSError) -> None:
        """Log, once, that shared memory is not available."""
        if what not in self._slower:
            self._slower.add(what)
            reason = error.strerror or str(error)
            self.log.info(f"{what} go through a socket, which is slower: {shm.SHARED}: {reason}")

    @property
    def ring_mb(self) -> float:
        """MiB of updates in the server's ring; infinity where this replica does not read one."""
        return math.inf if self._ring is None else self._ring.nbytes / 2**20

    # ------------------------------------------------------------------ where it stands

    @property
    def follow(self) -> Follow | None:
        """Its place in the log; another one after each greeting."""
        return None if self.session is None else self.session.follow

    @property
    def ended(self) -> wire.End | None:
        """The run's end, once every update before it is applied (or cannot be had any more)."""
        return None if self.session is None else self.session.ended

    @property
    def left_behind(self) -> bool:
        """Has the run ended with a state that this replica does not hold, and cannot get?"""
        return self.session is not None and self.session.left_behind

    @property
    def follows(self) -> bool:
        """Is this replica in its place, neither adrift nor waiting for a snapshot?"""
        return self.session is not None and self.session.joined

    @property
    def at_last_step(self) -> bool:
        """The run is ending, and this replica stands at its last step: time to keep it."""
        return self.session is not None and self.session.at_last_step

    # ------------------------------------------------------------------ taking part

    def ready(self, ready: wire.Ready) -> None:
        """Ask for such leases, now and after every greeting; or, with `own`, take part with samples
        of this worker's own."""
        assert self.session is not None
        self._do(self.session.ready(ready))

    def unready(self, unfinished: bool = False) -> None:
        """Ask for no more leases; `unfinished`: in the middle of one."""
        if self.session is not None:
            self.session.unready()
        if self.connection.link is not None and self.ended is None:
            self.connection.send(wire.Unready(unfinished=unfinished))

    @property
    def shards(self) -> int:
        """The number of processes that average in the open round."""
        current = None if self.follow is None else self.follow.open
        return 1 if current is None else max(1, len(current.shards))

    def evaluating(self, on: bool) -> None:
        """This worker evaluates, and the others wait for it; or it is done with that."""
        if self.session is not None and self.ended is None:
            self._do(self.session.evaluating(on))

    def stop(self, reason: str) -> None:
        """Ask the server to end the run, in order, for all."""
        if self.session is not None and self.ended is None:
            self._do(self.session.stop(reason))

    def room(self, bucket: int, nbytes: int) -> torch.Tensor:
        """Memory for a bucket on its way to the server or to a shard, uint8 [nbytes]."""
        return self._pushes.room(bucket, nbytes)

    def _owner(self, bucket: int) -> int:
        """The shard that averages this bucket in the open round."""
        if self.replica is None or self.follow is None:
            return SERVER
        return self.connection.shards.owner(self.replica.plan, self.follow.open, bucket)

    def push(self, push: wire.Push, buffers: list[Any]) -> None:
        """Send one bucket, now or in its turn; the buffers are not the caller's from now on."""
        assert self.session is not None
        now = time.monotonic()
        self.session.took_part = True
        if self.connection.kind == "tcp":
            push = msgspec.structs.replace(push, ready_s=now)
        self._pushes.window = self._window()
        self._pushes.add(push, buffers, now)
        self._send_due(now)

    def await_room(self) -> None:
        """Another bucket of this round is to be pushed: let it find a slot that is free, if one is
        soon, and take in what comes meanwhile."""
        if not self._pushes.full:
            return
        deadline = time.monotonic() + WAIT_S
        while self._pushes.full:
            if time.monotonic() > deadline:
                self._pushes.waited_in_vain()
                return
            self.abandoned.wait(OUTBOX_LOOK_S)
            self.poll()

    def hurry(self) -> None:
        """The round of the pushes went on without them, and they may enter a later one: send what
        has not left."""
        self._pushes.hurry()
        self._send_due(time.monotonic())

    def settled(self) -> None:
        """The round of the pushes is over: what has not been sent is forgotten."""
        self._pushes.forget()

    def _send_due(self, now: float) -> None:
        for push, buffers in self._pushes.due(now):
            with trace.span("send", bucket=push.bucket):
                if push.shard:
                    self.connection.shards.push(push, buffers)
                else:
                    self.connection.payloads.push(push, buffers)

    def report(self, step: int, values: dict[str, float | None], final: bool = False) -> None:
        self.connection.send(wire.Report(step=step, values=values, final=final))

    def problem(self, text: str) -> None:
        """Report to the server, which shows it, what this replica could not do."""
        sendable = text.encode(errors="replace").decode()  # the name of a file may be any bytes
        self.connection.send(wire.Problem(sendable[: wire.PROBLEM_CHARS]))

    def kept(self) -> None:
        """This step's files are on disk, or cannot be written: the run may end."""
        assert self.session is not None
        self._do(self.session.kept())

    def unreadable(self, round: int) -> None:
        """Report that no sample of the lease in this round can be read."""
        self.connection.send(wire.Unreadable(round=round))

    def next_lease(self, round: int) -> None:
        """Report that all steps with the lease that goes on in this round are made."""
        self.connection.send(wire.NextLease(round=round))

    def goodbye(self, goodbye: wire.Goodbye) -> None:
        """Send the first `goodbye`, with the step and the digest of the weights added. A probe goes
        before it: where the link was made anew since, the server would not know who leaves."""
        link = self.connection.link
        if link is None or self._left:
            return
        self._left = True
        digest, step = "", 0
        if self.replica is not None and self.follows:
            digest, step = self.replica.digest(), self.replica.step
        with contextlib.suppress(UserError):  # the server does not admit this peer any more
            self.connection.probe()
            self.connection.send(msgspec.structs.replace(goodbye, step=step, digest=digest))
        link.linger = 2000

    def catch_up(self) -> None:
        """Take a snapshot after having been adrift."""
        if self.session is not None:
            self._do(self.session.catch_up())

    # ------------------------------------------------------------------ the loop

    def poll(self) -> None:
        """Take in averages that have come, without waiting: for the hooks, in the middle of
        backward. Other messages wait, because no update may be applied now."""
        session = self.session
        assert session is not None
        while session.hears and self._has_next():
            if not isinstance(session.held[0][0], wire.Average | wire.Pulse | wire.Closing):
                break
            self._do(session.next(time.monotonic()))
        self._send_due(time.monotonic())

    def wait(self, done: Callable[[], Any], what: str, timeout_s: float | None = None) -> bool:
        """Handle messages, applying updates, until `done()`; False if `timeout_s` passed first.

        Logs from time to time that it waits for `what` (empty: only what is unusual), and what the
        server is doing. Raises `RunLost` when the server is silent for longer than the run's idle
        timeout, or does not take this peer any more.
        """
        start, applied_s = time.monotonic(), self._applied_s
        try:
            return self._wait(done, what, timeout_s, start)
        finally:
            self.waited_s += time.monotonic() - start - (self._applied_s - applied_s)

    def _wait(
        self, done: Callable[[], Any], what: str, timeout_s: float | None, start: float
    ) -> bool:
        connection, session = self.connection, self.session
        assert session is not None
        say_at = start + SAY_WAITING_AFTER_S
        said = ""
        while not done():
            if connection.must_greet and not connection.abandoned.is_set():
                self._look_for_end()
                if session.follow.end is not None:  # the run is over: do not greet again
                    connection.must_greet = False
                    self._do(session.stay_behind())
                    continue
                self._greet_again()
                continue  # the run may be over, and the connection with it
            if self._handle_one():
                continue
            now = time.monotonic()
            limit = 0.25
            if timeout_s is not None:
                limit = min(limit, timeout_s - (now - start))
                if limit <= 0:
                    return False
            self._sleep(limit)
            now = time.monotonic()
            self._tick(now)
            if now > say_at:
                text = self._waiting_for(what, now)
                same = re.sub(r"\d+", "", text)  # rounds and seconds are counted
                if same not in ("", said):
                    self.log.info(text)
                said, say_at = same, now + SAY_WAITING_AFTER_S
        return True

    def look(self) -> None:
        """Handle what has come, without waiting: between two steps."""
        if self.connection.must_greet:
            self.wait(lambda: False, "", timeout_s=0)
        while self._handle_one():
            pass
        self._tick(time.monotonic())

    def _look_for_end(self) -> None:
        """Read what has come, before the connections are made anew. Who stood in a long step may
        have missed the server's last words: a server that has ended answers no greeting."""
        session = self.session
        assert session is not None
        arrived = [message for _, message in self.connection.drain()]
        for message in [*(message for message, _ in session.held), *arrived]:
            if isinstance(message, wire.End):
                session.follow.ended(message)

    def _waiting_for(self, what: str, now: float) -> str:
        assert self.session is not None
        f = self.session.follow
        text = f"waiting {what}" if what else ""
        if now - f.heard_at > self.connection.heartbeat_timeout / 2:
            return f"{text or 'waiting'}: the server is silent"
        if f.trains and self._gets_no_share():
            return f"{text}: the others are sooner done without this worker, which is tried again"
        if f.trains or not f.phase:
            return text
        return f"{text or 'the server is'}: {f.phase}"

    def _gets_no_share(self) -> bool:
        assert self.session is not None and self.welcome is not None
        by_speed = self.welcome.settings.get("shares") == "speed"
        return by_speed and self.session.without_samples(self.welcome.id)

    def _tick(self, now: float) -> None:
        self._send_due(now)
        session, connection = self.session, self.connection
        assert session is not None
        connection.payloads.tick(now)
        connection.shards.tick(now, session.follow.makers)
        connection.relays.tick()
        if now - session.follow.heard_at <= connection.heartbeat_timeout / 2:
            connection.server_search.over()
        elif connection.server_search.found(now):
            connection.must_greet = True
            return
        self._do(session.tick(now))

    def _silent(self, seconds: float) -> None:
        connection = self.connection
        assert self.session is not None
        if connection.handshake is not None:
            connection.handshake.check()  # it may have been started again, with other keys
        if seconds > connection.give_up_s:
            raise RunLost(
                f"the server at {host_port(self.host, self.port)} has been silent for "
                f"{seconds:.0f} s; last step here: {self.session.replica.step}"
            )

    def _handle_one(self) -> bool:
        """Handle one message, if there is one."""
        connection, session = self.connection, self.session
        assert connection.link is not None and session is not None
        if session.hears and self._has_next():
            self._do(session.next(time.monotonic()))
            return True
        if not sockets.readable(connection.link):
            return False
        message, buffers = connection.decode(sockets.receive(connection.link))
        if isinstance(message, wire.Channel) and message.shard:
            connection.shards.told(message, time.monotonic())
            return True
        if isinstance(message, wire.Channel):
            connection.payloads.told(message, time.monotonic())
            return True
        if isinstance(message, wire.Carry):
            connection.shards.carry()
            return True
        if isinstance(message, wire.HandOn):
            connection.relays.hand_on(message)
            return True
        if isinstance(message, wire.Listen):
            connection.relays.listen(message)
            return True
        self._do(session.received(message, buffers, time.monotonic()))
        return True

    def _has_next(self) -> bool:
        """Is the first message of `held` here as a whole? The numbers of averages may still be on
        their way through channels, one faster than the other."""
        session = self.session
        assert session is not None
        while not self._complete():
            if not (session.reads_on and self._read_sub()):
                return False
        return True

    def _complete(self) -> bool:
        session = self.session
        assert session is not None
        asked: set[int] = set()  # shards: what comes through one channel comes in order
        for place in range(session.may_be_next):
            message, payload = session.held[place]
            if isinstance(message, wire.Sealed | wire.Sharded) and not payload:
                shard = message.shard if isinstance(message, wire.Sharded) else SERVER
                if shard in asked:
                    continue
                asked.add(shard)
                if session.wants(message):
                    payload = self._payload(message)
                    if payload is None:
                        continue
            session.goes_first(place, payload)
            return True
        return False

    def _payload(self, average: wire.Sealed | wire.Sharded) -> Any:
        """What has come of an average; None: it is on its way. Empty: it does not come. What a
        relay is to bring may come from its maker, too: when it began, or ends."""
        connection, now = self.connection, time.monotonic()
        relayed = connection.relays.payload(average)
        if relayed is not None:
            return relayed
        patient = connection.relays.brings(average)
        try:
            if isinstance(average, wire.Sharded):
                return connection.shards.payload(average, now, patient=patient)
            return connection.payloads.payload(average, now, patient=patient)
        except Lost:
            return None if patient else []

    def _read_sub(self) -> bool:
        connection, session = self.connection, self.session
        assert connection.sub is not None and session is not None
        if not sockets.readable(connection.sub):
            return False
        for frames in wire.split(sockets.receive(connection.sub)):
            message, buffers = connection.decode(frames)
            connection.relays.published(message, buffers)
            session.held.append((message, buffers))
        return True

    def _sleep(self, limit_s: float) -> None:
        """Wait until a message comes on a socket that may be read now."""
        connection, session = self.connection, self.session
        assert connection.link is not None and session is not None
        assert connection.sub is not None
        waiting = self._awaited()
        if waiting:
            more = [connection.sub] if session.reads_on else []
            sockets.wait(limit_s, connection.link, *waiting, *more)
            return
        if not session.hears:
            connection.link.poll(int(1000 * limit_s))
            return
        if self.rest_s > 0 and not session.gives:
            self.abandoned.wait(min(self.rest_s, limit_s))
        start = time.perf_counter()
        spins = self._may_spin and self._slept_s < SPIN_S
        if not (spins and self._spin(start)):
            connection.poller.poll(math.ceil(1000 * limit_s))
        self._slept_s = time.perf_counter() - start

    def _awaited(self) -> list[zmq.Socket[bytes]]:
        """The sockets of channels that the numbers of the next averages come through."""
        session, shards = self.session, self.connection.shards
        if session is None or not session.hears or not session.held:
            return []
        found = list(self.connection.payloads.waiting)
        heads = [session.held[place][0] for place in range(session.may_be_next)]
        for shard in {m.shard for m in heads if isinstance(m, wire.Sharded)}:
            found += shards.sockets(shard)
        if any(isinstance(m, wire.Sealed | wire.Sharded) for m in heads):
            found += self.connection.relays.sockets
        return found

    def _spin(self, start: float) -> bool:
        """Poll for up to `SPIN_S` before sleeping: waking up costs a small model more than the
        exchange itself.

        Other processes that want this core get it. Where the last wait was longer than `SPIN_S`, or
        the model is large, do not spin.
        """
        sub, link = self.connection.sub, self.connection.link
        assert link is not None and sub is not None
        while time.perf_counter() - start < SPIN_S:
            if sockets.readable(sub, link):
                return True
            _give_way()
        return False

    # ------------------------------------------------------------------ carrying out

    def _do(self, found: list[actions.Action]) -> None:
        """Carry out what the session says, one after the other."""
        connection, session = self.connection, self.session
        assert session is not None
        for action in found:
            match action:
                case actions.Take():
                    self._take(action)
                case actions.Apply():
                    self._apply(action)
                case actions.Closed():
                    if self.on_close is not None:
                        self.on_close(action.close)
                case actions.Send():
                    connection.send(action.message)
                case actions.Compare():
                    self._compare(action.step)
                case actions.Missed():
                    if self.on_missed is not None:
                        self.on_missed(action.close)
                case actions.Join():
                    self._send_join()
                case actions.Hear():
                    self._hear(action.admit)
                case actions.Joined():
                    assert connection.welcome is not None
                    connection.run = connection.welcome.run
                case actions.Greet():
                    connection.must_greet = True
                case actions.Silent():
                    self._silent(action.seconds)
                case actions.Probe():
                    connection.probe()
                case actions.Say():
                    self.log.info(action.text)
                case actions.Give():
                    self._give(action.snapshot)
                case actions.SendPiece():
                    self._send_piece(action)
                case actions.Begin():
                    self._begin(action.manifest)
                case actions.TakePiece():
                    self._take_piece(action)
                case actions.Adopt():
                    self._adopt(action.room, action.manifest)

    def _take(self, action: actions.Take) -> None:
        replica, session, average = self.replica, self.session, action.average
        assert replica is not None and session is not None
        if action.first:
            replica.forget_averages()
        buffers, blocks = action.payload, None
        if isinstance(average, wire.Shared):
            blocks = None if self._ring is None else shm.Blocks(self._ring, average.places)
        elif isinstance(buffers, shm.Blocks):
            blocks = buffers
        if blocks is not None:
            buffers = blocks.buffers if blocks.whole else ()
        if isinstance(average, wire.Sealed | wire.Sharded | wire.Shared) and not buffers:
            session.lost(average)
            return
        try:
            with trace.span("decode", bucket=average.bucket):
                replica.take(average, buffers)
        except PeerError as e:
            if session.follow.fetching_since is None:
                self._blame(average, e)
            self._do(session.unfit(average, str(e)))
            return
        now = time.monotonic()
        self._pushes.averaged(average.bucket, now)
        self._send_due(now)
        if blocks is not None and not blocks.whole:  # written over meanwhile
            session.lost(average)

    def _blame(self, average: wire.Average, error: PeerError) -> None:
        """Take nothing more from who has brought this average, if that was not the server."""
        connection = self.connection
        if connection.relays.brings(average):
            connection.relays.quit(f"what the relay hands on is no average: {error}")
        elif isinstance(average, wire.Sharded):
            connection.shards.lose(average.shard, f"what it sends is no average: {error}")

    def _apply(self, action: actions.Apply) -> None:
        replica, session = self.replica, self.session
        assert replica is not None and session is not None
        if action.first:
            replica.forget_averages()
        start = time.monotonic()
        with trace.span("optimizer", step=action.close.step):
            replica.apply(action.close)
        now = time.monotonic()
        self._applied_s += now - start
        self._do(session.applied(action.close, now))

    def _compare(self, step: int) -> None:
        """Report the digest, for the comparison of replicas."""
        assert self.replica is not None
        parts: dict[str, str] = {}
        digest = self.replica.digest(parts)
        self.connection.send(wire.Digest(step=step, digest=digest, parts=parts))

    # ------------------------------------------------------------------ snapshots

    def _give(self, snapshot: int) -> None:
        session, replica = self.session, self.replica
        assert session is not None and replica is not None
        try:
            giving = Giving(snapshot, replica)
        except (TypeError, ValueError, RuntimeError) as e:
            self._do(session.cannot_give(snapshot, str(e)))
            return
        session.given_from(snapshot, giving)
        self.connection.send(giving.manifest(replica))

    def _send_piece(self, action: actions.SendPiece) -> None:
        try:
            piece, content = action.source.give(action.piece)
        except PeerError as e:
            self.connection.send(wire.Abort(action.snapshot, str(e)))
            return
        self.connection.send(piece, content)

    def _begin(self, manifest: wire.Manifest) -> None:
        session, replica = self.session, self.replica
        assert session is not None and replica is not None
        try:
            taking = Taking(manifest, most_bytes(replica))
        except PeerError as e:
            self._do(session.refuse(manifest.snapshot, str(e)))
            return
        self._do(session.takes(manifest, taking, len(taking.pieces), time.monotonic()))

    def _take_piece(self, action: actions.TakePiece) -> None:
        session = self.session
        assert session is not None
        try:
            action.room.take(action.piece, action.digest, action.payload)
        except PeerError as e:
            self._do(session.refuse(action.snapshot, str(e)))
            return
        self._do(session.took(action.piece, time.monotonic()))

    def _adopt(self, taking: Taking, manifest: wire.Manifest) -> None:
        session, replica = self.session, self.replica
        assert session is not None and replica is not None
        try:
            state = unflatten(manifest.tree, taking.tensors)
            before = "" if replica.step else replica.digest()
            replica.load(state, manifest.step, manifest.lineage)
        except ValueError as e:
            why = f"it does not fit: {e}"
            self._do(session.refuse(manifest.snapshot, why, misfit=str(e)))
            return
        if before and before != replica.digest():
            self._say_replaced(manifest.step)
        self._do(session.adopted(manifest))

    def _say_replaced(self, step: int) -> None:
        """The weights that were here before the run are gone."""
        assert self.session is not None
        admit = self.session.admit
        by = f"{admit.first}'s" if admit is not None and admit.first else "the run's"
        if step:
            by = f"those of the run at step {step}"
        self.log.info(f"weights replaced by {by}: they differ from what was here")


_give_way: Callable[[], None] = getattr(os, "sched_yield", partial(time.sleep, 0))
"""Let another process have this core, if one wants it."""
