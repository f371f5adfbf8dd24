"""A language for scripts of events: each event of `Rounds` is a line, and so is each effect.

`Run` drives a real `Rounds`. Its methods are the events, told by worker number (0 is the observer),
and return the effects in words, so that a test reads as a talk; `Run.handle` takes any event and
returns the effects themselves:

    assert run.push(2, 0) == ["add 2.0 x10", "average 1.0 of 20"]

`told` gives the words for an effect. Sentences for people begin with `#`; where a test is not
about them, `but_words` leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from paramserver.protocol import messages as wire
from paramserver.protocol.messages import Lease
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.effects import (
    Add,
    Closed,
    Declined,
    Discard,
    Dismissed,
    Effect,
    Employed,
    Ended,
    Finish,
    PassOn,
    Publish,
    Remove,
    Retired,
    Say,
    Send,
    Spared,
    Start,
    Void,
)
from paramserver.rounds.events import (
    Dropped,
    Event,
    Forgotten,
    Greeted,
    Heard,
    Pushed,
    PushRefused,
    Relinked,
    Stop,
    Tick,
    Told,
)
from paramserver.rounds.ledger import Ledger
from paramserver.rounds.looks import DataSet
from paramserver.rounds.rules import Rules

LAYOUT = wire.Layout(
    (wire.Tensor("weight", (3, 2), "float32"), wire.Tensor("bias", (3,), "float32"))
)
NONCE = "server-1"


def leased(ledger: Ledger) -> int:
    """Samples that workers hold."""
    return sum(stop - start for _, start, stop in ledger._leased)


def unleased(ledger: Ledger) -> int:
    """Samples that are still to be leased, for the first time or again."""
    waiting = sum(stop - start for _, start, stop in ledger._waiting)
    return waiting + max(0, (ledger.epochs - ledger._epoch) * ledger.samples - ledger._start)


def told(effect: Effect) -> str:
    """One effect in words."""
    match effect:
        case Send():
            return f"{effect.session} <- {message(effect.message)}"
        case PassOn():
            return f"{effect.session} <- {type(effect.message).__name__} as it came"
        case Publish():
            return f"all <- {message(effect.message)}"
        case Start():
            return f"start at step {effect.step}"
        case Add():
            return f"add {effect.worker}.{effect.bucket} x{effect.weight:g}"
        case Discard():
            return f"discard {effect.worker}.{effect.bucket}"
        case Finish():
            absent = f" without {effect.absent}" if effect.absent else ""
            by = f" by {effect.shard}" if effect.shard else ""
            return f"average {effect.round}.{effect.bucket} of {effect.weight:g}{absent}{by}"
        case Closed():
            return message(effect.close)
        case Void():
            return f"void {effect.round}"
        case Say():
            return f"# {effect.text}"
        case Remove():
            return f"forget {effect.session}"
        case Ended():
            return message(effect.end)
        case Employed():
            return f"shard {effect.shard} of {effect.session} begins"
        case Dismissed():
            return f"shard {effect.shard} is over"
        case Spared():
            what = "nothing more" if effect.on else "averages again"
            return f"shards send {effect.session} {what}"
        case Declined():
            return f"the shard of {effect.session} is not wanted"
        case Retired():
            return f"shard {effect.shard} retires"
    raise AssertionError(effect)


def message(m: wire.Message) -> str:
    """A message in words: what scripts are about."""
    match m:
        case wire.Open():
            leases = ", ".join(f"{w}: {spans(ls)}" for w, ls in sorted(m.leases.items()))
            shards = f", by {' '.join(f'{s}:{n}' for s, n in m.shards)}" if m.shards else ""
            return f"open {m.round} at step {m.step} for {leases}{shards}"
        case wire.Close():
            text = f"close {m.round} to step {m.step}, in it {counts(m.contributors)}"
            if m.late:
                text += ", late " + ", ".join(f"{w} ({why})" for w, why in m.late.items())
            if m.carried is not msgspec.UNSET:
                late = (f"{w}'s {c.round} {spans([c.lease])}" for w, c in m.carried.items())
                text += f", carried {', '.join(late)}"
            return text + (f"; {message(m.open)}" if m.open else "")
        case wire.End():
            return f"end at step {m.step}: {m.reason}" + (" (error)" if m.error else "")
        case wire.Admit():
            return f"{m.action} at step {m.step}"
        case wire.Give():
            return f"give {m.snapshot} of step {m.step}"
        case wire.Abort():
            return f"abort {m.snapshot}: {m.reason}"
        case wire.Reject():
            return f"reject: {m.reason}"
        case wire.Refused():
            return f"refused {m.round}: {m.reason}"
        case wire.Greet():
            return "join again" if m.join else "who are you"
        case wire.Carry():
            return "carry a shard"
        case wire.HandOn():
            return "hand on" if m.on else "hand on no more"
        case wire.Listen():
            return f"listen at {m.folder}" if m.folder else "listen no more"
        case wire.Closing():
            return f"closing {m.round}, who holds {' '.join(map(str, m.buckets))}?"
        case wire.Pulse():
            return f"pulse at step {m.step}: {m.phase}"
    raise AssertionError(m)


def spans(leases: Iterable[Lease]) -> str:
    return " ".join(f"{epoch}/{start}-{stop}" for epoch, start, stop in leases) or "nothing"


def counts(samples: dict[int, int]) -> str:
    return " ".join(f"{worker}:{n}" for worker, n in samples.items()) or "nobody"


def but_words(effects: list[str]) -> list[str]:
    return [e for e in effects if not e.startswith("#")]


def session(who: int, life: str = "") -> str:
    return f"w{who}{life}" if who else f"obs{life}"


class Run:
    """A `Rounds` in a script. `now` is set by the test; nothing else moves time.

    A process of a worker is told by its number; `life` ("b", "c") tells a restarted one.
    """

    def __init__(
        self,
        *,
        buckets: int = 2,
        recovery: str | None = None,
        data_set: DataSet | None = None,
        **rules: Any,
    ) -> None:
        rules = {"num_workers": 2, "heartbeat_timeout": 10.0, "timeout": 1.0, "epochs": 1, **rules}
        self.now = 0.0
        self.buckets = buckets
        self.rules = Rules(**rules)
        self.rounds = Rounds(
            self.rules, NONCE, 0.0, lambda layout: buckets, recovery=recovery, data_set=data_set
        )
        self.closes: list[wire.Close] = []

    # ------------------------------------------------------------------ events

    def handle(self, event: Event) -> list[Effect]:
        """Any event, and the effects as they are. After a close the server says what it still
        keeps: here as much as before."""
        effects = self.rounds.handle(event, self.now)
        closes = [e.close for e in effects if isinstance(e, Closed)]
        if closes and (oldest := min(self.rounds.log.lineages, default=None)) is not None:
            effects += self.rounds.handle(Forgotten(oldest), self.now)
        self.closes += closes
        return effects

    def happens(self, event: Event) -> list[str]:
        return [told(e) for e in self.handle(event)]

    def tells(self, who: int, message: Any, life: str = "") -> list[str]:
        """A message on its link."""
        return self.happens(Told(session(who, life), message))

    def hello(
        self,
        who: int | None,
        life: str = "",
        *,
        nonce: str = "",
        returns: bool = False,
        trained: bool = False,
        reachable: bool = True,
    ) -> list[str]:
        name = session(1 if who is None else who, life)
        role = "worker" if who != 0 else "observer"
        greeting = Greeted(
            name, role, who, nonce or f"process of {name}", "pi", 100, returns, trained
        )
        why = self.rounds.declines(greeting, self.now, lambda session: reachable)
        return self.happens(greeting) if why is None else [f"no: {why}"]

    def join(self, who: int, life: str = "", **join: Any) -> list[str]:
        name = session(who, life)
        join = {"layout": LAYOUT, "step": 0, "lineage": f"fresh {name}", "device": "cpu", **join}
        return self.tells(who, wire.Join(**join), life)

    def follows(self, who: int, life: str = "") -> list[str]:
        """Join with the newest state."""
        return self.join(who, life, step=self.rounds.step, lineage=self.rounds.lineage)

    def ready(
        self,
        who: int,
        life: str = "",
        samples: int = 100,
        batch: int = 10,
        own: bool = False,
        **ready: Any,
    ) -> list[str]:
        return self.tells(
            who, wire.Ready(samples=samples, batch_size=batch, own=own, **ready), life
        )

    def unready(self, who: int, unfinished: bool = False) -> list[str]:
        return self.tells(who, wire.Unready(unfinished))

    def push(
        self,
        who: int,
        *buckets: int,
        life: str = "",
        bad: str = "",
        norm: float | None = None,
        **push: Any,
    ) -> list[str]:
        """Push these buckets of this worker's lease in the open round, or all of them."""
        effects: list[str] = []
        name = session(who, life)
        for bucket in buckets or range(self.buckets):
            header = self.header(who, bucket, **push)
            why = self.rounds.refusal(name, header)
            if why is not None:
                answer = Send(name, wire.Refused(round=header.round, reason=why))
                assert self.handle(PushRefused(name, header, why)) == [answer]
                effects.append(f"refused: {why}")
            else:
                effects += self.happens(Pushed(name, header, bad or None, norm))
        return effects

    def header(self, who: int, bucket: int, **push: Any) -> wire.Push:
        current = self.rounds.round
        member = current.members.get(who) if current else None
        usual = {
            "round": current.number if current else 0,
            "bucket": bucket,
            "samples": member.samples if member else 10,
        }
        return wire.Push(**{**usual, **push})

    def relinked(self, who: int) -> list[str]:
        return self.happens(Relinked(session(who)))

    def behind(self, who: int) -> list[str]:
        """It asks for what follows a state that is not kept."""
        return self.tells(who, wire.Fetch(step=-1, lineage="long ago"))

    def leave(self, who: int, reason: str = "it was stopped", **died: Any) -> list[str]:
        return self.tells(who, wire.Goodbye(reason, **died))

    def drop(self, who: int, reason: str, *, error: bool = False) -> list[str]:
        """The server lets it go."""
        return self.happens(Dropped(session(who), reason, error))

    def heard(self, who: int, life: str = "") -> None:
        assert self.handle(Heard(session(who, life))) == []

    def lease(self, who: int) -> Lease:
        """That of this worker in the open round."""
        assert self.rounds.round is not None
        return self.rounds.round.members[who].lease

    def dies(self, who: int, failed: str = "forward") -> list[str]:
        """Of an error in its lease: its loop is left before its program ends."""
        lease = self.lease(who)
        self.unready(who, unfinished=True)
        return self.leave(who, "ValueError: no", failed=failed, lease=lease)

    def adopted(self, who: int, number: int, life: str = "") -> list[str]:
        """The snapshot has no pieces."""
        snap = self.rounds.snapshot
        if snap is not None and snap.number == number and snap.pieces is None:
            self.handle(Told(snap.giver, self.manifest()))
        at = {"step": self.rounds.step, "lineage": self.rounds.lineage}
        return self.tells(who, wire.Adopted(number, **at), life)

    def manifest(self, *sizes: int, **fields: Any) -> wire.Manifest:
        """Of the snapshot under way: tensors of these sizes, in bytes; a piece has 10."""
        snap = self.rounds.snapshot
        usual = {
            "snapshot": snap.number if snap else 0,
            "step": self.rounds.step,
            "lineage": self.rounds.lineage,
            "tree": "{}",
            "tensors": tuple(("uint8", (size,)) for size in sizes),
            "piece_bytes": 10,
        }
        return wire.Manifest(**{**usual, **fields})

    def route(self, who: int, m: Any) -> tuple[str | None, list[str]]:
        """Part of a snapshot: to whom it goes on, and the other effects."""
        effects = self.handle(Told(session(who), m))
        goals = [e.session for e in effects if isinstance(e, PassOn) and e.message is m]
        rest = [told(e) for e in effects if not isinstance(e, PassOn)]
        return (goals[0] if goals else None), rest

    def digest(self, who: int, step: int, digest: str) -> list[str]:
        return self.tells(who, wire.Digest(step, digest))

    def stands(self, who: int, step: int, *, kept: bool = False) -> list[str]:
        return self.tells(who, wire.Stand(step, kept))

    def stop(self, reason: str = "Ctrl-C", *, error: bool = False) -> list[str]:
        return self.happens(Stop(reason, error))

    def tick(self, now: float, *alive: int) -> list[str]:
        """Time passes; `alive` are heard just before."""
        self.now = now
        for who in alive:
            self.heard(who)
        return self.happens(Tick())

    # ------------------------------------------------------------------ short cuts

    def observer(self) -> Run:
        """The observer is here, and is the origin."""
        self.hello(0)
        self.join(0)
        return self

    def workers(self, *numbers: int, samples: int = 100, batch: int = 10) -> Run:
        """These workers are here, stand where the log stands, and are ready."""
        for who in numbers:
            self.hello(who)
        for who in numbers:
            self.join(who)
            self.snapshot(who)
        while (under_way := self.rounds.snapshot) is not None:
            joiner = self.rounds.peers[under_way.joiner].id
            if not self.snapshot(joiner):
                break
        for who in numbers:
            self.ready(who, samples=samples, batch=batch)
        return self

    def snapshot(self, who: int, life: str = "") -> list[str]:
        """The snapshot under way, if it is for this worker, is taken."""
        under_way = self.rounds.snapshot
        if under_way is None or under_way.joiner != session(who, life):
            return []
        return self.adopted(who, under_way.number, life)

    def wait_s(self) -> float:
        """How long the open round waits after its quorum."""
        assert self.rounds.round is not None
        return self.rounds._waits.wait_s(self.rounds.round)

    def all_seen(self) -> None:
        for name in self.rounds.peers:
            self.handle(Heard(name))

    @property
    def ledger(self) -> Ledger:
        assert self.rounds.ledger is not None
        return self.rounds.ledger

    def sums(self) -> str:
        """The ledger in words: done, partly and skipped samples, and ranges that wait."""
        state = self.ledger.state()
        names = ", ".join(f"{state[k]} {k}" for k in ("done", "partly", "skipped"))
        return f"{names}; waiting {spans(self.ledger._waiting)}"
