"""The commands that our sentences tell a person to type."""

from __future__ import annotations

from paramserver.typed import installing, printing_token, typed


def test_in_a_clone_it_is_make_and_else_the_installed_program() -> None:
    words = ("worker", "id=2", "join=TOKEN", "seed=1")
    assert typed(*words, clone=True) == "make worker ID=2 JOIN=TOKEN seed=1"
    assert typed(*words, clone=False) == "paramserver-worker id=2 join=TOKEN seed=1"
    assert typed("keys", "rotate", clone=True) == "make keys ROTATE=1"
    assert typed("keys", "rotate", clone=False) == "paramserver-keys rotate"
    assert typed("plan", clone=False) == "python -m paramserver.launch plan"
    assert typed("doctor", "hosts=a,b", "--fix", clone=True) == "make doctor HOSTS=a,b ARGS=--fix"
    assert typed("watch", "join=...", clone=False) == "python -m paramserver.watch join=..."
    assert typed("runs", clone=False) == "python -m paramserver.runs"
    assert typed("server") == "make server"  # these tests run in a clone


def test_the_command_for_a_token_is_complete() -> None:
    """Without the port it would print the token of a server at another one."""
    assert printing_token("10.10.0.1", 7) == "make keys host_ip=10.10.0.1 port=7"
    assert printing_token("a,b", 9, of="watch_port") == "make keys host_ip=a,b watch_port=9"


def test_a_clones_own_environment_has_uv_to_install_with() -> None:
    assert installing("pip install ray", own=True) == ".venv/bin/uv pip install ray"
    assert installing("pip install ray", own=False) == "pip install ray"
