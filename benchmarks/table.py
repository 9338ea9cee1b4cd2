"""README.md's table of results, from the JSON files beside it: no number is written by hand.

python -m benchmarks.table
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.book import RATES_RUN, Run, read_runs
from benchmarks.measure import Figure, Ratio, Report
from pipeline.console import Console

HERE = Path(__file__).parent
README, RESULTS = HERE / "README.md", HERE / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
CPU, GPU = "cpu.json", "gpu.json"
RATIO_COLUMNS = ("what", "ratio", "spread", "seconds of both", "turns", "target", "of what")
FIGURE_COLUMNS = ("what", "value", "target", "of what")


def write_table(readme: Path = README, results: Path = RESULTS) -> None:
    """Replace what stands between the two markers."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}")


def tables(results: Path = RESULTS) -> str:
    """Every result that is there, as Markdown; and which is not."""
    reports: list[tuple[str, Report]] = []
    if (results / CPU).exists():
        report = msgspec.json.decode((results / CPU).read_bytes(), type=Report)
        reports.append((CPU, report))
    if (results / GPU).exists():
        reports += [(GPU, of_run(run)) for run in latest(read_runs(results / GPU))]
    parts = [of_report(name, report) for name, report in reports]
    missing = {CPU, GPU} - {name for name, _ in reports}
    return "\n".join([*parts, *(f"### {name}\n\nNot measured yet.\n" for name in sorted(missing))])


def latest(runs: Sequence[Run]) -> list[Run]:
    """Of every device the run that was added to last, without those that only smoke-test."""
    found = {run.machine["device"]: run for run in runs if run.kind == RATES_RUN}
    return [*found.values()]


def of_run(run: Run) -> Report:
    """The figures of a run as a report; missing: the parts that have none, and why."""
    report = Report(settings={}, machine=run.machine, versions=run.versions)
    for part in run.parts:
        report.add(*part.ratios, *part.figures)
        if part.state != "ok":
            report.missing.append(f"{part.name}: {part.state}, {part.message}")
    return report


def of_report(name: str, report: Report) -> str:
    """One report as Markdown."""
    versions = ", ".join(f"{k} {v}" for k, v in report.versions.items())
    text = f"### {name}\n\nMeasured on: {machine_text(report)}; {versions}.\n\n"
    if report.ratios:
        text += _table(RATIO_COLUMNS, [ratio_row(ratio) for ratio in report.ratios]) + "\n"
    if report.figures:
        text += _table(FIGURE_COLUMNS, [figure_row(figure) for figure in report.figures]) + "\n"
    if report.missing:
        text += "Not measured:\n\n" + "".join(f"- {line}\n" for line in report.missing)
    return text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def ratio_row(ratio: Ratio) -> tuple[str, ...]:
    """The median over turns, how far they spread, and the medians of both sides."""
    ratios = ratio.ratios
    sides = (statistics.median(side) for side in (ratio.ours, ratio.yardstick))
    return (
        ratio.name,
        number(ratio.median),
        f"{number(min(ratios))} to {number(max(ratios))}",
        " / ".join(map(number, sides)),
        str(len(ratios)),
        _target(ratio.target, ratio.met, ratio.at_least),
        ratio.note,
    )


def figure_row(figure: Figure) -> tuple[str, ...]:
    """A figure without a unit is a share."""
    if figure.unit:
        shown, bound = f"{number(figure.value)} {figure.unit}", figure.target
    else:
        shown, bound = f"{figure.value:.2%}", figure.target and figure.target * 100
    met = figure.target is None or figure.value <= figure.target
    return (figure.name, shown, _target(bound, met, unit=figure.unit or "%"), figure.note)


def number(value: float) -> str:
    """Few digits, for people: 0.0012, 1.017, 21.3, 40,500."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1e-2 else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _target(target: float | None, met: bool | None, at_least: bool = False, unit: str = "") -> str:
    if target is None:
        return ""
    bound = f"{'>=' if at_least else '<='} {target:g} {unit}".rstrip()
    return bound if met else f"{bound} (missed)"


def machine_text(report: Report) -> str:
    """The machine in one line."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report.machine.items())


def show_report(console: Console, title: str, report: Report, out: str | None = None) -> None:
    """Ratios, figures, the machine, and what is missing. out: a file that gets them as well."""
    rows: Sequence[tuple[str, ...]] = [ratio_row(ratio) for ratio in report.ratios]
    if rows:
        console.table(f"{title}: ratios", RATIO_COLUMNS, rows)
    if report.figures:
        figures = [figure_row(figure) for figure in report.figures]
        console.table(f"{title}: figures", FIGURE_COLUMNS, figures)
    console.say(f"\nmeasured on: {machine_text(report)}")
    for missing in report.missing:
        console.say(f"not measured: {missing}")
    if out is not None:
        report.write(out)


if __name__ == "__main__":
    write_table()
