"""The page in a real browser: Debian's Chromium, without a window.

Skipped where there is no Chromium, or no Playwright to drive it (`pip install '.[browser]'`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import msgspec
import pages
import pytest
from browser import Tab
from whole import Run

from paramserver.output.curves import read
from paramserver.output.serverlog import ServerLog
from paramserver.page import report
from paramserver.status.value import (
    Cause,
    Diagnosis,
    Event,
    EventKind,
    LogLine,
    Machine,
    State,
)

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing())

EVIL = "<script>document.title='evil'</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for all tests of this file."""
    with browser.chromium() as opened:
        yield opened


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    """A tab in which nothing may go wrong."""
    made = Tab(chromium, viewport={"width": 1200, "height": 900}, color_scheme="light")
    yield made
    made.context.close()
    assert made.wrong == []


@pytest.fixture
def page(tmp_path: Path) -> Iterator[pages.Served]:
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl")
    pages.earlier_run(tmp_path)
    with pages.served(tmp_path) as served:
        served.show(pages.status())
        yield served


def curve(tab: Tab, chart: str) -> str:
    """What a chart says of its newest values."""
    return str(tab.page.get_attribute(f'[data-chart="{chart}"] .plot', "aria-label"))


def test_a_run_as_it_goes_on(tab: Tab, page: pages.Served) -> None:
    tab.open(page.url, workers=3)
    assert "run 2026-11-22_14-05-09" in tab.text("h1")
    assert "step 812 of 1,120 · 73 % · epoch 3 of 5" in tab.text("#steps")
    assert tab.text("#why") == (
        "worker 3 (pi3) is late in 40 % of the rounds: without it 1.4 times faster"
    )
    assert "93.4 %" in tab.text("#tiles") and "19,080" in tab.text("#tiles")
    assert "training 0." in curve(tab, "loss") and "validation 0." in curve(tab, "loss")
    assert "accuracy 93." in curve(tab, "metric") and "samples/s 2,400" in curve(tab, "rate")
    row = tab.text("#rounds tbody tr:nth-child(3)")
    assert "late in 40 % of the rounds" in row and "compute 71 %" in row and "Wi-Fi" in row
    assert "Thunderbolt · 19.2 Gbit/s" in tab.page.inner_html("#topology")
    assert "done 13,000" in tab.text("#ledger") and "digits" in tab.text("#settings")
    assert "closed with 2 of 3" in tab.text("#lines")
    assert tab.page.locator("#events li").count() == 4
    assert tab.page.locator("#events li .mark.gone").count() == 1, "as it is marked in the curves"

    page.show(pages.status(step=900, loss=0.1))
    tab.until("document.querySelector('#steps').textContent.includes('step 900')")
    assert "0.1" in tab.text("#tiles")


def test_machines_turn_late_and_gone(tab: Tab, page: pages.Served) -> None:
    tab.open(page.url, workers=3)
    assert tab.page.locator("#topology g.late").count() == 1
    state = pages.status()
    gone = [
        msgspec.structs.replace(machine, state=State.GONE, trouble="gone: silent for 10 s")
        if machine.id == 2
        else machine
        for machine in state.machines
    ]
    gone[-1] = msgspec.structs.replace(gone[-1], minute_rounds=4000, minute_late=3)
    event = Event(kind=EventKind.GONE, step=813, at=state.made_at, text="worker 2 is gone now")
    page.show(
        msgspec.structs.replace(
            state, machines=tuple(gone), step=813, events=(*state.events, event)
        )
    )
    tab.until("document.querySelectorAll('#topology g.gone').length === 1")
    assert "gone: silent for 10 s" in tab.text("#rounds tbody tr:nth-child(2)")
    assert "late in 3 of 4,000 rounds" in tab.text("#rounds tbody tr:nth-child(3)")
    assert "worker 2 is gone now" in tab.text("#events li:first-child")


def test_text_from_others_is_text(tab: Tab, page: pages.Served) -> None:
    machines = (
        Machine(id=0, host=EVIL, kind=EVIL, device=EVIL),
        Machine(id=1, host=EVIL, kind=EVIL, device=EVIL, trouble=EVIL, state=State.LATE),
    )
    page.show(
        pages.status(
            machines=machines, phase=EVIL, model=EVIL, folder=EVIL, late=EVIL,
            settings={EVIL: EVIL},
            lines=(LogLine(at=1.0, text=EVIL, warning=True),),
            events=(Event(kind=EventKind.JOINED, step=1, at=1.0, text=EVIL),),
            diagnosis=Diagnosis(cause=Cause.SLOW, sentence=EVIL), averaging=EVIL,
        )
    )  # fmt: skip
    tab.page.on("dialog", lambda dialog: tab.wrong.append("a script ran"))
    tab.open(page.url, workers=1)
    places = ("h1", "#phase", "#model", "#why", "#rounds", "#settings", "#lines", "#events")
    for place in (*places, "#averaging"):
        assert "<script>" in tab.text(place), place
    assert tab.page.locator("#all img, #all script, header img").count() == 0
    assert "evil" not in tab.page.title().replace(EVIL, "")


def test_a_phone(chromium: Any, page: pages.Served) -> None:
    tab = Tab(chromium, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.show(pages.status(workers=12, settings={"a" * 200: "b" * 300}))
    tab.open(page.url, workers=12)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360, "it scrolls sideways"
    assert tab.page.evaluate("document.querySelector('#topology svg').clientWidth") <= 360
    tab.context.close()
    assert tab.wrong == []


@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_every_figure_is_whole_at_any_width(chromium: Any, page: pages.Served, width: int) -> None:
    small = {"loss": 0.00082134, "learning_rate": 0.00012345, "steps_per_s": 0.0123456}
    large = {"samples_per_s": 1234567.0, "sent_bytes_per_s": 9.87e9, "seconds": 360_000.0}
    page.show(pages.status(**small, **large))
    tab = Tab(chromium, viewport={"width": width, "height": 900})
    tab.open(page.url, workers=3)
    told = tab.page.locator("#tiles b").all_inner_texts()
    assert {"8.21e−4", "1.23e−4", "0.0123", "1,234,567", "9.9 GB/s", "100:00:00"} <= set(told)
    cut = "[...document.querySelectorAll('#tiles b')].filter((e) => e.scrollWidth > e.clientWidth)"
    lines = "[...document.querySelectorAll('#tiles b')].filter((e) => e.clientHeight > 30)"
    assert tab.page.evaluate(f"{cut}.map((e) => e.textContent)") == []
    assert tab.page.evaluate(f"{lines}.map((e) => e.textContent)") == [], "one line each"
    tab.context.close()
    assert tab.wrong == []


def test_sixty_four_workers_and_a_million_steps(chromium: Any, tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", steps=10_000, every=100)
    tab = Tab(chromium, viewport={"width": 1200, "height": 900})
    with pages.served(tmp_path) as page:
        page.show(pages.status(workers=64, step=1_000_000))
        tab.open(page.url, workers=64)
        assert tab.page.locator("#topology g.box, #topology g rect.box").count() == 66
        tab.until("document.querySelectorAll('.plot canvas').length === 3")
        for step in range(1_000_001, 1_000_021):
            page.show(pages.status(workers=64, step=step))
        tab.until("document.querySelector('#steps').textContent.includes('1,000,020')")
        tab.context.close()
        assert tab.wrong == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names(chromium: Any, page: pages.Served, scheme: str) -> None:
    """What axe-core finds: contrast, labels, roles, order of headings."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe
    tab = Tab(chromium, viewport={"width": 1200, "height": 900}, color_scheme=scheme)
    tab.open(page.url, workers=3)
    tab.until("document.querySelectorAll('#runs tbody tr').length === 1")
    tab.page.check("#runs tbody input")
    tab.until("document.querySelectorAll('#legend li').length === 3")
    found = axe().run(tab.page).response
    told = [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]]
    assert told == []
    assert any(each["id"] == "color-contrast" for each in found["passes"])
    tab.context.close()


def test_the_keyboard_is_enough(tab: Tab, page: pages.Served) -> None:
    tab.open(page.url, workers=3)
    tab.until("document.querySelectorAll('#runs tbody tr').length === 1")
    reached = []
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        reached.append(
            tab.page.evaluate(
                "(e => e.id || e.closest('[id]')?.id || e.className)(document.activeElement)"
            )
        )
    for name in ("theme", "smooth", "log", "by", "whole", "charts", "filter", "warnings", "lines",
                 "events", "runs"):  # fmt: skip
        assert name in reached, name
    tab.page.focus('[data-chart="loss"] .plot')
    range_of = "JSON.stringify(Charts.view.range)"
    tab.page.keyboard.press("+")
    near = tab.page.evaluate(range_of)
    tab.page.keyboard.press("ArrowRight")
    assert near != "null" and tab.page.evaluate(range_of) not in (near, "null")
    tab.page.keyboard.press("0")
    assert tab.page.evaluate(range_of) == "null"
    tab.page.focus("#log")
    tab.page.keyboard.press("Space")
    assert tab.page.evaluate("Charts.view.log")
    tab.page.select_option("#theme", "dark")
    dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(18, 22, 27)"


def test_curves_are_zoomed_smoothed_and_laid_beside_others(tab: Tab, page: pages.Served) -> None:
    tab.open(page.url, workers=3)
    over = tab.page.locator('[data-chart="loss"] .u-over').bounding_box()
    tab.page.mouse.move(over["x"] + 100, over["y"] + 50)
    tab.page.mouse.down()
    tab.page.mouse.move(over["x"] + 300, over["y"] + 60, steps=4)
    tab.page.mouse.up()
    low, high = tab.page.evaluate("Charts.view.range")
    assert 0 < low < high < 500
    tab.page.click("#whole")
    assert tab.page.evaluate("Charts.view.range") is None
    tab.page.click("#nearer")
    low, high = tab.page.evaluate("Charts.view.range")
    assert 380 < low < 430 and 800 < high < 830
    tab.page.click("#farther")
    assert tab.page.evaluate("Charts.view.range") is None
    rough = curve(tab, "loss")
    tab.page.fill("#smooth", "0")
    assert curve(tab, "loss") != rough
    tab.page.select_option("#by", "seconds")
    assert "training" in curve(tab, "loss")
    tab.page.check("#runs tbody input")
    tab.until("document.querySelectorAll('#legend li').length === 3")
    assert "2026-11-21_10-00-00 0." in curve(tab, "loss")
    tab.page.uncheck("#runs tbody input")
    tab.until("document.querySelectorAll('#legend li').length === 2")


def test_the_log_is_filtered(tab: Tab, page: pages.Served) -> None:
    tab.open(page.url, workers=3)
    tab.page.fill("#filter", "WORKER 1")
    assert tab.page.locator("#lines li").count() == 1
    tab.page.fill("#filter", "")
    tab.page.check("#warnings")
    assert tab.text("#lines").strip().endswith("worker 3 (pi3) late")
    state = pages.status()
    line = LogLine(at=state.made_at, text="worker 9 is here")
    page.show(msgspec.structs.replace(state, lines=(*state.lines, line)))
    tab.page.uncheck("#warnings")
    tab.until("document.querySelectorAll('#lines li').length === 4")


def test_a_new_tab_has_the_log_and_the_marks_of_before(tab: Tab, page: pages.Served) -> None:
    """Of what a server that was killed has kept; a status has the newest lines and events only."""
    log, state = ServerLog(page.folder / "server.jsonl"), pages.status()
    for number in range(300):
        text = f"line {number}"
        log.add(LogLine(at=state.made_at - 900 + number, text=text, warning=number == 7))
    log.add(Event(kind=EventKind.RESTART, step=400, at=state.made_at - 500, text="server again"))
    for entry in (*state.lines, *state.events):
        log.add(entry)
    tab.open(page.url, workers=3)
    assert tab.page.locator("#lines li").count() == 303
    assert tab.page.locator("#events li").count() == 5
    tab.page.check("#warnings")
    assert "line 7" in tab.text("#lines li:first-child")
    newer = LogLine(at=state.made_at, text="one more")
    page.show(msgspec.structs.replace(state, lines=(*state.lines, newer), step=813))
    tab.until("document.querySelector('#steps').textContent.includes('813')")
    tab.page.uncheck("#warnings")
    assert tab.page.locator("#lines li").count() == 304

    marks = "document.querySelector('[data-chart=\"loss\"] canvas').toDataURL()"
    for by in ("step", "seconds"):
        tab.page.select_option("#by", by)
        with_marks = tab.page.evaluate(marks)
        tab.page.evaluate("Charts.marks([])")
        assert tab.page.evaluate(marks) != with_marks, f"there are marks by {by}"
        tab.page.evaluate("Charts.marks([{kind: 'restart', step: 400}])")


def test_the_last_state_stays_and_the_page_comes_back(chromium: Any, tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", 100)
    tab = Tab(chromium)
    with pages.served(tmp_path) as first:
        first.show(pages.status())
        tab.open(first.url, workers=3)
    tab.until("!document.querySelector('#gone').hidden")
    assert tab.text("#gone").startswith("The run is over. What you see is the last state")
    assert "step 812" in tab.text("#steps") and tab.page.locator(".plot canvas").count() == 3
    with pages.served(tmp_path, port=first.web.port) as second:
        second.show(pages.status(step=900))
        tab.until("document.querySelector('#steps').textContent.includes('step 900')")
        assert tab.page.is_hidden("#gone")
    tab.context.close()


def test_a_server_that_is_stuck_is_told(tab: Tab, page: pages.Served) -> None:
    tab.page.clock.install()
    tab.open(page.url, workers=3)
    tab.page.clock.run_for(4000)
    assert tab.page.is_hidden("#gone")
    tab.page.clock.run_for(4000)
    assert tab.text("#gone").startswith("The server has said nothing since")
    page.show(pages.status(step=813))
    tab.until("document.querySelector('#gone').hidden")


def test_the_watch_token_opens_it(chromium: Any, tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / pages.RUN / "metrics.jsonl", 100)
    tab = Tab(chromium)
    with pages.served(tmp_path, secret=pages.SECRET) as page:
        page.show(pages.status())
        tab.open(page.url)
        tab.page.wait_for_selector("#token")
        assert tab.page.is_hidden("#all")
        tab.page.fill("#token", "wrong")
        tab.page.keyboard.press("Enter")
        tab.until("document.querySelector('#refused').textContent.includes('not the watch token')")
        tab.page.fill("#token", pages.TOKEN)
        tab.page.keyboard.press("Enter")
        tab.until("document.querySelectorAll('#rounds tbody tr').length === 3")
        tab.context.close()
        other = Tab(chromium)
        other.open(f"{page.url}/#{pages.TOKEN}", workers=3)
        assert pages.TOKEN not in other.page.url, "the address is clean, to be shown or copied"
        other.page.reload()
        other.until("document.querySelectorAll('#rounds tbody tr').length === 3")
        assert pages.TOKEN not in str(other.context.cookies())
        other.context.close()


def test_a_report_opens_from_disk(tab: Tab, tmp_path: Path) -> None:
    pages.write_metrics(tmp_path / "metrics.jsonl", 300)
    state = pages.status(end="all epochs are done", trains=False, model=EVIL)
    assert report.write(tmp_path / "report.html", state, read(tmp_path / "metrics.jsonl")) is None
    tab.open((tmp_path / "report.html").as_uri(), workers=3)
    assert tab.text("#phase") == "ended: all epochs are done" and tab.text("#model") == EVIL
    assert "training 0." in curve(tab, "loss")
    assert tab.page.is_hidden("#earlier") and tab.page.is_hidden("#gone")
    tab.page.select_option("#theme", "dark")
    assert tab.page.locator(".plot canvas").count() == 3


SLOW = """
import os
import time

import torch
from torch.utils.data import TensorDataset

WAIT_S = float(os.environ.get("WAIT_S", "0"))


class Digits(TensorDataset):
    def __init__(self):
        super().__init__(torch.zeros(500, 784), torch.zeros(500, dtype=torch.long))

    def __getitem__(self, index):
        time.sleep(WAIT_S)
        return super().__getitem__(index)
"""
"""A data set that makes a worker slow: it waits at each sample, as its environment says."""


def test_a_live_run(chromium: Any, tmp_path: Path) -> None:
    """A worker that computes slowly is named in the sentence. It is stopped, turns late or silent,
    then gone; the end; the report."""
    (tmp_path / "planted.py").write_text(SLOW)
    with Run(tmp_path) as run:
        words = ("num_workers=2", "num_epochs=10000", "observer=false", "heartbeat_timeout=2")
        server = run.server(*words, "dataset.name=planted:Digits", "batch_size=8")
        address = server.wait_for("page: http").partition("page: ")[2]
        own = "allow=planted"
        workers = [run.worker(1, own), run.worker(2, own, WAIT_S="0.004")]
        tab = Tab(chromium)
        tab.open(address, workers=2)
        tab.until("/^worker 2 .* computes/.test(document.querySelector('#why').textContent)")
        assert re.search(
            r"^worker 2 \(.+\) computes \d+ ms of each round, the slowest other .+s: \d\d % of "
            "the time all wait for it: .*shares=speed gives it less$",
            tab.text("#why"),
        )
        assert tab.page.is_hidden('[data-chart="metric"]'), "nobody evaluates"
        row = tab.text("#rounds tbody tr:first-child")
        assert re.search(r"wait \d\d %", row), "the other one waits"
        tab.until("document.querySelectorAll('#topology g.training').length === 3")
        tab.until("document.querySelectorAll('.plot canvas').length === 2")
        workers[1].send(signal.SIGSTOP)
        tab.until(
            "document.querySelector('#topology g.late, #topology g.silent, #topology g.gone')"
        )
        tab.until("document.querySelectorAll('#topology g.gone').length === 1")
        assert "worker 2" in tab.text("#events li:first-child")
        workers[1].kill()
        server.send(signal.SIGINT)
        tab.until("!document.querySelector('#gone').hidden")
        assert "The run is over" in tab.text("#gone")
        assert tab.text("#phase") == "ended: stopped by Ctrl-C"
        server.end()
        tab.open((run.runs[-1] / "report.html").as_uri(), workers=2)
        assert tab.text("#phase") == "ended: stopped by Ctrl-C"
        assert tab.page.locator("#topology g.gone").count() == 1, "the other stayed to the end"
        tab.context.close()
        assert tab.wrong == []
