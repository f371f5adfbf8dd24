"""Logging to W&B and TensorBoard, for real: offline, out of reach, killed, missing, or hanging."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import forked
import psutil
import pytest
from whole import CLONE, DEADLINE_S, Program

import workers.observer.loggers as logbook
from paramserver.errors import UserError
from paramserver.settings import Settings, Wandb
from workers.observer.loggers import (
    Background,
    News,
    Several,
    evaluation_values,
    open_logbooks,
    step_values,
    wandb_mode,
)

KEY = "0123456789" * 4  # has the form of a login, and opens nothing

# Each program prints the processes that it has left at its end, and all sentences.
PROGRAM = """
    import sys
    from pathlib import Path
    import psutil
    from workers.observer import loggers as logbook
    from paramserver.settings import Settings, Wandb
    from paramserver import logs
    from workers.observer.loggers import open_logbooks

    folder = Path(sys.argv[1])
    told = []
    logs.show("workers", logs.Lines(told.append))

    def end(book):
        book.close()
        print(*told, f"left: {psutil.Process().children(recursive=True)}", sep="\\n")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a login, and an environment that says nothing of W&B."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def folder(tmp_path: Path, home: Path) -> Path:
    folder = tmp_path / "2026-11-22_12-00-09"
    folder.mkdir()
    return folder


class Internet:
    """The internet, as wandb sees it: a server and proxy that counts calls and hangs up."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.calls = 0
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                if connection.recv(4) == b"quit":
                    return
                self.calls += 1

    @property
    def variables(self) -> dict[str, str]:
        proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        names = ("WANDB_BASE_URL", *proxies, *map(str.lower, proxies))
        return dict.fromkeys(names, self.address) | {"NO_PROXY": "", "no_proxy": ""}

    def close(self) -> None:
        with socket.create_connection(self._socket.getsockname()) as connection:
            connection.sendall(b"quit")
        self._thread.join()
        self._socket.close()


@pytest.fixture
def internet() -> Iterator[Internet]:
    internet = Internet()
    yield internet
    internet.close()


def start(script: str, folder: Path, variables: Mapping[str, str] | None = None) -> Program:
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(script)
    command = [sys.executable, "-c", code, str(folder)]
    return Program("it", command, CLONE, forks=forked.USABLE, **(variables or {}))


def output(program: Program) -> str:
    """All that it printed, once it has ended well."""
    code = program.end()
    assert code == 0, program.output
    return program.output


def logged(folder: Path, key: str) -> int:
    """How often a key was logged in the folder's only W&B run that holds it."""
    files = [path for path in folder.rglob("*.wandb") if key.encode() in path.read_bytes()]
    assert len(files) == 1
    return files[0].read_bytes().count(key.encode())


# W&B


def test_wandb_offline_logs_each_step_quietly_and_leaves_nothing(
    folder: Path, internet: Internet
) -> None:
    script = """
    book = open_logbooks(Settings(wandb=Wandb(project="my-project")), folder, problem=told.append)
    for step in range(1, 51):
        book.log(step, {"losses/train": 1 / step, f"only/{step:03}": 1.0})
    end(book)
    """
    text = output(start(script, folder, internet.variables))
    assert text == "left: []"
    assert internet.calls == 0
    (run,) = (folder / "wandb").iterdir()
    assert run.name.startswith("offline-run-")
    assert logged(folder, "losses/train") >= 50
    content = next(run.glob("*.wandb")).read_bytes()
    assert {int(n) for n in re.findall(rb"only/(\d{3})", content)} == set(range(1, 51))
    steps = re.findall(rb"_step\x82\x01([\x01\x02])(\d+)", content)  # length, digits, and more
    assert {int(digits[: length[0]]) for length, digits in steps} == set(range(1, 51))
    for known in (folder.name, "my-project", "learning_rate", "SimpleNN"):
        assert known.encode() in content


def test_wandb_out_of_reach_is_logged_offline_and_told_once(
    folder: Path, internet: Internet
) -> None:
    script = """
    logbook.WANDB_INIT_S = 1.0
    book = open_logbooks(Settings(), folder, problem=told.append)
    for step in range(1, 101):
        book.log(step, {"losses/train": 1 / step})
    end(book)
    """
    text = output(start(script, folder, internet.variables | {"WANDB_API_KEY": KEY}))
    line, left = text.splitlines()
    assert line.startswith("W&B cannot be used online, logging offline: ")
    assert f"wandb sync {folder}/wandb/offline-run-*" in line
    assert KEY not in text
    assert left == "left: []"
    assert internet.calls > 0  # so that the test above would have noticed a call
    assert logged(folder, "losses/train") >= 100


def test_a_killed_observer_leaves_no_process(folder: Path) -> None:
    script = """
    import time
    open_logbooks(Settings(), folder, problem=told.append)
    while not list(folder.rglob("*.wandb")):
        time.sleep(0.05)
    print("ready", flush=True)
    time.sleep(100)
    """
    program = start(script, folder)
    program.wait_for("^ready$")
    children = psutil.Process(program.process.pid).children(recursive=True)
    assert children
    program.send(signal.SIGKILL)
    assert program.end() == -signal.SIGKILL
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert not alive


def test_wandb_that_dies_is_told_once_and_the_run_goes_on(folder: Path) -> None:
    script = """
    import time
    book = open_logbooks(Settings(), folder, problem=told.append)
    step = 0

    def log():
        global step
        step += 1
        book.log(step, {"losses/train": 1 / step})
        time.sleep(0.01)

    while not list(folder.rglob("*.wandb")):
        log()
    for child in psutil.Process().children():
        child.kill()
    while not told:
        log()
    for _ in range(100):
        log()
    end(book)
    """
    line, left = output(start(script, folder)).splitlines()
    assert line.startswith("W&B stopped, training goes on: ")
    assert left == "left: []"


def test_a_missing_wandb_is_told_once_and_the_run_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    told: list[str] = []
    book = open_logbooks(Settings(), folder, problem=told.append)
    for step in range(1, 101):
        book.log(step, {"losses/train": 1 / step})
    book.close()
    (line,) = told
    assert line.startswith("W&B stopped, training goes on: import of wandb halted")


def test_disabled_is_a_logbook_that_writes_nothing(folder: Path) -> None:
    before = threading.enumerate()
    book = open_logbooks(Settings(wandb=Wandb(mode="disabled")), folder)
    book.log(1, {"losses/train": 1.0})
    assert {*threading.enumerate()} <= {*before}
    book.close()
    assert list(folder.iterdir()) == []


# The mode


def test_online_only_where_there_is_a_login(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb_mode(None) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode(None) == "online"
    assert wandb_mode("online") == "online"
    assert wandb_mode("offline") == "offline"
    assert wandb_mode("disabled") == "disabled"


@pytest.mark.parametrize(
    ("netrc", "settings", "server", "mode"),
    [
        (f"machine api.wandb.ai login user password {KEY}", "", "", "online"),
        (f"machine elsewhere login user password {KEY}", "", "", "offline"),
        (f"machine my.host:8080 login user password {KEY}", "", "http://my.host:8080", "online"),
        (f"machine api.wandb.ai login user password {KEY}", "", "http://my.host", "offline"),
        (
            f"machine my.host login user password {KEY}",
            "[default]\nbase_url = https://my.host\n",
            "",
            "online",
        ),
        ("machine api.wandb.ai login user", "", "", "offline"),
        ("complete nonsense", "", "", "offline"),
        (f"machine api.wandb.ai login user password {KEY}", "nonsense", "", "offline"),
    ],
)
def test_where_a_login_is_looked_for(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    netrc: str,
    settings: str,
    server: str,
    mode: str,
) -> None:
    (home / ".netrc").write_text(netrc + "\n")
    (home / ".netrc").chmod(0o600)
    (home / ".config" / "wandb").mkdir(parents=True)
    (home / ".config" / "wandb" / "settings").write_text(settings)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    assert wandb_mode(None) == mode


def test_wandb_mode_of_the_environment_counts_where_none_is_set(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode(None) == "disabled"
    assert wandb_mode("offline") == "offline"


def test_settings_that_cannot_be_fulfilled(folder: Path) -> None:
    with pytest.raises(UserError, match="no login"):
        open_logbooks(Settings(wandb=Wandb(mode="online")), folder)
    with pytest.raises(UserError, match=r"(?s)onlin .*online, offline, disabled"):
        open_logbooks(Settings(wandb=Wandb(mode="onlin")), folder)
    assert list(folder.iterdir()) == []


# TensorBoard


def test_tensorboard_holds_each_value_of_each_step(folder: Path) -> None:
    script = """
    book = open_logbooks(Settings(wandb=Wandb(mode="disabled"), tensorboard=True), folder)
    for step in range(1, 51):
        book.log(step, {"losses/train": 1 / step, "lr": 0.001})
    end(book)

    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    (path,) = (folder / "tensorboard").iterdir()
    events = [event for event in EventFileLoader(str(path)).Load() if event.summary.value]
    assert [event.step for event in events] == list(range(1, 51))
    for event in events:
        values = {value.tag: value.tensor.float_val[0] for value in event.summary.value}
        assert set(values) == {"losses/train", "lr"}
        assert abs(values["losses/train"] - 1 / event.step) < 1e-6
    """
    assert output(start(script, folder)) == "left: []"


def test_without_tensorboard_the_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'tensorboard>="):
        open_logbooks(Settings(wandb=Wandb(mode="disabled"), tensorboard=True), folder)


# The thread


class Book:
    """Notes what it is given; stops where it is told to."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = threading.Event()
        self.entered, self.release = threading.Event(), threading.Event()
        self.blocks_at = self.fails_at = -1
        self.thread = threading.current_thread()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert threading.current_thread() is self.thread
        if step == self.blocks_at:
            self.entered.set()
            assert self.release.wait(60)
        if step == self.fails_at:
            raise OSError("disk full\nand much more")
        self.steps.append(step)

    def close(self) -> None:
        self.closed.set()


class Opened:
    """A Background around a Book, and its sentences."""

    def __init__(self, close_s: float = 60.0, kill: Callable[[], None] = lambda: None) -> None:
        self.told: list[str] = []  # as problems
        self.books: list[Book] = []
        self._there = threading.Event()
        self.background = Background("Book", self._open, kill, close_s, problem=self._problem)
        assert self._there.wait(60)
        (self.book,) = self.books
        self._thread = threading.current_thread()

    def _open(self, news: News) -> Book:
        news("Book is open")
        self.books.append(Book())
        self._there.set()
        return self.books[0]

    def _problem(self, line: str) -> None:
        assert threading.current_thread() is self._thread
        self.told.append(line)


def test_what_is_no_problem_goes_to_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "workers"):
        opened = Opened()
        opened.background.close()
    (record,) = caplog.records
    assert record.getMessage() == "Book is open" and record.levelno == logging.INFO
    assert record.thread == threading.get_ident()
    assert opened.told == []


def test_a_problem_is_a_warning_where_nobody_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    def failing(news: News) -> Book:
        raise OSError("no room")

    Background("Book", failing).close()
    (record,) = caplog.records
    assert record.getMessage() == "Book stopped, training goes on: no room"
    assert record.levelno == logging.WARNING


def test_steps_arrive_in_order_and_before_the_end() -> None:
    opened = Opened()
    for step in range(1000):
        opened.background.log(step, {})
    opened.background.close()
    assert opened.book.steps == list(range(1000))
    assert opened.book.closed.is_set()
    opened.background.log(1000, {})
    opened.background.close()
    assert opened.book.steps == list(range(1000))
    assert opened.told == []


def test_a_failure_is_told_once_on_the_callers_thread() -> None:
    opened = Opened()
    opened.book.fails_at = 3
    for step in range(10):
        opened.background.log(step, {})
    assert opened.book.closed.wait(60)
    for step in range(10, 2 * logbook.MAX_WAITING):
        opened.background.log(step, {})
    opened.background.close()
    assert opened.book.steps == [0, 1, 2]
    assert opened.told == ["Book stopped, training goes on: disk full"]


def test_what_waits_for_a_slow_service_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "MAX_WAITING", 10)
    opened = Opened()
    opened.book.blocks_at = 0
    opened.background.log(0, {})
    assert opened.book.entered.wait(60)
    for step in range(1, 100):
        opened.background.log(step, {})
    assert opened.told == ["Book does not keep up: steps from 11 on will be missing"]
    opened.book.release.set()
    opened.background.close()
    assert opened.book.steps == list(range(11))
    assert opened.told[1:] == ["Book: 89 steps are missing"]


def test_a_service_that_hangs_at_the_end_is_given_up() -> None:
    killed: list[bool] = []

    def kill() -> None:
        killed.append(True)
        opened.book.release.set()

    opened = Opened(close_s=0.1, kill=kill)
    opened.book.blocks_at = 0
    opened.background.log(0, {})
    assert opened.book.entered.wait(60)
    opened.background.close()
    assert killed == [True]
    assert opened.told == ["Book did not end within 0.1 s: given up"]


def test_several_are_one_and_none_is_nothing() -> None:
    Several().log(1, {})
    Several().close()
    first, second = Book(), Book()
    both = Several([first, second])
    both.log(1, {})
    both.close()
    assert first.steps == second.steps == [1]
    assert first.closed.is_set()
    assert second.closed.is_set()


def test_values_have_their_documented_keys() -> None:
    assert evaluation_values(0.4, {"accuracy": 0.9}) == {"losses/val": 0.4, "accuracy/val": 0.9}
    assert step_values(
        loss=0.5,
        learning_rate=0.001,
        samples={1: 32, 3: 16},
        step_s=0.5,
        late=[2],
        sent_bytes=1000,
        received_bytes=2000,
        gradient_norms={"0.weight": 0.25},
    ) == {
        "losses/train": 0.5,
        "lr": 0.001,
        "batch_size": 48,
        "gradients/layer_0.weight": 0.25,
        "cluster/step_s": 0.5,
        "cluster/sent_bytes": 1000,
        "cluster/received_bytes": 2000,
        "cluster/samples_per_s/worker_1": 64.0,
        "cluster/samples_per_s/worker_3": 32.0,
        "cluster/late/worker_1": 0.0,
        "cluster/late/worker_2": 1.0,
        "cluster/late/worker_3": 0.0,
    }
    assert step_values(loss=None, learning_rate=None, samples={}, step_s=0.0) == {
        "batch_size": 0,
        "cluster/step_s": 0.0,
    }


def test_a_run_can_wait_until_its_logbooks_are_open_and_not_for_ever() -> None:
    may_open = threading.Event()

    def opener(news: object) -> Book:
        may_open.wait()
        return Book()

    def failing(news: object) -> Book:
        raise OSError("no room")

    slow = Background("slow", opener)
    failed = Background("failed", failing)
    books = Several([failed, slow])
    books.wait_open(0.0)
    assert not slow.opened.is_set()
    may_open.set()
    books.wait_open(DEADLINE_S)
    assert slow.opened.is_set() and failed.opened.is_set()
    books.close()
