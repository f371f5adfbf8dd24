"""Where each worker's time went: its own clock says how much it waited, the server for whom."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import Run

from paramserver.protocol.messages import Spent
from paramserver.protocol.pacing import WINDOW
from paramserver.rounds.times import MINUTE_S, ROUNDS_KEPT, Part


def a_run(buckets: int = 1, workers: int = 2, **rules: object) -> Run:
    run = Run(num_workers=workers, buckets=buckets, epochs=50, **rules).observer()
    return run.workers(*range(1, workers + 1), samples=1000, batch=10)


def a_round(run: Run, came: dict[int, float], spent: dict[int, Spent | None] | None = None) -> None:
    """Each pushes its only bucket so many seconds after the round's opening."""
    current = run.rounds.round
    assert current is not None
    for worker in sorted(came, key=came.__getitem__):
        run.now = current.opened_at + came[worker]
        run.push(worker, 0, spent=(spent or {}).get(worker))


def parts(run: Run) -> dict[int, list[float]]:
    """Those of the newest round."""
    return {
        w: [round(s, 6) for s in part] for w, part in run.rounds.clocks.newest[-1].parts.items()
    }


def test_a_wait_is_for_others_as_far_as_they_were_missing() -> None:
    run = a_run()
    a_round(run, {1: 0.3, 2: 1.0})
    # Worker 1 waited 0.9 s by its own clock, for 0.7 s of which its push was at the server.
    told = {1: Spent(0.2, 0.05, 0.9), 2: Spent(0.9, 0.1, 0.2, 0.01)}
    a_round(run, {1: 0.3, 2: 1.0}, told)
    assert parts(run) == {1: [0.15, 0.05, 0.2, 0.7, 0.0], 2: [0.8, 0.1, 0.2, 0.0, 0.0]}
    newest = run.rounds.clocks.newest[-1]
    assert newest.step == 2 and newest.seconds == pytest.approx(1.0)
    assert run.rounds.clocks.learning_rate == 0.01


def test_a_worker_that_tells_no_times_has_them_from_the_server() -> None:
    run = a_run()
    a_round(run, {1: 0.3, 2: 1.0})
    a_round(run, {1: 0.3, 2: 1.0})
    assert parts(run)[1] == [0.0, 0.0, 0.3, 0.7, 0.0]
    assert parts(run)[2] == [0.0, 0.0, 1.0, 0.0, 0.0]


def test_who_may_send_no_more_waits_for_others() -> None:
    """Worker 1 has all under way that it may have, since the averages wait for worker 2."""
    run = a_run(buckets=WINDOW + 2)
    for number in (1, 2):
        current = run.rounds.round
        assert current is not None
        at = current.opened_at
        for bucket in range(WINDOW):
            run.now = at + 0.1
            run.push(1, bucket)
        for bucket in range(WINDOW):
            run.now = at + 0.6 + bucket * 0.1  # the first makes room for one more
            run.push(2, bucket)
        run.now = at + 1.0
        run.push(1, WINDOW)
        run.push(2, WINDOW)
        run.push(2, WINDOW + 1)
        run.now = at + 1.1
        told = Spent(0.1, 0.0, 1.0) if number == 2 else None
        run.push(1, WINDOW + 1, spent=told)
    assert parts(run)[1] == [0.1, 0.0, 0.5, 0.5, 0.0]
    assert parts(run)[2][3] == 0.1, "it waited for the last one of worker 1"


def test_who_missed_the_round_was_late() -> None:
    run = a_run(workers=3, timeout=0.5)
    a_round(run, {1: 0.1, 2: 0.2})
    run.tick(run.now + 0.5)
    assert parts(run)[3] == [0.0, 0.0, 0.0, 0.0, 0.7]
    assert parts(run)[1][4] == 0.0
    minute = run.rounds.clocks.minute(run.now)
    assert [(minute[w].rounds, minute[w].late) for w in (1, 3)] == [(1, 0), (1, 1)]


def test_a_minute_is_forgotten_after_a_minute() -> None:
    run = a_run()
    for _ in range(ROUNDS_KEPT + 5):
        a_round(run, {1: 0.5, 2: 0.5}, {1: Spent(0.5, 0.0, 0.0), 2: Spent(0.5, 0.0, 0.0)})
    clocks = run.rounds.clocks
    assert len(clocks.newest) == ROUNDS_KEPT
    assert clocks.minute(run.now)[1].parts[0] == pytest.approx(32, abs=1.0)
    assert clocks.minute(run.now)[1].rounds == ROUNDS_KEPT + 5
    assert clocks.minute(run.now + MINUTE_S - 10)[1].rounds < 25
    assert clocks.minute(run.now + MINUTE_S + 1) == {}


anything = st.floats(allow_nan=True, allow_infinity=True)


@given(st.builds(Spent, anything, anything, anything, anything))
def test_no_worker_tells_more_than_can_be(spent: Spent) -> None:
    run = a_run()
    a_round(run, {1: 0.3, 2: 1.0})
    a_round(run, {1: 0.3, 2: 1.0}, {1: spent, 2: spent})
    for part in run.rounds.clocks.newest[-1].parts.values():
        assert all(0.0 <= seconds <= 1.0 + 1e-9 for seconds in part)
        assert math.isfinite(sum(part)) and isinstance(part, Part)
