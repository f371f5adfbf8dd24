"""A model of half a gigabyte: it ends as in one process, in a bounded amount of memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.optim import SGD
from whole import Run

from workers.builtin.data import order

WIDTH, BATCH, STEPS = 8000, 2, 1  # a step is some 10 s of processor time
MODEL_BYTES = 2 * WIDTH * WIDTH * 4
ROOM_BYTES = 12 * MODEL_BYTES

SCRIPT = f"""
import resource, sys
import torch, workers
from test_large import Samples, loss, made, sampled

model = made()
cluster = workers.join()
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
for x, y in cluster.batches(Samples(), batch_size={BATCH}):
    loss(model, x, y).backward()
    optimizer.step()
cluster.leave()
torch.save(sampled(model), sys.argv[1])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
SERVER = """
import atexit, resource, sys
from paramserver.__main__ import main
atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
main(sys.argv[1:])
"""


class Samples:
    def __len__(self) -> int:
        return 2 * BATCH * STEPS

    def batch(self, indices: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.stack([torch.arange(WIDTH) * (int(i) + 1) % 17 / 17 - 0.5 for i in indices])
        return x, x.flip(1)


def made() -> nn.Module:
    """Two layers, each many buckets long; their weights cost next to nothing."""
    layers = [nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False) for _ in range(2)]
    pattern = (torch.arange(WIDTH) % 101 - 50) / 50
    with torch.no_grad():
        for layer in layers:
            torch.outer(pattern, pattern.flip(0) / WIDTH**0.5, out=layer.weight)
    return nn.Sequential(*layers)


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(x), y) * WIDTH


def sampled(model: nn.Module) -> list[torch.Tensor]:
    """Of each layer some numbers out of every bucket, and the sum of every row."""
    return [
        part
        for p in model.parameters()
        for part in (p.detach().flatten()[::997].clone(), p.detach().sum(1, dtype=torch.float64))
    ]


@pytest.mark.long
@pytest.mark.skipif(
    psutil.virtual_memory().available < ROOM_BYTES,
    reason=f"it takes {ROOM_BYTES / 1e9:.0f} GB of memory",
)
def test_half_a_gigabyte_of_parameters(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with Run(tmp_path) as run:
        server = run.start(
            "the server", "-c", SERVER, f"port={run.port}", "observer=false", "plain=true",
            "num_epochs=1", "history_mb=0",
        )  # fmt: skip
        crew = [
            run.start(
                f"worker {number}", "train.py", f"{number}.pt",
                PYTHONPATH=f"{Path(__file__).parent.parent}:{Path(__file__).parent}",
                PARAMSERVER_HOST="127.0.0.1", PARAMSERVER_PORT=str(run.port),
                PARAMSERVER_ID=str(number), OMP_NUM_THREADS="1",
            )
            for number in (1, 2)
        ]  # fmt: skip
        programs = [server, *crew]
        assert [p.end() for p in programs] == [0, 0, 0], "\n".join(p.output for p in programs)
        summary = run.summary()
        assert summary["steps"] == STEPS and summary["replicas_equal"] is True
        unit = 1 if sys.platform == "darwin" else 1024
        peaks = [int(re.findall(r"^peak (\d+)", p.output, re.M)[0]) * unit for p in programs]
        assert peaks[0] < 5 * MODEL_BYTES, peaks  # measured: 3.9, 7.1, 7.1
        assert max(peaks[1:]) < 8.5 * MODEL_BYTES, peaks

    model, samples = made(), Samples()
    optimizer = SGD(model.parameters(), lr=0.1)
    for indices in order(len(samples), 42, 0).split(2 * BATCH):
        optimizer.zero_grad()
        loss(model, *samples.batch(indices, "cpu")).backward()
        optimizer.step()
    expected = sampled(model)
    for number in (1, 2):
        torch.testing.assert_close(
            torch.load(tmp_path / f"{number}.pt", weights_only=True), expected, rtol=0, atol=1e-4
        )
