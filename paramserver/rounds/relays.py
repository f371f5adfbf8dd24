"""The relays of a run: who hands on to whom what other hosts have averaged.

Where several replicas are on one host, a worker among them, its **relay**, gets what other hosts
average over the cable, and hands it on to the others, who **listen** (docs/protocol.md, "Relays").
Nothing depends on a relay but time: who lacks an average asks for it, and gets its own copies from
then on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from paramserver.protocol.messages import HandOn, Listen
from paramserver.rounds.effects import Spared
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.roster import Peer, Roster

RETRY_S = 10.0
"""So long a replica that lacked something gets its own copies before it listens again; each time
twice as long, up to `RETRY_MAX_S`, unless it has heard all for `LASTS_S`."""
RETRY_MAX_S = 640.0
LASTS_S = 60.0


class Listener(msgspec.Struct):
    """A replica that is to hear a relay; it does since `since`."""

    since: float | None = None


class Relay(msgspec.Struct):
    """The relay of a host: the session of a worker there."""

    session: str
    folder: str = ""
    """Where it hands on; empty: it has not said yet."""
    listeners: dict[str, Listener] = msgspec.field(default_factory=dict)
    """By session."""


class Relays:
    """Owns the relays, by the address of their host."""

    def __init__(self, roster: Roster, out: Outcome) -> None:
        self._roster = roster
        self._out = out
        self._relays: dict[str, Relay] = {}
        self._unable: set[str] = set()  # sessions that cannot hand on, or cannot listen
        self._waits: dict[str, tuple[float, float]] = {}  # by session: until when, and how long

    def at(self, address: str) -> bool:
        """Is there a relay that hands on at this address?"""
        relay = self._relays.get(address)
        return relay is not None and bool(relay.folder)

    @property
    def listening(self) -> set[str]:
        """The sessions that hear a relay."""
        relays = self._relays.values()
        return {
            session
            for relay in relays
            for session, listener in relay.listeners.items()
            if listener.since is not None
        }

    def look(self, hosts: Mapping[str, Sequence[Peer]], now: float) -> None:
        """Look for relays and listeners among these replicas, in the order of their ids by the
        addresses of their hosts."""
        for address, peers in hosts.items():
            able = [p for p in peers if p.session not in self._unable]
            relay = self._relays.get(address)
            if len(able) < 2:
                if relay is not None:
                    self._end(address)
            elif relay is None:
                workers = [p for p in able if p.role == "worker" and not p.is_elsewhere]
                if workers:
                    self._relays[address] = Relay(workers[0].session)
                    self._out.send(workers[0], HandOn())
            elif relay.folder:
                for peer in able:
                    self._let_listen(relay, peer, address, now)

    def _let_listen(self, relay: Relay, peer: Peer, address: str, now: float) -> None:
        session = peer.session
        until, _ = self._waits.get(session, (0.0, 0.0))
        if session != relay.session and session not in relay.listeners and now >= until:
            relay.listeners[session] = Listener()
            self._out.send(peer, Listen(folder=relay.folder, server=bool(address)))

    def hands_on(self, peer: Peer, folder: str) -> None:
        """A worker hands on there, or (no folder) cannot."""
        for address, relay in self._relays.items():
            if relay.session == peer.session and not relay.folder:
                relay.folder = folder
                if not folder:
                    self._unable.add(peer.session)
                    self._end(address)
                return

    def listens(self, peer: Peer, problem: str, now: float) -> None:
        """A replica hears the relay of its host, or does not, because of a `problem`."""
        address, listener = self._listener(peer.session)
        if listener is None:
            return
        if not problem:
            if listener.since is None:
                listener.since = now
                self._out.effects.append(Spared(peer.session, address, on=True))
        elif listener.since is None:
            self._unable.add(peer.session)
            self._stop(address, peer.session)
        else:
            self.lacks(peer, now)

    def lacks(self, peer: Peer, now: float) -> None:
        """This replica lacks an average that its relay should have handed on: it gets its own
        copies, for some time."""
        address, listener = self._listener(peer.session)
        if listener is None or listener.since is None:
            return
        _, before = self._waits.get(peer.session, (0.0, 0.0))
        lasted = now - listener.since > LASTS_S
        wait_s = RETRY_S if lasted or not before else min(2 * before, RETRY_MAX_S)
        self._waits[peer.session] = now + wait_s, wait_s
        self._stop(address, peer.session)

    def taken_out(self, peer: Peer) -> None:
        """This peer has no place until it joins again: it neither hands on nor listens."""
        address, listener = self._listener(peer.session)
        if listener is not None:
            self._stop(address, peer.session)
        for address, relay in list(self._relays.items()):
            if relay.session == peer.session:
                self._end(address)

    def forget(self, session: str) -> None:
        """This peer, which was taken out, is gone."""
        self._unable.discard(session)
        self._waits.pop(session, None)

    def _listener(self, session: str) -> tuple[str, Listener | None]:
        for address, relay in self._relays.items():
            if session in relay.listeners:
                return address, relay.listeners[session]
        return "", None

    def _stop(self, address: str, session: str) -> None:
        listener = self._relays[address].listeners.pop(session)
        if listener.since is not None:
            self._out.effects.append(Spared(session, address, on=False))
        self._out.send(self._roster.peers[session], Listen())

    def _end(self, address: str) -> None:
        for session in list(self._relays[address].listeners):
            self._stop(address, session)
        relay = self._relays.pop(address)
        self._out.send(self._roster.peers[relay.session], HandOn(on=False))


__all__ = ["Relays"]
