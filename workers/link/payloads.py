"""How a peer's payloads travel: through a channel where its link is under CURVE, else with their
headers.

A channel is asked for after each greeting. Until it is there, and where it does not come or fails,
payloads go through link and SUB: nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.transport import sealing, shm, sockets

from .channel import SKIPS_MAX, Channel, Lost, brought

if TYPE_CHECKING:
    from .connection import Connection

CONNECT_S = 5.0
"""In which a channel must be bound."""

MEASURE_S = 0.1

DIALS_MAX = 3
"""After each greeting. Then this peer does without."""


class Payloads:
    """The channels of one peer, and what it subscribes to."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._current: Channel | None = None  # bound
        self._next: Channel | None = None  # not bound yet
        self._old: Channel | None = None  # its last averages may be on their way
        self._dials = 0
        self._number = 0  # of the newest push
        self._hears = False
        self._topics: set[bytes] = set()
        self._measured_at = 0.0
        self._awaited: tuple[int, float] | None = None  # the payload that is waited for, since when

    @property
    def sealed(self) -> bool:
        """Is there a channel that works?"""
        return self._current is not None

    @property
    def waiting(self) -> list[zmq.Socket[bytes]]:
        """The sockets of channels from which something is waited for, beside the link."""
        if self._awaited is not None:
            return [c.socket for c in (self._old, self._current) if c is not None]
        return []

    # ------------------------------------------------------------------ coming and going

    def greeted(self) -> None:
        """The server has welcomed this peer, and knows its link."""
        welcome = self._connection.welcome
        self._dials = self._number = 0
        if welcome is not None and welcome.channels and self._connection.with_keys:
            self._dial()

    def hear(self) -> None:
        """The server admits this peer: receive averages from now on."""
        self._hears = True
        self._subscribe()

    def close(self) -> None:
        """Forget all keys; the sockets of the connection are closed, too."""
        for channel in (self._current, self._next, self._old):
            if channel is not None:
                channel.close()
        self._current = self._next = self._old = self._awaited = None
        self._hears = False
        self._topics.clear()

    def _dial(self) -> None:
        self._dials += 1
        self._connection.send(wire.Dial(costs=sealing.measured()))

    def told(self, message: wire.Channel, now: float) -> None:
        """The server hands out a channel, or closes the one that there was."""
        if not message.port:
            channels = (self._current, self._next, self._old)
            current = self._current
            if current is not None and self._next is not None and message.id == current.id:
                self._replace_by(None)
                self._subscribe()  # the next one comes up, or does not
            elif not message.id or message.id in (c.id for c in channels if c is not None):
                self._fail(message.reason, tell=False)
            return  # else it was given up here, too, and another one asked for
        if self._next is not None:
            self._next.close()
        try:
            self._next = self._connection.channel(message, now)
        except PeerError as e:
            self._next = None
            self._fail(str(e))
            return
        self._subscribe()

    def _replace_by(self, channel: Channel | None) -> None:
        """Push through this one. The one before may still have averages that nobody has read."""
        if self._current is not None:
            if self._old is not None:
                self._old.close()
            self._old = self._current
        self._current = channel

    def _fail(self, why: str, *, tell: bool = True) -> None:
        """There is no channel any more: ask for another one, or do without."""
        hears = self._hears
        topics = set(self._topics)
        self.close()
        self._hears, self._topics = hears, topics
        self._subscribe()
        connection = self._connection
        if self._dials < DIALS_MAX:
            self._dial()
            return
        if self._dials == DIALS_MAX:
            self._dials += 1
            connection.log.info(f"gradients go through CURVE, which is slower: {why}")
        if tell:
            connection.send(wire.Dial())

    def _subscribe(self) -> None:
        """Hear what brings averages. While a channel comes up, either way may."""
        connection = self._connection
        sub = connection.sub
        if not self._hears or sub is None:
            return
        wanted = set()
        relays = connection.relays
        if self._current is not None or self._next is not None or relays.from_server:
            wanted.add(wire.topic(wire.Sealed))
        if self._current is None and not relays.announced:
            wanted.add(wire.topic(wire.Average))
        for topic in wanted - self._topics:
            sockets.subscribe(sub, topic)
        for topic in self._topics - wanted:
            sockets.unsubscribe(sub, topic)
        self._topics = wanted

    def relayed(self) -> None:
        """Whether the server's averages come from a relay has changed."""
        self._subscribe()

    def forgive(self, missing: int) -> None:
        """So many averages may be missing on the channel without harm."""
        if self._current is not None:
            self._current.skips = -missing

    def measure(self) -> None:
        """Bound what channels hold here. Call it from time to time, in a long step, too; any thread
        may."""
        for channel in (self._current, self._next, self._old):
            if channel is not None:
                channel.measure()

    def tick(self, now: float) -> None:
        """Time has passed."""
        if now - self._measured_at > MEASURE_S:
            self._measured_at = now
            self.measure()
        channel = self._next
        if channel is None:
            return
        if channel.come_up(now):
            self._next = None
            self._replace_by(channel)
            self._subscribe()
        elif now - channel.since > CONNECT_S:
            port, self._next = channel.port, None
            channel.close()
            self._fail(f"nothing comes through port {port} of the server; is it open?")

    # ------------------------------------------------------------------ payloads

    def push(self, push: wire.Push, buffers: Sequence[Any]) -> None:
        """Send a push, whose buffers go through the channel if there is one."""
        connection, channel = self._connection, self._current
        if channel is None or not buffers:
            connection.send(push, *buffers)
            return
        self._number += 1
        push = msgspec.structs.replace(push, sealed=self._number)
        connection.send(push)
        try:
            channel.push(push, buffers)
        except Lost:
            self._fail("its connection was cut")

    def payload(
        self, average: wire.Sealed, now: float, *, patient: bool = False
    ) -> list[Any] | shm.Blocks | None:
        """The buffers of an average; None if they are on their way. Raises `Lost`, and looks for
        another channel, where they do not come. `patient`: they need not come this way, and the
        channel is not to blame."""
        channels = [c for c in (self._old, self._current) if c is not None]
        try:
            found = brought(channels, average, now, patient=patient)
        except Lost:
            self._awaited = None
            if channels and channels[-1].skips > SKIPS_MAX and not patient:
                self._fail(f"{SKIPS_MAX} averages were missing")
            raise
        if found is not None:
            self._awaited = None
            channel, buffers = found
            if channel is self._current and self._old is not None:
                self._old.close()
                self._old = None
            return buffers
        if patient:
            return None
        if self._awaited is None or self._awaited[0] != average.number:
            self._awaited = average.number, now
        heard_at = max(self._awaited[1], *(c.heard_at for c in channels))
        if now - heard_at > sealing.PATIENCE * self._connection.heartbeat_timeout:
            self._fail("nothing comes through it")
            raise Lost
        return None


__all__ = ["Payloads"]
