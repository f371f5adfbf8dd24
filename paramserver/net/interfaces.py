"""Network interfaces: reads the output of the systems' tools, and chooses the path between two
machines. Pure.

The hardware decides the kind of an interface, never the address: a Thunderbolt bridge often has
169.254.x.x, but so have many adapters without a connection.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

KINDS = ("thunderbolt", "ethernet", "wifi", "virtual", "other", "loopback")
"""Best first."""
OFFERED = ("thunderbolt", "ethernet", "wifi")
"""The kinds that are chosen by default; interfaces of VPNs and containers are not."""
SPOKEN = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi"}


@dataclass(frozen=True)
class Interface:
    """One address of one interface: IPv4, or IPv6 that is not link-local."""

    device: str
    kind: str
    address: str
    prefix: int  # length of the network's part
    mtu: int

    @property
    def network(self) -> str:
        return str(ipaddress.ip_interface(f"{self.address}/{self.prefix}").network)

    def __str__(self) -> str:
        return f"{self.address} ({SPOKEN.get(self.kind, self.kind)}, {self.device})"


def to_json(found: Sequence[Interface]) -> list[dict[str, Any]]:
    return [asdict(interface) for interface in found]


def from_json(data: Sequence[Mapping[str, Any]]) -> list[Interface]:
    return [Interface(**each) for each in data]


# ---------------------------------------------------------------------------------------- macOS


def hardware_ports(text: str) -> dict[str, str]:
    """Device -> kind, from `networksetup -listallhardwareports`."""
    found = {}
    for port, device in re.findall(r"Hardware Port: (.*)\nDevice: (\S+)", text):
        found[device] = _kind_of_port(port)
    return found


def _kind_of_port(port: str) -> str:
    port = port.lower()
    if "wi-fi" in port or "airport" in port:
        return "wifi"
    # "Thunderbolt Bridge", "Thunderbolt 1"; an adapter like "Thunderbolt Ethernet" is Ethernet
    if "thunderbolt" in port and "ethernet" not in port:
        return "thunderbolt"
    if re.search(r"ethernet|lan\b|10/100|gigabit|usb", port) and "tether" not in port:
        return "ethernet"
    return "other"


def from_ifconfig(text: str, ports: Mapping[str, str]) -> list[Interface]:
    """The addresses of interfaces that are up, from macOS's `ifconfig -a` and `hardware_ports`."""
    found = []
    for block in re.split(r"^(?=\S+: flags=)", text, flags=re.MULTILINE):
        head = re.match(r"(\S+): flags=\w+<([^>]*)>.*?mtu (\d+)", block)
        if not head or "UP" not in head[2].split(",") or "status: inactive" in block:
            continue
        device, mtu = head[1], int(head[3])
        members = re.findall(r"^\s+member: (\S+)", block, re.MULTILINE)
        kind = _kind_on_mac(device, head[2], members, ports)
        for address, mask in re.findall(r"\binet (\S+) .*?netmask (0x[0-9a-f]{8})", block):
            prefix = int(mask, 16).bit_count()
            found.append(Interface(device, kind, address, prefix, mtu))
        for address, length in re.findall(r"\binet6 ([0-9a-f:]+) prefixlen (\d+)", block):
            found.append(Interface(device, kind, address, int(length), mtu))
    return [interface for interface in found if usable(interface.address)]


def _kind_on_mac(device: str, flags: str, members: list[str], ports: Mapping[str, str]) -> str:
    if "LOOPBACK" in flags:
        return "loopback"
    if device in ports:
        return ports[device]
    if members:  # a bridge without a hardware port has the kind of its members
        kinds = {ports.get(member, "virtual") for member in members}
        return kinds.pop() if len(kinds) == 1 else "virtual"
    if "POINTOPOINT" in flags or re.match(r"utun|vmenet|vmnet|bridge|awdl|llw|ap\d", device):
        return "virtual"
    return "other"


# ---------------------------------------------------------------------------------------- Linux


def kind_on_linux(device: str, sysfs: Mapping[str, str]) -> str:
    """The kind of a device, from what lies in `/sys/class/net/<device>/`.

    `sysfs` maps a file's name to its content: ``type``, ``uevent``, ``driver`` (the name that the
    link ``device/driver`` ends in); ``wireless``, ``bridge`` and ``tun_flags`` are there or not.
    """
    if sysfs.get("type") == "772":
        return "loopback"
    if "wireless" in sysfs or "DEVTYPE=wlan" in sysfs.get("uevent", ""):
        return "wifi"
    if "thunderbolt" in sysfs.get("driver", "") or device.startswith("thunderbolt"):
        return "thunderbolt"
    inner = re.match(r"docker|br-|virbr|veth|cni|flannel|tailscale|zt|wg|tun|tap|dummy", device)
    if inner or "bridge" in sysfs or "tun_flags" in sysfs:
        return "virtual"
    return "ethernet" if sysfs.get("type") == "1" else "other"


# ---------------------------------------------------------------------------------------- choice


def usable(address: str) -> bool:
    """Can this address be dialled as it is? Link-local IPv6 needs a zone, and is left out."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return not (found.version == 6 and found.is_link_local) and not found.is_unspecified


def choose(own: Sequence[Interface]) -> Interface | None:
    """The address that a server listens at where the settings name none: by kind, Thunderbolt
    first.

    Of one kind the larger MTU, then the first. None where there is nothing but loopback, VPNs and
    containers.
    """
    offered = [i for i in own if i.kind in OFFERED]
    return min(offered, key=_rank, default=None)


def every_network(own: Sequence[Interface]) -> list[Interface]:
    """The addresses for a server that listens in all networks where machines may be: one in each,
    the best first. IPv6 only where there is nothing else."""
    offered = sorted((i for i in own if i.kind in OFFERED), key=_rank)
    fourth = [i for i in offered if ipaddress.ip_address(i.address).version == 4]
    found: dict[str, Interface] = {}
    for interface in fourth or offered:
        found.setdefault(interface.network, interface)
    return list(found.values())


def _rank(interface: Interface) -> tuple[int, bool, bool, int]:
    address = ipaddress.ip_address(interface.address)
    kind = KINDS.index(interface.kind)
    return kind, address.version == 6, address.is_link_local, -interface.mtu


def why(chosen: Sequence[Interface], own: Sequence[Interface]) -> str:
    """A sentence that explains this choice."""
    others = [str(i) for i in own if i.kind in OFFERED and i not in chosen]
    beside = f"; also here: {', '.join(others)}" if others else ""
    told = ", ".join(map(str, chosen))
    reason = "all networks here" if len(chosen) > 1 else "the best kind there is"
    return f"listening at {told}: {reason}{beside}"


@dataclass(frozen=True)
class Path:
    """How a worker's machine reaches its server's: two addresses in one network.

    `near` is None where the worker's machine has no address in that network: its system decides.
    """

    far: Interface  # the server's end
    near: Interface | None  # the worker's
    pinned: bool = False  # the settings say so
    bytes_per_s: float | None = None  # from the worker to the server, as measured
    measured_by: str = ""

    @property
    def kind(self) -> str:
        """The kind of the slower end."""
        kinds = [self.far.kind, *([self.near.kind] if self.near else [])]
        return max(kinds, key=KINDS.index)

    def __str__(self) -> str:
        near = f"{self.near.address} ({self.near.device})" if self.near else "by its routes"
        return f"{near} -> {self.far.address} ({self.far.device})"


def paths(
    server: Sequence[Interface],
    worker: Sequence[Interface],
    *,
    server_ip: str | None = None,
    worker_ip: str | None = None,
) -> list[Path]:
    """The paths from a worker's machine to its server's, best kind first.

    Addresses in the settings are used where the other end has an address in their network: a
    machine without a Thunderbolt port must not be sent to a Thunderbolt address. Without a common
    network, the worker dials the given address, or else the server's best, and the system's routes
    decide.
    """
    shared = [
        Path(far, near)
        for far in server
        for near in worker
        if far.network == near.network and far.kind != "loopback" and near.kind != "loopback"
        and far.address != near.address
    ]  # fmt: skip
    given = [
        replace(path, pinned=True)
        for path in shared
        if (server_ip is not None or worker_ip is not None)
        and server_ip in (None, path.far.address)
        and path.near is not None
        and worker_ip in (None, path.near.address)
    ]
    if not given and server_ip is not None:
        given = [replace(path, pinned=True) for path in shared if path.far.address == server_ip]
    if given or shared:
        return sorted(given or shared, key=lambda path: _rank_of_path(path))
    wanted = [i for i in server if i.address == server_ip]
    best = wanted or [i for i in [choose(server)] if i is not None]
    return [Path(far, None, pinned=bool(wanted)) for far in best]


def _rank_of_path(path: Path) -> tuple[int, tuple[int, bool, bool, int]]:
    return KINDS.index(path.kind), _rank(path.far)
