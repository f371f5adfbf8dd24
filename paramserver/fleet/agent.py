"""`python -m paramserver.fleet.agent ..`: answers questions about this machine, line by line.

Started on every machine by `up` and `doctor`, through ssh. A question is a JSON object in a line of
standard input, its answer one in a line of standard output; it ends with its standard input. Where
it cannot do what it was asked, the answer is ``{"problem": ..., "errno": ...}``.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paramserver import keys
from paramserver.errors import UserError
from paramserver.fleet import measurements, supervisor
from paramserver.fleet.speed import Broken, Listener, measure
from paramserver.net import machine
from paramserver.net.interfaces import to_json
from paramserver.program import exit_on_user_error


class Agent:
    """Answers questions; holds its listeners between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listeners: list[Listener] = []

    def answer(self, do: str, words: dict[str, Any]) -> dict[str, Any]:
        if do == "look":
            states = [asdict(state) for state in supervisor.status(self._folder)]
            own = to_json(machine.interfaces())
            return {"interfaces": own, "states": states, "down": machine.down()}
        if do == "time":
            return {"time": time.time()}
        if do == "facts":
            return machine.facts()
        if do == "health":
            from paramserver.fleet import health  # it takes numpy, which others need not wait for

            return {"memory": health.memory(), "data": health.data(words["dataset"])}
        if do == "listen":
            self._listeners.append(Listener(words["address"]))
            return {"port": self._listeners[-1].port}
        if do == "measure":
            return asdict(measure(**words))
        if do == "port":
            return {"held": machine.port_holder(words["port"])}
        if do == "ping":
            return {"pings": machine.pings(words["address"])}
        if do == "keep":
            measurements.write(self._folder, measurements.from_json(words["measurements"]))
            return {}
        if do == "kept":
            return {"measurements": measurements.to_json(measurements.read(self._folder))}
        if do == "token":
            return {"token": keys.load_or_make()[0].token(words["host"], words["port"])}
        return {"problem": f"{do} is no question"}

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()


def main() -> None:
    with exit_on_user_error():
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError("make up and make doctor start this program")
        agent = Agent(Path(sys.argv[1]))
        try:
            for line in sys.stdin:
                question = json.loads(line)
                try:
                    answer = agent.answer(question.pop("do"), question)
                except Broken as e:
                    answer = {"problem": str(e), "errno": e.number}
                except UserError as e:
                    answer = {"problem": e.problem}
                with suppress(BrokenPipeError):
                    print(json.dumps(answer), flush=True)
        finally:
            agent.close()


if __name__ == "__main__":
    main()
