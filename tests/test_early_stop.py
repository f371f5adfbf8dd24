"""A run stops early, in order, where its evaluations get no better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from whole import Run

from paramserver.config import schema
from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.settings import Settings
from workers.observer.early_stop import EarlyStop

NAMES = ["accuracy", "loss", "ema_accuracy", "ema_loss"]
NAN = float("nan")


def settings(**early_stop: Any) -> Settings:
    """Checked as those of a program are."""
    tree = {**vars(Settings()), "wandb": vars(Settings().wandb), "early_stop": early_stop}
    return schema.build(tree)


def stops_at(values: list[float | None], **early_stop: Any) -> tuple[int, str] | None:
    """The first of these evaluations that stops the run, and why."""
    early = EarlyStop(settings(**early_stop), NAMES)
    for step, value in enumerate(values):
        reason = early.evaluated(step, {f"val_{early_stop['metric']}": value, "val_loss": value})
        if reason is not None:
            return step, reason
    return None


@pytest.mark.parametrize(
    ("given", "values", "step"),
    [
        ({"metric": "accuracy"}, [0.1, 0.2, 0.2, 0.1, 0.2], 4),  # three in a row
        ({"metric": "accuracy"}, [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3], None),
        ({"metric": "accuracy", "patience": 1}, [0.1, 0.2, 0.2], 2),
        ({"metric": "loss", "patience": 2}, [3.0, 2.0, 2.5, 1.9, 1.9, 2.0], 5),
        ({"metric": "ema_loss", "patience": 1}, [3.0, 2.0, 1.0], None),
        ({"metric": "loss", "patience": 1, "mode": "max"}, [1.0, 2.0, 1.5], 2),
        ({"metric": "accuracy", "patience": 1, "min_delta": 0.1}, [0.1, 0.3, 0.39], 2),
        ({"metric": "accuracy", "patience": 2, "min_delta": 0.1}, [0.1, 0.3, 0.39, 0.41], None),
        ({"metric": "accuracy", "patience": 2}, [0.1, NAN, None], 2),
        ({"metric": "accuracy", "patience": 2}, [NAN, 0.1, NAN, 0.2], None),
    ],
)
def test_it_stops_when_nothing_gets_better(
    given: dict[str, Any], values: list[float | None], step: int | None
) -> None:
    found = stops_at(values, **given)
    assert (None if found is None else found[0]) == step


def test_the_reason_names_the_best_and_its_step() -> None:
    found = stops_at([0.5, 0.91234, 0.9, 0.9], metric="accuracy", patience=2)
    assert found is not None and found[1] == (
        "accuracy got no better in the last 2 evaluations: the best was 91.234 %, at step 1"
    )
    found = stops_at([NAN, NAN], metric="loss", patience=2)
    assert found is not None and found[1] == "loss was no number in 2 evaluations"


@pytest.mark.parametrize(
    ("given", "problem", "hint"),
    [
        ({"metric": "acuracy"}, "acuracy: this run's evaluations have none", "accuracy, loss"),
        ({"metric": "val_nothing"}, "have none of that name", "there is: accuracy"),
        ({"metric": "off"}, "is more or less off better?", "early_stop.mode=max, or min"),
    ],
)
def test_a_metric_that_is_not_evaluated_is_told(
    given: dict[str, Any], problem: str, hint: str
) -> None:
    names = [*NAMES, "off"] if given["metric"] == "off" else NAMES
    with pytest.raises(UserError) as caught:
        EarlyStop(settings(**given), names)
    assert problem in caught.value.problem and hint in caught.value.hint


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["early_stop.patience=0"], "early_stop.metric must be text, got nothing"),
        (["early_stop=accuracy", "early_stop.patience=0"], "a whole number of evaluations"),
        (["early_stop=accuracy", "early_stop.mode=up"], "must be min or max"),
        (["early_stop=accuracy", "early_stop.min_delta=-1"], "must be a number, 0 or more"),
        (["early_stop=accuracy", "early_stop.patients=2"], "must be one of metric, patience"),
        (["early_stop=accuracy", "observer=false"], "nobody evaluates then"),
        (["early_stop=accuracy", "eval_steps=0"], "the only evaluation is that of the end"),
        (["ema=1"], "ema must be more than 0 and below 1"),
        (["ema=0.9", "local_steps=4", "overlap=true"], "ema must be null with overlap=true"),
        (["samples=count"], "must be a function of yours"),
    ],
)
def test_settings_that_cannot_be(words: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        load(words, "server")
    assert problem in caught.value.problem


def test_a_run_of_the_built_in_training_stops_early_for_all(tmp_path: Path) -> None:
    stop = ["early_stop.metric=ema_accuracy", "early_stop.patience=2", "early_stop.min_delta=1"]
    with Run(tmp_path) as run:
        server = run.server(
            *stop, "ema=0.9", "dataset.name=digits", "eval_steps=10", "num_epochs=500"
        )
        crew = [run.worker(1), run.worker(2)]
        assert [p.end() for p in (server, *crew)] == [0, 0, 0], server.output
        summary = run.summary()
        assert "the observer stopped it: ema_accuracy got no better" in summary["end"]
        assert 30 <= summary["steps"] < 500 * 62
        assert summary["metrics"].keys() == {"ema_loss", "ema_accuracy"}
        assert summary["val_accuracy"] != summary["metrics"]["ema_accuracy"]
        assert "ema_accuracy got no better in the last 2 evaluations" in server.output
        assert all("ema_accuracy got no better" in worker.output for worker in crew)
        kept = [load_file(run.runs[-1] / f"{of}.safetensors") for of in ("model", "ema")]
        assert kept[0].keys() == kept[1].keys()
        assert any(not kept[0][name].equal(kept[1][name]) for name in kept[0])
