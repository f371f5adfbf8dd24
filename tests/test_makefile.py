"""The commands that people type: what `make server key=value` runs, and how it ends."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLONE = Path(__file__).resolve().parent.parent

PROGRAM = """
import json, os, signal, sys
if "wait" in os.environ:
    signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), sys.exit(0)))
    print("waiting", flush=True)
    signal.pause()
print(json.dumps(sys.argv[1:]))
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that is set up, with programs that only print their arguments."""
    folder = tmp_path / "clone"
    programs = ("paramserver/__main__", "paramserver/launch", "paramserver/keys")
    programs = (*programs, "paramserver/watch", "paramserver/runs")
    for program in (*programs, "workers/__main__", "pytest"):
        path = folder / f"{program}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PROGRAM)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(CLONE / name, folder)
        os.utime(folder / name, (0, 0))
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(sys.executable)
    (folder / ".venv/.ready").touch()
    return folder


def make(clone: Path, *words: str) -> list[str]:
    """The arguments that the program gets from this make command."""
    ran = subprocess.run(["make", *words], cwd=clone, capture_output=True, text=True, check=True)
    arguments: list[str] = json.loads(ran.stdout.splitlines()[-1])
    return arguments


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("server", ""),
        ("server learning_rate=0.01 model.hidden=256 num_workers=3", None),
        ("worker ID=2 host_ip=10.10.0.1", "id=2 host_ip=10.10.0.1"),
        ("worker", ""),
        ("worker id=3", "id=3"),
        ("worker ID=3 id=3", "id=3 id=3"),
        ("worker ID=2 JOIN=psabc", "id=2"),
        ("keys host_ip=10.10.0.1 ROTATE=1", "rotate host_ip=10.10.0.1"),
        ("watch JOIN=pwabc port=7", "port=7"),
        ("runs run_dir=old", "run_dir=old"),
        ("demo num_epochs=5", "demo num_epochs=5"),
        ("server seed=1 PYTHON=python9 ARGS=--help", "--help seed=1"),
        (
            "test ARGS=-x",
            "--numprocesses=auto --dist=loadfile --no-loadscope-reorder -m 'not long' -x",
        ),
        ("up model.hidden=64 seed=1", "up model.hidden=64 seed=1"),
        ("up DRY=1", "up --dry"),
        ("up SCRIPT=my.py lr=1 HOSTS=a,b", "up hosts=a,b --script=my.py lr=1 --"),
        ("status HOSTS=a,b", "status hosts=a,b"),
        ("status", "status"),
        ("doctor ARGS=--json", "doctor --json"),
        ("plan codec=int8 ARGS=--json", "plan --json codec=int8"),
        ("logs HOST=mini2", "logs --host=mini2"),
        ("logs", "logs"),
        ("attach HOST=mini2", "attach --host=mini2"),
        ("fetch HOSTS=a", "fetch hosts=a"),
        ("down", "down"),
        ("server PORT=44040 BATCH_SIZE=64", "PORT=44040 BATCH_SIZE=64"),
        ("demo Port=44040", "demo Port=44040"),
        ("example", "script examples/digits.py"),
        ("example NAME=gpt PYTHON=python9", "script examples/gpt.py"),
    ],
)
def test_words_reach_the_program(clone: Path, words: str, arguments: str | None) -> None:
    expected = words.split()[1:] if arguments is None else shlex.split(arguments)
    assert make(clone, *words.split()) == expected


def test_whatever_a_value_holds_arrives_unharmed(clone: Path) -> None:
    settings = [
        "run_dir=my runs/two  blanks",
        "model.layers=[1,2]",
        "dataset={name: MNIST, root: '~'}",
        'wandb.name="quoted" it\'s `date`',
        "a=$HOME $(HOME) $$ ${HOME}",
        "b=back\\slash\\\\ \\",
        "c=# ; & | < > ( ) * ? ~ !",
        "d=tab\tend",
        "e=é",
        "f=",
        "g=h=i",
    ]
    assert make(clone, "server", *settings) == settings


def test_what_is_for_programs_is_all_that_is_on_standard_output(clone: Path) -> None:
    done = subprocess.run(
        ["make", "doctor", "ARGS=--json"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["doctor", "--json"]
    assert done.stderr == ".venv/bin/python -m paramserver.launch doctor --json\n"


def test_words_for_a_script_stand_behind_the_settings(clone: Path) -> None:
    words = make(clone, "up", "SCRIPT=my script.py", "ARGS=--lr 0.1 x=1", "num_epochs=3")
    assert words == ["up", "--script=my script.py", "num_epochs=3", "--", "--lr", "0.1", "x=1"]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SCRIPT", "other.py")
        m.setenv("HOSTS", "other")
        assert make(clone, "up") == ["up"]


def test_a_join_token_goes_on_in_the_environment(clone: Path) -> None:
    (clone / "workers/__main__.py").write_text(
        "import json, os, sys\n"
        "token = os.environ.get('PARAMSERVER_JOIN')\n"
        "print(json.dumps([*sys.argv[1:], token, 'JOIN' in os.environ]))"
    )
    assert make(clone, "worker", "ID=2", "JOIN=psabc") == ["id=2", "psabc", False]
    assert make(clone, "worker", "ID=2") == ["id=2", None, False]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("JOIN", "psdef")
        assert make(clone, "worker", "ID=2") == ["id=2", "psdef", False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("server port 44030", "port is no command; make alone lists them. A setting is written"),
        ("server port 44030", "with a =: port=44030."),
        ("server port: 44030", "with a =: port=44030."),
        ("server optimizer={name: AdamW}", "A setting with braces and spaces is written in quotes"),
        ("sever", "sever is no command; make alone lists them.  Stop"),
        ("check seed=3", "check takes no settings: seed=3."),
        ("setup PYTHON=python3 DRY=1", "setup takes no settings: DRY=1."),
        ("server ID=2", "make server does not read ID="),
        ("logs HOSTS=a NAME=b", "make logs does not read NAME="),
        ("down HOST=a", "make down does not read HOST=: HOSTS= is what it reads"),
        ("server TORCH=gpu", "TORCH=gpu: it is cpu or cuda."),
        ("worker ID=2 NAME=digits", "make worker does not read NAME="),
        ("server JOIN=psabc", "make server does not read JOIN="),
        ("worker ID=2 id=3", "make worker has two values for id: 2 and 3\n  leave one of them out"),
        ("worker ID=2 ARGS=id=3", "make worker has two values for id: 2 and 3"),
        ("worker ID=2 JOIN=psabc join=psabcd", "make worker has two values for join\n"),
        ("server ARGS=port=7 port=8", "make server has two values for port: 7 and 8"),
        ("up HOSTS=a hosts=b", "make up has two values for hosts: a and b"),
        ("logs HOST=a ARGS=--host=b", "make logs has two values for --host: a and b"),
        ("worker ID=", "ID= has no value\n  give one, or leave it out"),
        ("up HOSTS= seed=1", "HOSTS= has no value"),
        ("watch JOIN=", "JOIN= has no value"),
    ],
)
def test_nothing_that_is_typed_is_ignored(clone: Path, words: str, said: str) -> None:
    """Words that the program gets are its own to judge: see test_config."""
    ran = subprocess.run(
        ["make", *words.split()], cwd=clone, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert said in ran.stderr and ran.stdout == ""
    assert "psabc" not in ran.stderr


def test_what_is_not_typed_is_no_setting(clone: Path) -> None:
    """Variables that a shell happens to have, and those of a make that calls this one."""
    with pytest.MonkeyPatch.context() as m:
        for name in ("PORT", "ID", "NAME", "ROTATE", "HOSTS", "SEED"):
            m.setenv(name, "7")
        assert make(clone, "worker") == [] and make(clone, "keys") == []
        assert make(clone, "example") == ["script", "examples/digits.py"]
        assert make(clone, "status") == ["status"]
        m.setenv("MAKELEVEL", "1")
        m.setenv("MAKEFLAGS", " -- CC=gcc ID=3 plain=true")
        told = make(clone, "--no-print-directory", "worker")
        assert told == ["id=3", "plain=true"]


def test_the_program_itself_gets_the_signal(clone: Path) -> None:
    with subprocess.Popen(
        ["make", "server", "wait=1"], cwd=clone, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == ".venv/bin/python -m paramserver wait=1\n"
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "stopped\n"


def test_ctrl_c_waits_until_the_program_can_end_without_a_traceback(clone: Path) -> None:
    held = "import json, signal\nprint(json.dumps([*map(int, signal.pthread_sigmask(0, []))]))"
    for program in ("paramserver/launch", "workers/__main__", "pytest"):
        (clone / f"{program}.py").write_text(held)
    assert make(clone, "status") == make(clone, "worker") == [signal.SIGINT]
    assert make(clone, "test") == []  # pytest would keep it blocked


def test_an_unfit_python_is_named(clone: Path) -> None:
    shutil.rmtree(clone / ".venv")
    old = clone / "old"
    old.write_text("#!/bin/sh\ncase $2 in *exit*) exit 1;; esac\necho 3.9.6\n")
    old.chmod(0o755)
    ran = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=clone, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert f"3.13 is needed; found: {old} (3.9.6)\n" in ran.stderr
    assert not (clone / ".setup.lock").is_symlink()


UV = """#!/bin/sh
test "$1" = --version && exit
echo "$@" >> uv.txt
case "$*" in *--torch-backend*) test -z "$UNREACHED";; esac
"""


@pytest.fixture
def installing(clone: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """Runs make in a clone without an environment's packages; returns what it said, and what uv was
    asked for. The machine has no NVIDIA GPU, unless a test puts an `nvidia-smi` there."""
    (clone / ".venv/.ready").unlink()
    folder = clone / "tools"
    folder.mkdir()
    tools = {"uv": UV, "df": "#!/bin/sh\necho head\necho / 1 1 ${ROOM:-9000000}\n"}
    # torch is installed where these tests run
    tools["python"] = f'#!/bin/sh\ncase "$*" in *m.version*) exit 1;; esac\n{sys.executable} "$@"\n'
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (clone / ".venv/bin/python").unlink()
    (clone / ".venv/bin/python").symlink_to(folder / "python")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def ran(*words: str, code: int = 0, **environment: str) -> tuple[str, str]:
        done = subprocess.run(
            ["make", *words],
            cwd=clone,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
        assert done.returncode == code, done.stderr
        asked = (clone / "uv.txt").read_text() if (clone / "uv.txt").exists() else ""
        return done.stdout + done.stderr, asked

    return ran


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux has two builds of PyTorch")
no_gpu = pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is an NVIDIA GPU")


@on_linux
@no_gpu
def test_a_machine_without_a_gpu_gets_the_build_for_the_cpu(installing: Any) -> None:
    said, asked = installing("setup")
    assert "PyTorch for the CPU, up to 2 GB" in said and "CUDA, 6" not in said
    tried, first, second = asked.splitlines()
    assert tried.endswith("--dry-run --torch-backend cpu torch torchvision")
    assert first.endswith("--torch-backend cpu torch torchvision") and "dry" not in first
    assert second.endswith("--editable .[dev]") and "backend" not in second
    assert "--compile-bytecode" not in asked


@on_linux
@no_gpu
def test_where_its_index_is_not_reached_the_usual_build_comes_and_its_size_is_said(
    installing: Any,
) -> None:
    said, asked = installing("setup", UNREACHED="1")
    assert "cannot be used" in said and "PyTorch with CUDA, 6 GB" in said
    assert len(asked.splitlines()) == 2


@on_linux
def test_there_must_be_room_for_cuda(installing: Any) -> None:
    said, asked = installing("setup", "TORCH=cuda", code=2, ROOM="3000000")
    assert "only 3 GB are free" in said and asked == ""


@on_linux
def test_a_gpu_gets_the_build_with_cuda(installing: Any, clone: Path) -> None:
    (clone / "tools/nvidia-smi").write_text("#!/bin/sh\n")
    (clone / "tools/nvidia-smi").chmod(0o755)
    said, asked = installing("setup")
    assert "PyTorch with CUDA, 6 GB" in said and "backend" not in asked
    assert len(asked.splitlines()) == 1


@on_linux
def test_either_build_can_be_chosen_but_not_by_chance(installing: Any) -> None:
    said, asked = installing("setup", "TORCH=tpu", code=2)
    assert "TORCH=tpu: it is cpu or cuda" in said and asked == ""
    said, asked = installing("setup", "TORCH=cpu", TORCH="tpu")
    assert "for the CPU" in said and "--torch-backend cpu" in asked


def test_a_look_at_other_machines_installs_nothing_heavy(installing: Any, clone: Path) -> None:
    said, asked = installing("status")
    assert "torch" not in said + asked and "--no-deps --editable ." in asked
    assert (clone / ".venv/.light").exists() and not (clone / ".venv/.ready").exists()
    installing("doctor")
    installing("server")
    _, all_asked = installing("status")
    rest = all_asked.removeprefix(asked)
    assert rest.splitlines()[-1].endswith("--editable .[dev]") and "no-deps" not in rest


def test_help_names_every_command(clone: Path) -> None:
    ran = subprocess.run(["make"], cwd=clone, capture_output=True, text=True, check=True)
    commands = next(
        line.split()[2:]
        for line in (CLONE / "Makefile").read_text().splitlines()
        if line.startswith("COMMANDS")
    )
    assert [
        line.split()[1] for line in ran.stdout.splitlines() if line.startswith("  make")
    ] == commands


@pytest.mark.parametrize("where", ["a closed pipe", "/dev/full"])
@pytest.mark.parametrize("word", ["help", "server"])
def test_output_of_which_only_the_head_is_read_or_that_is_not_taken(
    clone: Path, word: str, where: str
) -> None:
    """Nobody sees a traceback of make's own; what the program does then is its own to do."""
    if where == "/dev/full":
        out = os.open(where, os.O_WRONLY) if Path(where).exists() else pytest.skip(f"no {where}")
    else:
        read, out = os.pipe()
        os.close(read)
    try:
        ran = subprocess.run(
            ["make", word], cwd=clone, stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(out)
    assert 'File "<string>"' not in ran.stderr
    assert word == "server" or (ran.returncode, ran.stderr) == (0, "")
