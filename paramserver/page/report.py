"""report.html: the page with its data inside, which opens from disk without a server.

The page's parts are put into the file as they are; nothing is loaded from elsewhere. The content
security policy names them by their hashes, so no text of a run can become a script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from paramserver import drafts
from paramserver.output.curves import Curves
from paramserver.page.web import file
from paramserver.status.value import Diagnosis, LogLine, Status

_encode = msgspec.json.Encoder().encode
_STYLE = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')


def write(
    path: Path,
    status: Status,
    curves: Curves,
    lines: Sequence[LogLine] = (),
    diagnosis: Diagnosis | None = None,
) -> str | None:
    """Write the report of a run, whole or not at all.

    `status` is the last one; `lines` are of its log, and `diagnosis` is that of the last minute of
    training. Returns a sentence where that failed.
    """
    data = {
        "status": status,
        "curves": curves.part(),
        "lines": lines,
        "diagnosis": diagnosis,
    }
    try:
        drafts.write(path, page(data))
    except OSError as error:
        return f"{path} was not written: {error.strerror or error}"
    return None


def page(data: dict[str, Any]) -> bytes:
    """The page as one file."""
    html = file("index.html").decode()
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inside(kind: str, name: str) -> str:
        text = file(name).decode().strip()
        if name.startswith("uplot."):  # whose licence wants to be in every copy
            text = f"/*\n{file('uplot.LICENSE').decode()}*/\n{text}"
        assert f"</{kind}" not in text.lower(), name
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
        return f"<{kind}>{text}</{kind}>"

    html = _STYLE.sub(lambda found: inside("style", found[1]), html)
    html = _SCRIPT.sub(lambda found: inside("script", found[1]), html)
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; "
        f"style-src {' '.join(hashes['style'])}; img-src data:; base-uri 'none'; form-action 'none'"
    )
    # In JSON only texts can have these characters: an end tag in a host's name ends nothing.
    text = _encode(data).decode().replace("<", "\\u003c").replace(">", "\\u003e")
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    block = f'<script id="data" type="application/json">{text}</script>'
    html = html.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{head}', 1)
    before, body, after = html.partition("<body>\n")
    return f"{before}{body}{block}\n{after}".encode()
