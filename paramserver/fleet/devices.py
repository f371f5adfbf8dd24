"""`make doctor` on a machine that names no others: what its own devices can do.

The work is done by `workers.builtin.devices`, in a process of its own: a device may take a whole
process with it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import Any

from paramserver import __version__, terminal
from paramserver.errors import UserError
from paramserver.program import command
from paramserver.typed import typed

LIMIT_S = 600.0


def look(*, as_json: bool) -> int:
    """Try each device, and print a table; returns 1 where something is wrong."""
    try:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            "PyTorch is not installed here, so no device can be tried",
            "make setup installs it; to look at other machines: "
            + typed("doctor", "hosts=mini1,mini2"),
        ) from None
    if not as_json:
        terminal.say("trying each device of this machine, by itself and through a server ...")
    found, problem = _tried()
    from paramserver.fleet import health  # it takes numpy, which not every machine has

    tested = health.memory()
    head = {
        "paramserver": __version__,
        **versions,
        "python": platform.python_version(),
        "system": _system(),
    }
    if as_json:
        told = {"versions": head, "devices": found, "problem": problem, "memory": tested}
        terminal.result(json.dumps(told, indent=2))
    else:
        terminal.result(f"{table(head, found, problem)}\n{_memory(tested)}")
    return int(bool(problem or tested["wrong"]) or any(one["problem"] for one in found))


def _tried() -> tuple[list[dict[str, Any]], str]:
    """What came of each device, and what ended the process that tried them, if anything did."""
    try:
        done = subprocess.run(
            command("workers.builtin.devices"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], f"it took longer than {LIMIT_S:g} s"
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and found:
        return found, ""
    last = done.stderr.strip().splitlines()[-1:] or ["it did not say why"]
    return found, f"it ended with exit code {done.returncode}: {last[0]}"


def _memory(tested: dict[str, Any]) -> str:
    """What came of the memory, as a line."""
    size, wrong = f"{tested['bytes'] >> 20} MiB", tested["wrong"]
    if wrong:
        return f"memory: BROKEN, {wrong:,} bytes of {size} do not read back as they were written"
    return f"memory: {size} read back as written"


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}, {platform.machine()}"
    return f"{platform.system()} {platform.release()}, {platform.machine()}"


def table(head: dict[str, str], found: list[dict[str, Any]], problem: str) -> str:
    """The text to paste into a bug report, at most 80 columns."""
    lines = [", ".join(f"{name} {version}" for name, version in list(head.items())[:-2])]
    lines += [f"Python {head['python']}, {head['system']}", ""]
    lines += [f"{'device':<7} {'step':>9} {'exchange':>10}   {'loss':<14} {'off by':>8}  result"]
    for one in found:
        figures = f"{'':>9} {'':>10}   {'':<14} {'':>8}"
        if one["step_ms"] is not None:
            loss = f"{one['first']:.2f} to {one['last']:.3f}"
            off = max(one["off"], one["off_exchanged"])
            figures = f"{one['step_ms']:>6.2f} ms {one['exchange_ms']:>7.2f} ms   "
            figures += f"{loss:<14} {100 * off:>6.2f} %"
        lines.append(f"{one['device']:<7} {figures}  {'WRONG' if one['problem'] else 'right'}")
    lines += ["", *(f"{one['device']}: {one['name']}" for one in found)]
    lines += [f"{one['device']}: {one['problem']}" for one in found if one["problem"]]
    lines += [problem] if problem else []
    return "\n".join(lines)
