"""What knocks at a port on any network: other protocols, scanners, noise."""

from __future__ import annotations

import random
import socket
import struct
from contextlib import suppress

LOOPBACK = "127.0.0.1"
ZMTP = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f"

KNOCKS = {
    "http": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "tls": bytes.fromhex("160301020001fc0303") + bytes(500),
    "ssh": b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n",
    "scanner": b"",
    "zmtp of another kind": ZMTP + b"\x03\x00PLAIN" + bytes(100),
    "zmtp of a huge frame": ZMTP
    + b"\x03\x00NULL"
    + bytes(48)
    + b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    + b"\x02"
    + struct.pack(">Q", 2**62),
}


def bother(port: int, source: random.Random, host: str = LOOPBACK) -> None:
    """One stranger at a port: a known protocol, or noise. It goes without a goodbye."""
    knock = source.choice((*KNOCKS.values(), source.randbytes(source.randrange(1, 5000))))
    with suppress(OSError), socket.create_connection((host, port), 5) as s:
        s.settimeout(0.2)
        s.sendall(knock)
        if source.random() < 0.5:
            s.recv(1000)
