"""Makes the object that a name in the settings, with its arguments, stands for.

`model.type`, `dataset.name`, `optimizer`, `scheduler`, `loss` and `metric` are each a name in a
table (of ours, or of torch's), or `package.module:Name` for one of your own; every other key beside
the name is an argument. An imported object must be a subclass of the wanted class, or a function
that is annotated to return one. Where the name came from the server, the object must be this
worker's own code (`workers.builtin.own_code`).
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from paramserver.errors import UserError
from paramserver.fleet.user_code import current_folder_first
from paramserver.words import nearest, no_such, printable

from .own_code import NOTHING, OwnCode

NOT_THEIRS = (Path(torch.__file__).parent, Path(__file__).parents[1])


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
        raise UserError(f"{setting} must be a name, not {name!r}", kinds)
    if ":" in name:
        return _imported(setting, name, wanted, is_a, code)
    if name not in known:
        raise no_such(setting, name, known)
    return known[name]


def make(
    group: str, name: str, factory: Callable[..., Any], arguments: Mapping[str, Any], *first: Any
) -> Any:
    """Call `factory(*first, **arguments)`; the arguments are the settings of that group.

    Lists become tensors where those are annotated. Raises `UserError` for an argument that is
    unknown, missing or of another type, and for whatever the factory raises.
    """
    check(group, name, factory, arguments, len(first))
    try:
        return factory(*first, **_as_annotated(factory, arguments))
    except UserError:
        raise
    except Exception as fault:  # any exception of a constructor is a fault of the settings
        raise UserError(
            f"{name} cannot be built from these arguments: {told(fault)}", _takes(name, factory)
        ) from fault


def returns(found: Any, wanted: Any) -> bool:
    """Whether it is a function that is annotated to return that class."""
    if not inspect.isfunction(found) or (signature := _signature(found)) is None:
        return False
    made = signature.return_annotation
    return isinstance(made, type) and issubclass(made, wanted)


def check(
    group: str, name: str, factory: Callable[..., Any], arguments: Mapping[str, Any], first: int = 0
) -> None:
    """Raise `UserError` for an argument that is unknown, missing or of another type.

    The `first` parameters are no settings: the program gives them.
    """
    signature = _signature(factory)
    if signature is None:
        return
    parameters = list(signature.parameters.values())[first:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hint = _takes(name, factory)
    for key, value in arguments.items():
        if key in named:
            kind = named[key].annotation
            if not _fits(value, kind):
                raise UserError(f"{group}.{key} must be {kind.__name__}, not {value!r}", hint)
        elif not takes_any:
            raise UserError(
                f"{group}.{key} is no argument of {name}", did_you_mean(str(key), named, hint)
            )
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise UserError(f"{group}.{key} is missing", hint)


def takes(factory: Callable[..., Any], argument: str) -> bool:
    """Whether it has a parameter of that name."""
    signature = _signature(factory)
    return signature is not None and argument in signature.parameters


def told(fault: BaseException) -> str:
    """An exception in one line; with file and line where it was raised in a file of the user."""
    text = printable(" ".join(str(fault).split()))
    frames = [
        frame
        for frame in traceback.extract_tb(fault.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in NOT_THEIRS)
    ]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(fault).__name__}: {text}{place}"


def did_you_mean(word: str, known: Iterable[str], rest: str = "") -> str:
    """A hint with the nearest known name, if one is near, and the rest."""
    near = nearest(word, known, alike=0.5)
    return f"did you mean {near}? {rest}" if near else rest


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
        problem = (
            f"there is no module {module_name!r}"
            if is_absent
            else f"importing {module_name!r} failed: {told(fault)}"
        )
        raise UserError(
            f"{setting}={name}: {problem}",
            "its file must be in this folder, or installed, on every machine of the run",
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
        raise UserError(
            f"{setting}={name} is neither a subclass of {is_a} nor a function annotated to "
            "return one"
        )
    return found


# ------------------------------------------------------------------------------------- arguments


def _fits(value: object, kind: object) -> bool:
    """Whether `value` may stand where `kind` is annotated; only plain types are checked."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str or kind is bool:
        return isinstance(value, kind)
    return True


def _as_annotated(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists of YAML into tensors where the parameter is annotated so: the weights of
    classes."""
    signature = _signature(factory)
    converted = dict(arguments)
    for key, value in arguments.items():
        parameter = None if signature is None else signature.parameters.get(key)
        if isinstance(value, list) and parameter is not None and "Tensor" in str(parameter):
            converted[key] = torch.tensor(value)
    return converted


def _signature(factory: Callable[..., Any]) -> inspect.Signature | None:
    """With annotations as objects if their names can be resolved; None where Python cannot tell."""
    for resolve in (True, False):
        try:
            return inspect.signature(factory, eval_str=resolve)
        except Exception:  # annotations are the user's code, and some callables have no signature
            continue
    return None


def _takes(name: str, factory: Callable[..., Any]) -> str:
    """A hint: the arguments with their types and defaults."""
    signature = _signature(factory)
    if signature is None:
        return ""
    return f"{name} takes {', '.join(map(str, signature.parameters.values())) or 'no arguments'}"
