"""Finds faults in what the doctor has measured, as sentences, each with what to do. Pure.

A `Report` holds facts and measurements; `findings` judges it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from paramserver.fleet.commands import Trouble
from paramserver.net.hosts import Host
from paramserver.net.interfaces import KINDS, SPOKEN, Interface, Path
from paramserver.protocol import sharding
from paramserver.protocol.sharding import Cable
from paramserver.protocol.versions import misfit
from paramserver.rounds.shards import HOSTS_MIN, SMALL_BYTES, wanted
from paramserver.settings import Settings

NO_ROUTE = (65, 113)  # EHOSTUNREACH of macOS and of Linux
SKEW_S = 2.0
ROOM_BYTES = 2**30
MEMORY_BYTES = 2**30
JUMBO = 9000
UNEVEN = 0.5  # one way carries less than this share of the other
HUNDRED_GBITS = (0.05, 0.1)  # what a network of 100 Mbit/s carries
BETTER_PLACE = 1.25  # so much faster for the slowest machine: worth another place of the server
EXPECTED_GBITS = {"thunderbolt": 5.0, "ethernet": 0.7, "wifi": 0.05}
"""Gbit/s by kind of interface; less than this is a fault."""


@dataclass(frozen=True)
class Measurement:
    """Bytes a second on a path from a worker's machine to the server's, while no run was going
    on."""

    machine: str
    near: str  # its address
    far: str  # the server's
    bytes_per_s: float
    at: float  # seconds since the epoch


@dataclass(frozen=True)
class Measured:
    """A path from one machine to another, and its speed; `problem` where it carries nothing."""

    near: str  # names of the machines
    far: str
    path: Path
    round_trip_s: float = math.nan
    up_bytes_per_s: float = 0.0
    down_bytes_per_s: float = 0.0
    problem: str = ""
    errno: int = 0
    pings: bool | None = None  # does ping come through?

    @property
    def gbits(self) -> float:
        """Gbit/s of the slower way."""
        return 8e-9 * min(self.up_bytes_per_s, self.down_bytes_per_s)

    @property
    def kind(self) -> str:
        return SPOKEN.get(self.path.kind, self.path.kind)


@dataclass(frozen=True)
class Report:
    """Everything that the doctor has asked and measured."""

    hosts: tuple[Host, ...]
    troubles: tuple[Trouble, ...] = ()  # of machines that could not be asked
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)  # `machine.facts`, and more
    interfaces: dict[str, list[Interface]] = field(default_factory=dict)
    measured: tuple[Measured, ...] = ()
    port: int = 65432
    at_rest: bool = True  # no run goes on, which would take its part of each path
    before: tuple[Measurement, ...] = ()  # paths to the server's machine, when measured last
    down: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    """By machine: interfaces that are down, and their addresses."""

    def best(self, near: str, far: str) -> Measured | None:
        """The fastest working path of a pair; where the settings pin one, that one."""
        found = [
            m for m in self.measured if {m.near, m.far} == {near, far} and not m.problem
        ]  # fmt: skip
        pinned = [m for m in found if m.path.pinned]
        return max(pinned or found, key=lambda m: m.gbits, default=None)

    @property
    def server(self) -> Host:
        return next(host for host in self.hosts if host.serves)


def findings(report: Report) -> list[Trouble]:
    """All faults, the gravest first."""
    found = list(report.troubles)
    found += _versions(report)
    found += _data(report)
    for host in report.hosts:
        if host.name in report.facts:
            found += _machine(host.name, report.facts[host.name], report)
            found += _addresses(host.name, report.interfaces.get(host.name, []))
    for measured in report.measured:
        if measured.problem or measured == report.best(measured.near, measured.far):
            # The speed of the other paths does not matter.
            found += _path(measured, at_rest=report.at_rest)
    found += _worse_than_it_could_be(report)
    found += _gone(report)
    return found


def remarks(report: Report) -> list[str]:
    """What is worth knowing, though nothing is wrong."""
    told = []
    for m in report.measured:
        if m == report.best(m.near, m.far) and report.at_rest and _is_hundred(m):
            told.append(
                f"{m.path} is a network of 100 Mbit/s: slow, not wrong "
                "(a switch, port and cable for 1 Gbit/s carry ten times as much)"
            )
    return told + _better_place(report)


def _is_hundred(m: Measured) -> bool:
    low, high = HUNDRED_GBITS
    return not m.problem and m.path.kind == "ethernet" and low <= m.gbits <= high


def _better_place(report: Report) -> list[str]:
    """Where the server would be reached faster by the slowest of the machines that train."""
    if not report.at_rest:
        return []
    slowest: dict[str, Measured] = {}
    for host in report.hosts:
        ways = [report.best(w.name, host.name) for w in report.hosts if w.works and w != host]
        found = [way for way in ways if way is not None]
        if found and len(found) == len(ways):
            slowest[host.name] = min(found, key=lambda m: m.gbits)
    now = slowest.get(report.server.name)
    if now is None:
        return []
    best = max(slowest, key=lambda name: slowest[name].gbits)
    there = slowest[best]
    if there.gbits < BETTER_PLACE * now.gbits:
        return []
    return [
        f"the server would stand best on {best}: its slowest path has {there.gbits:.2f} Gbit/s, "
        f"that of {report.server.name} {now.gbits:.2f}"
    ]


def _gone(report: Report) -> Iterator[Trouble]:
    """Paths that were measured before and are not there any more, where a slower one remains."""
    here = {
        (m.near, m.path.near.address if m.path.near else None, m.path.far.address)
        for m in report.measured
    }
    server = report.server.name
    for old in report.before:
        asked = {old.machine, server} <= report.interfaces.keys()
        if not asked or (old.machine, old.near, old.far) in here:
            continue
        gbits = 8e-9 * old.bytes_per_s
        left = report.best(old.machine, server)
        if left is not None and left.gbits >= gbits:
            continue  # nothing is lost
        why = [
            f"{device} on {name} is down"
            for name, address in ((old.machine, old.near), (server, old.far))
            for device, addresses in report.down.get(name, {}).items()
            if address in addresses
        ] or [
            f"{name} has no address {address} any more"
            for name, address in ((old.machine, old.near), (server, old.far))
            if address not in {i.address for i in report.interfaces[name]}
        ]
        yield Trouble(
            old.machine,
            f"{old.near} -> {old.far}, {gbits:.2f} Gbit/s on "
            f"{datetime.fromtimestamp(old.at):%d %b}, is gone: {'; '.join(why)}",
            "is the cable in? If it is to stay out: from now on only what is here is compared",
        )


def _versions(report: Report) -> Iterator[Trouble]:
    server = report.facts.get(report.server.name)
    if server is None:
        return
    for name, facts in report.facts.items():
        for package, version in facts["versions"].items():
            other = server["versions"].get(package)
            if version == other:
                continue
            what = f"{package} {version}, but {other} on {report.server.name}"
            if unfit := misfit({package: version or ""}, {package: other or ""}):
                yield Trouble(name, f"{what}: they cannot train together", unfit[1])
            else:
                can = "they can train together; make up brings both to the same where it can"
                yield Trouble(name, what, can)


def _data(report: Report) -> Iterator[Trouble]:
    """Machines whose copy of the data set is not that of most, or cannot be read."""
    told = {name: facts.get("data", {}) for name, facts in report.facts.items()}
    digests = {name: each["digest"] for name, each in told.items() if "digest" in each}
    usual = max(
        dict.fromkeys(digests.values()), key=list(digests.values()).count, default=None
    )  # of equally many the first machine's
    for name, each in told.items():
        if "problem" in each:
            yield Trouble(name, each["problem"], "copy it anew")
        elif digests.get(name, usual) != usual:
            alike = next(other for other, digest in digests.items() if digest == usual)
            yield Trouble(
                name,
                f"its data set has other content than that of {alike}",
                "a file is damaged, or of another version: copy it from there, or remove it",
            )


def _machine(name: str, facts: dict[str, Any], report: Report) -> Iterator[Trouble]:
    if abs(facts.get("skew_s", 0.0)) > SKEW_S:
        yield Trouble(
            name,
            f"its clock is {facts['skew_s']:+.1f} s off this machine's",
            "training does not mind, logs do: set it by the network (NTP)",
        )
    if facts["free_disk_bytes"] < ROOM_BYTES:
        yield Trouble(
            name, f"only {facts['free_disk_bytes'] / 2**30:.1f} GiB of disk are free", "make room"
        )
    if facts["free_memory_bytes"] < MEMORY_BYTES:
        yield Trouble(
            name,
            f"only {facts['free_memory_bytes'] / 2**30:.1f} GiB of memory are free",
            "end what needs it",
        )
    if wrong := facts.get("memory", {}).get("wrong"):
        yield Trouble(
            name,
            f"its memory is broken: {wrong:,} of {facts['memory']['bytes']:,} bytes do not read "
            "back as they were written",
            "do not train on it; memtest86+ says which module it is, a lower memory clock may help",
        )
    if facts["sleep"].isdigit():
        yield Trouble(
            name,
            f"it sleeps after {facts['sleep']} minutes",
            "during a run that is held off; for ssh: sudo pmset -a sleep 0 womp 1",
        )
    if facts["firewall"] == "on":
        ports = f"{report.port}, {report.port + 1} and {report.port + 3}"
        yield Trouble(
            name,
            "a firewall is on",
            f"where nothing comes through: let ports {ports} in, or Python on a Mac",
        )
    if facts["device"] == "none":
        yield Trouble(name, "PyTorch does not load there", "make up makes the environment anew")
    held = facts.get("port_held")
    if held and name == report.server.name:
        yield Trouble(
            name, f"port {facts.get('port', report.port)} is taken by {held}",
            "stop that, or choose port=65500 (a run takes this one and the next)",
        )  # fmt: skip


def _addresses(name: str, own: Sequence[Interface]) -> Iterator[Trouble]:
    by_network: dict[str, set[str]] = {}
    for interface in own:
        if interface.kind != "loopback":
            by_network.setdefault(interface.network, set()).add(interface.device)
    for network, devices in by_network.items():
        if len(devices) > 1:
            yield Trouble(
                name,
                f"{' and '.join(sorted(devices))} are both in {network}: which one is used is luck",
                "give the cable between machines a network of its own, like 10.10.0.x",
            )


def _path(m: Measured, *, at_rest: bool) -> Iterator[Trouble]:
    where = f"{m.path} ({m.kind})"
    if m.problem:
        if m.errno in NO_ROUTE and m.pings:
            yield Trouble(
                m.near,
                f"ping reaches {m.far}, Python does not (errno {m.errno}): {where}",
                "on a Mac this is Local Network Privacy: allow it under System Settings, Privacy & "
                "Security, Local Network",
            )
        else:
            yield Trouble(
                m.near, f"does not reach {m.far} by {where}: {m.problem}",
                "the cable, the address, or a firewall at the other end",
            )  # fmt: skip
        return
    if at_rest and m.gbits < EXPECTED_GBITS.get(m.path.kind, 0.0) and not _is_hundred(m):
        near_mtu = m.path.near.mtu if m.path.near else JUMBO
        mtu = min(m.path.far.mtu, near_mtu)
        small = m.path.kind == "thunderbolt" and mtu < JUMBO
        yield Trouble(
            m.near,
            f"{where} to {m.far} carries only {m.gbits:.2f} Gbit/s",
            f"its MTU is {mtu}: set {JUMBO} at both ends" if small else "cable, port, or distance",
        )
    elif m.path.near is not None and m.path.near.mtu != m.path.far.mtu:
        yield Trouble(
            m.near,
            f"MTU {m.path.near.mtu} here, {m.path.far.mtu} on {m.far}: {where}",
            "the same at both ends",
        )
    ways = sorted((m.up_bytes_per_s, m.down_bytes_per_s))
    if at_rest and ways[0] < UNEVEN * ways[1]:
        yield Trouble(
            m.near,
            f"{where} to {m.far}: {8e-9 * m.up_bytes_per_s:.2f} Gbit/s up, "
            f"{8e-9 * m.down_bytes_per_s:.2f} down",
            "the slower way sets the pace: duplex, or a busy network",
        )


def _worse_than_it_could_be(report: Report) -> Iterator[Trouble]:
    """Find pairs that use a slow path though both machines have an address of a better kind."""
    server = report.server.name
    for host in report.hosts:
        used = report.best(host.name, server)
        if host.name == server or used is None:
            continue
        for kind in KINDS[: KINDS.index(used.path.kind)]:
            near = [i for i in report.interfaces.get(host.name, []) if i.kind == kind]
            far = [i for i in report.interfaces.get(server, []) if i.kind == kind]
            if near and far:
                yield Trouble(
                    host.name,
                    f"reaches {server} over {used.kind} at {used.gbits:.1f} Gbit/s although both "
                    f"have {SPOKEN.get(kind, kind)} addresses: {near[0].address} and "
                    f"{far[0].address}",
                    "is the cable in? Are both in one network, with the same mask?",
                )
                break


def about_machines(report: Report) -> list[str]:
    """A few lines about each machine."""
    told = []
    width = max(len(name) for name in report.facts) if report.facts else 0
    for name, facts in report.facts.items():
        told += [
            f"{name:<{width}}  {facts['system']} {facts['machine']}, Python {facts['python']}, "
            f"torch {facts['versions']['torch']}, {facts['device']}",
            f"{'':<{width}}  {facts['free_memory_bytes'] / 2**30:.1f} GiB of memory and "
            f"{facts['free_disk_bytes'] / 2**30:.0f} GiB of disk free",
            f"{'':<{width}}  clock {facts['skew_s']:+.1f} s, sleep: {facts['sleep']}, "
            f"firewall: {facts['firewall']}",
            *(f"{'':<{width}}  {well}" for well in filter(None, [_well(facts)])),
        ]
    return told


def _well(facts: dict[str, Any]) -> str:
    """What was tested of a machine's memory and data, as words."""
    memory, data = facts.get("memory"), facts.get("data", {})
    words = []
    if memory:
        fault = f"{memory['wrong']:,} wrong" if memory["wrong"] else "as written"
        words.append(f"{memory['bytes'] >> 20} MiB of memory read back: {fault}")
    if "digest" in data:
        words.append(f"data {data['digest']}")
    return ", ".join(words)


def about_paths(report: Report) -> list[str]:
    """Two lines about each path; addresses are whole, however narrow the terminal."""
    told = []
    for m in report.measured:
        mtu = f"{m.path.near.mtu if m.path.near else '?'} / {m.path.far.mtu}"
        carries = m.problem or (
            f"{1000 * m.round_trip_s:.2f} ms, {8e-9 * m.up_bytes_per_s:.2f} Gbit/s up, "
            f"{8e-9 * m.down_bytes_per_s:.2f} down"
        )
        told += [f"{m.near} -> {m.far}: {m.path}", f"  {m.kind}, MTU {mtu}: {carries}"]
    return told


def chosen(report: Report, settings: Settings) -> list[str]:
    """A sentence for each worker's machine: the path that `make up` takes; and who averages in a
    run with these settings."""
    server, told = report.server.name, []
    for host in report.hosts:
        best = report.best(host.name, server)
        if host.works and host.name != server and best is not None:
            told.append(
                f"{host.name} takes {best.path} to {server}: {best.kind}, {best.gbits:.2f} Gbit/s, "
                f"{1000 * best.round_trip_s:.2f} ms"
            )
    return told + _who_averages(report, settings)


def _who_averages(report: Report, settings: Settings) -> list[str]:
    """How the machines share the work of averaging: see docs/protocol.md, "Shards"."""
    server = report.server.name
    in_turn = sorted((h for h in report.hosts if h.works), key=lambda host: host.id or 0)
    at = Counter({host.name: host.workers for host in in_turn})
    others = [name for name in at if name != server]
    ways = [report.best(name, server) for name in others]
    rates = [1e9 / 8 * way.gbits for way in ways if way is not None]
    if not report.at_rest or not others or len(rates) < len(others):
        return []
    most = wanted(settings.shards_wanted, len(others), SMALL_BYTES)
    if most == 1:
        why = "shards is 1" if settings.shards == 1 else settings.averages_alone
        why = why or "robust averages take one machine"
        return [f"{server} averages alone: {why}"] if len(others) + 1 >= HOSTS_MIN else []
    names = [server, *others]
    relayed, single = {}, {}
    for number, (name, rate) in enumerate(zip(names, [max(rates), *rates], strict=True)):
        observed = settings.observer and name == server
        relayed[number] = sharding.relayed(rate, at[name], observer=observed)
        single[number] = Cable(rate, at[name], at[name] + observed)  # without shards nobody relays
    found, together_s = sharding.foreseen(relayed, most, alike=settings.deterministic)
    _, alone_s = sharding.foreseen(single, 1, alike=True)
    if not found:
        return [f"{server} averages alone: with these cables that takes the least time"]
    large = f" of models of {SMALL_BYTES >> 10} KiB or more" if settings.shards is None else ""
    equally = " equally" if settings.deterministic else ""
    parts = ", ".join(f"{names[number]} {share / 10:.0f} %" for number, share in found)
    return [
        f"averaging{large} is shared{equally}: {parts}; an exchange takes "
        f"{100 * together_s / alone_s:.0f} % of what it would with {server} alone"
    ]
