"""The worker's training: join, build what the run's settings say, loop over the leases.

It uses the same interface as a user's own loop (`workers.cluster`).
"""

from __future__ import annotations

import logging
import time

from paramserver import notify, trace
from paramserver.config.loading import check_worker_overrides, from_wire
from paramserver.errors import RunLost
from paramserver.net import address
from paramserver.settings import Settings
from paramserver.transport import sockets
from paramserver.typed import typed
from paramserver.words import host_port

from ..cluster import Cluster, join, told
from . import builders, models, own_code

PROGRESS_S = 5.0
WAITS_TOO_LONG = 50.0  # percent of a worker's time
log = logging.getLogger(__name__)


def train(settings: Settings, given: dict[str, object]) -> None:
    """Take part in all runs of a server, one after another, until the last one has ended.

    `settings` are this process's own; the run's come from the server, and `given` (its command
    line) must not contradict them. Raises `UserError`, and at the end `RunLost` where a run has
    ended by an error.
    """
    lost: RunLost | None = None
    while True:
        cluster = _join(settings, given)
        try:
            _train(cluster, settings, given)
        except RunLost as e:
            if cluster.end is None or not cluster.end.more:
                raise
            lost = e
            log.warning(str(e))
        cluster.leave()
        if cluster.end is None or not cluster.end.more:
            break
        log.info(f"run {cluster.trial} of {cluster.runs} is over, the next one follows")
    if lost is not None:
        raise lost


def _join(settings: Settings, given: dict[str, object]) -> Cluster:
    host, port = address.asked(settings, given)
    return join(
        host,
        settings.id,
        port=port,
        token=settings.join,
        security=settings.security,
        timeout_s=settings.join_timeout,
        shared_memory=settings.shared_memory,
    )


def _train(cluster: Cluster, settings: Settings, given: dict[str, object]) -> None:
    """Take part in a run until it ends. Leaves the cluster only with an error."""
    try:
        run = from_wire(settings, cluster.settings)
        check_worker_overrides(given, run)
        device = builders.choose_device(run.device)
        builders.set_threads(run.threads, run.num_workers if sockets.is_local(cluster.host) else 1)
        trace.begin(f"worker {cluster.worker_id}")
        log.info(
            f"worker {cluster.worker_id} of a run at {host_port(cluster.host, cluster.port)}, "
            f"on {device}"
        )

        code = own_code.of_worker(settings)
        samples = builders.load_data(run, code).train
        model = models.build(run.model, run.seed, code).to(device)
        optimizer = builders.build_optimizer(model, run, code)
        criterion = builders.build_criterion(run, model, samples, device, code)
        average = builders.build_average(model, run)
        model.train()
        model, stepper = cluster.attach(
            model,
            optimizer,
            scheduler=builders.build_scheduler(optimizer, run, code),
            clip_norm=run.clip_norm,
            schedule_by=run.schedule_by,
            after_step=None if average is None else average.update_parameters,
        )
        log.info(f"stands at step {cluster.step}")

        progress = Progress()
        batches = cluster.batches(
            samples, device=device, batch_limit=settings.batch_limit, samples=criterion.samples
        )
        for batch in batches:
            stepper.zero_grad()
            outputs, targets = builders.forward(model, batch)
            loss = criterion.loss(outputs, targets)
            cluster.tell(loss=loss)
            loss.backward()
            stepper.step()
            progress.did(len(targets), cluster)
        end = cluster.end
        assert end is not None
        log.info(f"the run is over at step {end.step}: {end.reason}")
    except BaseException as e:
        cluster.leave(told(e), e)
        raise


class Progress:
    """Logs a line every few seconds: this worker's step and speed."""

    def __init__(self) -> None:
        self._samples = self._steps = 0
        self._seen = 0  # the step at the last call
        self._at = time.monotonic()
        self._waited = 0.0
        self._advised = False

    def did(self, samples: int, cluster: Cluster) -> None:
        self._samples += samples
        self._steps += cluster.step != self._seen  # a large share comes in several batches
        self._seen = cluster.step
        now = time.monotonic()
        if now - self._at < PROGRESS_S:
            return
        seconds = now - self._at
        waited = cluster.waiting_s - self._waited
        share = min(100.0, 100 * waited / seconds)
        log.info(
            f"{notify.mark()}step {cluster.step}  {self._steps / seconds:.1f} steps/s  "
            f"{self._samples / seconds:,.0f} samples/s  "
            f"computing {100 - share:.0f} % of the time"
        )
        if share > WAITS_TOO_LONG and not self._advised:
            self._advised = True
            log.info(
                f"this worker waits {share:.0f} % of its time, for other workers and for the "
                f"exchange: {typed('plan')} tells which machines, codec and local_steps are faster"
            )
        self._samples = self._steps = 0
        self._at, self._waited = now, cluster.waiting_s
