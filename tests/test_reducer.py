"""Running sums: what comes out equals the weighted mean, and every payload is let go of once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.rounds.effects import Finish
from paramserver.server.data import Data
from paramserver.settings import Settings
from paramserver.tensors.bucket import BucketPlan, plan
from paramserver.tensors.codec import CODECS, codec_of, codec_of_averages, codec_of_pushes
from paramserver.tensors.codec.topk import TopK
from paramserver.tensors.reducer import Reducer

LAYOUT = wire.Layout(
    (
        wire.Tensor("weight", (40, 30), "float32"),
        wire.Tensor("bias", (30,), "float32"),
        wire.Tensor("running_mean", (30,), "float32", "stat"),
        wire.Tensor("seen", (), "int64", "count"),
    )
)
PLAN = plan(LAYOUT, 1.0)
GRAD, STAT, COUNT = range(3)
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2}


def reducer_of(plan: BucketPlan, up: str, down: str, ratio: float = 0.01) -> Reducer:
    return Reducer(plan, codec_of_pushes(up, ratio), codec_of_averages(down, ratio))


class Payloads:
    """Encoded pushes, and how often each was let go of."""

    def __init__(self) -> None:
        self.released: list[int] = []

    def made(self, values: torch.Tensor, codec: str) -> tuple[Any, float, Callable[[], None]]:
        buffers, scale = CODECS[codec].encode(values.clone())
        number = len(self.released)
        self.released.append(0)

        def release() -> None:
            self.released[number] += 1
            for buffer in buffers:  # a reader now gets rubbish
                torch.frombuffer(buffer, dtype=torch.uint8).fill_(0xFF)

        return buffers, scale, release


def average(reducer: Reducer, bucket: int, samples: int) -> Tensor:
    """What a reader makes of it."""
    buffers, scale, _ = reducer.finish(bucket, samples, ())
    return CODECS["float32"].decode(buffers, scale, torch.empty(PLAN.buckets[bucket].size))


@given(st.data())
def test_the_mean_is_weighted_by_samples(data: st.DataObject) -> None:
    """For every codec and any number of workers; a payload that was let go of is not read."""
    codec = data.draw(st.sampled_from(sorted(TOLERANCE)))
    samples = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=5))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    payloads, reducer = Payloads(), reducer_of(PLAN, codec, "float32")
    for _ in range(2):  # rounds
        pushed = [torch.randn(PLAN.buckets[GRAD].size) for _ in samples]
        for values, n in zip(pushed, samples, strict=True):
            buffers, scale, release = payloads.made(values, codec)
            why, norm = reducer.check(GRAD, buffers, scale)
            assert why is None and norm is not None
            assert abs(norm - values.norm()) < TOLERANCE[codec] * norm
            reducer.add(GRAD, buffers, scale, n, release)
        got = average(reducer, GRAD, sum(samples))
        wanted = sum(n * v.double() for v, n in zip(pushed, samples, strict=True)) / sum(samples)
        assert (got - wanted).abs().max() < TOLERANCE[codec] * 4
        reducer.close((GRAD,))
    assert set(payloads.released) == {1}


def test_in_topk_all_that_two_workers_chose_is_in_the_average() -> None:
    """Whatever each of them chose, and at once."""
    size, ratio = PLAN.buckets[GRAD].size, 0.1
    data = Data(Settings(codec="topk", topk_ratio=ratio), "nonce", None)
    data.start(LAYOUT)
    values = torch.zeros(2, size)
    for worker in (0, 1):
        values[worker, worker :: round(1 / ratio)] = torch.arange(1.0, round(ratio * size) + 1)
        buffers, scale = TopK(ratio).encode(values[worker].clone())
        push = wire.Push(round=1, bucket=GRAD, samples=1, scale=scale)
        assert data.push("session", worker, push, buffers)[0] is None
        data.add(worker, GRAD, 1)
    data.finish(Finish(round=1, step=1, bucket=GRAD, weight=2, absent=()))
    [(average, frames)] = data.due()
    came = CODECS["topk"].decode(frames[1:], average.scale, torch.empty(size))
    assert torch.allclose(came, values.mean(0), rtol=1e-3, atol=0)


def test_statistics_are_averaged_and_counters_take_the_maximum() -> None:
    payloads, reducer = Payloads(), reducer_of(PLAN, "int8", "int8")
    for n, stat, count in ((1, 0.0, 7.0), (3, 4.0, 5.0)):
        for bucket, value in ((STAT, stat), (COUNT, count)):
            full = torch.full((PLAN.buckets[bucket].size,), value)
            buffers, scale, release = payloads.made(full, "float32")
            reducer.add(bucket, buffers, scale, n, release)
    for bucket, wanted in ((STAT, 3.0), (COUNT, 7.0)):
        assert set(average(reducer, bucket, 1 + 3).tolist()) == {wanted}


EXACT = wire.Layout(
    (
        wire.Tensor("weight", (40, 30), "float32"),
        wire.Tensor("exact", (50, 20), "float64", "grad", "float64"),
        wire.Tensor("running_mean", (30,), "float64", "stat", "float64"),
        wire.Tensor("highest", (3,), "float32", "count"),
        wire.Tensor("seen", (4,), "int64", "count", "int64"),
    )
)


@given(
    st.sampled_from(sorted(CODECS)),
    st.lists(st.integers(1, 64), min_size=1, max_size=4),
    st.sampled_from([0.0001, 0.001, 1.0]),
    st.integers(0, 1000),
)
def test_float64_and_integers_are_exact_whatever_the_codec(
    codec: str, samples: list[int], bucket_mb: float, seed: int
) -> None:
    """Of each dtype and kind, in buckets of any size; payloads that were let go of are not read."""
    torch.manual_seed(seed)
    own, payloads = plan(EXACT, bucket_mb), Payloads()
    limit = max(8, int(bucket_mb * 2**20))
    assert all(b.nbytes <= limit for b in own.buckets)
    assert own.nbytes == 4 * 1200 + 8 * 1000 + 8 * 30 + 4 * 3 + 8 * 4
    reducer = reducer_of(own, codec, codec)
    for b in own.buckets:
        if b.sent == "float32" and b.kind == "grad":
            continue
        dtype = getattr(torch, b.sent)
        pushed = [torch.randn(b.size, dtype=torch.float64).mul_(2**60).to(dtype) for _ in samples]
        if b.kind == "count":
            pushed[0][0] = -(2**62) if b.sent == "int64" else -torch.inf
        for values, n in zip(pushed, samples, strict=True):
            buffers, scale, release = payloads.made(values, "float32")  # as it lies in memory
            assert reducer.check(b.index, buffers, scale)[0] is None
            reducer.add(b.index, buffers, scale, n, release)
        buffers, scale, _ = reducer.finish(b.index, sum(samples), ())
        got = codec_of(b.kind, b.sent, CODECS[codec]).decode(
            buffers, scale, torch.empty(b.size, dtype=dtype)
        )
        if b.kind == "count":
            assert torch.equal(got, torch.stack(pushed).amax(0))
        else:
            wanted = sum(n * v for v, n in zip(pushed, samples, strict=True)) / sum(samples)
            assert (got - wanted).abs().max() <= 2.0**-50 * torch.stack(pushed).abs().max()
    assert set(payloads.released) <= {1}


def test_numbers_in_float64_are_looked_at_too() -> None:
    own = plan(EXACT, 1.0)
    reducer = reducer_of(own, "topk", "float32")
    exact = next(b for b in own.buckets if b.sent == "float64" and b.kind == "grad")
    values = torch.full((exact.size,), 1e200, dtype=torch.float64)
    why, norm = reducer.check(exact.index, CODECS["float32"].encode(values)[0], 1.0)
    assert why is None and norm is not None and norm > 1e200
    values[3] = torch.nan
    why, norm = reducer.check(exact.index, CODECS["float32"].encode(values)[0], 1.0)
    assert why is not None and "not all of its numbers are finite" in why and norm is None


@pytest.mark.parametrize("pushes", [1, 2])
def test_a_void_round_lets_go_of_its_payloads(pushes: int) -> None:
    payloads, reducer = Payloads(), reducer_of(PLAN, "float32", "float32")
    for _ in range(pushes):
        buffers, scale, release = payloads.made(torch.ones(PLAN.buckets[GRAD].size), "float32")
        reducer.add(GRAD, buffers, scale, 1, release)
    reducer.close(())
    assert payloads.released == [1] * pushes


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 1000))
def test_of_two_workers_it_does_not_matter_who_comes_first(one: int, other: int, seed: int) -> None:
    torch.manual_seed(seed)
    pushed = [(torch.randn(PLAN.buckets[GRAD].size), n) for n in (one, other)]
    results = []
    for order in (pushed, pushed[::-1]):
        payloads, reducer = Payloads(), reducer_of(PLAN, "float32", "float32")
        for values, n in order:
            buffers, scale, release = payloads.made(values, "float32")
            reducer.add(GRAD, buffers, scale, n, release)
        results.append(average(reducer, GRAD, one + other))
    assert torch.equal(*results)


@pytest.mark.parametrize("bucket", [-1, len(PLAN.buckets), 999])
def test_a_bucket_that_there_is_not_is_a_mistake_of_its_sender(bucket: int) -> None:
    with pytest.raises(PeerError, match="there is no bucket"):
        reducer_of(PLAN, "float32", "float32").check(bucket, [bytes(4)], 1.0)
