"""What peers say behind a push whose payload is still on its way through a channel.

Headers come over the link, payloads over another connection; a peer's messages are handled in the
order in which it sent them all the same.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

HELD_BYTES, HELD_MESSAGES = 64 * 2**20, 2**16  # of one link


class Came(msgspec.Struct):
    """A message as it came over a link, in these many bytes; `frame` is one of its frames."""

    message: Any
    buffers: list[Any]
    frame: Any
    size: int
    at: float


class _Queue(msgspec.Struct):
    since: float
    """When the first message began to wait."""
    messages: deque[Came] = msgspec.field(default_factory=deque)
    bytes: int = 0


class Held:
    """Messages that wait, by the route of their link."""

    def __init__(self) -> None:
        self._queues: dict[bytes, _Queue] = {}

    def __contains__(self, route: bytes) -> bool:
        return route in self._queues

    def hold(self, route: bytes, came: Came, now: float) -> None:
        """From now on all messages of this link wait, this one first."""
        self._queues[route] = _Queue(since=now)
        self.behind(route, came)

    def first(self, route: bytes) -> Came | None:
        """The message of this link that waits for its payload; None where none does."""
        queue = self._queues.get(route)
        return None if queue is None else queue.messages[0]

    def go_on(self, route: bytes, now: float) -> None:
        """The first message does not wait any more, but the next one does, if there is one."""
        queue = self._queues[route]
        queue.bytes -= queue.messages.popleft().size
        queue.since = now
        if not queue.messages:
            del self._queues[route]

    def behind(self, route: bytes, came: Came) -> bool:
        """Let a message wait if others of its link do; returns whether it does."""
        queue = self._queues.get(route)
        if queue is None:
            return False
        queue.messages.append(came)
        queue.bytes += came.size
        return True

    def full(self, route: bytes) -> bool:
        """Do more messages wait than one peer may have here?"""
        queue = self._queues[route]
        return queue.bytes > HELD_BYTES or len(queue.messages) > HELD_MESSAGES

    def release(self, route: bytes) -> deque[Came]:
        """The messages of this link, which do not wait any more."""
        queue = self._queues.pop(route, None)
        return deque() if queue is None else queue.messages

    def since(self) -> list[tuple[bytes, float]]:
        """The links whose messages wait, and since when."""
        return [(route, queue.since) for route, queue in self._queues.items()]


__all__ = ["Came", "Held"]
