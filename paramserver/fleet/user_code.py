"""The user's own code that the machines need: a training script, the modules that settings name by
import path, and the modules that those import from their own folder.

Files are read, not imported. Installed packages are left out: they have to be on every machine, as
this project's own packages are.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from paramserver.config.schema import import_paths
from paramserver.errors import UserError
from paramserver.settings import Settings

OURS = Path(__file__).resolve().parents[2]
"""The folder of this project's packages."""


@dataclass(frozen=True)
class UserCode:
    """Files and packages of one folder, by their names in it."""

    folder: Path
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{', '.join(self.names)} from {self.folder}"


def modules(settings: Settings) -> dict[str, str]:
    """The top-level modules that settings name: the name of each, and the setting it is from."""
    found: dict[str, str] = {}
    for name, setting in import_paths(settings).items():
        found.setdefault(name.partition(":")[0].partition(".")[0], f"{setting}={name}")
    return found


@dataclass(frozen=True)
class Script:
    """A user's training script, and the words behind it."""

    path: Path
    words: tuple[str, ...] = ()

    @classmethod
    def find(cls, name: str, words: Sequence[str]) -> Script:
        """Raises `UserError` where there is none, or where it would import the wrong packages."""
        path = Path(name).expanduser()
        if not path.is_file():
            there = ", ".join(sorted(p.stem for p in path.parent.glob("*.py")))
            raise UserError(f"there is no script {path}", f"there is: {there}" if there else "")
        _check_neighbours(path)
        return cls(path, tuple(words))

    def settings(self, typed: Sequence[str]) -> list[str]:
        """The words of a command line for its run: first the settings in a YAML file beside it, of
        the same name, then those that were typed."""
        chosen = {"observer": "false"}  # an observer would need the script's model
        if self.path.with_suffix(".yaml").is_file():
            chosen["model"] = str(self.path.with_suffix(".yaml"))
        given = {word.partition("=")[0] for word in typed}
        return [f"{k}={v}" for k, v in chosen.items() if k not in given] + list(typed)


def _check_neighbours(script: Path) -> None:
    """Raise `UserError` where the script would import a neighbour in place of one of our packages:
    Python looks into the script's own folder first."""
    text = script.read_text(errors="replace")
    for name, uses, instead in (
        ("paramserver", r"^\s*(import|from) +paramserver\b", "rename it"),
        (
            "workers",
            r"\bworkers\.join\b|^\s*from +workers +import\b.*\bjoin\b",
            "rename it, or use in the script: from paramserver import join",
        ),
    ):
        for neighbour in (script.parent / name, script.parent / f"{name}.py"):
            is_other = neighbour.exists() and neighbour.resolve() != OURS / name
            if is_other and re.search(uses, text, re.MULTILINE):
                raise UserError(
                    f"{neighbour} has the name of our package, and {script.name} would import it",
                    instead,
                )


def place_of(script: Script, user_code: Sequence[UserCode], root: Path) -> str:
    """Where the script lies on each machine, below that machine's folder."""
    path = script.path.resolve()
    for number, own in enumerate(user_code):
        if own.folder == path.parent and path.name in own.names:
            return f"own/{number}/{path.name}"
    return f"code/{path.relative_to(root)}"


def find_user_code(
    settings: Settings, root: Path, script: Script | None = None
) -> tuple[UserCode, ...]:
    """The code to copy beside the clone at `root`, which is copied anyway."""
    by_folder: dict[Path, set[str]] = {}
    if script is not None and not script.path.resolve().is_relative_to(root):
        path = script.path.resolve()
        by_folder[path.parent] = _with_neighbours(path)
    for module in modules(settings):
        place = _place(module)
        if place is not None and place.parent != root and not is_installed(place):
            by_folder.setdefault(place.parent, set()).update(_with_neighbours(place))
    return tuple(UserCode(folder, tuple(sorted(names))) for folder, names in by_folder.items())


def absent(settings: Settings, root: Path) -> dict[str, str]:
    """The modules that settings name and that are not here: the name of each, and the setting it is
    from. What every environment has, by the pins of the clone at `root`, is none of them."""
    pins = (root / "constraints.txt").read_text(encoding="utf-8")
    brought = {line.partition("==")[0].replace("-", "_") for line in pins.splitlines()}
    return {
        module: setting
        for module, setting in modules(settings).items()
        if module not in brought and not _is_here(module)
    }


def _is_here(module: str) -> bool:
    try:
        with current_folder_first():
            return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return True


def _place(module: str) -> Path | None:
    """The file or the package's folder; None where there is none on this machine."""
    try:
        with current_folder_first():
            spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.has_location and spec.origin else None


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Look for modules in the current folder first, as `python -m` does; afterwards, for what they
    import later, last. Our programs do not look there (`paramserver.program`)."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
        if "" not in sys.path and here not in sys.path:
            sys.path.append(here)


def is_installed(place: Path) -> bool:
    """Is it a part of Python, or of an installed package?"""
    standard = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    is_package = {"site-packages", "dist-packages"} & {*place.parts}
    return bool(is_package) or any(place.is_relative_to(folder) for folder in standard)


def _with_neighbours(place: Path) -> set[str]:
    """Its name, and the names of the modules beside it that it imports, directly or through
    others."""
    found: set[str] = set()
    waiting = [place]
    while waiting:
        here = waiting.pop()
        if here.name in found:
            continue
        found.add(here.name)
        for source in sorted(here.rglob("*.py")) if here.is_dir() else [here]:
            for name in _imports(source):
                beside = (place.parent / f"{name}.py", place.parent / name)
                waiting += [path for path in beside if path.is_file() or _is_package(path)]
    return found


def _is_package(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*.py"))


def _imports(source: Path) -> Iterator[str]:
    """Top-level names of everything that a file imports from elsewhere than its own package."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, ValueError, SyntaxError):
        return  # the worker that imports it there shows the error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
