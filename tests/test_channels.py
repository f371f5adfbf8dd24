"""Sealed payloads: a run whose pushes and averages travel through channels, and those who attack
them."""

from __future__ import annotations

import pytest
from crew import Crew, Noise, perceptron
from whole import Served

from paramserver.keys import Keys
from paramserver.transport import sockets

KEYS = Keys.new()


@pytest.fixture(autouse=True)
def as_from_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers of this host use no ipc."""
    monkeypatch.setattr(sockets, "ipc_usable", lambda folder: False)


def test_a_run_with_keys_sends_its_payloads_through_channels() -> None:
    with Served(keys=KEYS, num_workers=2, num_epochs=2) as served:
        crew = Crew(served, perceptron, Noise(96))
        served.wait(*[crew.start(number, 8) for number in (1, 2)], served.end)
        print(served.server.channels.__dict__)
        print(crew.said, served.said)
    crew.check()
