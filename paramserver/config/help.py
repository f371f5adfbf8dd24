"""What `--help` prints for each command; `--version` too."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import suppress

from paramserver import __version__, terminal
from paramserver.config.schema import (
    HEADINGS,
    KEYS,
    NAMED,
    SHORT,
    Key,
    default_of,
    meaning,
)
from paramserver.words import shown

_SETTINGS = "Settings are words like batch_size=64; python -m paramserver --help lists all of them."
_HOSTS = (
    "Its machines are those in conf/cluster.yaml; cluster=FILE or hosts=NAME,NAME choose others."
)

_FILES = """\
Values come from, later over earlier: the defaults below, conf/cluster.yaml, conf/model.yaml, the
command line. cluster= and model= choose other files, by path or by name under conf/. A mapping
like model: or optimizer: is replaced, not merged, when its type or name changes (dataset.root
stays).

run     the server's value is everybody's; set on a worker to another value, it is an error
server  read by the server and its observer only
local   each process has its own"""

WITH_TABLE = ("server", "worker")
"""Commands whose page lists every setting."""

LAUNCHED = {
    "demo": "train on real digits: a server and two workers, all on this machine",
    "script": "a server and workers on this machine that run your own training script",
    "profile": "a short demo that shows where the time of a step goes",
    "ray": "a run on the nodes of a Ray cluster",
    "up": "start a run on the machines of a cluster, and show it",
    "status": "how it stands on each machine",
    "logs": "what each machine said last",
    "attach": "watch the run again",
    "fetch": "copy the run's summary, curves, model and last checkpoint here",
    "down": "end the run, in order, on every machine",
    "doctor": "look at each machine and measure every path; without machines, try this one",
    "plan": "predict the speed with each set of machines, codec and local_steps",
}
"""The commands of `python -m paramserver.launch`, and what each does."""

_PAGES = {
    "server": """\
        usage: python -m paramserver [cluster=FILE] [model=FILE] [key=value ...]
               make server [key=value ...]

        Starts the parameter server, and beside it the observer that evaluates and logs.

        examples:
          python -m paramserver
          python -m paramserver learning_rate=0.01 model.hidden=256 num_workers=3
          python -m paramserver cluster=home host_ip=10.10.0.1 wandb.mode=offline
          python -m paramserver cluster=runs/2025-01-31_20-15-00/config.yaml""",
    "worker": """\
        usage: python -m workers id=N [join=TOKEN] [key=value ...]
               make worker ID=N [JOIN=TOKEN] [key=value ...]

        Starts worker N. The run's settings come from the server: a worker on another machine
        needs its number and the join token that the server prints, nothing else. Where others
        may see the processes of this machine, give the token in the environment's
        PARAMSERVER_JOIN, or in a file.

        examples:
          python -m workers id=1
          python -m workers id=2 join=TOKEN
          python -m workers id=3 join=token.txt device=cpu dataset.root=/data""",
    "keys": """\
        usage: python -m paramserver.keys [rotate] [host_ip=ADDRESS] [port=N]
               make keys [ROTATE=1] [host_ip=ADDRESS] [port=N]

        Prints the join token of a server at host_ip, with which workers on other machines join.
        The keys are made where there are none. With the word rotate new ones are made first: then
        every older token is worthless, also for a server that runs, which notices it.

        examples:
          python -m paramserver.keys host_ip=10.10.0.1
          python -m paramserver.keys rotate host_ip=10.10.0.1""",
    "watch": """\
        usage: python -m paramserver.watch [host_ip=ADDRESS] [port=N] [watch_port=N]
               make watch [JOIN=TOKEN]

        Shows a run on the whole terminal while it goes on: progress, what the last minute waited
        for, where each machine's time went, loss, links and log. q ends the watching and leaves
        the run as it is. On the server's machine it needs nothing; elsewhere a watch token, which
        make keys prints there, or a join token, in JOIN= or the environment's PARAMSERVER_JOIN.

        examples:
          python -m paramserver.watch
          PARAMSERVER_JOIN=pw... python -m paramserver.watch""",
    "runs": """\
        usage: python -m paramserver.runs [run_dir=FOLDER]
               make runs [run_dir=FOLDER]

        Prints a table of the runs in run_dir, the newest last: when each began, its model, steps,
        accuracy (or loss) and samples a second, and how it ended.""",
    "launch": """\
        usage: python -m paramserver.launch COMMAND [key=value ...]
               make COMMAND [key=value ...]

        COMMAND --help tells more about one.""",
    "demo": f"""\
        usage: python -m paramserver.launch demo [key=value ...]
               make demo [key=value ...]

        Trains on 4,000 digits that come with the installation: a server, its observer and
        num_workers workers, all on this machine.

        {_SETTINGS}

        examples:
          python -m paramserver.launch demo
          python -m paramserver.launch demo num_workers=3 num_epochs=5""",
    "script": f"""\
        usage: python -m paramserver.launch script FILE.py [key=value ...] [-- WORDS ...]
               make example [NAME=digits] [key=value ...]

        Starts a server and num_workers processes of a training script of your own, all on this
        machine. In the script, join() without an address finds the server. A YAML file of the
        script's name beside it holds settings; words behind -- are the script's own. The output
        of the first process is printed at the end.

        {_SETTINGS}

        examples:
          python -m paramserver.launch script train.py
          python -m paramserver.launch script train.py num_workers=3 num_epochs=5 -- --lr 0.1""",
    "profile": f"""\
        usage: python -m paramserver.launch profile [key=value ...]
               make profile [key=value ...]

        A demo of five epochs that is traced: prints a table of where a worker's step goes, and
        writes trace.json into the run folder.

        {_SETTINGS}""",
    "ray": f"""\
        usage: python -m paramserver.launch ray [key=value ...]

        Runs the server on this machine, and a worker on each node of the Ray cluster that
        RAY_ADDRESS or this machine's ray start names; without one, a cluster is started here for
        the run.

        {_SETTINGS}

        example:
          python -m paramserver.launch ray dataset.name=digits num_epochs=20""",
    "up": f"""\
        usage: python -m paramserver.launch up [--dry] [--script=FILE.py] [key=value ...] [-- WORDS]
               make up [DRY=1] [SCRIPT=FILE.py] [HOSTS=NAME,NAME] [key=value ...] [ARGS=WORDS]

        Checks all machines, copies the code, makes the environments, measures the paths, starts
        server and workers, and shows the run. --dry (DRY=1) prints every command and runs none.
        With a script, the workers run that, with these words.

        {_HOSTS}
        {_SETTINGS}

        examples:
          python -m paramserver.launch up batch_size=64
          python -m paramserver.launch up cluster=home dataset.name=digits num_epochs=20""",
    "status": f"""\
        usage: python -m paramserver.launch status
               make status

        Shows for each process of the run its state, since when, how often it was started again,
        and its newest warning; of a run that goes on also its progress, and what it waits for.

        {_HOSTS}""",
    "logs": f"""\
        usage: python -m paramserver.launch logs [--host=NAME]
               make logs [HOST=NAME]

        Prints the last lines of each machine's logs; with a name, those of that machine only.

        {_HOSTS}""",
    "attach": f"""\
        usage: python -m paramserver.launch attach [--host=NAME]
               make attach [HOST=NAME]

        Shows the run that is going on; with a name, the lines of that machine only. Ctrl-C ends
        the watching, not the run.

        {_HOSTS}""",
    "fetch": f"""\
        usage: python -m paramserver.launch fetch
               make fetch

        Copies summary, curves, model and last checkpoint of the run into run_dir here, also while
        the run goes on.

        {_HOSTS}""",
    "down": f"""\
        usage: python -m paramserver.launch down
               make down

        Ends the run in order, with a checkpoint, and checks that nothing of it is left on any
        machine.

        {_HOSTS}""",
    "doctor": f"""\
        usage: python -m paramserver.launch doctor [--json] [--fix] [hosts=NAME,NAME]
               make doctor [HOSTS=NAME,NAME] [ARGS=--json] [ARGS=--fix]

        Without machines in conf/cluster.yaml: trains 50 steps on each device of this machine, by
        itself and through a server, holds the result against the CPU's, and prints a table.

        With machines: asks each one for its versions, device, memory, disk, clock, sleep and
        firewall, measures every network that a pair of machines is in, and names what is wrong.

        --json prints all of it for programs. The exit code is 1 if something is wrong. --fix
        prints the commands that give Thunderbolt cables the addresses that they lack, asks, and
        runs them.

        {_HOSTS}""",
    "plan": f"""\
        usage: python -m paramserver.launch plan [--json] [key=value ...]
               make plan [ARGS=--json] [key=value ...]

        Measures the links and some batches of the model, and predicts the speed with each set of
        machines, codec and number of local steps, best first. --json prints all of it for
        programs.

        {_HOSTS}
        {_SETTINGS}""",
}

ASK, VERSION = ("-h", "--help"), ("-V", "--version")


def answer(words: Sequence[str], command: str) -> None:
    """Print the page of this command, or the version, and exit, where a word asks for it. What
    follows a `--` is for another program."""
    own = words[: words.index("--")] if "--" in words else words
    for word in own:
        if word in ASK or word in VERSION:
            page = help_text(command) if word in ASK else f"paramserver {__version__}"
            with suppress(SystemExit):  # whoever reads only the head has what they wanted
                terminal.result(page)
            raise SystemExit(0)


def help_text(command: str) -> str:
    """Usage, purpose and examples; where the settings belong to the command, every one of them:
    name, default, whose it is, meaning and unit."""
    lines = [textwrap.dedent(_PAGES[command])]
    if command == "launch":
        lines += ["", "commands:", *(f"  {name:<9} {does}" for name, does in LAUNCHED.items())]
    if command in WITH_TABLE:
        lines += ["", _FILES, *_table()]
    return "\n".join(lines)


def _table() -> list[str]:
    lines = []
    for key in KEYS.values():
        if key.name in HEADINGS:
            lines += ["", f"{HEADINGS[key.name]}:"]
        if key.kind is dict and key.name not in SHORT:
            for part, default in key.default.items():
                name, said = f"{key.name}.{part}", f"argument of {key.default.get('type')}"
                lines += _row(
                    KEYS.get(name, Key(name, object, False, default, said, "", key.scope))
                )
        elif key.name.partition(".")[0] not in NAMED or key.name in NAMED:
            lines += _row(key)
    return lines


def _row(key: Key) -> list[str]:
    left = f"  {key.name:<18} {shown(default_of(key)):<12} {key.scope:<7} "
    space = " " * len(left)
    return textwrap.wrap(meaning(key), 96, initial_indent=left, subsequent_indent=space)
