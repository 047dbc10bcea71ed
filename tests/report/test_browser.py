"""A report in Chromium: scrubbed by mouse, keyboard and touch, on a phone and in the dark.

Needs the package `playwright` and a Chromium: `apt install chromium`, or `playwright install
chromium`. Skipped where one of them is missing.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from htm_pytorch.report import write_report
from tests.report.makers import make_trace

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        found = found or started.chromium.executable_path
        if not Path(found).exists():
            pytest.skip("needs a Chromium: apt install chromium, or playwright install chromium")
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page, whose every error and request fails the test."""
    torch.manual_seed(0)
    path = write_report(make_trace(), tmp_path / "report.html")
    options = getattr(request, "param", {})
    context = browser.new_context(viewport={"width": 1000, "height": 800}, **options)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda asked: problems.append(asked.url))
    page.goto(path.as_uri())
    page.wait_for_timeout(300)
    yield page
    assert [p for p in problems if p != path.as_uri() and not p.startswith("data:image/png")] == []
    context.close()


def now(page: Any) -> int:
    return int(page.input_value("#scrub"))


def said(page: Any) -> str:
    page.wait_for_timeout(300)
    return page.inner_text("#said")


def test_it_opens_at_the_first_moment_that_recalls(opened: Any) -> None:
    assert now(opened) == 4
    text = "Step 4: word4. Decides N. Recalls chunk 0 with 100%, most of it step 3. "
    assert said(opened) == text + "Chunk 0 is the one asked about."
    assert opened.inner_text("#numbers").split() == [
        "step",
        "4",
        "action",
        "N",
        "value",
        "0.5",
        "reward",
        "0",
    ]
    assert opened.locator("#recalled li.asked h3").inner_text() == "chunk 0: 100%"
    assert opened.locator("#frame").is_visible()


def test_keys(opened: Any) -> None:
    opened.keyboard.press("ArrowRight")
    assert now(opened) == 5
    assert said(opened) == "Step 5: word5. Nothing is asked of the memory here."
    assert opened.locator("#recalled li").count() == 0
    opened.focus("#scrub")
    for key, stop in (("Home", 0), ("ArrowRight", 1), ("ArrowUp", 2), ("ArrowLeft", 1), ("End", 8)):
        opened.keyboard.press(key)
        assert now(opened) == stop
    assert "Decides S. Recalls chunk 1 with 75%, most of it step 4; chunk 0 with 25%" in said(
        opened
    )
    assert opened.get_attribute("#scrub", "aria-valuetext") == "step 8, a decision"


def test_buttons_and_mouse(opened: Any) -> None:
    opened.click("#next")
    assert now(opened) == 8
    opened.click("#next")
    assert now(opened) == 8
    opened.click("#previous")
    assert now(opened) == 4
    box = opened.locator("#timeline").bounding_box()
    opened.mouse.move(box["x"] + 1, box["y"] + 40)
    opened.mouse.down()
    assert now(opened) == 0
    opened.mouse.move(box["x"] + box["width"] - 2, box["y"] + 40)
    assert now(opened) == 8
    opened.mouse.up()
    opened.mouse.move(box["x"] + 1, box["y"] + 40)
    assert now(opened) == 8


@pytest.mark.parametrize("opened", [{"has_touch": True, "is_mobile": True}], indirect=True)
def test_a_phone(opened: Any) -> None:
    opened.set_viewport_size({"width": 360, "height": 740})
    opened.wait_for_timeout(200)
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    assert opened.locator("#timeline svg").bounding_box()["width"] <= 360
    box = opened.locator("#timeline").bounding_box()
    opened.touchscreen.tap(box["x"] + 0.95 * box["width"], box["y"] + 40)
    assert now(opened) == 8
    for button in ("#previous", "#next"):
        size = opened.locator(button).bounding_box()
        assert size["width"] >= 44 and size["height"] >= 44


CONTRAST = """(selector) => {
  const light = (text) => {
    const part = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const style = getComputedStyle(document.querySelector(selector));
  const ink = light(selector.startsWith("svg") ? style.fill : style.color);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), paper];
}"""


@pytest.mark.parametrize("opened", [{"color_scheme": c} for c in ("light", "dark")], indirect=True)
def test_text_stands_out_by_day_and_night(opened: Any) -> None:
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for selector in ("body", ".hint", "dt", "button", "svg text", "svg .soft", "svg .bar"):
        contrast, paper = opened.evaluate(CONTRAST, selector)
        assert contrast >= 4.5, selector
        assert (paper < 0.1) == dark


def test_a_stronger_bar_is_taller_and_denser(opened: Any) -> None:
    """So that nothing is told by colour alone."""
    bars = opened.locator("svg .bar").evaluate_all(
        "(all) => all.map((b) => ['height', 'fill-opacity'].map((n) => Number(b.getAttribute(n))))"
    )
    assert len(bars) == 4
    assert bars == sorted(bars) and bars[0] < bars[-1]
    assert "100%" in opened.locator("svg").text_content()


def test_frames_are_those_of_the_steps(opened: Any) -> None:
    read = """() => { const c = document.getElementById("frame");
      return Array.from(c.getContext("2d").getImageData(0, 0, c.width, c.height).data); }"""
    opened.focus("#scrub")
    for _ in range(2):
        opened.keyboard.press("ArrowRight")
    shown = torch.tensor(opened.evaluate(read)).view(20, 24, 4)
    assert torch.equal(shown[..., :3], make_trace_frames()[6].long())


def make_trace_frames() -> torch.Tensor:
    """Of the trace that the fixture made, from the same seed."""
    torch.manual_seed(0)
    frames = make_trace().frames
    assert frames is not None
    return frames
