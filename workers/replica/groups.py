"""Values of an optimizer's parameter groups that a loop sets by hand: a learning rate, say.

They are part of the log: an update brings those that one worker's loop has changed
(`Close.groups`), and every replica sets them before its optimizer steps. What else a loop did to
its groups is put back then, so that replicas stay equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from paramserver.errors import UserError
from paramserver.protocol.messages import GROUPS_MAX, Groups, Value

TEXT_MAX, NUMBERS_MAX, VALUES_MAX = 64, 16, 64  # of a value, and of a group; see `Groups`


class ByHand:
    """Compares the groups of an optimizer with what they were at the last update."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._noted: list[dict[str, Any]] = []
        self.note()

    def note(self) -> None:
        """The values are those of the log, as of this step."""
        self._noted = [_copy(group) for group in self._optimizer.param_groups]

    def digests(self, most: int) -> dict[str, str]:
        """A short hash of the values of each name, in all groups, as of the last update."""
        names = dict.fromkeys(name for group in self._noted for name in group if name != "params")
        found = {}
        for name in list(names)[:most]:
            values = [group.get(name) for group in self._noted]
            told = [repr(v) if isinstance(v, _KINDS) else type(v).__name__ for v in values]
            found[str(name)[:64]] = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        return found

    def changed(self) -> Groups:
        """The values that were changed since `note`, by the number of the group. Raises `UserError`
        for one that cannot be sent."""
        found: Groups = {}
        pairs = zip(self._optimizer.param_groups, self._noted, strict=False)
        for number, (group, noted) in enumerate(pairs):
            if _equal(group, noted):
                continue
            values = {
                name: _sendable(name, value)
                for name, value in group.items()
                if name in noted and name != "params" and not _same(value, noted[name])
            }
            if values:
                found[number] = values
        if len(found) > GROUPS_MAX or any(len(values) > VALUES_MAX for values in found.values()):
            raise UserError("too many values of parameter groups were changed in one step")
        return found

    def put(self, values: Groups) -> None:
        """Set these values, and put back what else was changed since `note`. Those that do not fit
        here, which no replica of this recipe has sent, are left out."""
        pairs = zip(self._optimizer.param_groups, self._noted, strict=False)
        for group, noted in pairs:
            if not _equal(group, noted):
                for name, value in noted.items():
                    if name != "params" and not _same(group.get(name), value):
                        _set(group, name, value)
        self.set(values)

    def set(self, values: Groups) -> None:
        """Set these values, where they fit."""
        groups = self._optimizer.param_groups
        for number, changes in values.items():
            if 0 <= number < len(groups):
                for name, value in changes.items():
                    if name != "params" and _fits(value, groups[number].get(name)):
                        _set(groups[number], name, value)


def shown(groups: Mapping[int, Mapping[str, Value]]) -> str:
    """Some changed values as a phrase: those of the first group that has any."""
    for number, values in groups.items():
        told = ", ".join(f"{name} to {_told(value)}" for name, value in list(values.items())[:3])
        return f"{told} in group {number}" if number or len(groups) > 1 else told
    return "nothing"


def _told(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _copy(group: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they are now: numbers of tensors, and copies of lists."""
    copied = dict(group)
    for name, value in group.items():
        if name != "params" and (isinstance(value, list | Tensor)):
            copied[name] = _plain(value)
    return copied


def _equal(group: Mapping[str, Any], noted: Mapping[str, Any]) -> bool:
    """Are all of them the same objects, or equal numbers? Where it is not clear, no."""
    try:
        return group.keys() == noted.keys() and all(
            value is noted[name] or (type(value) is float and value == noted[name])
            for name, value in group.items()
        )
    except (TypeError, ValueError, RuntimeError):
        return False


def _same(value: Any, noted: Any) -> bool:
    """Is it the noted value?"""
    value = _plain(value)
    if value is noted:
        return True
    if isinstance(value, _KINDS) and isinstance(noted, _KINDS):
        return type(value) is type(noted) and value == noted
    return False


_KINDS = (bool, int, float, str, tuple)


def _plain(value: Any) -> Any:
    """A value as it travels: tensors and numpy's numbers become Python's, lists tuples."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return value


def _sendable(name: str, value: Any) -> Value:
    """The value, if it can be sent."""
    plain = _plain(value)
    numbers = plain if isinstance(plain, tuple) else (plain,)
    if isinstance(plain, tuple) and len(plain) <= NUMBERS_MAX and all(map(_is_number, numbers)):
        pass
    elif isinstance(plain, str) and len(plain) <= TEXT_MAX:
        return plain
    elif not (plain is None or _is_number(plain)):
        raise UserError(
            f"{name} of a parameter group was set to a {type(value).__name__}, which the other "
            "workers cannot be sent",
            "set numbers there, or give attach() an optimizer that has it already",
        )
    if not all(math.isfinite(n) for n in numbers if n is not None):
        raise UserError(f"{name} of a parameter group was set to {plain}", "is it divided by zero?")
    result: Value = plain
    return result


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _fits(value: Value, there: Any) -> bool:
    """May this value, which came with an update, replace the one that is there?"""
    there = _plain(there)
    if isinstance(there, tuple):
        return isinstance(value, tuple) and len(value) == len(there)
    if isinstance(there, bool) or there is None or value is None:
        return there is None or value is None or isinstance(value, bool)
    if _is_number(there):
        return _is_number(value)
    return isinstance(there, str) and isinstance(value, str)


def _set(group: dict[str, Any], name: str, value: Any) -> None:
    there = group.get(name)
    if isinstance(there, Tensor) and _is_number(value):
        there.fill_(value)
    elif isinstance(there, list) and isinstance(value, tuple):
        group[name] = list(value)
    else:
        group[name] = value
