"""The commands that a person types for our programs: `make server` in a clone, `paramserver-server`
where the package is installed without one."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_CLONE = (ROOT / "Makefile").is_file()
_INSTALLED = {
    "server": "paramserver-server",
    "worker": "paramserver-worker",
    "keys": "paramserver-keys",
    "watch": "python -m paramserver.watch",
    "runs": "python -m paramserver.runs",
}
_OF_MAKE = {"hosts": "HOSTS", "id": "ID", "join": "JOIN", "rotate": "ROTATE"}


def typed(program: str, *words: str, clone: bool = IN_CLONE) -> str:
    """The command line of this program (server, worker, keys, or a word of the launcher) with these
    words, as the program itself takes them: "id=2", "--fix"."""
    if not clone:
        start = _INSTALLED.get(program, f"python -m paramserver.launch {program}")
        return " ".join((start, *words))
    told = []
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            told.append(f"ARGS={word}")
            continue
        own = _OF_MAKE.get(name)
        told.append(f"{own}={value if equals else 1}" if own else word)
    return " ".join(("make", program, *told))


def printing_token(hosts: str, port: int, *, of: str = "port") -> str:
    """The command that prints the token of a server at this address, or these with commas. `of`: of
    which port that is, "watch_port" for the one where it is watched."""
    return typed("keys", f"host_ip={hosts}", f"{of}={port}")


def installing(command: str, *, own: bool = Path(sys.prefix) == ROOT / ".venv") -> str:
    """A `pip install ...`, as it is typed in a clone whose own environment this is: that has uv,
    and perhaps no pip."""
    return f".venv/bin/uv {command}" if own else command
