"""Wires: what loopback and a link really carry, and hosts of their own on this machine.

A host is a network namespace with one link to a switch (a bridge in a namespace of its own), held
to a rate in both directions by `tbf`. It takes root on Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from paramserver.net.address import free_port as find_free_port

NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
CHUNK = 2**20
BURST = "80kb"
"""The smallest with which links of 1 Gbit/s reach their rate both ways at once: a packet has up to
64 KiB here. What a burst lets through at once counts in a small exchange."""
SETTLED_S = 0.1  # for TCP's window to open
Address = tuple[str, int]


def why_no_hosts() -> str | None:
    """Why this machine cannot have hosts of its own; None where it can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces take root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found (iproute2)" if missing else None


class Hosts:
    """Hosts of these names on one switch, as a context; each link carries `rate` each way, after a
    rest `burst` at once."""

    def __init__(self, names: list[str], rate: str = "1gbit", burst: str = BURST) -> None:
        self._prefix = f"bench{os.getpid()}-"
        self._names = names
        self._rate = rate
        self._burst = burst
        self._made: list[str] = []

    def __getitem__(self, name: str) -> str:
        """What `move_to` and `Team.start` call this host."""
        return self._prefix + name

    def address(self, name: str) -> str:
        return f"10.77.0.{self._names.index(name) + 1}"

    def give_ipv6(self, name: str) -> str:
        """An IPv6 address of this host, from now on."""
        address = f"fd77::{self._names.index(name) + 1}"
        _ip(f"-n {self[name]} addr add {address}/64 dev eth0 nodad")
        return address

    def __enter__(self) -> Hosts:
        _remove_orphans()
        try:
            switch = self._add("switch")
            _ip(f"-n {switch} link add bridge type bridge")
            _ip(f"-n {switch} link set bridge up")
            for number, name in enumerate(self._names, 1):
                host, port = self._add(name), f"port{number}"
                _ip(f"-n {host} link add eth0 type veth peer name {port} netns {switch}")
                _ip(f"-n {host} addr add {self.address(name)}/24 dev eth0")
                _ip(f"-n {switch} link set {port} master bridge")
                for namespace, device in ((host, "lo"), (host, "eth0"), (switch, port)):
                    _ip(f"-n {namespace} link set {device} up")
                self.mend(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._made:  # the links go with their namespaces
            with contextlib.suppress(RuntimeError):
                _ip(f"netns del {self._made.pop()}")

    def cut(self, name: str, *, leaving: bool = True, arriving: bool = True) -> None:
        """From now on nothing that leaves this host, or that is sent to it, arrives."""
        ours, port = self._ends(name)
        for end in (ours, port)[not leaving : 1 + arriving]:
            _call("tc", f"{end} root blackhole")

    def mend(self, name: str) -> None:
        """Both directions of this host's link are as they should be."""
        for end in self._ends(name):
            _call("tc", f"{end} root tbf rate {self._rate} burst {self._burst} latency 100ms")

    def throttle(self, name: str, rate: str, *, outwards: bool = True) -> None:
        """This host's link carries `rate` from now on: each way, or only towards the host."""
        for end in self._ends(name)[0 if outwards else 1 :]:
            _call("tc", f"{end} root tbf rate {rate} burst 64kb latency 100ms")

    def _ends(self, name: str) -> tuple[str, str]:
        """For tc, of a host's link: its own end and the switch's."""
        port = f"port{self._names.index(name) + 1}"
        return (
            f"-n {self[name]} qdisc replace dev eth0",
            f"-n {self['switch']} qdisc replace dev {port}",
        )

    def _add(self, name: str) -> str:
        self._made.append(self[name])
        _ip(f"netns add {self[name]}")
        return self[name]


def move_to(host: str) -> None:
    """Let this process, which must have one thread, live on that host."""
    libc = ctypes.CDLL(None, use_errno=True)
    file = os.open(NAMESPACES / host, os.O_RDONLY)
    try:
        if libc.setns(file, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot move to {host}")
    finally:
        os.close(file)


def _remove_orphans() -> None:
    """Those of a benchmark that was killed."""
    for path in NAMESPACES.glob("bench*-*"):
        match = re.fullmatch(r"bench(\d+)-.*", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with contextlib.suppress(RuntimeError):
                _ip(f"netns del {path.name}")


def _ip(arguments: str) -> None:
    _call("ip", arguments)


def _call(tool: str, arguments: str) -> None:
    done = subprocess.run([tool, *arguments.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} {arguments}: {done.stderr.strip()}")


# ------------------------------------------------------------------ raw speed


def receive(address: Address, seconds: float) -> float:
    """Take in what `send` sends for so long; bytes per second."""
    with _socket() as server:
        server.bind(address)
        server.listen(1)
        connection, _ = server.accept()
    with connection:
        buffer, total, now = bytearray(CHUNK), 0, 0.0
        begin = time.perf_counter() + SETTLED_S
        while now < begin + seconds:
            count = connection.recv_into(buffer)
            now = time.perf_counter()
            total += count if now > begin else 0
        return total / (now - begin)


def send(address: Address) -> None:
    """Send bytes as fast as they go, until the other side has had enough."""
    with _connect(address) as connection, contextlib.suppress(OSError):
        data = bytes(CHUNK)
        while True:
            connection.sendall(data)


def answer(address: Address) -> None:
    """Send back every byte to `ask`."""
    with _socket() as server:
        server.bind(address)
        server.listen(1)
        connection, _ = server.accept()
    with connection:
        while data := connection.recv(64):
            connection.sendall(data)


def ask(address: Address, times: int) -> float:
    """Median seconds of a round trip of one byte."""
    with _connect(address) as connection:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(64)
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)[times // 2]


def _socket() -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _connect(address: Address, patience_s: float = 10.0) -> socket.socket:
    deadline = time.monotonic() + patience_s
    while True:
        connection = _socket()
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return connection


def free_port() -> int:
    """`find_free_port`, for one process of a session of tests among ports of its own: what is
    free now is bound seconds later."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 6
    return find_free_port(range(20_000 + 2_000 * number, 22_000 + 2_000 * number))
