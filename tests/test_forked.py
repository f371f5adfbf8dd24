"""Programs that are forked for tests are what new Pythons would be, and so are those they start."""

from __future__ import annotations

import re
from pathlib import Path

import forked
import psutil
import pytest
from whole import Run, children

from benchmarks.network import Hosts

pytestmark = pytest.mark.skipif(not forked.USABLE, reason="programs are forked on Linux only")

STARTS = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], "a word"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, cwd="there", env={**os.environ, "OWN": "its own"}, text=True,
    start_new_session=True,
)
print(child.pid, flush=True)
told, _ = child.communicate("an input")
print(told, child.returncode, flush=True)
again = [subprocess.run([sys.executable, *words]).returncode for words in (
    ["-c", "pass"], ["-c", "raise SystemExit(3)"], ["-c", "raise LookupError('after all')"],
    ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
)]
print(again, flush=True)
input()
"""
CHILD = """
import os, sys
print(os.getpid(), os.getppid(), os.getsid(0) == os.getpid(), "torch" in sys.modules)
print(sys.argv, os.getcwd(), os.environ["OWN"], sys.stdin.read())
sys.exit(7)
"""
NETWORK = """
import subprocess, sys
program = "import os, psutil; print(os.listdir('/sys/class/net'), list(psutil.net_if_addrs()))"
exec(program)
subprocess.run([sys.executable, "-c", program], check=True)
"""


def test_what_a_forked_program_starts_is_as_a_new_python_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "starter.py").write_text(STARTS)
    monkeypatch.setattr(forked, "waiting", lambda words: 3)
    with Run(tmp_path) as run:
        program = run.start("it", "-m", "starter", CHILD)
        child = program.wait_for(r"^\d+$")
        assert program.wait_for("True") == f"{child} {program.process.pid} True True"
        assert program.wait_for("a word") == f"['-c', 'a word'] {tmp_path}/there its own an input"
        assert program.wait_for(r"^ \d") == " 7"
        program.wait_for("LookupError: after all")
        assert program.wait_for(r"^\[") == "[0, 3, 1, -15]"
        assert program.end() == 1  # nothing is to be read


def test_those_that_wait_end_with_their_program(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("observer=false")
        server.wait_for("server at")
        waiting = psutil.Process(server.process.pid).children()
        assert waiting and children(server) == []
        server.kill()
        assert psutil.wait_procs(waiting, 60)[1] == []


@pytest.mark.root
@pytest.mark.parametrize("fresh", [False, True])
def test_a_host_has_its_own_network(
    fresh: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "starter.py").write_text(NETWORK)
    monkeypatch.setattr(forked, "waiting", lambda words: 1)
    with Hosts(["mini1"]) as hosts, Run(tmp_path) as run:
        program = run.start("it", "-m", "starter", host=hosts["mini1"], fresh=fresh)
        assert program.end() == 0, program.output
    assert len(program.lines) == 2
    for line in program.lines:
        assert set(re.findall(r"\w+", line)) == {"lo", "eth0"}
