"""The server: one thread, one poll loop that joins sockets, control and data.

It holds no model and no optimizer. `control` answers messages and carries out what `rounds`
decides, `data` keeps the running sums of the open round, and the newest updates for replicas that
fell behind. `Server` receives and sends.
"""

from __future__ import annotations

import errno
import math
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import msgspec
import zmq

from paramserver.errors import PeerError
from paramserver.fleet.plan_watch import PlanWatch
from paramserver.net import machine
from paramserver.net.link_watch import LinkWatch
from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import SERVER
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.looks import DataSet
from paramserver.rounds.rules import Rules
from paramserver.server.channels import Channels, Lost
from paramserver.server.control import Control, Finished, Watcher
from paramserver.server.data import Data
from paramserver.server.held import Came, Held
from paramserver.server.history import Frames
from paramserver.server.ports import Ports
from paramserver.settings import Settings
from paramserver.tensors.bucket import BucketPlan, plan
from paramserver.tensors.order import name_samples, places
from paramserver.transport import sealing, shm, sockets
from paramserver.transport.handshake import Authenticator
from paramserver.transport.sealing import Kind, Payload
from paramserver.typed import printing_token

TICK_S = 0.1
KEYS_LOOK_S = 2.0
OLD_TOKEN = "the keys of this server were made anew: your join token is worthless"
OLD_TOKEN_HINT = "take the token that `{}` prints on its machine"
LINK_TIMEOUTS = 2  # heartbeat timeouts from the welcome to the probe of the link
NO_SEAT = "this server listens for other machines: here only its own user takes part without keys"
NO_SEAT_HINT = (
    "start this worker as the user who started the server, where /tmp is the same; or give it the "
    "join token, which `{}` prints"
)
PULSES_PER_TIMEOUT = 10
MESSAGES_PER_TURN = 64
UNREAD_BYTES = 32 * 2**20  # of a snapshot, waiting for its joiner
PIECES_UNREAD = 6


class Server:
    """The parameter server of a run, bound to its addresses by the constructor; `run` serves until
    the end.

    `settings` are the run's; `to_send` is what workers get of them in the welcome. `hosts` are the
    addresses to bind, `guarded` those where only holders of `keys` get in. `observer_key` is what
    the observer that belongs to this server shows. `link_watch` checks the paths that workers were
    told to take, `plan_watch` gets what workers compute. `recovery`: the run's server died, having
    noted this step (its lineage, see `Recovery`) and what its `data_set` was. With `status`, which
    makes the run's as JSON, the run can be watched at the settings' port for that. `ports`, in
    place of these addresses, are bound already, by the program that serves several runs, of which
    this is number `trial`; such a run ends if no worker comes in `first_worker_s`. `fresh_keys`
    returns keys once they are others than before. Raises `UserError` where an address cannot be
    bound.

    To `control` it is the `Transport`.
    """

    def __init__(
        self,
        settings: Settings,
        to_send: dict[str, Any],
        watcher: Watcher,
        *,
        hosts: Sequence[str] = (),
        run: str,
        observer_key: str,
        recovery: str | None = None,
        data_set: DataSet | None = None,
        guarded: Sequence[str] = (),
        keys: sockets.ServerKeys | None = None,
        link_watch: LinkWatch | None = None,
        plan_watch: PlanWatch | None = None,
        status: Callable[[Control, float], bytes] | None = None,
        ports: Ports | None = None,
        trial: int = 1,
        first_worker_s: float | None = None,
        fresh_keys: Callable[[], sockets.ServerKeys | None] | None = None,
    ) -> None:
        self.settings = settings
        self.sent_bytes = 0
        self._came_bytes = 0  # through sockets
        self._link_watch = link_watch
        self._plan_watch = plan_watch
        self._status = status
        self._first_worker_s, self._began_at = first_worker_s, time.monotonic()
        cut = partial(plan, bucket_mb=settings.bucket_size_mb, min_bucket_mb=settings.min_bucket_mb)
        nonce = uuid.uuid4().hex
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
                shares=settings.shares,
                shards=settings.shards_wanted,
                averages_alone=settings.averages_alone,
                leaves_out=settings.leaves_out,
                local_steps=settings.local_steps,
                local_warmup_steps=settings.local_warmup_steps,
                overlap=settings.overlap,
                max_staleness=settings.max_staleness,
                max_norm_ratio=settings.max_norm_ratio,
                max_bad_rounds=settings.max_bad_rounds,
                epochs=settings.num_epochs,
                epoch_barrier=settings.epoch_barrier,
                observer=settings.observer,
                more=trial < settings.runs,
            ),
            nonce,
            time.monotonic(),
            lambda layout: len(cut(layout).buckets),
            run=run,
            recovery=recovery,
            data_set=data_set,
            name_samples=partial(name_samples, seed=settings.seed),
            places=partial(places, seed=settings.seed),
            sizes=lambda layout: _sizes(cut(layout)),
        )
        self._shared = shm.shared_folder() if settings.shared_memory else None
        self._unread = sockets.Unread()
        self._deaf_ears: set[str] = set()  # sessions of those who do not read what they ask for
        self._own_ports: Ports | None = None
        try:
            if ports is None:
                ports = self._own_ports = Ports(
                    settings, hosts=hosts, guarded=guarded, keys=keys, watched=status is not None
                )
        except BaseException:
            self.close()
            raise
        ports.resume()
        self._ports, self._fresh_keys, self._look_at_keys_at = ports, fresh_keys, 0.0
        self._with_keys: set[str] = set()  # sessions of those who have shown the join token's
        self._nonce = nonce
        self._held = Held()
        self._to_join: set[str] = set()  # sessions that were cut off, and have not joined again
        self._costs: dict[str, dict[str, float]] = {}  # by session: what sealing takes it
        self._spared: set[str] = set()  # sessions that get averages from a relay
        self._unlinked: dict[str, float] = {}  # sessions without a link, since when
        self.channels: Channels | None = None
        self._use(ports)
        if ports.ipc is None:
            how = (
                "need the join token, as those on other machines do"
                if ports.guarded
                else "use TCP and no shared memory, which is slower"
            )
            watcher.say(
                f"peers on this host {how}: no folder for temporary files (/tmp, TMPDIR) can be "
                "written"
            )
        self.data = Data(settings, nonce, None if self._shared is None else self._shared.path)
        self.control = Control(
            self.rounds,
            self.data,
            self,
            watcher,
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run=run,
                nonce=nonce,
                session="",
                id=0,
                settings=to_send,
                pub_port=settings.port + 1,
                ipc=None if ports.ipc is None else str(ports.ipc.path),
                shared=None if self._shared is None else str(self._shared.path),
                versions=machine.versions(),
                trial=trial,
                runs=settings.runs,
                channels=self.channels is not None,
            ),
            observer_key=observer_key,
            most_unread=max(UNREAD_BYTES, PIECES_UNREAD * ports.largest),
            earlier=ports.earlier,
        )
        self._tell_port_problems()
        if link_watch is not None:
            self.control.traffic.expected = link_watch.expected

    @property
    def digests(self) -> dict[str, tuple[int, str]]:
        """By peer: step and digest of its weights when it said goodbye."""
        return self.control.digests

    @property
    def received_bytes(self) -> int:
        """Through sockets and through shared memory."""
        return self._came_bytes + self.data.mapped_bytes

    # ------------------------------------------------------------------ the loop

    def stop(self, reason: str, *, error: bool = False) -> None:
        """Ask for an end, in order or by an `error`; safe in a signal handler."""
        self.control.stop(reason, error=error)

    def run(self) -> wire.End | None:
        """Serve until the run has ended and everybody has said goodbye, or had time to; None where
        it was to go on and did not (`rounds.deserted`, `rounds.put_off`)."""
        control = self.control
        next_tick = next_pulse = 0.0
        pulse_every = self.settings.heartbeat_timeout / PULSES_PER_TIMEOUT
        while not control.finished(now := time.monotonic()):
            due = self.rounds.next_deadline()
            limit = max(0.0, min(next_tick, due if due is not None else next_tick) - now)
            woken = self._poller.poll(math.ceil(1000 * limit))
            if self._authenticator is not None and any(s is not self._router for s, _ in woken):
                self._report_refused(self._authenticator)
            if self._passwords is not None:
                self._passwords.answer(time.monotonic)
            if self._strangers is not None:
                self._strangers.look()
            for _ in range(MESSAGES_PER_TURN):
                if not sockets.readable(self._router):
                    break
                self._receive(sockets.receive(self._router))
            if self.channels is not None:
                self._receive_payloads(self.channels)
            while self._deaf_ears:
                session = self._deaf_ears.pop()
                control.drop(session, "it does not read what it asks for", time.monotonic())
            now = time.monotonic()
            if now >= next_tick or (due is not None and now >= due):
                next_tick = now + TICK_S
                self._look_for_workers(now)
                self._look_at_keys(now)
                self._give_up_payloads(now)
                for who in self._ports.look_at_strangers():
                    if self.channels is not None:
                        self.channels.ended(who)
                if self._closed_to_strangers:
                    self._let_go_without_link(now)
                control.tick(now)
                self._show(now)
            if now >= next_pulse:
                next_pulse = now + pulse_every
                control.pulse(now)
        control.release_shards()
        self._show(time.monotonic(), last=True)
        return self.rounds.ended

    def _look_for_workers(self, now: float) -> None:
        """Has no worker come to this run, which follows another one?"""
        wait_s = self._first_worker_s
        if wait_s is None or now - self._began_at < wait_s:
            return
        self._first_worker_s = None
        if not self.rounds.started and not any(
            peer.role == "worker" for peer in self.rounds.peers.values()
        ):
            self.stop(f"no worker has joined this run in {wait_s:g} s", error=True)

    def _show(self, now: float, last: bool = False) -> None:
        """Send the status to those who watch."""
        if self._watch is None or self._status is None:
            return
        if self._watch.due(now) or last:
            self._watch.send(self._status(self.control, now), now)

    def _report_refused(self, authenticator: Authenticator) -> None:
        for sentence in authenticator.refused():
            self.control.watcher.say(sentence, warning=True)

    def _receive(self, frames: list[zmq.Frame]) -> None:
        """One message; whatever is wrong with it costs only its sender."""
        route = frames[0].bytes
        size = sum(map(len, frames[1:]))
        self._came_bytes += size
        now = time.monotonic()
        try:
            message, buffers = wire.from_frames(frames[1:])
            if isinstance(message, wire.Dial):
                self._dial(route, message, frames[-1], now)
                return
            if isinstance(message, wire.Offer) and self._is_a_stranger(frames[-1]):
                raise PeerError("a shard's link needs the join token's keys here")
            if isinstance(message, wire.Probe) and self._is_a_stranger(frames[-1]):
                self.control.refuse_link(route, message, self._no_seat, now)
                return
        except PeerError as e:
            self.control.refuse(route, e, now)
            return
        came = Came(message, buffers, frames[-1], size, now)
        if self._held.behind(route, came):
            if self._held.full(route):
                self._lose_payloads(route, "it says more than can be kept", now)
        elif isinstance(message, wire.Push) and message.sealed:
            self._held.hold(route, came, now)
            self._release(route, now)
        else:
            self._handle(route, came, now)

    def _look_at_keys(self, now: float) -> None:
        """Have the keys been made anew? Then all sessions that were begun with the old ones end,
        and so do all connections."""
        if self._fresh_keys is None or now < self._look_at_keys_at or not self._ports.guarded:
            return
        self._look_at_keys_at = now + KEYS_LOOK_S
        keys = self._fresh_keys()
        if keys is None:
            return
        control = self.control
        for session in list(control.doors):
            if self._is_own_observer(session):
                continue  # it is given the new token
            if session in self._with_keys or session not in control.routes:
                hint = OLD_TOKEN_HINT.format(self._printing_token)
                control.tell(session, wire.Reject(OLD_TOKEN, hint))
                control.drop(session, "its join token is an old one", now)
        self._with_keys.clear()
        if self.channels is not None:
            self.channels.close()
        self._ports.renew(keys)
        self._use(self._ports)
        self._tell_port_problems()
        control.watcher.say(
            "the keys were made anew: who came with an older token has left, and "
            f"`{self._printing_token}` prints the new one",
            warning=True,
        )

    def _is_own_observer(self, session: str) -> bool:
        """Is this the session of the observer that this program has started, by its key?"""
        peer = self.control.rounds.peers.get(session)
        return peer is not None and peer.role == "observer"

    def _tell_port_problems(self) -> None:
        for problem in (self._ports.watch_problem, self._ports.channel_problem):
            if problem:
                self.control.watcher.say(problem)

    def _use(self, ports: Ports) -> None:
        """Serve through these sockets from now on."""
        self._authenticator, self._watch = ports.authenticator, ports.watch
        self._router, self._pub = ports.router, ports.pub
        self._passwords, self._strangers = ports.passwords, ports.strangers
        self._peers_key = ports.peers_key
        self._closed_to_strangers = bool(ports.guarded)
        self._printing_token = printing_token(",".join(ports.guarded), self.settings.port)
        hint = NO_SEAT_HINT.format(self._printing_token)
        self._no_seat = wire.Reject(NO_SEAT, hint, keys=True)
        self.channels = None
        self._spared.clear()
        if ports.passwords and ports.channel and ports.strangers is not None:
            self.channels = Channels(
                ports.channel,
                ports.passwords,
                ports.strangers,
                ports.channel_port,
                self._nonce,
                ports.largest,
                lambda session, message: self.control.tell(session, message),
                lambda text: self.control.watcher.say(text, warning=True),
            )
        self._poller = zmq.Poller()
        for s in (
            self._router,
            *(self._authenticator.watches if self._authenticator is not None else ()),
            *(() if self._passwords is None else (self._passwords.socket,)),
            *(() if self.channels is None else (self.channels.socket,)),
            *(() if self._strangers is None else (self._strangers.watch,)),
        ):
            self._poller.register(s, zmq.POLLIN)

    def _is_a_stranger(self, frame: zmq.Frame) -> bool:
        """Did this come over TCP without keys, at a server that listens for other machines? There
        anybody on this machine may have sent it; its owner's peers come over ipc, whose folder
        nobody else can enter."""
        if not self._closed_to_strangers or not sockets.sender(frame):
            return False
        return sockets.user(frame) != self._peers_key

    def _let_go_without_link(self, now: float) -> None:
        """Who has greeted and shows no link in time does not keep its place: it has greeted at
        loopback, where anybody may."""
        control = self.control
        without = [session for session in control.doors if session not in control.routes]
        self._unlinked = {session: self._unlinked.get(session, now) for session in without}
        for session, since in list(self._unlinked.items()):
            if now - since > LINK_TIMEOUTS * self.settings.heartbeat_timeout:
                control.drop(session, "it has shown no link", now)

    def _release(self, route: bytes, now: float) -> None:
        """Handle what is held of this link, up to a payload that is still on its way: its header
        waits, and so does all that its sender says after it."""
        while (came := self._held.first(route)) is not None:
            message, payload = came.message, None
            if _is_sealed(message):
                try:
                    payload = self._payload(route, message)
                except Lost:
                    self._lose_payloads(route, "a record of a payload is missing", now)
                    return
                except PeerError as e:
                    self._held.release(route)
                    self.control.refuse(route, e, now)
                    return
                if payload is None:
                    return
            self._held.go_on(route, now)
            if payload is not None:
                came.buffers = payload.buffers
                came.size += payload.bytes
            self._handle(route, came, now)

    def _payload(self, route: bytes, push: wire.Push) -> Payload | None:
        """The payload of a push whose buffers come over a channel; None if they are on their
        way."""
        session = self.control.links.get(route)
        if session is None:  # it is greeted, and pushes again
            return Payload(Kind.PUSH, push.round, push.bucket, push.sealed, [])
        if self.channels is None:
            raise PeerError("you have no channel")
        payload = self.channels.payload(session, push.sealed)
        if payload is not None and (payload.round, payload.bucket) != (push.round, push.bucket):
            raise PeerError("this payload is of another round or bucket")
        return payload

    def _receive_payloads(self, channels: Channels) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if not sockets.readable(channels.socket):
                return
            frames = sockets.receive(channels.socket)
            self._came_bytes += sum(map(len, frames[1:]))
            now = time.monotonic()
            session = channels.receive(frames, now)
            route = None if session is None else self.control.routes.get(session)
            if route is not None:
                self._release(route, now)

    def _give_up_payloads(self, now: float) -> None:
        """Do not wait any longer for payloads of which nothing comes."""
        patience = sealing.PATIENCE * self.settings.heartbeat_timeout
        for route, since in self._held.since():
            session = self.control.links.get(route)
            heard = (
                since
                if session is None or self.channels is None
                else max(since, self.channels.heard_at(session))
            )
            if now - heard > patience:
                self._lose_payloads(route, "nothing comes through it", now)

    def _lose_payloads(self, route: bytes, why: str, now: float) -> None:
        """Payloads on this peer's channel are lost: it joins again, as where its link was cut, and
        gets another channel if it asks for one."""
        session = self.control.links.get(route)
        held = self._held.release(route)
        if session is None or self.channels is None:
            return
        lost = self.channels.lose(session, why)
        if lost or session not in self._to_join:  # else it knows: these pushes left before
            self._to_join.add(session)
            self.control.cut_off(session, now)
        for came in held:
            if not _is_sealed(came.message):
                self._handle(route, came, now)

    def _dial(self, route: bytes, dial: wire.Dial, frame: zmq.Frame, now: float) -> None:
        """Keys leave over CURVE only, on the connection that asked for them."""
        session = self.control.links.get(route)
        if session is None:
            return  # it is not known, or not any more, and greets again
        if not self._closed_to_strangers or sockets.user(frame) != self._peers_key:
            raise PeerError("a channel is for those who came with a join token")
        if dial.costs:
            self._costs[session] = dial.costs
        if self.channels is None:  # another program has taken its port
            self.control.tell(session, wire.Channel(reason="this server has no port for it"))
            return
        worker = self.control.rounds.peers[session].id
        if route in self._held:
            self._lose_payloads(route, "", now)
        self.channels.dial(session, worker, dial.costs, now)

    def _handle(self, route: bytes, came: Came, now: float) -> None:
        message, frame = came.message, came.frame
        if isinstance(message, wire.Join):
            self._to_join.discard(self.control.links.get(route, ""))
        self.control.receive(route, message, came.buffers, now)
        if isinstance(message, wire.Probe) and (session := self.control.links.get(route)):
            if self._peers_key and sockets.user(frame) == self._peers_key:
                self._with_keys.add(session)
            self.control.traffic.linked(session, sockets.sender(frame))
            self._note_rates()
        if not isinstance(message, wire.Push):
            return
        if message.ready_s and message.shard == SERVER:  # other numbers do not come by this path
            self._look_at_path(route, message, frame, came.size, now)
        if self._plan_watch is not None and message.compute_s is not None:
            peer = self.rounds.peers.get(self.control.links.get(route, ""))
            if peer is not None:
                self._plan_watch.pushed(peer.name, message.compute_s)

    def _note_rates(self) -> None:
        """What the cables of the workers' hosts carry, where that was measured before the run."""
        if self._link_watch is not None:
            peers, addresses = self.rounds.peers, self.control.traffic.addresses
            places = [(peers[s].id, address) for s, address in addresses.items() if s in peers]
            self.rounds.shards.rates = self._link_watch.cables(places)

    def _look_at_path(
        self, route: bytes, push: wire.Push, frame: zmq.Frame, size: int, now: float
    ) -> None:
        peer = self.rounds.peers.get(self.control.links.get(route, ""))
        if peer is None:
            return
        self.control.traffic.meter.pushed(peer.id, push.round, push.ready_s, size, now)
        if self._link_watch is not None:
            address = sockets.sender(frame)
            for sentence in self._link_watch.pushed(
                peer.id, peer.name, address, push.round, push.ready_s, size, now
            ):
                self.control.watcher.say(sentence, warning=True)

    def close(self) -> None:
        """Release what belongs to this run, and the ports where they are its own; safe to call
        twice."""
        if self.channels is not None:
            self.channels.close()
        if self._own_ports is not None:
            self._own_ports.close()
        if self._shared is not None:
            self._shared.close()

    # ------------------------------------------------------------------ what goes out

    def send(self, route: bytes, message: wire.Message, *buffers: Any) -> bool:
        """To one peer; False when that peer is gone."""
        return self._send_frames(route, wire.to_frames(message, *buffers), own=True)

    def send_kept(self, route: bytes, frames: Frames) -> bool:
        """The same for a message of an update, whose buffers may lie in the ring."""
        return self._send_frames(route, frames, own=self.data.ring is None)

    def publish(self, message: wire.Message) -> None:
        """To everybody who follows."""
        self._publish_frames(wire.to_frames(message))

    def publish_update(self, averages: list[Finished], close: Frames | None) -> None:
        """New averages, to those who share the ring and to those who do not; the close of their
        round travels with them."""
        closing = [] if close is None else [close]
        if self.channels is not None and close is not None:
            self.channels.round_over(time.monotonic())
        if not averages:
            for frames in closing:
                self._publish_frames(frames)
            return
        messages = [*(frames for _, frames in averages), *closing]
        sharing, spared = self.data.sharing, len(self._spared)
        sealed = 0 if self.channels is None else self.channels.live
        others = len(self.control.routes) - sharing - sealed - spared
        if sharing:
            headers = [self.data.as_shared(average) for average, _ in averages]
            sockets.send(self._pub, wire.join([*headers, *closing]))
        if sealed or spared:
            announced = [
                wire.to_frames(self._seal(average, frames)) for average, frames in averages
            ]
            sockets.send(self._pub, wire.join([*announced, *closing]))
        if others > 0 or not (sharing or sealed):
            copy = self.data.ring is not None  # its blocks are written over
            sockets.send(self._pub, wire.join(messages), copy=copy)
        size = sum(map(len, chain(*messages)))
        self.control.traffic.published_bytes += size
        self.sent_bytes += size * (sharing + sealed + max(0, others))

    def _seal(self, average: wire.Average, frames: Frames) -> wire.Sealed:
        """The header of an average whose numbers go through channels, or over a relay."""
        if self.channels is not None:
            return self.channels.publish(average, frames[1:])
        return wire.Sealed(**msgspec.structs.asdict(average))

    def spare(self, session: str, on: bool) -> None:
        """See `Transport`."""
        if on:
            self._spared.add(session)
        else:
            self._spared.discard(session)
        if self.channels is not None:
            self.channels.spare(session, on)

    def waiting(self, route: bytes) -> int:
        """Bytes of large frames that wait here for the peer at the other end."""
        return self._unread.waiting(route)

    def forget(self, route: bytes) -> None:
        """Nothing is sent there any more."""
        self._unread.forget(route)
        self._held.release(route)
        session = self.control.links.get(route)
        self._to_join.discard(session or "")
        if session is not None:
            self._costs.pop(session, None)
            self._spared.discard(session)
        if session is not None and self.channels is not None:
            self.channels.forget(session)

    def costs(self, session: str) -> dict[str, float] | None:
        """See `Transport`. Who came over ipc, whose folder nobody else can enter, may have keys as
        those may who came with keys. It has not said what sealing takes it, but this machine is
        its own."""
        if not self._closed_to_strangers:
            return {}
        return self._costs.get(session) or sealing.measured()

    def _publish_frames(self, frames: Frames) -> None:
        sockets.send(self._pub, frames, copy=len(frames) == 1)
        size = sum(map(len, frames))
        self.control.traffic.published_bytes += size
        self.sent_bytes += size * len(self.control.routes)

    def _send_frames(self, route: bytes, frames: Frames, own: bool) -> bool:
        """False when that peer is gone; what becomes of it is decided by its silence. One that has
        asked for thousands of messages and reads none is let go. `own`: see `sockets.Unread`."""
        try:
            if len(frames) == 1:
                sockets.send(self._router, [route, *frames], wait=False)
            else:
                self._unread.send(self._router, route, frames, own=own)
        except zmq.ZMQError as e:
            if e.errno == errno.EAGAIN and route in self.control.links:
                self._deaf_ears.add(self.control.links[route])
            if e.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        size = sum(map(len, frames))
        self.sent_bytes += size
        if (session := self.control.links.get(route)) is not None:
            self.control.traffic.sent(session, size)
        return True


def _is_sealed(message: wire.Message) -> bool:
    """Is this a push whose buffers come over a channel to this process?"""
    return isinstance(message, wire.Push) and bool(message.sealed) and not message.shard


def _sizes(cut: BucketPlan) -> tuple[tuple[int, ...], frozenset[int]]:
    return cut.sizes, cut.whole
