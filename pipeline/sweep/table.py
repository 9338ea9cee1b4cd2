"""Tables of a sweep, one a dataset: means over seeds, and differences that are paired by seed.

Two students of one seed see the same samples in the same order and, where their models are the
same, start from the same weights. Their difference varies less than either does, so groups are
compared by Student's t-test on the differences of runs with common seeds, of the last epoch. Where
a group differs from its baseline in more than loss and bias, its difference says in what.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import msgspec

from pipeline.compared import budget, deciding, differing
from pipeline.config import convert, flat, put
from pipeline.console import Console
from pipeline.output import visible
from pipeline.runs import spread
from pipeline.sweep.directory import Result
from pipeline.sweep.grid import Run
from stages.errors import ConfigError
from stages.settings import StudentConfig

_DEFAULT_BASELINE = {"loss.name": "ce"}
_COLUMNS = ("students", "test top-1, last epoch", "best epoch", "n", "time an epoch")


@dataclass(frozen=True)
class Group:
    """Runs that differ in seeds alone, and are done."""

    label: str
    results: Sequence[Result]

    @property
    def config(self) -> StudentConfig:
        """The settings of the first run: those of all but for the seeds."""
        return self.results[0].run.config


@dataclass(frozen=True)
class Difference:
    """Of two groups in percentage points. p: two-sided, None where it is not defined (fewer than
    two pairs, or differences that are all the same). pairs: seeds that both have.
    """

    points: float
    p: float | None
    pairs: int


def difference(group: Group, baseline: Group) -> Difference | None:
    """How much better a group is than the baseline; None without a common seed."""
    other = {result.run.seeds: result.last for result in baseline.results}
    ours = {result.run.seeds: result.last for result in group.results}
    seeds = [seeds for seeds in ours if seeds in other]
    if not seeds:
        return None
    gains = [100 * (ours[s] - other[s]) for s in seeds]
    spread = max(gains) - min(gains)
    p = None
    if spread > 1e-9 * max(map(abs, gains)):
        from scipy.stats import ttest_rel

        p = float(ttest_rel([ours[s] for s in seeds], [other[s] for s in seeds]).pvalue)
    return Difference(mean(gains), p, len(seeds))


def check_baseline(runs: Sequence[Run], wanted: dict[str, Any] | None) -> None:
    """Raise ConfigError where no run is the baseline that was asked for."""
    if wanted is not None and not any(_agrees(run.config, wanted) for run in runs):
        raise ConfigError(
            f"no run of this sweep is the baseline {wanted}", "Add such a run, or leave it out."
        )


def baseline_of(
    group: Group, groups: Sequence[Group], wanted: dict[str, Any] | None
) -> Group | None:
    """The group that another is compared with: of those with the wanted keys, the same dataset and
    (unless the keys name one) the same model, the one that differs in the fewest other keys. None
    where there is none, or no single one.
    """
    keys = _DEFAULT_BASELINE if wanted is None else wanted
    any_model = any(key.startswith("model.") for key in keys)
    found: dict[int, list[Group]] = {}
    for other in groups:
        alike = any_model or other.config.model == group.config.model
        if alike and other.config.data == group.config.data and _agrees(other.config, keys):
            found.setdefault(_distance(group.config, other.config), []).append(other)
    nearest = found[min(found)] if found else []
    return nearest[0] if len(nearest) == 1 else None


def _agrees(config: StudentConfig, keys: dict[str, Any]) -> bool:
    values: dict[str, Any] = msgspec.to_builtins(config)
    for key, value in keys.items():
        put(values, key, value)
    return convert(StudentConfig, values) == config


def _distance(one: StudentConfig, other: StudentConfig) -> int:
    """In how many of the keys that decide a result they differ."""
    return len(differing([deciding(_flat(one)), deciding(_flat(other))]))


def _unlike(one: StudentConfig, other: StudentConfig) -> list[str]:
    """The keys beside loss and bias in which they differ."""
    return differing([budget(_flat(one)), budget(_flat(other))])


def _flat(config: StudentConfig) -> dict[str, Any]:
    return flat(msgspec.to_builtins(config))


# ---- as text --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """All students of one dataset. failed: name and error of every run without a result."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    failed: Sequence[tuple[str, str]]


def tables(results: Sequence[Result], wanted: dict[str, Any] | None) -> list[Table]:
    """A table for every dataset, in the sweep's order."""
    by_dataset: dict[str, list[Result]] = {}
    for result in results:
        by_dataset.setdefault(result.run.config.data.dataset, []).append(result)
    return [_table(name, found, wanted) for name, found in by_dataset.items()]


def _table(dataset: str, results: Sequence[Result], wanted: dict[str, Any] | None) -> Table:
    by_label: dict[str, list[Result]] = {}
    for result in results:
        if result.error is None:
            by_label.setdefault(result.run.label, []).append(result)
    groups = [Group(label, found) for label, found in by_label.items()]
    compared = [baseline_of(group, groups, wanted) for group in groups]
    names = {group.label for group in compared if group is not None}
    against = f"against {names.pop()}" if len(names) == 1 else "against its baseline"
    teachers = sorted({r.teacher_top1 for r in results if r.teacher_top1 is not None})
    shown = ", ".join(f"{top1:.2%}" for top1 in teachers)
    return Table(
        dataset + (f", teacher {shown}" if shown else ""),
        (*_COLUMNS, against, "against the teacher"),
        [_row(group, baseline) for group, baseline in zip(groups, compared, strict=True)],
        [(result.run.name, result.error) for result in results if result.error is not None],
    )


def _row(group: Group, baseline: Group | None) -> list[str]:
    results = group.results
    last = [result.last for result in results]
    teacher = results[0].teacher_top1
    return [
        group.label,
        percent_text(last),
        percent_text([result.best for result in results]),
        str(len(results)),
        f"{mean(result.seconds for result in results):.3g} s",
        _compared(group, baseline),
        "-" if teacher is None else f"{100 * (mean(last) - teacher):+.2f}",
    ]


def _compared(group: Group, baseline: Group | None) -> str:
    if baseline is group:
        return "baseline"
    found = None if baseline is None else difference(group, baseline)
    if found is None:
        return "-"
    assert baseline is not None
    p = "-" if found.p is None else f"{found.p:.2g}"
    unlike = _unlike(group.config, baseline.config)
    more = f"; other {', '.join(unlike)}" if unlike else ""
    return f"{found.points:+.2f} (p {p}, n {found.pairs}{more})"


def percent_text(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in percent."""
    found = spread(values)
    text = f"{found.mean:.2%}"
    return text if found.std is None else f"{text} ± {100 * found.std:.2f}"


def table_markdown(results: Sequence[Result], wanted: dict[str, Any] | None) -> str:
    """The whole of table.md."""
    parts = []
    for table in tables(results, wanted):
        rows = [table.columns, ["---"] * len(table.columns), *table.rows]
        lines = [
            f"## {visible(table.title)}",
            "",
            *("| " + " | ".join(_cells(r)) + " |" for r in rows),
        ]
        parts.append(
            "\n".join([*lines, *(f"\nfailed: {visible(f'{n}: {e}')}" for n, e in table.failed)])
        )
    return "\n\n".join(parts) + "\n"


def _cells(row: Sequence[str]) -> list[str]:
    return [visible(cell).replace("|", "\\|") for cell in row]


def show_results(
    console: Console, results: Sequence[Result], wanted: dict[str, Any] | None
) -> None:
    """The tables, on the terminal."""
    for table in tables(results, wanted):
        if table.rows:
            console.table(table.title, table.columns, table.rows)
