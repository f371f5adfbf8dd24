"""The documents say what the code does: settings, files, messages, deadlines, links.

Read are the Markdown files of the top level and of docs/. Everything that a table repeats from the
code is compared with it here, so that a new setting, file or message is documented when it is made.
"""

from __future__ import annotations

import ast
import importlib
import math
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch

from paramserver.config import page as settings_page
from paramserver.config.schema import KEYS, NAMED, SHORT, scope
from paramserver.protocol import messages as wire
from paramserver.rounds import diagrams as state_diagrams
from paramserver.rounds import states
from paramserver.tensors.codec import CODECS, Codec
from paramserver.words import shown

CLONE = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(CLONE)): path.read_text(encoding="utf-8")
    for path in (*sorted(CLONE.glob("*.md")), *sorted(CLONE.glob("docs/*.md")))
}
README = PAGES["README.md"]
SETTINGS = PAGES["docs/settings.md"]
ARCHITECTURE = PAGES["docs/architecture.md"]
PROTOCOL = PAGES["docs/protocol.md"]
GLOSSARY = PAGES["docs/glossary.md"]
PACKAGES = ("paramserver", "workers")


def section(page: str, heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    found = re.search(rf"^(#+) {re.escape(heading)}$\n", page, re.MULTILINE)
    assert found, f"there is no heading {heading!r}"
    rest = page[found.end() :]
    after = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: after.start()] if after else rest


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row, heads and rules left out."""
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def without_code(page: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", page, flags=re.MULTILINE | re.DOTALL)


# ------------------------------------------------------------------------------------- settings


def test_the_table_of_settings_is_that_of_the_code() -> None:
    told = {}
    for name, default, unit, whose, value, meaning in rows(section(SETTINGS, "All settings")):
        assert value and meaning, f"{name} has no meaning"
        told[name.strip("`")] = (default.strip("`"), unit, whose)

    declared = {}
    for key in KEYS.values():
        group = key.name.partition(".")[0]
        if group in SHORT:
            default = key.default["name"] if key.default else key.default
            declared.setdefault(group, (shown(default), "", key.scope))
            continue
        if key.kind is not dict:
            declared[key.name] = (shown(key.default), key.unit, key.scope)
            continue
        for part, default in key.default.items():
            name = f"{key.name}.{part}"
            declared[name] = (shown(default), "", scope(name))
    assert told == declared


def test_the_page_of_settings_is_fresh() -> None:
    """`make docs` would change nothing: help, ranges, headings."""
    assert settings_page.written(SETTINGS) == SETTINGS, "the code has changed: make docs"


def test_a_page_without_markers_is_no_page_of_settings() -> None:
    with pytest.raises(ValueError, match="no <!-- settings -->"):
        settings_page.written("prose")


def test_settings_in_commands_exist() -> None:
    for name, page in PAGES.items():
        for line in re.findall(r"\bmake (?:server|worker|demo)\b[^`\n]*", page):
            for word in re.findall(r"\s([a-z_.]+)=", line):
                assert word in KEYS or word.partition(".")[0] in NAMED, f"{name}: {line}"


# ---------------------------------------------------------------------------------------- files


def test_every_room_has_its_row() -> None:
    """The table is what the packages say of themselves."""
    told = {cells[0]: cells[1] for cells in rows(section(ARCHITECTURE, "Rooms"))}
    declared = {}
    for path in sorted(p for package in PACKAGES for p in (CLONE / package).rglob("*/__init__.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        room = f"`{path.parent.relative_to(CLONE)}/`"
        declared[room] = " ".join(said.partition("\n\n")[0].split())
    assert told == declared


def test_files_named_in_the_text_exist() -> None:
    for name, page in PAGES.items():
        for path in re.findall(r"`((?:paramserver|workers|tests|conf|docs)/[\w./]*)`", page):
            assert (CLONE / path).exists(), f"{name} names {path}"


# ------------------------------------------------------------------------------------- messages


def test_the_tables_of_messages_are_those_of_the_code() -> None:
    told = {cells[0]: cells[2] for cells in rows(section(PROTOCOL, "Messages"))}
    declared = {
        message.__name__: ", ".join(field.name for field in msgspec.structs.fields(message))
        for message in get_args(wire.ANY)
    }
    assert told == declared


def test_the_version_is_that_of_the_code() -> None:
    assert f"version {wire.PROTOCOL}." in PROTOCOL.split("\n## ")[0]


def test_the_wire_module_has_a_row_for_every_message() -> None:
    table = re.findall(r"^(\w+) +(?:\w+ -> |PUB|both)", wire.__doc__ or "", re.MULTILINE)
    assert set(table) == {message.__name__ for message in get_args(wire.ANY)}


# --------------------------------------------------------------------------------- architecture


def modules() -> dict[str, object]:
    """Every module of both packages, imported, by its dotted name."""
    found = {}
    for package in PACKAGES:
        top = importlib.import_module(package)
        for info in pkgutil.walk_packages(top.__path__, f"{package}."):
            if not info.name.endswith((".__main__", ".conf")):
                found[info.name] = importlib.import_module(info.name)
    return found


def names() -> set[str]:
    """What the packages define: `name`, `Class.method`, `module.name`."""
    found = set()
    for dotted, module in modules().items():
        for name, value in vars(module).items():
            found |= {name, f"{dotted.rpartition('.')[2]}.{name}"}
            if isinstance(value, type):
                found |= {f"{name}.{member}" for member in dir(value)}
    return found


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("docs/architecture.md", "The journey of a gradient"),
        ("docs/architecture.md", "Where to make a change"),
        ("CONTRIBUTING.md", "Add a codec"),
        ("CONTRIBUTING.md", "Add a message"),
        ("docs/reading.md", "Reading the code"),
    ],
)
def test_functions_that_a_page_names_exist(page: str, heading: str) -> None:
    known = names()
    told = re.findall(r"`([A-Z]\w*(?:\.\w+)?|[a-z]+\.[a-z_]+)`", section(PAGES[page], heading))
    for word in told:
        if not word.endswith((".py", ".md")):
            assert word in known, word
    assert told


def diagrams(text: str) -> list[set[str]]:
    """The states of every Mermaid diagram of states."""
    found = []
    for diagram in re.findall(r"^```mermaid\nstateDiagram-v2\n(.*?)^```$", text, re.M | re.S):
        arrows = re.findall(r"^ +(\w+|\[\*\]) --> (\w+|\[\*\])(?:: .+)?$", diagram, re.MULTILINE)
        assert len(arrows) == diagram.count("-->") == len(diagram.splitlines())
        found.append({state for arrow in arrows for state in arrow} - {"[*]"})
    return found


def test_the_diagrams_of_peers_and_runs_are_fresh() -> None:
    """`make docs` would change nothing."""
    assert state_diagrams.written(ARCHITECTURE) == ARCHITECTURE, "the code has changed: make docs"
    [of_peer] = diagrams(section(ARCHITECTURE, "Peers"))
    [of_run] = diagrams(section(ARCHITECTURE, "How a run lives"))
    assert (of_peer, of_run) == (set(states.PEER), set(states.RUN))


def test_a_page_without_markers_has_no_place_for_diagrams() -> None:
    with pytest.raises(ValueError, match="no <!-- states of a peer -->"):
        state_diagrams.written("prose")


def test_the_diagram_of_rounds_can_be_read() -> None:
    [of_round] = diagrams(section(ARCHITECTURE, "How a round lives"))
    assert of_round == {"open", "closed", "void"}


def test_the_glossary_is_in_order_and_has_each_word_once() -> None:
    words = [cells[0] for cells in rows(GLOSSARY)]
    assert words == sorted(set(words))
    assert len(words) > 40 and "lineage" in words


def test_the_codec_that_contributing_adds_is_one() -> None:
    """The file that "Add a codec" writes, as it stands there."""
    [code] = re.findall(
        r"```python\n(.*?)^ *```", section(PAGES["CONTRIBUTING.md"], "Add a codec"), re.S | re.M
    )
    scope: dict[str, Any] = {"__name__": "float24"}
    exec(compile(textwrap.dedent(code), "CONTRIBUTING.md", "exec"), scope)
    codec: Codec = scope["Float24"]()
    values = torch.tensor([1.0, -3.0, 0.0, 2.0**-100, math.inf])
    buffers, scale = codec.encode(values.clone())
    assert codec.fits(5, buffers) is None and "bytes" in str(codec.fits(4, buffers))
    assert torch.equal(codec.decode(buffers, scale, torch.zeros(5)), values)


def test_every_codec_is_in_the_table_of_numbers() -> None:
    assert set(CODECS) <= {cells[0].strip("`") for cells in rows(section(PROTOCOL, "Numbers"))}


def test_deadlines_are_those_of_the_code() -> None:
    """`NAME = 3` in a page: there is such a constant, of that value."""
    source = "\n".join(p.read_text() for folder in PACKAGES for p in (CLONE / folder).rglob("*.py"))
    told = re.findall(r"`([A-Z][A-Z_]+) = ([\d.]+)`", "\n".join(PAGES.values()))
    assert len(told) > 10
    for name, value in told:
        defined = re.findall(rf"^ *{name} = ([\d.]+)", source, re.MULTILINE)
        assert float(value) in map(float, defined), f"{name} is {defined or 'nowhere'}"


# ---------------------------------------------------------------------------------------- links


def anchors(page: str) -> set[str]:
    """What a link can point to in a page: its headings, as GitHub names them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_resolve(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(PAGES[name])):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (CLONE / name).parent / path if path else CLONE / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", PAGES)
def test_no_line_is_longer_than_an_editor(name: str) -> None:
    """Prose is broken at 120 columns; tables, links and code may be longer."""
    for line in without_code(PAGES[name]).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "!")), line
