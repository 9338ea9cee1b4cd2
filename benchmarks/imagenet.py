"""One view of ImageNet-1k's shape, written, read, rectified, trained from and verified in bounds.

    python -m benchmarks.imagenet --work DIR                  all 1,281,167 rows: about 8 minutes
    python -m benchmarks.imagenet --work DIR --rows 100000    a quick one
    python -m benchmarks.imagenet --work DIR --rows 20000 --classes 21841      ImageNet-21k's rows

Logits and images are synthetic (`imagenet_data.py`), stored as `klt` and as `topk`; above 4,096
classes as `topk` alone. Each step runs in a process of its own, timed, and its peak of memory is
what that process took beyond what it held with its libraries and images loaded. No step may take
more than --bound (3 GiB). The plan for 300 views at the end is arithmetic on what was measured, and
--teacher images a second, which is yours to give. DIR needs 2 GB and is removed at the end.
"""

import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from benchmarks.imagenet_data import (
    CLASSES,
    SAMPLES,
    SyntheticTeacher,
    new_cache,
    row_order,
    synthetic_splits,
)
from benchmarks.imagenet_plan import show_plan
from benchmarks.measure import Figure, Report, new_report, peak_memory, seconds
from pipeline.console import Console
from stages.cache import LogitCache
from stages.cache.encoding import FIT_ROWS, fit_encoding, measure_all
from stages.cache.encoding.topk import TopK
from stages.inputs.counter_hash import permute
from stages.objectives.losses import DEFINITIONS, TemperedRows
from stages.rectify import rectify
from stages.settings import DataSettings, ModelSettings, RectifyConfig, StudentConfig, TrainSettings
from stages.train_student import train_student
from stages.verify import verify

BATCH, MOST_KLT_CLASSES = 1024, 4096
SLAB_MEMORY = "1GB"
LOSSES = ("ce", "kd", "dkd", "nkd", "rld")
Figures = list[Figure]


class Shape(NamedTuple):
    """Of the logits of one view."""

    rows: int
    classes: int


# ---- steps: each in a process of its own ----------------------------------------------------


def sizes(shape: Shape, _: str) -> Figures:
    """Every encoding on the rows that encodings are fitted to; and what rows these are."""
    splits, teacher = synthetic_splits(*shape), SyntheticTeacher(shape.classes)
    labels = splits.train.labels[row_order(shape.rows)[:FIT_ROWS]]
    logits = teacher.block(0, 0, labels)
    with peak_memory() as peak:
        started = time.perf_counter()
        measured = measure_all(logits, labels)
        taken = time.perf_counter() - started
    return [
        *_described(logits, labels),
        Figure(name="fit and measure all encodings", value=taken, unit="s"),
        _peak("fit and measure all encodings", peak.bytes),
        *(Figure(name=f"{m.coding.name}: row", value=m.row_bytes, unit="B") for m in measured),
        *(
            Figure(name=f"{m.coding.name}: KL at T=1", value=m.fidelity.mean_kl[0], unit="nat")
            for m in measured
        ),
    ]


def write(shape: Shape, folder: str, name: str) -> Figures:
    """One view: encoded, its fidelity measured, compressed, digested, put down and committed."""
    splits, teacher = synthetic_splits(*shape), SyntheticTeacher(shape.classes)
    order = row_order(shape.rows)
    labels = splits.train.labels[order]
    fitted = teacher.block(0, 0, labels[:FIT_ROWS])
    cache = new_cache(folder, fit_encoding(name, fitted, labels[:FIT_ROWS]), splits)
    taken, peaks = 0.0, []
    for block in range(cache.grid.num_blocks):
        logits = teacher.block(0, block, labels[cache.grid.rows(block)])
        predictions = logits.argmax(1)
        with peak_memory() as peak:
            started = time.perf_counter()
            cache.write_block(0, block, logits, predictions, {})
            taken += time.perf_counter() - started
        peaks.append(peak.bytes + logits.nbytes)
    cache.write_eval_logits(teacher.block(1, 0, splits.test.labels), {})
    cache.write_fidelity()
    cache.commits.compact_rest()
    cache.eval_commits.compact_rest()
    assert cache.fidelity is not None
    kept = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return [
        Figure(name=f"write {name}", value=taken, unit="s"),
        Figure(name=f"write {name}: speed", value=shape.rows / taken, unit="rows/s"),
        _peak(f"write {name}", max(peaks)),
        Figure(
            name=f"{name}: row of the view",
            value=cache.commits.extent([0]).bytes / shape.rows,
            unit="B",
        ),
        Figure(name=f"{name}: whole store", value=sum(kept), unit="B"),
        Figure(name=f"{name}: objects", value=len(kept), unit=""),
        Figure(name=f"{name}: KL at T=1, written", value=cache.fidelity.mean_kl[0], unit="nat"),
    ]


def read(shape: Shape, folder: str, name: str) -> Figures:
    """The view read as a student reads it, every row decoded in batches in random order."""
    order = permute(torch.arange(shape.rows), shape.rows, 0)
    with peak_memory() as peak:
        started = time.perf_counter()
        targets = LogitCache.open(folder).read_view(0)
        loaded = time.perf_counter() - started
        for batch in order.split(BATCH):
            targets.rows(batch)
        taken = time.perf_counter() - started
    return [
        Figure(name=f"read {name}: slab", value=loaded, unit="s"),
        Figure(name=f"read {name}: slab and every row", value=taken, unit="s"),
        Figure(name=f"read {name}: speed", value=shape.rows / taken, unit="rows/s"),
        _peak(f"read {name}", peak.bytes),
    ]


def rectified(shape: Shape, folder: str, name: str) -> Figures:
    """Stage two, on threads."""
    return _timed(f"rectify {name}", shape, lambda: rectify(folder, RectifyConfig()))


def trained(shape: Shape, folder: str, name: str) -> Figures:
    """An epoch of the smallest student, its targets in groups of chunks."""
    splits = synthetic_splits(*shape)
    config = StudentConfig(
        cache=folder,
        data=DataSettings(dataset="synthetic"),
        model=ModelSettings(architecture="benchmarks.imagenet_data:TinyStudent"),
        train=TrainSettings(epochs=1, batch_size=BATCH, lr=0.01),
        slab_memory=SLAB_MEMORY,
        device="cpu",
    )
    summary: dict[str, Any] = {}

    def epoch() -> None:
        summary.update(train_student(config, f"{folder}-run", splits=splits))

    figures = _timed(f"train from {name}", shape, epoch)
    waiting = 100 * summary["wait_share"]
    return [*figures, Figure(name=f"train from {name}: waiting", value=waiting, unit="%")]


def verified(shape: Shape, folder: str, name: str) -> Figures:
    """Every object, every record, and the rectification made again."""

    def look() -> None:
        if faults := verify(folder).faults:
            raise RuntimeError(f"{name}: {faults[0].where} {faults[0].what}")

    return _timed(f"verify {name}", shape, look)


def losses(shape: Shape, _: str) -> Figures:
    """What a step takes beyond the student's logits, as a multiple of them: forward, backward."""
    batch = max(BATCH, 2**24 // shape.classes)  # 64 MiB: smaller tensors hide in the heap
    labels = torch.arange(batch) * shape.classes // batch
    rows = SyntheticTeacher(shape.classes).block(0, 0, labels)
    coding = TopK(shape.classes)
    arrays = coding.encode(rows, labels)
    figures = []
    for name in LOSSES:
        partial = TemperedRows(lambda t: coding.decode(arrays, t), coding.kept(arrays))
        for part, teacher in (("topk rows", partial), ("whole rows", rows)):
            student = rows.flip(1).requires_grad_()
            with peak_memory() as peak:
                loss = DEFINITIONS[name].loss(student, teacher, labels)
                loss.backward()
            multiple = peak.bytes / student.nbytes
            figures.append(
                Figure(name=f"{name} from {part}: peak", value=multiple, unit="x logits")
            )
    return figures


def _timed(name: str, shape: Shape, work: Callable[[], object]) -> Figures:
    with peak_memory() as peak:
        taken = seconds(work)
    return [
        Figure(name=name, value=taken, unit="s"),
        Figure(name=f"{name}: speed", value=shape.rows / taken, unit="rows/s"),
        _peak(name, peak.bytes),
    ]


def _peak(name: str, peak: int) -> Figure:
    return Figure(name=f"{name}: peak", value=peak / 2**30, unit="GiB")


def _described(logits: Tensor, labels: Tensor) -> Figures:
    """What would show whether these rows are like a real classifier's."""
    p = logits.softmax(1)
    ordered = (logits - logits.mean(1, keepdim=True)).sort(1, descending=True).values.mean(0)
    entropy = -torch.special.xlogy(p, p).sum(1).mean()
    best = logits.topk(5).indices == labels[:, None]
    return [
        Figure(name="teacher: top-1", value=100 * float(best[:, 0].float().mean()), unit="%"),
        Figure(name="teacher: top-5", value=100 * float(best.any(1).float().mean()), unit="%"),
        Figure(name="teacher: confidence", value=100 * float(p.amax(1).mean()), unit="%"),
        Figure(name="teacher: entropy", value=float(entropy), unit="nat"),
        *(
            Figure(name=f"teacher: logit {k} above the mean", value=float(ordered[k - 1]), unit="")
            for k in (1, 2, 5, 10, 100)
        ),
    ]


# ---- all of them ----------------------------------------------------------------------------


@click.command()
@click.option("--work", required=True, type=Path, help="A folder for caches, removed at the end.")
@click.option("--rows", default=SAMPLES, show_default=True)
@click.option("--classes", default=CLASSES, show_default=True)
@click.option("--bound", default=3.0, show_default=True, help="GiB that no step may go beyond.")
@click.option("--teacher", default=1000.0, show_default=True, help="Its images/s, for the plan.")
@click.option("--out", default=None, help="JSON file for the figures.")
def main(
    work: Path, rows: int, classes: int, bound: float, teacher: float, out: str | None
) -> None:
    """Run every step, show what it took, and check the bound."""
    console = Console()
    shape, device = Shape(rows, classes), torch.device("cpu")
    report = new_report({**shape._asdict(), "bound_gib": bound}, device)
    console.say(f"{rows:,} rows x {classes:,} classes, synthetic; at most {bound:g} GiB a step")
    work.mkdir(parents=True)  # another's folder is not removed
    try:
        _measure(console, report, sizes, shape, "of all encodings")
        for name in ("klt", "topk") if classes <= MOST_KLT_CLASSES else ("topk",):
            for step in (write, read, rectified, trained, verified):
                _measure(console, report, step, shape, str(work / f"{name}.zarr"), name)
        _measure(console, report, losses, shape, "of topk rows")
    finally:
        shutil.rmtree(work)
    show_plan(console, report, *shape, teacher)
    peaks = [figure for figure in report.figures if figure.unit == "GiB"]
    worst = max(peaks, key=lambda figure: figure.value)
    console.say(f"\nlargest peak: {worst.value:.2f} GiB, {worst.name}; the bound is {bound:g} GiB")
    if out:
        report.write(out)
    sys.exit(worst.value > bound)


def _measure(
    console: Console, report: Report, step: Callable[..., Figures], *given: object
) -> None:
    """A step in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        figures = pool.submit(step, *given).result()
    report.add(*figures)
    console.table(
        f"{step.__name__} {given[-1]}",
        ("what", "value", ""),
        [(figure.name, f"{figure.value:,.4g}", figure.unit) for figure in figures],
    )


if __name__ == "__main__":
    main()
