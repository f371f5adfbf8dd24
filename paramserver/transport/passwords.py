"""Who may connect to the server's sockets for sealed payloads: whoever shows a password that was
handed out over CURVE for one connection and was not used yet.

A listener on the cable reads a password as it is used, and then it is worth nothing. Knowing one
opens no payload either: it only lets its holder connect, so that strangers cannot.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from paramserver.transport import sockets

VALID_S = 600.0
"""A worker reads of its channel after its step, which may be the first one, that compiles. Until a
password is used nobody can have read it on the cable."""

PASSWORD_BYTES = 16
ANSWERS_PER_TURN = 64
_PLAIN, _VERSION = b"PLAIN", b"1.0"


def is_password(text: str) -> bool:
    """Does it look like one that was handed out?"""
    return re.fullmatch(f"[0-9a-f]{{{2 * PASSWORD_BYTES}}}", text) is not None


@dataclass(frozen=True)
class _Handed:
    password: str
    until: float


class Passwords:
    """The passwords of one context's sockets, and the ZAP handler that asks for them (RFC 27). Call
    `answer` when `socket` is readable: no handshake goes on without."""

    def __init__(self, ctx: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.socket = sockets.zap_handler(ctx)
        self.refused = 0
        self._handed: dict[str, _Handed] = {}  # by user

    def hand_out(self, user: str, now: float) -> str:
        """A new password for one connection of this user, in place of one that was not used."""
        self._handed = {u: h for u, h in self._handed.items() if h.until > now}
        password = secrets.token_hex(PASSWORD_BYTES)
        self._handed[user] = _Handed(password, now + VALID_S)
        return password

    def take_back(self, user: str) -> None:
        """Who has this password need not come any more."""
        self._handed.pop(user, None)

    def spend(self, user: str, password: str, now: float) -> bool:
        """Is this the user's password? It is never right again. A wrong one leaves it as it is, or
        anybody could spend it who has seen the user's name."""
        handed = self._handed.get(user)
        if handed is None or handed.until <= now:
            return False
        if not hmac.compare_digest(handed.password.encode(), password.encode()):
            return False
        del self._handed[user]
        return True

    def answer(self, clock: Callable[[], float]) -> None:
        """Answer the handshakes that wait, at most so many that others have their turn."""
        for _ in range(ANSWERS_PER_TURN):
            if not sockets.readable(self.socket):
                return
            asked = [frame.bytes for frame in sockets.receive(self.socket)]
            name = self._admitted(asked, clock())
            self.refused += name is None
            status = (b"400", b"refused", b"") if name is None else (b"200", b"OK", name.encode())
            request = asked[1] if len(asked) > 1 else b""
            sockets.send(self.socket, [_VERSION, request, *status, b""])

    def _admitted(self, asked: list[bytes], now: float) -> str | None:
        """The user that may connect; None where it may not."""
        if len(asked) != 8:
            return None
        version, _, domain, _, _, mechanism, user, password = asked
        if (version, domain, mechanism) != (_VERSION, sockets.ZAP_CHANNEL.encode(), _PLAIN):
            return None
        name = user.decode("ascii", "replace")
        return name if self.spend(name, password.decode("ascii", "replace"), now) else None

    def close(self) -> None:
        self.socket.close()
