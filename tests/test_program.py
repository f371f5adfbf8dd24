"""How our programs begin and end: pages of help, folders full of strangers, signals."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

import paramserver
import workers
from paramserver import unfit
from paramserver.config import help, schema
from paramserver.errors import UserError
from paramserver.launch import local, machines
from paramserver.program import command, exit_on_user_error
from paramserver.settings import Settings
from paramserver.words import shown

CLONE = Path(__file__).resolve().parent.parent
COMMANDS = ("server", "worker", "keys", "watch", "runs", "launch", *help.LAUNCHED)


def started(program: str) -> subprocess.Popen[str]:
    """A process that runs these lines."""
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(CLONE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(
    *words: str, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CLONE), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


# ------------------------------------------------------------------------- a Python that fits


@pytest.mark.parametrize("module", ["paramserver", "workers", "paramserver.keys"])
def test_a_python_without_our_packages_says_which_one_has_them(module: str) -> None:
    done = python("-S", "-m", module, "--help", folder=CLONE)
    assert done.returncode == 2 and done.stdout == ""
    told, hint = done.stderr.splitlines()
    assert told == f"error: {sys.executable} has no msgspec, which this program needs"
    assert f"`.venv/bin/python -m {module} ...`" in hint


def test_a_python_that_is_too_old_can_read_that_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("paramserver/__init__", "paramserver/unfit", "workers/__init__"):
        ast.parse((CLONE / f"{name}.py").read_text(encoding="utf-8"), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 6))
    with pytest.raises(SystemExit) as e:
        unfit.refuse("paramserver")
    assert e.value.code == 2
    assert "error: Python 3.11, 3.12 or 3.13 is needed" in capsys.readouterr().err


# ------------------------------------------------------------------------------- pages of help


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_its_page(
    name: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        help.answer(["nonsense", flag], name)
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text == help.help_text(name) + "\n"
    assert text.startswith("usage: python -m ") and name in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", help.WITH_TABLE)
def test_a_page_with_settings_has_all_of_them(name: str) -> None:
    text = help.help_text(name)
    squeezed = " ".join(text.split())
    for setting, default in schema.flatten(asdict(Settings())).items():
        if setting.partition(".")[0] in schema.SHORT:
            setting = setting.removesuffix(".name")
        assert f" {setting} {shown(default)} {schema.scope(setting)} " in squeezed
    for key in schema.KEYS.values():
        if key.kind is not dict:
            assert " ".join(key.help.split()) in squeezed
        assert f"[{key.unit}]" in squeezed or not key.unit
    for heading in schema.HEADINGS.values():
        assert f"\n{heading}:\n" in text


def test_the_page_of_all_commands_names_each() -> None:
    text = help.help_text("launch")
    for name, does in help.LAUNCHED.items():
        assert f"  {name:<9} {does}\n" in text + "\n"


def test_every_command_is_told_of() -> None:
    assert {*help.LAUNCHED} == {*machines.COMMANDS, *local.COMMANDS}


def test_what_follows_two_dashes_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    help.answer(["train.py", "--", "--help", "--version"], "script")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("paramserver --help", 0, "usage: python -m paramserver ["),
        ("paramserver -V", 0, f"paramserver {paramserver.__version__}\n"),
        ("paramserver lerning_rate=1", 2, "did you mean `learning_rate`?"),
        ("paramserver model.type=SimpelNN", 2, "did you mean SimpleNN?"),
        ("workers --help", 0, "usage: python -m workers "),
        ("workers --version", 0, "paramserver "),
        ("workers id=1 prot=3", 2, "did you mean `port`?"),
        ("workers id=1 join=psabc", 2, "join is neither a join token nor a file"),
        ("workers id=1 host_ip=192.0.2.1", 2, "192.0.2.1 is on another machine"),
        ("paramserver.keys --help", 0, "usage: python -m paramserver.keys "),
        ("paramserver.watch --help", 0, "usage: python -m paramserver.watch "),
        ("paramserver.runs --version", 0, "paramserver "),
        ("paramserver.launch --help", 0, "commands:"),
        ("paramserver.launch --version", 0, "paramserver "),
        ("paramserver.launch attach --help", 0, "usage: python -m paramserver.launch attach"),
        ("paramserver.launch demo codec=int4", 2, "codec must be one of"),
        ("paramserver.launch statsu", 2, "there is no command statsu\n  did you mean status?"),
        ("paramserver.launch up hosts=one optimizer=Adm", 2, "did you mean Adam?"),
        ("paramserver.launch plan hosts=one,two model.hiden=3", 2, "did you mean hidden?"),
        ("paramserver.launch", 2, "a command is missing"),
    ],
)
def test_pages_and_mistakes_do_not_wait_for_pytorch(words: str, code: int, said: str) -> None:
    done = python("-X", "importtime", "-m", *words.split())
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    told = "".join(line for line in done.stderr.splitlines(True) if "import time:" not in line)
    assert done.returncode == code
    assert said in (told if code else done.stdout)
    assert "Traceback" not in told and "paramserver.program" in imported
    assert not imported & {"torch", "workers.cluster", "zeroconf", "matplotlib"}


def test_a_page_of_which_only_the_head_is_read() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write) as closed:
        done = subprocess.run(
            [sys.executable, "-m", "paramserver.launch", "up", "--help"],
            env={**os.environ, "PYTHONPATH": str(CLONE)},
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------------- strangers


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A folder with files whose names are those of our packages and of what they import."""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers/__init__.py").write_text("IS = 'a stranger'\n")
    (tmp_path / "workers/tasks.py").write_text("IS = 'a stranger, too'\n")
    for name in ("paramserver", "torch", "queue"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')\n")
    return tmp_path


def test_programs_of_ours_start_each_other_by_their_place(strangers: Path) -> None:
    """The observer, as the server starts it; both of our names are taken in PYTHONPATH, too."""
    taken = strangers / "taken"
    taken.mkdir()
    for name in ("workers", "paramserver.py"):
        (strangers / name).rename(taken / name)
    words = command("workers.observer.observer")[1:]
    done = python(*words, folder=strangers, PYTHONPATH=str(taken))
    assert done.returncode == 2
    assert done.stderr.startswith("error: the observer is started by the server")


def test_a_server_is_not_misled_by_the_folder_that_it_is_started_in(strangers: Path) -> None:
    """`python -m` looks there first; all of a server is imported when names are checked."""
    (strangers / "paramserver.py").unlink()
    done = python("-m", "paramserver", "optimizer.momentumm=0.9", folder=strangers)
    assert done.returncode == 2
    assert "optimizer.momentumm is no argument of Adam" in done.stderr
    assert not done.stdout and not (strangers / "runs").exists()


JOINS = """
from paramserver import RunLost, UserError, join
import workers, workers.tasks
assert workers.IS == "a stranger" and workers.tasks.IS == "a stranger, too"
cluster = join(port=1, alone={"num_epochs": 3}, say=print)
import torch
model = torch.nn.Linear(2, 1)
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
for x, y in cluster.batches([(torch.ones(2), torch.ones(1))] * 64):
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
print(cluster.step, type(cluster).__module__)
cluster.leave()
"""


def test_a_script_beside_its_own_workers_joins(strangers: Path) -> None:
    for name in ("paramserver", "torch", "queue"):
        (strangers / f"{name}.py").unlink()
    (strangers / "train.py").write_text(JOINS)
    done = python("train.py", folder=strangers)
    assert (done.returncode, done.stderr) == (0, "")
    assert "6 paramserver.workers.cluster\n" in done.stdout


def test_both_doors_are_one() -> None:
    assert paramserver.join is workers.join and paramserver.Cluster is workers.Cluster
    assert paramserver.UserError is workers.UserError and paramserver.RunLost is workers.RunLost
    with pytest.raises(AttributeError, match="'paramserver' has no attribute 'jion'"):
        paramserver.jion  # noqa: B018
    with pytest.raises(AttributeError, match="'workers' has no attribute 'jion'"):
        workers.jion  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("taken", "code", "said"),
    [
        ("workers.py", "import workers\ncluster = workers.join()", "from paramserver import join"),
        ("workers", "from workers import Cluster, join as j", "from paramserver import join"),
        ("paramserver.py", "from paramserver import join", "rename it"),
    ],
)
def test_a_script_that_would_find_a_stranger_is_told(
    tmp_path: Path, taken: str, code: str, said: str
) -> None:
    if taken.endswith(".py"):
        (tmp_path / taken).write_text("")
    else:
        (tmp_path / taken).mkdir()
    (tmp_path / "train.py").write_text(code)
    done = python("-P", "-m", "paramserver.launch", "script", "train.py", folder=tmp_path)
    assert done.returncode == 2
    assert f"{taken} " in done.stderr and said in done.stderr
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------- signals


def test_user_errors_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_on_user_error()
    def main() -> None:
        raise UserError("port 1 is taken", "choose another:\nport=2")

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: port 1 is taken\n  choose another:\n  port=2\n"


def test_an_interrupt_exits_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_in_the_middle_of_an_import_exits_quietly() -> None:
    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught, exit_on_user_error():
        type("Imported", (), {"field": Interrupted()})
    assert caught.value.code == 130


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), exit_on_user_error():
        raise ZeroDivisionError


HELD_BACK = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
signal.raise_signal(signal.SIGINT)
with exit_on_user_error(): print("not reached")
"""
BEFORE = "with exit_on_user_error(): wait()"
UNWINDING = """
with exit_on_user_error():
    interrupt(at_once=lambda: print("at once", flush=True))
    try:
        wait()
    finally:
        wait()
"""
TWICE = """
with exit_on_user_error():
    interrupt(times=2)
    try:
        wait()
    except KeyboardInterrupt:
        try:
            wait()
        except KeyboardInterrupt:
            wait()
"""
BEHIND = """
import atexit
atexit.register(wait)
with exit_on_user_error():
    interrupt()
"""
IN_A_THREAD = """
import threading
with exit_on_user_error():
    interrupt()
    threading.Thread(target=threading.Event().wait).start()
    wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("program", "signals", "said"),
    [
        pytest.param(HELD_BACK, 0, "", id="while it is loaded by make"),
        pytest.param(BEFORE, 1, "", id="before it has a handler"),
        pytest.param(UNWINDING, 2, "at once\n", id="while it ends"),
        pytest.param(TWICE, 3, "", id="three times"),
        pytest.param(BEHIND, 1, "", id="when it has ended"),
    ],
)
def test_no_signal_prints_a_traceback(
    program: str, signals: int, said: str, number: signal.Signals
) -> None:
    """The program says when it waits for the next one."""
    head = """
import signal
from paramserver.program import exit_on_user_error, interrupt
def wait():
    print("waiting", flush=True)
    while True:
        signal.pause()
"""
    with started(head + program) as process:
        assert process.stdout and process.stderr
        for _ in range(signals):
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(number)
        assert (process.stdout.read(), process.stderr.read()) == (said, "")
    unhandled = program == BEFORE and number == signal.SIGTERM
    ended_by = signal.SIGINT if program == HELD_BACK else number
    assert process.returncode == (-number if unhandled else 128 + ended_by)


AT_IMPORT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where this runs behind a `&`
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("paramserver", "paramserver.errors"),
        ("paramserver", "paramserver.__main__"),
        ("paramserver", "paramserver.program"),
        ("paramserver.launch", "paramserver.errors"),
        ("paramserver.keys", "paramserver.program"),
        ("workers", "workers.__main__"),
        ("workers", "paramserver.program"),
    ],
)
def test_ctrl_c_while_a_program_is_imported_prints_no_traceback(
    module: str, imported: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT.format(name=imported))
    done = python("-m", module, "--help", PYTHONPATH=f"{tmp_path}{os.pathsep}{CLONE}")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("package", ["paramserver", "workers"])
def test_in_the_process_of_a_user_ctrl_c_stays_what_it_is(package: str, tmp_path: Path) -> None:
    """Also where his own package imports ours while `python -m` looks for its program."""
    (tmp_path / "theirs").mkdir()
    begin = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    (tmp_path / "theirs" / "__init__.py").write_text(f"{begin}import {package}")
    (tmp_path / "theirs" / "run.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)")
    done = python("-m", "theirs.run", "paramserver", folder=tmp_path)
    assert done.stderr.endswith("KeyboardInterrupt\n")


def test_a_second_signal_does_not_wait_for_threads() -> None:
    """A program that waits for its threads at its end, as ThreadPoolExecutor's do."""
    head = "import signal\nfrom paramserver.program import exit_on_user_error, interrupt\n"
    wait = "def wait():\n    print('waiting', flush=True)\n    signal.pause()\n"
    with started(head + wait + IN_A_THREAD) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        while process.poll() is None:  # it may be anywhere between the two
            process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130
