"""`python -m benchmarks.buckets`: what the size of buckets does to an exchange over a cable.

Two workers, the server on the first one's host, a link of its own for each host. The same gradient
is cut into ever more buckets (`bucket_mb`), and as nobody sets it; all ways and gloo are measured
in turn, and the medians compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks import runs, team
from benchmarks.network import Hosts, why_no_hosts
from benchmarks.runs import SIZES, Limits, Place, size_bytes

ROUNDS = {"0.4 MB": 150, "1.35 MB": 100, "5 MB": 30, "46.8 MB": 6}
PIECES = (1, 2, 4, 6, 8, 12, 16, 24, 32)
RUN_S = 120.0
GLOO = "gloo"


def compare(
    size: str, codec: str, pieces: Sequence[int], repeats: int, rounds: int, place: Place
) -> None:
    """Print milliseconds of a round, the ratio to gloo's in float32, and processor time."""
    limits = Limits(RUN_S, rounds)
    ways: dict[str, list[str]] = {GLOO: [], "unset": []}
    for count in pieces:
        ways[f"{count}"] = [f"bucket_mb={size_bytes(size) / count / 2**20 + 1e-5:.6f}"]
    found: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, settings in ways.items():
            if name == GLOO:
                seconds = runs.all_reduce(limits, size, 2, place)
            else:
                # By default several may average, which chooses the buckets of float32.
                one = runs.exchange(
                    limits, size, 2, codec, place, shards=None, more_settings=settings
                )
                seconds = one.seconds
                processor[name].append(1e3 * (one.workers_s + one.server_s))
            found[name].append(1e3 * seconds)
    gloo = median(found[GLOO])
    print(f"{size}, {codec}: gloo float32 {gloo:.2f} ms")
    for name, values in found.items():
        if name != GLOO:
            low, high, at = min(values), max(values), median(values)
            busy = f"processors {median(processor[name]):.2f} ms"
            print(f"  {name:>6} {at:8.2f} ms ({low:.2f} - {high:.2f}) {at / gloo:6.2f}  {busy}")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.buckets", description=__doc__)
    parser.add_argument("--size", action="append", choices=SIZES)
    parser.add_argument("--codec", action="append", help="float32 and float16, if left out")
    parser.add_argument("--pieces", type=int, action="append", help="so many buckets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rate", default="1gbit", help="of a link, as tc takes it")
    parser.add_argument("--burst", help="of a link, as tc takes it")
    options = parser.parse_args(argv)
    if (reason := why_no_hosts()) is not None:
        print(f"not measured: {reason}", file=sys.stderr)
        return 1
    team.prepare()
    shape = {} if options.burst is None else {"burst": options.burst}
    with Hosts(["host1", "host2"], options.rate, **shape) as hosts:
        for size in options.size or ROUNDS:
            rounds = options.rounds or ROUNDS[size]
            for codec in options.codec or ("float32", "float16"):
                pieces = options.pieces or PIECES
                compare(size, codec, pieces, options.repeats, rounds, Place(hosts, "host1"))
    for process in team.left_behind():
        team.kill(process.pid)
    return 0


if __name__ == "__main__":
    sys.exit(main())
