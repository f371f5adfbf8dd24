"""What happens to a run, as values: `Rounds.handle` takes them and returns the effects.

Where a peer's message is all that happened, `Told` carries it as it came.
"""

from __future__ import annotations

import msgspec

from paramserver.protocol import messages as wire

Part = wire.Manifest | wire.Want | wire.Piece
"""Of a snapshot; it goes on to the other side."""
Message = (
    Part
    | wire.Join
    | wire.Ready
    | wire.Unready
    | wire.Unreadable
    | wire.Fetch
    | wire.Digest
    | wire.Stand
    | wire.Adopted
    | wire.Abort
    | wire.Goodbye
)
"""What a peer may tell, beside a push."""


class Event(msgspec.Struct, frozen=True):
    pass


class Tick(Event, frozen=True):
    """Time has passed. Due now and then, and at `Rounds.next_deadline`."""


class Stop(Event, frozen=True):
    """Somebody ends the run, in order or by an `error`."""

    reason: str
    error: bool = False


class Greeted(Event, frozen=True):
    """A Hello that `Rounds.declines` let pass. Without an `id` the peer gets the first that is
    free; whoever holds its id is gone. `returns`: it has been part of this run before."""

    session: str
    role: str
    id: int | None
    nonce: str
    host: str
    pid: int
    returns: bool = False


class Alive(Event, frozen=True):
    """A process of this run beats that has not greeted this server."""

    nonce: str


class Forgotten(Event, frozen=True):
    """Updates up to and including the one that led to `step` are not kept any more."""

    step: int


class PeerEvent(Event, frozen=True):
    """Something about one peer. It is ignored where that peer is not here."""

    session: str


class Heard(PeerEvent, frozen=True):
    """Any sign of life. Nothing follows from it before time is looked at."""


class Told(PeerEvent, frozen=True):
    """A message came on the peer's link."""

    message: Message


class Pushed(PeerEvent, frozen=True):
    """A push that `Rounds.refusal` let pass; `bad` tells what is wrong with its numbers. `norm`:
    that of the gradient, where it is known."""

    push: wire.Push
    bad: str | None = None
    norm: float | None = None


class PushRefused(PeerEvent, frozen=True):
    """A push that must not be used, and why."""

    push: wire.Push
    reason: str


class Relinked(PeerEvent, frozen=True):
    """The peer's link was cut and is back: what was on its way may be lost."""


class Dropped(PeerEvent, frozen=True):
    """The server lets the peer go; `error`: since it broke a rule."""

    reason: str
    error: bool = False
