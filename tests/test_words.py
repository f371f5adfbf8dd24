"""What peers call themselves and say is cleaned where messages are made and received: nothing of it
moves a cursor, reorders a line or hides in one, on a terminal, in a log or in a file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from liar import FakeServer
from test_strangers import HELLO, answer, dealer
from whole import Run

from paramserver.fleet.supervisor import died
from paramserver.protocol import messages as wire
from paramserver.server.observer_process import _how as how_it_ended
from paramserver.words import MARK, nearest, printable, printable_lines

EVIL = "\x1b[2J\x1b]0;title\x07red\r\nline\x00\x9b1m\u202eback\u200b\u2066 \ud7ff\u2028end"
SEEN = "red  line"
HIDDEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


def test_the_name_that_was_meant() -> None:
    known = {"SimpleNN": 1, "ResNet18": 2, "CNN": 3}
    assert nearest("simplenn", known) == nearest("SimpelNN", known) == "SimpleNN"
    assert nearest("Transformer", known) == nearest("x", []) == ""
    assert (nearest("net", known), nearest("net", known, alike=0.5)) == ("", "ResNet18")


@pytest.mark.parametrize(("code", "told"), [(-9, "SIGKILL"), (-40, "signal 40"), (-35, "35")])
def test_how_a_process_ended_is_told_for_every_signal(code: int, told: str) -> None:
    """Those between SIGRTMIN and SIGRTMAX have no names of their own."""
    assert told in how_it_ended(code) and told in died(code)


def test_what_is_left_of_a_text() -> None:
    assert printable("mini2 (Zürich, 東京) 😀") == "mini2 (Zürich, 東京) 😀"
    assert printable("a\x1b[2Jb\nc\td\u202ee") == f"a{MARK}[2Jb c d{MARK}e"
    assert printable_lines("a\nb\x07") == f"a\nb{MARK}"


@given(st.text())
@example(EVIL)
def test_any_text_is_made_printable_once(text: str) -> None:
    made = printable(text)
    assert made.isprintable() and len(made) == len(text) and printable(made) == made


SAID: dict[str, tuple[wire.Message, list[str]]] = {
    "hello": (msgspec.structs.replace(HELLO), ["host", "role"]),
    "join": (
        wire.Join(layout=wire.Layout(()), step=0, lineage="x", device=""),
        ["device", "kind", "recipe"],
    ),
    "later": (wire.Later(""), ["reason"]),
    "reject": (wire.Reject(""), ["reason", "hint"]),
    "refused": (wire.Refused(1, ""), ["reason"]),
    "abort": (wire.Abort(1, ""), ["reason"]),
    "pulse": (wire.Pulse(nonce="n", step=0, lineage="l", phase=""), ["phase"]),
    "problem": (wire.Problem(""), ["text"]),
    "goodbye": (wire.Goodbye(""), ["reason", "digest"]),
    "end": (wire.End(nonce="n", step=0, lineage="l", reason=""), ["reason"]),
}


def raw(message: wire.Message, **changes: Any) -> bytes:
    """A header of this message with these values, which no constructor has seen."""
    return msgspec.json.encode(msgspec.json.decode(wire.to_frames(message)[0]) | changes)


@pytest.mark.parametrize("name", SAID)
def test_every_word_of_a_message(name: str) -> None:
    message, fields = SAID[name]
    evil = EVIL.encode(errors="replace").decode()
    received, _ = wire.from_frames([raw(message, **dict.fromkeys(fields, evil))])
    for field in fields:
        assert getattr(received, field) == printable(evil)


def test_words_in_mappings_and_errors() -> None:
    report, _ = wire.from_frames([raw(wire.Report(step=1, values={}), values={"\x1b[2J": 1.0})])
    assert list(report.values) == [f"{MARK}[2J"]
    close = wire.Close(
        nonce="n", round=1, step=1, lineage="l", buckets=(), contributors={}, late={1: "\x1b"},
        loss=None, seconds=0.0, ledger={}, reason="\x1b",
    )  # fmt: skip
    assert (close.late, close.reason) == ({1: MARK}, MARK)
    layout = wire.Layout((wire.Tensor("\x1b[2J", (1,), "float32"),))
    assert "is no name that can be told" in (layout.problem() or "")
    with pytest.raises(wire.PeerError) as told:
        wire.from_frames([b'{"type":"\\u001b[2J"}'])
    assert str(told.value).isprintable()


def test_a_server_its_terminal_and_its_files(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("num_workers=1", "num_epochs=1", "eval_steps=0", "observer=false")
        server.wait_for("server at")
        evil = EVIL.encode(errors="replace").decode()
        with dealer(run.port) as door, dealer(run.port) as link:
            door.send(raw(HELLO, host=evil))
            session = answer(door, wire.Welcome).session
            link.send_multipart(wire.to_frames(wire.Probe(session=session)))
            answer(link, wire.Pulse)
            link.send(raw(wire.Goodbye(""), reason=evil, digest=evil))
            server.wait_for(SEEN)
        worker = run.worker(1)
        assert (worker.end(), server.end()) == (0, 0)
        told = [server.output, worker.output]
        told += [p.read_text() for p in run.runs[-1].rglob("*") if p.suffix in (".json", ".jsonl")]
        assert any(SEEN in text for text in told)
        assert not [found for text in told for found in HIDDEN.findall(text)]


@pytest.mark.parametrize("kind", ["later", "reject"])
def test_a_worker_and_its_terminal(tmp_path: Path, kind: str) -> None:
    class Rude(FakeServer):
        greeted = 0

        def answer(self, message: Any) -> list[wire.Message]:
            if not isinstance(message, wire.Hello):
                return []
            self.greeted += 1
            later = kind == "later" and self.greeted == 1
            return [wire.Later("SAY")] if later else [wire.Reject("SAY", "SAY")]

        def frames(self, message: wire.Message) -> list[Any]:
            text = EVIL.encode(errors="replace").decode()
            names = ("reason", "hint") if isinstance(message, wire.Reject) else ("reason",)
            return [raw(message, **dict.fromkeys(names, text))]

    with Rude() as server, Run(tmp_path) as run:
        worker = run.worker(1, f"port={server.port}")
        assert worker.end() == 2
        assert SEEN in worker.output and not HIDDEN.search(worker.output)
