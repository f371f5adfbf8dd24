"""Copies between this machine's memory and a device. With `cpu` as the device all but the waiting
is tried everywhere; with a GPU a wait that is not ours is an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paramserver.protocol import messages as wire
from workers.replica.device_copies import Averages, Gathering
from workers.replica.gradients import Gradients
from workers.replica.replica import Replica

DEVICES = [
    "cpu",
    pytest.param("cuda:0", marks=pytest.mark.cuda),
    pytest.param("mps", marks=pytest.mark.mps),
]


@contextmanager
def no_wait(device: str) -> Iterator[None]:
    """With CUDA, whatever makes this thread wait for the device without saying so is an error."""
    if not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
def test_averages_arrive_and_are_written_again_only_when_they_have(device: str) -> None:
    there = torch.device(device)
    averages = Averages({there})
    vector = torch.zeros(100_000, pin_memory=averages.pinned)
    for step in range(5):
        averages.wait()
        vector.fill_(step)
        with no_wait(device):
            copy = averages.on(there, vector)
            assert averages.on(there, vector) is copy  # one for all parameters
            parts = copy[:10], copy[10:]
        averages.forget()
        averages.wait()
        vector.fill_(-1.0)
        if device != "cpu":
            assert all(bool((part == step).all()) for part in parts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float16])
def test_a_bucket_is_brought_as_one(device: str, dtype: torch.dtype) -> None:
    gathering = Gathering(torch.device(device), 1 << 20)
    made = [torch.arange(n, device=device).to(dtype) for n in (3, 1, 500)]
    out = torch.empty(504, dtype=torch.float32 if dtype == torch.float16 else dtype)
    gathering.bring(lambda: made, gathering.mark(), out)
    assert torch.equal(out, torch.cat([m.cpu() for m in made]).to(out.dtype))


def replica_of(device: str) -> Replica:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 33), nn.BatchNorm1d(33), nn.Linear(33, 3)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return Replica(model, optimizer, bucket_mb=0.0005, codec="float32")


def sent_by(replica: Replica, stream: Any = None, gathered: bool = False) -> dict[int, Tensor]:
    """What one backward of this replica's model sends, by bucket."""
    sent: dict[int, Tensor] = {}

    def send(bucket: Any, values: Tensor, *_: Any) -> None:
        sent[bucket.index] = values.clone()

    gradients = Gradients(
        replica, lambda b: torch.empty(b.size, dtype=getattr(torch, b.sent)), send
    )
    device = replica.params[0][1].device
    if gathered:
        gradients._gathering = Gathering(device, replica.plan.largest_bytes)
    torch.manual_seed(2)
    inputs = torch.randn(16, 8).to(device)
    if stream is not None:
        torch.cuda.synchronize()  # the inputs are there
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        gradients.begin()
        replica.model(inputs).square().mean().backward()
        gradients.flush()
    gradients.close()
    return sent


def test_a_bucket_by_way_of_a_device_has_the_same_bits() -> None:
    """The way of a device, here of the CPU, against that of the CPU."""
    plain = sent_by(replica_of("cpu"))
    other = sent_by(replica_of("cpu"), gathered=True)
    assert plain.keys() == other.keys() and len(plain) > 3
    assert all(torch.equal(plain[i], other[i]) for i in plain)


@pytest.mark.cuda
def test_gradients_of_a_stream_of_the_users_own_are_complete() -> None:
    plain = sent_by(replica_of("cuda:0"))
    other = sent_by(replica_of("cuda:0"), torch.cuda.Stream())
    assert all(torch.equal(plain[i], other[i]) for i in plain)


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_is_applied_without_a_wait(device: str) -> None:
    replica, like = replica_of(device), replica_of("cpu")
    for step in range(1, 4):
        for r in (replica, like):
            buckets = [b for b in r.plan.buckets if b.kind != "whole"]
            for b in buckets:
                values = torch.full((b.size,), step, dtype=getattr(torch, b.sent))
                average = wire.Average(nonce="", round=step, step=step, bucket=b.index)
                r.take(average, [memoryview(values.numpy()).cast("B")])
            close = wire.Close(
                nonce="", round=step, step=step, lineage="l", contributors={1: 4}, late={},
                buckets=tuple(b.index for b in buckets), loss=None, seconds=0.0, ledger={},
            )  # fmt: skip
            with no_wait(device) if r is replica and step > 1 else no_wait("cpu"):
                r.apply(close)
    for (name, p), (_, q) in zip(replica.params, like.params, strict=True):
        assert torch.allclose(p.detach().cpu(), q.detach(), rtol=1e-6), name
    assert all(
        torch.equal(b.held.cpu(), c.held)
        for b, c in zip(replica.buffers.all, like.buffers.all, strict=True)
    )
