"""README.md's table of results, from the JSON files beside it: no number is written by hand.

python -m benchmarks.table
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from pipeline.bench.measure import Report
from pipeline.bench.tables import (
    FIGURE_COLUMNS,
    RATIO_COLUMNS,
    figure_row,
    machine_text,
    ratio_row,
)

HERE = Path(__file__).parent
README, RESULTS = HERE / "README.md", HERE / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
SHOWN = ("cpu.json", "gpu.json")


def write_table(readme: Path = README, results: Path = RESULTS) -> None:
    """Replace what stands between the two markers."""
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    readme.write_text(f"{before}{BEGIN}\n\n{tables(results)}\n{END}{after}")


def tables(results: Path = RESULTS) -> str:
    """Every result that is there, as Markdown; and which is not."""
    parts = []
    for name in SHOWN:
        path = results / name
        if path.exists():
            parts.append(of_report(name, msgspec.json.decode(path.read_bytes(), type=Report)))
        else:
            parts.append(f"### {name}\n\nNot measured yet.\n")
    return "\n".join(parts)


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


if __name__ == "__main__":
    write_table()
