"""The page in headless Chromium: offline, by keyboard, on a phone, in dark colours, in print."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from moe_replay.report.page import open_runs, page_of

from .conftest import HOSTILE, Make

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed: scripts/chromium installs it on Debian"
)
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, make_run: Make) -> Path:
    """Return the page of a run with R3, one without replay, and one with a dropped sample."""
    folder = tmp_path_factory.mktemp("page")
    runs = open_runs(
        [
            make_run(folder / "R3"),
            make_run(folder / "disabled", mode="disabled"),
            make_run(folder / "planted", dropped_step=2),
        ]
    )
    file = folder / "report.html"
    file.write_text(page_of(runs, written_at=datetime(2026, 12, 1, 12)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return one browser, with a profile of its own, for all tests."""
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield launched
        launched.close()


class Opened:
    """A page in the browser, with what it asked for and complained of."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(
            offline=True, viewport={"width": options.pop("width", 1280), "height": 900}, **options
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("#plot-metric .main-svg")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def data(self, key: str) -> list[dict[str, Any]]:
        """Return the traces that a figure has drawn."""
        script = f"JSON.stringify(document.getElementById('plot-{key}').data)"
        return json.loads(self.page.evaluate(script))


@pytest.fixture(scope="module")
def desktop(browser: Any, page_file: Path) -> Iterator[Opened]:
    """Return the page at the width of a desktop; who changes it sets it back."""
    with Opened(browser, page_file) as opened:
        yield opened


def test_it_loads_without_a_network_and_carries_the_numbers_of_the_runs(desktop, page_file):
    assert desktop.said == []
    assert desktop.asked == [page_file.as_uri()]
    drawn = {trace["name"]: trace for trace in desktop.data("reward")}
    assert drawn.keys() == {"R3", "disabled", "planted"}
    assert drawn["planted"]["y"] == [0.1, 0.2, 0.3]
    assert desktop.data("flips-2")[0]["z"] == [[0.01, 0.02, 0.03], [0.03, 0.03, 0.03]]
    marked = [t for t in desktop.data("agreement") if t["name"] == "planted dropped"]
    assert (marked[0]["x"], marked[0]["y"]) == ([2], [0.6])
    # What is drawn, not only what is held: a bar a station and run.
    assert desktop.page.locator("#plot-stations .bars .point path").count() == 6
    verdicts = desktop.page.locator(".card.bad").all_inner_texts()
    assert len(verdicts) == 1
    assert "Misaligned: 1 sample had routes of other tokens" in verdicts[0]


def test_a_script_that_is_not_its_own_does_not_run(browser, page_file, tmp_path):
    """The digests in its policy are what keeps them out, not only the escapes."""
    page = re.sub(r"<script>.*?</script>", "", page_file.read_text(encoding="utf-8"), flags=re.S)
    script = "<script>document.title = 'ran'</script></main>"
    titles = []
    for name, text in (("with", page), ("without", re.sub("<meta http-equiv.*?>", "", page))):
        planted = tmp_path / f"{name}-policy.html"
        planted.write_text(text.replace("</main>", script), encoding="utf-8")
        context = browser.new_context(offline=True)
        opened = context.new_page()
        opened.goto(planted.as_uri())
        titles.append(opened.title())
        context.close()
    assert titles == ["R3, disabled, planted · moe-replay report", "ran"]


def test_hostile_completions_are_text(desktop):
    page = desktop.page
    assert page.title() == "R3, disabled, planted · moe-replay report"
    assert page.locator("main img").count() == 0
    shown = page.locator("#sample").inner_text()
    # The page opens with the sample that the guard dropped.
    assert "Dropped by the guard" in shown
    assert page.locator("#sample-run option:checked").inner_text() == "planted"
    assert page.locator("#sample-step").input_value() == "2"
    tokens = page.locator("#sample .tokens .token").all_inner_texts()
    assert tokens == ["</script>", "<b>", "⟨U+202E⟩"]
    assert "\u202e" in HOSTILE and "\u202e" not in page.locator("body").inner_text()


def test_tokens_are_read_by_keyboard_and_say_ratio_and_flips(desktop):
    page = desktop.page
    page.focus("#sample .tokens")
    # It begins at the token that is farthest off: exp(-1) and exp(-1.69315).
    said = page.locator("#sample .token-words")
    assert said.inner_text() == (
        'Token 2 of 3 "<b>": engine 0.3679, trainer 0.1839, ln ratio -0.6931, 2 layers flip'
    )
    page.keyboard.press("ArrowLeft")
    assert said.inner_text().endswith("ln ratio 0, no layer flips")
    page.keyboard.press("End")
    assert said.inner_text().endswith("routes not compared")
    colours = page.locator("#sample .tokens .token").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert colours[0] == colours[2] == "rgba(0, 0, 0, 0)" != colours[1]


def test_it_is_used_by_keyboard_alone(desktop):
    page = desktop.page
    page.focus("a")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.evaluate("delete document.documentElement.dataset.theme; showTheme()")
    page.focus("[data-toggle='1']")
    page.keyboard.press("Space")
    hidden = [t["name"] for t in desktop.data("reward") if t.get("visible") is False]
    assert hidden == ["disabled"]
    page.keyboard.press("Space")
    summary = page.locator("#learning summary").first
    summary.focus()
    page.keyboard.press("Enter")
    cells = page.locator("#learning table").first.locator("tbody tr").all_inner_texts()
    assert cells[0].split() == ["1", "0.1000", "0.1000", "0.1000"]


def test_every_figure_has_a_heading_words_and_a_table(desktop):
    figures = desktop.page.locator("figure:has(.plot)")
    assert figures.count() == 11
    for figure in figures.all():
        assert figure.locator("h3").count() == 1
        assert len(figure.locator(".plot").get_attribute("aria-label")) > 20
        assert figure.locator("table tbody tr").count() > 0
    levels = desktop.page.locator("h1, h2, h3").evaluate_all(
        "all => all.map(one => Number(one.tagName[1]))"
    )
    steps = [after - before for before, after in itertools.pairwise(levels)]
    assert (levels.count(1), max(steps)) == (1, 1)


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_stands_out_in_either_scheme(scheme, desktop):
    desktop.page.emulate_media(color_scheme=scheme)
    for name in ("p.reading", ".card.bad .verdict", "summary", "dt", ".card.good .verdict"):
        assert _contrast(desktop.page, name) >= 4.5, name
    # A figure is drawn again when the scheme changes, some time after.
    desktop.page.wait_for_function(
        """ink => getComputedStyle(document.querySelector("#plot-reward .xtick text")).fill === ink""",
        arg={"light": "rgb(27, 31, 36)", "dark": "rgb(230, 237, 243)"}[scheme],
    )


def _contrast(page: Any, selector: str) -> float:
    """Return the contrast of text and what is behind it, by WCAG 2."""
    colours = page.locator(selector).first.evaluate(
        """one => {
          let behind = one;
          const back = (each) => getComputedStyle(each).backgroundColor;
          while (back(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [getComputedStyle(one).color, back(behind)];
        }"""
    )
    lights = sorted(map(_luminance, colours))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_phone_needs_no_sideways_scrolling(browser, page_file):
    with Opened(browser, page_file, width=390, has_touch=True, is_mobile=True) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        widths = page.locator(".plot .main-svg").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().right)"
        )
        assert max(widths) <= 390
        page.locator("#sample .tokens .token").first.tap()
        assert page.locator("#sample .token-words").inner_text().startswith("Token 1 of 3")


def test_it_prints_in_light_colours_without_controls(desktop):
    page = desktop.page
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    white = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert white == "rgb(255, 255, 255)"
    assert not page.locator("header.top").is_visible()
    assert not page.locator(".controls").first.is_visible()
    assert page.locator("#plot-gap .main-svg").first.bounding_box()["width"] <= 712
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen", color_scheme="light")
    assert page.get_attribute("html", "data-theme") is None
    assert desktop.said == []
