"""A checkpoint is written whole or not at all: on a full disk, and by a writer that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from paramserver.runfolder import find_checkpoint
from workers import checkpoint
from workers.replica import Replica

resource = pytest.importorskip("resource")

DIES_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from test_checkpoint import replica
from workers import checkpoint
checkpoint.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(Path(sys.argv[1]) / checkpoint.name(2), replica(), "run", {})
"""

DISK_IS_FULL = """
import resource, signal, sys
from pathlib import Path
from test_checkpoint import replica
from workers import checkpoint
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


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).resolve().parent
    return subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"},
        capture_output=True,
        text=True,
        check=False,
    )


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
    assert done.returncode == -signal.SIGKILL, done.stderr
    drafts = list(folder.glob("*.tmp"))
    assert len(drafts) == 1
    newest = find_checkpoint(str(folder), folder.parent)
    assert newest.name == checkpoint.name(1) and is_whole(newest)
    checkpoint.prune(folder, keep=3)  # as the next writer does
    assert [p.name for p in folder.iterdir()] == [checkpoint.name(1)]


def test_a_full_disk_costs_the_new_checkpoint_only(folder: Path) -> None:
    done = run(DISK_IS_FULL, folder)
    assert "not written:" in done.stdout, done.stderr
    assert [p.name for p in folder.iterdir()] == [checkpoint.name(1)]
    assert is_whole(folder / checkpoint.name(1))


def test_the_draft_of_a_writer_that_lives_is_left_alone(folder: Path) -> None:
    living = folder / f"{checkpoint.name(3)}.{os.getpid()}.tmp"
    old = folder / f"{checkpoint.name(3)}.tmp"  # of a version that named no writer
    for draft in (living, old):
        draft.touch()
    checkpoint.prune(folder, keep=3)
    assert living.exists() and not old.exists()
