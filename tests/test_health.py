"""The doctor's tests of memory and of the copy of the data."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from paramserver.fleet import health
from paramserver.fleet.agent import Agent

SMALL = 2**23


def test_good_memory_reads_back_as_written() -> None:
    assert health.memory(SMALL) == {"bytes": SMALL, "wrong": 0}
    assert health.memory(SMALL, limit_s=0.0) == {"bytes": SMALL, "wrong": 0}


@pytest.mark.parametrize("bit", [0, 63])
@pytest.mark.parametrize("stuck", [0, 1])
def test_a_bit_that_is_stuck_is_found(bit: int, stuck: int) -> None:
    words = np.empty(SMALL // 8, np.uint64)
    mask = np.uint64(1 << bit)

    def stick() -> None:
        words[12345] = words[12345] | mask if stuck else words[12345] & ~mask

    assert health._wrong(words, look=stick) == 8


def test_addresses_that_are_mixed_up_are_found() -> None:
    """Each place reads well by itself, but two of them are one."""
    words = np.empty(SMALL // 8, np.uint64)

    def alias() -> None:
        words[7] = words[-7]

    assert health._wrong(words, look=alias) == 8


def written(folder: Path, *, packed: bool = False, changed: int = 0) -> Path:
    folder.mkdir(parents=True)
    for number, part in enumerate(health.PARTS):
        content = bytes([number, changed if number == 2 else 0]) * 1000
        path = folder / (f"{part}.gz" if packed else part)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def test_a_data_set_has_one_digest_packed_or_not_wherever_it_lies(tmp_path: Path) -> None:
    one = health.data({"name": "MNIST", "root": str(written(tmp_path / "a"))})
    written(tmp_path / "b" / "MNIST" / "raw", packed=True)
    assert health.data({"name": "MNIST", "root": str(tmp_path / "b")}) == one and one["digest"]
    other = health.data({"name": "MNIST", "root": str(written(tmp_path / "c", changed=1))})
    assert other["digest"] != one["digest"]


def test_what_cannot_be_read_or_is_not_there(tmp_path: Path) -> None:
    folder = written(tmp_path / "a", packed=True)
    path = folder / f"{health.PARTS[0]}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    told = health.data({"name": "MNIST", "root": str(folder)})
    assert told["problem"].startswith("its copy of MNIST cannot be read")
    assert health.data({"name": "MNIST", "root": str(tmp_path)}) == {}
    assert health.data({"name": "package:Own", "root": str(folder)}) == {}
    assert "longer than 0 s" in health.data({"name": "digits"}, limit_s=0.0)["problem"]


def test_an_agent_is_asked_for_both(tmp_path: Path) -> None:
    told = Agent(tmp_path).answer("health", {"dataset": {"name": "digits"}})
    assert told["memory"]["wrong"] == 0 and len(told["data"]["digest"]) == 16
