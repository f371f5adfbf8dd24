"""From YAML files and the command line to one checked, frozen `Settings`.

The only file that sees OmegaConf. Later over earlier:

    the defaults in `settings` < cluster YAML < model YAML < command line (``key=value``)

A worker's `join` may also come from the environment, which goes before the files.

Both files share one namespace, so either may hold any setting. The default ones are
``conf/cluster.yaml`` and ``conf/model.yaml``, of the current folder or else those that come with
the installation; ``cluster=`` and ``model=`` choose others, by path or by name under ``conf/``. A
file chosen with ``cluster=`` that has a ``model:`` mapping is a whole configuration, as the
``config.yaml`` of a run is: the default model file is then left out.

``model:``, ``dataset:``, ``optimizer:`` and the like are replaced, not merged, by a layer that
changes their type or name, so that no argument of one model is handed to another. ``dataset.root``
stays: it is a place on this machine, whatever lies there.

On a worker the run's settings arrive with the server's welcome (`to_wire`, `from_wire`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    KeyValidationError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
    ValidationError,
)

from paramserver import terminal
from paramserver.config.schema import (
    KEYS,
    NAMED,
    Program,
    Where,
    build,
    check_early_stop,
    check_known,
    check_names,
    flatten,
    from_wire,
    meant,
    scope,
    spelled_out,
)
from paramserver.errors import UserError
from paramserver.net import hosts
from paramserver.net.jointoken import VARIABLE
from paramserver.settings import Settings
from paramserver.typed import typed
from paramserver.words import printable, shown

__all__ = [
    "Loaded",
    "Program",
    "check_worker_overrides",
    "dump",
    "from_wire",
    "load",
    "save",
    "to_wire",
]

_STAYING = {"dataset": ("root",)}  # group -> what stays where another one is named


@dataclass(frozen=True)
class Loaded:
    """What `load` found."""

    settings: Settings
    given: dict[str, object]  # set on the command line: flat dotted name -> converted value
    sources: tuple[Path, ...]  # the files that were read, lowest first
    twice: tuple[str, ...] = ()
    """A sentence for each setting that the command line has with two values."""

    def tell_twice(self) -> None:
        for sentence in self.twice:
            terminal.say(sentence)


@dataclass(frozen=True)
class _Layer:
    """One source of settings, nested and unresolved, and where each of them is written."""

    source: str
    tree: dict[str, Any]
    lines: dict[str, int]

    def where(self, name: str) -> str:
        while name and name not in self.lines:
            name = name.rpartition(".")[0]
        return f"{self.source}, line {self.lines[name]}" if name else self.source


def load(argv: list[str], program: Program) -> Loaded:
    """The settings of one process; `argv` is without the program's name.

    Raises `UserError` for anything a person got wrong, and on a worker for a setting that only the
    server reads.
    """
    chosen, command_line, twice = _read_command_line(argv)
    files = [_find("cluster", chosen.get("cluster"))]
    layers = [_read_file(path) for path in files if path]
    if "model" in chosen or not ("cluster" in chosen and "model" in layers[0].tree):
        files.append(_find("model", chosen.get("model")))
        layers += [_read_file(path) for path in files[1:] if path]
    if program == "worker" and os.environ.get(VARIABLE):
        layers.append(
            _Layer(f"environment variable {VARIABLE}", {"join": os.environ[VARIABLE]}, {})
        )
    layers.append(command_line)

    merged = asdict(Settings())
    origins: dict[str, _Layer] = {}
    for layer in layers:
        flat = flatten(layer.tree)
        check_names(flat, layer.where)
        merged = _merge(merged, layer.tree, layer.source)
        origins |= dict.fromkeys(flat, layer)

    def where(name: str) -> str:
        while name and name not in origins:
            name = name.rpartition(".")[0]
        return origins[name].where(name) if name else ""

    try:
        config = OmegaConf.create(merged)
        tree = _plain(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        raise _unresolved(error, where) from None
    if program != "worker":
        tree["join"] = None  # it is a secret, and nothing to a server
    settings = build(tree, where)
    final = flatten(asdict(settings))
    given = {name: final[name] for name in flatten(command_line.tree) if name in final}
    if program == "worker":
        _refuse_servers_own(given)
        _one_address(settings.host_ip)
    elif program == "server":
        _refuse_workers_own(flatten(command_line.tree))
        check_early_stop(settings, where)
        if settings.observer:  # without it these names are free for a script to read
            check_known(settings)
    return Loaded(settings, given, tuple(path for path in files if path), twice)


def dump(settings: Settings) -> str:
    """Every setting as YAML; a file of it, given as ``cluster=``, is the same settings."""
    return OmegaConf.to_yaml(asdict(settings))


def save(settings: Settings, path: Path) -> None:
    """Write every setting as YAML; ``cluster=<path>`` loads it again. Raises `OSError`."""
    head = "# What this run really used. A run like it: python -m paramserver cluster=<this file>\n"
    path.write_text(head + dump(settings), encoding="utf-8")


def to_wire(settings: Settings) -> dict[str, Any]:
    """What all must have equal, for the welcome: run-wide settings, without this machine's own."""
    wire = {name: value for name, value in asdict(settings).items() if _is_run_wide(name)}
    wire |= {"bucket_mb": settings.bucket_size_mb}
    return wire | {"dataset": {k: v for k, v in settings.dataset.items() if k != "root"}}


def check_worker_overrides(given: Mapping[str, object], run: Settings) -> None:
    """Raise `UserError` if a worker's command line contradicts the run's settings.

    `given` is that of `Loaded`; a worker's YAML files are not compared, since the server's win.
    """
    of_run = flatten(asdict(run))
    for name, value in given.items():
        if scope(name) == "run" and (name not in of_run or of_run[name] != value):
            theirs = shown(of_run[name]) if name in of_run else "no such argument"
            raise UserError(
                f"{name} is {shown(value)} on this worker's command line, but the run has {theirs}",
                "the server's settings are the run's: set it there, or leave it out here",
            )


# Sources ----------------------------------------------------------------------------------------


def _read_command_line(argv: Iterable[str]) -> tuple[dict[str, str], _Layer, tuple[str, ...]]:
    """The files chosen, the settings, and a sentence for each that is given twice, with two values:
    the last one counts, so that a word may be put behind a command line that somebody has made."""
    chosen: dict[str, str] = {}
    pairs: list[tuple[str, Any]] = []
    words = list(argv)
    for place, argument in enumerate(words):  # before their values: a shell may have cut one apart
        name, equals, _ = argument.partition("=")
        if not equals or not name or name.startswith("-"):
            raise _no_setting(argument, words[place + 1 :])
    for argument in words:
        name, _, text = argument.partition("=")
        if name in ("cluster", "model"):
            chosen[name] = text
        else:
            pairs.append((name, _read_value(name, text)))
    files = {name: text for name, text in chosen.items() if text}
    layer = _Layer("command line", _nest(pairs, "command line"), {})
    return files, layer, tuple(_given_twice(words, pairs))


def _given_twice(words: Sequence[str], pairs: Sequence[tuple[str, Any]]) -> Iterator[str]:
    given: list[tuple[str, Any]] = [
        (name, text)
        for name, _, text in (word.partition("=") for word in words)
        if name in ("cluster", "model")
    ]
    for pair in pairs:
        given += flatten(_nest([pair], "command line")).items()
    values: dict[str, Any] = {}
    for name, value in given:
        before = values.get(name, value)
        values[name] = value
        if before != value:
            token = name == "join"  # a secret
            which = "the last one counts" if token else f"{shown(value)} counts"
            yield f"{name} is given twice: {which}" + ("" if token else f", not {shown(before)}")


def _no_setting(argument: str, following: Sequence[str]) -> UserError:
    """The error for `--port 44030`, `port: 44030`, `port 44030` and the like: names what was
    meant."""
    name, equals, text = argument.partition("=")
    key = meant(name.strip("-:"), alike=0.75)
    if not (equals or text) and following and not following[0].startswith("-"):
        text = following[0] if "=" not in following[0] else ""
    example = f"{key}={text or 'VALUE'}" if key else "learning_rate=0.01"
    if argument.endswith(("}", "]")) and not equals:
        example += "; with braces and spaces in quotes: 'optimizer={name: AdamW}'"
    return UserError(
        f"cannot read the argument {printable(repr(argument))}",
        f"settings are written key=value, without dashes: {example}\n"
        f"{typed('server', '--help')} lists every setting",
    )


def _read_value(name: str, text: str) -> Any:
    """What stands behind ``name=``, read as YAML; but a text setting takes it as it stands, since
    YAML would make 7 of a run named 007."""
    try:
        if name in KEYS and KEYS[name].kind is str:
            value = None if text in ("", "null", "~") else text
            layer = OmegaConf.create({"value": value})
        else:
            layer = OmegaConf.from_dotlist([f"value={text}"])
        return _plain(OmegaConf.to_container(layer))["value"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        told = _in_words(error) if isinstance(error, OmegaConfBaseException) else str(error)
        reason = getattr(error, "problem", None) or told.splitlines()[0]
        raise UserError(
            f"cannot read the value in {name}={text}: {reason}",
            "values are read as YAML: 0.01, true, null, relu, [1, 2]",
        ) from None


def _read_file(path: Path) -> _Layer:
    text, lines = "", {}
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text)
        if not (node is None or isinstance(node, yaml.MappingNode)):
            raise UserError(f"{path} holds no settings", "they are lines of `key: value`")
        lines = _lines(node) if node else {}
        pairs = _plain(OmegaConf.to_container(OmegaConf.create(text))).items()
        tree = _spelled_out(_nest(pairs, str(path)), str(path))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        tab = "\t" in "".join(text.splitlines()[line : line + 1])
        raise UserError(
            f"cannot read {path}, line {line + 1}: {error.problem}",
            "YAML indents with spaces, not with tabs" if tab else "",
        ) from None
    except OmegaConfBaseException as error:
        raise _unresolved(error, _Layer(str(path), {}, lines).where) from None
    except RecursionError:
        raise UserError(f"cannot read {path}: it is nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: UTF-8, or `!!int x`
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason}", "it must be YAML, in UTF-8") from None
    return _Layer(str(path), tree, lines)


def _spelled_out(tree: dict[str, Any], source: str) -> dict[str, Any]:
    try:
        return hosts.spelled_out(tree)
    except UserError as error:
        raise UserError(f"{error.problem} ({source})", error.hint) from None


def _lines(node: Any, prefix: str = "") -> dict[str, int]:
    """Flat dotted name -> line, of a YAML mapping node."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        lines[name] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            lines |= _lines(value, f"{name}.")
    return lines


def _find(kind: str, name: str | None) -> Path | None:
    """The file that `kind`= chose, or its default; None where there is not even a default."""
    places = []
    if name:
        with suppress(ValueError):  # a user's name that cannot be one: ~ and a null byte
            places.append(Path(os.path.expanduser(name)))
    folders = [inner for folder in _folders() for inner in (folder, folder / kind)]
    for folder in folders:
        places += [folder / (name or kind), folder / f"{name or kind}.yaml"]
    for place in places:
        if os.path.isfile(place):  # which, unlike Path's, is false for any nonsense
            return place
    if not name:
        return None
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    hint = f"{kind}= takes a path, or a name under conf/: {', '.join(known) or 'none there'}"
    if kind == "model" and name.startswith("{"):
        hint += "\neach of its settings is one word: model.type=CNN model.width=32"
    elif kind == "model":
        hint += f"\nto choose the model's type, write model.type={name}"
    raise UserError(f"{kind}={name}: there is no such file", hint)


def _folders() -> list[Path]:
    """Where YAML files are looked for by name: the current folder's conf/, then the shipped one."""
    package = Path(__file__).resolve().parents[1]
    shipped = (package / "conf").resolve()  # in a clone this is a link to the folder beside it
    return [Path("conf"), shipped]


# Trees ------------------------------------------------------------------------------------------


def _nest(pairs: Iterable[tuple[Any, Any]], source: str) -> dict[str, Any]:
    """Dotted names opened into nested mappings, later over earlier."""
    trees: list[dict[str, Any]] = [{}]
    for name, value in pairs:
        value = spelled_out(name, value)
        for part in reversed(str(name).split(".")):
            value = {part: value}
        trees.append(value)
    return _overlay(trees, source)


def _merge(lower: dict[str, Any], upper: dict[str, Any], source: str) -> dict[str, Any]:
    """`upper` over `lower`; a group whose type or name changes is replaced but for what stays."""
    kept = dict(lower)
    for group, naming in NAMED.items():
        old, new = lower[group] or {}, upper.get(group) or {}
        if naming in new and new[naming] != old.get(naming):
            kept[group] = {part: old[part] for part in _STAYING.get(group, ()) if part in old}
    return _overlay([kept, upper], source)


def _overlay(trees: list[dict[str, Any]], source: str) -> dict[str, Any]:
    try:
        return _plain(OmegaConf.to_container(OmegaConf.merge(*trees)))
    except TypeError:
        raise UserError(
            f"{source}: a list and a mapping cannot be merged under one name",
            "give the argument of the model or data set as one of the two",
        ) from None


def _plain(container: Any) -> dict[str, Any]:
    assert isinstance(container, dict)
    return container


def _is_run_wide(name: str) -> bool:
    return name in KEYS and scope(name) == "run"


def _unresolved(error: OmegaConfBaseException, where: Where) -> UserError:
    name = str(error.full_key or "")
    place = where(name)
    filled_in = not isinstance(error, KeyValidationError | ValidationError | MissingMandatoryValue)
    hint = "${key} stands for another setting, ${oc.env:NAME} for an environment variable"
    return UserError(
        f"cannot {'fill in' if filled_in else 'read'} {name or 'a value'}: {_in_words(error)}"
        + (f" ({place})" if place else ""),
        hint if filled_in else "",
    )


def _in_words(error: OmegaConfBaseException) -> str:
    """What OmegaConf says, for people who have not read it."""
    text = str(error).splitlines()[0]
    quoted = re.search(r"'([^']*)'", text)
    wanted = quoted[1] if quoted else ""
    if isinstance(error, KeyValidationError):
        return "a name in it is no text"
    if isinstance(error, ValidationError):
        return "no setting takes a value of this kind"
    if isinstance(error, MissingMandatoryValue):
        return "??? stands for a value that is yet to be given"
    if isinstance(error, InterpolationKeyError):
        return f"there is no setting `{wanted}`"
    if isinstance(error, UnsupportedInterpolationType):
        return f"there is no ${{{text.split()[-1]}:...}}"
    if isinstance(error, GrammarParseError):
        return "its ${...} cannot be read"
    if "Environment variable" in text:
        return f"the environment has no variable {wanted}"
    if "detected" in text:  # recursive, or to a parent
        return "it stands for itself"
    return text


def _one_address(host_ip: str | None) -> None:
    """What a worker dials, where a server may have several addresses."""
    if host_ip is not None and "," in host_ip:
        raise UserError(
            f"a worker dials one address, not {host_ip}", "the server prints where it listens"
        )


def _refuse_workers_own(given: Mapping[str, object]) -> None:
    for name in ("id", "join"):
        if given.get(name) is not None:
            raise UserError(
                f"{name} belongs to a worker and means nothing here",
                f"a worker is started by: {typed('worker', 'id=2')}",
            )


def _refuse_servers_own(given: Mapping[str, object]) -> None:
    for name in given:
        if scope(name) == "server":
            raise UserError(
                f"{name} belongs to the server and means nothing on a worker",
                f"give it there: {typed('server', f'{name}={shown(given[name])}')}",
            )
