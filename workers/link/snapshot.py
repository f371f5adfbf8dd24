"""The two ends of a snapshot: a replica's whole state, piece by piece from one peer to another.

The server passes the messages on and keeps nothing of them; see "Snapshots" in docs/protocol.md.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import psutil
import torch
from torch import Tensor

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire

from ..replica.replica import Replica
from ..replica.state import DTYPES, as_bytes, dtype_name, empty, flatten, pieces

FLOOR_BYTES = 64 * 2**20
MOMENTS = 8  # numbers of optimizer state per element, at most
SQUARES = 4  # matrices of optimizer state per dimension (Shampoo, SOAP)
NUMBER_BYTES = 8


def most_bytes(replica: Replica) -> int:
    """The largest size of a state with this replica's layout, with any optimizer; at most the
    memory of this machine."""
    numbers = 0
    for tensor in replica.tensors():
        squares = sum(d * d for d in tensor.shape)
        numbers += (1 + MOMENTS) * tensor.numel() + SQUARES * squares
    # a complex number counts as two
    return min(FLOOR_BYTES + 2 * NUMBER_BYTES * numbers, psutil.virtual_memory().total)


class _Pieces:
    """The pieces of a state's `buffers`, and the digest of the whole."""

    def __init__(self, tree: str, buffers: list[Tensor], piece_bytes: int) -> None:
        self.tree, self.buffers = tree, buffers
        self.pieces = pieces([b.numel() for b in buffers], piece_bytes)
        self._sum, self._summed = hashlib.sha256(), 0

    def content(self, piece: int) -> Any:
        tensor, start, stop = self.pieces[piece]
        return self.buffers[tensor][start:stop].numpy().data

    def add_up_to(self, stop: int) -> None:
        """Add the pieces before `stop` to the digest. Each is added while others are on their
        way."""
        for piece in range(self._summed, stop):
            self._sum.update(self.content(piece))
        self._summed = max(self._summed, stop)

    def digest(self) -> str:
        self.add_up_to(len(self.pieces))
        whole = self._sum.copy()
        whole.update(self.tree.encode())
        return whole.hexdigest()


class Giving(_Pieces):
    """A snapshot of this replica that another one takes piece by piece."""

    def __init__(self, number: int, replica: Replica) -> None:
        self.number = number
        tree, tensors = flatten(replica.state())
        self.shapes = tuple((dtype_name(t.dtype), tuple(t.shape)) for t in tensors)
        self.piece_bytes = replica.plan.largest_bytes
        super().__init__(tree, [as_bytes(t) for t in tensors], self.piece_bytes)

    def manifest(self, replica: Replica) -> wire.Manifest:
        return wire.Manifest(
            snapshot=self.number,
            step=replica.step,
            lineage=replica.lineage,
            tree=self.tree,
            tensors=self.shapes,
            piece_bytes=self.piece_bytes,
        )

    def give(self, piece: int) -> tuple[wire.Piece, Any]:
        if not 0 <= piece < len(self.pieces):
            raise PeerError(f"there is no piece {piece}")
        self.add_up_to(piece + 1)
        digest = self.digest() if piece == len(self.pieces) - 1 else ""
        return wire.Piece(snapshot=self.number, piece=piece, digest=digest), self.content(piece)


class Taking(_Pieces):
    """A snapshot that is coming in, for a replica whose state is not larger than `most_bytes`.

    Raises `PeerError`, before anything is allocated, for an impossible manifest.
    """

    def __init__(self, manifest: wire.Manifest, most_bytes: int) -> None:
        for dtype, shape in manifest.tensors:
            if dtype not in DTYPES or len(shape) > wire.DIMENSIONS_MAX or min(shape, default=0) < 0:
                raise PeerError(f"the snapshot has a tensor of {dtype[:20]!r} and {shape[:8]}")
        size = sum(DTYPES[d].itemsize * math.prod(shape) for d, shape in manifest.tensors)
        if size > most_bytes:
            raise PeerError(
                f"the snapshot has {size / 2**20:,.0f} MiB, more than this replica's state can have"
            )
        try:
            self.tensors = [empty(dtype, shape) for dtype, shape in manifest.tensors]
        except (ValueError, RuntimeError) as e:
            raise PeerError(f"the snapshot cannot be held here: {e}") from None
        buffers = [as_bytes(t) for t in self.tensors]  # views: these are new, on the CPU
        super().__init__(manifest.tree, buffers, max(1, manifest.piece_bytes))
        self._came: set[int] = set()
        self._told = ""  # the digest, by the giver

    def take(self, piece: int, digest: str, buffers: list[Any]) -> None:
        """Store a piece. With the last one that comes, the whole has to be what the giver had."""
        tensor, start, stop = self.pieces[piece]
        if len(buffers) != 1 or memoryview(buffers[0]).nbytes != stop - start:
            raise PeerError(f"piece {piece} of the snapshot has another length")
        self.buffers[tensor][start:stop].copy_(torch.frombuffer(buffers[0], dtype=torch.uint8))
        self._came.add(piece)
        self._told = digest or self._told
        while self._summed in self._came:
            self.add_up_to(self._summed + 1)
        if len(self._came) == len(self.pieces) and self._told and self._told != self.digest():
            raise PeerError("the snapshot was changed on its way: it has another digest")


__all__ = ["Giving", "Taking", "most_bytes"]
