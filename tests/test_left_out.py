"""What a lossy codec leaves out of the averages of a bucket moves with the bucket: real sums, and
averages that the server and two shards make in turn."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.rounds.effects import Finish
from paramserver.server.data import Data
from paramserver.server.spread import Spread
from paramserver.settings import Settings
from paramserver.shard.adder import Adder
from paramserver.shard.memory import Memory
from paramserver.shard.orders import Orders
from paramserver.shard.process import Numbers
from paramserver.tensors.bucket import plan
from paramserver.tensors.codec import codec_of_averages

SIZE, RATIO = 64, 0.1
LAYOUT = wire.Layout((wire.Tensor("w", (SIZE,), "float32"), wire.Tensor("v", (SIZE,), "float32")))
DRAINED = 16
"""Rounds without gradients in which all that was left out arrives."""


class Makers:
    """A server and its shards, which answer at once or, with `slow`, when they are told to."""

    def __init__(self, codec: str, *, slow: bool = False) -> None:
        settings = Settings(
            codec_down=codec, topk_ratio=RATIO, bucket_mb=SIZE * 4 / 2**20, min_bucket_mb=None
        )
        self.own = Data(settings, "nonce", None)
        assert self.own.start(LAYOUT) is None
        assert self.own.plan is not None
        self.buckets = len(self.own.plan.buckets)
        assert self.buckets == 2
        self._cut = plan(LAYOUT, settings.bucket_size_mb, settings.min_bucket_mb)
        self._settings, self._codec = settings, codec_of_averages(codec, RATIO)
        self.spread = Spread(self.own, self._order, "nonce")
        self._adders: dict[int, Adder] = {}
        self._slow = slow
        self.orders: list[tuple[int, wire.Message]] = []
        self._unread: list[tuple[int, wire.Message, list[Any]]] = []
        self.round = self.step = self._number = 0
        self.pushed = torch.zeros(self.buckets, SIZE)
        self.averaged = torch.zeros(self.buckets, SIZE)
        self._made: list[list[Any]] = []  # by a shard, which has not told its scale yet
        self._sent: list[tuple[int, Tensor]] = []  # of the open round
        for shard in (1, 2):
            self.employ(shard)

    def employ(self, shard: int) -> None:
        s = self._settings
        orders = SimpleNamespace(codec=s.codec, codec_down=s.codec_down, topk_ratio=s.topk_ratio)
        numbers = Numbers(self._cut, cast(Orders, orders), Memory(0, wanted=False))
        self._adders[shard] = Adder(
            numbers,
            most=10,
            limit=1,
            tell=lambda message, *buffers: self._tells(shard, message, *buffers),
            send=lambda divide, buffers: self._made.append(buffers) or 1,
        )
        self.spread.employ(shard)

    def _order(self, shard: int, message: wire.Message, *buffers: Any) -> None:
        self.orders.append((shard, message))
        self._adders[shard].order(message, [bytearray(b) for b in buffers])

    def _tells(self, shard: int, message: wire.Message, *buffers: Any) -> None:
        copies = [bytearray(b) for b in buffers]
        match message:
            case wire.Arrived():
                self.spread.arrived(shard, message, 10)
            case wire.Averaged():
                assert self.spread.averaged(shard, message)
                self._note(message.bucket, self._made.pop(), message.scale)
            case wire.Recalled():
                self.spread.recalled(shard, message, copies)
            case wire.LeftOut():
                self._unread.append((shard, message, copies))
                if not self._slow:
                    self.read()

    def read(self) -> None:
        while self._unread:
            shard, message, buffers = self._unread.pop(0)
            self.spread.left_out(shard, cast(wire.LeftOut, message), buffers)

    def _note(self, bucket: int, buffers: list[Any], scale: float) -> None:
        numbers = self._codec.decode(buffers, scale, torch.empty(SIZE))
        self._sent.append((bucket, numbers.clone()))

    def average(
        self, makers: list[int], values: Tensor, *, void: bool = False, retires: bool = False
    ) -> None:
        """A round of one worker, whose buckets these makers average; `retires`: it is void because
        shard 1 does."""
        self.round += 1
        for bucket, maker in enumerate(makers):
            self._number += 1
            numbers = [bytearray(values[bucket].numpy())]
            push = wire.Push(
                round=self.round, bucket=bucket, samples=1, shard=maker, sealed=self._number
            )
            if maker:
                self._adders[maker].came("w1", self._number, push, numbers)
            assert self.spread.push("w1", 1, push, numbers)[0] is None
            self.spread.add(1, bucket, 1.0)
            self.spread.finish(Finish(self.round, self.step + 1, bucket, 1.0, (), maker))
        for average, frames in self.spread.due():
            self._note(average.bucket, frames[1:], average.scale)
        sent, self._sent = self._sent, []
        assert sorted(bucket for bucket, _ in sent) == list(range(self.buckets))
        if void or retires:
            if retires:
                self.spread.retire(1, passes_on=True)
            self.spread.forget_round(())
            return
        self.step += 1
        self.spread.close(close(self.round, self.step))
        self.spread.forget_round(tuple(range(self.buckets)))
        self.pushed += values
        for bucket, numbers in sent:
            self.averaged[bucket] += numbers

    def drain(self) -> None:
        for _ in range(DRAINED):
            self.average([0] * self.buckets, torch.zeros(self.buckets, SIZE))
            self.read()


def close(round: int, step: int) -> wire.Close:
    return wire.Close(
        nonce="nonce",
        round=round,
        step=step,
        lineage=f"s{step}",
        buckets=(0, 1),
        contributors={1: 1},
        late={},
        loss=None,
        seconds=0.0,
        ledger={},
    )


def gradient(seed: int) -> Tensor:
    return torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed))


SHARDS = st.sampled_from([0, 1, 2])
TURNS = st.lists(
    st.tuples(SHARDS, SHARDS, st.sampled_from([*["close"] * 3, "void", "retires", "retired"])),
    max_size=12,
)


@pytest.mark.parametrize("codec", ["topk", "int8"])
@given(turns=TURNS, slow=st.booleans())
def test_nothing_is_lost_or_counts_twice_whoever_averages(
    codec: str, turns: list[tuple[int, int, str]], slow: bool
) -> None:
    makers = Makers(codec, slow=slow)
    for seed, (first, second, what) in enumerate(turns):
        void, retires = what == "void", what == "retires"
        makers.average([first, second], gradient(seed), void=void, retires=retires)
        if seed % 3 == 2:
            makers.read()
        if what == "retired":
            makers.spread.retire(1, passes_on=True)
        if what in ("retires", "retired"):
            makers.read()
            assert makers.spread.has_taken_over(1)
            makers.spread.dismiss(1)
            makers.employ(1)
    makers.drain()
    assert not makers.spread.lost
    assert torch.allclose(makers.averaged, makers.pushed, atol=1e-3)


def test_what_a_shard_has_left_out_dies_with_it() -> None:
    makers = Makers("topk")
    makers.average([0, 1], gradient(0))
    makers.spread.dismiss(1)
    assert makers.spread.lost == {1}
    makers.drain()
    assert torch.allclose(makers.averaged[0], makers.pushed[0], atol=1e-2)
    assert not torch.allclose(makers.averaged[1], makers.pushed[1], atol=1e-2)


def test_it_waits_where_nobody_averages_the_bucket_yet() -> None:
    makers = Makers("topk", slow=True)
    makers.average([1, 0], gradient(0))
    makers.spread.retire(1, passes_on=True)
    assert not makers.spread.has_taken_over(1)
    makers.read()
    assert makers.spread.has_taken_over(1)
    makers.spread.dismiss(1)
    makers.average([2, 0], gradient(1))
    makers.drain()
    assert not makers.spread.lost
    assert torch.allclose(makers.averaged, makers.pushed, atol=1e-2)


def left_out_and_asked(makers: Makers) -> list[tuple[int, wire.Message]]:
    kinds = (wire.GiveUp, wire.LeftOut, wire.Recall)
    found = [(shard, m) for shard, m in makers.orders if isinstance(m, kinds)]
    makers.orders.clear()
    return found


def test_after_each_round_one_bucket_follows() -> None:
    makers = Makers("topk")
    makers.average([1, 1], gradient(0))
    assert left_out_and_asked(makers) == []
    for bucket in (0, 1):
        makers.average([2, 2], gradient(1))
        given = [(1, wire.GiveUp(bucket=bucket)), (2, wire.LeftOut(bucket=bucket))]
        assert left_out_and_asked(makers) == given
    makers.average([2, 2], gradient(2))
    assert left_out_and_asked(makers) == []


def test_who_leaves_is_asked_for_averages_first_and_what_it_tells_follows_bucket_by_bucket() -> (
    None
):
    makers = Makers("topk")
    makers.average([1, 1], gradient(0))
    makers.spread.retire(1, passes_on=True)
    found = [type(m) for _, m in left_out_and_asked(makers)]
    assert found == [wire.Recall, wire.Recall, wire.GiveUp, wire.GiveUp]
    makers.spread.dismiss(1)
    for bucket in (0, 1):
        makers.average([2, 2], gradient(1))
        assert left_out_and_asked(makers) == [(2, wire.LeftOut(bucket=bucket))]


def test_who_leaves_after_the_last_round_is_not_asked() -> None:
    makers = Makers("topk")
    makers.average([1, 1], gradient(0))
    makers.spread.retire(1, passes_on=False)
    assert {type(m) for _, m in left_out_and_asked(makers)} == {wire.Recall}
    assert makers.spread.has_taken_over(1)


def test_a_shard_that_does_not_answer_holds_back_its_own_buckets_only() -> None:
    makers = Makers("topk", slow=True)
    makers.average([1, 2], gradient(0))
    for _ in range(3):
        makers.average([0, 0], gradient(1))
    assert left_out_and_asked(makers) == [(1, wire.GiveUp(bucket=0)), (2, wire.GiveUp(bucket=1))]


def test_a_shard_that_dies_in_its_first_round_has_left_out_nothing() -> None:
    makers = Makers("topk")
    makers.average([0, 0], gradient(0))
    makers.average([1, 1], gradient(1), void=True)
    makers.spread.dismiss(1)
    makers.drain()
    assert not makers.spread.lost
    assert torch.allclose(makers.averaged, makers.pushed, atol=1e-3)


NUMBERS = bytes(4 * SIZE)


@pytest.mark.parametrize(
    ("bucket", "buffers", "why"),
    [
        (1, [NUMBERS], "nobody has asked"),
        (0, [NUMBERS[4:]], "another length"),
        (0, [NUMBERS, NUMBERS], "another length"),
        (0, [NUMBERS[4:] + struct.pack("<f", float("inf"))], "not finite, or huge"),
        (0, [NUMBERS[4:] + struct.pack("<f", 3e38)], "not finite, or huge"),
    ],
)
def test_what_no_shard_can_have_left_out_goes_to_nobody(
    bucket: int, buffers: list[bytes], why: str
) -> None:
    makers = Makers("topk", slow=True)
    makers.average([1, 0], gradient(0))
    makers.average([2, 0], gradient(1))  # now the first one is asked
    with pytest.raises(PeerError, match=why):
        makers.spread.left_out(1, wire.LeftOut(bucket=bucket), [bytearray(b) for b in buffers])
