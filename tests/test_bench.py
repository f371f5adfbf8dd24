"""The benchmark as a program: what it computes from measurements, and that it leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import buckets, report, runs
from benchmarks.machine import Machine
from benchmarks.network import NAMESPACES, why_no_hosts
from benchmarks.parts import Case, alternate, share_exposed
from benchmarks.report import DDP, GLOO, Results, Row

CLONE = Path(__file__).resolve().parent.parent

MACHINE = Machine(
    taken="2026-11-22 10:00",
    commit="abc1234",
    cpu="a processor",
    cores=2,
    memory_gb=8.0,
    system="Linux",
    python="3.11.7",
    torch="2.15",
    pyzmq="pyzmq 27",
    load=0.1,
    cores_gain=1.9,
    tcp_rate=2.5e9,
    copy_rate=2e10,
    round_trip_s=2e-5,
)


def results(*rows: Row) -> Results:
    return Results(MACHINE, "full", list(rows))


def row(how: str, *values: float, part: str = "exchange", workers: int = 2) -> Row:
    return Row(part, "46.8 MB", workers, how, "ms", list(values), [10.0])


# ------------------------------------------------------------------ figures


def test_ratios_are_to_gloo_of_the_same_group() -> None:
    gloo, other, ours = row(GLOO, 40, 50, 60), row(GLOO, 99, workers=4), row("ours", 20, 25, 90)
    found = results(gloo, other, ours)
    assert found.ratio(ours) == 0.5
    assert found.ratio(gloo) is None
    assert results(ours).ratio(ours) is None
    assert results(row(DDP, 10), ours).ratio(ours) == 2.5


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.5, "1.5"), (42.345, "42.3"), (99.97, "100"), (1234.5, "1,234")],
)
def test_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_ring_moves_less_than_two_gradients_through_each() -> None:
    assert [runs.ring_bytes(100, n) for n in (1, 2, 4)] == [0, 100, 150]


def test_buckets_as_nobody_sets_them_are_measured_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`shards` stays unset, too: float32 has other buckets where several may average."""
    told: list[tuple[object, object]] = []

    def exchange(*_: object, shards: int | None = 1, more_settings: object = ()) -> runs.Exchange:
        told.append((shards, more_settings))
        return runs.Exchange(0.4, 0.0, 0.0, 0.0)

    monkeypatch.setattr(runs, "exchange", exchange)
    monkeypatch.setattr(runs, "all_reduce", lambda *_: 0.4)
    buckets.compare("46.8 MB", "float32", [12], 1, 1, runs.HERE)
    assert told[0] == (None, [])
    assert "unset   400.00 ms" in capsys.readouterr().out


def test_sizes_are_what_they_are_called() -> None:
    for name in runs.SIZES:
        assert runs.size_bytes(name) / 1e6 == pytest.approx(float(name.split()[0]), rel=0.005)


def test_traffic_of_a_round_and_nobody_missing() -> None:
    lines = [
        {"workers": [1, 2], "sent_bytes": 100 * step, "received_bytes": 50 * step}
        for step in range(1, 5)
    ]
    assert runs.traffic(lines, 2) == (100, 50)
    with pytest.raises(RuntimeError, match="without one of its workers"):
        runs.traffic(lines, 3)


@pytest.mark.parametrize(("hidden", "percent"), [(1.0, 0), (0.75, 25), (0.0, 100)])
def test_what_a_round_takes_longer_than_backward_is_exposed(hidden: float, percent: float) -> None:
    def rounds_of(backward_s: float) -> tuple[float, float]:
        exchange_s = 0.1
        return backward_s + exchange_s * (1 - hidden if backward_s else 1), backward_s

    assert share_exposed(rounds_of) == pytest.approx(percent)


# ------------------------------------------------------------------ the order of measuring


def cases(seen: list[str], **broken_at: int) -> list[Case]:
    def measure(how: str) -> tuple[float, float]:
        seen.append(how)
        if seen.count(how) == broken_at.get(how):
            raise RuntimeError("broken")
        return float(len(seen)), 1.0

    return [Case(Row("exchange", "1 MB", 2, how, "ms"), lambda h=how: measure(h)) for how in "AB"]


def test_cases_are_measured_in_turn() -> None:
    seen: list[str] = []
    measured = cases(seen)
    alternate(list(measured), 3, lambda: True, lambda row, error: None)
    assert "".join(seen) == "ABABAB"
    assert [case.row.values for case in measured] == [[1, 3, 5], [2, 4, 6]]
    assert measured[0].row.limits == [1, 1, 1]


def test_a_case_that_fails_drops_out_and_is_told() -> None:
    seen: list[str] = []
    told: list[str] = []
    alternate(cases(seen, A=2), 3, lambda: True, lambda row, error: told.append(row.how))
    assert "".join(seen) == "ABABB" and told == ["A"]


def test_nothing_starts_after_the_time() -> None:
    seen: list[str] = []
    alternate(cases(seen), 3, lambda: len(seen) < 3, lambda row, error: None)
    assert "".join(seen) == "ABA"


# ------------------------------------------------------------------ what is written


def test_the_table() -> None:
    ours = row("ours", 20, 24, 28)
    ours.notes.append("a worker was late")
    assert report.table(results(row(GLOO, 48), ours), "exchange").splitlines() == [
        "| size | N | how | ms | lowest – highest | ÷ gloo | limit of the bytes |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
        f"| 46.8 MB | 2 | {GLOO} | 48 |  |  | 10 |",
        "|  |  | ours | 24 | 20 – 28 | 0.50 | 10 |",
        "",
        "46.8 MB, N = 2, ours: a worker was late",
    ]


def test_rows_say_whether_an_observer_follows_and_how_busy_the_cores_were() -> None:
    rows = [row(GLOO, 48, part="shards")]
    for observer, busy in ((False, [41.0]), (True, [50.0, 60.0, 90.0])):
        ours = row("ours", 24, part="shards")
        ours.observer, ours.busy = observer, busy
        rows.append(ours)
    found = results(*rows)
    assert report.table(found, "shards").splitlines() == [
        "| size, cables | N | how | observer | ms | lowest – highest | ÷ gloo | cores busy, % "
        "| limit of the bytes |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
        f"| 46.8 MB | 2 | {GLOO} |  | 48 |  |  |  | 10 |",
        "|  |  | ours | no | 24 |  | 0.50 | 41 | 10 |",
        "|  |  | ours | yes | 24 |  | 0.50 | 60 | 10 |",
    ]
    assert [r.label for r in rows] == [GLOO, "ours", "ours, observer"]  # bars of their own


def test_docs_get_what_was_measured_and_keep_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(
        "# Head\n<!-- exchange -->\nold\n<!-- end -->\nprose\n<!-- links -->\nkept\n<!-- end -->\n"
    )
    found = results(row(GLOO, 48))
    for _ in range(2):  # and a second time changes nothing
        assert report.write_docs(found, page) == ["exchange"]
    text = page.read_text()
    assert f"<!-- exchange -->\n\n{report.table(found, 'exchange')}\n\n<!-- end -->" in text
    assert "old" not in text and "prose\n<!-- links -->\nkept\n<!-- end -->" in text


def test_the_page_has_a_place_for_every_table() -> None:
    text = (CLONE / "docs/performance.md").read_text()
    for name in (*report.TITLES, "machine", "picture"):
        assert text.count(f"<!-- {name} -->\n") == 1
    assert text.count("<!-- end -->") == len(report.TITLES) + 2


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    found = results(row(GLOO, 48, 50), row("ours", 20))
    path = report.save(found, tmp_path)
    assert report.load(path) == found
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_newest_full_result_wins(tmp_path: Path) -> None:
    names = ("2026-11-21_10-00.json", "2026-11-22_10-00.json", "2026-11-23_10-00-quick.json")
    for name in names:
        (tmp_path / name).touch()
    assert report.newest(tmp_path) == tmp_path / names[1]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).unlink()
    assert report.newest(tmp_path) == tmp_path / names[2]
    (tmp_path / names[2]).unlink()
    assert report.newest(tmp_path) is None


# ------------------------------------------------------------------ processes


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=CLONE, capture_output=True, text=True, check=False
    )


def test_a_team_tells_who_failed_and_leaves_nobody() -> None:
    """A child process, since the one that others are forked from lives as long as its parent."""
    ran = python(
        "-c",
        "import json, time\n"
        "from benchmarks.team import Failed, Team, left_behind\n"
        "for function, argument, limit in ((json.loads, 'nonsense', 90), (time.sleep, 600, 0.5)):\n"
        "    try:\n"
        "        with Team(limit) as team:\n"
        "            team.start('other', time.sleep, 600)\n"
        "            team.program('program', 'http.server', '0')\n"
        "            team.start('it', function, argument)\n"
        "            team.wait('it')\n"
        "    except Failed as failed:\n"
        "        print(str(failed).splitlines()[0], str(failed).splitlines()[-1], sep=' ... ')\n"
        "    print(left_behind(), team.folder.exists())\n",
    )
    ended, left, late, left_late = ran.stdout.splitlines()
    wrong = "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)"
    assert ended == f"it ended with code 1: ... {wrong}", ran.stderr
    assert late.startswith("out of time waiting for it ... program said last:")
    assert left == left_late == "[] False"


@pytest.mark.long
def test_a_tiny_run(tmp_path: Path) -> None:
    ran = python(
        *("-m", "benchmarks.bench", "--tiny", "--results", str(tmp_path)),
        *("--only", "exchange", "--only", "links", "--only", "shards", "--only", "scale"),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = tmp_path.glob("*-tiny.json")
    found = report.load(path)
    linked = () if why_no_hosts() else ("links", "shards")
    for part in ("exchange", *linked, "scale"):
        assert found.of(part), part
        assert all(row.value > 0 for row in found.of(part))
        assert report.TITLES[part] in ran.stdout
    if why_no_hosts():
        assert found.notes == [f"{p}: not measured: {why_no_hosts()}" for p in ("links", "shards")]
    else:
        assert found.notes == []
        left = [p.name for p in NAMESPACES.glob("bench*") if not alive(p.name)]
        assert left == []


def alive(namespace: str) -> bool:
    """Does the benchmark that made this namespace still run? Another one may, beside the tests."""
    return os.path.exists(f"/proc/{namespace.removeprefix('bench').partition('-')[0]}")
