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
Dial       link -> server give me a channel for sealed payloads, or: I do without
Channel    server -> link where it is, with its keys and a password; or: it is closed, and why
Push       link -> server my gradient of one bucket; 1..n encoded buffers
Unreadable link -> server no sample of my lease in this round can be read: it has none from me
NextLease  link -> server all steps with my lease are made: this round has none of mine
Evaluating link -> server I evaluate: wait for me; or, I am done with it
StopRun    link -> server end the run in order, for all, and why
Refused    server -> link this push was not taken, and why
Average    PUB or link    the mean of one bucket; 1..n encoded buffers. Not applied before Close
Shared     PUB            the same for peers that share memory with the server: no buffers
Sealed     PUB            the same for peers with a channel, through which the buffers come
Sharded    PUB            the same of another shard than the server, which sends the buffers itself
Closing    PUB            all averages of this round are made: who holds those of other shards?
Holds      link -> server I do
Lacks      link -> server I do not, and no close has come: send me these on my link
Close      PUB or link    the round is over: this is the next update of the log
Open       PUB or link    a round is open, who is in it, with which samples (also inside Close)
Fetch      link -> server send me the updates after this step, Averages and Closes as on PUB
Fetched    server -> link that was all; where the log stands now
Stand      link -> server the observer has applied everything up to this step; it keeps it
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
Carry      server -> link start a shard beside you
Reached    link -> server my channel to a shard is bound; or, it is not, and why
Offer      shard -> server I am the shard that this worker was to start; again, as a beat
Employ     server -> shard you are one, of a run with this layout
Meet       server -> shard make a channel for this peer
Met        shard -> server here it is, for the peer
Part       server -> shard this peer is gone
Arrived    shard -> server this payload has come, and may be good or bad
Unneeded   server -> shard drop this payload, now or when it comes
AddUp      server -> shard add this payload to the sum of its bucket
Divide     server -> shard make the average of this bucket, and send it to all
GiveUp     server -> shard others average this bucket now: tell what you left out of its averages
LeftOut    shard -> server a lossy codec left this out; none or one buffer of float32
           server -> shard let it go into the next average of the bucket
Averaged   shard -> server it is on its way to all
Over       server -> shard the round is closed or void
Recall     server -> shard give me the average that you keep of this round and bucket
Recalled   shard -> server here it is; 1..n encoded buffers
HandOn     server -> link you are your host's relay: hand on what other hosts average; or: no more
HandsOn    link -> server there; or, I cannot
Listen     server -> link hear there what other hosts average; or: no more
Listens    link -> server I do; or, I do not, and why
Spare      server -> shard send this peer no averages, it hears its relay; or: send them again
Passed     relay -> peer  an average of another host; 1..n encoded buffers, or their places
========== ============== ==================================================================

The server answers a peer that breaks these rules with `Reject`; no other peer is affected.

Every field has a limit of its own (a number its range, a text, list or dict its length), every kind
of message one for its header, and a message one for its frames. Messages cut sentences that are too
long, so that their senders need not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any

import msgspec

from paramserver.errors import PeerError
from paramserver.words import printable

PROTOCOL = 2
KINDS = {
    "grad": ("float32", "float64"),
    "stat": ("float32", "float64"),
    "count": ("float32", "float64", "int64"),
    "whole": ("bytes",),
}
"""The kinds of tensors, with the dtypes in which each may be sent; see `Tensor`."""

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1,
    "complex128": 16, "complex64": 8, "complex32": 4,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
}  # fmt: skip
"""The dtypes of tensors, by torch's names, and the bytes that a number of each takes."""

DIMENSIONS_MAX = 64
ELEMENTS_MAX = 2**38  # a terabyte of float32
PROBLEM_CHARS = 1000
HEADER_BYTES_MAX = 4 * 2**20  # a layout of some ten thousand parameters; see `header_limit`
MEASURED_BYTES_MAX = 2**18  # of a dict with values of any kind, as JSON
BUFFERS_MAX = 16  # that follow one header
WORKERS_MAX = 1024
TENSORS_MAX = 2**16
BUCKETS_MAX = 2**16
SHARDS_MAX = 64
NUMBER_MAX = 2**53  # exact in any JSON reader, and the sum of a thousand fits into 64 bits
STEP_MAX = 2**48  # at which a run may begin, with room for the steps after it
SAMPLES_MAX = 2**31 - 1  # of one batch
LEAST_MAX = 2  # samples that a worker may insist on: statistics over a batch need no more
REASON_MAX, LATE_MAX = 4000, 200
PARTS_MAX = 64  # of a state whose digests are told
GROUPS_MAX = 2**12  # of an optimizer's parameters
LOOKS_MAX, LOOK_CHARS = 64, 64  # parts of samples that are compared; text that describes each
PAIRS_MAX = 64  # pairs of a model and its optimizer in a run

Int = Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=NUMBER_MAX)]
"""Python's integers may be larger; no peer needs that, and they cost time."""

Id = Annotated[str, msgspec.Meta(max_length=128)]
"""A generated name: nonce, session, run, lineage, digest, key."""

Name = Annotated[str, msgspec.Meta(max_length=255)]
"""A chosen name: a host, a device, a word of this protocol."""

Words = Annotated[str, msgspec.Meta(max_length=REASON_MAX)]
"""Sentences for people; see `clip`."""

Path = Annotated[str, msgspec.Meta(max_length=1024)]

Recipe = Annotated[str, msgspec.Meta(max_length=2**16)]

Indexes = Annotated[tuple[Int, ...], msgspec.Meta(max_length=TENSORS_MAX)]

Worker = Int
"""A worker's id, as the key of a dict."""

Shard = Annotated[int, msgspec.Meta(ge=0, le=65535)]
"""A shard's number; 0 is the server. No number is used twice by one server."""

Place = tuple[Int, Int, Int]
"""Where a buffer lies in shared memory; see `shm.Place`."""

Places = Annotated[tuple[Place, ...], msgspec.Meta(max_length=BUFFERS_MAX)]

Lease = tuple[Int, Int, Int]
"""(epoch, start, stop): a range of the epoch's shuffled order."""

OWN: Lease = (0, 0, 0)
"""The lease of a worker that brings samples of its own."""

Leases = Annotated[tuple[Lease, ...], msgspec.Meta(max_length=8)]

LEVELS_MAX = 32
"""Depth of nested lists and dicts where a message may hold anything."""
Anything = Annotated[dict[Name, Any], msgspec.Meta(max_length=1000)]
"""A dict whose contents this module does not know; as JSON at most `MEASURED_BYTES_MAX`."""

Shape = Annotated[tuple[Int, ...], msgspec.Meta(max_length=DIMENSIONS_MAX)]

Text = Annotated[str, msgspec.Meta(max_length=64)]

Pair = tuple[Text, Int]
"""The name of a model with its optimizer, and the number of its parameters."""

Value = None | bool | Int | float | Text | Annotated[
    tuple[Int | float, ...], msgspec.Meta(max_length=16)
]  # fmt: skip
"""A value of a parameter group: its learning rate, say, or its betas."""

Versions = Annotated[dict[Text, Text], msgspec.Meta(max_length=16)]
"""What is installed on a machine, by name; see `paramserver.protocol.versions`."""

Groups = Annotated[
    dict[Int, Annotated[dict[Name, Value], msgspec.Meta(max_length=64)]],
    msgspec.Meta(max_length=GROUPS_MAX),
]
"""Some values of an optimizer's parameter groups, by the groups' numbers."""


def clip(text: str, most: int = REASON_MAX) -> str:
    """A sentence, cut to `most` characters; it may hold words of other programs."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


class Message(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, kw_only=True):
    """Base of all headers. `type` comes first on the wire: a SUB can subscribe by prefix."""

    def _clip(self, *fields: str) -> None:
        """For `__post_init__`: make these fields, which may hold words of other programs, printable
        and not too long for terminals, logs, files and pages. So they are at the sender and at the
        receiver."""
        for field in fields:
            text = getattr(self, field)
            if len(text) > REASON_MAX or not text.isprintable():
                msgspec.structs.force_setattr(self, field, clip(printable(text)))


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of the layout. `kind`: grad and stat (mean), count (maximum), whole (as it is in
    the lowest worker that wrote to its module)."""

    name: Annotated[str, msgspec.Meta(max_length=1000)]
    shape: Shape
    dtype: Name
    kind: Name = "grad"
    sent: Name = "float32"
    """The dtype in which its numbers travel and are averaged; `bytes`: they stay as they are."""


class Layout(msgspec.Struct, frozen=True, omit_defaults=True):
    """Names, shapes and dtypes of what is exchanged, in the order of the flat vector."""

    tensors: Annotated[tuple[Tensor, ...], msgspec.Meta(max_length=TENSORS_MAX)]
    pairs: Annotated[tuple[Pair, ...], msgspec.Meta(max_length=PAIRS_MAX)] = ()
    """Where several models or optimizers take turns: each with as many of the first tensors, in
    order. No bucket holds tensors of two of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the pairs."""
        return tuple(name for name, _ in self.pairs)

    def fingerprint(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def problem(self) -> str | None:
        """The first impossible thing in this layout, as a sentence; None where it is valid."""
        names: set[str] = set()
        elements = 0
        for t in self.tensors:
            if not t.name.isprintable():
                return f"{t.name[:80]!r} is no name that can be told"
            if t.kind not in KINDS or t.dtype not in ITEM_BYTES:
                return f"{t.name[:80]} is of kind {t.kind[:20]!r}, dtype {t.dtype[:20]!r}"
            if t.sent not in KINDS[t.kind]:
                return f"{t.name[:80]}, of kind {t.kind}, is sent as {t.sent[:20]!r}"
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
        counts = [count for _, count in self.pairs]
        trained = sum(t.kind == "grad" for t in self.tensors)
        if self.pairs and (min(counts) < 1 or sum(counts) != trained):
            return "its pairs do not have the parameters"
        if len({"", *self.names}) <= len(counts) or not all(map(str.isprintable, self.names)):
            return "its pairs need names that can be told, each another one"
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
        if self.names != other.names:
            has, others = (", ".join(x.names) or "one model" for x in (other, self))
            return f"it is {has}, the run has {others}"
        if self.tensors != other.tensors or self.pairs != other.pairs:
            return "the parameters come in another order"
        return None


def _shape(t: Tensor) -> str:
    notes = [t.kind] if t.kind != "grad" else []
    if t.sent not in ("float32", "bytes"):
        notes.append(f"sent as {t.sent}")
    return f"{'x'.join(map(str, t.shape)) or 'scalar'} {t.dtype}" + (
        f" ({', '.join(notes)})" if notes else ""
    )


# --------------------------------------------------------------------------- greeting


class Hello(Message, frozen=True):
    protocol: Int
    role: Name
    """worker | observer"""
    id: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)] | None
    """A worker's number; None: any free one. For a wrong one the server has a sentence of its
    own."""
    nonce: Id
    """Made once per process: tells a restarted worker from a second one with the same id."""
    host: Name
    pid: Int
    run: Id | None = None
    """The run this replica belongs to, if it has state already."""
    key: Id = ""
    """Proves that the observer is the one this server started."""
    secret: Id = ""
    """Made once per process: a peer that said hello with a secret sends it with its probes and
    beats, because others may see its session on PUB. For a peer without one the session is
    enough."""
    versions: Versions = {}
    """Of this program, PyTorch and Python there; empty where the peer is older than this field."""
    after: Id = ""
    """A run of this server that this process has finished: it asks for the next one."""

    def __post_init__(self) -> None:
        self._clip("role", "host")


class Welcome(Message, frozen=True):
    protocol: Int
    run: Id
    nonce: Id
    """The server process; every published message carries it."""
    session: Id
    id: Int
    settings: Anything
    pub_port: Int
    ipc: Path | None = None
    """Folder of the ipc sockets, for peers on the server's own host."""
    shared: Path | None = None
    """Folder of the memory that such peers may share (`shm`)."""
    versions: Versions = {}
    """Of the server's machine, as in Hello."""
    trial: Int = 1
    """The place of the run among the `runs` that this server serves, from 1."""
    runs: Int = 1
    channels: bool = False
    """Peers whose link is under CURVE may dial for a channel (`Dial`)."""


class Probe(Message, frozen=True):
    session: Id
    secret: Id = ""
    """Of the Hello; never on PUB."""


class Greet(Message, frozen=True):
    session_known: bool = True
    """False: this server does not know the session, say hello; else a probe is enough."""
    join: bool = False
    """The link is known, but what was sent before, either way, may be lost: join again."""


class Join(Message, frozen=True):
    layout: Layout
    step: Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=STEP_MAX)]
    lineage: Id
    device: Name
    """Not used any more, but older servers of this protocol need it."""
    kind: Words = ""
    """Device, processor and version of torch: replicas of one kind must have equal digests."""
    recipe: Recipe = ""
    """Optimizer, schedule and clipping, in words: they must be the same in all replicas."""
    ledger: Anything | None = None
    """The ledger as of this step, for a server that does not know the log because it is new or
    resumes."""
    sharing: bool = False
    """This peer reads averages from the server's ring, if there is one when it is admitted."""
    outbox: Int = 0
    """Number of the outbox that this peer has made for its pushes; 0: none."""
    first: bool = False
    """Its script says that its weights are the first ones of the run."""

    def __post_init__(self) -> None:
        self._clip("device", "kind")
        if not self.recipe.isprintable():
            msgspec.structs.force_setattr(self, "recipe", printable(self.recipe))


class Admit(Message, frozen=True):
    action: Name
    """origin: your state is the run's; follow: fetch what you lack; adopt: a snapshot follows;
    behind: the history does not hold what you lack any more, join again when you want a
    snapshot."""
    step: Int
    lineage: Id
    outbox: bool = True
    """False where the server cannot map the peer's outbox: push through the link."""
    missed: Int = 0
    """Snapshots in a row that this peer did not get, not counting those of givers that have proven
    nothing yet and may hold nothing."""
    first: Name = ""
    """Who gave the run's first weights."""

    def __post_init__(self) -> None:
        self._clip("first")


class Dial(Message, frozen=True):
    """A peer whose link is under CURVE, and whose payloads need not be."""

    costs: Annotated[dict[Text, float], msgspec.Meta(max_length=16)] = {}
    """Seconds in which this machine seals a MiB, by the ciphers that it has; none: no channel is
    wanted any more, and averages come through PUB."""


class Channel(Message, frozen=True):
    """Only ever sent over CURVE. `port` 0: the channel of this `id` is closed, or without one there
    is none to be had, for the `reason`."""

    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    cipher: Text = ""
    id: Id = ""
    """Of both keys, in hexadecimal; also the user's name for the handshake."""
    password: Id = ""
    """It opens one connection, once."""
    up: Id = ""
    """The key for what the peer sends, in hexadecimal."""
    down: Id = ""
    """The key for what the server sends."""
    shard: Shard = 0
    reason: Words = ""
    host: Name = ""
    """The address of the shard's host, where that is not the server."""
    shared: Path = ""
    """The folder of the memory that the shard shares with peers on its host; empty: it has none."""

    def __post_init__(self) -> None:
        self._clip("reason")

    def __repr__(self) -> str:
        return f"Channel(port={self.port}, cipher={self.cipher!r}, reason={self.reason!r})"


class Look(msgspec.Struct, frozen=True, array_like=True):
    """A summary of a part of one sample: `exact` for labels and words, else `rough`."""

    index: Int
    """The sample's index in the data set."""
    leaf: Annotated[str, msgspec.Meta(max_length=LOOK_CHARS)]
    """The part of the sample."""
    exact: Annotated[str, msgspec.Meta(max_length=LOOK_CHARS)]
    rough: Annotated[tuple[float, ...], msgspec.Meta(max_length=8)] = ()
    """Mean, root of the mean square, and some of its numbers."""


class Ready(Message, frozen=True):
    samples: Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=STEP_MAX)]
    batch_size: Int
    own: bool = False
    """This worker brings samples of its own: its lease is `OWN`, and its pushes say how many
    samples they are of. Then `samples` is 0."""
    least: Annotated[int, msgspec.Meta(ge=1, le=LEAST_MAX)] = 1
    """Samples that a lease must have: 2 where the model has statistics over a batch."""
    drop_last: bool = False
    """Do not lease the last range of an epoch where it is shorter than a batch."""
    looks: Annotated[tuple[Look, ...], msgspec.Meta(max_length=LOOKS_MAX)] = ()
    """Summaries of a few samples: the set must be the same on all machines, in the same order."""
    weighs: bool = False
    """Its pushes say what they weigh (`Push.weight`), as those of all workers must then."""
    draws: Id = ""
    """Names what is drawn from the set, where an epoch is not each sample once: `samples` are draws
    then, the same in all workers."""


class Unready(Message, frozen=True):
    unfinished: bool = False
    """It left in the middle of a lease, perhaps because of it; if so, a Goodbye that says so
    follows at once."""


class Evaluating(Message, frozen=True):
    """A worker that evaluates between two steps, and for whom the others wait (`on`)."""

    on: bool


class StopRun(Message, frozen=True):
    """A worker's script, or the observer by what it has evaluated, ends the run in order, at the
    last closed step."""

    reason: Words

    def __post_init__(self) -> None:
        self._clip("reason")


class Later(Message, frozen=True):
    reason: Words

    def __post_init__(self) -> None:
        self._clip("reason")


class Reject(Message, frozen=True):
    reason: Words
    hint: Words = ""
    end: End | None = None
    """How the run that the peer asked for has ended."""
    run: Id = ""
    """The server's run, where the peer asked for the same."""
    keys: bool = False
    """A peer that shows the join token's keys would be let in."""

    def __post_init__(self) -> None:
        self._clip("reason", "hint")


# --------------------------------------------------------------------------- rounds


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """Where a worker's time went since its last push before this round, in seconds, by its own
    clock. It is shown to people, and nothing is decided by it."""

    busy_s: float
    """Loading, computing, encoding, the optimizer, and whatever else its loop does."""
    encode_s: float
    """Of that, what backward stood still for so that gradients could be sent."""
    waited_s: float
    """The rest: waiting for averages and samples."""
    learning_rate: float | None = None
    """Of its first group of parameters, at its last step."""


class Push(Message, frozen=True):
    round: Int
    bucket: Int
    samples: Annotated[int, msgspec.Meta(ge=-NUMBER_MAX, le=SAMPLES_MAX)]
    absent: Indexes = ()
    """Indexes into the layout of this bucket's parameters that had no gradient."""
    scale: float = 1.0
    places: Places = ()
    """Where the buffers lie in the outbox; none: they follow as frames."""
    without: Indexes = ()
    """Buckets that this worker has nothing for in this round: no push of them follows."""
    loss: float | None = None
    """Mean loss over the samples; with the last bucket."""
    compute_s: float | None = None
    """Seconds from the lease to the last gradient, by the worker's own clock, without waiting for
    others; with the last bucket."""
    ready_s: float = 0.0
    """When it was ready, by the worker's clock: the difference of two is the time between them."""
    unread: Annotated[tuple[Int, ...], msgspec.Meta(max_length=TENSORS_MAX)] = ()
    """Places in the lease, in order, of samples that could not be read: `samples` are the others.
    The same in every push of a round."""
    steps: Annotated[int, msgspec.Meta(ge=1, le=STEP_MAX)] = 1
    """Optimizer steps that the worker made with its samples, see `Open.local_steps`."""
    groups: Groups | msgspec.UnsetType = msgspec.UNSET
    """Values of the optimizer's parameter groups that its loop has changed since the last update,
    with the last bucket; left out where it has changed none."""
    weight: Annotated[int, msgspec.Meta(ge=0, le=SAMPLES_MAX)] = 0
    """What the loss is the mean of, tokens say, where that is not `samples`: the average weighs the
    push by it. The same in every push of a round; 0: `samples`."""
    spent: Spent | None = None
    """With the last bucket; None where the worker is older than this field."""
    pair: Text = ""
    """Whose step it is, where the layout has pairs: all pushes of a round are of one."""
    made_at: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] | msgspec.UnsetType = msgspec.UNSET
    """The step of the log at which the gradient was made, where late work is carried over; the same
    in every push of a round."""
    sealed: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)] = 0
    """The number of the payload on this peer's channel that holds the buffers, counted from 1; 0:
    they follow as frames, or lie at `places`."""
    shard: Shard = 0
    """To which they go, through the channel to it."""


class Unreadable(Message, frozen=True):
    round: Int


class NextLease(Message, frozen=True):
    """Where the layout has pairs: this worker has made all steps with its lease, and wants the next
    one in place of this round."""

    round: Int


class Refused(Message, frozen=True):
    round: Int
    reason: Words

    def __post_init__(self) -> None:
        self._clip("reason")


class Average(Message, frozen=True):
    nonce: Id
    round: Int
    step: Int
    """The step that this update leads to."""
    bucket: Int
    absent: Indexes = ()
    scale: float = 1.0


class Shared(Average, frozen=True):
    places: Places = ()
    """Where the buffers lie in the ring."""


class Sealed(Average, frozen=True):
    number: Int = 0
    """Of the payload, the same on the channels of all peers that have one."""


class Sharded(Average, frozen=True):
    """Of a shard other than the server."""

    shard: Shard = 0
    number: Int = 0
    """Of the payload, the same on all channels of that shard."""


class Closing(Message, frozen=True):
    """The round is closed as soon as it is known who holds the averages of `buckets`, those of
    other shards than the server. Repeated with each Pulse."""

    nonce: Id
    round: Int
    step: Int
    """The step that the update leads to."""
    buckets: Annotated[tuple[Int, ...], msgspec.Meta(max_length=BUCKETS_MAX)]


class Holds(Message, frozen=True):
    round: Int


class Lacks(Message, frozen=True):
    round: Int
    buckets: Annotated[tuple[Int, ...], msgspec.Meta(max_length=BUCKETS_MAX)]


class Open(Message, frozen=True):
    nonce: Id
    round: Int
    step: Int
    """The step everyone stands at."""
    lineage: Id
    leases: Annotated[dict[Worker, Leases], msgspec.Meta(max_length=WORKERS_MAX)]
    """By worker id: the lease of this round and, if there are more samples, the one after it."""
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=STEP_MAX)] = 1
    """Optimizer steps that a worker makes with its lease, at most. With one it pushes a gradient;
    with more, what its steps changed (`paramserver.rounds.local_steps`)."""
    began: Int = 0
    """Where the layout has pairs: the first round of these leases, which last over as many rounds
    as the workers' loops make steps with them. Else 0: a lease is for one round."""
    shards: Annotated[tuple[tuple[Shard, Int], ...], msgspec.Meta(max_length=SHARDS_MAX)] = ()
    """Who averages the buckets (`sharding.owners`): [shard, share in thousandths] of each; empty:
    the server."""


class CarriedOver(msgspec.Struct, frozen=True, array_like=True):
    """A worker's gradient that is still awaited, and not by any round: pushed for the `round` of
    its lease, it enters a later one."""

    round: Int
    lease: Lease


class Close(Message, frozen=True):
    nonce: Id
    round: Int
    step: Int
    """The step this update leads to."""
    lineage: Id
    """Names the state after this update; see `next_lineage`."""
    buckets: Annotated[tuple[Int, ...], msgspec.Meta(max_length=BUCKETS_MAX)]
    """The buckets that have an average. A bucket that no worker pushed has none."""
    contributors: Annotated[dict[Worker, Int], msgspec.Meta(max_length=WORKERS_MAX)]
    """Samples by worker, of those with at least one bucket in this update."""
    late: Annotated[
        dict[Worker, Annotated[str, msgspec.Meta(max_length=LATE_MAX)]],
        msgspec.Meta(max_length=WORKERS_MAX),
    ]
    """Members that miss the update, wholly or in part, with the reason."""
    loss: float | None
    seconds: float
    """From the opening of the round to its close."""
    ledger: Anything
    open: Open | None = None
    """The round that follows at once."""
    reason: Words = ""
    partly: Annotated[
        dict[Worker, Annotated[tuple[Int, ...], msgspec.Meta(max_length=BUCKETS_MAX)]],
        msgspec.Meta(max_length=WORKERS_MAX),
    ] = {}
    """For contributors with a part of their buckets in the update: these buckets."""
    local_steps: Annotated[int, msgspec.Meta(ge=1, le=STEP_MAX)] = 1
    """Of the round, see `Open`: with more than one, the averages are for the outer step."""
    groups: Groups | msgspec.UnsetType = msgspec.UNSET
    """Of the contributor with the lowest number that pushed everything: see `Push`. All replicas
    set these values before their optimizer steps. Left out where there are none, as older servers
    do, so that the lineage stays the same."""
    pair: Text | msgspec.UnsetType = msgspec.UNSET
    """Whose step it is, where the layout has pairs (left out where nobody pushed anything)."""
    carried: (
        Annotated[dict[Worker, CarriedOver], msgspec.Meta(max_length=WORKERS_MAX)]
        | msgspec.UnsetType
    ) = msgspec.UNSET
    """Whose gradients may enter a later update than that of their round. Who was among them in the
    close before, and is not any more, is a contributor of this update, or its gradient is void.
    Left out where there is nobody, so that the lineage stays the same."""

    def __post_init__(self) -> None:
        self._clip("reason")
        if self.late and any(
            len(why) > LATE_MAX or not why.isprintable() for why in self.late.values()
        ):
            late = {worker: clip(printable(why), LATE_MAX) for worker, why in self.late.items()}
            msgspec.structs.force_setattr(self, "late", late)


class Fetch(Message, frozen=True):
    step: Int
    lineage: Id


class Fetched(Message, frozen=True):
    step: Int
    open: Open | None = None


class Stand(Message, frozen=True):
    step: Int
    kept: bool = False
    """The run is ending, and this step's files are on disk, or cannot be written."""


class Digest(Message, frozen=True):
    step: Int
    digest: Id
    parts: Annotated[dict[Name, Id], msgspec.Meta(max_length=PARTS_MAX)] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    """Digests of parts of the state, for the cause of a difference: `weights`, `buffers`, and each
    value of the optimizer's parameter groups by its name."""


# --------------------------------------------------------------------------- snapshots


class Give(Message, frozen=True):
    snapshot: Int
    step: Int
    lineage: Id


class Manifest(Message, frozen=True):
    snapshot: Int
    step: Int
    lineage: Id
    tree: Annotated[str, msgspec.Meta(max_length=HEADER_BYTES_MAX)]
    """JSON of the state with its tensors replaced by their numbers (`workers.replica.state`)."""
    tensors: Annotated[tuple[tuple[Name, Shape], ...], msgspec.Meta(max_length=4 * TENSORS_MAX)]
    """dtype and shape of each."""
    piece_bytes: Int
    """Every tensor is cut into pieces of this size; they are numbered in order."""


class Want(Message, frozen=True):
    snapshot: Int
    piece: Int


class Piece(Message, frozen=True):
    snapshot: Int
    piece: Int
    digest: Id = ""
    """With the last piece: SHA-256 of all pieces in their order and of the tree, in hexadecimal;
    empty from an older giver."""


class Adopted(Message, frozen=True):
    snapshot: Int
    step: Int
    lineage: Id


class Abort(Message, frozen=True):
    snapshot: Int
    reason: Words

    def __post_init__(self) -> None:
        self._clip("reason")


# --------------------------------------------------------------------------- life


class Vitals(msgspec.Struct, frozen=True, array_like=True):
    """What a process tells of itself and its machine, for people."""

    memory_bytes: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
    """Of the process."""
    free_bytes: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
    """What the machine could still give."""
    total_bytes: Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
    """Of the machine."""
    temperature_c: float | None = None
    """The highest that its sensors tell; None where it has none that can be read."""


class Beat(Message, frozen=True):
    session: Id
    run: Id = ""
    nonce: Id = ""
    """The nonce of the Hello: a server that was started again learns from it which processes may
    come back."""
    secret: Id = ""
    """Of the Hello."""
    vitals: Vitals | None = None


class Phase(StrEnum):
    """What the server is doing or waiting for, for programs."""

    RETURNING = "returning"
    """It was started again, and waits for the replicas of its run to come back."""
    STARTING = "starting"
    """No round was open yet: the first weights or workers are missing."""
    TRAINING = "training"
    """A round is open."""
    SNAPSHOT = "snapshot"
    """A replica takes a snapshot, and no round is open."""
    PAUSED = "paused"
    """No round is open, because workers, samples, or a replica with the state are missing."""
    ENDING = "ending"
    """No more rounds are opened."""
    ENDED = "ended"


class Pulse(Message, frozen=True):
    nonce: Id
    step: Int
    lineage: Id
    phase: Words
    """What the server is doing or waiting for, as a sentence."""
    open: Open | None = None
    closed: Int | None = None
    """Newest round that is over."""
    sent_bytes: Int = 0
    """Bytes that the server has sent and received since it started."""
    received_bytes: Int = 0
    ending: bool = False
    """No more rounds; the run ends as soon as the observer has kept the newest step."""
    doing: Name = ""
    """The `Phase`; empty where the server is older than this field."""
    closing: Closing | None = None
    """Of the open round, if it is to be closed."""

    def __post_init__(self) -> None:
        self._clip("phase")

    @property
    def trains(self) -> bool:
        """Is a round open? An older server says so only in its sentence."""
        return (self.doing or self.phase) == Phase.TRAINING


class Report(Message, frozen=True):
    step: Int
    values: Annotated[dict[Name, float | None], msgspec.Meta(max_length=1000)]
    final: bool = False

    def __post_init__(self) -> None:
        if not all(map(str.isprintable, self.values)):
            values = {printable(name): value for name, value in self.values.items()}
            msgspec.structs.force_setattr(self, "values", values)


class Problem(Message, frozen=True):
    text: Annotated[str, msgspec.Meta(max_length=PROBLEM_CHARS)]
    """What could not be done and why: a checkpoint that was not written, a logger that stopped."""

    def __post_init__(self) -> None:
        self._clip("text")


LOAD, FORWARD, BACKWARD = FAILURES = "load", "forward", "backward"
"""Where a worker was with its lease when it died."""

FINISHED = "finished"
"""The reason of a worker that leaves because it is done (`Goodbye.finished`)."""


class Goodbye(Message, frozen=True):
    reason: Words
    step: Int = 0
    digest: Id = ""
    failed: Name = ""
    """Where in a lease an error of its own ended it: load, forward or backward."""
    lease: Lease | None = None
    """That lease."""
    error: bool = False
    """An exception ends it, which is the reason; it does not leave in order."""
    finished: bool | None = None
    """It has finished all its work. None where the peer is older than this field: then the reason
    `FINISHED` says so."""

    def __post_init__(self) -> None:
        self._clip("reason", "digest")

    @property
    def is_done(self) -> bool:
        """Did it leave because its work is done?"""
        return self.reason == FINISHED if self.finished is None else self.finished


class End(Message, frozen=True):
    nonce: Id
    step: Int
    lineage: Id
    reason: Words
    error: bool = False
    """The run did not end as it should: peers exit with an error too."""
    stopped: bool = False
    """A person ended it, in order, before its samples were done."""
    run: Id = ""
    """The run that is over: its peers know it by this name where its server was started again."""
    more: bool = False
    """The server goes on with another run, which this peer may join."""

    def __post_init__(self) -> None:
        self._clip("reason")


# --------------------------------------------------------------------------- shards


class Carry(Message, frozen=True):
    """To a worker whose host is to carry a shard."""


class Reached(Message, frozen=True):
    shard: Shard
    problem: Words = ""
    """Why there is no channel to it; empty: there is one."""

    def __post_init__(self) -> None:
        self._clip("problem")


class Offer(Message, frozen=True):
    session: Id
    """Of the worker that has started the shard."""
    secret: Id
    """Of that worker's Hello."""


class Employ(Message, frozen=True):
    shard: Shard
    nonce: Id
    """The server's."""
    layout: Layout


class Meet(Message, frozen=True):
    session: Id
    worker: Int
    """Its number; 0 is the observer."""
    costs: Annotated[dict[Text, float], msgspec.Meta(max_length=16)] = {}
    """As in Dial; none: its link is not under CURVE, and the channel has no cipher."""


class Met(Message, frozen=True):
    session: Id
    channel: Channel


class Part(Message, frozen=True):
    session: Id
    taken: Annotated[tuple[Int, ...], msgspec.Meta(max_length=BUCKETS_MAX)] = ()
    """Numbers of payloads of which an order will follow: the open round may have them without their
    sender."""


class Arrived(Message, frozen=True):
    session: Id
    number: Int
    round: Int
    bucket: Int
    bad: Words = ""
    """Why it must not be added; empty: it may."""
    norm: float | None = None
    """Of the gradient in it."""

    def __post_init__(self) -> None:
        self._clip("bad")


class Unneeded(Message, frozen=True):
    session: Id
    number: Int


class AddUp(Message, frozen=True):
    session: Id
    number: Int
    worker: Int
    bucket: Int
    weight: float
    late: bool = False
    """It is of an earlier round."""


class Divide(Message, frozen=True):
    round: Int
    step: Int
    bucket: Int
    weight: float
    absent: Indexes = ()


class GiveUp(Message, frozen=True):
    bucket: Int


class LeftOut(Message, frozen=True):
    bucket: Int


class Averaged(Message, frozen=True):
    round: Int
    bucket: Int
    number: Int
    absent: Indexes = ()
    scale: float = 1.0


class Over(Message, frozen=True):
    step: Int
    """The step that the update led to; 0: the round is void."""
    round: Int


class Recall(Message, frozen=True):
    round: Int
    bucket: Int


class Recalled(Message, frozen=True):
    round: Int
    bucket: Int
    kept: bool = True
    """False: it is not there any more."""


# --------------------------------------------------------------------------- relays


class HandOn(Message, frozen=True):
    on: bool = True


class HandsOn(Message, frozen=True):
    folder: Path = ""
    """Of the relay's socket and ring; empty: it cannot hand on."""


class Listen(Message, frozen=True):
    folder: Path = ""
    """Of the relay on this peer's host; empty: averages come from those that make them."""
    server: bool = False
    """The server's averages come from there, too, which is on another host."""


class Listens(Message, frozen=True):
    problem: Words = ""
    """Why it does not hear the relay; empty: it does."""

    def __post_init__(self) -> None:
        self._clip("problem")


class Spare(Message, frozen=True):
    session: Id
    on: bool = True


class Passed(Message, frozen=True):
    """The first one to whoever begins to listen is of round 0, and says only that the relay is
    heard."""

    nonce: Id
    """The server's."""
    shard: Shard
    """Whose it is: a shard may send what another one is to make."""
    round: Int
    bucket: Int
    places: Places = ()
    """Where the buffers lie in the relay's ring; none follow then."""


ANY = (
    Hello | Welcome | Later | Probe | Greet | Join | Admit | Ready | Unready | Reject | Push
    | Unreadable | NextLease | Evaluating | StopRun | Refused | Average | Shared | Sealed | Open
    | Close | Dial | Channel | Fetch | Fetched | Stand | Digest | Give | Manifest | Want | Piece
    | Adopted | Abort | Beat | Pulse | Report | Problem | Goodbye | End | Sharded | Closing | Holds
    | Lacks | Carry | Reached | Offer | Employ | Meet | Met | Part | Arrived | Unneeded | AddUp
    | Divide | GiveUp | LeftOut | Averaged | Over | Recall | Recalled | HandOn | HandsOn | Listen
    | Listens | Spare | Passed
)  # fmt: skip

HEADER_LIMITS: dict[type[Message], int] = {
    **dict.fromkeys((Join, Manifest, Close, Employ), HEADER_BYTES_MAX),
    **dict.fromkeys((Welcome, Push, Average, Shared, Sealed, Sharded, Divide, Averaged), 2**20),
    **dict.fromkeys((Closing, Lacks, Part, Passed), 2**20),
    **dict.fromkeys((Open, Pulse, Fetched), 2**18),
}
"""Bytes of the largest header, by kind of message; of those that are not here:"""
USUAL_HEADER_BYTES_MAX = 2**16

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(ANY)


def to_frames(message: Message, *buffers: Any) -> list[Any]:
    """The frames of a message: its header, then its buffers as they are."""
    return [_encoder.encode(message), *buffers]


def from_frames(frames: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The message and its buffers. Frames are bytes-like or `zmq.Frame`s; nothing is copied.

    Raises `PeerError` where the header is missing, too large, or not one of this protocol's, and
    where more buffers follow than any message has.
    """
    if not frames:
        raise PeerError("a message without a header")
    if len(frames) > 1 + BUFFERS_MAX:
        raise PeerError(f"{len(frames)} frames (at most {1 + BUFFERS_MAX})")
    header = getattr(frames[0], "buffer", frames[0])
    if len(header) > USUAL_HEADER_BYTES_MAX and len(header) > (most := header_limit(header)):
        raise PeerError(f"a header of {len(header)} bytes (at most {most})")
    try:
        message = _decoder.decode(header)
        if _brackets(header) > LEVELS_MAX:  # else nothing can be nested too deeply
            _check_depth(message)
        if len(header) > MEASURED_BYTES_MAX:
            _measure(message)
    except (ValueError, RecursionError) as e:  # DecodeError, ValidationError, UnicodeDecodeError
        raise PeerError(f"not a header of this protocol: {clip(printable(str(e)), 400)}") from None
    return message, [getattr(f, "buffer", f) for f in frames[1:]]


def header_limit(header: Any) -> int:
    """The largest size of a header with this beginning, by its kind. Every header that this module
    makes names its kind first, which a large one must do."""
    begin = bytes(header[:40])
    kind = begin.split(b'"')[3] if begin.startswith(b'{"type":"') else b""
    return _limits.get(kind, USUAL_HEADER_BYTES_MAX)


_limits = {str(kind.__struct_config__.tag).encode(): n for kind, n in HEADER_LIMITS.items()}


def _brackets(header: Any) -> int:
    text = bytes(header)
    return text.count(b"[") + text.count(b"{")


_NESTED = frozenset({Welcome, Join, Close})  # with fields that may hold anything


def _check_depth(message: Any) -> None:
    """Raise ValueError where a field that may hold anything is nested too deeply. The decoder's own
    limit depends on the version of Python, and code that handles the values may have a lower
    one."""
    if type(message) not in _NESTED:
        return
    level: list[Any] = [getattr(message, field, None) for field in ("settings", "ledger")]
    for _ in range(LEVELS_MAX):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    raise ValueError(f"`settings` or `ledger` is nested deeper than {LEVELS_MAX} levels")


def _measure(message: Any) -> None:
    """Raise ValueError where a field that may hold anything is too large."""
    for field in ("settings", "ledger"):
        size = len(_encoder.encode(getattr(message, field, None)))
        if size > MEASURED_BYTES_MAX:
            raise ValueError(f"`{field}` has {size} bytes (at most {MEASURED_BYTES_MAX})")


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
    """The messages that `join` has combined."""
    cuts = [-1, *(i for i, frame in enumerate(frames) if not len(frame)), len(frames)]
    return [frames[start + 1 : stop] for start, stop in pairwise(cuts)]


def topic(kind: type[Message]) -> bytes:
    """How every header of this kind begins: what a SUB subscribes to."""
    return f'{{"type":"{kind.__struct_config__.tag}"'.encode()


def next_lineage(previous: str, close: Close) -> str:
    """The name of the state after `close`, from the name of the state before it."""
    own = close
    if close.lineage or close.open is not None:
        own = msgspec.structs.replace(close, lineage="", open=None)
    return hashlib.sha256(previous.encode() + _encoder.encode(own)).hexdigest()[:32]
