"""The tensors of a run whose buckets several shards average: gives orders to the shards.

`Spread` has the methods of `control.Data`. It passes on what concerns the server's own buckets to
the `Data` of this process, and makes of the rest orders for the other shards. It keeps of their
payloads and averages only the numbers by which they are known. Pure: messages go out through
`order`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.protocol.sharding import SERVER
from paramserver.rounds.disagreement import Comparison
from paramserver.rounds.effects import Finish
from paramserver.server.history import Frames, Update

Finished = tuple[wire.Average, Frames]
NOBODY = -1


class Order(Protocol):
    """Sends a message to a shard, by its number."""

    def __call__(self, shard: int, message: wire.Message, *buffers: Any) -> object: ...


class Data(Protocol):
    """Keeps tensors; `paramserver.server.data.Data` documents these methods."""

    def start(self, layout: wire.Layout) -> str | None: ...
    def share(self, session: str, join: wire.Join) -> str | None: ...
    def located(self, session: str, push: wire.Push, buffers: list[Any]) -> list[Any]: ...
    def release(self, session: str, push: wire.Push) -> None: ...
    def push(
        self, session: str, worker: int, push: wire.Push, buffers: list[Any], *, late: bool
    ) -> tuple[str | None, float | None]: ...
    def drop(self, worker: int, bucket: int) -> None: ...
    def add(self, worker: int, bucket: int, weight: float, *, late: bool) -> None: ...
    def finish(self, finish: Finish) -> None: ...
    def leaves_out(self, bucket: int) -> bool: ...
    def give_up(self, bucket: int) -> list[Any]: ...
    def check_left_out(self, bucket: int, buffers: list[Any]) -> None: ...
    def take_over(self, bucket: int, buffers: list[Any]) -> None: ...
    def due(self) -> list[Finished]: ...
    def comparisons(self) -> Mapping[int, Comparison]: ...
    def close(self, close: wire.Close) -> Update: ...
    def forget_round(self, averaged: tuple[int, ...]) -> None: ...
    def reaches_back_to(self) -> int | None: ...
    def fetch(self, step: int) -> list[Update]: ...
    def forget(self, session: str) -> None: ...


class Sent(msgspec.Struct):
    """A payload that a shard keeps until it is told what becomes of it."""

    shard: int
    session: str
    number: int
    late: bool


class Kept(msgspec.Struct):
    """The averages of one update that other shards keep."""

    round: int
    lineage: str
    averages: dict[int, wire.Sharded]
    """By bucket."""
    found: dict[int, list[Any]] = msgspec.field(default_factory=dict)
    """Buffers that were asked for and have come, by bucket."""
    taken_over: dict[int, list[Any]] = msgspec.field(default_factory=dict)
    """The same of shards that are gone: they stay as long as the update is kept."""
    asked: bool = False

    def has(self, bucket: int) -> bool:
        return bucket in self.found or bucket in self.taken_over

    def lacks_of(self, shard: int) -> list[int]:
        """The buckets whose averages this shard keeps, and which are not here."""
        return [b for b, a in self.averages.items() if a.shard == shard and not self.has(b)]

    @property
    def complete(self) -> bool:
        return all(map(self.has, self.averages))


class Spread:
    """See the module's docstring. What a lossy codec leaves out of an average goes into a later one
    of that bucket, whoever makes it."""

    def __init__(self, own: Data, order: Order, nonce: str) -> None:
        self.own = own
        self._order = order
        self._nonce = nonce
        self.shards: set[int] = set()
        """That live."""
        self.lost: set[int] = set()
        """Buckets of which something was left out that is gone with a shard."""
        self._left_at: dict[int, set[int]] = {}  # by bucket: who left something out, and makes none
        self._asked: dict[int, int] = {}  # by shard: of which bucket it is about to tell that
        self._waiting: list[tuple[int, list[Any]]] = []  # buckets, and what was left out of them
        self._retiring: set[int] = set()
        self._arrived: dict[tuple[str, int], dict[int, wire.Arrived]] = {}  # by session and shard
        self._sent: dict[tuple[int, int], Sent] = {}  # by worker and bucket
        self._divided: dict[int, tuple[int, Finish]] = {}  # by bucket: the shard, and what it makes
        self._made: dict[int, wire.Sharded] = {}  # by bucket, of the open round
        self._due: list[wire.Sharded] = []
        self._makers: dict[int, int] = {}  # by bucket: the shard of its average in an update
        self._makes: dict[int, int] = {}  # the same of the open round
        self._kept: dict[int, Kept] = {}  # by step
        self._reach = -1  # shards that are gone had averages of the updates up to this step

    # ------------------------------------------------------------------ the shards

    def employ(self, shard: int) -> None:
        """A shard takes part."""
        self.shards.add(shard)

    def retire(self, shard: int, *, passes_on: bool) -> None:
        """A shard is about to go: take over what it keeps of the newest update, which some replicas
        may lack. Whoever lacks more takes a snapshot. `passes_on`: other rounds will follow, into
        which what it has left out may go."""
        self.shards.discard(shard)
        self._retiring.add(shard)
        if (newest := self._newest) is not None:
            for bucket in newest.lacks_of(shard):
                self._order(shard, wire.Recall(round=newest.round, bucket=bucket))
        self._leave(shard)
        if passes_on and shard not in self._asked:
            self._give_up_next(shard)

    def has_taken_over(self, shard: int) -> bool:
        """Is all here that this shard has of the newest update, and has left out?"""
        if shard in self._asked:
            return False
        return self._newest is None or not self._newest.lacks_of(shard)

    @property
    def _newest(self) -> Kept | None:
        """The newest update of which other shards keep a part."""
        return self._kept[max(self._kept)] if self._kept else None

    def dismiss(self, shard: int) -> None:
        """A shard is gone, with all that it kept."""
        self.shards.discard(shard)
        self._retiring.discard(shard)
        self._leave(shard)
        for bucket in self._left_by(shard):
            self._left_at[bucket].discard(shard)
            self.lost.add(bucket)
        if shard in self._asked:
            self.lost.add(self._asked.pop(shard))
        for key in [key for key in self._arrived if key[1] == shard]:
            del self._arrived[key]
        for step, kept in self._kept.items():
            if kept.lacks_of(shard):
                self._reach = max(self._reach, step)
            for bucket, average in kept.averages.items():
                if average.shard == shard and bucket in kept.found:
                    kept.taken_over[bucket] = kept.found.pop(bucket)

    def arrived(self, shard: int, report: wire.Arrived, most: int) -> None:
        """A payload has come to a shard. Raises `PeerError` where it tells of more than `most` of
        one peer that nobody has asked about."""
        reports = self._arrived.setdefault((report.session, shard), {})
        reports[report.number] = report
        if len(reports) > most:
            raise PeerError(f"{len(reports)} payloads of one peer")

    def averaged(self, shard: int, report: wire.Averaged) -> bool:
        """A shard has made an average; False where none was wanted of it. Raises `PeerError` where
        it cannot be right."""
        divided = self._divided.get(report.bucket)
        if divided is None or divided[0] != shard or divided[1].round != report.round:
            return False  # of a round that is void
        if not 0.0 < report.scale < float("inf"):
            raise PeerError(f"an average of scale {report.scale}")
        if report.absent != divided[1].absent:
            raise PeerError("an average without other tensors than it was to be")
        del self._divided[report.bucket]
        average = wire.Sharded(
            nonce=self._nonce,
            round=report.round,
            step=divided[1].step,
            bucket=report.bucket,
            absent=report.absent,
            scale=report.scale,
            shard=shard,
            number=report.number,
        )
        self._made[report.bucket] = average
        self._due.append(average)
        return True

    def announced(self) -> list[wire.Sharded]:
        """The averages that other shards have made since the last call."""
        due, self._due = self._due, []
        return due

    def awaits(self, session: str, push: wire.Push) -> bool:
        """Is the report on this push, which goes to another shard, still to come?"""
        if push.shard == SERVER or push.shard not in self.shards:
            return False
        return push.sealed not in self._arrived.get((session, push.shard), {})

    def _report(self, session: str, push: wire.Push) -> wire.Arrived | None:
        """The report on this push; those before it are of no use any more."""
        reports = self._arrived.get((session, push.shard), {})
        report = reports.pop(push.sealed, None)
        for number in [n for n in reports if n < push.sealed]:
            del reports[number]
            self._order(push.shard, wire.Unneeded(session=session, number=number))
        return report

    # ------------------------------------------------------------------ what is left out

    def _moves(self, bucket: int, before: int) -> None:
        """Another one than `before` averages this bucket now."""
        if before != NOBODY and self.own.leaves_out(bucket):
            self._left_at.setdefault(bucket, set()).add(before)

    def _leave(self, shard: int) -> None:
        """This shard averages no more."""
        for bucket in [b for b, maker in self._makers.items() if maker == shard]:
            self._makers[bucket] = NOBODY
            self._moves(bucket, shard)

    def _left_by(self, shard: int) -> list[int]:
        """The buckets of which this shard has left something out, and is not asked yet."""
        return sorted(b for b, shards in self._left_at.items() if shard in shards)

    def _give_up(self, shard: int, bucket: int) -> None:
        """Ask who has averaged this bucket for what it has left out."""
        self._left_at[bucket].discard(shard)
        if shard == SERVER:
            self._pass_on(bucket, self.own.give_up(bucket))
        else:
            self._asked[shard] = bucket
            self._order(shard, wire.GiveUp(bucket=bucket))

    def left_out(self, shard: int, report: wire.LeftOut, buffers: list[Any]) -> None:
        """A shard tells what it has left out. Raises `PeerError` where it was not asked for that,
        or where that cannot be."""
        if self._asked.get(shard) != report.bucket:
            raise PeerError("it tells what nobody has asked for")
        if buffers:
            self.own.check_left_out(report.bucket, buffers)
        del self._asked[shard]
        if shard not in self._retiring:
            self._pass_on(report.bucket, buffers)
            return
        self._waiting.append((report.bucket, buffers))
        self._give_up_next(shard)

    def _give_up_next(self, shard: int) -> None:
        """Ask a shard that is about to go for the next of what it has left out."""
        for bucket in self._left_by(shard)[:1]:
            self._give_up(shard, bucket)

    def _pass_on(self, bucket: int, buffers: list[Any]) -> None:
        """Give what others have left out to who averages this bucket, for its next average."""
        maker = self._makers[bucket]
        if not buffers:
            return
        if maker == SERVER:
            self.own.take_over(bucket, buffers)
        elif maker == NOBODY:
            self._waiting.append((bucket, buffers))
        else:
            self._order(maker, wire.LeftOut(bucket=bucket), *buffers)

    def _pass_one_on(self) -> None:
        """A round is over: let what was left out of one bucket go to who averages it now. The next
        round's averages come behind it, so that no more of it than that is on its way."""
        for place, (bucket, buffers) in enumerate(self._waiting):
            if self._makers[bucket] != NOBODY:
                del self._waiting[place]
                self._pass_on(bucket, buffers)
                return
        for bucket, shards in self._left_at.items():
            for shard in sorted(shards):
                if shard not in self._asked:
                    self._give_up(shard, bucket)
                    return

    # ------------------------------------------------------------------ the open round

    def start(self, layout: wire.Layout) -> str | None:
        return self.own.start(layout)

    def share(self, session: str, join: wire.Join) -> str | None:
        return self.own.share(session, join)

    def located(self, session: str, push: wire.Push, buffers: list[Any]) -> list[Any]:
        return buffers if push.shard else self.own.located(session, push, buffers)

    def release(self, session: str, push: wire.Push) -> None:
        if not push.shard:
            self.own.release(session, push)
        elif push.shard in self.shards and not self._is_taken(session, push):
            self._report(session, push)
            self._order(push.shard, wire.Unneeded(session=session, number=push.sealed))

    def _is_taken(self, session: str, push: wire.Push) -> bool:
        """Is this the second copy of a push whose payload was taken?"""
        return any(
            (sent.session, sent.number) == (session, push.sealed) for sent in self._sent.values()
        )

    def push(
        self,
        session: str,
        worker: int,
        push: wire.Push,
        buffers: list[Any],
        *,
        late: bool = False,
    ) -> tuple[str | None, float | None]:
        if not push.shard:
            return self.own.push(session, worker, push, buffers, late=late)
        report = self._report(session, push)
        if report is None:
            raise PeerError("the payload of a push is not there")
        bad = report.bad
        if (report.round, report.bucket) != (push.round, push.bucket):
            # Peer or shard lies. Nobody is sent away for what the other one may have said.
            bad = "its numbers are of another round or bucket"
        if bad:
            self._order(push.shard, wire.Unneeded(session=session, number=push.sealed))
            return bad, None
        self._sent[worker, push.bucket] = Sent(push.shard, session, push.sealed, late)
        return None, report.norm

    def drop(self, worker: int, bucket: int) -> None:
        sent = self._sent.pop((worker, bucket), None)
        if sent is None:
            self.own.drop(worker, bucket)
        else:
            self._unneeded(sent)

    def _unneeded(self, sent: Sent) -> None:
        if sent.shard in self.shards:
            self._order(sent.shard, wire.Unneeded(session=sent.session, number=sent.number))

    def add(self, worker: int, bucket: int, weight: float, *, late: bool = False) -> None:
        sent = self._sent.pop((worker, bucket), None)
        if sent is None:
            self.own.add(worker, bucket, weight, late=late)
            return
        self._order(
            sent.shard,
            wire.AddUp(
                session=sent.session,
                number=sent.number,
                worker=worker,
                bucket=bucket,
                weight=weight,
                late=late,
            ),
        )

    def finish(self, finish: Finish) -> None:
        self._makes[finish.bucket] = finish.shard
        if finish.shard == SERVER:
            self.own.finish(finish)
            return
        self._divided[finish.bucket] = finish.shard, finish
        self._order(
            finish.shard,
            wire.Divide(
                round=finish.round,
                step=finish.step,
                bucket=finish.bucket,
                weight=finish.weight,
                absent=finish.absent,
            ),
        )

    def due(self) -> list[Finished]:
        return self.own.due()

    def comparisons(self) -> Mapping[int, Comparison]:
        return self.own.comparisons()

    def close(self, close: wire.Close) -> Update:
        update = self.own.close(close)
        if self._made:
            self._kept[close.step] = Kept(close.round, close.lineage, dict(self._made))
        for shard in sorted(self.shards):
            self._order(shard, wire.Over(step=close.step, round=close.round))
        for bucket, maker in self._makes.items():
            before = self._makers.get(bucket, NOBODY)
            if before != maker:
                self._makers[bucket] = maker
                self._moves(bucket, before)
                self._left_at.get(bucket, set()).discard(maker)
        self._pass_one_on()
        self._over()
        return update

    def _over(self) -> None:
        self._made.clear()
        self._makes.clear()
        self._divided.clear()
        self._due.clear()

    def forget_round(self, averaged: tuple[int, ...]) -> None:
        for sent in self._sent.values():
            if not sent.late:
                self._unneeded(sent)
        self._sent = {key: sent for key, sent in self._sent.items() if sent.late}
        if not averaged:
            for shard in sorted(self.shards):
                self._order(shard, wire.Over(step=0, round=0))
            self._over()
        self.own.forget_round(averaged)

    # ------------------------------------------------------------------ what is kept

    @property
    def own_reach(self) -> int | None:
        """The step after which the server itself keeps its part of all updates."""
        return self.own.reaches_back_to()

    def reaches_back_to(self) -> int | None:
        reach = self.own.reaches_back_to()
        if reach is None:
            return None
        reach = max(reach, self._reach)
        for step in [step for step in self._kept if step <= reach]:
            if step < max(self._kept):  # who holds the newest may lack its close
                del self._kept[step]
        return reach

    def fetch(self, step: int) -> list[Update]:
        """The updates after `step`, but for what other shards keep of them, up to the first one of
        which they do."""
        found: list[Update] = []
        for update in self.own.fetch(step):
            if update.step in self._kept:
                return found or [update]
            found.append(update)
        return found

    def keeps(self, step: int) -> bool:
        """Do other shards keep a part of this update?"""
        return step in self._kept

    def found(self, step: int) -> list[tuple[wire.Average, list[Any]]]:
        """What has come of other shards' averages of this update."""
        kept = self._kept.get(step)
        if kept is None:
            return []
        here = kept.taken_over | kept.found
        return [(_plain(kept.averages[b]), buffers) for b, buffers in sorted(here.items())]

    def recall(self, step: int) -> bool:
        """Ask for the averages of this update that are not here; False where all are, or where
        those that are missing are gone."""
        kept = self._kept.get(step)
        if kept is None or kept.complete or step <= self._reach:
            return False
        if not kept.asked:
            kept.asked = True
            for bucket, average in kept.averages.items():
                if not kept.has(bucket):
                    self._order(average.shard, wire.Recall(round=kept.round, bucket=bucket))
        return True

    def awaited(self, step: int) -> set[int]:
        """The shards that were asked for averages of this update, and have not sent all of them."""
        kept = self._kept.get(step)
        if kept is None or not kept.asked:
            return set()
        return {average.shard for b, average in kept.averages.items() if not kept.has(b)}

    def recall_open(self, bucket: int) -> bool:
        """The same for an average of the open round."""
        average = self._made.get(bucket)
        if average is None or average.shard not in self.shards:
            return False
        self._order(average.shard, wire.Recall(round=average.round, bucket=bucket))
        return True

    def made(self, bucket: int, shard: int) -> wire.Average | None:
        """The header of this average of the open round, if this shard has made it."""
        average = self._made.get(bucket)
        return None if average is None or average.shard != shard else _plain(average)

    def recalled(self, shard: int, report: wire.Recalled, buffers: list[Any]) -> int | None:
        """An average has come that was asked for. Returns the step of which all is here now, or
        that cannot be had any more. Raises `PeerError` where another shard has made it."""
        for step, kept in self._kept.items():
            if kept.round == report.round and report.bucket in kept.averages:
                if kept.averages[report.bucket].shard != shard:
                    raise PeerError("an average that another shard has made")
                retires = kept.averages[report.bucket].shard in self._retiring
                if not (kept.asked or retires):
                    return None
                if not report.kept:
                    self._reach = max(self._reach, step)
                    return step
                (kept.taken_over if retires else kept.found)[report.bucket] = buffers
                return step if kept.complete else None
        return None

    def handed_out(self, step: int) -> None:
        """Nobody waits for this update any more: forget what came of other shards."""
        kept = self._kept.get(step)
        if kept is not None:
            kept.found.clear()
            kept.asked = False

    def forget(self, session: str) -> None:
        self.own.forget(session)
        for key in [key for key in self._arrived if key[0] == session]:
            del self._arrived[key]
        for shard in sorted(self.shards):
            taken = sorted(
                sent.number
                for sent in self._sent.values()
                if (sent.shard, sent.session) == (shard, session)
            )
            self._order(shard, wire.Part(session=session, taken=tuple(taken)))


def _plain(average: wire.Sharded) -> wire.Average:
    """The same as it travels with its buffers."""
    told = msgspec.structs.asdict(average)
    del told["shard"], told["number"]
    return wire.Average(**told)


__all__ = ["Spread"]
