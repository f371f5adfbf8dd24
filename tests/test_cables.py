"""Machines whose cable is out, in both directions or in one, and in again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import browser
import pytest
from whole import DEADLINE_S, Run

from benchmarks.network import Hosts
from paramserver.net.jointoken import decode

DIRECTIONS = ((True, True), (True, False), (False, True))
"""What is cut: what leaves the worker's machine, and what arrives there."""


@pytest.mark.root
def test_a_cable_that_is_out_costs_nothing_but_time(tmp_path: Path) -> None:
    """Out until the server has given the worker up. No other worker waits; this one comes back;
    every sample is accounted for."""
    with Hosts(["mini1", "mini2"]) as hosts, Run(tmp_path) as run:
        here, there = hosts["mini1"], hosts["mini2"]
        address = f"host_ip={hosts.address('mini1')}"
        small = [
            "model.type=CNN",
            "model.width=2",
            "model.hidden=8",
        ]  # CURVE is slow on a busy machine
        long = ["observer=false", "num_epochs=9999", "num_workers=2", "heartbeat_timeout=3"]
        keys = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        server = run.server(address, "timeout=1", *small, *long, host=here, **keys)
        token = server.wait_for("other machines join with: ").rpartition("=")[2]
        beside = run.worker(1, address, host=here)
        far = run.worker(2, host=there, PARAMSERVER_JOIN=token)
        server.wait_for("training, step")

        for leaving, arriving in DIRECTIONS:
            hosts.cut("mini2", leaving=leaving, arriving=arriving)
            server.wait_for(r"worker 2 .*is gone: silent")
            hosts.mend("mini2")
            server.wait_for(r"worker 2 .*(is here|took a snapshot)")
            for _ in range(2):  # the first may have been said before it asked to join
                server.wait_for(r"training, step (?!.*joining)")
        before = len(run.steps())  # weights are trusted only after a contribution
        while not any(2 in line["workers"] for line in run.steps()[before:]):
            server.wait_for("training, step")

        server.send(signal.SIGINT)
        assert [p.end() for p in (server, beside, far)] == [0, 0, 0]
        summary, steps = run.summary(), run.steps()
        [folder] = run.runs
        settings = json.loads((folder / "run.json").read_text())["settings"]
    assert (settings["bucket_mb"], settings["min_bucket_mb"]) == (1.0, 0.0625)
    assert summary["replicas_equal"] and len(summary["digests"]) == 2
    assert [line["step"] for line in steps] == list(range(1, summary["steps"] + 1))
    applied = summary["samples_done"] + summary["samples_partly"]
    assert sum(line["samples"] for line in steps) == applied


WATCH = """
import sys
from paramserver.net.address import to_watch
from paramserver.watch.connection import Connection

with Connection(*to_watch(None, 0, None, sys.argv[1])) as connection:
    while True:
        status = connection.poll(1.0)
        if status is not None and status.diagnosis.cause == "cable" and status.step > 30:
            print(status.diagnosis.machine, status.diagnosis.sentence)
            break
"""


@pytest.mark.root
@pytest.mark.long
def test_a_slow_cable_is_named_to_a_watcher_on_another_machine(tmp_path: Path) -> None:
    """It watches with the watch token, over the network: in a terminal, and in a browser."""
    with Hosts(["mini1", "mini2", "mini3"]) as hosts, Run(tmp_path) as run:
        hosts.throttle("mini3", "12mbit")
        address = f"host_ip={hosts.address('mini1')}"
        many = ["observer=false", "num_epochs=9999", "num_workers=3", "dataset.name=digits"]
        many.append(f"page_ip={hosts.address('mini1')}")
        keys = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        server = run.server(address, *many, host=hosts["mini1"], **keys)
        token = server.wait_for("other machines join with: ").rpartition("=")[2]
        page = server.wait_for("page elsewhere: ").partition("elsewhere: ")[2]
        run.worker(1, address, host=hosts["mini1"])
        for id in (2, 3):
            run.worker(id, host=hosts[f"mini{id}"], PARAMSERVER_JOIN=token)
        port = f"port={decode(token).port}"
        printed = run.start("make keys", "-m", "paramserver.keys", address, port, **keys)
        assert printed.end() == 0
        watch = next(w for w in printed.output.split() if w.startswith("pw"))
        words = ["ip", "netns", "exec", hosts["mini2"], sys.executable, "-c", WATCH, watch]
        seen = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE_S)
        if not browser.missing():
            with browser.chromium(tmp_path, hosts["mini2"]) as chromium:
                tab = browser.Tab(chromium)
                tab.open(page, workers=3)
                tab.until("document.querySelector('#why').textContent.startsWith('the cable of')")
                told = tab.text("#why")
                link = "document.querySelector('#topology').textContent.includes('Mbit/s')"
                tab.until(link)
                assert tab.wrong == []
            assert re.match(
                r"the cable of worker 3 \(.+\) carries [\d.]+ Mbit/s, \d+ % of each round waits "
                r"for it: codec=float16 \([12]\.\d times faster\) or local_steps=16",
                told,
            )
        server.send(signal.SIGINT)
        server.end()
    assert seen.stdout.startswith("3 the cable of worker 3 ("), seen.stdout + seen.stderr
    assert "Mbit/s, " in seen.stdout and "codec=float16 (" in seen.stdout
