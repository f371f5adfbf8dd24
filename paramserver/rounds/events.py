"""The events of a run, as values: `Rounds.handle` takes one and returns its effects.

`Told` carries a peer's message as it came.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from paramserver.protocol import messages as wire
from paramserver.rounds.disagreement import Comparison

Part = wire.Manifest | wire.Want | wire.Piece
"""A part of a snapshot, which the server passes on to the other side."""
Message = (
    Part
    | wire.Join
    | wire.Ready
    | wire.Unready
    | wire.Unreadable
    | wire.NextLease
    | wire.Fetch
    | wire.Digest
    | wire.Stand
    | wire.Adopted
    | wire.Abort
    | wire.Evaluating
    | wire.StopRun
    | wire.Goodbye
    | wire.Reached
    | wire.Holds
    | wire.Lacks
    | wire.HandsOn
    | wire.Listens
)
"""A message that a peer sends on its link, but for a push."""


class Event(msgspec.Struct, frozen=True):
    pass


class Tick(Event, frozen=True):
    """Time has passed. The server ticks now and then, and at `Rounds.next_deadline`."""


class Stop(Event, frozen=True):
    """Somebody ends the run, in order or by an `error`."""

    reason: str
    error: bool = False


class Greeted(Event, frozen=True):
    """A peer greeted, and `Rounds.declines` let it pass. Without an `id` it gets the first free
    one; a peer that holds its id is removed. `returns`: the process belonged to this run before;
    `trained`: it has finished one of the runs that this server served before."""

    session: str
    role: str
    id: int | None
    nonce: str
    host: str
    pid: int
    returns: bool = False
    trained: bool = False


class Alive(Event, frozen=True):
    """A process of this run beats, but has not greeted this server."""

    nonce: str


class StoodStill(Event, frozen=True):
    """The server itself stood still for so long, as a computer does that sleeps, and has read what
    came meanwhile."""

    seconds: float


class Forgotten(Event, frozen=True):
    """The updates up to and including the one that led to `step` are no longer kept, by the server
    and the shards; by the server itself those up to `own`."""

    step: int
    own: int = 0


class Compared(Event, frozen=True):
    """The gradients of the round that has just closed were compared: each worker's, by number."""

    workers: Mapping[int, Comparison]


class ShardEvent(Event, frozen=True):
    """An event of one shard, by its number. `Rounds` ignores it if it does not know it."""

    shard: int


class Works(ShardEvent, frozen=True):
    """The shard gave a sign of life."""


class Made(ShardEvent, frozen=True):
    """The shard has made this average, and sent it to all."""

    round: int
    bucket: int


class Failed(ShardEvent, frozen=True):
    """The shard cannot go on, for this reason."""

    reason: str


class PeerEvent(Event, frozen=True):
    """An event of one peer. `Rounds` ignores it if it does not know that session."""

    session: str


class Heard(PeerEvent, frozen=True):
    """The peer gave a sign of life. Nothing follows from it before the next tick."""


class Told(PeerEvent, frozen=True):
    """The peer sent a message on its link."""

    message: Message


class Pushed(PeerEvent, frozen=True):
    """The peer sent a push that `Rounds.refusal` let pass. `bad` says what is wrong with its
    numbers, `norm` is that of its gradient, where the server measured one."""

    push: wire.Push
    bad: str | None = None
    norm: float | None = None


class PushRefused(PeerEvent, frozen=True):
    """The server must not use this push; `reason` says why."""

    push: wire.Push
    reason: str


class Relinked(PeerEvent, frozen=True):
    """The peer's link was cut and is back: messages on their way may be lost."""


class Dropped(PeerEvent, frozen=True):
    """The server drops the peer, with `error` because the peer broke a rule."""

    reason: str
    error: bool = False


class Placed(PeerEvent, frozen=True):
    """The peer's link comes from this address; empty: from the server's own host."""

    address: str


class Offered(PeerEvent, frozen=True):
    """The worker has started a shard."""
