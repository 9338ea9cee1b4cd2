"""The page in a real browser: scripts run, tables sort, a phone needs no sideways scrolling."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, browser
from reports import write_sweep

from pipeline.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(small_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a rectification, and a sweep."""
    folder = tmp_path_factory.mktemp("report")
    cache = shutil.copytree(small_cache, folder / "a-name-as-long-as-people-give-to-caches.zarr")
    write_sweep(folder / "sweep")
    return write_report([str(cache), str(folder / "sweep")], str(folder / "report.html"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_shown_without_a_complaint(
    chromium: Browser, page: Path, width: int, scheme: str
) -> None:
    chromium.open(page, width, scheme)
    chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert chromium.run("innerWidth") == width
    assert chromium.run("document.scrollingElement.scrollWidth") <= width
    assert chromium.complaints() == []
    assert chromium.requests() == [page.resolve().as_uri()]


def test_both_colour_schemes_can_be_read(chromium: Browser, page: Path) -> None:
    """Text and figures have a contrast of at least 4.5 and 3 with the page (WCAG 2.2, AA)."""
    script = """(() => {
      const style = getComputedStyle(document.documentElement);
      const light = (name) => {
        const hex = style.getPropertyValue("--" + name).trim();
        const [r, g, b] = [1, 3, 5].map((at) => {
          const c = parseInt(hex.slice(at, at + 2), 16) / 255;
          return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const names = ["ink", "faint", "right", "wrong", "rectified", "series-0", "series-1",
                     "series-2", "series-3", "series-4", "series-5"];
      const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      return Object.fromEntries(names.map((n) => [n, ratio(light(n), light("paper"))]));
    })()"""
    papers = []
    for scheme in ("light", "dark"):
        chromium.open(page, 1280, scheme)
        for name, contrast in chromium.run(script).items():
            assert contrast >= (3 if name.startswith("series") else 4.5), (scheme, name, contrast)
        papers.append(chromium.run("getComputedStyle(document.body).backgroundColor"))
        text = "getComputedStyle(document.querySelector('figure svg text')).fill"
        assert chromium.run(text) not in papers
    assert papers[0] != papers[1]


SORTED = """(() => {
  const table = [...document.querySelectorAll("table")].find((t) =>
    t.caption.textContent.startsWith("Every run"));
  const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "last top-1, %");
  const head = table.tHead.rows[0].cells[column];
  return {
    head,
    values: [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value)),
    sort: head.getAttribute("aria-sort"),
  };
})()"""


def test_a_click_sorts_and_another_turns_round(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280)
    chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    before = chromium.run(f"{SORTED}.values")
    assert chromium.run(f"{SORTED}.sort") is None
    for direction, down in (("descending", True), ("ascending", False)):
        chromium.run(f"{SORTED}.head.querySelector('button').click()")
        assert chromium.run(f"{SORTED}.values") == sorted(before, reverse=down)
        assert chromium.run(f"{SORTED}.sort") == direction
    chromium.run(f"{SORTED}.head.querySelector('button').focus()")
    chromium.press("Enter", 13)
    assert chromium.run(f"{SORTED}.values") == sorted(before, reverse=True)


def test_words_are_sorted_from_a_to_z(chromium: Browser, page: Path) -> None:
    chromium.open(page, 1280)
    chromium.run("document.querySelectorAll('th button').forEach(b => b.click())")
    chromium.run("document.querySelectorAll('th:first-child button').forEach(b => b.click())")
    names = chromium.run("""[...document.querySelectorAll("table")].find((t) =>
      t.caption.textContent.startsWith("Every run")).tBodies[0].innerText.split("\\n")""")
    runs = [line.partition("\t")[0] for line in names if line.startswith("sweep/")]
    assert runs == sorted(runs)
    assert chromium.complaints() == []
