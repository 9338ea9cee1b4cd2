"""Figures as inline SVG that takes its colours and its font from the page.

matplotlib draws with a colour of its own for every role; afterwards these become CSS variables, so
that one drawing serves light and dark. Nothing of the surroundings gets in: no date, no
matplotlibrc of the user's, no ids that two figures could share.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipeline.report.html import Html, tag

ROLES = ("ink", "faint", "grid", "paper", "right", "wrong", "rectified", "plain")
SERIES = 6
"""How many colours curves have before dashes tell them apart."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_NAMES = (*ROLES, *(f"series-{n}" for n in range(SERIES)))
_HEX = {name: f"#0100{at:02x}" for at, name in enumerate(_NAMES)}
"""A colour that nothing else has, for each name: what is replaced afterwards."""
WIDTH, HEIGHT = 360.0, 236.0
"""In CSS pixels: about as wide as a phone, so that a figure's text is as large as the page's."""


def colour(name: str) -> str:
    """What to hand to matplotlib for a role, or for `series-<n>`."""
    return _HEX[name]


def series(position: int) -> tuple[str, Any]:
    """Colour name and dashes of the n-th curve; they repeat after SERIES * len(DASHES)."""
    return f"series-{position % SERIES}", DASHES[position // SERIES % len(DASHES)]


@dataclass
class Drawing:
    """A figure with one pair of axes; `svg` is there once the `drawing` is left."""

    axes: Axes
    svg: Html = field(default_factory=Html)


@contextmanager
def drawing(
    name: str, told: str, x: str, y: str, width: float = WIDTH, height: float = HEIGHT
) -> Iterator[Drawing]:
    """Axes to draw on. name: of the figure, unique on the page. told: what it shows, for those who
    do not see it. x, y: the axes' titles, none of them anybody's text (matplotlib reads `$`).
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says
        ink, faint, grid = colour("ink"), colour("faint"), colour("grid")
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": name,
                "font.size": 10.5,
                "text.color": ink,
                "axes.labelcolor": faint,
                "axes.labelsize": 10.5,
                "axes.edgecolor": faint,
                "axes.linewidth": 0.8,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.grid": True,
                "axes.axisbelow": True,
                "grid.color": grid,
                "grid.linewidth": 0.7,
                "xtick.color": faint,
                "ytick.color": faint,
                "xtick.major.size": 0,
                "ytick.major.size": 0,
                "lines.linewidth": 1.8,
                "lines.solid_capstyle": "round",
            }
        )
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        drawn = Drawing(axes)
        yield drawn
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        drawn.svg = _inline(written.getvalue(), name, told)


def _inline(svg: str, name: str, told: str) -> Html:
    """What matplotlib wrote, as part of a page."""
    viewbox = re.search(r'viewBox="([^"]+)"', svg)
    assert viewbox is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # would hold for all the page
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    # Ids: only those that something refers to, each under the figure's name.
    used = set(re.findall(r"#([A-Za-z]\w*)[\")]", body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(
        r"#([A-Za-z]\w*)([\")])", lambda m: f"#{name}-{m[1]}{m[2]}" if m[1] in used else m[0], body
    )
    for role, hexadecimal in _HEX.items():
        body = body.replace(hexadecimal, f"var(--{role})")
    body = re.sub(r"\s*\n\s*", "\n", body)
    return tag("svg", Html(body), viewBox=viewbox[1], role="img", aria_label=told)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only: epochs, views."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def captioned(svg: Html, title: str, note: str = "", legend: Html | None = None) -> Html:
    """A figure with its title above and, in smaller letters, what there is to know about it."""
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), tag("span", note) if note else None, legend),
        svg,
    )


def legend(*entries: tuple[str, str, Any]) -> Html:
    """Colour name, text and dashes of each curve. HTML, so that long names wrap on a phone."""
    items = [tag("li", swatch(name, dashes), text) for name, text, dashes in entries]
    return tag("ul", items, class_="legend")


def swatch(name: str, dashes: Any = "solid") -> Html:
    """A short piece of the curve that is drawn so."""
    pattern = None if dashes == "solid" else " ".join(f"{1.8 * part:g}" for part in dashes[1])
    line = tag(
        "line",
        x1=1, y1=5, x2=21, y2=5, style=f"stroke:var(--{name})", stroke_dasharray=pattern
    )  # fmt: skip
    return tag("svg", line, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")
