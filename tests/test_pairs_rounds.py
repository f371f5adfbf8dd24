"""Several pairs of a model and its optimizer: leases that last over several rounds, as scripts of
events and effects (see `scripts`)."""

from __future__ import annotations

import msgspec
import pytest
from scripts import LAYOUT, Run, but_words, session

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.rounds.effects import Send
from paramserver.rounds.events import PushRefused, Told
from paramserver.rounds.ledger import DONE, PARTLY, RETURNED, SKIPPED, Ledger, OwnLedger
from paramserver.tensors.bucket import plan

PAIRS = msgspec.structs.replace(LAYOUT, pairs=(("G", 1), ("D", 1)))
G, D = 0, 1  # the bucket of each


def pairs(*numbers: int, samples: int = 100, own: bool = False, **rules: object) -> Run:
    """These workers are here and ready, with two pairs of one bucket each."""
    run = Run(observer=False, **{"num_workers": len(numbers), **rules})
    for who in numbers:
        run.hello(who)
        run.join(who, layout=PAIRS)
    for who in numbers[1:]:
        run.snapshot(who)
    for who in numbers:
        run.ready(who, samples=0 if own else samples, own=own)
    return run


def step(run: Run, who: int, pair: str, **push: object) -> list[str]:
    """This worker pushes all of its step of that pair."""
    mine = G if pair == "G" else D
    return but_words(run.push(who, mine, pair=pair, without=(1 - mine,), **push))


def asks(run: Run, who: int) -> list[str]:
    assert run.rounds.round is not None
    return but_words(run.tells(who, wire.NextLease(run.rounds.round.number)))


def test_a_lease_lasts_over_the_steps_of_all_pairs_and_settles_once() -> None:
    run = pairs(1, 2)
    assert run.rounds.open_message().began == 1
    step(run, 1, "D")
    assert step(run, 2, "D")[1:] == [
        "average 1.1 of 20",
        "close 1 to step 1, in it 1:10 2:10; open 2 at step 1 for 1: 0/0-10 0/20-30, "
        "2: 0/10-20 0/30-40",
    ]
    opened = run.closes[-1].open
    assert opened is not None and (opened.round, opened.began) == (2, 1)
    assert run.closes[-1].pair == "D" and run.closes[-1].buckets == (D,)
    assert run.sums() == "0 done, 0 partly, 0 skipped; waiting nothing"
    step(run, 1, "G"), step(run, 2, "G")
    assert run.closes[-1].pair == "G" and run.closes[-1].buckets == (G,)
    assert asks(run, 1) == []
    assert asks(run, 2) == [
        "void 3",
        "all <- open 4 at step 2 for 1: 0/20-30 0/40-50, 2: 0/30-40 0/50-60",
    ]
    assert run.rounds.open_message().began == 4
    assert run.sums() == "20 done, 0 partly, 0 skipped; waiting nothing"


def test_the_run_ends_when_the_last_leases_are_handed_in() -> None:
    run = pairs(1, 2, samples=20)
    for pair in ("D", "D", "G"):
        step(run, 1, pair), step(run, 2, pair)
    asks(run, 1)
    assert asks(run, 2)[-1] == "end at step 3: all epochs are done"
    assert run.sums() == "20 done, 0 partly, 0 skipped; waiting nothing"


def test_who_dies_between_two_steps_leaves_a_lease_that_is_never_handed_out_again() -> None:
    run = pairs(1, 2)
    step(run, 1, "D"), step(run, 2, "D")
    run.leave(2)
    assert run.sums() == "0 done, 0 partly, 0 skipped; waiting 0/30-40"  # the open round has it
    step(run, 1, "G")
    assert run.sums() == "0 done, 10 partly, 0 skipped; waiting 0/30-40"
    asks(run, 1)
    assert run.sums() == "10 done, 10 partly, 0 skipped; waiting nothing"


def test_who_dies_after_its_part_of_the_first_step_leaves_a_part_of_its_lease() -> None:
    run = pairs(1, 2)
    step(run, 2, "D")
    run.leave(2), step(run, 1, "D")
    assert run.sums() == "0 done, 10 partly, 0 skipped; waiting 0/30-40"


def test_a_close_tells_the_samples_that_have_begun_and_a_restart_counts_them() -> None:
    run = pairs(1, 2)
    step(run, 1, "D"), step(run, 2, "D")
    state = msgspec.json.decode(msgspec.json.encode(run.closes[-1].ledger))
    assert (state["begun"], state["partly"]) == (20, 0)
    assert state["waiting"] == [[0, 20, 30], [0, 30, 40]]
    ledger = Ledger.from_state(state)
    assert (ledger.partly, ledger.lease(10)) == (20, (0, 20, 30))


def test_a_late_worker_has_no_part_in_the_rest_of_its_lease() -> None:
    run = pairs(1, 2, timeout=1.0)
    step(run, 1, "D")
    effects = but_words(run.tick(1.0, 1, 2))
    assert effects[-1].endswith("open 2 at step 1 for 1: 0/0-10 0/20-30")
    assert step(run, 2, "D")[0].startswith("refused: worker 2 (pi) has no lease")
    step(run, 1, "G")
    assert asks(run, 1)[-1] == "all <- open 4 at step 2 for 1: 0/20-30 0/10-20, 2: 0/30-40 0/40-50"
    assert run.sums() == "10 done, 0 partly, 0 skipped; waiting nothing"


def test_a_worker_that_is_late_for_the_second_step_has_a_part_of_its_lease_done() -> None:
    run = pairs(1, 2, timeout=1.0)
    step(run, 1, "D"), step(run, 2, "D"), step(run, 1, "G")
    run.tick(1.0, 1, 2)
    assert run.closes[-1].contributors == {1: 10} and 2 in run.closes[-1].late
    assert run.sums() == "0 done, 10 partly, 0 skipped; waiting nothing"


def test_a_worker_that_is_late_to_ask_has_made_all_its_steps() -> None:
    run = pairs(1, 2, timeout=1.0)
    step(run, 1, "D"), step(run, 2, "D"), asks(run, 1)
    assert but_words(run.tick(1.0, 1, 2)) == [
        "void 2",
        "all <- open 3 at step 1 for 1: 0/20-30 0/40-50, 2: 0/30-40 0/50-60",
    ]
    assert run.sums() == "20 done, 0 partly, 0 skipped; waiting nothing"


def test_bad_numbers_end_a_lease() -> None:
    run = pairs(1, 2)
    step(run, 1, "D"), step(run, 2, "D", bad="not finite")
    assert run.sums() == "0 done, 0 partly, 10 skipped; waiting nothing"
    assert run.rounds.round is not None and set(run.rounds.round.members) == {1}
    step(run, 1, "G", bad="not finite")
    assert run.sums() == "0 done, 10 partly, 10 skipped; waiting nothing"


def test_two_pairs_in_one_place_are_an_error_that_names_both() -> None:
    run = pairs(1, 2, 3)
    for who in (1, 2, 3):
        step(run, who, "D")
    step(run, 1, "G")
    refused = run.header(2, D, pair="D", without=(G,))
    why = run.rounds.refusal(session(2), refused)
    assert why == "worker 2 (pi) steps 'D', worker 1 (pi) steps 'G'"
    effects = run.handle(PushRefused(session(2), refused, why))
    answers = [e.message for e in effects if isinstance(e, Send)]
    assert [type(m) for m in answers] == [wire.Reject]
    assert answers[0].reason == why and "cluster.step" in answers[0].hint
    assert asks(run, 3)[0] == (
        "w3 <- reject: worker 3 (pi) asks for its next samples, worker 1 (pi) steps 'G'"
    )
    assert run.closes[-1].contributors == {1: 10} and run.closes[-1].step == 2


def test_of_two_in_unlike_places_the_one_that_has_shown_nothing_is_wrong() -> None:
    run = pairs(1, 2)
    step(run, 1, "D"), step(run, 2, "D"), step(run, 1, "G"), step(run, 2, "G")
    asks(run, 1), run.hello(3), run.join(3, layout=PAIRS), asks(run, 2)
    run.snapshot(3), run.ready(3)
    step(run, 1, "D"), step(run, 2, "D"), asks(run, 1), asks(run, 2)
    assert run.rounds.round is not None and set(run.rounds.round.members) == {1, 2, 3}
    step(run, 3, "G")
    assert step(run, 1, "D")[0] == (
        "w3 <- reject: worker 3 (pi) steps 'G', worker 1 (pi) steps 'D'"
    )
    step(run, 2, "D")
    assert run.closes[-1].pair == "D"


def test_nobody_enters_in_the_middle_of_a_lease() -> None:
    run = pairs(1, 2)
    step(run, 1, "D")
    run.hello(3), run.join(3, layout=PAIRS)
    step(run, 2, "D")
    assert run.rounds.snapshot is None and run.closes[-1].open is not None
    step(run, 1, "G"), step(run, 2, "G"), asks(run, 1)
    assert asks(run, 2)[-1].startswith("w1 <- give")
    run.snapshot(3), run.ready(3)
    for pair in ("D", "G"):
        step(run, 1, pair), step(run, 2, pair)
    asks(run, 1)
    assert "3: 0/" in asks(run, 2)[-1]


def test_leases_end_early_where_too_few_are_left_for_a_round() -> None:
    run = pairs(1, 2, min_workers=2)
    run.hello(3), run.join(3, layout=PAIRS)
    step(run, 1, "D"), step(run, 2, "D")
    run.leave(2), step(run, 1, "G")
    assert run.rounds.round is None and run.rounds.snapshot is not None
    assert run.sums() == "0 done, 20 partly, 0 skipped; waiting 0/30-40"
    run.snapshot(3)
    assert run.ready(3) == ["all <- open 3 at step 2 for 1: 0/20-30 0/40-50, 3: 0/30-40 0/50-60"]


def test_nobody_asks_for_the_next_lease_before_a_step() -> None:
    run = pairs(1, 2)
    assert asks(run, 1) == [] and asks(run, 2) == []
    assert run.rounds.round is not None and run.rounds.round.number == 1
    step(run, 1, "D"), step(run, 2, "D"), step(run, 1, "G")
    assert asks(run, 1) == []  # its push is here


def test_a_stop_in_the_middle_of_a_lease_counts_what_is_in_the_log() -> None:
    run = pairs(1, 2)
    step(run, 1, "D"), step(run, 2, "D")
    run.stop()
    assert run.sums() == "0 done, 20 partly, 0 skipped; waiting 0/20-30 0/30-40"


def test_an_evaluation_between_two_steps_holds_the_second_one() -> None:
    run = pairs(1, 2)
    step(run, 1, "D"), step(run, 2, "D"), step(run, 1, "G")
    run.tells(1, wire.Evaluating(True))
    step(run, 2, "G")
    assert run.rounds.round is None and run.rounds.snapshot is None
    assert run.tells(1, wire.Evaluating(False)) == [
        "all <- open 3 at step 2 for 1: 0/0-10 0/20-30, 2: 0/10-20 0/30-40"
    ]


def test_samples_of_ones_own_count_once() -> None:
    run = pairs(1, 2, own=True)
    step(run, 1, "D", samples=7), step(run, 2, "D", samples=3)
    assert step(run, 1, "G", samples=6) == ["refused: 6 samples pushed for a lease of 7"]
    step(run, 1, "G", samples=7), step(run, 2, "G", samples=3)
    asks(run, 1)
    run.leave(1, "finished")
    asks(run, 2)
    assert run.sums() == "10 done, 0 partly, 0 skipped; waiting nothing"
    step(run, 2, "D", samples=4)
    run.leave(2, "finished")
    assert run.sums() == "10 done, 4 partly, 0 skipped; waiting nothing"


def test_a_pair_that_the_run_does_not_have_is_refused() -> None:
    run = pairs(1, 2)
    assert run.push(1, D) == ["refused: the run has no pair ''"]
    one = Run(observer=False).workers(1, 2)
    assert one.push(1, 0, pair="G") == ["refused: the run has no pair 'G'"]
    assert one.tells(1, wire.NextLease(1)) == []
    one.push(1), one.push(2)
    assert one.closes[-1].pair is msgspec.UNSET and one.closes[-1].open is not None
    assert one.closes[-1].open.began == 0


def test_local_steps_of_several_pairs_are_refused() -> None:
    run = Run(observer=False, num_workers=1, local_steps=4)
    run.hello(1)
    [said] = but_words(run.join(1, layout=PAIRS))
    assert "cannot make local steps" in said


def test_with_an_observer_several_pairs_are_refused_with_the_way_out() -> None:
    run = Run(num_workers=1).observer()
    run.hello(1)
    effects = run.handle(Told(session(1), wire.Join(PAIRS, 0, "fresh w1", "cpu")))
    (reject,) = (e.message for e in effects if isinstance(e, Send))
    assert isinstance(reject, wire.Reject)
    assert "worker 1 (pi) has several models" in reject.reason
    assert "the observer has one model" in reject.reason
    assert "observer=false" in reject.hint


def test_other_pairs_are_another_model() -> None:
    other = msgspec.structs.replace(LAYOUT, pairs=(("A", 1), ("B", 1)))
    assert PAIRS.difference(other) == "it is A, B, the run has G, D"
    assert PAIRS.difference(LAYOUT) == "it is one model, the run has G, D"
    assert b"pairs" not in msgspec.json.encode(LAYOUT)


@pytest.mark.parametrize(
    "told", [(("G", 1),), (("G", 2), ("D", 0)), (("G", 1), ("G", 1)), (("", 1), ("D", 1))]
)
def test_impossible_pairs_are_no_layout(told: tuple[wire.Pair, ...]) -> None:
    assert "pairs" in (msgspec.structs.replace(LAYOUT, pairs=told).problem() or "")


def test_too_many_pairs_or_too_long_a_name_are_no_message() -> None:
    for told in ((("x", 1),) * (wire.PAIRS_MAX + 1), (("x" * 65, 2),)):
        layout = msgspec.structs.replace(LAYOUT, pairs=told)
        join = wire.Join(layout=layout, step=0, lineage="", device="")
        with pytest.raises(PeerError):
            wire.from_frames(wire.to_frames(join))


def test_no_bucket_holds_parameters_of_two_pairs() -> None:
    assert [b.tensors for b in plan(LAYOUT, 1.0).buckets] == [(0, 1)]
    assert [b.tensors for b in plan(PAIRS, 1.0).buckets] == [(0,), (1,)]


def test_what_an_update_has_a_part_of_is_never_returned() -> None:
    for how, told in ((DONE, (4, 0)), (PARTLY, (0, 4)), (RETURNED, (0, 4)), (SKIPPED, (0, 4))):
        ledger = Ledger(10, 1)
        lease = ledger.lease(4)
        assert lease is not None
        ledger.begin(lease)
        ledger.finish(lease, how)
        assert (ledger.done, ledger.partly) == told and "begun" not in ledger.state()
    own = OwnLedger()
    own.begin((0, 0, 3))
    assert Ledger.from_state(own.state()).partly == own.state()["begun"] == 3
    own.settle((0, 0, 3), SKIPPED)  # of another worker
    own.finish((0, 0, 3), DONE)
    assert (own.done, own.partly, own.skipped) == (3, 0, 3)


def test_begun_samples_that_cannot_be_are_no_state() -> None:
    for begun in (-4, 4):
        with pytest.raises(ValueError, match=r"agree|cannot be right"):
            Ledger.from_state(Ledger(10, 1).state() | {"begun": begun})


def test_samples_that_cannot_be_read_are_skipped_once() -> None:
    run = pairs(1, 2)
    step(run, 1, "D", unread=(3,), samples=9), step(run, 2, "D")
    assert run.ledger.state()["begun"] == 19 and run.ledger.unread == 1
    step(run, 1, "G", unread=(3,), samples=9), step(run, 2, "G")
    asks(run, 1), asks(run, 2)
    assert run.sums() == "19 done, 0 partly, 1 skipped; waiting nothing" and run.ledger.unread == 1
