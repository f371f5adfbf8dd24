"""Finds the class or function that a name in the settings stands for.

`model.type`, `dataset.name`, `optimizer`, `scheduler`, `loss` and `metric` are each a name in a
table (of ours, or of torch's), or `package.module:Name` for one of your own; every other key beside
the name is an argument (`paramserver.tensors.factories`). An imported object must be a subclass of
the wanted class, or a function that is annotated to return one. Where the name came from the
server, the object must be this worker's own code (`workers.builtin.own_code`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from paramserver.errors import UserError
from paramserver.fleet.user_code import current_folder_first
from paramserver.tensors.factories import did_you_mean, signature_of, told
from paramserver.words import no_such, quoted

from .own_code import NOTHING, OwnCode

WHERE = "its file must be in this folder, or installed, on every machine of the run"


def find(
    setting: str,
    name: object,
    known: Mapping[str, Any],
    wanted: Any,
    is_a: str,
    code: OwnCode | None = NOTHING,
) -> Any:
    """The object that `name` stands for: a row of `known`, or imported where it has a colon.

    `setting` is where the name is written, `wanted` the class (or classes, as for `issubclass`)
    that must be meant; a sentence calls it `is_a`. `code` limits what may be imported; None allows
    any, for names from the user of this process. Raises `UserError`, with the nearest name that
    there is.
    """
    kinds = f"known: {', '.join(known)}, or package.module:Name for your own"
    if not isinstance(name, str):
        raise UserError(f"{setting} must be a name, not {quoted(name)}", kinds)
    if ":" in name:
        return _imported(setting, name, wanted, is_a, code)
    if name not in known:
        raise no_such(setting, name, known)
    return known[name]


def returns(found: Any, wanted: Any) -> bool:
    """Whether it is a function that is annotated to return that class."""
    if not inspect.isfunction(found) or (signature := signature_of(found)) is None:
        return False
    made = signature.return_annotation
    return isinstance(made, type) and issubclass(made, wanted)


# -------------------------------------------------------------------------- from name to callable


def _imported(setting: str, name: str, wanted: Any, is_a: str, code: OwnCode | None) -> Any:
    """The object at `module:attribute`, which must be or make the `wanted` class."""
    module_name, _, attribute = name.partition(":")
    try:
        with current_folder_first():
            if code is not None:
                code.admit(setting, name)
            module = importlib.import_module(module_name)
    except UserError:
        raise
    except Exception as fault:  # a user's module may raise anything
        is_absent = isinstance(fault, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{fault.name}."
        )
        if is_absent:
            raise no_module(setting, name) from fault
        raise UserError(
            f"{setting}={name}: importing {module_name!r} failed: {told(fault)}", WHERE
        ) from fault
    found = getattr(module, attribute, None)
    if found is None:
        raise UserError(
            f"{setting}={name}: module {module_name} has no {attribute!r}",
            did_you_mean(attribute, vars(module)),
        )
    if code is not None:
        code.check_defined(setting, name, found)
    is_one = isinstance(found, type) and issubclass(found, wanted)
    if not is_one and not returns(found, wanted):
        raise is_neither(setting, name, is_a)
    return found


def no_module(setting: str, name: str) -> UserError:
    """The error where the module of `name` is missing."""
    return UserError(f"{setting}={name}: there is no module {name.partition(':')[0]!r}", WHERE)


def is_neither(setting: str, name: str, is_a: str) -> UserError:
    """The error where `name` stands for something else than it must."""
    return UserError(
        f"{setting}={name} is neither a subclass of {is_a} nor a function annotated to return one"
    )
