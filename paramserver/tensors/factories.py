"""Makes what the settings name, from the arguments that stand beside the name.

PyTorch is imported only where something of it is made: arguments are checked without it, too.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from paramserver.errors import UserError
from paramserver.tensors.annotations import misfit
from paramserver.words import nearest, printable, quoted

ROOT = Path(__file__).resolve().parents[2]
OURS = (ROOT / "paramserver", ROOT / "workers")


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
            f"{name} cannot be built from these arguments: {told(fault)}",
            taken_by(name, factory, len(first)),
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
    hint = taken_by(name, factory, first)
    for key, value in arguments.items():
        if key in named:
            is_default = value is named[key].default  # None of a number, as torch has it
            must = None if is_default else misfit(value, named[key].annotation)
            if must is not None:
                raise UserError(f"{group}.{key} must be {must}, not {quoted(value)}", hint)
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
    """An exception in one line; with file and line where it was raised in a file of the user. Where
    torch says what is wrong with a value, only that."""
    text = printable(" ".join(str(fault).split()))
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    not_theirs = OURS if torch is None else (*OURS, Path(torch).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(fault.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in not_theirs)
    ]
    if text and not frames and isinstance(fault, ValueError):
        return text
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
            import torch

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


def taken_by(name: str, factory: Callable[..., Any], first: int = 0) -> str:
    """A hint: the arguments with their types and defaults, without the `first` ones."""
    signature = signature_of(factory)
    if signature is None:
        return ""
    taken = (_shown(p) for p in list(signature.parameters.values())[first:])
    return f"{name} takes {', '.join(taken) or 'no arguments'}"


def _shown(parameter: inspect.Parameter) -> str:
    """As it is written in a source, also where its annotation is a text."""
    written = parameter.annotation
    if not isinstance(written, str):
        return str(parameter)
    plain = str(parameter.replace(annotation=parameter.empty))
    name, _, default = plain.partition("=")
    return f"{name}: {written}" + (f" = {default}" if default else "")


# ---------------------------------------------------------------- what the groups have of their own


def with_rate(
    optimizer: Callable[..., Any], given: Mapping[str, Any], learning_rate: float
) -> dict[str, Any]:
    """The arguments of an optimizer, those that are `given` and its `lr`. Raises `UserError` where
    `lr` is given."""
    if "lr" in given:
        raise UserError("optimizer.lr is a setting of its own", f"learning_rate={given['lr']}")
    rate = {"lr": learning_rate} if takes(optimizer, "lr") else {}
    return {**given, **rate}


def is_given_optimizer(name: object, scheduler: Callable[..., Any]) -> bool:
    """Is the optimizer the first argument of this scheduler? Schedulers of many have theirs."""
    return takes(scheduler, "optimizer") and name != "ChainedScheduler"


def check_mean(group: str, arguments: Mapping[str, Any]) -> None:
    """Raise `UserError` for a loss or a metric that is no mean."""
    if arguments.get("reduction", "mean") != "mean":
        raise UserError(
            f"{group}.reduction={arguments['reduction']}: it must be a mean",
            "gradients of workers are averaged by their samples",
        )


def with_those_within(group: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A group of settings, and those of the schedules in it; nothing of none."""
    if group is not None:
        yield group
        inner = group.get("schedulers")
        for each in inner if isinstance(inner, list) else ():
            if isinstance(each, dict):
                yield from with_those_within(each)


def follows_a_metric() -> UserError:
    return UserError(
        "ReduceLROnPlateau follows a metric that differs between replicas",
        "use a schedule that is a function of the step",
    )
