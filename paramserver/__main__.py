"""`python -m paramserver learning_rate=0.01`: the server, and the observer beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from paramserver.config.loading import exit_on_user_error, load
from paramserver.server.program import serve


def main(argv: Sequence[str] | None = None) -> None:
    """The server program. Exit codes: 0 ended in order, 1 ended early, 2 a person's mistake, 3 the
    run ended, but a result of it is missing (the last checkpoint, model.safetensors, the last
    evaluation, summary.json, lines of metrics.jsonl): the last warning names it."""
    with exit_on_user_error():
        settings = load(list(sys.argv[1:] if argv is None else argv), "server").settings
        code = serve(settings)
    sys.exit(code)


if __name__ == "__main__":
    main()
