"""The commands that a person types for our programs: `make server` in a clone, `paramserver-server`
where the package is installed without one."""

from __future__ import annotations

from pathlib import Path

IN_CLONE = (Path(__file__).resolve().parents[1] / "Makefile").is_file()
_INSTALLED = {
    "server": "paramserver-server",
    "worker": "paramserver-worker",
    "keys": "paramserver-keys",
}
_OF_MAKE = {"id": "ID", "join": "JOIN", "rotate": "ROTATE"}


def typed(program: str, *words: str, clone: bool = IN_CLONE) -> str:
    """The command line of this program (server, worker, keys, or a word of the launcher) with these
    words, as the program itself takes them: "id=2"."""
    if not clone:
        start = _INSTALLED.get(program, f"python -m paramserver.launch {program}")
        return " ".join((start, *words))
    told = []
    for word in words:
        name, equals, value = word.partition("=")
        own = _OF_MAKE.get(name)
        told.append(f"{own}={value if equals else 1}" if own else word)
    return " ".join(("make", program, *told))
