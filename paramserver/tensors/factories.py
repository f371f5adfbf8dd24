"""Makes what the settings name, from the arguments that stand beside the name."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from paramserver.errors import UserError
from paramserver.tensors.annotations import misfit
from paramserver.words import nearest, printable

ROOT = Path(__file__).resolve().parents[2]
NOT_THEIRS = (Path(torch.__file__).parent, ROOT / "paramserver", ROOT / "workers")


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
            f"{name} cannot be built from these arguments: {told(fault)}", taken_by(name, factory)
        ) from fault


def check(
    group: str, name: str, factory: Callable[..., Any], arguments: Mapping[str, Any], first: int = 0
) -> None:
    """Raise `UserError` for an argument that is unknown, missing or of another type.

    The `first` parameters are no settings: the program gives them.
    """
    signature = signature_of(factory)
    if signature is None:
        return
    parameters = list(signature.parameters.values())[first:]
    named = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hint = taken_by(name, factory)
    for key, value in arguments.items():
        if key in named:
            is_default = value is named[key].default  # None of a number, as torch has it
            must = None if is_default else misfit(value, named[key].annotation)
            if must is not None:
                raise UserError(f"{group}.{key} must be {must}, not {value!r}", hint)
        elif not takes_any:
            raise UserError(
                f"{group}.{key} is no argument of {name}", did_you_mean(str(key), named, hint)
            )
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in arguments:
            raise UserError(f"{group}.{key} is missing", hint)


def takes(factory: Callable[..., Any], argument: str) -> bool:
    """Whether it has a parameter of that name."""
    signature = signature_of(factory)
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


def _as_annotated(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Turn lists of YAML into tensors where the parameter is annotated so: the weights of
    classes."""
    signature = signature_of(factory)
    converted = dict(arguments)
    for key, value in arguments.items():
        parameter = None if signature is None else signature.parameters.get(key)
        if isinstance(value, list) and parameter is not None and "Tensor" in str(parameter):
            converted[key] = torch.tensor(value)
    return converted


def signature_of(factory: Callable[..., Any]) -> inspect.Signature | None:
    """With annotations as objects if their names can be resolved; None where Python cannot tell."""
    for resolve in (True, False):
        try:
            return inspect.signature(factory, eval_str=resolve)
        except Exception:  # annotations are the user's code, and some callables have no signature
            continue
    return None


def taken_by(name: str, factory: Callable[..., Any]) -> str:
    """A hint: the arguments with their types and defaults."""
    signature = signature_of(factory)
    if signature is None:
        return ""
    return f"{name} takes {', '.join(map(str, signature.parameters.values())) or 'no arguments'}"
