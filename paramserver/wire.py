"""The protocol: every message, and how it becomes ZeroMQ frames and back.

A message is a list of frames. Frame 0 is the **header**: one of the frozen structs below as JSON,
told apart by its `type`. Every further frame is a raw buffer of numbers; its meaning is fixed by
the header and its length is checked against the layout before a byte of it is used. There is no
pickle. What follows from one event is published as one: an empty frame stands between messages that
travel together (`join`, `split`).

Sockets: a `ROUTER` (port) for everything addressed to one peer, a `PUB` (port + 1) for what all of
them follow. A peer holds three sockets: the **door** (DEALER, TCP), where it says hello and later
beats from a thread of its own; the **link** (DEALER) for the rest; and a SUB.

========== ============== ==================================================================
message    direction      meaning; buffers that follow the header
========== ============== ==================================================================
Hello      door -> server who I am. Answer: Welcome, Later or Reject
Welcome    server -> door the run's settings, my session, where link and SUB connect to
Later      server -> door not yet, and why: ask again
Probe      link -> server binds this link to a session. Answer: Probe on PUB and a Pulse on the link
Greet      server -> any  I do not know this link: probe (or say hello) again; or: join again
Join       link -> server my layout, step and lineage. Answer: Admit or Reject
Admit      server -> link origin / follow / adopt: what to do to stand where the log stands
Ready      link -> server I am waiting for samples of a set of this length
Unready    link -> server give me no more samples until I am ready again
Push       link -> server my gradient of one bucket; 1..n encoded buffers
Refused    server -> link this push was not taken, and why
Average    PUB or link    the mean of one bucket; 1..n encoded buffers. Not applied before Close
Shared     PUB            the same for peers that share memory with the server: no buffers
Close      PUB or link    the round is over: this is the next update of the log
Open       PUB or link    a round is open, who is in it, with which samples (also inside Close)
Fetch      link -> server send me the updates after this step, Averages and Closes as on PUB
Fetched    server -> link that was all; where the log stands now
Stand      link -> server the observer has applied everything up to this step
Digest     link -> server the digest of my weights at this step
Give       server -> link you are the one who gives the snapshot
Manifest   link -> link   what the snapshot holds (through the server)
Want       link -> link   send me this piece of it (through the server)
Piece      link -> link   here it is; 1 raw buffer (through the server)
Adopted    link -> server I hold the snapshot now
Abort      both           the snapshot is off, and why
Beat       door -> server I am alive. A server that does not know me answers Greet
Pulse      PUB and link   the server is alive; newest step, what it is doing
Report     link -> server the observer's evaluation
Problem    link -> server what the observer could not do, as a sentence for people
Goodbye    link -> server I leave, in order; the digest of my weights
Reject     server -> any  you cannot take part, and why; final
End        PUB and link   the run is over, and why
========== ============== ==================================================================

A peer that breaks these rules is answered with `Reject` and costs only itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from paramserver.errors import PeerError

PROTOCOL = 2
KINDS = ("grad", "stat", "count")
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32")
DIMENSIONS_MAX = 64
ELEMENTS_MAX = 2**38  # a terabyte of float32
PROBLEM_CHARS = 1000
HEADER_BYTES_MAX = 4 * 2**20  # a layout of some ten thousand parameters; everything else is tiny

Int = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""Python has larger ones, which cost more than they are worth to a peer that means well."""

Place = tuple[Int, Int, Int]
"""Where a buffer lies in shared memory; see `arena.Place`."""

Lease = tuple[int, int, int]
"""(epoch, start, stop): a range of the epoch's shuffled order."""

OWN: Lease = (0, 0, 0)
"""The lease of a worker that brings samples of its own."""


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, kw_only=True):
    """Base of all headers. `type` comes first on the wire: a SUB can subscribe by prefix."""


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of the layout. `kind`: grad (mean), stat (mean, as float32), count (maximum)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str = "grad"


class Layout(msgspec.Struct, frozen=True):
    """Names, shapes and dtypes of what is exchanged, in the order of the flat vector."""

    tensors: tuple[Tensor, ...]

    def fingerprint(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def problem(self) -> str | None:
        """What cannot be right about this layout, whoever sent it; None when nothing is wrong."""
        names: set[str] = set()
        elements = 0
        for t in self.tensors:
            if t.kind not in KINDS or t.dtype not in DTYPES:
                return f"{t.name[:80]} is of kind {t.kind[:20]!r}, dtype {t.dtype[:20]!r}"
            if any(d < 0 for d in t.shape) or len(t.shape) > DIMENSIONS_MAX:
                return f"{t.name[:80]} has a shape that no tensor has"
            if t.name in names:
                return f"{t.name[:80]} comes twice"
            names.add(t.name)
            size = 1
            for d in t.shape:
                size = min(size * d, ELEMENTS_MAX + 1)
            elements += size
            if elements > ELEMENTS_MAX:
                return f"more than {ELEMENTS_MAX} numbers"
        return None if elements else "there is nothing to train in it"

    def difference(self, other: Layout) -> str | None:
        """The first difference to `other`, as a sentence about it; None when they are equal."""
        mine = {t.name: t for t in self.tensors}
        theirs = {t.name: t for t in other.tensors}
        for t in self.tensors:
            o = theirs.get(t.name)
            if o is None:
                return f"{t.name} {_shape(t)} is missing"
            if o != t:
                return f"{t.name} is {_shape(o)}, the run has {_shape(t)}"
        for t in other.tensors:
            if t.name not in mine:
                return f"{t.name} {_shape(t)} is not in the run's model"
        if self.tensors != other.tensors:
            return "the parameters come in another order"
        return None


def _shape(t: Tensor) -> str:
    return f"{'x'.join(map(str, t.shape)) or 'scalar'} {t.dtype}" + (
        "" if t.kind == "grad" else f" ({t.kind})"
    )


# --------------------------------------------------------------------------- greeting


class Hello(Message, frozen=True):
    protocol: Int
    role: str
    """worker | observer"""
    id: Int | None
    """A worker's number; None: any free one."""
    nonce: str
    """Made once per process: tells a restarted worker from a second one with the same id."""
    host: str
    pid: Int
    run: str | None = None
    """The run this replica belongs to, if it has state already."""
    key: str = ""
    """Proves that the observer is the one this server started."""


class Welcome(Message, frozen=True):
    protocol: Int
    run: str
    nonce: str
    """The server process; every published message carries it."""
    session: str
    id: Int
    settings: dict[str, Any]
    pub_port: Int
    ipc: str | None = None
    """Folder of the ipc sockets, for peers on the server's own host."""
    shared: str | None = None
    """Folder of the memory that such peers may share (`arena`)."""


class Probe(Message, frozen=True):
    session: str


class Greet(Message, frozen=True):
    session_known: bool = True
    """False: this server knows nothing of the session, say hello; else a probe is enough."""
    join: bool = False
    """The link is known, but what was sent before, either way, may be lost: join again."""


class Join(Message, frozen=True):
    layout: Layout
    step: Int
    lineage: str
    device: str
    kind: str = ""
    """What rounds as this replica does, in words: equal kinds must have equal digests."""
    recipe: str = ""
    """What turns an average into weights there, in words: it must be the same everywhere."""
    ledger: dict[str, Any] | None = None
    """As of this step: for a server that knows nothing of the log, since it is new or resumes."""
    link: str = "tcp"
    sharing: bool = False
    """This peer reads averages from the server's ring, if there is one when it is admitted."""
    outbox: Int = 0
    """Number of the outbox that it has made for its pushes; 0: none."""


class Admit(Message, frozen=True):
    action: str
    """origin: your state is the run's; follow: fetch what you lack; adopt: a snapshot follows;
    behind: what you lack is not kept any more, join again when you want a snapshot."""
    step: Int
    lineage: str


class Ready(Message, frozen=True):
    samples: Int
    batch_size: Int
    own: bool = False
    """It brings samples of its own: its lease is `OWN`, and its pushes tell how many they are of.
    Then `samples` is 0."""


class Unready(Message, frozen=True):
    pass


class Later(Message, frozen=True):
    reason: str


class Reject(Message, frozen=True):
    reason: str
    hint: str = ""


# --------------------------------------------------------------------------- rounds


class Push(Message, frozen=True):
    round: Int
    bucket: Int
    samples: Int
    absent: tuple[int, ...] = ()
    """Indexes into the layout of this bucket's parameters that had no gradient."""
    scale: float = 1.0
    places: tuple[Place, ...] = ()
    """Where the buffers lie in the outbox; none: they follow as frames."""
    loss: float | None = None
    """Mean loss over the samples; with the last bucket."""
    ready_s: float = 0.0
    """When it was ready, by its worker's clock: two of them tell how long it computed between."""


class Refused(Message, frozen=True):
    round: Int
    reason: str


class Average(Message, frozen=True):
    nonce: str
    round: Int
    step: Int
    """The step that this update leads to."""
    bucket: Int
    absent: tuple[int, ...] = ()
    scale: float = 1.0


class Shared(Average, frozen=True):
    places: tuple[Place, ...] = ()
    """Where the buffers lie in the ring."""


class Open(Message, frozen=True):
    nonce: str
    round: Int
    step: Int
    """The step everyone stands at."""
    lineage: str
    leases: dict[int, tuple[Lease, ...]]
    """By worker id: the lease of this round and, if there is more to do, the one after it."""


class Close(Message, frozen=True):
    nonce: str
    round: Int
    step: Int
    """The step this update leads to."""
    lineage: str
    """Names the state after this update; see `next_lineage`."""
    buckets: tuple[int, ...]
    """The buckets that have an average. One that nobody contributed to has none."""
    contributors: dict[int, int]
    """Samples of each worker that put something into this update."""
    late: dict[int, str]
    """Members that are not in it, or not with everything, and why."""
    loss: float | None
    seconds: float
    """From the opening of the round to its close."""
    ledger: dict[str, Any]
    open: Open | None = None
    """The round that follows at once."""
    reason: str = ""
    partly: dict[int, tuple[int, ...]] = {}
    """Of contributors that are not in it with everything: the buckets that are."""


class Fetch(Message, frozen=True):
    step: Int
    lineage: str


class Fetched(Message, frozen=True):
    step: Int
    open: Open | None = None


class Stand(Message, frozen=True):
    step: Int


class Digest(Message, frozen=True):
    step: Int
    digest: str


# --------------------------------------------------------------------------- snapshots


class Give(Message, frozen=True):
    snapshot: Int
    step: Int
    lineage: str


class Manifest(Message, frozen=True):
    snapshot: Int
    step: Int
    lineage: str
    tree: str
    """JSON of the state with its tensors replaced by their numbers (`workers.state`)."""
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """dtype and shape of each."""
    piece_bytes: Int
    """Every tensor is cut into pieces of this size; they are numbered in order."""


class Want(Message, frozen=True):
    snapshot: Int
    piece: Int


class Piece(Message, frozen=True):
    snapshot: Int
    piece: Int


class Adopted(Message, frozen=True):
    snapshot: Int
    step: Int
    lineage: str


class Abort(Message, frozen=True):
    snapshot: Int
    reason: str


# --------------------------------------------------------------------------- life


class Beat(Message, frozen=True):
    session: str
    run: str = ""
    nonce: str = ""
    """Of the Hello: a server that was started again knows by these who may come back."""


class Pulse(Message, frozen=True):
    nonce: str
    step: Int
    lineage: str
    phase: str
    """What the server is doing or waiting for, as a sentence."""
    open: Open | None = None
    closed: Int | None = None
    """Newest round that is over."""
    sent_bytes: Int = 0
    """By the server to all, since it started; and what it received."""
    received_bytes: Int = 0
    ending: bool = False
    """No more rounds; the run ends as soon as the observer stands at the newest step."""


class Report(Message, frozen=True):
    step: Int
    values: dict[str, float | None]
    final: bool = False


class Problem(Message, frozen=True):
    text: Annotated[str, msgspec.Meta(max_length=PROBLEM_CHARS)]
    """What could not be done and why: a checkpoint that was not written, a logger that stopped."""


FINISHED = "finished"
"""The reason of a worker that leaves because it is done."""


class Goodbye(Message, frozen=True):
    reason: str
    step: Int = 0
    digest: str = ""


class End(Message, frozen=True):
    nonce: str
    step: Int
    lineage: str
    reason: str
    error: bool = False
    """The run did not end as it should: peers exit with an error too."""


ANY = (
    Hello | Welcome | Later | Probe | Greet | Join | Admit | Ready | Unready | Reject | Push
    | Refused | Average | Shared | Open | Close | Fetch | Fetched | Stand | Digest | Give
    | Manifest | Want | Piece | Adopted | Abort | Beat | Pulse | Report | Problem
    | Goodbye | End
)  # fmt: skip

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ANY)


def to_frames(message: Message, *buffers: Any) -> list[Any]:
    """The frames of a message: its header, then its buffers as they are."""
    return [_encoder.encode(message), *buffers]


def from_frames(frames: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The message and its buffers. Frames are bytes-like or `zmq.Frame`s; nothing is copied.

    Raises `PeerError` where the header is missing, too large, or not one of this protocol's.
    """
    if not frames:
        raise PeerError("a message without a header")
    header = getattr(frames[0], "buffer", frames[0])
    if len(header) > HEADER_BYTES_MAX:
        raise PeerError(f"a header of {len(header)} bytes (at most {HEADER_BYTES_MAX})")
    try:
        return _decoder.decode(header), [getattr(f, "buffer", f) for f in frames[1:]]
    except (ValueError, RecursionError) as e:  # DecodeError, ValidationError, UnicodeDecodeError
        raise PeerError(f"not a header of this protocol: {e}") from None


def join(messages: Sequence[Sequence[Any]]) -> list[Any]:
    """Several messages as one, frames of each in order: it arrives as a whole, at the cost of one.

    An empty frame stands between two messages; no message has one of its own.
    """
    joined: list[Any] = []
    for frames in messages:
        if joined:
            joined.append(b"")
        joined.extend(frames)
    return joined


def split(frames: Sequence[Any]) -> list[Sequence[Any]]:
    """The messages that `join` has put into one."""
    cuts = [-1, *(i for i, frame in enumerate(frames) if not len(frame)), len(frames)]
    return [frames[start + 1 : stop] for start, stop in pairwise(cuts)]


def topic(kind: type[Message]) -> bytes:
    """How every header of this kind begins: what a SUB subscribes to."""
    return f'{{"type":"{kind.__struct_config__.tag}"'.encode()


def next_lineage(previous: str, close: Close) -> str:
    """The name of the state after `close`, from the name of the state before it."""
    own = msgspec.structs.replace(close, lineage="", open=None)
    return hashlib.sha256(previous.encode() + _encoder.encode(own)).hexdigest()[:32]
