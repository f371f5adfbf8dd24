"""The server's tensors: pushed payloads, running sums, averages, the newest updates.

`Data` decides nothing and sends nothing. `paramserver.server.control` decides what to do with a
payload, and passes the resulting frames on.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from paramserver import trace
from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.rounds.aggregate import MEAN
from paramserver.rounds.disagreement import Comparison
from paramserver.rounds.effects import Finish
from paramserver.server.history import Frames, History, Update
from paramserver.settings import Settings
from paramserver.tensors.bucket import BucketPlan, plan
from paramserver.tensors.codec import codec_of_averages, codec_of_pushes
from paramserver.tensors.reducer import Reducer, Release, fresh_room
from paramserver.tensors.robust_reducer import RobustReducer, Rule
from paramserver.tensors.whole import BUFFER_BYTES
from paramserver.transport import shm


class Payload(msgspec.Struct):
    """The buffers of a push that wait to be added."""

    buffers: list[Any]
    scale: float
    absent: tuple[int, ...]
    release: Release
    late: bool = False
    """It is of an earlier round than the open one, whose end does not drop it."""


class Data:
    """Payloads, sums and averages of the open round, and the history; see the module's docstring.

    `folder` is that of shared memory; None: do not use any.
    """

    def __init__(self, settings: Settings, nonce: str, folder: Path | None) -> None:
        self.plan: BucketPlan | None = None
        self.ring: shm.Ring | None = None
        self.mapped_bytes = 0  # received through shared memory
        self._settings = settings
        self._nonce = nonce
        self._folder = folder
        self._reducer: Reducer | None = None
        self._history = History(int(settings.history_mb * 2**20))
        self._payloads: dict[tuple[int, int], Payload] = {}  # by worker and bucket
        self._averages: list[Frames] = []  # of the open round, as sent
        self._averages_bytes = 0
        self._due: list[tuple[wire.Average, Frames]] = []  # the newest of those
        self._slots: dict[int, list[shm.Slot]] = {}  # of the ring, by bucket: no average yet
        self._places: dict[int, tuple[wire.Place, ...]] = {}  # of the newest average, by bucket
        self._round_stamp: int | None = None  # of the first block of the open round
        self._outboxes: dict[str, shm.Outbox] = {}  # by session
        self._sharing: set[str] = set()  # sessions of the peers that read the ring
        # Sums are limited by the speed of memory, and threads that wait for each other on shared
        # cores cost milliseconds each time.
        torch.set_num_threads(settings.threads or 1)

    def start(self, layout: wire.Layout) -> str | None:
        """Allocate the sums of this layout; returns a sentence for people, if there is one."""
        s = self._settings
        self.plan = plan(layout, s.bucket_size_mb, s.min_bucket_mb)
        problem = None
        try:
            self.ring = self._make_ring(self.plan)
        except OSError as e:
            problem = (
                f"averages go through sockets on this host, which is slower: {shm.SHARED}: "
                f"{e.strerror or e} (in docker: --shm-size=1g)"
            )
        up = codec_of_pushes(s.codec, s.topk_ratio)
        down = codec_of_averages(s.codec_of_averages, s.topk_ratio)
        room = fresh_room if self.ring is None else self._room
        if s.aggregate == MEAN and not s.scale_to_median:
            self._reducer = Reducer(self.plan, up, down, room)
        else:
            rule = Rule(s.aggregate, s.trim, s.clip_tau, s.scale_to_median)
            self._reducer = RobustReducer(self.plan, up, down, rule, room)
        return problem

    # ------------------------------------------------------------------ shared memory

    def share(self, session: str, join: wire.Join) -> str | None:
        """A peer on this host joins: open its outbox, and note whether it reads the ring. Returns
        why its outbox cannot be used, if so; raises `PeerError` where that is the peer's fault."""
        self._outboxes.pop(session, None)
        self._sharing.discard(session)
        if self._folder is None:
            return None
        if join.sharing:
            self._sharing.add(session)
        if join.outbox:
            path = shm.outbox_path(self._folder, session, join.outbox)
            try:
                self._outboxes[session] = shm.Outbox(path)
                path.unlink()  # both have it mapped, so the name is not needed any more
            except FileNotFoundError:
                pass  # the worker has joined again: its next join is on the way
            except ValueError as e:
                raise PeerError(f"your outbox cannot be used: {e}") from None
            except OSError as e:
                return str(e.strerror or e)
        return None

    @property
    def sharing(self) -> int:
        """The number of peers that read averages from the ring."""
        return len(self._sharing) if self.ring is not None else 0

    def _make_ring(self, plan: BucketPlan) -> shm.Ring | None:
        """Make shared memory for the history, where the open round replaces the oldest blocks, and
        for at least two updates; raises OSError where there is no room for it."""
        if self._folder is None:
            return None
        update = plan.nbytes + 2 * shm.ALIGN * (len(plan.buckets) + wire.BUFFERS_MAX)
        kept = max(int(self._settings.history_mb * 2**20), 2 * update)
        whole = (min(b.nbytes, BUFFER_BYTES) for b in plan.buckets if b.kind == "whole")
        open_round = 4 * max([plan.largest_bytes, *whole])
        path = shm.ring_path(self._folder)
        room = shm.room(self._folder) // 2  # the rest is for the workers' outboxes
        size = min(kept + open_round, room)
        least = min(kept, shm.RING_UPDATES * update) + open_round
        path.unlink(missing_ok=True)
        if size < least:
            raise OSError(
                errno.ENOSPC, f"{room >> 20} MiB may be taken, {-(-least >> 20)} are needed"
            )
        return shm.Ring(path, size)

    def _room(self, bucket: int, nbytes: int) -> torch.Tensor:
        assert self.ring is not None
        slot = self.ring.room(nbytes)
        self._slots.setdefault(bucket, []).append(slot)
        if self._round_stamp is None:
            self._round_stamp = slot.place[2]
        return slot.tensor

    # ------------------------------------------------------------------ the open round

    def located(self, session: str, push: wire.Push, buffers: list[Any]) -> list[Any]:
        """The buffers of a push: those that came with it, or those at the places in its peer's
        outbox. Raises `PeerError` for impossible places."""
        if not push.places:
            return buffers
        outbox = self._outboxes.get(session)
        if outbox is None:
            raise PeerError("you have no outbox")
        buffers = outbox.buffers(push.places)
        self.mapped_bytes += sum(place[1] for place in push.places)
        return buffers

    def release(self, session: str, push: wire.Push) -> None:
        """Release the located buffers of a push that is not used."""
        _free(self._outboxes.get(session), push.places)

    def push(
        self,
        session: str,
        worker: int,
        push: wire.Push,
        buffers: list[Any],
        *,
        late: bool = False,
    ) -> tuple[str | None, float | None]:
        """Check the located buffers of a push, and keep them until `add` or `drop`, unless they are
        bad; those that are not `late` no longer than the open round. Returns what `Reducer.check`
        does: why they are bad, and a gradient's norm.

        Raises `PeerError` where they do not fit the layout.
        """
        assert self._reducer is not None
        release = partial(_free, self._outboxes.get(session), push.places)
        bad, norm = self._reducer.check(push.bucket, buffers, push.scale, push.absent)
        if bad is None:
            payload = Payload(buffers, push.scale, push.absent, release, late)
            self._payloads[worker, push.bucket] = payload
        else:
            release()
        return bad, norm

    def drop(self, worker: int, bucket: int) -> None:
        """Drop a payload that is not to be added."""
        self._payloads.pop((worker, bucket)).release()

    def add(self, worker: int, bucket: int, weight: float, *, late: bool = False) -> None:
        """Add a payload to the sum of its bucket, `weight` times; one that is `late` counts only
        where nobody else's does, if the bucket's tensors come whole from one worker."""
        assert self._reducer is not None
        p = self._payloads.pop((worker, bucket))
        self._reducer.add(
            bucket, p.buffers, p.scale, weight, p.release, worker, p.absent, late=late
        )

    def finish(self, finish: Finish) -> None:
        """Make the average of a bucket; it is `due` then."""
        assert self._reducer is not None
        bucket = finish.bucket
        with trace.span("average", bucket=bucket):
            buffers, scale, absent = self._reducer.finish(bucket, finish.weight, finish.absent)
        average = wire.Average(
            nonce=self._nonce,
            round=finish.round,
            step=finish.step,
            bucket=bucket,
            absent=absent,
            scale=scale,
        )
        frames = wire.to_frames(average, *buffers)
        self._places[bucket] = tuple(slot.place for slot in self._slots.pop(bucket, ()))
        self._averages.append(frames)
        self._averages_bytes += sum(map(len, frames))
        self._due.append((average, frames))

    def leaves_out(self, bucket: int) -> bool:
        """Does the codec leave something out of averages of this bucket?"""
        assert self._reducer is not None
        return self._reducer.leaves_out(bucket)

    def give_up(self, bucket: int) -> list[Any]:
        """What was left out here of the averages of a bucket that a shard averages now."""
        assert self._reducer is not None
        return self._reducer.give_up(bucket)

    def check_left_out(self, bucket: int, buffers: list[Any]) -> None:
        """Raise `PeerError` for what no shard can have left out of the averages of a bucket."""
        assert self._reducer is not None
        self._reducer.check_left_out(bucket, buffers)

    def take_over(self, bucket: int, buffers: list[Any]) -> None:
        """A shard has left this out of averages of this bucket: it goes into the next one."""
        assert self._reducer is not None
        self._reducer.take_over(bucket, buffers)

    def due(self) -> list[tuple[wire.Average, Frames]]:
        """The averages that were made since the last call."""
        due, self._due = self._due, []
        return due

    def as_shared(self, average: wire.Average) -> Frames:
        """The message of an average for peers that read the ring: the places of its buffers."""
        places = self._places[average.bucket]
        return wire.to_frames(wire.Shared(places=places, **msgspec.structs.asdict(average)))

    def comparisons(self) -> Mapping[int, Comparison]:
        """What the averages of the open round say about each worker; nothing where they are
        means."""
        return self._reducer.comparisons() if isinstance(self._reducer, RobustReducer) else {}

    def close(self, close: wire.Close) -> Update:
        """The round is over: keep its averages and its close as an update."""
        frames = wire.to_frames(close)
        update = Update(
            step=close.step,
            messages=[*self._averages, frames],
            bytes=self._averages_bytes + len(frames[0]),
            stamp=self._round_stamp or 0,
        )
        self._history.add(update)
        return update

    def forget_round(self, averaged: tuple[int, ...]) -> None:
        """Drop the payloads and sums of the open round, but not what is late; the averages of these
        buckets are in an update."""
        self._averages, self._averages_bytes = [], 0
        self._round_stamp = None
        for p in self._payloads.values():
            if not p.late:
                p.release()
        self._payloads = {key: p for key, p in self._payloads.items() if p.late}
        self._slots.clear()
        if self._reducer is not None:
            self._reducer.close(averaged)

    # ------------------------------------------------------------------ what is kept

    def reaches_back_to(self) -> int | None:
        """The step from which a replica can follow now; None while there is no update."""
        if self.ring is not None:
            self._history.forget_before(self.ring.oldest)
        return self._history.reaches_back_to

    def fetch(self, step: int) -> list[Update]:
        """The updates after `step`, up to the size of one answer."""
        return self._history.after(step)

    def forget(self, session: str) -> None:
        """This peer is gone."""
        self._outboxes.pop(session, None)
        self._sharing.discard(session)


def _free(outbox: shm.Outbox | None, places: tuple[wire.Place, ...]) -> None:
    """Free slots that are not read any more. `outbox` is the one that they lie in: a worker that
    has joined again has another one."""
    if outbox is not None:
        outbox.free_all(places)
