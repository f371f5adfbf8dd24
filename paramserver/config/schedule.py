"""Whether the schedule of the settings lasts as long as the run."""

from __future__ import annotations

import math

from paramserver.settings import DATASETS, Settings


def known_samples(settings: Settings) -> int | None:
    """How many samples the run trains with, where that is known without the data set."""
    return DATASETS.get(str(settings.dataset["name"]))


def too_short(settings: Settings, samples: int | None) -> str:
    """A sentence where OneCycleLR ends before a run of that many samples; else empty. Beyond its
    end the learning rate stays where it is, which is next to nothing."""
    given = settings.scheduler or {}
    if given.get("name") != "OneCycleLR" or not samples:
        return ""
    word, total = "total_steps", given.get("total_steps")
    if total is None:
        word = "epochs times scheduler.steps_per_epoch"
        epochs, each = given.get("epochs"), given.get("steps_per_epoch")
        total = epochs * each if isinstance(epochs, int) and isinstance(each, int) else None
    a_step = settings.num_workers * settings.batch_size
    steps = math.ceil(settings.num_epochs * samples / a_step)
    if not isinstance(total, int) or total >= steps:
        return ""
    return (
        f"scheduler.{word} is {total:,}, but this run has about {steps:,} steps (num_epochs="
        f"{settings.num_epochs} of {samples:,} samples, {a_step:,} a step): after step {total:,} "
        "the learning rate stays as low as it is at the end of OneCycleLR; "
        f"scheduler.total_steps={steps} fits"
    )
