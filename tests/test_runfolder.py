"""Run folders are never shared, metrics are whole lines of JSON, a full disk is only reported."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from whole import DEADLINE_S

import paramserver.output.runfolder as runfolder
from paramserver import drafts
from paramserver.errors import UserError
from paramserver.net import machine
from paramserver.output import stored
from paramserver.output.runfolder import (
    EvalLine,
    Past,
    Record,
    RunFolder,
    StepLine,
    find_checkpoint,
    latest,
    unended,
)
from paramserver.protocol.messages import Look
from paramserver.rounds.looks import DataSet
from paramserver.rounds.recovery import NOTHING, UNKNOWN

NOON = datetime(2026, 11, 22, 12, 0, 9)


def step_line(step: int, loss: float | None = 0.5) -> StepLine:
    return StepLine(
        step=step,
        seconds=0.25 * step,
        loss=loss,
        samples=64,
        step_s=0.25,
        workers=(1, 2),
        late=(3,),
        sent_bytes=1000,
        received_bytes=2000,
        shares=(40, 24),
    )


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that must be JSON by the letter, without NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_folder_is_named_by_the_time(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "new" / "runs", NOON)
    assert folder.path == tmp_path / "new" / "runs" / "2026-11-22_12-00-09"
    assert folder.path.is_dir()
    assert folder.config == folder.path / "config.yaml"
    assert folder.checkpoints == folder.path / "checkpoints"


def test_of_many_servers_in_one_second_each_gets_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunFolder.create(tmp_path, NOON), range(40)))
    names = {folder.path.name for folder in folders}
    assert names == {"2026-11-22_12-00-09"} | {f"2026-11-22_12-00-09-{n}" for n in range(2, 41)}


def test_a_parent_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error:
        RunFolder.create(tmp_path / "file" / "runs", NOON)
    assert str(tmp_path / "file" / "runs") in error.value.problem
    assert "Not a directory" in error.value.problem
    assert "run_dir" in error.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder.create(tmp_path / "runs", NOON)


def test_lines_are_strict_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log(step_line(1))
    folder.log(step_line(2, math.nan))
    folder.log(step_line(3, math.inf))
    folder.log(EvalLine(step=3, seconds=0.75, val_loss=-math.inf, val_accuracy=0.91))
    assert folder.close() is None
    first, second, third, evaluation = strict_lines(folder.metrics)
    assert first == {
        "step": 1,
        "seconds": 0.25,
        "loss": 0.5,
        "samples": 64,
        "step_s": 0.25,
        "workers": [1, 2],
        "late": [3],
        "sent_bytes": 1000,
        "received_bytes": 2000,
        "shares": [40, 24],
    }
    assert second["loss"] is None
    assert third["loss"] is None
    assert evaluation == {"step": 3, "seconds": 0.75, "val_loss": None, "val_accuracy": 0.91}


def test_lines_are_written_at_once_and_no_later_than_at_the_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def steps_on_disk() -> list[int]:
        return [line["step"] for line in strict_lines(folder.metrics)]

    folder.log(step_line(1))
    assert not folder.metrics.exists()
    folder.flush(100.0)
    assert steps_on_disk() == [1]
    folder.log(step_line(2))
    folder.flush(100.001)
    assert steps_on_disk() == [1, 2]
    folder.log(step_line(3))
    folder.close()
    assert steps_on_disk() == [1, 2, 3]


def test_a_run_that_goes_on_takes_up_its_metrics(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.take_up() == Past()
    for step in (1, 2):
        folder.log(step_line(step))
    folder.log(EvalLine(step=2, seconds=0.5, val_loss=0.5, val_accuracy=0.9))
    folder.close()
    with folder.metrics.open("ab") as file:
        file.write(b'{"step":3,"seco')  # the server was killed here
    again = RunFolder(tmp_path)
    past = again.take_up()
    assert (past.steps, past.samples, past.last) == (2, 2 * step_line(1).samples, step_line(2))
    again.log(step_line(3))
    again.close()
    assert [line["step"] for line in strict_lines(again.metrics)] == [1, 2, 2, 3]


def test_the_newest_run_of_a_port_goes_on_if_it_has_not_ended(tmp_path: Path) -> None:
    def made(
        name: str, port: int = 1, *, ended: bool = False, at: str | None = None, **settings: object
    ) -> RunFolder:
        folder = RunFolder(tmp_path / f"2026-11-2{name}")
        folder.path.mkdir()
        folder.write_record(
            Record(
                run=name,
                host=socket.gethostname(),
                port=port,
                settings={**settings},
                ended=ended,
                host_ip=at,
            )
        )
        return folder

    def goes_on(port: int = 1, at: str | None = None, **settings: object) -> str | None:
        found = unended(tmp_path, port, settings, at)
        if found is None:
            return None
        found.folder.close()
        return None if found.differs else found.record.run

    assert goes_on() is None
    made("1_00-00-00", seed=3)
    assert goes_on(seed=3) == "1_00-00-00"
    assert goes_on(seed=4) is None and goes_on(port=2, seed=3) is None
    made("2_00-00-00", port=2, seed=3)
    (tmp_path / "2026-11-23_00-00-00").mkdir()  # of an older version: no run.json
    assert goes_on(seed=3) == "1_00-00-00" and goes_on(port=2, seed=3) == "2_00-00-00"
    torn = made("4_00-00-00", seed=3)
    torn.record.write_bytes(b'{"run":')
    assert goes_on(seed=3) == "1_00-00-00"
    elsewhere = made("5_00-00-00", at="10.10.0.1", seed=3)
    assert goes_on(seed=3) == "1_00-00-00"
    assert goes_on(seed=3, at="10.10.0.1") == "5_00-00-00"
    assert elsewhere.claim()  # by a server that lives: in another network namespace, say
    assert goes_on(seed=3, at="10.10.0.1") is None
    elsewhere.close()
    assert goes_on(seed=3, at="10.10.0.1") == "5_00-00-00"
    newer = made("5_00-00-01", seed=3)
    assert newer.claim() and goes_on(seed=3) == "1_00-00-00"
    newer.close()
    made("6_00-00-00", ended=True, seed=3)
    assert goes_on(seed=3) is None


def record(number: int, **changed: Any) -> Record:
    own: dict[str, Any] = {"host": socket.gethostname(), "machine": machine.identity(), "port": 1}
    return Record(**{**own, "run": f"run {number}", "settings": {}, "number": number, **changed})


def made(parent: Path, now: datetime, **changed: Any) -> RunFolder:
    """A run folder as a server leaves it that was killed at once."""
    folder = RunFolder.create(parent, now)
    folder.write_record(record(folder.number, **changed))
    folder.close()
    return folder


BEFORE = datetime(2021, 6, 4, 12, 0, 9)  # a machine whose clock lost the time
LATER = datetime(2037, 1, 1)


def test_the_order_of_runs_is_not_a_clocks(tmp_path: Path) -> None:
    (tmp_path / "2030-01-01_00-00-00").mkdir()  # of an older version: before all with a number
    first = made(tmp_path, LATER, ended=True)
    second = made(tmp_path, BEFORE)
    for folder, step in ((first, 188), (second, 415)):
        stored_checkpoint(folder.checkpoints / stored.name(step), step)
    newest = latest(tmp_path)
    assert newest is not None and newest.path == second.path
    assert find_checkpoint("latest", tmp_path).name == "step-00000415.safetensors"
    found = unended(tmp_path, 1, {})
    assert found is not None and found.folder.path == second.path and not found.differs
    found.folder.close()
    shutil.rmtree(second.path)
    assert made(tmp_path, BEFORE).read_record().number == 3  # type: ignore[union-attr]


def test_no_two_runs_get_one_number(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda i: RunFolder.create(tmp_path, NOON), range(40)))
    for folder in folders:
        folder.close()
    assert sorted(folder.number for folder in folders) == list(range(1, 41))
    assert (tmp_path / ".newest_run").read_text() == "40\n"


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"host": "as-it-was-called-yesterday"}, id="another host name"),
        pytest.param({"machine": "a container's that is gone"}, id="another machine id"),
        pytest.param({"machine": ""}, id="of an older version"),
        pytest.param({"machine": "", "host": "3f2a9c"}, id="a container's host name"),
    ],
)
def test_what_a_machine_may_lose_between_two_starts_does_not_lose_its_run(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    made(tmp_path, NOON, **changed)
    found = unended(tmp_path, 1, {})
    assert found is not None and not found.differs
    found.folder.close()


def test_on_a_disk_of_several_machines_another_ones_run_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_shared", lambda path: True)
    monkeypatch.setattr(machine, "identity", lambda: "this one")  # a container may have none
    made(tmp_path, NOON, machine="another", host="mini2")
    found = unended(tmp_path, 1, {})
    assert found is not None and found.differs == ("its machine is mini2",)
    found.folder.close()
    made(tmp_path, NOON, host="as-it-was-called-yesterday")
    found = unended(tmp_path, 1, {})
    assert found is not None and not found.differs
    found.folder.close()


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"port": 2}, "port is 2 there, 1 here"),
        ({"host_ip": "10.10.0.1"}, "host_ip is 10.10.0.1 there, null here"),
        ({"settings": {"seed": 4}}, "seed is 4 there, 3 here"),
        ({"port": 2, "settings": {"seed": 4}}, None),  # another run
        ({"ended": True, "settings": {"seed": 4}}, None),
    ],
)
def test_what_is_nearly_the_run_is_named_once(
    tmp_path: Path, there: dict[str, Any], said: str | None
) -> None:
    made(tmp_path, NOON, **{"settings": {"seed": 3}, **there})
    found = unended(tmp_path, 1, {"seed": 3})
    assert (found and found.differs) == (said and (said,))
    if found is not None:
        found.folder.close()
    made(tmp_path, NOON, settings={"seed": 3}, ended=True)  # the one that was begun instead
    assert unended(tmp_path, 1, {"seed": 3}) is None


@pytest.mark.parametrize("theirs", [{"bucket_mb": 2.0}, {}])
def test_what_the_server_chose_for_itself_may_differ(
    tmp_path: Path, theirs: dict[str, Any]
) -> None:
    made(tmp_path, NOON, settings={"seed": 3, **theirs})
    now = {"seed": 3, "bucket_mb": 4.0}
    for chosen, same in ((["bucket_mb"], True), ([], False), (["seed"], False)):
        found = unended(tmp_path, 1, now, chosen=chosen)
        assert found is not None and (not found.differs) == same
        found.folder.close()


def test_a_folder_belongs_to_one_server_while_that_lives(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from paramserver.output.runfolder import RunFolder\n"
        "print(RunFolder(Path(sys.argv[1])).claim(), flush=True); sys.stdin.read()"
    )
    folder = RunFolder.create(tmp_path, datetime.now())
    command = [sys.executable, "-c", script, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"False\n"
        other.kill()
    folder.close()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"True\n"
        assert not folder.claim()
        other.kill()  # as the server may be
    assert folder.claim()
    folder.close()


def test_a_failing_disk_is_told_once_and_tried_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "gone")
    folder.log(step_line(1))
    problem = folder.flush(0.0)
    assert problem is not None
    assert str(folder.metrics) in problem
    assert "No such file or directory" in problem
    folder.log(step_line(2))
    assert folder.flush(1.0) is None
    folder.path.mkdir()
    folder.log(step_line(3))
    assert folder.flush(2.0) is None
    assert [line["step"] for line in strict_lines(folder.metrics)] == [1, 2, 3]
    folder.close()


def test_a_folder_that_vanishes_is_told_and_made_anew(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs", NOON)
    folder.config.write_text("a: 1")
    folder.remember(folder.config)
    folder.write_record(record(folder.number))
    folder.open_note()
    folder.log(step_line(1))
    assert folder.flush(0.0) is None
    shutil.rmtree(tmp_path / "runs")
    folder.log(step_line(2))
    folder.flush(0.5)  # the next look is later
    folder.log(step_line(3))
    problem = folder.flush(2.0)
    assert problem is not None and "has vanished" in problem
    assert folder.flush(4.0) is None
    assert folder.note(3, "lineage3") is None and folder.noted() == "lineage3"
    assert [line["step"] for line in strict_lines(folder.metrics)] == [3]
    assert folder.config.read_text() == "a: 1"
    assert folder.read_record() == record(1)
    assert unended(tmp_path / "runs", 1, {}) is None  # it is still this server's
    folder.close()
    again = unended(tmp_path / "runs", 1, {})
    assert again is not None
    again.folder.close()


def test_a_note_that_the_disk_does_not_take_is_none(tmp_path: Path) -> None:
    run_script(
        FULL_DISK
        + """
    assert folder.open_note() is None and folder.note(1, "lineage1") is None
    assert folder.noted() == "lineage1"
    disk_has_room_for(10)
    assert "newest_step cannot be written" in folder.note(2, "lineage2")
    assert folder.noted() == "?" and folder.note(3, "lineage3") is None
    """,
        tmp_path,
    )


def test_what_waits_for_a_failing_disk_is_bounded_and_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runfolder, "MAX_WAITING_BYTES", 1000)
    folder = RunFolder(tmp_path / "gone")
    for now in range(50):
        folder.log(step_line(now + 1))
        folder.flush(float(now))
    folder.path.mkdir()
    folder.close()
    steps = [line["step"] for line in strict_lines(folder.metrics)]
    assert folder.metrics.stat().st_size <= 1000
    assert steps == list(range(1, len(steps) + 1))
    assert steps


def run_script(script: str, *args: object) -> None:
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        check=True,
        timeout=DEADLINE_S,
    )


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from paramserver.output.runfolder import *

    def disk_has_room_for(size):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    folder = RunFolder(Path(sys.argv[1]))
"""


def test_a_line_torn_by_a_full_disk_is_continued(tmp_path: Path) -> None:
    run_script(
        FULL_DISK
        + """
    def log(step):
        folder.log(EvalLine(step=step, seconds=1.0, val_loss=0.5, val_accuracy=0.9))

    log(1), log(2), log(3)
    disk_has_room_for(100)  # ends within the second line
    assert "File too large" in folder.flush(0.0)
    assert folder.metrics.stat().st_size == 100
    log(4)
    assert folder.flush(1.0) is None
    disk_has_room_for(resource.RLIM_INFINITY)
    log(5)
    assert folder.close() is None
    """,
        tmp_path,
    )
    lines = strict_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


def test_summary_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.write_summary({"steps": 7, "train_loss": math.nan, "digest": "a" * 500}) is None
    before = folder.summary.read_bytes()
    assert json.loads(before) == {"steps": 7, "train_loss": None, "digest": "a" * 500}
    run_script(
        FULL_DISK
        + """
    disk_has_room_for(100)
    problem = folder.write_summary({"steps": 8, "digest": "b" * 500})
    assert "summary.json was not written: File too large" in problem, problem
    """,
        tmp_path,
    )
    assert folder.summary.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_that_cannot_be_written_raises_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OSError, match="director"):
        drafts.write(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_latest_is_the_newest_folder(tmp_path: Path) -> None:
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None
    for name in (
        "2026-11-21_23-59-59-12",
        "2026-11-22_12-00-09",
        "2026-11-22_12-00-09-2",
        "2026-11-22_12-00-09-10",
        "zoo",
        "2026-11-22_12-00-09-old",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "2027-01-01_00-00-00").touch()
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.path == tmp_path / "2026-11-22_12-00-09-10"


def stored_checkpoint(path: Path, step: object, **told: str) -> Path:
    """A checkpoint, as far as its header and its size tell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": stored.FORMAT, "step": str(step), **told}
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": metadata, "0": tensor}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return path


BROKEN = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer than it is": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "its header cut off": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 10),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another file": lambda path: stored_checkpoint(path, 20, format="pt"),
    "of a negative step": lambda path: stored_checkpoint(path, -1),
    "of an absurd step": lambda path: stored_checkpoint(path, 10**30),
    "of a step that is none": lambda path: stored_checkpoint(path, "ten"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_named_and_an_older_whole_one_too(tmp_path: Path, how: str) -> None:
    first = stored_checkpoint(
        tmp_path / "2026-11-21_00-00-00/checkpoints/step-00000900.safetensors", 900
    )
    run = tmp_path / "2026-11-22_00-00-00"
    older = stored_checkpoint(run / "checkpoints/step-00000010.safetensors", 10)
    newest = stored_checkpoint(run / "checkpoints/step-00000020.safetensors", 20)
    BROKEN[how](newest)
    for resume in ("latest", str(run), run.name):
        with pytest.raises(UserError) as error:
            find_checkpoint(resume, tmp_path)
        assert f"{newest} cannot be resumed: " in error.value.problem
        assert f"of step 10: resume={older}" in error.value.hint
    assert find_checkpoint(str(older), tmp_path) == older
    older.unlink()
    with pytest.raises(UserError, match=f"of step 900: resume={first}"):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(UserError, match="no older one that is whole"):
        find_checkpoint(str(run), tmp_path)


def test_what_resume_names(tmp_path: Path) -> None:
    def checkpoint(folder: str, step: int) -> Path:
        path = tmp_path / folder / "checkpoints" / f"step-{step:08}.safetensors"
        return stored_checkpoint(path, step)

    with pytest.raises(UserError) as error:
        find_checkpoint("latest", tmp_path)
    assert str(tmp_path) in error.value.problem
    older = checkpoint("2026-11-21_00-00-00", 900)
    checkpoint("2026-11-22_00-00-00", 500)
    newest = checkpoint("2026-11-22_00-00-00", 1500)
    (tmp_path / "2026-11-23_00-00-00").mkdir()  # of a run that ended before its first checkpoint
    assert find_checkpoint("latest", tmp_path) == newest
    assert find_checkpoint(str(older), tmp_path) == older
    assert find_checkpoint(str(older.parent.parent), tmp_path) == older
    assert find_checkpoint(str(older.parent), tmp_path) == older
    assert find_checkpoint("2026-11-21_00-00-00", tmp_path) == older
    for wrong in ("2026-11-23_00-00-00", "missing"):
        with pytest.raises(UserError, match=f"resume={wrong}"):
            find_checkpoint(wrong, tmp_path)


NOTES_AND_DIES = """
import os, signal, sys
from pathlib import Path
from paramserver.output.runfolder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
assert folder.open_note() is None
for step in range(1, 813):
    folder.note(step, f"lineage{step}")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_newest_step_survives_a_kill(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.noted() == UNKNOWN
    subprocess.run([sys.executable, "-c", NOTES_AND_DIES, str(tmp_path)], check=False)
    assert folder.noted() == "lineage812"
    assert folder.open_note() is None
    assert folder.noted() == "lineage812"  # the next server has it until there is a newer one
    folder.note(813, "lineage813")
    assert folder.noted() == "lineage813"
    folder.close()
    folder.note(814, "")  # nothing happens


def test_what_the_data_sets_have_in_common_is_noted_for_the_next_server(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = Record("r", "h", 1, {"port": 1})
    data_set = DataSet("worker 1 (pi)", True, "", (Look(7, "1", "dog", (0.5, 1.0)),))
    assert folder.note_data_set(data_set) is None and folder.read_record() is None  # not yet begun
    assert folder.write_record(record) is None
    assert folder.note_data_set(data_set) is None
    assert folder.read_record() == msgspec.structs.replace(record, data_set=data_set)


@pytest.mark.parametrize("content", [b"", b"812", b"x" * 64, b"\xff" * 64, b"9" * 5000])
def test_a_note_that_is_not_one_is_not_believed(tmp_path: Path, content: bytes) -> None:
    folder = RunFolder(tmp_path)
    folder.newest_step.write_bytes(content)
    assert folder.noted() == UNKNOWN
    assert folder.open_note() is None
    assert folder.noted() == (UNKNOWN if len(content) == 64 else NOTHING)
    folder.note(3, "lineage3")
    assert folder.noted() == "lineage3"
    folder.close()


def test_a_note_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "gone")
    problem = folder.open_note()
    assert problem is not None and "newest_step cannot be written" in problem
    folder.note(3, "lineage3")
    assert folder.noted() == UNKNOWN


def test_what_nobody_holds_is_cut_off(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3, 4):
        folder.log(step_line(step))
    folder.log(EvalLine(step=2, seconds=0.75, val_loss=0.1, val_accuracy=0.91))
    folder.close()

    again = RunFolder(tmp_path)
    assert again.take_up().workers == {1: (4, 160, 0), 2: (4, 96, 0), 3: (0, 0, 4)}
    past = again.take_up(before=3)
    assert (past.steps, past.samples, past.last) == (2, 128, step_line(2))
    assert past.workers == {1: (2, 80, 0), 2: (2, 48, 0), 3: (0, 0, 2)}
    again.log(step_line(3, 0.25))
    assert again.close() is None
    assert [(line["step"], line["loss"]) for line in strict_lines(again.metrics)] == [
        (1, 0.5),
        (2, 0.5),
        (3, 0.25),
    ]
