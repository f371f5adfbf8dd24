"""`make setup` with the real uv, from two indexes on this machine: which PyTorch it installs.

The packages are made here and small. PyTorch's own index is a TLS server on loopback, to which a
proxy leads, since uv knows no other address for it than download.pytorch.org.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import socketserver
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from machines import find_uv

CLONE = Path(__file__).resolve().parent.parent
UV, OPENSSL = find_uv(), shutil.which("openssl")
TORCH_INDEX = "download.pytorch.org"
VERSIONS = {"torch": "2.15.0", "torchvision": "0.29.2"}
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "paramserver"
version = "0.1.0"
dependencies = ["torch>=2.6", "torchvision>=0.21"]
optional-dependencies = { dev = [] }
"""
BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "paramserver-0.1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\\nName: paramserver\\nVersion: 0.1.0\\n"
    metadata += "Requires-Dist: torch>=2.6\\nRequires-Dist: torchvision>=0.21\\n"
    metadata += "Provides-Extra: dev\\n"
    files = {
        "paramserver.pth": str(pathlib.Path.cwd()),
        "paramserver-0.1.0.dist-info/METADATA": metadata,
        "paramserver-0.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nTag: py3-none-any\\n",
        "paramserver-0.1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
"""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Linux has two builds of PyTorch"),
    pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is an NVIDIA GPU"),
    pytest.mark.skipif(UV is None, reason="uv is not installed"),
    pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed"),
]


def wheel(name: str, version: str, *requires: str) -> tuple[str, bytes]:
    """File name and bytes of a package with one empty module."""
    info, held = f"{name}-{version}.dist-info", io.BytesIO()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    with zipfile.ZipFile(held, "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}/__init__.py,,\n{info}/RECORD,,\n")
    return f"{name}-{version}-py3-none-any.whl", held.getvalue()


def listing(files: dict[str, bytes]) -> str:
    """The page of one package in an index."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    links = (f'<a href="{name}#sha256={digest}">{name}</a>' for name, digest in digests.items())
    return f"<!DOCTYPE html><html><body>{'<br>'.join(links)}</body></html>"


class Proxy(BaseHTTPRequestHandler):
    """Leads to the index of builds for the CPU, which it answers for itself; nowhere else."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_CONNECT(self) -> None:
        reached = self.path == f"{TORCH_INDEX}:443" and self.server.reached
        self.send_response(200 if reached else 502)
        self.end_headers()
        self.close_connection = not reached
        if reached:
            self.connection = self.server.tls.wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), _Raw(self.connection)

    def do_GET(self) -> None:
        *_, package, file = self.path.split("/")
        files = {n: data for n, data in self.server.files.items() if n.startswith(f"{package}-")}
        page = listing(files).encode() if files and not file else files.get(file)
        self.server.asked.append(self.path)
        self.send_response(200 if page is not None else 404)
        self.send_header("Content-Type", "application/zip" if file else "text/html")
        self.send_header("Content-Length", str(len(page or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page or b"")

    do_HEAD = do_GET

    def finish(self) -> None:
        super().finish()
        self.connection.close()  # of TLS, of which the server does not know

    def log_message(self, *_: Any) -> None: ...


class _Raw(io.RawIOBase):
    """What is written goes to the socket at once."""

    def __init__(self, to: Any) -> None:
        self._to = to

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._to.sendall(data)
        return len(data)


class Index(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Proxy)
        assert OPENSSL
        names = f"subjectAltName=DNS:{TORCH_INDEX}"
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-x509"]
        out = ["-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=test", "-addext", names]
        out += ["-addext", "basicConstraints=critical,CA:FALSE"]
        subprocess.run([OPENSSL, "req", *key, *out], cwd=folder, check=True, capture_output=True)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        self.files = dict(wheel(name, f"{version}+cpu") for name, version in VERSIONS.items())
        self.reached = True
        self.asked: list[str] = []


class Fresh:
    """A fresh clone, with a small package for ours and an environment without packages."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder / "clone", index
        self.folder.mkdir()
        shutil.copy(CLONE / "Makefile", self.folder)
        (self.folder / "pyproject.toml").write_text(PYPROJECT)
        (self.folder / "backend.py").write_text(BACKEND)
        pins = "".join(f"{name}=={version}\n" for name, version in VERSIONS.items())
        (self.folder / "constraints.txt").write_text(pins)
        for module in ("paramserver/server/program", "workers/builtin/train"):
            (self.folder / module).parent.mkdir(parents=True)
            (self.folder / f"{module}.py").touch()
        (self.folder / "workers/observer").mkdir()
        (self.folder / "workers/observer/observer.py").touch()
        usual = folder / "usual"
        for package, version, *requires in (
            ("torch", VERSIONS["torch"], "nvidia-cublas"),
            ("torchvision", VERSIONS["torchvision"], "torch"),
            ("nvidia_cublas", "13.4"),
        ):
            name, data = wheel(package, version, *requires)
            place = usual / package.replace("_", "-")
            place.mkdir(parents=True)
            (place / name).write_bytes(data)
            (place / "index.html").write_text(listing({name: data}))
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", self.folder / ".venv"], check=True
        )
        self.tools = folder / "tools"
        self.tools.mkdir()
        assert UV
        (self.tools / "uv").symlink_to(UV)
        proxy = f"http://127.0.0.1:{index.server_address[1]}"
        self.environment = {
            **{name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ},
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "UV_CACHE_DIR": str(folder / "cache"),
            "UV_DEFAULT_INDEX": usual.as_uri(),
            "UV_NO_CONFIG": "1",
            "UV_HTTP_RETRIES": "0",
            "HTTPS_PROXY": proxy,
            "ALL_PROXY": proxy,
            "SSL_CERT_FILE": str(folder / "cert.pem"),
        }

    def make(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            ["make", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def installed(self) -> dict[str, str]:
        found = self.folder.glob(".venv/lib/*/site-packages/*.dist-info")
        names = (path.name.removesuffix(".dist-info").partition("-") for path in found)
        return {name: version for name, _, version in names if name != "paramserver"}


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Fresh]:
    with Index(tmp_path) as index:
        thread = threading.Thread(target=index.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield Fresh(tmp_path, index)
        finally:
            index.shutdown()
            thread.join()


FOR_CPU = {name: f"{version}+cpu" for name, version in VERSIONS.items()}
WITH_CUDA = {**VERSIONS, "nvidia_cublas": "13.4"}


def test_a_machine_without_a_gpu_has_nothing_of_cuda_also_after_an_update(fresh: Fresh) -> None:
    said = fresh.make("setup")
    assert "installing PyTorch for the CPU" in said
    assert fresh.installed() == FOR_CPU
    os.utime(fresh.folder / "constraints.txt")  # an update that pins the same
    fresh.index.reached = False
    said = fresh.make("setup")
    assert "CUDA" not in said and fresh.installed() == FOR_CPU


def test_the_usual_build_comes_where_that_index_cannot_be_reached(fresh: Fresh) -> None:
    fresh.index.reached = False
    said = fresh.make("setup")
    assert "cannot be used; the usual build runs on the CPU, too" in said and "6 GB" in said
    assert "error" not in said.lower() and "tunnel" not in said
    assert fresh.installed() == WITH_CUDA and fresh.index.asked == []


def test_where_the_usual_build_fails_too_both_reasons_are_said(fresh: Fresh) -> None:
    fresh.index.reached = False
    fresh.environment["UV_DEFAULT_INDEX"] = fresh.folder.as_uri()
    said = fresh.make("setup", code=2)
    usual, _, before = said.partition("and before, of the build for the CPU:")
    assert "torch" in usual and f"https://{TORCH_INDEX}/" in before


def test_a_gpu_gets_cuda_and_a_word_chooses_otherwise(fresh: Fresh) -> None:
    (fresh.tools / "nvidia-smi").write_text("#!/bin/sh\n")
    (fresh.tools / "nvidia-smi").chmod(0o755)
    fresh.make("setup")
    assert fresh.installed() == WITH_CUDA and fresh.index.asked == []
    shutil.rmtree(fresh.folder / ".venv")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", fresh.folder / ".venv"], check=True
    )
    fresh.make("setup", "TORCH=cpu")
    assert fresh.installed() == FOR_CPU
