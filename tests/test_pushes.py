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
