"""The figures about students: accuracy, loss parts and weights, epoch by epoch."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from pipeline.report.figures import (
    DASHES,
    SERIES,
    captioned,
    colour,
    drawing,
    legend,
    series,
    whole_numbers,
)
from pipeline.report.groups import Group, Spread
from pipeline.report.html import Html, fragment, percent, tag

MOST_CURVES = SERIES * len(DASHES)
PARTS = {
    "loss_ce": ("faint", "cross-entropy with the label"),
    "loss_right": ("right", "distillation, rows the teacher has right"),
    "loss_wrong": ("wrong", "distillation, rows it has wrong"),
}
"""Metrics that the loss is made of, before its weights: colour and words."""


def accuracies(name: str, groups: Sequence[Group], teacher: float | None) -> Html:
    """Test accuracy of each group: the mean over seeds, with a band of one standard deviation."""
    drawn_groups = [group for group in groups if group.curve("test_top1")][:MOST_CURVES]
    told = "Test accuracy of each group of students by epoch"
    entries, width = [], 620.0
    with drawing(name, told, "epoch", "test top-1, %", width, 330.0) as drawn:
        for at, group in enumerate(drawn_groups):
            name_, dashes = series(at)
            curve = [_scaled(point, 100) for point in group.curve("test_top1")]
            _band(drawn.axes, curve, name_, dashes)
            entries.append((name_, f"{group.label} (n = {len(group.runs)})", dashes))
        if teacher is not None:
            dashes = (0, (4, 3))
            drawn.axes.axhline(100 * teacher, color=colour("ink"), linewidth=1.1, linestyle=dashes)
            entries.append(("ink", f"the teacher, {percent(teacher)}", dashes))
        whole_numbers(drawn.axes)
    note = "Means over seeds; bands are one standard deviation."
    if len(drawn_groups) < len(groups):
        note += f" Curves of {len(drawn_groups)} of {len(groups)} groups."
    return captioned(drawn.svg, "Test accuracy by epoch", note, legend(*entries))


def loss_parts(name: str, group: Group) -> Html | None:
    """What the loss of a group was made of in every epoch; None where it is a single term."""
    curves = {key: group.curve(key) for key in _parts(group)}
    curves = {key: curve for key, curve in curves.items() if curve}
    if not curves:
        return None
    entries = []
    told = "Parts of the training loss by epoch"
    with drawing(name, told, "epoch", "nats, before weighting the parts", height=200.0) as drawn:
        for at, (key, curve) in enumerate(curves.items()):
            role, words = PARTS.get(key, (series(at)[0], key.removeprefix("loss_")))
            _band(drawn.axes, curve, role, "solid")
            entries.append((role, words, "solid"))
        drawn.axes.set_ylim(0)
        whole_numbers(drawn.axes)
    return captioned(drawn.svg, group.label, "", legend(*entries))


def _parts(group: Group) -> list[str]:
    found = {key for run in group.runs for line in run.history for key in line}
    others = sorted(key for key in found if key.startswith("loss_") and key not in PARTS)
    return [key for key in PARTS if key in found] + others


def weights(name: str, groups: Sequence[Group]) -> Html | None:
    """How much right and wrong rows weighed, for each schedule in use; constant ones in words."""
    by_schedule: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for group in groups:
        right, wrong = group.curve("weight_right"), group.curve("weight_wrong")
        schedule = tuple((r.mean, w.mean) for r, w in zip(right, wrong, strict=False))
        if schedule:
            by_schedule.setdefault(schedule, []).append(group.label)
    shown: list[Html] = []
    words: list[str] = []
    for at, (schedule, labels) in enumerate(by_schedule.items()):
        whose = ", ".join(labels)
        if len(set(schedule)) == 1:
            of_right, of_wrong = schedule[0]
            words.append(f"{whose}: right rows {of_right:g}, wrong rows {of_wrong:g}, always.")
            continue
        told = "Weights of right and of wrong rows by epoch"
        with drawing(f"{name}-{at}", told, "epoch", "weight", height=200.0) as drawn:
            for position, role in enumerate(("right", "wrong")):
                values = [Spread(point[position], None, 1) for point in schedule]
                _band(drawn.axes, values, role, "solid")
            drawn.axes.set_ylim(0, 1.05 * max(max(point) for point in schedule))
            whole_numbers(drawn.axes)
        entries = (("right", "right rows", "solid"), ("wrong", "wrong rows", "solid"))
        shown.append(captioned(drawn.svg, whose, "", legend(*entries)))
    if not (shown or words):
        return None
    return fragment(
        tag("h4", "How much right and wrong rows weigh"),
        [tag("p", sentence, class_="note") for sentence in words],
        tag("div", shown, class_="figures") if shown else None,
    )


def _band(axes: Axes, curve: Sequence[Spread], name: str, dashes: object) -> None:
    """Means, and one standard deviation to either side where there are several runs."""
    epochs = range(1, len(curve) + 1)
    means = [point.mean for point in curve]
    if any(point.std for point in curve):
        low = [point.mean - (point.std or 0.0) for point in curve]
        high = [point.mean + (point.std or 0.0) for point in curve]
        axes.fill_between(epochs, low, high, color=colour(name), alpha=0.16, linewidth=0)
    marker = "o" if len(curve) <= 20 else None
    axes.plot(epochs, means, color=colour(name), linestyle=dashes, marker=marker, markersize=3)


def _scaled(point: Spread, factor: float) -> Spread:
    std = None if point.std is None else factor * point.std
    return Spread(factor * point.mean, std, point.n)
