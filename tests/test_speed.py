"""Round trip and throughput over ZeroMQ."""

from __future__ import annotations

import errno

import pytest
from whole import free_port

from paramserver.fleet.speed import Broken, Listener, measure


@pytest.fixture(scope="module", autouse=True)
def garbage_collector_of_pyzmq() -> None:
    """It starts with the first message that is not copied, and stays: a context of its own."""
    listener = Listener("127.0.0.1")
    measure("127.0.0.1", listener.port, None, 0.01)
    listener.close()


def test_loopback_carries_something_both_ways() -> None:
    listener = Listener("127.0.0.1")
    try:
        speed = measure("127.0.0.1", listener.port, "127.0.0.1", 0.1)
        assert speed.up_bytes_per_s > 0 and speed.down_bytes_per_s > 0
        assert 0 < speed.round_trip_s < 1
        assert speed.slower_bytes_per_s == min(speed.up_bytes_per_s, speed.down_bytes_per_s)
        measure("127.0.0.1", listener.port, None, 0.1)  # it answers again
    finally:
        listener.close()


def test_a_path_that_carries_nothing_says_why() -> None:
    with pytest.raises(Broken) as raised:
        measure("127.0.0.1", free_port(), None, 0.1)
    assert raised.value.number == errno.ECONNREFUSED
