"""Measures a path between two machines: round trip, and throughput each way, over ZeroMQ.

The side that dials measures, the side that listens only answers:

    echo, bytes      -> the same
    take, bytes      -> got                 (the way up: the dialler sends)
    give, length     -> bytes of that length  (the way down)

The number of unanswered messages is bounded: a window of about `QUEUE_S` at the speed so far, so
that a slow path is not filled for seconds and a fast one is never idle.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from paramserver.transport import sockets

FRAME_MAX = 2**20
FRAME_MIN = 2**14
FRAME_S = 0.005  # the time that a frame should take
QUEUE_S = 0.1
WINDOW_MIN = 2**16
WINDOW_MAX = 2**26
SETTLING = 0.25  # of a measurement's time: for windows to open and bursts to pass
ECHOES = 40
CONNECT_S = 5.0
SILENCE_S = 5.0  # until a path counts as broken
LISTEN_S = 300.0  # a listener that was forgotten ends


class Broken(Exception):
    """The path carries nothing; `number` is the system's errno, 0 for silence."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


@dataclass(frozen=True)
class Speed:
    """The speed of a path, as seen from the side that dials."""

    round_trip_s: float  # median
    up_bytes_per_s: float
    down_bytes_per_s: float

    @property
    def slower_bytes_per_s(self) -> float:
        return min(self.up_bytes_per_s, self.down_bytes_per_s)


class Listener:
    """Answers at `address`, at a port of its own, on a thread of its own, until closed."""

    def __init__(self, address: str) -> None:
        self._context = sockets.context()
        try:
            self._socket = sockets.router(self._context, 2 * FRAME_MAX)
            sockets.bind(self._socket, [sockets.tcp(address, 0)])
        except BaseException:
            self._context.term()
            raise
        bound = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.port = int(bound.rstrip(b"\0").rpartition(b":")[2])
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, name=f"listener at {address}")
        self._thread.start()

    def _answer(self) -> None:
        zeros = memoryview(bytes(FRAME_MAX))
        deadline = time.monotonic() + LISTEN_S
        while not self._over.is_set() and time.monotonic() < deadline:
            if not self._socket.poll(50):
                continue
            while sockets.readable(self._socket):
                peer, word, content = sockets.receive(self._socket)
                answer: list[Any] = [peer, word, content]
                if word.bytes == b"take":
                    answer = [peer, b"got"]
                elif word.bytes == b"give":
                    answer = [peer, b"took", zeros[: min(int(content.bytes), FRAME_MAX)]]
                with suppress(zmq.ZMQError):  # the peer is gone
                    sockets.send(self._socket, answer, copy=False)
        self._socket.close()
        self._context.term()

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def measure(address: str, port: int, near: str | None, seconds: float) -> Speed:
    """The path from `near` (None: as the routes have it) to a listener, `seconds` for each way.

    Raises `Broken` where nothing comes back.
    """
    _try(address, port, near)
    far = sockets.tcp(address, port)
    if near is not None:
        far = f"{sockets.tcp(near, 0)};{far.removeprefix('tcp://')}"
    context = sockets.context()
    dealer = sockets.dealer(context)
    try:
        sockets.connect(dealer, far)
        trip = _round_trip(dealer)
        up = _throughput(dealer, b"take", trip, seconds)
        down = _throughput(dealer, b"give", trip, seconds)
    finally:
        dealer.close(linger=0)
        context.term()
    return Speed(trip, up, down)


def _try(address: str, port: int, near: str | None) -> None:
    """Try a plain connection first: its error has a reason, while ZeroMQ would only be silent."""
    try:
        source = None if near is None else (near, 0)
        socket.create_connection((address, port), CONNECT_S, source_address=source).close()
    except OSError as e:
        raise Broken(e.errno or 0, e.strerror or str(e)) from None


def _round_trip(dealer: zmq.Socket[bytes]) -> float:
    times = []
    for _ in range(ECHOES):
        start = time.perf_counter()
        sockets.send(dealer, [b"echo", b"?"])
        _receive(dealer)
        times.append(time.perf_counter() - start)
    return sorted(times)[ECHOES // 2]


def _receive(dealer: zmq.Socket[bytes]) -> list[zmq.Frame]:
    if not dealer.poll(int(1000 * SILENCE_S)):
        raise Broken(0, f"nothing comes through for {SILENCE_S:g} s")
    return sockets.receive(dealer)


def _throughput(dealer: zmq.Socket[bytes], word: bytes, trip_s: float, seconds: float) -> float:
    """Bytes per second that arrive here, or whose arrival the listener confirms."""
    zeros = memoryview(bytes(FRAME_MAX))
    start = time.perf_counter()
    waiting: list[int] = []  # lengths of the messages under way, oldest first
    under_way = arrived = counted = 0
    rate = 0.0
    first = last = math.nan  # between which arrivals were counted
    while True:
        window = min(max(rate * max(QUEUE_S, 4 * trip_s), WINDOW_MIN), WINDOW_MAX)
        size = int(min(max(rate * FRAME_S, FRAME_MIN), FRAME_MAX))
        while under_way + size <= window or not waiting:
            content = zeros[:size] if word == b"take" else str(size).encode()
            sockets.send(dealer, [word, content], copy=False)
            waiting.append(size)
            under_way += size
        _receive(dealer)
        now = time.perf_counter()
        length = waiting.pop(0)
        under_way -= length
        arrived += length
        rate = max(rate, arrived / (now - start))
        if now - start >= SETTLING * seconds:
            if math.isnan(first):
                first = now
            else:
                counted += length
            last = now
        if now - start >= seconds and counted:
            break
    while waiting:  # the other direction starts with nothing under way
        _receive(dealer)
        waiting.pop()
    return counted / (last - first)
