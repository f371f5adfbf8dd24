"""The states of a peer and of the run, and what leads from each to the next.

`Rounds` looks up each change of state in these tables, and a missing row is a mistake in its code.
`make docs` draws the diagrams of `docs/architecture.md` from them (`paramserver.rounds.diagrams`),
with the causes as their labels.
"""

from __future__ import annotations

from paramserver.protocol import messages as wire

Table = dict[str, dict[str, str]]
"""State -> cause -> next state."""

# ------------------------------------------------------------------------------------- a peer

GREETED, WAITING, ADOPTING, REPLICA = "greeted", "waiting", "adopting", "replica"

JOINED = "Join"
ADMITTED = "Admit, as origin or to follow"
REJECTED = "Reject, since it has another model"
CHOSEN = "Give, when no round is open"
ADOPTED = "Adopted"
ABORTED = "Abort"
TAKEN_OUT = "cut off, behind the history, other weights than the rest, or another Join"

PEER: Table = {
    GREETED: {JOINED: WAITING, TAKEN_OUT: GREETED},
    WAITING: {ADMITTED: REPLICA, REJECTED: GREETED, CHOSEN: ADOPTING, TAKEN_OUT: GREETED},
    ADOPTING: {ADOPTED: REPLICA, ABORTED: GREETED},
    REPLICA: {TAKEN_OUT: GREETED},
}
"""A peer begins as greeted, after its Hello, and may leave from each state. Before `Rounds` takes
out a peer that adopts, it aborts the snapshot."""

HEEDED: dict[type[wire.Message], tuple[frozenset[str], frozenset[str]]] = {
    wire.Ready: (frozenset({"worker"}), frozenset({REPLICA})),
    wire.Stand: (frozenset({"observer"}), frozenset(PEER)),
    wire.Digest: (frozenset({"worker", "observer"}), frozenset({REPLICA})),
    wire.Adopted: (frozenset({"worker", "observer"}), frozenset({ADOPTING})),
    wire.NextLease: (frozenset({"worker"}), frozenset({REPLICA})),
    wire.Evaluating: (frozenset({"worker"}), frozenset({REPLICA})),
    wire.StopRun: (frozenset({"worker", "observer"}), frozenset({REPLICA})),
    wire.Holds: (frozenset({"worker", "observer"}), frozenset({REPLICA})),
    wire.HandsOn: (frozenset({"worker"}), frozenset({REPLICA})),
    wire.Listens: (frozenset({"worker", "observer"}), frozenset({REPLICA})),
}
"""Messages that `Rounds` heeds only from peers of these roles in these states."""

# ------------------------------------------------------------------------------------- the run

RETURNING = "coming_back"
STARTING = "waiting_for_the_first_state"
BETWEEN = "between_rounds"
OPEN = "round_open"
SNAPSHOT = "snapshot"
ENDING = "ending"
ENDED = "ended"

STARTED = "started"
RESTARTED = "started again in the middle of a run"
ORIGIN = "the origin is known"
OPENED = "enough workers are ready"
CLOSED = "closed, since every bucket has its average"
VOID = "void, since no member is left, it waited in vain, a shard of it is gone, or the run ends"
NEXT = "all its workers ask for their next samples"
GIVEN = "a replica waits for a snapshot"
TAKEN = "adopted"
OFF = "aborted"
END = "all epochs are done, somebody stops it, or it cannot go on"
OVER = "the observer has kept the last step"

RUN: Table = {
    RETURNING: {ORIGIN: BETWEEN},
    STARTING: {ORIGIN: BETWEEN, END: ENDING},
    BETWEEN: {ORIGIN: BETWEEN, OPENED: OPEN, GIVEN: SNAPSHOT, END: ENDING},
    OPEN: {CLOSED: BETWEEN, NEXT: BETWEEN, VOID: BETWEEN},
    SNAPSHOT: {TAKEN: BETWEEN, OFF: BETWEEN, END: ENDING},
    ENDING: {ORIGIN: ENDING, GIVEN: ENDING, TAKEN: ENDING, OFF: ENDING, OVER: ENDED},
    ENDED: {ORIGIN: ENDED},
}
"""No snapshot starts while a round is open, and no round opens during a snapshot. The next round
may open in the same moment as the last one closes. Another replica becomes the origin if all who
held the first state left before an update. While the run ends, a snapshot under way goes on, and
the observer may take another one."""


def after(table: Table, state: str, cause: str) -> str:
    """The next state."""
    following = table[state].get(cause)
    if following is None:
        raise AssertionError(f"there is no {cause!r} in the state {state!r}")
    return following
