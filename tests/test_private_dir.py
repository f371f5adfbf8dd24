"""Private folders go with their process, even one that was killed, and only those."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

from paramserver.transport.private_dir import PrivateFolder

HOLD = """
import sys
from pathlib import Path
from paramserver.transport.private_dir import PrivateFolder
folder = PrivateFolder(Path(sys.argv[1]))
print(folder.path, flush=True)
sys.stdin.read()
"""


def holder(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that keeps a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_private_and_removed_in_order(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    assert folder.path.parent == tmp_path and folder.path.name.startswith("paramserver-")
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "router").touch()
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed, left = holder(tmp_path)
    alive, kept = holder(tmp_path)
    with killed, alive:
        foreign = tmp_path / "paramserver-demo-of-mine"
        foreign.mkdir()
        assert left.is_dir() and kept.is_dir()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        folder = PrivateFolder(tmp_path)
        assert not left.exists()
        assert kept.is_dir() and foreign.is_dir()
        folder.close()
        alive.kill()


def test_a_folder_that_is_just_being_made_is_left_alone(tmp_path: Path) -> None:
    young = tmp_path / f"paramserver-{os.getpid()}-young"
    young.mkdir()
    (young / "new").touch()
    PrivateFolder(tmp_path).close()
    assert young.is_dir()
