"""Which values of YAML fit the annotation of an argument: numbers, text, lists and mappings.

An annotation may be an object, or text that cannot be resolved here, like those of torch's that
name what is imported for type checkers only. What is not known here is not judged.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a value may be: a test, and the words behind "must be" and behind "a list of"."""

    holds: Callable[[object], bool]
    one: str
    many: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    """A number, or lists of them: what becomes a tensor."""
    return all(map(_are_numbers, value)) if isinstance(value, list) else _is_number(value)


PLAIN = {
    "int": Kind(lambda v: _is_number(v) and isinstance(v, int), "a whole number", "whole numbers"),
    "float": Kind(_is_number, "a number", "numbers"),
    "str": Kind(lambda v: isinstance(v, str), "text", "texts"),
    "bool": Kind(lambda v: isinstance(v, bool), "true or false", "true or false"),
    "None": Kind(lambda v: v is None, "null", "null"),
    "Tensor": Kind(
        lambda v: isinstance(v, list) and _are_numbers(v), "a list of numbers", "numbers"
    ),
    "list": Kind(lambda v: isinstance(v, list), "a list", "lists"),
    "dict": Kind(lambda v: isinstance(v, dict), "a mapping", "mappings"),
}
PLAIN |= {"tuple": PLAIN["list"], "List": PLAIN["list"], "Tuple": PLAIN["list"]}
LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable", "Collection"}


def misfit(value: object, annotation: object) -> str | None:
    """What it must be, where `value` does not fit `annotation`: "a list of whole numbers"."""
    kind = _kind(_parsed(_text(annotation)))
    return None if kind is None or kind.holds(value) else kind.one


def _text(annotation: object) -> str:
    """As it is written in a source file."""
    if isinstance(annotation, type):
        return annotation.__name__ if annotation.__module__ in ("builtins", "torch") else ""
    return "None" if annotation is None else str(annotation)


def _parsed(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _kind(node: ast.expr | None) -> Kind | None:
    """What this annotation means; None where that is not known."""
    if isinstance(node, ast.Constant):
        return _kind(_parsed(node.value)) if isinstance(node.value, str) else PLAIN.get("None")
    if isinstance(node, ast.BinOp):
        return _either([node.left, node.right])
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _generic(_name(node.value), inner)
    return PLAIN.get(_name(node))


def _name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Attribute):  # typing.Any
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _generic(name: str, inner: list[ast.expr]) -> Kind | None:
    if name in ("Optional", "Union"):
        return _either([*inner, ast.Constant(None)] if name == "Optional" else inner)
    if name == "Literal":
        values = [n.value for n in inner if isinstance(n, ast.Constant)]
        words = " or ".join(map(str, values))
        return Kind(lambda v: v in values, words, words) if len(values) == len(inner) else None
    if name in ("dict", "Dict", "Mapping"):
        return PLAIN["dict"]
    if name not in LISTS:
        return None
    is_tuple = name in ("tuple", "Tuple")
    endless = len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...
    if is_tuple and not endless:
        return _of_each([_kind(n) for n in inner])
    each = _kind(inner[0])
    if each is None:
        return PLAIN.get(name)
    return Kind(
        lambda v: isinstance(v, list) and all(map(each.holds, v)),
        f"a list of {each.many}",
        "lists",
    )


def _of_each(kinds: list[Kind | None]) -> Kind:
    """A list of just so many, each of its kind."""

    def holds(value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) == len(kinds)
            and all(k is None or k.holds(v) for k, v in zip(kinds, value, strict=True))
        )

    many = {k.many if k is not None else "" for k in kinds}
    return Kind(
        holds, f"a list of {len(kinds)} {many.pop() if len(many) == 1 else ''}".rstrip(), ""
    )


def _either(nodes: list[ast.expr]) -> Kind | None:
    """What fits one of these; not known where one of them is not."""
    kinds = [kind for kind in map(_kind, nodes) if kind is not None]
    if len(kinds) < len(nodes):
        return None
    one, many = (" or ".join(dict.fromkeys(words)) for words in zip(
        *((k.one, k.many) for k in kinds), strict=True
    ))  # fmt: skip
    return Kind(lambda v: any(k.holds(v) for k in kinds), one, many)
