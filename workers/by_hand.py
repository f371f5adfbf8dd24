"""What a worker's loop sets in its optimizer's groups, a learning rate say, as its pushes carry it.

It counts as of `step`. So the last bucket, which carries it, leaves there if the loop has ever
changed something, and in the first step, when that is not known.
"""

from __future__ import annotations

import logging

import msgspec

from paramserver.protocol import messages as wire

from .replica import groups
from .replica.replica import Replica
from .replica.several import Pair


class SetByHand:
    """The values that this loop sets, see `workers.replica.groups`; of several pairs, for one."""

    def __init__(self, replica: Replica | Pair, log: logging.Logger) -> None:
        self._replica, self._log = replica, log
        self._ever: bool | None = None  # the loop changes values of the optimizer's groups
        self._sent: wire.Groups = {}  # those that it has changed for this round
        self._told = False  # that others' values count

    def begin(self) -> None:
        """A batch begins."""
        self._sent = {}

    def holds_last_bucket(self) -> bool:
        """Must the last bucket wait for `step`?"""
        return self._ever is not False or bool(self._replica.by_hand.changed())

    def changed(self) -> wire.Groups | msgspec.UnsetType:
        """What the loop has changed since the last update, for the last bucket."""
        if self._replica.local:
            return msgspec.UNSET  # of this worker's own steps
        self._sent = self._replica.by_hand.changed()
        return self._sent or msgspec.UNSET

    def missed(self, *, left: bool) -> wire.Groups:
        """What the loop has changed after its last bucket had left, if that was before `step`."""
        now = self._replica.by_hand.changed() if left else self._sent
        self._ever = bool(self._ever or now)
        if now == self._sent:
            return {}
        self._log.info(
            f"{groups.shown(now)} was set between backward and step(), when the gradient had left: "
            "it counts from the next step on, and later gradients wait for step()"
        )
        return now

    def say(self, close: wire.Close) -> None:
        """Report, once, that what this loop has set is not what counts."""
        counts = {} if close.groups is msgspec.UNSET else close.groups
        if self._told or not self._sent or self._sent == counts:
            return
        self._told = True
        whole = [id for id in close.contributors if id not in close.partly]
        others = shown if (shown := groups.shown(counts)) != "nothing" else "none of it"
        self._log.warning(
            f"this loop set {groups.shown(self._sent)}, worker {min(whole)} set {others}, which "
            "counts for all: compute it from cluster.step, which is the same in every worker, not "
            "from a counter of the loop's own (a schedule of torch: give it to attach())"
        )
