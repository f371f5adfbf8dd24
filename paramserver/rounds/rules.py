"""The settings that decide about rounds."""

from __future__ import annotations

import msgspec

MAX_WAIT_TIMEOUTS = 3  # heartbeat timeouts that a derived wait is at most


class Rules(msgspec.Struct, frozen=True):
    """The settings that decide about rounds; times in seconds."""

    num_workers: int = 2
    min_workers: int = 1
    max_workers: int = 64
    timeout: float | None = None
    quorum: float = 0.5
    heartbeat_timeout: float = 10.0
    join_timeout: float = 60.0
    idle_timeout: float = 1800.0
    deterministic: bool = False
    shares: str = "equal"
    max_norm_ratio: float | None = None
    max_bad_rounds: int = 10
    epochs: int = 2
    observer: bool = True

    @property
    def longest_wait_s(self) -> float:
        """How long any round may wait for somebody, where others could go on."""
        longest = MAX_WAIT_TIMEOUTS * self.heartbeat_timeout
        return max(longest, self.timeout or 0.0)
