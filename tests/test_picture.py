"""The picture of a run is drawn from whatever its metrics hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray
from whole import DEADLINE_S

from paramserver.output.curves import Curves, read
from paramserver.output.picture import Columns, _rates, _smoothed, draw

# Training and validation loss, validation accuracy, late workers.
BLUE = (47, 111, 222)
COLOURS = (BLUE, (240, 140, 46), (31, 157, 114), (214, 69, 69))


def step(at: int, loss: float | None = 0.5, late: tuple[int, ...] = ()) -> dict[str, Any]:
    return {
        "step": at,
        "seconds": 0.01 * at,
        "loss": loss,
        "samples": 64,
        "step_s": 0.01,
        "late": late,
        "workers": [1, 2],
    }


def evaluation(at: int, loss: float | None = 0.4, accuracy: float | None = 0.9) -> dict[str, Any]:
    return {"step": at, "seconds": 0.01 * at, "val_loss": loss, "val_accuracy": accuracy}


def write(path: Path, records: Iterable[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def has_colour(path: Path, colour: tuple[int, int, int]) -> bool:
    """Whether the picture, which must be a whole one of 1200 x 800, has pixels of this colour."""
    image: NDArray[np.float64] = imread(path)
    assert image.shape == (800, 1200, 4)
    return bool((np.round(255 * image[:, :, :3]) == colour).all(axis=2).any())


RUNS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no steps": ([], ""),
    "one step": ([step(1)], ""),
    "one step and its evaluation": ([step(1), evaluation(1)], ""),
    "only an evaluation": ([evaluation(0)], ""),
    "no loss known": ([step(at, None) for at in range(1, 50)], ""),
    "nothing evaluated well": ([step(1), evaluation(1, None, None)], ""),
    "all zero": ([step(1, 0.0) | {"samples": 0}, step(2, 0.0) | {"samples": 0}], ""),
    "the clock stands": ([step(at) | {"seconds": 0.0, "step_s": 0.0} for at in (1, 2)], ""),
    "all late": ([step(at, late=(2,)) for at in range(1, 4000)], ""),
    "resumed": ([step(at) for at in range(5000, 5100)] + [evaluation(5100)], ""),
    "huge": ([step(at, 1e30 * at) for at in range(1, 100)], ""),
    "negative": ([step(at, -1.0 * at) for at in range(1, 100)], ""),
    "torn": ([step(1), step(2)], '{"step": 3, "sec'),
    "rubbish": ([step(1)], '\n[1]\nnull\n\x00\n{"step": "x"}\n{"seconds": 1}\n'),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_run_has_a_picture(name: str, tmp_path: Path) -> None:
    records, tail = RUNS[name]
    metrics = write(tmp_path / "metrics.jsonl", records, tail)
    assert draw(read(metrics), tmp_path / "curves.png", r"Run $\frac$ of_2 %") is None
    has_colour(tmp_path / "curves.png", BLUE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_the_picture_shows_what_was_measured(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    steps = [step(at, 2 / at) for at in range(1, 200)]
    draw(read(write(tmp_path / "a", steps)), picture, "Run")
    assert [has_colour(picture, c) for c in COLOURS] == [True, False, False, False]
    evaluations = [evaluation(at, 1.5 / at, 1 - 1 / at) for at in range(10, 200, 20)]
    late = [step(200, late=(2,))]
    draw(read(write(tmp_path / "b", steps + evaluations + late)), picture, "Run")
    assert [has_colour(picture, c) for c in COLOURS] == [True] * 4


def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    records = (step(at, 2 / at + at % 7, late=(1,) * (at % 50 == 0)) for at in range(1, 100_001))
    metrics = write(tmp_path / "metrics.jsonl", records)
    assert draw(read(metrics), tmp_path / "curves.png", "Run") is None
    assert has_colour(tmp_path / "curves.png", BLUE)


def test_a_file_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    problem = draw(Curves(), tmp_path / "no" / "curves.png", "Run")
    assert problem == (f"{tmp_path / 'no' / 'curves.png'} was not drawn: No such file or directory")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")


def test_of_two_lines_for_a_step_the_last_counts(tmp_path: Path) -> None:
    lines = [step(2, 2.0), step(1, 1.0), step(2, 7.0), evaluation(2)]
    metrics = Columns(read(write(tmp_path / "metrics.jsonl", lines)))
    assert metrics.step.tolist() == [1, 2]
    assert metrics.loss.tolist() == [1.0, 7.0]
    assert metrics.eval_step.tolist() == [2]


def test_smoothing_keeps_the_curve_and_drops_single_outliers() -> None:
    x = np.arange(1.0, 601.0)
    y = 3 - x / 300
    y[400] = 50.0
    at, means = _smoothed(x, y)
    assert (at[0], at[-1]) == (1.0, 600.0)
    assert means[0] == y[0]
    # Off by half a window at the end, where there is no later half, and nowhere by more.
    assert np.abs(means - (3 - at / 300)).max() <= 6 / 300


def test_the_accuracy_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    """Else the metric that was reported first."""
    lines = [evaluation(1) | {"metrics": {"mood": 2.0}}, evaluation(2, accuracy=None)]
    drawn = Columns(read(write(tmp_path / "metrics.jsonl", lines)))
    assert drawn.metric == "accuracy" and drawn.val_metric[0] == 0.9
    assert np.isnan(drawn.val_metric[1])
    lines = [evaluation(1, accuracy=None), evaluation(2, accuracy=None) | {"metrics": {"mood": 2}}]
    drawn = Columns(read(write(tmp_path / "metrics.jsonl", lines)))
    assert drawn.metric == "mood" and drawn.val_metric[1] == 2


def test_rates_are_by_the_clock_with_pauses(tmp_path: Path) -> None:
    pause = [step(at) | {"seconds": 0.01 * at + (2.0 if at > 100 else 0.0)} for at in range(1, 201)]
    at, rates = _rates(Columns(read(write(tmp_path / "metrics.jsonl", pause))))
    assert math.isclose(float(np.median(rates)), 6400)
    assert 100 < at[rates.argmin()] <= 103
    assert rates.min() < 100


def test_matplotlib_is_loaded_only_to_draw_and_without_pyplot(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.jsonl", [step(1)])
    script = """
import sys
from pathlib import Path
from paramserver.output.curves import read
from paramserver.output.picture import draw
assert "matplotlib" not in sys.modules
draw(read(Path(sys.argv[1])), Path(sys.argv[2]), "Run")
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(metrics), str(tmp_path / "curves.png")],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
