"""The buckets of a round on their way up: which slot each lies in, when it goes, what is freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from paramserver.protocol import messages as wire
from paramserver.protocol.pacing import STALLED_S, WINDOW
from paramserver.transport import shm
from workers.link.pushes import Pushes

NBYTES = 100


class Worker:
    """A worker's pushes, and the server's view of its outbox."""

    def __init__(self, folder: Path) -> None:
        self.pushes = Pushes()
        self.pushes.begin(shm.Outbox(folder / "outbox", NBYTES))
        self.server = shm.Outbox(folder / "outbox")

    def push(self, bucket: int, nbytes: int = NBYTES) -> None:
        room = self.pushes.room(bucket, nbytes).fill_(bucket)
        self.add(bucket, room)

    def add(self, bucket: int, room: Tensor) -> None:
        self.pushes.add(push(bucket), [room.numpy().data], 0.0)

    def sent(self, now: float = 0.0) -> dict[int, tuple[bytes, bool]]:
        """By bucket: the bytes that reach the server, and whether through shared memory."""
        found: dict[int, tuple[bytes, bool]] = {}
        for push, buffers in self.pushes.due(now):
            read: list[Any] = [self.server.buffer(place) for place in push.places]
            assert not (read and buffers)
            [content] = read or buffers
            found[push.bucket] = bytes(content), bool(read)
        return found


def push(bucket: int) -> wire.Push:
    return wire.Push(round=1, bucket=bucket, samples=8)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path)


def test_a_bucket_is_read_where_it_was_written(worker: Worker) -> None:
    worker.push(0), worker.push(1, 40)
    assert worker.sent() == {0: (NBYTES * b"\0", True), 1: (40 * b"\1", True)}


def test_buckets_are_told_apart_whatever_order_they_are_pushed_in(worker: Worker) -> None:
    rooms = {bucket: worker.pushes.room(bucket, NBYTES).fill_(bucket) for bucket in (0, 1, 2)}
    worker.add(1, rooms[1]), worker.add(0, rooms[0])
    assert worker.sent() == {1: (NBYTES * b"\1", True), 0: (NBYTES * b"\0", True)}


def test_where_no_slot_is_free_memory_is_made_at_once(worker: Worker) -> None:
    """`Pushes` never waits: the next push may wait, until that is in vain."""
    for bucket in range(shm.OUTBOX_SLOTS):
        assert not worker.pushes.full
        worker.pushes.room(bucket, NBYTES)
    assert worker.pushes.full
    worker.push(shm.OUTBOX_SLOTS)
    assert worker.sent() == {shm.OUTBOX_SLOTS: (NBYTES * bytes([shm.OUTBOX_SLOTS]), False)}
    worker.pushes.waited_in_vain()
    assert not worker.pushes.full
    worker.server.free(3)
    worker.push(9)
    assert worker.sent() == {9: (NBYTES * b"\t", True)}, "without waiting, a slot is found"
    worker.pushes.forget()
    worker.push(0), worker.push(1)
    for bucket in (2, 3, 4):
        worker.pushes.room(bucket, NBYTES)
    assert worker.pushes.full, "in the next round waiting is tried again"


def test_a_bucket_that_does_not_fit_goes_through_the_socket(worker: Worker) -> None:
    worker.push(0, NBYTES + shm.ALIGN + 1)
    assert worker.sent()[0][1] is False


def test_numbers_from_elsewhere_go_through_the_socket(worker: Worker) -> None:
    worker.pushes.add(push(0), [b"abc"], 0.0)
    assert worker.sent() == {0: (b"abc", False)}


def test_what_is_ahead_of_the_averages_waits(worker: Worker) -> None:
    for bucket in range(WINDOW + 1):
        worker.push(bucket)
    assert list(worker.sent()) == list(range(WINDOW))
    assert not worker.sent()
    worker.pushes.averaged(2, 0.1)
    assert list(worker.sent(0.1)) == [WINDOW]


def test_where_no_average_comes_everything_is_sent(worker: Worker) -> None:
    for bucket in range(WINDOW + 1):
        worker.push(bucket)
    assert len(worker.sent(STALLED_S + 0.1)) == WINDOW + 1


def test_what_is_forgotten_is_free_again(worker: Worker) -> None:
    """A push that waits for its turn, and a bucket that was never complete."""
    for bucket in range(WINDOW):
        worker.push(bucket)
    worker.sent()
    for slot in range(WINDOW):
        worker.server.free(slot)
    worker.push(WINDOW), worker.pushes.room(WINDOW + 1, NBYTES)
    worker.pushes.forget()
    assert not worker.sent()
    for bucket in range(shm.OUTBOX_SLOTS):
        assert not worker.pushes.full
        worker.pushes.room(bucket, NBYTES)


def test_who_asks_twice_for_a_bucket_holds_one_slot(worker: Worker) -> None:
    """A backward that raised is tried again."""
    for _ in range(2 * shm.OUTBOX_SLOTS):
        worker.pushes.room(0, NBYTES)
    assert not worker.pushes.full


def test_an_outbox_that_the_server_does_not_read(worker: Worker) -> None:
    worker.push(0)
    room = worker.pushes.room(1, NBYTES).fill_(1)
    worker.pushes.without_outbox()
    worker.add(1, room)
    worker.push(2)
    assert {bucket: shared for bucket, (_, shared) in worker.sent().items()} == {
        0: False,
        1: False,
        2: False,
    }


def test_a_slot_of_an_earlier_outbox_is_not_told(worker: Worker, tmp_path: Path) -> None:
    """Joined anew in the middle of a backward: numbers that were written before lie elsewhere."""
    room = worker.pushes.room(0, NBYTES).fill_(7)
    worker.pushes.begin(shm.Outbox(tmp_path / "another", NBYTES))
    worker.add(0, room)
    assert worker.sent() == {0: (NBYTES * b"\7", False)}


class Near(Worker):
    """A worker with a shard on its host, which averages the odd buckets of a round: the shard reads
    an outbox of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.odd = 1  # the shard of the odd buckets
        self.outboxes = {1: shm.Outbox(folder / "near", NBYTES)}
        self.shard = shm.Outbox(folder / "near")
        self.pushes = Pushes(
            9, lambda bucket: self.odd if bucket % 2 else 0, lambda shard: self.outboxes.get(shard)
        )
        self.pushes.begin(shm.Outbox(folder / "outbox"), 9)

    def told(self) -> dict[int, tuple[int, bytes, bool]]:
        """By bucket: the shard, the bytes that reach it, and whether through shared memory."""
        found = {}
        for push, buffers in self.pushes.due(0.0):
            at = self.shard if push.shard else self.server
            read: list[Any] = [at.buffer(place) for place in push.places]
            assert not (read and buffers)
            [content] = read or buffers
            found[push.bucket] = push.shard, bytes(content), bool(read)
        return found

    def taken(self) -> int:
        """Slots of the shard's outbox that are not free."""
        return sum(state != shm.FREE for state in self.shard._states)


@pytest.fixture
def near(tmp_path: Path) -> Near:
    return Near(tmp_path)


def test_each_shard_on_this_host_reads_an_outbox_of_its_own(near: Near) -> None:
    near.push(0), near.push(1)
    assert near.told() == {0: (0, NBYTES * b"\0", True), 1: (1, NBYTES * b"\1", True)}
    assert near.taken() == 1


def test_what_found_no_slot_gets_one_when_it_is_sent(near: Near) -> None:
    rooms = {bucket: near.pushes.room(bucket, NBYTES).fill_(bucket) for bucket in range(1, 13, 2)}
    assert near.taken() == shm.OUTBOX_SLOTS == len(rooms) - 1
    near.add(1, rooms[1]), near.add(11, rooms[11])
    near.shard.free(4)
    assert near.told() == {1: (1, NBYTES * b"\1", True), 11: (1, NBYTES * b"\x0b", True)}


def test_where_no_slot_is_free_then_either_it_goes_through_the_channel(near: Near) -> None:
    for bucket in range(1, 13, 2):
        near.push(bucket)
    assert [through for _, _, through in near.told().values()] == 5 * [True] + [False]


def test_a_slot_for_a_shard_that_does_not_average_this_bucket_any_more_is_free(near: Near) -> None:
    near.push(1)
    near.odd = 2
    assert near.told() == {1: (2, NBYTES * b"\1", False)}
    assert near.taken() == 0


def test_a_slot_of_a_channel_that_is_gone_is_not_told(near: Near, tmp_path: Path) -> None:
    near.push(1), near.push(3)
    near.outboxes[1] = shm.Outbox(tmp_path / "again", NBYTES)
    near.shard = shm.Outbox(tmp_path / "again")
    assert near.told() == {1: (1, NBYTES * b"\1", True), 3: (1, NBYTES * b"\3", True)}
    near.push(5)
    near.outboxes.clear()
    assert near.told() == {5: (1, NBYTES * b"\5", False)}


def test_who_joins_again_frees_what_waited_for_a_shard(near: Near) -> None:
    """What is being written then is still its own."""
    near.pushes.window = 0
    near.push(1)
    assert not near.told() and near.taken() == 1
    room = near.pushes.room(3, NBYTES).fill_(3)
    near.pushes.begin(None, 9)
    assert near.taken() == 1
    near.add(3, room)
    assert near.told() == {3: (1, NBYTES * b"\3", True)}
    near.push(5)
    near.pushes.forget()
    assert near.taken() == 1, "what was sent is the shard's to free"
