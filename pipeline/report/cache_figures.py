"""The figures about one cache."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.report.figures import captioned, colour, drawing, legend, whole_numbers
from pipeline.report.html import Html
from pipeline.report.measured import Draw, entropy
from stages.scores import BINS, Calibration

HISTOGRAM_BINS = 30
RIGHT = ("right", "rows the teacher has right", "solid")
WRONG = ("wrong", "rows it has wrong", "solid")


def reliability(name: str, found: Calibration) -> Html:
    """Accuracy against confidence; the diagonal is a teacher that is as sure as it should be."""
    filled = (found.rows > 0).nonzero().squeeze(1)
    told = "Reliability diagram: accuracy against confidence in 15 bins"
    with drawing(name, told, "confidence (largest probability), %", "accuracy, %") as drawn:
        axes, width = drawn.axes, 100 / BINS
        middles = ((filled + 0.5) * width).tolist()
        accuracy = (100 * found.accuracy[filled]).tolist()
        axes.bar(middles, accuracy, width * 0.88, color=colour("right"), alpha=0.75, linewidth=0)
        axes.plot([0, 100], [0, 100], color=colour("ink"), linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
    note = "Bars below the dashed line: surer than right. Above it: too modest."
    return captioned(drawn.svg, "Is it as sure as it is right?", note)


def confidences(name: str, draw: Draw) -> Html:
    """How sure the teacher is where it is right, and where it is wrong."""
    sure = 100 * torch.softmax(draw.logits, dim=1).amax(1)
    told = "Histogram of confidence on right and on wrong rows"
    svg = _histograms(
        name,
        told,
        "confidence (largest probability), %",
        [("right", sure[~draw.wrong]), ("wrong", sure[draw.wrong])],
        100.0,
    )
    return captioned(svg, "How sure, right and wrong", legend=legend(RIGHT, WRONG))


def entropies(name: str, draw: Draw) -> Html:
    """Entropy of rows at T=1, right and wrong ones."""
    found = entropy(draw.logits)
    highest = math.log(draw.logits.shape[1])
    svg = _histograms(
        name,
        "Histogram of the entropy of right and of wrong rows at temperature 1",
        "entropy at T = 1, nats",
        [("right", found[~draw.wrong]), ("wrong", found[draw.wrong])],
        highest,
    )
    note = f"From one certain class (0) to all alike (ln {draw.logits.shape[1]:,} = {highest:.2f})."
    return captioned(svg, "Entropy of the teacher's rows", note, legend(RIGHT, WRONG))


def rectified_entropies(name: str, draw: Draw) -> Html:
    """Entropy of wrong rows before and after rectification, as the loss reads them."""
    assert draw.after is not None
    before = entropy(draw.before, draw.temperature)
    after = entropy(draw.after, draw.temperature)
    highest = max(float(before.max()), float(after.max()))
    lowest = min(float(before.min()), float(after.min()))
    svg = _histograms(
        name,
        "Histogram of the entropy of wrong rows before and after rectification",
        f"entropy at T = {draw.temperature:g}, nats",
        [("wrong", before), ("rectified", after)],
        highest,
        lowest,
    )
    shown = legend(("wrong", "as cached", "solid"), ("rectified", "rectified", "solid"))
    change = float(after.double().mean() - before.double().mean())
    note = f"Rectification changes their mean entropy by {change:+.3f} nats."
    return captioned(svg, "Wrong rows, before and after", note, shown)


def accuracy_by_view(name: str, top1: Mapping[int, float]) -> Html:
    """The teacher's accuracy on each view."""
    views, values = [*top1], [100 * value for value in top1.values()]
    told = "The teacher's accuracy on each cached view"
    with drawing(name, told, "view", "top-1, %") as drawn:
        mean = sum(values) / len(values)
        drawn.axes.axhline(mean, color=colour("faint"), linewidth=1, linestyle=(0, (4, 3)))
        size = 16 if len(views) <= 60 else 7
        drawn.axes.scatter(views, values, s=size, color=colour("right"), linewidth=0, zorder=3)
        room = max(0.2, 0.35 * (max(values) - min(values)))
        drawn.axes.set_ylim(min(values) - room, min(100.5, max(values) + room))
        whole_numbers(drawn.axes)
    spread = f"{min(values):.2f} % to {max(values):.2f} %"
    note = f"All rows of every view: {spread}. Dashed: the mean, {mean:.2f} %."
    return captioned(drawn.svg, "Teacher accuracy by view", note)


def _histograms(
    name: str, told: str, x: str, parts: list[tuple[str, Tensor]], high: float, low: float = 0.0
) -> Html:
    """Histograms over one another: each in shares of its own rows, (role, values) at a time."""
    high = max(high, low + 1e-6)
    with drawing(name, told, x, "share of rows, %") as drawn:
        edges = torch.linspace(low, high, HISTOGRAM_BINS + 1).numpy()
        for role, values in parts:
            if not len(values):
                continue
            counts = torch.histc(values.float(), HISTOGRAM_BINS, low, high)
            shares = (100 * counts / len(values)).numpy()
            drawn.axes.stairs(shares, edges, fill=True, color=colour(role), alpha=0.22, linewidth=0)
            drawn.axes.stairs(shares, edges, color=colour(role), linewidth=1.6)
        drawn.axes.set_xlim(low, high)
        drawn.axes.set_ylim(0)
    return drawn.svg
