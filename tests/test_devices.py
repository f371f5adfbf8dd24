"""What the doctor tells about this machine's own devices."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from paramserver.fleet import devices as doctor
from workers.builtin import builders, devices
from workers.builtin.devices import Tried, judged, try_all

CLONE = Path(__file__).resolve().parent.parent
GOOD = Tried("mps", "arm (GPU)", 1.25, 0.5, 2.3, 0.02, 0.001, 0.0)
HEAD = {
    "paramserver": "0.1.0",
    "torch": "2.15.0",
    "python": "3.12.1",
    "system": "macOS 15.1, arm64",
}


def test_the_doctor_tries_the_devices_of_a_machine_that_names_no_others(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/cluster.yaml").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "paramserver.launch", "doctor", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CLONE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    told = json.loads(done.stdout)
    assert told["problem"] == "" and told["versions"]["torch"].startswith(torch.__version__[:4])
    assert {one["device"] for one in told["devices"]} == {*builders.devices_here()}
    first = told["devices"][0]
    assert first["device"] == "cpu" and first["problem"] == ""
    assert first["off_exchanged"] == 0.0 and first["step_ms"] > 0
    assert told["memory"]["bytes"] > 0 and told["memory"]["wrong"] == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cuda:0", marks=pytest.mark.cuda),
        pytest.param("mps", marks=pytest.mark.mps),
    ],
)
def test_a_gpu_learns_what_the_cpu_learns(device: str) -> None:
    [tried] = try_all([device])
    assert tried.problem == "" and tried.off_exchanged < devices.OFF_EXCHANGED_MAX


def test_a_device_that_fails_is_told_and_the_next_one_tried() -> None:
    """`meta` computes shapes only: it stands for a GPU on which an operation is missing."""
    [tried] = try_all(["meta"])
    assert tried.device == "meta" and "Error: " in tried.problem and math.isnan(tried.step_ms)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"last": 2.2}, "it does not learn"),
        ({"last": math.nan}, "it does not learn"),
        ({"off": 0.2}, "it learns something else than the CPU"),
        ({"off": math.nan}, "it learns something else than the CPU"),
        ({"off_exchanged": 0.01}, "the exchange changes what it learns"),
    ],
)
def test_what_is_wrong_has_a_sentence(change: dict[str, float], problem: str) -> None:
    assert judged(replace(GOOD, **change)).problem == problem


def test_the_table_can_be_pasted() -> None:
    broken = {k: None if v != v else v for k, v in asdict(Tried("cuda:0", "RTX 9090")).items()}
    broken["problem"] = "RuntimeError: CUDA error: no kernel image is available"
    text = doctor.table(HEAD, [asdict(GOOD), broken], "it ended with exit code -11: killed")
    assert text.splitlines() == [
        "paramserver 0.1.0, torch 2.15.0",
        "Python 3.12.1, macOS 15.1, arm64",
        "",
        "device       step   exchange   loss             off by  result",
        "mps       1.25 ms    0.50 ms   2.30 to 0.020    0.10 %  right",
        "cuda:0                                                  WRONG",
        "",
        "mps: arm (GPU)",
        "cuda:0: RTX 9090",
        "cuda:0: RuntimeError: CUDA error: no kernel image is available",
        "it ended with exit code -11: killed",
    ]
