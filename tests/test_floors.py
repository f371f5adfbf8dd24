"""The floors of the house: imports go down only, and what must stay in one place stays there.

The sources are read, not imported, so a forbidden import is found wherever it hides: in a function,
behind `TYPE_CHECKING`, in a branch that no test runs.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parent.parent
PACKAGES = ("paramserver", "workers")

FLOORS = {
    4: "paramserver.__main__ paramserver.config paramserver.display paramserver.keys "
    "paramserver.actor paramserver.launch paramserver.onray paramserver.fleet.agent "
    "paramserver.fleet.doctor paramserver.fleet.up paramserver.fleet.watch "
    "workers.__main__ workers.observe workers.train",
    3: "paramserver.curves paramserver.runfolder paramserver.server "
    "workers workers.alone workers.buffers workers.checkpoint workers.checks workers.client "
    "workers.cluster workers.connection workers.gradients workers.logbook workers.recipe "
    "workers.replica workers.resume workers.snapshot workers.travel",
    2: "paramserver.fleet.keeper paramserver.fleet.machine paramserver.fleet.remote "
    "paramserver.fleet.speed paramserver.fleet.figures paramserver.address paramserver.arena "
    "paramserver.discover paramserver.drafts paramserver.folders paramserver.gate "
    "paramserver.memory "
    "paramserver.stored paramserver.tether paramserver.sockets workers.data workers.models "
    "workers.looks workers.named workers.own_code workers.own_data workers.samples",
    1: "paramserver.bucket paramserver.codec paramserver.feedback paramserver.mean "
    "paramserver.order paramserver.whole workers.state workers.weight",
    0: "paramserver.fleet paramserver.fleet.carry paramserver.fleet.hosts "
    "paramserver.fleet.interfaces paramserver.fleet.findings paramserver.fleet.plan "
    "paramserver.fleet.topology "
    "paramserver paramserver.comeback paramserver.departures paramserver.digests "
    "paramserver.effects "
    "paramserver.errors paramserver.jointoken paramserver.ledger paramserver.looks "
    "paramserver.members "
    "paramserver.norms paramserver.paths paramserver.problems paramserver.rounds "
    "paramserver.sentences "
    "paramserver.schema paramserver.settings paramserver.trace paramserver.wire workers.follow "
    "workers.pace workers.placed "
    "paramserver.terminal paramserver.words",
}
"""Programs, compose, I/O, math, meaning. `paramserver` and `workers` stand for their `__init__`, a
package inside them for all its modules (so a new codec needs no row)."""

FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules.split()}

UNSAFE = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that run code out of data."""


def floor(module: str) -> int | None:
    """The floor of one of our modules, None if the table does not have it."""
    if module in FLOOR_OF:
        return FLOOR_OF[module]
    package = module.rpartition(".")[0]
    return None if package in PACKAGES or not package else floor(package)


def sources() -> dict[str, str]:
    """Source text by module name, of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((CLONE / package).rglob("*.py")):
            parts = path.relative_to(CLONE).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imports(module: str, tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) for everything imported; `from package import module` names the module."""
    is_package = any(name.startswith(f"{module}.") for name in known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                ancestors = module.split(".")[: -node.level + is_package or None]
                base = ".".join([*ancestors, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base


def faults(module: str, source: str, known: set[str]) -> list[str]:
    """What in this module breaks the rules, one sentence each; empty if nothing does."""
    here = floor(module)
    if here is None:
        return [
            f"{module} has no floor: add it to FLOORS in tests/test_floors.py, where it belongs"
        ]
    tree = ast.parse(source)
    found = []

    for line, target in imports(module, tree, known):
        top = target.partition(".")[0]
        there = floor(target) if top in PACKAGES else None
        if there is not None and there > here:
            found.append(f"{module}:{line} (floor {here}) imports {target} (floor {there})")
        if module.startswith("paramserver") and top == "workers":
            found.append(f"{module}:{line} imports {target}: paramserver knows nothing of workers")
        if here == 0 and top not in {*sys.stdlib_module_names, "msgspec", *PACKAGES}:
            found.append(f"{module}:{line} (floor 0) imports {target}")
        if top == "omegaconf" and module != "paramserver.config":
            found.append(f"{module}:{line} imports omegaconf: only paramserver.config sees it")
        if top in UNSAFE:
            found.append(f"{module}:{line} imports {target}: no pickle, it runs what it reads")

    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call, line = ast.unparse(node.func), node.lineno
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if makes_zmq(call) and module != "paramserver.sockets":
                found.append(f"{module}:{line} calls {call}: only paramserver.sockets does that")
            if call.endswith("torch.load") and given.get("weights_only") != "True":
                found.append(f"{module}:{line} calls {call} without weights_only=True")
            if given.get("allow_pickle", "False") != "False":
                found.append(f"{module}:{line} calls {call} with allow_pickle")
    return found


def makes_zmq(call: str) -> bool:
    """Whether this called expression makes a ZeroMQ context or socket."""
    if re.match(r"(zmq\.(\w+\.)*)?(Context|Socket)\b", call):
        return True
    return call.endswith(".socket") and call != "socket.socket"


SOURCES = sources()


@pytest.mark.parametrize("module", SOURCES)
def test_rules_are_kept(module: str) -> None:
    found = faults(module, SOURCES[module], set(SOURCES))
    assert not found, "\n".join(found)


def test_every_row_has_its_file() -> None:
    assert set(FLOOR_OF) - set(SOURCES) == set()


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("paramserver.wire", "import paramserver.server", "(floor 0) imports paramserver.server"),
        ("paramserver.wire", "from paramserver import server", "imports paramserver.server"),
        ("paramserver.wire", "from . import server", "imports paramserver.server"),
        ("paramserver.codec", "from ..server import Server", "imports paramserver.server"),
        ("paramserver.codec.new", "from ..server import Server", "imports paramserver.server"),
        ("paramserver.mean", "def f():\n    import paramserver.server", "mean:2 (floor 1)"),
        ("workers.follow", "import workers", "imports workers (floor 3)"),
        ("workers.replica", "from workers.train import train", "imports workers.train (floor 4)"),
        ("paramserver.launch", "from workers import join", "knows nothing of workers"),
        ("paramserver.rounds", "import torch", "(floor 0) imports torch"),
        ("workers.train", "import omegaconf", "only paramserver.config"),
        ("workers.client", "import zmq\nzmq.Context()", "client:2 calls zmq.Context"),
        ("workers.client", "zmq.Context.instance()", "only paramserver.sockets"),
        ("workers.client", "zmq.asyncio.Context()", "only paramserver.sockets"),
        ("workers.client", "zmq.Context[zmq.Socket[bytes]]()", "only paramserver.sockets"),
        ("workers.client", "from zmq import Context\nContext()", "only paramserver.sockets"),
        ("workers.client", "self.context.socket(zmq.SUB)", "calls self.context.socket"),
        ("workers.checkpoint", "from pickle import loads", "no pickle"),
        ("workers.checkpoint", "torch.load(path)", "without weights_only=True"),
        ("workers.checkpoint", "torch.load(path, weights_only=False)", "without weights_only=True"),
        ("workers.data", "np.load(path, allow_pickle=True)", "with allow_pickle"),
        ("workers.brand_new", "", "add it to FLOORS"),
        ("paramserver.brand_new", "", "add it to FLOORS"),
    ],
)
def test_a_break_of_the_rules_is_found(module: str, source: str, complaint: str) -> None:
    known = {*FLOOR_OF, "paramserver.codec.float32"}
    assert complaint in "\n".join(faults(module, source, known))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("paramserver.wire", "import json, msgspec\nfrom paramserver.errors import PeerError"),
        ("paramserver.codec.new", "import torch\nfrom .float32 import Float32"),
        ("paramserver.codec", "from .float32 import Float32"),
        ("workers.train", "from paramserver import __version__, config"),
        ("workers.cluster", "import socket\nsocket.socket()\nsockets.connect()"),
        ("paramserver.server", "def run(context: zmq.Context[zmq.Socket[bytes]]) -> None: ..."),
        ("paramserver.sockets", "zmq.Context().socket(zmq.PUB)"),
        ("paramserver.config", "from omegaconf import OmegaConf"),
        ("workers.checkpoint", "torch.load(path, weights_only=True)"),
    ],
)
def test_what_keeps_the_rules_is_let_through(module: str, source: str) -> None:
    assert faults(module, source, {*FLOOR_OF, "paramserver.codec.float32"}) == []
