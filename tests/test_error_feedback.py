"""Error feedback: what is not sent now is sent later, once; a refused push leaves no trace."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor

from paramserver.protocol import messages as wire
from paramserver.tensors.bucket import BucketPlan, plan
from paramserver.tensors.codec import CODECS, codec_of_pushes
from paramserver.tensors.error_feedback import ErrorFeedback

LOSSY = [name for name, codec in CODECS.items() if codec.leaves_residual]
EXACT = [name for name, codec in CODECS.items() if not codec.leaves_residual]

LAYOUT = wire.Layout(
    (
        wire.Tensor("weight", (100, 30), "float32"),
        wire.Tensor("bias", (100,), "float32"),
        wire.Tensor("running_mean", (100,), "float32", "stat"),
        wire.Tensor("batches", (), "int64", "count"),
    )
)
RATIO = 0.02


@pytest.fixture
def cut() -> BucketPlan:
    """Four buckets: 2000 numbers of the weight, its other 1000 and the bias, 100 and 1."""
    made = plan(LAYOUT, bucket_mb=2000 * 4 / 2**20)
    assert [b.size for b in made.buckets] == [2000, 1100, 100, 1]
    return made


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


class Sender:
    """A sender with feedback, and what its receiver decodes."""

    def __init__(self, cut: BucketPlan, codec: str, ratio: float = RATIO) -> None:
        self.cut = cut
        self.feedback = ErrorFeedback(cut, codec_of_pushes(codec, ratio))

    def send(self, bucket: int, values: Tensor, absent: tuple[int, ...] = ()) -> Tensor:
        b = self.cut.buckets[bucket]
        given = self.feedback.values(b).copy_(values)
        buffers, scale = self.feedback.encode(b, given, absent)
        received = [bytearray(part) for part in buffers]
        codec = self.feedback.codec(b)
        assert codec.fits(b.size, received) is None
        return codec.decode(received, scale, torch.empty(b.size)).clone()

    def taken(self, bucket: int, values: Tensor, absent: tuple[int, ...] = ()) -> Tensor:
        arrived = self.send(bucket, values, absent)
        self.feedback.settled((bucket,))
        return arrived

    def refused(self, bucket: int, values: Tensor) -> None:
        self.send(bucket, values)
        self.feedback.settled(())


@pytest.mark.parametrize("codec", LOSSY)
def test_what_is_not_sent_at_once_is_sent_later(cut: BucketPlan, codec: str) -> None:
    sender = Sender(cut, codec)
    arrived = torch.zeros(2000, dtype=torch.float64)
    for seed in range(20):
        arrived += sender.taken(0, noise(2000, seed))
    # More rounds, with nothing new in them, bring the residual.
    for _ in range(300):
        arrived += sender.taken(0, torch.zeros(2000))
    whole = torch.stack([noise(2000, seed) for seed in range(20)]).double().sum(0)
    assert (arrived - whole).abs().max() < 1e-3


@pytest.mark.parametrize("codec", LOSSY)
def test_a_residual_weighs_what_it_weighed(cut: BucketPlan, codec: str) -> None:
    """A mean over 64 samples, of which a part is sent with means over 16: sums come out equal."""
    feedback = ErrorFeedback(cut, codec_of_pushes(codec, 0.3))
    b, values = cut.buckets[0], noise(2000)
    total = torch.zeros(b.size)
    for samples, now in ((64, values), *((16, torch.zeros(2000)) for _ in range(12))):
        given = feedback.values(b).copy_(now)
        buffers, scale = feedback.encode(b, given, samples=samples)
        received = [bytearray(part) for part in buffers]
        total += samples * feedback.codec(b).decode(received, scale, torch.empty(b.size))
        feedback.settled({0})
    torch.testing.assert_close(total, 64 * values, rtol=1e-2, atol=0.3)


@pytest.mark.parametrize("codec", EXACT)
def test_a_codec_that_leaves_no_residual_sends_each_gradient_as_it_is(
    cut: BucketPlan, codec: str
) -> None:
    sender = Sender(cut, codec)
    for seed in range(3):
        buffers, scale = CODECS[codec].encode(noise(2000, seed))
        alone = CODECS[codec].decode(buffers, scale, torch.empty(2000))
        assert torch.equal(sender.taken(0, noise(2000, seed)), alone)


@pytest.mark.parametrize("codec", LOSSY)
def test_buckets_have_residuals_of_their_own(cut: BucketPlan, codec: str) -> None:
    both, alone = Sender(cut, codec), Sender(cut, codec)
    for seed in range(3):
        both.send(1, noise(1100, seed + 10))
        interleaved = both.send(0, noise(2000, seed))
        both.feedback.settled((0, 1))
        assert torch.equal(interleaved, alone.taken(0, noise(2000, seed)))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("rounds_before", [0, 1, 4])
def test_a_refused_push_leaves_no_trace(cut: BucketPlan, codec: str, rounds_before: int) -> None:
    """Some worker computes its samples again: neither they nor the residual may count twice."""
    refused, never = Sender(cut, codec), Sender(cut, codec)
    for sender in (refused, never):
        for seed in range(rounds_before):
            sender.taken(0, noise(2000, seed))
    refused.refused(0, 5 * noise(2000, 98))
    refused.refused(0, 5 * noise(2000, 99))
    for seed in range(3):
        assert torch.equal(refused.taken(0, noise(2000, seed)), never.taken(0, noise(2000, seed)))


@pytest.mark.parametrize("codec", LOSSY)
def test_of_a_round_only_the_buckets_that_were_taken_count(cut: BucketPlan, codec: str) -> None:
    partly, first, second = Sender(cut, codec), Sender(cut, codec), Sender(cut, codec)
    partly.send(0, noise(2000))
    partly.send(1, noise(1100))
    partly.feedback.settled((0,))
    first.taken(0, noise(2000))
    assert torch.equal(partly.send(0, noise(2000, 1)), first.send(0, noise(2000, 1)))
    assert torch.equal(partly.send(1, noise(1100, 1)), second.send(1, noise(1100, 1)))


@pytest.mark.parametrize("codec", LOSSY)
def test_a_gradient_that_is_not_finite_is_refused_and_spoils_nothing(
    cut: BucketPlan, codec: str
) -> None:
    sender, never = Sender(cut, codec), Sender(cut, codec)
    bad = noise(2000)
    bad[7] = math.nan
    assert not math.isfinite(torch.linalg.vector_norm(sender.send(0, bad)))
    sender.feedback.settled(())
    assert torch.equal(sender.taken(0, noise(2000, 1)), never.taken(0, noise(2000, 1)))


@pytest.mark.parametrize("codec", LOSSY)
def test_the_residual_of_an_absent_tensor_waits_until_somebody_takes_it(
    cut: BucketPlan, codec: str
) -> None:
    """The bias ends the second bucket. Without a gradient no replica applies what comes for it."""
    sender, bias = Sender(cut, codec), slice(1000, 1100)
    first = torch.zeros(1100)
    first[bias] = noise(100)
    arrived = sender.taken(1, first)
    for seed in range(3):
        weight_only = noise(1100, seed)
        weight_only[bias] = 0.0
        while_absent = sender.taken(1, weight_only, absent=(1,))
        assert (while_absent[bias] == 0).all()
    later = torch.zeros(100, dtype=torch.float64)
    for _ in range(300):
        later += sender.taken(1, torch.zeros(1100))[bias]
    assert (arrived[bias] + later - first[bias]).abs().max() < 1e-3


@pytest.mark.parametrize("codec", CODECS)
def test_statistics_and_counters_go_as_they_are(cut: BucketPlan, codec: str) -> None:
    sender = Sender(cut, codec)
    for seed in range(3):
        assert torch.equal(sender.taken(2, noise(100, seed)), noise(100, seed))
        assert torch.equal(sender.taken(3, torch.tensor([12345.0])), torch.tensor([12345.0]))


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("is_taken", [True, False])
def test_one_rest_is_kept_and_another_only_while_under_way(
    cut: BucketPlan, codec: str, is_taken: bool
) -> None:
    feedback, b = ErrorFeedback(cut, codec_of_pushes(codec, RATIO)), cut.buckets[0]
    given: list[weakref.ref[Tensor]] = []
    for seed in range(2):
        values = noise(b.size, seed)
        given.append(weakref.ref(values))
        feedback.encode(b, values)
        del values
        if seed == 0:
            feedback.settled((0,))
    assert all(ref() is not None for ref in given)
    feedback.settled((0,) if is_taken else ())
    assert [ref() is not None for ref in given] == [not is_taken, is_taken]


@pytest.mark.parametrize("codec", EXACT)
def test_nothing_is_kept_where_nothing_is_left(cut: BucketPlan, codec: str) -> None:
    feedback, b = ErrorFeedback(cut, codec_of_pushes(codec, RATIO)), cut.buckets[0]
    values = noise(b.size)
    given = weakref.ref(values)
    feedback.encode(b, values)
    del values
    assert given() is None


@pytest.mark.parametrize("codec", LOSSY)
def test_with_feedback_both_ways_descent_arrives(cut: BucketPlan, codec: str) -> None:
    """Two workers pull against each other on every fifth number, harder than any pulls to the goal.
    Without feedback topk sends hardly anything else, and the residual is below the steps of
    int8."""
    up, down = [Sender(cut, codec, 0.1), Sender(cut, codec, 0.1)], Sender(cut, codec, 0.1)
    goal, apart = 0.01 * noise(2000, 1), torch.zeros(2000)
    apart[::5] = 0.2 * noise(400, 2)
    weights = torch.zeros(2000)
    for _ in range(300):
        first = up[0].taken(0, weights - goal + apart)
        second = up[1].taken(0, weights - goal - apart)
        weights -= 0.02 * down.taken(0, (first + second) / 2)
    assert (weights - goal).norm() < 0.18 * goal.norm()
