"""What the server knows of each peer's link and machine, for people; nothing is decided by it."""

from __future__ import annotations

from paramserver.net.link_watch import LinkMeter
from paramserver.protocol.messages import Vitals


class Traffic:
    """Bytes, addresses and vitals of the peers, by session."""

    def __init__(self) -> None:
        self.published_bytes = 0
        """To each peer that follows."""
        self.addresses: dict[str, str] = {}
        """Of the peer's end of its link; empty within this machine."""
        self.vitals: dict[str, Vitals] = {}
        self.meter = LinkMeter()
        self.expected: dict[int, float] = {}
        """Bytes a second that a worker's path carried, as it was measured before the run."""
        self._came: dict[str, int] = {}
        self._sent: dict[str, int] = {}
        self._published_before: dict[str, int] = {}

    def linked(self, session: str, address: str) -> None:
        """A peer's link has come up: from now on it gets what is published."""
        self.addresses[session] = address
        self._published_before.setdefault(session, self.published_bytes)

    def came(self, session: str, size: int) -> None:
        self._came[session] = self._came.get(session, 0) + size

    def sent(self, session: str, size: int) -> None:
        """Sent to this peer only."""
        self._sent[session] = self._sent.get(session, 0) + size

    def bytes_of(self, session: str) -> tuple[int, int]:
        """Bytes from this peer, and to it."""
        before = self._published_before.get(session, self.published_bytes)
        sent = self._sent.get(session, 0) + self.published_bytes - before
        return self._came.get(session, 0), sent

    def forget(self, session: str) -> None:
        """The peer is gone."""
        for kept in (self.addresses, self.vitals, self._came, self._sent, self._published_before):
            kept.pop(session, None)
