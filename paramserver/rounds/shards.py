"""The shards of a run: who carries one, who reaches it, and who holds what it made.

A shard averages some buckets in place of the server (docs/protocol.md, "Shards"). A round's
averages are **held** when for each shard a replica on another host has them: then the round may be
closed, whatever becomes of the shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import msgspec

from paramserver.protocol import sharding
from paramserver.protocol.messages import SHARDS_MAX, Carry
from paramserver.protocol.sharding import SERVER, Cable, Shares
from paramserver.rounds.outcome import Outcome
from paramserver.rounds.relays import Relays
from paramserver.rounds.roster import Peer, Roster
from paramserver.rounds.round import Round
from paramserver.rounds.rules import Rules
from paramserver.rounds.states import REPLICA

OFFER_S = 120.0  # for a worker that has spoken since it was asked: to import PyTorch takes a while
DEATHS_MAX = 3  # of shards of one host, one after the other; then it carries none any more
LONG_S = 600.0  # a shard that has lived so long was no failure: a long run outlives many workers
HOLD_TIMEOUTS = 1.5  # heartbeat timeouts for a replica to have the averages of a round
HOSTS_MIN = 3  # without a setting: with fewer, the server alone is as fast
SMALL_BYTES = 2**18  # without a setting: a smaller gradient takes longer with the one message more


def wanted(setting: int | None, hosts: int, nbytes: float) -> int:
    """So many shards average at most, with the server's, where workers are on so many `hosts`
    beside the server's, and a gradient has so many bytes."""
    if setting is not None:
        return min(setting, SHARDS_MAX)
    several = hosts + 1 >= HOSTS_MIN and nbytes >= SMALL_BYTES
    return min(hosts + 1, SHARDS_MAX) if several else 1


class Shard:
    """A shard that lives. `host` is the address of its machine, `owner` the session of the worker
    that has started it, `reached` has the sessions of those that have a channel to it."""

    def __init__(self, number: int, host: str, name: str, owner: str, now: float) -> None:
        self.number = number
        self.host = host
        self.name = name
        self.owner = owner
        self.since = self.last_seen = now
        self.reached: set[str] = set()


class Asked(msgspec.Struct):
    """A worker that was asked to carry a shard. It reads that when it next waits at its link, not
    during a step, which may take minutes where it is the first one."""

    session: str
    at: float
    spoke_at: float | None = None
    """On its link, for the first time since."""


class Shards:
    """Owns the shards by number (`live`), and the map of the next round: `shares`, and the `owners`
    of the buckets. `sentence` tells it to people, and is empty where the server averages all.
    `rates`, by address: bytes a second that the cable of a host carries, where it was measured.
    `relays` hand on within a host what others average."""

    make_relays: type[Relays] = Relays

    def __init__(self, rules: Rules, roster: Roster, out: Outcome) -> None:
        self.live: dict[int, Shard] = {}
        self.shares: Shares = ()
        self.owners: tuple[int, ...] = ()
        self.sentence = ""
        self.rates: Mapping[str, float] = {}
        self.relays = self.make_relays(roster, out)
        self._rules = rules
        self._roster = roster
        self._out = out
        self._sizes: tuple[int, ...] = ()
        self._fixed: frozenset[int] = frozenset()
        self._number = 0
        self._places: dict[str, str] = {}  # session -> address; empty: the server's own host
        self._asked: dict[str, Asked] = {}  # by address
        self._late: dict[str, str] = {}  # address -> the session that has offered nothing in time
        self._deaths: Counter[str] = Counter()  # by address
        self._excluded: set[str] = set()  # addresses of which too many shards have died
        self._to_say: list[str] = []
        self._said_alone = False
        self._unreached: set[tuple[int, str]] = set()  # of which it was said

    def begin(self, sizes: tuple[int, ...], fixed: frozenset[int]) -> None:
        """The buckets of the run have these bytes; those that are `fixed` stay with the server."""
        self._sizes, self._fixed = sizes, fixed
        self._map()

    # ------------------------------------------------------------------ who carries one

    def placed(self, session: str, address: str) -> None:
        """Note from where this peer comes."""
        self._places[session] = address

    def address(self, session: str) -> str | None:
        return self._places.get(session)

    def look(self, now: float) -> None:
        """Ask a worker of each host that is to carry a shard, and has none, for one."""
        hosts = self._hosts()
        self._say_who_carries_none(len(hosts))
        self._go_on_without(now)
        carrying, most = self._carrying(), self._most(len(hosts))
        for address, peer in hosts.items():
            if len(carrying) + 1 >= most:
                return
            if address in carrying or address in self._late or address in self._excluded:
                continue
            carrying.add(address)
            self._asked[address] = Asked(peer.session, now)
            self._out.send(peer, Carry())

    def _hosts(self) -> dict[str, Peer]:
        """The worker that may be asked on each host beside the server's, by its address."""
        hosts: dict[str, Peer] = {}
        for peer in sorted(self._roster.in_state(REPLICA), key=lambda p: p.id):
            address = self._places.get(peer.session, "")
            if peer.role == "worker" and address and peer.ready is not None:
                hosts.setdefault(address, peer)
        return hosts

    def _most(self, hosts: int) -> int:
        return wanted(self._rules.shards, hosts, sum(self._sizes))

    def _carrying(self) -> set[str]:
        """The hosts that carry a shard, or were asked to."""
        return {s.host for s in self.live.values()} | set(self._asked)

    def _say_who_carries_none(self, hosts: int) -> None:
        for sentence in self._to_say:
            self._out.warn(sentence)
        self._to_say.clear()
        why = self._rules.averages_alone
        if why and not self._said_alone and wanted(None, hosts, sum(self._sizes)) > 1:
            self._said_alone = True
            self._out.say(f"the server averages all gradients: {why}")

    def _go_on_without(self, now: float) -> None:
        """Let others have the place of a worker that offers no shard. It may still do so later."""
        for address, asked in list(self._asked.items()):
            waited_s, since = now - asked.at, f"it was asked for one {now - asked.at:.0f} s ago"
            if asked.spoke_at is not None and now - asked.spoke_at > OFFER_S:
                why = f"has offered none since {since}"
            elif asked.spoke_at is None and waited_s > max(OFFER_S, self._rules.idle_timeout):
                why = f"has said nothing but its beats since {since}"
            else:
                continue
            del self._asked[address]
            self._late[address] = asked.session
            who = self._roster.peers[asked.session].name
            self._out.say(f"the machine at {address} carries no shard so far: {who} {why}")

    def spoke(self, session: str, now: float) -> None:
        """A peer has said something on its link, where it soon reads, too."""
        asked = self._asked.get(self._places.get(session, ""))
        if asked is not None and asked.session == session and asked.spoke_at is None:
            asked.spoke_at = now

    def look_for_relays(self, now: float) -> None:
        """Where others average, see who hands that on within each host."""
        if self.shares:
            self.relays.look(self._replicas(), now)

    def _replicas(self) -> dict[str, list[Peer]]:
        """The replicas on each host, by its address."""
        hosts: dict[str, list[Peer]] = {}
        for peer in sorted(self._roster.in_state(REPLICA), key=lambda p: p.id):
            if peer.session in self._places:
                hosts.setdefault(self._places[peer.session], []).append(peer)
        return hosts

    def offered(self, peer: Peer, now: float) -> Shard | None:
        """The worker has started a shard: take it, if it was asked to. Later than it should it may
        do so where its place is still free."""
        address = self._places.get(peer.session, "")
        asked = self._asked.get(address)
        if asked is not None and asked.session == peer.session:
            del self._asked[address]
        elif self._late.get(address) == peer.session:
            del self._late[address]  # it may be asked again
            if not self._has_room():
                return None
        else:
            return None
        self._number += 1
        shard = Shard(self._number, address, peer.host, peer.session, now)
        self.live[shard.number] = shard
        return shard

    def declines(self, peer: Peer) -> bool:
        """Is a shard that this peer has started, and that was not taken, not going to be asked for
        either? One whose link was cut is asked for again."""
        address = self._places.get(peer.session, "")
        others = self._carrying() | set(self._late) | self._excluded
        return not address or address in others or not self._has_room()

    def _has_room(self) -> bool:
        return len(self._carrying()) + 1 < self._most(len(self._hosts()))

    def silent(self, now: float) -> list[Shard]:
        """The shards that have given no sign of life for too long."""
        limit = self._rules.heartbeat_timeout
        return [s for s in self.live.values() if now - s.last_seen > limit]

    def of(self, session: str) -> list[Shard]:
        """The shards that this worker has started."""
        return [s for s in self.live.values() if s.owner == session]

    def lose(self, number: int, now: float) -> Shard | None:
        """Forget a shard; None if it is not known."""
        shard = self.live.pop(number, None)
        if shard is not None:
            self._note_end(shard, now)
        return shard

    def retire(self, number: int, now: float) -> Shard:
        """Forget a shard whose worker leaves."""
        shard = self.live.pop(number)
        self._note_end(shard, now)
        return shard

    def _note_end(self, shard: Shard, now: float) -> None:
        """Each end may cost a round, in whatever order the shard's worker has left."""
        lived_long = now - shard.since >= LONG_S
        self._deaths[shard.host] = 0 if lived_long else self._deaths[shard.host] + 1
        if self._deaths[shard.host] >= DEATHS_MAX and shard.host not in self._excluded:
            self._excluded.add(shard.host)
            self._to_say.append(
                f"{shard.name} ({shard.host}) carries no shard any more: {DEATHS_MAX} in a row "
                f"have lived for less than {LONG_S / 60:g} minutes each, and each end may cost a "
                "round; others average in its place. See there why they, or their workers, end; a "
                "server that is started again asks for one again"
            )

    # ------------------------------------------------------------------ who reaches it

    def reached(self, peer: Peer, number: int, problem: str) -> bool:
        """The peer has a channel to a shard, or none because of a `problem`. Is that news?"""
        shard = self.live.get(number)
        if shard is None or (peer.session in shard.reached) == (not problem):
            return False
        if not problem:
            shard.reached.add(peer.session)
            return True
        shard.reached.discard(peer.session)
        if (key := (number, peer.session)) not in self._unreached:
            self._unreached.add(key)
            self._out.warn(
                f"{peer.name} does not reach the shard on {shard.name} ({shard.host}): {problem}; "
                "others average in its place",
                peer,
            )
        return True

    def forget(self, session: str) -> None:
        """This peer is gone."""
        self._places.pop(session, None)
        self.relays.forget(session)
        self._unreached = {key for key in self._unreached if key[1] != session}
        self._asked = {a: asked for a, asked in self._asked.items() if asked.session != session}
        for shard in self.live.values():
            shard.reached.discard(session)

    # ------------------------------------------------------------------ the map

    def choose(self, workers: Collection[Peer]) -> bool:
        """Choose the shards of the next round, in which these workers may take part. Are they other
        ones than before?"""
        sessions = {p.session for p in workers}
        chosen = [
            SERVER, *(n for n, s in sorted(self.live.items()) if sessions <= s.reached)
        ]  # fmt: skip
        found = self._shares(chosen, workers)
        if found == self.shares:
            return False
        self.shares = found
        self._map()
        self.sentence = self._told(measured=found != sharding.equal(chosen)) if found else ""
        self._out.say(self.sentence or "the server averages all gradients")
        return True

    def _told(self, *, measured: bool) -> str:
        parts = [
            f"{share / 10:.0f} % {self.live[shard].name}" if shard else f"{share / 10:.0f} % itself"
            for shard, share in self.shares
        ]
        by = ", as their cables were measured" if measured else ""
        return f"the server lets several average the gradients: {', '.join(parts)}{by}"

    def _shares(self, chosen: list[int], workers: Collection[Peer]) -> Shares:
        if self._rules.deterministic or len(chosen) == 1 or not self.rates:
            return sharding.equal(chosen)
        hosts = {SERVER: "", **{n: s.host for n, s in self.live.items()}}
        if any(hosts[n] not in self.rates for n in chosen):
            return sharding.equal(chosen)
        at = Counter(self._places.get(p.session, "") for p in workers)
        copies = {
            address: 1 if self.relays.at(address) else len(peers)
            for address, peers in self._replicas().items()
        }
        cables = {
            n: Cable(self.rates[hosts[n]], at[hosts[n]], copies.get(hosts[n], 0)) for n in chosen
        }
        return sharding.shares(cables, len(workers), sum(copies.values()))

    def _map(self) -> None:
        self.owners = sharding.owners(self._sizes, self.shares, self._fixed)

    def owner(self, bucket: int) -> int:
        """The shard that has the sum of this bucket."""
        return self.owners[bucket] if 0 <= bucket < len(self.owners) else SERVER

    # ------------------------------------------------------------------ who holds what

    def unheld(self, current: Round) -> list[Shard]:
        """The shards of which nobody elsewhere is known to hold what they made in this round. A
        member on another host that has all of it is waited for, as long as there is one; and what
        somebody says who has shown nothing yet counts only where nobody else can say it."""
        makers = sorted({current.owners[b] for b in current.made_elsewhere()})
        return [s for n in makers if (s := self.live.get(n)) and not self._is_held(s, current)]

    def _is_held(self, shard: Shard, current: Round) -> bool:
        peers = self._roster.peers
        holders = [peers[session] for session in current.holders if session in peers]
        members = [
            peer
            for m in current.members.values()
            if current.whole(m) and (peer := peers.get(m.session)) and peer.state == REPLICA
        ]
        elsewhere = [p for p in members if self._places.get(p.session, "") != shard.host]
        if elsewhere:
            holders = [p for p in holders if self._places.get(p.session, "") != shard.host]
        if any(p.has_shown for p in elsewhere):
            holders = [p for p in holders if p.has_shown]
        return bool(holders)

    def overdue(self, current: Round, now: float, left_s: float) -> list[tuple[Shard, str]]:
        """The shards that do not bring what they have to in time, and why. `left_s`: until the run
        is given up. With `overlap` a replica may compute for long before it says what it holds; but
        others get their turn when the round has waited as long as is left, half of the time."""
        found = []
        limit = self._rules.heartbeat_timeout
        for number in sorted({current.owners[b] for b in current.unmade}):
            since = min(at for b, at in current.unmade.items() if current.owners[b] == number)
            if number in self.live and now - since > limit:
                found.append((self.live[number], f"an average has been due for {limit:g} s"))
        if current.closing_at is not None:
            waited, limit = now - current.closing_at, HOLD_TIMEOUTS * self._rules.heartbeat_timeout
            if self._rules.overlap:
                limit = max(limit, left_s)
            if waited > limit:
                why = f"nobody elsewhere has what it made in the last {waited:.0f} s"
                found += [(shard, why) for shard in self.unheld(current)]
        return found


__all__ = ["Shard", "Shards", "wanted"]
