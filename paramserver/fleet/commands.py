"""Makes the commands for a cluster's machines, and reads their answers. Pure.

All commands use the user's own `ssh` and `rsync`, with their config, agent, jump hosts and known
hosts, so they work where these work at a prompt. On a machine with ``ssh: local`` the same scripts
run without ssh. A script begins in the home folder and needs nothing but a POSIX shell.

On each machine everything lies in one folder (`Host.folder`):

    code/            a copy of this clone, with its own .venv
    own/0/ ...       the user's own modules from elsewhere (`user_code`), one folder each
    runs/  data/     on the server's machine the run folders; data sets
    state/  logs/    files of `supervisor`
    settings.yaml    on the server's machine: the settings of the run
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from paramserver.config.schema import allowed
from paramserver.fleet.user_code import UserCode
from paramserver.net.hosts import HERE, Host, Process
from paramserver.settings import Settings

SSH = (
    "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3",
)  # fmt: skip
HASTY_S = 2  # for a connection, where a person waits for the answers of all machines
CHECK_S = 30.0
MEASURE_S = 900.0  # it may download a data set
COPY_S = 600.0
LOOPBACK = "127.0.0.1"
SETUP_S = 1800.0
ANSWER_S = 60.0
SERVER_PATIENCE_S = 120  # an orderly end takes the observer's last evaluation and upload
WORKER_PATIENCE_S = 15
PATH = '"$PATH:$HOME/.local/bin:/opt/homebrew/bin:/usr/local/bin"'
PYTHONS = ("python3", "python3.13", "python3.12", "python3.11")
ROOM_KB, ROOM_CUDA_KB = 3 * 2**20, 8 * 2**20  # for an environment that has to be made
ROOM_LEFT_KB = 2**19  # for a run
LEFT_OUT = (
    ".git", ".venv", ".setup.lock", "__pycache__", "*.pyc", ".*_cache", ".hypothesis",
    "*.egg-info", ".DS_Store", "/runs", "/data", "/wandb", "/build", "/dist", "/benchmarks/results",
)  # fmt: skip
AGAIN: dict[str, list[int]] = {"server": [], "worker": [1]}
"""Exit codes after which a process is started again; after a signal it always is. A server exits
with 1 when it ended its run early: a person decides whether to start it again."""


@dataclass(frozen=True)
class Command:
    """A process of this machine, most often an ssh. Its standard input may hold secrets: `masked`
    is the same without them."""

    host: str
    argv: tuple[str, ...]
    stdin: str = ""
    masked: str = ""
    limit_s: float = ANSWER_S
    hasty: bool = False
    """A person waits: a machine to which there is no connection at once is off."""

    def __str__(self) -> str:
        """The command line as a person would type it."""
        line = shlex.join(self.argv)
        return f"{line} <<'END'\n{self.masked.rstrip()}\nEND" if self.masked else line


def shell(
    host: Host,
    script: str,
    *,
    stdin: str = "",
    masked: str = "",
    limit_s: float = ANSWER_S,
    hasty: bool = False,
) -> Command:
    """A script on that machine, beginning in its home folder."""
    script = f"PATH={PATH}; export PATH; cd || exit 1\n{script}"
    if hasty:
        script = f"echo here\n{script}"  # before what takes long
    if host.ssh == HERE:
        argv: tuple[str, ...] = ("sh", "-c", script)
    else:
        # Of an option that is given twice ssh takes the first one.
        first = ("ssh", "-o", f"ConnectTimeout={HASTY_S}", *SSH[1:]) if hasty else SSH
        argv = (*first, host.ssh, f"exec sh -c {shlex.quote(script)}")
    return Command(host.name, argv, stdin, masked or stdin, limit_s, hasty)


def place(host: Host, inner: str = "") -> str:
    """A path in the host's folder, quoted for a shell that stands in the home folder."""
    folder = host.folder.removeprefix("~/").rstrip("/")
    return shlex.quote(f"{folder}/{inner}" if inner else folder)


def below_home(host: Host, run_folder: str) -> str:
    """The path of a run folder, which its server names as seen from the code, as ssh and rsync take
    it: absolute, or below the home folder."""
    own = host.folder.removeprefix("~/").rstrip("/")
    return posixpath.normpath(posixpath.join(own, "code", run_folder))


def spoken(host: Host, run_folder: str) -> str:
    """The run folder, for people: as scp takes it."""
    folder = below_home(host, run_folder)
    if host.ssh != HERE:
        return f"{host.ssh}:{folder}"
    return folder if folder.startswith("/") else f"~/{folder}"


# ------------------------------------------------------------------------------------------ checks


def check(host: Host) -> Command:
    """Checks whether a machine can take part; `read_check` reads the answer."""
    pythons = " ".join(shlex.quote(p) for p in ([host.python] if host.python else PYTHONS))
    version = "import platform; print(platform.python_version())"
    return shell(
        host,
        f"""
echo "time $(date +%s)"
echo "cores $(getconf _NPROCESSORS_ONLN)"
echo "gpus $(nvidia-smi -L 2> /dev/null | grep -c '^GPU')"
echo "system $(uname -s)"
for python in {pythons}; do
    if found=$("$python" -c '{version}' 2> /dev/null); then echo "python $found"; fi
done
for tool in make rsync uv; do
    if "$tool" --version > /dev/null 2>&1; then echo "has $tool"; fi
done
if nvidia-smi -L > /dev/null 2>&1 || test -e /dev/nvidia0; then echo "has nvidia"; fi
if ! told=$(mkdir -p {place(host, "code")} 2>&1); then echo "unwritable $told"; exit; fi
test -w {place(host, "code")} || echo "unwritable it belongs to somebody else"
echo "room $(df -Pk {place(host)} | awk 'NR == 2 {{ print $4 }}')"
if test -e {place(host, "code/.venv/.ready")}; then echo "has environment"; fi
if test -n "$(ls {place(host, "code")})" && ! test -e {place(host, "code/Makefile")}; then
    echo "foreign $(ls {place(host, "code")} | head -1)"
fi
""",
        limit_s=CHECK_S,
    )


@dataclass(frozen=True)
class Checked:
    """The facts that `check` found on a machine."""

    system: str = ""
    time: float = 0.0
    pythons: tuple[str, ...] = ()
    has: frozenset[str] = frozenset()
    room_kb: int | None = None
    unwritable: str = ""
    foreign: str = ""
    cores: int = 0
    gpus: int = 0


def read_check(answer: str) -> Checked:
    """Read the answer to `check`; skip lines of login scripts."""
    said: dict[str, list[str]] = {}
    for line in answer.splitlines():
        key, _, value = line.partition(" ")
        said.setdefault(key, []).append(value.strip())

    def first(key: str) -> str:
        return said.get(key, [""])[0]

    def number(key: str) -> int:
        return int(first(key)) if first(key).isdigit() else 0

    return Checked(
        system=first("system"),
        time=float(number("time")),
        cores=number("cores"),
        gpus=number("gpus"),
        pythons=tuple(dict.fromkeys(said.get("python", []))),
        has=frozenset(said.get("has", [])),
        room_kb=int(first("room")) if first("room").isdigit() else None,
        unwritable=first("unwritable"),
        foreign=first("foreign"),
    )


@dataclass(frozen=True)
class Trouble:
    """A fault of a machine, and what to do about it."""

    host: str
    problem: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.host}: {self.problem}" + (f"\n  {self.cure}" if self.cure else "")


def troubles(host: Host, found: Checked) -> list[Trouble]:
    """Everything that keeps a machine from taking part."""
    told = []

    def tell(problem: str, cure: str) -> None:
        told.append(Trouble(host.name, problem, cure))

    mac = found.system == "Darwin"
    could_fetch = "uv" in found.has and host.python is None
    if not could_fetch and not any(fits(version) for version in found.pythons):
        have = f" (found: {', '.join(found.pythons)})" if found.pythons else ""
        wanted = f"{host.python} is not" if host.python else "there is no"
        tell(
            f"{wanted} Python 3.11, 3.12 or 3.13{have}",
            "install uv (https://docs.astral.sh/uv), which brings one, or: "
            + ("brew install python@3.12" if mac else "apt install python3 python3-venv"),
        )
    for tool in ("make", "rsync"):
        if tool not in found.has:
            get = "xcode-select --install" if mac else f"apt install {tool}"
            tell(f"{tool} is missing", f"on {host.name}: {get}")
    if found.unwritable:
        tell(
            f"cannot write into {host.folder}: {found.unwritable}",
            "choose another place with folder:",
        )
    elif found.foreign:
        tell(
            f"{host.folder}/code holds something else ({found.foreign})",
            "it would be overwritten: choose another place with folder:",
        )
    ready = "environment" in found.has
    cuda = "nvidia" in found.has and host.device != "cpu"
    need = ROOM_LEFT_KB if ready else ROOM_CUDA_KB if cuda else ROOM_KB
    if found.room_kb is not None and found.room_kb < need:
        tell(
            f"{found.room_kb / 2**20:.1f} GiB are free, {need / 2**20:.1f} GiB are needed"
            + ("" if ready else f" (PyTorch{' with CUDA' if cuda else ''} is large)"),
            "make room, or choose another place with folder:",
        )
    return told


def fits(version: str) -> bool:
    """Is this a Python that the project runs on?"""
    parts = version.split(".")
    return parts[0] == "3" and len(parts) > 1 and parts[1] in ("11", "12", "13")


_SSH_SAYS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known here",
        "if you set it up anew: ssh-keygen -R {address}, then ssh {ssh} once; if not, find out why",
    ),
    (
        r"Host key verification failed",
        "its host key is not known here yet",
        "ssh {ssh} once by hand, compare the key, answer yes",
    ),
    (
        r"Permission denied",
        "ssh is refused",
        "it must work without a password: ssh-copy-id {ssh}, then try: ssh {ssh} true",
    ),
    (r"Could not resolve hostname", "ssh does not know this name", "right name? see: ssh {ssh}"),
    (
        r"Connection refused",
        "it is there, but nobody listens for ssh",
        "macOS: System Settings, General, Sharing, Remote Login; Linux: apt install openssh-server",
    ),
    (
        r"timed out|Timeout|No route to host|Host is down|Network is unreachable|not responding",
        "it does not answer: off, asleep, or another network?",
        "try: ssh {ssh} true",
    ),
    (r"Connection (closed|reset)|Broken pipe", "ssh broke off", "try: ssh {ssh} true"),
)


def ssh_trouble(host: Host, stderr: str) -> Trouble:
    """The meaning of a failure of ssh itself (exit code 255, or no answer in time)."""
    for pattern, problem, cure in _SSH_SAYS:
        if re.search(pattern, stderr):
            # ssh looks keys up by another name where its config says so (HostName, HostKeyAlias).
            named = re.search(r"Host key for (\S+) has changed", stderr)
            address = named[1] if named else host.ssh.rpartition("@")[2]
            cure = cure.format(ssh=host.ssh, address=shlex.quote(address))
            return Trouble(host.name, problem, cure)
    lines = [line for line in stderr.splitlines() if line.strip()]
    said = lines[-1] if lines else "it does not say why"
    return Trouble(host.name, f"ssh fails: {said}", f"try: ssh {host.ssh} true")


# ------------------------------------------------------------------------------------------ set-up


def copy(host: Host, root: str) -> Command:
    """Copies the changes of the clone at `root`, and removes files that it does not have any
    more."""
    return _rsync(host, root, "code", [f"--exclude={pattern}" for pattern in LEFT_OUT])


def copy_own(host: Host, user_code: Sequence[UserCode]) -> list[Command]:
    """Copies the user's own modules, and removes those that are not needed any more."""
    commands = []
    for number, own in enumerate(user_code):
        chosen = ["--exclude=__pycache__", "--exclude=*.pyc"]
        chosen += [f"--include=/{name}" for name in own.names]
        rest = ["--exclude=/*", "--delete-excluded"]
        inner = f"own/{number}"
        commands.append(shell(host, f"exec mkdir -p {place(host, inner)}"))
        commands.append(_rsync(host, str(own.folder), inner, [*chosen, *rest]))
    return commands


def own_path(user_code: Sequence[UserCode], up: str = "../") -> str:
    """The PYTHONPATH for these modules, as seen from the code; from the host's folder itself, where
    a script is started, with `up=""`."""
    return ":".join(f"{up}own/{number}" for number in range(len(user_code)))


def _rsync(host: Host, source: str, inner: str, options: Sequence[str]) -> Command:
    argv = ["rsync", "-az", "--delete", *options]
    folder = host.folder.removeprefix("~/").rstrip("/")
    if host.ssh == HERE:
        to = f"{folder}/{inner}/"
        target = f'"$HOME/{to}"' if not folder.startswith("/") else f"'{to}'"
        argv = ["sh", "-c", f"exec {shlex.join([*argv, f'{source}/'])} {target}"]
    else:
        argv += ["-e", shlex.join(SSH), f"{source}/", f"{host.ssh}:{folder}/{inner}/"]
    return Command(host.name, tuple(argv), limit_s=COPY_S)


RESULTS = (
    "config.yaml", "metrics.jsonl", "summary.json", "curves.png", "report.*", "model.safetensors",
    "ema.safetensors",
)  # fmt: skip
"""What is copied of a run folder, with the last checkpoint. Not run.json: a server on this machine
could take the copy for a run of its own."""


def last_checkpoint(host: Host, folder: str) -> Command:
    """The name of the newest one in a run folder, or nothing."""
    inner = shlex.quote(f"{folder}/checkpoints")
    return shell(
        host, f"cd {inner} 2> /dev/null || exit 0; ls step-*.safetensors 2> /dev/null | tail -1"
    )


def copy_results(host: Host, folder: str, target: str, checkpoint: str) -> Command:
    """Copies the results of a run folder into one of this machine."""
    names = [*RESULTS, "checkpoints/", *([f"checkpoints/{checkpoint}"] if checkpoint else [])]
    argv = ["rsync", "-a", "--prune-empty-dirs"]
    argv += [*(f"--include=/{name}" for name in names), "--exclude=*"]
    if host.ssh == HERE:
        source = f"'{folder}/'" if folder.startswith("/") else f'"$HOME"/{shlex.quote(folder)}/'
        argv = ["sh", "-c", f"exec {shlex.join(argv)} {source} {shlex.quote(target)}/"]
    else:
        argv += ["-e", shlex.join(SSH), f"{host.ssh}:{folder}/", f"{target}/"]
    return Command(host.name, tuple(argv), limit_s=COPY_S)


def environment(host: Host) -> Command:
    """Makes or updates .venv there; quick if there is nothing to do."""
    words = f" PYTHON={shlex.quote(host.python)}" if host.python else ""
    words += " TORCH=cpu" if host.device == "cpu" else ""  # else by whether there is a GPU
    return shell(host, f"cd {place(host, 'code')} && exec make setup{words} 2>&1", limit_s=SETUP_S)


def python(host: Host, module: str, *words: str, without: str = "", **keywords: Any) -> Command:
    """Runs a module of the copy, in its environment; `..` is the host's folder. Where there is no
    environment yet the answer is `without`."""
    line = shlex.join([".venv/bin/python", "-m", module, *words])
    here = place(host, "code/.venv/.ready")
    unless = f"test -e {here} || {{ echo {shlex.quote(without)}; exit; }}\n" if without else ""
    return shell(host, f"{unless}cd {place(host, 'code')} && exec {line}", **keywords)


def agent(host: Host) -> Command:
    """Starts `paramserver.fleet.agent`, which answers questions."""
    return python(host, "paramserver.fleet.agent", "..")


def settings_file(host: Host, text: str) -> Command:
    """Writes the run's settings to the server's machine."""
    return shell(host, f"umask 077; exec cat > {place(host, 'settings.yaml')}", stdin=text)


def measure(host: Host, settings: Settings, text: str, own: str = "") -> Command:
    """Measures a few batches of the model that `text`, the run's settings, describes; `own` is the
    PYTHONPATH of the user's modules."""
    linked = settings.with_bucket(linked=True)
    argv = [
        ".venv/bin/python", "-m", "workers.builtin.measure", "cluster=../plan.yaml",
        "num_workers=1", f"bucket_mb={linked.bucket_size_mb:g}",
        f"min_bucket_mb={linked.min_bucket_mb or 'null'}",
        f"dataset.root={_below(_root(settings))}",
    ]  # fmt: skip
    argv += [f"device={host.device}"] if host.device else []
    argv += [f"threads={host.threads}"] if host.threads else []
    paths = f"PYTHONPATH={shlex.quote(own)}; export PYTHONPATH\n" if own else ""
    script = f"umask 077; cat > {place(host, 'plan.yaml')} && cd {place(host, 'code')} || exit 1\n"
    return shell(
        host, f"{script}{paths}exec {shlex.join(argv)}", stdin=text, limit_s=MEASURE_S
    )  # fmt: skip


def keep_plan(host: Host, settings: Settings, text: str) -> Command:
    """Writes what was planned beside the runs of that machine, for a server there to compare."""
    folder = _below(settings.run_dir)
    script = f"cd {place(host, 'code')} && mkdir -p {shlex.quote(folder)} && cd "
    script += f"{shlex.quote(folder)} && cat > plan.json.tmp && exec mv plan.json.tmp plan.json"
    return shell(host, script, stdin=text)


# -------------------------------------------------------------------------------------------- runs


def _below(path: str) -> str:
    """A relative path of the settings, which is beside the code, as seen from the code."""
    return path if path.startswith(("/", "~")) else f"../{path}"


def server_argv(settings: Settings, addresses: Sequence[str]) -> list[str]:
    return [
        ".venv/bin/python", "-m", "paramserver", "cluster=../settings.yaml",
        f"host_ip={','.join(addresses) or 'null'}", "plain=true",
        f"run_dir={_below(settings.run_dir)}", f"dataset.root={_below(_root(settings))}",
    ]  # fmt: skip


def worker_argv(
    host: Host, settings: Settings, address: str | None, id: int | None = None
) -> list[str]:
    """`address` is the server's; None: on the same machine. `id`: of several workers there."""
    argv = [
        ".venv/bin/python", "-m", "workers", f"id={id or host.id}", f"host_ip={address or 'null'}",
        f"port={settings.port}", f"dataset.root={_below(_root(settings))}",
        f"join_timeout={settings.join_timeout:g}",
    ]  # fmt: skip
    argv += ["security=none"] if settings.security == "none" else []
    argv += [f"allow={','.join(names)}"] if (names := allowed(settings)) else []
    argv += [f"device={host.device}"] if host.device else []
    return argv + ([f"threads={host.threads}"] if host.threads else [])


def script_argv(place: str, words: Sequence[str]) -> list[str]:
    """A user's script, started in the host's folder."""
    return ["code/.venv/bin/python", place, *words]


def script_environment(settings: Settings, address: str | None, id: int) -> dict[str, str]:
    """What `workers.join()` in that script needs, but for the token, which is a secret."""
    return {
        "PARAMSERVER_HOST": address or LOOPBACK,
        "PARAMSERVER_PORT": str(settings.port),
        "PARAMSERVER_ID": str(id),
        **({"PARAMSERVER_SECURITY": "none"} if settings.security == "none" else {}),
    }


def own_share(host: Host, process: Process, found: Checked, script: bool) -> dict[str, str]:
    """The environment that gives a worker its part of the machine: one of its GPUs where there
    are several workers, its share of the cores; and, to a script, the host's `device` and
    `threads`, which a worker of ours gets as settings."""
    given = {}
    device = host.device or "auto"
    if script and device == "cpu":
        given["CUDA_VISIBLE_DEVICES"] = ""
    elif script and device.startswith("cuda:"):
        given["CUDA_VISIBLE_DEVICES"] = device.partition(":")[2]
    elif host.workers > 1 and found.gpus and device in ("auto", "cuda"):
        given["CUDA_VISIBLE_DEVICES"] = str(process.rank % found.gpus)
    if host.threads and script:
        given["OMP_NUM_THREADS"] = str(host.threads)
    elif host.workers > 1 and found.cores and not host.threads:
        given["OMP_NUM_THREADS"] = str(max(1, found.cores // host.workers))
    return given


def _root(settings: Settings) -> str:
    return str(settings.dataset.get("root", "data"))


def start(
    host: Host,
    name: str,
    argv: Sequence[str],
    up: str,
    secrets: Mapping[str, str],
    own: Mapping[str, str] = MappingProxyType({}),
    folder: str = "",
) -> Command:
    """Starts `server` or a `worker` under a supervisor, in `folder` as seen from the code.
    `secrets` are environment variables that are not shown, `own` others that are; all go through
    standard input."""

    def orders(secrets: Mapping[str, str]) -> str:
        told = {
            "argv": argv,
            "environment": {"PYTHONUNBUFFERED": "1", **own, **secrets},
            "restart": host.restart,
            "again": AGAIN[name.partition("-")[0]],
            "up": up,
            "folder": folder,
        }
        return json.dumps(told)

    return supervisor(
        host, "start", name, stdin=orders(secrets), masked=orders(dict.fromkeys(secrets, "***"))
    )


def supervisor(host: Host, command: str, *words: str, **keywords: Any) -> Command:
    """Runs a command of `paramserver.fleet.supervisor`."""
    return python(
        host, "paramserver.fleet.supervisor", command, *words[:1], "..", *words[1:], **keywords
    )


def stop(host: Host, name: str) -> Command:
    """Ends a process in order."""
    patience_s = SERVER_PATIENCE_S if name == "server" else WORKER_PATIENCE_S
    none = json.dumps({"ran": False, "killed": [], "left": [], "state": None})
    return supervisor(
        host, "stop", name, str(patience_s), without=none, limit_s=patience_s + 2 * ANSWER_S
    )


def status(host: Host, *, hasty: bool = False, shown: bool = False) -> Command:
    """Asks for the state of every process that runs or ran there; `shown`: with the status of the
    run in its server's."""
    words = ["shown"] if shown else []  # behind the folder: copies of before do not look there
    module = "paramserver.fleet.supervisor"
    return python(host, module, "status", "..", *words, without="[]", hasty=hasty)
