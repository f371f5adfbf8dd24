"""What a run is doing, or waiting for: the phase for programs, and the sentence for people."""

from __future__ import annotations

from paramserver.protocol.messages import Phase
from paramserver.rounds import states
from paramserver.rounds.ending import Ending
from paramserver.rounds.evaluations import Evaluations
from paramserver.rounds.leases import Leases
from paramserver.rounds.origin import Origin
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Roster
from paramserver.rounds.rules import Rules
from paramserver.rounds.snapshots import Snapshots
from paramserver.rounds.states import REPLICA, WAITING


class Phases:
    """Reads the parts of `Rounds`, and owns the sentence that was logged last. `state` is the run's
    (`states.RUN`), `started`: its first round has opened, `step` that of the log."""

    def __init__(
        self,
        rules: Rules,
        roster: Roster,
        leases: Leases,
        snapshots: Snapshots,
        ending: Ending,
        evaluations: Evaluations,
        origin: Origin,
    ) -> None:
        self._rules = rules
        self._roster = roster
        self._leases = leases
        self._snapshots = snapshots
        self._ending = ending
        self._evaluations = evaluations
        self._origin = origin
        self._said = ""

    def now(self, state: str, started: bool, step: int, now: float) -> tuple[Phase, str]:
        """The phase, and its sentence with what happens, and when, if what is waited for does not
        come before."""
        phase, sentence = self._now(state, started, step, now)
        return phase, sentence + self._otherwise(state, started, now)

    def say_pause(self, out: Outcome, state: str, started: bool, step: int, now: float) -> None:
        """A pause is logged when it begins, not every time somebody looks."""
        paused = started and state in (states.BETWEEN, states.ENDING)
        text = ""  # without seconds, which change all the time
        if paused and self._snapshots.running is None:
            text = self._now(state, started, step, now)[1]
        if text and text != self._said:
            out.say(text + self._otherwise(state, started, now))
        self._said = text

    def _now(self, state: str, started: bool, step: int, now: float) -> tuple[Phase, str]:
        """The same without what changes by the second."""
        ending, peers = self._ending, self._roster.peers
        if ending.ended is not None:
            return Phase.ENDED, f"ended: {ending.ended.reason}"
        if ending.begun is not None:
            if self._roster.observer is not None or ending.observer_comes:
                return Phase.ENDING, "waiting for the observer to keep the last step"
            return Phase.ENDING, f"ending: {ending.begun[0]}"
        if state == states.RETURNING:
            here = ", ".join(p.name for p in peers.values() if p.returns) or "nobody"
            sentence = f"waiting for the replicas of this run to come back: {here} here"
            return Phase.RETURNING, sentence
        if state == states.STARTING:
            return Phase.STARTING, self._first_state()
        if self._snapshots.running is not None:
            return Phase.SNAPSHOT, self._snapshots.sentence()
        if self._evaluations.active:
            return Phase.PAUSED, self._evaluations.sentence()
        if state == states.OPEN:
            return Phase.TRAINING, "training"
        return self._pause(started, step, now)

    def _first_state(self) -> str:
        """Whose model and first weights are the run's, and what keeps them."""
        if not self._rules.observer:
            text, missing = self._first_worker(), self._ending.departures.missing()
            return f"{text}; {missing}" if missing else text
        if self._roster.observer is None:
            return "waiting for the observer, which loads PyTorch and makes the model"
        return "waiting for the observer, whose model and first weights are the run's"

    def _first_worker(self) -> str:
        waiting = sorted(self._roster.in_state(WAITING), key=lambda p: p.id)
        if not waiting:
            here = any(p.role == "worker" for p in self._roster.peers.values())
            return "waiting for the first worker" + (", which brings the model" if here else "")
        names = ", ".join(p.name for p in waiting)
        return (
            f"waiting for {self._rules.num_workers} workers, the lowest of which gives the first "
            f"weights: {names} joined"
        )

    def _pause(self, started: bool, step: int, now: float) -> tuple[Phase, str]:
        """No round is open, and no snapshot under way."""
        if self._ending.nobody_left_until(now) is not None:
            return Phase.PAUSED, self._ending.departures.verdict(own=self._leases.own)[0]
        if self._ending.lost_since is not None:
            return Phase.PAUSED, self._ending.lost_state(step)
        if self._roster.in_state(WAITING) and not self._roster.in_state(REPLICA):
            sentence = f"waiting for a replica that stands at step {step}: nobody here does"
            return Phase.PAUSED, sentence
        ready, least = self._roster.workers_ready(), self._rules.min_workers
        here = " and ".join(p.name for p in ready) or "no worker"
        are = "are" if len(ready) > 1 else "is"
        missing = self._ending.departures.missing()
        missing = f"; {missing}" if missing else ""
        if not started:
            wanted = self._rules.num_workers
            of = f"{wanted} workers" if wanted > 1 else "the worker"
            return Phase.STARTING, f"waiting for {of}: {here} {are} ready{missing}"
        if self._leases.exhausted and ready:
            return Phase.PAUSED, "waiting for the last samples"
        if len(ready) < least:
            needed = f", {least} are needed" if least > 1 else ""
            if not ready and (to_come := self._ending.departures.to_come):
                has = "have" if to_come > 1 else "has"
                needed = f", {to_come} of {self._rules.num_workers} {has} not come yet"
            return Phase.PAUSED, f"paused: {here} {are} ready{needed}{missing}"
        return Phase.PAUSED, "between rounds"

    def _otherwise(self, state: str, started: bool, now: float) -> str:
        if self._ending.begun is not None or state == states.RETURNING:
            return ""
        if otherwise := self._ending.otherwise(now):
            return otherwise
        due = self.starts_with_fewer(state, started)
        return "" if due is None else f" (starts with fewer in {max(0.0, due - now):.0f} s)"

    def starts_with_fewer(self, state: str, started: bool) -> float | None:
        """When the run takes the next step of its start with those who are here, if no others come
        before; None where it does not wait for others."""
        if state == states.STARTING:
            return self._origin.due_at(self._roster)
        since = self._roster.ready_since
        enough = len(self._roster.workers_ready()) >= self._rules.min_workers
        if state == states.SNAPSHOT or started or since is None or not enough:
            return None
        return since + self._rules.join_timeout
