"""The observer: a replica that pushes nothing. It evaluates, writes checkpoints and logs.

The server's command starts it (`python -m workers.observer.observer`) and sends it `Orders` as one
line of JSON on its standard input. Each further line is a new join token. Where that pipe ends, the
server is gone: the observer writes a checkpoint and ends too.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import msgspec
import torch

from paramserver import drafts, logs, trace
from paramserver.errors import UserError
from paramserver.net import address
from paramserver.output.runfolder import RunFolder
from paramserver.program import exit_on_user_error
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import optimizer_steps
from paramserver.rounds.local_steps import outer_of
from paramserver.settings import Settings
from paramserver.transport import malloc
from paramserver.typed import typed

from ..builtin import builders, models
from ..link.client import Client
from ..replica import checkpoint
from ..replica.replica import Replica
from ..replica.resume import resume
from .early_stop import EarlyStop
from .loggers import evaluation_values, open_logbooks, step_values

NICE = 2
PROBLEMS_TOLD = 100  # reported to the server; further ones are only in this program's log
LOGBOOK_S = 5.0  # that the first round waits for W&B
REST_MAX_S = 0.05
REST_GROWS, REST_BEGINS_S = 1.1, 1e-4  # how fast the estimate of a round may rise
NORMS_EVERY_S = 0.05  # for shorter steps: norms of every step cost a fast run a tenth of its speed
KEPT_SHARE = 0.25  # of the server's history: the part that may wait here unread

EMA = "ema_"  # before the names of what is evaluated of the average

log = logging.getLogger("workers.observer")


class Orders(msgspec.Struct, frozen=True):
    """What the server's command sends to its observer."""

    host: str
    port: int
    key: str
    run: str
    folder: str
    settings: Settings
    resume: str | None = None
    token: str | None = None
    """The join token, for a server that lets nobody in at loopback without ipc."""


class Observer:
    """One observer of one run, from its first state to its last evaluation."""

    def __init__(self, orders: Orders) -> None:
        settings = self.settings = orders.settings
        self.orders = orders
        self.folder = RunFolder(Path(orders.folder))
        for folder in (self.folder.path, self.folder.checkpoints):
            drafts.sweep(folder)
        self.device = builders.choose_device(settings.device)
        builders.set_threads(1, 1)
        self.val = builders.load_data(settings, None).val
        model = models.build(settings.model, settings.seed, None).to(self.device)
        self.copy = copy.deepcopy(model)  # it is evaluated while updates go on
        self.criterion = builders.build_criterion(settings, self.copy, self.val, self.device, None)
        self.average = builders.build_average(model, settings)
        self.average_copy = None if self.average is None else copy.deepcopy(model)
        names = evaluated_names(self.criterion, self.average is not None)
        self.early_stop = None if settings.early_stop is None else EarlyStop(settings, names)
        optimizer = builders.build_optimizer(model, settings, None)
        self.replica = Replica(
            model,
            optimizer,
            bucket_mb=settings.bucket_size_mb,
            min_bucket_mb=settings.min_bucket_mb,
            codec=settings.codec_of_averages,
            scheduler=builders.build_scheduler(optimizer, settings, None),
            clip_norm=settings.clip_norm,
            schedule_by=settings.schedule_by,
            after_step=None if self.average is None else self.average.update_parameters,
            outer=outer_of(settings),
        )
        if orders.resume is not None:
            resume(self.replica, Path(orders.resume), settings)
            log.info(f"resumed {orders.resume} at step {self.replica.steps}")
        there = address.find(orders.host, orders.port, orders.token)
        self.client = Client(
            there.host, there.port, role="observer", key=orders.key, outside=there.outside
        )
        self._untold: list[str] = []  # problems that are not reported to the server yet
        self._told: set[str] = set()
        self._left = False
        self.logbook = open_logbooks(
            settings, self.folder.path, run=orders.run, problem=self._problem
        )
        self.client.on_close = self._on_close
        self.client.on_missed = self._on_missed
        self.server_gone = self.client.abandoned  # set where the pipe from the server ends
        self._logs: list[tuple[int, dict[str, float]]] = []  # held back during an evaluation
        self._evaluated: tuple[int, dict[str, float | None]] | None = None  # step, metrics
        self._saved_step: int | None = None
        self._unsaved: list[int] = []  # steps of checkpoints in a row that were not written
        self._kept = ""  # lineage of the state that was written at the run's end
        self._due: set[str] = set()
        self._evaluating = False
        self._noted = (-1, 0)  # the last update, and the optimizer steps by then
        self._norms_at = 0.0  # when gradients are measured next
        self._round_s = 0.0  # seconds of a round, estimated rather too short than too long

    def renew(self, token: str) -> None:
        """The server has new keys, and this join token; another thread may say so."""
        there = address.find(self.orders.host, self.orders.port, token)
        if there.outside is not None:
            self.client.renew(there.outside)

    def run(self) -> None:
        """Follow the run to its end."""
        client = self.client
        client.connect(self.settings.join_timeout)
        self.logbook.wait_open(LOGBOOK_S)  # otherwise it takes processor time from the first rounds
        client.join(self.replica)
        self._tell_problems()
        while True:
            client.wait(
                lambda: (
                    (self._due and client.follows)
                    or self._must_keep()
                    or client.ended
                    or self.server_gone.is_set()
                ),
                "",
            )
            if client.ended is not None or self.server_gone.is_set():
                break
            if self._must_keep():
                self._keep()
            if "checkpoint" in self._due:
                self._due.discard("checkpoint")
                self._save()
            if "evaluation" in self._due:
                self._due.discard("evaluation")
                self._evaluate()
        if self.server_gone.is_set():
            log.info(f"the server is gone; writing a checkpoint of step {self.replica.steps}")
        self._finish()

    def close(self) -> None:
        """Close the sockets first: the server need not wait for loggers where the run was not
        followed to its end."""
        self._left = True
        self.client.close()
        self.logbook.close()

    def _problem(self, text: str) -> None:
        """Log a problem, and report it to the server, which shows it."""
        log.info(text)
        if text not in self._told and len(self._told) < PROBLEMS_TOLD:
            self._told.add(text)
            self._untold.append(text)
        if self.client.follows and not self._left:
            self._tell_problems()

    def _tell_problems(self) -> None:
        while self._untold:
            self.client.problem(self._untold.pop(0))

    # ------------------------------------------------------------------ step by step

    def _on_missed(self, close: wire.Close) -> None:
        """Log a step that this replica did not apply, and catch up where the state is needed."""
        self._note(close, None)
        if self._due:
            self.client.catch_up()

    def _on_close(self, close: wire.Close) -> None:
        self.client.rest_s = self._rest_s(close)
        norms, now = None, time.monotonic()
        if self.settings.track_gradients and now >= self._norms_at:
            self._norms_at = now + NORMS_EVERY_S
            with_gradient = [(n, p.grad) for n, p in self.replica.params if p.grad is not None]
            lengths = torch._foreach_norm([g for _, g in with_gradient]) if with_gradient else []
            norms = {n: float(norm) for (n, _), norm in zip(with_gradient, lengths, strict=True)}
        self._note(close, norms)

    def _rest_s(self, close: wire.Close) -> float:
        """Seconds for which updates may lie unread: the server keeps those of this time, unless
        rounds get shorter."""
        self._round_s = min(close.seconds, REST_GROWS * self._round_s + REST_BEGINS_S)
        kept_mb = min(self.settings.history_mb, self.client.ring_mb)
        update_mb = self.replica.plan.nbytes / 2**20
        return min(REST_MAX_S, KEPT_SHARE * kept_mb / update_mb * self._round_s)

    def _note(self, close: wire.Close, norms: dict[str, float] | None) -> None:
        """Log a step, and note what is due after it."""
        s, step = self.settings, optimizer_steps(close.ledger, close.step)
        update, noted = self._noted
        before = noted if update == close.step - 1 else step - close.local_steps
        self._noted = close.step, step
        assert self.client.follow is not None
        sent, received = self.client.follow.traffic
        group = self.replica.optimizer.param_groups[0]  # one of a user's may have no rate
        values = step_values(
            loss=close.loss,
            learning_rate=group.get("lr"),
            samples=close.contributors,
            step_s=close.seconds,
            late=close.late,
            sent_bytes=sent,
            received_bytes=received,
            gradient_norms=norms,
        )
        self._logs.append((step, values))
        if _due(s.eval_steps, before, step):
            self._due.add("evaluation")
        elif not self._evaluating:
            self._write_logs()
        if _due(s.checkpoint_steps, before, step):
            self._due.add("checkpoint")

    def _evaluate(self) -> None:
        """Evaluate a copy of this step's weights, and of their average if there is one; apply
        updates between batches."""
        step, weights = self.replica.steps, self.replica.state()["model"]
        self.copy.load_state_dict(weights)
        copies = {"": self.copy}
        if self.average is not None and self.average_copy is not None:
            self.average_copy.load_state_dict(builders.averaged(self.average, weights))
            copies[EMA] = self.average_copy
        found: dict[str, float] = {}
        self._evaluating = True
        for of, model in copies.items():
            loss, metric = builders.evaluate(
                model, self.val, self.device, self.criterion, lambda: self._keep_up()
            )
            found[f"{of}loss"] = loss
            if metric is not None:
                found[f"{of}{self.criterion.name}"] = metric
        self._evaluating = False
        report: dict[str, float | None] = {f"val_{name}": value for name, value in found.items()}
        self._evaluated = (step, report)
        self.client.report(step, report)
        loss = found.pop("loss")
        for logged, values in self._logs:
            if logged == step:
                values.update(evaluation_values(loss, found))
        self._write_logs()
        if self.early_stop is not None and not self.client.at_last_step:
            reason = self.early_stop.evaluated(step, report)
            if reason is not None:  # where this is lost, the next evaluation says it again
                self.client.stop(reason)

    def _keep_up(self) -> None:
        """Apply the updates that have come, up to the step of the next evaluation."""
        self.client.wait(lambda: self._due or self._must_keep(), "", timeout_s=0)
        if self._must_keep():
            self._keep()
        if "checkpoint" in self._due:
            self._due.discard("checkpoint")
            self._save()

    def _write_logs(self) -> None:
        """Log the held steps, except the one whose evaluation is due: that waits for the result."""
        ready = len(self._logs) - ("evaluation" in self._due)
        for step, values in self._logs[:ready]:
            self.logbook.log(step, values)
        del self._logs[:ready]

    def _save(self) -> None:
        """Write a checkpoint. Where the disk is full, older ones are removed; where that does not
        help, this one is left out, and the run goes on."""
        step, folder = self.replica.steps, self.folder.checkpoints
        path, settings = folder / checkpoint.name(step), asdict(self.settings)
        try:
            self._write(lambda: checkpoint.save(path, self.replica, self.orders.run, settings))
            checkpoint.prune(folder, self.settings.keep_checkpoints, path)
            drafts.sweep(self.folder.path)
        except OSError as e:
            self._unsaved.append(step)
            sentence = f"the checkpoint of step {step} was not written: {e.strerror or e}"
            if len(self._unsaved) == 1:
                self._problem(sentence)  # a sentence with their number follows later
            else:
                log.info(sentence)
        else:
            self._saved_step = step
            self._tell_unsaved()

    def _write(self, write: Callable[[], None]) -> None:
        """Write a file; where the disk is full, remove older checkpoints first."""
        removed = checkpoint.with_room(write, self.folder.checkpoints)
        if removed:
            log.info(f"removed to make room: {', '.join(removed)}")
            self._problem("the disk is full: older checkpoints are removed to make room")

    def _tell_unsaved(self) -> None:
        count = len(self._unsaved)
        if count > 1:
            self._problem(f"{count} checkpoints were not written, up to step {self._unsaved[-1]}")
        self._unsaved.clear()

    def _must_keep(self) -> bool:
        """Does the run's end wait for this observer's files?"""
        return self.client.at_last_step and self._kept != self.replica.lineage

    def _keep(self) -> None:
        """The last checkpoint and the weights. Before the run's end workers still hold this state:
        should this process die now, another observer takes it from them."""
        step = self.replica.steps
        if self._saved_step != step and step > 0:
            self._save()
        self._tell_unsaved()
        model = self.replica.state()["model"]
        weights = {self.folder.model: model}
        if self.average is not None:
            weights[self.folder.average] = builders.averaged(self.average, model)
        for path, state in weights.items():
            try:
                self._write(partial(checkpoint.save_model, path, state, step))
            except OSError as e:
                self._problem(f"{path} was not written: {e.strerror or e}")
        self._kept = self.replica.lineage
        if self.client.at_last_step:
            self.client.kept()

    def _finish(self) -> None:
        """Write the last files if that is not done, evaluate, and send goodbye."""
        step = self.replica.steps
        if self._kept != self.replica.lineage:
            self._keep()
        self._due.clear()
        if self.server_gone.is_set():
            self._write_logs()
            return
        if self._evaluated is None or self._evaluated[0] != step:
            self._evaluate()
        assert self._evaluated is not None
        self.client.report(*self._evaluated, final=True)
        self.logbook.close()  # its problems are reported before goodbye
        self._tell_problems()
        self.client.goodbye(wire.Goodbye(wire.FINISHED, finished=True))


def evaluated_names(criterion: builders.Criterion, average: bool) -> list[str]:
    """The names of what an evaluation finds, the metric first."""
    names = ["loss"] if criterion.metric is None else [criterion.name, "loss"]
    return names + [f"{EMA}{name}" for name in names if average]


def _due(every: int, before: int, now: int) -> bool:
    """Is `now` the first step at or behind a multiple of `every`? (0: never.) A round of local
    steps makes several at once."""
    return every > 0 and now // every > before // every


def main() -> None:
    """The observer program; see the module's docstring."""
    logs.show("workers", logs.Lines())
    with exit_on_user_error():
        _step_aside()
        malloc.keep_freed()
        line = sys.stdin.readline()
        if not line:
            raise UserError(
                "the observer is started by the server", f"{typed('server')} starts both"
            )
        trace.begin("observer")
        observer = Observer(msgspec.json.decode(line, type=Orders))

        def watch_pipe() -> None:
            for token in sys.stdin:
                observer.renew(token)
            observer.server_gone.set()

        threading.Thread(target=watch_pipe, name="pipe", daemon=True).start()
        try:
            observer.run()
        finally:
            observer.close()


def _step_aside() -> None:
    """Give the workers precedence where cores are scarce: the observer falls behind and catches
    up."""
    with suppress(OSError):  # a container may forbid it
        os.nice(NICE)
        if sys.platform == "linux":  # waking up, it does not take a core from a working process
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


if __name__ == "__main__":
    main()
