"""What each setting may be: its type, its range, whose it is; and the headings of its group.

Pure: no file, no OmegaConf. `KEYS` is read off the dataclasses in `settings`, so a new setting is
one field there. Names are flat and dotted, as on the
command line: ``batch_size``, ``wandb.mode``, ``model.hidden``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from paramserver.errors import UserError
from paramserver.net import hosts
from paramserver.ranges import FILLED, FUNCTION, Range, is_import_path
from paramserver.rounds.aggregate import BY_COORDINATE, CLIPPED
from paramserver.settings import AGGREGATES, DATASETS, MODELS, Settings, Wandb
from paramserver.typed import typed
from paramserver.words import nearest, no_such, quoted, shown

Program = Literal["server", "worker", "launch"]
Where = Callable[[str], str]  # a setting's name -> where its value was written, or ""

NAMED = {"model": "type", "dataset": "name"}  # what is called by a name, and its arguments
SHORT = ("optimizer", "scheduler", "loss", "samples", "metric", "early_stop", "outer")
"""The same; the name may stand alone."""
NAMED |= dict.fromkeys(SHORT, "name") | {"early_stop": "metric"}
GROUPS = (*NAMED, "wandb")  # settings that hold settings


@dataclass(frozen=True)
class Key:
    """One setting, as `settings` declares it."""

    name: str
    kind: type  # int, float, bool, str, list, or dict for the free mappings
    optional: bool  # may be null
    default: Any
    help: str
    unit: str
    scope: str  # run | server | local
    ranges: tuple[Range, ...] = ()  # that every number, text, list or mapping is in
    words: tuple[str, ...] = ()  # that may stand in place of a number


def _keys(owner: type, prefix: str = "") -> Iterator[Key]:
    hints = get_type_hints(owner)
    for field in fields(owner):
        hint = hints[field.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _keys(hint, f"{field.name}.")
            continue
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        kind = get_origin(kinds[0]) or kinds[0]
        words = tuple(w for k in kinds if get_origin(k) is Literal for w in get_args(k))
        yield Key(
            prefix + field.name, kind, NoneType in kinds, default, **field.metadata, words=words
        )


# What the free mappings must hold; the rest of them belongs to the model and the data set.
_PARTS = (
    Key(
        "model.type",
        str,
        False,
        "SimpleNN",
        "SimpleNN | CNN | ResNet18, or your own as package.module:Name; the rest are its arguments",
        "",
        "run",
        (FILLED,),
    ),
    Key(
        "dataset.name",
        str,
        False,
        "MNIST",
        "MNIST | FashionMNIST | digits (5,000 real MNIST digits that come with the installation), "
        "or your own as package.module:Name; the rest are its arguments",
        "",
        "run",
        (FILLED,),
    ),
    Key(
        "dataset.root",
        str,
        False,
        "data",
        "folder of data files on this machine",
        "",
        "local",
        (FILLED,),
    ),
    *(
        Key(
            f"{name}.{NAMED[name]}",
            str,
            False,
            None,
            "its name",
            "",
            "server" if name == "early_stop" else "run",
            (FUNCTION if name == "samples" else FILLED,),
        )
        for name in SHORT
    ),
)

KEYS: dict[str, Key] = {key.name: key for key in (*_keys(Settings), *_PARTS)}


WORD_MAX = 200  # characters of a name within a group
WHOLE_MAX = 2**63  # beyond it are no samples, steps and sizes, only mistakes and lies

_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def scope(name: str) -> str:
    """Whose a setting is: ``run``, ``server`` or ``local``; a model's arguments are the run's."""
    return KEYS[name if name in KEYS else name.partition(".")[0]].scope


def spelled_out(name: str, value: Any) -> Any:
    """``optimizer: SGD`` as ``optimizer: {name: SGD}``, ``allow: a, b`` as a list; anything else as
    it is."""
    if name == "allow" and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return {NAMED[name]: value} if name in SHORT and isinstance(value, str) else value


def import_paths(settings: Settings) -> dict[str, str]:
    """What settings name by its import path: each name, and the setting that it is the value of."""
    found: dict[str, str] = {}

    def look(setting: str, part: str, group: Any) -> None:
        if not isinstance(group, Mapping):
            return
        name = group.get(part)
        if is_import_path(name):
            found.setdefault(str(name), f"{setting}.{part}")
        inner = group.get("schedulers")
        for each in inner if isinstance(inner, list) else ():  # one after another
            look(f"{setting}.schedulers", part, each)

    for group, part in NAMED.items():
        look(group, part, getattr(settings, group))
    return found


def allowed(settings: Settings) -> tuple[str, ...]:
    """What the owner of these settings lets workers import, wherever it lies: what stands in
    `allow`, and what the settings themselves name."""
    return tuple(dict.fromkeys((*(settings.allow or ()), *import_paths(settings))))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as flat dotted names; only the groups are opened, an empty one is kept."""
    flat: dict[str, Any] = {}
    for part, value in tree.items():
        name = f"{prefix}{part}"
        if isinstance(value, Mapping) and value and (prefix or name in GROUPS):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def check_names(flat: Mapping[str, Any], where: Where) -> None:
    """Raise a `UserError` for the first name that is no setting, with the nearest one that is, and
    for a group that is no mapping."""
    for name, value in flat.items():
        group, *parts = name.split(".")
        may_be_null = name in KEYS and KEYS[name].optional and value is None
        if name in GROUPS and not (isinstance(value, Mapping) or may_be_null):
            raise _wrong(name, must_be(KEYS.get(name)), value, where)
        if name in (*KEYS, "wandb") or (group in NAMED and all(parts)):
            continue
        near = meant(name)
        guess = f"; did you mean `{near}`?" if near else ""
        raise UserError(
            f"unknown setting `{name}`{guess}{_at(where, name)}",
            f"{typed('server', '--help')} lists every setting",
        )


SHORTER = {"lr": "learning_rate", "bs": "batch_size", "host": "host_ip", "model": "model.type"}
"""What people write for settings whose names are longer."""


def meant(word: str, *, alike: float = 0.6) -> str:
    """The setting that this misspelt name may mean, at least that much `alike`; empty where there
    is none."""
    wanted = word.lower().replace("-", "_")
    inner = (key for key in KEYS if key.endswith(f".{wanted}"))  # `project` of wandb
    return SHORTER.get(wanted) or nearest(wanted, KEYS, alike=alike) or next(inner, "")


def check_known(settings: Settings) -> None:
    """Raise `UserError` for a model or a data set that is neither ours nor an import path; torch's
    names are checked where torch is imported, with their arguments: `tensors.torch_names`."""
    for setting, group, part, known in (
        ("model.type", settings.model, "type", MODELS),
        ("dataset.name", settings.dataset, "name", DATASETS),
    ):
        name = str(group[part])
        if ":" not in name and name not in known:
            raise no_such(setting, name, known)


def from_wire(base: Settings, wire: Mapping[str, Any]) -> Settings:
    """The run's settings as a server tells them, with those of `base` that are this process's own.

    Raises `UserError` if `wire` is not exactly the run-wide settings that this version knows, each
    of its type and within its range.
    """
    tree = asdict(base)
    run_wide = {name for name in tree if name in KEYS and scope(name) == "run"}
    differing = sorted(run_wide ^ set(wire))
    if differing:
        raise UserError(
            "the server and this worker know different settings: "
            + shown(", ".join(differing), 400),
            "install the same version on both machines",
        )
    tree |= wire
    own = [key.name.split(".") for key in _PARTS if key.scope == "local"]
    for group, part in own:
        if isinstance(tree[group], Mapping):
            rest = {k: v for k, v in tree[group].items() if k != part}
            here = getattr(base, group)
            tree[group] = rest | ({part: here[part]} if part in here else {})
    try:
        for word in _words(wire):
            if not (isinstance(word, str) and word.isprintable() and len(word) <= WORD_MAX):
                raise UserError(
                    f"the server's settings have a name that is none: {shown(repr(word))}"
                )
        if wire["bucket_mb"] is None:  # a server chooses, where that was left to it
            raise _wrong("bucket_mb", "must be a number", None, _of_server)
        return build(tree, _of_server)
    except RecursionError:
        raise UserError("the server's settings are nested too deeply") from None


def _of_server(name: str) -> str:
    return "sent by the server" if scope(name) == "run" else ""


def _words(value: Any) -> Iterator[Any]:
    """The names within nested settings, which will stand in sentences."""
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _words(inner)


def build(tree: Mapping[str, Any], where: Where = lambda name: "") -> Settings:
    """The finished `Settings` of a complete nested tree; a `UserError` for the first bad value."""
    names = [field.name for field in fields(Settings) if field.name != "wandb"]
    _check_rule(tree["aggregate"], where)
    if isinstance(tree["outer"], Mapping):
        tree = {**tree, "outer": {"name": "SGD", **tree["outer"]}}
    values = {name: _checked(name, spelled_out(name, tree[name]), where) for name in names}
    logging = {
        field.name: _checked(f"wandb.{field.name}", tree["wandb"][field.name], where)
        for field in fields(Wandb)
    }
    try:
        hosts.read(values["hosts"])
    except UserError as e:
        raise UserError(e.problem + _at(where, "hosts"), e.hint) from None
    for fewer, more in (("min_workers", "num_workers"), ("num_workers", "max_workers")):
        if values[fewer] > values[more]:
            raise _wrong(fewer, f"must not exceed {more} ({values[more]})", values[fewer], where)
    settings = Settings(**values, wandb=Wandb(**logging))
    _check_local_steps(settings, where)
    _check_aggregate(settings, where)
    _check_staleness(settings, where)
    _check_shards(settings, where)
    if settings.early_stop is not None:
        _check_parts("early_stop", settings.early_stop, EARLY_STOP, where)
    return settings


WHOLE_GRADIENTS = {
    "krum", "multikrum", "bulyan", "geometricmedian", "geomedian", "geomed", "rfa", "autogm",
    "mda", "mva", "mcc", "smea", "monna", "meamed", "nnm", "faba", "dnc", "caf",
}  # fmt: skip
"""Rules that others know and that are none here, without their case, spaces and hyphens."""


def _check_rule(value: Any, where: Where) -> None:
    """Raise a `UserError` with the reason for a rule that needs whole gradients at once."""
    word = "".join(c for c in str(value).lower() if c.isalnum())
    if isinstance(value, str) and word in WHOLE_GRADIENTS:
        must = (
            f"must be one of {', '.join(AGGREGATES)}: {shown(value)} compares whole gradients with "
            "each other, and the server never has them: it averages each bucket while others are "
            "still computed"
        )
        raise _wrong("aggregate", must, value, where)


def _check_aggregate(s: Settings, where: Where) -> None:
    """Raise a `UserError` for a rule that cannot be followed with these other settings."""
    if s.codec == "topk" and s.aggregate in BY_COORDINATE:
        must = (
            "must be mean or clipped with codec=topk: each worker sends other numbers, and where "
            "most send none the middle is zero"
        )
        raise _wrong("aggregate", must, s.aggregate, where)
    if s.clip_tau is not None and s.aggregate != CLIPPED:
        raise _wrong("clip_tau", "must be null unless aggregate=clipped", s.clip_tau, where)
    if s.scale_to_median and s.local_steps == 1:
        must = "must be false with local_steps=1: it is for the differences of local steps"
        raise _wrong("scale_to_median", must, s.scale_to_median, where)


def _check_staleness(s: Settings, where: Where) -> None:
    """Raise a `UserError` where late work cannot be carried over."""
    why = ""
    if s.max_staleness and s.deterministic:
        why = "deterministic=true: who is late differs from run to run"
    if s.max_staleness and s.local_steps != 1:
        why = f"local_steps={s.local_steps}: late local steps began at older weights, and where "
        why += "they ended says nothing about the newer ones"
    if why:
        raise _wrong("max_staleness", f"must be 0 with {why}", s.max_staleness, where)


def _check_shards(s: Settings, where: Where) -> None:
    """Raise a `UserError` where several are to average, with other bits in each run."""
    if s.averages_alone and s.shards is not None:
        must = (
            f"must be null or 1 with deterministic=true and averages in {s.leaves_out}: "
            f"{s.averages_alone}"
        )
        raise _wrong("shards", must, s.shards, where)


def _check_local_steps(s: Settings, where: Where) -> None:
    """Raise a `UserError` for an outer step that cannot be made, or not with these local steps."""
    if s.local_steps == "auto" and s.deterministic:
        must = "must be a number with deterministic=true: measured times differ from run to run"
        raise _wrong("local_steps", must, s.local_steps, where)
    if s.overlap and s.local_steps == 1:
        must = "must be false with local_steps=1: gradients leave while backward computes as it is"
        raise _wrong("overlap", must, s.overlap, where)
    if s.overlap and s.deterministic:
        must = "must be false with deterministic=true: averages come sooner or later"
        raise _wrong("overlap", must, s.overlap, where)
    if s.overlap and s.ema is not None:
        must = "must be null with overlap=true: weights go on changing while updates are exchanged"
        raise _wrong("ema", must, s.ema, where)
    if s.outer is None:
        return
    if s.local_steps == 1:
        must = "must be null with local_steps=1: the mean of an optimizer's steps is another thing "
        raise _wrong("outer", must + "than a step with the mean gradient", s.outer, where)
    _check_parts("outer", s.outer, OUTER, where)
    if s.outer.get("nesterov") and not s.outer.get("momentum"):
        raise _wrong("outer.momentum", "must be more than 0 with nesterov", None, where)


def check_early_stop(s: Settings, where: Where) -> None:
    """Raise a `UserError` where a server is to stop early, and nobody would evaluate."""
    if s.early_stop is not None and not s.observer:
        must = "must be null with observer=false: nobody evaluates then"
        raise _wrong("early_stop", must, s.early_stop, where)
    if s.early_stop is not None and s.eval_steps == 0:
        must = "must be null with eval_steps=0: the only evaluation is that of the end"
        raise _wrong("early_stop", must, s.early_stop, where)


Parts = Mapping[str, tuple[Callable[[Any], bool], str]]
"""The parts of a group: what each may be, and the words for what may not."""


def _check_parts(group: str, given: Mapping[str, Any], parts: Parts, where: Where) -> None:
    for name, value in given.items():
        if name not in parts:
            raise _wrong(f"{group}.{name}", f"must be one of {', '.join(parts)}", value, where)
        is_right, must = parts[name]
        if not is_right(value):
            raise _wrong(f"{group}.{name}", must, value, where)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


OUTER: Parts = {
    "name": (lambda v: v == "SGD", "must be SGD"),
    "lr": (lambda v: _number(v) and 0 < v <= 10, "must be a number, more than 0 and at most 10"),
    "momentum": (lambda v: _number(v) and 0 <= v < 1, "must be a number from 0 to below 1"),
    "nesterov": (lambda v: isinstance(v, bool), "must be true or false"),
}
EARLY_STOP: Parts = {
    "metric": (lambda v: isinstance(v, str), "must be the name of a metric"),
    "patience": (
        lambda v: _number(v) and isinstance(v, int) and v >= 1,
        "must be a whole number of evaluations, 1 or more",
    ),
    "mode": (lambda v: v in ("min", "max"), "must be min or max: whether less or more is better"),
    "min_delta": (lambda v: _number(v) and v >= 0, "must be a number, 0 or more"),
}


def _checked(name: str, value: Any, where: Where) -> Any:
    """`value` as the setting's type and within its range."""
    key = KEYS[name]
    if (value is None and key.optional) or value in key.words:
        return value
    if isinstance(value, str) and key.kind is not str:
        value = _read_scalar(value)  # quoted in YAML, or out of an environment variable
    if key.kind is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if key.kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e3 is a whole number too
    if key.kind is int and type(value) is int and abs(value) >= WHOLE_MAX:
        raise _wrong(name, "must be below 2**63", value, where)
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is not key.kind or not finite:
        raise _wrong(name, must_be(key), value, where)
    for allowed in key.ranges:
        if not allowed.holds(value):
            raise _wrong(name, allowed.must, value, where)
    if isinstance(value, dict):
        return _checked_mapping(name, value, where)
    return value


def _checked_mapping(name: str, mapping: dict[Any, Any], where: Where) -> dict[str, Any]:
    """A free mapping: its own parts are checked, the rest must be plain and finite."""
    for inner, value in flatten(mapping, f"{name}.").items():
        for leaf in value if isinstance(value, list) else [value]:
            plain = leaf is None or isinstance(leaf, (bool, int, float, str, list, dict))
            if not plain or (isinstance(leaf, float) and not math.isfinite(leaf)):
                raise _wrong(inner, "must be a plain, finite value", leaf, where)
    own = [key.name for key in _PARTS if key.name.startswith(f"{name}.")]
    parts = {key.rpartition(".")[2]: key for key in own}
    return mapping | {part: _checked(key, mapping.get(part), where) for part, key in parts.items()}


def _read_scalar(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def must_be(key: Key | None) -> str:
    kind = "a mapping" if key is None else _KINDS[key.kind]
    if key is not None and key.name in SHORT:
        kind = "a name, or a mapping with a name"
    others = () if key is None else (*key.words, *(("null",) if key.optional else ()))
    return " or ".join((f"must be {kind}", *others))


def _wrong(name: str, must: str, value: object, where: Where) -> UserError:
    key = KEYS.get(name)
    got = "nothing" if value is None else quoted(value)
    hint = ""
    if key and key.kind is dict and isinstance(value, str):
        hint = f"for its name alone: {key.name}.{NAMED[name]}={shown(value)}\n"
    if key and key.kind is str and type(value) in (bool, int, float):
        hint = f"to make text of it in YAML, put it in quotes: {name}: '{shown(value)}'\n"
    if key:
        hint += f"{name}: {meaning(key)}; default {shown(default_of(key))}"
    return UserError(f"{name} {must}, got {got}{_at(where, name)}", hint)


def _at(where: Where, name: str) -> str:
    place = where(name)
    return f" ({place})" if place else ""


def default_of(key: Key) -> object:
    """As a person writes it."""
    return key.default[NAMED[key.name]] if key.name in SHORT and key.default else key.default


def meaning(key: Key) -> str:
    return f"{key.help} [{key.unit}]" if key.unit else key.help


HEADINGS = {  # first setting of a group -> its heading
    "host_ip": "Where",
    "num_workers": "Who, and how long to wait",
    "codec": "The exchange",
    "seed": "The training",
    "eval_steps": "What is kept and shown",
}
