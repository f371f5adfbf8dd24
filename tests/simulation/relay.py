"""The two ends of a relay in virtual time, for the shipping `Relays` of a peer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from paramserver.protocol import messages as wire
from paramserver.tensors.bucket import BucketPlan
from workers.link.relays import Key

from .book import Broken
from .network import Carried, Line, Network
from .server import Ring
from .shard import Block, Lane, content

if TYPE_CHECKING:
    from .peer import Client

LOSES = 0.1  # share of the relays that do not hand on
LOST = 0.2  # this share of what they should
DELAY_S, JITTER_S = 0.0002, 0.01  # within a host


class Plan(msgspec.Struct):
    """What a relay needs to know of the buckets."""

    buckets: tuple[int, ...]

    @classmethod
    def of(cls, buckets: int) -> BucketPlan:
        return cast(BucketPlan, cls(tuple(range(buckets))))


class Relay:
    """The end that hands on."""

    def __init__(self, client: Client, plan: BucketPlan) -> None:
        assert client.welcome is not None
        if client.serial % 9 == 0:
            raise OSError("no folder")
        world = client.world
        self.address = client.address
        self._nonce, self._world = client.welcome.nonce, world
        self._ring = Ring(2 * len(plan.buckets)) if client.serial % 3 else None
        self._loses = LOST if world.chance(LOSES) else 0.0
        self.net = Network(world, DELAY_S, JITTER_S)
        self._routes: list[bytes] = []
        self._new: list[bytes] = []
        self.folder = f"relay-{client.serial}-{client.server.boots}-{client.greetings}"
        self._folders = client.server.relays
        self._folders[self.folder] = self

    def receive(self, route: bytes, carried: Carried) -> None:
        """Somebody begins to listen: the socket notes it, the process looks later."""
        self._new.append(route)

    def look(self) -> None:
        new, self._new = self._new, []
        self._routes += new
        for route in new:
            self.net.send(route, (wire.Passed(nonce=self._nonce, shard=0, round=0, bucket=0), None))

    def hand_on(self, shard: int, round: int, bucket: int, buffers: list[Any]) -> None:
        self.look()
        passed = wire.Passed(nonce=self._nonce, shard=shard, round=round, bucket=bucket)
        [average] = buffers
        payload = content(average)
        if self._ring is not None:
            payload = Block(self._ring, self._ring.write(payload))
        for route in self._routes:
            if not self._world.chance(self._loses):
                self.net.send(route, (passed, payload))

    def close(self) -> None:
        self._folders.pop(self.folder, None)
        self.net.server_died()


class Source:
    """The end that listens."""

    def __init__(self, client: Client, plan: BucketPlan, told: wire.Listen) -> None:
        relay = client.server.relays.get(told.folder)
        if relay is None or client.serial % 8 == 0:
            raise OSError("no such folder")
        if relay.address != client.address:
            raise Broken(f"{client.name} is to listen to a relay on another host")
        assert client.welcome is not None
        self.server = told.server
        self.heard = False
        self._client, self._nonce = client, client.welcome.nonce
        self._most = 2 * len(plan.buckets)
        self._passed: dict[Key, Any] = {}
        self._line = Lane(relay.net, "relay", relay.receive, self._arrive)
        self._line.send((None, None))

    def _arrive(self, line: Line, carried: Carried) -> None:
        passed, payload = carried
        if passed.nonce != self._nonce:
            return
        self.heard = True
        if passed.round:
            self._passed[passed.shard, passed.round, passed.bucket] = payload
            while len(self._passed) > self._most:
                del self._passed[next(iter(self._passed))]
        self._client.hears_relay()

    def read(self) -> bool:
        return False

    def payload(self, key: Key) -> list[Any] | None:
        found = self._passed.pop(key, None)
        return None if found is None else [found]

    def close(self) -> None:
        self._line.close()


__all__ = ["Plan", "Relay", "Source"]
