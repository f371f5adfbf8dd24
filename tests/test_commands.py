"""The commands for a cluster's machines, and what their answers mean."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from paramserver.fleet import commands
from paramserver.fleet.commands import Checked, fits, read_check, ssh_trouble, troubles
from paramserver.fleet.user_code import UserCode
from paramserver.net.hosts import Host, read
from paramserver.settings import Settings
from workers.link.environment import Environment, read_environment

MINI = Host("mini2", "user@mini2.local", id=2, role="worker")
HERE = Host("here", "local", id=1, role="both")


def inner(command: commands.Command) -> str:
    """The script that the shell of the other machine gets."""
    assert command.argv[: len(commands.SSH)] == commands.SSH
    words = shlex.split(command.argv[-1])
    assert words[:3] == ["exec", "sh", "-c"] and len(words) == 4
    return words[3]


def test_everything_goes_through_the_users_ssh() -> None:
    command = commands.check(MINI)
    assert command.argv[len(commands.SSH)] == "user@mini2.local"
    assert "python3.12" in inner(command)
    assert commands.check(HERE).argv[:2] == ("sh", "-c")


def test_words_with_blanks_and_quotes_arrive_unharmed() -> None:
    folder = "it's my folder"
    host = Host("a", "a", folder=folder, python="/opt/my python")
    assert f"cd {shlex.quote(folder + '/code')}" in inner(commands.environment(host))
    assert "PYTHON='/opt/my python'" in inner(commands.environment(host))


def test_code_is_copied_without_what_belongs_to_each_machine() -> None:
    argv = commands.copy(MINI, "/clone").argv
    assert argv[0] == "rsync" and argv[-2:] == ("/clone/", "user@mini2.local:paramserver/code/")
    for own in (".venv", "/runs", "/data", ".git", "/wandb"):
        assert f"--exclude={own}" in argv


def test_own_modules_are_copied_beside_the_code() -> None:
    own = [UserCode(Path("/desk"), ("layers.py", "nets")), UserCode(Path("/other"), ("data.py",))]
    _, first, _, second = commands.copy_own(MINI, own)
    assert first.argv[-2:] == ("/desk/", "user@mini2.local:paramserver/own/0/")
    assert second.argv[-2:] == ("/other/", "user@mini2.local:paramserver/own/1/")
    assert commands.own_path(own) == "../own/0:../own/1"
    assert commands.own_path(own, up="") == "own/0:own/1"
    command = commands.start(
        MINI, "worker", ["x"], "up", {}, {"PYTHONPATH": commands.own_path(own)}
    )
    assert '"PYTHONPATH": "../own/0:../own/1"' in str(command)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_only_what_is_named_arrives_and_what_is_gone_goes(tmp_path: Path) -> None:
    desk, home = tmp_path / "desk", tmp_path / "home"
    for name in ("nets/deep/x.py", "nets/__pycache__/x.pyc", "layers.py", "holiday.mov", "old.py"):
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        (desk / name).touch()

    def arrived(*names: str) -> set[str]:
        for command in commands.copy_own(HERE, [UserCode(desk, names)]):
            subprocess.run(command.argv, check=True, env={**os.environ, "HOME": str(home)})
        there = home / "paramserver/own/0"
        return {str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()}

    home.mkdir()
    assert arrived("nets", "layers.py", "old.py") == {"nets/deep/x.py", "layers.py", "old.py"}
    (desk / "nets/deep/x.py").rename(desk / "nets/y.py")
    assert arrived("nets", "layers.py") == {"nets/y.py", "layers.py"}


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_the_results_of_a_run_are_copied_with_its_last_checkpoint(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "it's here"
    there = home / "paramserver/runs/one"
    last = "checkpoints/step-00000010.safetensors"
    for name in (
        "run.json", "summary.json", "curves.png", "report.html", "wandb/x", "model.safetensors",
        "checkpoints/step-00000009.safetensors", last, "observer.log",
    ):  # fmt: skip
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text(name)
    here.mkdir()
    environment = {**os.environ, "HOME": str(home)}

    def said(command: commands.Command) -> str:
        done = subprocess.run(command.argv, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    folder = commands.below_home(HERE, "../runs/one")
    assert folder == "paramserver/runs/one"
    newest = said(commands.last_checkpoint(HERE, folder))
    said(commands.copy_results(HERE, folder, str(here), newest))
    found = {str(p.relative_to(here)) for p in here.rglob("*") if p.is_file()}
    assert found == {"summary.json", "curves.png", "report.html", "model.safetensors", last}
    assert said(commands.last_checkpoint(HERE, "paramserver/runs/none")) == ""
    (there / last).unlink()
    (there / "checkpoints/step-00000009.safetensors").unlink()
    assert said(commands.last_checkpoint(HERE, folder)) == ""  # one without any


def test_where_a_run_folder_is() -> None:
    assert commands.spoken(MINI, "../runs/one") == "user@mini2.local:paramserver/runs/one"
    assert commands.spoken(MINI, "/big/runs/one") == "user@mini2.local:/big/runs/one"
    assert commands.spoken(HERE, "../runs/one") == "~/paramserver/runs/one"
    elsewhere = replace(MINI, folder="/disk/ps")
    assert commands.spoken(elsewhere, "../runs/one") == "user@mini2.local:/disk/ps/runs/one"


def test_where_a_person_waits_a_machine_that_is_off_is_given_up_soon() -> None:
    argv = commands.status(MINI, hasty=True).argv
    assert argv.index("ConnectTimeout=2") < argv.index("ConnectTimeout=10")  # ssh takes the first
    assert "ConnectTimeout=2" not in commands.status(MINI).argv


def test_secrets_go_by_standard_input_and_are_not_shown() -> None:
    command = commands.start(MINI, "worker", ["x"], "up", {"WANDB_API_KEY": "s3cret"})
    assert "s3cret" not in " ".join(command.argv)
    assert "s3cret" not in str(command) and "WANDB_API_KEY" in str(command)
    assert json.loads(command.stdin)["environment"]["WANDB_API_KEY"] == "s3cret"
    assert json.loads(command.stdin)["again"] == [1]


def test_a_command_is_shown_as_one_types_it(tmp_path: Path) -> None:
    """What DRY=1 prints can be pasted into a shell."""
    command = commands.settings_file(Host("here", "local", folder="its"), "a: 1\nb: '$HOME'\n")
    (tmp_path / "its").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path)}
    subprocess.run(["sh", "-c", str(command)], check=True, env=environment)
    assert (tmp_path / "its/settings.yaml").read_text() == "a: 1\nb: '$HOME'\n"
    assert (tmp_path / "its/settings.yaml").stat().st_mode & 0o077 == 0


def test_what_is_started() -> None:
    settings = Settings(port=7000, dataset={"name": "digits", "root": "/sets"})
    server = commands.server_argv(settings, ["10.10.0.1", "192.168.1.5"])
    assert "host_ip=10.10.0.1,192.168.1.5" in server and "run_dir=../runs" in server
    assert "dataset.root=/sets" in server
    worker = commands.worker_argv(
        Host("pi", "pi", id=3, device="cpu", threads=2), settings, "10.10.0.1"
    )
    assert worker[2:] == [
        "workers", "id=3", "host_ip=10.10.0.1", "port=7000", "dataset.root=/sets",
        "join_timeout=60", "device=cpu", "threads=2",
    ]  # fmt: skip
    assert "host_ip=null" in commands.worker_argv(HERE, settings, None)
    named = Settings(model={"type": "mine.nets:Net"}, allow=["other"])  # by who types make up
    assert "allow=other,mine.nets:Net" in commands.worker_argv(HERE, named, None)


def test_workers_of_one_machine_share_its_gpus_and_cores() -> None:
    two, pair = Host("a", "a", id=1, workers=2), Checked(cores=8, gpus=2)

    def given(host: Host, found: Checked, script: bool = False) -> list[dict[str, str]]:
        return [commands.own_share(host, p, found, script) for p in host.processes]

    assert given(two, pair) == [
        {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "4"},
        {"CUDA_VISIBLE_DEVICES": "1", "OMP_NUM_THREADS": "4"},
    ]
    assert given(two, Checked(cores=1)) == 2 * [{"OMP_NUM_THREADS": "1"}]  # it has no GPU
    assert given(replace(two, device="cpu"), pair) == 2 * [{"OMP_NUM_THREADS": "4"}]
    assert given(replace(two, threads=3), Checked(cores=8)) == 2 * [{}]  # they have it as a setting
    one = replace(two, workers=1, threads=3)
    assert given(one, pair) == [{}]
    assert given(replace(one, device="cpu"), pair, script=True) == [
        {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}
    ]
    assert given(replace(one, device="cuda:1"), pair, script=True)[0]["CUDA_VISIBLE_DEVICES"] == "1"


def test_what_a_script_finds_in_its_environment() -> None:
    settings = Settings(port=7000, security="none")
    found = read_environment(commands.script_environment(settings, "10.10.0.1", 3))
    assert found == Environment("10.10.0.1", 7000, 3, None, "none")
    here = read_environment(commands.script_environment(Settings(), None, 1))
    assert here == Environment("127.0.0.1", 65432, 1)


def test_the_check_of_this_machine(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path)}
    argv = commands.check(HERE).argv
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    found = read_check(done.stdout)
    assert found.system in ("Linux", "Darwin")
    assert found.room_kb is not None and found.room_kb > 0
    assert not found.unwritable and not found.foreign
    (tmp_path / "paramserver/code/mine.txt").write_text("precious")
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=environment)
    assert read_check(done.stdout).foreign == "mine.txt"


GOOD = Checked("Linux", 1e9, ("3.11.2",), frozenset({"make", "rsync"}), 20 * 2**20)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("", []),
        ("system Darwin\npython 3.9.6\n", ["3.13 (found: 3.9.6)", "brew install"]),
        ("python 3.14.0\nhas uv\n", None),
        ("system Darwin\nhas rsync\npython 3.12.1", ["make is missing", "xcode-select --install"]),
        ("system Linux\npython 3.12.1\nhas make", ["rsync is missing", "apt install rsync"]),
        ("python 3.12.1\nhas make\nhas rsync\nroom 1048576", ["1.0 GiB are free, 3.0 GiB"]),
        ("python 3.12.1\nhas make\nhas rsync\nhas nvidia\nroom 4194304", ["4.0 GiB are free, 8.0"]),
        ("python 3.12.1\nhas make\nhas rsync\nroom 4194304", None),
        ("python 3.12.1\nhas make\nhas rsync\nroom 1048576\nhas environment", None),
        ("unwritable mkdir: Permission denied", ["cannot write into paramserver: mkdir: Perm"]),
        ("foreign thesis.tex", ["paramserver/code holds something else (thesis.tex)"]),
        ("Welcome to pi5!\nLast login: now\npython 3.11.2\nhas make\nhas rsync\n", None),
    ],
)
def test_what_a_check_says_is_wrong(answer: str, said: list[str] | None) -> None:
    told = "\n".join(str(trouble) for trouble in troubles(MINI, read_check(answer)))
    for words in said or []:
        assert words in told
    if said is None:
        assert not any(word in told for word in ("Python", "GiB")), told


def test_a_good_machine_has_no_trouble() -> None:
    assert troubles(MINI, GOOD) == []


def test_a_machine_that_computes_on_its_cpu_needs_no_room_for_cuda() -> None:
    host = Host("a", "a", device="cpu")
    assert "exec make setup TORCH=cpu 2>&1" in inner(commands.environment(host))
    assert "TORCH" not in inner(commands.environment(Host("a", "a", device="cuda:1")))
    found = Checked("Linux", 1e9, ("3.11.2",), GOOD.has | {"nvidia"}, 4 * 2**20)
    assert troubles(host, found) == []
    assert "PyTorch with CUDA is large" in str(*troubles(MINI, found))


def test_a_python_that_was_asked_for_must_fit() -> None:
    host = Host("a", "a", python="/opt/python")
    told = troubles(host, Checked("Linux", 1e9, (), GOOD.has | {"uv"}, GOOD.room_kb))
    assert [trouble.problem for trouble in told] == ["/opt/python is not Python 3.11, 3.12 or 3.13"]


@pytest.mark.parametrize(
    ("version", "good"), [("3.11.2", True), ("3.13.0", True), ("3.10.9", False), ("3.14.1", False),
                          ("2.7", False), ("3", False), ("", False)],
)  # fmt: skip
def test_fitting_versions(version: str, good: bool) -> None:
    assert fits(version) is good


@pytest.mark.parametrize(
    ("stderr", "problem", "cure"),
    [
        ("Host key verification failed.", "not known here yet", "ssh user@mini2.local once"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "is not the one",
            "ssh-keygen -R mini2.local",
        ),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n"
            "Host key for [10.10.0.2]:2222 has changed and you have requested strict checking.\n"
            "Host key verification failed.",
            "is not the one",
            "ssh-keygen -R '[10.10.0.2]:2222', then ssh user@mini2.local",
        ),
        ("a@b: Permission denied (publickey,password).", "refused", "ssh-copy-id user@mini2.local"),
        ("ssh: Could not resolve hostname mini2.local: x", "does not know this name", "right name"),
        ("connect to host m port 22: Connection refused", "nobody listens for ssh", "Remote Login"),
        ("connect to host m port 22: Operation timed out", "does not answer", "try: ssh"),
        ("connect to host m port 22: No route to host", "does not answer", "try: ssh"),
        ("Timeout, server m not responding.", "does not answer", "try: ssh"),
        ("Connection closed by 10.0.0.1 port 22", "ssh broke off", "try: ssh"),
        ("Bad owner on ~/.ssh/config", "ssh fails: Bad owner on ~/.ssh/config", "try: ssh"),
        ("", "does not say why", "try: ssh"),
    ],
)
def test_what_ssh_says(stderr: str, problem: str, cure: str) -> None:
    trouble = ssh_trouble(MINI, stderr)
    assert problem in trouble.problem
    assert cure in trouble.cure


def test_the_list_and_its_defaults() -> None:
    host = read([{"name": "mini1", "role": "both"}])[0]
    assert (host.ssh, host.folder, host.restart, host.id) == ("mini1", "paramserver", 3, 1)
