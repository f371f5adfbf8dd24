"""Reads the metadata of a file of weights, without torch: is the file complete, and of which step?

Checkpoints and model.safetensors are safetensors files: eight bytes with the length of a header,
the header as JSON, then the numbers. The header says where they end, so the size shows that a file
was cut off or is empty.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

FORMAT = "paramserver checkpoint 1"
MODEL_FORMAT = "pt"
STEPS_MAX = 10**12  # a thousand a second for thirty years
HEADER_BYTES_MAX = 100_000_000  # the most that safetensors reads itself
STEP_DIGITS_MAX = 13


def name(step: int) -> str:
    """The name of a checkpoint's file."""
    return f"step-{step:08d}.safetensors"


class Broken(Exception):
    """This file cannot be used; the text says why."""


class _Entry(msgspec.Struct):
    data_offsets: tuple[int, int]


def read(path: Path) -> dict[str, str]:
    """The metadata of a file that is complete, as far as its size shows. Raises `Broken`."""
    try:
        if path.is_dir():
            raise Broken("it is a folder")
        if path.exists() and not path.is_file():  # a pipe would be waited for, without end
            raise Broken("it is not a file")
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_BYTES_MAX, size - 8):
                raise Broken(f"its {size} bytes are no safetensors file, or the rest of one")
            raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
            metadata = raw.pop("__metadata__", msgspec.Raw(b"{}"))
            ends = [msgspec.json.decode(e, type=_Entry).data_offsets[1] for e in raw.values()]
            told = msgspec.json.decode(metadata, type=dict[str, str])
    except OSError as e:
        raise Broken(e.strerror or str(e)) from None
    except (ValueError, RecursionError) as e:
        raise Broken(f"its header cannot be read: {e}") from None
    whole = 8 + length + max(ends, default=0)
    if size != whole:
        raise Broken(f"it has {size} bytes of {whole}")
    return told


def step(path: Path, format: str = FORMAT) -> int:
    """The step of a complete file of that format. Raises `Broken`."""
    told = read(path)
    if told.get("format") != format:
        raise Broken("it is not a checkpoint of this program")
    return step_of(told)


def newest_whole(folder: Path, but: Path | None = None) -> Path | None:
    """The complete checkpoint of the highest step in a folder, except `but`."""
    for path in sorted(folder.glob("step-*.safetensors"), reverse=True):
        if path != but:
            try:
                step(path)
            except Broken:
                continue
            return path
    return None


def step_of(metadata: dict[str, str], key: str = "step") -> int:
    """The step in a file's metadata: of optimizer steps; with the key "update", where there is one,
    that of the log. Raises `Broken` for impossible ones."""
    text = metadata.get(key, metadata.get("step", ""))
    if not (text.isascii() and text.isdigit() and len(text) <= STEP_DIGITS_MAX):
        raise Broken(f"its step is {text[:40]!r}")
    if int(text) > STEPS_MAX:
        raise Broken(f"its step is {text}: no run has so many")
    return int(text)
