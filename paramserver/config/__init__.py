"""What can be set, and how it is read from files and the command line."""

from typing import Any


def __getattr__(name: str) -> Any:
    """The functions of `loading` by their former names, which scripts import. Loaded when one is
    asked for, as OmegaConf takes a while."""
    if name not in ("from_wire", "load", "save", "to_wire"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from paramserver.config import loading

    return getattr(loading, name)
