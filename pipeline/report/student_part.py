"""The part of the page about the students of one dataset: curves, means, runs, costs."""

from collections.abc import Sequence

from pipeline.console import counted, duration
from pipeline.report import student_figures as figures
from pipeline.report.figures import series, swatch
from pipeline.report.groups import Group, Spread, comparable, differing, short, unlike
from pipeline.report.html import Cell, Html, Row, fragment, percent, table, tag
from pipeline.report.passes import saved_passes
from pipeline.report.runs import Run
from pipeline.report.sources import KnownCaches

MOST_KEYS = 4
"""How many of the settings that groups cannot be compared in have a column of their own."""
MOST_LOSSES = 12
"""How many groups' losses are drawn: each has a figure of its own."""


def student_part(groups: Sequence[Group], known: KnownCaches, key: str) -> Html:
    """Everything about the students of one dataset. Groups that can be compared stand together, the
    best first. key: unique on the page.
    """
    best_first = sorted(groups, key=lambda group: -group.spread(last_top1).mean)
    groups = [group for members in comparable(best_first) for group in members]
    return tag(
        "section",
        tag("h3", "Students", id=key),
        _curves(groups, known, key),
        _not_compared(groups),
        _means(groups),
        _settings(groups),
        saved_passes(groups, known),
        _losses(groups, key),
        figures.weights(f"{key}-weights", groups),
        _every_run(groups),
    )


def last_top1(run: Run) -> float:
    return run.summary.last.test_top1


def best_top1(run: Run) -> float:
    return run.summary.best.test_top1


def _curves(groups: Sequence[Group], known: KnownCaches, key: str) -> Html | None:
    if not any(group.curve("test_top1") for group in groups):
        return None
    teachers = {teacher_of(run, known) for group in groups for run in group.runs}
    teacher = teachers.pop() if len(teachers) == 1 else None  # several: no line is everybody's
    shown = figures.accuracies(f"{key}-accuracy", groups, teacher)
    return tag("div", shown, class_="figures wide")


def teacher_of(run: Run, known: KnownCaches) -> float | None:
    """Test top-1 of the teacher whose cache a run was trained from."""
    if run.teacher_top1 is not None:
        return run.teacher_top1
    facts = known.of(run.cache)
    return None if facts is None else facts.teacher_top1


def mean_and_std(found: Spread) -> str:
    """A mean of shares in percent; with its standard deviation where there are several runs."""
    return percent(found.mean) + ("" if found.std is None else f" ± {100 * found.std:.2f}")


def _not_compared(groups: Sequence[Group]) -> Html | None:
    keys = unlike(groups)
    if not keys:
        return None
    shown = ", ".join(keys[:MOST_KEYS]) + (", ..." if len(keys) > MOST_KEYS else "")
    text = f"The groups differ in {shown}, and not only in loss and bias. Only groups that agree "
    return tag("p", text, "in all of these compare losses.", class_="note")


def _means(groups: Sequence[Group]) -> Html:
    keys = unlike(groups)[:MOST_KEYS]
    selected = any(run.summary.selected.val_top1 is not None for g in groups for run in g.runs)
    curves = [group.label for group in groups if group.curve("test_top1")]
    rows = []
    for group in groups:
        mark = None
        if group.label in curves and curves.index(group.label) < figures.MOST_CURVES:
            mark = swatch(*series(curves.index(group.label)))
        seeds = f"{len(group.runs)}"
        if group.seeds < len(group.runs):
            seeds += f" ({counted(group.seeds, 'seed')})"
        seconds = group.spread(lambda run: run.summary.seconds_an_epoch).mean
        parameters = group.runs[0].summary.parameters
        cells = [
            Cell([mark, group.label], group.label),
            *(
                Cell(short(group.settings.get(key)), _sortable(group.settings.get(key)))
                for key in keys
            ),
            Cell(seeds, len(group.runs), "n"),
            *_mean_cells(group.spread(last_top1), "last"),
            *_mean_cells(group.spread(best_top1), "best"),
            _epoch(group.spread(lambda run: run.summary.best.epoch + 1)),
        ]
        if selected:
            cells += _mean_cells(group.spread(lambda run: run.summary.selected.test_top1), "chosen")
        cells += [
            Cell(f"{parameters:,}", parameters, "parameters"),
            Cell(f"{seconds:.3g} s", seconds, "seconds_an_epoch"),
        ]
        rows.append(Row(cells, group=group.label))
    columns = ["group", *keys, "n", "last epoch, %", "± std", "best epoch, %", "± std", "best at"]
    columns += ["chosen on held-out, %", "± std"] if selected else []
    caption = fragment(
        "Test top-1, mean and standard deviation over n runs",
        tag("small", "The best epoch is picked on the test split itself, as the literature does: "
        "it flatters. The last epoch does not. Time: of the median epoch without the first, which "
        "warms up."),
    )  # fmt: skip
    return table(caption, [*columns, "parameters", "time an epoch"], rows, 1 + len(keys))


def _sortable(value: object) -> str | float | None:
    return value if isinstance(value, (str, int, float)) else None


def _mean_cells(found: Spread, field: str) -> list[Cell]:
    std = "" if found.std is None else f"{100 * found.std:.2f}"
    return [
        Cell(f"{100 * found.mean:.2f}", found.mean, f"{field}_mean"),
        Cell(std, found.std, f"{field}_std"),
    ]


def _epoch(found: Spread) -> Cell:
    return Cell(f"{found.mean:.1f}".removesuffix(".0"), found.mean, "best_epoch")


def _settings(groups: Sequence[Group]) -> Html | None:
    """In what the groups differ, all of it: labels keep the fewest that tell them apart."""
    settings = [group.settings for group in groups]
    keys = differing(settings) if len(groups) > 1 else []
    if len(keys) < 2:  # the labels say it all
        return None
    rows = [
        Row([group.label, *(short(group.settings.get(key)) for key in keys)]) for group in groups
    ]
    whole = table("Settings in which the groups differ", ["group", *keys], rows, len(keys) + 1)
    return tag("details", tag("summary", f"All {len(keys)} settings in which they differ"), whole)


def _losses(groups: Sequence[Group], key: str) -> Html | None:
    parts = figures.part_names(groups)
    losses = [
        figures.loss_parts(f"{key}-loss-{at}", group, parts)
        for at, group in enumerate(groups[:MOST_LOSSES])
    ]
    drawn = [svg for svg in losses if svg is not None]
    if not drawn:
        return None
    told = "Before loss.ce_weight and loss.weight; the mean over seeds, and one standard deviation."
    if len(groups) > MOST_LOSSES:
        told += f" The {MOST_LOSSES} best of {len(groups)} groups."
    return fragment(
        tag("h4", "What the loss is made of"),
        tag("p", told, class_="note"),
        figures.parts_legend(parts),
        tag("div", drawn, class_="figures"),
    )


def _every_run(groups: Sequence[Group]) -> Html:
    rows = []
    for group in groups:
        for run in group.runs:
            summary, (data, init) = run.summary, run.seeds
            seed = f"{data}" if data == init else f"{data}, {init}"
            cells: list[Cell] = [Cell(run.name), Cell(group.label), Cell(seed, data, "seed")]
            for name, picked in (("last", summary.last), ("best", summary.best)):
                cells += [
                    Cell(f"{100 * picked.test_top1:.2f}", picked.test_top1, f"{name}.test_top1"),
                    Cell(f"{100 * picked.test_top5:.2f}", picked.test_top5, f"{name}.test_top5"),
                    Cell(f"{picked.loss:.4f}", picked.loss, f"{name}.loss"),
                    Cell(f"{picked.epoch + 1}", picked.epoch, f"{name}.epoch"),
                ]
            cells += [
                Cell(duration(summary.train_seconds), summary.train_seconds, "train_seconds"),
                Cell(percent(summary.wait_share, 1), summary.wait_share, "wait_share"),
            ]
            rows.append(Row(cells, run=run.name, group=group.label))
    each = ("top-1, %", "top-5, %", "loss", "epoch")
    columns = ["run", "group", "seed", *(f"last {what}" for what in each)]
    columns += [f"best {what}" for what in each]
    columns += ["time", "waiting for targets"]
    whole = table("Every run", columns, rows, text_columns=2)
    return tag("details", tag("summary", f"Every run, {len(rows)} of them"), whole)


def teacher_part(runs: Sequence[Run]) -> Html:
    """Runs of train-teacher: teachers and baselines."""
    rows = []
    for run in runs:
        summary = run.summary
        cells = [
            Cell(run.name),
            Cell(str(run.config.get("model.architecture"))),
            Cell(f"{100 * summary.last.test_top1:.2f}", summary.last.test_top1, "last.test_top1"),
            Cell(f"{100 * summary.best.test_top1:.2f}", summary.best.test_top1, "best.test_top1"),
            Cell(f"{summary.epochs}", summary.epochs, "epochs"),
            Cell(f"{summary.parameters:,}", summary.parameters, "parameters"),
            Cell(duration(summary.train_seconds), summary.train_seconds, "train_seconds"),
        ]
        rows.append(Row(cells, run=run.name))
    columns = ("run", "model", "last top-1, %", "best top-1, %", "epochs", "parameters", "time")
    return table("Trained on hard labels: teachers and baselines", columns, rows, text_columns=2)
