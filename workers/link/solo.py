"""A cluster of one: stands in for `workers.link.client` where there is no server.

Gradients take the same path through the code, and the log is the same, so a loop for a cluster runs
alone unchanged. It sends nothing, and writes no file.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import msgspec
import torch

from paramserver.config.schema import build, check_names
from paramserver.errors import UserError
from paramserver.net import address
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import DONE, PARTLY, RETURNED, SKIPPED, UNREAD, Ledger, OwnLedger
from paramserver.settings import RunSettings, Settings
from paramserver.tensors.codec import CODECS, fresh
from paramserver.tensors.reducer import Reducer

from ..replica.replica import Replica
from . import follow

ID = 1
# Nothing travels, and the only worker's own steps are the run's.
AS_IT_IS = {
    "codec": "float32",
    "codec_down": None,
    "local_steps": 1,
    "num_workers": 1,
    "outer": None,
    "overlap": False,
}


class Solo:
    """The interface of `Client`, as far as `Cluster` uses it, for the only worker of a run.

    `settings` are some of those that a server would have (`num_epochs`, `batch_size`, `seed`);
    raises `UserError` for an unknown one. `log` gets sentences for a person.
    """

    host, port = address.LOOPBACK, 0
    compares = False  # there is no other data set

    waited_s = 0.0
    """This worker waits for nobody."""

    def __init__(self, settings: Mapping[str, Any], log: logging.Logger) -> None:
        check_names(settings, lambda name: "alone=")
        known = asdict(Settings())
        run = build({**known, **settings, **AS_IT_IS}, lambda name: "alone=")
        self.settings = RunSettings.of(run.with_bucket(linked=False))
        self.welcome = wire.Welcome(
            protocol=wire.PROTOCOL,
            run="",
            nonce=uuid.uuid4().hex,
            session="",
            id=ID,
            settings={},  # there is no other peer
            pub_port=0,
        )
        self.log = log
        self.device = "cpu"
        self.first = True
        self.greetings = 1
        self.on_close: Callable[[wire.Close], None] | None = None
        self.follow: follow.Follow | None = None
        self._ledger: Ledger | None = None
        self._wanted = wire.Ready(samples=0, batch_size=0)
        self._unread: tuple[int, ...] = ()
        self._unreadable = False
        self._leases: list[wire.Lease] = []
        self._begun: wire.Lease | None = None  # the first of them, with which steps were made
        self._began = 0  # where pairs take turns: in which round
        self._round = 0
        self._opened_at = 0.0
        self._got: set[int] = set()
        self._without: set[int] = set()
        self._bad: str | None = None
        self._loss: float | None = None
        self._samples = 0
        self._groups: wire.Groups | msgspec.UnsetType = msgspec.UNSET
        self._pair = ""
        self._left: wire.Goodbye | None = None  # how its only worker left, if it has
        self._stopped: str | None = None  # why the script stopped the run

    # ------------------------------------------------------------------ what a loop asks for

    def join(self, replica: Replica) -> str:
        self.replica = replica
        self.follow = follow.Follow(self.welcome.nonce, replica, 0.0)
        self._reducer = Reducer(replica.plan, CODECS["float32"], CODECS["float32"])
        return "origin"

    def ready(self, ready: wire.Ready) -> None:
        """Begin, or go on, with rounds of `batch_size` samples, or of `own` ones."""
        assert self.follow is not None
        if self._ledger is None:
            epochs = self.settings.num_epochs
            self._ledger = OwnLedger() if ready.own else Ledger(ready.samples, epochs)
            self._ledger.barrier = self.settings.epoch_barrier
        if self._ledger.samples != ready.samples:
            raise UserError(
                f"a data set of {ready.samples} samples, the run has one of {self._ledger.samples}",
                "every call of batches() needs the same training set",
            )
        self._wanted = ready
        opened = self._open()
        if opened is not None:
            self.follow.opened(opened)

    def unready(self, unfinished: bool = False) -> None:
        """The loop was left: the open round is void, and its samples come first the next time."""
        assert self._ledger is not None
        if self._begun is not None:
            self._end_lease(PARTLY)
        for lease in self._leases:
            self._ledger.settle(lease, RETURNED)
        self._leases.clear()
        self.replica.forget_averages()

    def evaluating(self, on: bool) -> None:
        """Nobody waits."""

    def stop(self, reason: str) -> None:
        """The run ends with the step that is being computed."""
        self._stopped = reason

    @property
    def ended(self) -> wire.End | None:
        if self._ledger is None:
            return None
        if self._stopped is not None:
            reason, error = f"stopped: {self._stopped}", False
        elif self._ledger.finished:
            reason, error = "all epochs are done", False
        elif self._left is None:
            return None
        elif not isinstance(self._ledger, OwnLedger) and self._left.is_done:
            reason, error = "finished, before all samples were done", self._left.error
        elif not isinstance(self._ledger, OwnLedger):
            reason, error = f"left before all samples were done: {self._left.reason}", True
        elif self._left.is_done and not self._left.error:
            reason, error = "every worker has finished", False
        else:
            reason, error = f"the only worker left: {self._left.reason}", self._left.error
        step, lineage = self.replica.step, self.replica.lineage
        stopped = self._stopped is not None
        return wire.End(self.welcome.nonce, step, lineage, reason, error, stopped)

    @property
    def left_behind(self) -> bool:
        return False

    def wait(self, done: Callable[[], Any], what: str, timeout_s: float | None = None) -> bool:
        """Close rounds until `done()`; there is no other worker to wait for."""
        while not done():
            told = len(self._got) + len(self._without)
            whole = told == len(self.replica.plan.buckets)
            assert whole or self._unreadable, f"nothing comes: {what}"
            self._close()
        return True

    # ------------------------------------------------------------------ the exchange

    def room(self, bucket: int, nbytes: int) -> torch.Tensor:
        return fresh(nbytes)

    def await_room(self) -> None:
        pass

    def settled(self) -> None:
        pass

    def hurry(self) -> None:
        pass

    def poll(self) -> None:
        pass

    def look(self) -> None:
        pass

    def push(self, push: wire.Push, buffers: list[Any]) -> None:
        """One bucket is its own average; numbers that are not finite are refused as by a server."""
        bad, _ = self._reducer.check(push.bucket, buffers, push.scale, push.absent)
        self._bad = self._bad or bad
        self._loss, self._samples, self._unread = push.loss, push.samples, push.unread
        self._groups, self._pair = push.groups, push.pair
        average = wire.Average(
            nonce=self.welcome.nonce,
            round=push.round,
            step=self.replica.step + 1,
            bucket=push.bucket,
            absent=push.absent,
            scale=push.scale,
        )
        assert self.follow is not None
        taken = self.follow.average(average)
        if isinstance(taken, follow.Take):
            self.replica.take(average, buffers)
        self._got.add(push.bucket)
        self._without.update(push.without)

    def unreadable(self, round: int) -> None:
        """Skip the whole lease."""
        _, start, stop = self._leases[0]
        self._unreadable, self._unread = True, tuple(range(stop - start))
        self._bad = "no sample of its lease can be read"

    def next_lease(self, round: int) -> None:
        """Of several pairs: all steps with the lease are made."""
        assert self.follow is not None
        self._end_lease(DONE)
        following = self._open()
        if following is not None:
            self.follow.opened(following)

    def _end_lease(self, how: str) -> None:
        assert self._ledger is not None and self._begun is not None
        self._ledger.finish(self._begun, how)
        self._begun = None
        del self._leases[0]

    def goodbye(self, goodbye: wire.Goodbye) -> None:
        if self._left is None:
            self._left = goodbye

    def close(self) -> None:
        pass

    # ------------------------------------------------------------------ the log

    def _open(self) -> wire.Open | None:
        """The next round, if there are samples left for one."""
        assert self._ledger is not None
        # This round's, and the one that is loaded meanwhile; none where a lease goes on.
        while self._begun is None and len(self._leases) < 2:
            wanted = self._wanted
            lease = self._ledger.lease(wanted.batch_size, wanted.least, wanted.drop_last)
            if lease is None:
                break
            self._leases.append(lease)
        if not self._leases:
            return None
        self._round += 1
        if self._begun is None and self.replica.layout.pairs:
            self._began = self._round
        self._opened_at = time.monotonic()
        self._got.clear()
        self._without.clear()
        self._bad, self._unread, self._unreadable = None, (), False
        return wire.Open(
            nonce=self.welcome.nonce,
            round=self._round,
            step=self.replica.step,
            lineage=self.replica.lineage,
            leases={ID: tuple(self._leases)},
            began=self._began,
        )

    def _close(self) -> None:
        """The gradient is complete: it is the next update of the log."""
        assert self._ledger is not None and self.follow is not None
        self._settle(self._ledger)
        for lost in self._ledger.take_news():
            if lost.why != UNREAD:  # those were reported one by one
                self.log.info(
                    f"skipped: samples {lost.lease[1]} to {lost.lease[2] - 1} of its order"
                )
        if self._bad is not None:
            self.log.info(f"round {self._round}: refused: {self._bad}")
            self.replica.forget_averages()
        close = wire.Close(
            nonce=self.welcome.nonce,
            round=self._round,
            step=self.replica.step + 1,
            lineage=self.replica.lineage,  # no other replica compares it
            buckets=tuple(sorted(self._got)) if self._bad is None else (),
            contributors={ID: self._samples} if self._bad is None else {},
            late={} if self._bad is None else {ID: self._bad},
            loss=self._loss,
            seconds=time.monotonic() - self._opened_at,
            ledger=self._ledger.state(),
            groups=self._groups,
            pair=self._pair or msgspec.UNSET,
        )
        self.replica.apply(close)
        self.follow.applied(close)
        if self.on_close is not None:
            self.on_close(close)
        following = self._open()
        if following is not None:
            self.follow.opened(following)

    def _settle(self, ledger: Ledger) -> None:
        """The round closes. Of several pairs the lease goes on, unless its numbers were bad."""
        if self._begun is not None:
            if self._bad is not None:
                self._end_lease(PARTLY)
            return
        lease = self._leases[0]
        if lease == wire.OWN:
            lease = (0, 0, self._samples)
        if self._began and self._bad is None:
            ledger.begin(lease, self._unread)
            self._begun = lease
            return
        del self._leases[0]
        ledger.settle(lease, DONE if self._bad is None else SKIPPED, self._unread)
