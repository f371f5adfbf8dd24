"""The tables of states: whole, reachable, and what the server goes by."""

from __future__ import annotations

import pytest
import scripts
from scripts import Run
from simulation import Parts, simulate

from paramserver.protocol import messages as wire
from paramserver.rounds import roster, states
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.effects import Effect
from paramserver.rounds.events import Event
from paramserver.rounds.states import PEER, RUN, Table


@pytest.mark.parametrize("table", [PEER, RUN])
def test_every_state_is_in_the_table_and_can_be_reached(table: Table) -> None:
    reached = {to for row in table.values() for to in row.values()}
    assert reached <= set(table)
    assert set(table) - reached <= {states.STARTING, states.RETURNING}


def test_a_cause_that_a_state_does_not_have_is_a_mistake_in_the_code() -> None:
    assert states.after(PEER, states.WAITING, states.CHOSEN) == states.ADOPTING
    with pytest.raises(AssertionError, match="no 'Adopted' in the state 'replica'"):
        states.after(PEER, states.REPLICA, states.ADOPTED)


class Checked(Rounds):
    """The state is what is under way."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        effects = super().handle(event, now)
        assert (self.round is not None) == (self.state == states.OPEN)
        assert self.snapshot is None or self.state in (states.SNAPSHOT, states.ENDING)
        assert (self.ending is not None) == (self.state in (states.ENDING, states.ENDED))
        assert (self.ended is not None) == (self.state == states.ENDED)
        assert self.layout is not None or self.state not in (states.BETWEEN, states.OPEN)
        return effects


def test_every_row_is_taken_and_the_state_is_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row that is never used would be drawn all the same."""
    taken: set[tuple[str, str]] = set()

    def noted(table: Table, state: str, cause: str) -> str:
        taken.add((state, cause))
        return table[state][cause]

    monkeypatch.setattr(states, "after", noted)
    monkeypatch.setattr(roster, "after", noted)
    for seed in range(100):
        assert simulate(seed, Parts(rounds=Checked)).failure is None
    monkeypatch.setattr(scripts, "Rounds", Checked)
    what_seldom_happens()
    rows = {(state, cause) for table in (PEER, RUN) for state in table for cause in table[state]}
    assert taken == rows


def what_seldom_happens() -> None:
    """By the table of the run."""
    run = Run()
    run.stop()
    run.hello(0), run.join(0)  # it was on its way
    assert run.rounds.state == states.ENDED
    run = Run().observer()
    run.leave(0)
    run.hello(0, "b"), run.join(0, "b")
    assert run.rounds.state == states.BETWEEN
    run.stop()
    run.join(0, "b", lineage="another")
    assert run.rounds.state == states.ENDING
    for way in ("adopted", "aborted"):
        run = Run().observer()
        run.hello(1), run.join(1)
        assert run.rounds.state == states.SNAPSHOT
        run.stop()
        run.snapshot(1) if way == "adopted" else run.leave(1)
        assert run.rounds.state == states.ENDING and run.rounds.snapshot is None
    run = Run().observer().workers(1, 2)
    run.push(1), run.push(2)
    run.leave(0)
    run.hello(0, "b")
    run.stop()
    run.join(0, "b")
    assert run.rounds.state == states.ENDING and run.rounds.snapshot is not None


def test_what_a_peer_says_out_of_turn_is_ignored_or_refused() -> None:
    run = Run().observer()
    run.hello(1)
    assert run.ready(1) == ["w1 <- reject: ready before joining"]
    assert run.adopted(1, 7) == ["w1 <- join again"]
    assert run.digest(1, 0, "d") == []
    run.join(1)
    assert run.ready(1) == run.adopted(1, 7) == run.digest(1, 0, "d") == []
    run.snapshot(1)
    assert run.tells(1, wire.Stand(0)) == []
    assert run.rounds.peers["w1"].stands_at is None
    assert run.ready(0) == ["obs <- reject: ready before joining"]
