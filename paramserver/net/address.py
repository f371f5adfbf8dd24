"""Where a server listens, where a worker dials, and who needs keys for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from zmq.utils import z85

from paramserver.errors import UserError
from paramserver.net import jointoken
from paramserver.net.jointoken import JoinToken
from paramserver.transport.sockets import PeerKeys, is_local, is_loopback, own_addresses

LOOPBACK = "127.0.0.1"
AUTO = "auto"
"""As `host_ip`: a server chooses its address by kind, a worker looks for its server."""
EVERYWHERE = ("0.0.0.0", "::")
TOKEN_FILE_BYTES = 4096


@dataclass(frozen=True)
class Address:
    """A server as a worker reaches it; `keys` where it lets in only those who have them."""

    host: str
    port: int
    keys: PeerKeys | None = None


def listen(host_ip: str | None, security: str = "curve") -> tuple[list[str], list[str]]:
    """The addresses for a server to bind: those that are open to all, loopback first, and those
    where only who has the join token gets in. `host_ip` may be several, with commas; "0.0.0.0" are
    all that this host has now."""
    given = [host for host in (host_ip or "").split(",") if host]
    others = own_addresses() if set(given) & set(EVERYWHERE) else given
    open_to_all = [LOOPBACK]
    guarded = []
    for host in others:
        if security == "none" or is_loopback(host):
            open_to_all.append(host)
        else:
            guarded.append(host)
    return [h for h in dict.fromkeys(open_to_all) if h != "localhost"], list(dict.fromkeys(guarded))


def find(
    host: str | None, port: int | None, join: str | None, *, security: str = "curve"
) -> Address:
    """Where the server is that is meant by an address, a join token, or both.

    `join` is a token or the path of a file that holds one; it brings host and port, which go before
    it where they are given. An address of this host is dialled over loopback, where nothing is
    needed. Raises `UserError` where another machine is meant and there is no token (or, for
    ``security="none"``, no need of one).
    """
    token = read(join) if join else None
    host = host or (token.host if token is not None else LOOPBACK)
    port = port or (token.port if token is not None else 65432)
    if is_local(host):
        return Address(LOOPBACK, port)
    if security == "none":
        return Address(host, port)
    if token is None:
        raise UserError(
            f"the server at {host} is on another machine: joining it takes its join token",
            "make worker ID=... JOIN=... as `make server` prints it there (or join=FILE, or "
            f"{jointoken.VARIABLE});\nwhere that server runs with security=none, give "
            "security=none here too",
        )
    return Address(host, port, keys_of(token))


def read(join: str) -> JoinToken:
    """The token that is meant: itself, or in a file. Raises `UserError`."""
    if jointoken.looks_like_one(join):
        return jointoken.decode(join)
    try:
        path = Path(os.path.expanduser(join))
        with path.open("rb") as file:
            text = file.read(TOKEN_FILE_BYTES).decode("ascii", "replace")
    except (OSError, ValueError) as error:  # ValueError: not even a file's name
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"join is neither a join token nor a file that can be read: {why}",
            "a token begins with `ps` and is one word; `make server` prints it",
        ) from None
    try:
        return jointoken.decode(text)
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", error.hint) from None


def keys_of(token: JoinToken) -> PeerKeys:
    """A token's keys, as sockets take them."""
    return PeerKeys(server=z85.encode(token.server_key), secret=z85.encode(token.client_secret))
