"""The page's web server: files that never change, the run's state, and a stream of what is new.

    GET  /              the page, and its parts /page.js, /page.css, ...
    GET  /events        server-sent events: the log so far, then status, curves and end as they
                        come, and a beat every few seconds
    GET  /curves.json   the curves of this run; with ?run=NAME of another one in `run_dir`
    GET  /runs.json     earlier runs
    GET  /trace.json    the last minute for ui.perfetto.dev
    GET  /enter         may this browser see the run? 200 or 401
    POST /enter         {"token": ...} for a cookie

There is nothing else, and nothing here changes a run. Nothing is logged, so no token is, either.
"""

from __future__ import annotations

import socket
import threading
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from paramserver.output.runfolder import RunFolder
from paramserver.output.serverlog import newest
from paramserver.page import runs
from paramserver.page.board import Board, Seen
from paramserver.page.guard import (
    HEADERS,
    HEADERS_NEAR,
    cookie_name,
    cookie_of,
    holds,
    is_ours,
    opens,
)

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".LICENSE": "text/plain; charset=utf-8",
}
JSON = "application/json"
CONNECTIONS = 48  # at once
REQUEST_S = 10.0  # for a request to come in, and for each piece of an answer to go out
BEAT_S = 5.0
TOKEN_BYTES = 4096

_encode = msgspec.json.Encoder().encode


class _Enter(msgspec.Struct):
    token: str


@lru_cache(maxsize=32)
def file(name: str) -> bytes:
    """A file of the page."""
    return (STATIC / name).read_bytes()


FILES = tuple(sorted(path.name for path in STATIC.iterdir() if path.suffix in TYPES))


class Web(ThreadingHTTPServer):
    """Serves `board` at a socket that listens already.

    With the `secret` of the watch token only its holders see the run. `run_dir` holds the earlier
    runs, `folder` is the name of this one.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        listening: socket.socket,
        board: Board,
        run_dir: Path,
        folder: str,
        secret: bytes | None,
    ) -> None:
        super().__init__(listening.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.board, self.run_dir, self.folder, self.secret = board, run_dir, folder, secret
        self.log = RunFolder(run_dir / folder).server_log
        self.port = listening.getsockname()[1]
        name = socket.gethostname().lower()
        self.names = {name, f"{name.removesuffix('.local')}.local"}
        self.reading = threading.Lock()  # one earlier run at a time
        self._room = threading.BoundedSemaphore(CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each connection, while they are not too many."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A viewer that went away is no error, and there is no log for others."""


class Handler(BaseHTTPRequestHandler):
    """One request, then the connection is closed."""

    server: Web
    server_version, sys_version = "paramserver", ""
    timeout = REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self._answer(code, "text/plain; charset=utf-8", f"{message or code}\n".encode())

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        name = url.path.removeprefix("/") or "index.html"
        if not self._is_for_us():
            return
        if name in FILES:
            self._answer(200, TYPES[Path(name).suffix], file(name))
        elif name not in ("events", "curves.json", "runs.json", "trace.json", "enter"):
            self.send_error(404, "there is no such thing here")
        elif not self._may_look():
            self.send_error(401, "this takes the watch token")
        elif name == "events":
            self._stream()
        elif name == "enter":
            self._answer(200, JSON, b"{}")
        else:
            with self.server.reading:
                self._data(name, parse_qs(url.query).get("run", [""])[0])

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/enter" or not (length.isdecimal() and int(length) <= TOKEN_BYTES):
            self.send_error(404, "there is no such thing here")
            return
        try:
            told = msgspec.json.decode(self.rfile.read(int(length)), type=_Enter).token
        except (msgspec.DecodeError, ValueError, RecursionError):
            self.send_error(400, "this is no token")
            return
        secret = self.server.secret
        if secret is None:
            self._answer(200, JSON, b"{}")
        elif opens(told, secret):
            cookie = f"{cookie_name(self.server.port)}={cookie_of(secret)}"
            kept = {"Set-Cookie": f"{cookie}; HttpOnly; SameSite=Strict; Path=/"}
            self._answer(200, JSON, b"{}", kept)
        else:
            self.send_error(401, "this is not the watch token")

    # ------------------------------------------------------------------ parts

    def _is_for_us(self) -> bool:
        """Was the request meant for this machine, by a page of ours?"""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not is_ours(hosts[0], self.server.names):
            self.send_error(403, "the page has another name: use this machine's address")
            return False
        if self.headers.get("Sec-Fetch-Site", "none") == "cross-site" and self.path != "/":
            self.send_error(403, "another site may not read this")
            return False
        return True

    def _may_look(self) -> bool:
        secret = self.server.secret
        if secret is None:
            return True
        return holds(self.headers.get("Cookie", ""), cookie_name(self.server.port), secret)

    def _data(self, name: str, run: str) -> None:
        parent, own = self.server.run_dir, self.server.folder
        if name == "runs.json":
            found: Any = runs.earlier(parent, own)
        elif name == "trace.json":
            found = self.server.board.trace()
        elif not run:
            found = self.server.board.curves()
        else:
            found = runs.curves(parent, run)
            if found is None:
                self.send_error(404, "there is no such run")
                return
        self._answer(200, JSON, _encode(found))

    def _answer(
        self, code: int, kind: str, content: bytes, more: dict[str, str] | None = None
    ) -> None:
        self._head(code, kind, {"Content-Length": str(len(content)), **(more or {})})
        self.wfile.write(content)

    def _head(self, code: int, kind: str, more: dict[str, str]) -> None:
        self.close_connection = True
        self.send_response(code)
        headers = HEADERS if self.server.secret is not None else HEADERS_NEAR
        for name, value in {"Content-Type": kind, **headers, **more}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def _stream(self) -> None:
        board, seen = self.server.board, Seen()
        with board.viewer() as room:
            if not room:
                self.send_error(503, "too many look at this page")
                return
            self._head(200, "text/event-stream", {})
            self.wfile.write(b"retry: 2000\n\n")
            with self.server.reading:
                log = _encode(newest(self.server.log))
            self._event("log", log)
            del log
            while True:
                news = board.next(seen, BEAT_S)
                for kind, text in news:
                    self._event(kind, text)
                if not news:
                    self._event("beat", b"{}")  # finds a viewer that is gone
                if news and news[-1][0] == "end":
                    return

    def _event(self, kind: str, text: bytes) -> None:
        self.wfile.write(b"event: %s\ndata: %s\n\n" % (kind.encode(), text))
