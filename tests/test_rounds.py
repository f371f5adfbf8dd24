"""The server's mind, as scripts of events and the exact effects that follow (see `scripts`)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scripts import LAYOUT, NONCE, Run, but_words, leased, session, unleased

from paramserver.protocol import messages as wire
from paramserver.protocol.messages import Lease
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.effects import Add, Finish, Say, Send
from paramserver.rounds.ending import COMING_TIMES
from paramserver.rounds.events import (
    Alive,
    Event,
    Forgotten,
    Greeted,
    Heard,
    Pushed,
    PushRefused,
    Relinked,
    StoodStill,
    Stop,
    Tick,
    Told,
)
from paramserver.rounds.ledger import KILLED, UNREAD, Ledger, Lost
from paramserver.rounds.outliers import NEEDED
from paramserver.rounds.rules import Rules
from paramserver.rounds.states import GREETED, REPLICA
from paramserver.rounds.waits import Vain

# ------------------------------------------------------------------------ samples of one's own


def of_their_own(*numbers: int) -> Run:
    run = Run(observer=False, num_workers=len(numbers)).workers()
    for who in numbers:
        run.hello(who)
        run.join(who)
        run.snapshot(who)
    for who in numbers:
        run.ready(who, own=True, samples=0)
    return run


def test_who_brings_samples_of_its_own_tells_how_many() -> None:
    run = of_their_own(1, 2)
    assert run.push(1, 0, samples=0) == ["refused: 0 samples pushed"]
    assert run.push(1, 0, samples=7) == ["add 1.0 x7"]
    assert run.push(1, 1, samples=8) == ["refused: 8 samples pushed for a lease of 7"]
    assert run.push(1, 1, samples=7) == ["add 1.1 x7"]
    assert run.push(2, 0, samples=3) == ["add 2.0 x3", "average 1.0 of 10"]
    assert but_words(run.push(2, 1, samples=3)) == [
        "add 2.1 x3",
        "average 1.1 of 10",
        "close 1 to step 1, in it 1:7 2:3; open 2 at step 1 for 1: 0/0-0 0/0-0, 2: 0/0-0 0/0-0",
    ]
    assert run.push(2, 0, samples=4, bad="not finite")[1].startswith("w2 <- refused 2")
    run.push(1, samples=5)
    assert run.sums() == "15 done, 0 partly, 4 skipped; waiting nothing"


def test_the_run_ends_when_all_who_brought_samples_have_finished() -> None:
    run = of_their_own(1, 2)
    run.push(1, samples=7), run.push(2, samples=3)
    assert but_words(run.leave(1, "finished")) == ["forget w1"]
    run.push(2, samples=3)
    assert run.sums() == "13 done, 0 partly, 0 skipped; waiting nothing"
    assert run.leave(2, "finished")[-1] == "end at step 2: every worker has finished"


def test_one_that_finished_with_nothing_in_the_log_ends_no_run_that_others_are_to_join() -> None:
    run = Run(observer=False, num_workers=2, min_workers=1, join_timeout=9.0).workers()

    def comes(who: int, now: float) -> None:
        run.hello(who), run.join(who)
        run.tick(now, who)
        run.snapshot(who)
        run.ready(who, own=True, samples=0)
        assert run.rounds.started

    comes(1, 9.0)
    run.leave(1, "finished")
    assert run.tick(25.0) == ["# paused: no worker is ready, 1 of 2 has not come yet"]
    comes(2, 30.0)
    run.push(2, samples=3)
    assert run.leave(2, "finished")[-1] == "end at step 1: every worker has finished"


def test_that_somebody_has_finished_is_not_read_off_its_reason() -> None:
    run = of_their_own(1, 2)
    run.leave(1, "that is all", finished=True)
    run.leave(2, "my last batch", finished=True)
    assert run.rounds.ended is not None
    assert run.rounds.ended.reason == "every worker has finished"


def test_the_run_does_not_end_with_one_who_was_killed() -> None:
    run = of_their_own(1, 2)
    run.leave(2, "finished")
    run.tick(5.0, 1)
    assert run.tick(15.1)[0] == "# worker 1 (pi) is gone: silent for 10.1 s"
    assert run.tick(1000.0) == [] and run.rounds.ending is None
    assert run.rounds.phase(1000.0).startswith("paused: no worker is ready")


def test_one_who_failed_may_be_started_again_before_the_run_ends_without_it() -> None:
    run = of_their_own(1, 2)
    run.leave(2, "finished")
    assert but_words(run.leave(1, "LookupError: enough", error=True)) == ["void 1", "forget w1"]
    sentence = "every worker has finished, except: worker 1 (pi) failed: LookupError: enough"
    assert run.tick(1.0) == [f"# {sentence} (the run ends in 29 s unless one comes)"]
    assert run.tick(29.9) == []
    assert run.tick(30.0)[-1] == f"end at step 0: {sentence}"


def test_of_their_own_all_may_leave_without_saying_that_they_have_finished() -> None:
    """As scripts do that forget it: their program ends, and the run a little later."""
    run = of_their_own(1, 2)
    run.push(1, samples=7), run.push(2, samples=3)
    run.leave(2, "its program ended"), run.leave(1, "its program ended")
    assert run.rounds.phase(4.0) == "every worker has left (the run ends in 6 s unless one comes)"
    assert run.tick(9.9)[0].startswith("# every worker has left")
    assert run.tick(10.0)[-1] == "end at step 1: every worker has left"


def test_of_their_own_where_all_failed_that_is_an_error() -> None:
    run = of_their_own(1, 2)
    run.leave(1, "ValueError: a", error=True), run.leave(2, "ValueError: b", error=True)
    assert run.tick(29.9) and run.rounds.ending is None
    assert run.tick(30.0)[-1] == (
        "end at step 0: no worker has finished: "
        "worker 1 (pi) failed: ValueError: a; worker 2 (pi) failed: ValueError: b (error)"
    )


def test_all_bring_samples_of_their_own_or_nobody_does() -> None:
    run = of_their_own(1, 2)
    run.hello(3), run.join(3)
    run.leave(2), run.push(1, samples=1)
    run.snapshot(3)
    [answer] = run.ready(3)
    assert answer == (
        "w3 <- reject: worker 3 (pi) brings one set that all share, the run has samples of its "
        "own, as worker 1 (pi) and 1 more"
    )
    run = Run(observer=False).workers(1, 2)
    [answer] = run.ready(2, own=True, samples=0)
    assert answer == (
        "w2 <- reject: worker 2 (pi) brings samples of its own, the run has one set that all "
        "share, as worker 1 (pi) and 1 more"
    )


# ----------------------------------------------------------------------------- the first state


def test_workers_wait_for_the_observer_whose_state_is_the_runs() -> None:
    run = Run()
    assert run.hello(1) == ["# worker 1 (pi) is here"]
    assert run.join(1) == []
    assert "waiting for the observer" in run.rounds.phase(0.0)
    assert run.hello(0) == []
    assert run.join(0) == [
        "start at step 0",
        "obs <- origin at step 0",
        "# the first state comes from the observer, at step 0",
        "w1 <- adopt at step 0",
        "obs <- give 1 of step 0",
    ]
    assert run.adopted(1, 1) == ["# worker 1 (pi) took a snapshot of step 0"]


def test_without_an_observer_the_lowest_worker_is_the_origin_when_enough_have_joined() -> None:
    run = Run(observer=False)
    assert run.rounds.phase(0.0) == "waiting for the first worker"
    run.hello(2)
    run.hello(1)
    assert run.rounds.phase(0.0) == "waiting for the first worker, which brings the model"
    assert run.join(2) == []
    assert run.rounds.phase(20.0) == (
        "waiting for 2 workers, the lowest of which gives the first weights: worker 2 (pi) joined "
        "(starts with fewer in 40 s)"
    )
    assert but_words(run.join(1)) == [
        "start at step 0",
        "w1 <- origin at step 0",
        "w2 <- adopt at step 0",
        "w1 <- give 1 of step 0",
    ]


def test_who_does_not_come_is_waited_for_once() -> None:
    """Before the first weights are chosen, and not again before the first round."""
    run = Run(observer=False, num_workers=3, join_timeout=60.0)
    run.hello(3), run.hello(2)
    run.join(3)
    run.tick(30.0, 2, 3)
    run.join(2)
    run.tick(40.0, 2, 3), run.tick(50.0, 2, 3)
    assert but_words(run.tick(59.9, 2, 3)) == []
    assert but_words(run.tick(60.0, 2, 3))[:2] == ["start at step 0", "w2 <- origin at step 0"]
    run.snapshot(3)
    assert but_words(run.ready(2)) == []
    assert but_words(run.ready(3)) == [
        "all <- open 1 at step 0 for 2: 0/0-10 0/20-30, 3: 0/10-20 0/30-40"
    ]


def test_the_worker_whose_script_says_so_is_the_origin_at_once() -> None:
    run = Run(observer=False, num_workers=4)
    for who in (1, 2, 3):
        run.hello(who)
    run.join(1)
    assert but_words(run.join(3, first=True)) == [
        "start at step 0",
        "w3 <- origin at step 0",
        "w1 <- adopt at step 0",
        "w3 <- give 1 of step 0",
    ]
    assert run.join(2, first=True) == [
        "w2 <- reject: worker 2 (pi) was to give the first weights, which are those of worker 3 "
        "(pi), whose script says the same"
    ]
    run.hello(3, "b", reachable=False)  # it was started again
    assert but_words(run.join(3, "b", first=True))[:2] == [
        "start at step 0",
        "w3b <- origin at step 0",
    ]


def test_who_says_so_too_late_or_beside_an_observer_is_refused_until_the_run_has_begun() -> None:
    run = Run(observer=False).workers(1, 2)
    run.hello(3)
    assert run.join(3, first=True) == [
        "w3 <- reject: worker 3 (pi) was to give the first weights, which are those of worker 1 "
        "(pi), which came before"
    ]
    run.push(1), run.push(2)
    run.hello(4)
    assert but_words(run.join(4, first=True)) == ["w4 <- adopt at step 1"]
    run = Run().observer()
    run.hello(1)
    assert "which are the observer's" in run.join(1, first=True)[0]


def test_the_model_that_most_have_is_the_runs() -> None:
    run = Run(observer=False, num_workers=3)
    other = wire.Layout((wire.Tensor("weight", (3, 4), "float32"), LAYOUT.tensors[1]))
    for who in (1, 2, 3):
        run.hello(who)
    run.join(1, layout=other)
    run.join(2)
    assert but_words(run.join(3)) == [
        "start at step 0",
        "w2 <- origin at step 0",
        "w1 <- reject: worker 1 (pi) has another model than worker 2 (pi): "
        "weight is 3x4 float32, the run has 3x2 float32",
        "w3 <- adopt at step 0",
        "w2 <- give 1 of step 0",
    ]


def test_effects_are_plain_values() -> None:
    run = Run()
    run.hello(1)
    assert run.handle(Told("w1", wire.Ready(samples=1, batch_size=1))) == [
        Send("w1", wire.Reject("ready before joining"))
    ]
    assert run.handle(Told("w1", wire.Goodbye("bye")))[0] == Say("worker 1 (pi) left: bye")


def test_an_event_of_one_who_is_not_here_is_ignored() -> None:
    run = Run().observer().workers(1, 2)
    run.leave(1)
    assert run.leave(1) == run.drop(1, "too late") == run.relinked(1) == run.ready(1) == []
    assert [p.id for p in run.rounds.peers.values()] == [0, 2]


def test_whom_the_server_drops_has_left_and_has_not_finished() -> None:
    run = of_their_own(1)
    assert run.drop(1, wire.FINISHED) == [
        "# worker 1 (pi) left: finished",
        "void 1",
        "# round 1 came to nothing: worker 1 (pi) left, and no other worker is left in it",
        "forget w1",
    ]
    assert run.rounds.phase(0.0).startswith("every worker has left (the run ends in 10 s")


def test_an_origin_that_resumes_brings_step_and_ledger() -> None:
    before = Ledger(100, 1)
    for _ in range(3):
        lease = before.lease(10)
        assert lease is not None
        before.settle(lease, "done")
    before.lease(10)
    run = Run()
    run.hello(0)
    assert but_words(run.join(0, step=3, lineage="old", ledger=before.state())) == [
        "start at step 3",
        "obs <- origin at step 3",
    ]
    run.workers(1, 2)
    assert run.sums() == "30 done, 0 partly, 0 skipped; waiting nothing"
    opened = run.rounds.open_message()
    assert opened is not None and opened.step == 3 and opened.lineage == "old"
    assert opened.leases == {1: ((0, 30, 40), (0, 50, 60)), 2: ((0, 40, 50), (0, 60, 70))}


def test_a_garbled_ledger_is_no_beginning_but_the_next_one_may_be() -> None:
    run = Run()
    run.hello(0)
    [answer] = run.join(0, ledger={"samples": 5})
    assert answer.startswith("obs <- reject: the checkpoint's ledger cannot be right")
    assert but_words(run.join(0)) == ["start at step 0", "obs <- origin at step 0"]


def test_a_model_without_parameters_is_no_beginning() -> None:
    run = Run()
    run.hello(0)
    [answer] = run.join(0, layout=wire.Layout(()))
    assert answer == "obs <- reject: the model cannot be trained: there is nothing to train in it"
    assert run.rounds.layout is None


def test_who_holds_the_state_follows_and_any_other_adopts() -> None:
    run = Run().observer()
    for who in (1, 2):
        run.hello(who)
    assert but_words(run.join(1, lineage="fresh obs")) == ["w1 <- follow at step 0"]
    assert but_words(run.join(2)) == ["w2 <- adopt at step 0", "obs <- give 1 of step 0"]


def test_a_first_state_that_is_lost_before_an_update_is_replaced() -> None:
    run = Run().observer()
    run.hello(1)
    run.join(1)
    assert but_words(run.leave(0)) == [
        "w1 <- abort 1: the observer left",
        "forget obs",
    ]
    assert but_words(run.join(1)) == ["w1 <- adopt at step 0"]
    assert run.rounds.phase(0.0) == "waiting for a replica that stands at step 0: nobody here does"
    run.hello(0, "b")
    assert but_words(run.join(0, "b")) == [
        "start at step 0",
        "obsb <- origin at step 0",
        "w1 <- adopt at step 0",
        "obsb <- give 2 of step 0",
    ]
    assert not run.rounds.knows(0, "fresh obs")


def test_after_an_update_a_new_replica_is_never_the_origin() -> None:
    run = Run(observer=False).workers(1, 2)
    run.push(1), run.push(2)
    run.leave(1), run.leave(2)
    run.hello(3)
    assert but_words(run.join(3)) == ["w3 <- adopt at step 1"]
    assert "nobody here does" in run.rounds.phase(0.0)


def test_another_worker_takes_over_where_the_origin_died_before_an_update() -> None:
    run = Run(observer=False)
    for who in (1, 2, 3, 4):
        run.hello(who)
        run.join(who)
    assert but_words(run.leave(1)) == [
        "w2 <- abort 1: worker 1 (pi) left",
        "forget w1",
        "start at step 0",
        "w3 <- origin at step 0",
        "w4 <- adopt at step 0",
        "w3 <- give 2 of step 0",
    ]
    assert run.rounds.lineage == "fresh w3"
    run = Run(observer=False).workers(1, 2)  # a round is open
    run.hello(3)
    run.join(3)
    run.leave(1)
    assert but_words(run.leave(2))[-3:] == [
        "forget w2",
        "start at step 0",
        "w3 <- origin at step 0",
    ]
    assert run.rounds.ledger is None


# ----------------------------------------------------------------------------- who belongs


def test_an_id_is_taken_while_its_holder_can_be_reached() -> None:
    run = Run()
    run.hello(2)
    run.now = 3.0
    assert run.hello(2, "b") == [
        "no: worker id 2 is taken by pid 100 on pi (last seen 3.0 s ago)",
    ]
    assert run.hello(2, "b", reachable=False) == ["forget w2", "# worker 2 (pi) is here"]


def test_the_same_process_may_greet_again() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1, 0)
    effects = run.hello(1, "b", nonce="process of w1")
    assert effects == ["forget w1", "# worker 1 (pi) is here"]
    assert but_words(run.push(2)) == [
        "add 2.0 x10",
        "average 1.0 of 20",
        "add 2.1 x10",
        "average 1.1 of 10",
        "close 1 to step 1, in it 1:10 2:10, late 1 (greeted again); "
        "open 2 at step 1 for 2: 0/30-40 0/20-30",
    ]
    assert run.sums() == "10 done, 10 partly, 0 skipped; waiting nothing"


def test_ids_are_given_and_have_a_range() -> None:
    run = Run(max_workers=3)
    assert run.hello(2) == ["# worker 2 (pi) is here"]
    run.handle(Greeted("any", "worker", None, "n", "mac", 1))
    peer = run.rounds.peers["any"]
    assert (peer.id, peer.name) == (1, "worker 1 (mac)")
    assert run.hello(3) == ["# worker 3 (pi) is here"]
    for wrong in (4, -1):
        [no] = run.hello(wrong)
        assert no == (f"no: worker id {wrong} is out of range: ids run from 1 to 3 (max_workers)")


def test_another_model_is_refused_with_the_difference() -> None:
    run = Run().observer()
    run.hello(1)
    other = wire.Layout((wire.Tensor("weight", (3, 4), "float32"), LAYOUT.tensors[1]))
    assert run.join(1, layout=other) == [
        "w1 <- reject: worker 1 (pi) has another model than the observer: "
        "weight is 3x4 float32, the run has 3x2 float32"
    ]
    assert run.tick(1.0) == [] and run.rounds.snapshot is None


def test_workers_that_came_before_the_origin_are_compared_with_it() -> None:
    run = Run()
    run.hello(1)
    run.join(1, layout=wire.Layout(LAYOUT.tensors[:1]))
    run.hello(0)
    assert run.join(0)[-1] == (
        "w1 <- reject: worker 1 (pi) has another model than the observer: bias 3 float32 is missing"
    )


def test_another_way_from_gradient_to_weights_is_refused() -> None:
    run = Run()
    run.hello(0)
    run.join(0, recipe="Adam lr 0.1")
    run.hello(1)
    [answer] = run.join(1, recipe="SGD lr 0.1")
    assert answer.startswith("w1 <- reject: worker 1 (pi) makes its steps in another way")
    assert run.tick(1.0) == [] and run.rounds.snapshot is None
    assert but_words(run.join(1, recipe="Adam lr 0.1"))[0] == "w1 <- adopt at step 0"


def test_another_data_set_is_refused_and_so_is_an_empty_one() -> None:
    run = Run().observer().workers(1)
    run.hello(2)
    run.join(2)
    run.snapshot(2)
    assert run.ready(2, samples=99) == [
        "w2 <- reject: worker 2 (pi) has a data set of 99 samples, the run has one of 100, as "
        "worker 1 (pi)"
    ]
    assert run.ready(2, samples=0) == ["w2 <- reject: a data set without samples"]
    assert run.ready(2, batch=0) == ["w2 <- reject: a data set without samples"]
    run = Run(num_workers=1).observer().workers(1, samples=1, batch=1)
    assert run.rounds.open_message().leases == {1: ((0, 0, 1),)}  # type: ignore[union-attr]


def before_the_first_round(*sizes: int, **ready: Any) -> tuple[Run, list[str]]:
    """Workers with data sets of these sizes; what follows when the last one is ready."""
    run = Run(observer=False, num_workers=len(sizes))
    numbers = range(1, len(sizes) + 1)
    for who in numbers:
        run.hello(who)
    for who in numbers:
        run.join(who)
    for who in numbers:
        run.snapshot(who)
    answers: list[str] = []
    for who, samples in zip(numbers, sizes, strict=True):
        assert not answers
        answers = but_words(run.ready(who, samples=samples, **ready))
    return run, answers


def test_the_mistake_of_the_first_is_its_own() -> None:
    """Until the first round most are right, then the lowest."""
    run, answers = before_the_first_round(99, 100, 100)
    assert answers == [
        "w1 <- reject: worker 1 (pi) has a data set of 99 samples, the run has one of 100, as "
        "worker 2 (pi) and 1 more"
    ]
    assert run.tick(run.rules.join_timeout, 1, 2, 3)[-1].startswith("all <- open 1 at step 0 for 2")
    assert before_the_first_round(99, 100)[1] == [
        "w2 <- reject: worker 2 (pi) has a data set of 100 samples, the run has one of 99, as "
        "worker 1 (pi)"
    ]


def test_labels_that_most_have_are_the_runs() -> None:
    run = Run(observer=False, num_workers=3).workers(1, 2)
    run.hello(3), run.join(3)
    while run.rounds.snapshot is not None:
        run.snapshot(run.rounds.peers[run.rounds.snapshot.joiner].id)
    looks = {
        who: (wire.Look(7, "1", label),) for who, label in ((1, "cat"), (2, "dog"), (3, "dog"))
    }
    run.ready(1, looks=looks[1]), run.ready(2, looks=looks[2])
    assert but_words(run.ready(3, looks=looks[3])) == [
        "w1 <- reject: sample 7 of worker 1 (pi) is cat (in 1), that of worker 2 (pi) is dog"
    ]


OTHERS: list[tuple[dict[str, Any], str]] = [
    ({"weighs": True}, "says what its batches weigh (samples=), the others do not"),
    ({"draws": "a"}, "draws its samples by weights, the others draw each once"),
    ({"looks": (wire.Look(7, "1", "cat"),)}, "sample 7 of worker 3 (pi) is cat (in 1), that of"),
]
"""What a worker may be mistaken in, or lie about, that no ledger tells."""


@pytest.mark.parametrize(("mistake", "why"), OTHERS)
def test_after_a_restart_it_is_known_what_all_have_in_common(
    mistake: dict[str, Any], why: str
) -> None:
    """Whoever is ready first would decide it, and those who are right would be refused."""
    right = {"looks": (wire.Look(7, "1", "dog"),)}
    before = Run().observer().workers(1, 2)
    assert before.rounds.data_set is not None
    before = Run(num_workers=1).observer()
    before.hello(1), before.join(1), before.snapshot(1), before.ready(1, **right)
    run = Run(recovery="name of 4", data_set=before.rounds.data_set)
    back(run, 1, 4, ledger=LEDGER)
    run.hello(3), run.join(3), run.snapshot(3)
    [refused] = but_words(run.ready(3, **{**right, **mistake}))
    assert refused.startswith("w3 <- reject") and why in refused
    assert but_words(run.ready(1, **right))[0].startswith("all <- open")


@pytest.mark.parametrize(("mistake", "why"), OTHERS)
def test_with_a_ledger_that_was_resumed_most_decide_what_all_have_in_common(
    mistake: dict[str, Any], why: str
) -> None:
    run = Run(observer=False, num_workers=3)
    right = {"looks": (wire.Look(7, "1", "dog"),)}
    for who in (1, 2, 3):
        run.hello(who)
    for who in (1, 2, 3):
        run.join(who, step=4, lineage="saved", ledger=LEDGER)
    [short] = run.ready(2, samples=90)
    assert short.startswith("w2 <- reject: worker 2 (pi) has a data set of 90 samples")
    assert run.ready(3, **{**right, **mistake}) == [] == run.ready(1, **right)
    [refused] = but_words(run.ready(2, **right))
    assert refused.startswith("w3 <- reject") and why in refused
    assert run.ledger.done == 40


def test_ready_from_one_who_lost_its_place_is_left_until_it_says_so_again() -> None:
    run = Run().observer().workers(1, 2)
    run.behind(2)
    assert run.ready(2) == []  # it was on its way when the worker got the answer
    assert but_words(run.follows(2)) == ["w2 <- follow at step 0"]
    assert run.ready(2) == []
    assert [p.id for p in run.rounds.workers_ready()] == [1, 2]


def test_ready_from_one_who_has_no_snapshot_yet_does_not_count() -> None:
    run = Run(num_workers=1).observer()
    run.hello(1)
    run.join(1)
    assert run.ready(1) == []
    assert but_words(run.snapshot(1)) == []
    assert run.rounds.workers_ready() == []
    assert run.ready(1) == ["all <- open 1 at step 0 for 1: 0/0-10 0/10-20"]


def test_ready_without_a_join_and_from_the_observer_is_refused() -> None:
    run = Run().observer()
    run.hello(1)
    assert run.ready(1) == ["w1 <- reject: ready before joining"]
    assert run.ready(0) == ["obs <- reject: ready before joining"]


def test_who_has_just_come_is_not_silent() -> None:
    run = Run()
    run.now = 50.0
    run.hello(1)
    assert run.tick(59.0) == []
    assert run.tick(60.1)[0] == "# worker 1 (pi) is gone: silent for 10.1 s"


def test_silence_is_the_end_of_a_peer_and_any_sign_of_life_keeps_it() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1)
    assert run.tick(10.0, 1)[-1].startswith("# round 1 closed with 1 of 2")
    assert run.tick(10.5, 1)[:3] == [
        "# the observer is gone: silent for 10.5 s",
        "forget obs",
        "# worker 2 (pi) is gone: silent for 10.5 s",
    ]
    assert [p.id for p in run.rounds.peers.values()] == [1]


@pytest.mark.parametrize(
    ("then", "blamed"),
    [
        ("nothing", (0, 10, 20)),
        ("another late round", (0, 10, 20)),
        ("a late push", (0, 30, 40)),
        ("it left its loop and is back", None),
        ("it greets again", None),
    ],
)
def test_who_falls_silent_died_of_the_lease_that_it_was_not_done_with(
    then: str, blamed: Lease | None
) -> None:
    """Before it is noticed rounds close without it, and the next leases it has never seen."""
    run = Run(epochs=10).observer().workers(1, 2)
    assert run.lease(2) == (0, 10, 20)
    run.push(1), run.tick(1.0, 0, 1, 2)
    assert run.lease(2) == (0, 30, 40)
    match then:
        case "another late round":
            run.push(1), run.tick(2.0, 0, 1, 2)
        case "a late push":
            assert run.push(2, round=1) == ["refused: round 1 is not open; round 2 is"] * 2
        case "it left its loop and is back":
            run.unready(2), run.ready(2)
        case "it greets again":
            run.hello(2, "b", nonce="process of w2")
    run.tick(12.1, 0, 1)
    assert [s.lease for s in run.ledger._suspects.values()] == ([blamed] if blamed else [])


def test_after_a_void_round_its_members_may_compute_their_leases_still() -> None:
    run = Run(num_workers=1, epochs=10).observer().workers(2)
    run.hello(1), run.join(1)
    alive(run, 30.0, 0, 1, 2)  # void: worker 1 waits for a snapshot
    run.snapshot(1), run.ready(1)
    assert run.rounds.peers["w2"].late_with == (0, 0, 10)


# ----------------------------------------------------------------------------- rounds


def test_a_round_is_added_averaged_and_closed_bucket_by_bucket() -> None:
    run = Run().observer()
    run.workers(1)
    run.hello(2)
    run.join(2)
    run.snapshot(2)
    assert run.ready(2) == ["all <- open 1 at step 0 for 1: 0/0-10 0/20-30, 2: 0/10-20 0/30-40"]
    assert run.push(1, 0) == ["add 1.0 x10"]
    assert run.push(2, 0) == ["add 2.0 x10", "average 1.0 of 20"]
    assert run.push(2, 1) == ["add 2.1 x10"]
    assert run.push(1, 1) == [
        "add 1.1 x10",
        "average 1.1 of 20",
        "close 1 to step 1, in it 1:10 2:10; "
        "open 2 at step 1 for 1: 0/20-30 0/40-50, 2: 0/30-40 0/50-60",
    ]


def test_the_close_names_all_that_a_replica_must_hold() -> None:
    run = Run().observer().workers(1, 2)
    run.now = 0.5
    run.push(1, loss=1.0), run.push(2, loss=2.0)
    [close] = run.closes
    assert (close.nonce, close.round, close.step) == (NONCE, 1, 1)
    assert (close.buckets, close.contributors, close.late) == ((0, 1), {1: 10, 2: 10}, {})
    assert (close.loss, close.seconds, close.reason, close.partly) == (1.5, 0.5, "", {})
    assert close.ledger == {
        "samples": 100,
        "epochs": 1,
        "head": (0, 40),
        "waiting": [(0, 20, 30), (0, 30, 40)],  # a restart would lease them again
        "done": 20,
        "partly": 0,
        "skipped": 0,
    }
    assert close.lineage == wire.next_lineage("fresh obs", close) == run.rounds.lineage
    assert close.open == run.rounds.open_message()
    assert run.rounds.knows(1, close.lineage) and run.rounds.knows(0, "fresh obs")
    assert run.handle(Forgotten(1)) == []
    assert not run.rounds.knows(0, "fresh obs") and run.rounds.knows(1, close.lineage)


def test_averages_and_losses_are_weighted_by_what_workers_say_where_all_say_it() -> None:
    run = Run(buckets=1).observer()
    for who in (1, 2):
        run.hello(who), run.join(who), run.snapshot(who), run.ready(who, weighs=True)
    assert run.push(1) == ["refused: it says no weight"]
    assert run.push(1, weight=300, loss=1.0) == ["add 1.0 x300"]
    assert run.push(2, weight=100, loss=2.0)[:2] == ["add 2.0 x100", "average 1.0 of 400"]
    assert run.closes[0].loss == 1.25 and run.closes[0].contributors == {1: 10, 2: 10}
    assert run.sums().startswith("20 done")
    run.hello(3), run.join(3), run.push(1, weight=1), run.push(2, weight=1), run.snapshot(3)
    assert run.ready(3) == [
        "w3 <- reject: worker 3 (pi) does not say what its batches weigh (samples=), the others "
        "do, as worker 1 (pi) and 1 more"
    ]


def test_all_workers_draw_alike_and_what_is_drawn_is_not_named_as_samples() -> None:
    run = Run(num_workers=1).observer()
    run.hello(1), run.join(1), run.snapshot(1), run.ready(1, draws="a", samples=50)
    for who, ready, why in (
        (2, {"draws": "b"}, "draws its samples by other weights than the run"),
        (3, {}, "draws each sample once, the others draw by weights"),
        (4, {"draws": "a", "samples": 60}, "has 60 draws in an epoch, the run has 50"),
    ):
        run.hello(who), run.join(who), run.push(1), run.snapshot(who)
        assert run.ready(who, **{"samples": 50, **ready}) == [
            f"w{who} <- reject: worker {who} (pi) {why}, as worker 1 (pi)"
        ]
    run = Run(num_workers=1).observer()
    run.hello(1), run.join(1), run.snapshot(1), run.ready(1)
    run.hello(2), run.join(2), run.push(1), run.snapshot(2)
    assert run.ready(2, draws="a") == [
        "w2 <- reject: worker 2 (pi) draws its samples by weights, the others draw each once, as "
        "worker 1 (pi)"
    ]


@pytest.mark.parametrize("draws", ["", "a"])
def test_what_is_drawn_in_one_epoch_is_not_looked_for_in_the_next(draws: str) -> None:
    run = Run(num_workers=1, epochs=2).observer()
    run.rounds._leases.name_samples = lambda n, lease: f"the samples {lease} of {n}"
    run.rounds._leases._places = lambda n, lease, epoch: [7]
    run.hello(1), run.join(1), run.snapshot(1), run.ready(1, draws=draws)
    ledger = run.rounds.ledger
    assert ledger is not None
    ledger.lost.append(Lost((0, 3, 4), KILLED))
    assert ledger._avoided(1) == ([] if draws else [7])
    named = "place 3 of epoch 0's draws: " if draws else "the samples (0, 3, 4) of 100 (place 3"
    assert run.rounds.lost_by_name()[0].startswith(named)


def test_before_the_first_round_most_decide_how_samples_are_drawn() -> None:
    run = Run(num_workers=3).observer()
    said = list[str]()
    for who, draws in ((1, "a"), (2, "b"), (3, "b")):
        run.hello(who), run.join(who), run.snapshot(who)
        said += run.ready(who, draws=draws)
    assert any("w1 <- reject: worker 1 (pi) draws its samples by other weights" in s for s in said)


def test_a_weight_is_the_same_in_every_bucket_and_of_no_use_where_none_is_asked_for() -> None:
    run = Run().observer().workers(1, 2)
    assert run.push(1, 0, weight=5) == ["refused: it says a weight, unlike the others"]
    run = Run(num_workers=1).observer()
    run.hello(1), run.join(1), run.snapshot(1), run.ready(1, weighs=True)
    run.push(1, 0, weight=5)
    assert run.push(1, 1, weight=6) == ["refused: another weight than in the bucket before"]


def test_averages_and_losses_are_weighted_by_samples() -> None:
    run = Run(epochs=1).observer().workers(1, 2, samples=14)
    assert run.push(1, loss=1.0) == ["add 1.0 x10", "add 1.1 x10"]
    effects = run.push(2, loss=3.5)
    assert effects[:2] == ["add 2.0 x4", "average 1.0 of 14"]
    assert run.closes[0].loss == pytest.approx((10 * 1.0 + 4 * 3.5) / 14)


def test_a_loss_that_is_no_number_and_one_that_is_not_told_do_not_count() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1, loss=math.nan), run.push(2, loss=2.0)
    run.push(1), run.push(2)
    assert [c.loss for c in run.closes] == [2.0, None]


def test_a_parameter_is_absent_where_nobody_had_a_gradient() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1, 0, absent=(0, 1))
    assert run.push(2, 0, absent=(1,)) == ["add 2.0 x10", "average 1.0 of 20 without (1,)"]
    run.push(1, 1, absent=(1,))
    assert run.push(2, 1)[1] == "average 1.1 of 20"


def test_a_lease_is_held_two_ahead_and_returned_ones_go_first() -> None:
    run = Run().observer().workers(1, 2)
    assert run.rounds.open_message().leases == {  # type: ignore[union-attr]
        1: ((0, 0, 10), (0, 20, 30)),
        2: ((0, 10, 20), (0, 30, 40)),
    }
    run.leave(2)  # both of its leases come back
    assert but_words(run.push(1))[-1] == (
        "close 1 to step 1, in it 1:10, late 2 (left); open 2 at step 1 for 1: 0/20-30 0/10-20"
    )
    assert run.sums() == "10 done, 0 partly, 0 skipped; waiting 0/30-40"


def test_sums_are_in_the_order_of_ids_where_that_is_asked_for() -> None:
    run = Run(deterministic=True, num_workers=3).observer().workers(1, 2, 3)
    assert run.push(3, 0) == []
    assert run.push(1, 0) == ["add 1.0 x10"]
    assert run.push(2, 0) == ["add 2.0 x10", "add 3.0 x10", "average 1.0 of 30"]
    assert run.push(2, 1) == [] and run.push(3, 1) == []
    assert but_words(run.leave(1)) == [  # its turn passes
        "add 2.1 x10",
        "add 3.1 x10",
        "average 1.1 of 20",
        "forget w1",
        "close 1 to step 1, in it 1:10 2:10 3:10, late 1 (left); "
        "open 2 at step 1 for 2: 0/40-50 0/30-40, 3: 0/50-60 0/60-70",
    ]
    run = Run(deterministic=True, timeout=None).observer().workers(1, 2)
    assert run.wait_s() == math.inf


# ----------------------------------------------------------------------------- who is late


def test_after_quorum_and_timeout_a_round_closes_without_the_late() -> None:
    run = Run(timeout=0.5).observer().workers(1, 2)
    run.now = 2.0
    assert run.rounds.next_deadline() is None
    run.push(1)
    assert run.rounds.next_deadline() == 2.5
    assert run.tick(2.4, 0, 1, 2) == []
    assert run.tick(2.5, 0, 1) == [
        "average 1.0 of 10",
        "average 1.1 of 10",
        "close 1 to step 1, in it 1:10, late 2 (late (last seen 0.1 s ago)); "
        "open 2 at step 1 for 1: 0/20-30 0/10-20, 2: 0/30-40 0/40-50",
        "# round 1 closed with 1 of 2: worker 2 (pi) late (last seen 0.1 s ago)",
    ]
    assert run.push(2, 0, round=1) == ["refused: round 1 is not open; round 2 is"]


def test_who_is_late_is_told_when_it_changes() -> None:
    run = Run(timeout=0.0).observer().workers(1, 2)
    words = []
    for late in (True, True, False, True):
        run.push(1)
        effects = run.tick(run.now + 1) if late else run.push(2)
        words.append([e for e in effects if e.startswith("#")])
    assert [len(w) for w in words] == [1, 0, 1, 1]
    assert words[2] == ["# round 3 closed with worker 2 (pi) again"]
    assert "usually within 1.00 s" in words[3][0]


def test_a_late_one_that_is_given_up_is_not_said_to_be_back() -> None:
    run = Run(timeout=0.0, min_workers=1).observer().workers(1, 2)
    run.push(1)
    assert any("late" in e for e in run.tick(run.now + 1) if e.startswith("#"))
    run.leave(2)
    assert not [e for e in run.push(1) if e.startswith("#")]


def test_what_was_pushed_in_time_stays_in_and_is_counted_once() -> None:
    run = Run(timeout=0.5).observer().workers(1, 2)
    run.push(1)
    assert run.push(2, 0) == ["add 2.0 x10", "average 1.0 of 20"]
    assert "average 1.1 of 10" in run.tick(1.0)
    assert run.sums() == "10 done, 10 partly, 0 skipped; waiting nothing"
    assert run.closes[0].contributors == {1: 10, 2: 10}
    assert run.closes[0].partly == {2: (0,)}


@pytest.mark.parametrize(
    ("quorum", "pushed", "due"),
    [(0.0, 0, False), (0.0, 1, True), (0.5, 1, False), (0.5, 2, True), (1.0, 3, False)],
)
def test_the_timeout_runs_from_the_quorum_on(quorum: float, pushed: int, due: bool) -> None:
    run = Run(num_workers=4, quorum=quorum).observer().workers(1, 2, 3, 4)
    for who in range(1, pushed + 1):
        run.push(who)
    assert (run.rounds.next_deadline() is not None) == due


def test_a_quorum_is_one_of_those_who_are_still_expected() -> None:
    run = Run(num_workers=4).observer().workers(1, 2, 3, 4)
    run.push(1)
    run.leave(2)
    assert run.rounds.next_deadline() is None  # 1 of 3
    run.leave(3)
    assert run.rounds.next_deadline() == 1.0  # 1 of 2: worker 4 is not waited for without end
    run.push(4, 0)
    assert "close 1 to step 1, in it 1:10 4:10, late 2 (left), 3 (left), 4 (late" in " ".join(
        run.tick(1.0)
    )


def test_the_derived_timeout_covers_a_steady_slow_machine_and_no_sudden_one() -> None:
    run = Run(timeout=None, epochs=100).observer().workers(1, 2)
    run.now = 0.5
    run.push(1)
    assert run.wait_s() == 30.0  # nothing is known of worker 2 yet
    run.now = 2.0
    run.push(2)
    assert run.wait_s() == pytest.approx(6.0)  # three times its 2 s
    for _ in range(66):
        run.now += 0.01
        run.push(1), run.push(2)
    assert run.wait_s() == 1.0  # never less
    run.push(1)
    run.tick(run.now + 1.5, 0, 1, 2)
    assert run.wait_s() == 1.0  # one slow push of many is no habit
    for _ in range(5):
        run.push(1)
        run.tick(run.now + 20.0, 0, 1, 2)
    assert run.wait_s() == 30.0  # a late push counts as taking until it was given up


def members(run: Run) -> list[int]:
    """Of the open round."""
    assert run.rounds.round is not None
    return sorted(run.rounds.round.members)


def rounds_of_one(run: Run, count: int) -> list[str]:
    """Worker 1 pushes for some rounds, each of which waits for the others as long as rounds do."""
    effects: list[str] = []
    for _ in range(count):
        effects += run.push(1)
        if run.rounds.next_deadline() is not None:
            effects += run.tick(run.rounds.next_deadline() or 0.0, 0, 1, 2)
    return effects


@pytest.mark.parametrize(("timeout", "rounds"), [(20.0, 3), (3.0, 10)])
def test_who_brings_nothing_however_long_they_wait_is_left_out_for_as_long(
    timeout: float, rounds: int
) -> None:
    """After three rounds, and three heartbeat timeouts of waiting in all."""
    run = Run(epochs=1000, timeout=timeout, idle_timeout=1e6).observer().workers(1, 2)
    waited_s = timeout * rounds
    assert not [e for e in rounds_of_one(run, rounds - 1) if "go on without" in e]
    for times in (1, 2, 4, 8, 10, 10):
        [said] = [e for e in rounds_of_one(run, 1) if "go on without" in e]
        began, rest_s = run.now, times * waited_s
        assert f"rounds go on without it for {rest_s:.0f} s" in said
        while run.now < began + rest_s:
            run.push(1)
            assert not run.closes[-1].late and 2 not in members(run), "nobody waits for it"
            run.tick(run.now + 5.0, 0, 1, 2)
        again = math.ceil(30.0 / timeout)  # it is given as much time again
        waited_s = timeout * again
        run.push(1)
        assert 2 in members(run)
        rounds_of_one(run, again - 1)
    run.push(1), run.push(2)  # it is there
    assert run.closes[-1].contributors == {1: 10, 2: 10}
    assert not [e for e in rounds_of_one(run, rounds - 1) if "go on without" in e], "it begins anew"


def test_of_a_round_only_the_time_after_its_quorum_was_waited_in_vain() -> None:
    run = Run(epochs=1000, timeout=10.0).observer().workers(1, 2)
    for _ in range(3):
        run.now += 7.0  # that worker 1 needs
        run.all_seen()
        said = rounds_of_one(run, 1)
    assert "without it for 30 s" in " ".join(said)


def test_who_brings_nothing_to_rounds_of_local_steps_is_left_out_too() -> None:
    """Although such a round may take minutes, it waited as long as it does after its quorum."""
    rules = {"local_steps": 2, "timeout": None, "idle_timeout": 1e6}
    run = Run(epochs=1000, **rules).observer().workers(1, 2)
    assert not [e for e in rounds_of_one(run, 2) if "go on without" in e]
    assert "without it for 90 s" in " ".join(rounds_of_one(run, 1))
    run.push(1)
    assert members(run) == [1]


def test_who_is_left_out_does_not_hold_up_a_round_of_local_steps_for_minutes() -> None:
    """It is in one only since nobody else was here, and had minutes before."""
    rules = {"local_steps": 2, "timeout": None, "idle_timeout": 1000.0}
    run = Run(epochs=1000, **rules).observer().workers(1, 2)
    run.rounds._waits.vain = {2: Vain(until=900.0)}
    run.tells(1, wire.Unready()), run.ready(1)
    assert run.tick(29.0, 0, 1, 2) == []
    said = run.tick(30.0, 0, 1, 2)
    assert any("has waited 30 s for worker 2" in sentence for sentence in said)
    assert members(run) == [1]


def test_who_is_late_now_and_then_takes_part_in_every_round() -> None:
    run = Run(epochs=1000).observer().workers(1, 2)
    for _ in range(10):
        rounds_of_one(run, 2)
        run.push(2, 0)
        rounds_of_one(run, 1)
    assert 2 in members(run)


def test_nobody_is_left_out_where_too_few_would_be_left() -> None:
    run = Run(epochs=1000, min_workers=2).observer().workers(1, 2)
    rounds_of_one(run, 8)
    assert all(2 in close.late for close in run.closes)


def test_where_too_few_would_be_left_the_one_is_asked_that_rests_the_least() -> None:
    """Not all of them: one that never brings anything would hold up every round."""
    run = Run(epochs=1000, min_workers=2).observer().workers(1, 2, 3)
    run.rounds._waits.vain = {3: Vain(until=81.0), 1: Vain(until=11.0)}
    run.push(2), run.push(3), run.tick(1.0, 0, 1, 2, 3)
    run.rounds._waits.vain[3] = Vain(until=81.0)
    assert members(run) == [1, 2]
    run.push(1), run.push(2)
    assert 1 not in run.rounds._waits.vain, "it brought something, and takes part again"


def test_a_new_greeting_is_no_new_beginning_for_who_brings_nothing() -> None:
    run = Run(epochs=1000, timeout=10.0).observer().workers(1, 2)
    rounds_of_one(run, 2)
    run.hello(2, "b", reachable=False), run.follows(2, "b"), run.ready(2, "b")
    run.push(1)
    assert members(run) == [1, 2]
    run.push(1)
    run.heard(2, "b")
    said = run.tick(run.rounds.next_deadline() or 0.0, 0, 1)
    assert "without it for 30 s" in " ".join(said)
    run.hello(2, "c", reachable=False), run.follows(2, "c"), run.ready(2, "c")
    for _ in range(3):
        run.push(1)
        assert members(run) == [1], "it is left out still"


# ------------------------------------------------------------------- rounds that wait in vain


def alive(run: Run, seconds: float, *who: int, every: float = 5.0) -> list[str]:
    """Time passes, and these beat."""
    effects: list[str] = []
    until = run.now + seconds
    while run.now < until:
        effects += run.tick(min(until, run.now + every), *who)
    return effects


def test_a_round_whose_members_bring_nothing_is_void_where_another_waits_for_a_snapshot() -> None:
    run = Run(num_workers=1, epochs=10).observer().workers(2)
    run.hello(1), run.join(1)
    assert but_words(alive(run, 29.9, 0, 1, 2)) == []
    awaited = "has waited 30 s for worker 2 (pi) (last seen 0.0 s ago)"
    assert run.tick(30.0, 0, 1, 2) == [
        "void 1",
        f"# round 1 came to nothing: {awaited}, while worker 1 (pi) could take part",
        "obs <- give 2 of step 0",
    ]
    assert run.adopted(1, 2)[1].startswith("all <- open 2 at step 0 for 2")
    run.ready(1)
    void, _, opened = alive(run, 30.0, 0, 1, 2)
    assert void == "void 2" and "for 1: 0/10-20 0/20-30, 2: 0/0-10" in opened
    run.push(1)
    assert "rounds go on without it for 61 s" in " ".join(alive(run, 2.0, 0, 1, 2))
    assert run.closes[-1].contributors == {1: 10}


def test_one_that_computes_for_minutes_is_awaited_where_nobody_else_could_go_on() -> None:
    """Its first batch compiles. That it is awaited is said once."""
    run = Run(epochs=10, timeout=None).observer().workers(1, 2)
    said = alive(run, 900.0, 0, 1, 2)
    assert said == [
        "# round 1 has waited 30 s for worker 1 (pi) (last seen 0.0 s ago), "
        "worker 2 (pi) (last seen 0.0 s ago)"
    ]
    run.push(1), run.push(2)
    assert run.closes[-1].contributors == {1: 10, 2: 10}
    run.leave(0)
    said = alive(run, 1800.1, 1, 2)
    awaited = [f"worker {n} (pi) (last seen 0.0 s ago)" for n in (1, 2)]
    assert f"s: round 2 has waited 1800 s for {', '.join(awaited)} (error)" in said[-1]


@pytest.mark.parametrize(("idle_timeout", "most"), [(1800.0, 120.0), (150.0, 75.0)])
def test_who_comes_again_and_again_does_not_take_a_slow_workers_time(
    idle_timeout: float, most: float
) -> None:
    """Each round that was in vain makes the next one more patient, until something is closed. The
    others come in before the run is given up: a round that is void at that moment helps nobody."""
    run = Run(num_workers=1, epochs=10, observer=False, idle_timeout=idle_timeout).workers(1)
    run.hello(2)
    waits = []
    for number in range(1, 6):
        run.relinked(2), run.follows(2), run.ready(2)  # it takes its part in no round
        began = run.now
        while run.rounds.round is not None and run.rounds.round.number == number:
            run.tick(run.now + 5.0, 1, 2)
        waits.append(run.now - began)
    run.relinked(2), run.follows(2), run.ready(2)
    assert [w for w in waits if w] == [30.0, 30.0, 60.0, most]  # once it had its turn alone
    run.push(1)
    assert run.closes[-1].contributors == {1: 10}


def test_a_run_in_which_a_worker_died_of_its_samples_waits_for_it_before_it_is_given_up() -> None:
    run = Run(num_workers=1, epochs=10, idle_timeout=50.0).observer().workers(1, 2)
    alive(run, 40.0, 0, 1, 2)  # neither of them pushes
    run.dies(1)
    run.hello(1), run.join(1)
    said = alive(run, 49.0, 0, 1, 2)  # 30 s of them for worker 2, which does not push
    assert run.rounds.ending is None
    assert "obs <- give 3 of step 0" in said


def test_a_round_that_waits_in_vain_is_void_also_where_snapshots_were_wasted() -> None:
    """They wait as long as rounds go on; one in which nobody pushes does not."""
    run = Run(num_workers=1, epochs=10, idle_timeout=1000.0).observer().workers(1)
    for _ in range(10):
        run.rounds._snapshots.waste.wasted(3, run.now)
    assert run.rounds._snapshots.waste.next_at == 160.0
    run.hello(2), run.join(2)
    effects = alive(run, 30.0, 0, 1, 2)
    assert "void 1" in effects and effects[-1] == "obs <- give 2 of step 0"


def test_a_round_with_one_that_is_left_out_does_not_begin_just_before_another_is_ready() -> None:
    run = Run(num_workers=1, epochs=1000).observer().workers(1)
    run.hello(2), run.join(2)
    run.push(1)  # and worker 2 takes a snapshot
    run.rounds._waits.vain = {1: Vain(until=81.0)}
    run.snapshot(2)
    assert run.rounds.round is None
    run.ready(2)
    assert members(run) == [2]
    run.hello(3), run.join(3)
    run.push(2), run.leave(2), run.snapshot(3)
    run.rounds._waits.vain = {1: Vain(until=81.0)}
    run.tick(9.9, 0, 1, 3)
    assert run.rounds.round is None
    run.tick(10.0, 0, 1, 3)
    assert members(run) == [1], "it does not come: whoever there is"


def test_a_round_whose_pushes_come_slowly_is_not_given_up() -> None:
    """Its members are heard, and it comes nearer to its end."""
    run = Run(num_workers=1, buckets=4, epochs=10, idle_timeout=100.0).observer().workers(1)
    for bucket in range(4):
        alive(run, 90.0, 0, 1)
        run.push(1, bucket)
    assert run.rounds.ending is None and run.closes[-1].contributors == {1: 10}
    alive(run, 100.1, 0, 1)
    assert run.rounds.ending is not None and "nothing happened for 100 s" in run.rounds.ending[0]


def test_the_end_names_its_run() -> None:
    rounds = Rounds(Rules(), NONCE, 0.0, lambda layout: 1, run="run-1")
    rounds.handle(Stop("enough"), 0.0)
    assert rounds.ended is not None and rounds.ended.run == "run-1"


def test_who_says_again_and_again_that_it_is_ready_keeps_no_run_alive() -> None:
    run = Run(num_workers=2, min_workers=2, epochs=10, idle_timeout=100.0).observer().workers(1, 2)
    run.push(1)
    run.push(2)
    run.leave(2)
    for second in range(1, 100 * COMING_TIMES + 2):
        assert run.rounds.ending is None
        run.unready(1)
        run.ready(1)
        run.tick(float(second), 0, 1)
    assert run.rounds.ending is not None and "nothing happened for 100 s" in run.rounds.ending[0]


def test_nor_before_the_first_round() -> None:
    run = Run(num_workers=2, idle_timeout=100.0, join_timeout=50.0).observer().workers(1)
    for second in range(1, 100 * COMING_TIMES + 2):
        assert run.rounds.ending is None
        run.unready(1)
        run.ready(1)
        run.tick(float(second), 0, 1)
    assert run.rounds.ending is not None and "nothing happened for 100 s" in run.rounds.ending[0]


@pytest.mark.parametrize("rules", [{"quorum": 1.0, "timeout": None}, {"deterministic": True}])
def test_where_all_are_to_be_in_it_one_that_never_pushes_costs_half_of_idle_timeout(
    rules: dict[str, Any],
) -> None:
    run = Run(epochs=10, idle_timeout=600.0, **{"timeout": None, **rules}).observer()
    run.workers(1, 2)
    run.push(1)
    assert len(alive(run, 299.0, 0, 1, 2)) == 1, "who is awaited is said, no more"
    assert not run.closes
    alive(run, 1.0, 0, 1, 2)
    assert run.closes[-1].contributors == {1: 10} and 2 in run.closes[-1].late
    for _ in range(2):
        run.push(1)
        alive(run, 300.0, 0, 1, 2)
    run.push(1)
    assert len(run.closes) == 4, "it rests: nobody waits for it"


def test_a_deterministic_run_lets_a_newcomer_wait_longer() -> None:
    run = Run(num_workers=1, epochs=10, deterministic=True, timeout=None, idle_timeout=600.0)
    run.observer().workers(2)
    run.hello(1), run.join(1)
    alive(run, 299.0, 0, 1, 2)
    assert run.rounds.round is not None and run.rounds.round.number == 1
    assert "void 1" in alive(run, 1.0, 0, 1, 2)


def test_a_round_that_waits_for_one_most_of_the_time_has_a_sentence() -> None:
    run = Run(epochs=1000).observer().workers(1, 2)
    said: list[str] = []
    for _ in range(50):
        run.now += 0.02
        run.push(1)
        run.now += 0.9
        said += run.push(2)
    assert [e for e in said if "every round waits" in e] == [
        "# every round waits 0.90 s for worker 2 (pi): the others are done after 0.02 s"
    ]
    assert run.rounds.prompted == {"w2"}


def test_who_fetches_nearly_every_update_is_named_and_told_on_its_link() -> None:
    run = Run(epochs=1000).observer().workers(1, 2)
    said: list[str] = []
    for _ in range(45):
        newest = wire.Fetch(run.rounds.step, run.rounds.lineage)
        assert run.tells(2, newest) == run.tells(2, newest) == []
        if len(run.closes) % 3 == 0:
            assert run.tells(1, newest) == []
        run.push(1)
        said += run.push(2)
    assert [e for e in said if "fetches" in e] == [
        "# worker 2 (pi) fetches nearly every update: it seems to get nothing of what is published "
        "(is the port after the server's blocked?); it gets them by its own link instead"
    ]
    assert run.rounds.deaf == {"w2"}
    run.leave(2)
    assert run.rounds.deaf == set()


# ----------------------------------------------------------------------------- who dies


def test_who_dies_before_its_push_gives_its_lease_back() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1)
    effects = but_words(run.leave(2))
    assert effects[-1].startswith("close 1 to step 1, in it 1:10, late 2 (left)")
    assert run.sums() == "10 done, 0 partly, 0 skipped; waiting 0/30-40"
    assert run.ledger._leased == {(0, 20, 30), (0, 10, 20)}


def test_who_dies_in_its_push_has_its_samples_counted_as_partly() -> None:
    run = Run().observer().workers(1, 2)
    run.push(2, 1)
    run.leave(2)
    assert but_words(run.push(1))[:4] == [
        "add 1.0 x10",
        "average 1.0 of 10",
        "add 1.1 x10",
        "average 1.1 of 20",
    ]
    assert run.sums() == "10 done, 10 partly, 0 skipped; waiting nothing"


def test_who_dies_after_its_push_is_in_the_update() -> None:
    run = Run().observer().workers(1, 2)
    run.push(2)
    run.leave(2)
    run.push(1)
    assert run.closes[0].contributors == {1: 10, 2: 10} and run.closes[0].late == {}
    assert run.sums() == "20 done, 0 partly, 0 skipped; waiting nothing"


def test_a_round_that_somebody_finished_is_closed_though_all_have_left() -> None:
    run = Run().observer().workers(1, 2)
    run.push(2)
    run.leave(2)
    assert but_words(run.leave(1))[:3] == ["average 1.0 of 10", "average 1.1 of 10", "forget w1"]
    assert run.closes[0].contributors == {2: 10}
    assert run.sums() == "10 done, 0 partly, 0 skipped; waiting 0/0-10 0/20-30 0/30-40"


def test_a_greeting_that_ends_a_part_may_close_the_round() -> None:
    run = Run().observer().workers(1, 2)
    run.push(2)
    effects = but_words(run.hello(1, "b", nonce="process of w1"))
    assert effects[-1].startswith("close 1 to step 1, in it 2:10, late 1 (greeted again)")


def test_a_round_without_a_member_left_is_void_and_its_leases_come_back() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1, 0), run.push(2, 0)
    run.leave(1)
    assert run.leave(2) == [
        "# worker 2 (pi) left: it was stopped",
        "void 1",
        "# round 1 came to nothing: worker 2 (pi) left, and no other worker is left in it",
        "forget w2",
    ]
    assert run.sums() == ("0 done, 0 partly, 0 skipped; waiting 0/0-10 0/10-20 0/20-30 0/30-40")
    assert run.rounds.step == 0
    run.workers(3)
    assert run.rounds.open_message().round == 2  # type: ignore[union-attr]
    assert run.rounds.open_message().leases == {3: ((0, 0, 10), (0, 10, 20))}  # type: ignore[union-attr]


def test_a_restarted_worker_is_in_from_the_next_round_on() -> None:
    run = Run().observer().workers(1, 2)
    run.hello(2, "b", reachable=False)
    assert run.join(2, "b") == ["w2b <- adopt at step 0"]  # not while a round is open
    assert run.push(2, 0, life="b") == ["refused: worker 2 (pi) has no lease in round 1"]
    assert but_words(run.push(1))[-2:] == [
        "close 1 to step 1, in it 1:10, late 2 (greeted again)",
        "obs <- give 3 of step 1",
    ]
    assert run.snapshot(2, "b") == [
        "# worker 2 (pi) took a snapshot of step 1",
        "all <- open 2 at step 1 for 1: 0/20-30 0/10-20",
    ]
    run.ready(2, "b")
    close = but_words(run.push(1))[-1]
    assert close.endswith("open 3 at step 2 for 1: 0/10-20 0/40-50, 2: 0/30-40 0/50-60")


# ----------------------------------------------------------------------------- bad pushes


def test_a_bad_gradient_is_refused_and_its_samples_are_skipped() -> None:
    run = Run().observer().workers(1, 2)
    assert run.push(2, 0, bad="not finite") == [
        "# round 1: worker 2 (pi) refused: not finite",
        "w2 <- refused 1: not finite",
    ]
    assert run.push(2, 1) == ["refused: a bucket of this round was refused: not finite"]
    assert "close 1 to step 1, in it 1:10, late 2 (not finite)" in run.push(1)[-2]
    assert run.sums() == "10 done, 0 partly, 10 skipped; waiting nothing"
    assert 2 in run.rounds.open_message().leases  # type: ignore[union-attr]


def test_after_a_good_bucket_a_bad_one_makes_it_partly() -> None:
    run = Run().observer().workers(1, 2)
    run.push(2, 0)
    run.push(2, 1, bad="not finite")
    run.push(1)
    assert run.sums() == "10 done, 10 partly, 0 skipped; waiting nothing"


def test_when_all_are_bad_the_step_is_empty_and_does_not_come_back() -> None:
    run = Run(buckets=1).observer().workers(1, 2)
    run.push(1, bad="not finite")
    effects = run.push(2, bad="not finite")
    assert "close 1 to step 1, in it nobody, late 1 (not finite), 2 (not finite)" in " ".join(
        effects
    )
    assert run.closes[0].buckets == ()
    assert run.sums() == "0 done, 0 partly, 20 skipped; waiting nothing"


def test_nothing_but_bad_gradients_ends_the_run_with_the_reason() -> None:
    run = Run(buckets=1, max_bad_rounds=3).observer().workers(1, 2, samples=1000)

    def bad_rounds(count: int) -> None:
        for _ in range(count):
            run.push(1, bad="not finite")
            run.push(2, bad="not finite")

    bad_rounds(2)
    run.push(1, bad="not finite")
    run.push(2)  # a good one: the counting begins anew
    bad_rounds(2)
    assert run.rounds.ending is None
    bad_rounds(1)
    why = (
        "3 rounds in a row brought nothing but gradients that had to be refused: "
        "round 6 closed with 0 of 2: worker 1 (pi) not finite; worker 2 (pi) not finite"
    )
    assert run.rounds.ending == (why, True)
    assert run.rounds.round is None and len(run.closes) == 6
    assert run.sums().startswith("10 done, 0 partly, 110 skipped")


def back(run: Run, who: int, step: int, ledger: Any = None) -> list[str]:
    """A worker comes back to a server that was started again."""
    run.hello(who, returns=True)
    return run.join(who, step=step, lineage=f"name of {step}", ledger=ledger)


LEDGER = Ledger(100, 1).state() | {"head": (0, 40), "done": 40}


def test_a_run_goes_on_where_its_most_advanced_replica_stands() -> None:
    run = Run(recovery="name of 4", num_workers=3)
    run.hello(0)
    run.join(0)  # the new observer is no origin: it knows nothing of the run
    assert back(run, 1, 3) == []
    assert run.rounds.phase(0.0) == (
        "waiting for the replicas of this run to come back: worker 1 (pi) here"
    )
    told = back(run, 2, 4, ledger=LEDGER)
    assert "# the run goes on after step 4, where worker 2 (pi) stands" in told
    assert run.rounds.step == 4 and run.sums() == "40 done, 0 partly, 0 skipped; waiting nothing"
    assert [run.rounds.peers[name].state for name in ("obs", "w1", "w2")].count("replica") == 1
    for _ in range(2):  # the observer and worker 1
        assert run.rounds.snapshot is not None
        run.adopted({"obs": 0, "w1": 1}[run.rounds.snapshot.joiner], run.rounds.snapshot.number)
    run.ready(2)
    assert run.rounds.round is not None  # a missing worker may come later
    run.push(2)
    assert run.closes[0].step == 5 and run.closes[0].contributors == {2: 10}


def test_who_beats_may_hold_more_and_is_awaited() -> None:
    run = Run(recovery="name of 6")
    back(run, 1, 4)
    for now in (5.0, 10.0, 15.0):
        run.rounds.handle(Alive("process of w2"), now)
        assert run.tick(now, 1) == []
    back(run, 2, 5)
    assert run.rounds.step == 5  # less than was noted, but no other replica is left


def test_who_is_silent_is_not_awaited_longer_than_anybody() -> None:
    run = Run(recovery="name of 6")
    back(run, 1, 4)
    assert run.tick(9.9, 1) == [] and run.rounds.coming_back
    assert "# the run goes on after step 4, where worker 1 (pi) stands" in run.tick(10.0, 1)


def test_a_newer_step_that_was_noted_is_waited_for() -> None:
    run = Run(recovery="name of 6")
    back(run, 1, 5)
    back(run, 2, 5)
    run.rounds.handle(Alive("process of w3"), 5.0)
    assert run.tick(12.0, 1, 2) == [] and run.rounds.coming_back
    back(run, 3, 6)
    assert run.rounds.step == 6


def test_it_goes_on_with_those_who_are_here_when_somebody_never_greets() -> None:
    run = Run(recovery="name of 6", idle_timeout=60.0)
    back(run, 1, 5)
    for now in range(1, 62):
        run.rounds.handle(Alive("process of w2"), float(now))
        run.tick(float(now), 1)
    assert run.rounds.step == 5 and run.rounds.ending is None


def test_who_was_cut_off_meanwhile_has_not_deserted() -> None:
    run = Run(recovery="name of 6")
    back(run, 1, 5)
    run.tick(9.0, 1)
    run.relinked(1)
    assert run.tick(11.0, 1) == [] and not run.rounds.deserted
    run.join(1, step=5, lineage="name of 5")
    assert run.rounds.step == 5


def test_stopped_before_it_goes_on_the_run_stays_as_it_is() -> None:
    run = Run(recovery="name of 6")
    back(run, 1, 5)
    assert run.stop() == []
    assert run.rounds.put_off and run.rounds.ended is None and not run.rounds.deserted


def test_a_run_to_which_nobody_comes_back_is_deserted() -> None:
    run = Run(recovery="name of 6")
    run.tick(9.9)
    assert not run.rounds.deserted
    run.tick(10.0)
    assert run.rounds.deserted and run.rounds.ended is None


def test_the_end_waits_for_an_observer_that_is_still_starting() -> None:
    run = Run(buckets=1, recovery="name of 4")
    back(run, 1, 4, ledger=LEDGER)
    run.rounds.observer_comes = True
    run.ready(1)
    run.push(1)
    run.stop()
    assert run.rounds.ended is None
    run.hello(0)
    run.join(0)
    run.snapshot(0)
    run.stands(0, 5, kept=True)
    assert run.rounds.ended is not None and run.rounds.ended.step == 5


def test_a_replica_that_differs_is_named_and_takes_a_snapshot() -> None:
    run = Run(buckets=1).observer().workers(1, 2, 3)
    for who in (1, 2, 3):
        run.push(who)
    assert run.digest(1, 1, "a") == run.digest(2, 1, "b") == run.digest(3, 1, "a") == []
    assert run.digest(0, 1, "a")[0] == (
        "# worker 2 (pi) has other weights than the rest: it takes a snapshot"
    )
    assert run.push(2) == ["refused: too late for round 2: has other weights than the rest"]
    run.follows(2)  # a name of its state that is right says nothing about its weights
    for who in (1, 3):
        run.push(who)
    assert run.rounds.snapshot is not None and run.rounds.snapshot.joiner == "w2"
    run.snapshot(2)
    assert run.rounds.snapshot is None
    run.relinked(2)
    run.follows(2)  # now it may
    assert run.rounds.peers["w2"].state == "replica"


def test_digests_of_steps_that_a_replica_did_not_apply_do_not_count() -> None:
    run = Run(buckets=1).observer().workers(1, 2)
    for who in (1, 2):
        run.push(who)
    run.relinked(2)
    run.follows(2)  # at step 1, which it does not report
    run.digest(1, 1, "a")
    assert run.digest(2, 1, "b") == run.digest(2, 2, "b") == []
    assert run.digest(0, 1, "a") == []
    assert all(peer.state == "replica" for peer in run.rounds.peers.values())


def test_a_bad_push_and_a_death_do_not_bring_the_bad_samples_back() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1, 0, bad="not finite")
    run.leave(2)
    assert run.sums() == "0 done, 0 partly, 10 skipped; waiting 0/30-40"


@pytest.mark.parametrize(
    ("push", "why"),
    [
        ({"round": 9}, "round 9 is not open; round 1 is"),
        ({"bucket": 2}, "there is no bucket 2"),
        ({"bucket": -1}, "there is no bucket -1"),
        ({"samples": 11}, "11 samples pushed for a lease of 10"),
        ({"samples": 0}, "0 samples pushed for a lease of 10"),
        ({"absent": (2,)}, "it names parameters that the run does not have"),
        ({"absent": (-1,)}, "it names parameters that the run does not have"),
    ],
)
def test_pushes_that_do_not_fit_are_refused(push: dict[str, Any], why: str) -> None:
    run = Run().observer().workers(1, 2)
    bucket = push.pop("bucket", 0)
    assert run.push(1, bucket, **push) == [f"refused: {why}"]
    assert run.push(1, 0) == ["add 1.0 x10"]


def test_pushes_of_those_who_are_not_in_it_are_refused() -> None:
    run = Run(timeout=9.0).observer()
    run.hello(1)
    assert run.push(1, 0, round=3) == ["refused: round 3 is not open; no round is"]
    run = Run(timeout=9.0).observer().workers(1, 2)
    run.hello(3)
    assert run.push(3, 0) == ["refused: worker 3 (pi) has no lease in round 1"]
    run.push(1, 0)
    assert run.push(1, 0) == ["refused: bucket 0 of round 1 came twice"]
    run.relinked(1)
    assert run.push(1, 1) == ["refused: too late for round 1: was cut off"]


def test_a_gradient_out_of_all_proportion_is_discarded() -> None:
    run = Run(max_norm_ratio=10.0, epochs=100).observer().workers(1, 2)
    while len(run.closes) < NEEDED:
        run.push(1, norm=1.0), run.push(2, norm=1.2)
    assert run.push(1, 0, norm=9.9) == ["add 1.0 x10"]
    discarded, said, refused = run.push(2, 0, norm=100.0)[:3]
    assert discarded == "discard 2.0"
    assert "worker 2 (pi) refused: its norm of 100 is 83.3 times the usual 1.2" in said
    assert refused.startswith(f"w2 <- refused {NEEDED + 1}: its norm of 100")
    assert run.push(1, 1, bad="not finite", norm=None)[0].startswith("#")  # kept nowhere


# ----------------------------------------------------------------------------- cut off, behind


def test_after_a_cut_a_peer_begins_anew() -> None:
    run = Run().observer().workers(1, 2)
    run.push(2, 0)
    assert run.relinked(2) == ["w2 <- join again"]
    assert run.push(1)[-1] == ("# round 1 closed with 1 of 2: worker 2 (pi) was cut off")
    assert run.sums() == "10 done, 10 partly, 0 skipped; waiting nothing"
    assert run.follows(2) == ["w2 <- follow at step 1"]
    assert run.ready(2) == []
    assert run.push(1)[-1] == "# round 2 closed with worker 2 (pi) again"


def test_a_cut_of_the_only_member_makes_its_round_void() -> None:
    run = Run(num_workers=1).observer().workers(1)
    assert run.relinked(1) == [
        "void 1",
        "# round 1 came to nothing: worker 1 (pi) was cut off, and no other worker is left in it",
        "w1 <- join again",
    ]
    run.follows(1)
    assert run.ready(1) == ["all <- open 2 at step 0 for 1: 0/0-10 0/10-20"]


def test_a_cut_calls_a_snapshot_off_and_only_the_other_side_is_told() -> None:
    run = Run().observer()
    run.hello(1)
    run.join(1)
    assert run.relinked(1) == [
        "# snapshot 1 was given up: worker 1 (pi) was cut off",
        "obs <- abort 1: worker 1 (pi) was cut off",
        "w1 <- join again",
    ]
    assert but_words(run.join(1)) == ["w1 <- adopt at step 0", "obs <- give 2 of step 0"]
    assert but_words(run.relinked(0)) == [
        "w1 <- abort 2: the observer was cut off",
        "obs <- join again",
    ]


def test_who_fell_behind_may_join_again_for_a_snapshot() -> None:
    run = Run().observer().workers(1, 2)
    assert run.behind(2) == ["w2 <- behind at step 0"]
    run.push(1)
    assert run.closes[0].late == {2: "fell behind the kept updates"}
    run.join(2, lineage="long ago")
    assert but_words(run.push(1))[-1] == "obs <- give 3 of step 2"


def test_one_that_has_shown_nothing_is_asked_for_a_snapshot_after_one_that_failed_once() -> None:
    run = Run().observer()
    run.hello(1), run.follows(1)  # the name of a state is no secret
    run.hello(2), run.join(2)
    givers = []
    for _ in range(3):
        assert run.rounds.snapshot is not None
        givers.append(run.rounds.snapshot.giver)
        run.handle(Told(givers[-1], wire.Abort(run.rounds.snapshot.number, "no")))
        run.join(2)
    assert givers == ["obs", "obs", "w1"]


def test_a_giver_that_fell_behind_gives_no_snapshot() -> None:
    run = Run(observer=False).workers(1)
    run.hello(2), run.join(2), run.snapshot(2)
    run.hello(3)
    run.join(3)
    assert but_words(run.behind(1)) == [
        "w3 <- abort 2: worker 1 (pi) fell behind the kept updates",
        "w1 <- behind at step 0",
    ]
    assert but_words(run.join(3)) == ["w3 <- adopt at step 0", "w2 <- give 3 of step 0"]


def test_who_never_joined_cannot_be_behind() -> None:
    run = Run().observer()
    run.hello(1)
    assert run.behind(1) == []


def test_who_leaves_its_loop_is_not_waited_for_and_may_come_back() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1)
    effects = but_words(run.unready(2))
    assert effects[-1] == (
        "close 1 to step 1, in it 1:10, late 2 (left its loop); "
        "open 2 at step 1 for 1: 0/20-30 0/10-20"
    )
    assert run.ready(2) == []
    assert run.push(1)[-2].endswith("open 3 at step 2 for 1: 0/10-20 0/40-50, 2: 0/30-40 0/50-60")


# ----------------------------------------------------------------------------- snapshots


def test_a_late_joiner_takes_a_snapshot_between_rounds_and_the_run_pauses() -> None:
    run = Run().observer().workers(1, 2)
    run.hello(3)
    assert run.join(3) == ["w3 <- adopt at step 0"]
    run.push(1)
    assert run.push(2)[-2:] == [
        "close 1 to step 1, in it 1:10 2:10",
        "obs <- give 3 of step 1",
    ]
    assert run.rounds.phase(0.0) == "worker 3 (pi) takes a snapshot"
    assert run.rounds.doing(0.0) == "snapshot"
    assert run.push(1, 0) == ["refused: round 0 is not open; no round is"]
    assert run.adopted(3, 3) == [
        "# worker 3 (pi) took a snapshot of step 1",
        "all <- open 2 at step 1 for 1: 0/20-30 0/40-50, 2: 0/30-40 0/50-60",
    ]
    run.ready(3)
    run.push(1)
    assert "3: 0/60-70 0/90-100" in run.push(2)[-1]


def test_the_parts_of_a_snapshot_go_to_the_other_side() -> None:
    run = Run().observer()
    run.hello(1)
    run.join(1)
    manifest = run.manifest(5)
    want, piece = wire.Want(snapshot=1, piece=0), wire.Piece(snapshot=1, piece=0)
    assert run.route(0, manifest) == ("w1", [])
    assert run.route(1, want) == ("obs", [])
    assert run.route(0, piece) == ("w1", [])
    for who, wrong in ((1, manifest), (0, want), (1, piece)):
        assert run.route(who, wrong) == (
            None,
            [f"{session(who)} <- reject: not your part of this snapshot"],
        )
    run.hello(2)
    assert run.route(2, want)[0] is None
    assert run.route(1, wire.Want(snapshot=7, piece=0)) == (
        None,
        ["w1 <- abort 7: this snapshot is over"],
    )


def test_only_what_brings_a_snapshot_nearer_to_its_end_goes_on() -> None:
    run = Run(num_workers=1).observer().workers(1)
    run.hello(2)
    run.join(2)
    run.push(1)
    want = [wire.Want(snapshot=2, piece=n) for n in range(-1, 31)]
    assert run.route(2, want[1]) == (None, []), "there is no manifest yet"
    assert run.route(0, run.manifest(295, 5))[0] == "w2"
    assert run.route(0, run.manifest(295, 5)) == (None, []), "it comes once"
    assert run.route(0, wire.Piece(snapshot=2, piece=0)) == (None, []), "nobody wants it"
    assert [run.route(2, w)[0] for w in want[1:18]] == ["obs"] * 16 + [None], "that is enough"
    assert run.route(2, want[0]) == run.route(2, wire.Want(snapshot=2, piece=31)) == (None, [])
    assert run.route(0, wire.Piece(snapshot=2, piece=3))[0] == "w2"
    assert run.route(0, wire.Piece(snapshot=2, piece=3)) == (None, []), "it was there"
    assert run.route(2, wire.Want(snapshot=2, piece=3)) == (None, []), "it was there"
    assert run.route(2, wire.Want(snapshot=2, piece=16))[0] == "obs"


def test_asking_for_the_same_piece_is_no_progress() -> None:
    run = Run(num_workers=1).observer().workers(1)
    run.hello(2)
    run.join(2)
    run.push(1)
    run.route(0, run.manifest(100))
    run.route(2, wire.Want(snapshot=2, piece=0))
    run.route(0, wire.Piece(snapshot=2, piece=0))
    for now in range(1, 10):
        run.tick(float(now), 0, 1, 2)
        run.route(2, wire.Want(snapshot=2, piece=0))
    effects = run.tick(10.5, 0, 1, 2)
    assert effects[0] == "# snapshot 2 was given up: worker 2 (pi) was silent for 10 s"
    assert effects[-1].startswith("all <- open 2")


def test_a_snapshot_has_a_limit_in_all() -> None:
    run = Run(num_workers=1).observer().workers(1)
    run.hello(2)
    run.join(2)
    run.push(1)
    run.route(0, run.manifest(1000))
    said: list[str] = []
    for n in range(60):
        run.route(2, wire.Want(snapshot=2, piece=n))
        run.route(0, wire.Piece(snapshot=2, piece=n))
        said += run.tick(float(n), 0, 1, 2)
    assert said[0] == "# snapshot 2 was given up: it is not over after 31 s"
    assert run.rounds.peers["w2"].failed_by == {0: 1}, "who is slow is not seen: another is next"


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"tensors": (("uint8", (2**62,)),)}, "more than 1048576 pieces"),
        ({"tensors": (("uint8", (2**62, 0)), ("uint8", (11, 2**40)))}, "more than 1048576 pieces"),
        ({"tensors": (("uint8", (-5,)),)}, "a tensor of 'uint8' and shape (-5,)"),
        ({"tensors": (("object", (5,)),)}, "a tensor of 'object' and shape (5,)"),
        ({"piece_bytes": 0}, "pieces of 0 bytes"),
        ({"step": 7}, "another state than that of step 0"),
        ({"lineage": "made up"}, "another state than that of step 0"),
    ],
)
def test_a_manifest_that_cannot_be_is_not_passed_on(wrong: dict[str, Any], why: str) -> None:
    run = Run().observer()
    run.hello(1)
    run.join(1)
    goal, effects = run.route(0, run.manifest(**wrong))
    assert goal is None
    assert effects[0].startswith(
        f"# snapshot 1 was given up: the observer gives what cannot be: {why}"
    )
    assert [e.split(":")[0] for e in but_words(effects)[:2]] == ["obs <- abort 1", "w1 <- abort 1"]


def test_adopted_without_all_pieces_is_not_believed() -> None:
    run = Run(num_workers=1).observer().workers(1)
    run.hello(2)
    run.join(2)
    run.push(1)
    run.route(0, run.manifest(20))
    run.route(2, wire.Want(snapshot=2, piece=0))
    run.route(0, wire.Piece(snapshot=2, piece=0))
    effects = run.adopted(2, 2)
    assert effects[0] == (
        "# snapshot 2 was given up: worker 2 (pi) says that it holds it, after 1 of 2 pieces"
    )
    assert run.rounds.peers["w2"].state != REPLICA


def test_a_giver_whose_snapshots_fail_is_asked_last() -> None:
    run = Run(observer=False, epochs=100).workers(1, 2)
    run.push(1), run.push(2)
    run.hello(3), run.join(3)
    run.push(1)
    assert "w1 <- give 2 of step 2" in run.push(2)
    run.route(3, wire.Abort(2, "a state of another model"))
    run.join(3)
    run.push(1)
    assert "w2 <- give 3 of step 3" in run.push(2)
    run.snapshot(3)
    assert run.rounds.peers["w3"].state == REPLICA


def test_a_joiner_whom_one_giver_failed_is_given_to_by_another() -> None:
    """Whatever others have said of that one: joiners that lie make honest givers look bad."""
    run = Run(observer=False, epochs=1000, max_workers=8).workers(1, 2)
    run.hello(4), run.join(4)
    while run.rounds.peers["w1"].failed_gives < 3:
        run.push(1), run.push(2)
        if run.rounds.snapshot is not None:
            run.route(4, wire.Abort(run.rounds.snapshot.number, "a lie"))
            run.join(4)
        run.tick(run.now + 5.0, 1, 2, 4)
    run.leave(4), run.leave(2)
    run.hello(2, "b"), run.follows(2, "b"), run.ready(2, "b")  # no joiner has complained of it yet
    run.push(1)
    run.push(1), run.push(2, life="b")
    run.hello(3), run.join(3)
    givers = []
    while len(givers) < 2:
        run.push(1), run.push(2, life="b")
        if run.rounds.snapshot is not None:
            assert run.rounds.snapshot.joiner == "w3"
            givers.append(run.rounds.snapshot.giver)
            aborts = wire.Abort(run.rounds.snapshot.number, "it likes to")
            run.handle(Told(givers[-1], aborts))
            run.join(3)
        run.rounds.handle(Heard("w2b"), run.now + 5.0)
        run.tick(run.now + 5.0, 1, 3)
    assert givers == ["w2b", "w1"]
    assert run.rounds.peers["w2b"].failed_gives < run.rounds.peers["w1"].failed_gives


def test_who_only_knows_the_name_of_a_state_is_not_waited_for_for_ever() -> None:
    run = Run(epochs=100).observer()
    run.hello(2), run.follows(2)
    run.leave(0)
    run.hello(1), run.join(1)
    for number in (1, 2, 3):
        effects = run.tick(run.now + 11.0, 1, 2)
        assert "worker 2 (pi) is here, but has not given its state for 10 s" in " ".join(effects)
        if number < 3:
            run.join(1)
    assert "# worker 2 (pi) gave its state to nobody in 3 attempts" in " ".join(effects)
    run.join(1)
    assert but_words(run.follows(2)) == ["w2 <- adopt at step 0"]
    run.hello(0, "b")
    assert "obsb <- origin at step 0" in run.join(0, "b")


def test_the_last_one_to_hold_a_state_is_asked_until_it_answers() -> None:
    """It computes for long, and has neither contributed nor given the state to anybody yet."""
    run = Run(observer=False, epochs=100, quorum=0.5, idle_timeout=1000.0).workers(1, 2)
    run.push(1), run.tick(run.now + 9.0, 1, 2)
    assert run.closes[-1].contributors == {1: 10}
    run.leave(1)
    run.hello(1, "b"), run.join(1, "b")
    asked = 0
    while asked < 5:
        run.heard(1, "b")
        effects = run.tick(run.now + 5.0, 2)
        if "w1b <- abort" in " ".join(effects):
            effects += run.join(1, "b")
        asked += sum(effect.startswith("w2 <- give") for effect in effects)
        assert run.rounds.ending is None and not run.rounds.peers["w2"].has_shown
    run.snapshot(1, "b")
    assert run.rounds.peers["w1b"].state == REPLICA


def missed(run: Run, who: int) -> int:
    """The answer to a joiner: the number of snapshots that it did not get."""
    join = wire.Join(layout=LAYOUT, step=0, lineage="its own", device="cpu")
    effects = run.handle(Told(session(who), join))
    said = [e.message for e in effects if isinstance(e, Send) and e.session == session(who)]
    admit = next(m for m in said if isinstance(m, wire.Admit))
    assert admit.action == "adopt"
    return admit.missed


@pytest.mark.parametrize(
    "way", ["silent", "joined again", "cut off", "behind", "declined", "no manifest", "refused"]
)
def test_what_one_that_has_shown_nothing_does_not_give_is_not_held_against_the_joiner(
    way: str,
) -> None:
    """It may hold nothing, and joiners end after five: so it is asked three times at most."""
    run = Run(epochs=100).observer()
    run.hello(1)
    assert missed(run, 1) == 0
    for number in (1, 2):
        run.route(0, wire.Abort(number, "it cannot be sent"))
        assert missed(run, 1) == number
    run.hello(2), run.follows(2), run.leave(0)
    for number in (4, 5, 6):
        assert missed(run, 1) == 3, "what the observer did not give is"
        assert run.rounds.snapshot and run.rounds.snapshot.giver == session(2)
        match way:
            case "silent":
                run.tick(run.now + 11.0, 1, 2)
            case "joined again":
                run.follows(2)
            case "cut off":
                run.relinked(2), run.follows(2)
            case "behind":
                run.behind(2), run.follows(2)
            case "declined":
                run.route(2, wire.Abort(number, "it stands at step 0"))
            case "no manifest":
                run.route(2, run.manifest(piece_bytes=0))
            case "refused":
                run.route(1, wire.Abort(number, "it does not fit"))
    assert missed(run, 1) == 3
    assert run.rounds.snapshot is None and run.rounds.peers["w2"].state != REPLICA
    run.hello(0, "b"), run.join(0, "b")
    assert run.rounds.snapshot is not None
    run.snapshot(1)
    assert run.rounds.peers["w1"].state == REPLICA and run.rounds.peers["w1"].missed == 0


def test_what_a_joiner_did_not_get_is_remembered_where_its_process_greets_again() -> None:
    run = Run(observer=False, epochs=100).workers(1, 2)
    run.push(1), run.push(2)
    run.hello(3), run.join(3)
    run.push(1), run.push(2)
    run.route(3, wire.Abort(2, "a state of another model"))
    run.hello(3, "b", nonce="process of w3"), run.join(3, "b")
    again = run.rounds.peers["w3b"]
    assert again.missed == 1
    run.push(1)
    assert "w2 <- give 3 of step 3" in run.push(2), "by another giver"
    run.hello(3, "c", reachable=False), run.join(3, "c")
    assert run.rounds.peers["w3c"].missed == 0, "another process has tried nothing"


def test_a_joiner_waits_for_a_giver_whose_loop_is_elsewhere_and_is_told_so() -> None:
    """Before its first batch, evaluating, in another cluster: it answers when it is back."""
    run = Run(observer=False, join_timeout=5.0, idle_timeout=200.0)
    run.hello(1), run.join(1, first=True)
    run.hello(2)
    off = (
        "worker 1 (pi) is here, but has not given its state for 10 s: its loop does something "
        "else, and answers with its next batch"
    )
    said = {1: [f"# snapshot 1 was given up: {off}"]}
    for number in range(1, 20):
        assert missed(run, 2) == 0
        waits = run.rounds.phase(run.now)
        assert waits == (
            "worker 2 (pi) waits for the state of worker 1 (pi), whose loop does something else: "
            "it answers with its next batch"
        )
        effects = run.tick(run.now + 10.1, 1, 2)
        assert f"w2 <- abort {number}: {off}" in effects
        assert [line for line in effects if line.startswith("#")] == said.get(number, [])
    missed(run, 2)
    run.snapshot(2)
    assert run.rounds.peers["w2"].state == REPLICA
    run.ready(1)
    assert "open 1" in run.ready(2)[-1]


def test_a_joiner_does_not_wait_for_ever_for_such_a_giver() -> None:
    run = Run(observer=False, num_workers=1, epochs=10**6, idle_timeout=100.0)
    run.workers(1)
    run.hello(2)
    counts = [missed(run, 2)]
    run.push(1)
    while run.now < 400.0:  # it trains, and never gives its state
        run.tick(run.now + 5.0, 1, 2)
        if run.rounds.peers["w2"].state == GREETED:
            counts.append(missed(run, 2))
        if run.rounds.round is not None:
            run.push(1)
    waited = counts.count(0)
    assert 4 < waited < 12 and counts[waited : waited + 5] == [1, 2, 3, 4, 5]


def test_who_is_in_its_loop_is_asked_before_one_that_is_elsewhere() -> None:
    run = Run(observer=False, epochs=100).workers(1, 2)
    run.push(1), run.push(2)
    run.tells(1, wire.Evaluating(True))
    run.hello(3), run.join(3)
    run.push(1)
    assert "w2 <- give 2 of step 2" in run.push(2)
    run.snapshot(3)
    run.tells(1, wire.Evaluating(False))
    run.ready(3), run.push(1), run.push(2)
    run.unready(1)
    run.hello(4), run.join(4)
    run.push(2), run.push(3)
    assert run.rounds.snapshot and run.rounds.snapshot.giver == "w2"


def test_who_is_cut_off_while_it_takes_a_snapshot_has_not_missed_it() -> None:
    """It joins anew, as often as its network breaks."""
    run = Run(epochs=100).observer()
    run.hello(1), run.join(1)
    run.relinked(1)
    assert missed(run, 1) == 0
    assert run.rounds.snapshot is not None
    run.tick(11.0, 0, 1)
    assert missed(run, 1) == 1, "but the observer was silent"


def test_who_greets_again_has_still_given_nothing() -> None:
    run = Run(epochs=100).observer()
    run.hello(2, nonce="liar"), run.follows(2)
    run.leave(0)
    run.hello(1), run.join(1)
    for before, life in (("", "b"), ("b", "c"), ("c", "d")):
        assert run.rounds.snapshot and run.rounds.snapshot.giver == session(2, before)
        effects = run.hello(2, life, nonce="liar")
        run.join(1)
        answer = run.follows(2, life)
    assert "gave its state to nobody in 3 attempts" in " ".join(effects)
    assert but_words(answer) == ["w2d <- adopt at step 0"]
    assert run.rounds.snapshot is None


def test_the_last_holder_that_was_cut_off_gives_its_state_when_it_is_back() -> None:
    """It beat, and did not hear that it was asked; then it greeted again."""
    run = Run(epochs=100).observer().workers(1, 4)
    run.push(1), run.push(4)
    run.hello(2, nonce="cut off"), run.follows(2)
    run.leave(0), run.leave(1), run.leave(4)
    run.hello(3), run.join(3)
    for _ in range(3):
        assert run.rounds.snapshot and run.rounds.snapshot.giver == "w2"
        run.tick(run.now + 10.1, 2, 3)
        run.join(3)
    run.hello(2, "b", nonce="cut off")
    run.join(3)
    assert run.follows(2, "b")[0].startswith("w2b <- follow")
    assert run.rounds.snapshot and run.rounds.snapshot.giver == "w2b"


def test_between_two_snapshots_a_round_goes_on() -> None:
    run = Run(epochs=100, max_workers=8).observer().workers(1, 2)
    for who in (3, 4):
        run.hello(who), run.join(who)
    run.push(1), run.push(2)
    effects = run.snapshot(3)
    assert effects[-1].startswith("all <- open 2"), "although worker 4 waits"
    run.push(1)
    assert "obs <- give 4 of step 2" in run.push(2)


def test_who_joins_again_and_again_waits_longer_each_time() -> None:
    """With any worker id: what counts is that none contributes."""
    run = Run(epochs=1000, max_workers=64).observer().workers(1, 2)
    given, rounds = [], 0
    run.push(1), run.push(2)
    while run.now < 600:
        liar = 3 + len(given) % 5
        run.hello(liar), run.join(liar)
        run.push(1), run.push(2)
        if run.rounds.snapshot is not None:
            given.append(run.now)
            run.snapshot(liar)
        run.leave(liar)
        rounds += 1
        run.tick(run.now + 1.0, 0, 1, 2)
    waits = [round(b - a) for a, b in pairwise(given)]
    assert waits[-1] >= 160 and len(given) < 15, waits
    assert waits == sorted(waits)
    run.hello(9), run.join(9)
    while run.rounds.peers["w9"].state != REPLICA:  # an honest one comes after all
        run.push(1), run.push(2)
        run.snapshot(9)
        run.tick(run.now + 1.0, 0, 1, 2, 9)
    run.ready(9)
    run.push(1), run.push(2)
    run.push(1), run.push(2), run.push(9)
    assert 9 in run.closes[-1].contributors
    assert run.rounds._snapshots.waste.in_a_row == 0, "and the next one need not wait"


def test_the_observer_never_waits_for_what_workers_wasted() -> None:
    run = Run(epochs=1000).observer().workers(1, 2)
    run.rounds._snapshots.waste.next_at = 1e9
    run.leave(0), run.hello(0, "b"), run.join(0, "b")
    run.push(1)
    assert "w1 <- give 3 of step 1" in run.push(2)


def test_the_lines_about_one_worker_are_limited() -> None:
    run = Run(epochs=1000, max_workers=8).observer().workers(1, 2)
    lines: list[str] = []
    for _ in range(1000):
        lines += run.hello(3) + run.leave(3)
    said = [line for line in lines if line.startswith("#")]
    assert len(said) == 100
    run.tick(1.0, 0, 1, 2)
    assert run.tick(31.5, 0, 1, 2)[-1] == "# worker 3 (pi): 1900 more lines about it are left out"
    assert run.hello(4) == ["# worker 4 (pi) is here"], "others are told of"


def test_the_digest_of_a_goodbye_counts_from_members_only() -> None:
    run = Run(epochs=1000, max_workers=8).observer().workers(1, 2)
    run.push(1), run.push(2)
    run.hello(3)
    run.hello(4), run.follows(4)  # where the log stands is no secret
    for who, step in ((3, 1), (4, 1), (1, 2), (2, 1), (0, 1)):
        run.leave(who, "bye", step=step, digest=f"digest of {who}")
    assert {id: digest for id, (_, _, digest) in run.rounds.digests.items()} == {
        2: "digest of 2",
        0: "digest of 0",
    }


def test_a_digest_of_somebody_who_only_follows_does_not_count() -> None:
    run = Run(epochs=1000, max_workers=8, num_workers=1).observer().workers(1)
    for liar in (2, 3, 4):
        run.hello(liar), run.follows(liar)
    run.push(1)
    for liar in (2, 3, 4):
        assert run.digest(liar, 1, "a lie") == []
    assert run.digest(1, 1, "true") == []
    assert run.digest(0, 1, "true") == []
    assert all(p.state == REPLICA for p in run.rounds.peers.values())


def test_one_who_is_found_wrong_again_and_again_takes_no_more_snapshots() -> None:
    run = Run(observer=False, epochs=1000).workers(1, 2)
    run.push(1), run.push(2)
    said: list[str] = []
    for _ in range(10):
        step = run.rounds.step
        said += run.digest(1, step, "a lie") + run.digest(2, step, "true")
        if run.rounds.peers["w2"].state != REPLICA:
            run.join(2)
            run.push(1)
            run.snapshot(2)
            run.ready(2)
        run.push(1), run.push(2)
        run.push(1), run.push(2)
    assert sum("it takes a snapshot" in line for line in said) == 3
    assert [line for line in said if "again" in line and line.startswith("#")] == [
        "# worker 2 (pi) and worker 1 (pi) have other weights again, after 3 snapshots: "
        "one of them is broken; stop that one"
    ]


def test_a_run_cannot_begin_before_its_first_step() -> None:
    run = Run()
    run.hello(0)
    assert run.join(0, step=-1) == ["obs <- reject: there is no step -1 to begin at"]


def test_joiners_come_one_after_the_other() -> None:
    run = Run().observer()
    for who in (1, 2, 3):
        run.hello(who)
        run.join(who)
    assert but_words(run.adopted(1, 1)) == ["obs <- give 2 of step 0"]
    assert but_words(run.adopted(2, 2)) == ["obs <- give 3 of step 0"]
    assert but_words(run.adopted(3, 3)) == []


def test_without_the_observer_the_lowest_numbered_replica_gives() -> None:
    run = Run().observer().workers(2, 1)
    run.leave(0)
    run.hello(3)
    run.join(3)
    run.push(1)
    assert "w1 <- give 3 of step 1" in run.push(2)


def test_a_silent_giver_is_named_and_the_next_one_asked_after_a_round() -> None:
    run = Run(num_workers=1).observer().workers(1)
    run.hello(2)
    run.join(2)
    assert "obs <- give 2 of step 1" in run.push(1)
    assert run.tick(9.9, 0, 1, 2) == []
    assert run.tick(10.1, 0, 1, 2) == [
        "# snapshot 2 was given up: the observer was silent for 10 s",
        "obs <- abort 2: the observer was silent for 10 s",
        "w2 <- abort 2: the observer was silent for 10 s",
        "all <- open 2 at step 1 for 1: 0/10-20 0/20-30",
    ]
    assert run.join(2) == ["w2 <- adopt at step 1"]
    assert "w1 <- give 3 of step 2" in run.push(1)


def test_a_silent_joiner_is_named_and_training_goes_on() -> None:
    run = Run(num_workers=1).observer().workers(1)
    run.hello(2)
    run.join(2)
    run.push(1)
    run.now = 5.0
    run.route(0, run.manifest(10))
    run.route(2, wire.Want(snapshot=2, piece=0))
    run.route(0, wire.Piece(snapshot=2, piece=0))
    assert run.tick(14.9, 0, 1, 2) == []
    effects = run.tick(15.1, 0, 1, 2)
    assert effects[0] == "# snapshot 2 was given up: worker 2 (pi) was silent for 10 s"
    assert effects[-1].startswith("all <- open 2")
    run.push(1)
    assert run.rounds.snapshot is None  # no joiner waits for one any more


def test_a_giver_may_decline_and_a_joiner_too() -> None:
    run = Run().observer().workers(1, 2)
    run.hello(3)
    run.join(3)
    run.push(1), run.push(2)
    goal, effects = run.route(0, wire.Abort(3, "it stands at step 0"))
    assert goal is None
    assert but_words(effects)[0] == "w3 <- abort 3: it stands at step 0"
    assert but_words(effects)[1].startswith("all <- open 2")
    run.join(3)
    run.push(1), run.push(2)
    _, effects = run.route(3, wire.Abort(4, "no room"))
    assert but_words(effects)[0] == "w1 <- abort 4: no room"
    assert run.route(1, wire.Abort(4, "?")) == (None, ["w1 <- abort 4: this snapshot is over"])


def test_who_joins_again_is_not_told_to_join_again() -> None:
    """Else the answer to each of its joins would be one more, for ever."""
    run = Run().observer()
    run.hello(1)
    run.join(1)
    assert run.join(1) == [
        "# snapshot 1 was given up: worker 1 (pi) joined again",
        "obs <- abort 1: worker 1 (pi) joined again",
        "w1 <- adopt at step 0",
        "obs <- give 2 of step 0",
    ]


def test_a_snapshot_that_was_called_off_while_it_was_adopted() -> None:
    run = Run().observer()
    run.hello(1)
    run.join(1)
    run.tick(10.1, 0, 1)
    assert run.adopted(1, 1) == ["w1 <- join again"]
    assert run.follows(1) == ["w1 <- follow at step 0"]
    assert run.adopted(1, 1) == []  # an echo


def test_a_giver_and_a_joiner_that_die() -> None:
    run = Run(observer=False).workers(1, 2)
    run.hello(3)
    run.join(3)
    run.push(1), run.push(2)
    assert but_words(run.leave(1))[:2] == ["w3 <- abort 2: worker 1 (pi) left", "forget w1"]
    run.join(3)
    run.push(2)
    assert but_words(run.leave(3)) == [
        "w2 <- abort 3: worker 3 (pi) left",
        "forget w3",
        "all <- open 3 at step 2 for 2: 0/20-30 0/40-50",
    ]


# ----------------------------------------------------------------------------- when to begin


def test_the_first_round_waits_for_all_workers_or_join_timeout() -> None:
    run = Run(num_workers=3, min_workers=2, join_timeout=20.0).observer().workers(1, 2)
    assert run.rounds.phase(5.0) == (
        "waiting for 3 workers: worker 1 (pi) and worker 2 (pi) are ready "
        "(starts with fewer in 15 s)"
    )
    assert run.tick(19.9, 0, 1, 2) == []
    run.all_seen()
    assert "(starts with fewer in 0 s)" in run.rounds.phase(25.0)
    assert run.tick(20.0, 0, 1, 2) == [
        "# starting with 2 of 3 workers",
        "all <- open 1 at step 0 for 1: 0/0-10 0/20-30, 2: 0/10-20 0/30-40",
    ]


def test_fewer_than_min_workers_pause_the_run_and_it_says_so_once() -> None:
    run = Run(min_workers=2).observer().workers(1, 2)
    run.push(1)
    run.leave(2)  # the open round goes to its end
    assert run.rounds.step == 1 and run.rounds.round is None
    pause = "paused: worker 1 (pi) is ready, 2 are needed; worker 2 (pi) left: it was stopped"
    assert run.tick(1.0, 0, 1) == [f"# {pause}"]
    assert run.tick(2.0, 0, 1) == []
    run.hello(3)
    assert but_words(run.join(3)) == ["w3 <- adopt at step 1", "obs <- give 3 of step 1"]
    run.snapshot(3)
    assert run.ready(3) == ["all <- open 2 at step 1 for 1: 0/20-30 0/30-40, 3: 0/10-20 0/40-50"]


def test_who_has_no_lease_is_not_waited_for() -> None:
    run = Run(num_workers=3).observer().workers(1, 2, 3, samples=20)
    assert sorted(run.rounds.round.members) == [1, 2]  # type: ignore[union-attr]
    run.push(1)
    assert "close 1 to step 1, in it 1:10 2:10" in run.push(2)
    assert run.rounds.ending == ("all epochs are done", False)


# ----------------------------------------------------------------------------- the end


def test_after_the_last_epoch_the_run_ends_when_the_observer_has_kept_its_state() -> None:
    run = Run().observer().workers(1, 2, samples=20)
    run.push(1)
    assert run.push(2)[-2:] == [
        "close 1 to step 1, in it 1:10 2:10",
        "all <- pulse at step 1: waiting for the observer to keep the last step",
    ]
    assert run.rounds.ended is None
    assert run.stands(2, 1, kept=True) == []  # only the observer is waited for
    assert run.stands(0, 0, kept=True) == []
    assert run.stands(0, 1) == []
    assert run.stands(0, 1, kept=True) == ["end at step 1: all epochs are done"]
    assert run.rounds.phase(0.0) == "ended: all epochs are done"
    assert run.push(1, 0) == ["refused: round 0 is not open; no round is"]
    assert run.tick(1000.0) == []


def test_without_an_observer_the_run_ends_at_once() -> None:
    run = Run(observer=False).workers(1, 2, samples=20)
    run.push(1)
    assert run.push(2)[-1] == "end at step 1: all epochs are done"


def test_the_end_does_not_wait_for_an_observer_that_does_not_move() -> None:
    run = Run(idle_timeout=100.0).observer().workers(1, 2, samples=20)
    run.push(1), run.push(2)
    assert but_words(run.tick(100.0, 0, 1, 2)) == []
    assert run.tick(100.1, 0, 1, 2) == ["end at step 1: all epochs are done"]


def test_an_observer_that_comes_closer_is_given_time() -> None:
    run = Run(idle_timeout=30.0).observer().workers(1, 2, samples=40)
    run.push(1), run.push(2)
    run.push(1), run.push(2)
    run.now = 25.0
    run.stands(0, 1)
    assert but_words(run.tick(55.0, 0)) == ["forget w1", "forget w2"]
    assert run.tick(55.1, 0) == ["end at step 2: all epochs are done"]


def test_an_observer_that_dies_before_the_last_step_is_kept_is_followed_by_another() -> None:
    run = Run().observer().workers(1, 2, samples=20)
    run.push(1), run.push(2)
    run.stands(0, 1)
    run.rounds.observer_comes = True  # its process was started again
    assert run.leave(0) == ["# the observer left: it was stopped", "forget obs"]
    assert but_words(run.tick(20.0, 1, 2)) == []
    assert but_words(run.hello(0, "b")) == []
    assert but_words(run.join(0, "b")) == ["obsb <- adopt at step 1", "w1 <- give 3 of step 1"]
    assert but_words(run.adopted(0, 3, "b")) == []
    assert run.rounds.ended is None
    assert run.tells(0, wire.Stand(1, kept=True), life="b") != []
    assert run.rounds.ended is not None and not run.rounds.ended.error


@pytest.mark.parametrize("why", ["no process", "nobody holds the state"])
def test_the_end_does_not_wait_for_a_step_that_nobody_can_keep(why: str) -> None:
    run = Run().observer().workers(1, 2, samples=20)
    run.push(1), run.push(2)
    run.rounds.observer_comes = why != "no process"
    if why == "nobody holds the state":
        run.leave(1), run.leave(2)
    assert run.leave(0)[-1] == "end at step 1: all epochs are done"


def test_while_it_ends_only_the_observer_gets_a_snapshot() -> None:
    run = Run().observer().workers(1, 2, samples=20)
    run.hello(3)
    run.join(3)
    run.push(1)
    run.behind(0)
    assert but_words(run.push(2))[-1].startswith("all <- pulse")
    assert but_words(run.join(0, lineage="long ago")) == [
        "obs <- adopt at step 1",
        "w1 <- give 3 of step 1",
    ]
    assert run.adopted(0, 3) == ["# the observer took a snapshot of step 1"]
    assert run.stands(0, 1, kept=True) == ["end at step 1: all epochs are done"]


def test_epochs_follow_each_other_without_a_barrier() -> None:
    run = Run(epochs=2, num_workers=1).observer().workers(1, samples=15)
    opened = []
    while run.rounds.round is not None:
        opened.append(run.rounds.round.members[1].lease)
        run.push(1)
    assert opened == [(0, 0, 10), (0, 10, 15), (1, 0, 10), (1, 10, 15)]
    assert run.sums() == "30 done, 0 partly, 0 skipped; waiting nothing"


def test_a_stop_ends_the_run_at_the_last_closed_step() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1), run.push(2)
    run.push(1, 0)
    assert but_words(run.stop())[0] == "void 2"
    assert run.sums().startswith("20 done, 0 partly")
    assert run.stands(0, 1, kept=True) == ["end at step 1: Ctrl-C"]
    assert run.stop("b") == []


def test_a_stop_because_of_a_fault_is_an_error_for_all() -> None:
    run = Run(observer=False).workers(1, 2)
    assert run.stop("disk full", error=True)[-1] == "end at step 0: disk full (error)"
    assert run.rounds.ended == wire.End(
        nonce=NONCE, step=0, lineage="fresh w1", reason="disk full", error=True
    )


def test_before_anything_began_a_stop_ends_too() -> None:
    assert Run().stop()[-1] == "end at step 0: Ctrl-C"


def test_with_nobody_left_the_run_ends_although_samples_are_left() -> None:
    run = Run(idle_timeout=100.0, observer=False).workers(1, 2)
    run.leave(1, "SIGINT")
    run.now = 3.0
    run.leave(2, "its program ended")
    who = "worker 1 (pi) left: SIGINT; worker 2 (pi) left: its program ended"
    reason = f"every worker has left before all samples were done: {who}"
    assert run.tick(4.0) == [f"# {reason} (the run ends in 9 s unless one comes)"]
    assert run.tick(12.9) == [] and run.rounds.pulse(12.9).phase.startswith(reason)
    assert run.tick(13.0) == [
        f"all <- pulse at step 0: ending: {reason}",
        f"end at step 0: {reason} (error)",
    ]


def test_who_has_done_nothing_has_not_finished_the_run() -> None:
    """Any worker can greet, say that it is done, and so end the run for those who come later."""
    run = Run(num_workers=1).observer().workers(1)
    run.leave(1, "finished")
    who = "worker 1 (pi) left: finished"
    assert run.rounds.ending is None
    run.tick(10.0, 0)
    why = f"every worker has left before all samples were done: {who}"
    assert run.rounds.ending == (why, True)
    run = Run(num_workers=1).observer().workers(1)
    run.push(1)
    run.leave(1, "finished")
    assert run.rounds.ending == ("every worker has finished, before all samples were done", False)


@pytest.mark.parametrize("error", [False, True])
def test_one_alone_does_not_end_the_run_of_those_who_are_still_to_come(error: bool) -> None:
    """It came first, was alone when the others' time was over, and has brought nothing."""
    run = Run(num_workers=3, join_timeout=20.0, idle_timeout=500.0).observer().workers(1)
    assert run.tick(20.0, 0, 1)[-1].startswith("all <- open 1")
    run.leave(1, "SIGINT" if not error else "ValueError: no", error=error)
    how = "failed: ValueError: no" if error else "left: SIGINT"
    paused = f"paused: no worker is ready, 2 of 3 have not come yet; worker 1 (pi) {how}"
    assert run.tick(21.0, 0) == [f"# {paused}"]
    for now in range(25, 400, 5):
        run.tick(now, 0)
    assert run.rounds.ending is None
    run.workers(2)
    assert run.rounds.round is not None and list(run.rounds.round.members) == [2]
    run.leave(2)
    assert run.tick(401.0, 0)[0].startswith("# paused: no worker is ready, 1 of 3 has not come yet")
    run.workers(3), run.leave(3)
    why = "every worker has "  # all have been here
    assert run.tick(402.0, 0)[0].startswith(f"# {why}")
    for now in range(405, 445, 5):
        run.tick(now, 0)
    assert run.rounds.ending is not None and run.rounds.ending[0].startswith(why)


def test_one_that_only_came_and_left_does_not_end_a_run_that_goes_on() -> None:
    """Those of whom something is in the log may be on their way to a server that was restarted."""
    run = Run(recovery="name of 4", idle_timeout=100.0)
    back(run, 0, 4, ledger=LEDGER)
    run.hello(3), run.join(3), run.snapshot(3), run.ready(3)
    run.leave(3)
    run.tick(90.0, 0)
    assert run.rounds.ending is None
    run = Run(recovery="name of 4", idle_timeout=100.0)
    back(run, 1, 4, ledger=LEDGER)
    run.leave(1)
    assert run.tick(10.0)[-1].startswith("end at step 4: every worker has left before all samples")


def test_who_finishes_on_a_link_that_was_made_anew_has_finished() -> None:
    run = of_their_own(1)
    run.push(1, samples=7)
    run.relinked(1)
    assert run.leave(1, "finished")[-1] == "end at step 1: every worker has finished"


def test_one_who_comes_before_that_goes_on_and_the_time_begins_anew() -> None:
    run = Run(observer=False).workers(1, 2)
    run.push(1), run.push(2)
    run.workers(3)
    run.leave(1), run.leave(2), run.leave(3)
    run.tick(9.9)
    run.hello(4)
    left = "; ".join(f"worker {number} (pi) left: it was stopped" for number in (1, 2, 3))
    assert run.tick(19.0, 4) == [f"# paused: no worker is ready; {left}"]
    run.leave(4, "UserError: another model", error=True)  # one that never took part
    assert run.tick(28.9)[0].startswith("# every worker has left") and run.rounds.ending is None
    assert run.tick(29.0)[-1].startswith("end at step 1: every worker has left before all")


def test_who_stops_a_run_whose_workers_failed_is_told_why_they_did() -> None:
    run = Run(observer=False)
    run.hello(1)
    run.leave(1, "device=cuda is not on this machine", error=True)  # before it took part
    why = "worker 1 (pi) failed: device=cuda is not on this machine"
    assert run.rounds.phase(0.0) == f"waiting for the first worker; {why}"
    assert run.stop()[-1] == f"end at step 0: Ctrl-C; {why}"


def test_where_all_failed_a_supervisor_has_time_to_start_them_again() -> None:
    run = Run(observer=False).workers(1, 2)
    run.leave(1, "ValueError: 1 sample", error=True)
    run.leave(2, "ValueError: 1 sample", error=True)
    run.tick(29.9)
    assert run.rounds.ending is None
    assert run.tick(30.0)[-1] == (
        "end at step 0: every worker has failed: worker 1 (pi) failed: ValueError: 1 sample; "
        "worker 2 (pi) failed: ValueError: 1 sample (error)"
    )


def test_where_all_failed_before_the_first_round_nobody_is_left_who_could_come() -> None:
    """As with a mistake in the script, which each of them meets at its first batch."""
    run = Run(num_workers=2, observer=False, idle_timeout=1000.0)
    for number in (1, 2):
        run.hello(number), run.join(number)
    run.snapshot(2)
    assert run.rounds.phase(0.0) == "waiting for 2 workers: no worker is ready"
    for number in (1, 2):
        run.leave(number, "UserError: how many samples?", error=True)
    why = "; ".join(f"worker {n} (pi) failed: UserError: how many samples?" for n in (1, 2))
    assert run.rounds.phase(20.0) == (
        f"every worker has failed: {why} (the run ends in 10 s unless one comes)"
    )
    run.tick(29.9)
    assert run.rounds.ending is None
    assert run.tick(30.0)[-1] == f"end at step 0: every worker has failed: {why} (error)"


def test_who_waits_for_others_before_the_start_is_not_idle() -> None:
    run = Run(num_workers=3, join_timeout=20.0, idle_timeout=15.0).observer().workers(1, 2)
    for now in (8.0, 16.0):
        run.tick(now, 0, 1, 2)
        assert run.rounds.ending is None
    assert run.tick(20.0, 0, 1, 2)[-1].startswith("all <- open 1")
    run = Run(num_workers=3, join_timeout=20.0, idle_timeout=15.0, observer=False)
    run.hello(1), run.join(1)
    for now in (8.0, 16.0, 19.0):
        run.tick(now, 1)
        assert run.rounds.ending is None
    run.tick(20.0, 1)
    assert run.rounds.phase(20.0) == "waiting for 3 workers: no worker is ready"


def test_who_fell_silent_is_awaited_as_long_as_idle_timeout() -> None:
    run = Run(idle_timeout=100.0, observer=False).workers(1, 2)
    run.leave(2)
    run.tick(10.1)  # worker 1 is silent
    run.tick(110.1)
    assert run.rounds.ended is None
    assert run.tick(110.2)[-1] == (
        "end at step 0: every worker has left before all samples were done: "
        "worker 1 (pi) fell silent; worker 2 (pi) left: it was stopped (error)"
    )


def test_who_fell_silent_long_ago_is_awaited_no_more() -> None:
    run = Run(num_workers=3, idle_timeout=50.0, observer=False, epochs=100).workers(1, 2, 3)
    for now in range(5, 70, 5):  # worker 3 is silent from the beginning
        run.tick(float(now), 1, 2)
        run.push(1), run.push(2)
    run.leave(1), run.leave(2)
    run.tick(74.9)
    assert run.rounds.ending is None
    assert run.tick(75.0)[-1].startswith("end at step")


def test_before_the_first_round_a_server_waits_for_whoever_comes() -> None:
    """One came, had the wrong data set, and left: the others are about to join."""
    run = Run(idle_timeout=1000.0, observer=False).workers(1, samples=8)
    run.leave(1, "TypeError: a DataLoader", error=True)
    assert run.tick(900.0) == []
    run.workers(2, 3, samples=100)
    assert run.rounds.round is not None and run.ledger.samples == 100


def test_where_nobody_holds_the_state_any_more_the_others_do_not_wait_for_ever() -> None:
    run = Run(observer=False).workers(1, 2)
    run.push(1), run.push(2)
    run.leave(2)
    run.tick(5.0, 1)
    run.hello(3), run.join(3)
    run.tick(15.1, 3)  # worker 1 is silent
    sentence = (
        "nobody here stands at step 1, which the others wait for; "
        "worker 1 (pi) (gone, silent for 10.1 s) was the last to hold it"
    )
    assert run.rounds.phase(25.1) == (
        f"{sentence} (the run ends in 30 s unless one comes who does)"
    )
    for now in (25.0, 35.0, 45.0, 55.0):
        run.tick(now, 3)
        assert run.rounds.ending is None
    assert run.tick(55.2, 3)[-1] == f"end at step 1: {sentence} (error)"


def test_while_the_server_itself_stood_still_nobody_was_late() -> None:
    """A laptop slept: who was on the way back hears of it now."""
    run = Run(observer=False).workers(1, 2)
    run.push(1), run.push(2)
    run.leave(2)
    run.tick(5.0, 1)
    run.hello(3), run.join(3)
    run.tick(15.1, 3)
    run.rounds.handle(StoodStill(1000.0), 1015.1)
    run.tick(1055.0, 3)
    assert run.rounds.ending is None
    assert run.tick(1055.2, 3)[-1].startswith("end at step 1")


def test_who_held_the_state_and_was_only_cut_off_is_in_time() -> None:
    run = Run(observer=False).workers(1, 2)
    run.push(1), run.push(2)
    run.leave(2)
    run.tick(5.0, 1)
    run.hello(3), run.join(3)
    run.tick(15.1, 3), run.tick(25.0, 3), run.tick(35.0, 3)
    run.hello(1, "b")
    assert "w3 <- give" not in "".join(run.follows(1, "b"))
    assert run.rounds.snapshot is not None
    run.snapshot(3)
    run.tick(44.0, 3), run.heard(1, "b")
    assert run.rounds.ending is None and len(run.rounds.peers) == 2


def test_nobody_is_told_to_wait_for_an_observer_that_there_is_not() -> None:
    run = Run(observer=False).workers(1, 2)
    assert "all <- pulse at step 0: ending: Ctrl-C" in run.stop()


def test_an_observer_that_has_no_state_is_not_waited_for_where_nobody_has() -> None:
    run = Run().observer().workers(1, 2)
    run.push(1), run.push(2)
    run.leave(0), run.leave(1), run.leave(2)
    run.rounds.observer_comes = True
    run.hello(0, "b"), run.join(0, "b")
    assert run.stop(error=True)[-1] == "end at step 1: Ctrl-C (error)"


def test_a_worker_that_is_back_before_the_other_costs_a_step_and_no_sample() -> None:
    """60 samples in batches of 10 for two workers are three steps; here they are four."""
    run = Run(recovery="name of 4", observer=False)
    back(run, 1, 4, ledger=LEDGER)
    run.ready(1)
    run.push(1)  # alone
    back(run, 2, 4), run.snapshot(2)
    run.ready(2)
    while run.rounds.round is not None:
        for who in list(run.rounds.round.members):
            run.push(who)
    assert run.rounds.step - 4 == 4 and run.ledger.done == 100
    assert [sorted(close.contributors) for close in run.closes] == [[1], [1], [1, 2], [1, 2]]


def test_who_comes_to_work_keeps_a_run_from_being_idle() -> None:
    run = Run(idle_timeout=100.0, min_workers=2).observer()
    run.now = 90.0
    run.all_seen()
    run.workers(1)
    run.tick(110.0, 0, 1)
    assert run.rounds.ending is None
    run.tick(190.1, 0, 1)
    assert run.rounds.ending is not None


def test_what_a_run_without_a_round_waits_for() -> None:
    run = Run(num_workers=1, min_workers=1).observer().workers(1, samples=10)
    run.relinked(1)
    assert run.rounds.phase(0.0) == "paused: no worker is ready"
    run.follows(1)
    run.ready(1, samples=10)
    run.hello(2)
    run.join(2)
    run.push(1)
    run.stands(0, 1, kept=True)
    assert run.rounds.phase(0.0) == "ended: all epochs are done"


def test_the_leases_of_an_ended_run_are_returned() -> None:
    run = Run(observer=False).workers(1, 2)
    run.stop()
    assert leased(run.ledger) == 0
    assert run.ledger.counted + unleased(run.ledger) == run.ledger.total


def test_what_the_pulse_tells() -> None:
    run = Run().observer().workers(1, 2)
    pulse = run.rounds.pulse(0.0)
    assert (pulse.nonce, pulse.step, pulse.lineage) == (NONCE, 0, "fresh obs")
    assert (pulse.phase, pulse.open, pulse.closed) == ("training", run.rounds.open_message(), 0)
    assert pulse.doing == "training"
    run.leave(1), run.leave(2)
    pulse = run.rounds.pulse(0.0)
    assert (pulse.open, pulse.closed, pulse.ending) == (None, 1, False)
    assert pulse.doing == "paused" and pulse.phase != "paused"


def test_the_phases_of_a_run() -> None:
    run = Run(min_workers=2)
    told = [run.rounds.doing(0.0)]
    run.observer()
    told.append(run.rounds.doing(0.0))
    run.workers(1, 2)
    told.append(run.rounds.doing(0.0))
    run.leave(1), run.leave(2)
    told.append(run.rounds.doing(0.0))
    run.stop()
    told.append(run.rounds.doing(0.0))
    run.leave(0)
    told.append(run.rounds.doing(0.0))
    assert told == ["starting", "starting", "training", "paused", "ending", "ended"]
    assert Run(recovery="a lineage").rounds.doing(0.0) == "returning"


def test_what_each_worker_did_is_tallied() -> None:
    run = Run(timeout=0.0).observer().workers(1, 2)
    run.push(1), run.push(2)
    run.push(1), run.tick(1.0)
    one, two = run.rounds.tallies[1], run.rounds.tallies[2]
    assert (one.rounds, one.samples, one.late) == (2, 20, 0)
    assert (two.rounds, two.samples, two.late) == (1, 10, 1)


# ----------------------------------------------------------------------------- any order at all

NUMBERS = st.integers(0, 3)
BUCKETS = 2


class AnyOrder(RuleBasedStateMachine):
    """Events in orders that no client would send them in: sums still agree, nothing raises."""

    @initialize(
        observer=st.booleans(), deterministic=st.booleans(), timeout=st.sampled_from([None, 0.1])
    )
    def begin(self, observer: bool, deterministic: bool, timeout: float | None) -> None:
        self.now, self.lives = 0.0, 0
        rules = Rules(
            num_workers=2,
            max_workers=3,
            heartbeat_timeout=10.0,
            idle_timeout=1e9,
            epochs=2,
            observer=observer,
            deterministic=deterministic,
            timeout=timeout,
        )
        self.rounds = Rounds(rules, NONCE, 0.0, lambda layout: BUCKETS)
        self.sums: dict[int, list[int]] = {}
        self.taken: set[tuple[int, int]] = set()

    def happens(self, event: Event) -> None:
        """Carry out the effects, as the server would, and check what it relies on."""
        for effect in self.rounds.handle(event, self.now):
            match effect:
                case Add():
                    assert (effect.worker, effect.bucket) in self.taken
                    self.taken.remove((effect.worker, effect.bucket))
                    self.sums.setdefault(effect.bucket, []).append(effect.weight)
                case Finish():
                    assert sum(self.sums.pop(effect.bucket)) == effect.weight
                case _ if type(effect).__name__ in ("Closed", "Void"):
                    if type(effect).__name__ == "Closed":
                        assert not self.sums and not self.taken
                    self.sums.clear()
                    self.taken.clear()

    def sessions(self, who: int) -> list[str]:
        return [s for s, p in self.rounds.peers.items() if p.id == who]

    @rule(who=NUMBERS, reachable=st.booleans())
    def hello(self, who: int, reachable: bool) -> None:
        self.lives += 1
        role = "worker" if who else "observer"
        greeting = Greeted(f"life {self.lives}", role, who, str(self.lives), "", 0)
        if self.rounds.declines(greeting, self.now, lambda session: reachable) is None:
            self.happens(greeting)

    @rule(who=NUMBERS, knows=st.booleans())
    def join(self, who: int, knows: bool) -> None:
        r = self.rounds
        step, lineage = (r.step, r.lineage) if knows else (0, f"fresh {who}")
        for name in self.sessions(who):
            message = wire.Join(layout=LAYOUT, step=step, lineage=lineage, device="cpu")
            self.happens(Told(name, message))

    @rule(who=NUMBERS, batch=st.integers(1, 7))
    def ready(self, who: int, batch: int) -> None:
        for name in self.sessions(who):
            message = wire.Ready(samples=20, batch_size=batch)
            self.happens(Told(name, message))

    @rule(who=NUMBERS, bucket=st.integers(0, BUCKETS), bad=st.booleans())
    def push(self, who: int, bucket: int, bad: bool) -> None:
        r = self.rounds
        for name in self.sessions(who):
            member = r.round.members.get(who) if r.round else None
            push = wire.Push(
                round=r.round.number if r.round else 1,
                bucket=bucket,
                samples=member.samples if member else 1,
            )
            why = r.refusal(name, push)
            if why is not None:
                self.happens(PushRefused(name, push, why))
                continue
            if not bad:
                self.taken.add((who, bucket))
            self.happens(Pushed(name, push, "bad" if bad else None))

    @rule(who=NUMBERS)
    def push_all(self, who: int) -> None:
        for bucket in range(BUCKETS):
            self.push(who, bucket, False)

    @rule(who=NUMBERS)
    def relinked(self, who: int) -> None:
        for name in self.sessions(who):
            self.happens(Relinked(name))

    @rule(who=NUMBERS, message=st.sampled_from([wire.Fetch(-1, "long ago"), wire.Unready()]))
    def tells(self, who: int, message: Any) -> None:
        for name in self.sessions(who):
            self.happens(Told(name, message))

    @rule(who=NUMBERS)
    def leave(self, who: int) -> None:
        for name in self.sessions(who):
            self.happens(Told(name, wire.Goodbye("")))

    @rule(who=NUMBERS, back=st.integers(0, 1))
    def adopted(self, who: int, back: int) -> None:
        for name in self.sessions(who):
            self.happens(Told(name, wire.Adopted(self.rounds._snapshots.number - back, 0, "")))

    @rule(who=NUMBERS, back=st.integers(0, 1))
    def aborts(self, who: int, back: int) -> None:
        for name in self.sessions(who):
            abort = wire.Abort(self.rounds._snapshots.number - back, "no")
            self.happens(Told(name, abort))

    @rule(seconds=st.sampled_from([0.05, 1.0, 6.0]), alive=st.sets(NUMBERS))
    def tick(self, seconds: float, alive: set[int]) -> None:
        self.now += seconds
        for who in alive:
            for name in self.sessions(who):
                self.happens(Heard(name))
        self.happens(Tick())

    @invariant()
    def sums_agree(self) -> None:
        ledger = self.rounds.ledger
        if ledger is not None:
            assert ledger.counted + leased(ledger) + unleased(ledger) == ledger.total
            assert Ledger.from_state(ledger.state()).counted == ledger.counted

    @invariant()
    def each_lease_has_one_holder(self) -> None:
        r = self.rounds
        held = [lease for p in r.peers.values() for lease in p.leases]
        assert len(set(held)) == len(held)
        members = r.round.members.values() if r.round else ()
        held += [m.lease for m in members if m.lease not in held]
        if r.ledger is not None:
            assert set(held) == r.ledger._leased
        assert all(len(p.leases) <= 2 for p in r.peers.values())

    @invariant()
    def no_round_is_open_while_a_snapshot_is_given(self) -> None:
        r = self.rounds
        assert r.round is None or r.snapshot is None
        if r.snapshot is not None:
            assert r.peers[r.snapshot.giver].state == REPLICA
            assert r.snapshot.joiner in r.peers


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestAnyOrder = AnyOrder.TestCase


# ------------------------------------------------------------------------ what workers die of


def trained(*numbers: int, samples: int = 40, **rules: Any) -> Run:
    """These workers have contributed to a step."""
    run = Run(num_workers=len(numbers), observer=True, **rules).observer()
    run.workers(*numbers, samples=samples)
    for who in numbers:
        run.push(who)
    assert run.rounds.step == 1
    return run


def test_what_two_workers_die_of_is_halved_and_what_still_kills_is_skipped() -> None:
    run = trained(1, 2, 3)
    assert run.lease(1) == (0, 30, 40)
    run.dies(1)
    assert run.lease(2) == (0, 30, 40)
    run.dies(2)
    assert run.lease(3) == (0, 30, 35)
    told = run.dies(3)
    assert "# skipped: places 30 to 34 of epoch 0's order: workers died of it" in told
    ledger = run.rounds.ledger
    assert ledger is not None and (ledger.skipped, ledger.killed) == (5, 5)


def test_what_was_left_unfinished_is_held_back_until_it_is_clear_why() -> None:
    run = trained(1, 2)
    assert (run.lease(1), run.lease(2)) == ((0, 20, 30), (0, 30, 40))
    run.unready(1, unfinished=True)
    run.push(2)
    assert run.rounds.round is None
    run.tick(0.5, 0, 1, 2)
    assert run.rounds.round is None
    run.tick(1.5, 0, 1, 2)  # it was a break in the middle of a batch
    assert run.lease(2) == (0, 20, 30)
    ledger = run.rounds.ledger
    assert ledger is not None and not ledger.remembers


def test_who_left_in_the_middle_and_is_ready_again_gets_it_back() -> None:
    run = trained(1, 2)
    run.unready(1, unfinished=True)
    run.push(2)
    run.ready(1, samples=40)
    assert run.lease(1) == (0, 20, 30)


def test_what_is_skipped_is_named_by_its_samples_too() -> None:
    run = trained(1, 2)
    run.rounds._leases.name_samples = lambda n, lease: f"the samples {lease} of {n}"
    run.ready(1, samples=40, drop_last=True)
    ledger = run.rounds.ledger
    assert ledger is not None
    ledger.news.append(Lost((1, 3, 4), UNREAD))
    run.push(1)
    assert (
        "# skipped: the samples (1, 3, 4) of 40 (place 3 of epoch 1's order): it cannot be read"
        in run.push(2)
    )
    ledger.lost.append(Lost((1, 3, 4), UNREAD))
    assert run.rounds.lost_by_name() == [
        "the samples (1, 3, 4) of 40 (place 3 of epoch 1's order): it cannot be read"
    ]


@pytest.mark.parametrize("how", ["in order", "another lease", "a phase that there is not"])
def test_who_leaves_without_dying_of_its_lease_does_not_count(how: str) -> None:
    run = trained(1, 2)
    lease = run.lease(1)
    run.unready(1)
    if how == "in order":
        run.leave(1)
    elif how == "another lease":
        run.leave(1, failed="load", lease=(0, 0, 1))
    else:
        run.leave(1, failed="lunch", lease=lease)
    ledger = run.rounds.ledger
    assert ledger is not None and not ledger.remembers


def test_a_worker_that_falls_silent_counts_unless_it_comes_back() -> None:
    run = trained(1, 2)
    ledger = run.rounds.ledger
    assert ledger is not None
    run.tick(30.0, 0, 2)
    assert [tuple(s) for s in ledger.state()["suspects"]] == [((0, 20, 30), 0, 1, 0, True)]
    run.hello(1)
    assert not ledger.remembers


def test_who_is_late_does_not_count() -> None:
    run = trained(1, 2)
    run.push(2)
    run.tick(29.0, 0, 1, 2), run.tick(60.0, 0, 1, 2)
    ledger = run.rounds.ledger
    assert ledger is not None and run.rounds.step == 2 and not ledger.remembers


def test_samples_that_cannot_be_read_are_skipped_beside_the_rest() -> None:
    run = trained(1, 2)
    assert run.push(1, 0, samples=8, unread=(1, 4)) == ["add 1.0 x8"]
    assert run.push(1, 1, samples=9, unread=(1,)) == [
        "refused: other samples could not be read than in the bucket before"
    ]
    for samples, unread in ((8, (4, 1)), (8, (1, 1)), (8, (1, 10)), (9, (1, 4)), (0, range(10))):
        assert "refused" in run.push(2, 0, samples=samples, unread=tuple(unread))[0]
    run.push(1, 1, samples=8, unread=(1, 4)), run.push(2)
    ledger = run.rounds.ledger
    assert ledger is not None and (ledger.done, ledger.skipped) == (38, 2)


def test_a_lease_of_which_nothing_can_be_read_is_skipped() -> None:
    run = trained(1, 2, samples=400)
    ledger = run.rounds.ledger
    assert ledger is not None
    run.tells(1, wire.Unreadable(9))  # of another round
    assert run.rounds.round is not None and run.rounds.round.members[1].bad is None
    run.tells(1, wire.Unreadable(run.rounds.round.number))
    run.push(2)
    assert (run.rounds.step, ledger.done, ledger.skipped, ledger.unread) == (2, 30, 10, 10)


def test_more_than_one_in_a_hundred_end_the_run_when_most_workers_met_them() -> None:
    run = trained(1, 2)
    for who in (1, 2):
        assert run.rounds.ending is None
        run.push(who, samples=8, unread=(1, 4))
    assert run.rounds.ending is not None
    why, error = run.rounds.ending
    assert error and why.startswith("4 samples could not be read, more than one in 100: first 21")


def test_one_worker_alone_cannot_end_the_run_so() -> None:
    run = trained(1, 2, 3, samples=400)
    run.push(1, samples=2, unread=tuple(range(8))), run.push(2), run.push(3)
    assert run.rounds.step == 2 and run.rounds.ending is None


def test_one_that_has_brought_nothing_and_cannot_read_what_others_could_is_sent_away() -> None:
    """It neither ends the run nor has all samples skipped, while those who can read are away."""
    run = trained(1, 2, samples=100, epochs=3)
    run.hello(3), run.join(3)
    run.tick(9.0, 0, 3), run.tick(18.0, 0, 3)  # the others are silent
    run.snapshot(3), run.ready(3)
    assert members(run) == [3]
    number = run.rounds.round.number if run.rounds.round is not None else 0
    effects = run.tells(3, wire.Unreadable(number))
    why = "worker 3 (pi) could not read 10 samples of the training set, others could"
    assert f"w3 <- reject: {why}" in effects and f"# {why}: worker 3 (pi) is sent away" in effects
    assert run.rounds.ending is None and run.ledger.unread == 10
    run.hello(1, "b"), run.follows(1, "b"), run.ready(1, "b")
    run.push(1, life="b", samples=9, unread=(0,))
    assert run.rounds.ending is None, "what it could not read is not held against others"
    run.hello(1, "c", reachable=False), run.follows(1, "c"), run.ready(1, "c")
    number = run.rounds.round.number if run.rounds.round is not None else 0
    run.tells(1, wire.Unreadable(number), "c")
    assert run.rounds.ending is not None, "it has contributed, whatever became of its connection"
    assert run.rounds.ending[0].startswith("21 samples could not be read")


def test_where_nothing_can_be_trained_on_the_run_fails() -> None:
    run = Run(num_workers=1, max_bad_rounds=3, observer=False)
    run.hello(1), run.join(1), run.ready(1, samples=1, batch=5)
    assert run.rounds.round is not None
    run.tells(1, wire.Unreadable(run.rounds.round.number))
    assert run.rounds.ended is not None
    assert run.rounds.ended.error and "no sample could be trained on" in run.rounds.ended.reason


def test_a_rest_of_one_is_part_of_the_lease_before_it() -> None:
    run = Run(num_workers=1, observer=False)
    run.hello(1), run.join(1), run.ready(1, samples=11, batch=10, least=2)
    assert run.lease(1) == (0, 0, 11)


def test_a_mistake_of_one_does_not_decide_the_length() -> None:
    run = Run(num_workers=2, observer=True).observer().workers(1, samples=8)
    run.leave(1)
    run.workers(2, 3, samples=64)
    ledger = run.rounds.ledger
    assert ledger is not None and ledger.samples == 64 and run.rounds.round is not None


def test_a_worker_may_push_fewer_local_steps_than_its_lease_is_for() -> None:
    run = Run(local_steps=4).observer().workers(1, 2, samples=100, batch=5)
    assert (run.lease(1), run.lease(2)) == ((0, 0, 20), (0, 20, 40))
    assert run.push(1, 0, samples=15, steps=4) == ["refused: 15 samples pushed for a lease of 20"]
    run.push(1, 0, samples=14, steps=3, unread=(2,))
    assert run.lease(1) == (0, 0, 15)
    assert run.push(1, 1, samples=20, steps=4) == [
        "refused: other samples could not be read than in the bucket before"
    ]
    assert run.push(1, 1, samples=10, steps=2, unread=(2,)) == [
        "refused: 10 samples pushed, 1 not readable for a lease of 15"
    ]
    run.push(1, 1, samples=14, steps=3, unread=(2,)), run.push(2, samples=20, steps=4)
    assert run.closes[0].contributors == {1: 14, 2: 20}
    assert run.sums() == "34 done, 0 partly, 1 skipped; waiting nothing"
    held = [lease for peer in run.rounds.peers.values() for lease in peer.leases]
    assert (0, 15, 20) in held  # for the round after the one that is open


def test_what_a_worker_did_not_come_to_comes_back_also_where_its_round_is_void() -> None:
    run = Run(local_steps=4, observer=False).workers(1, 2, samples=100, batch=5)
    run.push(1, 0, samples=15, steps=3)
    run.leave(1), run.leave(2)
    assert run.ledger.counted == 0 and leased(run.ledger) == 0
