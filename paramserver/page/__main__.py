"""`python -m paramserver.page`: the page's process, as the server starts it.

It reads its orders from standard input and ends where that ends. It only reads: the states that the
server publishes, and the run's files. While nobody looks it sleeps.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import msgspec

from paramserver.errors import PeerError, UserError
from paramserver.net.address import LOOPBACK, Address
from paramserver.output.curves import Tail
from paramserver.output.runfolder import RunFolder
from paramserver.page.board import Board
from paramserver.page.process import Orders
from paramserver.page.web import Web
from paramserver.program import exit_on_user_error
from paramserver.status.value import STATUS_BYTES_MAX, from_json
from paramserver.watch.connection import Connection

ORDERS_BYTES = 2**16
READ_S = 0.5  # between two looks at metrics.jsonl
STATE_S = 0.25
NOBODY_S = 3600.0
NICE = 10
END_S = 1.0  # for the viewers to hear of the end


def feed(board: Board, folder: RunFolder, port: int) -> None:
    """Show the run on the board, while somebody looks; returns when the board is closed."""
    tail, read_at = Tail(folder.metrics), 0.0
    watching: Connection | None = None
    try:
        while not board.closed:
            if not board.somebody_looks(0):
                if watching is not None:
                    watching.close()
                    watching = None
                board.somebody_looks(NOBODY_S)
                continue
            if watching is None:
                watching = Connection(Address(LOOPBACK, port))
            if time.monotonic() >= read_at:
                read_at = time.monotonic() + READ_S
                while board.read(tail) and not board.closed:
                    pass  # viewers are served between two pieces
            try:
                status = watching.poll(STATE_S)
            except UserError:  # another program has the port since the server died
                watching.close()
                watching = None
                continue
            if status is not None:
                board.show(status)
    finally:
        if watching is not None:
            watching.close()


def why_it_ended(folder: RunFolder) -> str:
    """A sentence for viewers, when the server is gone."""
    record = folder.read_record()
    if record is None or not record.ended:
        return "the server is gone, and the run has not ended: start it again to go on"
    report = folder.path / "report.html"
    return f"the run is over; {report} keeps this page" if report.exists() else "the run is over"


@exit_on_user_error()
def main() -> None:
    try:
        orders = msgspec.json.decode(sys.stdin.buffer.readline(ORDERS_BYTES), type=Orders)
    except msgspec.DecodeError:
        raise UserError("a server starts this program, when somebody opens its page") from None
    os.nice(NICE)  # the run comes first
    folder, board = RunFolder(Path(orders.folder)), Board()
    webs = [
        Web(
            socket.socket(fileno=descriptor),
            board,
            folder.path.parent,
            folder.path.name,
            orders.secret if descriptor in orders.guarded else None,
        )
        for descriptor in (*orders.open_to_all, *orders.guarded)
    ]
    for web in webs:
        threading.Thread(target=web.serve_forever, args=(0.5,), daemon=True).start()
    feeding = threading.Thread(
        target=feed, args=(board, folder, orders.watch_port), name="feed", daemon=True
    )
    feeding.start()
    for last in iter(partial(sys.stdin.buffer.readline, STATUS_BYTES_MAX), b""):
        with suppress(PeerError):
            board.finish(from_json(last))
    board.close(why_it_ended(folder))
    board.everybody_left(END_S)
    feeding.join(END_S)


if __name__ == "__main__":
    main()
