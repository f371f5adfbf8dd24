"""`python -m paramserver.launch demo`: see `paramserver.launch.local`; `... status`
and the like: `paramserver.launch.machines`."""

from __future__ import annotations

import sys

from paramserver.errors import UserError
from paramserver.program import exit_on_user_error
from paramserver.words import nearest


def main() -> None:
    """Runs the command that the first word names; exits with its code."""
    with exit_on_user_error():
        from paramserver.config.help import LAUNCHED, answer

        command, *words = sys.argv[1:] or [""]
        if command not in LAUNCHED:
            answer([command], "launch")
            near = nearest(command, LAUNCHED)
            raise UserError(
                f"there is no command {command}" if command else "a command is missing",
                (f"did you mean {near}? " if near else "")
                + f"python -m paramserver.launch {'|'.join(LAUNCHED)}",
            )
        answer(words, command)
        from paramserver.launch.machines import COMMANDS, on_machines

        if command in COMMANDS:
            from paramserver.fleet.remote import end_all
            from paramserver.program import interrupt

            work = on_machines(command, words)
            interrupt(at_once=end_all)
            code = work()
        else:
            from paramserver.launch import local

            code = local.COMMANDS[command](words)
    sys.exit(code if code >= 0 else 128 - code)  # a server that a signal ended, as a shell has it


if __name__ == "__main__":
    main()
