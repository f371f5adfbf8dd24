"""The doctor's findings, and its drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from itertools import combinations
from typing import Any
from xml.etree import ElementTree

import pytest

from paramserver.fleet import topology
from paramserver.fleet.findings import (
    Measured,
    Report,
    about_machines,
    about_paths,
    chosen,
    findings,
    remarks,
)
from paramserver.fleet.measurements import Measurement
from paramserver.net.hosts import Host
from paramserver.net.interfaces import Interface, Path
from paramserver.settings import Settings

HOSTS = (Host("mini1", "mini1", role="server"), Host("mini2", "mini2", id=1))
TB1 = Interface("bridge0", "thunderbolt", "10.10.0.1", 24, 9000)
TB2 = Interface("bridge0", "thunderbolt", "10.10.0.2", 24, 9000)
WIFI1 = Interface("en1", "wifi", "192.168.1.1", 24, 1500)
WIFI2 = Interface("en1", "wifi", "192.168.1.2", 24, 1500)
FACTS: dict[str, Any] = {
    "versions": {"paramserver": "1", "torch": "2.15.0", "pyzmq": "27"},
    "skew_s": 0.1, "free_disk_bytes": 2**36, "free_memory_bytes": 2**33,
    "sleep": "never", "firewall": "off", "device": "mps",
}  # fmt: skip
FAST = Measured("mini2", "mini1", Path(TB1, TB2), 0.0005, 2e9, 2e9)
AIR = Measured("mini2", "mini1", Path(WIFI1, WIFI2), 0.01, 25e6, 25e6)
GOOD = Report(
    HOSTS,
    facts={"mini1": FACTS, "mini2": FACTS},
    interfaces={"mini1": [TB1, WIFI1], "mini2": [TB2, WIFI2]},
    measured=(FAST, AIR),
)


def told(report: Report) -> str:
    return "\n".join(str(trouble) for trouble in findings(report))


def with_facts(**facts: Any) -> Report:
    return replace(GOOD, facts={"mini1": FACTS, "mini2": {**FACTS, **facts}})


def test_a_port_that_is_taken_is_told_of_the_server_alone() -> None:
    both = {name: {**FACTS, "port_held": "pid 7 (nc)"} for name in ("mini1", "mini2")}
    assert told(replace(GOOD, facts=both)).startswith("mini1: port 65432 is taken by pid 7 (nc)\n")
    assert "mini2" not in told(replace(GOOD, facts=both))


def test_a_good_cluster_has_nothing_to_be_told() -> None:
    assert told(GOOD) == ""
    assert chosen(GOOD, Settings()) == [
        "mini2 takes 10.10.0.2 (bridge0) -> 10.10.0.1 (bridge0) to mini1: Thunderbolt, "
        "16.00 Gbit/s, 0.50 ms"
    ]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"versions": {**FACTS["versions"], "torch": "2.14"}},
            "torch 2.14, but 2.15.0 on mini1\n  they can train together",
        ),
        (
            {"versions": {**FACTS["versions"], "torch": "2.2.2"}},
            "torch 2.2.2, but 2.15.0 on mini1: they cannot train together\n"
            "  install PyTorch 2.15.0 there",
        ),
        ({"skew_s": 40.0}, "its clock is +40.0 s off"),
        ({"free_disk_bytes": 2**29}, "only 0.5 GiB of disk"),
        ({"free_memory_bytes": 2**29}, "only 0.5 GiB of memory"),
        ({"sleep": "10"}, "it sleeps after 10 minutes"),
        ({"firewall": "on"}, "a firewall is on"),
        ({"device": "none"}, "PyTorch does not load"),
        ({"memory": {"bytes": 2**28, "wrong": 8}}, "its memory is broken: 8 of 268,435,456"),
        ({"data": {"problem": "its copy of MNIST cannot be read: CRC"}}, "its copy of MNIST"),
    ],
)
def test_what_is_wrong_with_a_machine(facts: dict[str, Any], said: str) -> None:
    assert f"mini2: {said}" in told(with_facts(**facts))


def test_data_that_differ_are_those_of_the_fewer_machines() -> None:
    def said(**digests: str) -> str:
        facts = {name: {**FACTS, "data": {"digest": d}} for name, d in digests.items()}
        return told(replace(GOOD, facts=facts))

    assert said(mini1="a", mini2="a") == ""
    assert said(mini1="a", mini2="b").startswith("mini2: its data set has other content than that")
    assert said(mini1="a", mini2="b", pi="b").startswith("mini1: its data set has other content")
    assert told(with_facts(data={"digest": "b"})) == ""  # the other one has none


def test_memory_and_data_are_told_of_each_machine() -> None:
    facts = {**FACTS, "system": "Linux", "machine": "x", "python": "3.11.7"}
    facts |= {"memory": {"bytes": 2**28, "wrong": 0}, "data": {"digest": "0123456789abcdef"}}
    lines = about_machines(replace(GOOD, facts={"mini1": facts}))
    assert lines[-1].strip() == "256 MiB of memory read back: as written, data 0123456789abcdef"


def test_wifi_although_there_is_a_cable() -> None:
    broken = replace(FAST, problem="Operation timed out", errno=60)
    said = told(replace(GOOD, measured=(broken, AIR)))
    assert "reaches mini1 over Wi-Fi at 0.2 Gbit/s although both have Thunderbolt" in said
    assert "does not reach mini1 by 10.10.0.2 (bridge0)" in said


def test_local_network_privacy_is_named() -> None:
    refused = replace(FAST, problem="No route to host", errno=65, pings=True)
    assert "Local Network Privacy" in told(replace(GOOD, measured=(refused, AIR)))
    dead = replace(refused, pings=False)
    assert "Local Network Privacy" not in told(replace(GOOD, measured=(dead, AIR)))


def test_slow_and_uneven_paths() -> None:
    small = Path(replace(TB1, mtu=1500), replace(TB2, mtu=1500))
    slow = replace(FAST, path=small, up_bytes_per_s=5e8, down_bytes_per_s=5e8)
    assert "carries only 4.00 Gbit/s\n  its MTU is 1500" in told(replace(GOOD, measured=(slow,)))
    uneven = replace(FAST, up_bytes_per_s=1e9, down_bytes_per_s=3e9)
    assert "8.00 Gbit/s up, 24.00 down" in told(replace(GOOD, measured=(uneven,)))
    mixed = replace(FAST, path=Path(TB1, replace(TB2, mtu=1500)))
    assert "MTU 1500 here, 9000 on mini1" in told(replace(GOOD, measured=(mixed,)))


def test_two_interfaces_in_one_network() -> None:
    astray = {"mini1": [TB1], "mini2": [TB2, WIFI2, replace(WIFI2, device="en7")]}
    assert "en1 and en7 are both in 192.168.1.0/24" in told(replace(GOOD, interfaces=astray))


def test_what_the_settings_pin_is_taken() -> None:
    pinned = replace(AIR, path=replace(AIR.path, pinned=True))
    assert replace(GOOD, measured=(FAST, pinned)).best("mini2", "mini1") == pinned


def test_the_picture() -> None:
    assert topology.text(GOOD).splitlines() == [
        "mini1 ═══ Thunderbolt 16.00 Gbit/s 0.50 ms ═══ mini2",
        "          10.10.0.1 - 10.10.0.2  <- make up takes it",
    ]
    drawn = ElementTree.fromstring(topology.svg(GOOD))
    words = [element.text for element in drawn.iter() if element.text and element.text.strip()]
    assert "Thunderbolt 16.00 Gbit/s" in words and "mini1" in words and "server" in words
    assert "0.50 ms, 10.10.0.1 - 10.10.0.2" in words


def test_a_cable_that_is_out_is_named_where_a_slower_network_remains() -> None:
    at = datetime(2026, 11, 24, 12, 0).timestamp()
    before = (Measurement("mini2", TB2.address, TB1.address, 2e9, at),)
    air = {"mini1": [TB1, WIFI1], "mini2": [WIFI2]}
    gone = replace(GOOD, measured=(AIR,), interfaces=air, before=before)
    assert "10.10.0.2 -> 10.10.0.1, 16.00 Gbit/s on 24 Nov, is gone: mini2 has no address" in told(
        gone
    )
    down = replace(gone, down={"mini2": {"bridge0": ["10.10.0.2"]}})
    assert "is gone: bridge0 on mini2 is down\n  is the cable in?" in told(down)
    assert "is gone" not in told(replace(GOOD, before=before))  # it is there, however slow
    slower = (replace(before[0], bytes_per_s=1e6),)
    assert "is gone" not in told(replace(gone, before=slower))  # nothing is lost
    assert "is gone" not in told(replace(gone, interfaces={"mini1": [TB1]}))  # it does not answer


def test_what_a_run_leaves_free_is_no_fault_of_a_cable() -> None:
    slow = replace(FAST, up_bytes_per_s=5e6, down_bytes_per_s=5e7)
    assert "carries only" in told(replace(GOOD, measured=(slow,)))
    assert told(replace(GOOD, measured=(slow,), at_rest=False)) == ""
    dead = replace(FAST, problem="No route to host", errno=65)
    assert "does not reach" in told(replace(GOOD, measured=(dead, AIR), at_rest=False))


def test_a_network_of_100_mbit_is_slow_and_not_wrong() -> None:
    lan = [Interface("eth0", "ethernet", f"192.168.2.{n}", 24, 1500) for n in (1, 2)]
    slow = Measured("mini2", "mini1", Path(lan[0], lan[1]), 0.0005, 11.7e6, 11.7e6)
    report = replace(GOOD, measured=(slow,), interfaces={"mini1": [lan[0]], "mini2": [lan[1]]})
    assert told(report) == ""
    assert (
        "192.168.2.2 (eth0) -> 192.168.2.1 (eth0) is a network of 100 Mbit/s: slow, not"
        in (remarks(report)[0])
    )
    bad = replace(slow, up_bytes_per_s=4e6, down_bytes_per_s=4e6)
    assert "carries only 0.03" in told(replace(report, measured=(bad,)))


def test_where_the_server_would_stand_best_is_told() -> None:
    hosts = (*HOSTS, Host("mini3", "mini3", id=2))
    way = {pair: replace(FAST, far=pair[0], near=pair[1]) for pair in combinations("abc", 2)}
    names = dict(zip("abc", ("mini1", "mini2", "mini3"), strict=True))

    def between(pair: tuple[str, str], rate: float) -> Measured:
        far, near = (names[letter] for letter in pair)
        return replace(way[pair], far=far, near=near, up_bytes_per_s=rate, down_bytes_per_s=rate)

    # The server's machine has a slow path to one of those that train; they have a fast one.
    ways = (between(("a", "b"), 1e8), between(("a", "c"), 2e9), between(("b", "c"), 2e9))
    assert remarks(Report(hosts, measured=ways)) == [
        "the server would stand best on mini2: its slowest path has 16.00 Gbit/s, "
        "that of mini1 0.80"
    ]
    assert remarks(Report(hosts, measured=ways, at_rest=False)) == []
    alike = (between(("a", "b"), 1.9e9), *ways[1:])
    assert remarks(Report(hosts, measured=alike)) == []


def who_averages(
    workers: Sequence[int],
    rates: Sequence[float] = (1.0, 1.0),
    server: str = "both",
    **settings: Any,
) -> list[str]:
    """What is told of who averages, where so many workers are on each machine, the first one the
    server's, and the others have cables of so many Gbit/s."""
    first = 1 + sum(workers[:1]) if server == "server" else 1
    hosts = [Host("mini1", "mini1", role=server, id=1, workers=workers[0])]
    for number, (count, _) in enumerate(zip(workers[1:], rates, strict=True), 2):
        hosts.append(Host(f"mini{number}", "", id=first + number, workers=count))
    ways = [
        replace(FAST, near=host.name, up_bytes_per_s=rate * 125e6, down_bytes_per_s=rate * 125e6)
        for host, rate in zip(hosts[1:], rates, strict=True)
    ]
    told = chosen(Report(tuple(hosts), measured=tuple(ways)), Settings(**settings))
    return [sentence for sentence in told if " takes 10." not in sentence]


LARGE = "averaging of models of 256 KiB or more is shared: "


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        ((1, 1, 1), "mini1 33 %, mini2 33 %, mini3 33 %; an exchange takes 67 %"),
        # What others average crosses a host's cable once, however many replicas are there; where
        # the server averages alone, each of them gets a copy of its own.
        ((1, 2, 1), "mini1 25 %, mini2 50 %, mini3 25 %; an exchange takes 67 %"),
        ((4, 4, 4), "mini1 33 %, mini2 33 %, mini3 33 %; an exchange takes 42 %"),
    ],
)
def test_who_averages_is_told_as_the_run_chooses_it(workers: list[int], said: str) -> None:
    assert who_averages(workers) == [f"{LARGE}{said} of what it would with mini1 alone"]


def test_an_observer_on_a_machine_that_does_not_train_takes_its_copy_too() -> None:
    three = ((1, 1, 1, 1), (1.0, 1.0, 1.0), "server")
    with_one, without = (who_averages(*three, observer=seen)[0] for seen in (True, False))
    assert with_one.startswith(f"{LARGE}mini1 25 %, mini2 25 %")
    assert without.startswith(f"{LARGE}mini1 40 %, mini2 20 %")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shards": 1}, "mini1 averages alone: shards is 1"),
        ({"aggregate": "median"}, "mini1 averages alone: robust averages take one machine"),
        ({"deterministic": True, "codec": "int8"}, "mini1 averages alone: what int8 leaves out of"),
        ({"shards": 2}, "averaging is shared: mini1 50 %, mini2 50 %; an exchange takes 100 %"),
        ({"deterministic": True}, "is shared equally: mini1 33 %, mini2 33 %, mini3 33 %; "),
    ],
)
def test_who_averages_is_what_the_settings_say(settings: dict[str, Any], said: str) -> None:
    [told] = who_averages((1, 1, 1), (1.0, 0.5), **settings)
    assert said in told


def test_one_machine_averages_where_that_takes_least() -> None:
    [told] = who_averages((1, 1, 1), (0.2, 1.0), shards=2)
    assert told == "mini1 averages alone: with these cables that takes the least time"
    assert who_averages((1, 1), (1.0,)) == []


def test_addresses_are_whole_at_80_columns() -> None:
    sixth = [
        Interface("enp0s31f6", "ethernet", f"fd00:1234:5678:9abc::{n}", 64, 1500) for n in (1, 2)
    ]
    facts = {**FACTS, "system": "Linux", "machine": "x86_64", "python": "3.11.7"}
    report = replace(
        GOOD,
        facts={"mini1": facts, "mini2": facts},
        measured=(FAST, replace(FAST, path=Path(sixth[0], sixth[1]))),
    )
    lines = [*about_machines(report), *about_paths(report)]
    assert "mini2 -> mini1: 10.10.0.2 (bridge0) -> 10.10.0.1 (bridge0)" in lines
    assert "mini1  Linux x86_64, Python 3.11.7, torch 2.15.0, mps" in lines
    assert all(len(line) <= 80 for line in lines if "fd00" not in line)


@pytest.mark.parametrize("count", range(2, 7))
def test_no_label_of_the_picture_hides_another_one_or_a_machine(count: int) -> None:
    hosts = [Host(f"mini{i}", "", role="worker" if i else "server") for i in range(count)]
    ways = [replace(FAST, far=a.name, near=b.name) for a, b in combinations(hosts, 2)]
    drawn = ElementTree.fromstring(topology.svg(Report(tuple(hosts), measured=tuple(ways))))
    rects = [e.attrib for e in drawn.iter() if e.tag.endswith("rect") and "x" in e.attrib]
    assert len(rects) == count + len(ways)
    for a, b in combinations(rects, 2):
        apart = (
            int(b[at]) - int(a[at]) >= int(a[size]) or int(a[at]) - int(b[at]) >= int(b[size])
            for at, size in (("x", "width"), ("y", "height"))
        )
        assert any(apart), (a, b)
