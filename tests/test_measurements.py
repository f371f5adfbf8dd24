"""What the doctor measured is kept for the next start, whatever became of the file."""

from __future__ import annotations

from pathlib import Path

from paramserver.fleet.measurements import FILE, Measurement, read, write


def test_the_newest_figures_are_kept(tmp_path: Path) -> None:
    assert read(tmp_path) == []
    one = Measurement("mini2", "10.10.0.2", "10.10.0.1", 2e9, 1.7e9)
    other = Measurement("pi5", "10.20.0.3", "10.20.0.1", 1e8, 1.7e9)
    for measured in ([one], [one, other], []):
        write(tmp_path, measured)
        assert read(tmp_path) == measured
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_another_version_s_file_counts_as_none(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", '[{"machine": "mini2"}]', "3"):
        (tmp_path / FILE).write_text(text)
        assert read(tmp_path) == []
