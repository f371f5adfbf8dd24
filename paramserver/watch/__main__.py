"""`make watch`, `python -m paramserver.watch`: a live screen of a run, from any machine."""

from __future__ import annotations

import sys

from paramserver.program import exit_on_user_error


def main() -> None:
    """Watch a run until somebody ends that, or until it is over where nobody sits at a terminal."""
    with exit_on_user_error():
        from paramserver.config.help import answer

        words = sys.argv[1:]
        answer(words, "watch")
        from paramserver.watch.program import watch

        watch(words)


if __name__ == "__main__":
    main()
