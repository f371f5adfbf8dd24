"""The processes of a run on all its machines: `status`, `logs` and `down`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from rich.text import Text

from paramserver.config.loading import load
from paramserver.errors import PeerError, UserError
from paramserver.fleet import commands, remote
from paramserver.fleet.commands import Trouble
from paramserver.fleet.lines import Lines
from paramserver.fleet.supervisor import State, died
from paramserver.net import hosts as fleet
from paramserver.net.hosts import Host
from paramserver.output import figures
from paramserver.settings import Settings
from paramserver.status.value import State as Doing
from paramserver.status.value import Status, from_json
from paramserver.typed import typed
from paramserver.words import printable

LOG_LINES = 100


Named = tuple[Settings, dict[str, object], tuple[Host, ...]]


def machines_if_any(arguments: Sequence[str]) -> Named:
    """The settings, those that were typed, and the machines: those of ``hosts=a,b``, or else all
    that the file names, which may be none. Raises `UserError`."""
    typed = [word for word in arguments if re.match(r"hosts=[^\[{]", word)]
    if len(set(typed)) > 1:
        raise UserError(f"the machines are given twice: {' and '.join(typed)}", "leave one out")
    loaded = load([word for word in arguments if word not in typed], "server")
    loaded.tell_twice()
    entries = loaded.settings.hosts
    hosts = fleet.read(fleet.choose(typed[-1].partition("=")[2], entries) if typed else entries)
    return loaded.settings, loaded.given, hosts


def machines(arguments: Sequence[str]) -> Named:
    """`machines_if_any`; raises `UserError` without machines."""
    found = machines_if_any(arguments)
    if not found[2]:
        raise UserError(
            "no machines are named",
            "name them in conf/cluster.yaml:\n"
            "hosts:\n"
            "  - {name: mini1, ssh: mini1, role: both}\n"
            "  - {name: mini2, ssh: user@mini2.local}\n"
            "or with the command: HOSTS=mini1,user@mini2.local\n"
            "docs/cluster.md tells more",
        )
    return found


def only(hosts: tuple[Host, ...], name: str | None) -> tuple[Host, ...]:
    """The machine of that name, or all. Raises `UserError` for an unknown name."""
    chosen = tuple(host for host in hosts if name in (None, "", host.name))
    if not chosen:
        known = ", ".join(host.name for host in hosts)
        raise UserError(f"there is no machine {name}", f"the machines: {known}")
    return chosen


# --------------------------------------------------------------------------------------- looking


def states(
    hosts: Sequence[Host], *, hasty: bool = False, shown: bool = False
) -> tuple[dict[str, dict[str, State]], list[Trouble]]:
    """The states of the processes of each machine, by name; and the machines that do not answer.
    `shown`: with the status of the run in its server's."""

    def look(host: Host) -> dict[str, State]:
        told = remote.ask(host, commands.status(host, hasty=hasty, shown=shown), "status")
        return {each["name"]: State(**each) for each in told}

    return remote.on_all(look, hosts)


def status(arguments: list[str]) -> int:
    """Print the processes of all machines with what the run says of each, what the last minute
    waited for, and the newest warning of each process; returns 1 where a machine does not answer
    or a process failed."""
    _, _, hosts = machines(arguments)
    found, troubles = states(hosts, hasty=True, shown=True)
    rows: list[tuple[tuple[str, ...], str, str]] = []  # cells, style of the third, last words
    wrong = bool(troubles)
    warnings: list[tuple[str, str]] = []
    missing = {trouble.host: trouble for trouble in troubles}
    run = run_of(state for kept in found.values() for state in kept.values())
    for host in hosts:
        if host.name in missing:
            rows.append(((host.name, "", "not reached", "", ""), "red", ""))  # reason: below
            continue
        kept = of_last_start(found[host.name])
        if not kept:
            rows.append(((host.name, "", "nothing was started here", "", ""), "", ""))
        for process in sorted(kept, key=lambda name: (name != "server", name)):
            state = kept[process]
            wrong |= state.phase == "failed"
            warnings += [(host.name, state.warning)] if state.warning else []
            style = {"failed": "red", "running": "green"}.get(state.phase, "")
            since = f"since {datetime.fromtimestamp(state.since):%d %b %H:%M:%S}"
            again = f"started again: {state.restarts}" if state.restarts else ""
            row = (host.name, host.spoken(process), in_words(state), since, again)
            rows.append((row, style, of_run(run, host, state) or state.last))
    lines = Lines(hosts)
    widths = [max(len(cells[column]) for cells, _, _ in rows) for column in range(5)]
    for cells, style, last in rows:
        padded = [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]
        line = Text.assemble("  ".join(padded[:2]), "  ", (padded[2], style), "  ")
        line.append("  ".join(padded[3:]))
        line.rstrip()
        lines.print(line)
        if last:
            lines.print(Text(f"  {printable(last)}", style="dim"))
    if run is not None and run.diagnosis.sentence and run.trains:
        lines.tell("")
        lines.tell(run.diagnosis.sentence)
    if run is not None and run.averaging:
        lines.tell(run.averaging)
    if warnings:
        lines.tell("")
        lines.tell("the newest warnings:")
    for name, warning in warnings:
        lines.say(name, warning)
    for trouble in troubles:
        lines.tell_as_it_is(str(trouble))
    return int(wrong)


def run_of(states: Iterable[State]) -> Status | None:
    """The status of the run that goes on on the machines; None where no server shows one."""
    for state in states:
        with suppress(PeerError):  # of another version
            if state.shown:
                return from_json(state.shown.encode())
    return None


def of_run(run: Status | None, host: Host, state: State) -> str:
    """What the run says of this process; empty where it is no part of it."""
    if run is None or not state.alive:
        return ""
    if state.name == "server":
        words = [run.phase]
        if run.step:
            words += [*map(str.strip, figures.progress(run)), *figures.figures(run)]
        return ", ".join(words)
    ids = {process.name: process.id for process in host.processes}
    machine = run.machine(ids.get(state.name, 0))
    if machine is None or machine.role != "worker" or machine.state == Doing.GONE:
        return ""
    return ", ".join(figures.of_machine(machine, run)) or machine.state.value


def of_last_start(kept: Mapping[str, State]) -> dict[str, State]:
    """Without the processes that ended before the newest start there."""
    newest = max(kept.values(), key=lambda state: state.since, default=None)
    return {
        name: state
        for name, state in kept.items()
        if state.alive or newest is None or state.up == newest.up
    }


def in_words(state: State) -> str:
    """The state of a process, in a few words."""
    if state.phase == "failed":
        return f"failed ({died(state.code)})" if state.code is not None else "failed: it was killed"
    if state.phase == "running":
        return f"running for {timedelta(seconds=round(max(0.0, time.time() - state.since)))}"
    return "starts again" if state.phase == "pausing" else state.phase


def logs(arguments: list[str], name: str | None = None) -> int:
    """Print the last lines of every log; returns 1 where a machine does not answer."""
    _, _, hosts = machines(arguments)
    lines = Lines(hosts)
    chosen = only(hosts, name)
    found, troubles = states(chosen)

    def read(host: Host) -> list[str]:
        told: list[str] = []
        for kept in found.get(host.name, {}):
            text = remote.must(
                host, commands.supervisor(host, "log", kept, str(LOG_LINES)), "reading logs"
            )
            told += text.splitlines()
        return told

    texts, more = remote.on_all(read, [host for host in chosen if host.name in found])
    for host in chosen:
        for line in texts.get(host.name, []):
            lines.say(host.name, line)
    for trouble in troubles + more:
        lines.tell_as_it_is(str(trouble))
    return int(bool(troubles or more))


# ---------------------------------------------------------------------------------------- ending


def down(arguments: list[str]) -> int:
    """End the run in order, then every process that is left; returns 1 where a machine does not
    answer or a process could not be ended."""
    _, _, hosts = machines(arguments)
    lines = Lines(hosts)
    server = next(host for host in hosts if host.serves)
    others = [host for host in hosts if host != server]
    troubles = stop(lines, [server], "server")  # it ends the run for the workers, too
    troubles += stop(lines, hosts, "worker")
    troubles += stop(lines, others, "server")  # where the roles have changed
    for trouble in {trouble.host: trouble for trouble in troubles}.values():
        lines.tell_as_it_is(str(trouble))
    clean = [host.name for host in hosts if host.name not in {t.host for t in troubles}]
    if clean:
        lines.tell(f"nothing of the run is left on {', '.join(clean)}")
    return int(bool(troubles))


def stop(lines: Lines, hosts: Sequence[Host], name: str) -> list[Trouble]:
    """End the processes of that name; returns the faults."""

    def end(host: Host) -> list[Trouble]:
        answer = remote.ask(host, commands.stop(host, name), f"stopping the {name}")
        for line in answer["killed"]:
            lines.say(host.name, f"had to be killed: {line}")
        for state in answer.get("ended", [answer["state"]] if answer["ran"] else []):
            if state is not None:
                code = state["code"]
                how = "in order" if code in (0, 1) else "by force" if code is None else died(code)
                told = host.spoken(state["name"]).replace("server", "the server")
                lines.say(host.name, f"{told} has ended, {how}")
                if folder := state.get("run_folder"):
                    there = commands.spoken(host, folder)
                    lines.say(
                        host.name, f"its run folder: {there}; its results here: {typed('fetch')}"
                    )
        if answer["left"]:
            left = ", ".join(str(pid) for pid in answer["left"])
            return [Trouble(host.name, f"processes that cannot be ended: {left}")]
        return []

    told, troubles = remote.on_all(end, hosts)
    return troubles + [trouble for each in told.values() for trouble in each]


def refuse(troubles: Sequence[Trouble], what: str) -> None:
    """Raise one `UserError` with all faults, if there are any."""
    if troubles:
        raise UserError(what, "\n".join(str(trouble) for trouble in troubles))
