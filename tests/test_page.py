"""The page without a browser: curves in bounded memory, who may see it, and what it answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import msgspec
import pages
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from whole import DEADLINE_S, Program, Run, children, data_in

from paramserver.errors import UserError
from paramserver.net import jointoken
from paramserver.net.jointoken import JoinToken
from paramserver.output.curves import Curves, Line, Tail, follow, read
from paramserver.output.serverlog import ServerLog
from paramserver.page import guard, process, report, runs
from paramserver.page.board import VIEWERS, Board, Seen
from paramserver.page.web import CONNECTIONS
from paramserver.settings import Settings
from paramserver.status.value import LINES_KEPT, Event, EventKind, LogLine

SECRET, TOKEN = pages.SECRET, pages.TOKEN


# --------------------------------------------------------------------------------------- curves


def step(at: int, loss: float | None = 1.0, samples: int = 64, late: tuple[int, ...] = ()) -> Line:
    return Line(step=at, seconds=at / 10, samples=samples, loss=loss, late=late)


def test_a_short_run_has_each_of_its_steps() -> None:
    curves = Curves()
    for at in range(1, 6):
        curves.add(step(at, loss=1 / at, late=(2,) if at == 3 else ()))
    part = curves.part()
    assert part["step"] == [1, 2, 3, 4, 5] and part["seconds"] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert part["loss"] == part["low"] == part["high"] == [1, 0.5, 0.333333, 0.25, 0.2]
    assert part["late"] == [0, 0, 1, 0, 0]


def test_many_steps_share_bins_and_none_is_lost() -> None:
    curves = Curves(bins=8)
    for at in range(1, 101):
        curves.add(step(at, loss=float(at), samples=at, late=(1,) if at % 10 == 0 else ()))
    part = curves.part()
    assert len(part["step"]) <= 8 and part["step"][-1] == 100
    assert sum(part["samples"]) == sum(range(1, 101)) and sum(part["late"]) == 10
    assert part["low"][0] == 1 and part["high"][-1] == 100
    first = part["step"][0]
    weighted = sum(n * n for n in range(1, first + 1)) / sum(range(1, first + 1))
    assert part["loss"][0] == pytest.approx(weighted, rel=1e-5)
    assert part["changed"] > 1, "a reader has to take all of it anew"


def test_steps_without_a_loss_are_gaps() -> None:
    curves = Curves(bins=2)
    for at, loss in enumerate([None, 2.0, float("nan"), float("inf"), None, None], 1):
        curves.add(step(at, loss))
    assert curves.part()["loss"] == [2.0, None]


def test_a_killed_servers_steps_are_void() -> None:
    curves = Curves()
    for at in (1, 2, 3, 4, 3, 4, 5):
        curves.add(step(at))
    assert curves.part()["step"] == [1, 2, 3, 4, 5]


def test_evaluations_are_thinned_and_their_metrics_limited() -> None:
    curves = Curves(evaluations=16)
    for at in range(1, 1001):
        names = {f"metric {n}": float(n) for n in range(20)}
        curves.add(Line(step=at, val_loss=1.0, val_accuracy=float("nan"), metrics=names))
    part = curves.part()
    assert 8 <= len(part["eval_step"]) <= 16 and part["eval_step"] == sorted(part["eval_step"])
    assert len(part["evals"]) == 9 and part["evals"]["accuracy"][0] is None
    assert all(len(column) == len(part["eval_step"]) for column in part["evals"].values())


def test_a_million_steps_take_little_memory() -> None:
    lines = [step(at, loss=0.5) for at in range(1, 20_001)]
    tracemalloc.start()
    try:
        curves = Curves()
        for _ in range(3):
            for line in lines:
                line.step += 20_000
                curves.add(line)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()
    assert len(curves.bins) <= 4096 and len(json.dumps(curves.part())) < 400_000


def test_a_file_is_followed_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves, tail = Curves(), Tail(path)
    assert not follow(curves, tail), "there is no file yet"
    path.write_text('{"step": 1, "seconds": 0.1, "samples": 1, "loss": 2.0}\n{"step": 2, "sec')
    follow(curves, tail)
    assert curves.part()["step"] == [1]
    with path.open("a") as file:
        file.write('onds": 0.2, "samples": 1, "loss": 1.0}\nrubbish\n[1]\n{"step": "x"}\n')
        file.write('{"step": 2, "seconds": 0.2, "val_loss": 0.5, "val_accuracy": 0.9}\n')
    follow(curves, tail)
    part = curves.part()
    assert part["loss"] == [2.0, 1.0] and part["evals"] == {"loss": [0.5], "accuracy": [0.9]}
    path.unlink()
    path.write_text('{"step": 7, "seconds": 0.1, "samples": 1, "loss": 3.0}\n')
    follow(curves, tail)
    assert curves.part()["step"] == [7], "another file: what was before is void"


def test_a_line_that_never_ends_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"x" * 3 * 2**20 + b'\n{"step": 1, "samples": 1, "loss": 1.0}\n')
    curves, tail = Curves(), Tail(path)
    for _ in range(5):
        follow(curves, tail)
        assert len(tail._rest) < 2**17
    assert curves.part()["step"] == [1]


NUMBERS = st.none() | st.integers() | st.floats() | st.text(max_size=5)
LINES = st.fixed_dictionaries(
    {"step": st.integers(0, 50) | NUMBERS},
    optional={
        "samples": st.integers(0, 100) | NUMBERS,
        "seconds": NUMBERS,
        "loss": NUMBERS,
        "late": st.lists(NUMBERS, max_size=2) | NUMBERS,
        "val_loss": NUMBERS,
        "val_accuracy": NUMBERS,
        "metrics": st.dictionaries(st.text(max_size=5), NUMBERS, max_size=12),
    },
).map(lambda line: json.dumps(line).encode())


@given(st.lists(LINES | st.binary(max_size=30), max_size=40))
def test_any_file_becomes_curves_that_can_be_sent(lines: list[bytes]) -> None:
    curves = Curves(bins=4, evaluations=4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        path.write_bytes(b"\n".join(lines) + b"\n")
        tail = Tail(path)
        while follow(curves, tail):
            pass
    part = msgspec.json.decode(msgspec.json.encode(curves.part()))
    assert len(part["step"]) <= 4 and len(part["eval_step"]) <= 4
    assert part["step"] == sorted(set(part["step"]))
    columns = ("seconds", "loss", "low", "high", "samples", "late")
    assert {len(part[name]) for name in columns} == {len(part["step"])}


# ------------------------------------------------------------------------------------ the board


def test_a_viewer_gets_what_is_new_and_nothing_twice() -> None:
    board, seen = Board(), Seen()
    assert [kind for kind, _ in board.next(seen, 0)] == ["curves"]
    assert board.next(seen, 0) == []
    board.show(pages.status(step=812))
    board.show(pages.status(step=813))
    [(kind, text)] = board.next(seen, 0)
    assert kind == "status" and json.loads(text)["step"] == 813, "a slow viewer misses states"
    board.finish(pages.status(step=814))
    board.show(pages.status(step=813))
    assert json.loads(board.next(seen, 0)[0][1])["step"] == 814, "nothing comes after the last"
    board.close("over")
    assert board.next(seen, 0) == [("end", b'{"text":"over"}')]


def test_curves_come_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    board, seen, tail = Board(), Seen(), Tail(path)
    pages.write_metrics(path, 150)
    board.read(tail)
    first = json.loads(board.next(seen, 0)[0][1])
    assert first["from"] == 0 and len(first["step"]) == 150
    with path.open("a") as file:
        file.write('{"step": 151, "seconds": 9.0, "samples": 1, "loss": 1.0}\n')
    board.read(tail)
    second = json.loads(board.next(seen, 0)[0][1])
    assert second["from"] == 149 and second["step"] == [150, 151]


# --------------------------------------------------------------------------------- who may look


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1:65480", True), ("127.0.0.1", True), ("[::1]:65480", True), ("10.10.0.1", True),
        ("localhost:8000", True), ("LOCALHOST", True), ("a.localhost", True), ("mini1:80", True),
        ("mini1.local", True), ("mini1.local.", True), ("", False), ("evil.example", False),
        ("evil.example:65480", False), ("127.0.0.1.evil.example", False), ("mini1.evil", False),
        ("127.0.0.1@evil.example", False), ("localhost:80:80", False), ("a b", False),
        ("[::1", False), ("<script>", False), ("notlocalhost", False),
    ],
)  # fmt: skip
def test_names_in_requests(host: str, ours: bool) -> None:
    assert guard.is_ours(host, {"mini1", "mini1.local"}) == ours


def test_the_cookie_is_made_of_the_secret_and_does_not_show_it() -> None:
    cookie = guard.cookie_of(SECRET)
    assert SECRET.hex() not in cookie
    assert guard.holds(f"a=b; paramserver_page_1={cookie}", "paramserver_page_1", SECRET)
    others = ("", f"paramserver_page_2={cookie}", "paramserver_page_1=", f"x={cookie}")
    for wrong in (*others, "\x00;=", "paramserver_page_1=\xe9"):
        assert not guard.holds(wrong, "paramserver_page_1", SECRET)


def test_the_watch_token_of_any_address_opens_the_page_and_nothing_else_does() -> None:
    def token(host: str = "::1", secret: bytes = SECRET, watches: bool = True) -> str:
        return jointoken.encode(JoinToken(host, 7, bytes(32), secret, watches))

    assert guard.opens(TOKEN, SECRET) and guard.opens(f" {token()}\n", SECRET)
    for wrong in (
        token(secret=bytes(32)),
        token(watches=False),
        TOKEN[:-1],
        "",
        "\ud800",
        "x" * 99,
    ):
        assert not guard.opens(wrong, SECRET)


@given(st.text() | st.text("[]:.0123456789abc"))
def test_any_text_in_a_request_is_judged(text: str) -> None:
    assert guard.is_ours(text, set()) in (True, False)
    assert not guard.holds(text, "paramserver_page_1", SECRET)
    assert not guard.opens(text, SECRET)


# ----------------------------------------------------------------------------------- the answers


def ask(
    page: pages.Served, path: str, method: str = "GET", body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.web.port, timeout=DEADLINE_S)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        sent = {"Host": f"127.0.0.1:{page.web.port}", **headers}
        if body:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_page_and_its_parts(tmp_path: Path) -> None:
    with pages.served(tmp_path) as page:
        code, headers, content = ask(page, "/")
        assert code == 200 and b"<main" in content
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy and "Access-Control-Allow-Origin" not in headers
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"]
        for name in ("page.js", "charts.js", "machines.js", "shown.js", "page.css", "uplot.js"):
            assert ask(page, f"/{name}")[0] == 200 and name.encode() in content
        assert b"MIT" in ask(page, "/uplot.LICENSE")[2]


def test_nothing_comes_from_outside() -> None:
    own = [p for p in (Path(process.__file__).parent / "static").iterdir() if "uplot" not in p.name]
    for path in own:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in text.replace("// ", "").replace("://", "//") or "http" not in text, path
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert word not in text, f"{path.name}: text from others may become markup by {word}"


def test_what_is_not_there_and_what_is_not_allowed(tmp_path: Path) -> None:
    with pages.served(tmp_path) as page:
        for path in (
            "/no",
            "/../page.js",
            "/%2e%2e/x",
            "/static/page.js",
            "//etc/passwd",
            "/web.py",
        ):
            assert ask(page, path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"):
            code, headers, _ = ask(page, "/", method)
            assert code in (404, 501) and "Access-Control-Allow-Origin" not in headers
        assert ask(page, "/", Host="evil.example")[0] == 403
        assert ask(page, "/curves.json", Host=f"evil.example:{page.web.port}")[0] == 403
        assert ask(page, "/curves.json", Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(page, "/enter", "POST", b"x" * 5000)[0] == 404
        assert ask(page, "/enter", "POST", b"[")[0] == 400


HOST = b"Host: localhost\r\n"
NO_REQUESTS = {
    "nothing": b"",
    "blank lines": b"\r\n\r\n",
    "half a line": b"GET\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\n" + HOST + b"Host: evil.example\r\n\r\n",
    "a broken address": b"GET http://[ HTTP/1.1\r\n" + HOST + b"\r\n",
    "a long address": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 200 + b"\r\n",
    "an odd length": b"POST /enter HTTP/1.1\r\n" + HOST + b"Content-Length: \xb2\r\n\r\n{}",
    "a huge length": b"POST /enter HTTP/1.1\r\n" + HOST + b"Content-Length: 9999999999\r\n\r\n{}",
}


@pytest.mark.parametrize("kind", NO_REQUESTS)
def test_what_is_no_request_harms_nobody(tmp_path: Path, kind: str) -> None:
    with pages.served(tmp_path) as page:
        with socket.create_connection(("127.0.0.1", page.web.port)) as sock:
            sock.sendall(NO_REQUESTS[kind])
            sock.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                answer = sock.makefile("rb").read()
                assert b" 200 " not in answer.partition(b"\n")[0]
                assert b"Traceback" not in answer and b"<html" not in answer
        assert ask(page, "/")[0] == 200


def test_elsewhere_only_the_watch_token_opens_it(tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", 10)
    with pages.served(tmp_path, secret=SECRET) as page:
        assert ask(page, "/")[0] == 200, "the page itself says nothing of the run"
        for path in ("/events", "/curves.json", "/runs.json", "/trace.json", "/enter"):
            assert ask(page, path)[0] == 401, path
            assert ask(page, f"{path}?token={TOKEN}")[0] == 401, "an address may be in a log"
        assert (
            ask(page, "/enter", "POST", json.dumps({"token": "pw" + "b" * 43}).encode())[0] == 401
        )
        code, headers, _ = ask(page, "/enter", "POST", json.dumps({"token": TOKEN}).encode())
        cookie = headers["Set-Cookie"]
        assert code == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        kept = cookie.partition(";")[0]
        assert ask(page, "/enter", Cookie=kept)[0] == 200
        assert ask(page, "/curves.json", Cookie=kept)[0] == 200
        assert ask(page, "/curves.json", Cookie=kept[:-1] + "x")[0] == 401


def test_the_last_minute_as_a_trace(tmp_path: Path) -> None:
    with pages.served(tmp_path) as page:
        assert json.loads(ask(page, "/trace.json")[2])["traceEvents"] == []
        page.board.show(pages.status())
        events = json.loads(ask(page, "/trace.json")[2])["traceEvents"]
        assert {e["name"] for e in events if e["ph"] == "X"} >= {"compute", "cable"}


def test_earlier_runs(tmp_path: Path) -> None:
    pages.earlier_run(tmp_path)
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", 10)
    (tmp_path / "2026-11-20_10-00-00").mkdir()  # without steps
    (tmp_path / "other").mkdir()
    broken = tmp_path / "2026-11-19_10-00-00"
    pages.write_metrics(broken / "metrics.jsonl", 10)
    (broken / "summary.json").write_text('{"steps": "many", "end": ["<b>"], "metrics": 3}')
    with pages.served(tmp_path) as page:
        found = json.loads(ask(page, "/runs.json")[2])
        assert [run["name"] for run in found] == ["2026-11-21_10-00-00", "2026-11-19_10-00-00"]
        assert found[0]["steps"] == 600 and found[0]["result"] == "91.0 %"
        assert found[1]["steps"] is None and found[1]["model"] == ""
        curves = json.loads(ask(page, "/curves.json?run=2026-11-21_10-00-00")[2])
        assert len(curves["step"]) == 600
        for name in (
            "2026-11-20_10-00-00",
            "..",
            "../other",
            "/etc/passwd",
            "2026-11-21_10-00-00/..",
        ):
            assert ask(page, f"/curves.json?run={name}")[0] == 404, name


def test_few_earlier_runs_are_kept_in_memory(tmp_path: Path) -> None:
    names = [f"2026-11-{day}_10-00-00" for day in range(10, 20)]
    for name in names:
        pages.write_metrics(tmp_path / name / "metrics.jsonl", 5)
    for name in names:
        assert runs.curves(tmp_path, name) is not None
    assert len(runs._cache) == runs.CACHED


def test_one_thread_at_a_time_uses_what_is_kept_of_earlier_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each address of the page has its own server, and they share it."""
    held = []

    class Watched(OrderedDict[Path, Any]):
        def __setitem__(self, path: Path, kept: Any) -> None:
            held.append(runs._reading.locked())
            super().__setitem__(path, kept)

        def move_to_end(self, path: Path, last: bool = True) -> None:
            held.append(runs._reading.locked())
            super().move_to_end(path, last)

    monkeypatch.setattr(runs, "_cache", Watched())
    pages.earlier_run(tmp_path, "2026-11-21_10-00-00", 5)
    assert runs.curves(tmp_path, "2026-11-21_10-00-00") is not None
    assert held == [True, True] and not runs._reading.locked()


def viewer(page: pages.Served) -> http.client.HTTPResponse:
    """The stream of somebody who looks; it has the socket."""
    connection = http.client.HTTPConnection("127.0.0.1", page.web.port, timeout=DEADLINE_S)
    connection.request("GET", "/events")
    return connection.getresponse()


def test_a_stream_tells_what_is_new_and_ends_with_the_server(tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", 10)
    with pages.served(tmp_path) as page:
        page.show(pages.status())
        answer = viewer(page)
        told = [answer.readline() for _ in range(11)]
        kinds = [told[place] for place in (2, 5, 8)]
        assert kinds == [b"event: log\n", b"event: curves\n", b"event: status\n"]
        assert json.loads(told[3].removeprefix(b"data: ")) == {"lines": [], "events": []}
        assert json.loads(told[9].removeprefix(b"data: "))["step"] == 812
        page.board.close("the run is over")
        assert b'event: end\ndata: {"text":"the run is over"}' in answer.read()


def test_a_stream_begins_with_the_log_that_is_kept(tmp_path: Path) -> None:
    log = ServerLog(tmp_path / pages.RUN / "server.jsonl")
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", 10)
    for number in range(LINES_KEPT + 5):
        log.add(LogLine(at=float(number), text=f"line {number}"))
    log.add(Event(kind=EventKind.RESTART, step=7, at=2000.0))
    with pages.served(tmp_path) as page, closing(viewer(page)) as answer:
        assert [answer.readline() for _ in range(3)][2] == b"event: log\n"
        told = json.loads(answer.readline().removeprefix(b"data: "))
        assert [line["text"] for line in told["lines"]] == [
            f"line {number}" for number in range(5, LINES_KEPT + 5)
        ]
        assert [event["kind"] for event in told["events"]] == ["restart"]


def test_too_many_viewers_cost_the_others_nothing(tmp_path: Path) -> None:
    with pages.served(tmp_path) as page:
        page.show(pages.status())
        streams = []
        for _ in range(VIEWERS):
            streams.append(viewer(page))
            assert streams[-1].status == 200
        assert ask(page, "/events")[0] == 503
        assert ask(page, "/")[0] == 200
        idle = [socket.create_connection(("127.0.0.1", page.web.port)) for _ in range(CONNECTIONS)]
        page.board.show(pages.status(step=813))
        for each in (*streams, *idle):
            each.close()
        news = pages.status()
        for _ in range(200):  # a viewer that went away is found at the second piece that it misses
            page.board.show(news)
            if page.board.everybody_left(0.1):
                return
        pytest.fail("who went away is not forgotten")


# ----------------------------------------------------------------------------------- the process


def test_the_next_free_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        page = process.opened(Settings(page_port=port))
        assert port < page.port < port + process.PORTS and page.guarded == []
        assert page.address("127.0.0.1") == f"http://127.0.0.1:{page.port}"
        assert page.address("::1") == f"http://[::1]:{page.port}"
        page.close()
        page.close()
    with pytest.raises(UserError, match=r"cannot be shown at 192\.0\.2\.1"):
        process.opened(Settings(page_ip="192.0.2.1"))
    assert process.opened(Settings(page=False)).sockets == []
    assert process.opened(Settings(watch_port=0)).sockets == [], "there is nothing to show"


def test_a_page_without_a_free_port_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PORTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        page = process.opened(Settings(page_port=port))
    assert page.sockets == [] and f"no port from {port} on is free" in page.problem


class Stream:
    """A viewer of a page at this port."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self.connection.request("GET", "/events")
        self.answer = self.connection.getresponse()

    def until(self, kind: str, wanted: Callable[[Any], bool] = lambda told: True) -> Any:
        """The next event of this kind that is wanted."""
        name = b""
        while line := self.answer.readline():
            key, _, value = line.rstrip(b"\n").partition(b": ")
            if key == b"event":
                name = value
            elif key == b"data" and name.decode() == kind and wanted(told := json.loads(value)):
                return told
        raise AssertionError(f"the stream ended without {kind}")

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


def page_of(server: Program) -> psutil.Process | None:
    """The page's process of a running server."""
    found = [c for c in children(server) if "paramserver.page" in c.cmdline()]
    return found[0] if found else None


def test_a_page_comes_when_somebody_looks_and_ends_with_its_server(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("num_workers=1", "num_epochs=10000", "observer=false")
        port = int(server.wait_for(r"page: http://127\.0\.0\.1:\d+$").rpartition(":")[2])
        assert page_of(server) is None, "nobody has looked"
        run.worker(1)
        viewer = Stream(port)
        state = viewer.until("status", lambda told: told["step"] > 20)
        assert state["folder"] == run.runs[-1].name and len(state["machines"]) == 2
        assert len(viewer.until("curves", lambda told: told["step"])["step"]) > 0
        process = page_of(server)
        assert process is not None and process.memory_info().rss < 80e6
        if sys.platform == "linux":
            assert "torch" not in " ".join(m.path for m in process.memory_maps())

        process.kill()  # that is nothing to the run
        viewer.close()
        viewer = Stream(port)
        viewer.until("status", lambda told: told["step"] > state["step"])

        server.send(signal.SIGINT)
        last = viewer.until("status", lambda told: bool(told["end"]))
        assert last["end"] == "stopped by Ctrl-C"
        assert "report.html keeps this page" in viewer.until("end")["text"]
        assert viewer.answer.read().strip() == b""
        viewer.close()
        server.end()
        report_of = (run.runs[-1] / "report.html").read_text()
        assert "stopped by Ctrl-C" in report_of


def test_the_program_is_for_a_server() -> None:
    command = [sys.executable, "-m", "paramserver.page"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: a server starts this program, when somebody opens its page\n"


def test_a_page_ends_with_a_server_that_is_killed(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("num_workers=1", "observer=false")
        port = int(server.wait_for(r"page: http").rpartition(":")[2])
        viewer = Stream(port)
        viewer.until("status")
        process = page_of(server)
        assert process is not None
        os.kill(server.process.pid, signal.SIGKILL)  # and nothing that it started
        assert "start it again" in viewer.until("end")["text"]
        viewer.close()
        process.wait(DEADLINE_S)
        server.end()


# ----------------------------------------------------------------------------------- the report


def test_a_report_is_one_file_with_nothing_from_outside(tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / "metrics.jsonl", 200)
    evil = "</script><script>alert(1)</script><!--"
    state = pages.status(phase=evil)
    assert report.write(tmp_path / "report.html", state, read(tmp_path / "metrics.jsonl")) is None
    text = (tmp_path / "report.html").read_text()
    assert 'src="' not in text and '<link rel="stylesheet"' not in text and "alert(1)</" not in text
    assert "default-src 'none'; script-src 'sha256-" in text
    assert text.count("Permission is hereby granted") == 2, "uPlot's licence goes with it"
    data = data_in(text)
    told = json.loads(data)
    assert told["status"]["phase"] == evil and len(told["curves"]["step"]) == 200
    problem = report.write(tmp_path / "no" / "report.html", state, Curves())
    assert problem is not None and problem.endswith("was not written: No such file or directory")
