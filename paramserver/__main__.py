"""`python -m paramserver learning_rate=0.01`: the server, and the observer beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paramserver.program import exit_on_user_error


def main(argv: Sequence[str] | None = None) -> None:
    """The server program. Exit codes: 0 ended in order, 1 ended early, 2 a person's mistake, 3 the
    run ended, but a result of it is missing (the last checkpoint, model.safetensors, the last
    evaluation, summary.json, lines of metrics.jsonl): the last warning names it. With several
    `runs`, that of the worst one."""
    with exit_on_user_error():
        words = list(sys.argv[1:] if argv is None else argv)
        from paramserver.config.help import answer

        answer(words, "server")
        from paramserver.config.loading import load

        loaded = load(words, "server")
        loaded.tell_twice()
        from paramserver.server.program import serve  # PyTorch takes seconds

        code = serve(loaded.settings)
    sys.exit(code)


if __name__ == "__main__":
    main()
