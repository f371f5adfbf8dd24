"""Late work that is carried over: who is carried, when it enters, what becomes of its samples."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import Run, but_words, leased, unleased

from paramserver.protocol import messages as wire
from paramserver.rounds.late import WAIT_MIN_S, WAIT_TIMES, weight_of_late
from workers.link.follow import Follow

HALF = f"{10 * weight_of_late(1):g}"
"""What ten samples weigh, one update late."""


def three(**rules: Any) -> Run:
    """Three workers in round 1, with the leases 0/0-10, 0/10-20 and 0/20-30."""
    rules = {"num_workers": 3, "max_staleness": 2, **rules}
    return Run(**rules).observer().workers(1, 2, 3)


def late(run: Run, *others: int) -> list[str]:
    """The others push all of the open round, which goes on without the third worker."""
    effects: list[str] = []
    for who in others or (1, 2):
        effects += run.push(who)
    return but_words([*effects, *run.tick(run.now + 1.0, 0, 1, 2, 3)])


def close(effects: list[str]) -> str:
    return next(e for e in effects if e.startswith("close"))


def test_who_is_late_keeps_its_lease_and_gets_no_other() -> None:
    run = three()
    assert close(late(run)) == (
        "close 1 to step 1, in it 1:10 2:10, late 3 (late (last seen 0.0 s ago), carried over), "
        "carried 3's 1 0/20-30; open 2 at step 1 for 1: 0/30-40 0/50-60, 2: 0/40-50 0/60-70"
    )
    assert leased(run.ledger) == 50
    assert (0, 20, 30) in run.ledger.state()["waiting"]  # as after a restart


def test_a_late_gradient_enters_the_open_round_with_less_weight() -> None:
    run = three()
    late(run)
    assert run.push(3, 0, round=1) == []  # it is not complete
    assert run.push(3, 1, round=1) == [f"add 3.0 x{HALF}", f"add 3.1 x{HALF}"]
    closed = run.push(1) + run.push(2)
    assert f"average 2.0 of {20 + 10 * weight_of_late(1):g}" in closed
    assert close(closed).startswith("close 2 to step 2, in it 1:10 2:10 3:10; open 3 at step 2 for")
    assert "3: " in close(closed)  # it has a lease again
    assert run.sums().startswith("50 done, 0 partly, 0 skipped")
    assert run.push(3, 0, round=1) == ["refused: round 1 is not open; round 3 is"]


def test_its_weight_goes_by_the_updates_since_the_step_that_it_was_made_at() -> None:
    assert [weight_of_late(lag) for lag in range(4)] == pytest.approx(
        [1.0, 1 / math.sqrt(2), 1 / math.sqrt(3), 0.5]
    )
    run = three()
    late(run)
    late(run)
    pushed = run.push(3, round=1, made_at=0)
    assert pushed == [f"add 3.{b} x{10 * weight_of_late(2):g}" for b in (0, 1)]
    run = three()
    late(run)
    late(run)  # it looked, and began its lease at step 1
    assert run.push(3, round=1, made_at=1) == [f"add 3.{b} x{HALF}" for b in (0, 1)]


@pytest.mark.parametrize("made_at", [-0, 3, 7])
def test_no_gradient_is_of_a_step_that_was_not(made_at: int) -> None:
    run = three(max_staleness=3)
    late(run)
    late(run)
    late(run)  # the log stands at step 3
    told = run.push(3, 0, round=1, made_at=made_at)
    if made_at <= 3:
        assert told == []
        assert run.push(3, 1, round=1, made_at=2) == [
            "refused: a gradient of round 1 cannot have been made at step 2"
        ]
    else:
        assert told == ["refused: a gradient of round 1 cannot have been made at step 7"]


def test_where_a_bucket_is_averaged_already_it_enters_the_next_round() -> None:
    run = three()
    late(run)
    run.push(1, 0)
    assert "average 2.0 of 20" in run.push(2, 0)
    assert run.push(3, round=1) == []
    run.push(1, 1)
    closed = but_words(run.push(2, 1))
    assert "in it 1:10 2:10, carried 3's 1 0/20-30; open 3" in close(closed)
    weight = f"{10 * weight_of_late(2):g}"
    assert closed[-2:] == [f"add 3.0 x{weight}", f"add 3.1 x{weight}"]
    closed = run.push(1) + run.push(2)
    assert "in it 1:10 2:10 3:10; open" in close(closed)
    assert run.sums().startswith("70 done")


def test_what_is_too_old_comes_back_and_is_computed_again() -> None:
    run = three(max_staleness=1)
    late(run)
    run.push(3, 0, round=1)
    effects = late(run)
    assert "discard 3.0" in effects
    assert "carried" not in close(effects)
    assert "1: 0/20-30" not in close(effects)  # 1 and 2 had theirs already
    assert "open 3 at step 2 for 1: 0/50-60 0/20-30" in close(effects)
    assert run.push(3, 1, round=1) == ["refused: round 1 is not open; round 3 is"]
    run.push(1)
    assert "3: " in close(run.push(2))  # it takes part again


def test_what_is_partly_in_an_average_is_not_carried() -> None:
    run = three()
    run.push(3, 0)
    closed = close(late(run))
    assert "in it 1:10 2:10 3:10, late 3 (late" in closed and "carried" not in closed
    assert run.ledger.state()["partly"] == 10
    assert run.push(3, 1, round=1) == ["refused: round 1 is not open; round 2 is"]


def test_without_staleness_the_lease_comes_back_at_once() -> None:
    run = three(max_staleness=0)
    closed = close(late(run))
    assert "carried" not in closed
    assert "open 2 at step 1 for 1: 0/30-40 0/20-30" in closed


def test_a_void_round_settles_what_entered_it() -> None:
    run = three()
    late(run)
    run.push(3, round=1)
    assert "void 2" in run.stop()
    assert (
        run.sums()
        == "20 done, 0 partly, 0 skipped; waiting 0/20-30 0/30-40 0/40-50 0/50-60 0/60-70"
    )


@pytest.mark.parametrize("how", ["dies", "leaves its loop", "joins again", "leaves"])
def test_who_is_gone_gives_its_lease_back(how: str) -> None:
    run = three()
    late(run)
    run.push(3, 0, round=1)
    effects = {
        "dies": lambda: run.tick(run.now + 11.0, 0, 1, 2),
        "leaves its loop": lambda: run.unready(3),
        "joins again": lambda: run.relinked(3),
        "leaves": lambda: run.leave(3),
    }[how]()
    assert "discard 3.0" in effects
    assert run.ledger._waiting == [(0, 20, 30)]
    run.push(1)
    assert "0/20-30" in close(run.push(2))


def test_a_late_gradient_of_bad_numbers_is_skipped_once() -> None:
    run = three()
    late(run)
    run.push(3, 0, round=1)
    effects = but_words(run.push(3, 1, round=1, bad="not finite"))
    assert effects == ["discard 3.0", "w3 <- refused 1: not finite"]
    run.push(1)
    closed = close(run.push(2))
    assert "in it 1:10 2:10, late 3 (not finite); open" in closed
    assert run.sums().startswith("40 done, 0 partly, 10 skipped")


def test_a_late_gradient_of_bad_numbers_does_not_come_back_when_it_is_too_old() -> None:
    run = three(max_staleness=1)
    late(run)
    run.push(1, 0)
    run.push(2, 0)
    run.push(3, 0, round=1, bad="not finite")
    run.push(1, 1)
    run.push(2, 1)
    assert run.sums().startswith("40 done, 0 partly, 10 skipped")


def test_what_cannot_be_read_is_skipped_late_too() -> None:
    run = three()
    late(run)
    run.tells(3, wire.Unreadable(round=1))
    run.push(1)
    run.push(2)
    assert run.sums().startswith("40 done, 0 partly, 10 skipped")


def test_one_that_dies_of_its_lease_late_is_remembered() -> None:
    run = three()
    late(run)
    run.unready(3, unfinished=True)
    run.leave(3, "ValueError: no", failed="forward", lease=(0, 20, 30))
    assert [s.lease for s in run.ledger._suspects.values()] == [(0, 20, 30)]


def test_nobody_waits_for_who_is_carried_nor_counts_it_to_the_quorum() -> None:
    run = Run(num_workers=4, max_staleness=2).observer().workers(1, 2, 3, 4, samples=1000)
    for who in (1, 2, 3):
        run.push(who)
    run.tick(run.now + 1.0, 0, 1, 2, 3, 4)
    run.push(4, round=1)
    run.push(1)
    assert run.rounds.next_deadline() is None, "two of three are the quorum"
    run.push(2)
    assert run.rounds.next_deadline() is not None
    assert "in it 1:10 2:10 3:10 4:10" in close(run.push(3))


def test_at_the_end_of_a_run_the_others_compute_what_is_late() -> None:
    run = Run(num_workers=3, max_staleness=3).observer().workers(1, 2, 3, samples=30)
    closed = close(late(run))
    assert closed.endswith("open 2 at step 1 for 1: 0/20-30")
    assert run.push(3, 0, round=1) == ["refused: round 1 is not open; round 2 is"]
    run.push(1)
    assert run.sums() == "30 done, 0 partly, 0 skipped; waiting nothing"


def test_what_is_complete_at_the_end_of_a_run_is_its_last_update() -> None:
    run = Run(num_workers=3, max_staleness=3).observer().workers(1, 2, 3, samples=50)
    late(run)
    run.push(1, 0)
    run.push(2, 0)
    run.push(3, round=1)
    run.push(1, 1)
    run.push(2, 1)
    assert [c.contributors for c in run.closes] == [{1: 10, 2: 10}, {1: 10, 2: 10}, {3: 10}]
    assert run.sums() == "50 done, 0 partly, 0 skipped; waiting nothing"
    assert run.rounds.ending == ("all epochs are done", False)


def test_all_that_is_late_enters_a_round_that_nobody_else_is_in() -> None:
    run = Run(num_workers=3, max_staleness=3, quorum=0.0, epochs=1).observer()
    run.workers(1, 2, 3, samples=30)
    run.hello(4)
    run.join(4)
    run.push(1)
    run.tick(run.now + 1.0, 0, 1, 2, 3, 4)
    assert run.rounds.snapshot is not None and run.rounds.round is None
    run.push(2, round=1)
    run.push(3, round=1)
    effects = but_words(run.snapshot(4))
    adds = [f"add {who}.{bucket} x{HALF}" for bucket in (0, 1) for who in (2, 3)]
    assert [e for e in effects if e.startswith("add")] == adds
    assert [c.contributors for c in run.closes] == [{1: 10}, {2: 10, 3: 10}]


def test_too_few_others_need_who_is_late() -> None:
    run = Run(num_workers=2, min_workers=2, max_staleness=3).observer().workers(1, 2)
    run.push(1)
    closed = close(run.tick(1.0, 0, 1, 2))
    assert "in it 1:10, late 2 (late" in closed
    assert "open 2 at step 1 for 1: " in closed and "2: " in closed.partition("open 2")[2]
    assert run.push(2, 0, round=1) == ["refused: round 1 is not open; round 2 is"]


def test_own_samples_are_carried_too() -> None:
    run = Run(num_workers=3, max_staleness=2).observer().workers()
    for who in (1, 2, 3):
        run.hello(who)
    for who in (1, 2, 3):
        run.join(who)
    while (under_way := run.rounds.snapshot) is not None:
        run.snapshot(run.rounds.peers[under_way.joiner].id)
    for who in (1, 2, 3):
        run.ready(who, samples=0, batch=1, own=True)
    run.push(1, samples=4)
    run.push(2, samples=4)
    assert "carried 3's 1 0/0-0" in close(run.tick(1.0, 0, 1, 2, 3))
    assert run.push(3, round=1, samples=4)[0] == f"add 3.0 x{4 * weight_of_late(1):g}"
    run.push(1, samples=4)
    assert "in it 1:4 2:4 3:4" in close(run.push(2, samples=4))
    assert run.ledger.done == 20


def test_values_that_a_late_loop_set_do_not_count() -> None:
    run = three()
    late(run, 2, 3)
    run.push(1, round=1, groups={0: {"lr": 0.5}})
    run.push(2, groups={0: {"lr": 0.1}})
    run.push(3)
    assert run.closes[-1].contributors == {1: 10, 2: 10, 3: 10}
    assert run.closes[-1].groups == {0: {"lr": 0.1}}


def test_a_round_lasts_little_longer_than_pushes_usually_take() -> None:
    run = Run(num_workers=3, timeout=None, max_staleness=2).observer()
    run.workers(1, 2, 3, samples=1000)
    for _ in range(3):
        run.now += 2.0
        for who in (1, 2, 3):
            run.push(who)
    opened_at = run.now
    run.now += 2.0
    run.push(1)
    run.push(2)
    assert run.rounds.next_deadline() == pytest.approx(opened_at + 2.0 * WAIT_TIMES)
    run.tick(opened_at + 2.0 * WAIT_TIMES, 0, 1, 2, 3)
    opened_at = run.now
    run.now += 2.0 * WAIT_TIMES  # slow, but nobody is to blame for that
    run.push(1)
    run.push(3, round=4)
    assert run.rounds.next_deadline() == pytest.approx(run.now + WAIT_MIN_S)


def test_who_computes_what_is_too_old_gets_nothing_before_it_is_done() -> None:
    run = three(max_staleness=1)
    late(run)
    closed = close(late(run))
    assert "3: " not in closed.partition("open 3")[2]
    run.push(3, 0, round=1)
    run.push(1)
    assert "3: " in close(run.push(2)).partition("open 4")[2]


MOVES = (
    *("push", "push", "push", "push one", "time", "time", "join", "loop", "bad", "look"),
    *("stranger", "snapshot"),
)


@given(
    st.integers(1, 4),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.sampled_from((30, 70)),
    st.lists(st.tuples(st.sampled_from(MOVES), st.integers(1, 3)), max_size=60),
)
def test_whatever_happens_each_sample_is_counted_once_and_nothing_is_too_old(
    most: int, quorum: float, samples: int, moves: list[tuple[str, int]]
) -> None:
    run = Run(num_workers=3, max_staleness=most, quorum=quorum, epochs=2).observer()
    run.workers(1, 2, 3, samples=samples)
    added = set[str]()
    for move, who in moves:
        if run.rounds.ending is not None:
            break
        made_at = None
        peer = next(p for p in run.rounds.peers.values() if p.id == who)
        current, carried = run.rounds.round, peer.carried
        effects: list[str] = []
        if move in ("push", "push one", "bad") and (carried or current):
            told: dict[str, Any] = {"bad": "not finite"} if move == "bad" else {}
            member = current.members.get(who) if current else None
            if carried is not None:
                lease = carried.lease
                told |= {"round": carried.round, "samples": lease[2] - lease[1]}
                made_at = carried.made_at if carried.pushes else carried.step - 1
                told["made_at"] = made_at
            if carried is not None or member is not None:
                effects = run.push(who, *((0,) if move == "push one" else ()), **told)
        elif move == "time":
            effects = run.tick(run.now + 1.0, 0, 1, 2, 3)
        elif move == "join":
            run.relinked(who)
            run.follows(who)
            effects = run.ready(who, samples=samples)
        elif move == "loop":
            run.unready(who)
            effects = run.ready(who, samples=samples)
        elif move == "look" and carried is not None and not carried.pushes:
            told = {"round": carried.round, "made_at": run.rounds.step}
            effects = run.push(who, samples=carried.lease[2] - carried.lease[1], **told)
        elif move == "newcomer":
            run.hello(4)
            effects = run.join(4)
        elif move == "snapshot":
            effects = run.snapshot(4)
        for effect in effects:
            if effect.startswith("add "):
                added.add(effect.partition(".")[0].removeprefix("add "))
            elif effect.startswith("close "):
                assert {str(who) for who in run.closes[-1].contributors} <= added
                added.clear()
            if effect.startswith("add ") and made_at is not None:
                assert run.rounds.step - made_at <= most + 1
        ledger = run.ledger
        ahead = unleased(ledger) + leased(ledger)
        assert ledger.done + ledger.partly + ledger.skipped + ahead == 2 * samples
        assert sum(sum(c.contributors.values()) for c in run.closes) == ledger.done + ledger.partly
        for each in run.rounds.peers.values():
            if each.carried is not None:
                assert run.rounds.step + 1 - each.carried.step <= most
                assert not each.leases and each.carried.lease in ledger._leased
        for payload in (c.carried for c in run.closes if c.carried is not msgspec.UNSET):
            assert payload


# ------------------------------------------------------------------------------ at the worker


class Replica:
    step, lineage = 0, ""


def follow(*closes: wire.Close) -> Follow:
    found = Follow("server", Replica(), 0.0)
    for each in closes:
        found.applied(each)
    return found


def closed(round: int, carried: Any, leases: Any = None, step: int | None = None) -> wire.Close:
    opened = wire.Open("server", round + 1, round, "", leases or {1: ((0, 90, 99),)})
    told = {} if carried is None else {"carried": carried}
    return wire.Close(
        nonce="server",
        round=round,
        step=round if step is None else step,
        lineage="",
        buckets=(),
        contributors={},
        late={},
        loss=None,
        seconds=1.0,
        ledger={},
        open=opened,
        **told,
    )


OF_2 = {2: wire.CarriedOver(4, (0, 10, 20))}


def test_a_worker_waits_until_it_knows_what_became_of_its_late_gradient() -> None:
    f = follow(closed(4, OF_2))
    assert f.is_over(4) and not f.is_settled(2, 4) and f.is_awaited(2, 4)
    f.applied(closed(5, OF_2))
    assert not f.is_settled(2, 4)
    f.applied(closed(6, None))
    assert f.is_settled(2, 4)


def test_a_lease_of_a_round_that_is_over_is_begun_late() -> None:
    f = follow(closed(4, OF_2))
    assert f.lease(2, after=3) == (4, (0, 10, 20))
    assert f.lease(2, after=4) is None  # its gradient is on the way
    assert f.lease(1, after=3) == (5, (0, 90, 99))
    alone = follow(msgspec.structs.replace(closed(4, OF_2), open=None))
    assert alone.lease(2, after=3) == (4, (0, 10, 20)) and alone.open is None


def test_a_new_lease_settles_what_was_late() -> None:
    """The round that it entered was void."""
    f = follow(closed(4, OF_2))
    f.opened(wire.Open("server", 6, 0, "", {2: ((0, 30, 40),)}))
    assert f.is_settled(2, 4)
    assert f.lease(2, after=4) == (6, (0, 30, 40))


def test_who_has_joined_again_is_not_awaited() -> None:
    f = follow(closed(4, OF_2))
    f.joins(6)
    assert f.is_settled(2, 4)
    f.applied(closed(5, OF_2))  # fetched
    assert f.is_settled(2, 4) and f.lease(2, after=3) is None
