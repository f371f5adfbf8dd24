"""What a worker tells the shard that it starts, as a line of JSON on its standard input."""

from __future__ import annotations

import msgspec

LINGER_S = 5.0
"""So long a shard stays when its worker has left, while the server asks it for averages."""


class Orders(msgspec.Struct, frozen=True):
    """Where the server is, who the shard belongs to, and the run's settings about numbers."""

    host: str
    port: int
    address: str
    """Of this host, as the server's network knows it: there the shard listens."""
    server_key: str
    secret_key: str
    """In Z85; empty where the link to the server has no keys."""
    session: str
    secret: str
    """Of the worker."""
    codec: str
    codec_down: str
    topk_ratio: float
    bucket_mb: float
    min_bucket_mb: float | None
    history_mb: float
    heartbeat_timeout: float
    guarded: bool
    """The run has keys: what goes through channels is sealed."""
    shared_memory: bool
    """Use it with replicas on this host."""

    def __repr__(self) -> str:
        return f"Orders(host={self.host!r}, port={self.port}, session={self.session!r})"


__all__ = ["LINGER_S", "Orders"]
