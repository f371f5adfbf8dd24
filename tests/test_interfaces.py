"""Kinds of interfaces from recorded output, and the path that two machines take."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import replace
from typing import Any

import pytest
from recorded import FIREWALL_OFF, FIREWALL_ON, HARDWARE_PORTS, IFCONFIG, PMSET

from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.net import machine
from paramserver.net.address import listen
from paramserver.net.interfaces import (
    Interface,
    Path,
    choose,
    every_network,
    from_ifconfig,
    from_json,
    hardware_ports,
    kind_on_linux,
    paths,
    to_json,
    why,
)
from paramserver.settings import Settings

TB1 = Interface("bridge0", "thunderbolt", "10.10.0.1", 24, 9000)
TB2 = Interface("bridge0", "thunderbolt", "10.10.0.2", 24, 9000)
LAN1 = Interface("en0", "ethernet", "192.168.1.5", 24, 1500)
LAN2 = Interface("en0", "ethernet", "192.168.1.6", 24, 1500)
WIFI1 = Interface("en1", "wifi", "192.168.7.5", 24, 1500)
WIFI2 = Interface("wlan0", "wifi", "192.168.7.6", 24, 1500)
LOOP = Interface("lo0", "loopback", "127.0.0.1", 8, 16384)
VPN = Interface("utun3", "virtual", "100.64.0.1", 10, 1280)


def test_hardware_ports_of_a_mac() -> None:
    assert hardware_ports(HARDWARE_PORTS) == {
        "en0": "ethernet",
        "en1": "wifi",
        "en2": "thunderbolt",
        "en3": "thunderbolt",
        "bridge0": "thunderbolt",
        "en7": "ethernet",
        "en8": "ethernet",
        "en9": "other",
    }


def test_interfaces_of_a_mac_that_are_up() -> None:
    found = from_ifconfig(IFCONFIG, hardware_ports(HARDWARE_PORTS))
    assert [(i.device, i.kind, i.address, i.prefix, i.mtu) for i in found] == [
        ("lo0", "loopback", "127.0.0.1", 8, 16384),
        ("lo0", "loopback", "::1", 128, 16384),
        ("en1", "wifi", "192.168.1.7", 24, 1500),
        ("en1", "wifi", "fd12:3456:789a::7", 64, 1500),
        ("bridge0", "thunderbolt", "10.10.0.2", 24, 9000),
        ("utun3", "virtual", "100.101.102.103", 32, 1280),
        ("en7", "ethernet", "169.254.80.12", 16, 1500),
    ]
    assert choose(found) == found[4]


def test_a_bridge_without_a_port_of_its_own_is_what_it_joins() -> None:
    ports = {"en2": "thunderbolt", "en3": "thunderbolt"}
    found = {i.device: i.kind for i in from_ifconfig(IFCONFIG, ports)}
    assert found["bridge0"] == "thunderbolt"
    ports["en3"] = "ethernet"
    found = {i.device: i.kind for i in from_ifconfig(IFCONFIG, ports)}
    assert found["bridge0"] == "virtual"


@pytest.mark.parametrize(
    ("device", "sysfs", "kind"),
    [
        ("lo", {"type": "772"}, "loopback"),
        ("eth0", {"type": "1", "driver": "e1000e"}, "ethernet"),
        ("end0", {"type": "1", "uevent": "INTERFACE=end0"}, "ethernet"),
        ("wlan0", {"type": "1", "uevent": "DEVTYPE=wlan"}, "wifi"),
        ("wlp2s0", {"type": "1", "wireless": "", "driver": "iwlwifi"}, "wifi"),
        ("thunderbolt0", {"type": "1", "driver": "thunderbolt-net"}, "thunderbolt"),
        ("enp5s0", {"type": "1", "driver": "thunderbolt-net"}, "thunderbolt"),
        ("docker0", {"type": "1", "bridge": ""}, "virtual"),
        ("br0", {"type": "1", "bridge": ""}, "virtual"),
        ("vethab12", {"type": "1"}, "virtual"),
        ("tun0", {"type": "65534", "tun_flags": "0x1001"}, "virtual"),
        ("ib0", {"type": "32"}, "other"),
    ],
)
def test_kinds_on_linux(device: str, sysfs: dict[str, str], kind: str) -> None:
    assert kind_on_linux(device, sysfs) == kind


def test_the_choice_goes_by_kind_and_says_so() -> None:
    own = [LOOP, VPN, WIFI1, LAN1, TB1]
    assert choose(own) == TB1
    assert choose([LOOP, VPN, WIFI1, LAN1]) == LAN1
    assert choose([LOOP, VPN, WIFI1]) == WIFI1
    assert choose([LOOP, VPN]) is None
    assert every_network([*own, replace(LAN1, address="192.168.1.6")]) == [TB1, LAN1, WIFI1]
    sixth = replace(WIFI1, address="fd00::5", prefix=64)
    assert every_network([LOOP, sixth]) == [sixth] and sixth not in every_network([*own, sixth])
    assert why([TB1, LAN1], own) == (
        "listening at 10.10.0.1 (Thunderbolt, bridge0), 192.168.1.5 (Ethernet, en0): all networks "
        "here; also here: 192.168.7.5 (Wi-Fi, en1)"
    )
    assert why([TB1], own) == (
        "listening at 10.10.0.1 (Thunderbolt, bridge0): the best kind there is; also here: "
        "192.168.7.5 (Wi-Fi, en1), 192.168.1.5 (Ethernet, en0)"
    )


def test_an_address_that_nobody_gave_comes_last_of_its_kind() -> None:
    nobody = Interface("en7", "ethernet", "169.254.80.12", 16, 9000)
    assert choose([nobody, LAN1]) == LAN1
    assert choose([Interface("en0", "ethernet", "fd00::5", 64, 1500), nobody]) == nobody


def test_paths_go_over_networks_that_both_have() -> None:
    found = paths([LOOP, WIFI1, LAN1, TB1], [LOOP, TB2, LAN2, WIFI2])
    assert found == [Path(TB1, TB2), Path(LAN1, LAN2), Path(WIFI1, WIFI2)]
    assert [path.kind for path in found] == ["thunderbolt", "ethernet", "wifi"]


def test_an_address_that_is_given_is_taken_where_both_are_on_its_network() -> None:
    mini1, mini2, pi = [TB1, LAN1], [TB2, LAN2], [LAN2]
    assert paths(mini1, mini2, server_ip=LAN1.address) == [Path(LAN1, LAN2, pinned=True)]
    assert paths(mini1, mini2, worker_ip=LAN2.address) == [Path(LAN1, LAN2, pinned=True)]
    assert paths(mini1, pi, server_ip=TB1.address) == [Path(LAN1, LAN2)]  # it has no such cable


def test_without_a_network_in_common_the_routes_decide() -> None:
    assert paths([TB1, LAN1], [WIFI2], server_ip=LAN1.address) == [Path(LAN1, None, pinned=True)]
    assert paths([LAN1, WIFI1], [VPN]) == [Path(LAN1, None)]
    assert paths([LOOP], [VPN]) == []


def test_interfaces_travel_as_json() -> None:
    assert from_json(to_json([TB1, LAN1])) == [TB1, LAN1]


def a_mac(monkeypatch: pytest.MonkeyPatch, **answers: str) -> list[tuple[str, ...]]:
    """This machine is a Mac whose tools say so; what they are asked."""
    asked = []

    def ask(*command: str) -> str:
        asked.append(command)
        return answers.get(command[0].rpartition("/")[2], "")

    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(machine, "ask", ask)
    return asked


def test_a_mac_is_asked_by_its_own_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = a_mac(
        monkeypatch, networksetup=HARDWARE_PORTS, ifconfig=IFCONFIG, pmset=PMSET,
        socketfilterfw=FIREWALL_ON,
    )  # fmt: skip
    bridge = Interface("bridge0", "thunderbolt", "10.10.0.2", 24, 9000)
    assert choose(machine.interfaces()) == bridge
    assert (machine._sleep(), machine._firewall()) == ("1", "on")
    assert asked == [
        ("networksetup", "-listallhardwareports"), ("ifconfig", "-a"), ("pmset", "-g"),
        ("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"),
    ]  # fmt: skip


def test_a_mac_that_never_sleeps_and_one_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    never = PMSET.replace(" sleep                1 (sleep", " sleep                0 (sleep")
    a_mac(monkeypatch, pmset=never, socketfilterfw=FIREWALL_OFF)
    assert (machine._sleep(), machine._firewall()) == ("never", "off")
    a_mac(monkeypatch)
    assert (machine._sleep(), machine._firewall()) == ("unknown", "unknown")
    assert machine.interfaces() == []


def test_a_taken_port_is_seen_also_where_it_may_not_be_known_whose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert str(os.getpid()) in str(machine.port_holder(port))
        monkeypatch.setattr(
            "paramserver.transport.sockets.listener", lambda port: ""
        )  # a Mac, without root
        assert f"lsof -nP -iTCP:{port}" in str(machine.port_holder(port))
    assert machine.port_holder(port) is None


HOME = [{"name": "mini1", "role": "both"}, {"name": "mini2"}]


def settled(own: list[Interface], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    """Where a server listens on a machine with these interfaces, and its sentence about that."""
    monkeypatch.setattr(machine, "interfaces", lambda: own)
    return machine.settle(Settings(**settings))


def test_a_server_chooses_where_it_is_asked_to_or_other_machines_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [LOOP, WIFI1, LAN1, VPN]
    chosen = (f"{LAN1.address},{WIFI1.address}", why([LAN1, WIFI1], own))
    assert settled(own, monkeypatch, host_ip="auto") == chosen
    assert settled(own, monkeypatch, hosts=HOME) == chosen
    open_to_all = settled(own, monkeypatch, host_ip="auto", security="none")
    assert open_to_all == (LAN1.address, why([LAN1], own))  # without keys at one address
    assert settled(own, monkeypatch) == (None, "")
    assert settled(own, monkeypatch, hosts=HOME[:1]) == (None, "")
    here = [HOME[0], {"name": "mini2", "ssh": "local"}]
    assert settled(own, monkeypatch, hosts=here) == (None, "")
    assert settled(own, monkeypatch, hosts=HOME, host_ip="127.0.0.1") == ("127.0.0.1", "")


def test_a_server_takes_the_address_that_hosts_gives_it_if_it_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = [LOOP, TB1, WIFI1]
    both = f"{TB1.address},{WIFI1.address}"
    for ip, chosen in ((WIFI1.address, WIFI1.address), (LAN2.address, both)):
        named = [{"name": "mini1", "role": "server", "ip": ip}, {"name": "mini2"}]
        assert settled(own, monkeypatch, hosts=named)[0] == chosen


def test_with_nothing_to_choose_from_it_is_an_error_only_where_a_choice_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host_ip, said = settled([LOOP, VPN], monkeypatch, hosts=HOME)
    assert host_ip is None and "listening on loopback only" in said
    with pytest.raises(UserError, match="no Thunderbolt, Ethernet or Wi-Fi address"):
        settled([LOOP, VPN], monkeypatch, host_ip="auto")


def test_this_machine_has_loopback_and_what_it_chooses_is_its_own() -> None:
    own = machine.interfaces()
    assert ("loopback", "127.0.0.1") in {(i.kind, i.address) for i in own}
    if chosen := every_network(own):
        where = ",".join(interface.address for interface in chosen)
        assert machine.settle(Settings(host_ip="auto")) == (where, why(chosen, own))


def test_a_fast_cable_is_one_of_thunderbolt_at_which_the_server_listens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "interfaces", lambda: [LOOP, TB1, WIFI1])
    assert machine.has_fast_cable([WIFI1.address, TB1.address])
    assert not machine.has_fast_cable([WIFI1.address])
    assert not machine.has_fast_cable([])


@pytest.mark.parametrize(
    ("host_ip", "open_to_all", "guarded"),
    [
        (None, ["127.0.0.1"], []),
        ("localhost", ["127.0.0.1"], []),
        ("10.10.0.1", ["127.0.0.1"], ["10.10.0.1"]),
        ("10.10.0.1,192.168.1.5", ["127.0.0.1"], ["10.10.0.1", "192.168.1.5"]),
    ],
)
def test_where_a_server_listens(
    host_ip: str | None, open_to_all: list[str], guarded: list[str]
) -> None:
    assert machine.settle(Settings(host_ip=host_ip)) == (host_ip, "")
    assert listen(host_ip) == (open_to_all, guarded)


def test_a_worker_dials_one_address() -> None:
    with pytest.raises(UserError, match="a worker dials one address"):
        load(["id=1", "host_ip=10.10.0.1,192.168.1.5"], "worker")


@pytest.mark.skipif(sys.platform != "linux", reason="/sys/class/net is Linux's")
def test_facts_of_this_machine_are_plain() -> None:
    facts = machine.facts()
    assert facts["versions"]["pyzmq"] and facts["free_disk_bytes"] > 0
    assert facts["device"] in ("cpu", "mps") or facts["device"].startswith("cuda")
