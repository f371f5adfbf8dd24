"""A cluster from one keyboard: real machines (`machines.py`), and commands as one types them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import FAST, SLOW, Machines, find_uv, uv_cache, why_no_machines
from whole import CLONE, Program

from paramserver.fleet import measurements
from paramserver.fleet.measurements import Measurement

pytestmark = [
    pytest.mark.timeout(600),  # many processes import torch, on two cores
    pytest.mark.root,
    pytest.mark.skipif(why_no_machines() is not None, reason=str(why_no_machines())),
]

NAMES = ["mini1", "mini2", "mini3", "bare", "full", "fresh"]
NEW = "fresh" if find_uv() is not None and uv_cache().is_dir() else "mini2"
"""A machine whose environment is yet to be made, where there is something to install from."""
HOSTS = """
port: 43210
hosts:
  - {name: mini1, role: server}
  - {name: mini2, threads: 1}
  - {name: mini3, threads: 1, restart: 0}
"""
PAIR = """
port: 43210
hosts:
  - {name: mini1, role: server}
  - {name: mini2%s, threads: 1}
"""
"""Without the third one, whose processes take seconds to import torch on two cores."""
SMALL = (
    "dataset.name=digits", "wandb.mode=disabled", "track_gradients=false",
    "digest_steps=0",
)  # fmt: skip
LISTENS = """
import socket, sys
listening = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("here", flush=True)
listening.accept()
"""
OUTSIDE = """
from torch import nn
import inside

class Net(nn.Sequential):
    def __init__(self, pixels: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(pixels, inside.CLASSES))
"""
"""A model that lies in no clone, and needs a neighbour."""
SCRIPT = """
import argparse, os
import torch
from torch import nn
import workers
import inside

parser = argparse.ArgumentParser()
parser.add_argument("--rate", type=float)
rate = parser.parse_args().rate
print("rate", rate, "in", os.getcwd())
model = nn.Linear(4, inside.CLASSES)
cluster = workers.join()
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=rate))
data = torch.utils.data.TensorDataset(torch.randn(640, 4), torch.zeros(640, dtype=torch.long))
for inputs, labels in cluster.batches(data):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
"""
SLOWER = "15mbit"  # so slow that the link is what a round waits for, however busy this machine is
LONG = ("num_epochs=10000", "heartbeat_timeout=3")
MEASUREMENTS = 3  # of a cable, in turns with iperf3, until both say the same


class Cluster:
    """Machines, and a cluster file that names them."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self.machines = machines
        self.file = folder / "cluster.yaml"
        self.file.write_text(HOSTS)

    def make(self, word: str, *settings: str, **environment: str) -> Program:
        """`make word`, typed on the laptop."""
        command = [sys.executable, "-m", "paramserver.launch", word, f"cluster={self.file}"]
        return self.machines.type(*command, *settings, **environment)

    def on_a_terminal(self, word: str, *settings: str) -> Program:
        """The same where the laptop has a terminal."""
        spawn = "import pty, sys; pty.spawn(sys.argv[1:])"
        command = [sys.executable, "-m", "paramserver.launch", word, f"cluster={self.file}"]
        return self.machines.type(
            sys.executable, "-c", spawn, *command, *settings, TERM="xterm", CI=""
        )

    def says(self, word: str, *settings: str, code: int = 0) -> str:
        """All that such a command says."""
        program = self.make(word, *settings)
        assert program.end() == code, program.output
        return program.output

    def runs(self) -> list[Path]:
        return sorted((self.machines.home("mini1") / "paramserver/runs").glob("2*"))

    def kill(self, name: str, words: str) -> None:
        """`kill -9` on a machine: every process with these words in its command line."""
        self.machines.on(name, "pkill", "-9", "-f", words)

    def left(self) -> list[str]:
        """What runs on any machine that should not."""
        names = ("mini1", "mini2", "mini3", "fresh")
        return [line for name in names for line in self.machines.processes(name)]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with Machines(tmp_path_factory.mktemp("machines"), NAMES, ("500mbit", "100mbit")) as made:
        yield made
        shutil.rmtree(made.home("fresh"))  # pytest would keep the gigabytes for three runs


@pytest.fixture
def cluster(machines: Machines, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(machines, tmp_path)
    yield cluster
    for name in ("mini1", "mini2", "mini3", "fresh"):
        for device in ("eth0", "eth1"):
            machines.cut(name, device, "up")
            machines.slow_down(name, device)
    if cluster.left():
        cluster.file.write_text(HOSTS)
        cluster.says("down")


def test_all_that_is_wrong_is_told_at_once(cluster: Cluster) -> None:
    names = ("mini2", "asleep", "stranger", "unknown", "bare", "full")
    cluster.file.write_text(
        "hosts:\n  - {name: mini1, role: server}\n"
        + "".join(f"  - {{name: {name}}}\n" for name in names)
    )
    said = cluster.says("up", code=2)
    assert said.startswith("error: asleep, stranger, unknown, bare, full cannot take part as they")
    for words in (
        "asleep: it does not answer: off, asleep, or another network?",
        "stranger: its host key is not the one that is known here",
        "unknown: its host key is not known here yet",
        "bare: there is no Python 3.11, 3.12 or 3.13",
        "full: 0.0 GiB are free, 3.0 GiB are needed",
    ):
        assert words in said
    assert "mini1" not in said and "mini2:" not in said
    assert "ssh-keygen -R stranger, then ssh stranger once" in said
    assert not (cluster.machines.home("mini1") / "paramserver/code/Makefile").exists()


def test_a_run_from_start_to_end(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text(OUTSIDE)
    (tmp_path / "inside.py").write_text("CLASSES = 10\n")
    own = ("model.type=outside:Net", "model.pixels=784")
    up = cluster.make(
        "up", *SMALL, *LONG, "batch_size=16", *own,
        WANDB_API_KEY="s3cret" * 7, PYTHONPATH=f"{CLONE}:{tmp_path}",
    )  # fmt: skip
    up.wait_for(f"copying inside.py, outside.py from {tmp_path} to each machine")
    up.wait_for(
        r"mini2 \| reaches mini1 by 10.10.0.2 \(eth0\) -> 10.10.0.1 \(eth0\), Ethernet: 0.[1-5]"
    )  # on a busy machine less than the 0.5 Gbit/s of the link
    where = ", ".join(f"{address}:43210" for address in ("127.0.0.1", f"{FAST}.1", f"{SLOW}.1"))
    up.wait_for(rf"mini1 \| .*server at {where}, run folder ../runs/")
    up.wait_for(r"mini1 \| .*step [1-9]")
    logs = machines_logs(cluster)
    assert "server at" in logs and not re.search(r"\bps[a-z2-7]{60}", up.output + logs)  # a token
    for name in ("mini1", "mini2", "mini3"):
        assert "s3cret" not in "\n".join(cluster.machines.processes(name))
    up.send(signal.SIGINT)
    assert up.end() == 0
    assert up.lines[-1] == (
        "the run goes on. Look again: make attach, make status. End it: make down; "
        f"each with cluster={cluster.file}"
    )
    config = (cluster.runs()[-1] / "config.yaml").read_text()
    assert "batch_size: 16" in config and "outside:Net" in config
    assert (
        len([line for line in cluster.left() if "paramserver.fleet.supervisor start" in line]) == 3
    )

    status = cluster.says("status")
    assert re.search(r"mini1 +server +running for", status)
    assert re.search(r"mini3 +worker 2 +running for", status)
    assert re.search(r"\n  training, step [\d,]+/[\d,]+,.* samples/s, epoch \d+/", status)

    assert "another run is under way on mini1" in cluster.says("up", *SMALL, code=2)

    screen = cluster.on_a_terminal("attach")
    screen.wait_for(r"step [\d,]+/[\d,]+ .* left")  # as drawn, not as a line of the log
    screen.wait_for(r"worker 2 .*mini3.*samples/s")
    screen.kill()
    assert "training, step" not in screen.output
    tail = cluster.make("attach", "--host=mini2")
    tail.wait_for(r"mini2 \| \[worker 1\] · step [\d]+")
    tail.kill()
    assert "mini1 |" not in tail.output

    tail = cluster.make("attach", "--host=mini1")
    tail.wait_for(r"step [1-9]")  # it follows the log
    cluster.machines.cut("mini2", "eth0", "down")
    tail.wait_for(r"worker 1 \(mini2\) comes by 10.20.0.2, not by 10.10.0.2 as make up had chosen")
    cluster.machines.cut("mini2", "eth0", "up")
    tail.kill()

    attach = cluster.make("attach")
    attach.wait_for(r"mini1 \| .*step [1-9]")
    cluster.kill("mini3", "workers id=2")
    attach.wait_for(r"mini3 \| worker 2 has failed")
    cluster.kill("mini2", "workers id=1")
    attach.wait_for(
        r"mini2 \| warning: the worker died \(killed by SIGKILL\): starting it again \(1 of 3\)"
    )
    attach.wait_for(r"mini1 \| .*worker 1 \(mini2\) is here")
    attach.send(signal.SIGINT)
    assert attach.end() == 0
    assert "worker 2  failed (killed by SIGKILL)" in cluster.says("status", code=1)
    assert "mini2 | warning: the worker died" in cluster.says("logs", "--host=mini2")

    down = cluster.says("down")
    assert "mini1 | the server has ended, in order" in down
    name = cluster.runs()[-1].name
    assert f"its run folder: mini1:paramserver/runs/{name}; its results here: make fetch" in down
    assert down.splitlines()[-1] == "nothing of the run is left on mini1, mini2, mini3"
    assert cluster.left() == []
    folder = cluster.runs()[-1]
    assert json.loads((folder / "run.json").read_text())["ended"]
    last = max((folder / "checkpoints").glob("step-*.safetensors")).name
    here = os.path.relpath(tmp_path / "here", CLONE)
    told = cluster.says("fetch", f"run_dir={here}")
    assert f"the results of mini1:paramserver/runs/{folder.name}" in told
    fetched = tmp_path / "here" / folder.name
    for name in ("summary.json", "model.safetensors", "config.yaml", f"checkpoints/{last}"):
        assert (fetched / name).read_bytes() == (folder / name).read_bytes()
    assert [path.name for path in (fetched / "checkpoints").iterdir()] == [last]
    assert not (fetched / "run.json").exists()
    assert "nothing of the run is left" in cluster.says("down")


def test_what_fails_is_told_and_the_next_start_works(cluster: Cluster) -> None:
    """A start at a taken port, on a machine with nothing on it; one that is cut off; a link that
    becomes slow during the run, and one that is out, beside which another way leads; supervisors
    that are killed."""
    machines, new = cluster.machines, NEW
    here, number = machines.address(new), machines.address(new).rpartition(".")[2]
    cluster.file.write_text(PAIR.replace("mini2%s", f"{new}, ip: {here}"))  # one path to measure
    small, before = (*SMALL, *LONG, "observer=false", "bucket_mb=0.25"), len(cluster.runs())
    doctor = Measurement(new, here, "10.10.0.1", 70e6, 1.7e9)
    measurements.write(machines.home("mini1") / "paramserver", [doctor])

    machines.slow_down(new, "eth0", SLOWER)
    taken = machines.enter("mini1", sys.executable, "-c", LISTENS, "43210")
    try:
        assert taken.stdout is not None and taken.stdout.readline() == b"here\n"
        said = cluster.says("up", *small, code=2)
    finally:
        cluster.kill("mini1", "socket.create_server")
        taken.communicate()
    machines.slow_down(new, "eth0")
    if new == "fresh":  # uv has its cache and no network: it would be the world's
        assert re.search(
            r"fresh \| making .venv with python3 \(3\.(.|\n)*fresh \|  \+ torch==", said
        )
        assert (machines.home(new) / "paramserver/code/.venv/.ready").exists()
    assert re.search(
        rf"{new} +\| warning: 0.0\d Gbit/s come up now, where make doctor had measured 0.56",
        said,
    )
    assert "mini1 | error: port 43210 is taken" in said
    assert said.splitlines()[-2:] == [
        "error: the server did not start on mini1", "  what it said is above",
    ]  # fmt: skip
    assert cluster.left() == []

    up = cluster.make("up", *small)
    up.wait_for(r"mini1 \| .*server at")
    up.kill()  # before the workers are started, or while they are, as when the laptop dies

    again = cluster.make("up", *small)
    again.wait_for(r"mini1 \| .*step [1-9]")

    machines.slow_down(new, "eth0", SLOWER)
    slow = rf"worker 1 \({new}\) brings 0.0[012]\d Gbit/s, where make doctor had measured 0.56"
    again.wait_for(rf"mini1 \| .*warning: {slow}")
    assert re.search(rf"the newest warnings:\nmini1 \| .*{slow}", cluster.says("status"))
    machines.slow_down(new, "eth0")

    machines.cut(new, "eth0", "down")
    again.wait_for(rf"mini1 \| .*worker 1 \({new}\) is gone: silent for")
    machines.on(new, "ip", "route", "add", "10.10.0.1", "via", "10.20.0.1")
    again.wait_for(rf"mini1 \| .*worker 1 \({new}\) is here")
    other = rf"comes by 10.20.0.{number}, not by {here} as make up had chosen"
    again.wait_for(rf"mini1 \| .*warning: worker 1 \({new}\) {other}")
    machines.cut(new, "eth0", "up")
    machines.on(new, "ip", "route", "del", "10.10.0.1")
    again.send(signal.SIGINT)
    assert again.end() == 0
    assert re.search(slow, cluster.says("logs", "--host=mini1"))
    assert len(cluster.runs()) == before + 1  # the server that ran already was left alone

    cluster.kill("mini1", "fleet.supervisor start server")
    cluster.kill(new, "fleet.supervisor")
    said = cluster.says("down")
    assert said.splitlines()[-1] == f"nothing of the run is left on mini1, {new}"
    assert cluster.left() == []


def test_a_script_on_two_workers_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    """Without a word in the file about workers; with its neighbour and its arguments."""
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "inside.py").write_text("CLASSES = 2\n")
    cluster.file.write_text("port: 43210\n")
    words = (f"--script={tmp_path / 'train.py'}", "hosts=mini1,mini2:2", "num_epochs=2")
    up = cluster.make("up", *words, "track_gradients=false", "--", "--rate", "0.5")
    up.wait_for(f"copying inside.py, train.py from {tmp_path} to each machine")
    assert up.end() == 0, up.output
    home = cluster.machines.home("mini2")
    for number in (2, 3):
        assert f"mini2 | [worker {number}] rate 0.5 in {home}/paramserver" in up.output
    assert re.search(r"mini1 \| rate 0.5 in ", up.output)  # the only worker there
    assert "worker 3 │" in up.output and "all epochs are done" in up.output
    assert set(cluster.left()) == set()
    name = cluster.runs()[-1].name
    assert up.lines[-2:] == [
        f"the run folder: mini1:paramserver/runs/{name}",
        f"copy the results here: make fetch; each with cluster={cluster.file} HOSTS=mini1,mini2:2",
    ]  # fmt: skip


def test_the_doctor_takes_the_fast_link_and_measures_both_as_iperf3_does(cluster: Cluster) -> None:
    cluster.file.write_text(PAIR % "")
    found = json.loads(cluster.says("doctor", "--json", code=1))  # 0.5 Gbit/s is slow for Ethernet
    chosen = found["chosen"]["mini2"]
    assert chosen["path"]["far"]["address"] == cluster.machines.address("mini1")
    rates = measured(found)
    kept = measurements.read(cluster.machines.home("mini1") / "paramserver")
    assert {(f.machine, f.near, f.far): f.bytes_per_s for f in kept} == {
        ("mini2", f"{network}.2", f"{network}.1"): rates[device]
        for network, device in ((FAST, "eth0"), (SLOW, "eth1"))
    }
    assert rates["eth0"] > 2 * rates["eth1"]
    assert "carries only" in "\n".join(f["problem"] for f in found["findings"])

    if shutil.which("iperf3") is None:
        pytest.skip("iperf3 is not installed")
    for _ in range(MEASUREMENTS - 1):  # what a cable carries changes while others use processors
        if agrees(cluster, rates):
            return
        rates = measured(json.loads(cluster.says("doctor", "--json", code=1)))
    assert agrees(cluster, rates)


def measured(found: dict[str, Any]) -> dict[str, float]:
    """Bytes a second from mini2 to mini1 that the doctor has measured, by device."""
    paths = [p for p in found["paths"] if (p["near"], p["far"]) == ("mini2", "mini1")]
    return {p["path"]["near"]["device"]: p["up_bytes_per_s"] for p in paths}


def agrees(cluster: Cluster, rates: dict[str, float]) -> bool:
    """Does iperf3 measure the same on both cables?"""
    theirs = {
        device: iperf3(cluster.machines, cluster.machines.address("mini1", network))
        for device, network in (("eth0", FAST), ("eth1", SLOW))
    }
    print(f"the doctor measured {rates}, iperf3 {theirs}")
    return bool(rates == pytest.approx(theirs, rel=0.15))


def test_a_plan_measures_model_and_links_on_each_machine(cluster: Cluster) -> None:
    cluster.file.write_text(PAIR.replace("role: server", "role: both") % "")
    said = cluster.says("plan", *SMALL, "codec=float32")
    assert re.search(r"mini2 \| 32 samples take [\d.]+ ms on cpu", said)
    assert re.search(r"^ *samples/s +machines +server on", said, re.MULTILINE)
    assert re.search(r"make up cluster=\S+ dataset.name=digits .*codec=float32", said)

    for _ in range(MEASUREMENTS):
        told = json.loads(cluster.says("plan", "--json", *SMALL, "local_steps=1"))
        rates = {(link["from"], link["to"]): link["up_bytes_per_s"] for link in told["links"]}
        rate = 8e-6 * rates["mini2", "mini1"]
        if faster_one := rate == pytest.approx(480, rel=0.25):  # of two links
            break
    assert faster_one, rate
    assert {tuple(p["machines"]) for p in told["plans"]} >= {("mini1",), ("mini1", "mini2")}
    assert {p["local_steps"] for p in told["plans"]} == {1}
    assert cluster.left() == []


def machines_logs(cluster: Cluster) -> str:
    """All that any process has written on any machine."""
    homes = (cluster.machines.home(name) for name in ("mini1", "mini2", "mini3"))
    logs = (path for home in homes for path in home.glob("paramserver/logs/*.log"))
    return "\n".join(path.read_text() for path in logs)


def iperf3(machines: Machines, address: str) -> float:
    """Bytes per second from mini2 to mini1, at this address of it, as iperf3 measures them."""
    server = machines.enter("mini1", "iperf3", "-s", "-1", "--forceflush")
    assert server.stdout is not None
    while b"listening" not in server.stdout.readline():
        pass
    told = machines.on("mini2", "iperf3", "-c", address, "-t", "1", "-J")
    server.communicate()
    return float(json.loads(told)["end"]["sum_received"]["bits_per_second"]) / 8
