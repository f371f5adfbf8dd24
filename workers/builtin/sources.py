"""What a user's own classes and functions take, read from their source files: nothing is imported.

A server says so what is wrong in the settings before it listens, and no module of a user's runs in
its process. Only the observer and the workers import it. Where only importing would tell, because a
name is bound by other means than a plain `class` or `def`, nothing is said here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

from paramserver.errors import UserError
from paramserver.fleet.user_code import current_folder_first
from paramserver.words import nearest

from . import registry
from .own_code import parsed, specs, statements

BOUND_AT_RUN_TIME = {"globals", "vars", "setattr", "exec", "__getattr__", "__path__", "modules"}
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


def read(setting: str, name: str, is_a: str) -> Source | None:
    """What the source file of `package.module:Name` defines; None where that cannot be read.

    `is_a` is what it must be or return, for sentences. Raises `UserError` where importing it would
    fail: no such module, no such name in it, no Python.
    """
    module, _, attribute = name.partition(":")
    with current_folder_first():
        path = list(specs(module))
        if any(_is_absent(spec) for spec in path):
            if _may_be_elsewhere(path):
                return None
            raise registry.no_module(setting, name)
    spec = path[-1]
    if not isinstance(spec.loader, SourceFileLoader) or spec.origin is None:
        return None
    tree = parsed(setting, name, Path(spec.origin))
    found = [node for node in statements(tree.body) if _defines(node, attribute)]
    if _is_bound_otherwise(tree, attribute) or len(found) > 1:
        return None
    if not found:
        near = nearest(attribute, _defined(tree))
        raise UserError(
            f"{setting}={name}: module {module} has no {attribute!r}",
            f"did you mean {near}?" if near else "",
        )
    [node] = found
    if isinstance(node, ast.ClassDef):
        signature = _of_class(node, tree)
        return None if signature is None else Source(signature, None)
    assert isinstance(node, Function)
    if node.decorator_list:
        return None
    if node.returns is None:
        raise registry.is_neither(setting, name, is_a)
    return Source(_of_function(node), ast.unparse(node.returns))


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


def _defines(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.ClassDef | Function) and node.name == name


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in statements(tree.body):
        if isinstance(node, ast.ClassDef | Function):
            yield node.name


def _is_bound_otherwise(tree: ast.Module, name: str) -> bool:
    """Whether the module may have this name from elsewhere than a `class` or `def`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if any((alias.asname or alias.name) in ("*", name) for alias in node.names):
                return True
        elif isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return True
        called = getattr(node, "id", None) or getattr(node, "attr", None)
        if (called or getattr(node, "name", None)) in BOUND_AT_RUN_TIME:
            return True
    return False


# --------------------------------------------------------------------------------- its signature


def _of_class(node: ast.ClassDef, tree: ast.Module) -> inspect.Signature | None:
    """What its constructor takes; None where that is another's, or changed by a decorator."""
    if node.decorator_list or node.keywords:
        return None
    own = {n.name: n for n in statements(node.body) if isinstance(n, Function)}
    if "__new__" in own:
        return None
    init = own.get("__init__")
    if init is not None:
        return None if init.decorator_list else _of_function(init, method=True)
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
