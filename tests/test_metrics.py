"""One dict of metrics by name: out of a report, into files and back, and in words."""

from __future__ import annotations

import pytest

from paramserver.output import metrics

REPORT = {"val_loss": 0.25, "val_mood": 2.0, "val_accuracy": 0.93456, "val_gone": None}


def test_a_report_holds_them_beside_the_loss() -> None:
    assert metrics.reported(REPORT) == {"mood": 2.0, "accuracy": 0.93456, "gone": None}


def test_files_keep_the_field_that_the_accuracy_has_had() -> None:
    fields = metrics.fields(metrics.reported(REPORT))
    assert fields == {"val_accuracy": 0.93456, "metrics": {"mood": 2.0, "gone": None}}
    assert list(metrics.held(fields)) == ["accuracy", "mood", "gone"]
    assert metrics.held(fields) == metrics.reported(REPORT)
    assert metrics.fields({}) == {"val_accuracy": None, "metrics": {}}


@pytest.mark.parametrize(
    "fields", [{}, {"val_accuracy": None}, {"metrics": None}, {"metrics": "?"}]
)
def test_a_file_without_any_holds_none(fields: dict[str, object]) -> None:
    assert metrics.held(fields) == {}


def test_each_is_written_in_its_form() -> None:
    values = {"accuracy": 0.93456, "mood": 0.123456, "gone": None, "a\x1bb": 2.0}
    assert metrics.live(values)[:2] == ["accuracy 93.5 %", "mood 0.1235"]
    assert metrics.final(values)[:2] == ["93.46 % right", "mood 0.1235"]
    assert len(metrics.live(values)) == 3 and "\x1b" not in "".join(metrics.live(values))
