"""A script's second life: a cell that is run again, another training in one process, wrapped
models, a spawned child, several loops in one thread."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import CLASSES, INPUTS, Noise
from torch import nn
from torch.optim import SGD
from whole import DEADLINE_S, LOOPBACK, Run, Served, free_port

import workers
from paramserver.errors import UserError
from paramserver.transport import sockets
from workers.replica.names import load_own, own_names, own_state
from workers.replica.replica import Replica


class Cell:
    """What a notebook's cell does: join, attach, train a while. It never leaves."""

    def __init__(self, served: Served, number: int | None) -> None:
        self.served, self.number = served, number
        self.said: list[str] = []
        self.model = nn.Linear(INPUTS, CLASSES)
        self.optimizer: Any = SGD(self.model.parameters(), lr=0.1)
        self.clusters: list[workers.Cluster] = []

    def run(self, steps: int) -> int:
        """Returns the step that it came to."""
        cluster = workers.join(LOOPBACK, self.number, port=self.served.port, say=self.said.append)
        self.clusters.append(cluster)
        _, self.optimizer = cluster.attach(self.model, self.optimizer)
        # The loop is interrupted in a batch, and its generator lives on in a traceback.
        self.loop = iter(cluster.batches(Noise(640), batch_size=8))
        for x, y, _ in self.loop:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(x), y).backward()
            if cluster.step >= steps:
                break
            self.optimizer.step()
        return cluster.step


@pytest.mark.parametrize("number", [1, None])
def test_a_cell_that_is_run_again_leaves_what_it_had_joined(number: int | None) -> None:
    with Served(num_workers=1, num_epochs=10) as served:
        cell = Cell(served, number)
        assert served.start(two_runs, cell).result(DEADLINE_S) == (3, 6)
        assert len(served.server.rounds.peers) == 1
        hooks = [len(p._post_accumulate_grad_hooks or ()) for p in cell.model.parameters()]
        assert hooks == [1, 1]
        cell.clusters[-1].leave()
        cell.loop.close()
        assert all(not p._post_accumulate_grad_hooks for p in cell.model.parameters())
    # Under the same number the new greeting may be read before the goodbye: it takes the old place.
    goodbyes = sum("left: it joined again" in line for line in served.said)
    assert goodbyes == 1 or (number == 1 and goodbyes == 0)
    assert "worker 1 leaves: it joined again" in cell.said


def two_runs(cell: Cell) -> tuple[int, int]:
    return cell.run(3), cell.run(6)


def test_a_model_that_is_attached_again_is_taken_from_the_cluster_before() -> None:
    with Served(num_workers=1, num_epochs=10) as served:
        cell = Cell(served, 1)
        assert served.start(cell.run, 2).result(DEADLINE_S) == 2
        with workers.join(port=free_port(), say=lambda line: None) as alone:
            alone.attach(cell.model, cell.optimizer)
            assert [len(p._post_accumulate_grad_hooks) for p in cell.model.parameters()] == [1, 1]
        served.until_said("left: its model was attached again")
        cell.loop.close()


def test_a_loop_that_nobody_holds_any_more_is_not_under_way() -> None:
    def begin() -> None:
        cluster = workers.join(port=free_port(), say=lambda line: None)
        model = nn.Linear(INPUTS, CLASSES)
        cluster.attach(model, SGD(model.parameters(), lr=0.1))
        next(cluster.batches(Noise(64)))  # the loop and its batches hold each other

    gc.disable()
    try:
        begin()
        begin()
    finally:
        gc.enable()


def test_a_loop_within_the_loop_of_another_cluster_is_refused() -> None:
    with Served(num_workers=2) as served:

        def work(number: int) -> None:
            with (
                served.join(number, lambda line: None) as cluster,
                workers.join(port=free_port(), say=lambda line: None) as alone,
            ):
                for each in (cluster, alone):
                    model = nn.Linear(INPUTS, CLASSES)
                    each.attach(model, SGD(model.parameters(), lr=0.1))
                batches = iter(cluster.batches(Noise(64)))
                next(batches)
                for second in (alone.batches(Noise(64)), alone.own_batches([1])):
                    with pytest.raises(UserError, match="a loop of another cluster is under way"):
                        next(iter(second))

        served.wait(served.start(work, 1), served.start(work, 2))


@pytest.mark.parametrize("begun", [False, True])
def test_two_servers_in_one_thread_are_refused_before_their_workers_wait_for_each_other(
    begun: bool,
) -> None:
    def work(number: int) -> str:
        generator = workers.join(LOOPBACK, number, port=one.port, say=said.append)
        critic = workers.join(LOOPBACK, number, port=two.port, say=said.append)
        for cluster in (generator, critic):
            model = nn.Linear(INPUTS, CLASSES)
            try:
                cluster.attach(model, SGD(model.parameters(), lr=0.1))
            except UserError as e:
                refused = str(e)
            else:
                loop = iter(cluster.batches(Noise(64)))
                if begun:
                    next(loop)
        model = nn.Linear(INPUTS, CLASSES)  # as a cell that is run again
        cluster.attach(model, SGD(model.parameters(), lr=0.1))
        cluster.leave()
        loop.close()
        return refused

    said: list[str] = []
    with Served(num_workers=1) as one, Served(num_workers=1) as two:
        refused = two.start(work, 1).result(DEADLINE_S)
        one.until_said("left: its thread attached to another server")
    assert f"attach() to a second server ({LOOPBACK}:{two.port})" in refused
    assert ("is under way" if begun else "has not begun") in refused
    assert "attach(generator=(G, opt_g), critic=(D, opt_d))" in refused


# --------------------------------------------------------------------------------- wrapped models


class Blocks(nn.Module):
    def __init__(self, wrap: Any = lambda block: block) -> None:
        super().__init__()
        self.first = wrap(nn.Sequential(nn.Linear(INPUTS, 8), nn.BatchNorm1d(8)))
        self.rest = nn.ModuleList([wrap(nn.Linear(8, 8)), nn.Linear(8, CLASSES)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.rest:
            x = layer(x)
        return x


def compiled(block: nn.Module) -> Any:
    return torch.compile(block, backend="eager")


def replica(model: nn.Module) -> Replica:
    return Replica(model, SGD(model.parameters(), lr=0.1), bucket_mb=1.0, codec="float32")


@pytest.mark.parametrize(
    "wrap", [compiled, nn.DataParallel, lambda block: nn.DataParallel(compiled(block))]
)
def test_wrapped_blocks_have_the_models_own_names(wrap: Any) -> None:
    plain, wrapped = Blocks(), Blocks(wrap)
    assert plain.state_dict().keys() != wrapped.state_dict().keys()
    assert own_state(wrapped).keys() == plain.state_dict().keys()
    ours, theirs = replica(plain), replica(wrapped)
    assert ours.layout == theirs.layout and ours.recipe() == theirs.recipe()
    theirs.load(ours.state(), 3, "there")
    assert theirs.digest() == ours.digest()
    ours.load(theirs.state(), 3, "there")
    for name, value in own_state(wrapped).items():
        assert torch.equal(value, plain.state_dict()[name])


def test_a_module_of_ones_own_may_be_called_as_wrappers_call_theirs() -> None:
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert own_names(model)("module.weight") == "module.weight"
    load_own(model, own_state(model))


def test_workers_with_and_without_compiled_blocks_train_together() -> None:
    with Served(num_workers=2, num_epochs=2) as served:

        def work(number: int, wrap: Any) -> None:
            with served.join(number, lambda line: None) as cluster:
                model = Blocks(wrap)
                model, optimizer = cluster.attach(model, SGD(model.parameters(), lr=0.1))
                for x, y, _ in cluster.batches(Noise(64), batch_size=8):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x), y).backward()
                    optimizer.step()

        served.wait(
            served.start(work, 1, lambda block: block), served.start(work, 2, nn.DataParallel)
        )
    assert len(served.digests()) == 1 and len(served.closes) == 8


# ------------------------------------------------------------------------------- spawned children

WITHOUT_GUARD = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import workers

model = torch.nn.Linear(2, 1)
cluster = workers.join(port={port}, say=print)
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
loader = DataLoader(
    TensorDataset(torch.ones(8, 2)), 4, num_workers=1, multiprocessing_context="spawn"
)
for (x,) in cluster.own_batches(loader):
    model(x).mean().backward()
    optimizer.step()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no spawn there")
def test_a_spawned_child_that_runs_the_script_again_is_told(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        script = tmp_path / "train.py"
        script.write_text(WITHOUT_GUARD.format(port=run.port))
        program = run.start("the script", "train.py", fresh=True)
        assert program.end() == 1
    assert (
        "join() in a process that a DataLoader, or multiprocessing, has started" in program.output
    )
    assert "if __name__ == '__main__':" in program.output


# ----------------------------------------------------------------------------------- IPv6


def test_a_server_is_reached_by_ipv6() -> None:
    context = sockets.context()
    try:
        router = sockets.router(context, 2**20)
        endpoint = sockets.tcp("::1", free_port())
        sockets.bind(router, [endpoint])
        dealer = sockets.dealer(context)
        sockets.connect(dealer, endpoint)
        sockets.send(dealer, [b"hello"])
        assert router.poll(int(1000 * DEADLINE_S))
        frames = sockets.receive(router)
        assert frames[-1].bytes == b"hello" and sockets.sender(frames[-1]) == "::1"
    finally:
        context.destroy(linger=0)


# --------------------------------------------------------------------------- several models in one


def gan() -> tuple[nn.ModuleDict, SGD]:
    torch.manual_seed(5)
    generator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, INPUTS))
    critic = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 1))
    both = nn.ModuleDict({"G": generator, "D": critic}).double()
    groups = [{"params": both["D"].parameters()}, {"params": both["G"].parameters(), "lr": 0.05}]
    return both, SGD(groups, lr=0.1, momentum=0.9)


def take_turns(both: nn.ModuleDict, step: int, x: torch.Tensor) -> None:
    def says(sample: torch.Tensor, real: float) -> torch.Tensor:
        out = both["D"](sample)
        return nn.functional.binary_cross_entropy_with_logits(out, torch.full_like(out, real))

    noise = x[:, :4]
    if step % 2 == 0:
        (says(x, 1.0) + says(both["G"](noise).detach(), 0.0)).backward()
    else:
        says(both["G"](noise), 1.0).backward(inputs=list(both["G"].parameters()))


def test_a_gan_of_one_module_is_that_of_one_process() -> None:
    data = Noise(96)
    data.x = data.x.double()
    batches: dict[tuple[int, int], list[int]] = {}
    with Served(num_workers=2, num_epochs=2) as served:
        models = {}
        made = {number: gan() for number in (1, 2)}  # here: threads share torch's generator

        def work(number: int) -> None:
            both, inner = made[number]
            with served.join(number, lambda line: None) as cluster:
                both, optimizer = cluster.attach(both, inner)
                models[number] = both
                for x, _, i in cluster.batches(data, batch_size=8):
                    batches[number, cluster.step] = i.tolist()
                    optimizer.zero_grad()
                    take_turns(both, cluster.step, x)
                    optimizer.step()

        served.wait(served.start(work, 1), served.start(work, 2))
    truth, optimizer = gan()
    for step, close in enumerate(served.closes):
        optimizer.zero_grad()
        own = [i for worker in close.contributors for i in batches[worker, step]]
        take_turns(truth, step, data.x[own])
        optimizer.step()
    assert len(served.closes) == 12
    for model in models.values():
        torch.testing.assert_close(model.state_dict(), truth.state_dict(), rtol=0, atol=1e-9)
