"""Checkpoints: a replica's whole state in one safetensors file, written whole or not at all.

The tensors are stored under their numbers in `workers.replica.state.flatten`, the rest of the tree,
step, lineage and settings as text in the file's metadata. No pickle. Tensors of a dtype that
safetensors does not know are stored as their bytes, with one more dimension:
`tensor.view(dtype).squeeze(-1)` gives them back, and the metadata name these dtypes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as pack
from torch import Tensor

from paramserver import drafts
from paramserver.errors import UserError
from paramserver.output import stored
from paramserver.output.stored import FORMAT, MODEL_FORMAT, STEPS_MAX, name

from .replica import Replica
from .state import DTYPES, as_bytes, dtype_name, flatten, unflatten

__all__ = ["STEPS_MAX", "Checkpoint", "load", "name", "prune", "save", "save_model", "with_room"]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file: the tree for `Replica.load`, with run, step (of the log), lineage and
    settings."""

    state: dict[str, Any]
    step: int
    lineage: str
    run: str
    settings: dict[str, Any]


def save(path: Path, replica: Replica, run: str, settings: dict[str, Any]) -> None:
    """Write a checkpoint. Raises OSError, and then leaves a file that was there before
    unchanged."""
    tree, tensors = flatten(replica.state())
    metadata = {
        "format": FORMAT,
        "tree": tree,
        "step": str(replica.steps),
        "update": str(replica.step),
        "lineage": replica.lineage,
        "run": run,
        "settings": json.dumps(settings),
    }
    _write({str(i): t for i, t in enumerate(tensors)}, path, metadata)


def save_model(path: Path, state: dict[str, Any], step: int) -> None:
    """Write the weights alone, by their names in this state of a model. Entries that are no
    tensors are left out, and named in the metadata (`left_out`); checkpoints have them."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    metadata = {"format": MODEL_FORMAT, "step": str(step)}
    if left_out := [key for key in state if key not in tensors]:
        metadata["left_out"] = json.dumps(left_out)
    _write(tensors, path, metadata)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises `UserError` for a file that is not one."""
    try:
        stored.step(path)
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            dtypes = json.loads(metadata.get("dtypes", "{}"))
            tensors = [f.get_tensor(str(i)) for i in range(len(f.keys()))]
            for key, dtype in dtypes.items():
                as_bytes = tensors[int(key)].clone()  # its memory is aligned for every dtype
                tensors[int(key)] = as_bytes.view(DTYPES[dtype]).squeeze(-1)
        return Checkpoint(
            state=unflatten(metadata["tree"], tensors),
            step=stored.step_of(metadata, "update"),
            lineage=_lineage(metadata["lineage"]),
            run=metadata["run"],
            settings=_mapping(json.loads(metadata["settings"])),
        )
    except stored.Broken as e:
        raise UserError(f"the checkpoint {path} cannot be resumed: {e}") from None
    except _UNREADABLE as e:
        raise UserError(f"the checkpoint {path} cannot be read: {e}") from None


_UNREADABLE = (
    OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError,
    RuntimeError, RecursionError,
)  # fmt: skip


def _lineage(text: str) -> str:
    if not re.fullmatch(r"[0-9a-zA-Z-]{1,64}", text):
        raise ValueError(f"its lineage is {text[:40]!r}")
    return text


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it holds no settings")
    return value


def prune(folder: Path, keep: int, newest: Path) -> None:
    """Remove all but the newest `keep` checkpoints, `newest` among them, and drafts that no process
    writes any more."""
    drafts.sweep(folder)
    others = sorted(path for path in folder.glob("step-*.safetensors") if path != newest)
    for old in others[: len(others) - (keep - 1)]:
        old.unlink(missing_ok=True)


def with_room(write: Callable[[], None], folder: Path) -> list[str]:
    """Call `write`; where the disk is full, remove checkpoints in `folder`, the oldest first, until
    it has room. The newest whole one stays. Returns the names of those removed.

    Raises OSError.
    """
    removed: list[str] = []
    while True:
        try:
            write()
            return removed
        except OSError as error:
            if error.errno not in drafts.FULL:
                raise
            drafts.sweep(folder)
            stays = stored.newest_whole(folder)
            old = next((p for p in sorted(folder.glob("step-*.safetensors")) if p != stays), None)
            if old is None:
                raise
            old.unlink()
            removed.append(old.name)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all. Tensors with larger numbers come first, so that each
    is aligned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    separate = _separate(tensors)
    dtypes = {k: dtype_name(t.dtype) for k, t in separate.items() if _name_of(t.dtype) is None}
    for key in dtypes:
        separate[key] = separate[key].unsqueeze(-1).view(torch.uint8)
    if dtypes:
        metadata = {**metadata, "dtypes": json.dumps(dtypes)}
    header: dict[str, Any] = {"__metadata__": metadata}
    ordered, start = sorted(separate, key=lambda k: (-separate[k].element_size(), k)), 0
    for key in ordered:
        t = separate[key]
        stop = start + t.numel() * t.element_size()
        header[key] = {
            "dtype": _name_of(t.dtype),
            "shape": list(t.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with drafts.draft(path, 8 + len(text) + start) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in ordered:
            if separate[key].numel():
                file.write(as_bytes(separate[key]).numpy())


@cache
def _name_of(dtype: torch.dtype) -> str | None:
    """The installed safetensors' name of this dtype; None where it has none."""
    try:
        packed = pack({"": torch.empty((), dtype=dtype)})
    except (SafetensorError, KeyError):
        return None
    header = json.loads(packed[8 : 8 + int.from_bytes(packed[:8], "little")])
    return str(header[""]["dtype"])


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors stores no two names for one memory (tied weights): give each its own."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        pointer = own.untyped_storage().data_ptr()
        if pointer in seen or own.untyped_storage().nbytes() != own.numel() * own.element_size():
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        result[key] = own
    return result
