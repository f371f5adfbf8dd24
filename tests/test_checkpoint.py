"""A checkpoint is written whole or not at all: on a full disk, and by a writer that is killed."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from whole import CLONE, Program, Run

from paramserver import drafts
from paramserver.output import stored
from paramserver.output.runfolder import find_checkpoint
from workers.replica import checkpoint
from workers.replica.replica import Replica

resource = pytest.importorskip("resource")

DIES_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from test_checkpoint import replica
from paramserver import drafts
from workers.replica import checkpoint
drafts.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path(sys.argv[1]) / checkpoint.name(2), replica(), "run", {})
"""

DISK_IS_FULL = """
import resource, signal, sys
from pathlib import Path
from test_checkpoint import replica
from workers.replica import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.save(Path(sys.argv[1]) / checkpoint.name(2), replica(), "run", {})
except OSError as e:
    print("not written:", e)
"""


def replica() -> Replica:
    torch.manual_seed(1)
    model = nn.Linear(100, 100)
    return Replica(model, torch.optim.Adam(model.parameters()), bucket_mb=1.0, codec="float32")


def run(program: str, folder: Path) -> Program:
    """A process that has ended."""
    with Run(folder) as run:
        started = run.start("it", "-c", program, str(folder), PYTHONPATH=f"{CLONE}:{CLONE}/tests")
        started.end()
    return started


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of a run, with a whole one."""
    found = tmp_path / "checkpoints"
    checkpoint.save(found / checkpoint.name(1), replica(), "run", {})
    return found


def is_whole(path: Path) -> bool:
    return torch.equal(checkpoint.load(path).state["model"]["weight"], replica().params[1][1])


def test_a_writer_that_is_killed_leaves_what_was_there(folder: Path) -> None:
    done = run(DIES_WHILE_WRITING, folder)
    assert done.process.returncode == -signal.SIGKILL, done.output
    drafts = list(folder.glob("*.tmp"))
    assert len(drafts) == 1
    newest = find_checkpoint(str(folder), folder.parent)
    assert newest.name == checkpoint.name(1) and is_whole(newest)
    checkpoint.prune(folder, 3, folder / checkpoint.name(1))  # as the next writer does
    assert [p.name for p in folder.iterdir()] == [checkpoint.name(1)]


def test_a_full_disk_costs_the_new_checkpoint_only(folder: Path) -> None:
    done = run(DISK_IS_FULL, folder)
    assert "not written:" in done.output
    assert [p.name for p in folder.iterdir()] == [checkpoint.name(1)]
    assert is_whole(folder / checkpoint.name(1))


def test_the_draft_of_a_writer_that_lives_is_left_alone(folder: Path) -> None:
    """Whatever its name says: process ids come again."""
    others = (f"{checkpoint.name(3)}.{os.getpid()}.tmp", "model.safetensors.1.tmp", ".tmpAbCd12")
    for name in (*others, ".run.json.7.tmp", f"{checkpoint.name(3)}.tmp"):
        (folder / name).touch()
    with drafts.draft(folder / checkpoint.name(2)) as file:
        file.write(b"half")
        checkpoint.prune(folder, 3, folder / checkpoint.name(1))
        assert {p.name for p in folder.iterdir()} == {
            checkpoint.name(1), f"{checkpoint.name(2)}.{os.getpid()}.tmp",
        }  # fmt: skip
    assert (folder / checkpoint.name(2)).read_bytes() == b"half"


def test_what_was_just_written_stays_whatever_lies_beside_it(folder: Path) -> None:
    """Steps of a log that was lost may be higher."""
    for step in (5, 6, 7):
        (folder / checkpoint.name(step)).touch()
    checkpoint.prune(folder, 2, folder / checkpoint.name(1))
    assert sorted(p.name for p in folder.iterdir()) == [checkpoint.name(1), checkpoint.name(7)]


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_older_checkpoints_make_room_and_the_last_whole_one_stays(folder: Path, room: int) -> None:
    """The disk is full until this number of checkpoints is gone."""
    for step in (2, 3):
        checkpoint.save(folder / checkpoint.name(step), replica(), "run", {})
    (folder / checkpoint.name(4)).write_bytes(b"cut off")

    def write() -> None:
        if len(list(folder.iterdir())) > 4 - room:
            raise OSError(errno.ENOSPC, "No space left on device")

    names = [checkpoint.name(step) for step in (1, 2, 3, 4)]
    gone = [names[0], names[1], names[3]]
    assert checkpoint.with_room(write, folder) == gone[:room]
    assert sorted(p.name for p in folder.iterdir()) == sorted({*names} - {*gone[:room]})


def test_where_nothing_can_make_room_the_last_whole_one_stays(folder: Path) -> None:
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.save(folder / checkpoint.name(2), replica(), "run", {})
    with pytest.raises(OSError, match="No space"):
        checkpoint.with_room(write, folder)
    assert [p.name for p in folder.iterdir()] == [checkpoint.name(2)]


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    torch.manual_seed(2)
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(5, dtype=torch.float64),
        "half": torch.randn(3, 1).half(),
        "yes": torch.tensor(True),
        "none": torch.empty(0, 4),
        "turned": torch.randn(3, 4).t(),
    }
    checkpoint._write(tensors, tmp_path / "x", {"format": "pt", "step": "1", "a": 'b"\n\u20ac'})
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
    assert stored.read(tmp_path / "x") == {"format": "pt", "step": "1", "a": 'b"\n\u20ac'}
