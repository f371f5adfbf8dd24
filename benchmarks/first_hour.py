"""`python -m benchmarks.first_hour`: what a newcomer waits for, and how much disk it takes.

The set-up of a fresh clone, with each build of PyTorch and for a machine that only looks at others;
the pages of `--help`; and, on Linux as root, `make up` on hosts that have nothing yet, to the first
step. Everything is installed with uv's cache of this machine: what comes from the network the first
time depends on the network.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.team import CLONE

PAGES = (
    ("paramserver --help", 0),
    ("paramserver lerning_rate=1", 2),
    ("workers --help", 0),
    ("paramserver.launch up --help", 0),
)
REPEATS = 9
HOSTS = ("fresh1", "fresh2")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_hour", description="what a newcomer waits for"
    )
    parts = {"help": pages, "setup": set_ups, "up": empty_hosts}
    parser.add_argument("--only", nargs="+", choices=parts, help="these parts")
    chosen = parser.parse_args(argv).only or list(parts)
    print("| what | seconds | on disk |\n|---|---|---|")
    for name in chosen:
        for what, seconds, size in parts[name]():
            print(f"| {what} | {seconds} | {size} |", flush=True)
    return 0


Row = tuple[str, str, str]


def pages() -> Iterator[Row]:
    """Pages and a mistake: the median of some starts."""
    for words, code in PAGES:
        took = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-m", *words.split()], capture_output=True)
            took.append(time.perf_counter() - start)
            assert done.returncode == code, done.stderr
        yield f"`python -m {words}`", f"{median(took):.2f}", ""


def set_ups() -> Iterator[Row]:
    """`make` in a fresh clone of what is committed here."""
    for what, word in (
        ("`make setup TORCH=cuda`", "setup TORCH=cuda"),
        ("`make setup TORCH=cpu`", "setup TORCH=cpu"),
        ("`make status`, which only looks", "status HOSTS=local"),
    ):
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / "clone"
            subprocess.run(["git", "clone", "--quiet", CLONE, clone], check=True)
            start = time.perf_counter()
            done = subprocess.run(
                ["make", *word.split()],
                cwd=clone,
                env={**os.environ, "HOME": folder, "UV_CACHE_DIR": str(_cache())},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            seconds = time.perf_counter() - start
            if done.returncode:
                last = done.stdout.strip().splitlines()[-1]
                yield what, f"failed: {last}", ""
                continue
            if "for the CPU cannot be used" in done.stdout:
                what += " (its index cannot be reached here: the build with CUDA)"
            packages = next((clone / ".venv/lib").glob("python*/site-packages"))
            cuda = sum(map(_bytes, (packages / "nvidia", packages / "triton")))
            note = f", of these {_gb(cuda)} in nvidia and triton" if cuda else ""
            yield what, f"{seconds:.1f}", _gb(_bytes(clone / ".venv")) + note


def empty_hosts() -> Iterator[Row]:
    """From typing `make up` to the first step of a training on hosts without an environment."""
    sys.path.insert(0, str(CLONE / "tests"))
    from machines import Machines, why_no_machines

    if why := why_no_machines():
        yield "`make up` on empty hosts", why, ""
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        Machines(Path(folder), [*HOSTS], ("1gbit", "100mbit")) as machines,
    ):
        words = ["up", f"hosts={','.join(HOSTS)}", "dataset.name=digits", "port=43210"]
        start = time.perf_counter()
        up = machines.type(sys.executable, "-m", "paramserver.launch", *words, "num_epochs=2")
        try:
            for said in (*["the code is there"] * len(HOSTS), "server at"):  # each takes minutes
                up.wait_for(said)
            runs = machines.home(HOSTS[0]) / "paramserver/runs"
            while not any(f.stat().st_size for f in runs.glob("*/metrics.jsonl")):
                assert up.process.poll() is None, up.output
                time.sleep(0.1)
            seconds = time.perf_counter() - start
        finally:
            machines.type(sys.executable, "-m", "paramserver.launch", "down", words[1]).end()
        what = f"`make up` on {len(HOSTS)} empty hosts, to the first step"
        size = _bytes(machines.home(HOSTS[1]) / "paramserver")
        yield what, f"{seconds:.1f}", f"{_gb(size)} each"


def _cache() -> Path:
    return Path(os.environ.get("UV_CACHE_DIR", Path("~/.cache/uv").expanduser()))


def _bytes(folder: Path) -> int:
    """The sizes of all files in it."""
    return sum(f.lstat().st_size for f in folder.rglob("*") if not f.is_dir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
