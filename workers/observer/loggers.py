"""Where the observer writes what it sees: Weights & Biases, TensorBoard, both, or nowhere.

A `Logbook` takes one call per step and gives it to a thread of its own, in bursts: a step costs the
caller about a microsecond, and a service that is slow, broken or out of reach costs the training
one line in the log and nothing else. At most `MAX_WAITING` steps wait.

Keys:

    losses/train                        sample-weighted mean over the round's workers
    losses/val, accuracy/val            where the step was evaluated; another metric: <name>/val;
                                        of an average of the weights: ema_loss/val and the like
    gradients/layer_<name>              norm of a parameter's averaged gradient; not of each step
                                        where steps are shorter than 50 ms
    lr, batch_size                      batch_size: samples that took part in the step
    cluster/step_s                      duration of the round
    cluster/samples_per_s/worker_<id>
    cluster/late/worker_<id>            1 where the worker did not make the round, else 0
    cluster/sent_bytes, cluster/received_bytes    by the server, since the run began
"""

from __future__ import annotations

import configparser
import dataclasses
import importlib.util
import logging
import netrc
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil

from paramserver.errors import UserError
from paramserver.settings import WANDB_MODES, Settings
from paramserver.typed import installing

log = logging.getLogger(__name__)

BURST_S = 0.5  # between bursts: 50 steps at once cost wandb a third of 50 single ones
MAX_WAITING = 20_000  # steps, about 30 MB: a minute's worth while a service is slow to start
WANDB_INIT_S = 20.0  # then the run is logged offline
WANDB_FINISH_S = 20.0  # for uploading the last steps; the others stay on disk for `wandb sync`
CLOSE_S = 60.0  # for everything, the two above included
KILLED_S = 5.0  # until killed processes are gone


class Logbook(Protocol):
    """Takes the values of one step after another, until it is closed."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write down the values of one step; call once per step, with rising steps."""

    def close(self) -> None:
        """Write what is still waiting and let go of threads, files and processes."""


def open_logbooks(
    settings: Settings,
    folder: Path,
    *,
    run: str | None = None,
    problem: Callable[[str], None] | None = None,
) -> Several:
    """Open the logbooks of the settings inside the run folder; does not wait for them or for the
    network.

    `problem` gets a sentence where something is not logged as it was asked for (a service that
    failed), by default as a warning of this module's logger, which gets every other sentence for a
    person (a page to look at). Both are called on the thread that calls `log` or `close`.
    `run` is the run's id: an observer that opens it again online, after a crash, goes on in the
    same W&B run. Offline each gets its own.

    Raises UserError where the settings cannot be fulfilled: TensorBoard is not installed, an
    unknown `wandb.mode`, or `online` without a login.
    """
    problem = problem or log.warning
    books: list[Background] = []
    mode = wandb_mode(settings.wandb.mode)
    if mode != "disabled":
        books.append(
            Background(
                "W&B",
                lambda news: _Wandb(settings, folder, mode, run, news),
                _kill_wandb,
                problem=problem,
            )
        )
    if settings.tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "tensorboard=true, but TensorBoard is not installed",
                "install it with: " + installing("pip install 'tensorboard>=2.18'"),
            )
        books.append(Background("TensorBoard", lambda news: _TensorBoard(folder), problem=problem))
    return Several(books)


def step_values(
    *,
    loss: float | None,
    learning_rate: float | None,
    samples: Mapping[int, int],
    step_s: float,
    late: Iterable[int] = (),
    sent_bytes: int | None = None,
    received_bytes: int | None = None,
    gradient_norms: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """One step's values under their documented keys; what is None is left out.

    `samples` holds, by worker id, how many samples entered the step; `late` the ids of the workers
    that missed the round; `gradient_norms` a norm by parameter name.
    """
    values: dict[str, float | None] = {
        "losses/train": loss,
        "lr": learning_rate,
        "batch_size": sum(samples.values()),
        "cluster/step_s": step_s,
        "cluster/sent_bytes": sent_bytes,
        "cluster/received_bytes": received_bytes,
    }
    for worker, count in samples.items():
        if step_s > 0:
            values[f"cluster/samples_per_s/worker_{worker}"] = count / step_s
        values[f"cluster/late/worker_{worker}"] = 0.0
    for worker in late:
        values[f"cluster/late/worker_{worker}"] = 1.0
    for name, norm in (gradient_norms or {}).items():
        values[f"gradients/layer_{name}"] = norm
    return {key: value for key, value in values.items() if value is not None}


def evaluation_values(loss: float, metrics: Mapping[str, float]) -> dict[str, float]:
    """What an evaluation adds to the values of its step, under the documented keys."""
    return {"losses/val": loss} | {f"{name}/val": value for name, value in metrics.items()}


class News(deque[tuple[str, bool]]):
    """Sentences for another thread, each with whether it is a problem; calling it adds one that is
    not."""

    def __call__(self, text: str) -> None:
        self.append((text, False))

    def problem(self, text: str) -> None:
        self.append((text, True))


class Several:
    """Several logbooks as one; an empty one writes nothing."""

    def __init__(self, books: Iterable[Background] = ()) -> None:
        self._books = tuple(books)

    def wait_open(self, limit_s: float) -> None:
        """Wait until all are open or have failed, or until the limit: opening keeps a core busy."""
        until = time.monotonic() + limit_s
        for book in self._books:
            book.opened.wait(max(0.0, until - time.monotonic()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for book in self._books:
            book.log(step, values)

    def close(self) -> None:
        for book in self._books:
            book.close()


class Background:
    """A logbook on a thread of its own, which opens it, writes to it in bursts and closes it.

    Any exception of the inner logbook ends that logbook, with one sentence, and nothing else.
    `kill` ends the processes it may have left: after a failure, or where it hangs past the deadline
    of `close`.
    """

    def __init__(
        self,
        name: str,
        opener: Callable[[News], Logbook],
        kill: Callable[[], None] = lambda: None,
        close_s: float = CLOSE_S,
        problem: Callable[[str], None] = log.warning,
    ) -> None:
        self._name, self._opener, self._kill = name, opener, kill
        self._problem, self._close_s = problem, close_s
        self._waiting: deque[tuple[int, Mapping[str, float]]] = deque()
        self._missed = 0
        self._news = News()  # deques: filled by one thread, emptied by the other
        self._closing = threading.Event()
        self.opened = threading.Event()
        """The inner logbook is open, or has failed."""
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"logbook {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._news:
            self._tell()
        if self._failed:
            return
        if len(self._waiting) >= MAX_WAITING:
            self._missed += 1
            if self._missed == 1:
                self._problem(
                    f"{self._name} does not keep up: steps from {step} on will be missing"
                )
            return
        self._waiting.append((step, values))

    def close(self) -> None:
        self._closing.set()
        self._thread.join(self._close_s)
        if self._thread.is_alive():
            self._news.problem(f"{self._name} did not end within {self._close_s:g} s: given up")
            self._kill()
            self._thread.join(KILLED_S)
        if self._missed:
            self._news.problem(f"{self._name}: {self._missed} steps are missing")
            self._missed = 0
        self._tell()

    def _tell(self) -> None:
        while self._news:
            text, problem = self._news.popleft()
            (self._problem if problem else log.info)(text)

    def _work(self) -> None:
        book: Logbook | None = None
        try:
            book = self._opener(self._news)
            self.opened.set()
            while not self._closing.wait(BURST_S):
                self._drain(book)
            self._drain(book)
            book.close()
        except BaseException as error:  # an exception of a service must not end the training
            self._failed = True
            self.opened.set()
            self._waiting.clear()
            self._news.problem(f"{self._name} stopped, training goes on: {_first_line(error)}")
            if book is not None:
                with suppress(BaseException):
                    book.close()
            self._kill()

    def _drain(self, book: Logbook) -> None:
        while self._waiting:
            step, values = self._waiting.popleft()
            book.log(step, values)


class _TensorBoard:
    """TensorBoard's event files in `<run folder>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        # One event for all values: add_scalar writes one for each, at seven times the cost.
        scalars = [self._summary.Value(tag=key, simple_value=x) for key, x in values.items()]
        self._writer.file_writer.add_summary(self._summary(value=scalars), step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A W&B run in `<run folder>/wandb`; falls back to offline where W&B is out of reach."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        mode: str,
        run: str | None,
        news: News,
    ) -> None:
        # Read at wandb's import. Error reports would use the network, offline too.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        self._wandb = wandb
        self._run: Any = None
        options: dict[str, Any] = {
            "console": "off",
            "silent": True,
            "disable_code": True,
            "disable_git": True,
            "symlink": False,
            "init_timeout": WANDB_INIT_S,
            "finish_timeout": WANDB_FINISH_S,
            "stop_fn": lambda: news("W&B asks to stop: end the run at its server"),  # not by SIGINT
            "x_save_requirements": False,
            "x_disable_stats": True,  # they take one more process, and are of this machine alone
        }
        known = {key: option for key, option in options.items() if hasattr(wandb.Settings(), key)}

        def start(mode: str) -> Any:
            return wandb.init(
                project=settings.wandb.project,
                entity=settings.wandb.entity,
                name=settings.wandb.name or folder.name,
                dir=folder,
                config=dataclasses.asdict(settings),
                mode=mode,  # type: ignore[arg-type]
                id=run if mode == "online" else None,
                resume="allow" if run is not None and mode == "online" else None,
                settings=wandb.Settings(**known),
            )

        # wandb's service process inherits this: a third less processor time for each step.
        os.environ.setdefault("GOMAXPROCS", "1")
        try:
            self._run = start(mode)
        except Exception as error:
            if mode == "offline":
                self.close()
                raise
            news.problem(
                f"W&B cannot be used online, logging offline: {_first_line(error)}; "
                f"later: wandb sync {folder / 'wandb'}/offline-run-*"
            )
            self._run = start("offline")
        if self._run.url:
            news(f"W&B: {self._run.url}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        try:
            if self._run is not None:
                self._run.finish()
        finally:
            self._wandb.teardown()  # ends the service process


def wandb_mode(wanted: str | None) -> str:
    """The mode to use: `wanted`, else WANDB_MODE, else online where there is a login."""
    mode = wanted or os.environ.get("WANDB_MODE") or None
    if mode is None:
        return "online" if wandb_login_exists() else "offline"
    if mode not in WANDB_MODES:
        raise UserError(f"wandb.mode={mode} is unknown", f"one of: {', '.join(WANDB_MODES)}")
    if mode == "online" and not wandb_login_exists():
        raise UserError(
            "wandb.mode=online, but no login to W&B was found on this machine",
            "log in with: wandb login, or use wandb.mode=offline",
        )
    return mode


def wandb_login_exists() -> bool:
    """Whether wandb will find credentials for its server; looks at the same files, without the
    network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    found = configparser.ConfigParser()
    config = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    try:
        found.read(Path(config).expanduser() / "settings")
        default = found.get("default", "base_url", fallback="https://api.wandb.ai")
        server = urlsplit(os.environ.get("WANDB_BASE_URL") or default).netloc
        entry = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser())
        login = entry.authenticators(server)
    except (OSError, RuntimeError, ValueError, netrc.NetrcParseError, configparser.Error):
        return False  # RuntimeError: there is no home folder
    return bool(login and login[2])


def _kill_wandb() -> None:
    """End the service processes of a W&B that broke or hangs: they would outlive the run."""
    children = [child for child in psutil.Process().children(recursive=True) if _is_wandb(child)]
    for child in children:
        with suppress(psutil.Error):
            child.kill()
    psutil.wait_procs(children, timeout=KILLED_S)


def _is_wandb(process: psutil.Process) -> bool:
    try:
        return bool(process.name().startswith("wandb"))
    except psutil.Error:
        return False


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
