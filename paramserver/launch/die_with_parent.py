"""`python -m paramserver.launch.die_with_parent MODULE words ...`: a program that does not outlive
the process that started it.

Its standard input is a pipe from that process. Where the pipe ends, that process was killed, and
another one may already do the same work. So this program kills itself at once, without cleaning up,
as if both had been one process.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    threading.Thread(target=_watch, name="parent", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
