"""`python -m workers.builtin.measure key=value ...`: what this machine needs for a few batches.

The settings are those of the run, and so are model, data set, loss and optimizer. It prints
``{"ready": true}`` when these are made, waits for a line (or the end) of standard input, so that
several processes can begin at once, and prints one JSON object:

    device     where it computed, as text
    samples    of the training set
    points     [[samples, seconds], ...]: medians of a step of that many samples
    backward   the share of backward in the first of these
    buckets    bytes of each bucket as float32, in the order in which backward completes them
    other      bytes that no codec makes smaller
    copy_s     seconds to copy a byte
    codecs     by name: seconds to encode and to decode a byte of float32

Beside errors for people, which end it with exit code 2, everything else goes to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from paramserver import terminal
from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.program import exit_on_user_error
from paramserver.settings import CODECS, Settings
from paramserver.tensors.codec import codec_of_averages, codec_of_pushes
from paramserver.transport import malloc

from ..replica.replica import Replica
from ..samples import loader, takes_indices
from . import builders, models

SECONDS = 2.0  # for each number of samples
PATIENCE_S = 10.0  # for slow ones
STEPS_MIN, STEPS_MAX = 3, 200
TIMES = 5
PIECES_BYTES, PIECE = 32 * 2**20, 2**19  # of numbers to copy and encode: more than a cache holds


def main() -> None:
    with exit_on_user_error():
        malloc.keep_freed()  # as the worker program does
        settings = load(sys.argv[1:], "server").settings
        measuring = Measuring(settings)
        terminal.result(json.dumps({"ready": True}))
        sys.stdin.readline()
        terminal.result(json.dumps(measuring.all()))


class Measuring:
    """A model and its data set on this machine's device."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._device = builders.choose_device(settings.device)
        builders.set_threads(settings.threads, settings.num_workers)
        samples = builders.load_data(settings, None).train
        self._model = models.build(settings.model, settings.seed, None).to(self._device)
        self._optimizer: Optimizer = builders.build_optimizer(self._model, settings, None)
        criterion = builders.build_criterion(settings, self._model, samples, self._device, None)
        self._loss = criterion.loss
        self._model.train()
        replica = Replica(
            self._model,
            self._optimizer,
            bucket_mb=settings.bucket_size_mb,
            min_bucket_mb=settings.min_bucket_mb,
            codec=settings.codec,
        )
        self._plan = replica.plan
        self._load = loader(samples, self._device)
        self._ahead = not takes_indices(samples)  # a worker reads these while it computes
        self._length = len(samples)
        if self._length < 2:
            raise UserError("too few samples to measure with", "at least two")

    def all(self) -> dict[str, Any]:
        points, backward = [], 0.0
        for size in sorted({self._size(1), self._size(2)}):
            seconds, share = self._steps(size)
            backward = backward or share
            points.append([size, seconds])
        coded = {b.index for b in self._plan.buckets if b.kind == "grad" and b.sent == "float32"}
        sizes = [(b.index in coded, b.nbytes) for b in self._plan.buckets]
        copy_s, codecs = codec_seconds(self._settings.topk_ratio)
        return {
            "device": str(self._device),
            "samples": self._length,
            "points": points,
            "backward": backward,
            "buckets": [n for is_coded, n in sizes if is_coded],
            "other": sum(n for is_coded, n in sizes if not is_coded),
            "copy_s": copy_s,
            "codecs": codecs,
        }

    def _size(self, times: int) -> int:
        """So many times the samples of a step; never one, which BatchNorm does not take."""
        return max(2, min(self._length, times * self._settings.batch_size))

    def _steps(self, size: int) -> tuple[float, float]:
        """Median seconds of a step of so many samples, and backward's share in it."""
        laps: list[tuple[float, float, float]] = []  # reading, computing, of that backward
        begun = time.perf_counter()
        elapsed = 0.0
        while len(laps) < 2 or (
            elapsed < (SECONDS if len(laps) > STEPS_MIN else PATIENCE_S) and len(laps) < STEPS_MAX
        ):
            laps.append(self._step(size, len(laps) * size))
            elapsed = time.perf_counter() - begun
        laps = laps[1:]  # the first one starts a device, or compiles
        reading, computing, backward = (median(column) for column in zip(*laps, strict=True))
        seconds = max(reading, computing) if self._ahead else reading + computing
        return seconds, backward / seconds

    def _step(self, size: int, first: int) -> tuple[float, float, float]:
        begun = time.perf_counter()
        batch = self._load(torch.arange(first, first + size) % self._length)
        self._finish()
        read = time.perf_counter()
        self._optimizer.zero_grad()
        outputs, targets = builders.forward(self._model, batch)
        loss = self._loss(outputs, targets)
        self._finish()
        forward = time.perf_counter()
        loss.backward()
        self._finish()
        backward = time.perf_counter()
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        self._finish()
        return read - begun, time.perf_counter() - read, backward - forward

    def _finish(self) -> None:
        """Wait for what a device was asked to compute."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()


def codec_seconds(topk_ratio: float) -> tuple[float, dict[str, tuple[float, float]]]:
    """Seconds to copy a byte, and by codec to encode and to decode a byte of float32."""
    count = max(1, PIECES_BYTES // (4 * PIECE))
    values = [torch.randn(PIECE) for _ in range(count)]
    room = torch.empty(PIECE)
    out = [torch.empty(PIECE) for _ in range(count)]
    copy_s = _per_byte(lambda i: out[i].copy_(values[i]), count)
    codecs = {}
    for name in CODECS:
        push = codec_of_pushes(name, topk_ratio)
        average = codec_of_averages(name, topk_ratio)

        def encode(i: int) -> Any:
            return push.encode(room.copy_(values[i]))  # noqa: B023 - it is called at once

        coded = [average.encode(v.clone()) for v in values]

        def decode(i: int) -> Tensor:
            return average.decode(*coded[i], out[i])  # noqa: B023

        encode_s = _per_byte(encode, count) - copy_s
        codecs[name] = (max(0.0, encode_s), _per_byte(decode, count))
    return copy_s, codecs


def _per_byte(work: Callable[[int], Any], count: int) -> float:
    laps = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        for i in range(count):
            work(i)
        laps.append(time.perf_counter() - begun)
    return median(laps) / (count * 4 * PIECE)


if __name__ == "__main__":
    main()
