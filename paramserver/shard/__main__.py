"""`python -m paramserver.shard`: a shard's process, as a worker starts it.

It reads its orders from standard input. Where that ends, it waits until the server needs it no
more, for a few seconds, since others may lack what it has averaged last; a further line ends it at
once.
"""

from __future__ import annotations

import os
import sys
import threading

import msgspec

from paramserver.errors import UserError
from paramserver.program import exit_on_user_error
from paramserver.shard.orders import LINGER_S, Orders

ORDERS_BYTES = 2**16
END_S = 5.0


@exit_on_user_error()
def main() -> None:
    try:
        orders = msgspec.json.decode(sys.stdin.buffer.readline(ORDERS_BYTES), type=Orders)
    except msgspec.DecodeError:
        raise UserError("a worker starts this program, when its server wants a shard") from None
    from paramserver.shard.process import Process
    from paramserver.transport import malloc

    malloc.keep_freed()

    process = Process(orders)

    def watch() -> None:
        after_s = 0.0 if sys.stdin.buffer.readline(ORDERS_BYTES) else LINGER_S
        process.end(after_s)
        threading.Timer(after_s + END_S, lambda: os._exit(1)).start()

    threading.Thread(target=watch, name="pipe", daemon=True).start()
    try:
        process.run()
    finally:
        process.close()
    os._exit(0)  # the thread at the pipe does not keep it


if __name__ == "__main__":
    main()
