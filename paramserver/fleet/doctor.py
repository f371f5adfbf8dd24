"""`doctor`: examines each machine, measures each path, and reports faults.

It measures every pair of machines over every network that both are in: one path at a time, a second
each way, so that no measurement disturbs another. During a run it measures what the run leaves
free.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from paramserver import terminal
from paramserver.config.loading import load
from paramserver.fleet import commands, devices, measurements, remote, topology
from paramserver.fleet.cables import fixes
from paramserver.fleet.commands import Trouble
from paramserver.fleet.findings import (
    Measured,
    Report,
    about_machines,
    about_paths,
    chosen,
    findings,
    remarks,
)
from paramserver.fleet.lines import Lines
from paramserver.fleet.measurements import Measurement
from paramserver.fleet.processes import states
from paramserver.fleet.remote import Agent, Failed
from paramserver.fleet.up import clone, job, measure, prepare
from paramserver.net.hosts import Host
from paramserver.net.interfaces import Interface, from_json, paths
from paramserver.net.interfaces import Path as Way
from paramserver.settings import Settings
from paramserver.typed import typed

SECONDS = 1.0
ASK_S = 300.0
PICTURE = Path("runs/topology.svg")


def doctor(arguments: list[str], *, as_json: bool = False, fix: bool = False) -> int:
    """Examine all machines, or where none are named the devices of this one; returns 1 where one
    of them has a fault. `fix`: offer to set the addresses that Thunderbolt cables lack."""
    named = any(word.startswith("hosts=") for word in arguments)
    if not named and not load(arguments, "server").settings.hosts:
        return devices.look(as_json=as_json)
    wanted = job(arguments)
    lines = Lines(wanted.hosts)
    hosts, at_rest, troubles = _prepared(lines, wanted.hosts, quiet=as_json)
    with ExitStack() as stack:
        agents = {host.name: stack.enter_context(Agent(host)) for host in hosts}
        report, more = examine(wanted.hosts, agents, wanted.settings.port, wanted.settings.dataset)
        before = _kept(agents.get(wanted.server.name))
        measured, broken = measure_paths(
            wanted.hosts, report.interfaces, agents, wanted.settings.host_ip
        )
        if at_rest and wanted.server.name in agents:
            broken += _keep(agents[wanted.server.name], measured)
    report = replace(
        report,
        troubles=(*troubles, *more, *broken),
        measured=tuple(measured),
        port=wanted.settings.port,
        at_rest=at_rest,
        before=tuple(before),
    )
    found = findings(report)
    if as_json:
        terminal.result(json.dumps(to_json(report, found), indent=2))
    else:
        _print(lines, report, wanted.settings, found, at_rest)
        if fix:
            return _fix(lines, report)
        if fixes(report):
            command = typed("doctor", "--fix")
            lines.tell(f"Thunderbolt cables lack an address of their own. Set them: {command}")
    return int(bool(found))


def _fix(lines: Lines, report: Report) -> int:
    """Print the commands that set addresses, ask, and run them; returns 1 where one fails."""
    wanted = fixes(report)
    if not wanted:
        lines.tell("no Thunderbolt cable lacks an address")
        return 0
    for each in wanted:
        lines.tell_as_it_is(str(each))
    if not terminal.somebody_answers() or not terminal.asked("run them now, y, or not, N? ", ASK_S):
        lines.tell("nothing was changed")
        return 1
    failed = [each.host.name for each in wanted if subprocess.call(each.argv)]
    if failed:
        lines.tell(f"it failed on {', '.join(failed)}")
        return 1
    lines.tell(f"done; {typed('doctor')} measures the new paths")
    return 0


def _prepared(
    lines: Lines, hosts: tuple[Host, ...], *, quiet: bool
) -> tuple[list[Host], bool, list[Trouble]]:
    """The machines that can be asked, with this code on them unless a run is going on there;
    whether no machine has a run; and the faults of the other machines."""

    def one(host: Host) -> bool:
        found = commands.read_check(remote.must(host, commands.check(host), "the check"))
        wrong = commands.troubles(host, found)
        if wrong:
            raise Failed(wrong[0])
        return "environment" in found.has

    ready, troubles = remote.on_all(one, hosts)
    able = [host for host in hosts if host.name in ready]
    kept, more = states([host for host in able if ready[host.name]])
    troubles += more
    able = [host for host in able if host.name not in {t.host for t in more}]
    idle = [h for h in able if not any(s.alive for s in kept.get(h.name, {}).values())]
    prepare(lines, idle, clone(), quiet=quiet)
    return able, idle == able, troubles


def examine(
    hosts: tuple[Host, ...],
    agents: Mapping[str, Agent],
    port: int,
    dataset: Mapping[str, Any] | None = None,
) -> tuple[Report, list[Trouble]]:
    """The facts of each machine, and the difference of its clock to ours; where a `dataset` is
    given a test of its memory, too, and the digest of its copy of that."""

    def one(host: Host) -> tuple[dict[str, Any], list[Interface], dict[str, list[str]]]:
        agent = agents[host.name]
        look = agent.ask("look")  # the first answer may wake it up
        serves = any(s["name"] == "server" and s["alive"] for s in look["states"])
        before = time.time()
        there = agent.ask("time")["time"]
        skew = there - (before + time.time()) / 2
        facts = agent.ask("facts")
        taken: dict[str, Any] = {"port_held": None}
        for each in () if serves else (port, port + 1):  # not by our own run
            if taken["port_held"] is None:
                taken = {"port": each, "port_held": agent.ask("port", port=each)["held"]}
        found = from_json(look["interfaces"])
        well = {} if dataset is None else agent.ask("health", dataset=dict(dataset))
        return facts | {"skew_s": skew, **taken, **well}, found, look.get("down", {})

    told, troubles = remote.on_all(one, [agent.host for agent in agents.values()])
    facts = {name: each[0] for name, each in told.items()}
    interfaces = {name: each[1] for name, each in told.items()}
    down = {name: each[2] for name, each in told.items()}
    return Report(hosts, (), facts, interfaces, down=down), troubles


def _kept(agent: Agent | None) -> list[Measurement]:
    """What was measured last, where the server's machine answers."""
    if agent is None:
        return []
    with suppress(Failed):
        return measurements.from_json(agent.ask("kept").get("measurements", []))
    return []


def measure_paths(
    hosts: tuple[Host, ...],
    interfaces: Mapping[str, list[Interface]],
    agents: Mapping[str, Agent],
    host_ip: str | None,
) -> tuple[list[Measured], list[Trouble]]:
    """Every path of every pair, one after the other; the server's machine is the far end."""
    measured, troubles = [], []
    there = sorted((h for h in hosts if h.name in interfaces), key=lambda host: not host.serves)
    for far, near in combinations(there, 2):
        own, other = interfaces[far.name], interfaces[near.name]
        wanted = paths(own, other, server_ip=far.ip or (host_ip if far.serves else None), worker_ip=near.ip)  # fmt: skip  # noqa: E501
        pinned = {(w.far, w.near) for w in wanted if w.pinned}
        for way in paths(own, other):
            way = Way(way.far, way.near, (way.far, way.near) in pinned)
            try:
                told = measure(agents, far.name, near.name, way, SECONDS)
                pings = None
                if "problem" in told:
                    pings = agents[near.name].ask("ping", address=way.far.address)["pings"]
            except Failed as e:
                troubles.append(e.trouble)
                break
            measured.append(Measured(near.name, far.name, way, **told, pings=pings))
    return measured, troubles


def _keep(agent: Agent, measured: list[Measured]) -> list[Trouble]:
    """Write the speeds towards the server's machine to a file there, for the next `make up`."""
    now = time.time()
    found = [
        Measurement(m.near, m.path.near.address, m.path.far.address, m.up_bytes_per_s, now)
        for m in measured
        if m.far == agent.host.name and m.path.near is not None and not m.problem
    ]
    try:
        agent.ask("keep", measurements=measurements.to_json(found))
    except Failed as e:
        return [e.trouble]
    return []


def to_json(report: Report, found: list[Trouble]) -> dict[str, Any]:
    """The report and its findings, for programs."""
    return {
        "machines": {
            host.name: {
                **report.facts.get(host.name, {}),
                "interfaces": [asdict(i) for i in report.interfaces.get(host.name, [])],
            }
            for host in report.hosts
        },
        "paths": [asdict(m) for m in report.measured],
        "chosen": {
            host.name: asdict(best)
            for host in report.hosts
            if (best := report.best(host.name, report.server.name)) is not None
        },
        "findings": [asdict(trouble) for trouble in found],
        "remarks": remarks(report),
    }


def _print(
    lines: Lines, report: Report, settings: Settings, found: list[Trouble], at_rest: bool
) -> None:
    for part in (about_machines(report), about_paths(report)):
        for line in part:
            lines.tell(line)
        lines.tell("")
    if picture := topology.text(report):
        lines.tell_as_it_is(picture)
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(topology.svg(report), encoding="utf-8")
        lines.tell_as_it_is(f"as a picture: {PICTURE}\n")
    for sentence in (*chosen(report, settings), *remarks(report)):
        lines.tell(sentence)
    if not at_rest:
        lines.tell(
            "a run is going on: these figures are what it leaves free. They are not kept, and no "
            "cable is blamed for them"
        )
    for trouble in found:
        lines.tell_as_it_is(str(trouble))
    if not found:
        lines.tell("nothing is wrong")
