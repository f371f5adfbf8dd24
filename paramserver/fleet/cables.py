"""Addresses for Thunderbolt cables that have none of their own yet. Pure.

A Mac's Thunderbolt bridge without a setting gives itself an address of 169.254.0.0/16, another one
after each start, and the same network may be on other interfaces.
"""

from __future__ import annotations

import ipaddress
import shlex
from dataclasses import dataclass

from paramserver.fleet.findings import Report
from paramserver.net.hosts import HERE, Host
from paramserver.net.interfaces import Interface

NETWORKS = tuple(ipaddress.IPv4Network(f"10.10.{n}.0/24") for n in range(10))
MTU = 9000


@dataclass(frozen=True)
class Fix:
    """An address for an interface of a machine, and the commands there that set it."""

    host: Host
    device: str
    address: str
    commands: tuple[str, ...]

    @property
    def argv(self) -> tuple[str, ...]:
        """The process that runs them, with this terminal: sudo may ask for a password."""
        script = " && ".join(self.commands)
        return (
            ("sh", "-c", script) if self.host.ssh == HERE else ("ssh", "-t", self.host.ssh, script)
        )

    def __str__(self) -> str:
        told = [f"{self.host.name}: {self.address} for {self.device}"]
        return "\n  ".join((*told, *self.commands))


def fixes(report: Report) -> list[Fix]:
    """An address for each Thunderbolt interface that has none of its own, where another machine
    has such an interface, too."""
    cables: dict[str, Interface] = {}
    for host in report.hosts:
        own = [i for i in report.interfaces.get(host.name, []) if i.kind == "thunderbolt"]
        given = [i for i in own if not _is_of_its_own(i)]
        if own:
            cables[host.name] = (given or own)[0]
    bare = {name for name, interface in cables.items() if _is_of_its_own(interface)}
    if len(cables) < 2 or not bare:
        return []
    network = _network(report, [i for name, i in cables.items() if name not in bare])
    if network is None:
        return []
    taken = {i.address for found in report.interfaces.values() for i in found}
    free = (str(address) for address in network.hosts() if str(address) not in taken)
    told = []
    for host in report.hosts:
        if host.name in bare:
            device, address = cables[host.name].device, next(free)
            mac = report.facts[host.name]["system"] == "Darwin"
            told.append(
                Fix(
                    host,
                    device,
                    address,
                    _on_mac(device, address) if mac else _on_linux(device, address),
                )
            )
    return told


def _is_of_its_own(interface: Interface) -> bool:
    """Has the interface given this address to itself?"""
    return ipaddress.ip_address(interface.address).is_link_local


def _network(report: Report, given: list[Interface]) -> ipaddress.IPv4Network | None:
    """The network of the cables that have an address, or else one that nobody is in."""
    for interface in given:
        network = ipaddress.ip_network(interface.network)
        if isinstance(network, ipaddress.IPv4Network):
            return network
    used = [ipaddress.ip_address(i.address) for found in report.interfaces.values() for i in found]
    return next((n for n in NETWORKS if not any(a in n for a in used)), None)


def _on_mac(device: str, address: str) -> tuple[str, ...]:
    service = shlex.quote("Thunderbolt Bridge")
    return (
        f"sudo networksetup -setmanual {service} {address} 255.255.255.0",
        f"sudo networksetup -setMTU {device} {MTU}",
    )


def _on_linux(device: str, address: str) -> tuple[str, ...]:
    return (
        f"sudo ip addr add {address}/24 dev {device}",
        f"sudo ip link set {device} mtu {MTU} up",
    )
