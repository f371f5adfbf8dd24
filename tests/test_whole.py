"""Whole runs as people start them: server, observer and workers are programs, on loopback.

One run serves several promises where it can: the module's fixtures make it, the tests look at what
it left. Events come from the programs' output and from the closes that the server publishes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Rounding, Setup, drawn, rounding_bound, train
from safetensors.torch import load_file
from torch import nn
from torch.optim import Adam
from whole import (
    ENDLESS,
    LOOPBACK,
    Gate,
    Monitor,
    Program,
    Run,
    Served,
    children,
    data_in,
    free_port,
    private_folders,
)

import workers
from paramserver.__main__ import main as server_main
from paramserver.output.runfolder import Record, RunFolder
from workers.__main__ import main as worker_main
from workers.builtin import data, models
from workers.replica import checkpoint

SAMPLES = 4000  # digits to train on
BATCH = 16
EPOCHS = 2
STEPS = EPOCHS * SAMPLES // (2 * BATCH)  # with two workers
CHECKED_STEP = 100
MODEL = {"type": "SimpleNN", "input_dim": 784, "hidden": 16, "out": 10, "activation": "relu"}
SEED = 42


def one_process(steps: int, rounding: Rounding | None = None) -> nn.Module:
    """Plain PyTorch: batches of 32, in the order of the seed, from the seed's first weights."""
    samples = data.load({"name": "digits"}, SEED).train
    model = models.build(MODEL, SEED)
    optimizer = Adam(model.parameters(), lr=0.001)
    for indices in data.order(SAMPLES, SEED, 0).split(2 * BATCH)[:steps]:
        batches = [samples.batch(indices)]
        optimizer.zero_grad()
        for images, labels in batches if rounding is None else rounding(batches):
            share = len(labels) / len(indices)
            (nn.functional.cross_entropy(model(images), labels) * share).backward()
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
    """A run of two workers, which start before their server; what was seen on the way. Server,
    observer and one worker are a new Python each, as people start them."""
    seen: dict[str, Any] = {}
    with Run(tmp_path_factory.mktemp("ordinary")) as run:
        crew = [run.worker(1), run.worker(2, fresh=True)]
        for worker in crew:
            worker.wait_for(f"waiting for a server at {LOOPBACK}:{run.port}")
        crew[0].send(signal.SIGSTOP)  # the run does not begin before all of the server was seen
        server = run.server(
            f"batch_size={BATCH}",
            f"num_epochs={EPOCHS}",
            "deterministic=true",
            f"checkpoint_steps={CHECKED_STEP}",
            "eval_steps=100",
            fresh=True,
        )
        server.wait_for("the first state comes from the observer")
        seen["folders"] = private_folders(server)
        crew[0].send(signal.SIGCONT)
        seen["codes"] = [program.end() for program in (server, *crew)]
        seen["server"], seen["crew"] = server.output, [worker.output for worker in crew]
        yield run, seen


Ordinary = tuple[Run, dict[str, Any]]


def test_a_run_ends_by_itself_in_order(ordinary: Ordinary) -> None:
    run, seen = ordinary
    assert seen["codes"] == [0, 0, 0], seen["server"]
    assert run.summary()["end"] == "all epochs are done"
    assert run.summary()["steps"] == STEPS
    assert all(f"the run is over at step {STEPS}" in output for output in seen["crew"])


def test_two_workers_equal_one_process_with_twice_the_batch(ordinary: Ordinary) -> None:
    run, _ = ordinary
    folder = RunFolder(run.runs[-1])
    saved = checkpoint.load(folder.checkpoints / checkpoint.name(CHECKED_STEP)).state["model"]
    expected = one_process(CHECKED_STEP).state_dict()
    bound = rounding_bound(lambda rounding: one_process(CHECKED_STEP, rounding))
    torch.testing.assert_close(saved, expected, rtol=0, atol=bound)
    start = models.build(MODEL, SEED).state_dict()
    assert all((start[name] - expected[name]).abs().max() > 1e-3 > bound for name in start), bound


class Digits:
    """Some, in float64, with the index of each."""

    def __init__(self, samples: int) -> None:
        images, self.y = data.load({"name": "digits"}, SEED).train.batch(torch.arange(samples))
        self.x = images.double()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.x[index], self.y[index], index


def test_in_float64_two_workers_equal_one_process() -> None:
    """Where rounding neither hides a mistake nor looks like one, on any processor."""
    digits = Digits(60 * 2 * BATCH)

    def make(seed: int) -> Setup:
        layers = (nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))
        model = drawn(nn.Sequential(*layers), SEED).double()
        return Setup(model, Adam(model.parameters(), lr=0.001))

    crew = train(make, digits, {1: BATCH, 2: BATCH}, num_epochs=1, seed=SEED, bucket_mb=0.05)
    crew.check()
    plain = make(SEED)
    for indices in data.order(len(digits), SEED, 0).split(2 * BATCH):
        plain.optimizer.zero_grad()
        nn.functional.cross_entropy(plain.model(digits.x[indices]), digits.y[indices]).backward()
        plain.optimizer.step()
    trained, expected = crew.setups[1].model.state_dict(), plain.model.state_dict()
    assert len(crew.served.closes) == 60
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-10)


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
    assert counted == [EPOCHS * SAMPLES, 0, 0]
    assert summary["samples"] == sum(line["samples"] for line in run.steps()) == EPOCHS * SAMPLES
    assert {w["id"]: w["samples"] for w in summary["per_worker"]} == {1: SAMPLES, 2: SAMPLES}


def test_the_run_folder_holds_what_is_promised(ordinary: Ordinary) -> None:
    run, seen = ordinary
    folder = run.runs[-1]
    names = {"config.yaml", "metrics.jsonl", "summary.json", "curves.png", "model.safetensors"}
    names |= {"checkpoints", "observer.log", "server.jsonl", "report.html"}
    assert names <= {path.name for path in folder.iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line["step"] for line in lines if "val_loss" in line]
    assert evaluated == [100, 200, STEPS], seen["server"]
    assert [line["step"] for line in run.steps()] == list(range(1, STEPS + 1))
    assert all(line["workers"] == [1, 2] and line["late"] == [] for line in run.steps())


def test_no_private_folder_is_left_behind(ordinary: Ordinary) -> None:
    _, seen = ordinary
    assert seen["folders"]
    assert not any(folder.exists() for folder in seen["folders"])


# --------------------------------------------------------------------------- an end from outside


def test_a_run_that_is_interrupted_and_resumed_ends_as_if_it_was_not(
    ordinary: Ordinary, tmp_path: Path
) -> None:
    """Ctrl-C on the server ends all programs in order; resume=latest takes up the very place."""
    settings = [f"batch_size={BATCH}", f"num_epochs={EPOCHS}", "deterministic=true"]
    settings += Gate.settings
    with Run(tmp_path) as run:
        with Gate(tmp_path, at=31) as gate:
            server, *crew = run.server(*settings), run.worker(1), run.worker(2)
            gate.wait(*crew)
            folders = private_folders(server)
            server.send(signal.SIGINT)
        all_ended_well(server, *crew)
        assert not any(folder.exists() for folder in folders)
        interrupted = run.summary()
        assert interrupted["end"] == "stopped by Ctrl-C"
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
    assert summary["samples_done"] == EPOCHS * SAMPLES
    assert summary["digest"] == ordinary[0].summary()["digest"]
    assert summary["replicas_equal"] is True


def test_a_worker_that_is_asked_to_leave_says_goodbye_and_may_come_back(tmp_path: Path) -> None:
    """With min_workers=2 the run pauses without it, says so, and goes on when it is back."""
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server = run.server("batch_size=20", "num_epochs=3", "min_workers=2", "eval_steps=0")
            crew = [run.worker(1), run.worker(2)]
            monitor.until(lambda close: close.step >= 10)
            crew[1].send(signal.SIGINT)
            server.wait_for(r"worker 2 .* left: ")
            why = r"worker 2 \(.*\) left: stopped by Ctrl-C"
            server.wait_for(rf"paused: worker 1 \(.*\) is ready, 2 are needed; {why}")
            assert crew[1].end() == 0
            crew[1] = run.worker(2)
            server.wait_for(r"worker 2 .* took a snapshot of step \d+")
        all_ended_well(server, *crew)
        summary = run.summary()
    assert summary["end"] == "all epochs are done"
    counted = [summary[f"samples_{how}"] for how in ("done", "partly", "skipped")]
    assert sum(counted) == 3 * SAMPLES and counted[2] == 0
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 3


# ----------------------------------------------------------------------------------------- faults


def test_who_is_killed_is_left_out_and_a_successor_taken_in(tmp_path: Path) -> None:
    """First the observer, which the server starts again; then a worker, which a person does."""
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server = run.server(
                "batch_size=16", f"num_epochs={ENDLESS}", "heartbeat_timeout=2", "eval_steps=0"
            )
            crew = [run.worker(1), run.worker(2)]
            monitor.until(lambda close: close.step >= 10)

            (observer,) = children(server)
            observer.kill()
            server.wait_for(r"the observer ended \(exit code -9.*\): starting it again")
            server.wait_for(r"the observer took a snapshot of step \d+")

            crew[1].send(signal.SIGKILL)
            killed_at = monitor.step_with(1).step
            server.wait_for(r"worker 2 .* is gone: silent for ([2-9]|\d\d+)\.\d s")
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
    assert summary["end"] == "stopped from outside (SIGTERM)"
    counted = [summary[f"samples_{how}"] for how in ("done", "partly", "skipped")]
    in_steps = sum(line["samples"] for line in run.steps())
    assert sum(counted) == in_steps and counted[2] == 0
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 3


def clock_set_back() -> dict[str, str]:
    """The environment of a machine that has lost the time; empty where faketime is missing."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return {} if not libraries else {
        "LD_PRELOAD": str(libraries[0]), "FAKETIME": "-2000d",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip


def test_a_killed_server_is_started_again_and_no_closed_step_is_lost(tmp_path: Path) -> None:
    """Killed twice: the workers keep the run, a new server finds it, and the sums are right. The
    clock is of no use, where there is faketime: an earlier run seems to be a later one."""
    settings = ("batch_size=16", f"num_epochs={ENDLESS}", "heartbeat_timeout=3", "eval_steps=0")
    clock = clock_set_back()
    with Run(tmp_path) as run:
        earlier = RunFolder.create(tmp_path / "runs", datetime.now())
        earlier.write_record(
            Record("earlier", socket.gethostname(), run.port, {}, ended=True, number=1)
        )
        earlier.close()
        servers = [run.server(*settings, **clock)]
        with Monitor(run.port) as monitor:
            crew = [run.worker(1), run.worker(2)]
            left: set[Path] = set()
            for _ in range(2):
                monitor.until(lambda close: len(close.contributors) == 2)
                # The workers that pushed for it stood at the step before, so that one is held for
                # certain: # the monitor may be the only one that got this one before the server
                # died.
                held = monitor.until(lambda close: close.step % 50 == 0).step - 1
                left |= private_folders(servers[-1])
                servers[-1].send(signal.SIGKILL)
                assert servers[-1].end() == -signal.SIGKILL
                servers.append(run.server(*settings, **clock))
                went_on = re.search(r"after step (\d+)", servers[-1].wait_for("the run goes on"))
                assert went_on is not None and int(went_on[1]) >= held
                servers[-1].wait_for(r"the observer took a snapshot of step \d+")
            monitor.step_with(1, 2)
        servers[-1].send(signal.SIGTERM)
        all_ended_well(servers[-1], *crew)
        assert len(run.runs) == 2
        summary = run.summary()
        record = RunFolder(run.runs[-1]).read_record()
    assert record is not None and record.data_set is not None and record.data_set.looks
    assert len(left) == 4 and not any(folder.exists() for folder in left)
    lines = run.steps()
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["step"] == summary["steps"]
    # Killed between telling an update and noting it, a server leaves a line out; the next says so.
    missing = summary["steps"] - len(lines)
    assert (missing > 0) == any("metrics.jsonl lacks" in server.output for server in servers)
    counted = [summary[f"samples_{how}"] for how in ("done", "partly", "skipped")]
    more = sum(counted) - sum(line["samples"] for line in lines)
    assert 0 <= more <= 32 * missing and counted[1:] == [0, 0]
    assert sum(worker["samples"] for worker in summary["per_worker"]) == summary["samples"]
    assert summary["samples"] == sum(line["samples"] for line in lines)
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 3
    report = json.loads(data_in((run.runs[-1] / "report.html").read_text()))
    assert [event["kind"] for event in report["status"]["events"]].count("restart") == 2
    said = [line["text"] for line in report["lines"]]
    assert sum(line.startswith("server at ") for line in said) == 3


def test_a_run_to_which_nobody_comes_back_is_followed_by_a_new_one(tmp_path: Path) -> None:
    settings = ("batch_size=16", f"num_epochs={ENDLESS}", "heartbeat_timeout=1", "eval_steps=0")
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            programs = [run.server(*settings), run.worker(1), run.worker(2)]
            monitor.until(lambda close: close.step >= 5)
            for program in programs:
                program.send(signal.SIGKILL)
                program.end()
        again = run.server(*settings)
        with Monitor(run.port) as monitor:
            crew = [run.worker(1), run.worker(2)]
            again.wait_for("this run has not ended: waiting for its replicas")
            again.wait_for("nobody came back: a new run begins")
            monitor.step_with(1, 2)
        again.send(signal.SIGTERM)
        all_ended_well(again, *crew)
        assert len(run.runs) == 2
        steps, summary = run.steps(), run.summary()
        assert [line["step"] for line in steps] == list(range(1, summary["steps"] + 1))
        assert summary["samples"] == sum(line["samples"] for line in steps)


def test_a_stopped_worker_is_late_then_gone_then_back(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        with Monitor(run.port) as monitor:
            server = run.server(
                "batch_size=16",
                f"num_epochs={ENDLESS}",
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
            assert re.match(r"round \d+ closed with 1 of 2: worker 2 .* late", late.reason)
            server.wait_for(re.escape(late.reason))
            monitor.step_with(1, 2)

            crew[1].send(signal.SIGSTOP)
            server.wait_for(r"worker 2 .* is gone: silent for ([3-9]|\d\d+)\.\d s")
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
    # A busy machine may make worker 1 late, too.
    late_in = {n: sum(n in line["late"] for line in run.steps()) for n in (1, 2)}
    assert {w["id"]: w["late"] for w in summary["per_worker"]} == late_in and late_in[2] > 0


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
        server.wait_for("server at")  # without one, such a loop trains alone
        crew = [run.start(f"loop {n}", "loop.py", str(run.port), str(n)) for n in (1, 2)]
        for loop in crew:
            loop.wait_for("my loop is over")
        all_ended_well(server, *crew)
        summary = run.summary()
    assert summary["samples_done"] == 360
    assert summary["replicas_equal"] is True and len(summary["digests"]) == 2


# ----------------------------------------------------------------------- mistakes that people make


@pytest.fixture(scope="module")
def busy() -> Iterator[Served]:
    """A server that waits for more workers than there are: worker 1 is taken."""
    with (
        Served(num_workers=9) as served,
        workers.join(port=served.port, worker_id=1, say=served.say),
    ):
        yield served


def test_a_port_that_is_taken_is_told_with_its_owner(busy: Served, tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server(f"port={busy.port}")
        assert server.end() == 2, server.output
    assert f"error: port {busy.port} is taken by pid {os.getpid()} (" in server.output
    assert "Traceback" not in server.output
    assert run.runs == []


def test_a_worker_id_that_is_taken_is_told_with_its_owner(busy: Served, tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        worker = run.worker(1, f"port={busy.port}")
        assert worker.end() == 2, worker.output
    assert f"error: worker id 1 is taken by pid {os.getpid()} on " in worker.output
    assert "Traceback" not in worker.output


def test_data_that_are_nowhere_end_the_run_with_the_observers_words(tmp_path: Path) -> None:
    no_network = dict.fromkeys(("http_proxy", "https_proxy"), f"http://{LOOPBACK}:9")
    with Run(tmp_path) as run:
        server = run.server("dataset.name=MNIST", f"dataset.root={tmp_path}/data", **no_network)
        assert server.end() == 2, server.output
    error = server.output[server.output.index("error: ") :]
    assert f"MNIST is not in {tmp_path}/data and cannot be downloaded there" in error
    assert "dataset.name=digits" in error
    assert f"{tmp_path}/data/MNIST/raw" in error
    assert "Traceback" not in server.output


@pytest.fixture
def signals_kept() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_kept")
@pytest.mark.parametrize(
    ("program", "setting", "words"),
    [
        ("server", "learning_rat=0.1", ["unknown setting", "did you mean `learning_rate`"]),
        ("server", "run_dir={file}", ["cannot make a run folder in {file}", "run_dir="]),
        ("server", "resume=latest", ["no checkpoint to resume in", "run_dir"]),
        ("server", "host_ip=192.0.2.1", ["192.0.2.1", "this host has no such address"]),
        ("worker", "learning_rat=0.1", ["unknown setting", "did you mean `learning_rate`"]),
        ("worker", "checkpoint_steps=5", ["checkpoint_steps belongs to the server"]),
        ("worker", "id=65", ["worker id 65 is out of range: ids run from 1 to 64"]),
        ("worker", "id=0", ["id", "1"]),
        ("worker", "learning_rate=0.5", ["learning_rate is 0.5", "the run has 0.001"]),
        ("worker", "model.hidden=64", ["model.hidden is 64", "the run has 128"]),
        ("worker", "host_ip=192.0.2.1", ["192.0.2.1 is on another machine", "JOIN="]),
        ("worker", "join=psaeexf6u7gwbz5kemb5p5", ["the join token is cut off: 22 of its 132"]),
        ("worker", "join={file}", ["{file}: this is no join token", "make keys"]),
        ("worker", "security=off", ["security must be one of curve, none"]),
        ("worker", "device=cuda:7", ["device=cuda:7 is not on this machine", "there is: "]),
    ],
)
def test_a_mistake_is_told_in_words_with_exit_code_2(
    busy: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    program: str,
    setting: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a_file"
    file.touch()
    port = free_port() if program == "server" else busy.port
    arguments = ["id=2"] * (program == "worker") + [f"port={port}", setting.format(file=file)]
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit) as end:
        (worker_main if program == "worker" else server_main)()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word.format(file=file).lower() in error.lower()
    # No run folder; where one was made, its number is not used again.
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert left <= {"a_file", "runs", "runs/.newest_run"}


@pytest.mark.usefixtures("signals_kept")
def test_no_server_before_the_deadline_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    monkeypatch.setattr(sys, "argv", ["program", "id=1", f"port={port}", "join_timeout=0.2"])
    with pytest.raises(SystemExit) as end:
        worker_main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: no server answered at {LOOPBACK}:{port} within 0.2 s")
    assert "make server" in error and "join_timeout=" in error
