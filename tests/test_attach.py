"""What `make up` and `make attach` say about processes that have ended."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from paramserver.fleet.attach import NO_WORKER, Event, Followers, show
from paramserver.fleet.lines import Lines
from paramserver.net.hosts import Host

MINI1 = Host("mini1", "mini1", role="both", id=1)
MINI2 = Host("mini2", "mini2", id=2, workers=2)
WORKERS = [(MINI1, "worker"), (MINI2, "worker-1"), (MINI2, "worker-2")]


class Scripted(Followers):
    """Followers whose processes end in this order, with these exit codes."""

    def __init__(self, lines: Lines, ends: list[tuple[Host, str, int]]) -> None:
        super().__init__(lines)
        self._ends = ends

    @property
    def follows(self) -> set[str]:
        return {name.partition("-")[0] for _, name, _ in self._ends}

    def events(self, until: float = math.inf) -> Iterator[Event]:
        while self._ends:
            host, name, code = self._ends.pop(0)
            yield Event(host, name, code=code)


@pytest.mark.parametrize(
    ("codes", "told"), [((1, 1, 2), True), ((1, 0, 1), False), ((0, 0, 0), False)]
)
def test_where_all_workers_failed_it_is_told_that_the_server_waits(
    codes: tuple[int, ...], told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = [(*worker, code) for worker, code in zip(WORKERS, codes, strict=True)]
    lines = Lines([MINI1, MINI2])
    assert show(Scripted(lines, [*ends, (MINI1, "server", 0)]), lines, [], plain=True) == 0
    said = capsys.readouterr().out
    assert (NO_WORKER in said) is told
    assert said.count("has failed. Why: make status, make logs") == sum(map(bool, codes))


def test_where_the_run_is_over_nobody_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines([MINI1, MINI2])
    ends = [(MINI1, "server", 1), *((*worker, 1) for worker in WORKERS)]
    assert show(Scripted(lines, ends), lines, [], plain=True) == 1
    assert NO_WORKER not in capsys.readouterr().out
