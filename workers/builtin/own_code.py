"""Decides which code a worker imports for a name in the settings.

A worker gets the run's settings from its server, and must not let a peer choose what is imported or
called here. `package.module:Name` therefore means only

* what a source file defines that the worker's owner put into the folder where the worker was
  started, or into one that the environment's PYTHONPATH names (`make up` copies the user's code
  there);
* what the worker's own settings name: in `allow`, or as the model, the data set and so on.

No module is imported, not even a parent package, before that check: this module finds files as
Python would find them, and reads them.
"""

from __future__ import annotations

import ast
import os
import pkgutil
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, FrozenImporter, ModuleSpec, SourceFileLoader
from itertools import accumulate
from pathlib import Path
from typing import Any

from paramserver.config.schema import allowed
from paramserver.errors import UserError
from paramserver.fleet.user_code import is_installed
from paramserver.ranges import is_import_path
from paramserver.settings import Settings
from paramserver.words import nearest

OURS = tuple(Path(__file__).resolve().parents[2] / name for name in ("paramserver", "workers"))


@dataclass(frozen=True)
class OwnCode:
    """The folders whose modules may be imported, and the names that are allowed beside them.

    A name is `package`, which stands for all below it, `package.module` or `package.module:Name`.
    """

    folders: tuple[Path, ...] = ()
    allowed: tuple[str, ...] = ()

    def admit(self, setting: str, name: str) -> None:
        """Raise `UserError` unless `name` may be imported and, where a file of this worker's own
        decides, that file defines it."""
        if not is_import_path(name):
            raise UserError(f"{setting}={name!r} is not of the form package.module:Name")
        if self._allowing(name):
            return
        module, _, attribute = name.partition(":")
        spec = None
        for spec in specs(module):
            why = self._why_not(spec)
            if why is not None:
                raise _refused(setting, name, why)
        if spec is None or spec.origin is None:
            raise UserError(
                f"{setting}={name}: there is no module {module!r} of this worker's own",
                f"its file must be in the folder where the worker is started, on every machine of "
                f"the run; an installed one is named on the worker: allow={name}",
            )
        _check_defined(setting, name, Path(spec.origin), attribute)

    def check_defined(self, setting: str, name: str, found: Any) -> None:
        """Raise `UserError` unless the object found under an admitted name was defined in that
        module."""
        entry, theirs = self._allowing(name), str(getattr(found, "__module__", None))
        if entry == name:
            return
        module = name.partition(":")[0]
        if theirs == module or (entry and _is_below(theirs, entry)):
            return
        raise _refused(setting, name, f"it is defined in {theirs}, not in {module}")

    def _allowing(self, name: str) -> str | None:
        """The entry of `allowed` that admits `name`."""
        module = name.partition(":")[0]
        found = [e for e in self.allowed if e == name or (":" not in e and _is_below(module, e))]
        return max(found, key=len, default=None)

    def _why_not(self, spec: ModuleSpec) -> str | None:
        """Why this module must not be imported, as a sentence; None where it is this worker's
        own."""
        if spec.origin is None and spec.submodule_search_locations is not None:
            return None  # a folder without __init__.py: nothing runs
        if not spec.has_location or spec.origin is None:
            return f"{spec.name} is a part of Python"
        path = Path(os.path.abspath(spec.origin))
        real = path.resolve()
        if any(real.is_relative_to(folder) for folder in OURS):
            return f"{spec.name} is a part of this program"
        if is_installed(path) or is_installed(real):
            return f"{spec.name} is installed, not this worker's own"
        homes = [folder for folder in self.folders if real.is_relative_to(folder.resolve())]
        if not homes:
            return f"{spec.name} lies in {real.parent}"
        if not isinstance(spec.loader, SourceFileLoader):
            return f"{spec.name} is no source file"
        return _in_doubt(real, homes[0].resolve())


NOTHING = OwnCode()


def of_worker(own: Settings) -> OwnCode:
    """The code that this process may import; `own` are its own settings, without the server's."""
    here = [Path.cwd()]
    if not sys.flags.ignore_environment:
        entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        here += [Path(os.path.abspath(entry)) for entry in entries if entry]
    return OwnCode(tuple(here), allowed(own))


def _refused(setting: str, name: str, why: str) -> UserError:
    return UserError(
        f"{setting}={name} comes from the server and is not imported: {why}",
        "a worker takes from its server only names of modules in the folder where it was started; "
        f"only where you know this one and trust the server with it: allow={name}",
    )


def _is_below(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


# ------------------------------------------------------------------------------------- the files


def specs(module: str) -> Iterator[ModuleSpec]:
    """The specs that importing `module` would load, its parents first, without importing. It ends
    early where one is missing, with a spec without an origin."""
    where: Iterable[str] | None = None
    for full in accumulate(module.split("."), lambda parent, tail: f"{parent}.{tail}"):
        imported = sys.modules.get(full)
        if imported is not None:
            spec = getattr(imported, "__spec__", None) or ModuleSpec(full, None)
            where = getattr(imported, "__path__", ())
        else:
            spec = _find(full, sys.path if where is None else where) or _missing(full)
            where = spec.submodule_search_locations or ()
        yield spec


def _missing(name: str) -> ModuleSpec:
    """The spec of a missing module, as of an empty folder."""
    return ModuleSpec(name, None, is_package=True)


def _find(full: str, where: Iterable[str]) -> ModuleSpec | None:
    """As `PathFinder.find_spec`, which needs the parents in `sys.modules`, where they must not
    be."""
    if "." not in full:
        for builtin in (BuiltinImporter, FrozenImporter):
            if (found := builtin.find_spec(full)) is not None:
                return found
    portions: list[str] = []
    for entry in where:
        finder = pkgutil.get_importer(entry or os.getcwd())
        spec = None if finder is None else finder.find_spec(full, None)
        if spec is None:
            continue
        if spec.loader is not None:
            return spec
        portions += spec.submodule_search_locations or ()
    if not portions:
        return None
    folder = ModuleSpec(full, None, is_package=True)
    folder.submodule_search_locations = portions
    return folder


def _in_doubt(file: Path, home: Path) -> str | None:
    """Why this file may not be this user's own work, as a sentence: another user or a tool may have
    written it. None where it is."""
    between = [file, *(p for p in file.parents if p != home and p.is_relative_to(home))]
    for folder in between[1:]:
        if (folder / "pyvenv.cfg").exists():
            return f"{folder} is an environment of Python's"
    if not hasattr(os, "getuid"):
        return None
    for path in between:
        if path.parent.stat().st_mode & stat.S_IWOTH and path.stat().st_uid not in (os.getuid(), 0):
            return f"{path} is another user's, in a folder where everybody may write"
    return None


# ---------------------------------------------------------------------------------- what is in one


def parsed(setting: str, name: str, file: Path) -> ast.Module:
    """What is in this source file of `name`. Raises `UserError` where it is no Python."""
    try:
        return ast.parse(file.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as fault:
        text = " ".join(str(fault).split())
        raise UserError(
            f"{setting}={name}: importing {name.partition(':')[0]!r} failed: "
            f"{type(fault).__name__}: {text}"
        ) from None


def _check_defined(setting: str, name: str, file: Path, attribute: str) -> None:
    """Raise `UserError` unless this source defines a class of that name, or a function with an
    annotated result."""
    tree = parsed(setting, name, file)
    defined: dict[str, ast.AST] = {}
    elsewhere: dict[str, str] = {}
    for node in statements(tree.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            defined[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            elsewhere |= {a.asname or a.name: f"{source}:{a.name}" for a in node.names}
    module = name.partition(":")[0]
    if attribute in elsewhere and attribute not in defined:
        raise _refused(setting, name, f"{module} has it from {elsewhere[attribute]}")
    found = defined.get(attribute)
    if found is None:
        near = nearest(attribute, defined)
        raise UserError(
            f"{setting}={name}: module {module} has no {attribute!r}",
            f"did you mean {near}?" if near else "",
        )
    if not isinstance(found, ast.ClassDef) and getattr(found, "returns", None) is None:
        raise UserError(
            f"{setting}={name} is neither a class nor a function annotated to return one"
        )


def statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also within `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)
