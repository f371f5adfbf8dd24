"""The interface for a training loop: join a cluster, attach a model, iterate over this worker's
leases.

    cluster = join("10.10.0.1", worker_id=2)
    model, optimizer = cluster.attach(model, optimizer)
    for images, labels in cluster.batches(train_set):
        optimizer.zero_grad()
        criterion(model(images), labels).backward()   # buckets leave as they become ready
        optimizer.step()                              # waits for the averages, then steps

The built-in loop (`workers.builtin.train`) uses the same interface.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar, overload

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paramserver import logs, trace
from paramserver.errors import RunLost, UserError
from paramserver.net import address, mdns
from paramserver.protocol import messages as wire
from paramserver.protocol.messages import Lease
from paramserver.ranges import ADDRESS
from paramserver.rounds.late import weight_of_late
from paramserver.rounds.local_steps import outer_of
from paramserver.settings import RunSettings, Settings
from paramserver.tensors.bucket import Bucket
from paramserver.tensors.codec import codec_of_pushes
from paramserver.tensors.error_feedback import ErrorFeedback
from paramserver.terminal import STOPPED_BY

from . import living
from .batches import Batches, Epochs, Sizes, sizes_of, weights_of
from .by_hand import SetByHand
from .contribution import Contribution
from .lengths import Lengths
from .link.client import Client
from .link.environment import listens, read_environment
from .link.solo import Solo
from .loaders import parts_of
from .local_rounds import LocalRounds
from .looks import look
from .optimizer import ClusterOptimizer
from .replica.gradients import Gradients
from .replica.replica import Replica
from .replica.several import Pair, Several
from .samples import Loading, Samples, Unusable, cut, drawn_from
from .turns import Turns
from .weight import check_function, checked, collates_by_default, samples_in

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

PAIR_OPTIONS = {"scheduler", "clip_norm", "before_step", "after_step"}
"""What each of several pairs may have of its own, see `Cluster.attach`."""

ZERO_STEPS = 3  # with gradients that are all 0, before it is said


def join(
    host: str | None = None,
    worker_id: int | None = None,
    *,
    port: int | None = None,
    token: str | None = None,
    security: str | None = None,
    timeout_s: float = 60.0,
    shared_memory: bool = True,
    say: Callable[[str], None] | None = None,
    alone: Mapping[str, Any] | None = None,
) -> Cluster:
    """Greet the server at `host` and take part as worker `worker_id` (None: any free id).

    What is not given is taken from the environment (`workers.link.environment`). A server on
    another machine needs its join `token`, or the path of a file that holds one; the token brings
    host and port, where they are not given. Of several addresses in a token one that answers is
    taken, and another one where that falls silent. As host, "auto" looks for the server in the
    local network, by mDNS, too. `security="none"` (usual: "curve") is for a server with the same
    setting. If there is neither host nor token, and no server listens on this machine, this is a
    cluster of one: the same loop trains alone, with the settings in `alone` (`num_epochs`,
    `batch_size`, `seed`) over the usual ones.

    With a server on this host gradients go through shared memory, half of which is left to others
    (a DataLoader's processes, say); `shared_memory=False` leaves all.

    Each event is a line for `say(line)`; without it, for the logger `workers`, whose lines are
    printed where the script has given it neither a handler nor a level.

    Waits up to `timeout_s` for the server's answer. Raises `UserError` where there is none or where
    the server refuses, with the reason.
    """
    living.refuse_in_child()
    if say is None:
        logs.show_unless_told("workers")
        log = logging.getLogger("workers")
    else:
        log = logs.to(say, "workers")
    here = read_environment(os.environ)
    host, port, token = host or here.host, port or here.port, token or here.token
    security = security or here.security or "curve"
    if host is not None and not ADDRESS.holds(host):
        raise UserError(f"host={host!r} {ADDRESS.must}", "join('10.10.0.1', port=65432)")
    search = None
    if host is None and token is None:
        port = port or Settings.port
        if not listens(address.LOOPBACK, port):
            if living.last_finished(address.LOOPBACK, port):
                raise UserError(
                    f"the server on this machine (port {port}) has served all its runs",
                    "start it with runs=N for N of them; trials(N) takes part in as many",
                )
            only = Solo(alone or {}, log)
            epochs = only.settings.num_epochs
            log.info(f"no server on this machine (port {port}): training alone, {epochs} epochs")
            return Cluster(only)
    several = security != "none" and address.several(token)  # networks that lead to the server
    if host == address.AUTO or several:
        search = partial(mdns.Search, token, security=security, log=log)
    there = address.find(host, port, token, security=security) if host != address.AUTO else None
    if there is None or (several and host is None and there.host != address.LOOPBACK):
        there = mdns.find(token, security=security, timeout_s=timeout_s, log=log)
    id = here.id if worker_id is None else worker_id
    before = living.leave_same(there.host, there.port, id)
    client = Client(
        there.host,
        there.port,
        id=id,
        keys=there.keys,
        outside=there.outside,
        search=search,
        shared_memory=shared_memory,
        log=log,
        after=living.last_finished(there.host, there.port),
    )
    try:
        client.connect(timeout_s)
    except BaseException:
        client.close()
        raise
    cluster = Cluster(client)
    cluster.asked, cluster.before = id, before
    return cluster


def trials(
    number: int, host: str | None = None, worker_id: int | None = None, **options: Any
) -> Iterator[Cluster]:
    """Take part in as many runs of one server (`make server runs=3`), one after another: a search
    over settings, for instance.

        for cluster in trials(len(RATES)):
            rate = RATES[cluster.trial - 1]
            model, optimizer = cluster.attach(...)

    The other arguments are those of `join`. Each cluster is left at the end of its turn (not by
    `break`). A worker that comes later begins with the trial that is under way. The loop ends
    sooner where somebody ends the server. Raises `UserError` where the server has another number
    of runs.
    """
    trial = 0
    while trial < number:
        cluster = join(host, worker_id, **options)
        if cluster.is_alone:
            cluster.trial, cluster.runs = trial + 1, number
        trial = cluster.trial
        if cluster.runs != number:
            problem = f"this script takes part in {number} runs, its server serves {cluster.runs}"
            cluster.leave(problem)
            raise UserError(problem, f"start the server with runs={number}")
        yield cluster  # one that is left by an error, or by break, is left at the program's end
        cluster.leave()
        if not cluster.is_alone and cluster.end is not None and not cluster.end.more:
            return


class Cluster:
    """This worker's place in a run. `settings` are the run's, as the server sent them: attributes
    (`cluster.settings.batch_size`), or items of a mapping."""

    def __init__(self, client: Client | Solo) -> None:
        assert client.welcome is not None
        self.client = client
        self.settings: RunSettings = client.settings
        self.worker_id = client.welcome.id
        self.trial: int = client.welcome.trial
        """The place of this run, from 1, among the `runs` that its server serves."""
        self.runs: int = client.welcome.runs
        self.asked: int | None = self.worker_id
        """The number that was asked for."""
        self.before: Cluster | None = None
        """The cluster of this thread, at the same server, that this one follows."""
        self.thread = 0
        self.in_loop = False
        """A loop over its batches is under way."""
        self.stands = False
        """It has attached to a server, and not begun a loop."""
        self.trains: set[int] = set()
        """The parameters, by their ids."""
        living.lives(self)
        self._replica: Replica | None = None
        self._gradients: Gradients | None = None
        self._feedback: ErrorFeedback | None = None
        self._optimizers: list[ClusterOptimizer] = []
        self._several: Several | None = None  # the replica, if pairs take turns in it
        self._in_batch = False
        self._by_hand: SetByHand | None = None
        self._by_hands: dict[str, SetByHand] = {}  # of several pairs
        self._local: LocalRounds | None = None
        self._contribution = Contribution(client.greetings)
        self._turns = Turns(client, self._contribution, worker=self.worker_id)
        self._weighs = False  # its weight is told, since it is not the number of samples
        self._lengths: Lengths | None = Lengths(client.log) if client.compares else None
        self._batch = Sizes(0, 0)  # of the optimizer step that is being worked on
        self._part, self._parts_left = 0, 0  # weight of its part at hand; parts that follow it
        self._leased_at = 0.0  # when the lease was there that is being worked on
        self._held_up_s = 0.0  # of the time since, what was spent waiting for others
        self._encoded_s = 0.0  # since the last push with times, see `wire.Spent`
        self._told_at, self._told_waited_s = 0.0, 0.0  # when that was; seconds waited by then
        self._gone = False  # it has left
        self._zeros = 0  # first averages that were all zero; ZERO_STEPS: looked at no more
        self._own = False  # this worker takes part with samples of its own
        self._ready: Loading | None = None  # leases are asked for, and loaded by this
        self._epochs: Epochs | None = None  # the script loops over them
        self._stepped = True  # step() was called for it
        self._computing = 0  # since when; for a trace
        self._lease: Lease | None = None  # the lease of `batches` that is being computed
        self._phase = ""  # load, forward or backward, until the gradient is complete
        self._seeded = False
        self._told = False  # the loss of the part at hand
        self._carried = False  # the gradient may enter a later round than its own
        self._waiting_s = 0.0
        self._load_ahead: Callable[[], None] | None = None
        self._contributed = False  # since its last greeting
        self._stop_reason: str | None = None  # its script stops the run
        self._stopping = False  # the server knows
        self._lost: wire.End | None = None  # this worker's part ended, and perhaps the run
        atexit.register(self._at_exit)

    @property
    def is_alone(self) -> bool:
        """Is this a cluster of one, without a server?"""
        return isinstance(self.client, Solo)

    @property
    def host(self) -> str:
        """The server's address, as it is dialled."""
        return self.client.host

    @property
    def port(self) -> int:
        return self.client.port

    @property
    def run(self) -> str:
        """The run's id."""
        return "" if self.client.welcome is None else self.client.welcome.run

    @property
    def step(self) -> int:
        """Optimizer steps made so far; each update is one, or a round of local steps."""
        if self._replica is None:
            return 0
        return self._replica.steps + self._replica.made

    @property
    def epoch(self) -> int:
        """Whole epochs of samples applied so far; 0 with batches of one's own."""
        return self._replica.epoch if self._replica is not None else 0

    @property
    def waiting_s(self) -> float:
        """Seconds spent in `step` waiting for averages, in all."""
        return self._waiting_s

    @overload
    def attach(
        self,
        model: M,
        optimizer: Optimizer | ClusterOptimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
        after_step: Callable[[nn.Module], Any] | None = None,
        accumulate: int = 1,
        schedule_by: str = "step",
        buffers: Mapping[str, str] | None = None,
        first: bool = False,
    ) -> tuple[M, ClusterOptimizer]: ...

    @overload
    def attach(
        self,
        *,
        schedule_by: str = "step",
        buffers: Mapping[str, str] | None = None,
        first: bool = False,
        **pairs: tuple[Any, ...],
    ) -> tuple[tuple[Any, ClusterOptimizer], ...]: ...

    def attach(
        self,
        model: Any = None,
        optimizer: Any = None,
        *,
        scheduler: Any = None,
        clip_norm: Any = None,
        before_step: Any = None,
        after_step: Any = None,
        accumulate: Any = 1,
        schedule_by: str = "step",
        buffers: Mapping[str, str] | None = None,
        first: bool = False,
        **pairs: tuple[Any, ...],
    ) -> Any:
        """Make this model a replica: it takes the run's state, and its gradients are exchanged.

        These arguments fix what happens between the averaged gradient and the parameters, in every
        replica: `before_step(model)`, clipping of the total norm, the optimizer, the schedule (with
        every update, or `schedule_by` "epoch"), and `after_step(model)`, an average of the weights
        for instance: the state of the object that it belongs to goes to workers that come later.
        With `local_steps` they are of the steps that each
        worker makes by itself. `accumulate` backward passes make one step.
        `buffers` names buffers that forwards write and that are averaged ("mean") or take the
        largest ("max"); others come whole from one worker, except those of normalisation layers.
        `first`: the run begins with the weights of this worker, which needs not wait for others;
        without it those of the lowest worker are the first, once `num_workers` have joined.
        Torch's generator stays as it is until the first batch begins, when each worker seeds it
        differently.

        Several models, or optimizers of one, are given by name, each with its optimizer and, if it
        has any, a dict of its own `scheduler`, `clip_norm`, `before_step` and `after_step`:

            (G, opt_g), (D, opt_d) = cluster.attach(generator=(G, opt_g), critic=(D, opt_d))

        They take turns, as the loop calls the `step` of one or the other: each is a step of the
        run, by the average of that pair's gradients, which are None afterwards. A lease is for
        all steps from one batch to the next, which every worker's loop makes in the same order.

        Raises `UserError` where the model or the optimizer is not the run's, or cannot be a
        replica's.
        """
        self._check_here("attach()")
        if self._replica is not None:
            raise UserError(
                "attach() was called twice",
                "several models are attached in one call: attach(generator=(G, opt_g), "
                "critic=(D, opt_d)), see 'Several models' in docs/your-own-model.md; for another "
                "training: cluster.leave(), then join() and attach() again",
            )
        if pairs or model is None or optimizer is None:
            own = (scheduler, clip_norm, before_step, after_step)
            if model is not None or optimizer is not None or any(x is not None for x in own):
                raise UserError(
                    "attach() takes one model with its optimizer, or several by name",
                    "several: attach(generator=(G, opt_g), critic=(D, opt_d, {'clip_norm': 1.0}))",
                )
            return self._attach_several(pairs, schedule_by, buffers, first, accumulate)
        if not isinstance(model, nn.Module) or not isinstance(optimizer, Optimizer):
            raise UserError(
                f"attach() was given {_kind(model)} and {_kind(optimizer)}",
                "it takes a model and its optimizer: attach(model, optimizer)",
            )
        optimizer = _unwrapped(optimizer, scheduler)
        if after_step is not None and outer_of(self.settings) and self.settings.overlap:
            raise UserError(
                "after_step cannot run while local steps go on during an exchange",
                "leave it out, or start the server with overlap=false",
            )
        living.leave_others(self, model)
        replica = Replica(
            model,
            optimizer,
            bucket_mb=self.settings.bucket_size_mb,
            min_bucket_mb=self.settings.min_bucket_mb,
            codec=self.settings.codec_of_averages,
            scheduler=scheduler,
            clip_norm=clip_norm,
            before_step=before_step,
            after_step=after_step,
            schedule_by=schedule_by,
            own_schedule=self.settings.epoch_barrier,
            buffers=buffers,
            outer=outer_of(self.settings),
        )
        self._take_part(replica, first, accumulate)
        self._optimizers = [ClusterOptimizer(optimizer, self._step)]
        return model, self._optimizers[0]

    def _attach_several(
        self,
        given: Mapping[str, tuple[Any, ...]],
        schedule_by: str,
        buffers: Mapping[str, str] | None,
        first: bool,
        accumulate: int,
    ) -> tuple[tuple[Any, ClusterOptimizer], ...]:
        """Make these pairs a replica."""
        if len(given) < 2 or accumulate != 1:
            raise UserError(
                "attach() of several models takes two or more, and needs no accumulate=: nothing "
                "leaves before the step of one",
                "one: attach(model, optimizer); several: attach(generator=(G, opt_g), "
                "critic=(D, opt_d))",
            )
        if self.settings.local_steps != 1:
            raise UserError(
                "several models with optimizers of their own cannot make local steps",
                "start the server with local_steps=1",
            )
        if self.settings.max_staleness:
            raise UserError(
                "late work of several models with optimizers of their own cannot be carried over: "
                "a lease is for several of their steps",
                "start the server with max_staleness=0",
            )
        pairs = [_pair(name, told) for name, told in given.items()]
        for pair in pairs:
            living.leave_others(self, pair.model)
        replica = self._several = Several(
            pairs,
            bucket_mb=self.settings.bucket_size_mb,
            min_bucket_mb=self.settings.min_bucket_mb,
            codec=self.settings.codec_of_averages,
            schedule_by=schedule_by,
            own_schedule=self.settings.epoch_barrier,
            buffers=buffers,
        )
        self._take_part(replica, first, 1)
        self._by_hands = {pair.name: SetByHand(pair, self.client.log) for pair in pairs}
        self._optimizers = [
            ClusterOptimizer(pair.optimizer, partial(self._step_pair, pair)) for pair in pairs
        ]
        return tuple((p.model, o) for p, o in zip(pairs, self._optimizers, strict=True))

    def _take_part(self, replica: Replica, first: bool, accumulate: int) -> None:
        """Join with this replica."""
        if not isinstance(accumulate, int) or accumulate < 1:
            raise UserError(
                f"accumulate={accumulate!r}", "it is the number of backward passes of a step"
            )
        if not self.is_alone:
            living.refuse_second_attach(self)
        before, self.before = self.before, None
        if before is not None and before._replica is not None and before.run == self.run:
            living.hand_over(before._replica, replica)
        self._replica = replica
        self.trains = {id(p) for _, p in replica.params}
        self._tell_float64(replica)
        self.client.device = str(next(iter(replica.model.parameters())).device.type)
        self.client.first = first
        with self._losing():
            self.client.join(replica)
        self.stands = not self.is_alone
        codec = codec_of_pushes(self.settings.codec, self.settings.topk_ratio)
        self._feedback = ErrorFeedback(replica.plan, codec)
        self.client.on_close = self._on_close
        self._by_hand = SetByHand(replica, self.client.log)
        self._gradients = Gradients(
            replica, self._values, self._send_bucket, accumulate, self._by_hand.holds_last_bucket
        )
        self._local = LocalRounds(
            self.client,
            replica,
            self._gradients,
            self._contribution,
            self._settled,
            worker=self.worker_id,
            overlap=self.settings.overlap,
        )

    def _tell_float64(self, replica: Replica) -> None:
        """Report that gradients in float64 do not go through a codec that loses precision."""
        codecs = {self.settings.codec, self.settings.codec_of_averages} - {"float32"}
        exact = [t.name for t in replica.layout.tensors if t.kind == "grad" and t.sent == "float64"]
        if codecs and exact:
            self.client.log.info(
                f"{len(exact)} parameters in float64 ({exact[0]}) are exchanged as they are, "
                f"not as {' or '.join(sorted(codecs))}"
            )

    # ------------------------------------------------------------------ samples

    def batches(
        self,
        dataset: Any,
        *,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        drop_last: bool = False,
        batch_limit: int | None = None,
        samples: Callable[[Any], int] | None = None,
        weights: Any = None,
    ) -> Batches:
        """This worker's batches, epoch after epoch, until the run has ended in order: all epochs
        are done, or a person stopped it. Where it ends by an error, or without this worker, it
        raises `RunLost`; `end` tells how it ended in any case.

        `dataset` is the same on every worker: something with a length and `batch(indices, device)`
        or `dataset[i]` (samples are then collated as torch's DataLoader does, and tensors moved to
        `device`). The server decides which samples come, so that each sample of an epoch is used
        once, with any number of workers. It skips and names samples that cannot be read or that
        make workers die and, with `drop_last`, the last short batch of an epoch. The next lease's
        data is loaded while this one is computed, or, by `batch`, while the averages are on their
        way.

        A DataLoader stands for its data set: its batch size, `drop_last`, `collate_fn`, processes
        and pinning are used, its order is not. `len()` estimates this worker's batches in an epoch.

        A round's average weighs each batch by its number of samples. Where the loss is the mean of
        something else (tokens, say), `samples(batch)` gives that number, in every worker.

        With `weights`, a number for each sample, an epoch is what these draw: as many samples as
        the set has, with replacement; a `WeightedRandomSampler` says another number of draws, or
        without replacement. Each draw is used once then, not each sample.

        With `shares: speed` the worker computes more or fewer samples than `batch_size`, by its
        speed. More than `batch_limit` samples come in several batches, whose gradients are added:
        `step` exchanges and applies them with the last one. The default is no limit on a CPU, and
        `batch_size` on a GPU. Raises `UserError` for an unsuitable data set.
        """
        self._check_part("batches()")
        assert self._replica is not None
        check_function(samples)
        draws = drawn_from(dataset, weights)
        given = parts_of(dataset, draws)
        if given is not None:
            batch_size, drop_last = batch_size or given.batch_size, drop_last or given.drop_last
        size = self.settings.batch_size if batch_size is None else batch_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"batch_size={size!r}", "it is a whole number of samples, at least 1")
        if self._several is not None and batch_limit is not None:
            raise UserError("batch_limit with several models", "leave it out")
        by_speed = self.settings.shares == "speed" and not self.settings.deterministic
        by_speed &= self._several is None
        if batch_limit is None and by_speed and self.client.device != "cpu":
            batch_limit = size
        if batch_limit is not None and batch_limit < 1:
            raise UserError(f"batch_limit={batch_limit!r}", "it is a number of samples, at least 1")
        drawn = "" if draws is None else draws.digest()
        wanted = (id(dataset), size, str(device), drop_last, batch_limit, samples, drawn)
        before = None if self._epochs is None else self._epochs.batches
        if before is not None and before.wanted == wanted:
            return before  # a script may call this anew in each epoch
        read = Samples(
            dataset,
            device,
            limit=batch_limit,
            least=min(size, self._replica.least),
            seed=self.settings.seed,
            deterministic=self.settings.deterministic,
            worker=self.worker_id,
            draws=draws,
            log=self.client.log,
        )
        return Batches(
            partial(self._batches, size=size, drop_last=drop_last, weight=samples),
            dataset,
            read,
            wanted,
            size,
            -(-read.leased // (size * self.settings.num_workers)),
        )

    def _batches(
        self,
        batches: Batches,
        *,
        size: int,
        drop_last: bool,
        weight: Callable[[Any], int] | None,
    ) -> Iterator[Any]:
        assert self._replica is not None and self._local is not None
        local = self._local
        least = min(size, self._replica.least)
        samples, loading = batches.samples, batches.loads()
        if self._epochs is not None:
            self._epochs.begun, self._epochs.batches = True, batches

        def load_ahead() -> None:
            assert self.client.follow is not None
            lease = self.client.follow.lease_ahead(self.worker_id)
            if lease is not None:
                loading.begin(lease if local.most == 1 else cut(lease, size, least)[0])

        self._load_ahead = load_ahead
        self._weighs = weight is not None
        living.refuse_second_loop(self)
        if self._ready is not loading:  # else they are, since the last epoch
            self._ready = loading
            ready = wire.Ready(
                samples=samples.leased,
                batch_size=size,
                least=least,
                drop_last=drop_last,
                looks=look(samples) if self.client.compares else (),
                weighs=self._weighs,
                draws="" if samples.draws is None else samples.draws.digest(),
            )
            with self._losing():
                self.client.ready(ready)
        whole = False  # the pass
        self.in_loop, self.stands = True, False
        try:
            while (lease := self._next_lease()) is not None:
                self._seed()
                self._lease, self._phase = lease, wire.LOAD
                if local.most > 1:
                    pieces = cut(lease, size, least)
                    yield from self._local_batches(pieces, loading, least, load_ahead, weight)
                    continue
                loading.keep(lease)
                if not loading.in_loop:
                    loading.begin(lease)
                    load_ahead()
                parts = loading.result(lease)
                unread = tuple(place for part in parts for place in part.unread)
                parts = [part for part in parts if part.samples]
                if unread and sum(part.samples for part in parts) < least:
                    self._nothing_readable()
                    continue
                weights = weights_of(parts, weight)
                self._begin(sizes_of(parts, weights), unread, parts=len(parts))
                for place, part in enumerate(parts):
                    self._look_at_lengths(part.data, weight)
                    self._begin_part(weights[place], len(parts) - 1 - place)
                    yield part.data
                    self._check_stepped()
            whole = True
        finally:
            self.in_loop = False
            self._load_ahead = None
            if not whole or self._epochs is None or self.client.ended is not None:
                batches.close()
                self._leave_loop()

    def epochs(self) -> Iterator[int]:
        """The numbers of the run's epochs, for a script with two loops. A pass over `batches` ends
        with the samples of the epoch then, or over `own_batches` with these, and the script may
        evaluate before the next one. What the others do meanwhile, see `evaluating`.

            for epoch in cluster.epochs():
                for images, labels in batches: ...
                test(model)

        A pass may be empty, where others had all samples of the epoch. One that is broken off
        leaves its samples to others, and its epoch goes on. Without `epoch_barrier` a round may
        hold samples of two epochs; with it, all workers are at the same step between two passes, so
        that a schedule may be stepped there. Raises `UserError` for an epoch without a pass.
        """
        self._check_part("epochs()")
        epochs = self._epochs = Epochs(self.epoch, self.settings.num_epochs)
        try:
            while self.client.ended is None and epochs.now < self.settings.num_epochs:
                yield epochs.now
                if not epochs.begun:
                    raise UserError(
                        "an epoch without batches",
                        "for epoch in cluster.epochs(): for batch in cluster.batches(...):",
                    )
                epochs.next(self.epoch)
        finally:
            self._epochs = None
            if epochs.batches is not None:
                epochs.batches.close()
            if self._ready is not None:
                self._leave_loop()

    def _local_batches(
        self,
        pieces: list[Lease],
        loading: Loading,
        least: int,
        load_ahead: Callable[[], None],
        weight: Callable[[Any], int] | None,
    ) -> Iterator[Any]:
        """The batches of a round of local steps, one for each of these pieces of the lease, until
        all steps are made or the round is over without them."""
        assert self._local is not None
        local = self._local
        self._begin_local(len(pieces))
        start, unread = pieces[0][1], list[int]()
        for number, piece in enumerate(pieces):
            self._phase = wire.LOAD
            loading.keep(piece)
            if not loading.in_loop:
                loading.begin(piece)
                if number + 1 < len(pieces):
                    loading.begin(pieces[number + 1])
                else:
                    load_ahead()
            parts = loading.result(piece)
            unread += (piece[1] - start + place for part in parts for place in part.unread)
            self._contribution.unread = tuple(unread)
            parts = [part for part in parts if part.samples]
            local.left = len(pieces) - 1 - number
            if sum(part.samples for part in parts) < least:
                continue
            weights = weights_of(parts, weight)
            self._batch = sizes_of(parts, weights)
            for place, part in enumerate(parts):
                self._look_at_lengths(part.data, weight)
                self._begin_part(weights[place], len(parts) - 1 - place)
                with self._stopping_sooner():
                    yield part.data
                self._check_stepped()
            if local.exchanged or not local.is_open():
                return
        if self._contribution.steps:  # the last piece could not be read
            self._exchange_local()
        elif local.under_way is None or self._await_own_round():
            self._nothing_readable()

    def _look_at_lengths(self, batch: Any, weight: Callable[[Any], int] | None) -> None:
        """Warn, once, where the number of samples may be the wrong weight of a batch."""
        if self._lengths is not None and weight is None:
            self._lengths.look(batch)

    def own_batches(
        self, batches: Iterable[T], *, samples: Callable[[T], int] | None = None
    ) -> Iterator[T]:
        """Batches of this worker's own: any iterable, a DataLoader say, whose data stay here.

        Each one is part of a round, whose average weighs it by `samples(batch)`, which is counted
        where it is not given and all parts of the batch agree (`workers.weight`). One call is one
        pass; call it again for the next one, and `leave` after the last. The run ends when all
        workers have left so. A pass ends early where a person stopped the run, and raises `RunLost`
        where it ended by an error, or without this worker. Raises `UserError` for a batch whose
        samples cannot be counted.
        """
        self._check_part("own_batches()")
        assert self._replica is not None and self._local is not None
        check_function(samples)
        local = self._local
        if self._replica.schedule_by == "epoch":
            raise UserError(
                "a schedule by epoch follows the epochs of a set that all workers share",
                "attach(schedule_by='step')",
            )
        living.refuse_second_loop(self)
        self._seed()
        self._weighs = False
        if self._epochs is not None:
            self._epochs.begun = True
        if not self._own:
            self._own = True
            with self._losing():
                self.client.ready(wire.Ready(samples=0, batch_size=1, own=True))
        whole, self.in_loop, self.stands = False, True, False  # the pass
        collated = collates_by_default(batches)
        try:
            for batch in batches:
                if samples is None:
                    count = samples_in(batch, collated=collated)
                else:
                    count = checked(samples(batch))
                if local.exchanged or not local.is_open():
                    if self._next_lease() is None:
                        break
                    if local.most > 1:
                        self._begin_local(local.most)
                    else:
                        self._begin(Sizes(count, count))
                if local.most > 1:
                    self._batch, local.left = Sizes(count, count), local.left - 1
                self._look_at_lengths(batch, samples)
                self._begin_part(count, 0)
                with self._stopping_sooner():
                    yield batch
                self._check_stepped()
            if self._epochs is not None:
                self._epochs.over()
            if local.is_open() and not local.exchanged:  # the pass ends in its middle
                self._exchange_local(go_on=False)
            elif local.under_way is not None:
                self._finish_round()
            self._turns.ask_for_next()
            whole = True
        finally:
            self.in_loop = False
            if not whole or self.client.ended is not None:
                self._own = False
                self._leave_loop()

    def _check_part(self, call: str) -> None:
        """Raise `UserError` where this worker has no part in the run yet, or none any more."""
        self._check_here(call)
        if self._replica is None:
            raise UserError(f"{call} before attach()", "attach the model first")

    def _check_here(self, call: str) -> None:
        """Raise `UserError` where this worker has left."""
        if self._gone:
            raise UserError(f"{call} after leave()", "take part again: cluster = join()")

    def _seed(self) -> None:
        """Seed torch's generator, once, so that dropout differs between workers. It is done late,
        so that what a script draws before, a split of the data set say, is the same in every
        worker."""
        if not self._seeded:
            self._seeded = True
            torch.manual_seed(self.settings.seed + self.worker_id)

    def _begin(self, batch: Sizes, unread: tuple[int, ...] = (), parts: int = 1) -> None:
        """Note that the computation of a batch begins, which comes in this number of parts."""
        assert self._gradients is not None and self._replica is not None
        assert self._by_hand is not None
        self._replica.come_back()
        self._gradients.begin(parts=parts > 1)
        self._by_hand.begin()
        self._batch = batch
        self._contribution.begin(batch, unread)
        self._computing = trace.now()

    def _begin_local(self, steps: int) -> None:
        """A round of local steps begins."""
        assert self._local is not None
        self._local.begin(steps)
        self._computing = trace.now()

    def _settled(self) -> None:
        """The exchange of a round is over."""
        assert self._feedback is not None
        self.client.settled()
        self._feedback.settled(self._contribution.taken, self._contribution.share)
        self._contribution.taken, self._contribution.share = (), 1.0
        self._carried = False

    def _begin_part(self, weight: int, left: int) -> None:
        """A part of the batch is next, and `left` more follow."""
        self._part, self._parts_left, self._in_batch = weight, left, True
        self._stepped, self._told, self._phase = False, False, wire.FORWARD

    def _nothing_readable(self) -> None:
        """No sample of the lease can be read: tell so, and let the round pass."""
        self._phase = ""
        with self._losing():
            self.client.unreadable(self._contribution.round)
        self._wait_for_the_end_of_the_round()

    def _check_stepped(self) -> None:
        if not self._stepped:
            raise UserError(
                "optimizer.step() was not called for the last batch",
                "call it once for every batch, on the optimizer that attach() returned; to "
                "accumulate, split the batch: attach(accumulate=...)",
            )

    def _take_back_sockets(self) -> None:
        """Wait until what a backward that broke off has left to the thread that pushes is sent: a
        socket is used by one thread at a time."""
        if self._gradients is not None and threading.get_ident() == self.thread:
            with suppress(Exception):
                self._gradients.finish()

    def _leave_loop(self) -> None:
        self._take_back_sockets()
        self._ready = None
        if self.client.ended is not None:
            # The run is over for this worker: the server need not wait for it.
            self.client.goodbye(wire.Goodbye(wire.FINISHED, finished=True))
        elif self._lost is None:
            self.client.unready(unfinished=bool(self._phase))

    def _next_lease(self) -> Lease | None:
        """Wait, following the log, until there is a round with a lease for us; None where the run
        has ended in order. Raises `RunLost` (`_is_over`)."""
        assert self._local is not None
        client, part, local = self.client, self._contribution, self._local
        self._leased_at, self._held_up_s = time.perf_counter(), 0.0
        self._in_batch = False
        if local.ahead is not None and not self._stopping:
            return local.ahead
        limit = self._epoch_limit
        found: tuple[int, Lease] | None = None

        def look() -> bool:
            nonlocal found
            assert client.follow is not None
            if client.greetings != part.greetings:
                local.greeted(client.greetings)
                self._turns.lost()
                self._stopping = self._contributed = False
            if not self._stopping:
                self._turns.ask_for_next()
            found = client.follow.lease(self.worker_id, part.round)
            if client.ended is not None or (limit is not None and self.epoch > limit):
                return True
            return found is not None and not self._stopping

        with self._losing():
            client.look()  # the newest lease counts: rounds of older ones go on without us
            client.wait(look, "for the end" if self._stopping else "for samples")
        if self._is_over():
            return None
        if limit is not None and (found is None or found[1][0] > limit):
            assert self._epochs is not None
            self._epochs.over(None if found is None else found[1][0])
            return None
        assert found is not None
        self._lost = None
        part.round, lease = found
        opened = None if client.follow is None else client.follow.open
        local.most = 1 if opened is None else opened.local_steps  # None: the lease is a late one
        self._turns.begin(0 if opened is None else opened.began)
        self._leased_at, self._held_up_s = time.perf_counter(), 0.0
        return lease

    @property
    def _epoch_limit(self) -> int | None:
        """The epoch with which the pass ends, where that is not the run's end."""
        return None if self._epochs is None or self._stopping else self._epochs.limit

    # ------------------------------------------------------------------ the exchange

    def tell(self, loss: float | Tensor) -> None:
        """The mean loss over this batch, for progress and logs; optional, before `step`."""
        self._contribution.tell(self._part, loss, again=self._told)
        self._told = True

    def _values(self, bucket: Bucket) -> Tensor:
        """Memory for a bucket's numbers."""
        assert self._feedback is not None
        return self._feedback.values(bucket, partial(self.client.room, bucket.index))

    def _send_bucket(
        self, bucket: Bucket, values: Tensor, absent: tuple[int, ...], without: tuple[int, ...]
    ) -> None:
        """A bucket of this step's gradient is complete: encode and send it, take in averages."""
        assert self._replica is not None and self._feedback is not None
        assert self._gradients is not None
        assert self._by_hand is not None
        part, start = self._contribution, time.perf_counter()
        with trace.span("encode", bucket=bucket.index):
            room = partial(self.client.room, bucket.index)
            buffers, scale = self._feedback.encode(bucket, values, absent, room, part.weight)
        if not self._gradients.threaded:  # else backward goes on meanwhile
            self._encoded_s += time.perf_counter() - start
        part.sent += 1 + len(without)
        self._phase = wire.BACKWARD
        last = part.sent == len(self._replica.plan.buckets)
        push = wire.Push(
            round=part.round,
            bucket=bucket.index,
            samples=part.samples,
            absent=absent,
            scale=scale,
            unread=part.unread,
            without=without,
            loss=part.mean_loss() if last else None,
            compute_s=self._computed_s() if last else None,
            steps=part.steps,
            groups=self._by_hand.changed() if last else msgspec.UNSET,
            weight=part.weight if self._weighs else 0,
            spent=self._spent() if last else None,
            pair=self._turns.pair,
        )
        if self.settings.max_staleness:
            part.made_at = self._replica.step
            push = msgspec.structs.replace(push, made_at=part.made_at)
        with self._losing():
            self.client.push(push, buffers)
            self.client.poll()
            if not last and not self.settings.overlap:
                start = time.perf_counter()
                self.client.await_room()
                if not self._gradients.threaded:
                    held_up_s = time.perf_counter() - start
                    self._held_up_s += held_up_s
                    self.client.waited_s += held_up_s

    def _computed_s(self) -> float:
        """Seconds from the lease to the last gradient, without those in which others were waited
        for."""
        return time.perf_counter() - self._leased_at - self._held_up_s

    def _spent(self) -> wire.Spent | None:
        """Where the time since the last such push went; None with the first one."""
        assert self._replica is not None and self._gradients is not None
        now, waited_s = time.perf_counter(), self.client.waited_s
        before, waited_before = self._told_at, self._told_waited_s
        encoded_s = self._encoded_s + self._gradients.take_waited_s()
        self._told_at, self._told_waited_s, self._encoded_s = now, waited_s, 0.0
        if not before:
            return None
        waited_s -= waited_before
        busy_s = now - before - waited_s
        return wire.Spent(busy_s, encoded_s, waited_s, self._replica.learning_rate)

    def _on_close(self, close: wire.Close) -> None:
        """Note which of our buckets are part of this update."""
        if self.worker_id in close.contributors and self.worker_id not in close.partly:
            self._contributed = True
            self._stop_if_asked()
        assert self._local is not None and self._by_hand is not None
        assert self.client.follow is not None
        part, in_time = self._contribution, self._local.under_way or self._contribution.round
        late = self._carried  # by the close before
        self._carried = self.client.follow.is_awaited(self.worker_id, part.round)
        if self._carried:
            self.client.hurry()
        if self.worker_id not in close.contributors or not (late or close.round == in_time):
            return
        part.taken = close.partly.get(self.worker_id, close.buckets)
        if late:
            part.share = weight_of_late(close.step - 1 - part.made_at)
        elif self.worker_id not in close.partly:
            self._by_hand.say(close)

    def _step(self) -> None:
        """Send the rest of the gradient and follow the log until this round is over."""
        self._check_here("optimizer.step()")
        if self._gradients is None or self._feedback is None or self._stepped:
            raise UserError(
                "optimizer.step() without a batch of its own",
                "call it once for every batch that batches() gives",
            )
        if self._parts_left or self._part < self._batch.weight:
            self._gradients.add_part(self._part / self._batch.weight)
        if self._parts_left:
            self._stepped = True
            return
        assert self._replica is not None and self._by_hand is not None
        if self._replica.local:
            self._step_locally()
            return
        left = self._contribution.sent == len(self._replica.plan.buckets)
        self._gradients.flush()
        self._stepped = True
        missed = self._by_hand.missed(left=left)
        self._finish_round()
        self._replica.by_hand.set(missed)

    def _step_pair(self, pair: Pair) -> None:
        """Send the gradient of one of several pairs, in the round of its place among the steps with
        this lease, and follow the log until that is over. Where this worker missed a round of its
        lease, others go on without: then the step comes to nothing."""
        if self._gradients is None or not self._in_batch:
            raise UserError(
                "optimizer.step() without a batch of its own",
                "call it in the loop over batches()",
            )
        turns, part = self._turns, self._contribution
        start = time.perf_counter()
        with self._losing():
            self.client.wait(lambda: turns.may_step() is not None, f"for round {turns.next}")
        self._waiting_s += time.perf_counter() - start
        if turns.may_step():
            part.round, part.sent, turns.pair = turns.next, 0, pair.name
            self._by_hand = self._by_hands[pair.name]
            self._gradients.send_pair(pair.start, pair.stop)
            self._finish_round()
        turns.made()
        part.over()
        pair.forget_gradient()
        self._stepped, self._told = True, False
        self._leased_at, self._held_up_s = time.perf_counter(), 0.0
        self._is_over()

    def _step_locally(self) -> None:
        """Step with this worker's own gradient, and exchange after the last step of the round;
        after the others take in what has come."""
        assert self._gradients is not None and self._local is not None
        self._gradients.gather()
        with trace.span("local step"):
            self._local.step(self._batch)
        self._stepped, self._phase = True, ""
        if self._local.left == 0:
            self._exchange_local()
            return
        with self._losing():
            self.client.look()
        self._is_over()

    def _exchange_local(self, go_on: bool = True) -> None:
        """Send what this round's local steps came to. With `overlap` go on with the next lease at
        once; else follow the log until the round is over."""
        assert self._local is not None
        if self._local.under_way is not None and not self._await_own_round():
            return
        if not self._local.send(self._epoch_limit, go_on=go_on):
            self._finish_round()
            return
        self._phase = ""
        trace.done("compute", self._computing, round=self._contribution.round)

    @contextmanager
    def _stopping_sooner(self) -> Iterator[None]:
        """Where the loop is left in this block, between two local steps, take part in the round
        with those made, and follow it to its end. One that is left in the middle of a step has met
        an error, and takes no part."""
        try:
            yield
        except GeneratorExit:
            assert self._replica is not None and self._local is not None
            if self._replica.local and self._stepped and not self._parts_left:
                with suppress(UserError):  # the run may be lost: `end` tells
                    if not self._local.exchanged and self._local.is_open():
                        self._exchange_local(go_on=False)
                    elif self._local.under_way is not None:
                        self._finish_round()
                        self._replica.come_back()
            raise

    def _await_own_round(self) -> bool:
        """Wait until the exchange under way is over, and the round open whose steps were made
        meanwhile. False where they were made in vain."""
        assert self._local is not None
        local, start = self._local, time.perf_counter()

        def open_or_void() -> bool:
            return not local.is_open() or local.under_way is None

        with self._losing():
            self.client.wait(open_or_void, f"for the averages of round {local.under_way}")
        waited_s = time.perf_counter() - start
        self._waiting_s += waited_s
        self._held_up_s += waited_s
        return not self._is_over() and local.is_open()

    def _finish_round(self) -> None:
        """All of this worker's part has left: follow the log until the round is over."""
        assert self._local is not None
        part = self._contribution
        trace.done("compute", self._computing, round=part.round)
        self._phase = ""
        part.over()
        if self._load_ahead is not None:
            with trace.span("load"):
                self._load_ahead()
        waiting, start = trace.now(), time.perf_counter()
        self._wait_for_the_end_of_the_round()
        trace.done("wait", waiting, round=part.round)
        self._look_for_zeros()
        self._local.settle()
        self._waiting_s += time.perf_counter() - start
        self._is_over()

    def _look_for_zeros(self) -> None:
        """Warn where the first averages are all zero: nothing will be learned so."""
        assert self._replica is not None and self._local is not None
        if self._zeros >= ZERO_STEPS or not self._contribution.taken or self._local.most > 1:
            return
        if self._several is not None:  # there are no gradients any more
            return
        if any(p.grad is not None and bool(p.grad.any()) for _, p in self._replica.params):
            self._zeros = ZERO_STEPS
            return
        self._zeros += 1
        if self._zeros == ZERO_STEPS:
            self.client.log.warning(
                f"every gradient of the first {ZERO_STEPS} steps was 0, nothing is learned: is the "
                "loss a constant? CrossEntropyLoss over a single output is (BCEWithLogitsLoss is "
                "its loss)"
            )

    def _wait_for_the_end_of_the_round(self) -> None:
        client, part = self.client, self._contribution
        with self._losing():
            client.wait(
                lambda: (
                    client.greetings != part.greetings
                    or client.ended is not None
                    or (
                        client.follow is not None
                        and client.follow.is_settled(self.worker_id, part.round)
                    )
                ),
                f"for the averages of round {part.round}",
            )

    # ------------------------------------------------------------------ the end

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the others wait while this worker evaluates, between two steps: no round goes on
        without it, at most for half of `idle_timeout`. They do not wait for a worker that has not
        made a step yet, nor for an evaluation outside such a block."""
        self._check_part("evaluating()")
        self._take_back_sockets()
        self.client.evaluating(True)
        try:
            yield
        finally:
            self.client.evaluating(False)

    def stop(self, reason: str) -> None:
        """End the run in order, for all, with `reason` as its end: this worker's loop is over with
        this batch, those of the others with their next step, and the observer keeps the last one.
        A worker that has made no step yet stops it after its first one."""
        self._check_part("stop()")
        self._take_back_sockets()
        self._stop_reason = reason
        if self._contributed:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self._stop_reason is not None and not self._stopping:
            self._stopping = True
            self.client.stop(self._stop_reason)

    @property
    def end(self) -> wire.End | None:
        """How the run ended: its `reason`, the `step` it came to, and whether that is an `error`.

        None while it goes on, and where this worker has left it and it goes on without. Where the
        server is lost, or did not take this worker any more, `step` is the last one here.
        """
        end = self.client.ended or self._lost
        if end is None:
            return None
        if self._replica is not None and self._replica.step == end.step:
            end = msgspec.structs.replace(end, step=self._replica.steps)
        if not self.client.left_behind:
            return end
        behind = f"{end.reason}; this worker was left behind at step {self.step}"
        return msgspec.structs.replace(end, reason=behind, error=end.error or not end.stopped)

    def _is_over(self) -> bool:
        """Has the run ended in order? Raises `RunLost` where it ended by an error, or finished with
        a state that this worker does not hold: the code after the loop must not run then."""
        end = self.end if self.client.ended is not None else None
        if end is not None and end.error:
            raise RunLost(f"the run ended early, at step {end.step}: {end.reason}")
        if end is not None and self._replica is not None:
            self._replica.come_back()
            self._replica.buffers.reset_all()  # the last forward's round may have been void
        return end is not None

    @contextmanager
    def _losing(self) -> Iterator[None]:
        """A `UserError` in this block ends the run for this worker."""
        try:
            yield
        except UserError as e:
            if self._lost is None and self._replica is not None:
                nonce = self.client.welcome.nonce if self.client.welcome is not None else ""
                at = self._replica.step, self._replica.lineage
                self._lost = wire.End(nonce, *at, reason=e.problem, error=True)
            raise

    # ------------------------------------------------------------------ leaving

    def leave(self, reason: str = wire.FINISHED, error: BaseException | None = None) -> None:
        """Say goodbye and close the sockets; safe to call twice, and called at exit.

        `error` is what ends this worker, by default the exception that is being handled: in the
        middle of a batch the server learns that others may die of the same samples. A given `error`
        ends this worker's part by an error, unless it only asks the program to end (Ctrl-C).
        """
        atexit.unregister(self._at_exit)
        living.left(self)
        self._gone = True
        failed = self._failed(error or sys.exception())
        if self._gradients is not None:
            with suppress(Exception):  # after an error in the middle of a backward
                self._gradients.finish()
            self._gradients.close()
        wrong = failed != "" or isinstance(error, Exception)
        wrong = wrong or (isinstance(error, SystemExit) and bool(error.code))
        if reason == wire.FINISHED or self.client.ended is not None:
            living.finished(self)
        self.client.goodbye(
            wire.Goodbye(
                reason,
                failed=failed,
                lease=self._lease if failed else None,
                error=wrong,
                finished=reason == wire.FINISHED,
            )
        )
        self.client.close()
        if self._replica is not None:
            self._replica.give_back()
        for optimizer in self._optimizers:
            optimizer.release()

    def _failed(self, error: BaseException | None) -> str:
        """Where in its batch this worker was when the error came; empty where the batch is not the
        cause."""
        ours = isinstance(error, UserError) and self._phase != wire.LOAD
        if not isinstance(error, Exception) or isinstance(error, RunLost | Unusable) or ours:
            return ""
        return self._phase

    def _at_exit(self) -> None:
        """Leave at the program's end, with the error that the interpreter has just shown, if any.
        (At a prompt it has shown errors that did not end the program.)"""
        error: BaseException | None = None
        if not hasattr(sys, "ps1"):
            error = getattr(sys, "last_exc", getattr(sys, "last_value", None))
        self.leave("its program ended" if error is None else told(error), error)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.leave(wire.FINISHED if error is None else told(error), error)


def _unwrapped(optimizer: Any, scheduler: LRScheduler | None) -> Any:
    """The user's optimizer, where `attach` has returned this one in a training before."""
    if scheduler is not None and isinstance(scheduler.optimizer, ClusterOptimizer):
        scheduler.optimizer._opt_called = True  # type: ignore[attr-defined]
    return optimizer.wrapped if isinstance(optimizer, ClusterOptimizer) else optimizer


def _pair(name: str, told: Any) -> Pair:
    """One of several pairs, as `attach` was given it."""
    model, optimizer, options = (*told, {})[:3] if isinstance(told, tuple) else (None,) * 3
    fits = isinstance(model, nn.Module) and isinstance(optimizer, Optimizer)
    if not (fits and len(told) in (2, 3) and isinstance(options, Mapping)):
        raise UserError(
            f"attach({name}=...) is no model with its optimizer",
            f"attach({name}=(model, optimizer)), perhaps with a dict of scheduler, clip_norm, "
            "before_step and after_step as its third",
        )
    unknown = sorted(set(options) - PAIR_OPTIONS)
    if unknown:
        raise UserError(
            f"attach({name}=...) has no option {', '.join(map(str, unknown))}",
            f"there are {', '.join(sorted(PAIR_OPTIONS))}",
        )
    optimizer = _unwrapped(optimizer, options.get("scheduler"))
    return Pair(name, model, optimizer, **options)


def _kind(thing: object) -> str:
    """What this is, in words."""
    name = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    return f"the class {name}" if isinstance(thing, type) else f"a {name}"


def told(error: BaseException) -> str:
    """An error on one line. An exception of a user's program has its class, as in a traceback; ours
    are sentences."""
    if isinstance(error, KeyboardInterrupt):
        return str(error) or STOPPED_BY[signal.SIGINT]
    ours = isinstance(error, UserError | RunLost) or not isinstance(error, Exception)
    text = str(error) if ours and str(error) else f"{type(error).__name__}: {error}"
    return text.strip().splitlines()[0]


__all__ = ["Cluster", "ClusterOptimizer", "RunLost", "UserError", "join", "trials"]
