"""A worker in virtual time: its program's loop, with the shipping `LocalRounds` and `Turns`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from paramserver.protocol import messages as wire
from workers.batches import Sizes
from workers.contribution import Contribution
from workers.samples import cut
from workers.turns import Turns

from .book import HUGE, USUAL, Gradient, Sample, samples_of
from .peer import Client
from .process import DEAF, Leaves, Waiting

SPEEDS = (1.0, 1.0, 2.0, 30.0)
"""Seconds for a sample, of each machine in turn: where shares follow speed."""
LONGEST_S = 2.0  # for a bucket, by a slow machine


class Gradients:
    """Stands in for those of the real worker: `push` sends what local steps came to."""

    def __init__(self, push: Callable[[], None]) -> None:
        self._push = push

    def begin_local(self) -> None:
        pass

    def send_local(self, outer: Any) -> None:
        self._push()


class Worker(Client):
    """The loop of `workers.builtin.train` over `workers.cluster`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.part = Contribution(0)
        self._brought = 0  # samples of its own
        self._steps_of: list[Sample] = []  # this round's local steps, their samples
        self._began = 0.0  # they did
        self.left_sooner = self.went_on = 0  # how often
        self.local = self._parts.local(
            self,  # type: ignore[arg-type]
            self.replica,  # type: ignore[arg-type]
            Gradients(self._push_local),  # type: ignore[arg-type]
            self.part,
            self.pushes.forget,
            worker=self.id,
            overlap=self.server.rules.overlap,
        )
        self.turns = Turns(self, self.part, worker=self.id)  # type: ignore[arg-type]

    def main(self) -> Waiting:
        yield from self.connect()
        yield from self.join()
        self.ready()
        self.part.greetings = self.greetings
        batches = 0
        while (lease := (yield from self._next_lease())) is not None:
            batches += 1
            if self.habits.hangs_s:
                hangs_s, self.habits.hangs_s = self.habits.hangs_s, 0.0
                yield self.world.now + hangs_s, DEAF
            if self.habits.own:
                if batches > self.habits.own:
                    break
                yield from self._make_steps(self._own(), ())
                yield from self._goes_on()
                continue
            if self.local.most > 1 and self._step_by_step:
                yield from self._local_round(lease)
                continue
            places = self._unread(lease)
            if len(places) == lease[2] - lease[1]:
                self.send(wire.Unreadable(round=self.part.round))
                yield from self._step()
                continue
            if self.habits.deadly.intersection(samples_of(lease)):
                yield from self._die(lease)
            samples = tuple(s for i, s in enumerate(samples_of(lease)) if i not in places)
            yield from self._make_steps(samples, places)
            yield from self._goes_on()
        self.goodbye(wire.FINISHED, finished=True)

    def _goes_on(self) -> Waiting:
        """Or leaves, or pauses."""
        if self.world.chance(self.habits.leaves):
            self.goodbye("it was stopped")
            raise Leaves("left")
        if self.world.chance(self.habits.pauses):
            self.unready()
            yield self.world.now + self.world.random.expovariate(1.0), DEAF
            self.ready()

    # ------------------------------------------------------------------ steps

    def next_lease(self, number: int) -> None:
        """For `Turns`."""
        self.send(wire.NextLease(round=number))

    def _make_steps(self, samples: tuple[Sample, ...], unread: tuple[int, ...]) -> Waiting:
        """One, or where there are pairs one of each, with one lease."""
        if not self.server.layout.pairs:
            yield from self._backward(samples, unread)
            yield from self._step()
            return
        start = 0
        for pair, count in self.server.layout.pairs:
            self.turns.pair = pair
            yield from self._step_pair(range(start, start + count), samples, unread)
            self.turns.made()
            start += count

    def _step_pair(
        self, buckets: range, samples: tuple[Sample, ...], unread: tuple[int, ...]
    ) -> Waiting:
        """As `Cluster._step_pair`: nothing leaves before the gradient of the whole step is
        there."""
        world, habits, turns, model = self.world, self.habits, self.turns, self.replica.model
        bad = world.random.choice(buckets) if world.chance(habits.bad) else None
        yield world.now + habits.compute_s * len(buckets) * (0.5 + world.random.random()), DEAF
        yield from self.wait(lambda: turns.may_step() is not None)
        if not turns.may_step():
            return
        self.part.round = turns.next
        others = tuple(b for b in range(self.server.buckets) if b not in buckets)
        for bucket in buckets:
            self._push(
                bucket,
                (model, samples, self._norm(bucket == bad)),
                unread=unread,
                without=others if bucket == buckets[0] else (),
                pair=turns.pair,
            )
            self.poll()
        yield from self._step()

    # ------------------------------------------------------------------ local steps

    @property
    def _step_by_step(self) -> bool:
        """Does it make local steps one by one, as the real one does? Else it works a lease off at
        once."""
        return self.habits.sooner > 0 or self.server.rules.overlap

    def _local_round(self, lease: wire.Lease) -> Waiting:
        """As `Cluster._local_batches`."""
        local, part = self.local, self.part
        pieces = cut(lease, self.habits.batch_size)
        local.begin(len(pieces))
        self._steps_of, self._began = [], self.world.now
        for number, piece in enumerate(pieces):
            local.left = len(pieces) - 1 - number
            samples = samples_of(piece)
            if self.habits.deadly.intersection(samples):
                yield from self._die(lease)
            readable = [s for s in samples if s not in self.habits.unreadable]
            first = piece[1] - lease[1]
            part.unread += tuple(first + i for i in self._unread(piece))
            if not readable:
                continue
            yield self.world.now + self._seconds(1.0) * (0.5 + self.world.random.random()), DEAF
            self._steps_of += readable
            local.step(Sizes(len(readable), len(readable)))
            if local.left == 0:
                yield from self._exchange()
                yield from self._goes_on()
                return
            yield from self.wait(lambda: self.ended is not None, timeout_s=0)
            if not local.is_open() or self.ended is not None:
                return
            if self.world.chance(self.habits.sooner):
                yield from self._leave_loop()
                return
        if part.steps:
            yield from self._exchange()
        elif local.under_way is None or (yield from self._own_round()):
            self.send(wire.Unreadable(round=part.round))
            yield from self._step()

    def _leave_loop(self) -> Waiting:
        """Between two steps, and take part with those that were made."""
        self.world.say(f"{self.name} leaves its loop after {self.part.steps} local steps")
        self.left_sooner += 1
        yield from self._exchange(go_on=False)
        if self.ended is not None:
            return
        if self.world.chance(0.3):
            self.goodbye("it was stopped")
            raise Leaves("left")
        self.unready()
        self.ready()

    def _exchange(self, go_on: bool = True) -> Waiting:
        """As `Cluster._exchange_local`."""
        if self.local.under_way is not None and not (yield from self._own_round()):
            return
        if self.local.send(go_on=go_on):
            self.went_on += 1
        else:
            yield from self._step()

    def _own_round(self) -> Waiting:
        """Wait until the round is open whose steps were made. False: they were made in vain."""
        local = self.local
        yield from self.wait(
            lambda: not local.is_open() or local.under_way is None or self.ended is not None
        )
        return local.is_open() and self.ended is None

    def _push_local(self) -> None:
        """What this round's steps came to, all buckets of it."""
        part, world, buckets = self.part, self.world, self.server.buckets
        bad = world.random.randrange(buckets) if world.chance(self.habits.bad) else None
        for bucket in range(buckets):
            last = bucket == buckets - 1
            self._push(
                bucket,
                (self.replica.model, tuple(self._steps_of), self._norm(bucket == bad)),
                samples=part.samples,
                unread=part.unread,
                loss=1.0 if last else None,
                compute_s=world.now - self._began if last else None,
                steps=part.steps,
            )

    def _seconds(self, part: float) -> float:
        """For a bucket, or a local step, of so many batches."""
        least_s = self.habits.compute_s
        if self.server.rules.shares != "speed":
            return least_s
        # More samples take longer, and each machine has a speed.
        return max(least_s, min(least_s * part * SPEEDS[self.id % len(SPEEDS)], LONGEST_S))

    def _own(self) -> tuple[Sample, ...]:
        """The next batch of its own."""
        first = self._brought
        self._brought += 1 + (self.serial + first) % self.habits.batch_size
        return tuple((self.serial, n) for n in range(first, self._brought))

    def _unread(self, lease: wire.Lease) -> tuple[int, ...]:
        """Places in the lease of what cannot be read."""
        unreadable = self.habits.unreadable
        return tuple(i for i, s in enumerate(samples_of(lease)) if s in unreadable)

    def _die(self, lease: wire.Lease) -> Waiting:
        """Of an error in the middle of a batch; its loop is left before its program ends."""
        yield self.world.now + self.habits.compute_s * self.world.random.random(), DEAF
        if not self.habits.in_silence:
            self.unready(unfinished=True)
            self.goodbye("an error", failed=wire.FORWARD, lease=lease, error=True)
        raise Leaves("left: it died of its samples")

    def _next_lease(self) -> Waiting:
        found: tuple[int, wire.Lease] | None = None
        if self.local.ahead is not None:
            return self.local.ahead

        def look() -> bool:
            nonlocal found
            assert self.follow is not None
            if self.greetings != self.part.greetings:
                self.local.greeted(self.greetings)
                self.turns.lost()
            self.turns.ask_for_next()
            found = self.follow.lease(self.id, self.part.round)
            return found is not None or self.ended is not None

        yield from self.wait(lambda: self.ended is not None, timeout_s=0)
        yield from self.wait(look)
        if self.ended is not None:
            return None
        assert found is not None
        self.part.round, lease = found
        opened = None if self.follow is None else self.follow.open
        self.local.most = 1 if opened is None else opened.local_steps
        self.turns.begin(0 if opened is None else opened.began)
        return lease

    def _backward(self, samples: tuple[Sample, ...], unread: tuple[int, ...]) -> Waiting:
        """A gradient of the model as it is now, bucket by bucket; nothing is applied meanwhile."""
        world, habits, buckets = self.world, self.habits, self.server.buckets
        model = self.replica.model
        bad = world.random.randrange(buckets) if world.chance(habits.bad) else None
        began, by_speed = world.now, self.server.rules.shares == "speed"
        seconds = self._seconds(len(samples) / habits.batch_size)
        if world.chance(habits.stutters):
            stutter = seconds * buckets * 6.0 * world.random.random()
            most = self.server.rules.idle_timeout / 4  # else a run may well be given up meanwhile
            yield world.now + min(stutter, most), DEAF
        for bucket in range(buckets):
            yield world.now + seconds * (0.5 + world.random.random()), DEAF
            self._push(
                bucket,
                (model, samples, self._norm(bucket == bad)),
                unread=unread,
                loss=1.0 if bucket == buckets - 1 else None,
                compute_s=world.now - began if by_speed and bucket == buckets - 1 else None,
            )
            self.poll()

    def _norm(self, bad: bool) -> float:
        """A bad gradient is out of all proportion where norms are judged, else it is not
        finite."""
        if not bad:
            return USUAL
        return math.nan if self.server.rules.max_norm_ratio is None else HUGE

    def _push(self, bucket: int, gradient: Gradient, **more: Any) -> None:
        """Push one bucket of a gradient, or say that it is absent; `more` is for the message."""
        absent = (bucket,) if self.world.chance(self.habits.absent) else ()
        told = {"samples": len(gradient[1]), **more}
        if self.server.rules.max_staleness:
            told["made_at"] = self.replica.step
        push = wire.Push(round=self.part.round, bucket=bucket, absent=absent, **told)
        self.push(push, gradient)

    def _step(self) -> Waiting:
        yield from self.wait(
            lambda: (
                self.greetings != self.part.greetings
                or self.ended is not None
                or (self.follow is not None and self.follow.is_settled(self.id, self.part.round))
            )
        )
        self.local.settle()

    def closed(self, close: wire.Close) -> None:
        """As `Cluster._on_close`."""
        assert self.follow is not None
        if self.follow.is_awaited(self.id, self.part.round):
            self.pushes.hurry()
            self._send_due()
