"""A replica at its connection: follows the log, pushes, gives and takes snapshots.

The mirror of `paramserver.server.server`: what to do with a message is decided by
`workers.link.follow`, here it is carried out, in the thread of the training loop, inside `poll` and
`wait`.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from paramserver import trace
from paramserver.errors import PeerError, RunLost, UserError
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import check_counts
from paramserver.transport import shm, sockets
from workers.link import follow
from workers.link.connection import Connection, RunOver
from workers.link.pushes import WAIT_S, Pushes
from workers.link.snapshot import Giving, Taking, most_bytes
from workers.replica.replica import Replica
from workers.replica.state import unflatten

WANTS_IN_FLIGHT = 4
SAY_WAITING_AFTER_S = 3.0
MISSED_MAX = 5  # snapshots in a row; then this peer gives up
MISFITS_MAX = 3  # snapshots in a row that do not fit in the same way
SILENT_TIMEOUTS = 3  # heartbeat timeouts; then the connections are made anew
OUTBOX_LOOK_S = 0.0001
SPIN_S = 0.006


class Client(Connection):
    """The connection of one replica to its server. Call `connect`, then `join`, then the rest.

    Waits raise `RunLost` when the server was silent past `give_up_s`, and `UserError` when it
    refuses this peer.
    """

    def __init__(self, host: str, port: int, **options: Any) -> None:
        """`options` are those of `Connection`."""
        super().__init__(host, port, **options)
        self.replica: Replica | None = None
        self.follow: follow.Follow | None = None
        self.device = "cpu"
        self.on_close: Callable[[wire.Close], None] | None = None
        """Called after each applied update."""
        self.on_missed: Callable[[wire.Close], None] | None = None
        """If set, this replica may go adrift: when it has fallen behind what the server keeps, it
        only hears of closes until `catch_up` is called, and disturbs nobody with a snapshot."""
        self.adrift = False
        self.compares = True  # there are others, whose data set must be the same
        self.rest_s = 0.0
        """How long `wait` leaves messages lying where nobody waits for this replica: a batch of
        updates costs less than as many single ones, here and to whoever shares the processor."""
        self._slept_s = math.inf  # until something came, the last time
        self._pushes = Pushes()
        self._outboxes = 0
        self._ring: shm.Ring | None = None
        self._slower: set[str] = set()  # what was said to go through sockets
        self._held: deque[tuple[Any, list[Any]]] = deque()  # from SUB, to be looked at (again)
        self._admitted: wire.Admit | None = None
        self._joined = False
        self._taking: Taking | None = None
        self._over = 0  # the last snapshot that was called off: nothing else of it is news
        self._why_missed = ""  # what was wrong with it
        self._misfits: list[str] = []  # in what the last ones did not fit
        self._giving: Giving | None = None
        self._give_later: wire.Give | None = None
        self._ready: wire.Ready | None = None
        self._took_part = False  # it has pushed something
        self._left = False  # goodbye was said
        self._left_behind = False  # the run has ended, and nothing more of it is to be had
        self._stood = -1  # the step that the server was last told we stand at
        self._kept_step = -1  # the step of which it was told that it is kept
        self.at_last_step = False
        """The run is ending, and this replica stands at its last step: time to keep it."""

    # ------------------------------------------------------------------ coming

    def join(self, replica: Replica) -> str:
        """Stand where the log stands: as its origin, by following, or by a snapshot.

        Returns how: origin, follow or adopt.
        """
        assert self.welcome is not None
        self.replica = replica
        now = time.monotonic()
        self.follow = follow.Follow(self.welcome.nonce, replica.step, replica.lineage, now)
        self._send_join()
        self._wait_for_admission()
        if self.abandoned.is_set() and not self._joined:
            raise RunLost("the run was over before this replica could join")
        if self.ended is not None and not self._joined:
            raise RunLost(f"the run ended before this replica could join: {self.ended.reason}")
        return self._admitted.action if self._admitted is not None else ""

    def _wait_for_admission(self) -> None:
        self.wait(
            lambda: self._joined or self.ended or self._must_greet or self.abandoned.is_set(),
            "to be admitted",
        )

    def _join_again(self) -> None:
        """What was on its way may be lost: let the server tell anew where to begin."""
        self._taking = self._giving = self._give_later = None
        self._held.clear()
        if self.follow is not None:
            self.follow.fetching_since = None
        self._send_join()

    def _send_join(self) -> None:
        assert self.replica is not None
        self._joined, self.adrift, self._stood = False, False, -1
        self.at_last_step = False
        self._admitted = None
        outbox = self._make_outbox()
        self._pushes.begin(outbox)
        self._send(
            wire.Join(
                layout=self.replica.layout,
                step=self.replica.step,
                lineage=self.replica.lineage,
                device=self.device,
                kind=self.replica.kind(),
                recipe=self.replica.recipe(),
                ledger=self.replica.ledger,
                link=self._link_kind,
                sharing=self._shared is not None,
                outbox=0 if outbox is None else self._outboxes,
            )
        )

    def _make_outbox(self) -> shm.Outbox | None:
        """Memory for pushes that a server on this host reads where they lie."""
        if self._shared is None or self._hello.role != "worker":
            return None
        assert self.welcome is not None and self.replica is not None
        session, number = self.welcome.session, self._outboxes
        shm.outbox_path(self._shared, session, number).unlink(missing_ok=True)
        self._outboxes += 1
        path = shm.outbox_path(self._shared, session, self._outboxes)
        slot_bytes = self.replica.plan.largest_bytes
        try:
            shm.check(shm.outbox_bytes(slot_bytes), self._shared)
            return shm.Outbox(path, slot_bytes)
        except OSError as e:
            self._say_slower("gradients", e)
            return None

    def _hear_averages(self) -> bool:
        """From the server's ring, if it shares one with us, or through SUB. False where the ring
        cannot be used: the server must know, or it sends nothing through SUB."""
        assert self._sub is not None
        ring = None if self._shared is None else self._shared / "ring"
        self._ring = None
        if ring is not None and ring.exists():
            try:
                self._ring = shm.Ring(ring)
            except OSError as e:
                self._say_slower("averages", e)
                self._shared = None
                return False
            sockets.subscribe(self._sub, wire.topic(wire.Shared))
        else:
            sockets.subscribe(self._sub, wire.topic(wire.Average))
        return True

    def _say_slower(self, what: str, error: OSError) -> None:
        """Once: shared memory is not to be had."""
        if what not in self._slower:
            self._slower.add(what)
            reason = error.strerror or str(error)
            self.say(f"{what} go through a socket, which is slower: {shm.SHARED}: {reason}")

    @property
    def ring_mb(self) -> float:
        """MiB of updates that the server keeps where this replica reads them; else infinity."""
        return math.inf if self._ring is None else self._ring.nbytes / 2**20

    # ------------------------------------------------------------------ taking part

    def ready(self, ready: wire.Ready) -> None:
        """Ask for such leases, now and after every greeting; or, with `own`, take part with samples
        of this worker's own."""
        self._ready = ready
        self._send(ready)

    def unready(self, unfinished: bool = False) -> None:
        """Ask for no more leases; `unfinished`: in the middle of one."""
        self._ready = None
        if self._link is not None and self.ended is None:
            self._send(wire.Unready(unfinished=unfinished))

    def room(self, bucket: int, nbytes: int) -> torch.Tensor:
        """Memory for a bucket on its way to the server, uint8 [nbytes]."""
        return self._pushes.room(bucket, nbytes)

    def push(self, push: wire.Push, buffers: list[Any]) -> None:
        """Send one bucket, now or in its turn; the buffers are not the caller's from now on."""
        now = time.monotonic()
        self._took_part = True
        if self._link_kind == "tcp":
            push = msgspec.structs.replace(push, ready_s=now)
        self._pushes.add(push, buffers, now)
        self._send_due()

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

    def settled(self) -> None:
        """The round of the pushes is over: what has not been sent is forgotten."""
        self._pushes.forget()

    def _send_due(self) -> None:
        for push, buffers in self._pushes.due(time.monotonic()):
            with trace.span("send", bucket=push.bucket):
                self._send(push, *buffers)

    def report(self, step: int, values: dict[str, float | None], final: bool = False) -> None:
        self._send(wire.Report(step=step, values=values, final=final))

    def problem(self, text: str) -> None:
        """Let people at the server know what could not be done here."""
        sendable = text.encode(errors="replace").decode()  # the name of a file may be any bytes
        self._send(wire.Problem(sendable[: wire.PROBLEM_CHARS]))

    def kept(self) -> None:
        """What is to stay of this step is on disk, or cannot be written: the run may end."""
        assert self.replica is not None
        self._kept_step = self.replica.step
        self._send(wire.Stand(step=self._kept_step, kept=True))

    def unreadable(self, round: int) -> None:
        """No sample of the lease in this round can be read."""
        self._send(wire.Unreadable(round=round))

    def goodbye(
        self,
        reason: str,
        failed: str = "",
        lease: wire.Lease | None = None,
        *,
        error: bool = False,
        finished: bool = False,
    ) -> None:
        """Tell the server that this peer leaves, in order or by an `error`, and the digest of the
        weights with it. Once. `failed` is one of `wire.FAILURES` where an error in this lease is
        the reason; `finished`: it leaves because it is done."""
        if self._link is None or self._left:
            return
        self._left = True
        digest, step = "", 0
        if self.replica is not None and self._joined:
            digest, step = self.replica.digest(), self.replica.step
        with contextlib.suppress(UserError):  # it lets nobody in any more
            said = wire.Goodbye(reason, step, digest, failed, lease, error, finished)
            self._send(said)
        self._link.linger = 2000

    def _close_sockets(self) -> None:
        super()._close_sockets()
        self._pushes.without_outbox()
        self._ring = None

    @property
    def ended(self) -> wire.End | None:
        """The run's end, once every update before it is applied (or cannot be had any more)."""
        end = self.follow.end if self.follow else None
        if end is None or self.replica is None:
            return None
        return end if self.replica.step >= end.step or self._left_behind else None

    @property
    def left_behind(self) -> bool:
        """Has the run ended with a state that this replica does not hold, and cannot get?"""
        end = self.ended
        if end is None or self.replica is None:
            return False
        return (self.replica.step, self.replica.lineage) != (end.step, end.lineage)

    @property
    def follows(self) -> bool:
        """Is this replica in its place, neither adrift nor waiting for a snapshot?"""
        return self._joined

    def catch_up(self) -> None:
        """Take a snapshot after having been adrift."""
        if self.adrift:
            self.adrift = False
            self._send_join()

    # ------------------------------------------------------------------ the loop

    def poll(self) -> None:
        """Take in averages that have come, without waiting: for the hooks, in the middle of
        backward. Anything else must wait, since nothing may be applied now."""
        while self._may_read_sub():
            if not self._held and not self._read_sub():
                break
            if not isinstance(self._held[0][0], wire.Average | wire.Pulse):
                break
            self._next_published()
        self._send_due()

    def wait(self, done: Callable[[], Any], what: str, timeout_s: float | None = None) -> bool:
        """Handle messages, applying updates, until `done()`; False if `timeout_s` passed first.

        Says from time to time that it waits for `what` (empty: only what is out of the ordinary),
        and what the server is doing. Raises `RunLost` when the server is silent for longer than
        `give_up_s`, or does not take this peer any more.
        """
        start = time.monotonic()
        say_at = start + SAY_WAITING_AFTER_S
        said = ""
        while not done():
            if self._must_greet and not self.abandoned.is_set():
                if self.follow is not None and self.follow.end is not None:
                    self._stay_behind()  # nobody is left to greet
                    continue
                self._greet_again()
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
                if text not in ("", said):
                    self.say(text)
                said, say_at = text, now + SAY_WAITING_AFTER_S
        return True

    def _waiting_for(self, what: str, now: float) -> str:
        f = self.follow
        text = f"waiting {what}" if what else ""
        if f is None or now - f.heard_at > self.heartbeat_timeout / 2:
            return f"{text or 'waiting'}: the server is silent"
        if f.trains or not f.phase:
            return text
        return f"{text or 'the server is'}: {f.phase}"

    def _tick(self, now: float) -> None:
        self._send_due()
        f = self.follow
        if f is None:
            return
        if now - f.heard_at <= self.heartbeat_timeout / 2:
            self._elsewhere.over()
        elif self._elsewhere.found(now):
            self._must_greet = True
            return
        effect = f.tick(now, self.heartbeat_timeout / 2)
        if isinstance(effect, follow.Silent):
            if self._knock is not None:
                self._knock.check()  # it may have been started again, with other keys
            if effect.seconds > self.give_up_s:
                raise RunLost(
                    f"the server at {self.host}:{self.port} has been silent for "
                    f"{effect.seconds:.0f} s; last step here: {f.step}"
                )
            if effect.seconds > SILENT_TIMEOUTS * self.heartbeat_timeout:
                self._must_greet = True
            elif self.welcome is not None:
                self._send_probe()
        elif isinstance(effect, follow.Gap):
            self._fetch()
        taking = self._taking
        if taking is not None and now - taking.heard_at > 2 * self.heartbeat_timeout:
            self._taking = None
            self._send_join()

    def _handle_one(self) -> bool:
        """Handle one message, if there is one."""
        assert self._link is not None
        if self._may_read_sub() and (self._held or self._read_sub()):
            self._next_published()
            return True
        if not sockets.readable(self._link):
            return False
        self._from_link(*self._decode(sockets.receive(self._link)))
        return True

    def _may_read_sub(self) -> bool:
        """SUB waits while a fetch or a snapshot is on its way: it continues where they end."""
        f = self.follow
        return f is not None and (self._joined or self.adrift) and f.fetching_since is None

    def _read_sub(self) -> bool:
        assert self._sub is not None
        if not sockets.readable(self._sub):
            return False
        for frames in wire.split(sockets.receive(self._sub)):
            self._held.append(self._decode(frames))
        return True

    def _next_published(self) -> None:
        """Look at the next message from SUB; one that shows a gap is looked at again later."""
        message, buffers = self._held.popleft()
        if not self._published(message, buffers):
            self._held.appendleft((message, buffers))
            self._fetch()

    def _sleep(self, limit_s: float) -> None:
        """Until something comes on a socket that may be read now."""
        assert self._link is not None and self._sub is not None
        if not self._may_read_sub():
            self._link.poll(int(1000 * limit_s))
            return
        if self.rest_s > 0 and self._giving is None:
            self.abandoned.wait(min(self.rest_s, limit_s))
        start = time.perf_counter()
        if not (self._slept_s < SPIN_S and self._hello.role == "worker" and self._spin(start)):
            self._poller.poll(math.ceil(1000 * limit_s))
        self._slept_s = time.perf_counter() - start

    def _spin(self, start: float) -> bool:
        """Look again and again for a few milliseconds whether something has come.

        Who sleeps wakes with cold caches, which costs a small model more than its exchange. Others
        that want this core get it; where the last sleep was longer than this, nobody spins.
        """
        assert self._link is not None and self._sub is not None
        while time.perf_counter() - start < SPIN_S:
            if sockets.readable(self._sub, self._link):
                return True
            _give_way()
        return False

    # ------------------------------------------------------------------ messages

    def _published(self, message: Any, buffers: list[Any]) -> bool:
        """A message of the log, from SUB or fetched; False when something is missing before it."""
        f, replica = self.follow, self.replica
        assert f is not None and replica is not None
        now = time.monotonic()
        if self.adrift:
            self._heard_adrift(message, now)
            return True
        effect: follow.Effect = follow.NOTHING
        if isinstance(message, wire.Average):
            if isinstance(message, wire.Shared):
                if not self._still_there(message):
                    return True  # as if PUB had dropped it: its close will show the gap
                assert self._ring is not None
                buffers = [self._ring.buffer(place) for place in message.places]
            effect = f.average(message)
        elif isinstance(message, wire.Close):
            _check_ledger(message)
            effect = f.close(message)
        elif isinstance(message, wire.Open):
            effect = f.opened(message)
        elif isinstance(message, wire.Pulse):
            effect = f.pulse(message, now)
            self._stand(message)
        elif isinstance(message, wire.End):
            effect = f.ended(message)
        if isinstance(effect, follow.Take):
            if effect.first:
                replica.forget_averages()
            with trace.span("decode", bucket=message.bucket):
                replica.take(effect.average, buffers)
            self._pushes.averaged(message.bucket, now)
            self._send_due()
            if isinstance(message, wire.Shared) and not self._still_there(message):
                f.lost(message.bucket)
        elif isinstance(effect, follow.Apply):
            if effect.first:
                replica.forget_averages()
            with trace.span("optimizer", step=effect.close.step):
                replica.apply(effect.close)
            f.applied(effect.close)
            self._tell_digest()
            if self.on_close is not None:
                self.on_close(effect.close)
            if self._give_later is not None:
                self._give(self._give_later)
        elif isinstance(effect, follow.Diverged):
            self.say(f"{effect.why}: taking a snapshot")
            self._join_again()
        return not isinstance(effect, follow.Gap)

    def _tell_digest(self) -> None:
        """From time to time: are all replicas still equal?"""
        assert self.replica is not None and self.welcome is not None
        every, step = self.welcome.settings["digest_steps"], self.replica.step
        if every and step % every == 0:
            self._send(wire.Digest(step=step, digest=self.replica.digest()))

    def _still_there(self, message: wire.Shared) -> bool:
        """Has the server not yet written over the blocks that this average lies in?"""
        return self._ring is not None and all(map(self._ring.whole, message.places))

    def _heard_adrift(self, message: Any, now: float) -> None:
        f = self.follow
        assert f is not None
        if isinstance(message, wire.Close) and message.nonce == f.nonce:
            if self.on_missed is not None:
                self.on_missed(message)
        elif isinstance(message, wire.Pulse):
            f.pulse(message, now)
        elif isinstance(message, wire.End):
            f.ended(message)
        if f.ending or f.end is not None:
            self.catch_up()

    def _stand(self, pulse: wire.Pulse) -> None:
        """The observer tells where it stands, so that the run does not end before it has kept the
        last step."""
        f = self.follow
        assert f is not None
        if self._hello.role != "observer" or (pulse.nonce, pulse.step) != (f.nonce, f.step):
            return
        self.at_last_step = pulse.ending and self._joined
        if self._stood != pulse.step:
            self._stood = pulse.step
            self._send(wire.Stand(step=pulse.step, kept=self._kept_step == pulse.step))

    def _fetch(self) -> None:
        assert self.follow is not None
        if self._joined:  # before that, Admit or a snapshot tells where to begin
            self._send(self.follow.fetch(time.monotonic()))

    def _from_link(self, message: Any, buffers: list[Any]) -> None:
        f = self.follow
        now = time.monotonic()
        if f is not None:
            f.heard(now)  # not from SUB: that goes on for a peer which the server has given up
        match message:
            case wire.Average() | wire.Close():
                if self._joined:
                    if f is not None and f.fetching_since is not None:
                        f.fetching_since = now  # the answer is coming: not yet time to ask again
                    self._published(message, buffers)
            case wire.Fetched():
                if f is not None and isinstance(f.fetched(message.step, message.open), follow.Gap):
                    self._fetch()
            case wire.Pulse() if f is not None and self.adrift:
                self._heard_adrift(message, now)
            case wire.Pulse() if f is not None:
                self._stand(message)
                if isinstance(f.pulse(message, now), follow.Gap) and f.fetching_since is None:
                    self._fetch()
            case wire.Admit():
                self._on_admit(message)
            case wire.Reject():
                kind = RunLost if self._took_part else UserError
                raise kind(message.reason, message.hint)
            case wire.Greet():
                if not message.session_known:
                    self._must_greet = True
                elif message.join:
                    if f is not None and not self.adrift:
                        self._join_again()
                elif self.welcome is not None:
                    self._send_probe()
            case wire.Give():
                self._give(message)
            case wire.Want():
                self._piece(message)
            case wire.Manifest():
                self._take(message, now)
            case wire.Piece():
                self._take_piece(message, buffers, now)
            case wire.Abort():
                self._on_abort(message)
            case wire.End() if f is not None:
                f.ended(message)
                if not self._joined:
                    self._left_behind = True
                elif f.step < message.step and f.fetching_since is None:
                    self._fetch()
            case _:
                pass  # Refused: the round's close tells the rest; Probe, late

    def _on_admit(self, message: wire.Admit) -> None:
        f, replica = self.follow, self.replica
        assert f is not None and replica is not None
        self._admitted = message
        if not message.outbox:
            self._pushes.without_outbox()
        if not self._hear_averages():
            self._join_again()
            return
        f.fetching_since = None
        if message.action in ("adopt", "behind"):
            self._joined = False
            self._held.clear()
            if message.action == "adopt":
                self._give_up_if_in_vain(message.missed)
                return  # Manifest and pieces follow
            if f.end is not None:
                self._stay_behind()
            elif self.on_missed is not None and not f.ending:
                self.adrift = True
            else:
                self._send_join()
            return
        self._joined_now()
        if message.action == "follow" and message.step > f.step:
            self._fetch()

    def _stay_behind(self) -> None:
        """The run has ended, and what this replica lacks is not to be had any more."""
        assert self.follow is not None and self.follow.end is not None
        self._must_greet = False
        if not self._left_behind:
            self._left_behind = True
            if self.left_behind:
                end, stands = self.follow.end, self.follow.step
                self.say(f"the run ended at step {end.step}, this replica at {stands}")

    def _joined_now(self) -> None:
        assert self.replica is not None and self._sub is not None
        self._joined = True
        assert self.welcome is not None
        self.run = self.welcome.run
        if self._ready is not None:
            self._send(self._ready)

    def _greet_again(self) -> None:
        """The server does not know this session any more: it was silent for too long, or is a new
        one. Say hello again, and stand where the log stands."""
        assert self.welcome is not None and self.replica is not None and self.follow is not None
        silent_s = time.monotonic() - self.follow.heard_at
        if silent_s > SILENT_TIMEOUTS * self.heartbeat_timeout:
            self.say(f"the server has been silent for {silent_s:.0f} s: greeting it again")
        elif not self._elsewhere.moved:
            self.say("the server does not know this worker any more: greeting it again")
        self._close_sockets()
        self._must_greet = False  # nobody is left who would set it
        own = self.welcome.id if self._hello.role == "worker" else None  # leases are told by it
        self._hello = msgspec.structs.replace(self._hello, run=self.run, id=own)
        self._held.clear()
        self._giving = self._give_later = self._taking = None
        self._over = 0
        try:
            welcome = self.connect(self.give_up_s, self.replica.step)
        except RunOver as e:
            self.follow.end = e.end
            self._stay_behind()
            return
        except UserError as e:
            raise RunLost(e.problem, e.hint) from None
        self.follow = follow.Follow(
            welcome.nonce, self.replica.step, self.replica.lineage, time.monotonic()
        )
        self._send_join()
        self._wait_for_admission()

    # ------------------------------------------------------------------ snapshots: giving

    def _give(self, message: wire.Give) -> None:
        f, replica = self.follow, self.replica
        assert f is not None and replica is not None
        self._giving = self._give_later = None
        if f.step == message.step and f.lineage == message.lineage:
            try:
                self._giving = Giving(message.snapshot, replica)
            except (TypeError, ValueError, RuntimeError) as e:  # it costs the joiner, not us
                self.say(f"this replica's state cannot be sent: {e}")
                self._send(wire.Abort(message.snapshot, f"the state cannot be sent: {e}"))
                return
            self._send(self._giving.manifest(replica))
        elif f.step < message.step:
            # Apply what is on its way first, then look at this again.
            self._give_later = message
            if f.fetching_since is None:
                self._fetch()
        else:
            self._send(wire.Abort(message.snapshot, f"I stand at step {f.step}"))

    def _piece(self, message: wire.Want) -> None:
        giving = self._giving
        if giving is None or giving.number != message.snapshot:
            self._send(wire.Abort(message.snapshot, "I do not give this snapshot"))
            return
        try:
            content = giving.bytes(message.piece)
        except PeerError as e:
            self._send(wire.Abort(message.snapshot, str(e)))
            return
        self._send(wire.Piece(snapshot=message.snapshot, piece=message.piece), content)

    # ------------------------------------------------------------------ snapshots: taking

    def _take(self, manifest: wire.Manifest, now: float) -> None:
        assert self.replica is not None
        try:
            self._taking = Taking(manifest, now, most_bytes(self.replica))
        except PeerError as e:
            self._refuse_snapshot(manifest.snapshot, str(e))
            return
        self._want_more()

    def _refuse_snapshot(self, number: int, why: str, misfit: str = "") -> None:
        """It cannot be right, which is the giver's fault as long as others may give another: layout
        and recipe are those of the run. Where they agree, it is ours."""
        self._send(wire.Abort(number, why[: wire.REASON_MAX]))
        self._over, self._taking = number, None
        self._why_missed = why
        self._misfits = [*self._misfits[1 - MISFITS_MAX :], misfit] if misfit else []
        self.say(f"{why}: asking for it again")
        self._send_join()

    def _give_up_if_in_vain(self, missed: int) -> None:
        """So many snapshots in a row did not come to this replica: the server counts them, since it
        knows of which givers that says something."""
        alike = len(self._misfits) == MISFITS_MAX and len(set(self._misfits)) == 1
        if alike and missed >= MISFITS_MAX:
            raise UserError(
                f"the run's state does not fit this worker's model or optimizer: "
                f"{self._misfits[-1]}",
                "start it with the same model, optimizer and settings as the others",
            )
        if missed >= MISSED_MAX:
            raise UserError(
                f"the run's state is not to be had, tried {missed} times: {self._why_missed}",
                "what the others say about it stands in their own output",
            )

    def _want_more(self) -> None:
        taking = self._taking
        assert taking is not None
        while len(taking.wanted) < WANTS_IN_FLIGHT and taking.next < len(taking.pieces):
            taking.wanted.add(taking.next)
            self._send(wire.Want(snapshot=taking.manifest.snapshot, piece=taking.next))
            taking.next += 1
        if not taking.wanted:
            self._adopt(taking)

    def _take_piece(self, message: wire.Piece, buffers: list[Any], now: float) -> None:
        taking = self._taking
        if taking is None or taking.manifest.snapshot != message.snapshot:
            return
        try:
            taking.take(message.piece, buffers)
        except PeerError as e:
            self._refuse_snapshot(message.snapshot, str(e))
            return
        taking.heard_at = now
        self._want_more()

    def _adopt(self, taking: Taking) -> None:
        f, replica = self.follow, self.replica
        assert f is not None and replica is not None
        m = taking.manifest
        self._taking = None
        try:
            state = unflatten(m.tree, taking.tensors)
            replica.load(state, m.step, m.lineage)
        except ValueError as e:
            f.adopted(replica.step, replica.lineage)  # another state, if half of it was loaded
            self._refuse_snapshot(m.snapshot, f"it does not fit: {e}", misfit=str(e))
            return
        self._misfits = []
        f.adopted(m.step, m.lineage)
        self._send(wire.Adopted(snapshot=m.snapshot, step=m.step, lineage=m.lineage))
        self._joined_now()

    def _on_abort(self, message: wire.Abort) -> None:
        if self._giving is not None and self._giving.number == message.snapshot:
            self._giving = None
        elif not self._joined and message.snapshot != self._over:
            self._over, self._taking = message.snapshot, None
            self._why_missed = message.reason
            self._send_join()


def _check_ledger(close: wire.Close) -> None:
    try:
        check_counts(close.ledger)
    except PeerError as e:
        raise UserError(
            f"the server does not speak this protocol: step {close.step}: {e}",
            "is it this program, in the same version?",
        ) from None


def _give_way() -> None:
    """Let others have this core, if any wants it."""
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)
