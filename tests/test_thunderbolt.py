"""Addresses for Thunderbolt cables, from what Macs say about their interfaces."""

from __future__ import annotations

from recorded import HARDWARE_PORTS, IFCONFIG

from paramserver.fleet.cables import fixes
from paramserver.fleet.findings import Report
from paramserver.net.hosts import Host
from paramserver.net.interfaces import Interface, from_ifconfig, hardware_ports

HOSTS = (
    Host("mini1", "mini1", role="server"),
    Host("mini2", "me@mini2.local", id=1),
    Host("box", "local", id=2),
)
FACTS = {"mini1": {"system": "Darwin"}, "mini2": {"system": "Darwin"}, "box": {"system": "Linux"}}
LINUX = Interface("thunderbolt0", "thunderbolt", "169.254.3.4", 16, 1500)


def recorded(bridge: str) -> list[Interface]:
    """A Mac's interfaces as it tells them, with this address on its Thunderbolt bridge."""
    text = IFCONFIG.replace("inet 10.10.0.2 netmask 0xffffff00", f"inet {bridge}")
    found = from_ifconfig(text, hardware_ports(HARDWARE_PORTS))
    assert [i.address for i in found if i.kind == "thunderbolt"] == [bridge.split()[0]]
    return found


ITSELF = "169.254.80.12 netmask 0xffff0000"


def test_cables_that_gave_themselves_addresses_get_some_of_one_network() -> None:
    both = {"mini1": recorded(ITSELF), "mini2": recorded(ITSELF), "box": [LINUX]}
    first, second, third = fixes(Report(HOSTS, facts=FACTS, interfaces=both))
    assert [fix.address for fix in (first, second, third)] == [
        "10.10.0.1",
        "10.10.0.2",
        "10.10.0.3",
    ]
    assert first.commands == (
        "sudo networksetup -setmanual 'Thunderbolt Bridge' 10.10.0.1 255.255.255.0",
        "sudo networksetup -setMTU bridge0 9000",
    )
    assert third.commands == (
        "sudo ip addr add 10.10.0.3/24 dev thunderbolt0",
        "sudo ip link set thunderbolt0 mtu 9000 up",
    )
    assert second.argv == ("ssh", "-t", "me@mini2.local", " && ".join(second.commands))
    assert third.argv == ("sh", "-c", " && ".join(third.commands))
    assert str(first).startswith("mini1: 10.10.0.1 for bridge0\n  sudo networksetup -setmanual")


def test_who_has_an_address_keeps_it_and_the_others_come_into_its_network() -> None:
    given = {"mini1": recorded("10.10.7.1 netmask 0xffffff00"), "mini2": recorded(ITSELF)}
    [fix] = fixes(Report(HOSTS[:2], facts=FACTS, interfaces=given))
    assert (fix.host.name, fix.address) == ("mini2", "10.10.7.2")


def test_a_network_that_somebody_is_in_is_left_alone() -> None:
    lan = Interface("en0", "ethernet", "10.10.0.9", 24, 1500)
    both = {"mini1": [*recorded(ITSELF), lan], "mini2": recorded(ITSELF)}
    assert [f.address for f in fixes(Report(HOSTS[:2], facts=FACTS, interfaces=both))] == [
        "10.10.1.1", "10.10.1.2",
    ]  # fmt: skip


def test_one_cable_alone_and_cables_with_addresses_need_nothing() -> None:
    assert fixes(Report(HOSTS[:2], facts=FACTS, interfaces={"mini1": recorded(ITSELF)})) == []
    both = {name: recorded(f"10.10.0.{n} netmask 0xffffff00") for n, name in enumerate(FACTS, 1)}
    assert fixes(Report(HOSTS, facts=FACTS, interfaces=both)) == []
