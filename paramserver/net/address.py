"""The addresses that a server binds and a worker dials, and which of them need keys."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from zmq.utils import z85

from paramserver.errors import UserError
from paramserver.net import jointoken
from paramserver.net.jointoken import JoinToken
from paramserver.settings import Settings
from paramserver.transport.sockets import (
    PeerKeys,
    addresses_of,
    is_local,
    is_loopback,
    own_addresses,
)
from paramserver.typed import printing_token, typed

LOOPBACK = "127.0.0.1"
PORTS = 4  # that servers are apart: the last of them is for sealed payloads
AUTO = "auto"
"""This value of `host_ip` makes a server choose its address by kind, and a worker look for its
server."""
EVERYWHERE = ("0.0.0.0", "::")
TOKEN_FILE_BYTES = 4096


@dataclass(frozen=True)
class Address:
    """A server as a worker reaches it; with `keys` where the server admits only peers that have
    them."""

    host: str
    port: int
    keys: PeerKeys | None = None
    outside: Address | None = None
    """Where this is loopback, and there is a token: the same server for those who show its keys."""


def listen(host_ip: str | None, security: str = "curve") -> tuple[list[str], list[str]]:
    """The addresses for a server to bind: those open to every peer, loopback first, and those that
    admit only peers with the join token. `host_ip` may hold several, with commas, and names;
    "0.0.0.0" stands for all that this host has now, "::" for those of IPv6, too. Raises `UserError`
    for a name that is unknown, or that only this host can reach."""
    given = [bare(host) for host in (host_ip or "").split(",") if host]
    if "::" in given:
        others = [*own_addresses(), *own_addresses(socket.AF_INET6)]
    elif set(given) & set(EVERYWHERE):
        others = own_addresses()
    else:
        others = [_address_of(host) for host in given]
    open_to_all = [LOOPBACK]
    guarded = []
    for host in others:
        if security == "none" or is_loopback(host):
            open_to_all.append(host)
        else:
            guarded.append(host)
    return [h for h in dict.fromkeys(open_to_all) if h != "localhost"], list(dict.fromkeys(guarded))


def bare(host: str) -> str:
    """An address as people write it in front of a port, `[fd00::2]`, without the brackets."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _address_of(host: str) -> str:
    """The address at which a server listens that is to be reached by this name."""
    found = addresses_of(host)
    if host == "localhost" or found == [host]:
        return host
    if not found:
        raise unknown(host)
    outside = [address for address in found if not is_loopback(address)]
    if not outside:
        raise UserError(
            f"host_ip={host} is {found[0]} here, where no other machine reaches it",
            "give the address itself, or host_ip=auto",
        )
    return outside[0]


def unknown(host: str) -> UserError:
    return UserError(
        f"{host} is neither an address nor a name that this machine knows",
        "is it misspelt? Give the address, like 10.10.0.1 or fd00::2; the server prints it",
    )


def asked(settings: Settings, given: Mapping[str, object]) -> tuple[str | None, int | None]:
    """Host and port of the server that a worker with these settings asks for, of which the command
    line has `given` some. None: as its join token says, which takes precedence over files."""
    host: str | None = settings.host_ip or LOOPBACK
    port: int | None = settings.port
    if settings.join is not None:
        host = host if "host_ip" in given or host == AUTO else None
        port = port if "port" in given else None
    return host, port


def check(settings: Settings, given: Mapping[str, object]) -> None:
    """Raise the `UserError` of a token that cannot be used, or that is missing, before anything
    that takes time."""
    host, port = asked(settings, given)
    if host != AUTO:
        find(host, port, settings.join, security=settings.security)
    elif settings.join is not None:
        read(settings.join)


def find(
    host: str | None, port: int | None, join: str | None, *, security: str = "curve"
) -> Address:
    """The server that an address, a join token, or both stand for.

    `join` is a token or the path of a file that holds one; a given host and port take precedence
    over the token's. An address of this host becomes loopback, where no keys are needed (by the
    user of the server; others come from `outside`). Raises
    `UserError` where the server is on another machine and there is no token, unless `security` is
    "none".
    """
    token = read(join) if join else None
    there = _reached(
        host,
        port or (token.port if token is not None else 65432),
        token,
        security,
        takes="joining it takes its join token",
        hint=f"{typed('worker', 'id=...', 'join=...')} as `{typed('server')}` prints it there (or "
        f"join=FILE, or {jointoken.VARIABLE})",
    )
    if there.host != LOOPBACK or token is None or security == "none" or not is_local(_of(token)):
        return there
    return replace(there, outside=Address(_of(token), there.port, keys_of(token)))


def _reached(
    host: str | None, port: int, token: JoinToken | None, security: str, *, takes: str, hint: str
) -> Address:
    """The server at this host, or at the token's address. What being there `takes`, with a `hint`,
    is told where it is on another machine, and there is no token."""
    host = bare(host or _of(token))
    if is_local(host):
        return Address(LOOPBACK, port)
    if security == "none":
        return Address(host, port)
    if token is None:
        if not addresses_of(host):
            raise unknown(host)
        raise UserError(
            f"the server at {host} is on another machine: {takes}",
            f"{hint};\nwhere that server runs with security=none, give security=none here too",
        )
    return Address(host, port, keys_of(token))


def several(join: str | None) -> bool:
    """Does this token have more than one address of its server? Raises `UserError`."""
    return join is not None and len(read(join).hosts) > 1


def _of(token: JoinToken | None) -> str:
    """The address in a token: the first one, or one of this machine."""
    if token is None:
        return LOOPBACK
    return next((host for host in token.hosts if is_local(host)), token.hosts[0])


def to_watch(
    host: str | None,
    port: int,
    watch_port: int | None,
    join: str | None,
    *,
    security: str = "curve",
) -> list[Address]:
    """Where a run is watched that an address, a join token or a watch token stand for: each address
    of a token is one of the same server's, the best first. `port` is the server's, if no token
    tells another; a given `watch_port` takes precedence over all. Raises `UserError`."""
    token = read(join, to_watch=True) if join else None
    if token is not None and token.watches:
        port = watch_port or token.port
    else:
        port = token.port if token is not None else port
        port = replace(Settings(), port=port, watch_port=watch_port).port_of_watchers
    hosts = [host or LOOPBACK] if host or token is None else list(token.hosts)
    if any(map(is_local, hosts)):
        hosts = [LOOPBACK]
    found = [
        _reached(
            each,
            port,
            token,
            security,
            takes="watching it takes a token",
            hint=f"{typed('watch', 'join=...')} with the watch token that "
            f"`{printing_token(each, port, of='watch_port')}` prints there, or the join token",
        )
        for each in hosts
    ]
    return list(dict.fromkeys(found))


def read(join: str, *, to_watch: bool = False) -> JoinToken:
    """The token in this text, or in the file that it names; a watch token only `to_watch`. Raises
    `UserError`."""
    if jointoken.looks_like_one(join):
        return jointoken.decode(join, to_watch=to_watch)
    try:
        path = Path(os.path.expanduser(join))
        with path.open("rb") as file:
            text = file.read(TOKEN_FILE_BYTES).decode("ascii", "replace")
    except (OSError, ValueError) as error:  # ValueError: not a valid file name either
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"join is neither a join token nor a file that can be read: {why}",
            f"a token begins with `ps` and is one word; `{typed('server')}` prints it",
        ) from None
    try:
        return jointoken.decode(text, to_watch=to_watch)
    except UserError as error:
        raise UserError(f"{path}: {error.problem}", error.hint) from None


def keys_of(token: JoinToken) -> PeerKeys:
    """A token's keys, in the form that sockets take."""
    return PeerKeys(server=z85.encode(token.server_key), secret=z85.encode(token.client_secret))


def free_port(within: range = range(20_000, 32_000)) -> int:
    """A port of loopback at which a server can be started: those where it publishes, is watched and
    takes sealed payloads are free, too. Nothing dials out from those `within` 20,000 and 32,000, on
    Linux and macOS. Raises `UserError` where there is none."""
    for port in random.sample(within[::PORTS], min(100, len(within[::PORTS]))):
        with suppress(OSError), ExitStack() as bound:
            s = replace(Settings(), port=port)
            for each in (port, port + 1, s.port_of_watchers, s.port_of_channels):
                bound.enter_context(socket.socket()).bind((LOOPBACK, each))
            return port
    raise UserError("no port of this machine is free for a server")
