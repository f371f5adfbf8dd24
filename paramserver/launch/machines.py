"""The commands for a cluster of many machines (`paramserver.fleet`): up, status, logs, attach,
fetch, down, doctor, plan. Each imports only what it needs, since a person waits for the answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

from paramserver.errors import UserError
from paramserver.settings import Settings

COMMANDS = ("up", "status", "logs", "attach", "fetch", "down", "doctor", "plan")
OPTIONS = {
    "up": ["--dry", "--script="],
    "logs": ["--host="],
    "attach": ["--host="],
    "doctor": ["--json", "--fix"],
    "plan": ["--json"],
}


def on_machines(command: str, words: list[str]) -> Callable[[], int]:
    """What carries out one of `COMMANDS` with these words (options like --dry, settings, and behind
    a -- the words for a script) and returns the exit code. It needs no more imports, which a
    Ctrl-C should not interrupt. Raises `UserError`."""
    words, behind = behind_dashes(words)
    known = OPTIONS.get(command, [])
    options = [word for word in words if word.startswith("--")]
    for option in options:
        if option.partition("=")[0] + "=" * ("=" in option) not in known:
            raise UserError(f"{command} knows no option {option}", ", ".join(known))
    settings = [word for word in words if word not in options]
    named = [word.partition("=")[2] for word in options if word.startswith("--script=")]
    if behind and not named:
        raise UserError(
            f"{command} has nothing that takes the words behind --: {' '.join(behind)}",
            "make up SCRIPT=train.py ARGS='--lr 0.1' gives them to your script",
        )
    if command == "up":
        from paramserver.fleet.up import job, up
        from paramserver.fleet.user_code import Script

        own = Script.find(named[-1], behind) if named else None
        wanted = job(settings, own)
        _check_beforehand(wanted.settings)
        return partial(up, wanted, settings, dry="--dry" in options)
    if command == "fetch":
        from paramserver.fleet.fetch import fetch

        return partial(fetch, settings)
    if command == "doctor":
        from paramserver.fleet.doctor import doctor

        return partial(doctor, settings, as_json="--json" in options, fix="--fix" in options)
    if command == "plan":
        from paramserver.fleet.planning import plan_for
        from paramserver.fleet.processes import machines_if_any

        _check_beforehand(machines_if_any(settings)[0])
        return partial(plan_for, settings, as_json="--json" in options)
    if command == "attach":
        from paramserver.fleet.attach import attach

        host = options[-1].partition("=")[2] if options else None
        return lambda: attach(settings, host) or 0
    from paramserver.fleet import processes

    if command == "logs":
        host = options[-1].partition("=")[2] if options else None
        return lambda: processes.logs(settings, host) or 0
    return partial({"status": processes.status, "down": processes.down}[command], settings)


def _check_beforehand(settings: Settings) -> None:
    """Raise `UserError` for what the settings name that cannot be, before anything is copied or
    another machine is asked."""
    if settings.observer:  # without it these names are free for a script to read
        from paramserver import workers_package

        beforehand = import_module(f"{workers_package().__name__}.builtin.beforehand")
        beforehand.check_for_others(settings)


def behind_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the word `--`."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
