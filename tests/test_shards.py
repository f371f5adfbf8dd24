"""Shards beside the workers, each on a host of its own: whole runs over shaped cables."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from whole import Program, Run

from benchmarks.network import Hosts

NAMES = ["mini1", "mini2", "mini3"]
SMALL = ["bucket_mb=0.01", "observer=false", "num_epochs=9999", "digest_steps=5"]


class Cluster:
    """A server beside worker 1, and two workers on hosts of their own."""

    def __init__(self, hosts: Hosts, run: Run, folder: Path, security: str, *more: str) -> None:
        self.run, self.hosts = run, hosts
        address = f"host_ip={hosts.address('mini1')}"
        keys = {"XDG_CONFIG_HOME": str(folder / "mini1")}
        near, token = [f"security={security}"], dict[str, str]()
        self.server = run.server(
            *(address, "num_workers=3", *near, *SMALL, *more), host=hosts["mini1"], **keys
        )
        if security == "curve":
            told = self.server.wait_for("other machines join with: ")
            token = {"PARAMSERVER_JOIN": told.rpartition("=")[2].strip()}
        far = [] if token else [address, *near]
        self.workers = [run.worker(1, address, *near, host=hosts["mini1"], **keys)]
        for number in (2, 3):
            host = hosts[NAMES[number - 1]]
            self.workers.append(run.worker(number, *far, host=host, **token))

    def end(self) -> None:
        """All end in order, with equal weights."""
        self.server.send(signal.SIGINT)
        assert [p.end() for p in (self.server, *self.workers)] == [0] * 4
        summary = self.run.summary()
        assert summary["replicas_equal"] and len(summary["digests"]) == 3


@contextmanager
def cluster(folder: Path, security: str, *more: str) -> Iterator[Cluster]:
    # A slow cable leaves the processors idle, which the processes of the shards need to begin.
    with Hosts(NAMES, rate="20mbit", burst="64kb") as hosts, Run(folder) as run:
        yield Cluster(hosts, run, folder, security, *more)


def shards_of(workers: Sequence[Program]) -> list[psutil.Process]:
    """The processes of the shards that these workers have started."""
    return [
        child
        for worker in workers
        for child in psutil.Process(worker.process.pid).children(recursive=True)
        if "paramserver.shard" in child.cmdline()
    ]


@pytest.mark.root
@pytest.mark.parametrize("security", ["none", "curve"])
def test_shards_on_three_hosts_average_as_one_server_does(tmp_path: Path, security: str) -> None:
    with cluster(tmp_path, security, "shards=3") as there:
        there.server.wait_for("several average the gradients: 33 % itself, 33 % .*, 33 % ")
        for _ in range(3):
            there.server.wait_for("training, step")
        shards = shards_of(there.workers)
        assert len(shards) == 2
        there.end()
        assert not any(map(psutil.Process.is_running, shards))


@pytest.mark.root
def test_a_shard_that_is_killed_costs_its_round_and_is_replaced(tmp_path: Path) -> None:
    with cluster(tmp_path, "none", "shards=2", "heartbeat_timeout=3") as there:
        there.server.wait_for("several average the gradients: 50 % itself, 50 % ")
        there.server.wait_for("training, step")
        [first] = shards_of(there.workers)
        os.kill(first.pid, signal.SIGKILL)
        there.server.wait_for(r"shard 1 on .* is gone: .*; others average its part")
        there.server.wait_for("carries shard 2")
        there.server.wait_for("several average the gradients: 50 % itself, 50 % ")
        there.server.wait_for("training, step")
        there.end()
