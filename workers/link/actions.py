"""What a session lets its client do, as frozen values; see `workers.link.session`."""

from __future__ import annotations

from typing import Any

import msgspec

from paramserver.protocol import messages as wire


class Action(msgspec.Struct, frozen=True):
    pass


class Send(Action, frozen=True):
    message: wire.Message


class Join(Action, frozen=True):
    """Tell the server where the replica stands; what was to be pushed is void."""


class Greet(Action, frozen=True):
    """Say hello again, as soon as nobody is in the middle of something: the server does not know
    this peer any more, or is silent."""


class Probe(Action, frozen=True):
    """Let the server try both ways."""


class Silent(Action, frozen=True):
    """Nothing was heard for this long: look whether this peer is still let in, or give up."""

    seconds: float


class Say(Action, frozen=True):
    """A sentence for a person."""

    text: str


class Hear(Action, frozen=True):
    """The server admits this peer. Listen where it says that averages come, then call `admitted`;
    where that cannot be, `join_again`."""

    admit: wire.Admit


class Joined(Action, frozen=True):
    """The replica holds a state of the run that it was welcomed to."""


class Take(Action, frozen=True):
    """Decode this average into its place; where that is too late, call `lost`.

    `first` of its round: forget what was taken before.
    """

    average: wire.Average
    payload: Any
    first: bool


class Apply(Action, frozen=True):
    """Apply this update, then call `applied`. `first`: forget what was taken before."""

    close: wire.Close
    first: bool


class Compare(Action, frozen=True):
    """Tell the server the digest of this step."""

    step: int


class Closed(Action, frozen=True):
    """This update is in the model now."""

    close: wire.Close


class Missed(Action, frozen=True):
    """This update is not followed."""

    close: wire.Close


class Give(Action, frozen=True):
    """Make the replica's state ready to be sent as this snapshot: call `gives`, then send its
    manifest; or call `cannot_give`."""

    snapshot: int


class SendPiece(Action, frozen=True):
    """Send a piece of a snapshot; tell the server where there is no such piece."""

    source: Any
    snapshot: int
    piece: int


class Begin(Action, frozen=True):
    """Make room for a snapshot: call `takes`; or `refuse`, where it cannot be right."""

    manifest: wire.Manifest


class TakePiece(Action, frozen=True):
    """Put a piece into its place: call `took`; or `refuse`."""

    room: Any
    snapshot: int
    piece: int
    payload: Any


class Adopt(Action, frozen=True):
    """All pieces are here, load them: call `adopted`; or `refuse`, where they do not fit."""

    room: Any
    manifest: wire.Manifest
