"""Finds out at `attach` whether a replica's state can be sent, not when the first newcomer asks for
it. A state travels as text and bytes (`workers.replica.state`).

An error names the part that cannot be converted or loaded, and what to do about it.
"""

from __future__ import annotations

from typing import Any

from paramserver.errors import UserError
from paramserver.protocol.messages import HEADER_BYTES_MAX

from .state import flatten, unflatten

PLAIN = "numbers, texts, lists, dicts and tensors with bytes of their own"
HINTS = {
    "model": f"its state_dict() must be made of {PLAIN}; so must what get_extra_state() returns",
    "optimizer": f"its state_dict() must be made of {PLAIN}",
    "scheduler": f"its state_dict() must be made of {PLAIN}: leave functions out there, as torch's "
    "LambdaLR does",
    "after_step": f"what state_dict() of its object gives must be made of {PLAIN}",
}
"""The advice by part of a state, where that part cannot travel."""

TEXT_BYTES_MAX = HEADER_BYTES_MAX // 2
"""Bytes of JSON in a snapshot, at most: its header needs the remaining room for dtypes and
shapes."""


def stateful(function: Any) -> Any:
    """The object with a state of its own, to be loaded again, that a function belongs to or is: an
    averaged model, say. None where there is none."""
    for holder in (function, getattr(function, "__self__", None)):
        if callable(getattr(holder, "state_dict", None)) and callable(
            getattr(holder, "load_state_dict", None)
        ):
            return holder
    return None


def there_and_back(part: str, state: Any) -> Any:
    """A part of a replica's state as another replica would receive it; its tensors are not copies.

    Raises `UserError` where it cannot be sent.
    """
    try:
        text, tensors = flatten({part: state})
    except (TypeError, ValueError, RecursionError) as e:
        what = e if isinstance(e, TypeError) else f"the {part}'s state: {e}"
        raise UserError(
            f"{what}: it cannot be sent to a worker that comes later, nor stored", HINTS[part]
        ) from None
    if len(text) > TEXT_BYTES_MAX:
        raise UserError(
            f"the {part}'s state has {len(text)} bytes beside its tensors, at most "
            f"{TEXT_BYTES_MAX} can be sent to a worker that comes later",
            "keep long lists of numbers in tensors",
        )
    return unflatten(text, tensors)[part]
