"""The figures of a status in words: one place for the display, `make status` and `make watch`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from paramserver.output import metrics
from paramserver.status.value import Machine, Status
from paramserver.units import clock, per_second, size
from paramserver.words import printable

BETWEEN = 3
"""Cells between two figures in a line."""
BAR_CELLS_MIN, BAR_CELLS_MAX = 10, 60


def progress(status: Status) -> list[str]:
    """How far the run is: "step 812/1,120", "72 %", "0:03 left"."""
    words = [f"step {status.step:,}" + (f"/{status.total_steps:,}" if status.total_steps else "")]
    if (share := made(status)) is not None:
        words.append(f"{100 * share:3.0f} %")  # a bar beside it keeps its length
        if status.eta_s is not None and status.trains:
            words.append(f"{clock(status.eta_s)} left")
    return words


def made(status: Status) -> float | None:
    """The part of the steps that is made, 0 to 1; None where their number is not known."""
    return min(status.step / status.total_steps, 1.0) if status.total_steps else None


def figures(status: Status) -> list[str]:
    """The run's values, the most important first, for `fitting`."""
    found = [status.place] if status.place else []
    if status.loss is not None:
        found.append(f"loss {status.loss:.4f}")
    if status.samples_per_s is not None:
        found.append(f"{status.samples_per_s:,.0f} samples/s")
    if status.epoch is not None:
        of = f"/{status.num_epochs}" if status.num_epochs is not None else ""
        found.append(f"epoch {status.epoch}{of}")
    of = "" if status.val_step in (None, status.step) else f" (step {status.val_step:,})"
    found += [f"{figure}{of}" for figure in metrics.live(status.metrics)]
    if status.steps_per_s is not None:
        found.append(f"{per_second(status.steps_per_s)} steps/s")
    return found


def more_figures(status: Status) -> list[str]:
    """What a large screen has room for beside them."""
    found = [] if status.learning_rate is None else [f"lr {status.learning_rate:.3g}"]
    found.append(f"{size(status.sent_bytes_per_s)}/s out")
    found.append(f"{size(status.received_bytes_per_s)}/s in")
    return found


def fitting(words: Sequence[str], width: int) -> list[str]:
    """The first words that fit into `width` cells, `BETWEEN` apart; at least one."""
    fitted, used = list(words[:1]), cell_len(words[0]) if words else 0
    for word in words[1:]:
        used += BETWEEN + cell_len(word)
        if used > width:
            break
        fitted.append(word)
    return fitted


def beside_a_bar(words: Sequence[str], width: int) -> tuple[list[str], int]:
    """The first words that leave room for a bar in a line of `width` cells, and the cells of the
    bar; 0 where not even one word does."""
    words = list(words)
    while True:
        room = min(width - cell_len((" " * BETWEEN).join(words)) - 2, BAR_CELLS_MAX)
        if room >= BAR_CELLS_MIN or len(words) == 1:
            return words, room if room >= BAR_CELLS_MIN else 0
        words.pop()


def rate(machine: Machine) -> str:
    """The speed of a worker; empty where it is not known."""
    known = machine.samples_per_s
    return "" if known is None else f"{known:,.0f} samples/s"


def share(machine: Machine, status: Status) -> str:
    """The samples that a worker is given; empty where all get the same."""
    return "" if machine.share is None else f"{machine.share:,} a {status.shares_of}"


def of_machine(machine: Machine, status: Status) -> list[str]:
    """What is to be said of a worker in a line: its trouble, or else its speed; its share; how
    often it was late."""
    late = f"late {machine.late_rounds:,}x" if machine.late_rounds else ""
    words = (printable(machine.trouble) or rate(machine), share(machine, status), late)
    return [word for word in words if word]
