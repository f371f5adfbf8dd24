"""A server announces itself in the local network by mDNS, and a worker finds it (`host_ip: auto`).

A server that listens for other machines is announced as a service `_paramserver._tcp.local.` with
its port, the addresses that it is bound to, and in its TXT record `run`, `protocol` and, where it
has keys, `key`: the fingerprint of its public one (`jointoken.fingerprint`). mDNS is RFC 6762, such
services RFC 6763.

Any machine in the network can announce anything, so a worker trusts no announcement: with a join
token it dials the addresses that fit the token's fingerprint, and takes one at which a CURVE
handshake has proven the token's key; of several, the one by the best kind of interface. Mind that
mDNS is spoken over IPv4 only here. Records are read one by one, not as the newest state of a
service: a machine that announces another one's name must not hide that one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import queue
import re
import socket
import time
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

import zeroconf
import zmq

from paramserver.errors import UserError
from paramserver.net import address, jointoken, machine
from paramserver.net.address import Address
from paramserver.net.interfaces import KINDS, Interface
from paramserver.protocol import messages as wire
from paramserver.transport import sockets
from paramserver.transport.handshake import HandshakeMonitor
from paramserver.transport.sockets import PeerKeys
from paramserver.words import host_port

SERVICE = "_paramserver._tcp.local."
ASK_FIRST_S, ASK_LAST_S = 1.0, 8.0  # between questions; doubles each time
OTHERS_S = 1.5  # without a token: how long to wait for answers of further servers
BETTER_S = 2.0  # how long to wait for a better address of the same server
TURN_S = 0.05
CANDIDATES = 100  # addresses that are tried in one search
RECORDS = 1000  # that are kept, of all senders together
_PTR, _IN, _QUERY = 12, 1, 0  # of DNS

logging.getLogger("zeroconf").setLevel(logging.CRITICAL)  # errors that matter are reported here


# ----------------------------------------------------------------------------------- the server's


class Announcement:
    """Announces a server while it lives; `problem` is set where that fails.

    No call waits: a thread of zeroconf finds a free name and announces it.
    """

    def __init__(self, hosts: Iterable[str], port: int, run: str, key: bytes | None) -> None:
        """Announce the `hosts` that other machines can reach; `key` is the server's public key."""
        addresses = sorted({a for host in hosts for a in _reachable(host)})
        self._zeroconf: zeroconf.Zeroconf | None = None
        self._told: Future[object] | None = None
        self._problem: str | None = None
        self._addresses, self._port, self._run = addresses, port, run
        if not addresses:
            return
        host = socket.gethostname().partition(".")[0][:40]
        self._info = self._service(f"{host} {run[:8]}.{SERVICE}", key)
        try:
            self._zeroconf = zeroconf.Zeroconf(addresses, ip_version=_version(addresses))
        except (OSError, zeroconf.Error) as e:
            self._problem = _silent(e)
            return
        loop = self._zeroconf.loop
        assert loop is not None
        telling = self._zeroconf.async_register_service(self._info, allow_name_change=True)
        self._told = asyncio.run_coroutine_threadsafe(_both(telling), loop)

    def _service(self, name: str, key: bytes | None) -> zeroconf.ServiceInfo:
        text = {"run": self._run, "protocol": str(wire.PROTOCOL)}
        if key is not None:
            text["key"] = jointoken.fingerprint(key)
        return zeroconf.ServiceInfo(
            SERVICE,
            name,
            port=self._port,
            properties=text,
            server=f"paramserver-{self._run[:8]}.local.",  # others may announce the machine's own
            parsed_addresses=self._addresses,
        )

    def renew(self, key: bytes) -> None:
        """The server has another public key now."""
        before, zc = self._told, self._zeroconf
        if zc is None or zc.loop is None:
            return

        async def renewed() -> None:
            if before is not None:
                await asyncio.wrap_future(before)
            # Registering may have changed the name.
            await (await zc.async_update_service(self._service(self._info.name, key)))

        self._told = asyncio.run_coroutine_threadsafe(renewed(), zc.loop)

    def problem(self) -> str | None:
        """Why this server cannot be announced, as a sentence, once; else None."""
        if self._told is not None and self._told.done():
            error = self._told.exception()
            if error is None and self._zeroconf is not None and not self._zeroconf.engine.senders:
                error = OSError("its addresses take no part in multicast")
            self._problem = None if error is None else _silent(error)
            self._told = None
        told, self._problem = self._problem, None
        return told

    def close(self) -> None:
        """Announce that the server is gone."""
        if self._told is not None:
            self._told.cancel()
        if self._zeroconf is not None:
            with suppress(OSError, TimeoutError, zeroconf.Error):
                self._zeroconf.close()


async def _both(telling: Awaitable[Awaitable[object]]) -> None:
    await (await telling)


def _reachable(host: str) -> Iterator[str]:
    """The addresses of this host that are valid on another machine, too."""
    with suppress(OSError):
        for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
            found = ipaddress.ip_address(info[4][0])
            scoped = found.version == 6 and found.is_link_local
            if not (found.is_loopback or found.is_unspecified or scoped):
                yield str(found)


def _version(addresses: Sequence[str]) -> zeroconf.IPVersion:
    six = {":" in a for a in addresses}
    if len(six) == 2:
        return zeroconf.IPVersion.All
    return zeroconf.IPVersion.V6Only if True in six else zeroconf.IPVersion.V4Only


def _silent(error: BaseException) -> str:
    return (
        f"workers cannot find this server by host_ip=auto: no multicast DNS here ({_words(error)})"
    )


def _words(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


# ----------------------------------------------------------------------------------- the worker's


@dataclass(frozen=True)
class Heard:
    """An announced address of a server; `key` is a fingerprint, or "" without keys."""

    run: str
    host: str
    port: int
    key: str

    def __str__(self) -> str:
        return f"{host_port(self.host, self.port)} (run {self.run[:8]})"


class _Browser(zeroconf.RecordUpdateListener):
    """Sends questions, and collects the announcements of all machines."""

    def __init__(self) -> None:
        super().__init__()
        self._records: queue.SimpleQueue[zeroconf.DNSRecord] = queue.SimpleQueue()
        self._kept: set[zeroconf.DNSRecord] = set()
        self._told: set[Heard] = set()
        self._ask_at, self._pause_s = 0.0, ASK_FIRST_S
        self._zeroconf = zeroconf.Zeroconf(ip_version=zeroconf.IPVersion.V4Only)
        self._zeroconf.add_listener(self, None)

    def async_update_records(
        self, zc: zeroconf.Zeroconf, now: float, records: list[zeroconf.RecordUpdate]
    ) -> None:
        """Called in zeroconf's thread."""
        for update in records:
            if self._records.qsize() < RECORDS:
                self._records.put(update.new)

    def ask(self, now: float) -> None:
        """Ask for servers, if it is time; without a list of known answers, so that all answer
        again."""
        if now >= self._ask_at:
            question = zeroconf.DNSOutgoing(_QUERY)
            question.add_question(zeroconf.DNSQuestion(SERVICE, _PTR, _IN))
            self._zeroconf.send(question)
            self._ask_at = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, ASK_LAST_S)

    def news(self) -> list[Heard]:
        """Announcements that are new since the last call."""
        before = len(self._kept)
        while not self._records.empty():
            record = self._records.get()
            if len(self._kept) < RECORDS:
                self._kept.add(record)
        if len(self._kept) == before:
            return []
        new = [heard for heard in joined(self._kept) if heard not in self._told]
        self._told.update(new)
        return new

    def close(self) -> None:
        self._zeroconf.close()


def joined(records: Iterable[zeroconf.DNSRecord]) -> list[Heard]:
    """Every service that these records describe."""
    records = list(records)
    texts: dict[str, list[dict[str, str]]] = {}
    hosts: dict[str, list[str]] = {}
    for record in records:
        if isinstance(record, zeroconf.DNSText):
            texts.setdefault(record.key, []).append(_text(record.text))
        elif isinstance(record, zeroconf.DNSAddress):
            with suppress(ValueError):
                hosts.setdefault(record.key, []).append(str(ipaddress.ip_address(record.address)))
    return list(
        dict.fromkeys(
            Heard(text.get("run", "?"), host, record.port, text.get("key", ""))
            for record in records
            if isinstance(record, zeroconf.DNSService) and record.key.endswith(f".{SERVICE}")
            for host in hosts.get(record.server_key, [])
            for text in texts.get(record.key, [])
            if 0 < record.port < 65536
        )
    )


def _text(content: bytes) -> dict[str, str]:
    """A TXT record: strings of the form name=value, each behind its length."""
    found = {}
    while content:
        length, content = content[0], content[1:]
        name, _, value = content[:length].partition(b"=")
        shown = value.decode("ascii", "replace")[:64]  # it may be shown on a terminal
        found[name.decode("ascii", "replace")] = re.sub(r"[^!-~]", "?", shown)
        content = content[length:]
    return found


@dataclass
class _Trial:
    """A connection to an address where the server may be; `rank` is that of this machine's
    interface towards it, the lowest best."""

    door: zmq.Socket[bytes]
    handshake: HandshakeMonitor
    rank: int

    def close(self) -> None:
        self.handshake.close()
        self.door.close()


class _Trials:
    """Connections to addresses where the server may be; `won` is the best one that is the
    server's."""

    def __init__(self, keys: PeerKeys | None) -> None:
        self._keys = keys
        self._ctx = sockets.context()
        self._running: dict[tuple[str, int], _Trial] = {}
        self._tried: set[tuple[str, int]] = set()
        self._own = machine.interfaces()
        self._best = min((KINDS.index(i.kind) for i in self._own), default=0)
        self._proven_at: float | None = None
        self.strangers: list[str] = []

    def begin(self, host: str, port: int) -> None:
        if (host, port) in self._tried or len(self._tried) >= CANDIDATES:
            return
        self._tried.add((host, port))
        door = sockets.dealer(self._ctx)
        handshake = HandshakeMonitor(self._ctx, door, host, port, with_keys=self._keys is not None)
        self._running[host, port] = _Trial(door, handshake, rank(host, self._own))
        sockets.connect(door, sockets.tcp(host, port), self._keys)

    def won(self, now: float, log: logging.Logger) -> tuple[str, int] | None:
        """An address of the server, once: by the best kind of interface, if several have proven to
        be its own within `BETTER_S`. Logs which addresses are another server's."""
        for at, trial in list(self._running.items()):
            try:
                trial.handshake.check()
            except UserError as e:
                self._running.pop(at).close()
                self.strangers.append(e.problem)
                log.info(f"{e.problem}: not the one that is looked for, the search goes on")
        proven = {at: t.rank for at, t in self._running.items() if t.handshake.proven}
        if not proven:
            return None
        if self._proven_at is None:
            self._proven_at = now
        best = min(proven, key=lambda at: proven[at])
        if proven[best] > self._best and now < self._proven_at + BETTER_S:
            return None
        self._running.pop(best).close()
        return best

    def close(self) -> None:
        for trial in self._running.values():
            trial.close()
        self._running.clear()
        self._ctx.term()


def rank(host: str, own: Sequence[Interface]) -> int:
    """The rank of the interface towards this host, by its kind: the lowest is the best. An address
    of this machine itself is better than all others."""
    if sockets.is_local(host):
        return -1
    near = sockets.towards(host)
    return next((KINDS.index(i.kind) for i in own if i.address == near), len(KINDS))


class Search:
    """Looks for a server: call `look` again and again; a context manager.

    With a token it finds the server that proves the token's key, and tries the token's addresses
    like announced ones. Without a token it finds the only announced server. With `run`, only a
    server of that run.
    """

    def __init__(
        self,
        join: str | None,
        *,
        security: str = "curve",
        run: str | None = None,
        known: tuple[str, int] | None = None,
        log: logging.Logger,
    ) -> None:
        """`join` is a token or the path of a file that holds one; `known` an address that is tried
        in any case, and ends the search if it is the server's; `log` gets sentences for a person.
        Raises `UserError`."""
        self._token = address.read(join) if join and security != "none" else None
        self._join, self._security, self._run, self._log = join, security, run, log
        self.whose = "the server of this join token" if self._token else "a server"
        self._fitting: list[Heard] = []
        self._others: list[Heard] = []
        self._choose_at: float | None = None
        self._browser: _Browser | None = None
        try:
            self._browser = _Browser()
        except (OSError, zeroconf.Error) as e:
            silent = f"there is no multicast DNS on this machine: {_words(e)}"
            if self._token is None:
                raise UserError(silent, "give the server's address: host_ip=10.10.0.1") from None
            log.info(f"{silent}; only what the join token names is tried")
        self._trials = _Trials(address.keys_of(self._token) if self._token else None)
        if self._token is not None:
            for host in self._token.hosts[: jointoken.HOSTS_MAX]:
                self._trials.begin(host, self._token.port)
        self._known, self._over = known, False
        if known is not None and not sockets.is_loopback(known[0]):
            self._trials.begin(*known)

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._trials.close()
        if self._browser is not None:
            self._browser.close()

    def look(self, now: float) -> Address | None:
        """An address of the server as soon as it is known, each one once; does not wait. An address
        of this host becomes loopback. Raises `UserError` where without a token there are
        several."""
        if self._over:
            return None
        if self._browser is not None:
            self._browser.ask(now)
            for heard in self._browser.news():
                self._consider(heard)
        if self._token is None and self._fitting:
            self._choose_at = self._choose_at or now + OTHERS_S
            if now >= self._choose_at:
                for there in only(self._fitting, self._security):
                    self._trials.begin(there.host, there.port)
        won = self._trials.won(now, self._log)
        self._over = won is not None and won == self._known
        return None if won is None else address.find(*won, self._join, security=self._security)

    def _consider(self, heard: Heard) -> None:
        if self._token is None:
            fits = self._security != "none" or not heard.key
        else:
            fits = heard.key == jointoken.fingerprint(self._token.server_key)
        fits &= self._run in (None, heard.run)
        (self._fitting if fits else self._others).append(heard)
        if fits and self._token is not None:
            self._trials.begin(heard.host, heard.port)

    def seen(self) -> str:
        """The other servers that were found, as lines for a person."""
        told = [*self._trials.strangers, *(f"{each} is another one" for each in self._others)]
        return "".join(f"\n  {line}" for line in told)


def find(
    join: str | None, *, security: str = "curve", timeout_s: float, log: logging.Logger
) -> Address:
    """The address that `Search` finds. Raises `UserError` where that takes too long."""
    with Search(join, security=security, log=log) as search:
        log.info(f"looking for {search.whose} in the local network (for {timeout_s:g} s)")
        deadline = time.monotonic() + timeout_s
        while (now := time.monotonic()) < deadline:
            found = search.look(now)
            if found is not None:
                log.info(f"found it at {host_port(found.host, found.port)}")
                return found
            time.sleep(TURN_S)
        raise UserError(
            f"{search.whose} was not found within {timeout_s:g} s{search.seen()}",
            "is it running with host_ip=..., in this network? mDNS does not pass routers, and some "
            "Wi-Fi does not pass it at all:\nhost_ip=10.10.0.1 goes straight to an address",
        )


def only(heard: Sequence[Heard], security: str) -> list[Address]:
    """The addresses of the only announced server, for a worker without a token.

    Raises `UserError` where there are several, or where the server needs a token.
    """
    if len({each.run for each in heard}) > 1:
        raise UserError(
            f"there are several servers: {', '.join(map(str, heard))}",
            "a join token tells which is meant (JOIN=...), or an address: host_ip=... port=...",
        )
    return [address.find(each.host, each.port, None, security=security) for each in heard]
