"""What a session asks its client to do, as frozen values; see `workers.link.session`."""

from __future__ import annotations

from typing import Any

import msgspec

from paramserver.protocol import messages as wire


class Action(msgspec.Struct, frozen=True):
    pass


class Send(Action, frozen=True):
    message: wire.Message


class Join(Action, frozen=True):
    """Send a `Join` with the replica's position; pushes that wait are void."""


class Greet(Action, frozen=True):
    """Say hello again, as soon as no other action is under way: the server does not know this peer
    any more, or is silent."""


class Probe(Action, frozen=True):
    """Send a probe, which the server answers on link and PUB."""


class Silent(Action, frozen=True):
    """The server has been silent for this long: check whether it still admits this peer, or give
    up."""

    seconds: float


class Say(Action, frozen=True):
    """A sentence for a person."""

    text: str


class Hear(Action, frozen=True):
    """The server admits this peer. Receive averages where it sends them, then call `admitted`;
    where that fails, `join_again`."""

    admit: wire.Admit


class Joined(Action, frozen=True):
    """The replica holds a state of the run that it was welcomed to."""


class Take(Action, frozen=True):
    """Decode this average into the memory for it; where that is too late, call `lost`,
    and `unfit` where they are none of this bucket.

    `first` of its round: drop averages that were taken before.
    """

    average: wire.Average
    payload: Any
    first: bool


class Apply(Action, frozen=True):
    """Apply this update, then call `applied`. `first`: drop averages that were taken before."""

    close: wire.Close
    first: bool


class Compare(Action, frozen=True):
    """Report the digest of this step to the server."""

    step: int


class Closed(Action, frozen=True):
    """This update is in the model now."""

    close: wire.Close


class Missed(Action, frozen=True):
    """This update is not applied here, because the replica is adrift."""

    close: wire.Close


class Give(Action, frozen=True):
    """Make the replica's state ready to be sent as this snapshot: call `gives`, then send its
    manifest; or call `cannot_give`."""

    snapshot: int


class SendPiece(Action, frozen=True):
    """Send a piece of a snapshot; abort it where there is no such piece."""

    source: Any
    snapshot: int
    piece: int


class Begin(Action, frozen=True):
    """Allocate memory for a snapshot: call `takes`; or `refuse`, where the manifest is
    impossible."""

    manifest: wire.Manifest


class TakePiece(Action, frozen=True):
    """Store a piece: call `took`; or `refuse`."""

    room: Any
    snapshot: int
    piece: int
    digest: str
    payload: Any


class Adopt(Action, frozen=True):
    """All pieces are here, load them: call `adopted`; or `refuse`, where they do not fit."""

    room: Any
    manifest: wire.Manifest
