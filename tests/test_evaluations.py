"""Workers that evaluate while the others wait, and scripts that stop the run for all."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from crew import Noise, loss, perceptron
from scripts import Run, but_words
from whole import DEADLINE_S, Served, free_port

import workers
from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from workers.cluster import Cluster


def trained(*, evaluates: int = 1, **rules: Any) -> Run:
    """Two workers with one step in the log, of whom one evaluates now."""
    run = Run(buckets=1, observer=False, timeout=1.0, heartbeat_timeout=10.0, **rules)
    run.workers(1, 2)
    run.push(1), run.push(2)
    run.tells(evaluates, wire.Evaluating(True))
    return run


def test_the_open_round_waits_for_a_worker_that_evaluates_and_its_time_counts_nowhere() -> None:
    run = trained()
    run.push(2)
    assert run.rounds.next_deadline() is None
    for now in (5.0, 40.0, 90.0):
        assert run.tick(now, 1, 2) == []
    assert run.rounds.phase(90.0) == "worker 1 (pi) evaluates, the others wait"
    run.tells(1, wire.Evaluating(False))
    assert run.rounds.phase(90.0) == "training"
    assert run.tick(90.9, 1, 2) == []  # it has the usual time now
    assert "in it 1:10 2:10" in run.push(1)[-1]
    assert run.rounds.peers["w1"].push_time_p95 == pytest.approx(0.9)
    assert run.closes[-1].seconds == pytest.approx(0.9)


def test_after_its_evaluation_a_worker_may_be_late_as_ever() -> None:
    run = trained()
    run.push(2)
    run.tick(90.0, 1, 2)
    run.tells(1, wire.Evaluating(False))
    assert "late 1 (late (" in " ".join(run.tick(91.0, 1, 2))


def test_no_round_opens_while_a_worker_evaluates_that_has_no_part_in_it() -> None:
    run = trained()
    run.unready(1)
    assert not any("open" in line for line in run.push(2))
    assert run.tick(60.0, 1, 2) == ["# worker 1 (pi) evaluates, the others wait"]
    assert "open 3" in run.tells(1, wire.Evaluating(False))[-1]


def test_a_worker_that_evaluates_for_ever_is_waited_for_no_longer() -> None:
    run = trained(idle_timeout=100.0)
    run.push(2)
    assert run.tick(49.0, 1, 2) == []
    said = run.tick(50.0, 1, 2)
    assert said == ["# worker 1 (pi) has evaluated for 50 s: the others go on"]
    assert any("close 2" in line and "late 1" in line for line in run.tick(51.0, 1, 2))
    run.tells(1, wire.Evaluating(False)), run.tells(1, wire.Evaluating(True))
    assert run.rounds.phase(51.0) == "training"  # it has brought nothing since
    assert run.rounds.ending is None


def test_its_time_begins_anew_with_each_gradient_in_the_log() -> None:
    run = trained(idle_timeout=100.0)
    for now in (40.0, 80.0, 120.0):
        run.push(2)
        assert run.tick(now, 1, 2) == []
        run.tells(1, wire.Evaluating(False))
        run.push(1)
        run.tells(1, wire.Evaluating(True))
    assert [c.contributors for c in run.closes] == [{1: 10, 2: 10}] * 4


@pytest.mark.parametrize("gone", ["leaves", "silent"])
def test_a_worker_that_goes_while_it_evaluates_holds_nobody_up(gone: str) -> None:
    run = trained()
    run.push(2)
    effects = run.leave(1) if gone == "leaves" else run.tick(11.0, 2)
    assert any("close 2" in line and "open 3" in line for line in effects)


def test_who_has_nothing_in_the_log_makes_nobody_wait_and_stops_nothing() -> None:
    run = trained(evaluates=3)  # is not even here
    run.hello(3), run.join(3), run.push(1), run.push(2), run.snapshot(3)
    run.tells(3, wire.Evaluating(True))
    assert run.rounds.phase(1.0) == "training"
    [said] = run.tells(3, wire.StopRun("it is mine"))
    assert said == "# worker 3 (pi) cannot stop the run before its first step"
    assert run.rounds.ending is None


def test_the_observer_stops_the_run_by_what_it_has_evaluated() -> None:
    """One that was started again, too, of which nothing is in the log."""
    run = Run(buckets=1, observer=False).workers(1, 2)
    run.push(1), run.push(2)
    run.hello(0), run.join(0), run.push(1), run.push(2), run.snapshot(0)
    assert run.rounds.peers["obs"].state == "replica"
    run.tells(0, wire.StopRun("accuracy got no better"))
    run.tells(0, wire.Stand(step=2, kept=True))
    end = run.rounds.ended
    assert end is not None and end.stopped and not end.error
    assert end.reason == "the observer stopped it: accuracy got no better"


def test_a_script_stops_the_run_for_all_in_order() -> None:
    run = trained()
    effects = but_words(run.tells(2, wire.StopRun("no better for\x1b three epochs")))
    assert effects[-1].startswith("end at step 1: worker 2 (pi) stopped it: no better for")
    assert "\x1b" not in effects[-1]
    end = run.rounds.ended
    assert end is not None and end.stopped and not end.error
    assert run.tells(1, wire.StopRun("me too")) == []


def test_when_all_have_finished_a_run_of_a_shared_set_is_over_at_once() -> None:
    run = trained()
    run.leave(1, "finished")
    assert run.rounds.ending is None
    assert run.leave(2, "finished")[-1] == (
        "end at step 1: every worker has finished, before all samples were done"
    )


@pytest.mark.parametrize("how", [{"error": True}, {}])
def test_where_one_may_come_back_a_run_of_a_shared_set_waits(how: dict[str, Any]) -> None:
    run = trained()
    run.leave(1, "SIGTERM", **how)
    run.leave(2, "finished")
    assert run.rounds.ending is None


# ---------------------------------------------------------------------------------- real loops


def work(cluster: Cluster, number: int, each: Any) -> int:
    setup = perceptron(number)
    model, optimizer = cluster.attach(setup.model, setup.optimizer)
    steps = 0
    for x, y, _ in cluster.batches(Noise(4000), batch_size=4):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()
        steps += 1
        each(cluster, steps)
    return steps


def test_a_stop_ends_the_loops_of_all_and_their_scripts_go_on() -> None:
    def early(cluster: Cluster, steps: int) -> None:
        if cluster.worker_id == 1 and steps == 3:
            cluster.stop("the loss is good enough")

    def one(number: int) -> tuple[int, wire.End | None]:
        with served.join(number, served.say) as cluster:
            return work(cluster, number, early), cluster.end

    with Served(num_workers=2, heartbeat_timeout=60.0) as served:
        both = [served.start(one, number) for number in (1, 2)]
        served.wait(*both, served.end)
    end = served.end.result()
    assert "stopped it: the loss is good enough" in end.reason and not end.error
    assert [f.result()[0] for f in both] in ([3, 3], [3, 4]) and end.step == 3
    assert all(e is not None and e.reason == end.reason for _, e in (f.result() for f in both))


def test_others_wait_for_an_evaluation_as_long_as_it_takes() -> None:
    """With 0.5 s for who is late, and an evaluation that lasts far longer."""
    waited = threading.Event()

    def each(cluster: Cluster, steps: int) -> None:
        if cluster.worker_id == 1 and steps == 2:
            with cluster.evaluating():
                assert waited.wait(DEADLINE_S)
        if steps == 4:
            cluster.stop("enough")

    def one(number: int) -> None:
        with served.join(number, served.say) as cluster:
            work(cluster, number, each)

    with Served(num_workers=2, timeout=0.5) as served:
        both = [served.start(one, number) for number in (1, 2)]
        served.until(lambda: served.server.rounds._evaluations.active)
        since = next(iter(served.server.rounds._evaluations.active.values())).evaluates_since
        served.until(lambda: _now(served) > since + 1.5)
        assert len(served.closes) == 2
        waited.set()
        served.wait(*both, served.end)
    assert all(len(c.contributors) == 2 for c in served.closes)


def _now(served: Served) -> float:
    return max(p.last_seen for p in served.server.rounds.peers.values())


def test_before_attach_there_is_nothing_to_stop_or_to_wait_for() -> None:
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        with pytest.raises(UserError, match="before attach"):
            cluster.stop("so soon")
        with pytest.raises(UserError, match="before attach"), cluster.evaluating():
            pass


def test_after_leave_every_call_says_how_to_take_part_again() -> None:
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        for model, optimizer in ((setup.optimizer, setup.model), (setup.model, torch.optim.SGD)):
            with pytest.raises(UserError, match=r"attach\(\) was given a ") as other:
                cluster.attach(model, optimizer)  # type: ignore[type-var, arg-type]
            assert "attach(model, optimizer)" in other.value.hint
        _, attached = cluster.attach(setup.model, setup.optimizer)
        with pytest.raises(UserError, match="called twice") as twice:
            cluster.attach(setup.model, setup.optimizer)
        assert "leave()" in twice.value.hint
    for call in (
        lambda: cluster.batches(Noise(8)),
        lambda: next(cluster.own_batches([1])),
        lambda: next(cluster.epochs()),
        lambda: cluster.stop("too late"),
        lambda: cluster.attach(setup.model, setup.optimizer),
        attached.step,
    ):
        with pytest.raises(UserError, match=r"\(\) after leave\(\)") as late:
            call()
        assert "join()" in late.value.hint


def test_alone_a_stop_ends_the_loop_and_an_evaluation_is_one() -> None:
    def each(cluster: Cluster, steps: int) -> None:
        with cluster.evaluating():
            if steps == 2:
                cluster.stop("enough")

    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        setup = perceptron(1)
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        cluster.stop("at once")
        for x, y, _ in cluster.batches(Noise(16), batch_size=4):
            loss(model, x, y).backward()
            optimizer.step()
        assert cluster.end is not None and cluster.end.step == 1

    with workers.join(port=free_port(), say=lambda line: None) as cluster:
        assert work(cluster, 1, each) == 2
        assert cluster.end is not None and not cluster.end.error
        assert (cluster.end.reason, cluster.end.step) == ("stopped: enough", 2)
