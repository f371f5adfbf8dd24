"""The machines that `make up` starts a run on, as `conf/cluster.yaml` names them. Pure.

    hosts:
      - {name: mini1, ssh: mini1, ip: 10.10.0.1, role: server}
      - {name: mini2, ssh: user@mini2.local, ip: 10.10.0.2}
      - {name: pi5, ssh: pi5, device: cpu}

The shorter spelling says the same: ``server: mini1``, ``workers: [mini2, pi5]`` and, where
addresses are to be fixed, ``host_ip: {mini1: 10.10.0.1, mini2: 10.10.0.2}``; `spelled_out` turns
it into the list.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from paramserver.errors import UserError
from paramserver.settings import outside
from paramserver.words import nearest, quoted

HERE = "local"  # as `ssh`: this machine, without ssh
WORKERS_MAX = 64  # on one machine
ROLES = ("server", "worker", "both")


@dataclass(frozen=True)
class Process:
    """A worker's process on a machine: its name there, its number in the run, and which of the
    machine's workers it is, from 0."""

    name: str
    id: int
    rank: int


@dataclass(frozen=True)
class Host:
    """One machine. `ssh` is a name or address that the user's own ssh understands."""

    name: str
    ssh: str
    ip: str | None = None  # its address for the exchange; None: found by measuring
    role: str = "worker"  # server, worker, or both
    id: int | None = None  # the (first) worker's number; None: by the place in the list
    workers: int = 1  # processes that train on it
    device: str | None = None
    threads: int | None = None
    folder: str = "paramserver"  # below the home folder, or absolute
    python: str | None = None  # makes its environment
    restart: int = 3  # how often a process that died is started again

    @property
    def serves(self) -> bool:
        return self.role in ("server", "both")

    @property
    def works(self) -> bool:
        return self.role in ("worker", "both")

    @property
    def processes(self) -> tuple[Process, ...]:
        """Its workers."""
        if not self.works or self.id is None:
            return ()
        several = self.workers > 1
        return tuple(
            Process(f"worker-{rank + 1}" if several else "worker", self.id + rank, rank)
            for rank in range(self.workers)
        )

    def spoken(self, name: str) -> str:
        """The name of a process there, for people."""
        ids = {process.name: process.id for process in self.processes}
        return f"worker {ids[name]}" if name in ids else name


def read(entries: Any) -> tuple[Host, ...]:
    """The checked machines of a setting `hosts`, each worker with its number. Raises `UserError`.

    None and an empty list are no machines.
    """
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise _wrong("must be a list of machines", "hosts:\n  - {name: mini1, role: server}")
    hosts = [_host(entry) for entry in entries]
    if not hosts:
        return ()
    names = [host.name for host in hosts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _wrong(f"names {min(twice)} twice", "each machine has a name of its own")
    servers = [host.name for host in hosts if host.serves]
    if len(servers) != 1:
        raise _wrong(
            f"has {len(servers) or 'no'} server{'s' if len(servers) > 1 else ''}"
            + (f": {', '.join(servers)}" if servers else ""),
            "exactly one machine has role: server, or role: both if it also trains",
        )
    if not any(host.works for host in hosts):
        raise _wrong("has no worker", "role: both lets the server's machine train, too")
    return _numbered(hosts)


def _numbered(hosts: list[Host]) -> tuple[Host, ...]:
    taken = [process.id for host in hosts for process in host.processes]
    if twice := {number for number in taken if taken.count(number) > 1}:
        raise _wrong(f"gives id {min(twice)} to two machines", "or leave them out: 1, 2, 3 ...")
    given = []
    for host in hosts:
        number = host.id if host.works else None
        if host.works and number is None:
            number = 1  # the first of so many free ones in a row
            while not set(taken).isdisjoint(range(number, number + host.workers)):
                number += 1
            taken += range(number, number + host.workers)
        given.append(replace(host, id=number))
    return tuple(given)


def choose(text: str, entries: Any) -> list[dict[str, Any]]:
    """The machines of ``hosts=mini1,user@mini2``, for `read`: what is typed behind ssh, with
    ``:2`` for two workers there. One that `entries`, the file's machines, names is as it is there.
    Without a server among them the first one is both. Raises `UserError`."""
    known = {
        entry["name"]: dict(entry)
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)
    }
    found: list[dict[str, Any]] = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        ssh, colon, count = word.partition(":")
        name = ssh.rpartition("@")[2]
        if not name or (colon and not re.fullmatch("0*[1-9][0-9]{0,8}", count)):
            raise UserError(
                f"hosts={text}: {word!r} is no machine",
                "hosts=mini1,user@mini2.local, or mini1:2 for two workers there",
            )
        entry = known.get(ssh) or known.get(name) or {"name": name, "ssh": ssh}
        found.append(entry | ({"workers": int(count)} if colon else {}))
    if not found:
        raise UserError("hosts= names no machine", "hosts=mini1,user@mini2.local")
    if all(entry.get("role", "worker") == "worker" for entry in found):
        found[0] = found[0] | {"role": "both"}
    return found


_KINDS: dict[str, type] = {
    **dict.fromkeys(("name", "ssh", "ip", "role", "device", "folder", "python"), str),
    **dict.fromkeys(("id", "threads", "restart", "workers"), int),
}


def _host(entry: Any) -> Host:
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        hint = "a machine is written {name: mini1, ssh: user@mini1}"
        raise _wrong(f"holds {quoted(entry)}", hint)
    name = entry["name"]
    for key, value in entry.items():
        if key not in _KINDS:
            near = nearest(str(key), _KINDS)
            guess = f"; did you mean `{near}`?" if near else ""
            known = ", ".join(field.name for field in fields(Host))
            raise _wrong(f"{name} has an unknown `{key}`{guess}", f"a machine has: {known}")
        if value is not None and type(value) is not _KINDS[key]:
            kind = "text" if _KINDS[key] is str else "a whole number"
            raise _wrong(f"{name}.{key} must be {kind}, got {quoted(value)}")
    host = Host(**{"ssh": name, **{k: v for k, v in entry.items() if v is not None}})
    problem = _problem(host)
    if problem:
        raise _wrong(f"{name}.{problem[0]}", problem[1])
    return host


def _problem(host: Host) -> tuple[str, str] | None:
    """The fault in one machine's values, and what to do; None where there is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", host.name):
        return f"name must be a plain word, got {host.name!r}", "letters, digits, . _ and -"
    if not re.fullmatch(r"[^\s-]\S*", host.ssh):
        return (
            f"ssh must be what you type behind ssh, got {host.ssh!r}",
            "options go into ~/.ssh/config; ssh: local is this machine",
        )
    if host.role not in ROLES:
        return f"role must be {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {host.role!r}", ""
    if host.ip is not None:
        try:
            ipaddress.ip_address(host.ip)
        except ValueError:
            return f"ip must be an address like 10.10.0.1, got {host.ip!r}", ""
    for name in ("id", "device", "threads"):  # settings of its worker
        value = getattr(host, name)
        if value is not None and (must := outside(name, value)):
            return f"{name} {must}, got {value!r}", ""
    if not 1 <= host.workers <= WORKERS_MAX:
        return f"workers must be 1 to {WORKERS_MAX}, got {host.workers}", "role: server trains none"
    if host.id is not None and (must := outside("id", host.id + host.workers - 1)):
        return f"id of the last of its {host.workers} workers {must}", ""
    if host.restart < 0:
        return f"restart must be 0 or more, got {host.restart}", ""
    plain = host.folder.removeprefix("~/")
    if not plain.strip("/") or plain.startswith("~") or ".." in plain.split("/"):
        return f"folder must be below the home folder, or absolute, got {host.folder!r}", ""
    return None


def spelled_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings with ``server:``, ``workers:`` and a mapping ``host_ip:`` as ``hosts:``.

    Everything else stays as it is. Raises `UserError` where the two spellings contradict.
    """
    tree = dict(tree)
    addresses = tree.get("host_ip")
    short = [key for key in ("server", "workers") if key in tree]
    if isinstance(addresses, Mapping) and (short or "hosts" in tree):
        del tree["host_ip"]
    else:
        addresses = {}
    if not short:
        entries = tree.get("hosts")
    elif "hosts" in tree:
        raise UserError(
            f"there is both `hosts` and `{short[0]}`", "either the list, or server: and workers:"
        )
    else:
        entries = _listed(tree.pop("server", None), tree.pop("workers", []))
    if not isinstance(entries, list):
        return tree
    known = {
        entry["name"]: entry
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }
    for name, address in addresses.items():
        if name not in known:
            raise UserError(
                f"host_ip has an address for {name}, which is none of the machines",
                f"the machines: {', '.join(map(str, known))}",
            )
        known[name].setdefault("ip", address)
    tree["hosts"] = entries
    return tree


def _listed(server: Any, workers: Any) -> list[dict[str, Any]]:
    """The list that ``server:`` and ``workers:`` stand for."""
    if not isinstance(workers, list):
        raise UserError("`workers` must be a list of machines", "workers: [mini2, pi5]")
    if server is None:
        raise UserError("there is `workers` and no `server`", "server: mini1")
    entries: list[dict[str, Any]] = []
    for given, role in [(server, "server"), *((worker, "worker") for worker in workers)]:
        entry = dict(given) if isinstance(given, Mapping) else {"name": given}
        if role == "worker" and entry == {"name": entries[0].get("name")}:
            entries[0]["role"] = "both"
        else:
            entries.append({**entry, "role": role})
    return entries


def _wrong(problem: str, hint: str = "") -> UserError:
    between = " " if re.match(r"(must|has|holds|names|gives)\b", problem) else ": "
    return UserError(f"hosts{between}{problem}", hint)
