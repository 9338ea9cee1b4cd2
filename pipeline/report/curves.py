"""The figures about students: accuracy, loss parts and weights, epoch by epoch."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from pipeline.console import percent
from pipeline.report.figures import (
    DASHES,
    SERIES,
    Entry,
    Figure,
    colour,
    drawing,
    series,
    whole_numbers,
)
from pipeline.report.groups import Group
from pipeline.runs import Spread

MOST_CURVES = SERIES * len(DASHES)
_MOST_BANDS = 6
"""With more groups the bands would cover one another; the table has every deviation."""
PARTS = {
    "loss_ce": ("faint", "cross-entropy with the label"),
    "loss_right": ("right", "distillation, rows the teacher has right"),
    "loss_wrong": ("wrong", "distillation, rows it has wrong"),
    "loss_kd": ("series-0", "distillation, all rows"),
}
"""Metrics that the loss is made of, before its weights: colour and words."""


def accuracies(name: str, groups: Sequence[Group], teacher: float | None) -> Figure:
    """Test accuracy of each group: the mean over seeds, with a band of one standard deviation.

    Drawn twice, for wide windows and for narrow ones: page.css shows one of the two.
    """
    shown = [group for group in groups if group.curve("test_top1")][:MOST_CURVES]
    bands = len(shown) <= _MOST_BANDS
    description, teachers = "Test accuracy of each group of students by epoch", (0, (4, 3))
    drawings = []
    for kind, width, height in (("wide", 620.0, 330.0), ("narrow", 360.0, 250.0)):
        with drawing(
            f"{name}-{kind}", description, "epoch", "test top-1, %", width, height
        ) as drawn:
            for at, group in enumerate(shown):
                curve = [point.scaled(100) for point in group.curve("test_top1")]
                _band(drawn.axes, curve, *series(at), filled=bands)
            if teacher is not None:
                ink = colour("ink")
                drawn.axes.axhline(100 * teacher, color=ink, linewidth=1.1, linestyle=teachers)
            whole_numbers(drawn.axes)
        drawings.append((kind, drawn.svg))
    legend: list[Entry] = []
    for at, group in enumerate(shown):
        of, dashes = series(at)
        legend.append((of, f"{group.label} (n = {len(group.runs)})", dashes))
    if teacher is not None:
        legend.append(("ink", f"the teacher, {percent(teacher)}", teachers))
    note = "Means over seeds" + ("; bands are one standard deviation." if bands else ".")
    if len(shown) < len(groups):
        note += f" Curves of {len(shown)} of {len(groups)} groups."
    return Figure("Test accuracy by epoch", drawings, note, legend)


def loss_parts(name: str, group: Group, parts: Sequence[str]) -> Figure | None:
    """What the loss of a group was made of in every epoch; None where it is a single term.

    parts: those that any group of the page has, see `part_names`.
    """
    curves = {key: curve for key in parts if (curve := group.curve(key))}
    if "loss_right" in curves:
        curves.pop("loss_kd", None)  # the sum of the two
    if not curves:
        return None
    description = "Parts of the training loss by epoch"
    with drawing(name, description, "epoch", "mean over the epoch", height=200.0) as drawn:
        for key, curve in curves.items():
            _band(drawn.axes, curve, _part_colour(key, parts), "solid")
        drawn.axes.set_ylim(0)
        whole_numbers(drawn.axes)
    return Figure(group.label, [("", drawn.svg)])


def part_names(groups: Sequence[Group]) -> list[str]:
    """The metrics that losses are made of, the known ones first."""
    found: set[str] = set()
    for line in (line for group in groups for run in group.runs for line in run.history):
        found |= line.keys() - ({"loss_kd"} if "loss_right" in line else set())
    others = sorted(key for key in found if key.startswith("loss_") and key not in PARTS)
    return [key for key in PARTS if key in found] + others


def _part_colour(key: str, parts: Sequence[str]) -> str:
    """The same for a part in every figure."""
    return PARTS[key][0] if key in PARTS else series(parts.index(key))[0]


def parts_legend(parts: Sequence[str]) -> list[Entry]:
    """One for all figures of loss parts."""
    words = {key: description for key, (_, description) in PARTS.items()}
    named = ((key, words.get(key, key.removeprefix("loss_"))) for key in parts)
    return [(_part_colour(key, parts), description, "solid") for key, description in named]


def weights(name: str, groups: Sequence[Group]) -> tuple[list[str], list[Figure]]:
    """How much right and wrong rows weighed, for each schedule in use: constant ones in words."""
    by_schedule: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for group in groups:
        if not any(run.uses_teacher for run in group.runs):
            continue  # its weights weigh nothing
        right, wrong = group.curve("weight_right"), group.curve("weight_wrong")
        schedule = tuple((r.mean, w.mean) for r, w in zip(right, wrong, strict=False))
        if schedule:
            by_schedule.setdefault(schedule, []).append(group.label)
    figures: list[Figure] = []
    words: list[str] = []
    legend = (("right", "right rows", "solid"), ("wrong", "wrong rows", "solid"))
    for at, (schedule, labels) in enumerate(by_schedule.items()):
        whose = "; ".join(labels)  # a label may have commas
        if len(set(schedule)) == 1:
            of_right, of_wrong = schedule[0]
            words.append(f"{whose}: right rows {of_right:g}, wrong rows {of_wrong:g}, always.")
            continue
        description = "Weights of right and of wrong rows by epoch"
        with drawing(f"{name}-{at}", description, "epoch", "weight", height=200.0) as drawn:
            for position, role in enumerate(("right", "wrong")):
                values = [Spread(point[position], None, 1) for point in schedule]
                _band(drawn.axes, values, role, "solid")
            drawn.axes.set_ylim(0, 1.05 * max(max(point) for point in schedule))
            whole_numbers(drawn.axes)
        figures.append(Figure(whose, [("", drawn.svg)], legend=legend))
    return words, figures


def _band(
    axes: Axes, curve: Sequence[Spread], name: str, dashes: object, filled: bool = True
) -> None:
    """Means, and one standard deviation to either side where there are several runs."""
    epochs = range(1, len(curve) + 1)
    means = [point.mean for point in curve]
    if filled and any(point.std for point in curve):
        low = [point.mean - (point.std or 0.0) for point in curve]
        high = [point.mean + (point.std or 0.0) for point in curve]
        axes.fill_between(epochs, low, high, color=colour(name), alpha=0.16, linewidth=0)
    marker = "o" if len(curve) <= 20 else None
    axes.plot(epochs, means, color=colour(name), linestyle=dashes, marker=marker, markersize=3)
