"""A cluster of one: the same loop without a server does just what a plain loop does."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Noise, Setup, in_float64, loss, perceptron
from test_cluster import NORMED, drawn
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR
from whole import CLONE, DEADLINE_S, LOOPBACK, Served, free_port

import workers
from paramserver.errors import UserError
from workers.builtin.data import order
from workers.link.environment import Environment, read_environment


def normed(seed: int) -> Setup:
    model = drawn(NORMED, seed)
    return Setup(model, Adam(model.parameters(), lr=0.01))


def train(setup: Setup, data: Noise, **alone: Any) -> tuple[workers.Cluster, list[list[int]]]:
    """A whole run without a server, and the batches that it gave."""
    batches = []
    with workers.join(port=free_port(), say=lambda line: None, alone=alone) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer, **setup.attach)
        for x, y, indices in cluster.batches(data):
            batches.append(indices.tolist())
            optimizer.zero_grad()
            loss(model, x, y).backward()
            optimizer.step()
    return cluster, batches


@pytest.mark.parametrize("make", [perceptron, normed])
def test_alone_is_a_plain_loop(make: Any) -> None:
    data, setup, plain = Noise(45), make(1), make(1)
    cluster, batches = train(setup, data, num_epochs=3, batch_size=8, seed=5)
    for epoch in range(3):
        for indices in order(45, 5, epoch).split(8):
            plain.optimizer.zero_grad()
            loss(plain.model, data.x[indices], data.y[indices]).backward()
            plain.optimizer.step()
    assert cluster.step == 18 and [len(b) for b in batches[:6]] == [8, 8, 8, 8, 8, 5]
    assert cluster.end is not None and cluster.end.reason == "all epochs are done"
    trained, expected = setup.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


@pytest.mark.parametrize("limit", [1, 3, 8, 20])
def test_a_batch_in_parts_is_the_same_batch(limit: int) -> None:
    data = Noise(45)
    data.x = data.x.double()
    setups, losses, sizes = [in_float64(perceptron)(1) for _ in range(2)], [], []
    for setup, most in zip(setups, (None, limit), strict=True):
        alone, told, parts = {"num_epochs": 2, "batch_size": 8}, [], []
        with workers.join(port=free_port(), say=lambda line: None, alone=alone) as cluster:
            model, optimizer = cluster.attach(setup.model, setup.optimizer)
            cluster.client.on_close = lambda close, told=told: told.append(close.loss)
            for x, y, indices in cluster.batches(data, batch_limit=most):
                parts.append(len(indices))
                optimizer.zero_grad()
                part_loss = loss(model, x, y)
                cluster.tell(part_loss)
                part_loss.backward()
                optimizer.step()
        assert cluster.step == 12
        losses.append(told)
        sizes.append(parts)
    assert max(sizes[0]) == 8 and max(sizes[1]) <= limit and sum(sizes[1]) == 90
    assert losses[1] == pytest.approx(losses[0], rel=1e-10) and len(losses[0]) == 12
    trained, expected = (setup.model.state_dict() for setup in setups)
    for name, value in expected.items():
        torch.testing.assert_close(trained[name], value, rtol=1e-10, atol=1e-12)


def test_a_schedule_by_epoch_goes_on_where_an_epoch_ends() -> None:
    rates: list[float] = []
    setup = perceptron(1)
    setup.attach = {"scheduler": StepLR(setup.optimizer, 1, 0.5), "schedule_by": "epoch"}
    setup.attach["before_step"] = lambda model: rates.append(setup.optimizer.param_groups[0]["lr"])
    train(setup, Noise(20), num_epochs=3, batch_size=8)
    assert rates == [0.1] * 3 + [0.05] * 3 + [0.025] * 3


def test_a_loop_knows_how_many_epochs_are_done() -> None:
    data, setup = Noise(40), perceptron(1)
    alone = {"num_epochs": 2}
    with workers.join(port=free_port(), say=lambda line: None, alone=alone) as cluster:
        assert cluster.epoch == 0
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        seen = []
        for x, y, _ in cluster.batches(data, batch_size=16):
            loss(model, x, y).backward()
            optimizer.step()
            seen.append(cluster.epoch)
    assert seen == [0, 0, 1, 1, 1, 2]


def test_a_batch_of_bad_numbers_is_left_out() -> None:
    data = Noise(40)
    data.x[7] = float("nan")
    said: list[str] = []
    setup = perceptron(1)
    with workers.join(port=free_port(), say=said.append, alone={"num_epochs": 1}) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for x, y, _ in cluster.batches(data, batch_size=8):
            loss(model, x, y).backward()
            optimizer.step()
        assert cluster.step == 5
    assert all(p.isfinite().all() for p in setup.model.parameters())
    assert len(said) == 2 and "refused: not all of its numbers are finite" in said[1]


def test_a_loop_that_was_left_goes_on_with_what_is_left() -> None:
    seen: Counter[int] = Counter()
    setup = perceptron(1)
    with workers.join(port=free_port(), say=lambda line: None, alone={"num_epochs": 2}) as cluster:
        model, optimizer = cluster.attach(setup.model, setup.optimizer)
        for stop_at in (3, 100):
            for x, y, indices in cluster.batches(Noise(40), batch_size=8):
                if cluster.step == stop_at:
                    break
                seen.update(indices.tolist())
                optimizer.zero_grad()
                loss(model, x, y).backward()
                optimizer.step()
    assert seen == dict.fromkeys(range(40), 2)


def test_settings_are_checked() -> None:
    for wrong, sentence in (
        ({"num_epoch": 2}, "did you mean `num_epochs`"),
        ({"num_epochs": 0}, "num_epochs must be 1 or more"),
    ):
        with pytest.raises(UserError, match=sentence):
            workers.join(port=free_port(), alone=wrong)


def test_a_server_on_this_machine_is_found() -> None:
    with Served() as served, workers.join(port=served.port, say=served.say) as cluster:
        assert cluster.client.welcome.run == "test"


def test_a_server_that_was_named_is_waited_for() -> None:
    with pytest.raises(UserError, match="no server answered"):
        workers.join(LOOPBACK, port=free_port(), timeout_s=0.1, say=lambda line: None)


SCRIPT = """
import torch, workers
from torch.utils.data import TensorDataset

x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
data = TensorDataset(x, x[:, 0])
model = torch.nn.Linear(6, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
cluster = workers.join()
model, optimizer = cluster.attach(model, optimizer)
for inputs, target in cluster.batches(data):
    optimizer.zero_grad()
    loss = ((model(inputs)[:, 0] - target) ** 2).mean()
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
cluster.leave()
print("worker", cluster.worker_id, "stands at step", cluster.step, flush=True)
"""


def test_an_address_with_a_port_is_told() -> None:
    with pytest.raises(UserError, match="must be an address alone") as told:
        workers.join("10.10.0.1:65432")
    assert "port=65432" in told.value.hint


def test_a_script_runs_with_and_without_a_server(tmp_path: Path) -> None:
    """The same file: alone, then two processes of it that find the server in the environment."""
    port = free_port()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {"PYTHONPATH": str(CLONE), "PATH": "", "PARAMSERVER_PORT": str(port)}

    def start(**more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script)],
            env={**environment, **more},
            stdout=subprocess.PIPE,
            text=True,
        )

    alone = start()
    assert "training alone, 2 epochs" in (told := alone.communicate(timeout=DEADLINE_S)[0])
    assert told.endswith("worker 1 stands at step 4\n")
    with Served(num_workers=2, num_epochs=2, batch_size=8) as served:
        environment["PARAMSERVER_PORT"] = str(served.port)
        both = [
            start(PARAMSERVER_HOST=LOOPBACK, PARAMSERVER_ID="7"),
            start(SLURM_LAUNCH_NODE_IPADDR=LOOPBACK, SLURM_PROCID="2"),
        ]
        told = "".join(script.communicate(timeout=DEADLINE_S)[0] for script in both)
        assert "worker 7 stands at step 8\n" in told and "worker 3 stands at step 8\n" in told
        assert len(served.digests()) == 1


# ------------------------------------------------------------------------------------- where


def test_where_a_worker_was_placed() -> None:
    assert read_environment({}) == Environment()
    assert read_environment({"PARAMSERVER_HOST": "", "PARAMSERVER_ID": " "}) == Environment()
    ours = {"PARAMSERVER_HOST": "10.10.0.1", "PARAMSERVER_PORT": "70", "PARAMSERVER_ID": "3"}
    assert read_environment(ours) == Environment("10.10.0.1", 70, 3)
    assert read_environment({"PARAMSERVER_JOIN": "psabc"}) == Environment(token="psabc")
    srun = {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.5", "SLURM_PROCID": "0"}
    assert read_environment(srun) == Environment("10.0.0.5", None, 1)
    assert read_environment({**srun, **ours}) == Environment("10.10.0.1", 70, 3)
    assert read_environment({"SLURM_PROCID": "0"}) == Environment()  # a batch script, outside srun
    with pytest.raises(UserError, match="PARAMSERVER_ID is 'two'"):
        read_environment({"PARAMSERVER_ID": "two"})


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_loss_that_is_always_zero_is_told(outputs: int) -> None:
    said = list[str]()
    model: nn.Module = nn.Linear(6, outputs)
    with workers.join(port=free_port(), say=said.append, alone={"num_epochs": 1}) as cluster:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = cluster.attach(model, optimizer)
        for x, y, _ in cluster.batches(Noise(64), batch_size=8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y % outputs).backward()
            optimizer.step()
    told = [line for line in said if "CrossEntropyLoss over a single output" in line]
    assert len(told) == (1 if outputs == 1 else 0)
