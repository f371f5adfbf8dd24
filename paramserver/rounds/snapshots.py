"""Snapshots: who gives the run's state, who takes it, and what comes of it.

A replica gives its state to a peer that waits for it, through the server, between two rounds. One
snapshot runs at a time. `Snapshots` chooses both sides, follows what goes through, ends a snapshot
that comes to nothing (`Off`), and remembers who gave nothing and who made nothing of what it got.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import msgspec

from paramserver.protocol.messages import (
    Abort,
    Adopted,
    Give,
    Manifest,
    Piece,
    Reject,
    Want,
)
from paramserver.rounds import states
from paramserver.rounds.effects import PassOn
from paramserver.rounds.events import Part
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.states import REPLICA, WAITING
from paramserver.rounds.waste import Waste

FAILED_GIVES = 3  # of one that has proven nothing: then it is taken for one that holds no state
SideMessage = Part | Abort | Adopted
"""What the two sides of a snapshot send."""
EMPTY = f"gave its state to nobody in {FAILED_GIVES} attempts"
SNAPSHOT_TIMEOUTS = 3  # heartbeat timeouts that a snapshot may take, beside the time for its bytes
SNAPSHOT_BYTES_PER_S = 2**20  # a link that is slower cannot train either
PIECES_MAX = 2**20
WANTS_MAX = 16  # pieces that are on their way at a time
DTYPE_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
    **dict.fromkeys(
        ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1
    ),
}
"""What a snapshot may hold; see `workers.replica.state`."""


class Snapshot:
    """A snapshot on its way from one replica to another: a manifest once, then each piece once.

    Only what brings it nearer to its end is passed on, and counts as progress.
    """

    def __init__(self, number: int, giver: str, joiner: str, now: float) -> None:
        self.number = number
        self.giver = giver
        self.joiner = joiner
        self.began_at = self.progress_at = now
        self.waits_for = giver
        self.pieces: int | None = None  # that the manifest tells of
        self.piece_bytes = 0
        self._wanted: set[int] = set()
        self.delivered: set[int] = set()

    @property
    def complete(self) -> bool:
        return self.pieces is not None and len(self.delivered) == self.pieces

    @property
    def unanswered(self) -> bool:
        """Has nothing come of its giver yet? A worker answers where its loop looks at messages: not
        before its first batch, and not while it evaluates."""
        return self.pieces is None

    def limit_s(self, timeout_s: float) -> float:
        """Seconds that it may have taken by now, for what it has brought."""
        brought = len(self.delivered) * self.piece_bytes
        return SNAPSHOT_TIMEOUTS * timeout_s + brought / SNAPSHOT_BYTES_PER_S

    def tells(self, manifest: Manifest) -> str | None:
        """Take the manifest. Returns what cannot be right about it; None where nothing is wrong."""
        pieces, step = 0, manifest.piece_bytes
        if step < 1:
            return f"pieces of {step} bytes"
        for dtype, shape in manifest.tensors:
            width = DTYPE_BYTES.get(dtype)
            if width is None or any(d < 0 for d in shape):
                return f"a tensor of {dtype[:20]!r} and shape {shape[:8]}"
            pieces += -(-width * math.prod(shape) // step)
            if pieces > PIECES_MAX:
                return f"more than {PIECES_MAX} pieces"
        self.pieces, self.piece_bytes = pieces, step
        return None

    def advance(self, message: Manifest | Want | Piece, now: float) -> bool:
        """Note a message. Does it bring the snapshot nearer to its end? Only then it is passed
        on."""
        if isinstance(message, Manifest):
            self.waits_for = self.joiner
        elif isinstance(message, Want):
            piece, under_way = message.piece, len(self._wanted) - len(self.delivered)
            known = self.pieces is not None and 0 <= piece < self.pieces
            if not known or piece in self._wanted or under_way >= WANTS_MAX:
                return False
            self._wanted.add(piece)
            self.waits_for = self.giver
        else:
            if message.piece not in self._wanted or message.piece in self.delivered:
                return False
            self.delivered.add(message.piece)
            if len(self._wanted) == len(self.delivered):
                self.waits_for = self.joiner
        self.progress_at = now
        return True


class Off(msgspec.Struct, frozen=True):
    """The running snapshot must end: why, and the sessions that may have failed, which are those of
    its giver, its joiner or both. `but` knows it already: it would join again once more.
    `elsewhere`: the giver is here, and has not looked at its messages."""

    why: str
    blamed: frozenset[str]
    but: Peer | None = None
    elsewhere: bool = False


class Taken(msgspec.Struct, frozen=True):
    """The joiner holds the state."""


class Snapshots:
    """Owns the snapshot that runs (`running`), the number of those that began, and what they say
    about peers: `disbelieved` are the ids of workers that are taken for some that hold no state,
    `waste` says how long rounds go on before the next one. `timeout_s`: the heartbeat timeout,
    `patience_s`: as long as a joiner waits for givers whose loops are elsewhere."""

    def __init__(
        self, roster: Roster, out: Outcome, timeout_s: float, patience_s: float, now: float
    ) -> None:
        self.running: Snapshot | None = None
        self.number = 0
        self.disbelieved: set[int] = set()
        self.waste = Waste(timeout_s, now)
        self._round_goes_first = False  # after a snapshot
        self._roster = roster
        self._out = out
        self._timeout_s = timeout_s
        self._patience_s = patience_s

    # ------------------------------------------------------------------ its beginning

    def may_take(self, now: float, *, in_vain: bool) -> Collection[str]:
        """The roles that need not wait for a snapshot while rounds can go on: nobody right after
        another one, and no workers as long as those before made nothing of theirs. Where the last
        round was `in_vain` a joiner may be who is needed: it waits no longer than after one that
        was wasted."""
        if self._round_goes_first and not in_vain:
            return ()
        next_at = self.waste.next_in_vain_at if in_vain else self.waste.next_at
        return ("observer", "worker") if now >= next_at else ("observer",)

    def begin(self, roles: Collection[str], step: int, lineage: str, now: float) -> bool:
        """Begin a snapshot of this step, for the first peer of these roles that waits for one;
        those that made nothing of earlier ones come last. Did one begin?"""
        joiner = min(
            (p for p in self._roster.in_state(WAITING) if p.join and p.role in roles),
            key=lambda p: self.waste.by.get(p.id, 0),
            default=None,
        )
        if joiner is None:
            return False
        givers = self._roster.in_state(REPLICA)
        if not givers:
            return False
        # The giver that has failed this joiner least comes first: a joiner gives up after a few
        # snapshots, and what others say of a giver may be a lie. One that has shown nothing counts
        # as if it had failed once, and comes after those of which as much is known. So does one
        # that is not in its loop, and would answer late. The observer's id is 0.
        giver = min(
            givers,
            key=lambda p: (
                joiner.failed_by.get(p.id, 0) + (not p.has_shown),
                not p.has_shown,
                p.is_elsewhere,
                p.failed_gives,
                p.id,
            ),
        )
        self.number += 1
        self.running = Snapshot(self.number, giver.session, joiner.session, now)
        joiner.turn(states.CHOSEN)
        self._out.send(giver, Give(snapshot=self.number, step=step, lineage=lineage))
        return True

    def round_opened(self) -> None:
        """Note that a round opened: the next snapshot may begin after it."""
        self._round_goes_first = False

    # ------------------------------------------------------------------ its way

    def told(
        self, peer: Peer, message: SideMessage, step: int, lineage: str, now: float
    ) -> Off | Taken | None:
        """Take a message of one side of the snapshot, which is of this step. Returns the snapshot's
        end, if it ends with this message."""
        snap = self.running
        if snap is None or snap.number != message.snapshot:
            if not isinstance(message, Adopted):
                self._out.send(peer, Abort(message.snapshot, "this snapshot is over"))
            return None
        if isinstance(message, Adopted):
            return self._adopted(peer, snap, now)
        if not isinstance(message, Abort):
            return self._pass_on(peer, snap, message, (step, lineage), now)
        if peer.session not in (snap.giver, snap.joiner):
            return None
        # A joiner that refuses it may be right or wrong: another replica gives the next one.
        return Off(message.reason, frozenset({snap.giver, peer.session}), but=peer)

    def _pass_on(
        self, peer: Peer, snap: Snapshot, message: Part, state: tuple[int, str], now: float
    ) -> Off | None:
        """Pass a part of the snapshot on to the other side."""
        source, goal = snap.giver, snap.joiner
        if isinstance(message, Want):
            source, goal = goal, source
        if peer.session != source:
            self._out.send(peer, Reject("not your part of this snapshot"))
            return None
        if isinstance(message, Manifest):
            if snap.pieces is not None:
                return None
            wrong = snap.tells(message)
            if (message.step, message.lineage) != state:
                wrong = f"another state than that of step {state[0]}"
            if wrong is not None:
                why = f"{peer.name} gives what cannot be: {wrong}"
                return Off(why, frozenset({snap.giver}))
        if snap.advance(message, now):
            self._out.effects.append(PassOn(goal, message))
        return None

    def _adopted(self, peer: Peer, snap: Snapshot, now: float) -> Off | Taken:
        """Believe that the joiner holds the snapshot, if all of it went through this server."""
        if not snap.complete:
            had = f"{len(snap.delivered)} of {snap.pieces or 'unknown'} pieces"
            why = f"{peer.name} says that it holds it, after {had}"
            return Off(why, frozenset({peer.session}))
        peer.wrong, peer.owes, peer.adopted_at = False, peer.role == "worker", now
        self.disbelieved.discard(peer.id)
        peer.given_by = snap.giver
        peer.failed_by.clear()
        peer.missed, peer.waits_since = 0, None
        self._roster.peers[snap.giver].failed_gives = 0
        self.running = None
        self._round_goes_first = True
        return Taken()

    # ------------------------------------------------------------------ its end

    def overdue(self, now: float, *, awaited: bool) -> Off | None:
        """The end of a snapshot that takes too long. `awaited`: enough workers for a round wait."""
        snap, timeout_s = self.running, self._timeout_s
        if snap is None:
            return None
        if now - snap.progress_at > timeout_s:
            culprit = self._roster.peers[snap.waits_for]
            if snap.unanswered and culprit.role == "worker":
                why = (
                    f"{culprit.name} is here, but has not given its state for {timeout_s:g} s: its "
                    "loop does something else, and answers with its next batch"
                )
                return Off(why, frozenset({snap.waits_for}), elsewhere=True)
            why = f"{culprit.name} was silent for {timeout_s:g} s"
            return Off(why, frozenset({snap.waits_for}))
        if now - snap.began_at > snap.limit_s(timeout_s) and awaited:
            why = f"it is not over after {now - snap.began_at:.0f} s"
            return Off(why, frozenset({snap.giver, snap.joiner}))  # who is slow is not seen
        return None

    def sentence(self) -> str:
        """Who takes the running snapshot, and whose answer is awaited where that takes long."""
        snap, peers = self.running, self._roster.peers
        assert snap is not None
        joiner, giver = peers[snap.joiner], peers[snap.giver]
        if snap.unanswered and (giver.is_elsewhere or giver.id in joiner.failed_by):
            return (
                f"{joiner.name} waits for the state of {giver.name}, whose loop does something "
                "else: it answers with its next batch"
            )
        return f"{joiner.name} takes a snapshot"

    def without(self, peer: Peer, why: str) -> Off | None:
        """The end of the snapshot, if this peer, which is taken out, is one of its sides."""
        snap = self.running
        if snap is None or peer.session not in (snap.giver, snap.joiner):
            return None
        return Off(f"{peer.name} {why}", frozenset({peer.session}), but=peer)

    def call_off(self, off: Off, now: float, *, begun: bool) -> Peer | None:
        """End the snapshot, and send Abort to both sides. Returns the giver if it is taken for one
        that holds no state from now on. Where the log has `begun`, and no other replica is here,
        one that is elsewhere is asked again, and this does not count: it may compute, or be cut
        off, and without it the state is lost.

        A joiner gives up after a number of snapshots that it missed. Those of a giver that has
        shown nothing do not count, since it is asked a few times only: otherwise a worker that only
        says that it holds the state, at a moment when nobody else does, would end honest joiners.
        Those that the joiner itself ends do not count either: it joins anew. Nor do those whose
        giver is elsewhere, until the joiner has waited as long as anybody waits.
        """
        snap = self.running
        assert snap is not None
        self.running = None
        self._round_goes_first = True
        joiner, giver = self._roster.peers[snap.joiner], self._roster.peers[snap.giver]
        if not off.elsewhere or giver.id not in joiner.failed_by:  # else its phase says it
            self._out.warn(f"snapshot {snap.number} was given up: {off.why}", joiner)
        left = off.but is joiner and giver.session not in off.blamed
        if giver.has_shown and not left and not (off.elsewhere and self._waits_on(joiner, now)):
            joiner.missed += 1
        last = begun and off.elsewhere and self._roster.in_state(REPLICA) == [giver]
        if last:
            joiner.failed_by.setdefault(giver.id, 0)
        empty = not last and giver.session in off.blamed and self._gave_nothing(giver, joiner)
        if empty:
            self._out.warn(f"{giver.name} {EMPTY}: it is not asked again", giver)
            self.disbelieved.add(giver.id)
        if joiner.session in off.blamed:
            self._wasted(joiner, now)
        for peer in (giver, joiner):
            if peer is not off.but:
                self._out.send(peer, Abort(snapshot=snap.number, reason=off.why))
        joiner.turn(states.ABORTED)  # it joins again when it has understood
        return giver if empty and giver.state == REPLICA else None

    def _waits_on(self, joiner: Peer, now: float) -> bool:
        """Does this joiner go on waiting for a giver whose loop is elsewhere?"""
        if joiner.waits_since is None:
            joiner.waits_since = now - self._timeout_s
        return now - joiner.waits_since < self._patience_s

    def _gave_nothing(self, giver: Peer, joiner: Peer) -> bool:
        """Count a snapshot that came to nothing. May its giver be one that holds no state? The name
        of a state is no secret: a worker that knows it, but has neither contributed nor given the
        state to anybody, may hold nothing while others wait."""
        giver.failed_gives += 1
        failed = joiner.failed_by[giver.id] = joiner.failed_by.get(giver.id, 0) + 1
        return not giver.has_shown and max(giver.failed_gives, failed) >= FAILED_GIVES

    # ------------------------------------------------------------------ what comes of it

    def gave_wrong(self, joiner: Peer) -> None:
        """Note that the weights of this joiner are not the run's. Its giver is asked less often."""
        joiner.wrong = True
        giver = self._roster.peers.get(joiner.given_by)
        if giver is not None:
            giver.failed_gives += 1

    def contributes(self, peer: Peer) -> None:
        """Note that a whole gradient of this worker is in the log."""
        peer.proven = True
        if peer.owes:
            peer.owes = False
            self.waste.useful(peer.id)

    def taken_out(self, peer: Peer, now: float) -> None:
        """Note that nothing is expected of this peer any more. A snapshot that it took is wasted,
        if it has contributed nothing since."""
        if peer.owes:
            peer.owes = False
            self._wasted(peer, now)

    def _wasted(self, joiner: Peer, now: float) -> None:
        """Count a snapshot whose joiner contributed nothing."""
        if joiner.role == "observer":
            return
        wait_s = self.waste.wasted(joiner.id, now)
        if wait_s is not None:
            self._out.warn(
                f"{self.waste.in_a_row} snapshots in a row went to workers that did not train: "
                f"the next one waits for {wait_s:.0f} s, while rounds go on",
                joiner,
            )
