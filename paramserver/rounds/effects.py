"""The decisions of `rounds`, as values that the server carries out in their order."""

from __future__ import annotations

import msgspec

from paramserver.protocol.messages import Close, End, Layout, Message


class Effect(msgspec.Struct, frozen=True):
    pass


class Send(Effect, frozen=True):
    """Send a message to one peer's link."""

    session: str
    message: Message


class PassOn(Effect, frozen=True):
    """Pass the part of a snapshot that has just come on to the other side's link, with its
    payload."""

    session: str
    message: Message


class Publish(Effect, frozen=True):
    """Publish a message to all peers."""

    message: Message


class Start(Effect, frozen=True):
    """The layout is known: allocate its sums."""

    layout: Layout
    step: int


class Add(Effect, frozen=True):
    """Add the payload that came with this push to the bucket's sum, `weight` times. `late`: it is
    of an earlier round."""

    worker: int
    bucket: int
    weight: float
    late: bool = False


class Discard(Effect, frozen=True):
    """Drop the payload of this push: its norm is out of proportion, or it is of an earlier round
    and too old for the next one."""

    worker: int
    bucket: int


class Finish(Effect, frozen=True):
    """Divide the bucket's sum by `weight` and publish it."""

    round: int
    step: int
    bucket: int
    weight: float
    absent: tuple[int, ...]
    shard: int = 0
    """Which has its sum."""


class Closed(Effect, frozen=True):
    """An update entered the log: keep it with the round's averages, and publish it."""

    close: Close


class Void(Effect, frozen=True):
    """The open round is void: drop its sums."""

    round: int


class Say(Effect, frozen=True):
    """Log a sentence for people, perhaps as a warning; a `problem` is kept for the summary, too."""

    text: str
    warning: bool = False
    problem: bool = False


class Remove(Effect, frozen=True):
    """The peer is gone; forget its sockets."""

    session: str


class Employed(Effect, frozen=True):
    """The shard that this worker has offered takes part, by this number."""

    shard: int
    session: str


class Spared(Effect, frozen=True):
    """This peer gets what other hosts than its own (`address`) average from its relay, so those
    need not send it; or (not `on`) they must again."""

    session: str
    address: str
    on: bool


class Dismissed(Effect, frozen=True):
    """A shard is gone, with all that it kept."""

    shard: int


class Retired(Effect, frozen=True):
    """A shard averages nothing any more, because its worker leaves: take over what it keeps of the
    newest update before it ends."""

    shard: int


class Declined(Effect, frozen=True):
    """A shard that this peer has started is not wanted: end it."""

    session: str


class Ended(Effect, frozen=True):
    """The run is over: publish the End."""

    end: End
