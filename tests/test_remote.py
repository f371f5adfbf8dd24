"""Commands that are run on machines, with an `ssh` that does what a test needs."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from paramserver.fleet import commands, remote
from paramserver.net.hosts import Host

MINI = Host("mini2", "mini2.local")
STATUS = commands.status(MINI, hasty=True)


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a Python script in the place of ssh. It has a moment to connect."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(remote, "CONNECT_S", 2.0)  # this machine may be busy
    monkeypatch.setattr(commands, "HASTY_S", 0)

    def put(script: str) -> None:
        (tmp_path / "ssh").write_text(f"#!{sys.executable} -S\n{script}")
        (tmp_path / "ssh").chmod(0o755)

    return put


def test_a_name_that_is_looked_for_in_vain_does_not_keep_a_person_waiting(
    ssh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh("import signal\nsignal.pause()")
    monkeypatch.setattr(remote, "CONNECT_S", 0.2)
    with pytest.raises(remote.Failed) as failed:
        remote.ask(MINI, STATUS, "status")
    assert failed.value.trouble.problem.startswith("it does not answer: off, asleep")
    assert failed.value.trouble.cure == "try: ssh mini2.local true"


def test_a_machine_that_is_connected_is_waited_for_also_where_it_is_slow(
    ssh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, is_connected = threading.Event(), remote._is_connected

    def look(pid: int) -> bool:
        try:
            return is_connected(pid)
        finally:
            looked.set()

    monkeypatch.setattr(remote, "_is_connected", look)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                assert looked.wait(60)
                connection.sendall(b"now")

        machine = threading.Thread(target=answer)
        machine.start()
        ssh(
            "import socket\n"
            f"s = socket.create_connection({server.getsockname()!r})\n"
            "s.recv(3)\n"
            "print('[]')"
        )
        assert remote.ask(MINI, STATUS, "status") == []
        machine.join()


def test_a_machine_that_has_begun_to_answer_is_waited_for(ssh: Any, tmp_path: Path) -> None:
    """Through a connection of another ssh, say, which is none of this one."""
    os.mkfifo(tmp_path / "go")
    ssh(f"print('here', flush=True)\nopen({str(tmp_path / 'go')!r}).read()\nprint('[]')")

    def go_on(line: str) -> None:
        if line == "here":  # nobody reads the pipe any more when the next one comes
            (tmp_path / "go").open("w").close()

    done = remote.run(MINI, STATUS, tell=go_on)
    assert done.code == 0 and json.loads(done.out.splitlines()[-1]) == []
