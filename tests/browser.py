"""A real browser for tests of the page: Debian's Chromium, without a window.

It takes a Chromium that is installed, and Playwright to drive it (`pip install '.[browser]'`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WAIT_MS = 20_000


def missing() -> str:
    """What there would have to be for a browser; empty where there is one."""
    if find_spec("playwright") is None:
        return "Playwright is not installed: pip install '.[browser]'"
    return "" if CHROMIUM else "there is no Chromium"


@contextmanager
def chromium(folder: Path | None = None, host: str | None = None) -> Iterator[Any]:
    """The browser; in the network namespace `host`, if one is named, with a script for that in
    `folder`."""
    from playwright.sync_api import sync_playwright

    program = CHROMIUM
    if host is not None and folder is not None:
        script = folder / "chromium"
        script.write_text(f'#!/bin/sh\nexec ip netns exec {host} {CHROMIUM} "$@"\n')
        script.chmod(0o700)
        program = str(script)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-features=SpareRendererForSitePerProcess"],
        )
        yield opened
        opened.close()


class Tab:
    """A page in the browser, and what went wrong in it."""

    def __init__(self, chromium: Any, **options: Any) -> None:
        self.context = chromium.new_context(**options)
        self.context.set_default_timeout(WAIT_MS)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self._said(m.type, m.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))

    def _said(self, kind: str, text: str) -> None:
        if kind == "error" and "net::ERR_" not in text:  # a server may end before its tab
            self.wrong.append(text)

    def open(self, url: str, workers: int | None = None) -> Any:
        self.page.goto(url)
        if workers is not None:
            self.until(f"document.querySelectorAll('#rounds tbody tr').length === {workers}")
        return self.page

    def until(self, condition: str) -> None:
        """Wait for it. (Playwright's own way needs `eval`, which the page's policy forbids.)"""
        for _ in range(WAIT_MS // 50):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(50)
        pytest.fail(f"it never came: {condition}")

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))
