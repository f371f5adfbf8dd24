"""Everything that reads from a socket or a file, given bytes that libFuzzer makes up.

    make fuzz MINUTES=10              all of it, for so long together, ending in a table
    make fuzz ARGS='--only server'    one target; `--input FILE` repeats what a crash has left

Atheris sees which branches of the project's code an input takes, and breeds those that take new
ones. Whatever is not the error that is meant for bad input is a crash, and so is a process that
grows beyond a gigabyte or stands still. Takes Linux, and `pip install -e '.[fuzz]'`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

try:
    import atheris
except ImportError:
    sys.exit("error: atheris is not installed\n  .venv/bin/uv pip install -e '.[fuzz]'")

BECOME = "--become"
"""What makes this program one target: its imports are what libFuzzer watches."""

with (
    atheris.instrument_imports(include=["paramserver", "workers"])
    if BECOME in sys.argv
    else nullcontext()
):
    import msgspec
    import torch
    import zmq
    from whole import LOOPBACK, free_port

    from paramserver.config.loading import from_wire, load, to_wire
    from paramserver.errors import PeerError, UserError
    from paramserver.keys import Keys
    from paramserver.net import jointoken
    from paramserver.output import runfolder
    from paramserver.output.runfolder import RunFolder
    from paramserver.protocol import messages as wire
    from paramserver.server.control import Control
    from paramserver.server.server import Server
    from paramserver.settings import Settings
    from paramserver.status.value import Machine, Status, from_json, to_json
    from paramserver.tensors.codec import CODECS
    from paramserver.watch.screen import View, drawn
    from workers.builtin import models, registry
    from workers.builtin.own_code import NOTHING
    from workers.link.connection import Connection
    from workers.replica import checkpoint
    from workers.replica.replica import Replica
    from workers.replica.state import flatten, unflatten

MEMORY_MB = 1500
STANDSTILL_S = 20
LONGEST = 4096
CRASHES = "runs/fuzz"
LAYOUT = wire.Layout((wire.Tensor("w", (3, 5), "float32"), wire.Tensor("b", (3,), "float32")))
HELLO = wire.Hello(protocol=wire.PROTOCOL, role="worker", id=None, nonce="n", host="h", pid=1)
TOLD = to_wire(Settings())
CUT = b"\0\0"
"""Between the frames of an input."""


class Quiet:
    """Looks on and says nothing."""

    def say(self, text: str, warning: bool = False) -> None: ...
    def closing(self, control: Control, close: wire.Close) -> None: ...
    def closed(self, control: Control, close: wire.Close) -> None: ...
    def reported(self, control: Control, report: wire.Report) -> None: ...
    def problem(self, text: str) -> None: ...
    def looked(self, control: Control, now: float) -> None: ...


class Received:
    """All that a server receives: from one worker in the middle of its training, and a stranger."""

    def __init__(self) -> None:
        self.server: Server | None = None
        self.session = ""
        self.count = 0

    def __call__(self, content: bytes) -> None:
        self.count += 1
        if self.server is None or self.count % 1000 == 0:
            self.begin()
        elif self.session not in self.server.rounds.peers:
            self.join(self.server)
        assert self.server is not None
        if self.server.rounds.round is None:  # its log went on, or the run has ended
            self.begin()
        sender, *frames = content.split(CUT)
        for old, new in ((b"SESSION", self.session), (b"ROUND", str(self.server.rounds.step + 1))):
            frames = [frame.replace(old, new.encode()) for frame in frames]
        self.receive(b"stranger" if sender == b"s" else b"link", *frames)

    def begin(self) -> None:
        if self.server is not None:
            self.server.close()
        settings = Settings(
            port=free_port(), observer=False, num_workers=1, bucket_mb=0.001, history_mb=1
        )
        self.server = server = Server(
            settings, to_wire(settings), Quiet(), hosts=[LOOPBACK], run="r", observer_key="key"
        )
        self.join(server)
        assert server.rounds.round is not None, "the worker has no round to take part in"

    def join(self, server: Server) -> None:
        self.receive(b"door", *wire.to_frames(HELLO))
        self.session = next((s for s, d in server.control.doors.items() if d == b"door"), "")
        for message in JOINING:
            header = wire.to_frames(message)[0]
            self.receive(b"link", header.replace(b"SESSION", self.session.encode()))

    def receive(self, sender: bytes, *frames: bytes) -> None:
        assert self.server is not None
        self.server._receive([zmq.Frame(sender), *map(zmq.Frame, frames)])


def from_file(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], None]:
    """A target that reads a file of this name."""
    path = Path(tempfile.mkdtemp(prefix="fuzz-")) / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def target(content: bytes) -> None:
        path.write_bytes(content)
        with suppress(UserError):
            read(path)

    return target


def tree(content: bytes) -> None:
    with suppress(ValueError):
        unflatten(content.decode(errors="replace"), [torch.zeros(1)] * 3)


def told(content: bytes) -> None:
    """The settings that a server sends."""
    with suppress(UserError, ValueError):
        from_wire(Settings(), TOLD | dict(msgspec.json.decode(content)))


class Welcomed:
    """What a server says first: refused, or settings that a worker can use."""

    def __init__(self) -> None:
        self.peer = Connection(LOOPBACK, 1)

    def __call__(self, content: bytes) -> None:
        with suppress(UserError, PeerError):
            message = wire.from_frames([content])[0]
            if isinstance(message, wire.Welcome):
                found = self.peer._checked(message)
                assert "/" not in message.session and found.bucket_mb is not None


def name(content: bytes) -> None:
    """A name that a server sends: a row of ours, or refused. Nothing is imported."""
    before = set(sys.modules)
    with suppress(UserError):
        text = content.decode(errors="replace")
        registry.find("model.type", text, models.MODELS, torch.nn.Module, "a module", NOTHING)
    assert set(sys.modules) == before


def token(content: bytes) -> None:
    with suppress(UserError):
        jointoken.decode(content.decode(errors="replace"))


def status(content: bytes) -> None:
    """What a watcher takes for a status can be drawn, and nothing in it moves a cursor."""
    with suppress(PeerError):
        for line in drawn(from_json(content), View(), 80, 24):
            assert line.plain.isprintable()


def payload(content: bytes) -> None:
    """What `fits` lets pass can be decoded."""
    kind, *buffers = content.split(CUT)
    codec = CODECS[sorted(CODECS)[len(kind) % len(CODECS)]]
    views = [memoryview(bytearray(b)) for b in buffers]
    if codec.fits(15, views) is None:
        assert codec.decode(views, 1.0, torch.zeros(15)).numel() == 15


def record(path: Path) -> None:
    found = runfolder.unended(path.parent.parent, 65432, {})
    if found is not None:
        found.folder.close()


JOINING: list[wire.Message] = [
    wire.Probe(session="SESSION"),
    wire.Join(layout=LAYOUT, step=0, lineage="x", device="cpu"),
    wire.Ready(samples=64, batch_size=8),
]
OTHERS: list[wire.Message] = [
    HELLO,
    wire.Beat(session="SESSION"),
    wire.Unready(),
    wire.Evaluating(True),
    wire.StopRun("no better for three epochs"),
    wire.Fetch(step=0, lineage="x"),
    wire.Digest(step=0, digest="0"),
    wire.Stand(step=0),
    wire.Manifest(snapshot=1, step=0, lineage="x", tree="{}", tensors=(), piece_bytes=4),
    wire.Want(snapshot=1, piece=0),
    wire.Piece(snapshot=1, piece=0),
    wire.Adopted(snapshot=1, step=0, lineage="x"),
    wire.Abort(snapshot=1, reason=""),
    wire.Report(step=0, values={"val_loss": 0.5}),
    wire.Problem("the disk is full"),
    wire.Goodbye(reason="", step=0, digest="0"),
]
PUSH = wire.to_frames(wire.Push(round=1, bucket=0, samples=8))[0].replace(b":1,", b":ROUND,", 1)


def seeds(target: str, folder: Path) -> list[bytes]:
    """What should be understood, to begin with."""
    if target == "received":
        headers = [wire.to_frames(message)[0] for message in (*JOINING, *OTHERS)]
        made = [CUT.join((b"l", header)) for header in headers]
        return [*made, CUT.join((b"l", PUSH, bytes(range(1, 73)))), CUT.join((b"s", PUSH))]
    if target in ("checkpoint", "tree"):
        model = torch.nn.Linear(3, 2)
        replica = Replica(
            model, torch.optim.Adam(model.parameters()), bucket_mb=1.0, codec="float32"
        )
        if target == "tree":
            return [flatten(replica.state())[0].encode()]
        path = folder / "step-00000001.safetensors"
        checkpoint.save(path, replica, "run", {"learning_rate": 0.001})
        return [path.read_bytes()]
    return {
        "told": [msgspec.json.encode(TOLD), b'{"bucket_mb":0.5,"model":{"type":"CNN","width":4}}'],
        "welcome": wire.to_frames(
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run="r",
                nonce="n",
                session="s",
                id=1,
                settings=TOLD,
                pub_port=1,
            )
        ),
        "names": [
            b"CNN",
            b"torch.fx.graph_module:reduce_graph_module",
            b"os:system",
            b"fuzz:Quiet",
        ],
        "token": [Keys.new().token(LOOPBACK, 65432).encode()],
        "status": [to_json(Status(run="r", made_at=1.0, machines=(Machine(id=1, host="h"),)))],
        "payload": [CUT.join((b"x" * n, bytes(60), bytes(4))) for n in range(len(CODECS))],
        "run.json": [b'{"run":"r","host":"h","port":65432,"settings":{}}'],
        "metrics": [b'{"step":1,"samples":8,"late":[]}\n'],
        "settings": [b"model:\n  type: simplenn\n  hidden: 16\nport: 65432\n"],
    }[target]


def targets() -> dict[str, Callable[[], Callable[[bytes], None]]]:
    """By name, how to make each one."""
    run = "runs/2026-11-22_12-00-09"
    return {
        "received": Received,
        "payload": lambda: payload,
        "token": lambda: token,
        "status": lambda: status,
        "tree": lambda: tree,
        "told": lambda: told,
        "welcome": Welcomed,
        "names": lambda: name,
        "checkpoint": lambda: from_file("step-00000001.safetensors", checkpoint.load),
        "run.json": lambda: from_file(f"{run}/run.json", record),
        "metrics": lambda: from_file(
            f"{run}/metrics.jsonl", lambda path: RunFolder(path.parent).take_up()
        ),
        "settings": lambda: from_file(
            "cluster.yaml", lambda path: load([f"cluster={path}"], "server")
        ),
    }


def fuzz(target: str, arguments: Sequence[str]) -> None:
    """Become libFuzzer."""
    torch.set_num_threads(1)
    atheris.Setup([target, *arguments], targets()[target]())
    atheris.Fuzz()


def work(target: str, seconds: int, corpus: Path) -> tuple[str, bool]:
    """One target for a time, in a process of its own: its result, and whether it is well."""
    corpus.mkdir()
    Path(CRASHES).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for number, seed in enumerate(seeds(target, Path(name))):
            (corpus / f"seed-{number}").write_bytes(seed)
    done = subprocess.run(
        [
            sys.executable, "-m", "fuzz", BECOME, target, str(corpus),
            f"-max_total_time={seconds}", f"-max_len={LONGEST}", f"-rss_limit_mb={MEMORY_MB}",
            f"-timeout={STANDSTILL_S}", f"-artifact_prefix={CRASHES}/{target}-",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    finished = re.search(r"Done (\d+) runs in (\d+) second", done.stdout)
    if done.returncode or finished is None:
        return "\n".join(done.stdout.splitlines()[-40:]), False
    found = len(list(corpus.iterdir()))
    return (
        f"{int(finished[1]):>12,} inputs in {finished[2]} s, {found:,} of them of a new kind",
        True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's head."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="for all targets together")
    parser.add_argument("--only", choices=targets(), help="one target")
    parser.add_argument("--input", help="with --only: an input that a crash has left")
    parser.add_argument(BECOME, nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.become:
        fuzz(args.become[0], args.become[1:])
    if args.input:
        fuzz(args.only, [args.input])
    chosen = [args.only] if args.only else list(targets())
    well = True
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for target in chosen:
            seconds = max(1, round(60 * args.minutes / len(chosen)))
            told, fine = work(target, seconds, Path(folder) / target)
            well &= fine
            print(f"  {target:<12}{told}", flush=True)
    print("nothing but the errors that are meant" if well else "CRASHED: see above")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
