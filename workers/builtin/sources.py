"""What a user's own classes and functions take, read from their source files: nothing is imported.

A server says so what is wrong in the settings before it listens, and no module of a user's runs in
its process. Only the observer and the workers import it. A name is followed through `from a import
b` and `Name = Other` to its `class` or `def`. Where only running the module would tell, because the
name is bound by other means or a decorator may change what it takes, nothing is said here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

from paramserver.errors import UserError
from paramserver.fleet.user_code import current_folder_first
from paramserver.words import nearest

from . import registry
from .own_code import parsed, specs, statements

BOUND_AT_RUN_TIME = {"globals", "vars", "setattr", "exec", "__getattr__", "__path__", "modules"}
KEEP_ARGUMENTS = {
    "enable_grad", "final", "inference_mode", "no_grad", "override",
}  # fmt: skip
"""Decorators of Python's and torch's that leave alone what a class or function takes."""
NO_DATACLASSES = {"Dataset", "Module", "object"}
FOLLOWED = 8  # imports, from module to module
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """Stands for a class or function of a user's own: it has its signature, and is never called."""

    def __init__(self, signature: inspect.Signature, returns: str | None) -> None:
        self.__signature__ = signature
        self.returns = returns
        """What a function is annotated to return, as written; None of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this is a source, to be read only")


class _Written(str):
    """A piece of source, shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def read(setting: str, name: str, is_a: str, *, elsewhere: bool = False) -> Source | None:
    """What the source file of `package.module:Name` defines; None where that cannot be read.

    `is_a` is what it must be or return, for sentences. Raises `UserError` where importing it would
    fail: no such module (unless the run is `elsewhere`, where it may be), no such name in it, no
    Python.
    """
    module, _, attribute = name.partition(":")
    with current_folder_first():
        path = list(specs(module))
        if any(_is_absent(spec) for spec in path):
            if (elsewhere and _is_absent(path[0])) or _may_be_elsewhere(path):
                return None
            raise registry.no_module(setting, name)
        found = _followed(setting, name, path[-1], attribute)
    if found is None:
        return None
    node, tree = found
    if isinstance(node, ast.ClassDef):
        signature = _of_class(node, tree)
        return None if signature is None else Source(signature, None)
    if not _keeps_arguments(node):
        return None
    if node.returns is None:
        raise registry.is_neither(setting, name, is_a)
    return Source(_of_function(node), ast.unparse(node.returns))


@cache
def of_ours(file: str) -> Mapping[str, Source]:
    """The classes and functions of a module of ours beside this one."""
    tree = ast.parse(Path(__file__).with_name(file).read_bytes())
    found: dict[str, Source] = {}
    for node in tree.body:
        if isinstance(node, Function):
            found[node.name] = Source(_of_function(node), None)
        elif isinstance(node, ast.ClassDef) and (signature := _of_class(node, tree)) is not None:
            found[node.name] = Source(signature, None)
    return found


def of_text(signature: str) -> Source:
    """A signature as `inspect` writes it."""
    [node] = ast.parse(f"def it{signature}: ...").body
    assert isinstance(node, Function)
    return Source(_of_function(node), None)


# ------------------------------------------------------------------------------------ its module


def _is_absent(spec: ModuleSpec) -> bool:
    return spec.origin is None and not spec.submodule_search_locations and spec.loader is None


def _may_be_elsewhere(path: list[ModuleSpec]) -> bool:
    """Whether Python may find the absent module by other means than files in folders."""
    at = next(at for at, spec in enumerate(path) if _is_absent(spec))
    if at == 0:
        try:
            return importlib.util.find_spec(path[0].name) is not None
        except (ImportError, ValueError):
            return True
    parent = path[at - 1]
    if parent.origin is None:  # a folder without __init__.py
        return False
    if not isinstance(parent.loader, SourceFileLoader):
        return True
    text = Path(parent.origin).read_text(encoding="utf-8", errors="replace")
    return any(word in text for word in BOUND_AT_RUN_TIME)


def _followed(
    setting: str, name: str, spec: ModuleSpec, attribute: str, left: int = FOLLOWED
) -> tuple[ast.ClassDef | Function, ast.Module] | None:
    """The definition of this name in a module, or where the module has it from, and the source that
    it stands in; None where that is not known. Raises `UserError` where there is none."""
    if not isinstance(spec.loader, SourceFileLoader) or spec.origin is None or not left:
        return None
    tree = parsed(setting, name, Path(spec.origin))
    found = _bindings(tree, attribute)
    if found is None or len(found) > 1:
        return None
    if not found:
        raise _has_none(setting, name, spec.name, attribute, tree)
    [node] = found
    if isinstance(node, ast.ClassDef | Function):
        return node, tree
    if isinstance(node, ast.Assign):  # Name = Other
        assert isinstance(node.value, ast.Name)
        return _followed(setting, name, spec, node.value.id, left - 1)
    assert isinstance(node, ast.ImportFrom)
    theirs = next(a.name for a in node.names if (a.asname or a.name) == attribute)
    path = _imported_by(spec, node)
    if (
        not path
        or any(map(_is_absent, path))
        or not _is_absent([*specs(f"{path[-1].name}.{theirs}")][-1])
    ):
        return None  # it may be caught, or is a module itself
    return _followed(setting, name, path[-1], theirs, left - 1)


def _imported_by(spec: ModuleSpec, node: ast.ImportFrom) -> list[ModuleSpec]:
    """The module that `from ... import` names in the module of this spec, its parents before it."""
    full = node.module or ""
    if node.level:
        is_package = spec.submodule_search_locations is not None
        parents = spec.name.split(".")
        kept = len(parents) - node.level + is_package
        if kept < 1:
            return []
        full = ".".join([*parents[:kept], *([full] if full else [])])
    return list(specs(full))


def _has_none(setting: str, name: str, module: str, attribute: str, tree: ast.Module) -> UserError:
    near = nearest(attribute, _defined(tree))
    named, _, wanted = name.partition(":")
    problem = f"module {module} has no {attribute!r}"
    if (module, attribute) != (named, wanted):
        problem = f"{named} has {wanted} from elsewhere, but {problem}"
    return UserError(f"{setting}={name}: {problem}", f"did you mean {near}?" if near else "")


def _binds(node: ast.stmt, name: str) -> bool:
    """Whether it gives this name to something that is read in a source."""
    if isinstance(node, ast.ImportFrom):
        return any((alias.asname or alias.name) == name for alias in node.names)
    if isinstance(node, ast.Assign):
        [*targets], value = node.targets, node.value
        return [getattr(t, "id", None) for t in targets] == [name] and isinstance(value, ast.Name)
    return isinstance(node, ast.ClassDef | Function) and node.name == name


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in statements(tree.body):
        if isinstance(node, ast.ClassDef | Function):
            yield node.name


def _outside(node: ast.AST) -> Iterator[ast.AST]:
    """All that is no part of a class or a function: what is bound there is the module's."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.ClassDef | Function | ast.Lambda):
            yield from _outside(child)


def _bindings(tree: ast.Module, name: str) -> list[ast.stmt] | None:
    """The statements that bind a name; None where it may be bound by others than can be read."""
    plain = [node for node in statements(tree.body) if _binds(node, name)]
    read = {id(part) for node in plain for part in (node, *getattr(node, "targets", ()))}
    for node in _outside(tree):
        if id(node) in read:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name) in ("*", name) for alias in node.names):
                return None
        elif isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Global) and name in node.names:
            return None
        called = getattr(node, "id", None) or getattr(node, "attr", None)
        if (called or getattr(node, "name", None)) in BOUND_AT_RUN_TIME:
            return None
    return plain


# --------------------------------------------------------------------------------- its signature


def _of_class(node: ast.ClassDef, tree: ast.Module) -> inspect.Signature | None:
    """What its constructor takes; None where that is another's, or changed by a decorator."""
    if len(node.decorator_list) == 1 and _name_of(node.decorator_list[0]) == "dataclass":
        return _of_dataclass(node, node.decorator_list[0])
    if not _keeps_arguments(node) or node.keywords:
        return None
    own = {n.name: n for n in statements(node.body) if isinstance(n, Function)}
    if "__new__" in own:
        return None
    init = own.get("__init__")
    if init is not None:
        return _of_function(init, method=True) if _keeps_arguments(init) else None
    bases = [
        other
        for other in statements(tree.body)
        if isinstance(other, ast.ClassDef)
        and other is not node
        and any(isinstance(b, ast.Name) and b.id == other.name for b in node.bases)
    ]
    if len(node.bases) != 1 or len(bases) != 1 or bases[0].lineno > node.lineno:
        return None
    return _of_class(bases[0], tree)


def _of_dataclass(node: ast.ClassDef, decorator: ast.expr) -> inspect.Signature | None:
    """What a dataclass takes whose fields are all its own, written plainly."""
    chosen = {k.arg for k in decorator.keywords} if isinstance(decorator, ast.Call) else set()
    own = {n.name for n in node.body if isinstance(n, Function)}
    bases = {_name_of(base) for base in node.bases}
    if (
        chosen - {"frozen", "eq", "slots", "repr"}
        or own & {"__init__", "__new__"}
        or (bases - NO_DATACLASSES)
    ):
        return None
    found = []
    for field in node.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        if not isinstance(field.target, ast.Name) or "Var" in ast.unparse(field.annotation):
            return None  # of the class, or for __post_init__ only
        value = field.value
        if isinstance(value, ast.Call) and _name_of(value) == "field":
            words = {k.arg for k in value.keywords}
            if words & {"init", "kw_only", None}:
                return None
            value = value if words & {"default", "default_factory"} else None
        place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        found.append(_parameter(ast.arg(field.target.id, field.annotation), place, value))
    try:
        return inspect.Signature(found)
    except ValueError:  # one without a default behind one that has it: Python refuses it, too
        return None


def _keeps_arguments(node: ast.ClassDef | Function) -> bool:
    """Whether no decorator changes what it takes."""
    return all(_name_of(decorator) in KEEP_ARGUMENTS for decorator in node.decorator_list)


def _name_of(node: ast.expr) -> str:
    """The last part of a dotted name, called or not."""
    if isinstance(node, ast.Call):
        node = node.func
    if isinstance(node, ast.Subscript):  # Dataset[Tensor]
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _of_function(node: Function, method: bool = False) -> inspect.Signature:
    kind, arguments = inspect.Parameter, node.args
    places = [
        *((a, kind.POSITIONAL_ONLY) for a in arguments.posonlyargs),
        *((a, kind.POSITIONAL_OR_KEYWORD) for a in arguments.args),
    ]
    defaults: list[ast.expr | None] = [None] * (len(places) - len(arguments.defaults))
    defaults += arguments.defaults
    found = [_parameter(a, k, d) for (a, k), d in zip(places, defaults, strict=True)]
    if arguments.vararg is not None:
        found.append(_parameter(arguments.vararg, kind.VAR_POSITIONAL, None))
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        found.append(_parameter(argument, kind.KEYWORD_ONLY, default))
    if arguments.kwarg is not None:
        found.append(_parameter(arguments.kwarg, kind.VAR_KEYWORD, None))
    return inspect.Signature(found[int(method) :])


def _parameter(argument: ast.arg, kind: Any, default: ast.expr | None) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    written = argument.annotation
    value: Any = empty
    if default is not None:
        is_none = isinstance(default, ast.Constant) and default.value is None
        value = None if is_none else _Written(ast.unparse(default))
    return inspect.Parameter(
        argument.arg,
        kind,
        default=value,
        annotation=empty if written is None else _Written(ast.unparse(written)),
    )
