"""Who gives the first weights of a run: the script's decision, else the lowest worker's."""

from __future__ import annotations

import re
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from whole import DEADLINE_S, ENDLESS, Served

from paramserver.errors import UserError

PRETRAINED = 7.0


class Starts:
    """Workers that join, take part in one epoch, and report the weights that they began with."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.weights: dict[int, float] = {}
        self.said: dict[int, list[str]] = {}
        self.data = [(torch.zeros(3), torch.zeros(())) for _ in range(24)]

    def start(self, number: int, **attach: Any) -> Future[None]:
        return self.served.start(self._work, number, attach)

    def joined(self, number: int) -> None:
        """Wait until it has said what it brings."""
        peers = self.served.server.rounds.peers
        self.served.until(lambda: any(p.id == number and p.join for p in peers.values()))

    def _work(self, number: int, attach: dict[str, Any]) -> None:
        said = self.said[number] = list[str]()
        model = nn.Linear(3, 1)
        with torch.no_grad():
            model.weight.fill_(PRETRAINED if attach.get("first") else float(number))
        with self.served.join(number, said.append) as cluster:
            optimizer = SGD(model.parameters(), lr=0.1)
            model, optimizer = cluster.attach(model, optimizer, **attach)
            self.weights[number] = float(model.weight.detach()[0, 0])
            for x, _ in cluster.batches(self.data, batch_size=4):
                optimizer.zero_grad()
                model(x).mean().backward()
                optimizer.step()


def test_the_lowest_worker_gives_them_whoever_comes_first() -> None:
    with Served(num_workers=3, num_epochs=1) as served:
        starts = Starts(served)
        futures = []
        for number in (3, 2, 1):
            futures.append(starts.start(number))
            starts.joined(number)
        served.wait(*futures)
    assert starts.weights == {1: 1.0, 2: 1.0, 3: 1.0}
    told = [line for line in starts.said[3] if "weights replaced" in line]
    assert len(told) == 1
    assert re.fullmatch(
        r"weights replaced by worker 1 \(.*\)'s: they differ from what was here", told[0]
    )
    assert not any("weights replaced" in line for line in starts.said[1])


def test_the_worker_whose_script_says_so_gives_them() -> None:
    with Served(num_workers=2, num_epochs=1) as served:
        starts = Starts(served)
        futures = [starts.start(1)]
        starts.joined(1)
        futures.append(starts.start(2, first=True))
        served.wait(*futures)
    assert starts.weights == {1: PRETRAINED, 2: PRETRAINED}
    assert any("replaced by worker 2" in line for line in starts.said[1])


def test_two_scripts_that_say_so_are_an_error() -> None:
    with Served(num_workers=2, num_epochs=1) as served:
        starts = Starts(served)
        first = starts.start(2, first=True)
        starts.joined(2)
        with pytest.raises(UserError, match=r"those of worker 2 .* whose script says the same"):
            starts.start(1, first=True).result(DEADLINE_S)
        served.wait(starts.start(3), first)


def test_who_comes_late_is_told_that_its_weights_are_gone() -> None:
    with Served(num_workers=1, num_epochs=ENDLESS) as served:
        starts = Starts(served)
        first = starts.start(1)
        served.until(lambda: len(served.closes) > 3)
        second = starts.start(2, first=True)  # it was started again, say
        served.until_contributes(2)
        served.stop()
        served.wait(second, first)
    assert any(
        re.search(r"replaced by those of the run at step \d+", line) for line in starts.said[2]
    )
