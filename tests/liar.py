"""A server that speaks the protocol and lies to its workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import zmq
from whole import LOOPBACK, free_port

from paramserver.config.loading import to_wire
from paramserver.protocol import messages as wire
from paramserver.settings import Settings


class FakeServer:
    """Welcomes every peer that says hello on loopback, with these settings over the usual ones and
    these fields over those of an honest Welcome; answers probes. As a `with` block."""

    def __init__(self, told: Mapping[str, Any] | None = None, **welcome: Any) -> None:
        self.port = free_port()
        self.received: list[Any] = []
        settings = json.loads(json.dumps(to_wire(Settings()) | dict(told or {})))
        usual = {"protocol": wire.PROTOCOL, "run": "r", "nonce": "n", "session": "s", "id": 1}
        self.welcome = wire.Welcome(
            **{**usual, "settings": settings, "pub_port": self.port + 1, **welcome}
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def answer(self, message: Any) -> list[wire.Message]:
        """The answer to this message."""
        if isinstance(message, wire.Hello):
            return [self.welcome]
        if isinstance(message, wire.Probe):
            return [wire.Pulse(nonce="n", step=0, lineage="l", phase="training")]
        return []

    def frames(self, message: wire.Message) -> list[Any]:
        """As which it is sent."""
        return wire.to_frames(message)

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        router, pub = context.socket(zmq.ROUTER), context.socket(zmq.PUB)
        router.linger = pub.linger = 0
        router.bind(f"tcp://{LOOPBACK}:{self.port}")
        pub.bind(f"tcp://{LOOPBACK}:{self.port + 1}")
        while not self._stop.is_set():
            if not router.poll(50):
                continue
            sender, *frames = router.recv_multipart()
            message, _ = wire.from_frames(frames)
            self.received.append(message)
            if isinstance(message, wire.Probe):
                pub.send_multipart(wire.to_frames(message))
            for answer in self.answer(message):
                router.send_multipart([sender, *self.frames(answer)])
        router.close()
        pub.close()
        context.term()
