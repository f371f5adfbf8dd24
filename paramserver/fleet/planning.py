"""`plan`: measures the model on each machine and the links between them, and predicts how fast it
would train with each set of machines, place of the server, codec and number of local steps.

Where `hosts` names no other machine it measures this one: with one process, and with `num_workers`
of them at once.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from paramserver import drafts, terminal
from paramserver.errors import UserError
from paramserver.fleet import commands, plan, plan_watch, remote
from paramserver.fleet.doctor import examine, measure_paths
from paramserver.fleet.findings import Report
from paramserver.fleet.lines import Lines
from paramserver.fleet.plan import HERE, CodecCost, Link, Machine, Model, Plan, Row
from paramserver.fleet.processes import machines_if_any, refuse, states
from paramserver.fleet.remote import Agent
from paramserver.fleet.up import check, check_modules, clone, job, prepare
from paramserver.fleet.user_code import find_user_code
from paramserver.net.hosts import Host
from paramserver.program import command as program
from paramserver.rounds.local_steps import AUTO
from paramserver.rounds.shares import Cost
from paramserver.settings import Settings
from paramserver.typed import typed

CHOSEN = ("codec", "local_steps", "shares", "overlap")
"""Settings that a plan chooses where nobody has typed them."""


def plan_for(arguments: list[str], *, as_json: bool = False) -> int:
    """Print what could be run, best first, and the command for the best. Raises `UserError`."""
    settings, given, hosts = machines_if_any(arguments)
    if len(hosts) == 1 and hosts[0].ssh != "local":
        raise UserError(
            f"{hosts[0].name} is the only machine: there is nothing to choose from",
            "name two or more; with no machine at all, a plan is made for this one",
        )
    lines = Lines(hosts)
    say = (lambda host, line: None) if as_json else lines.say
    if len(hosts) > 1:
        measured, links = _on_machines(lines, arguments, say, quiet=as_json)
    else:
        measured, links = _here(settings, arguments, say)
    machines = _machines(measured, hosts)
    found = []
    for at_once in {m.processes for m in machines}:
        wanted = _job(settings, given, measured, linked=bool(links))
        found += plan.plans([m for m in machines if m.processes == at_once], links, wanted)
    found.sort(key=lambda p: -p.worth)
    rows = plan.table(found)
    if not rows:
        raise UserError("no two machines reach each other", f"{typed('doctor')} looks closer")
    _keep(settings, hosts, found)
    command = _command(rows[0].plan, hosts, arguments)
    if as_json:
        terminal.result(json.dumps(_to_json(measured, links, rows, command), indent=2))
    else:
        lines.tell("")
        lines.print(_drawn(rows, len(hosts) > 1))
        lines.tell("")
        lines.tell_as_it_is(command)
    return 0


Measured = dict[str, list[dict[str, Any]]]
"""What `workers.builtin.measure` found, by machine: one for each process that ran at once; on this
machine alone, by the number of these."""


# --------------------------------------------------------------------------------------- measuring


def _on_machines(
    lines: Lines, arguments: list[str], say: Any, *, quiet: bool
) -> tuple[Measured, dict[tuple[str, str], Link]]:
    """Copy the code, measure the links, then the model on all machines at once."""
    wanted, root = job(arguments), clone()
    code = find_user_code(wanted.settings, root)
    checked = check(wanted.hosts)
    check_modules(wanted, checked, root)
    ready = [host for host in wanted.hosts if "environment" in checked[host.name].has]
    kept, troubles = states(ready)
    refuse(troubles, "not all machines answer")
    busy = [name for name, there in kept.items() if any(s.alive for s in there.values())]
    if busy:
        raise UserError(
            f"a run is under way on {', '.join(busy)}: it would be measured, too",
            f"{typed('status')} shows it, {typed('down')} ends it",
        )
    prepare(lines, wanted.hosts, root, code, quiet=quiet)
    with ExitStack() as stack:
        agents = {host.name: stack.enter_context(Agent(host)) for host in wanted.hosts}
        report, more = examine(wanted.hosts, agents, wanted.settings.port)
        refuse(more, "not all machines answer")
        if not quiet:
            lines.tell("measuring the links, one after the other")
        paths, broken = measure_paths(
            wanted.hosts, report.interfaces, agents, wanted.settings.host_ip
        )
        refuse(broken, "the links cannot be measured")
    links = links_of(replace(report, measured=tuple(paths)))
    own = commands.own_path(code)

    def one(host: Host) -> list[dict[str, Any]]:
        say(host.name, "measuring some batches")
        command = commands.measure(host, wanted.settings, wanted.text, own)
        found: dict[str, Any] = remote.ask(host, command, "measuring the model")
        say(host.name, _said(found))
        return [found]

    measured, troubles = remote.on_all(one, [h for h in wanted.hosts if h.works])
    refuse(troubles, "the model cannot be measured")
    return measured, links


def links_of(report: Report) -> dict[tuple[str, str], Link]:
    """The best path of each pair, both ways round: (worker's machine, server's)."""
    links = {}
    names = [host.name for host in report.hosts]
    for near in names:
        for far in names:
            best = report.best(near, far)
            if near == far or best is None:
                continue
            link = Link(
                best.up_bytes_per_s,
                best.down_bytes_per_s,
                best.round_trip_s,
                best.path.far.address,
                best.path.kind == "wifi",
            )
            if best.near != near:
                link = replace(link.turned, port=best.path.near.address if best.path.near else "")
            links[near, far] = link
    return links


def _here(
    settings: Settings, arguments: Sequence[str], say: Any
) -> tuple[Measured, dict[tuple[str, str], Link]]:
    """This machine: one process, then as many as workers will run here."""
    measured = {}
    for at_once in sorted({1, settings.num_workers}):
        say(HERE, f"measuring some batches, {at_once} process{'es' if at_once > 1 else ''} at once")
        measured[str(at_once)] = found = _at_once(at_once, arguments)
        say(HERE, _said(found[0]))
    return measured, {}


def _at_once(processes: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """What so many processes measure that begin at the same time. Raises `UserError`."""
    words = [a for a in arguments if a.partition("=")[0] != "num_workers"]
    command = program("workers.builtin.measure", *words, f"num_workers={processes}")
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(processes):
            started.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout is not None
            process.stdout.readline()  # it is ready, or has failed
        for process in started:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write("go\n")
                process.stdin.flush()
        found = []
        for process in started:
            out, err = process.communicate(timeout=commands.MEASURE_S)
            if process.returncode:
                problem, *hints = err.strip().splitlines() or ["the measurement failed"]
                raise UserError(
                    problem.removeprefix("error: "), "\n".join(h.strip() for h in hints)
                )
            found.append(json.loads(out.strip().splitlines()[-1]))
        return found
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _said(found: Mapping[str, Any]) -> str:
    samples, seconds = found["points"][0]
    return (
        f"{samples} samples take {1000 * seconds:.1f} ms on {found['device']}: "
        f"{samples / seconds:,.0f} samples/s"
    )


def _keep(settings: Settings, hosts: Sequence[Host], found: Sequence[Plan]) -> None:
    """Leave the plans beside the runs, on each machine those with the server there. Raises
    `UserError`."""
    if len(hosts) < 2:
        path = Path(settings.run_dir) / plan_watch.FILE
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts.write(path, plan_watch.kept(settings, found), synced=False)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        return

    def one(host: Host) -> None:
        text = plan_watch.kept(settings, [p for p in found if p.server == host.name])
        remote.must(host, commands.keep_plan(host, settings, text), "keeping the plan")

    refuse(remote.on_all(one, hosts)[1], "the plan cannot be kept")


# ------------------------------------------------------------------------------------ what it means


def _machines(measured: Measured, hosts: Sequence[Host]) -> list[Machine]:
    """The machines as the plan sees them, that of the server first."""
    if len(hosts) < 2:
        return [machine(HERE, found, len(found)) for found in measured.values()]
    found = [machine(host.name, measured[host.name]) for host in hosts if host.works]
    found += [replace(found[0], name=host.name, works=False) for host in hosts if not host.works]
    server = next(host.name for host in hosts if host.serves)
    return sorted(found, key=lambda m: m.name != server)


def machine(name: str, found: Sequence[Mapping[str, Any]], processes: int = 1) -> Machine:
    """A machine from what its processes measured at the same time."""

    def middle(of: Any) -> float:
        return float(median(of(each) for each in found))

    costs = [plan.cost_of([(int(n), float(s)) for n, s in each["points"]]) for each in found]
    codecs = {
        name: CodecCost(
            middle(lambda each, name=name: each["codecs"][name][0]),
            middle(lambda each, name=name: each["codecs"][name][1]),
        )
        for name in found[0]["codecs"]
    }
    return Machine(
        name,
        Cost(median(c.fixed_s for c in costs), median(c.sample_s for c in costs)),
        middle(lambda each: each["backward"]),
        processes,
        middle(lambda each: each["copy_s"]),
        codecs,
    )


def _job(
    settings: Settings, given: Mapping[str, object], measured: Measured, *, linked: bool
) -> plan.Job:
    """What is planned, and which settings are free: not those that somebody has typed."""
    found = next(iter(measured.values()))[0]
    wanted = plan.Job(
        Model(tuple(map(float, found["buckets"])), float(found["other"])),
        settings.batch_size,
        samples=int(found["samples"]),
        topk_ratio=settings.topk_ratio,
        encrypted=linked and settings.security != "none",
        shards=settings.shards_wanted,
        observer=settings.observer,
        equal_shares=settings.deterministic,
    )
    if "codec" in given:
        wanted = wanted._replace(codecs=(settings.codec,))
    if "local_steps" in given:
        wanted = wanted._replace(local_steps=(settings.local_steps,))
    alone = tuple(c for c in wanted.codecs if replace(settings, codec=c).averages_alone)
    if settings.shards in (None, 1):
        wanted = wanted._replace(alone=alone)
    else:  # with these it would be refused
        wanted = wanted._replace(codecs=tuple(c for c in wanted.codecs if c not in alone))
    if settings.deterministic:
        numbers = tuple(n for n in wanted.local_steps if n != AUTO)
        wanted = wanted._replace(local_steps=numbers, overlap=(False,))
    elif "overlap" in given:
        wanted = wanted._replace(overlap=(settings.overlap,))
    if "shares" in given or settings.deterministic:
        wanted = wanted._replace(shares=(settings.shares,))
    return wanted


# ------------------------------------------------------------------------------------------ showing


def _drawn(rows: Sequence[Row], many: bool) -> Table:
    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("samples/s", justify="right")
    for head in ("machines", "server on") if many else ("workers",):
        drawn.add_column(head)
    drawn.add_column("codec")
    drawn.add_column("local\nsteps", justify="right")
    drawn.add_column("shares")
    drawn.add_column("why")
    for shown, sentence in rows:
        places = (", ".join(shown.machines), shown.server) if many else (str(shown.workers),)
        drawn.add_row(
            f"{shown.samples_per_s:,.0f}", *places, shown.choice.codec,
            shown.shown_steps, shown.choice.shares if shown.workers > 1 else "",
            sentence,
        )  # fmt: skip
    return drawn


def _command(best: Plan, hosts: Sequence[Host], arguments: Sequence[str]) -> str:
    """How to start it. What was typed stays, also where one worker has no use for it."""
    names = {a.partition("=")[0] for a in arguments}
    words = [a for a in arguments if a.partition("=")[0] not in (*CHOSEN, "num_workers")]
    chosen = [
        f"{name}={str(value).lower()}" for name, value in zip(CHOSEN, best.choice, strict=True)
        if (best.workers > 1 and value is not False) or name == "codec" or name in names
    ]  # fmt: skip
    named = [a for a in words if re.match(r"hosts=[^\[{]", a)]
    if named and best.server in best.machines:
        machines = filter(None, map(str.strip, named[-1].partition("=")[2].split(",")))
        typed_as = dict(zip((host.name for host in hosts), machines, strict=True))
        first = sorted(best.machines, key=lambda name: name != best.server)
        word = f"HOSTS={','.join(typed_as[name] for name in first)}"
        rest = [a for a in words if a not in named]
        return f"start it with\n  make up {shlex.join([word, *rest, *chosen])}"
    settings = shlex.join([*words, *chosen])
    if len(hosts) < 2:
        told = [
            "start it with",
            f"  {typed('server', f'num_workers={best.workers}')} {settings}",
            *(f"  {typed('worker', f'id={k}')}" for k in range(1, best.workers + 1)),
        ]
        return "\n".join(told)
    changes = []
    out = [h.name for h in hosts if h.works and h.name not in best.machines]
    if gone := [name for name in out if name != best.server]:
        changes.append(f"leave out {', '.join(gone)}")
    role = "both" if best.server in best.machines else "server"
    server = next(h for h in hosts if h.name == best.server)
    if server.role != role:
        changes.append(f"{best.server} gets role: {role}")
        others = [h for h in hosts if h.serves and h.name in best.machines and h is not server]
        changes += [f"{h.name} gets role: worker" for h in others]
    first = [f"in conf/cluster.yaml, {'; '.join(changes)}; then"] if changes else ["start it with"]
    return "\n".join([*first, f"  make up {settings}"])


def _to_json(
    measured: Measured,
    links: Mapping[tuple[str, str], Link],
    rows: Sequence[Row],
    command: str,
) -> dict[str, Any]:
    return {
        "measured": measured,
        "links": [{"from": a, "to": b, **asdict(link)} for (a, b), link in links.items()],
        "plans": [
            {
                "samples_per_s": row.plan.samples_per_s,
                "machines": row.plan.machines,
                "workers": row.plan.workers,
                "server": row.plan.server,
                **row.plan.choice._asdict(),
                "steps": row.plan.steps,
                "compute_s": row.plan.compute_s,
                "exchange_s": row.plan.exchange_s,
                "sentence": row.sentence,
            }
            for row in rows
        ],
        "command": command,
    }
