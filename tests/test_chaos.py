"""A short chaos with real processes, and proof that its judge would show a broken promise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chaos import Sizes, Tally, judge

TESTS = Path(__file__).resolve().parent
SUMMARY = {
    "steps": 3, "updates": 3, "samples_done": 96, "samples_partly": 0, "samples_skipped": 0,
    "replicas_equal": True, "digests": {}, "val_accuracy": 0.93,
}  # fmt: skip
LINES = [{"step": step, "samples": 32} for step in (1, 2, 3)]


@pytest.mark.parametrize(
    ("minutes", "settings"),
    [
        pytest.param("0.2", [], marks=pytest.mark.long),
        ("0.03", ["shares=speed", "local_steps=8"]),
        pytest.param("0.2", ["shares=speed"], marks=pytest.mark.long),
        pytest.param("0.2", ["local_steps=32"], marks=pytest.mark.long),
        pytest.param(
            "0.2", ["shares=speed", "local_steps=8", "overlap=true"], marks=pytest.mark.long
        ),
        pytest.param("0.2", ["local_steps=auto", "codec=int8"], marks=pytest.mark.long),
        pytest.param("0.2", ["shards=3"], marks=[pytest.mark.long, pytest.mark.root]),
    ],
)
def test_faults_of_every_kind_break_no_promise(minutes: str, settings: list[str]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "chaos", "--minutes", minutes),
            *("--seed", "5", "--no-compare", *settings),
        ],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every promise was kept" in done.stdout
    assert "steps lost" in done.stdout and "fault: " in done.stdout


def test_a_run_without_a_flaw_is_judged_so() -> None:
    rows, broken = judge(Tally(), SUMMARY, LINES, 0.94)
    assert broken == [] and ("samples applied twice", "0") in rows


@pytest.mark.parametrize(
    ("tally", "summary", "lines", "told"),
    [
        (Tally(steps_lost=1), {}, LINES, "1 closed steps were lost"),
        (Tally(), {"samples_done": 64}, LINES, "32 samples, or a step, were applied twice"),
        (Tally(), {"samples_done": 128}, LINES, "32 samples are in no update"),
        (Tally(), {}, [*LINES, LINES[-1]], "applied twice"),
        (Tally(), {"updates": 2}, [LINES[0], LINES[1] | {"update": 1}], "applied twice"),
        (Tally(), {"replicas_equal": False}, LINES, "replicas differ"),
        (Tally(), {"val_accuracy": 0.5}, LINES, "accuracy 0.5, undisturbed 0.94"),
    ],
)
def test_a_broken_promise_is_told(
    tally: Tally, summary: dict[str, Any], lines: list[dict[str, Any]], told: str
) -> None:
    _, broken = judge(tally, SUMMARY | summary, lines, 0.94)
    assert any(told in promise for promise in broken), broken


def test_what_grows_is_told() -> None:
    flat, growing = [100 * 2**20] * 40, [(100 + 2 * i) * 2**20 for i in range(40)]
    assert Sizes({"server": flat}, {"server": [30] * 40}).judge()[1] == []
    assert "memory of server grows" in Sizes({"server": growing}).judge()[1][0]
    lost = [30 + i // 4 for i in range(40)]
    assert "descriptors of server grows" in Sizes({}, {"server": lost}).judge()[1][0]
