"""`fetch`: copies the results of a run from the server's machine to this one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paramserver.errors import UserError
from paramserver.fleet import commands, remote
from paramserver.fleet.attach import typed_too
from paramserver.fleet.lines import Lines
from paramserver.fleet.processes import machines
from paramserver.fleet.remote import Failed
from paramserver.fleet.supervisor import State
from paramserver.net.hosts import Host
from paramserver.settings import Settings
from paramserver.typed import typed

HOME = Path("runs")


def fetch(arguments: list[str]) -> int:
    """Copy the newest run's results here. Raises `UserError` where there are none."""
    settings, _, hosts = machines(arguments)
    server = next(host for host in hosts if host.serves)
    try:
        bring(Lines(hosts), settings, server)
    except Failed as e:
        raise UserError(str(e.trouble)) from None
    return 0


def tell_where(lines: Lines, settings: Settings, server: Host, arguments: Sequence[str]) -> None:
    """At the end of a run: say where its folder is; with `fetch: true`, copy the results here."""
    try:
        if settings.fetch:
            bring(lines, settings, server)
            return
        state = _server(server)
        if state is not None and state.run_folder:
            lines.tell(f"the run folder: {commands.spoken(server, state.run_folder)}")
            lines.tell(f"copy the results here: {typed('fetch')}{typed_too(arguments)}")
    except Failed as e:
        lines.tell_as_it_is(str(e.trouble))


def bring(lines: Lines, settings: Settings, server: Host) -> None:
    """Copy what there is. Raises `Failed`, and `UserError` where no run was started."""
    state = _server(server)
    if state is None or not state.run_folder:
        raise UserError(
            f"there is no run on {server.name} whose results could be copied",
            f"{typed('status')} tells how it stands there",
        )
    folder = commands.below_home(server, state.run_folder)
    last = remote.must(server, commands.last_checkpoint(server, folder), "looking for checkpoints")
    target = _here(settings, folder)
    target.mkdir(parents=True, exist_ok=True)
    copy = commands.copy_results(server, folder, str(target), last.strip())
    remote.must(server, copy, "copying the results")
    found = sorted(path for path in target.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in found) / 1e6
    names = ", ".join(str(path.relative_to(target)) for path in found)
    so_far = " so far (the run goes on)" if state.alive else ""
    lines.tell(f"{target}: the results of {commands.spoken(server, state.run_folder)}{so_far}")
    lines.tell(f"  {names or 'nothing yet'} ({size:,.1f} MB)")


def _server(server: Host) -> State | None:
    told = remote.ask(server, commands.status(server), "status")
    return next((State(**each) for each in told if each["name"] == "server"), None)


def _here(settings: Settings, folder: str) -> Path:
    """The folder for it on this machine."""
    own = Path(settings.run_dir)
    return (HOME if own.is_absolute() or settings.run_dir.startswith("~") else own) / Path(
        folder
    ).name
