"""Bounds what one connection can make ZeroMQ hold.

ZeroMQ has a limit for the size of a frame and one for the number of messages that wait, but none
for the number of frames in a message, and hands out a message when it is complete. So a message
without end would fill this process's memory. The kernel knows how many bytes have come through a
connection, and an `Inflow` ends one through which too many come of which no message is handed out.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from contextlib import suppress

# Where the kernel says how many bytes have come: the option of TCP, the length of what it answers
# and the place of the number in that. Linux: tcpi_bytes_received of struct tcp_info; macOS:
# tcpi_rxbytes of struct tcp_connection_info (netinet/tcp.h).
_OPTIONS = {"linux": (11, 136, 128), "darwin": (0x106, 112, 88)}


class Inflow:
    """One TCP connection of a ZeroMQ socket, by its file descriptor: `most` bytes of it may wait
    here. On a system that does not count them, nothing is ever too much."""

    def __init__(self, descriptor: int, most: int) -> None:
        self._descriptor, self._most = descriptor, most
        self._ends = _ends(descriptor)
        self._heard, self._before = False, 0

    def heard(self) -> None:
        """A message that came through this connection was handed out."""
        self._heard = True

    def too_much(self) -> bool:
        """Has more come than may wait since a message was handed out? Call it from time to time."""
        taken = taken_bytes(self._descriptor)
        if taken is None:
            return False
        if self._heard or taken < self._before:
            self._heard, self._before = False, taken
        return taken - self._before > self._most

    def end(self) -> bool:
        """End the connection, unless it is gone already; returns whether it did."""
        if self._ends is None or _ends(self._descriptor) != self._ends:
            return False  # the number may be another connection's by now
        with suppress(OSError), socket.socket(fileno=os.dup(self._descriptor)) as s:
            # What waits in the kernel goes, too, and the other end learns of it at once.
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.shutdown(socket.SHUT_RDWR)
            return True
        return False

    @property
    def sender(self) -> str:
        """The address at the other end; "" where it is gone."""
        return "" if self._ends is None else str(self._ends[1][0]).removeprefix("::ffff:")


def taken_bytes(descriptor: int) -> int | None:
    """Bytes that this process has read of a TCP connection so far; None where that is unknown."""
    option, size, place = _OPTIONS.get(sys.platform, (0, 0, 0))
    if not option:
        return None
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as s:
        told = s.getsockopt(socket.IPPROTO_TCP, option, size)
        if len(told) < size:  # a system that imitates another one
            return None
        unread = struct.unpack("i", fcntl.ioctl(s, termios.FIONREAD, bytes(4)))[0]
        return int(struct.unpack_from("=Q", told, place)[0]) - int(unread)
    return None


def _ends(descriptor: int) -> tuple[tuple[object, ...], tuple[object, ...]] | None:
    """The addresses of both ends of a connection; None where it is none."""
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as s:
        return s.getsockname(), s.getpeername()
    return None


__all__ = ["Inflow", "taken_bytes"]
