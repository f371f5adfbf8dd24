"""Decides what a replica does about each message of its server, as actions that its client carries
out.

`workers.link.follow` knows where the replica stands in the log. A session adds the rest of a peer's
part in the protocol: joining, greeting again, giving and taking snapshots, going adrift, and
reports. Pure: messages and `now` come in, actions come out as frozen values, which the client
carries out at once and in order. A session has no socket, tensor or clock. It hands payloads, and
the memory of snapshots, through without using them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from paramserver.errors import PeerError, RunLost, UserError
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import check_counts

from . import follow
from .actions import (
    Action,
    Adopt,
    Apply,
    Begin,
    Closed,
    Compare,
    Give,
    Greet,
    Hear,
    Join,
    Joined,
    Missed,
    Probe,
    Say,
    Send,
    SendPiece,
    Silent,
    Take,
    TakePiece,
)
from .follow import Follow, Replica


class Taking(msgspec.Struct):
    """A snapshot that is coming in."""

    manifest: wire.Manifest
    room: Any
    pieces: int
    heard_at: float
    next: int = 0
    wanted: set[int] = msgspec.field(default_factory=set)


class Session:
    """The part that `replica` takes in a run, through all its greetings.

    `drifts`: when the replica has fallen behind the server's history, it goes adrift: it only
    receives closes until `catch_up` is called, and takes no snapshot.

    Raises `UserError` where the server refuses this peer, `RunLost` where it does so in the middle.
    """

    WANTS_IN_FLIGHT = 4
    MISSED_MAX = 5  # snapshots in a row that failed; then this peer gives up
    MISFITS_MAX = 3  # snapshots in a row that do not fit in the same way
    SILENT_TIMEOUTS = 3  # heartbeat timeouts of silence; then the connections are made anew
    LACKS_S = 1.0  # after which a replica asks for averages of a round that is not closed
    LINEAGE_CHARS = 64  # of a state that is not in the log any more
    TAKING_TIMEOUTS = 2  # heartbeat timeouts without a piece; then the snapshot is asked for anew

    def __init__(
        self,
        replica: Replica,
        role: str = "worker",
        *,
        drifts: bool = False,
        make_follow: Callable[..., Follow] = Follow,
    ) -> None:
        self.replica = replica
        self.follow = make_follow("", replica, 0.0)
        self.joined = False
        """The replica is in its place, neither adrift nor waiting for a snapshot."""
        self.adrift = False
        self.admit: wire.Admit | None = None
        """The server's answer to the last join."""
        self.behind = False
        """The run has ended, and no more updates of it can be fetched."""
        self.at_last_step = False
        """The run is ending, and this replica stands at its last step: time to keep it."""
        self.took_part = False
        """It has pushed something."""
        self.held: deque[tuple[Any, Any]] = deque()
        """From SUB, to be looked at (again); see `next`."""
        self._role, self._drifts, self._make_follow = role, drifts, make_follow
        self._timeout_s, self._digest_steps = 0.0, 0
        self._ready: wire.Ready | None = None
        self._evaluates = False
        self._taking: Taking | None = None
        self._over = 0  # the last snapshot that was aborted: drop its other messages
        self._why_missed = ""  # what was wrong with it
        self._misfits: list[str] = []  # why the last snapshots did not fit
        self._giving: tuple[int, Any] | None = None  # its number and its source
        self._give_later: wire.Give | None = None
        self._closing: tuple[wire.Closing, float] | None = None
        """The round that is to be closed, and since when averages of it are missing here."""
        self._stood = -1  # the step of the last `Stand`
        self._kept_step = -1  # the last step that was reported as kept

    @property
    def ended(self) -> wire.End | None:
        """The run's end, once every update before it is applied (or cannot be had any more)."""
        end = self.follow.end
        if end is None:
            return None
        return end if self.replica.step >= end.step or self.behind else None

    @property
    def left_behind(self) -> bool:
        """Has the run ended with a state that this replica does not hold, and cannot get?"""
        end = self.ended
        if end is None:
            return False
        return (self.replica.step, self.replica.lineage) != (end.step, end.lineage)

    @property
    def gives(self) -> bool:
        """Does another replica take a snapshot of this one?"""
        return self._giving is not None

    # ------------------------------------------------------------------ coming

    def greeted(
        self, nonce: str, now: float, *, timeout_s: float, digest_steps: int = 0, run: str = ""
    ) -> list[Action]:
        """A server with this `nonce` has welcomed this peer to its `run`, for the first time or
        again. `timeout_s` is the run's heartbeat timeout."""
        self._timeout_s, self._digest_steps = timeout_s, digest_steps
        self.follow = self._make_follow(nonce, self.replica, now, run)
        return self._join()

    def unknown(self) -> None:
        """The server does not know this peer any more: messages on their way are void."""
        self.held.clear()
        self._giving = self._give_later = self._taking = None
        self._over = 0

    def join_again(self) -> list[Action]:
        """Messages on their way may be lost: join again, so that the server says where to begin."""
        self._taking = self._giving = self._give_later = None
        self.held.clear()
        self.follow.fetching_since = None
        return self._join()

    def _join(self) -> list[Action]:
        self.joined = self.adrift = self.at_last_step = False
        self._stood, self.admit = -1, None
        return [Join()]

    def admitted(self, admit: wire.Admit, now: float) -> list[Action]:
        """Averages are heard (see `Hear`)."""
        f = self.follow
        self.admit, self.adrift = admit, False  # an older answer may have set it adrift meanwhile
        f.fetching_since = None
        f.joins(admit.step)
        if admit.action in ("adopt", "behind"):
            self.joined = False
            self.held.clear()
            if admit.action == "adopt":
                self._give_up_if_in_vain(admit.missed)
                return []  # Manifest and pieces follow
            if f.end is not None:
                return self.stay_behind()
            if self._drifts and not f.ending:
                self.adrift = True
                return []
            return self._join()
        actions = self._joined()
        if admit.action == "follow" and admit.step > f.step:
            actions += self._fetch(now)
        return actions

    def _joined(self) -> list[Action]:
        self.joined = True
        said: list[Action] = [Joined()]
        if self._ready is not None:
            said.append(Send(self._ready))
        if self._evaluates:
            said.append(Send(wire.Evaluating(True)))
        return said

    def stay_behind(self) -> list[Action]:
        """The run has ended, and the updates that this replica lacks cannot be fetched any more."""
        if self.behind:
            return []
        self.behind = True
        end = self.follow.end
        if end is None or not self.left_behind:
            return []
        return [Say(f"the run ended at step {end.step}, this replica at {self.replica.step}")]

    def catch_up(self) -> list[Action]:
        """Take a snapshot after having been adrift."""
        return self._join() if self.adrift else []

    # ------------------------------------------------------------------ what it tells

    def ready(self, ready: wire.Ready) -> list[Action]:
        """Ask for leases, now and after every greeting."""
        self._ready = ready
        return [Send(ready)]

    def unready(self) -> None:
        self._ready = None

    def evaluating(self, on: bool) -> list[Action]:
        """This worker evaluates, or is done with it."""
        self._evaluates = on
        return [Send(wire.Evaluating(on))] if self.joined else []

    def stop(self, reason: str) -> list[Action]:
        """End the run, in order, for all."""
        return [Send(wire.StopRun(reason))] if self.joined else []

    def kept(self) -> list[Action]:
        """This step's files are on disk, or cannot be written: the run may end."""
        self._kept_step = self.replica.step
        return [Send(wire.Stand(step=self._kept_step, kept=True))]

    def _stand(self, pulse: wire.Pulse) -> list[Action]:
        """Report where the observer stands, so that the run does not end before it has kept the
        last step."""
        f = self.follow
        if self._role != "observer" or (pulse.nonce, pulse.step) != (f.nonce, f.step):
            return []
        self.at_last_step = pulse.ending and self.joined
        if self._stood == pulse.step:
            return []
        self._stood = pulse.step
        return [Send(wire.Stand(step=pulse.step, kept=self._kept_step == pulse.step))]

    def without_samples(self, worker: int) -> bool:
        """Is a round open in which this worker, which has taken part before, has no lease?"""
        current = self.follow.open
        if current is None or current.round <= self.follow.over or not self.took_part:
            return False
        return worker not in current.leases

    # ------------------------------------------------------------------ time

    def tick(self, now: float) -> list[Action]:
        """Time has passed: ask again where there was no answer, probe a silent server."""
        actions: list[Action] = []
        effect = self.follow.tick(now, self._timeout_s / 2)
        if isinstance(effect, follow.Silent):
            long = effect.seconds > self.SILENT_TIMEOUTS * self._timeout_s
            actions += Silent(effect.seconds), Greet() if long else Probe()
        elif isinstance(effect, follow.Gap):
            actions += self._fetch(now)
        actions += self._ask(now)
        taking = self._taking
        if taking is not None and now - taking.heard_at > self.TAKING_TIMEOUTS * self._timeout_s:
            self._taking = None
            actions += self._join()
        return actions

    # ------------------------------------------------------------------ what shards have made

    def _asked(self, closing: wire.Closing, now: float) -> list[Action]:
        """Does this replica hold the averages that other shards have made in this round?"""
        lacks = self.follow.closing(closing) if self.joined else None
        if lacks is None:
            return []
        if not lacks:
            self._closing = None
            return [Send(wire.Holds(round=closing.round))]
        if self._closing is None or self._closing[0].round != closing.round:
            self._closing = closing, now
        return []

    def _ask(self, now: float) -> list[Action]:
        """Ask for averages that have not come, while the round is not closed yet."""
        if self._closing is None or now - self._closing[1] < self.LACKS_S:
            return []
        closing, self._closing = self._closing[0], None
        lacks = self.follow.closing(closing) if self.joined else None
        if lacks is None:
            return []
        self._closing = closing, now
        if not lacks:
            return self._asked(closing, now)
        return [Send(wire.Lacks(round=closing.round, buckets=lacks))]

    # ------------------------------------------------------------------ what is published

    @property
    def hears(self) -> bool:
        """May SUB be read? It waits while a fetch or a snapshot is on its way: it continues where
        they end."""
        return (self.joined or self.adrift) and self.follow.fetching_since is None

    @property
    def may_be_next(self) -> int:
        """Any of so many messages at the head of `held` may be looked at first: averages that are
        wanted need no order among them."""
        count = 0
        for message, _ in self.held:
            if not (isinstance(message, wire.Average) and self.wants(message)):
                break
            count += 1
        return max(count, min(1, len(self.held)))

    def goes_first(self, place: int, payload: Any) -> None:
        """The message at this place of `held` is next; its payload has come."""
        message, _ = self.held[place]
        del self.held[place]
        self.held.appendleft((message, payload))

    @property
    def reads_on(self) -> bool:
        """May more be read from SUB while what is `held` is on its way? Not past the end of a
        round."""
        return self.may_be_next == len(self.held)

    def next(self, now: float) -> list[Action]:
        """Look at the next message of `held`; one that shows a gap is looked at again later."""
        message, payload = self.held.popleft()
        actions = self._published(message, payload, now)
        if actions is None:
            self.held.appendleft((message, payload))
            return self._fetch(now)
        return actions

    def _published(self, message: Any, payload: Any, now: float) -> list[Action] | None:
        """A message of the log, from SUB or fetched; None when something is missing before it."""
        f = self.follow
        if self.adrift:
            return self._heard_adrift(message, now)
        actions: list[Action] = []
        effect: follow.Effect = follow.NOTHING
        if isinstance(message, wire.Average):
            effect = f.average(message)
        elif isinstance(message, wire.Close):
            _check_ledger(message)
            effect = f.close(message)
        elif isinstance(message, wire.Open):
            effect = f.opened(message)
        elif isinstance(message, wire.Pulse):
            effect = f.pulse(message, now)
            actions = self._stand(message)
            if message.closing is not None:
                actions += self._asked(message.closing, now)
        elif isinstance(message, wire.Closing):
            return self._asked(message, now)
        elif isinstance(message, wire.End):
            effect = f.ended(message)
        if isinstance(effect, follow.Take):
            return [Take(effect.average, payload, effect.first)]
        if isinstance(effect, follow.Apply):
            return [Apply(effect.close, effect.first)]
        if isinstance(effect, follow.TooLate):
            return self.stay_behind()
        if isinstance(effect, follow.Diverged):
            return [Say(f"{effect.why}: taking a snapshot"), *self.join_again()]
        return None if isinstance(effect, follow.Gap) else actions

    def wants(self, average: wire.Average) -> bool:
        """Are the numbers of this average needed? Not while this replica is adrift."""
        return not self.adrift and self.follow.wants(average)

    def lost(self, average: wire.Average) -> None:
        """The numbers of this average were written over while they were read: as if PUB had dropped
        it. The close of its round will show the gap."""
        self.follow.lost(average.bucket)

    def unfit(self, average: wire.Average, why: str) -> list[Action]:
        """The numbers of this average are none of its bucket. From PUB or a channel: it is lost,
        and will be fetched. What was fetched is what the server keeps, and would come again: then
        this replica leaves the log, and so gets a snapshot."""
        self.lost(average)
        if self.follow.fetching_since is None:
            return []
        # Under its own name the server would let it go on fetching.
        self.replica.lineage = f"apart-{self.replica.lineage}"[: self.LINEAGE_CHARS]
        said = f"update {average.step} cannot be used ({why}): taking a snapshot"
        return [Say(said), *self.join_again()]

    def applied(self, close: wire.Close, now: float) -> list[Action]:
        """The update is in the model, and the replica's step and lineage are the close's."""
        self.follow.applied(close)
        actions: list[Action] = []
        if self._digest_steps and close.step % self._digest_steps == 0:
            actions.append(Compare(close.step))
        actions.append(Closed(close))
        if self._give_later is not None:
            actions += self._give(self._give_later, now)
        return actions

    def _heard_adrift(self, message: Any, now: float) -> list[Action]:
        f, actions = self.follow, list[Action]()
        if isinstance(message, wire.Close) and message.nonce == f.nonce:
            actions.append(Missed(message))
        elif isinstance(message, wire.Pulse):
            f.pulse(message, now)
            if (message.nonce, message.step) == (f.nonce, f.step):
                # It got there before its answer, or the log came back; others may lack its state.
                actions += self.catch_up()
        elif isinstance(message, wire.End) and isinstance(f.ended(message), follow.TooLate):
            return self.stay_behind()
        if f.ending or f.end is not None:
            actions += self.catch_up()
        return actions

    def _fetch(self, now: float) -> list[Action]:
        if not self.joined:  # Admit or a snapshot says where to begin
            return []
        return [Send(self.follow.fetch(now))]

    # ------------------------------------------------------------------ what comes over the link

    def received(self, message: Any, payload: Any, now: float) -> list[Action]:
        """A message for this peer alone."""
        f = self.follow
        f.heard(now)  # not for SUB, which reaches peers that the server does not know, too
        match message:
            case wire.Average() | wire.Close():
                if not self.joined:
                    return []
                if f.fetching_since is not None:
                    f.fetching_since = now  # the answer is on its way: do not ask again yet
                return self._published(message, payload, now) or []
            case wire.Fetched() if self.adrift:
                return self._join()  # what it asked later is still kept: it is not behind after all
            case wire.Fetched():
                if isinstance(f.fetched(message.step, message.open), follow.Gap):
                    return self._fetch(now)
            case wire.Pulse() if self.adrift:
                return self._heard_adrift(message, now)
            case wire.Pulse():
                actions = self._stand(message)
                if message.closing is not None:
                    actions += self._asked(message.closing, now)
                if isinstance(f.pulse(message, now), follow.Gap) and f.fetching_since is None:
                    actions += self._fetch(now)
                return actions
            case wire.Admit():
                return [Hear(message)]
            case wire.Reject():
                kind = RunLost if self.took_part else UserError
                raise kind(message.reason, message.hint)
            case wire.Greet():
                if not message.session_known:
                    return [Greet()]
                if not message.join:
                    return [Probe()]
                return [] if self.adrift else self.join_again()
            case wire.Give():
                return self._give(message, now)
            case wire.Want():
                if self._giving is None or self._giving[0] != message.snapshot:
                    return [Send(wire.Abort(message.snapshot, "it does not give this snapshot"))]
                return [SendPiece(self._giving[1], message.snapshot, message.piece)]
            case wire.Manifest():
                return [Begin(message)]
            case wire.Piece():
                return self._piece(message, payload, now)
            case wire.Abort():
                return self._aborted(message)
            case wire.End():
                f.ended(message)
                if not self.joined:
                    self.behind = True
                elif f.step < message.step and f.fetching_since is None:
                    return self._fetch(now)
            case _:
                pass  # Refused: the round's close says the rest; a late Probe
        return []

    # ------------------------------------------------------------------ snapshots: giving

    def _give(self, message: wire.Give, now: float) -> list[Action]:
        f = self.follow
        self._giving = self._give_later = None
        if f.step == message.step and f.lineage == message.lineage:
            return [Give(message.snapshot)]
        if f.step < message.step:
            # Apply the updates on their way first, then handle this message again.
            self._give_later = message
            return self._fetch(now) if f.fetching_since is None else []
        return [Send(wire.Abort(message.snapshot, f"it stands at step {f.step}"))]

    def given_from(self, snapshot: int, source: Any) -> None:
        """Pieces of this snapshot are read from `source` (see `Give`)."""
        self._giving = snapshot, source

    def cannot_give(self, snapshot: int, why: str) -> list[Action]:
        """Abort the snapshot; the joiner has to do without, this replica goes on."""
        return [
            Say(f"this replica's state cannot be sent: {why}"),
            Send(wire.Abort(snapshot, f"the state cannot be sent: {why}")),
        ]

    # ------------------------------------------------------------------ snapshots: taking

    def takes(self, manifest: wire.Manifest, room: Any, pieces: int, now: float) -> list[Action]:
        """There is room for this snapshot, which comes in `pieces` pieces (see `Begin`)."""
        self._taking = Taking(manifest, room, pieces, now)
        return self._want_more(self._taking)

    def _want_more(self, taking: Taking) -> list[Action]:
        actions: list[Action] = []
        while len(taking.wanted) < self.WANTS_IN_FLIGHT and taking.next < taking.pieces:
            taking.wanted.add(taking.next)
            want = wire.Want(snapshot=taking.manifest.snapshot, piece=taking.next)
            actions.append(Send(want))
            taking.next += 1
        if not taking.wanted:
            self._taking = None
            actions.append(Adopt(taking.room, taking.manifest))
        return actions

    def _piece(self, message: wire.Piece, payload: Any, now: float) -> list[Action]:
        taking = self._taking
        if taking is None or taking.manifest.snapshot != message.snapshot:
            return []
        if message.piece not in taking.wanted:
            taking.heard_at = now
            return []
        piece, digest = message.piece, message.digest
        return [TakePiece(taking.room, message.snapshot, piece, digest, payload)]

    def took(self, piece: int, now: float) -> list[Action]:
        """A piece of the snapshot was stored."""
        taking = self._taking
        if taking is None:
            return []
        taking.wanted.discard(piece)
        taking.heard_at = now
        return self._want_more(taking)

    def refuse(self, snapshot: int, why: str, misfit: str | None = None) -> list[Action]:
        """Refuse a snapshot that does not fit. That is the giver's fault as long as another replica
        may give one that fits, since layout and recipe are the run's. Where `MISFITS_MAX` snapshots
        fail in the same way, it is this replica's."""
        self._over, self._taking = snapshot, None
        self._why_missed = why
        if misfit is not None:
            self.follow.adopted()  # the state is another one, even if only a part was loaded
        self._misfits = [*self._misfits[1 - self.MISFITS_MAX :], misfit] if misfit else []
        return [
            Send(wire.Abort(snapshot, why[: wire.REASON_MAX])),
            Say(f"{why}: asking for it again"),
            *self._join(),
        ]

    def adopted(self, manifest: wire.Manifest) -> list[Action]:
        """The replica is in the state of this snapshot."""
        self._misfits = []
        self.follow.adopted()
        step, lineage = manifest.step, manifest.lineage
        told = wire.Adopted(snapshot=manifest.snapshot, step=step, lineage=lineage)
        return [Send(told), *self._joined()]

    def _aborted(self, message: wire.Abort) -> list[Action]:
        if self._giving is not None and self._giving[0] == message.snapshot:
            self._giving = None
        elif not self.joined and message.snapshot != self._over:
            self._over, self._taking = message.snapshot, None
            self._why_missed = message.reason
            return self._join()
        return []

    def _give_up_if_in_vain(self, missed: int) -> None:
        """Raise `RunLost` after `MISSED_MAX` failed snapshots in a row. The server counts them,
        because it knows which givers have proven anything."""
        alike = len(self._misfits) == self.MISFITS_MAX and len(set(self._misfits)) == 1
        if alike and missed >= self.MISFITS_MAX:
            raise UserError(
                f"the run's state does not fit this worker's model or optimizer: "
                f"{self._misfits[-1]}",
                "start it with the same model, optimizer and settings as the others",
            )
        if missed >= self.MISSED_MAX:
            raise UserError(
                f"the run's state did not arrive, tried {missed} times: {self._why_missed}",
                "the output of the other workers may say more",
            )


def _check_ledger(close: wire.Close) -> None:
    try:
        check_counts(close.ledger)
    except PeerError as e:
        raise UserError(
            f"the server does not speak this protocol: step {close.step}: {e}",
            "is it this program, in the same version?",
        ) from None
