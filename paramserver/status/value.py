"""The status of a run: one value from which display, terminal, page and report are made.

The server makes it a few times a second (`paramserver.server.watching`), and sends it as JSON to
everybody who watches. It costs the same for any model: no weights, gradients or averages are in it.

Every field has a limit. What was said by others (hosts, devices, log lines) is made printable and
cut, by whoever makes a value and again by whoever reads one, so that it can go to a terminal; a web
page must escape it. Numbers that are not finite are not there: None. Ids of workers are from 1 on,
0 is the server, -1 the observer. Times are seconds; `at` and `made_at` are seconds since 1970 by
the server's clock, and `*_bytes_per_s` are bytes a second, averaged over a few seconds.

New fields get a default, so that an older value can still be read; unknown fields are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import msgspec

from paramserver.errors import PeerError
from paramserver.protocol.messages import NUMBER_MAX, Phase, clip
from paramserver.words import printable

SERVER, OBSERVER = 0, -1
"""The ids of machines that are no workers."""

ASK, ASK_S = b"status", 1.0
"""What a watcher sends, and about how often; see `paramserver.server.watching`."""

THIS_MACHINE = "this machine"
"""The kind of a link to a worker on the server's own machine."""

ROUNDS_KEPT = 60
"""The newest rounds of which a status has the times; fewer where there are many workers."""
TIMES_MAX = 960
"""Times of workers in rounds, in all: this keeps a status small with any number of workers."""

MACHINES_MAX = 1026  # workers, the server, the observer
LINKS_MAX = 2 * MACHINES_MAX
EVENTS_MAX, WARNINGS_MAX, LINES_MAX = 100, 10, 40
LINES_KEPT = 1000  # by the server, for its report
LOSSES_MAX, EVALUATIONS_MAX = 120, 60
METRICS_MAX, SETTINGS_MAX = 32, 100
NAME_CHARS, LINE_CHARS, SENTENCE_CHARS = 255, 400, 1000
STATUS_BYTES_MAX = 2**20
SECONDS_MAX = 1e9

Id = Annotated[int, msgspec.Meta(ge=OBSERVER, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0, le=NUMBER_MAX)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=SECONDS_MAX)]
Rate = Annotated[float, msgspec.Meta(ge=0.0, le=1e18)]
Name = Annotated[str, msgspec.Meta(max_length=NAME_CHARS)]
Line = Annotated[str, msgspec.Meta(max_length=LINE_CHARS)]
Sentence = Annotated[str, msgspec.Meta(max_length=SENTENCE_CHARS)]
Metrics = Annotated[dict[Name, float | None], msgspec.Meta(max_length=METRICS_MAX)]
Time = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """Base of these values."""

    def _clean(self, **limits: int) -> None:
        """For `__post_init__`: make these texts printable and not too long."""
        for field, most in limits.items():
            text = getattr(self, field)
            if len(text) > most or not text.isprintable():
                msgspec.structs.force_setattr(self, field, clip(printable(text), most))

    def _clean_keys(self, *fields: str) -> None:
        for field in fields:
            values = getattr(self, field)
            if any(len(key) > NAME_CHARS or not key.isprintable() for key in values):
                cleaned = {clip(printable(key), NAME_CHARS): v for key, v in values.items()}
                msgspec.structs.force_setattr(self, field, cleaned)


class Times(msgspec.Struct, frozen=True, array_like=True):
    """Where a worker's time went: seconds of one round, or of many rounds together. On the wire a
    list: [compute, encode, cable, wait, late]."""

    compute: Seconds = 0.0
    """Loading, forward, backward and the optimizer."""
    encode: Seconds = 0.0
    """Making a gradient ready to be sent, where backward stood still for it."""
    cable: Seconds = 0.0
    """Waiting for the exchange itself: this worker's bytes on their way, and the server's work."""
    wait: Seconds = 0.0
    """Waiting for other workers, whose part of the round had not come yet."""
    late: Seconds = 0.0
    """Of rounds that closed without this worker, wholly or in part."""

    @property
    def total(self) -> float:
        return self.compute + self.encode + self.cable + self.wait + self.late

    def __add__(self, other: Times) -> Times:
        return Times(
            self.compute + other.compute,
            self.encode + other.encode,
            self.cable + other.cable,
            self.wait + other.wait,
            self.late + other.late,
        )


PARTS = ("compute", "encode", "cable", "wait", "late")
"""The fields of `Times`, in the order in which they are drawn."""


class RoundTimes(msgspec.Struct, frozen=True, array_like=True):
    """Where each member's time went in one closed round. On the wire a list: [step, seconds, {id:
    [compute, encode, cable, wait, late]}]."""

    step: Count
    """Optimizer steps in the state that the round led to."""
    seconds: Seconds
    """From the round's opening to its close, by the server's clock."""
    workers: Annotated[dict[Id, Times], msgspec.Meta(max_length=MACHINES_MAX)]
    """By id. A member's times may be a little more or less than `seconds`: its own clock measures
    compute and encode, and its round begins when the message of the opening has come."""


class State(StrEnum):
    """What a machine is doing, for colours and pictures."""

    JOINING = "joining"
    """It has greeted, and holds no state of the run yet."""
    SNAPSHOT = "snapshot"
    """It takes, or gives, a snapshot."""
    IDLE = "idle"
    """It holds the state and has no samples: it waits for a round, or for samples."""
    TRAINING = "training"
    """A worker that takes part in the open round; the server while a round is open."""
    LATE = "late"
    """The round, or the last one, goes on without it."""
    SILENT = "silent"
    """Nothing came from it for some seconds."""
    GONE = "gone"
    """It left, or was silent for too long. It stays in the list for a while."""


class Machine(Value, frozen=True):
    """A worker, the observer or the server: the process, and the machine that it runs on."""

    id: Id
    """A worker's number; `SERVER`, `OBSERVER`."""
    host: Name = ""
    """The machine's own name."""
    kind: Sentence = ""
    """Device, processor and version of torch, in words; empty where that is not known."""
    device: Name = ""
    """cpu, cuda, mps; empty where that is not known."""
    state: State = State.IDLE
    trouble: Sentence = ""
    """Its trouble, if any, in words: "late 0.4 s", "silent for 3.2 s", "left: it has finished"."""
    last_seen_s: Seconds = 0.0
    """Since its last sign of life."""

    share: Count | None = None
    """Its samples of a round, where samples follow speed (`shares: speed`)."""
    samples_per_s: Rate | None = None
    samples: Count = 0
    """In the whole run."""
    rounds: Count = 0
    """That it contributed to, in the whole run."""
    late_rounds: Count = 0
    """That missed it, wholly or in part, in the whole run."""

    minute: Times = Times()
    """Where its time went in the rounds of the last minute, in all."""
    minute_rounds: Count = 0
    """Rounds of the last minute of which it was a member."""
    minute_late: Count = 0
    """Of those, the ones that closed without it, wholly or in part."""

    memory_bytes: Count | None = None
    """Memory of its process."""
    memory_free_bytes: Count | None = None
    """What the machine could still give."""
    memory_total_bytes: Count | None = None
    """Of the machine."""
    temperature_c: Annotated[float, msgspec.Meta(ge=-100.0, le=1000.0)] | None = None
    """The highest that the machine's sensors tell, in degrees Celsius."""

    sent_bytes: Count = 0
    """From it to the server, since this server started."""
    received_bytes: Count = 0
    """From the server to it."""
    sent_bytes_per_s: Rate = 0.0
    received_bytes_per_s: Rate = 0.0

    def __post_init__(self) -> None:
        self._clean(host=NAME_CHARS, device=NAME_CHARS, kind=SENTENCE_CHARS, trouble=SENTENCE_CHARS)

    @property
    def role(self) -> str:
        """worker, observer or server."""
        return {SERVER: "server", OBSERVER: "observer"}.get(self.id, "worker")

    @property
    def name(self) -> str:
        """Its name in sentences, as in the log: "worker 2 (mini2)"."""
        if self.role != "worker":
            return f"the {self.role}"
        return f"worker {self.id} ({self.host})" if self.host else f"worker {self.id}"


class Link(Value, frozen=True):
    """What connects a machine with the server."""

    machine: Id
    address: Name = ""
    """The machine's end, as the server sees it; empty within one host."""
    kind: Name = ""
    """"this machine", or the kind of the server's interface: "Thunderbolt", "Ethernet 1 Gbit/s",
    "Wi-Fi"; empty where that is not known."""
    measured_bytes_per_s: Rate | None = None
    """In this run, from the machine to the server while several pushes were under way; where there
    never are several, both ways together in the time for which the machine waited."""
    expected_bytes_per_s: Rate | None = None
    """The same as `make up` measured it before the run, on an idle link."""
    share: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 1.0
    """The part of the machine's traffic that takes this link."""

    def __post_init__(self) -> None:
        self._clean(address=NAME_CHARS, kind=NAME_CHARS)


class Samples(Value, frozen=True):
    """The ledger: what became of the samples of the whole run. `done`, `partly` and `skipped` are
    counted and never handed out again."""

    of_epoch: Count = 0
    """Samples of one pass over the training set; 0 where workers bring their own."""
    total: Count = 0
    """Of all epochs; 0 where workers bring their own."""
    done: Count = 0
    partly: Count = 0
    skipped: Count = 0
    leased: Count = 0
    """In the workers' hands now, computed or loaded."""
    returned: Count = 0
    """Handed back so far, because their round went without them; they are handed out again."""


class EventKind(StrEnum):
    JOINED = "joined"
    GONE = "gone"
    SNAPSHOT = "snapshot"
    CHECKPOINT = "checkpoint"
    RESTART = "restart"
    """The server was started again."""
    ENDED = "ended"


class Event(Value, frozen=True):
    """Something to mark in the curves."""

    kind: EventKind
    step: Count
    at: Time
    text: Line = ""
    machine: Id | None = None
    """Whose; None where it is the run's."""

    def __post_init__(self) -> None:
        self._clean(text=LINE_CHARS)


class LogLine(Value, frozen=True):
    """A line of the server's log."""

    at: Time
    text: Line
    warning: bool = False

    def __post_init__(self) -> None:
        self._clean(text=LINE_CHARS)


class Evaluation(Value, frozen=True):
    """An evaluation of the observer."""

    step: Count
    loss: float | None = None
    metrics: Metrics = {}
    """By name ("accuracy"); shares from 0 to 1."""

    def __post_init__(self) -> None:
        self._clean_keys("metrics")


class Cause(StrEnum):
    """What the last minute waited for most."""

    NOTHING = "nothing"
    """All machines compute nearly all the time."""
    UNKNOWN = "unknown"
    """There are too few rounds to tell."""
    NOT_TRAINING = "not training"
    """No round is open: the phase says for what the run waits."""
    LATE = "late"
    SLOW = "slow"
    """A worker computes longer than the others, who wait for it."""
    CABLE = "cable"
    ENCODE = "encode"


class Diagnosis(Value, frozen=True):
    """What the last minute waited for, and what would change it; see `diagnosis`."""

    cause: Cause = Cause.UNKNOWN
    sentence: Sentence = ""
    machine: Id | None = None
    """The machine that is named."""

    def __post_init__(self) -> None:
        self._clean(sentence=SENTENCE_CHARS)


class Status(Value, frozen=True):
    """See the module's docstring. None and empty texts stand for what is not known yet."""

    run: Name
    """The id of the run."""
    made_at: Time
    """When this value was made."""
    folder: Name = ""
    """The name of the run's folder, without its path."""
    trial: Count = 1
    """The place of the run, from 1, among the `runs` that its server serves."""
    runs: Count = 1
    more: bool = False
    """It has ended, and its server goes on with the next one."""
    model: Name = ""
    """Type or class of the model, as the settings name it."""

    phase: Sentence = ""
    """What the run does or waits for: "training", "waiting for 2 workers: worker 1 ready"."""
    doing: Phase = Phase.STARTING
    """The same for programs."""
    end: Sentence = ""
    """Why the run has ended; empty while it goes on."""
    error: bool = False
    """It ended, or ends, by an error."""
    trains: bool = False
    """A round is open: the remaining time can be estimated, and `phase` says nothing new."""
    late: Sentence = ""
    """Why the newest round that closed without a member did so."""
    averaging: Sentence = ""
    """Who averages how much of the gradients; empty where the server averages all."""

    seconds: Seconds = 0.0
    """Of the whole run: since its first round was opened, without the time without a server."""
    step: Count = 0
    """Optimizer steps made."""
    total_steps: Count | None = None
    """An estimate: it moves when workers come and go."""
    epoch: Count | None = None
    """1 is the first."""
    num_epochs: Count | None = None
    local_steps: Count = 1
    """Optimizer steps between two exchanges."""
    steps_per_s: Rate | None = None
    samples_per_s: Rate | None = None
    eta_s: Seconds | None = None
    """Until the last step."""

    loss: float | None = None
    """Of the newest steps, a mean weighted by samples."""
    learning_rate: float | None = None
    losses: Annotated[tuple[tuple[Count, float], ...], msgspec.Meta(max_length=LOSSES_MAX)] = ()
    """(step, loss) over the whole run, thinned: means of equally many steps each."""
    evaluations: Annotated[tuple[Evaluation, ...], msgspec.Meta(max_length=EVALUATIONS_MAX)] = ()
    """Over the whole run, thinned; the newest is the last."""

    sent_bytes: Count = 0
    """From the server to all, in the whole run."""
    received_bytes: Count = 0
    sent_bytes_per_s: Rate = 0.0
    received_bytes_per_s: Rate = 0.0

    machines: Annotated[tuple[Machine, ...], msgspec.Meta(max_length=MACHINES_MAX)] = ()
    """The server, the observer where there is one, and the workers, by id; those that are gone stay
    for some minutes."""
    links: Annotated[tuple[Link, ...], msgspec.Meta(max_length=LINKS_MAX)] = ()
    rounds: Annotated[tuple[RoundTimes, ...], msgspec.Meta(max_length=ROUNDS_KEPT)] = ()
    """The newest rounds, the newest last."""
    samples: Samples = Samples()
    events: Annotated[tuple[Event, ...], msgspec.Meta(max_length=EVENTS_MAX)] = ()
    """The newest, in their order."""
    warnings: Annotated[tuple[LogLine, ...], msgspec.Meta(max_length=WARNINGS_MAX)] = ()
    """The newest warnings, the newest last."""
    lines: Annotated[tuple[LogLine, ...], msgspec.Meta(max_length=LINES_MAX)] = ()
    """The newest lines of the log, warnings among them."""
    settings: Annotated[dict[Name, Line], msgspec.Meta(max_length=SETTINGS_MAX)] = {}
    """Settings that are not the default, by name, as they are written; secrets are not there."""
    diagnosis: Diagnosis = Diagnosis()

    def __post_init__(self) -> None:
        self._clean(
            run=NAME_CHARS,
            folder=NAME_CHARS,
            model=NAME_CHARS,
            phase=SENTENCE_CHARS,
            end=SENTENCE_CHARS,
            late=SENTENCE_CHARS,
            averaging=SENTENCE_CHARS,
        )
        self._clean_keys("settings")
        if not all(v.isprintable() and len(v) <= LINE_CHARS for v in self.settings.values()):
            cleaned = {k: clip(printable(v), LINE_CHARS) for k, v in self.settings.items()}
            msgspec.structs.force_setattr(self, "settings", cleaned)

    def machine(self, id: int) -> Machine | None:
        """The machine with this id."""
        return next((m for m in self.machines if m.id == id), None)

    @property
    def workers(self) -> tuple[Machine, ...]:
        """The workers, without those that are gone."""
        return tuple(m for m in self.machines if m.id > 0 and m.state != State.GONE)

    @property
    def place(self) -> str:
        """Of the run among others: "run 2 of 5"; empty where its server serves no others."""
        return f"run {self.trial} of {self.runs}" if self.runs > 1 else ""

    @property
    def shares_of(self) -> str:
        """What the machines' shares are of: a step, or a round of several."""
        return "step" if self.local_steps == 1 else "round"

    @property
    def val_step(self) -> int | None:
        """The step of the newest evaluation."""
        return self.evaluations[-1].step if self.evaluations else None

    @property
    def metrics(self) -> Mapping[str, float | None]:
        """Metrics of the newest evaluation, by name."""
        return self.evaluations[-1].metrics if self.evaluations else {}


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Status)


def to_json(status: Status) -> bytes:
    """The value as JSON, with every field; numbers that are not finite become null."""
    return _encoder.encode(status)


def from_json(text: Any) -> Status:
    """The value of such a text (bytes-like). Raises `PeerError` where it is none, or larger than
    any status is."""
    if len(text) > STATUS_BYTES_MAX:
        raise PeerError(f"a status of {len(text)} bytes (at most {STATUS_BYTES_MAX})")
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as e:
        raise PeerError(f"not a status: {clip(printable(str(e)), 400)}") from None


def finite(value: float | None, most: float = 1e18) -> float | None:
    """A number from 0 to `most`, or None: what a peer tells may be any number."""
    if value is None or not math.isfinite(value):
        return None
    return min(max(value, 0.0), most)
