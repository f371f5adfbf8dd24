"""The clusters of this process: an earlier one gives way to the next.

A notebook's cell is run again, a script trains again: then the same model, optimizer and worker
number come back while the cluster of before was never left.
"""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING

from torch import nn

from paramserver.errors import UserError
from paramserver.words import host_port

from .replica.replica import Replica

if TYPE_CHECKING:
    from .cluster import Cluster

_living: weakref.WeakValueDictionary[int, Cluster] = weakref.WeakValueDictionary()
"""By id. Threads may be workers, too: a WeakSet cannot be read while another thread adds to it."""
_finished: dict[tuple[str, int], str] = {}
"""By address of a server of several runs: the last one that this process has finished."""


def refuse_in_child() -> None:
    """Raise `UserError` in a process that multiprocessing has spawned, while it runs the script
    again to find its functions: it would join as another worker, and its parent wait for it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "join() in a process that a DataLoader, or multiprocessing, has started: such a "
            "process runs the whole script again",
            "put what the script does below `if __name__ == '__main__':`, or in a function that is "
            "called there",
        )


def lives(cluster: Cluster) -> None:
    """Note that this cluster belongs to this thread."""
    cluster.thread = threading.get_ident()
    _living[id(cluster)] = cluster


def left(cluster: Cluster) -> None:
    """Note that it was left."""
    _living.pop(id(cluster), None)


def _all() -> list[Cluster]:
    references = _living.valuerefs()  # a copy, made in one step
    return [cluster for each in references if (cluster := each()) is not None]


def finished(cluster: Cluster) -> None:
    """Note that this process has finished its run, where the server goes on with another one."""
    if cluster.runs > 1:
        _finished[cluster.host, cluster.port] = cluster.run


def last_finished(host: str, port: int) -> str:
    """The last run of several that this process has finished there; empty: none."""
    return _finished.get((host, port), "")


def leave_same(host: str, port: int, asked: int | None) -> Cluster | None:
    """Leave the cluster that this thread has joined before, at the same server, under the same
    number. Returns it."""
    found = None
    for cluster in _all():
        same = (cluster.host, cluster.port, cluster.asked) == (host, port, asked)
        if same and cluster.thread == threading.get_ident():
            found = cluster
            _give_way(cluster, "it joined again")
    return found


def hand_over(before: Replica, replica: Replica) -> None:
    """Let a replica go on where the one of the cluster before stood, in the same run. Nobody else
    may hold that state. Where it does not fit, the replica begins like any other."""
    if before.step and (before.layout, before.recipe()) == (replica.layout, replica.recipe()):
        with suppress(ValueError):
            replica.load(before.state(), before.step, before.lineage)


def leave_others(cluster: Cluster, model: nn.Module) -> None:
    """Leave the other clusters of this process that train any parameter of this model."""
    parameters = {id(p) for p in model.parameters()}
    for other in _all():
        if other is not cluster and parameters & other.trains:
            _give_way(other, "its model was attached again")


def refuse_second_attach(cluster: Cluster) -> None:
    """Raise `UserError` where this thread has attached to another server, and its loop there has
    not begun or is under way. Their workers would wait for each other: one here for others to
    join, and those for the state that it gives in its loop there. The other cluster is left, so
    that a notebook's cell may be run again."""
    if any(other.in_loop for other in _of_this_thread(cluster)):
        gc.collect()  # a loop that nobody holds any more is not under way
    for other in _of_this_thread(cluster):
        if not (other.stands or other.in_loop):
            continue
        how = "is under way" if other.in_loop else "has not begun"
        _give_way(other, "its thread attached to another server")
        raise UserError(
            f"attach() to a second server ({host_port(cluster.host, cluster.port)}) in one thread, "
            f"while the loop of the first ({host_port(other.host, other.port)}) {how}: the workers "
            "of each would wait for those of the other",
            "several models of one loop are attached in one call, at one server: "
            "attach(generator=(G, opt_g), critic=(D, opt_d)), see 'Several models' in "
            "docs/your-own-model.md; of two trainings one comes after the other, with "
            "cluster.leave() between them",
        )


def _of_this_thread(cluster: Cluster) -> list[Cluster]:
    """The other clusters of this thread that have a server."""
    here = threading.get_ident()
    return [o for o in _all() if o is not cluster and o.thread == here and not o.is_alone]


def refuse_second_loop(cluster: Cluster) -> None:
    """Raise `UserError` where the loop of another cluster is under way in this thread."""
    if not _has_other_loop(cluster):
        return
    gc.collect()  # a loop that nobody holds any more is not under way
    if _has_other_loop(cluster):
        raise UserError(
            "a loop of another cluster is under way in this thread: the rounds of each would "
            "wait for the other's",
            "leave the other loop first, with its cluster's leave(); several models of one "
            "loop are attached in one call, see 'Several models' in docs/your-own-model.md",
        )


def _has_other_loop(cluster: Cluster) -> bool:
    here = threading.get_ident()
    return any(o.in_loop and o.thread == here for o in _all() if o is not cluster)


def _give_way(cluster: Cluster, why: str) -> None:
    cluster.client.log.info(f"worker {cluster.worker_id} leaves: {why}")
    cluster.leave(why, UserError(why))  # it comes back: the run does not end for that
