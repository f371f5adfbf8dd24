"""A peer that sends any well-formed message at any moment.

It greets like a worker and knows what anybody can know: the newest round, step and lineage, its own
leases, the snapshot that it has a part in. With that it says what fits the moment, or nearly, or
anything at all, in any order and as often as it likes. Each liar has habits of its own: some only
greet, some take snapshots for ever, some hold a lease and never push.

What every worker may do is left out: to stop the run. So is what no server can see: numbers that
are wrong in a gradient or a snapshot, a process that calls itself one of an earlier server's, and
a worker that is the first of all.
"""

from __future__ import annotations

import math
import random
import types
import typing
from typing import Any

import msgspec

from paramserver.protocol import messages as wire

from .network import Network, Together, World
from .process import DEAF, Process, Waiting
from .server import LIAR, LIE, Server

SAID = tuple(k for k in typing.get_args(wire.ANY) if k not in (wire.Beat, wire.Hello, wire.StopRun))
UNDERSTOOD = (
    wire.Join, wire.Ready, wire.Unready, wire.Push, wire.Fetch, wire.Stand, wire.Digest, wire.Want,
    wire.Manifest, wire.Piece, wire.Adopted, wire.Abort, wire.Report, wire.Probe,
)  # fmt: skip
"""What does not cost its place at once."""
WEIGHTS = (0, 0, 1, 1, 5)
OPENINGS: tuple[tuple[type[wire.Message], ...], ...] = (
    (),
    (wire.Join,),
    (wire.Join, wire.Ready),
    (wire.Join, wire.Ready, wire.Ready),
    (wire.Join, wire.Fetch, wire.Ready),
    (wire.Join, wire.Want, wire.Adopted),
    (wire.Join, wire.Goodbye),
)
"""What comes first after a greeting."""


class Liar(Process):
    """Lives until the run's end; `id` is its worker id."""

    name = "the liar"

    def __init__(
        self, world: World, net: Network, server: Server, id: int, samples: int, seed: int
    ) -> None:
        self.server, self.id, self.samples = server, id, samples
        self.rng = rng = random.Random(seed)
        self.every_s = rng.choice((0.02, 0.1, 0.5))
        self.truth = rng.choice((0.3, 0.7, 1.0))  # share of what fits the moment
        careful = rng.random() < 0.8
        self.weights = [
            0 if careful and kind not in UNDERSTOOD else rng.choice(WEIGHTS) for kind in SAID
        ]
        self.opening = rng.choice(OPENINGS)
        self.quiet = rng.choice((0.0, 0.0, 0.9, 1.0))  # share of times that it says nothing then
        self.waits_for_it = rng.random() < 0.5
        self._first: list[type[wire.Message]] = []
        self.beats = rng.random() < 0.8
        self.anew = 0.0 if seed % 3 == 0 else 0.01  # share of times that it greets anew
        self.session = ""
        self.open: wire.Open | None = None
        self.pulse: wire.Pulse | None = None
        self.snapshot = self._snapshot_before = 0
        self.next_piece = self.next_bucket = 0
        self._nonces = 0
        self._lies_of_set = random.Random(f"set {seed}")
        super().__init__(world, net, server.receive)
        self.sub_room = 10

    # ------------------------------------------------------------------ what it does

    def main(self) -> Waiting:
        self._greet()
        while True:
            yield self.world.now + self.rng.expovariate(1 / self.every_s), DEAF
            self._listen()
            if not self.session or self.rng.random() < self.anew:
                self._greet()
            else:
                self._say()

    def _greet(self) -> None:
        if not self.lines or self.rng.random() < 0.2:
            self.close_lines()
            self.session = ""
            for kind in ("door", "link", "sub"):
                self.open_line(kind)
        if self.rng.random() < 0.3:
            self._nonces += 1
        hello = wire.Hello(
            protocol=wire.PROTOCOL,
            role=self.rng.choice(("worker",) * 8 + ("observer", "king")),
            id=self.rng.choice((self.id,) * 8 + (-1, 2**40)),
            nonce=f"liar-{self._nonces}",
            host=LIAR,
            pid=self.rng.choice((1, -1, wire.NUMBER_MAX)),
        )
        self.lines["door"].send((hello, None))

    def _say_of_shards(self) -> None:
        """That it reaches one or not, holds averages or lacks them, or has started one."""
        rng, number = self.rng, self.open.round if self.open is not None else 1
        buckets = tuple(range(rng.randrange(4)))
        told = rng.choice(
            (
                *[wire.Reached(shard=shard) for shard in range(4)] * 3,
                wire.Reached(shard=rng.randrange(4), problem="it says so"),
                *[wire.Holds(round=number)] * 4,
                wire.Lacks(round=number, buckets=buckets),
                wire.Offer(session=self.session, secret=""),
                wire.Offer(session="session-1-1", secret=""),
            )
        )
        self.lines["link"].send((told, None))

    def _say(self) -> None:
        if self.server.rules.shards != 1 and self.rng.random() < 0.3:
            self._say_of_shards()
        first = bool(self._first)
        if first:
            kind = self._first[0]
            waits = kind in (wire.Want, wire.Adopted) and self.snapshot == self._snapshot_before
            if waits and self.waits_for_it:
                return
            del self._first[0]
        elif self.rng.random() < self.quiet or not any(self.weights):
            return
        else:
            [kind] = self.rng.choices(SAID, self.weights)
        message = self._apt(kind)
        if message is None or (not first and self.rng.random() > self.truth):
            message = self._any(kind)
        elif self.rng.random() < 0.1:
            field = self.rng.choice(message.__struct_fields__ or ("",))
            if field:
                hints = typing.get_type_hints(type(message), include_extras=True)
                message = msgspec.structs.replace(message, **{field: self._value(hints[field])})
        ledger = self.server.rounds.ledger
        if isinstance(message, wire.Ready) and (ledger is None or ledger.untouched):
            message = wire.Ready(samples=self.samples, batch_size=max(1, message.batch_size))
        elif isinstance(message, wire.Ready) and self._lies_of_set.random() < 0.3:
            message = msgspec.structs.replace(message, samples=self.samples, weighs=True)
        if isinstance(message, wire.Probe):
            message = wire.Probe(session=self.session if self.rng.random() < 0.8 else "made up")
        self.lines["link"].send((message, LIE))

    # ------------------------------------------------------------------ what it knows

    def heard_at_door(self, message: Any) -> None:
        if isinstance(message, wire.Welcome) and message.session != self.session:
            self.session = message.session
            self._first, self._snapshot_before = list(self.opening), self.snapshot
            self.lines["link"].send((wire.Probe(session=self.session), None))
            if self.beats:
                beat = wire.Beat(session=self.session)
                self.beat(beat, self.server.rules.heartbeat_timeout / 5)

    def _listen(self) -> None:
        while self.inbox["door"]:
            self.heard_at_door(self.inbox["door"].popleft()[0])
        for kind in ("link", "sub"):
            while self.inbox[kind]:
                message = self.inbox[kind].popleft()[0]
                if isinstance(message, Together):
                    message = message.messages[-1][0]  # the close, if there is one
                if isinstance(message, wire.Close | wire.Pulse) and message.open is not None:
                    self.open, self.next_bucket = message.open, 0
                if isinstance(message, wire.Open):
                    self.open, self.next_bucket = message, 0
                if isinstance(message, wire.Pulse):
                    self.pulse = message
                if isinstance(message, wire.Give | wire.Manifest):
                    self.snapshot, self.next_piece = message.snapshot, 0

    # ------------------------------------------------------------------ what it says

    def _apt(self, kind: type[wire.Message]) -> wire.Message | None:
        """What a worker might say now; None where there is nothing of the kind."""
        step = self.pulse.step if self.pulse else 0
        lineage = self.pulse.lineage if self.pulse else ""
        lease = None
        if self.open is not None and self.id in self.open.leases:
            [*leases] = self.open.leases[self.id]
            lease = leases[0] if leases else None
        match kind:
            case wire.Join:
                knows = self.rng.random() < 0.5
                return wire.Join(
                    layout=self.server.layout,
                    step=step if knows else 0,
                    lineage=lineage if knows else "liar's own",
                    device="cpu",
                )
            case wire.Ready:
                return wire.Ready(samples=self.samples, batch_size=self.rng.choice((1, 3, 1000)))
            case wire.Push if lease is not None and self.open is not None:
                self.next_bucket += 1
                return wire.Push(
                    round=self.open.round,
                    bucket=self.next_bucket - 1,
                    samples=lease[2] - lease[1],
                    loss=self.rng.choice((0.5, math.inf, None)),
                    compute_s=(None, 1e-9, 1e9, math.nan, -1.0)[self.next_bucket % 5],
                    spent=(None, wire.Spent(-1.0, math.nan, 1e300, math.inf))[self.next_bucket % 2],
                )
            case wire.Fetch:
                return wire.Fetch(step=step, lineage=lineage)
            case wire.Digest:
                return wire.Digest(step=step, digest="a lie")
            case wire.Stand:
                return wire.Stand(step=step)
            case wire.Manifest:
                return wire.Manifest(
                    snapshot=self.snapshot,
                    step=step,
                    lineage=lineage,
                    tree="",
                    tensors=(("uint8", (self.rng.choice((0, 3, 1000)),)),),
                    piece_bytes=1,
                )
            case wire.Want:
                self.next_piece += self.rng.random() < 0.7
                return wire.Want(snapshot=self.snapshot, piece=self.next_piece)
            case wire.Piece:
                return wire.Piece(snapshot=self.snapshot, piece=self.rng.randrange(4))
            case wire.Adopted:
                return wire.Adopted(snapshot=self.snapshot, step=step, lineage=lineage)
            case wire.Abort:
                return wire.Abort(snapshot=self.snapshot, reason="it likes to")
            case wire.Goodbye:
                return wire.Goodbye(reason="finished", step=step, digest="a lie")
            case wire.Unready:
                return wire.Unready()
        return None

    def _any(self, kind: type[wire.Message]) -> wire.Message:
        hints = typing.get_type_hints(kind, include_extras=True)
        return kind(**{field: self._value(hint) for field, hint in hints.items()})

    def _value(self, hint: Any) -> Any:
        """Anything that a field of this type may hold; now and then something of this run."""
        rng = self.rng
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            limit = args[1]
            if args[0] is int:
                real = [
                    self.snapshot,
                    0,
                    1,
                    -1,
                    limit.ge,
                    limit.le,
                    rng.randint(limit.ge, limit.le),
                ]
                if self.open is not None:
                    real += [self.open.round, self.open.step, self.open.round + 1]
                return min(max(rng.choice(real), limit.ge), limit.le)
            value = self._value(args[0])
            return value[: limit.max_length] if isinstance(value, str | tuple) else value
        if hint is str:
            known = [self.session, "", "x" * 300]
            if self.pulse is not None:
                known += [self.pulse.lineage, self.pulse.nonce]
            return rng.choice(known)
        if hint in (bool, float):
            return hint(rng.choice((0, 1)))
        if hint is msgspec.UnsetType:
            return msgspec.UNSET
        if hint is Any:
            return rng.choice((None, 1, "x", [1, 2]))
        if origin is tuple and args[-1] is Ellipsis:
            return tuple(self._value(args[0]) for _ in range(rng.randrange(3)))
        if origin is tuple:
            return tuple(map(self._value, args))
        if origin is dict:
            return {self._value(args[0]): self._value(args[1]) for _ in range(rng.randrange(3))}
        if origin in (typing.Union, types.UnionType):
            return self._value(rng.choice(args))
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            fields = typing.get_type_hints(hint, include_extras=True)
            return hint(**{f: self._value(h) for f, h in fields.items()})
        return None
