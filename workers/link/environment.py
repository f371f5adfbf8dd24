"""What the environment variables of a worker say: the server's address and its own number.

The program that starts a worker may set `PARAMSERVER_HOST`, `PARAMSERVER_PORT`, `PARAMSERVER_ID`
and `PARAMSERVER_JOIN`, the join token (or the path of a file that holds it); or, for a run without
keys, `PARAMSERVER_SECURITY=none`. Under SLURM, `srun` sets for each of its tasks the address of the
node where it was called, where the server is expected, and the task's number, which begins at 0.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from paramserver.errors import UserError
from paramserver.net import jointoken

LISTENS_S = 5.0  # a refusal comes at once
HOST, PORT, ID = "PARAMSERVER_HOST", "PARAMSERVER_PORT", "PARAMSERVER_ID"
SECURITY = "PARAMSERVER_SECURITY"
TOKEN = jointoken.VARIABLE
SLURM_HOST, SLURM_TASK = "SLURM_LAUNCH_NODE_IPADDR", "SLURM_PROCID"


@dataclass(frozen=True)
class Environment:
    """None: the environment does not say."""

    host: str | None = None
    port: int | None = None
    id: int | None = None
    token: str | None = None
    security: str | None = None


def read_environment(environment: Mapping[str, str]) -> Environment:
    """Raises `UserError` where a port or a number is not one."""
    host = environment.get(HOST) or None
    port, id = _number(environment, PORT), _number(environment, ID)
    # A batch script has a task number too, but only tasks of srun have its address.
    if environment.get(SLURM_HOST):
        host = host or environment[SLURM_HOST]
        task = _number(environment, SLURM_TASK)
        id = id if id is not None or task is None else task + 1
    token, security = environment.get(TOKEN) or None, environment.get(SECURITY) or None
    return Environment(host, port, id, token, security)


def listens(host: str, port: int) -> bool:
    """Does a program listen there? One that is too busy to answer counts."""
    try:
        socket.create_connection((host, port), LISTENS_S).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"the environment variable {name} is {text!r}", "it must be a number")
    return int(text)
