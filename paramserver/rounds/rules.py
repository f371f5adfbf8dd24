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
    shards: int | None = 1
    """Processes that average, at most; None: one for each host, from three hosts on."""
    averages_alone: str = ""
    """Why the server averages alone although several could, see `Settings`."""
    leaves_out: str = ""
    """The codec of averages, where it leaves out of one what goes into the next."""
    local_steps: int | str = 1
    local_warmup_steps: int = 0
    overlap: bool = False
    max_staleness: int = 0
    max_norm_ratio: float | None = None
    max_bad_rounds: int = 10
    epochs: int = 2
    epoch_barrier: bool = False
    observer: bool = True
    more: bool = False
    """The server goes on with another run after this one."""

    def longest_wait_s(self, local_steps: int = 1) -> float:
        """How long any round may wait for somebody, where others could go on. One of several local
        steps may take minutes."""
        longest = MAX_WAIT_TIMEOUTS * self.heartbeat_timeout
        if local_steps > 1:
            longest = max(longest, self.idle_timeout / 2)
        return max(longest, self.timeout or 0.0)
