"""The server's status of a run, made from its rounds in virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scripts import Run

from paramserver.protocol.messages import Spent, Vitals
from paramserver.rounds.disagreement import Comparison
from paramserver.rounds.events import Compared
from paramserver.server.overview import GONE_S, Overview, Totals, changed_settings
from paramserver.server.traffic import Traffic
from paramserver.settings import Settings
from paramserver.status.value import (
    EVALUATIONS_MAX,
    LINES_MAX,
    LOSSES_MAX,
    OBSERVER,
    ROUNDS_KEPT,
    SERVER,
    TIMES_MAX,
    EventKind,
    State,
    Status,
    from_json,
    to_json,
)


class Watched:
    """A run in a script, and its overview."""

    def __init__(self, workers: int = 2, **rules: object) -> None:
        self.run = Run(num_workers=workers, buckets=1, max_workers=64, **rules).observer()
        self.run.workers(*range(1, workers + 1), samples=1000, batch=10)
        self.overview = Overview(
            Settings(num_workers=workers), "id", "folder", "mini1", lambda address: "Ethernet"
        )
        self.traffic, self.totals = Traffic(), Totals()

    def round(self, *workers: int) -> None:
        self.run.now += 1.0
        for worker in workers:
            self.run.push(worker, 0, spent=Spent(0.5, 0.1, 0.5, 0.01))
        rounds = self.run.rounds
        self.totals = replace(
            self.totals,
            steps=rounds.step,
            samples=10 * rounds.step,
            sent_bytes=1000 * rounds.step,
            tallies={w: (t.rounds, t.samples, t.late) for w, t in rounds.tallies.items()},
        )

    def status(self) -> Status:
        """As a watcher gets it."""
        now = self.run.now
        made = self.overview.status(
            self.run.rounds, self.totals, self.traffic, Vitals(1, 2, 3), "", now, 1e9 + now
        )
        return from_json(to_json(made))


def test_machines_in_their_order_with_what_they_do() -> None:
    watched = Watched()
    status = watched.status()
    assert [m.id for m in status.machines] == [SERVER, OBSERVER, 1, 2]
    assert [m.state for m in status.machines] == [
        State.TRAINING, State.IDLE, State.TRAINING, State.TRAINING
    ]  # fmt: skip
    assert status.machines[0].host == "mini1" and status.machines[0].memory_total_bytes == 3
    watched.round(1, 2)
    watched.round(1, 2)
    status = watched.status()
    assert status.step == 2 and status.trains and status.learning_rate == 0.01
    assert status.steps_per_s == 1.0 and status.samples_per_s == 10.0
    assert status.sent_bytes_per_s == 1000.0
    one = status.machine(1)
    assert one is not None and (one.rounds, one.samples, one.samples_per_s) == (2, 20, 10.0)
    assert one.minute_rounds == 2 and one.minute.encode == pytest.approx(0.2)
    assert [took.step for took in status.rounds] == [1, 2]
    assert (status.samples.done, status.samples.leased, status.samples.of_epoch) == (40, 40, 1000)


def test_what_is_left_is_counted_in_the_batches_of_the_workers() -> None:
    """A loop of one's own has its own batch size, whatever the server's settings say."""
    watched = Watched(2, epochs=3)
    assert Settings().batch_size != 10
    assert watched.status().total_steps == 3 * 1000 / 20
    watched.round(1, 2)
    assert (watched.status().step, watched.status().total_steps) == (1, 150)


def test_what_is_left_does_not_grow_while_a_run_ends() -> None:
    """The bar of one that was half through stays there as its workers leave."""
    watched = Watched(2, epochs=3)
    watched.round(1, 2)
    assert watched.status().total_steps == 150
    watched.run.stop()
    for worker in (1, 2):
        watched.run.leave(worker, "stopped", finished=True)
        assert watched.status().total_steps == 150


def test_whose_gradients_disagree() -> None:
    """It trains on, and says so beside its trouble."""
    watched = Watched(3)
    compared = {w: Comparison(0.9 if w == 2 else 0.1, 1.0) for w in (1, 2, 3)}
    for _ in range(10):
        watched.run.handle(Compared(compared))
    two, one = watched.status().machine(2), watched.status().machine(1)
    assert two is not None and two.trouble == "disagrees in 10 of 10 rounds"
    assert one is not None and one.trouble == "" and two.state == State.TRAINING


def test_who_is_late_silent_or_gone() -> None:
    watched = Watched(3, timeout=0.4)
    watched.round(1, 2)
    watched.run.now += 0.6
    late = watched.status().machine(3)
    assert late is not None and late.state == State.LATE and late.trouble == "late 0.6 s"
    watched.run.tick(watched.run.now)
    watched.round(1, 2, 3)
    watched.run.heard(3)
    watched.run.now += 5.0
    for worker in (0, 1, 2):
        watched.run.heard(worker)
    silent = watched.status().machine(3)
    assert silent is not None and silent.state == State.SILENT
    assert silent.trouble == "silent for 5.0 s" and silent.last_seen_s == 5.0
    watched.run.leave(3)
    status = watched.status()
    gone = status.machine(3)
    assert gone is not None and gone.state == State.GONE and gone.samples_per_s is None
    assert [m.id for m in status.workers] == [1, 2]
    kinds = [(event.kind, event.machine) for event in status.events]
    assert kinds[-1] == (EventKind.GONE, 3) and (EventKind.JOINED, 3) in kinds
    watched.run.now += GONE_S + 1
    assert watched.status().machine(3) is None, "not for ever"


def test_links_and_bytes_are_of_each_machine() -> None:
    watched = Watched()
    one, two = (p.session for p in watched.run.rounds.peers.values() if p.role == "worker")
    watched.traffic.linked(one, "")
    watched.traffic.published_bytes = 500
    watched.traffic.linked(two, "10.0.0.2")
    watched.traffic.vitals[two] = Vitals(10, 20, 30, 61.5)
    watched.status()
    watched.run.now += 1.0
    watched.traffic.came(one, 300)
    watched.traffic.published_bytes = 1500
    watched.traffic.sent(two, 7)
    status = watched.status()
    first, second = status.workers
    assert (first.sent_bytes, first.received_bytes) == (300, 1500)
    assert (second.sent_bytes, second.received_bytes) == (0, 1007)
    assert first.sent_bytes_per_s == 300 and second.received_bytes_per_s == 1007
    assert second.temperature_c == 61.5 and first.memory_bytes is None
    kinds = {link.machine: (link.address, link.kind) for link in status.links}
    assert kinds[1] == ("", "this machine") and kinds[2] == ("10.0.0.2", "Ethernet")
    watched.traffic.forget(two)
    assert watched.traffic.bytes_of(two) == (0, 0)


def test_a_status_stays_small_whatever_the_run() -> None:
    watched = Watched(64, epochs=100)
    for i in range(1000):
        watched.overview.closed(i, 1 / (i + 1))
        watched.overview.evaluated(i, 0.5, {f"metric {k}": 1.0 for k in range(100)})
        watched.overview.said(f"line {i} " * 100, 1.0, warning=i % 2 == 0)
    for _ in range(ROUNDS_KEPT + 5):
        watched.round(*range(1, 65))
    status = watched.status()
    assert len(status.rounds) == TIMES_MAX // 64
    assert len(status.lines) == LINES_MAX and len(status.evaluations) <= EVALUATIONS_MAX
    assert (
        status.evaluations[-1].step == 999
        and status.evaluations[0].step < 1000 // EVALUATIONS_MAX * 2
    )
    assert len(to_json(status)) < 300_000


def test_the_losses_of_many_steps_are_thinned() -> None:
    watched = Watched()
    for step in range(5000):
        watched.overview.closed(step, float(step % 7))
        watched.overview.closed(step, float("nan"))
    losses = watched.status().losses
    assert LOSSES_MAX // 2 <= len(losses) <= LOSSES_MAX and losses[-1][0] == 4999
    assert all(2.5 < value < 3.5 for _, value in losses[:-1]), "means of many steps"


def test_settings_that_are_not_the_default() -> None:
    own = Settings(
        num_epochs=9,
        join="ps-secret",
        host_ip="10.0.0.1",
        bucket_mb=2.0,
        run_dir="/home/me",
        dataset={"name": "MNIST", "root": "/home/me/data"},
        model={"type": "my.module:Net", "depth": 3},
    )
    assert changed_settings(own) == {
        "num_epochs": "9", "model.type": "my.module:Net", "model.depth": "3"
    }  # fmt: skip
    assert changed_settings(Settings()) == {}
    assert changed_settings(Settings(codec="int8").with_bucket(linked=True)) == {"codec": "int8"}
    finely = Settings(min_bucket_mb=0.05).with_bucket(linked=True)
    assert changed_settings(finely) == {"min_bucket_mb": "0.05"}
