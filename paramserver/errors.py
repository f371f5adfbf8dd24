"""Errors for people, and errors that say whose fault it was.

`UserError` is what a person can mend: programs print it as one short paragraph and exit with
code 2, never with a traceback. `PeerError` is a fault of the other side of a socket: it costs
that peer its message, or its place, and nobody else anything. Everything else is a defect of
this project and may show its traceback.
"""


class UserError(Exception):
    """A person's mistake: what was wrong and where, and what to do about it.

    Raised anywhere, printed by `paramserver.config.loading.exit_on_user_error` with exit code 2.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem if not hint else f"{problem}\n  {hint}")
        self.problem = problem
        self.hint = hint


class PeerError(Exception):
    """The other side sent something that the protocol does not allow; the text tells it why."""


class RunLost(UserError):
    """The run is over for this process, and not in order: it ended by an error or with a state that
    this replica does not hold, or its server was silent past every deadline."""
