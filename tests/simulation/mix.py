"""What schedules are made of: how often each kind of them comes, and `--only` for narrow ones.

A rare mistake needs two or three rare things at once. A few thousand schedules that all have these
find it sooner than hundreds of thousands of all kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mix:
    """Of how many schedules something is a part, as a share, or each so many seeds."""

    liars_every: int = 4
    """A liar."""
    speed_every: int = 5
    """Shares follow speed."""
    local_every: int = 7
    """Rounds have local steps."""
    late: float = 0.4
    """Late work is carried over: where order does not matter, without local steps."""
    pairs: float = 0.2
    """Several pairs take turns: with several buckets, without a liar and local steps."""
    own: float = 0.1
    """Workers bring samples of their own: without a liar."""
    hangs: float = 0.5
    """After the faults all who have samples hang, and beat, as soon as there is somebody who got
    none: where shares follow speed."""
    homeward: float = 0.06
    """All workers leave in order at some time, and stay away."""
    moves: float = 0.2
    """Of the times that a server is started again: on another port."""
    machines: float = 0.3
    """Whole machines stop, and go on: with shards."""
    small: bool = False
    """Few samples."""


NEVER = 10**9
ONLY: dict[str, dict[str, Any]] = {
    "late": {"late": 1.0, "local_every": NEVER},
    "pairs": {"pairs": 1.0, "local_every": NEVER},
    "local": {"local_every": 1},
    "speed": {"speed_every": 1},
    "hang": {"hangs": 1.0, "speed_every": 1},
    "liar": {"liars_every": 1},
    "honest": {"liars_every": NEVER},
    "own": {"own": 1.0, "liars_every": NEVER},
    "home": {"homeward": 1.0, "liars_every": NEVER},
    "moves": {"moves": 1.0},
    "machines": {"machines": 1.0},
    "small": {"small": True},
}
"""What `--only` puts into every schedule."""


def only(kinds: str) -> Mix:
    """The mix of schedules that all have these kinds, joined by +. Raises `ValueError`."""
    mix: dict[str, Any] = {}
    for kind in kinds.split("+"):
        if kind not in ONLY:
            raise ValueError(f"{kind!r} is none of {', '.join(ONLY)}")
        mix |= ONLY[kind]
    return Mix(**mix)
