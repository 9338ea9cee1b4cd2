"""The part of the page about the students of one dataset: curves, means, runs, costs."""

from collections.abc import Sequence
from typing import Any

from pipeline.console import counted, duration, percent
from pipeline.report import curves
from pipeline.report.figures import series
from pipeline.report.groups import Group, comparable, differing, short, unlike
from pipeline.report.sources import KnownCaches
from pipeline.report.tables import Cell, Row, Table
from pipeline.runs import Run, Spread

MOST_KEYS = 4
"""How many of the settings that groups cannot be compared in have a column of their own."""
MOST_LOSSES = 12
"""How many groups' losses are drawn: each has a figure of its own."""


def student_part(groups: Sequence[Group], known: KnownCaches, key: str) -> dict[str, Any]:
    """What students.html shows of one dataset. Groups that can be compared stand together, the
    best first. key: unique on the page.
    """
    best_first = sorted(groups, key=lambda group: -group.spread(last_top1).mean)
    groups = [group for members in comparable(best_first) for group in members]
    teachers = {teacher_of(run, known) for group in groups for run in group.runs}
    teacher = teachers.pop() if len(teachers) == 1 else None  # several: no line is everybody's
    curved, keys = any(group.curve("test_top1") for group in groups), unlike(groups)
    parts = curves.part_names(groups)
    losses = [
        curves.loss_parts(f"{key}-loss-{at}", group, parts)
        for at, group in enumerate(groups[:MOST_LOSSES])
    ]
    constant, weights = curves.weights(f"{key}-weights", groups)
    return {
        "key": key,
        "groups": len(groups),
        "accuracy": curves.accuracies(f"{key}-accuracy", groups, teacher) if curved else None,
        "unlike": ", ".join(keys[:MOST_KEYS]) + (", ..." if len(keys) > MOST_KEYS else ""),
        "means": _means(groups),
        "settings": _settings(groups),
        "costs": _costs(groups, known),
        "losses": [figure for figure in losses if figure is not None],
        "most_losses": MOST_LOSSES,
        "parts": curves.parts_legend(parts),
        "weights": weights,
        "constant_weights": constant,
        "runs": _every_run(groups),
    }


def last_top1(run: Run) -> float:
    """Test top-1 of the last epoch, in [0, 1]."""
    return run.summary.last.top1


def best_top1(run: Run) -> float:
    """Test top-1 of the best epoch, in [0, 1]."""
    return run.summary.best.top1


def teacher_of(run: Run, known: KnownCaches) -> float | None:
    """Test top-1 of the teacher whose cache a run was trained from."""
    if run.teacher_top1 is not None:
        return run.teacher_top1
    facts = known.of(run.cache)
    return None if facts is None else facts.teacher_top1


def mean_and_std(found: Spread) -> str:
    """A mean of shares in percent; with its standard deviation where there are several runs."""
    return percent(found.mean) + ("" if found.std is None else f" ± {100 * found.std:.2f}")


def _means(groups: Sequence[Group]) -> Table:
    keys = unlike(groups)[:MOST_KEYS]
    selected = any(run.summary.selected.val_top1 is not None for g in groups for run in g.runs)
    drawn = [group.label for group in groups if group.curve("test_top1")][: curves.MOST_CURVES]
    rows = []
    for group in groups:
        mark = series(drawn.index(group.label)) if group.label in drawn else None
        seeds = f"{len(group.runs)}"
        if group.seeds < len(group.runs):
            seeds += f" ({counted(group.seeds, 'seed')})"
        seconds = group.spread(lambda run: run.summary.seconds_an_epoch).mean
        parameters = group.runs[0].summary.parameters
        cells = [
            Cell(group.label, group.label, mark=mark),
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
            cells += _mean_cells(group.spread(lambda run: run.summary.selected.top1), "chosen")
        cells += [
            Cell(f"{parameters:,}", parameters, "parameters"),
            Cell(f"{seconds:.3g} s", seconds, "seconds_an_epoch"),
        ]
        rows.append(Row(cells, group=group.label))
    columns = ["group", *keys, "n", "last epoch, %", "± std", "best epoch, %", "± std", "best at"]
    columns += ["chosen on held-out, %", "± std"] if selected else []
    note = (
        "The best epoch is picked on the test split itself, as the literature does: it flatters. "
        "The last epoch does not. Time: of the median epoch without the first, which warms up."
    )
    caption = "Test top-1, mean and standard deviation over n runs"
    return Table(caption, [*columns, "parameters", "time an epoch"], rows, 1 + len(keys), note)


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


def _settings(groups: Sequence[Group]) -> Table | None:
    """In what the groups differ, all of it: labels keep the fewest that tell them apart."""
    settings = [group.settings for group in groups]
    keys = differing(settings) if len(groups) > 1 else []
    if len(keys) < 2:  # the labels say it all
        return None
    rows = [
        Row([group.label, *(short(group.settings.get(key)) for key in keys)]) for group in groups
    ]
    return Table("Settings in which the groups differ", ["group", *keys], rows, len(keys) + 1)


def _costs(groups: Sequence[Group], known: KnownCaches) -> dict[str, Any]:
    """How many teacher passes each cache took, and how many its students would have cost online.

    One pass is the teacher once over the training set: online an epoch needs one for each view
    that it shows, the cache needed one for each view that it holds, whatever is learned from it.
    """
    runs = [run for group in groups for run in group.runs]
    by_cache: dict[str, list[Run]] = {}
    for run in runs:
        for cache in run.caches if run.uses_teacher else ():
            by_cache.setdefault(cache, []).append(run)
    caches = [_cost_of(cache, of_cache, known) for cache, of_cache in by_cache.items()]
    took = [cache["took"] for cache in caches]
    seconds = sum(run.summary.train_seconds for run in runs)
    waited = sum(run.summary.train_seconds * run.summary.wait_share for run in runs)
    return {
        "caches": caches,
        "together": len(caches) > 1 and None not in took,
        "online": sum(cache["online"] for cache in caches),
        "took": sum(views or 0 for views in took),
        "seconds": seconds,
        "runs": len(runs),
        "waited": waited / max(seconds, 1e-9),
        "without": sum(run.kind == "student" and not run.uses_teacher for run in runs),
    }


def _cost_of(cache: str, runs: Sequence[Run], known: KnownCaches) -> dict[str, Any]:
    online, facts = sum(run.teacher_passes for run in runs), known.of(cache)
    took = None if facts is None else facts.views
    return {
        "name": cache.rstrip("/").rpartition("/")[2],
        "runs": len(runs),
        "online": online,
        "took": took,
        "further": 0 if took is None else -(-took * len(runs) // online) - len(runs),
    }


def _every_run(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        for run in group.runs:
            summary, (data, init) = run.summary, run.seeds
            seed = f"{data}" if data == init else f"{data}, {init}"
            cells: list[Cell] = [Cell(run.name), Cell(group.label), Cell(seed, data, "seed")]
            for name, picked in (("last", summary.last), ("best", summary.best)):
                cells += [
                    Cell(f"{100 * picked.top1:.2f}", picked.top1, f"{name}.test_top1"),
                    Cell(f"{100 * picked.top5:.2f}", picked.top5, f"{name}.test_top5"),
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
    return Table("Every run", columns, rows, words=2)


def teacher_part(runs: Sequence[Run]) -> Table:
    """Runs of train-teacher: teachers and baselines."""
    rows = []
    for run in runs:
        summary = run.summary
        cells = [
            Cell(run.name),
            Cell(str(run.config.get("model.architecture"))),
            Cell(f"{100 * summary.last.top1:.2f}", summary.last.top1, "last.test_top1"),
            Cell(f"{100 * summary.best.top1:.2f}", summary.best.top1, "best.test_top1"),
            Cell(f"{summary.epochs}", summary.epochs, "epochs"),
            Cell(f"{summary.parameters:,}", summary.parameters, "parameters"),
            Cell(duration(summary.train_seconds), summary.train_seconds, "train_seconds"),
        ]
        rows.append(Row(cells, run=run.name))
    columns = ("run", "model", "last top-1, %", "best top-1, %", "epochs", "parameters", "time")
    return Table("Trained on hard labels: teachers and baselines", columns, rows, words=2)
