"""The two ends of a snapshot, without a network: pieces in any order, and one wrong bit."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paramserver.errors import PeerError
from workers.link.snapshot import Giving, Taking, most_bytes
from workers.replica.replica import Replica


def a_replica() -> Replica:
    model = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Replica(model, optimizer, bucket_mb=1e-4, codec="float32")


REPLICA = a_replica()


def both_ends() -> tuple[Giving, Taking]:
    giving = Giving(1, REPLICA)
    taking = Taking(giving.manifest(REPLICA), most_bytes(REPLICA))
    assert len(taking.pieces) > 3
    return giving, taking


def send(
    giving: Giving, taking: Taking, order: Iterable[int], bit: tuple[int, int] = (-1, 0)
) -> None:
    """`bit`: the piece, and which of its bits is turned over on its way."""
    for number in order:
        piece, content = giving.give(number)
        bits = bytearray(content)
        if number == bit[0]:
            bits[bit[1] // 8] ^= 1 << bit[1] % 8
        taking.take(number, piece.digest, [bits])


@given(st.randoms(use_true_random=False))
def test_a_snapshot_may_come_in_any_order(random: Random) -> None:
    giving, taking = both_ends()
    order = list(range(len(taking.pieces)))
    random.shuffle(order)
    send(giving, taking, order)
    assert all(map(torch.equal, taking.buffers, giving.buffers))


@given(st.data())
def test_a_snapshot_with_one_wrong_bit_is_refused_with_its_last_piece(data: st.DataObject) -> None:
    giving, taking = both_ends()
    last = len(taking.pieces) - 1
    wrong = data.draw(st.integers(0, last))
    bit = wrong, data.draw(st.integers(0, 8 * len(giving.content(wrong)) - 1))
    send(giving, taking, range(last), bit)
    with pytest.raises(PeerError, match="changed on its way"):
        send(giving, taking, [last], bit)


def test_a_tree_that_was_changed_is_noticed() -> None:
    giving, taking = both_ends()
    taking.tree += " "
    with pytest.raises(PeerError, match="changed on its way"):
        send(giving, taking, range(len(taking.pieces)))


def test_a_snapshot_of_an_older_giver_is_taken_without_a_digest() -> None:
    giving, taking = both_ends()
    for number in range(len(taking.pieces)):
        taking.take(number, "", [giving.content(number)])
