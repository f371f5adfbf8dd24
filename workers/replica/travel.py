"""Can a replica's state travel? `attach` finds out, not the first newcomer.

A state travels as text and bytes (`workers.replica.state`). What cannot be turned into these, or
cannot be loaded from them, is named with what to do about it.
"""

from __future__ import annotations

from typing import Any

from paramserver.errors import UserError
from paramserver.protocol.messages import HEADER_BYTES_MAX
from workers.replica.state import flatten, unflatten

PLAIN = "numbers, texts, lists, dicts and tensors with bytes of their own"
HINTS = {
    "model": f"its state_dict() must be made of {PLAIN}; so must what get_extra_state() returns",
    "optimizer": f"its state_dict() must be made of {PLAIN}",
    "scheduler": f"its state_dict() must be made of {PLAIN}: leave functions out there, as torch's "
    "LambdaLR does",
}
"""By part of a state: what to do about what cannot travel."""

TEXT_BYTES_MAX = HEADER_BYTES_MAX // 2
"""Of what is no tensor, in a snapshot: its header needs the rest for dtypes and shapes."""


def there_and_back(part: str, state: Any) -> Any:
    """A part of a replica's state as it would arrive; its tensors are no copies.

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
