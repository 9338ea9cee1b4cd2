r"""One figure: bytes on disk against the accuracy that students lose, of every cache of the study.

    python results/cifar100/encodings_figure.py --out docs/encodings.svg

Reads encodings_study.jsonl beside this file, which `encodings_study.py summary` writes: each line a
`cache`, its `bytes` a row, a student's `temperature`, the mean `difference` to the students of the
exact rows in points of top-1, the half-width of its 95 % `interval`, and `n`, of how many seeds.
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
EXACT = "float32"
WHOLE = "klt"
"""Caches whose names begin so keep whole rows; the others a part of each."""


def by_temperature(study: Path) -> dict[float, list[dict[str, Any]]]:
    """The rows of the study but those of the exact rows, and those without a difference."""
    found: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for line in study.read_text().splitlines():
        row = json.loads(line)
        if row["cache"] != EXACT and math.isfinite(row["difference"]):
            found[row["temperature"]].append(row)
    if not found:
        raise click.ClickException(f"{study} has no differences yet: no student has finished")
    return dict(sorted(found.items()))


@click.command()
@click.option("--study", default=str(HERE / "encodings_study.jsonl"), show_default=False)
@click.option("--out", required=True, help="The SVG file.")
def main(study: str, out: str) -> None:
    """Draw."""
    from matplotlib.figure import Figure

    rows = by_temperature(Path(study))
    drawing = Figure(figsize=(4.6 * len(rows), 3.6), layout="constrained")
    panels = drawing.subplots(1, len(rows), sharex=True, sharey=True, squeeze=False)[0]
    every = [row for some in rows.values() for row in some]
    for panel, (temperature, some) in zip(panels, rows.items(), strict=True):
        panel.axhline(0, color="0.6", lw=0.8)
        for i, row in enumerate(sorted(some, key=lambda row: row["bytes"])):
            interval = row["interval"] if math.isfinite(row["interval"]) else 0
            colour = "C0" if row["cache"].startswith(WHOLE) else "C1"
            panel.errorbar(
                row["bytes"], row["difference"], interval, fmt="o", color=colour, ms=4, lw=1.2
            )
            panel.annotate(
                row["cache"],
                (row["bytes"], row["difference"]),
                xytext=(4, -11 if i % 2 else 5),  # neighbours apart
                textcoords="offset points",
                fontsize=7,
            )
        seeds = sorted({row["n"] for row in some})
        shown = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        panel.set_title(f"students at T = {temperature:g}, {shown} seeds", fontsize=10, loc="left")
        panel.set_xscale("log")
        ticks = [t for t in (8, 12, 16, 24, 32, 48, 64, 96) if _between(t, every)]
        panel.set_xticks(ticks, [str(t) for t in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlabel("bytes a row on disk", fontsize=9)
        panel.margins(x=0.2)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 against exact rows, points", fontsize=9)
    drawing.savefig(out, format="svg", metadata={"Date": None})


def _between(tick: float, rows: list[dict[str, Any]]) -> bool:
    sizes = [row["bytes"] for row in rows]
    return min(sizes) / 1.3 <= tick <= 1.3 * max(sizes)


if __name__ == "__main__":
    main()
