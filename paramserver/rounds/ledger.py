"""The ledger: which samples of which epoch are leased, done, or still to do.

The work of a run is one endless queue of ranges, epoch after epoch. With a `barrier` nothing of an
epoch is leased before all of the one before it is settled; usually there is none. A lease takes
a range from its head; the last range of an epoch may be short. A range that is returned goes to the
front, in its old order, so that nothing is skipped. A range that was counted is never returned, so
that nothing is applied twice. At any time, in samples:

    done + partly + skipped + leased + returned + ahead = epochs * samples

A range that workers die of would kill them all, one after the other: deaths are counted by range
(`died`). Two that tell of an error, or three of any kind, and the range is halved; of a half one
more is enough, and what cannot be halved any further, or not without the last workers, is skipped.
What is skipped so, what nobody could read and what was dropped is named in `lost`. In the epochs
that follow, the samples that killed are skipped wherever they lie (`places`).

Where workers bring samples of their own there is nothing to lease out: `OwnLedger` counts what they
tell.

No clock, no socket; the state goes as a small dict into every close (`state`, `from_state`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import msgspec

from paramserver.errors import PeerError
from paramserver.protocol.messages import OWN, Lease

DONE, PARTLY, SKIPPED, RETURNED = "done", "partly", "skipped", "returned"

KILLED, AGAIN, UNREAD, DROPPED = "killed", "again", "unread", "dropped"
"""Why samples are lost: workers died of them in this epoch or in an earlier one, nobody could read
them, or they were the short rest of an epoch that was not wanted."""

Places = Callable[[int, Lease, int], Sequence[int]]
"""Where, of a set of so many, the samples of a range lie in the order of another epoch."""

ERRORS_MAX, DEATHS_MAX = 2, 3  # of a range, with an error and in all
STRANGERS_MAX = 9  # where nobody of them had contributed before
SUSPECTS_KEPT = 64
LOST_NAMED = 32
KILLED_RANGES_MAX = 8
COUNTS = ("samples", "done", "partly", "skipped")
SHARE_MAX = 100  # at most one sample in so many may be unreadable, or kill


class Suspect(msgspec.Struct, frozen=True, array_like=True):
    """A range that workers died of, and how often it was halved before."""

    lease: Lease
    errors: Annotated[int, msgspec.Meta(ge=0, le=2**20)]
    silent: Annotated[int, msgspec.Meta(ge=0, le=2**20)]
    halvings: Annotated[int, msgspec.Meta(ge=0, le=2**20)] = 0
    believed: bool = True
    """At least one of these workers had contributed before. Anybody can greet, and seem to die."""

    @property
    def due(self) -> bool:
        if not self.believed:
            return self.errors + self.silent >= STRANGERS_MAX
        return self.errors >= ERRORS_MAX or self.errors + self.silent >= DEATHS_MAX


class Lost(msgspec.Struct, frozen=True, array_like=True):
    """A range that is skipped, and why."""

    lease: Lease
    why: str


class LedgerState(msgspec.Struct, frozen=True):
    """What a replica keeps of a ledger. Leases that were out count as waiting again."""

    samples: int
    epochs: int
    head: tuple[int, int]
    waiting: tuple[Lease, ...]
    done: int
    partly: int
    skipped: int
    own: bool = False
    """It was an `OwnLedger`."""
    unread: int = 0
    killed: int = 0
    killed_ranges: int = 0
    suspects: Annotated[tuple[Suspect, ...], msgspec.Meta(max_length=SUSPECTS_KEPT)] = ()
    lost: Annotated[tuple[Lost, ...], msgspec.Meta(max_length=LOST_NAMED)] = ()
    steps: int | None = None
    rest: int = 0
    begun: int = 0


def optimizer_steps(ledger: Mapping[str, Any] | None, step: int) -> int:
    """The optimizer steps in the state at this `step` of the log, which is what people are shown.
    An update is one step, but for rounds of local steps, of which the ledger counts more."""
    steps: int | None = None if ledger is None else ledger.get("steps")
    return step if steps is None else steps


def check_counts(state: dict[str, Any]) -> None:
    """Check that the counts with which a replica computes are there, and are numbers.
    `Ledger.from_state` checks the rest, where a ledger is made of it. Raises `PeerError`."""
    for name in COUNTS:
        if type(state.get(name)) is not int:
            raise PeerError(f"`{name}` of the ledger is no number")
    if type(state.get("steps", 0)) is not int:
        raise PeerError("`steps` of the ledger is no number")


class Ledger:
    """Samples of `epochs` passes over a set of `samples`; see the module's head."""

    def __init__(self, samples: int, epochs: int) -> None:
        self.samples = samples
        self.epochs = epochs
        self.done = 0
        self.partly = 0
        self.skipped = 0
        self.returned = 0  # so far, by this server; they are handed out again
        self._epoch, self._start = 0, 0  # the head of what was never leased
        self._waiting: list[Lease] = []  # returned ranges, sorted; they go first
        self._leased: set[Lease] = set()
        self._begun: list[tuple[Lease, int]] = []
        """Of these, those of which an update has a part, with their readable samples."""
        self._suspects: dict[Lease, Suspect] = {}
        self.unread = 0  # samples that could not be read, of those skipped
        self.killed, self.killed_ranges = 0, 0  # samples that workers died of, in so many ranges
        self.lost: list[Lost] = []
        """The first ranges that are lost, by name."""
        self.news: list[Lost] = []
        """What was lost since the last call of `take_news`."""
        self.places: Places | None = None
        self.barrier = False
        """Lease nothing of an epoch before all of the one before it is settled."""
        self._deadly: tuple[tuple[int, int], list[int]] = (-1, 0), []  # of an epoch, see `_avoided`
        self._least = 1
        self._spare = False
        self.steps: int | None = None
        """Optimizer steps made, once there was a round of local steps (see `optimizer_steps`)."""
        self._rest, self._counted = 0, 0  # samples that make no step yet; counted by then

    def lease(
        self,
        size: int,
        least: int = 1,
        drop_last: bool = False,
        *,
        short: int | None = None,
        joined: bool = False,
    ) -> Lease | None:
        """The next range of at most `size` samples; None when nothing is left to lease. With
        `joined` ranges that came back are put together where they lie side by side: they were
        leased in other sizes.

        No rest of fewer than `least` samples stays behind: it is part of the range before it. With
        `drop_last` the last range of an epoch is dropped where it has fewer samples than `size`,
        and than `short`.
        """
        if size < 1:
            raise ValueError("a lease holds at least one sample")
        self._least = max(1, least)
        while True:
            if self._held_by_barrier:
                return None
            returned = bool(self._waiting)
            taken = self._from_waiting(size, joined) if returned else self._from_head(size)
            if taken is None or returned or not drop_last:
                break
            if taken[2] < self.samples or taken[2] - taken[1] >= min(size, short or size):
                break
            self.skipped += taken[2] - taken[1]
            self._lose(taken, DROPPED)
        if taken is not None:
            self._leased.add(taken)
            self._pass_deadly()  # nothing else may be left
        return taken

    @property
    def _held_by_barrier(self) -> bool:
        """Is what comes next of a later epoch than something that is not settled?"""
        if not self.barrier or not self._leased:
            return False
        following = self._waiting[0][0] if self._waiting else self._epoch
        return following > min(self._leased)[0]

    def _from_waiting(self, size: int, joined: bool) -> Lease:
        epoch, start, stop = lease = self._waiting.pop(0)
        while joined and stop - start < size and lease not in self._suspects:
            follower = self._waiting[0] if self._waiting else None
            if follower is not None and follower[:2] == (epoch, stop):
                if follower in self._suspects:
                    break
                stop = self._waiting.pop(0)[2]
            elif (self._epoch, self._start) == (epoch, stop) and self._end_of(epoch, stop) > stop:
                stop = self._advance(size - (stop - start))
            else:
                break
        while stop - start < self._least:  # of a worker to whom that was enough
            if self._waiting and self._waiting[0][:2] == (epoch, stop):
                stop = self._waiting.pop(0)[2]
            elif (self._epoch, self._start) == (epoch, stop) and self._end_of(epoch, stop) > stop:
                stop = self._advance(size)
            else:
                break
        if stop - start - size >= self._least:
            self._waiting.insert(0, (epoch, start + size, stop))
            return epoch, start, start + size
        rest = self._end_of(epoch, stop) - stop
        if (self._epoch, self._start) == (epoch, stop) and 0 < rest < self._least:
            stop = self._advance(rest)  # too short to be a range of its own
        return epoch, start, stop

    def _from_head(self, size: int) -> Lease | None:
        self._pass_deadly()
        if self._epoch >= self.epochs or self.samples == 0:
            return None
        epoch, start = self._epoch, self._start
        return epoch, start, self._advance(size)

    def _advance(self, size: int) -> int:
        """Take `size` samples from the head, and a rest that would be too short for a range of its
        own. Returns the place where they end."""
        end = self._end_of(self._epoch, self._start)
        stop = min(self._start + size, end)
        if end - stop < self._least:
            stop = end
        self._move_head(stop)
        return stop

    def _move_head(self, stop: int) -> None:
        self._epoch, self._start = (
            (self._epoch, stop) if stop < self.samples else (self._epoch + 1, 0)
        )

    def _pass_deadly(self) -> None:
        """Skip samples at the head that killed in an earlier epoch, and ranges between two of them
        that are too short."""
        while self._epoch < self.epochs and (avoided := self._avoided(self._epoch)):
            start = self._start
            end = self._end_of(self._epoch, start)
            if end - start >= max(1, self._least):
                return
            while end in avoided:
                end += 1
            self.skipped += end - start
            self.killed += end - start
            self._lose((self._epoch, start, end), AGAIN)
            self._move_head(end)

    def _end_of(self, epoch: int, start: int) -> int:
        """The next place from `start` on that no range may hold, or the epoch's end."""
        avoided = self._avoided(epoch)
        found = bisect.bisect_left(avoided, start)
        return avoided[found] if found < len(avoided) else self.samples

    def _avoided(self, epoch: int) -> list[int]:
        """Where the samples that killed in earlier epochs lie in this one, in order."""
        killers = [x.lease for x in self.lost if x.why == KILLED and x.lease[0] < epoch]
        if not killers or self.places is None:
            return []
        key = (epoch, len(killers))
        if self._deadly[0] != key:
            found = {p for lease in killers for p in self.places(self.samples, lease, epoch)}
            self._deadly = key, sorted(found)
        return self._deadly[1]

    def split(self, lease: Lease, size: int) -> Lease:
        """Return what follows the first `size` samples of this lease, which stay leased."""
        self._leased.remove(lease)
        epoch, start, stop = lease
        first, rest = (epoch, start, start + size), (epoch, start + size, stop)
        self._leased |= {first, rest}
        self.settle(rest, RETURNED)
        return first

    def begin(self, lease: Lease, unread: Sequence[int] = ()) -> None:
        """An update has a part of this lease, which goes on: it is never returned from now on.
        `unread` as in `settle`."""
        self._skip_unread(lease, unread)
        self._begun.append((lease, lease[2] - lease[1] - len(unread)))

    def finish(self, lease: Lease, how: str) -> None:
        """End a lease that has begun: done, or else partly."""
        begun = next(one for one in self._begun if one[0] == lease)
        self._begun.remove(begun)
        self._leased.discard(lease)  # those of one's own are not there
        self._acquit(lease)
        if how == DONE:
            self.done += begun[1]
        else:
            self.partly += begun[1]

    def settle(self, lease: Lease, how: str, unread: Sequence[int] = ()) -> None:
        """End a lease: done, partly, skipped (all counted) or returned to the queue's head.

        `unread`: places in it, in order, of the samples that could not be read. They are skipped,
        whatever becomes of the rest.
        """
        if how not in (DONE, PARTLY, SKIPPED, RETURNED):
            raise ValueError(how)
        self._leased.remove(lease)
        if how == RETURNED:
            self.returned += lease[2] - lease[1]
            self._put_back(lease)
            return
        self._acquit(lease)
        _, start, stop = lease
        self._skip_unread(lease, unread)
        if how == SKIPPED:
            self.skipped += stop - start - len(unread)
        elif how == DONE:
            self.done += stop - start - len(unread)
        else:
            self.partly += stop - start - len(unread)

    def _skip_unread(self, lease: Lease, unread: Sequence[int]) -> None:
        epoch, start, _ = lease
        for first, last in _runs(unread):
            self._lose((epoch, start + first, start + last), UNREAD)
        self.unread += len(unread)
        self.skipped += len(unread)

    def died(self, lease: Lease, *, error: bool, spare: bool, believed: bool = True) -> None:
        """A worker died while it computed this range, with an error or without a word.

        `spare`: there are workers enough to look for the part of it that kills. `believed`: it had
        contributed before. A range that was settled, halved or leased in parts meanwhile has its
        answer.
        """
        if lease not in self._leased and lease not in self._waiting:
            return
        known = [s for s in self._suspects.values() if _overlap(s.lease, lease)]
        self._suspect(
            Suspect(
                lease,
                errors=max((s.errors for s in known), default=0) + error,
                silent=max((s.silent for s in known), default=0) + (not error),
                halvings=max((s.halvings for s in known), default=0),
                believed=believed or any(s.believed for s in known),
            )
        )
        self._spare = spare
        if lease in self._waiting:
            self._waiting.remove(lease)
            self._put_back(lease)

    def lived(self, lease: Lease) -> None:
        """A worker that seemed to have died of this range without a word is alive."""
        suspect = self._suspects.get(lease)
        if suspect is not None and suspect.silent:
            self._suspect(msgspec.structs.replace(suspect, silent=suspect.silent - 1))

    def _suspect(self, suspect: Suspect) -> None:
        self._suspects.pop(suspect.lease, None)
        if suspect.errors + suspect.silent:
            self._suspects[suspect.lease] = suspect
        while len(self._suspects) > SUSPECTS_KEPT:
            del self._suspects[next(iter(self._suspects))]

    def _put_back(self, lease: Lease) -> None:
        """Let a returned range wait; halve it, or skip it, if it killed too often."""
        epoch, start, stop = lease
        suspect = self._suspects.get(lease)
        if suspect is None or not suspect.due:
            bisect.insort(self._waiting, lease)
            return
        self._acquit(lease, rests=False)
        if stop - start >= 2 * self._least and (suspect.halvings == 0 or self._spare):
            middle = (start + stop) // 2
            for half in ((epoch, start, middle), (epoch, middle, stop)):
                self._suspect(Suspect(half, ERRORS_MAX - 1, 1, suspect.halvings + 1))
                bisect.insort(self._waiting, half)
            return
        self.skipped += stop - start
        self.killed += stop - start
        self.killed_ranges += 1
        self._lose(lease, KILLED)

    def _acquit(self, lease: Lease, rests: bool = True) -> None:
        """Suspect this range no more. The rest of a suspected range that held it stays
        suspected."""
        epoch, start, stop = lease
        for s in [s for s in self._suspects.values() if _overlap(s.lease, lease)]:
            del self._suspects[s.lease]
            for rest in ((epoch, s.lease[1], start), (epoch, stop, s.lease[2])):
                if rests and rest[1] < rest[2] and rest not in self._suspects:
                    self._suspect(msgspec.structs.replace(s, lease=rest))

    def _lose(self, lease: Lease, why: str) -> None:
        self.news.append(Lost(lease, why))
        if len(self.lost) < LOST_NAMED:
            self.lost.append(Lost(lease, why))

    def take_news(self) -> list[Lost]:
        """What was lost since the last call."""
        news, self.news = self.news, []
        return news

    @property
    def most_lost(self) -> int:
        """So many samples may be broken in the epochs so far."""
        epochs = min(self._epoch + 1, max(1, self.epochs))
        return max(1, self.samples // SHARE_MAX) * epochs

    @property
    def too_many_unread(self) -> bool:
        return self.unread > self.most_lost

    @property
    def hopeless(self) -> str | None:
        """Why it makes no sense to go on: more samples are skipped than may be broken in a data
        set. None while there are fewer."""
        most = self.most_lost
        if self.too_many_unread:
            return f"{self.unread} samples could not be read, more than one in {SHARE_MAX}"
        if self.killed > most and self.killed_ranges > KILLED_RANGES_MAX:
            return (
                f"workers died of {self.killed_ranges} ranges of {self.killed} samples, "
                f"more than one in {SHARE_MAX}"
            )
        return None

    @property
    def exhausted(self) -> bool:
        """Nothing is left to lease. Leases that are out may still be returned."""
        return not self._waiting and (self._epoch >= self.epochs or self.samples == 0)

    @property
    def finished(self) -> bool:
        return self.exhausted and not self._leased

    @property
    def untouched(self) -> bool:
        """Nobody trained on these samples or died of them: the data set may still change."""
        return not (self.counted or self._leased or self._suspects)

    @property
    def remembers(self) -> bool:
        """It knows of samples that workers died of."""
        return bool(self._suspects or self.killed)

    @property
    def counted(self) -> int:
        """Samples that are settled for good."""
        return self.done + self.partly + self.skipped

    @property
    def total(self) -> int:
        return self.samples * self.epochs

    def begin_steps(self, before: int) -> None:
        """The first round of local steps begins: optimizer steps are counted from now on, beside
        those `before`."""
        if self.steps is None:
            self.steps, self._counted = before, self.counted

    def optimizer_steps(self, step: int) -> int:
        """The optimizer steps in the newest state, at this step of the log."""
        return step if self.steps is None else self.steps

    def count_steps(self, batch: int, made: int) -> None:
        """A round is over: count the optimizer steps that its samples make, of `batch` samples
        each, if steps are counted; what is left over counts with the next ones. A worker `made` so
        many of them."""
        if self.steps is None:
            return
        self._rest += self.counted - self._counted
        self._counted = self.counted
        made, self._rest = divmod(self._rest, batch)
        self.steps += made

    def state(self) -> dict[str, Any]:
        """The ledger as JSON. Leases that are out count as waiting, as after a restart; the samples
        of those that an update has a part of are `begun`, and count as partly then."""
        state: dict[str, Any] = {
            "samples": self.samples,
            "epochs": self.epochs,
            "head": (self._epoch, self._start),
            "waiting": sorted([*self._waiting, *(self._leased - {le for le, _ in self._begun})]),
            "done": self.done,
            "partly": self.partly,
            "skipped": self.skipped,
        }
        rare = {
            "unread": self.unread,
            "killed": self.killed,
            "killed_ranges": self.killed_ranges,
            "suspects": [msgspec.to_builtins(s) for s in self._suspects.values()],
            "lost": [msgspec.to_builtins(lost) for lost in self.lost],
            "begun": sum(samples for _, samples in self._begun),
        }
        if self.steps is not None:
            state |= {"steps": self.steps, "rest": self._rest}
        return {**state, **{name: value for name, value in rare.items() if value}}

    @classmethod
    def from_state(cls, state: dict[str, Any], epochs: int | None = None) -> Ledger:
        """The ledger that `state` tells of, with `epochs` in place of its own if given.

        Raises `msgspec.ValidationError` (a ValueError) for what no ledger can have told.
        """
        s = msgspec.convert(state, LedgerState)
        epoch, start = s.head
        s = msgspec.structs.replace(s, partly=s.partly + s.begun)
        waiting = sorted(s.waiting)
        steps = 0 if s.steps is None else s.steps
        counts = (s.samples, s.epochs, s.done, s.partly, s.skipped, epoch, start, steps, s.rest)
        if min(*counts, s.begun) < 0 or start >= max(1, s.samples):
            raise msgspec.ValidationError("the ledger's numbers cannot be right")
        before = (0, 0)  # ranges lie apart, and behind the head
        for lease in waiting:
            if not (0 <= lease[1] < lease[2] <= s.samples and before <= lease[:2]):
                raise msgspec.ValidationError(f"{lease} cannot wait in the ledger")
            before = (lease[0], lease[2])
        if before > s.head:
            raise msgspec.ValidationError("what waits in the ledger was never leased")
        if s.own and (s.samples, s.head, waiting) == (0, (0, 0), []):
            own = OwnLedger()
            own.done, own.partly, own.skipped = s.done, s.partly, s.skipped
            own._count_from(s)
            return own
        spans = sum(stop - start for _, start, stop in waiting)
        if s.done + s.partly + s.skipped + spans != epoch * s.samples + start:
            raise msgspec.ValidationError("the ledger's sums do not agree")
        if min(s.unread, s.killed, s.killed_ranges) < 0 or s.unread + s.killed > s.skipped:
            raise msgspec.ValidationError("the ledger's numbers cannot be right")
        for lease in (*(suspect.lease for suspect in s.suspects), *(lost.lease for lost in s.lost)):
            if not (0 <= lease[0] <= epoch and 0 <= lease[1] < lease[2] <= s.samples):
                raise msgspec.ValidationError(f"the ledger has no range {lease}")
        if any(lost.why not in (KILLED, AGAIN, UNREAD, DROPPED) for lost in s.lost):
            raise msgspec.ValidationError("samples are lost for no reason that there is")
        ledger = cls(s.samples, s.epochs if epochs is None else epochs)
        ledger.done, ledger.partly, ledger.skipped = s.done, s.partly, s.skipped
        ledger._epoch, ledger._start = s.head
        ledger._waiting = waiting
        ledger.unread, ledger.killed = s.unread, s.killed
        ledger.killed_ranges, ledger.lost = s.killed_ranges, list(s.lost)
        ledger._suspects = {suspect.lease: suspect for suspect in s.suspects}
        ledger._count_from(s)
        return ledger

    def _count_from(self, s: LedgerState) -> None:
        self.steps, self._rest, self._counted = s.steps, s.rest, self.counted


class OwnLedger(Ledger):
    """The ledger of a run whose workers bring samples of their own: it only counts what they
    report.

    There is always another lease, `OWN`. A returned lease is forgotten: its samples are the
    worker's.
    """

    def __init__(self) -> None:
        super().__init__(samples=0, epochs=0)

    def lease(self, *_: object, **__: object) -> Lease:
        """`OWN`, whatever is asked for."""
        return OWN

    def died(self, lease: Lease, *, error: bool, spare: bool, believed: bool = True) -> None:
        """Do nothing: no other worker gets these samples."""

    def settle(self, lease: Lease, how: str, unread: Sequence[int] = ()) -> None:
        """`lease` is (0, 0, number of samples that the worker reported)."""
        if how != RETURNED:
            self._leased.add(lease)
            super().settle(lease, how)

    def count_steps(self, batch: int, made: int) -> None:
        """Batches have no size that is known before: those `made` count."""
        if self.steps is not None:
            self.steps += made

    @property
    def exhausted(self) -> bool:
        return False

    def state(self) -> dict[str, Any]:
        return {**super().state(), "own": True}


def _overlap(a: Lease, b: Lease) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The ranges of neighbours among these places, which are in order."""
    start = stop = -1
    for place in places:
        if place != stop:
            if stop > 0:
                yield start, stop
            start = place
        stop = place + 1
    if stop > 0:
        yield start, stop
