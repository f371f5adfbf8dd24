"""Scripts of many kinds change few lines, and end with the weights of one process."""

from __future__ import annotations

import multiprocessing.forkserver
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kinds import KINDS, Kind
from measured import forkserver, resumed, run

NAMES = [kind.name for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_a_script_changes_few_lines(kind: Kind) -> None:
    new, gone = kind.changed
    assert new <= kind.most_lines and gone <= 2
    compile(kind.clustered, kind.name, "exec")


@pytest.mark.parametrize("kind", KINDS[:2], ids=NAMES[:2])
def test_a_late_worker_and_one_that_dies_change_nothing(kind: Kind) -> None:
    assert run(kind, 3, hard=True, dtype=torch.float64) < 1e-9


@pytest.fixture(scope="module")
def forks() -> Iterator[None]:
    """What processes of loaders are forked from, as long as these tests run."""
    forkserver()
    yield
    forkserver.cache_clear()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.long
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("count", "hard"), [(2, False), (3, True)])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_any_script_ends_with_the_weights_of_one_process(
    kind: Kind, count: int, hard: bool
) -> None:
    assert run(kind, count, hard=hard, dtype=torch.float64) < 1e-9


@pytest.mark.long
@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_any_script_ends_near_them_in_float32(kind: Kind) -> None:
    """How near depends on the processor: here only that nothing else is computed."""
    assert run(kind, 2, hard=False, dtype=torch.float32) < 1e-3


@pytest.mark.long
def test_a_run_that_is_resumed_ends_with_the_weights_of_one_process(tmp_path: Path) -> None:
    assert resumed(tmp_path, torch.float64) < 1e-9
