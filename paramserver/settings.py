"""What there is to set: plain frozen objects, one place, one sentence each.

`paramserver.config.loading` fills them from the YAML files and the command line and is the only
file that sees OmegaConf. Everyone else gets a finished, checked `Settings`.

Each field carries `help` (what it does), `unit` (of a number), what its value may be (`ranges`) and
`scope`:

* ``run``    the same for everybody; the server's value is sent to all in the welcome;
* ``server`` read only by the server and its observer;
* ``local``  belongs to one process on one machine (addresses, devices, folders).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from paramserver.protocol.messages import WORKERS_MAX
from paramserver.ranges import (
    ADDRESS,
    DEVICE,
    FILLED,
    IMPORTABLE,
    SECONDS,
    SEED,
    Range,
    at_least,
    between,
    inside,
    more_than,
    one_of,
    share_of,
)

BUCKET_MB, LINKED_BUCKET_MB = 4.0, 2.0
"""By default, where all processes share a host, and where some are reached over links. On one host
each message costs more than its bytes; over a link the first average may come sooner."""
SHARDED_BUCKET_MB = 1.0
"""In float32, over links, where several shards may average: a shard with more buckets keeps both
directions of its cable busy for longer. Smaller codecs have smaller pieces anyway."""
BUCKET_SIZES = "bucket_mb", "min_bucket_mb"
PIECES = 12
"""Buckets into which a small gradient is cut, where these are not too small."""
SLOW_CABLE = 4
"""Where a cable is slow and shards may average, a bucket is so many times the least, 256 KiB on the
wire: nothing comes down before a whole bucket of each worker is there, and while the last averages
come down nothing goes up."""
LINKED_LEAST_MB = {"float32": 0.0625, "float16": 0.125, "bfloat16": 0.125, "int8": 0.25}
"""What `min_bucket_mb` is over links, by the codec that carries less of pushes' and averages': what
takes 64 KiB on the wire. Smaller ones made no exchange shorter over 1 Gbit/s."""

AGGREGATES = ("mean", "trimmed", "median", "clipped")
CODECS = ("float32", "float16", "bfloat16", "int8", "topk")
LEAVE_OUT = frozenset({"int8", "topk"})
"""The codecs that leave out of one average what goes into the next (`Codec.leaves_residual`)."""
MODELS = ("SimpleNN", "CNN", "ResNet18")
DATASETS = {"MNIST": 60_000, "FashionMNIST": 60_000, "digits": 4_000}
"""The built-in ones, and how many samples of each are trained with."""
WATCHED_BELOW, UNPRIVILEGED = 502, 1024  # ports
WANDB_MODES = ("online", "offline", "disabled")


def setting(default: Any, help: str, *ranges: Range, unit: str = "", scope: str = "run") -> Any:
    """A dataclass field with its documentation, and the ranges that a value other than null is in;
    a dict default is copied for each instance."""
    metadata = {"help": help, "ranges": ranges, "unit": unit, "scope": scope}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Wandb:
    """Where the observer logs to Weights & Biases."""

    mode: str | None = setting(
        None,
        "online | offline | disabled; null = online where there is a login, else offline",
        one_of(*WANDB_MODES),
        scope="server",
    )
    project: str = setting("paramserver", "project on W&B", FILLED, scope="server")
    name: str | None = setting(
        None, "name of the run; null = the run folder's name", scope="server"
    )
    entity: str | None = setting(None, "team or user; null = the login's default", scope="server")


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, after merging; see the module's head for `scope`."""

    # Where
    host_ip: str | None = setting(
        None,
        "server: addresses to listen at beside loopback, separated by commas; worker: the server's "
        "address; auto = the server listens in every network here (Thunderbolt, Ethernet, Wi-Fi), "
        "a worker finds the server by mDNS; null = loopback only, but as with auto for a server "
        "whose hosts names other machines",
        ADDRESS,
        scope="local",
    )
    hosts: list[Any] | None = setting(
        None, "the machines that make up starts a run on; see docs/cluster.md", scope="local"
    )
    port: int = setting(
        65432, "TCP port of the server; the next one is used too", between(1, 65534), scope="local"
    )
    watch_port: int | None = setting(
        None,
        "server: TCP port at which the run can be watched (make watch); null = 502 below port, 0 = "
        "nobody can watch",
        between(0, 65535),
        scope="local",
    )
    join: str | None = setting(
        None,
        "worker: the join token of a server on another machine, or a file that holds it; it holds "
        "address and port, too; also in the environment, as PARAMSERVER_JOIN",
        FILLED,
        scope="local",
    )
    security: str = setting(
        "curve",
        "curve | none; none = no keys and no encryption: whoever reaches the server may take part",
        one_of("curve", "none"),
        scope="local",
    )
    id: int | None = setting(
        None, "worker: its number, 1 or more", between(1, 65535), scope="local"
    )
    device: str = setting("auto", "auto | cpu | cuda | cuda:N | mps", DEVICE, scope="local")
    threads: int | None = setting(
        None,
        "torch's threads; null = a worker's share of the machine's cores, one in the server",
        at_least(1),
        scope="local",
    )
    allow: list[Any] | None = setting(
        None,
        "worker: packages, modules or module:Name, beside those in the folder where it is started, "
        "that the server's settings may name",
        IMPORTABLE,
        scope="local",
    )
    shared_memory: bool = setting(
        True,
        "gradients and averages go through /dev/shm between processes of one host; half of it is "
        "left to others, such as a DataLoader; false = through sockets, slower; the server's false "
        "is everybody's",
        scope="local",
    )
    run_dir: str = setting("runs", "parent folder of the run folders", FILLED, scope="local")
    plain: bool = setting(False, "show progress as plain lines, on a terminal too", scope="local")
    fetch: bool = setting(
        False,
        "make up: copy the results here when a run that was watched to its end is over, as make "
        "fetch does",
        scope="local",
    )

    # Who, and how long to wait
    num_workers: int = setting(2, "workers that the first round waits for", between(1, 65535))
    max_workers: int = setting(
        64,
        "worker ids run from 1 to this; more than num_workers may join at any time",
        between(1, WORKERS_MAX),
    )
    min_workers: int = setting(
        1, "the run pauses while fewer workers than this are here", at_least(1)
    )
    timeout: float | None = setting(
        None,
        "how long a round still waits for the rest once its quorum has pushed; "
        "null = from measured times",
        *SECONDS,
        unit="s",
    )
    quorum: float = setting(
        0.5, "share of a round's workers after whose gradients timeout starts to run", share_of(1)
    )
    max_staleness: int = setting(
        0,
        "carry late work over: a worker that is late goes on with its gradient, which enters a "
        "later round, as long as at most so many updates were made without it; 0 = what is late is "
        "computed again; see docs/modes.md",
        between(0, 100),
        unit="updates",
    )
    heartbeat_timeout: float = setting(
        10.0,
        "silence after which a machine counts as gone",
        more_than(0),
        between(0.01, 1e9),
        unit="s",
    )
    join_timeout: float = setting(
        60.0,
        "how long the server waits for num_workers before it starts with fewer, "
        "and a worker for its server",
        *SECONDS,
        unit="s",
        scope="local",
    )
    idle_timeout: float = setting(
        1800.0,
        "the run ends when nothing was pushed for this long; a worker waits this long for a server "
        "that died",
        *SECONDS,
        unit="s",
    )

    # The exchange
    codec: str = setting(
        "float32",
        "numbers on the wire: float32; half the bytes with float16 or bfloat16, a quarter with "
        "int8; only the largest numbers with topk",
        one_of(*CODECS),
    )
    codec_down: str | None = setting(
        None, "the same for the averages; null = as codec", one_of(*CODECS)
    )
    topk_ratio: float = setting(
        0.01, "share of the numbers that topk pushes; averages carry twice that", share_of(1)
    )
    aggregate: str = setting(
        "mean",
        "what is made of the workers' gradients: their mean, or what one broken machine cannot "
        "spoil: trimmed, median or clipped; see docs/robust.md",
        one_of(*AGGREGATES),
    )
    trim: float = setting(
        0.25,
        "where aggregate is trimmed: the share of the workers whose numbers are left out at each "
        "side, at least one and less than half",
        share_of(0.5),
    )
    clip_tau: float | None = setting(
        None,
        "where aggregate is clipped: how far a gradient may be from the average before, as a norm "
        "of each bucket; null = the workers' median distance",
        more_than(0),
    )
    scale_to_median: bool = setting(
        False,
        "where there are local steps: what each worker pushes is scaled to the workers' median "
        "norm before it is averaged",
    )
    bucket_mb: float | None = setting(
        None,
        f"size of a bucket, counted as float32; null = {BUCKET_MB:g} where the server listens on "
        f"loopback only, else {LINKED_BUCKET_MB:g}; where several `shards` may average "
        f"{SHARDED_BUCKET_MB:g} in float32, except at a Thunderbolt cable, or what takes 256 KiB "
        "on the wire if make up has measured a slow cable",
        share_of(256),
        between(0.0001, 256),
        unit="MiB",
    )
    min_bucket_mb: float | None = setting(
        None,
        f"a small gradient is cut into up to {PIECES} buckets of at least this size, so that "
        "averages come down while others go up; null = what takes 64 KiB on the wire, or as "
        "bucket_mb where that is given, or the server listens on loopback only or at a Thunderbolt "
        "cable",
        share_of(256),
        between(0.0001, 256),
        unit="MiB",
    )
    history_mb: float = setting(
        256.0,
        "newest updates that the server keeps for replicas that fell behind; at least one",
        at_least(0),
        between(0, 1e9),
        unit="MiB",
    )
    max_norm_ratio: float | None = setting(
        1000.0,
        "the server refuses a gradient whose norm is more than this many times the usual norm of "
        "its bucket; null = only one that is not finite",
        more_than(1),
    )
    max_bad_rounds: int = setting(
        10,
        "the run ends after this many rounds in a row with only refused gradients",
        at_least(1),
        unit="rounds",
    )
    digest_steps: int = setting(
        500,
        "between two comparisons of the replicas' weights; 0 = never",
        at_least(0),
        unit="steps",
    )
    deterministic: bool = setting(
        False,
        "add gradients in the order of worker ids: the same bits run after run; with averages in "
        "int8 or topk the server averages alone",
    )

    # The training
    seed: int = setting(42, "seed of the first weights, the split and the shuffling", SEED)
    batch_size: int = setting(32, "samples per worker and step", at_least(1))
    shares: str = setting(
        "equal",
        "speed | equal: whether the samples of a round, batch_size for each worker, are divided by "
        "the workers' speed, so that all are done at once",
        one_of("speed", "equal"),
    )
    shards: int | None = setting(
        None,
        "processes that average, at most; null = one for the cable of each host, from three hosts "
        "on and for models of 256 KiB or more, but not with deterministic=true and averages in "
        "int8 or topk; 1 = the server alone",
        between(1, 64),
    )
    local_steps: int | Literal["auto"] = setting(
        1,
        "optimizer steps that each worker makes by itself between two exchanges; 1 = every step's "
        "gradients are averaged; auto = the server chooses, from measured times",
        at_least(1),
        unit="steps",
    )
    local_warmup_steps: int = setting(
        0,
        "where there are local steps: so many steps first whose gradients are averaged",
        at_least(0),
        unit="steps",
    )
    overlap: bool = setting(
        False,
        "where there are local steps: workers go on with the next ones while those of a round are "
        "exchanged, so that no step waits for the cable",
    )
    outer: dict[str, Any] | None = setting(
        None,
        "what is done with the mean of the workers' local steps: {name: SGD, lr: 0.7, momentum: "
        "0.9, nesterov: true}; null = by local_steps and num_workers; see docs/modes.md",
    )
    batch_limit: int | None = setting(
        None,
        "worker: the most samples that it computes at once; a larger share comes in parts, whose "
        "gradients are added; null = batch_size on a GPU, no limit on a CPU",
        at_least(1),
        unit="samples",
        scope="local",
    )
    epoch_barrier: bool = setting(
        False,
        "no round holds samples of two epochs: the last one of an epoch holds only the rest of its "
        "samples, and the next epoch begins when all of them are done",
    )
    learning_rate: float = setting(0.001, "the optimizer's step size", more_than(0))
    num_epochs: int = setting(2, "passes over the training set", at_least(1))
    optimizer: dict[str, Any] = setting(
        {"name": "Adam"},
        "one of torch.optim by its name, or your own as package.module:Name; with arguments: "
        "optimizer.weight_decay=0.01, or {name: AdamW, weight_decay: 0.01}",
    )
    scheduler: dict[str, Any] | None = setting(
        None, "one of torch.optim.lr_scheduler: {name: StepLR, step_size: 3}; null = none"
    )
    schedule_by: str = setting(
        "step", "step | epoch: when the schedule is stepped", one_of("step", "epoch")
    )
    clip_norm: float | None = setting(
        None, "the averaged gradient's total norm is clipped to this; null = never", more_than(0)
    )
    loss: dict[str, Any] = setting(
        {"name": "CrossEntropyLoss"},
        "one of torch.nn, or your own as package.module:name, with arguments",
    )
    samples: dict[str, Any] | None = setting(
        None,
        "what the loss is the mean of, where that is not the samples of a batch: a function of a "
        "batch that gives their number (tokens, say), as package.module:name, with arguments; null "
        "= the samples",
    )
    ema: float | None = setting(
        None,
        "keep an average of the weights, too (EMA): after each update this share of the average "
        "stays, 0.999 for instance, and the rest are the new weights; null = none",
        inside(0, 1),
    )
    metric: dict[str, Any] | None = setting(
        None,
        "what the observer reports beside the loss: accuracy, a loss of torch.nn, or your own; "
        "null = accuracy where targets are classes, else nothing",
    )
    model: dict[str, Any] = setting(
        {
            "type": "SimpleNN",
            "input_dim": 784,
            "hidden": 128,
            "out": 10,
            "activation": "relu",
        },
        "type and its arguments",
    )
    dataset: dict[str, Any] = setting(
        {"name": "MNIST", "root": "data"},
        "name and, for a data set of your own, its arguments",
    )

    # What is kept and shown
    eval_steps: int = setting(
        200, "between two evaluations; 0 = only at the end", at_least(0), unit="steps"
    )
    early_stop: dict[str, Any] | None = setting(
        None,
        "end the run when evaluations get no better: {metric: accuracy, patience: 3, mode: max, "
        "min_delta: 0}, where the metric is loss, that of the run or, with ema, ema_loss and the "
        "like; null = never",
        scope="server",
    )
    track_gradients: bool = setting(True, "log the norm of each parameter's averaged gradient")
    checkpoint_steps: int = setting(
        500,
        "between two checkpoints; 0 = only at the end",
        at_least(0),
        unit="steps",
        scope="server",
    )
    keep_checkpoints: int = setting(
        3, "newest checkpoints that are kept", at_least(1), scope="server"
    )
    resume: str | None = setting(
        None, "latest, a run folder or a checkpoint to go on from", scope="server"
    )
    page: bool = setting(
        True,
        "show the run in a browser, at the address that the server prints; see docs/runs.md",
        scope="server",
    )
    page_port: int = setting(
        65480,
        "TCP port of the page; the next free one if it is taken",
        between(1, 65535),
        scope="server",
    )
    page_ip: str | None = setting(
        None,
        "addresses of this machine, separated by commas, that show the page beside loopback, to "
        "holders of the watch token; null = loopback only",
        ADDRESS,
        scope="server",
    )
    runs: int = setting(
        1,
        "runs that the server serves, one after another, each in a folder of its own: a search "
        "over settings in one script, say; see docs/your-own-model.md",
        between(1, 10_000),
        scope="server",
    )
    observer: bool = setting(
        True,
        "start the observer beside the server; without it nobody evaluates, saves or logs",
        scope="server",
    )
    wandb: Wandb = field(
        default_factory=Wandb,
        metadata={"help": "Weights & Biases", "ranges": (), "unit": "", "scope": "server"},
    )
    tensorboard: bool = setting(
        False, "write files for TensorBoard into the run folder, too", scope="server"
    )

    @property
    def codec_of_averages(self) -> str:
        """What `codec_down` means."""
        return self.codec_down or self.codec

    @property
    def bucket_size_mb(self) -> float:
        """What `bucket_mb` means; where it is null, that of a server that listens on loopback only
        (`with_bucket` puts a value in its place for any other)."""
        return self.bucket_mb or BUCKET_MB

    @property
    def shards_wanted(self) -> int | None:
        """What `shards` means: robust averages look at a whole gradient of each worker, which one
        process has; see `averages_alone`, too."""
        return 1 if self._is_robust or self.averages_alone else self.shards

    @property
    def _is_robust(self) -> bool:
        return self.aggregate != "mean" or self.scale_to_median

    @property
    def leaves_out(self) -> str:
        """The codec of averages, where it leaves out of one what goes into the next."""
        return self.codec_of_averages if self.codec_of_averages in LEAVE_OUT else ""

    @property
    def averages_alone(self) -> str:
        """Why the server averages alone where several could; empty where it need not, or does so
        anyhow. When another process begins to average a bucket depends on the time."""
        if not (self.deterministic and self.leaves_out) or self._is_robust or self.shards == 1:
            return ""
        return (
            f"what {self.leaves_out} leaves out of an average goes into the next one, and into a "
            "later one where another machine takes a bucket over, at a step that differs from run "
            "to run (deterministic=true); codec_down=float16 lets several average"
        )

    @property
    def port_of_channels(self) -> int:
        """Where sealed payloads travel: behind the other ports, or before them where none is."""
        return self.port + 3 if self.port + 3 < 65536 else self.port - 2

    @property
    def port_of_watchers(self) -> int:
        """What `watch_port` means; 0: nobody can watch. It is far from `port`, because people start
        servers on one machine at ports that are two apart."""
        if self.watch_port is None:
            below = self.port - WATCHED_BELOW
            return below if below >= UNPRIVILEGED else self.port + WATCHED_BELOW
        return self.watch_port

    def with_bucket(self, *, linked: bool, fast: bool = False, slow: bool = False) -> Settings:
        """These settings with the sizes of buckets that they mean where peers are `linked` by a
        network, one with a `fast` cable (Thunderbolt) perhaps, or with a cable that was measured as
        `slow` (`paramserver.net.link_watch`). With a `bucket_mb`, or on one host,
        `min_bucket_mb: null` means the same size."""
        if self.bucket_mb is not None:
            return self
        if not linked:
            return replace(self, bucket_mb=BUCKET_MB)
        sharded = self.shards_wanted != 1
        finer = sharded and self.codec == "float32" and not fast
        size = SHARDED_BUCKET_MB if finer else LINKED_BUCKET_MB
        codecs = self.codec, self.codec_of_averages
        least = max(LINKED_LEAST_MB.get(codec, size) for codec in codecs)
        if slow and sharded and not self.deterministic:  # nothing measured chooses then
            size = min(size, SLOW_CABLE * least)
        usual = size if fast else min(size, least)
        return replace(self, bucket_mb=size, min_bucket_mb=self.min_bucket_mb or usual)


@dataclass(frozen=True)
class RunSettings(Settings, Mapping[str, Any]):
    """The settings of a run that a worker takes part in, as its server told them.

    As a mapping (`settings["batch_size"]`, `dict(settings)`) it holds those that are the same for
    everybody. What is this process's own has its default here.
    """

    @classmethod
    def of(cls, settings: Settings) -> RunSettings:
        return cls(**vars(settings))

    def __getitem__(self, name: str) -> Any:
        if name not in _OF_RUN:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(_OF_RUN)

    def __len__(self) -> int:
        return len(_OF_RUN)


_OF_RUN = tuple(f.name for f in fields(Settings) if f.metadata["scope"] == "run")
_RANGES: dict[str, tuple[Range, ...]] = {f.name: f.metadata["ranges"] for f in fields(Settings)}


def outside(name: str, value: Any) -> str:
    """What a value that is not null must be ("must be 1 or more"), if it is out of the range of the
    setting of this name; else empty."""
    return next((each.must for each in _RANGES[name] if not each.holds(value)), "")
