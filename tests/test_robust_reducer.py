"""Robust averages of a round's pushes: what is kept for them, what of them counts, who is named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import WINDOW
from paramserver.rounds.disagreement import KEPT, NAMED, Comparison, Disagreement
from paramserver.rounds.effects import Finish
from paramserver.server.data import Data
from paramserver.settings import Settings
from paramserver.tensors.codec import CODECS, codec_of, codec_of_averages, codec_of_pushes
from paramserver.tensors.robust_reducer import RobustReducer

LAYOUT = wire.Layout(
    (
        wire.Tensor("weight", (40, 30), "float32"),
        wire.Tensor("bias", (30,), "float32"),
        wire.Tensor("exact", (50,), "float64", "grad", "float64"),
        wire.Tensor("running_mean", (30,), "float32", "stat"),
        wire.Tensor("seen", (), "int64", "count", "int64"),
    )
)
GRAD, EXACT, STAT, COUNT = range(4)
SIZES = (1230, 50, 30, 1)


class Server:
    """`Data` with these settings, in rounds of a few workers' pushes."""

    def __init__(self, layout: wire.Layout = LAYOUT, **settings: Any) -> None:
        self.settings = Settings(**settings)
        self.data = Data(self.settings, "nonce", None)
        self.data.start(layout)
        assert self.data.plan is not None
        self.plan = self.data.plan

    def push(
        self, worker: int, bucket: int, values: Tensor, weight: int = 1, absent: Sequence[int] = ()
    ) -> None:
        b = self.plan.buckets[bucket]
        up = codec_of(b.kind, b.sent, codec_of_pushes(self.settings.codec, 0.1))
        buffers, scale = up.encode(values.clone())
        push = wire.Push(round=1, bucket=bucket, samples=1, scale=scale, absent=tuple(absent))
        assert self.data.push("session", worker, push, buffers)[0] is None
        self.data.add(worker, bucket, weight)

    def average(self, bucket: int, absent: Sequence[int] = ()) -> Tensor:
        b = self.plan.buckets[bucket]
        self.data.finish(Finish(round=1, step=1, bucket=bucket, weight=1, absent=tuple(absent)))
        [(average, frames)] = self.data.due()
        down = codec_of(b.kind, b.sent, codec_of_averages(self.settings.codec_of_averages, 0.1))
        out = torch.empty(b.size, dtype=getattr(torch, b.sent))
        return down.decode(frames[1:], average.scale, out).clone()

    def of(self, bucket: int, pushed: Sequence[Tensor], weights: Sequence[int] = ()) -> Tensor:
        """The average of a bucket that these workers push."""
        for worker, values in enumerate(pushed, 1):
            self.push(worker, bucket, values, weights[worker - 1] if weights else 1)
        return self.average(bucket)


def randoms(count: int, bucket: int = GRAD, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(count)
    same = torch.randn(SIZES[bucket])
    return [(same + 0.3 * torch.randn(SIZES[bucket])).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("rule", ["trimmed", "median", "clipped"])
def test_the_order_in_which_pushes_come_changes_no_bit(rule: str) -> None:
    pushed, weights = randoms(5), [3, 1, 4, 1, 5]
    one, two = Server(aggregate=rule), Server(aggregate=rule)
    for worker in range(5):
        one.push(worker, GRAD, pushed[worker], weights[worker])
    for worker in (3, 0, 4, 2, 1):
        two.push(worker, GRAD, pushed[worker], weights[worker])
    assert torch.equal(one.average(GRAD), two.average(GRAD))


@pytest.mark.parametrize("codec", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("rule", ["trimmed", "median", "clipped"])
def test_a_liar_is_cut_away_with_any_codec(rule: str, codec: str) -> None:
    pushed = randoms(5)
    server = Server(aggregate=rule, codec=codec, max_norm_ratio=None)
    honest = torch.stack(pushed).mean(0)
    got = server.of(GRAD, [*pushed[:4], -1e4 * pushed[4]])
    pulled = 2 / 5 if rule == "clipped" else 0.0  # one of five pulls the other way
    assert (got - honest).norm() < (0.25 + pulled) * honest.norm()


def test_of_a_bucket_that_some_did_not_push_those_count_that_did() -> None:
    """A partial round: two of four cannot be trimmed, so it is their mean."""
    pushed, server = randoms(2), Server(aggregate="trimmed")
    assert torch.allclose(server.of(GRAD, pushed), torch.stack(pushed).mean(0))


@pytest.mark.parametrize("rule", ["trimmed", "median"])
def test_a_parameter_that_some_lack_is_the_middle_of_the_others_in_their_share(rule: str) -> None:
    """As much as with the mean, where those agree: two of six workers lack the bias, and one of the
    others lies."""
    server = Server(aggregate=rule)
    for worker in range(6):
        values = torch.ones(SIZES[GRAD])
        values[1200:] = 0.0 if worker < 2 else (1e6 if worker == 5 else 3.0)
        server.push(worker, GRAD, values, absent=[1] if worker < 2 else ())
    got = server.average(GRAD)
    assert torch.allclose(got[:1200], torch.ones(1200)) and torch.allclose(
        got[1200:], torch.tensor(2.0)
    )


@pytest.mark.parametrize("rule", ["trimmed", "clipped"])
def test_a_parameter_that_all_lack_is_zero_and_has_no_centre(rule: str) -> None:
    server = Server(aggregate=rule)
    for absent in ((), (1,), ()):
        for worker in range(3):
            values = torch.full((SIZES[GRAD],), 2.0)
            values[1200:] *= not absent
            server.push(worker, GRAD, values, absent=absent)
        got = server.average(GRAD, absent)
        assert torch.allclose(got[:1200], torch.tensor(2.0))
        assert torch.allclose(got[1200:], torch.tensor(0.0 if absent else 2.0))
        server.data.forget_round((GRAD,))


def test_what_nobody_has_does_not_follow_the_centre() -> None:
    """Clipped gradients stay near the average before; a parameter that all lack has none."""
    server = Server(aggregate="clipped", clip_tau=1.0)
    for absent in ((), (1,)):
        values = torch.full((SIZES[GRAD],), 2.0)
        values[1200:] *= not absent
        for worker in range(3):
            server.push(worker, GRAD, values, absent=absent)
        got = server.average(GRAD, absent)
        server.data.forget_round((GRAD,))
    assert got[1200:].eq(0).all() and got[:1200].ne(0).all()


def test_float64_statistics_and_counters_are_robust_too() -> None:
    server = Server(aggregate="median")
    exact = [torch.full((50,), v, dtype=torch.float64) for v in (1.0, 1.0 + 1e-12, 9.0)]
    assert torch.equal(server.of(EXACT, exact), exact[1])
    stats = [torch.full((30,), v) for v in (1.0, 2.0, 1e9)]
    assert torch.equal(server.of(STAT, stats), stats[1])
    counts = [torch.tensor([v]) for v in (7, 8, 2**60)]
    assert server.of(COUNT, counts).tolist() == [8]


def test_a_set_length_is_for_gradients_alone() -> None:
    """The running mean of a BatchNorm may move as far as it does."""
    server = Server(aggregate="clipped", clip_tau=1e-3)
    stats = [torch.full((30,), 5.0)] * 3
    assert torch.allclose(server.of(STAT, stats), stats[0])
    assert server.of(GRAD, randoms(3)).norm() <= 1.0001e-3


def test_the_centre_is_the_average_before_of_a_round_that_counted() -> None:
    server = Server(aggregate="clipped", clip_tau=0.5)
    far = torch.zeros(SIZES[GRAD])
    far[0] = 10.0
    for expected, counted in ((0.5, True), (1.0, False), (1.0, True), (1.5, True)):
        got = server.of(GRAD, [far, far])
        assert got[0] == pytest.approx(expected) and got[1:].eq(0).all()
        server.data.forget_round((GRAD,) if counted else ())


def test_a_server_that_was_started_again_begins_at_zero() -> None:
    server = Server(aggregate="clipped", clip_tau=0.5)
    far = torch.full((SIZES[GRAD],), 1.0)
    first = server.of(GRAD, [far, far])
    server.data.forget_round((GRAD,))
    assert server.of(GRAD, [far, far]).norm() > 1.5 * first.norm()
    server.data.forget_round((GRAD,))
    server.data.start(LAYOUT)
    assert torch.equal(server.of(GRAD, [far, far]), first)


def test_what_a_codec_leaves_of_a_robust_average_comes_with_the_next_one() -> None:
    """And no residual is of the liar's numbers."""
    server = Server(aggregate="median", codec_down="int8")
    pushed = randoms(4)
    total = torch.zeros(SIZES[GRAD])
    for _ in range(50):
        total += server.of(GRAD, [*pushed, torch.full((SIZES[GRAD],), 1e6)])
        server.data.forget_round((GRAD,))
    wanted = torch.stack([*pushed, torch.full((SIZES[GRAD],), 1e6)]).median(0).values
    assert torch.allclose(total / 50, wanted, atol=2e-3)


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_local_steps_are_scaled_to_their_median_norm(rule: str) -> None:
    """One worker went a hundred times as far as the others, one nowhere."""
    server = Server(aggregate=rule, local_steps=8, scale_to_median=True)
    same = torch.full((SIZES[GRAD],), 1.0)
    pushed = [same, 2 * same, 3 * same, 100 * same, 0 * same]
    scaled = [2.5, 2.5, 2.5, 2.5, 0.0]
    wanted = torch.tensor(sum(scaled) / 5 if rule == "mean" else 2.5)
    assert torch.allclose(server.of(GRAD, pushed), wanted)
    stats = [torch.full((30,), v) for v in (1.0, 3.0, 5.0, 15.0, 1.0)]  # these are no steps
    assert torch.allclose(server.of(STAT, stats), torch.tensor(5.0 if rule == "mean" else 3.0))


# ---------------------------------------------------------------------- what is kept


def test_what_is_kept_are_the_pushes_of_the_buckets_under_way() -> None:
    """Of 40 buckets and 8 workers, as the pacing lets them come: a copy of each of the few buckets
    from each worker, not of the gradient, and all of them are let go of, once."""
    layout = wire.Layout(tuple(wire.Tensor(f"w{i}", (2500,), "float32") for i in range(40)))
    server = Server(layout, aggregate="trimmed", bucket_mb=10_000 / 2**20)
    assert len(server.plan.buckets) == 40
    reducer = server.data._reducer
    assert isinstance(reducer, RobustReducer)
    kept = most = 0
    released = [0] * 320

    def add(worker: int, bucket: int) -> None:
        nonlocal kept, most
        buffers, scale = CODECS["float32"].encode(torch.randn(2500))
        assert isinstance(reducer, RobustReducer)

        def release() -> None:
            nonlocal kept
            kept -= 10_000
            released[bucket * 8 + worker] += 1

        reducer.check(bucket, buffers, scale)
        reducer.add(bucket, buffers, scale, 32, release, worker)
        kept += 10_000
        most = max(most, kept)

    for bucket in range(40 + WINDOW - 1):
        for worker in range(8):
            if bucket < 40:
                add(worker, bucket)
        if bucket >= WINDOW - 1:
            server.average(bucket - WINDOW + 1)
    assert most == WINDOW * 8 * 10_000 and kept == 0 and set(released) == {1}
    assert not reducer._rows or sum(r.nbytes for r in reducer._rows.values()) == 8 * 10_000
    add(0, 0)
    reducer.close(())
    assert kept == 0


def test_the_mean_keeps_no_copies() -> None:
    assert not isinstance(Server().data._reducer, RobustReducer)


# ---------------------------------------------------------------------- who is named


def compared(rule: str, pushed: Sequence[Tensor], weights: Sequence[int] = ()) -> set[int]:
    """The workers that are named after ten such rounds."""
    server, found, named = Server(aggregate=rule), Disagreement(), set()
    for _ in range(KEPT):
        server.of(GRAD, pushed, weights)
        named |= set(found.note(server.data.comparisons()))
        server.data.forget_round((GRAD,))
    return named


@pytest.mark.parametrize("rule", ["trimmed", "median", "clipped"])
@pytest.mark.parametrize("count", [3, 4, 8])
def test_a_worker_that_sends_rubbish_is_named(rule: str, count: int) -> None:
    good = randoms(count)
    torch.manual_seed(1)
    for bad in (10 * good[1], -good[1], torch.zeros_like(good[1]), 30 * torch.randn(SIZES[GRAD])):
        assert compared(rule, [good[0], bad, *good[2:]]) == {2}, bad.norm()


@pytest.mark.parametrize("rule", ["trimmed", "median", "clipped"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_nobody_is_named_where_all_are_alike(rule: str, count: int) -> None:
    assert compared(rule, randoms(count)) == set()
    torch.manual_seed(2)
    assert compared(rule, [torch.randn(SIZES[GRAD]) for _ in range(count)]) == set()
    assert compared(rule, [torch.zeros(SIZES[GRAD])] * count) == set()


def test_a_gradient_of_few_samples_is_noisier_by_right() -> None:
    pushed = randoms(4)
    pushed[0] += 3.0 * torch.randn(SIZES[GRAD])
    assert compared("trimmed", pushed, [1, 32, 32, 32]) == set()
    assert compared("trimmed", pushed, [32, 32, 32, 32]) == {1}


@pytest.mark.parametrize("rule", ["trimmed", "median", "clipped"])
def test_one_that_always_sends_the_same_gradient_is_named(rule: str) -> None:
    """It may be as good as any other, and never the outermost one."""
    server, found, named = Server(aggregate=rule), Disagreement(), set()
    torch.manual_seed(1)
    stuck = 1.0 + 0.3 * torch.randn(SIZES[GRAD])
    for number in range(KEPT + 1):
        pushed = [stuck, *(1.0 + 0.3 * torch.randn(SIZES[GRAD]) for _ in range(3))]
        server.of(GRAD, pushed, ())
        named |= set(found.note(server.data.comparisons()))
        server.data.forget_round((GRAD,))
        assert not named or number >= NAMED
    assert named == {1}


def odd(worker: int | None, count: int = 4) -> dict[int, Comparison]:
    return {w: Comparison(0.9 if w == worker else 0.2, 1.0) for w in range(1, count + 1)}


def test_it_takes_nine_of_ten_rounds_and_is_said_once_until_it_was_well_again() -> None:
    found = Disagreement()
    rounds = [odd(3)] * 5 + [odd(None)] + [odd(3)] * 3
    assert [found.note(each) for each in rounds] == [[]] * 9 and found.trouble(3) == ""
    assert found.note(odd(3)) == [3]
    assert found.trouble(3) == f"disagrees in {NAMED} of {KEPT} rounds" and found.trouble(1) == ""
    assert all(found.note(odd(3)) == [] for _ in range(20))
    assert all(found.note(odd(None)) == [] for _ in range(5)) and found.trouble(3) == ""
    assert [found.note(odd(3)) for _ in range(9)][-1] == [3]


def test_where_half_disagree_nobody_is_the_odd_one() -> None:
    found = Disagreement()
    two = {1: Comparison(0.9, 1.0), 2: Comparison(0.9, 1.0)} | {
        w: Comparison(0.0, 1.0) for w in (3, 4)
    }
    assert all(found.note(two) == [] for _ in range(2 * KEPT))
    alone = {1: Comparison(0.9, -1.0)}
    assert all(found.note(alone) == [] for _ in range(2 * KEPT))
