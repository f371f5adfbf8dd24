"""Machines of their own on this one: hosts with name, address, home, host key and processes.

A machine is a network namespace with a fast link to one switch and a slow one to another, in which
an sshd runs as the first process of a process namespace, with a home folder, a host key and
an /etc/passwd of its own. The laptop is one without sshd, from which commands are typed. It takes
root on Linux, and Debian's iproute2, openssh-server and rsync.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib import metadata
from pathlib import Path

from whole import CLONE, DEADLINE_S, Program

FAST, SLOW = "10.10.0", "10.20.0"
NEEDED = ("ip", "tc", "ssh", "sshd", "ssh-keygen", "rsync", "unshare", "make")
SHELL_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
HASTY_UV = """case $1 in pip) exec "$uv" "$@" --no-compile-bytecode ;; esac
exec "$uv" "$@"
"""
"""Compiling what is imported never, or once, takes most of the time of making an environment."""


def why_no_machines() -> str | None:
    """Why this one cannot have machines of its own; None where it can."""
    if sys.platform != "linux":
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces take root"
    path = f"{os.environ['PATH']}:{SHELL_PATH}"
    missing = [tool for tool in NEEDED if shutil.which(tool, path=path) is None]
    return f"not found: {', '.join(missing)}" if missing else None


class Machines:
    """Machines of these names, and a laptop, as a context. `bare` has no Python, `full` no room,
    `fresh...` no environment, but all for one in uv's cache; the others share this environment."""

    def __init__(self, folder: Path, names: list[str], rates: tuple[str, str]) -> None:
        self._folder = folder
        self._names = [*names, "laptop"]
        self._rates = rates
        self._prefix = f"psm{os.getpid()}-"
        self._made: list[str] = []
        self._sshds: dict[str, subprocess.Popen[str]] = {}
        self._readers: list[threading.Thread] = []

    def address(self, name: str, network: str = FAST) -> str:
        return f"{network}.{self._names.index(name) + 1}"

    def home(self, name: str) -> Path:
        return self._folder / name / "home"

    def __enter__(self) -> Machines:
        _remove_orphans()
        try:
            self._make_networks()
            for name in self._names:
                self._make_files(name)
            for name in self._names[:-1]:
                self._start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for sshd in self._sshds.values():
            sshd.kill()  # unshare, which takes all of the machine's processes with it
            sshd.wait()
        for reader in self._readers:
            reader.join(DEADLINE_S)
        for sshd in self._sshds.values():
            assert sshd.stderr is not None
            sshd.stderr.close()
        while self._made:  # the links go with their namespaces
            with contextlib.suppress(RuntimeError):
                call("ip", f"netns del {self._prefix}{self._made.pop()}")

    # ------------------------------------------------------------------ making

    def _make_networks(self) -> None:
        switch = self._add("switch")
        for number in (0, 1):
            call("ip", f"-n {switch} link add bridge{number} type bridge")
            call("ip", f"-n {switch} link set bridge{number} up")
        for name in self._names:
            host = self._add(name)
            call("ip", f"-n {host} link set lo up")
            for number, (network, rate) in enumerate(zip((FAST, SLOW), self._rates, strict=True)):
                device, port = f"eth{number}", f"{name}{number}"
                call("ip", f"-n {host} link add {device} type veth peer name {port} netns {switch}")
                call("ip", f"-n {host} addr add {self.address(name, network)}/24 dev {device}")
                call("ip", f"-n {switch} link set {port} master bridge{number}")
                for namespace, end in ((host, device), (switch, port)):
                    call("ip", f"-n {namespace} link set {end} up")
                    shape(namespace, end, rate)

    def _add(self, name: str) -> str:
        self._made.append(name)
        call("ip", f"netns add {self._prefix}{name}")
        return self._prefix + name

    def _make_files(self, name: str) -> None:
        folder, home = self._folder / name, self.home(name)
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        (home / "paramserver/code/.venv").mkdir(parents=True)
        passwd = Path("/etc/passwd").read_text()
        moved = re.sub(r"^(root:.*:)[^:]*(:[^:]*)$", rf"\g<1>{home}\2", passwd, flags=re.MULTILINE)
        (folder / "passwd").write_text(moved)
        call("ssh-keygen", f"-q -t ed25519 -f {folder / 'key'} -N", "")
        if name == "laptop":
            self._make_laptop(home)
            return
        (folder / "bin").mkdir()
        uv, links = find_uv(), ""
        if uv and name.startswith("fresh"):
            (folder / "bin/uv").write_text(f"#!/bin/sh\nuv={uv}\n{HASTY_UV}")
            (folder / "bin/uv").chmod(0o755)
            links = f"UV_FIND_LINKS={_wheel_of_uv(folder)}"
        elif uv and name != "bare":
            (folder / "bin/uv").symlink_to(uv)
        (folder / "sshd_config").write_text(
            f"HostKey {folder / 'key'}\n"
            f"AuthorizedKeysFile {self._folder / 'laptop/key.pub'}\n"
            "PidFile none\nUsePAM no\nStrictModes no\nPermitRootLogin yes\nUseDNS no\n"
            f"SetEnv UV_CACHE_DIR={uv_cache()} UV_OFFLINE=1 {links} "
            f"PATH={folder / 'bin'}:{SHELL_PATH}\n"
        )

    def _make_laptop(self, home: Path) -> None:
        config, known = [f"IdentityFile {self._folder / 'laptop/key'}", "User root"], []
        for name in self._names[:-1]:
            key = " ".join((self._folder / name / "key.pub").read_text().split()[:2])
            config.append(f"Host {name}\n  HostName {self.address(name)}\n  HostKeyAlias {name}")
            known.append(f"{name} {key}")
        first = self._names[0]
        for name in (
            "stranger",
            "unknown",
        ):  # the first machine, with a wrong host key and with none
            config.append(f"Host {name}\n  HostName {self.address(first)}\n  HostKeyAlias {name}")
        known.append(
            "stranger " + " ".join((self._folder / "laptop/key.pub").read_text().split()[:2])
        )
        config.append(f"Host asleep\n  HostName {FAST}.250")
        (home / ".ssh/config").write_text("\n".join(config) + "\n")
        (home / ".ssh/known_hosts").write_text("\n".join(known) + "\n")

    def _inside(self, name: str, then: str) -> list[str]:
        """A command line that becomes `sh -c then` on that machine, with what follows as its $@."""
        passwd = self._folder / name / "passwd"
        script = f"hostname {name} && mount --bind {passwd} /etc/passwd && {then}"
        own = [] if name == "laptop" else ["-p", "-f", "--kill-child", "--mount-proc"]
        enter = ["ip", "netns", "exec", self._prefix + name, "unshare", "-u", "-m", *own]
        return [*enter, "sh", "-c", script, "sh"]

    def _start(self, name: str) -> None:
        home, mounts = self.home(name), []
        if name == "bare":
            for python in _pythons():
                mounts.append(f"mount --bind /dev/null {python}")
        elif name == "full":
            mounts.append(f"mount -t tmpfs -o size=1m none {home}")
        elif not name.startswith("fresh"):
            venv = home / "paramserver/code/.venv"
            mounts += [f"mount --bind {sys.prefix} {venv}", f"mount -o remount,bind,ro {venv}"]
        sshd = f"exec /usr/sbin/sshd -D -e -f {self._folder / name / 'sshd_config'}"
        Path("/run/sshd").mkdir(exist_ok=True)
        process = subprocess.Popen(
            self._inside(name, " && ".join([*mounts, sshd])),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._sshds[name] = process
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "Server listening" in line:
                break
        else:
            raise RuntimeError(f"no sshd on {name}: {''.join(said)}")
        reader = threading.Thread(target=process.stderr.read)
        reader.start()
        self._readers.append(reader)

    # ------------------------------------------------------------------ using

    def type(self, *words: str, **environment: str) -> Program:
        """A command of this clone, typed on the laptop."""
        command = [*self._inside("laptop", 'exec "$@"'), *words]
        home = str(self.home("laptop"))
        return Program("the laptop", command, CLONE, HOME=home, COLUMNS="300", **environment)

    def on(self, name: str, *words: str) -> str:
        """What a command prints on a machine, as one of its processes."""
        return subprocess.run(
            self._enter(name, *words), capture_output=True, text=True, check=True
        ).stdout

    def enter(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """A process of a machine whose output is ours to read."""
        return subprocess.Popen(self._enter(name, *words), stdout=subprocess.PIPE)

    def _enter(self, name: str, *words: str) -> list[str]:
        unshare = self._sshds[name].pid
        children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        return ["nsenter", "-t", children[0], "-a", *words]

    def processes(self, name: str) -> list[str]:
        """The command lines on a machine, but for sshd's and those that look."""
        found = self.on(name, "ps", "-eo", "args=").splitlines()
        return [line for line in found if not re.search(r"sshd|^ps |unshare", line)]

    def cut(self, name: str, device: str, state: str) -> None:
        """Take a link `down` or `up`."""
        call("ip", f"-n {self._prefix}{name} link set {device} {state}")

    def slow_down(self, name: str, device: str, rate: str = "") -> None:
        """What leaves a machine over a link is held to this rate; "": to its own again."""
        shape(self._prefix + name, device, rate or self._rates[int(device[-1])])

    def namespace(self, name: str) -> str:
        return self._prefix + name


def shape(namespace: str, device: str, rate: str) -> None:
    """Hold what a device sends to this rate."""
    held = f"tbf rate {rate} burst 256kb latency 50ms"
    call("tc", f"-n {namespace} qdisc replace dev {device} root {held}")


def find_uv() -> str | None:
    """The uv of this environment, or else of this machine."""
    return shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def uv_cache() -> Path:
    """Where it keeps all that was ever installed with it."""
    return Path(os.environ.get("UV_CACHE_DIR", Path("~/.cache/uv").expanduser()))


def _wheel_of_uv(folder: Path) -> Path:
    """The folder of a wheel of this environment's uv, packed from what is installed: pip brought
    it, so it is in no cache of its own."""
    uv = metadata.distribution("uv")
    tag = re.search(r"^Tag: (.*)", uv.read_text("WHEEL") or "", re.MULTILINE)
    assert tag is not None and uv.files is not None
    wheel = folder / f"wheels/uv-{uv.version}-{tag[1]}.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        for path in uv.files:
            if path.parts[0] == "..":  # into bin/
                file.write(path.locate(), f"uv-{uv.version}.data/scripts/{path.name}")
            elif path.name == "RECORD":
                file.writestr(str(path), "")
            elif path.suffix != ".pyc" and path.name not in ("INSTALLER", "REQUESTED"):
                file.write(path.locate(), str(path))
    return wheel.parent


def _pythons() -> set[Path]:
    """Every Python that an ssh session would find here."""
    names = ("python3", "python3.13", "python3.12", "python3.11")
    folders = (*SHELL_PATH.split(":"), "/usr/local/bin")
    places = (Path(folder) / name for folder in folders for name in names)
    return {place.resolve() for place in places if place.exists()}


def _remove_orphans() -> None:
    """Those of a session that was killed."""
    for path in Path("/run/netns").glob("psm*-*"):
        match = re.fullmatch(r"psm(\d+)-.*", path.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            with contextlib.suppress(RuntimeError):
                call("ip", f"netns del {path.name}")


def call(tool: str, arguments: str, *more: str) -> str:
    """Run a tool of the system to its end; its output."""
    command = [tool, *arguments.split(), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} {arguments}: {done.stderr.strip()}")
    return done.stdout
