"""What is measured, as functions that run in processes of their own: this project, and its peers.

All return plain values. Times are seconds of whole rounds, from the end of one to the end of the
next, in the process of the first worker or rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch._dynamo  # the first optimizer imports it, which takes seconds: here, once for all
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from paramserver import keys
from paramserver.__main__ import main as server_main
from paramserver.net import address, link_watch
from paramserver.output import picture
from paramserver.protocol import messages as wire
from paramserver.rounds.local_steps import outer_of
from paramserver.server import program
from paramserver.settings import Settings
from paramserver.tensors.codec import CODECS, codec_of_averages, codec_of_pushes
from paramserver.tensors.error_feedback import ErrorFeedback
from paramserver.tensors.reducer import Reducer
from paramserver.transport import malloc, sockets
from workers.builtin import builders, data, models
from workers.cluster import join
from workers.link.client import Client
from workers.replica.replica import Replica

LOOPBACK = "127.0.0.1"
PATIENCE_S = 60.0
SEED = 42


class Layers(nn.Module):
    """Layers whose gradients cost what they are told to: nothing, or a wait.

    `shapes` are the elements of each layer, first layer first. Backward takes `seconds` in all,
    slept in equal parts before each layer's gradient; that is the layer's own weights, so that it
    costs neither time nor memory. Without a wait all layers are one function: what autograd needs
    for each is not the exchange's.
    """

    def __init__(self, shapes: Sequence[int], seconds: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.layers = nn.ParameterList(torch.empty(n).normal_(std=0.01) for n in shapes)
        self._seconds = seconds / len(shapes)
        layers = list(self.layers)
        self._functions = [[layer] for layer in layers] if seconds else [layers]

    def forward(self) -> Tensor:
        x = torch.zeros(())
        for layers in self._functions:
            x = _Layers.apply(x, self._seconds, *layers)
        return x


class Watched(Layers):
    """`Layers` as an observer's model: it tells nothing of images."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 10)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, *weights: Tensor) -> Tensor:
        ctx.gradients, ctx.seconds = [w.detach() for w in weights], seconds
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if ctx.seconds:
            time.sleep(ctx.seconds)
        return gradients[0], None, *(g.detach() for g in ctx.gradients)


class Idle(Optimizer):
    """An optimizer that leaves everything as it is: it is not the exchange's."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        pass


class Laps:
    """Times of rounds: `lap` ends one and says whether there are more; the first are warm-up."""

    def __init__(self, rounds: int, warm_up: int) -> None:
        self._left = rounds + warm_up
        self._rounds = rounds
        self._seconds: list[float] = []
        self._at = time.perf_counter()
        self._processor_s: list[float] = [time.process_time()]
        self.busy = 0.0
        """Share of the machine's cores that was busy in the rounds that count, whoever used it."""

    def lap(self) -> bool:
        now = time.perf_counter()
        self._processor_s.append(time.process_time())
        self._seconds.append(now - self._at)
        self._at, self._left = now, self._left - 1
        if self._left in (self._rounds, 0):  # after the warm-up, and at the end
            self.busy = psutil.cpu_percent() / 100  # since it was called before
        return self._left > 0

    @property
    def seconds(self) -> list[float]:
        return self._seconds[-self._rounds :]

    @property
    def processor_s(self) -> float:
        """Of this process, in a round, on average."""
        return (self._processor_s[-1] - self._processor_s[-1 - self._rounds]) / self._rounds


def backward_alone(model: Layers, rounds: int = 5) -> float:
    """Median seconds of a backward whose gradients nobody takes."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model().backward()
        seconds.append(time.perf_counter() - start)
        model.zero_grad()
    return sorted(seconds)[rounds // 2]


# ------------------------------------------------------------------ this project


def server(
    *settings: str, keys_in: str = "", guarded: bool = False, paths: str = ""
) -> dict[str, float]:
    """The server program; only the picture it draws at the end of a run is left out. Returns its
    processor time, all of it.

    `keys_in`: the folder of its keys. `guarded`: loopback needs them as other addresses do.
    `paths`: what `make up` tells it of the workers' cables (`link_watch.write`).
    """
    if paths:
        os.environ[link_watch.VARIABLE] = paths
    picture.draw = lambda *_, **__: None
    os.environ["XDG_CONFIG_HOME"] = keys_in
    if guarded:
        program.listen = lambda *_: ([], [LOOPBACK])
    try:
        server_main([*settings, "plain=true"])
    except SystemExit as end:
        if end.code:
            raise
    return {"processor_s": time.process_time()}


def worker(
    host: str,
    port: int,
    number: int,
    shapes: Sequence[int],
    rounds: int,
    warm_up: int,
    *,
    seconds: float = 0.0,
    tcp: bool = False,
    keys_in: str = "",
    guarded: bool = False,
    security: str = "none",
    shards: int = 1,
) -> dict[str, Any]:
    """Train `Layers` for that many rounds, by the door that every training loop uses. Where
    backward takes no time there is none: the gradients are there, as they are for `all_reduce`.

    Rounds count as soon as `shards` processes average.

    `tcp`: as from another host, with neither ipc nor shared memory. `keys_in`, `guarded`: as the
    server's.
    """
    torch.set_num_threads(1)
    malloc.keep_freed()  # as the worker program does
    os.environ["XDG_CONFIG_HOME"] = keys_in
    token = keys.load_or_make()[0].token(host, port) if security == "curve" else None
    if tcp:
        sockets.ipc_usable = lambda folder: False
    if guarded:
        address.is_local = lambda host: False
    model = Layers(shapes, seconds)
    alone = backward_alone(model) if seconds else 0.0
    drawn = torch.Generator().manual_seed(SEED + number)
    gradients = [] if seconds else [torch.randn(n, generator=drawn) for n in shapes]
    with join(
        host, number, port=port, token=token, security=security, timeout_s=PATIENCE_S
    ) as cluster:
        model, optimizer = cluster.attach(model, Idle(model.parameters()))
        laps, counts = Laps(rounds, warm_up), False
        for _ in cluster.batches(_Counts(cluster.settings.num_workers * 1000)):
            # Before the step the open round is the same for all: who began to count earlier than
            # others would leave earlier, and take its shard with it.
            counts = counts or cluster.client.shards >= shards
            optimizer.zero_grad()
            if seconds:
                model().backward()
            else:
                for layer, gradient in zip(model.layers, gradients, strict=True):
                    layer.grad = gradient
            optimizer.step()
            if counts and not laps.lap():
                break
    return {
        "seconds": laps.seconds,
        "alone": alone,
        "processor_s": laps.processor_s,
        "busy": laps.busy,
    }


def waiting_worker(
    port: int,
    number: int,
    shapes: Sequence[int],
    samples: int,
    sample_s: float,
    slower_after: int = 0,
    slower: float = 1.0,
    stutters_every: int = 0,
) -> None:
    """A worker whose computing is a wait for each of its samples, of a run over so many; `slower`
    times as long a wait once the run has made `slower_after` steps, or in every so many of its
    batches."""
    torch.set_num_threads(1)
    malloc.keep_freed()
    model = Layers(shapes)
    gradients = [torch.randn(n) for n in shapes]
    with join(LOOPBACK, number, port=port, timeout_s=PATIENCE_S) as cluster:
        model, optimizer = cluster.attach(model, Idle(model.parameters()))
        for number, count in enumerate(cluster.batches(_Counts(samples)), 1):
            is_slow = bool(slower_after) and cluster.step >= slower_after
            is_slow |= bool(stutters_every) and number % stutters_every == 0
            time.sleep(count * sample_s * (slower if is_slow else 1.0))
            optimizer.zero_grad()
            for layer, gradient in zip(model.layers, gradients, strict=True):
                layer.grad = gradient
            optimizer.step()


class _Counts:
    """A data set without data, so that loading it is not measured: a batch is the number of its
    samples."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: Tensor, device: object) -> int:
        return len(indices)


def simulated_workers(
    port: int, numbers: Sequence[int], shapes: Sequence[int], rounds: int, warm_up: int
) -> dict[str, Any]:
    """Several workers in one process, that push the same gradient and look at no average.

    What they cost is their sockets; so rounds tell what the server can bear.
    """
    torch.set_num_threads(1)
    malloc.keep_freed()
    model = Layers(shapes)
    clients = [Client(LOOPBACK, port, id=n) for n in numbers]
    try:
        for client in clients:
            client.connect(PATIENCE_S)
        with ThreadPoolExecutor(len(clients)) as pool:  # who joins takes a snapshot from another
            for entered in [pool.submit(_enter, client, model) for client in clients]:
                entered.result()
        buckets = _encoded(clients[0])
        laps, more = Laps(rounds, warm_up), True
        while more:
            for client in clients:
                number = _lease(client)
                for index, (buffers, scale) in enumerate(buckets):
                    push = wire.Push(round=number, bucket=index, samples=1, scale=scale)
                    client.push(push, buffers)
            for client in clients:
                _see_the_end(client, number)
            more = laps.lap()
        for client in clients:
            client.goodbye(wire.Goodbye(wire.FINISHED, finished=True))
    finally:
        for client in clients:
            client.close()
    return {"seconds": laps.seconds}


class _Shadow(Replica):
    """A simulated worker's replica: it follows the steps and leaves its weights as they are."""

    def take(self, average: wire.Average, buffers: Sequence[Any]) -> None:
        pass

    def apply(self, close: wire.Close) -> None:
        self.step, self.lineage, self.ledger = close.step, close.lineage, close.ledger


def _enter(client: Client, model: Layers) -> None:
    assert client.welcome is not None
    settings = client.settings
    optimizer = Idle(model.parameters())
    replica = _Shadow(
        model,
        optimizer,
        bucket_mb=settings.bucket_size_mb,
        min_bucket_mb=settings.min_bucket_mb,
        codec=settings.codec,
    )
    client.join(replica)
    client.ready(wire.Ready(samples=settings.num_workers * 1000, batch_size=1))
    _lease(client)


def _lease(client: Client) -> int:
    """Wait for a round to take part in; its number."""
    follow, welcome = client.follow, client.welcome
    assert follow is not None and welcome is not None
    client.wait(lambda: follow.lease(welcome.id, 0), "for a round", PATIENCE_S)
    found = follow.lease(welcome.id, 0)
    if found is None:
        raise TimeoutError(f"worker {welcome.id} got no round to take part in")
    return found[0]


def _see_the_end(client: Client, number: int) -> None:
    follow = client.follow
    assert follow is not None
    if not client.wait(lambda: follow.is_over(number), "for its end", PATIENCE_S):
        raise TimeoutError(f"round {number} does not end")


def _encoded(client: Client) -> list[tuple[list[Any], float]]:
    """Any gradient, bucket by bucket, as it goes onto the wire."""
    assert client.replica is not None and client.welcome is not None
    codec = CODECS[client.settings.codec]
    return [codec.encode(torch.randn(bucket.size)) for bucket in client.replica.plan.buckets]


# ------------------------------------------------------------------ accuracy


JUDGED = (0.2, 10)
"""In the last fifth of a training, ten times at most."""


def accuracy(dataset: dict[str, Any], codec: str, seed: int, epochs: int, workers: int) -> float:
    """Percent of right answers that SimpleNN gives on the validation set after `epochs`: the mean
    over the steps that `JUDGED` tells, since from one step to the next it goes up and down by more
    than a codec costs.

    What `workers` and a server do, one after another in this process: each has error feedback of
    its own, the averages go through the codec too.
    """
    torch.set_num_threads(1)
    settings = Settings(dataset=dataset, seed=seed, codec=codec)
    samples = data.load(dataset, seed)
    model = models.build(settings.model, seed)
    optimizer = builders.build_optimizer(model, settings)
    replica = Replica(model, optimizer, bucket_mb=settings.bucket_size_mb, codec=codec)
    buckets, params = replica.plan.buckets, [p for _, p in replica.params]
    up = codec_of_pushes(codec, settings.topk_ratio)
    senders = [ErrorFeedback(replica.plan, up) for _ in range(workers)]
    reducer = Reducer(replica.plan, up, codec_of_averages(codec, settings.topk_ratio))
    indices, size = tuple(b.index for b in buckets), settings.batch_size
    criterion, step = nn.CrossEntropyLoss(), 0
    cpu = torch.device("cpu")
    judged_by = builders.build_criterion(settings, model, samples.val, cpu)
    share, times = JUDGED
    steps = epochs * (len(samples.train) // (workers * size))
    judged_at = {steps - round(k * share * steps / times) for k in range(times)}
    right = []
    for epoch in range(epochs):
        order = data.order(len(samples.train), seed, epoch)
        for batches in order.split(workers * size):
            if len(batches) < workers * size:
                continue
            for sender, batch in zip(senders, batches.split(size), strict=True):
                images, labels = samples.train.batch(batch)
                gradients = torch.autograd.grad(criterion(model(images), labels), params)
                flat = torch.cat([g.reshape(-1) for g in gradients])
                for b in buckets:
                    buffers, scale = sender.encode(b, flat[b.start : b.stop].clone())
                    reducer.add(b.index, buffers, scale, size, _nothing)
                sender.settled(indices)
            step += 1
            for b in buckets:
                buffers, scale, _ = reducer.finish(b.index, workers * size, ())
                average = wire.Average(
                    nonce="", round=step, step=step, bucket=b.index, absent=(), scale=scale
                )
                replica.take(average, buffers)
            reducer.close(indices)
            replica.apply(
                wire.Close(
                    nonce="", round=step, step=step, lineage="", buckets=indices,
                    contributors={}, late={}, loss=None, seconds=0.0, ledger={},
                )
            )  # fmt: skip
            if step in judged_at:
                _, found = builders.evaluate(model, samples.val, cpu, judged_by)
                assert found is not None
                right.append(found)
                model.train()
    return 100 * sum(right) / len(right)


def local_accuracy(
    dataset: dict[str, Any], steps: int, seed: int, epochs: int, workers: int
) -> float:
    """`accuracy` of local steps, with the outer step that these and the workers' number give: each
    worker is a replica with an optimizer of its own."""
    torch.set_num_threads(1)
    settings = Settings(dataset=dataset, seed=seed, local_steps=steps, num_workers=workers)
    samples, size = data.load(dataset, seed), settings.batch_size
    codec, criterion, cpu = CODECS["float32"], nn.CrossEntropyLoss(), torch.device("cpu")
    replicas = [_replica(settings) for _ in range(workers)]
    judged_by = builders.build_criterion(settings, replicas[0].model, samples.val, cpu)
    reducer = Reducer(replicas[0].plan, codec, codec)
    buckets = replicas[0].plan.buckets
    share, times = JUDGED
    round_size = workers * size * steps
    rounds = epochs * len(samples.train) // round_size
    judged_at = {max(1, rounds - round(k * share * rounds / times)) for k in range(times)}
    orders = torch.cat([data.order(len(samples.train), seed, epoch) for epoch in range(epochs)])
    right = []
    for number, taken in enumerate(orders[: rounds * round_size].split(round_size), 1):
        for replica, lease in zip(replicas, taken.split(steps * size), strict=True):
            outer = replica.begin_local()
            for batch in lease.split(size):
                images, labels = samples.train.batch(batch)
                replica.optimizer.zero_grad()
                criterion(replica.model(images), labels).backward()
                replica.step_locally()
            flat = torch.cat([p.detach().reshape(-1) for _, p in replica.params])
            for b in buckets:
                values = flat[b.start : b.stop].clone()
                outer.pushed(b, values)
                buffers, scale = codec.encode(values)
                reducer.add(b.index, buffers, scale, steps * size, _nothing)
        averages = [reducer.finish(b.index, round_size, ()) for b in buckets]
        for replica in replicas:
            for b, (buffers, scale, _) in zip(buckets, averages, strict=True):
                average = wire.Average(
                    nonce="", round=number, step=number, bucket=b.index, absent=(), scale=scale
                )
                replica.take(average, buffers)
            replica.apply(
                wire.Close(
                    nonce="", round=number, step=number, lineage="", contributors={}, late={},
                    buckets=tuple(b.index for b in buckets), loss=None, seconds=0.0, ledger={},
                    local_steps=steps,
                )
            )  # fmt: skip
        reducer.close(tuple(b.index for b in buckets))
        if number in judged_at:
            model = replicas[0].model
            _, found = builders.evaluate(model, samples.val, cpu, judged_by)
            assert found is not None
            right.append(found)
            model.train()
    return 100 * sum(right) / len(right)


def _replica(settings: Settings) -> Replica:
    model = models.build(settings.model, settings.seed)
    optimizer = builders.build_optimizer(model, settings)
    bucket_mb, rule = settings.bucket_size_mb, outer_of(settings)
    return Replica(model, optimizer, bucket_mb=bucket_mb, codec="float32", outer=rule)


def _nothing() -> None:
    pass


# ------------------------------------------------------------------ torch.distributed with gloo


def _join_gloo(rank: int, ranks: int, address: str, port: int) -> None:
    torch.set_num_threads(1)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = loopback if address == LOOPBACK else "eth0"
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=PATIENCE_S),
    )
    dist.barrier()


def all_reduce(
    rank: int,
    ranks: int,
    address: str,
    port: int,
    elements: int,
    rounds: int,
    warm_up: int,
    *,
    half: bool = False,
) -> dict[str, Any]:
    """Averages of one flat tensor, gloo's best case; `half`: in float16, as DDP's hook does it."""
    _join_gloo(rank, ranks, address, port)
    torch.manual_seed(SEED)
    flat = torch.empty(elements).normal_()
    small = torch.empty(elements if half else 0, dtype=torch.float16)
    laps, more = Laps(rounds, warm_up), True
    while more:
        if half:
            small.copy_(flat).div_(ranks)
            dist.all_reduce(small)
            flat.copy_(small)
        else:
            dist.all_reduce(flat)
            flat.div_(ranks)
        more = laps.lap()
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": laps.seconds}


def ddp_layers(
    rank: int,
    ranks: int,
    address: str,
    port: int,
    shapes: Sequence[int],
    rounds: int,
    warm_up: int,
    *,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """`Layers` in DistributedDataParallel, as `worker` trains it."""
    _join_gloo(rank, ranks, address, port)
    model = Layers(shapes, seconds)
    alone = backward_alone(model)
    parallel = DistributedDataParallel(model)
    laps, more = Laps(rounds, warm_up), True
    while more:
        model.zero_grad()
        parallel().backward()
        more = laps.lap()
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": laps.seconds, "alone": alone}


def ddp_training(
    rank: int, ranks: int, address: str, port: int, steps: int, warm_up: int, way: str
) -> dict[str, Any]:
    """The training of `python -m workers` in DistributedDataParallel: same data, model, optimizer.

    `way`: float32, float16 (its hook), or "no exchange": every rank for itself.
    """
    _join_gloo(rank, ranks, address, port)
    settings = Settings(dataset={"name": "digits"})
    samples = data.load(settings.dataset, settings.seed).train
    model = models.build(settings.model, settings.seed)
    optimizer = builders.build_optimizer(model, settings)
    criterion = nn.CrossEntropyLoss()
    parallel: Any = model if way == "no exchange" else DistributedDataParallel(model)
    if way == "float16":
        parallel.register_comm_hook(None, fp16_compress_hook)
    size = settings.batch_size
    order, start = data.order(len(samples), settings.seed, 0), rank * size
    laps, more = Laps(steps, warm_up), True
    while more:
        if start + size > len(samples):
            order, start = data.order(len(samples), settings.seed, 0), rank * size
        images, labels = samples.batch(order[start : start + size])
        start += ranks * size
        optimizer.zero_grad()
        criterion(parallel(images), labels).backward()
        optimizer.step()
        more = laps.lap()
    dist.barrier()
    dist.destroy_process_group()
    return {"seconds": laps.seconds}
