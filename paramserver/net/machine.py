"""Facts about this machine: interfaces, versions, free memory, sleep settings and firewall.

Runs on every machine of a cluster (`agent`), and in a server that chooses its own address.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from paramserver import __version__
from paramserver.errors import UserError
from paramserver.net import hosts
from paramserver.net.address import AUTO, LOOPBACK
from paramserver.net.interfaces import (
    Interface,
    choose,
    every_network,
    from_ifconfig,
    hardware_ports,
    kind_on_linux,
    usable,
    why,
)
from paramserver.protocol.messages import Vitals
from paramserver.protocol.versions import OWN, PYTHON, TORCH
from paramserver.settings import Settings
from paramserver.transport import sockets

SYSFS = Path("/sys/class/net")
MACHINE_IDS = (Path("/etc/machine-id"), Path("/var/lib/dbus/machine-id"))
SHARED_DISK = re.compile(
    r"(nfs|cifs|smb|afp|9p|ceph|lustre|gluster|gpfs|beegfs|ocfs|gfs|webdav|afs|coda|virtiofs"
    r"|vboxsf|prl_fs|osxfs|macfuse|fuse\b)"
)
"""File systems that are, or may be, on another machine, by the beginnings of their names."""
CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal")
"""Linux's names of those of a processor."""
TOOL_S = 10.0
CONNECT_S = 1.0


def interfaces() -> list[Interface]:
    """The addresses of this machine's interfaces that are up, with their kinds."""
    if sys.platform == "darwin":
        ports = hardware_ports(ask("networksetup", "-listallhardwareports"))
        return from_ifconfig(ask("ifconfig", "-a"), ports)
    stats = psutil.net_if_stats()
    found = []
    for device, addresses in psutil.net_if_addrs().items():
        if device not in stats or not stats[device].isup:
            continue
        kind = kind_on_linux(device, _sysfs(SYSFS / device))
        for a in addresses:
            if a.family not in (socket.AF_INET, socket.AF_INET6) or not usable(a.address):
                continue
            found.append(Interface(device, kind, a.address, _prefix(a.netmask), stats[device].mtu))
    return found


def down() -> dict[str, list[str]]:
    """The devices of this machine that are down, or without a cable, with their addresses."""
    stats, up = psutil.net_if_stats(), {i.address for i in interfaces()}
    found: dict[str, list[str]] = {}
    for device, addresses in psutil.net_if_addrs().items():
        own = [a.address for a in addresses if a.family == socket.AF_INET]
        if own and not up & set(own) and (device not in stats or not stats[device].isup):
            found[device] = own
    return found


def _sysfs(folder: Path) -> dict[str, str]:
    """The files of a device that `kind_on_linux` reads."""
    found = {}
    for name in ("type", "uevent", "tun_flags"):
        with suppress(OSError):
            found[name] = (folder / name).read_text().strip()
    for name in ("wireless", "bridge"):
        if (folder / name).is_dir():
            found[name] = ""
    with suppress(OSError):
        found["driver"] = os.readlink(folder / "device" / "driver").rpartition("/")[2]
    return found


def _prefix(netmask: str | None) -> int:
    return 0 if netmask is None else int(ipaddress.ip_address(netmask)).bit_count()


def settle(settings: Settings) -> tuple[str | None, str]:
    """The `host_ip` of a server with these settings on this machine, and a sentence where this
    function chose it: with `host_ip: auto`, and without `host_ip` where `hosts` names other
    machines.

    Raises `UserError` where there is no address to choose.
    """
    machines = hosts.read(settings.hosts)
    others = any(not host.serves and host.ssh != hosts.HERE for host in machines)
    if settings.host_ip not in (None, AUTO) or (settings.host_ip is None and not others):
        return settings.host_ip, ""
    own = interfaces()
    given = next((host.ip for host in machines if host.serves), None)
    if settings.host_ip is None and given in {i.address for i in own}:
        return given, f"listening at {given}: hosts says so"
    chosen = every_network(own)
    if settings.security == "none":  # who listens without keys listens at one address
        best = choose(own)
        chosen = [best] if best is not None else []
    if chosen:
        return ",".join(i.address for i in chosen), why(chosen, own)
    if settings.host_ip is None:
        return None, (
            "hosts names other machines, but this one has no Thunderbolt, Ethernet or Wi-Fi "
            "address for them: listening on loopback only"
        )
    raise UserError(
        "this machine has no Thunderbolt, Ethernet or Wi-Fi address to listen at",
        f"its addresses: {', '.join(str(i) for i in own) or 'none'}\nchoose one: host_ip=...",
    )


def has_fast_cable(addresses: Collection[str]) -> bool:
    """Is one of these addresses of this machine that of a Thunderbolt cable?"""
    return bool(addresses) and any(
        i.kind == "thunderbolt" and i.address in addresses for i in interfaces()
    )


def identity() -> str:
    """An identifier of this machine, independent of host name and address; "" where there is none,
    as in many containers. It is a hash, because the machine's number itself is confidential
    (machine-id(5))."""
    found = ""
    if sys.platform == "darwin":
        told = ask("ioreg", "-rd1", "-c", "IOPlatformExpertDevice")
        found = next((line for line in told.splitlines() if "IOPlatformUUID" in line), "")
    for path in MACHINE_IDS:
        with suppress(OSError, ValueError):
            found = found or path.read_text().strip()
    return hashlib.sha256(f"paramserver {found}".encode()).hexdigest()[:16] if found else ""


def is_shared(path: Path) -> bool:
    """May other machines write to this folder's disk, too? True where that is not known."""
    try:
        place = path.resolve()
        mounts = {Path(p.mountpoint): p.fstype.lower() for p in psutil.disk_partitions(all=True)}
    except (OSError, RuntimeError, psutil.Error):
        return True
    kinds = [mounts[folder] for folder in (place, *place.parents) if folder in mounts]
    return not kinds or bool(SHARED_DISK.match(kinds[0]))


def ask(*command: str) -> str:
    """The output of a tool of the system; empty where it is missing or fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TOOL_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return done.stdout
    return ""


# ------------------------------------------------------------------------------------------ facts


def facts() -> dict[str, Any]:
    """The facts that `make doctor` collects from every machine; plain values, for JSON."""
    memory = psutil.virtual_memory()
    return {
        "host": socket.gethostname(),
        "system": platform.system(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {"paramserver": __version__, **_installed("torch", "pyzmq")},
        "device": device(),
        "cores": os.cpu_count(),
        "memory_bytes": memory.total,
        "free_memory_bytes": memory.available,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "sleep": _sleep(),
        "firewall": _firewall(),
    }


def vitals() -> Vitals | None:
    """Memory and temperature now; None where the system does not tell."""
    try:
        memory = psutil.virtual_memory()
        own = psutil.Process().memory_info().rss
    except (psutil.Error, OSError):
        return None
    return Vitals(own, memory.available, memory.total, _temperature())


def _temperature() -> float | None:
    """The highest that this machine's sensors tell, in degrees Celsius: of its processor, where one
    of them is known to be that. (macOS tells none.)"""
    try:
        found = psutil.sensors_temperatures()
    except (AttributeError, OSError, ValueError):  # AttributeError: not on this system
        return None
    known = {name: sensors for name, sensors in found.items() if name in CPU_SENSORS}
    degrees = [sensor.current for sensors in (known or found).values() for sensor in sensors]
    return max((d for d in degrees if d is not None and 0 < d < 150), default=None)


def pings(address: str) -> bool | None:
    """Does one ping come back? None where there is no `ping`."""
    if shutil.which("ping") is None:
        return None
    wait = ("-t", "3") if platform.system() == "Darwin" else ("-W", "3")
    return "ttl=" in ask("ping", "-c", "1", *wait, address).lower()


def port_holder(port: int) -> str | None:
    """The program that listens at this port on this machine, in words; None if there is none."""
    if held := sockets.listener(port):
        return held
    with suppress(OSError), socket.create_connection((LOOPBACK, port), CONNECT_S):
        return f"somebody (sudo lsof -nP -iTCP:{port} tells)"  # macOS shows it only to root
    return None


def versions() -> dict[str, str]:
    """Versions of this program, Python and PyTorch: of the one that this process has loaded, else
    of the one that is installed."""
    torch = getattr(sys.modules.get("torch"), "__version__", None) or _installed("torch")["torch"]
    found = {OWN: __version__, PYTHON: platform.python_version(), TORCH: str(torch or "")}
    return {what: version[:64] for what, version in found.items() if version}


def _installed(*packages: str) -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package).partition("+")[0]
    return found


def device() -> str:
    """The best device for training, as torch sees it; `none` where torch does not load."""
    try:
        import torch
    except (ImportError, OSError):
        return "none"
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name(0)})"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _sleep() -> str:
    """Minutes without input until this machine sleeps: `never`, `10`, or `unknown`."""
    if sys.platform == "darwin":
        for line in ask("pmset", "-g").splitlines():
            words = line.split()
            if words[:1] == ["sleep"] and len(words) > 1:
                return "never" if words[1] == "0" else words[1]
        return "unknown"
    target = ask("systemctl", "show", "-p", "LoadState", "--value", "sleep.target").strip()
    return {"masked": "never", "": "never"}.get(target, "unknown")


def _firewall() -> str:
    """`on`, `off` or `unknown` (it may take root to know)."""
    if sys.platform == "darwin":
        told = ask("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate").lower()
        return "on" if "enabled" in told else "off" if "disabled" in told else "unknown"
    if shutil.which("ufw") is None and shutil.which("firewall-cmd") is None:
        return "off"
    told = ask("systemctl", "is-active", "ufw", "firewalld")
    return "on" if "active" in told.split() else "off" if told else "unknown"
