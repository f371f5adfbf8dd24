"""The status of a run: what it may hold, and that it holds no more."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest

from paramserver.errors import PeerError
from paramserver.protocol.messages import Phase
from paramserver.status.value import (
    LINE_CHARS,
    LINES_MAX,
    OBSERVER,
    ROUNDS_KEPT,
    SERVER,
    STATUS_BYTES_MAX,
    Cause,
    Diagnosis,
    Evaluation,
    Event,
    EventKind,
    Link,
    LogLine,
    Machine,
    RoundTimes,
    Samples,
    State,
    Status,
    Times,
    finite,
    from_json,
    to_json,
)

FULL = Status(
    run="0123456789abcdef",
    made_at=1.8e9,
    folder="2026-11-22_14-05-09",
    model="SimpleNN",
    phase="training",
    doing=Phase.TRAINING,
    trains=True,
    seconds=12.5,
    step=812,
    total_steps=1120,
    epoch=3,
    num_epochs=5,
    steps_per_s=298.0,
    samples_per_s=19_080.0,
    eta_s=1.03,
    loss=0.2134,
    learning_rate=0.001,
    losses=((1, 2.3), (400, 0.4), (812, 0.2134)),
    evaluations=(Evaluation(step=800, loss=0.3, metrics={"accuracy": 0.934}),),
    sent_bytes=10**9,
    received_bytes=2 * 10**9,
    machines=(
        Machine(id=SERVER, host="mini1"),
        Machine(id=OBSERVER, host="mini1"),
        Machine(
            id=1,
            host="mini1",
            state=State.TRAINING,
            samples_per_s=9_540.0,
            minute=Times(0.5, 0.1, 0.2, 0.1, 0.0),
            memory_bytes=10**9,
            temperature_c=61.5,
        ),
        Machine(id=2, host="mini2", state=State.LATE, trouble="late 0.41 s", late_rounds=3),
        Machine(id=3, host="pi", state=State.GONE),
    ),
    links=(Link(machine=2, address="10.10.0.2", kind="Thunderbolt", measured_bytes_per_s=1.1e9),),
    rounds=(
        RoundTimes(811, 0.003, {1: Times(0.002, 0.0, 0.001), 2: Times(0.002)}),
        RoundTimes(812, 0.003, {1: Times(0.002, 0.0, 0.0, 0.001), 2: Times(late=0.003)}),
    ),
    samples=Samples(of_epoch=5000, total=25_000, done=13_000, leased=128, returned=64),
    events=(Event(kind=EventKind.GONE, step=640, at=1.8e9, text="worker 3 is gone", machine=3),),
    warnings=(LogLine(at=1.8e9, text="round 812 closed with 1 of 2", warning=True),),
    lines=(LogLine(at=1.8e9, text="worker 1 (mini1) is here"),),
    settings={"batch_size": "64"},
    diagnosis=Diagnosis(cause=Cause.LATE, sentence="worker 2 (mini2) is late", machine=2),
)  # fmt: skip


def test_a_status_survives_its_journey() -> None:
    text = to_json(FULL)
    assert from_json(text) == FULL
    assert len(text) < 4000


def test_the_smallest_status_can_be_read() -> None:
    assert from_json(b'{"run": "r", "made_at": 1.0}') == Status(run="r", made_at=1.0)


def test_fields_of_a_later_version_are_ignored() -> None:
    assert from_json(b'{"run": "r", "made_at": 1.0, "moods": [1, 2]}').run == "r"


def test_it_names_its_machines() -> None:
    assert [machine.name for machine in FULL.machines] == [
        "the server", "the observer", "worker 1 (mini1)", "worker 2 (mini2)", "worker 3 (pi)"
    ]  # fmt: skip
    assert [machine.id for machine in FULL.workers] == [1, 2], "who is gone is not counted"
    assert FULL.metrics == {"accuracy": 0.934}


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"[]",
        b'{"made_at": 1.0}',
        b'{"run": 1, "made_at": 1.0}',
        b'{"run": "r", "made_at": -1}',
        b'{"run": "r", "made_at": 1, "step": -1}',
        b'{"run": "r", "made_at": 1, "doing": "dancing"}',
        b'{"run": "r", "made_at": 1, "machines": [{"id": 99999}]}',
        b'{"run": "r", "made_at": 1, "machines": [{"id": 1, "minute": [-1.0]}]}',
        b'{"run": "' + b"r" * 256 + b'", "made_at": 1}',
        b'{"run": "r", "made_at": 1, "lines": ['
        + b",".join([b'{"at": 1, "text": ""}'] * (LINES_MAX + 1))
        + b"]}",
        b'{"run": "r", "made_at": 1, "rounds": ['
        + b",".join([b"[1, 1.0, {}]"] * (ROUNDS_KEPT + 1))
        + b"]}",
        b"[" * 100_000,
        b" " * (STATUS_BYTES_MAX + 1),
    ],
)
def test_what_is_no_status_is_refused(broken: bytes) -> None:
    with pytest.raises(PeerError, match=r"^(not )?a status"):
        from_json(broken)


def test_no_name_or_line_moves_a_cursor() -> None:
    evil = "\x1b[2J\u202eevil\n"
    status = msgspec.structs.replace(
        FULL,
        phase=evil,
        machines=(Machine(id=1, host=evil, trouble=evil, kind=evil),),
        lines=(LogLine(at=1.0, text=evil + "x" * LINE_CHARS),),
        settings={evil: evil},
        evaluations=(Evaluation(step=1, metrics={evil: 0.5}),),
    )
    texts = [
        status.phase,
        status.machines[0].host,
        status.machines[0].trouble,
        status.machines[0].kind,
        status.lines[0].text,
        *status.settings,
        *status.settings.values(),
        *status.metrics,
    ]
    assert all(text.isprintable() for text in texts)
    assert len(status.lines[0].text) == LINE_CHARS

    raw = b'{"run": "r", "made_at": 1, "machines": [{"id": 1, "host": "\\u001b[2J"}]}'
    assert from_json(raw).machines[0].host.isprintable(), "the reader does not trust its sender"


def test_numbers_of_peers_become_finite() -> None:
    assert [finite(x) for x in (None, float("nan"), float("inf"), -1.0, 2.5, 1e300)] == [
        None, None, None, 0.0, 2.5, 1e18
    ]  # fmt: skip


def test_reading_a_status_needs_no_torch() -> None:
    code = (
        "import sys, paramserver.status.value\n"
        "sys.exit(bool({'torch', 'zmq', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
