"""The run's end: why it comes, when, and what it waits for.

A run ends when its work is done, when somebody stops it, or when it cannot go on: no worker is
left, nobody here holds the state that others wait for, or nothing happens for long. Before it is
over, the observer has the time to keep the last step.
"""

from __future__ import annotations

from collections.abc import Collection

from paramserver.protocol.messages import End
from paramserver.rounds.departures import Departures
from paramserver.rounds.log import Log
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.rules import Rules
from paramserver.rounds.states import GREETED, REPLICA, WAITING

HOLDER_TIMEOUTS = 4  # that the last one who held the state has to come back to those who wait
COMING_TIMES = 4  # idle timeouts since the last work that comings alone may keep a run alive


class Ending:
    """Owns the reason of the end (`begun`: no more rounds; with it, whether that is an error), the
    `End` itself (`ended`), and what may lead to it: how workers left, and since when nobody here
    holds the state that others wait for (`lost_since`), or nothing has happened (`busy_at`).
    `observer_comes`: the observer's process runs, whether it has greeted or not. `more`: another
    run of this server follows."""

    def __init__(self, rules: Rules, roster: Roster, now: float) -> None:
        self.begun: tuple[str, bool] | None = None
        self.ended: End | None = None
        self.observer_comes = False
        self.departures = Departures(rules.heartbeat_timeout, rules.idle_timeout, rules.num_workers)
        self.lost_since: float | None = None
        self.moved_at = now  # the end was begun, or the observer came closer to keeping it
        self._stopped = False  # somebody stopped it, in order
        self.more = rules.more
        self.busy_at = now  # see `works` and `comes_to_work`
        self._worked_at = now
        self._last_holder = ""  # the last replica that was taken out, and why
        self._rules = rules
        self._roster = roster

    # ------------------------------------------------------------------ what may lead to it

    def works(self, now: float) -> None:
        """Note that a push was taken, or a step was closed."""
        self.busy_at = self._worked_at = now

    def comes_to_work(self, now: float) -> None:
        """Note that a worker is ready. One that says it again and again, and pushes nothing, keeps
        the run alive for a while only."""
        self.busy_at = max(self.busy_at, min(now, self._longest))

    @property
    def _longest(self) -> float:
        """Until when comings alone may keep the run alive."""
        return self._worked_at + (COMING_TIMES - 1) * self._rules.idle_timeout

    def stood_still(self, seconds: float) -> None:
        """Do not count the seconds in which the server heard nobody."""
        self.busy_at += seconds
        self._worked_at += seconds
        self.moved_at += seconds
        self.departures.stood_still(seconds)
        if self.lost_since is not None:
            self.lost_since += seconds

    def taken_out(self, peer: Peer, why: str) -> None:
        """Note that this peer takes no part any more."""
        if peer.state == REPLICA:
            self._last_holder = f"{peer.name} ({why})"

    def nobody_left_until(self, now: float) -> float | None:
        """When the run ends because no worker is left; None where one is, or is awaited."""
        return None if self._roster.has_workers else self.departures.due(now)

    def due(self, log: Log, own: bool, now: float) -> tuple[str, bool] | None:
        """The end of a run for which nobody is left, or left who holds its state: why, and whether
        that is an error. `own`: workers bring samples of their own."""
        self._look_for_holder(log, now)
        left_until = self.nobody_left_until(now)
        if left_until is not None and now >= left_until:
            return self.departures.verdict(own=own)
        if self.lost_since is not None and now >= self._lost_until(self.lost_since):
            return self.lost_state(log.step), True
        return None

    def is_idle(self, now: float, starts_at: float | None) -> bool:
        """Has nothing happened for long, though nobody in particular is waited for? A run that
        `starts_at` a time with those who are here is not idle before."""
        since = self.busy_at
        if starts_at is not None:
            since = max(since, min(starts_at, self._longest))
        return self.lost_since is None and now - since > self._rules.idle_timeout

    def _look_for_holder(self, log: Log, now: float) -> None:
        """Does somebody wait for a state that nobody here holds any more?"""
        workers = [p.state for p in self._roster.peers.values() if p.role == "worker"]
        if self._roster.has_replica or not log.begun or WAITING not in workers:
            self.lost_since = None
        elif self.lost_since is None:
            self.lost_since = now

    def _lost_until(self, since: float) -> float:
        return since + HOLDER_TIMEOUTS * self._rules.heartbeat_timeout

    def lost_state(self, step: int) -> str:
        """The sentence about a state that nobody here holds."""
        last = f"; {self._last_holder} was the last to hold it" if self._last_holder else ""
        return f"nobody here stands at step {step}, which the others wait for{last}"

    def otherwise(self, now: float) -> str:
        """When the run ends, if who is waited for does not come before; empty: nobody is."""
        due, who = self.nobody_left_until(now), "comes"
        if due is None and self.lost_since is not None:
            due, who = self._lost_until(self.lost_since), "comes who does"
        if due is None:
            return ""
        return f" (the run ends in {max(0.0, due - now):.0f} s unless one {who})"

    # ------------------------------------------------------------------ from its beginning

    def begin(self, reason: str, error: bool, now: float, *, stopped: bool) -> None:
        """Begin the end: no more rounds. `stopped`: somebody stopped the run, in order."""
        self.begun, self.moved_at, self._stopped = (reason, error), now, stopped

    def is_last(self) -> None:
        """Note that no other run follows, because the server is to end."""
        self.more = False

    def observer_moves(self, now: float) -> None:
        """Note that the observer came closer to keeping the last step."""
        self.moved_at = now

    def awaits_observer(self, log: Log, empty: Collection[int], now: float) -> bool:
        """Is the observer on its way to the last step, or about to keep it? While it lives it is
        waited for: to write a large model to a slow disk takes minutes. `empty`: ids of workers
        that hold no state, whatever they say."""
        if now - self.moved_at > self._rules.idle_timeout:
            return False
        held = any(
            p.state == REPLICA or (p.state == GREETED and p.join is not None and p.id not in empty)
            for p in self._roster.peers.values()  # one that greeted and had joined does so again
        )
        observer = self._roster.observer
        if observer is None or observer.join is None:
            comes = self.observer_comes or observer is not None
            return comes and log.begun and held
        may_have_it = held or observer.state != WAITING  # else nobody could give it a snapshot
        return may_have_it and observer.kept_at != log.step

    def end(self, nonce: str, run: str, log: Log) -> End:
        """End this run at the log's step."""
        assert self.begun is not None
        reason, error = self.begun
        self.ended = End(
            nonce=nonce,
            step=log.step,
            lineage=log.lineage,
            reason=reason,
            error=error,
            stopped=self._stopped,
            run=run,
            more=self.more,
        )
        return self.ended
