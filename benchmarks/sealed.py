"""`python -m benchmarks.sealed`: what keys cost over TCP on loopback, beside the same run without
keys and beside gloo, and what else could prove an average to its receivers.

The runs are measured in turn, with keys, without, gloo, and so on, and the medians compared. Where
all cores are busy, it is processor time that counts.
"""

from __future__ import annotations

import argparse
import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from benchmarks import runs, team
from benchmarks.runs import HERE, Exchange, Limits
from paramserver.transport.sealing import CIPHERS, RECORD_BYTES, TAG_BYTES

ROUNDS = {"1.35 MB": 200, "46.8 MB": 20, "250 MB": 6}
RUN_S = 120.0
CIPHER_BYTES = 48 * 2**20  # more than a cache of one core holds


def ciphers() -> None:
    """GB/s of one core, on buffers that do not fit into its cache: what an average costs its sender
    and each receiver, by how its receivers know that no other receiver has made it."""
    plain = memoryview(np.random.default_rng(0).bytes(CIPHER_BYTES))
    stride = RECORD_BYTES + TAG_BYTES
    count = CIPHER_BYTES // RECORD_BYTES
    sealed, opened = (memoryview(bytearray(count * stride)) for _ in range(2))

    def each(do: Callable[[bytes, int], object]) -> float:
        best = float("inf")
        for _ in range(5):
            start = time.process_time()
            for i in range(count):
                do(i.to_bytes(12), i)
            best = min(best, time.process_time() - start)
        return CIPHER_BYTES / best / 1e9

    def of(view: memoryview, i: int, size: int) -> memoryview:
        return view[i * size : (i + 1) * size]

    for name, cipher in CIPHERS.items():
        aead = cipher(secrets.token_bytes(32))
        seal = each(
            lambda nonce, i, a=aead: a.encrypt_into(
                nonce, of(plain, i, RECORD_BYTES), None, of(sealed, i, stride)
            )
        )
        unseal = each(
            lambda nonce, i, a=aead: a.decrypt_into(
                nonce, of(sealed, i, stride), None, of(opened, i, RECORD_BYTES)
            )
        )
        tag = each(
            lambda nonce, i, a=aead: a.encrypt_into(
                nonce, b"", of(plain, i, RECORD_BYTES), of(sealed, 0, TAG_BYTES)
            )
        )
        print(f"{name:18} seal {seal:5.1f}  open {unseal:5.1f}  tag alone {tag:5.1f} GB/s")
    digest = each(lambda _, i: hashlib.sha256(of(plain, i, RECORD_BYTES)).digest())
    print(f"{'sha256':18} {digest:5.1f} GB/s")


def compare(size: str, workers: int, repeats: int) -> None:
    limits = Limits(RUN_S, ROUNDS[size])
    found: dict[str, list[Exchange]] = {"plain": [], "keys": []}
    gloo: list[float] = []
    for _ in range(repeats):
        for name, exchanges in found.items():
            exchanges.append(
                runs.exchange(limits, size, workers, "float32", tcp=True, guarded=name == "keys")
            )
        gloo.append(runs.all_reduce(limits, size, workers, HERE))

    def middle(name: str, figure: Callable[[Exchange], float]) -> float:
        return 1000 * median(map(figure, found[name]))

    wall = {name: middle(name, lambda e: e.seconds) for name in found}
    busy = {name: middle(name, lambda e: e.workers_s + e.server_s) for name in found}
    print(
        f"{size:8} N = {workers}: plain {wall['plain']:7.1f} ms  keys {wall['keys']:7.1f} ms  "
        f"gloo {1000 * median(gloo):7.1f} ms | keys / plain {wall['keys'] / wall['plain']:.2f}  "
        f"keys / gloo {wall['keys'] / 1000 / median(gloo):.2f} | processor time: "
        f"plain {busy['plain']:7.1f} ms  keys {busy['keys']:7.1f} ms  "
        f"ratio {busy['keys'] / busy['plain']:.2f}",
        flush=True,
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["46.8 MB", "250 MB"], choices=list(ROUNDS))
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args(words)
    ciphers()
    team.prepare()
    for size in given.sizes:
        for workers in given.workers:
            compare(size, workers, given.repeats)


if __name__ == "__main__":
    main()
