"""The report's page in a headless Chromium: what the reader sees, in both colour schemes. Skipped without a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.artifact import Artifact
from launch.report import write_report
from tests.launch.test_page import FIGURES

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make browser")

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
LOWEST_CONTRAST = 3.0
"""Of large text and graphics (WCAG 2.1, AA); body text has to have more."""
BODY_CONTRAST = 4.5

TEXTS = """
() => {
  const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  };
  const luminance = colour => {
    const [r, g, b] = colour.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    // Names of cells stand on bars of their own colour.
    if (!own || element.closest('.cell-name') || element.getClientRects().length === 0) continue;
    const style = getComputedStyle(element);
    const text = luminance(rgba(element.closest('svg') ? style.fill : style.color));
    const behind = luminance(ground(element));
    const contrast = (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
    found.push({text: element.textContent.trim().slice(0, 40), contrast, inPicture: !!element.closest('svg')});
  }
  return found;
}
"""
PICTURES = """
() => [...document.querySelectorAll('figure')].map(figure => {
  const svg = figure.querySelector('svg'), box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path, use, image, text')];
  return {
    name: svg.getAttribute('aria-label'), width: box.width, height: box.height,
    marks: marks.filter(mark => mark.getBoundingClientRect().width > 0).length,
    captioned: figure.querySelector('figcaption').innerText.trim().length > 0,
  };
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    own = next((path for name in NAMES if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as playwright:
        path = own or playwright.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("no Chromium is installed: make browser")
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(full_steps: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("browser"), "demo", full_steps)


@pytest.fixture(params=["light", "dark"])
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page, what the console said, and all that was asked for."""
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1240, "height": 900})
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asking: asked.append(asking.url))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    yield page, said, asked
    context.close()


def test_the_page_says_nothing_and_asks_for_nothing(opened: tuple[Any, list[str], list[str]], report: Path) -> None:
    _, said, asked = opened

    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]


def test_every_figure_is_seen(opened: tuple[Any, list[str], list[str]]) -> None:
    pictures = opened[0].evaluate(PICTURES)

    assert sorted(picture["name"] for picture in pictures) == sorted(FIGURES)
    for picture in pictures:
        assert picture["width"] > 300, picture
        assert picture["height"] > 100, picture
        assert picture["marks"] > 10, picture
        assert picture["captioned"], picture


def test_text_stands_out_from_its_ground(opened: tuple[Any, list[str], list[str]]) -> None:
    texts = opened[0].evaluate(TEXTS)

    assert len(texts) > 200
    faint = [text for text in texts if text["contrast"] < (LOWEST_CONTRAST if text["inPicture"] else BODY_CONTRAST)]
    assert faint == []


def test_the_schemes_differ_in_their_ground(browser: Any, report: Path) -> None:
    grounds = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(report.as_uri())
        grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        context.close()

    assert grounds == {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 18, 23)"}


@pytest.mark.parametrize("width", [390, 1240])
def test_nothing_is_wider_than_the_window(browser: Any, report: Path, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.goto(report.as_uri())

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
