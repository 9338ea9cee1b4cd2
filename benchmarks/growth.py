"""Does a cache get slower, or need more memory, as it grows? Synthetic logits, no images.

    python -m benchmarks.growth --out growth.json --plot growth.svg

The base is a cache of 8 views of 16,384 samples: 100 classes, encoding klt, blocks of 16,384 rows.
It is grown to 4 and 16 times as many views, and to 4 and 16 times as many samples, with blocks of
the same size; every size has a process of its own. For each operation the table gives seconds per
million rows (rows of views: what a view holds, times views) and the peak of memory beyond what the
process held before it:

    write           encode, measure, compress, digest, commit every block; the logits are there
    read            every view with read_view, each row of it decoded in batches
    read by block   the same, a block's rows at a time (what --slab-memory does)
    rectify         every view
    verify          every byte, logits and rectification; without a teacher
    append          one view more: room, blocks, the statistics of all views
    append rectify  and that view rectified, with the statistics of all views

Flat means: at 16 times the size both figures are what they are at the base, within the
noise. Memory is bounded by threads times blocks: `verify` takes about 45 MiB for each of its four
threads, and a base of fewer blocks than threads would look four times smaller than what it grows
to. Measured for 4, 8, 32 and 128 views: 97, 185, 183, 171 MiB at the most, with one thread 41 to 86
for 32 views; how many blocks come together is a matter of chance. `rectify` takes 5 to 18 MiB, the
records of the views at hand and what the heap keeps. `read` has to grow with samples, since it
holds a view. Appending says the
statistics of all views anew, from their records: a part that grows with views, by less than a
millisecond a view. The last figure opens a cache of 100,000 blocks (5,000 views of 20
blocks, of records alone), lists what is complete and reads one view's records.
"""

import ctypes
import gc
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.imagenet_data import SyntheticTeacher
from benchmarks.measure import Figure, new_report, peak_memory, seconds
from benchmarks.synthetic_cache import CLASSES, TEST_SAMPLES, labels_of, new_cache
from pipeline.console import Console
from stages.cache import LogitCache
from stages.cache.records import seal_records
from stages.cache.storage import write_object
from stages.rectify import rectify
from stages.settings import RectifyConfig
from stages.verify import verify

VIEWS, SAMPLES = 8, 16_384
FACTORS, BATCH = (1, 4, 16), 1024
OPERATIONS = (
    "write",
    "read",
    "read by block",
    "rectify",
    "verify",
    "append",
    "append rectify",
)
TURNS = {1: 3, 4: 1, 16: 1}
"""How often an operation is repeated where it can be: the small ones are soon done."""
MANY_VIEWS, MANY_BLOCKS = 5_000, 20
Growth = dict[str, dict[int, dict[str, tuple[float, int]]]]
"""views or samples -> factor -> operation -> seconds per million rows, bytes."""


def measured(
    work: Callable[[], object], turns: int = 1, before: Callable[[], object] = lambda: None
) -> tuple[float, int]:
    """Median seconds, and the largest peak of memory in bytes. before: not measured."""
    taken, peaks = [], []
    for _ in range(turns):
        before()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is else taken again without a trace
        with peak_memory() as peak:
            taken.append(seconds(work))
        peaks.append(peak.bytes)
    return statistics.median(taken), max(peaks)


def grown(
    path: Path, views: int, samples: int, block_rows: int, turns: int
) -> dict[str, tuple[float, int]]:
    """Operation -> seconds per million rows, and the peak of memory in bytes."""
    cache = new_cache(path, views, samples, block_rows)
    cache.write_eval_logits(SyntheticTeacher(CLASSES).block(0, 0, labels_of(TEST_SAMPLES)), {})
    found = {"write": write(path, range(views))}
    found["read"] = measured(lambda: read(path), turns)
    found["read by block"] = measured(lambda: read_by_block(path), turns)

    def rectified() -> None:
        rectify(path, RectifyConfig())

    found["rectify"] = measured(rectified, turns, before=lambda: unrectified(path))
    found["verify"] = measured(lambda: checked(path), turns)
    each = {name: (1e6 * t / (views * samples), peak) for name, (t, peak) in found.items()}

    cache.grow(views + 1)
    appended = {"append": write(path, [views]), "append rectify": measured(rectified)}
    checked(path)
    return each | {name: (1e6 * t / samples, peak) for name, (t, peak) in appended.items()}


def write(path: Path, views: Sequence[int]) -> tuple[float, int]:
    """Every block of some views, and what stage one says of all views when it ends."""
    teacher, taken = SyntheticTeacher(CLASSES), 0.0
    peaks: list[int] = []
    cache = LogitCache.open(path, writable=True)
    for view, block in ((v, b) for v in views for b in range(cache.grid.num_blocks)):
        logits = teacher.block(view, block, cache.row_labels[cache.grid.rows(block)])
        block_of = (view, block, logits, logits.argmax(1), {"device": "none"})
        once, peak = measured(partial(cache.write_block, *block_of))
        taken, peaks = taken + once, [*peaks, peak]

    def finish() -> None:
        again = LogitCache.open(path, writable=True)
        again.write_fidelity()
        again.commits.compact_rest()
        assert len(again.top1_per_view) == again.num_views

    last, peak = measured(finish)
    return taken + last, max(*peaks, peak)


def read(path: Path) -> None:
    """Every row of every view, a view at a time."""
    cache = LogitCache.open(path)
    for view in range(cache.num_views):
        targets = cache.read_view(view)
        for batch in torch.arange(cache.num_samples).split(BATCH):
            targets.rows(batch)


def read_by_block(path: Path) -> None:
    """Every row of every view, a block at a time."""
    cache = LogitCache.open(path)
    for view, block in ((v, b) for v in range(cache.num_views) for b in _blocks(cache)):
        targets = cache.read_view(view, runs=[cache.grid.rows(block)])
        for batch in cache.dataset_index[cache.grid.rows(block)].split(BATCH):
            targets.rows(batch)


def unrectified(path: Path) -> None:
    """Without what an earlier turn has made."""
    for folder in ("rectified", "commits/rectified"):
        shutil.rmtree(path / folder / RectifyConfig().chosen_name, ignore_errors=True)


def checked(path: Path) -> None:
    if faults := verify(path).faults:
        raise RuntimeError(f"{path} has faults: {faults[0]}")


def opened(path: Path) -> float:
    """Seconds until a cache of 100,000 blocks can be read from."""
    samples = 10 * MANY_BLOCKS
    small = new_cache(path, MANY_VIEWS, samples, block_rows=10)
    logits = SyntheticTeacher(CLASSES).block(0, 0, small.row_labels[:10])
    small.write_block(0, 0, logits, logits.argmax(1), {})
    record = small.commits.of_view(0)[0]
    for view in range(MANY_VIEWS):
        records = [{**record, "view": view, "block": b} for b in range(MANY_BLOCKS)]
        write_object(small.group.store, f"commits/logits/v{view:05d}.json", seal_records(records))

    def work() -> None:
        cache = LogitCache.open(path)
        assert len(cache.complete_views) == MANY_VIEWS
        assert len(cache.commits.of_view(MANY_VIEWS // 2)) == MANY_BLOCKS

    return measured(work, turns=5)[0]


def alone(work: Callable[..., Any], *arguments: object) -> Any:
    """What a function gives in a fresh process, that has all imports behind it."""
    alone_there = ProcessPoolExecutor(1, get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, alone_there as process:
        return process.submit(_warm, work, Path(folder), arguments).result()


def _warm(work: Callable[..., Any], folder: Path, arguments: Sequence[object]) -> Any:
    grown(folder / "warm", 2, 2048, 1024, turns=1)
    return work(folder / "cache", *arguments)


@click.command()
@click.option("--out", required=True, help="JSON for the figures.")
@click.option("--plot", help="SVG.")
@click.option("--samples", default=SAMPLES, show_default=True, help="Of the base.")
def main(out: str, plot: str | None, samples: int) -> None:
    """Measure every size and show the table."""
    console = Console()
    report = new_report(
        {"views": VIEWS, "samples": samples, "classes": CLASSES, "encoding": "klt"},
        torch.device("cpu"),
    )
    growth: Growth = {"views": {}, "samples": {}}
    for axis, factor in [("views", 1), *((a, f) for f in FACTORS[1:] for a in growth)]:
        sizes = (VIEWS * factor, samples) if axis == "views" else (VIEWS, samples * factor)
        console.say(f"{sizes[0]} views of {sizes[1]} samples")
        growth[axis][factor] = alone(grown, *sizes, samples, TURNS[factor])
    growth["samples"][1] = growth["views"][1]
    for axis, by_factor in growth.items():
        for factor, operations in sorted(by_factor.items()):
            where = f"{factor}x {axis}"
            for name, (taken, peak) in operations.items():
                report.add(Figure(name=f"{name}, {where}", value=taken, unit="s per million rows"))
                report.add(Figure(name=f"{name}, {where}: peak", value=peak / 2**20, unit="MiB"))
    opening = alone(opened)
    report.add(Figure(name="open, 100,000 blocks", value=opening, unit="s", target=1.0))
    report.write(out)
    show(console, growth)
    console.say(f"open a cache of 100,000 blocks: {opening:.3f} s (target <= 1)")
    if plot is not None:
        draw(growth, plot)


def show(console: Console, growth: Growth) -> None:
    """One line an operation: every size side by side."""
    sizes = [(a, f) for a in growth for f in FACTORS if (a, f) != ("samples", 1)]
    columns = ["operation", *("base" if f == 1 else f"{f}x {a}" for a, f in sizes)]
    for index, (title, scale) in enumerate(
        (("seconds per million rows", 1.0), ("peak memory, MiB", 2**-20))
    ):
        rows = [
            [n, *(f"{growth[a][f][n][index] * scale:.2f}" for a, f in sizes)] for n in OPERATIONS
        ]
        console.table(title, columns, rows)


def draw(growth: Growth, path: str) -> None:
    """Time per row and peak memory against size: solid as views grow, dashed as samples do."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9.5, 3.8), layout="constrained")
    panels = drawing.subplots(1, 2)
    titles = (("seconds per million rows", 1.0), ("peak memory, MiB", 2**-20))
    for index, (panel, (title, scale)) in enumerate(zip(panels, titles, strict=True)):
        for colour, name in enumerate(OPERATIONS):
            for (axis, by_factor), style in zip(growth.items(), ("-", "--"), strict=True):
                values = [by_factor[factor][name][index] * scale for factor in FACTORS]
                label = name if axis == "views" else None
                panel.plot(
                    FACTORS, values, f"o{style}", color=f"C{colour}", ms=3, lw=1.2, label=label
                )
        panel.set_xscale("log", base=2)
        panel.set_xticks(FACTORS, [f"{factor}x" for factor in FACTORS])
        panel.set_ylim(bottom=0)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("views (solid) or samples (dashed), of the base", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.25, lw=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    drawing.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    drawing.savefig(path, format="svg", metadata={"Date": None})


def _blocks(cache: LogitCache) -> range:
    return range(cache.grid.num_blocks)


if __name__ == "__main__":
    main()
