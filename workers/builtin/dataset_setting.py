"""What the setting `dataset` says, of one of ours and of a user's own; without PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from paramserver.errors import UserError
from paramserver.settings import DATASETS
from paramserver.tensors import factories
from paramserver.words import quoted

VAL_SHARE = 0.1
_KEYS = ("name", "root")  # digits ignores root, so that dataset.name=digits alone selects it


def checked(dataset: dict[str, Any]) -> tuple[str, Path]:
    """Name and root folder of a data set of ours. Raises `UserError` for anything else in it."""
    for key in dataset:
        if key not in _KEYS:
            raise UserError(f"unknown setting dataset.{key}", _nearest(str(key), _KEYS))
    name, root = dataset.get("name"), dataset.get("root", "data")
    if not isinstance(name, str):
        raise UserError(
            f"dataset.name must be a name, not {quoted(name)}", f"known: {', '.join(DATASETS)}"
        )
    if name not in DATASETS:
        raise UserError(
            f"there is no data set {name!r} (dataset.name)",
            f"{_nearest(name, DATASETS)}, or package.module:Name for your own",
        )
    if not isinstance(root, str | os.PathLike):
        raise UserError(f"dataset.root must be a folder, not {quoted(root)}")
    return name, Path(os.path.expanduser(root))


def _nearest(word: str, known: Collection[str]) -> str:
    return factories.did_you_mean(word, known, f"known: {', '.join(known)}")


def parts(
    kind: Callable[..., Any], given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any] | None, float]:
    """What is `given` for a data set of this kind: its arguments, those of the validation set over
    them, if that is another one, and the share that is held out if not. Raises `UserError`."""
    arguments = dict(given)
    if not factories.takes(kind, "root"):
        arguments.pop("root", None)  # the setting has a default
    # Settings of ours, unless the class itself has an argument of that name.
    share = (
        VAL_SHARE if factories.takes(kind, "val_share") else arguments.pop("val_share", VAL_SHARE)
    )
    val = None if factories.takes(kind, "val") else arguments.pop("val", None)
    if not isinstance(share, float) or not 0 < share < 1:
        raise UserError(f"dataset.val_share must be between 0 and 1, not {quoted(share)}")
    if val is None and factories.takes(kind, "train") and "train" not in arguments:
        arguments["train"], val = True, {"train": False}
    if not isinstance(val, dict | None):
        raise UserError(f"dataset.val must be a mapping of arguments, not {quoted(val)}")
    return arguments, val, share
