"""Checkpoints: a replica's whole state in one safetensors file, written whole or not at all.

The tensors are stored under their numbers in `workers.state.flatten`, the rest of the tree, step,
lineage and settings as text in the file's metadata. No pickle.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paramserver.errors import UserError
from workers.replica import Replica
from workers.state import flatten, unflatten

FORMAT = "paramserver checkpoint 1"


@dataclass(frozen=True)
class Checkpoint:
    """What a file held: the tree for `Replica.load`, and where it belongs."""

    state: dict[str, Any]
    step: int
    lineage: str
    run: str
    settings: dict[str, Any]


def name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def save(path: Path, replica: Replica, run: str, settings: dict[str, Any]) -> None:
    """Write a checkpoint. Raises OSError, and leaves what was there before as it was."""
    tree, tensors = flatten(replica.state())
    metadata = {
        "format": FORMAT,
        "tree": tree,
        "step": str(replica.step),
        "lineage": replica.lineage,
        "run": run,
        "settings": json.dumps(settings),
    }
    _write({str(i): t for i, t in enumerate(tensors)}, path, metadata)


def save_model(path: Path, replica: Replica) -> None:
    """Write the weights alone, by their names in the model's state_dict."""
    _write(dict(replica.state()["model"]), path, {"format": "pt", "step": str(replica.step)})


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises `UserError` for a file that is not one."""
    try:
        with safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is not a checkpoint of this program")
            tensors = [f.get_tensor(str(i)) for i in range(len(f.keys()))]
        return Checkpoint(
            state=unflatten(metadata["tree"], tensors),
            step=int(metadata["step"]),
            lineage=metadata["lineage"],
            run=metadata["run"],
            settings=json.loads(metadata["settings"]),
        )
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise UserError(f"the checkpoint {path} cannot be read: {e}") from None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and the drafts of writers that are no more."""
    for draft in folder.glob("*.tmp"):
        writer = draft.name.split(".")[-2]
        if not (writer.isdigit() and psutil.pid_exists(int(writer))):
            draft.unlink(missing_ok=True)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink(missing_ok=True)


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Beside its place first, on the disk for sure, then into its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            save_file(_separate(tensors), temporary, metadata)
        except SafetensorError as e:
            raise OSError(str(e)) from None
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
