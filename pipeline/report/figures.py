"""Figures as inline SVG that takes its colours and its font from the page; those of a cache.

matplotlib draws with a colour of its own for every role; afterwards these become CSS variables, so
that one drawing serves light and dark. Nothing of the surroundings gets in: no date, no
matplotlibrc of the user's, no ids that two figures could share.
"""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import torch
from matplotlib import figure as plots
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pipeline.report.measured import Draw, Statistics, entropy
from stages.scores import BINS, Calibration

ROLES = ("ink", "faint", "grid", "paper", "right", "wrong", "rectified", "plain")
SERIES = 6
"""How many colours curves have before dashes tell them apart."""
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_NAMES = (*ROLES, *(f"series-{n}" for n in range(SERIES)))
_HEX = {name: f"#0100{at:02x}" for at, name in enumerate(_NAMES)}
"""A colour that nothing else has, for each name: what is replaced afterwards."""
WIDTH, HEIGHT = 360.0, 236.0
"""In CSS pixels: about as wide as a phone, so that a figure's text is as large as the page's."""
HISTOGRAM_BINS = 30


def colour(name: str) -> str:
    """What to hand to matplotlib for a role, or for `series-<n>`."""
    return _HEX[name]


def series(position: int) -> tuple[str, Any]:
    """Colour name and dashes of the n-th curve; they repeat after SERIES * len(DASHES)."""
    return f"series-{position % SERIES}", DASHES[position // SERIES % len(DASHES)]


Entry = tuple[str, str, Any]
"""Colour name, text and dashes of a curve, for a legend."""


@dataclass(frozen=True)
class Figure:
    """A figure with its title and what there is to know about it. drawings: the SVG, by the width
    of the window that it is for ("wide", "narrow", "" for any).
    """

    title: str
    drawings: Sequence[tuple[str, str]]
    note: str = ""
    legend: Sequence[Entry] = ()


@dataclass
class Drawing:
    """A figure with one pair of axes; `svg` is there once the `drawing` is left."""

    axes: Axes
    svg: str = ""


@contextmanager
def drawing(
    name: str, description: str, x: str, y: str, width: float = WIDTH, height: float = HEIGHT
) -> Iterator[Drawing]:
    """Axes to draw on. name: of the figure, unique on the page. description: what it shows, for
    those who do not see it. x, y: the axes' titles, none of them anybody's text, as matplotlib
    reads `$`.
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
        figure = plots.Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        drawn = Drawing(axes)
        yield drawn
        written = io.StringIO()
        # Not `savefig`, which lays a figure out in a first drawing that it throws away.
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None, "Creator": None})
        drawn.svg = _inline(written.getvalue(), name, description)


def _inline(svg: str, name: str, description: str) -> str:
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
    return f'<svg viewBox="{viewbox[1]}" role="img" aria-label="{escape(description)}">{body}</svg>'


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only: epochs, views."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def pattern(dashes: Any) -> str:
    """`stroke-dasharray` of a short piece of a curve that is drawn with these dashes."""
    return " ".join(f"{1.8 * part:g}" for part in dashes[1])


# ---- a cache --------------------------------------------------------------------------------


def cache_figures(
    key: str, draw: Draw, found: Calibration, top1: Mapping[int, float]
) -> list[Figure]:
    """Every figure about one cache. key: of the cache, unique on the page. top1: by view."""
    figures = [_reliability(f"{key}-reliability", found), *_confidence(key, draw)]
    if draw.after is not None and bool(draw.wrong.any()):
        figures.append(_rectified_entropies(f"{key}-rectified", draw, draw.after))
    return [*figures, _accuracy_by_view(f"{key}-views", top1)]


def _reliability(name: str, found: Calibration) -> Figure:
    """Accuracy against confidence; on the diagonal the teacher is calibrated."""
    filled = (found.rows > 0).nonzero().squeeze(1)
    description = f"Reliability diagram: accuracy against confidence in {BINS} bins"
    with drawing(name, description, "confidence (largest probability), %", "accuracy, %") as drawn:
        axes, width = drawn.axes, 100 / BINS
        middles = ((filled + 0.5) * width).tolist()
        accuracy = (100 * found.accuracy[filled]).tolist()
        axes.bar(middles, accuracy, width * 0.88, color=colour("right"), alpha=0.75, linewidth=0)
        axes.plot([0, 100], [0, 100], color=colour("ink"), linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
    note = "Bars below the dashed line: overconfident. Above it: underconfident."
    return Figure("Reliability", [("", drawn.svg)], note)


def _confidence(key: str, draw: Draw) -> list[Figure]:
    """Confidence and entropy at T=1, of right rows and of wrong ones."""
    classes = draw.logits.shape[1]
    confidence = 100 * torch.softmax(draw.logits, dim=1).amax(1)
    rows = {"right": ~draw.wrong, "wrong": draw.wrong}
    legend = [
        ("right", "rows the teacher has right", "solid"),
        ("wrong", "rows it has wrong", "solid"),
    ]
    measures = (
        (
            *("confidence", "confidence (largest probability), %", confidence, 100.0),
            *("Confidence, right and wrong", ""),
        ),
        (
            *("entropy", "entropy at T = 1, nats", entropy(draw.logits), math.log(classes)),
            "Entropy of the teacher's rows",
            f"From one certain class (0) to all alike (ln {classes:,} = {math.log(classes):.2f}).",
        ),
    )
    figures = []
    for what, x, values, high, title, note in measures:
        description = f"Histogram of the {what} of right and of wrong rows at temperature 1"
        parts = {role: values[chosen] for role, chosen in rows.items()}
        svg = _histograms(f"{key}-{what}", description, x, parts, (0.0, high))
        figures.append(Figure(title, [("", svg)], note, legend))
    return figures


def _rectified_entropies(name: str, draw: Draw, rectified: Tensor) -> Figure:
    """Entropy of wrong rows before and after rectification, as the loss reads them."""
    before, after = (entropy(rows, draw.temperature) for rows in (draw.before, rectified))
    both = torch.cat([before, after])
    svg = _histograms(
        name,
        "Histogram of the entropy of wrong rows before and after rectification",
        f"entropy at T = {draw.temperature:g}, nats",
        {"wrong": before, "rectified": after},
        (float(both.min()), float(both.max())),
    )
    change = float(after.double().mean() - before.double().mean())
    note = f"Rectification changes their mean entropy by {change:+.3f} nats."
    legend = [("wrong", "as cached", "solid"), ("rectified", "rectified", "solid")]
    return Figure("Wrong rows, before and after", [("", svg)], note, legend)


def confidence_of_caches(name: str, shown: Sequence[Statistics]) -> Figure:
    """The confidence of several teachers, each in shares of its own rows."""
    parts = {f"series-{at}": 100 * each.confidence for at, each in enumerate(shown)}
    text = "Histogram of the confidence of teachers of folds and of one teacher, at temperature 1"
    svg = _histograms(name, text, "confidence (largest probability), %", parts, (0.0, 100.0))
    legend = [
        (f"series-{at}", f"{each.name}, {'out of fold' if each.folds else 'one teacher'}", "solid")
        for at, each in enumerate(shown)
    ]
    return Figure("Confidence by cache", [("", svg)], "", legend)


def _accuracy_by_view(name: str, top1: Mapping[int, float]) -> Figure:
    """The teacher's accuracy on each view."""
    views, values = [*top1], [100 * value for value in top1.values()]
    mean = sum(values) / len(values)
    with drawing(name, "The teacher's accuracy on each cached view", "view", "top-1, %") as drawn:
        drawn.axes.axhline(mean, color=colour("faint"), linewidth=1, linestyle=(0, (4, 3)))
        size = 16 if len(views) <= 60 else 7
        drawn.axes.scatter(views, values, s=size, color=colour("right"), linewidth=0, zorder=3)
        room = max(0.2, 0.35 * (max(values) - min(values)))
        drawn.axes.set_ylim(min(values) - room, min(100.5, max(values) + room))
        whole_numbers(drawn.axes)
    spread = f"{min(values):.2f} % to {max(values):.2f} %"
    note = f"All rows of every view: {spread}. Dashed: the mean, {mean:.2f} %."
    return Figure("Teacher accuracy by view", [("", drawn.svg)], note)


def _histograms(
    name: str, description: str, x: str, parts: Mapping[str, Tensor], limits: tuple[float, float]
) -> str:
    """Histograms over one another: each in shares of its own rows. parts: values by role."""
    low, high = limits[0], max(limits[1], limits[0] + 1e-6)
    with drawing(name, description, x, "share of rows, %") as drawn:
        edges = torch.linspace(low, high, HISTOGRAM_BINS + 1).numpy()
        for role, values in parts.items():
            if not len(values):
                continue
            counts = torch.histc(values.float(), HISTOGRAM_BINS, low, high)
            shares = (100 * counts / len(values)).numpy()
            drawn.axes.stairs(shares, edges, fill=True, color=colour(role), alpha=0.22, linewidth=0)
            drawn.axes.stairs(shares, edges, color=colour(role), linewidth=1.6)
        drawn.axes.set_xlim(low, high)
        drawn.axes.set_ylim(0)
    return drawn.svg
