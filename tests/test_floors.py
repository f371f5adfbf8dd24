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

ROOMS = [
    "paramserver.errors paramserver.words paramserver.trace paramserver.ranges paramserver "
    "paramserver.run_module paramserver.typed paramserver.unfit paramserver.units",
    "paramserver.locks paramserver.drafts",
    "paramserver.terminal paramserver.notify paramserver.logs",
    "paramserver.program",
    "paramserver.protocol",
    "paramserver.wire",
    "paramserver.settings",
    "paramserver.rounds",
    "paramserver.status",
    "paramserver.tensors",
    "paramserver.transport",
    "paramserver.net",
    "paramserver.config",
    "paramserver.output",
    "paramserver.keys paramserver.runs",
    "paramserver.fleet",
    "paramserver.watch",
    "paramserver.page",
    "paramserver.server",
    "paramserver.shard",
    "paramserver.launch",
    "paramserver.__main__",
    "workers.replica",
    "workers.generators",
    "workers.draws",
    "workers.loaders",
    "workers.samples workers.weight workers.lengths",
    "workers.looks workers.optimizer workers.batches",
    "workers.link",
    "workers.by_hand workers.contribution workers.local_rounds workers.turns",
    "workers.cluster workers.living",
    "workers",
    "workers.builtin",
    "workers.data workers.models workers.recipe",
    "workers.observer",
    "workers.__main__",
]
"""From the ground up: a module imports its own room and those below. A folder stands for all that
is in it, `paramserver` and `workers` for their `__init__`."""

FLOOR_OF = {name: floor for floor, names in enumerate(ROOMS) for name in names.split()}

PURE = [
    "paramserver.errors",
    "paramserver.words",
    "paramserver.typed",
    "paramserver.trace",
    "paramserver.ranges",
    "paramserver.units",
    "paramserver.settings",
    "paramserver",
    "paramserver.run_module",
    "paramserver.unfit",
    "paramserver.protocol",
    "paramserver.rounds",
    "paramserver.status",
    "paramserver.config.schema",
    "paramserver.config.page",
    "paramserver.net.hosts",
    "paramserver.net.interfaces",
    "paramserver.net.jointoken",
    "paramserver.net.link_watch",
    "paramserver.fleet.commands",
    "paramserver.fleet.findings",
    "paramserver.fleet.plan",
    "paramserver.fleet.plan_watch",
    "paramserver.fleet.topology",
    "paramserver.fleet.user_code",
    "paramserver.output.problems",
    "paramserver.output.thinned",
    "paramserver.page.guard",
    "paramserver.server.control",
    "paramserver.server.held",
    "paramserver.server.history",
    "paramserver.server.overview",
    "paramserver.server.spread",
    "paramserver.server.traffic",
    "paramserver.shard.adder",
    "paramserver.shard.orders",
    "workers.link.actions",
    "workers.link.environment",
    "workers.link.follow",
    "workers.link.session",
]
"""What knows no torch and no socket: the standard library and msgspec do."""

UNSAFE = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules that run code out of data."""


def floor(module: str) -> int | None:
    """The floor of one of our modules, None if the table does not have it."""
    if module in FLOOR_OF:
        return FLOOR_OF[module]
    package = module.rpartition(".")[0]
    return None if package in PACKAGES or not package else floor(package)


def pure(module: str) -> bool:
    """Is it this module, or a folder that it is in, that shall be pure?"""
    if module in PURE:
        return True
    package = module.rpartition(".")[0]
    return package not in PACKAGES and package != "" and pure(package)


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
        return [f"{module} is in no room: move it, or add it to ROOMS in tests/test_floors.py"]
    tree = ast.parse(source)
    found = []

    for line, target in imports(module, tree, known):
        top = target.partition(".")[0]
        there = floor(target) if top in PACKAGES else None
        if there is not None and there > here:
            found.append(f"{module}:{line} imports {target}, which is above it")
        if module.startswith("paramserver") and top == "workers":
            found.append(f"{module}:{line} imports {target}: paramserver knows nothing of workers")
        if pure(module) and top not in {*sys.stdlib_module_names, "msgspec", *PACKAGES}:
            found.append(f"{module}:{line} imports {target}, and is to be pure")
        if pure(module) and top in PACKAGES and not pure(target):
            found.append(f"{module}:{line} imports {target}: that is not pure, {module} is to be")
        if top == "omegaconf" and module != "paramserver.config.loading":
            found.append(
                f"{module}:{line} imports omegaconf: only paramserver.config.loading sees it"
            )
        if top in UNSAFE:
            found.append(f"{module}:{line} imports {target}: no pickle, it runs what it reads")

    for node in ast.walk(tree):
        full = isinstance(node, ast.ImportFrom) and not node.level and str(node.module)
        if full and module.startswith("workers") and full.partition(".")[0] == "workers":
            found.append(
                f"{module} imports {full} by its full name, which may be another's beside a script:"
                " from . import"
            )
        if isinstance(node, ast.Call):
            call, line = ast.unparse(node.func), node.lineno
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if makes_zmq(call) and module != "paramserver.transport.sockets":
                found.append(
                    f"{module}:{line} calls {call}: only paramserver.transport.sockets does that"
                )
            if re.fullmatch(r"(fcntl\.)?(flock|lockf)", call) and module != "paramserver.locks":
                found.append(f"{module}:{line} calls {call}: only paramserver.locks does that")
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


WIRE, SOCKETS = "paramserver.protocol.messages", "paramserver.transport.sockets"
SERVER, CLIENT = "paramserver.server.server", "workers.link.client"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        (WIRE, "import paramserver.server.server", "imports paramserver.server.server, which is"),
        (WIRE, "from paramserver.server import server", "imports paramserver.server.server"),
        (WIRE, "from ..server import server", "imports paramserver.server.server"),
        (
            "paramserver.tensors.codec",
            "from ...server import x",
            "imports paramserver.server, which",
        ),
        ("paramserver.tensors.codec.new", "from ...server import x", "imports paramserver.server"),
        (
            "paramserver.tensors.reducer",
            "def f():\n    import paramserver.server",
            "reducer:2 imports",
        ),
        ("workers.link.follow", "import workers", "imports workers, which is above it"),
        (
            "workers.replica.replica",
            "from workers.builtin import train",
            "workers.builtin.train, which",
        ),
        ("paramserver.launch.local", "from workers import join", "knows nothing of workers"),
        ("paramserver.rounds.coordinator", "import torch", "imports torch, and is to be pure"),
        ("workers.link.follow", "import zmq", "imports zmq, and is to be pure"),
        ("paramserver.server.control", "import paramserver.server.data", "data: that is not pure"),
        ("workers.builtin.train", "import omegaconf", "only paramserver.config.loading"),
        (CLIENT, "import zmq\nzmq.Context()", "client:2 calls zmq.Context"),
        (CLIENT, "zmq.Context.instance()", "only paramserver.transport.sockets"),
        (CLIENT, "zmq.asyncio.Context()", "only paramserver.transport.sockets"),
        (CLIENT, "zmq.Context[zmq.Socket[bytes]]()", "only paramserver.transport.sockets"),
        (CLIENT, "from zmq import Context\nContext()", "only paramserver.transport.sockets"),
        (CLIENT, "self.context.socket(zmq.SUB)", "calls self.context.socket"),
        ("workers.replica.checkpoint", "from pickle import loads", "no pickle"),
        ("workers.replica.checkpoint", "torch.load(path)", "without weights_only=True"),
        ("workers.replica.state", "torch.load(p, weights_only=False)", "without weights_only=True"),
        ("workers.builtin.data", "np.load(path, allow_pickle=True)", "with allow_pickle"),
        ("paramserver.drafts", "fcntl.flock(fd, 2)", "only paramserver.locks does that"),
        ("workers.cluster", "from workers.samples import Samples", "by its full name, which may"),
        ("workers.brand_new", "", "add it to ROOMS"),
        ("paramserver.brand_new", "", "add it to ROOMS"),
        ("paramserver.brand.new", "", "add it to ROOMS"),
    ],
)
def test_a_break_of_the_rules_is_found(module: str, source: str, complaint: str) -> None:
    known = {*SOURCES, *FLOOR_OF}
    assert complaint in "\n".join(faults(module, source, known))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (WIRE, "import json, msgspec\nfrom paramserver.errors import PeerError"),
        ("paramserver.tensors.codec.new", "import torch\nfrom .float32 import Float32"),
        ("paramserver.tensors.codec", "from .float32 import Float32"),
        (
            "workers.builtin.train",
            "from paramserver import __version__\nfrom paramserver import config",
        ),
        ("workers.cluster", "import socket\nsocket.socket()\nsockets.connect()"),
        ("workers.cluster", "from .samples import Samples"),
        (SERVER, "def run(context: zmq.Context[zmq.Socket[bytes]]) -> None: ..."),
        (SOCKETS, "zmq.Context().socket(zmq.PUB)"),
        ("paramserver.config.loading", "from omegaconf import OmegaConf"),
        ("workers.replica.checkpoint", "torch.load(path, weights_only=True)"),
        ("paramserver.locks", "fcntl.flock(fd, 2)"),
    ],
)
def test_what_keeps_the_rules_is_let_through(module: str, source: str) -> None:
    assert faults(module, source, {*SOURCES, *FLOOR_OF}) == []
