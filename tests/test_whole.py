"""Whole runs as people start them: server, observer and workers are programs, on loopback.

One run serves several promises where it can: the module's fixtures make it, the tests look at what
it left. Events come from what the programs print and from the closes that the server publishes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Adam
from whole import LOOPBACK, Monitor, Program, Run, Served, ipc_folders

import workers
from paramserver.runfolder import RunFolder
from workers import checkpoint, data, models

SAMPLES = 4000  # digits to train on
BATCH = 16
STEPS = SAMPLES // (2 * BATCH)  # of one epoch with two workers
CHECKED_STEP = 100
MODEL = {"type": "SimpleNN", "input_dim": 784, "hidden": 16, "out": 10, "activation": "relu"}
SEED = 42


def one_process(steps: int) -> nn.Module:
    """Plain PyTorch: batches of 32, in the order of the seed, from the seed's first weights."""
    train = data.load({"name": "digits"}, SEED).train
    model = models.build(MODEL, SEED)
    optimizer = Adam(model.parameters(), lr=0.001)
    for indices in data.order(SAMPLES, SEED, 0).split(2 * BATCH)[:steps]:
        images, labels = train.batch(indices)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.runs[-1] / "model.safetensors")


def all_ended_well(*programs: Program) -> None:
    codes = {program.name: program.end() for program in programs}
    assert set(codes.values()) == {0}, f"{codes}\n" + "\n\n".join(p.output for p in programs)


# ------------------------------------------------------------------------------- an ordinary run


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, dict[str, Any]]]:
    """One epoch of two workers, which start before their server; what was seen on the way."""
    seen: dict[str, Any] = {}
    with Run(tmp_path_factory.mktemp("ordinary")) as run:
        crew = [run.worker(number) for number in (1, 2)]
        for worker in crew:
            worker.wait_for(f"waiting for a server at {LOOPBACK}:{run.port}")
        server = run.server(
            f"batch_size={BATCH}",
            "num_epochs=1",
            "deterministic=true",
            f"checkpoint_steps={CHECKED_STEP}",
            "eval_steps=50",
        )
        server.wait_for("the first state comes from the observer")
        seen["ipc"] = ipc_folders(server)
        seen["codes"] = [program.end() for program in (server, *crew)]
        seen["server"], seen["crew"] = server.output, [worker.output for worker in crew]
        yield run, seen


Ordinary = tuple[Run, dict[str, Any]]


def test_a_run_ends_by_itself_in_order(ordinary: Ordinary) -> None:
    run, seen = ordinary
    assert seen["codes"] == [0, 0, 0], seen["server"]
    assert run.summary()["end"] == "all epochs are done"
    assert run.summary()["steps"] == STEPS
    assert all("the run is over at step 125" in output for output in seen["crew"])


def test_two_workers_equal_one_process_with_twice_the_batch(ordinary: Ordinary) -> None:
    run, _ = ordinary
    folder = RunFolder(run.runs[-1])
    saved = checkpoint.load(folder.checkpoints / checkpoint.name(CHECKED_STEP)).state["model"]
    expected = one_process(CHECKED_STEP).state_dict()
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-5)
    start = models.build(MODEL, SEED).state_dict()
    assert all((start[name] - expected[name]).abs().max() > 1e-3 for name in start)


def test_all_replicas_have_one_digest(ordinary: Ordinary) -> None:
    summary = ordinary[0].summary()
    assert summary["replicas_equal"] is True
    assert len(summary["digests"]) == 3
    assert set(summary["digests"].values()) == {summary["digest"]}


def test_the_model_file_holds_the_last_weights(ordinary: Ordinary) -> None:
    run, _ = ordinary
    last = checkpoint.load(sorted((run.runs[-1] / "checkpoints").iterdir())[-1])
    assert last.step == STEPS
    written = weights(run)
    assert all(torch.equal(written[name], value) for name, value in last.state["model"].items())
    model = models.build(MODEL, SEED)
    model.load_state_dict(written)
    val = data.load({"name": "digits"}, SEED).val
    images, labels = val.batch(torch.arange(len(val)))
    right = (model(images).argmax(1) == labels).float().mean().item()
    assert right == pytest.approx(run.summary()["val_accuracy"], abs=1e-6)


def test_every_sample_is_done_once(ordinary: Ordinary) -> None:
    run, _ = ordinary
    summary = run.summary()
    counted = [summary[f"samples_{how}"] for how in ("done", "partly", "skipped")]
    assert counted == [SAMPLES, 0, 0]
    assert summary["samples"] == sum(line["samples"] for line in run.steps()) == SAMPLES
    assert {w["id"]: w["samples"] for w in summary["per_worker"]} == {1: 2000, 2: 2000}


def test_the_run_folder_holds_what_is_promised(ordinary: Ordinary) -> None:
    run, _ = ordinary
    folder = run.runs[-1]
    names = {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "model.safetensors"}
    assert names | {"checkpoints", "observer.log"} <= {path.name for path in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [50, 100, STEPS]
    assert [line["step"] for line in run.steps()] == list(range(1, STEPS + 1))
    assert all(line["workers"] == [1, 2] and line["late"] == [] for line in run.steps())


def test_no_socket_is_left_behind(ordinary: Ordinary) -> None:
    _, seen = ordinary
    assert len(seen["ipc"]) == 1 or sys.platform == "win32"
    assert not any(folder.exists() for folder in seen["ipc"])


# --------------------------------------------------------------------------- an end from outside


def test_a_run_that_is_interrupted_and_resumed_ends_as_if_it_was_not(
    ordinary: Ordinary, tmp_path: Path
) -> None:
    """Ctrl-C on the server ends all programs in order; resume=latest takes up the very place."""
    settings = [f"batch_size={BATCH}", "num_epochs=1", "deterministic=true", "eval_steps=0"]
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server, *crew = run.server(*settings), run.worker(1), run.worker(2)
            monitor.until(lambda close: close.step >= 30)
            server.send(signal.SIGINT)
        all_ended_well(server, *crew)
        interrupted = run.summary()
        assert interrupted["end"] == "stopped by SIGINT"
        assert 30 <= interrupted["steps"] < STEPS, "interrupted too late to prove anything"
        assert interrupted["replicas_equal"] is True
        assert checkpoint.name(interrupted["steps"]) in {
            path.name for path in (run.runs[-1] / "checkpoints").iterdir()
        }

        crew = [run.worker(number) for number in (1, 2)]
        server = run.server(*settings, "resume=latest")
        server.wait_for(f"comes from the observer, at step {interrupted['steps']}")
        all_ended_well(server, *crew)
        summary = run.summary()
        assert len(run.runs) == 2
    assert run.steps()[0]["step"] == interrupted["steps"] + 1
    assert summary["steps"] == STEPS
    assert summary["samples_done"] == SAMPLES
    assert summary["digest"] == ordinary[0].summary()["digest"]
    assert summary["replicas_equal"] is True


def test_a_worker_that_is_asked_to_leave_says_goodbye_and_may_come_back(tmp_path: Path) -> None:
    """With min_workers=2 the run pauses without it, says so, and goes on when it is back."""
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server = run.server("batch_size=40", "num_epochs=3", "min_workers=2", "eval_steps=0")
            crew = [run.worker(1), run.worker(2)]
            monitor.until(lambda close: close.step >= 10)
            crew[1].send(signal.SIGINT)
            server.wait_for(r"worker 2 .* left: ")
            server.wait_for(r"paused: 1 of at least 2 workers ready \(worker 1 ")
            assert crew[1].end() == 0
            crew[1] = run.worker(2)
            server.wait_for(r"worker 2 .* took a snapshot of step \d+")
        all_ended_well(server, *crew)
        summary = run.summary()
    assert summary["end"] == "all epochs are done"
    counted = [summary[f"samples_{how}"] for how in ("done", "partly", "skipped")]
    assert counted == [3 * SAMPLES, 0, 0] or sum(counted) == 3 * SAMPLES
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 3


# ----------------------------------------------------------------------------------------- faults


def test_a_killed_worker_is_left_out_and_its_successor_taken_in(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server = run.server(
                "batch_size=16", "num_epochs=100000", "heartbeat_timeout=2", "eval_steps=0"
            )
            crew = [run.worker(1), run.worker(2)]
            monitor.until(lambda close: close.step >= 10)
            crew[1].send(signal.SIGKILL)
            killed_at = monitor.step_with(1).step
            server.wait_for(r"worker 2 .* is gone: silent for 2\.\d s")
            alone_at = monitor.step_with(1).step
            assert crew[1].end() == -signal.SIGKILL
            crew[1] = run.worker(2)
            server.wait_for(r"worker 2 .* took a snapshot of step \d+")
            together_at = monitor.step_with(1, 2).step
            server.send(signal.SIGTERM)
        all_ended_well(server, *crew)
        summary = run.summary()
        observers = run.runs[-1] / "observer.log"
        assert "Traceback" not in observers.read_text()
    assert killed_at <= alone_at < together_at <= summary["steps"]
    assert summary["end"] == "stopped by SIGTERM"
    counted = [summary[f"samples_{how}"] for how in ("done", "partly", "skipped")]
    in_steps = sum(line["samples"] for line in run.steps())
    assert sum(counted) == in_steps and counted[2] == 0
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 3


def test_a_stopped_worker_is_late_then_gone_then_back(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server = run.server(
                "batch_size=16",
                "num_epochs=100000",
                "timeout=0.2",
                "heartbeat_timeout=3",
                "eval_steps=0",
            )
            crew = [run.worker(1), run.worker(2)]
            monitor.step_with(1, 2)

            crew[1].send(signal.SIGSTOP)
            late = monitor.until(lambda close: 2 in close.late)
            crew[1].send(signal.SIGCONT)
            assert "late" in late.late[2] and "last seen" in late.late[2]
            said = server.wait_for(r"round \d+ closed with 1 of 2: worker 2 .* late")
            assert late.reason in said
            monitor.step_with(1, 2)

            crew[1].send(signal.SIGSTOP)
            server.wait_for(r"worker 2 .* is gone: silent for 3\.\d s")
            monitor.step_with(1)
            crew[1].send(signal.SIGCONT)
            crew[1].wait_for("greeting it again")
            server.wait_for(r"worker 2 .* is here")
            monitor.step_with(1, 2)

            crew[1].send(signal.SIGTERM)
            server.wait_for(r"worker 2 .* left: ")
            assert crew[1].end() == 0
            monitor.step_with(1)
            server.send(signal.SIGTERM)
        all_ended_well(server, crew[0])
        summary = run.summary()
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 2
    assert {w["id"]: w["late"] > 0 for w in summary["per_worker"]} == {1: False, 2: True}


# --------------------------------------------------------------------------- one's own loop


LOOP = """
import sys, torch, workers
from torch import nn

class Points(torch.utils.data.Dataset):
    def __len__(self): return 90
    def __getitem__(self, i): return torch.full((3,), i / 90), i % 2

torch.manual_seed(int(sys.argv[2]))
model = nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
cluster = workers.join(port=int(sys.argv[1]), worker_id=int(sys.argv[2]))
model, optimizer = cluster.attach(model, optimizer)
for x, y in cluster.batches(Points()):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
cluster.leave()
print("my loop is over")
"""


def test_five_lines_make_ones_own_loop_a_worker(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    with Run(tmp_path) as run:
        server = run.server("observer=false", "num_epochs=4", "batch_size=8")
        crew = [run.start(f"loop {n}", "loop.py", str(run.port), str(n)) for n in (1, 2)]
        for loop in crew:
            loop.wait_for("my loop is over")
        all_ended_well(server, *crew)
        summary = run.summary()
    assert summary["samples_done"] == 360
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 2


# ----------------------------------------------------------------------- mistakes that people make


class Mistakes:
    """Commands that cannot work, all started at once, and what they meet."""

    def __init__(self, run: Run) -> None:
        (run.folder / "a_file").touch()
        self.run = run
        self.taken = socket.create_server((LOOPBACK, 0))
        self.busy = Served(num_workers=9)  # waits for more workers than will ever come
        self.holder = workers.join(port=self.busy.port, worker_id=1, say=self.busy.say)
        no_network = dict.fromkeys(("http_proxy", "https_proxy"), f"http://{LOOPBACK}:9")
        port = f"port={self.busy.port}"
        self.commands = {
            "port": run.server(f"port={self.taken.getsockname()[1]}"),
            "folder": run.server("run_dir=a_file"),
            "name": run.server("learning_rat=0.1"),
            "data": run.server("dataset.name=MNIST", f"dataset.root={run.folder}", **no_network),
            "nobody": run.worker(1, "join_timeout=0.2"),
            "id": run.worker(1, port),
            "range": run.worker(65, port),
            "override": run.worker(2, port, "learning_rate=0.5"),
            "servers own": run.worker(3, port, "checkpoint_steps=5"),
            "device": run.worker(4, port, "device=cuda:7"),
        }

    def close(self) -> None:
        self.taken.close()
        self.holder.leave()
        with self.busy:
            pass


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mistakes]:
    with Run(tmp_path_factory.mktemp("mistakes")) as run:
        made = Mistakes(run)
        try:
            for program in made.commands.values():
                program.end()
        finally:
            made.close()
        yield made


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("port", [f"is taken by pid {os.getpid()} (", "port="]),
        ("folder", ["cannot make a run folder in", "a_file", "run_dir="]),
        ("name", ["learning_rat", "did you mean learning_rate"]),
        ("data", ["MNIST is not in", "cannot be downloaded", "dataset.name=digits"]),
        ("nobody", ["no server answered at 127.0.0.1:", "within 0.2 s", "make server"]),
        ("id", [f"worker id 1 is taken by pid {os.getpid()} on ", "make worker ID="]),
        ("range", ["worker id 65 is out of range: ids run from 1 to 64"]),
        ("override", ["learning_rate is 0.5", "the run has 0.001"]),
        ("servers own", ["checkpoint_steps belongs to the server"]),
        ("device", ["device=cuda:7 is not on this machine", "cpu"]),
    ],
)
def test_a_mistake_is_told_in_words_with_exit_code_2(
    mistakes: Mistakes, name: str, words: list[str]
) -> None:
    program = mistakes.commands[name]
    assert program.process.returncode == 2, program.output
    assert "Traceback" not in program.output
    error = program.output[program.output.index("error: ") :]
    assert all(word.lower() in error.lower() for word in words), error


def test_mistakes_leave_no_run_behind(mistakes: Mistakes) -> None:
    """But for the one whose data were missing: that was found out in the run."""
    assert len(mistakes.run.runs) == 1
