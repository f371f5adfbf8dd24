"""Shared memory leaves room for others, and a run goes on without it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crew import Crew, Noise, perceptron
from whole import CLONE, DEADLINE_S, ENDLESS, LOOPBACK, Served

from paramserver.protocol import messages as wire
from paramserver.rounds.effects import Finish
from paramserver.server.data import Data
from paramserver.settings import Settings
from paramserver.tensors.codec import CODECS, codec_of_pushes
from paramserver.tensors.error_feedback import ErrorFeedback
from paramserver.transport import shm
from workers.link.client import Client

TRAINING = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from crew import Crew, Noise, perceptron
from paramserver.transport import shm
from whole import Served

least = []
def look(number, step):
    status = os.statvfs("/dev/shm")
    least.append(status.f_bavail / status.f_blocks)

with Served(num_workers=2, num_epochs=4) as served:
    crew = Crew(served, perceptron, Noise(64), hold=look)
    served.wait(crew.start(1, 8), crew.start(2, 8), served.end)
    assert served.samples == (256, 0, 0) and len(served.digests()) == 1
    print(min(least), *served.said, *crew.said, sep="\\n")
"""


def trained(size: str) -> list[str]:
    """A training where /dev/shm has this size: the least share of it that was free, then what was
    said."""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", TRAINING, CLONE / "tests"],
        env={**os.environ, "PYTHONPATH": str(CLONE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.root
def test_half_of_a_small_shared_memory_is_left_to_others() -> None:
    free, *said = trained("64m")  # docker's default; the ring alone would take 256
    assert 0.5 <= float(free) < 0.8
    assert not any("slower" in line for line in said)


@pytest.mark.root
def test_without_shared_memory_a_run_goes_on_and_says_so_once() -> None:
    free, *said = trained("8k")
    assert float(free) >= 0.5
    assert sum("averages go through sockets on this host" in line for line in said) == 1
    assert sum("gradients go through a socket" in line for line in said) == 2  # of two workers


@pytest.mark.parametrize("where", ["server", "worker"])
def test_it_can_be_switched_off(where: str) -> None:
    with Served(heartbeat_timeout=1.0, shared_memory=where != "server") as served:
        client = Client(LOOPBACK, served.port, shared_memory=where != "worker")
        try:
            welcome = client.connect(DEADLINE_S)
            assert (welcome.shared is None) == (where == "server")
            assert client.connection.kind == "ipc" and client.connection.shared is None
        finally:
            client.close()


@pytest.mark.skipif(not shm.SHARED.is_dir(), reason="needs /dev/shm")
def test_a_worker_that_cannot_map_the_averages_gets_them_through_its_socket() -> None:
    def spoil(number: int, step: int) -> None:
        if number == 1 and step == 1:
            shared = served.server._shared
            assert shared is not None
            (shared.path / "ring").rename(shared.path / "moved")
            (shared.path / "ring").mkdir()
            started.append(crew.start(2, 8))
            served.until_said("worker 2 .* is here")

    started: list[object] = []
    with Served(num_workers=1, num_epochs=ENDLESS) as served:
        crew = Crew(served, perceptron, Noise(64), hold=spoil)
        first = crew.start(1, 8)
        served.until(lambda: any({1, 2} == set(close.contributors) for close in served.closes))
        served.stop()
        served.wait(first, served.end)
        done = sum(sum(close.contributors.values()) for close in served.closes)
        assert len(served.digests()) == 1 and served.samples == (done, 0, 0)
        assert sum("averages go through a socket" in line for line in crew.said) == 1


def test_what_cannot_be_made_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="half of it is left to others"):
        shm.check(2**62, tmp_path)
    with pytest.raises(OSError, match=r"\[Errno"):
        shm.Memory(tmp_path / "ring", 2**62)
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="empty"):
        shm.Memory(tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


LAYOUT = wire.Layout(
    (
        wire.Tensor("weight", (3000,), "float32"),
        wire.Tensor("exact", (10,), "float64", sent="float64"),
        wire.Tensor("mean", (30,), "float32", "stat"),
        wire.Tensor("queue", (5,), "uint8", "whole", sent="bytes"),
        wire.Tensor("pointer", (8,), "uint8", "whole", sent="bytes"),
    )
)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A server's, in shared memory."""
    made = shm.shared_folder()
    if made is None:
        pytest.skip("needs /dev/shm")
    yield made.path
    made.close()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_average_lies_where_its_header_says(codec: str, workers: int, folder: Path) -> None:
    """Also in a second round, and after one that came to nothing."""
    data = Data(Settings(codec=codec, bucket_mb=0.005, history_mb=1), "nonce", folder)
    assert data.start(LAYOUT) is None and data.plan is not None
    ring = shm.Ring(folder / "ring")
    for number in (1, 2, 3):
        for b in data.plan.buckets:
            for worker in range(workers):
                feedback = ErrorFeedback(data.plan, codec_of_pushes(codec, 0.1))
                dtype = torch.uint8 if b.sent == "bytes" else getattr(torch, b.sent)
                values = torch.full((b.size,), worker + 1, dtype=dtype)
                buffers, scale = feedback.encode(b, values)
                push = wire.Push(round=number, bucket=b.index, samples=1, scale=scale)
                assert data.push("session", worker, push, buffers)[0] is None
                data.add(worker, b.index, 1)
            if number != 2:
                data.finish(Finish(number, number, b.index, workers, ()))
        due = data.due()
        assert len(due) == (0 if number == 2 else len(data.plan.buckets))
        for average, frames in due:
            shared = wire.from_frames(data.as_shared(average))[0]
            assert isinstance(shared, wire.Shared) and len(shared.places) == len(frames) - 1 > 0
            for place, buffer in zip(shared.places, frames[1:], strict=True):
                assert ring.whole(place) and bytes(ring.buffer(place)) == bytes(buffer)
        data.forget_round(tuple(average.bucket for average, _ in due))
