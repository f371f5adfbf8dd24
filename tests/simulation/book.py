"""The book of a run: what every step's model must be, and which samples went into each bucket.

No real server has it. A model is one number here, the hash of all that was applied to it; a
gradient is the samples it was made from, and the model that they were shown to. So a sample that
is lost or counted twice is seen at once, and so is a replica that applied something else than the
log.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from typing import Any

from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import Ledger, OwnLedger

Sample = tuple[int, int]
"""(epoch, place in its shuffled order); of a worker's own: (its process, how many came before)."""

Gradient = tuple[int, tuple[Sample, ...], float]
"""The model that made it, the samples it was made from, and its norm: `USUAL` where it is good."""

USUAL, HUGE = 1.0, 1e6

Content = list[tuple[bool, tuple[Sample, ...]]]
"""An update: for each bucket whether it has a gradient, and of which samples."""


class Broken(AssertionError):
    """A promise was not kept."""


def samples_of(lease: wire.Lease) -> tuple[Sample, ...]:
    epoch, start, stop = lease
    return tuple((epoch, i) for i in range(start, stop))


def after_update(model: int, content: Content) -> int:
    """What an update makes of a model."""
    return hash((model, *content))


class Book:
    """Told of each update before anybody hears of it. `models`, by lineage, are those of runs
    before this one: who takes part in them may live. With `pairs` a lease is for several rounds."""

    def __init__(self, buckets: int, models: dict[str, int], *, pairs: bool = False) -> None:
        self.models = dict(models)
        self.lineage = self._first = ""
        self._pairs = pairs
        self.closes: list[wire.Close] = []
        self._contents: list[Content] = []
        self._updates: dict[str, tuple[str, wire.Close, Content]] = {}  # with the lineage before
        self._counted: list[set[Sample]] = [set() for _ in range(buckets)]
        self.withheld: set[Sample] = set()
        """A liar said that it has nothing of these for some buckets: they are done without."""
        self.leftovers = count(1)
        self.went_in: set[int] = set()
        """What was left out of one average, and went into another that is part of an update."""

    @property
    def step(self) -> int:
        return len(self.closes)

    def begin(self, lineage: str, model: int) -> None:
        """The first state is known. It may be another one as long as nothing follows it."""
        if self.closes:
            raise Broken(f"a new origin after {self.step} steps")
        self.lineage = self._first = lineage
        self.models[lineage] = model

    def go_on(self, step: int, lineage: str, model: int) -> set[str]:
        """After a restart the log goes on from here, perhaps from a step that was lost before; the
        lineages of closed steps that are lost now."""
        self.compare("the one from which the run goes on", lineage, model)
        names = {c.lineage for c in self.closes}
        self.closes, self._contents, self.lineage = [], [], lineage
        while lineage in self._updates:
            lineage, close, content = self._updates[lineage]
            self.closes.insert(0, close)
            self._contents.insert(0, content)
        self._first = lineage
        if step != self.step:
            raise Broken(f"the run goes on from step {step} of no log")
        for bucket, counted in enumerate(self._counted):
            counted.clear()
            for content in self._contents:
                counted.update(content[bucket][1])
        return names - {c.lineage for c in self.closes}

    def was_closed(self, lineage: str) -> bool:
        """Did an update of this run lead to that state, even if it was lost later?"""
        return lineage in self._updates

    @property
    def model(self) -> int:
        """The model at the newest step."""
        return self.models[self.lineage]

    def model_at(self, step: int) -> int:
        """The model at that step of the log."""
        return self.models[self.closes[step - 1].lineage if step else self._first]

    def lag(self, model: int, most: int) -> int:
        """How many updates were made since this was the model; at most so many."""
        names = [self._first, *(c.lineage for c in self.closes)]
        for lag, lineage in enumerate(reversed(names[-1 - most :])):
            if self.models[lineage] == model:
                return lag
        known = any(self.models[lineage] == model for lineage in names)
        why = f"is older than {most} updates" if known else "is of another model"
        raise Broken(f"a gradient of another model goes into step {self.step + 1}: it {why}")

    def compare(self, name: str, lineage: str, model: int) -> None:
        """Promise 1: whoever holds a state by one name holds the same model."""
        if self.models.get(lineage) != model:
            raise Broken(f"{name} holds another model than the log by the name of {lineage}")

    def close(self, close: wire.Close, averages: dict[int, tuple[wire.Average, Any]]) -> None:
        """The next update; checks that no sample is in it twice, or was in one before."""
        if close.step != self.step + 1:
            raise Broken(f"step {close.step} follows step {self.step}")
        if set(averages) != set(close.buckets):
            raise Broken(f"the close has buckets {close.buckets}, averaged were {set(averages)}")
        content: Content = []
        for bucket, counted in enumerate(self._counted):
            average, samples = averages.get(bucket, (None, ()))
            content.append((average is not None and bucket not in average.absent, samples))
            twice = counted.intersection(samples)
            if twice or len(set(samples)) < len(samples):
                raise Broken(f"samples {sorted(twice) or samples} twice in bucket {bucket}")
            counted.update(samples)
        if close.lineage in self.models:
            raise Broken("two states have one name")
        self.models[close.lineage] = after_update(self.model, content)
        self._updates[close.lineage] = self.lineage, close, content
        self.lineage = close.lineage
        self.closes.append(close)
        self._contents.append(content)
        self._check_state(close.ledger)

    def _check_state(self, state: dict[str, Any]) -> None:
        """What a close says of the ledger is what is really in the sums."""
        everywhere, anywhere = set.intersection(*self._counted), set.union(*self._counted)
        done, begun = state["done"], state.get("begun", 0)
        most = len(everywhere | (anywhere & self.withheld))
        # Who leaves between two rounds of a lease, or after the last, leaves it in part.
        if done > most or (not self._pairs and done < len(everywhere)):
            raise Broken(f"{done} samples done, {len(everywhere)} are in every bucket")
        if state["partly"] + begun != len(anywhere) - done:
            raise Broken(f"{state['partly']} samples partly, not {len(anywhere) - done - begun}")
        if state.get("own"):
            return
        epoch, start = state["head"]
        waiting = [s for lease in state["waiting"] for s in samples_of(tuple(lease))]
        settled = done + state["partly"] + state["skipped"] + begun
        if settled + len(waiting) != epoch * state["samples"] + start:
            raise Broken(f"the ledger's sums do not agree: {state}")
        if len(set(waiting)) < len(waiting) or anywhere.intersection(waiting):
            raise Broken("samples that were counted wait to be leased again")

    def check_end(self, ledger: Ledger) -> None:
        """Done + partly + skipped = all, and what was not skipped is in some bucket."""
        self._check_state(ledger.state())
        if isinstance(ledger, OwnLedger):
            return
        if ledger.counted != ledger.total:
            raise Broken(f"{ledger.counted} of {ledger.total} samples were counted")
        missing = ledger.total - len(set.union(*self._counted))
        if missing != ledger.skipped:
            raise Broken(f"{missing} samples are in no bucket, {ledger.skipped} were skipped")


class Residuals:
    """What a codec leaves out of the averages of one process. Each average leaves something, which
    has a number, and goes into the next one of its bucket, whoever makes that; never into two."""

    def __init__(self, book: Book) -> None:
        self._book = book
        self._left: dict[int, tuple[int, ...]] = {}  # by bucket
        self._under_way: dict[int, tuple[int, ...]] = {}  # what goes in
        self._came: dict[int, tuple[int, ...]] = {}  # to a bucket that is under way

    def average(self, bucket: int, *, counts: bool) -> None:
        """Make an average; `counts`: it may become part of an update."""
        before = self._left.get(bucket, ())
        twice = len(set(before)) < len(before) or not self._book.went_in.isdisjoint(before)
        if counts and twice:
            raise Broken(f"what was left out of bucket {bucket} goes into two averages")
        self._under_way[bucket] = before
        self._left[bucket] = (next(self._book.leftovers),)

    def settled(self, averaged: Collection[int]) -> None:
        for bucket, before in self._under_way.items():
            if bucket in averaged:
                self._book.went_in.update(before)
            else:
                self._left[bucket] = (*before, *self._came.get(bucket, ()))
        self._under_way.clear()
        self._came.clear()

    def give_up(self, bucket: int) -> list[Any]:
        left = self._left.pop(bucket, ())
        if bucket in self._under_way:
            left = (*self._under_way.pop(bucket), *self._came.pop(bucket, ()))
        return [left] if left else []

    def take_over(self, bucket: int, given: Any) -> None:
        self._left[bucket] = (*self._left.get(bucket, ()), *given)
        if bucket in self._under_way:
            self._came[bucket] = (*self._came.get(bucket, ()), *given)
