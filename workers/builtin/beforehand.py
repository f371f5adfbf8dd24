"""Checks what the settings name before a server listens, downloads or makes a folder.

What is ours and torch's is tried with its arguments; a user's own is read, not imported
(`workers.builtin.reading`). What only a model with its samples shows, the observer says.
"""

from __future__ import annotations

from paramserver.settings import Settings

from . import reading

TRIED = ("model", "optimizer", "scheduler", "loss", "metric")
"""Settings whose values are tried with PyTorch. The default ones are right."""


def check(settings: Settings) -> None:
    """Raise `UserError` for the first name or argument that cannot be, and a device that is not
    here."""
    _try(settings)
    reading.check_own(settings)
    from . import builders

    builders.choose_device(settings.device)


def check_for_others(settings: Settings) -> None:
    """The same for a run on other machines, of which their devices and memory, and what is
    installed there, cannot be known. Without PyTorch here, only names, and arguments by their
    types."""
    reading.check(settings)  # takes no time, while PyTorch takes seconds
    if all(getattr(settings, name) == getattr(Settings(), name) for name in TRIED):
        return
    try:
        import torch  # noqa: F401
    except (ImportError, OSError):  # it is not here, or does not load: the machines have their own
        return
    _try(settings, here=False)


def _try(settings: Settings, *, here: bool = True) -> None:
    """Raise `UserError` for arguments that what is ours and torch's cannot be built from."""
    from paramserver.tensors import torch_names

    from . import models

    torch_names.check_named(settings)
    if ":" not in str(settings.model["type"]):
        models.check(dict(settings.model), here=here)
