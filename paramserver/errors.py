"""The kinds of errors.

`UserError` is a mistake that a person can correct: programs print it as one short paragraph and
exit with code 2, without a traceback. `PeerError` is a fault of the other side of a socket: that
peer loses its message, or its place in the run, and no other peer is affected. Any other exception
is a defect of this project and may show its traceback.
"""


class UserError(Exception):
    """A person's mistake: what was wrong and where, and what to do about it.

    `paramserver.program.exit_on_user_error` prints it and exits with code 2.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem if not hint else f"{problem}\n  {hint}")
        self.problem = problem
        self.hint = hint


class PeerError(Exception):
    """The peer sent something that the protocol does not allow; the text, which the peer gets, says
    what."""


class RunLost(UserError):
    """The run is over for this process, and not in order: it ended by an error or with a state that
    this replica does not hold, or its server was silent for too long."""
