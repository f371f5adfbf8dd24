"""Which shard averages which bucket, and how large a part of all each shard takes.

A shard is a process that adds the pushes of some buckets (docs/protocol.md, "Shards"). The server
chooses `shares` and tells them with each round; server and workers compute `owners` from them, with
whole numbers only, so that all come to the same map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

SERVER = 0
"""The shard in the server's own process."""

WHOLE = 1000
"""The shares of all shards of a round together."""

Shares = tuple[tuple[int, int], ...]
"""(shard, share of the bytes in thousandths) of each, by number; empty: the server alone."""

TURNS = 60  # of the bisection: more than a float can tell apart


class Cable(msgspec.Struct, frozen=True):
    """The cable of one host that may carry a shard, and what else goes through it."""

    rate: float
    """Bytes a second, each way."""
    workers: int = 1
    """Workers on that host."""
    copies: int = 1
    """How often each average that others made crosses the cable, for replicas on that host."""


def relayed(rate: float, workers: int, *, observer: bool = False) -> Cable:
    """The cable of a host with so many workers, and perhaps the observer, in a run that goes well:
    one of these replicas takes what other hosts average, and hands it on to the others there."""
    return Cable(rate, workers, min(1, workers + observer))


def owners(sizes: Sequence[int], shares: Shares, fixed: frozenset[int]) -> tuple[int, ...]:
    """The shard of each bucket, for buckets of these `sizes`; those in `fixed` are the server's.

    Each bucket goes to the shard that lacks most of its share so far, of equal ones to the first:
    pushes leave in the buckets' order, and all shards are to be busy at any time.
    """
    if not shares:
        return (SERVER,) * len(sizes)
    total = 0
    got = dict.fromkeys((shard for shard, _ in shares), 0)
    found = []
    for bucket, size in enumerate(sizes):
        if bucket in fixed:
            found.append(SERVER)
            continue
        total += size
        shard = max(shares, key=lambda s: s[1] * total - WHOLE * got[s[0]])[0]
        got[shard] += size
        found.append(shard)
    return tuple(found)


def equal(shards: Sequence[int]) -> Shares:
    """The same share for each of these shards; none where the server is alone."""
    if list(shards) == [SERVER]:
        return ()
    return _rounded(dict.fromkeys(shards, 1.0))


def shares(cables: Mapping[int, Cable], workers: int, receivers: int) -> Shares:
    """The shares with which the slowest cable is done soonest, where each of so many `workers`
    pushes a whole gradient and so many `receivers` get all averages.

    With a share s, a host of w workers that takes c copies of others' averages receives
    s (workers - w) + c (1 - s) gradients and sends w (1 - s) + s (receivers - c). The time in which
    all can be done is found by bisection.
    """
    if len(cables) < 2:
        return ()
    slow, fast = 0.0, 1.0
    while sum(_most(c, fast, workers, receivers) for c in cables.values()) < 1.0:
        fast *= 2.0
        if fast > 2.0**60:  # no share helps: a host's own pushes take that long
            return equal(sorted(cables))
    for _ in range(TURNS):
        middle = (slow + fast) / 2
        done = sum(_most(c, middle, workers, receivers) for c in cables.values()) >= 1.0
        slow, fast = (slow, middle) if done else (middle, fast)
    found = _rounded({shard: _most(c, fast, workers, receivers) for shard, c in cables.items()})
    return () if found == ((SERVER, WHOLE),) else found


def seconds(cables: Mapping[int, Cable], chosen: Shares, workers: int, receivers: int) -> float:
    """The time that the slowest of these cables needs for one exchange, for each byte of a
    gradient."""
    told, longest = dict(chosen or ((SERVER, WHOLE),)), 0.0
    for shard, cable in cables.items():
        share = told.get(shard, 0) / WHOLE
        came, went = (base + slope * share for base, slope in _loads(cable, workers, receivers))
        longest = max(longest, came / cable.rate, went / cable.rate)
    return longest


def foreseen(cables: Mapping[int, Cable], most: int, *, alike: bool) -> tuple[Shares, float]:
    """The shares of a run in which the first `most` of these hosts average, and the time that an
    exchange takes for each byte of a gradient. `alike`: shares are equal, whatever cables carry."""
    workers = sum(cable.workers for cable in cables.values())
    receivers = sum(cable.copies for cable in cables.values())
    first = {shard: cables[shard] for shard in sorted(cables)[:most]}
    found = equal(list(first)) if alike else shares(first, workers, receivers)
    return found, seconds(cables, found, workers, receivers)


def _loads(
    cable: Cable, workers: int, receivers: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Gradients in and out of a host, each as what there is without a shard and what a whole one
    adds."""
    w, c = cable.workers, cable.copies
    return (c, workers - w - c), (w, receivers - c - w)


def _most(cable: Cable, time: float, workers: int, receivers: int) -> float:
    """The largest share that this host can take if it must be done in so many seconds for each byte
    of a gradient. Where its own traffic takes longer, none."""
    most = 1.0
    for base, slope in _loads(cable, workers, receivers):
        left = time * cable.rate - base
        if slope > 0:
            most = min(most, max(0.0, left / slope))
    return most


def _rounded(parts: Mapping[int, float]) -> Shares:
    """In thousandths that add up to `WHOLE`: by largest remainder, of equal ones the first."""
    total = sum(parts.values())
    exact = {shard: part / total * WHOLE for shard, part in sorted(parts.items())}
    whole = {shard: int(value) for shard, value in exact.items()}
    by_rest = sorted(exact, key=lambda shard: (whole[shard] - exact[shard], shard))
    for shard in by_rest[: WHOLE - sum(whole.values())]:
        whole[shard] += 1
    return tuple((shard, share) for shard, share in whole.items() if share)


__all__ = [
    "SERVER",
    "WHOLE",
    "Cable",
    "Shares",
    "equal",
    "foreseen",
    "owners",
    "relayed",
    "seconds",
    "shares",
]
