"""What a shard and the replicas on its host share: who uses what, and what is not written over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire
from paramserver.shard.memory import OPEN_ROUND, Memory
from paramserver.tensors.bucket import plan
from paramserver.transport import private_dir, shm
from paramserver.transport.sealing import Share
from workers.link.shared import Shared

pytestmark = pytest.mark.skipif(not shm.SHARED.is_dir(), reason="needs /dev/shm")

ELEMENTS = 1000
LAYOUT = wire.Layout((wire.Tensor("w", (ELEMENTS,), "float32"),))
CUT = plan(LAYOUT, 1.0)
ID = bytes(range(16))
BOTH = Share.RING | Share.OUTBOX
NBYTES = 4 * ELEMENTS


class Pair:
    """The two ends of a channel between a worker and a shard on its host."""

    def __init__(self, history: int = 0) -> None:
        self.memory = Memory(history)
        self.memory.begin(CUT)
        self.folder = Path(self.memory.folder)
        self.said: list[tuple[str, str]] = []

    def come(self, slot_bytes: int = NBYTES) -> Shared:
        """A peer finds out what it can use."""
        return Shared(self.folder, ID.hex(), slot_bytes, lambda *told: self.said.append(told))

    def meet(self, peer: Shared) -> Share:
        """The channel is bound."""
        share = self.memory.bound(ID, peer.ready)
        there = shm.channel_path(self.folder, ID.hex()).exists()
        assert not (there and Share.OUTBOX in share), "who is killed now leaves no name behind"
        peer.agreed(share)
        return share

    def average(self, content: bytes, bucket: int = 0) -> bytes | None:
        """Make an average; where it lies."""
        room = self.memory.room(bucket, len(content))
        room.numpy()[:] = memoryview(content)
        return self.memory.places(bucket)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.memory.close()


def push(*places: wire.Place) -> wire.Push:
    return wire.Push(round=1, bucket=0, samples=1, places=places)


def test_pushes_and_averages_are_read_where_they_were_written(pair: Pair) -> None:
    peer = pair.come()
    assert pair.meet(peer) == BOTH and not pair.said
    assert peer.outbox is not None
    slot = peer.outbox.room(8)
    assert slot is not None
    slot.tensor.fill_(7)
    [buffer], release = pair.memory.located(ID, push(slot.place), [])
    assert bytes(buffer) == 8 * b"\7"
    assert [peer.outbox.room(8) is None for _ in range(shm.OUTBOX_SLOTS)][-1]
    release()
    assert peer.outbox.room(8) is not None
    told = pair.average(b"average!")
    blocks = peer.blocks(told)
    assert blocks is not None and blocks.whole
    assert [bytes(b) for b in blocks.buffers] == [b"average!"]


def test_who_pushes_nothing_reads_averages(pair: Pair) -> None:
    assert pair.meet(pair.come(slot_bytes=0)) == Share.RING


def test_a_ring_that_cannot_be_mapped_costs_only_itself(pair: Pair) -> None:
    ring = shm.ring_path(pair.folder)
    ring.unlink()
    ring.mkdir()
    peer = pair.come()
    assert pair.meet(peer) == Share.OUTBOX
    assert peer.outbox is not None and peer.blocks(pair.average(b"1234")) is None
    assert [what for what, _ in pair.said] == ["averages"]


def test_an_outbox_that_the_shard_cannot_map_is_not_used(pair: Pair) -> None:
    peer = pair.come()
    path = shm.channel_path(pair.folder, ID.hex())
    path.unlink()
    path.write_bytes(b"")
    assert pair.meet(peer) == Share.RING and peer.outbox is None
    assert [what for what, _ in pair.said] == ["gradients"]
    assert not path.exists()
    with pytest.raises(PeerError, match="no outbox"):
        pair.memory.located(ID, push((shm.STATES, 8, 0)), [])


def test_without_room_for_it_numbers_go_through_the_channel(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm, "room", lambda folder: 1000)
    pair.memory.begin(CUT)
    peer = pair.come()
    assert pair.meet(peer) == Share.NOTHING
    assert sorted(what for what, _ in pair.said) == ["averages", "gradients"]
    assert pair.average(b"1234") is None


def test_a_ring_takes_a_part_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "room", lambda folder: 100_000)
    pair = Pair(history=2**20)
    assert pair.meet(pair.come()) == BOTH
    assert shm.ring_path(pair.folder).stat().st_size < 50_000 + shm.ALIGN
    pair.memory.close()


def test_a_shard_that_is_told_not_to_shares_nothing() -> None:
    memory = Memory(0, wanted=False)
    memory.begin(CUT)
    assert memory.folder == "" and memory.bound(ID, BOTH) == Share.NOTHING
    memory.close()


@pytest.mark.parametrize(
    "place", [(0, 8, 0), (shm.STATES, 8, 1), (shm.STATES, 2**40, 0), (shm.STATES, 8, 2**30)]
)
def test_an_impossible_place_in_an_outbox_is_refused(pair: Pair, place: wire.Place) -> None:
    pair.meet(pair.come())
    with pytest.raises(PeerError, match="no such place"):
        pair.memory.located(ID, push(place), [])


@pytest.mark.parametrize(
    "told",
    [b"", b"\xc1", *(msgspec.msgpack.encode(p) for p in (
        [[0, 8, 1]], [[65, 8, 1]], [[64, 2**40, 1]], [[-64, 8, 1]], [[64, 0, 1]], "text",
    ))],
)  # fmt: skip
def test_an_impossible_place_in_a_ring_is_no_average(pair: Pair, told: bytes) -> None:
    peer = pair.come()
    pair.meet(peer)
    assert peer.blocks(told) is None


def test_an_average_that_was_written_over_is_seen_to_be(pair: Pair) -> None:
    peer = pair.come()
    pair.meet(peer)
    first = peer.blocks(pair.average(NBYTES * b"a"))
    assert first is not None and first.whole
    assert pair.memory.oldest == 1
    for _ in range(20):
        pair.memory.over()
        pair.average(NBYTES * b"b")
    assert pair.memory.oldest > 1 and not first.whole


def test_the_open_round_is_never_written_over(pair: Pair) -> None:
    """Of a round that is larger than the ring, what does not fit goes through channels."""
    peer = pair.come()
    pair.meet(peer)
    pair.average(NBYTES * b"-", bucket=99)
    pair.memory.over()
    told = [pair.average(NBYTES * b"x", bucket) for bucket in range(20)]
    there = [peer.blocks(t) for t in told if t is not None]
    assert 0 < len(there) < len(told)
    assert all(blocks is not None and blocks.whole for blocks in there)
    pair.memory.over()
    assert pair.average(NBYTES * b"y") is not None, "the next round has room again"
    assert OPEN_ROUND >= 2


def test_a_bucket_of_which_a_part_lies_elsewhere_goes_through_channels(pair: Pair) -> None:
    told = [pair.average(NBYTES * b"x", bucket=1) for _ in range(20)]
    assert told[0] is not None and told[-1] is None
    assert pair.average(b"small", bucket=1) is None


def test_a_shard_that_begins_anew_forgets_what_was(pair: Pair) -> None:
    peer = pair.come()
    pair.meet(peer)
    assert peer.outbox is not None
    slot = peer.outbox.room(8)
    assert slot is not None
    before = peer.blocks(pair.average(b"old!"))
    pair.memory.begin(CUT)
    with pytest.raises(PeerError, match="no outbox"):
        pair.memory.located(ID, push(slot.place), [])
    other = pair.come(slot_bytes=0)
    pair.meet(other)
    found = other.blocks(pair.average(b"new!"))
    assert found is not None and before is not None
    assert [bytes(found.buffers[0]), bytes(before.buffers[0])] == [b"new!", b"old!"]


def test_no_file_is_left_of_a_channel_that_never_came_up(pair: Pair) -> None:
    pair.come().close()
    assert not list(pair.folder.glob("channel-*"))


def test_the_memory_of_a_shard_that_was_killed_is_removed(tmp_path: Path) -> None:
    program = """
import sys
from paramserver.shard.memory import Memory
made = Memory(2**20)
print(made.folder, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as shard:
        assert shard.stdout is not None
        folder = Path(shard.stdout.readline().strip())
        private_dir.sweep(folder.parent)
        assert folder.is_dir(), "its owner lives"
        os.kill(shard.pid, signal.SIGKILL)
        shard.wait()
    private_dir.sweep(folder.parent)
    assert not folder.exists()
