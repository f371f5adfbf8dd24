"""When a worker starts the process of its shard."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from workers.link.shards import Shards


class Beside(Shards):
    """Starts no process."""

    def __init__(self) -> None:
        connection: Any = SimpleNamespace(heartbeat_timeout=10.0)
        super().__init__(connection)
        self.ended: list[bool] = []  # of each process that it would have started

    def _start(self) -> None:
        number = len(self.ended)
        self.ended.append(False)
        process: Any = SimpleNamespace(poll=lambda: 0 if self.ended[number] else None)
        self._process = process

    def measure(self) -> None: ...


@pytest.mark.parametrize("asked", [False, True])
def test_a_shard_that_is_about_to_end_is_followed_by_another_if_one_was_asked_for(
    asked: bool,
) -> None:
    """The server ends a shard and asks for another one at once, over two links."""
    beside = Beside()
    beside.carry()
    if asked:
        beside.carry()
    beside.tick(1.0)
    assert len(beside.ended) == 1
    beside.ended[0] = True
    for now in (2.0, 3.0):
        beside.tick(now)
        assert len(beside.ended) == 1 + asked
