"""Everything that this project claims about its speed, measured here and now.

    make bench
    python -m benchmarks.suite --quick
    python -m benchmarks.suite --dataset folder:DIR --weights runs/teacher --student resnet9_w8

Without arguments nothing is downloaded: the embedded digits, and synthetic images of CIFAR's shape
with a cheap and an expensive teacher, trained for an epoch. Writes results/cpu.json, or
results/gpu.json on a GPU, and from both the table in README.md. Every figure is a ratio of things
done in turns in one process; nothing fails by being slow.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import msgspec
import torch

from benchmarks import cases, worlds
from benchmarks.accelerator import ROWS, accelerator_figures
from benchmarks.synthetic_cache import written_cache
from benchmarks.table import RESULTS, write_table
from benchmarks.worlds import Plan
from pipeline.bench.command import named
from pipeline.bench.measure import Report, new_report
from pipeline.bench.tables import show_report
from pipeline.bench.teacher import teacher_figures
from pipeline.bench.training import Bench, student_figures
from pipeline.console import Console
from stages.device import choose_device
from stages.errors import CacheError, ConfigError, ViewError
from stages.training.config import Dtype

PARTS = ("students", "teacher", "reading", "rectify", "views", "sweep", "gpu", "help")


@dataclass(frozen=True)
class Suite:
    """What is measured. turns: of students; of the rest fewer. seconds: longer epochs are cut short
    and scaled. quick: a smoke run. whole: nothing is left out, so that the results that are there
    are replaced. accelerated: with the figures that only a GPU shows.
    """

    plans: Sequence[Plan]
    device: str
    turns: int
    seconds: float
    quick: bool = False
    whole: bool = False
    accelerated: bool = False

    @property
    def sweep(self) -> tuple[int, int]:
        """How many students, and the epochs of each."""
        return (2, 1) if self.quick else (8, 20)

    @property
    def few(self) -> int:
        """Turns of what takes long, or is far from its target."""
        return min(self.turns, 3)

    @property
    def rows(self) -> tuple[int, int]:
        """Views and samples of the synthetic cache."""
        return (2, 200) if self.quick else (8, 50_000)


@click.command()
@click.option("--dataset", help="Instead of the synthetic images, with --weights.")
@click.option("--weights", multiple=True, help="Run directories of teachers of --dataset.")
@click.option(
    "--student", "students", multiple=True, help="With --dataset; resnet9_w8 if left out."
)
@click.option("--augment", default="pad-crop-flip", show_default=True, help="With --dataset.")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="bfloat16", show_default=True, help="Of 32-pixel models.")
@click.option("--batch-size", default=128, show_default=True)
@click.option("--turns", default=11, show_default=True, help="Of students; else 3.")
@click.option("--seconds", default=1.0, show_default=True, help="Longer epochs are cut short.")
@click.option("--threads", default=0, help="CPU threads; torch's choice if 0.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these.")
@click.option("--quick", is_flag=True, help="Digits alone, one turn: a smoke run.")
@click.option("--out", help="JSON; benchmarks/results/cpu.json or gpu.json if left out.")
def main(**given: object) -> None:
    """Measure every figure and write the table."""
    options = msgspec.convert(given, _Options)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device(options.device)
    suite = Suite(
        plans=options.plans(),
        device=str(device),
        turns=1 if options.quick else options.turns,
        seconds=options.seconds,
        quick=options.quick,
        whole=not (options.quick or options.parts or options.dataset),
        accelerated=device.type == "cuda",
    )
    run_suite(suite, options.parts or PARTS, options.out)


class _Options(msgspec.Struct, frozen=True):
    dataset: str | None
    weights: tuple[str, ...]
    students: tuple[str, ...]
    augment: str
    device: str
    dtype: Dtype
    batch_size: int
    turns: int
    seconds: float
    threads: int
    parts: tuple[str, ...]
    quick: bool
    out: str | None

    def plans(self) -> list[Plan]:
        """What there is to measure on. Raises UsageError for options that belong together."""
        if (self.dataset is None) != (not self.weights):
            raise click.UsageError("--dataset and --weights belong together")
        small = [worlds.digits("float32")]
        if self.quick:
            return small
        if self.dataset is None:
            make = [("resnet9_w8", ("resnet9_w2", "resnet8x4")), ("resnet9_w32", ("resnet9_w8",))]
            return small + [worlds.synthetic(*m, self.dtype, self.batch_size) for m in make]
        return small + [
            Plan(
                name=f"{self.dataset}, {Path(weights).name}",
                dataset=self.dataset,
                teacher="",
                students=self.students or ("resnet9_w8",),
                augment=self.augment,
                weights=weights,
                batch_size=self.batch_size,
                dtype=self.dtype,
            )
            for weights in self.weights
        ]


def run_suite(suite: Suite, parts: Sequence[str], out: str | None) -> Report:
    """Measure, show and write. out: where the JSON goes; None for its place among the results, and
    then README.md's table is written as well.
    """
    device, console, started = choose_device(suite.device), Console(), time.perf_counter()
    report = new_report({**msgspec.to_builtins(suite), "parts": list(parts)}, device)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:

        def say(part: str, of: str) -> None:
            console.say(f"{time.perf_counter() - started:6.0f} s  {part}  {of}")

        for part, of, measure in _cases(suite, parts, Path(folder), say):
            say(part, of)
            try:
                report.add(*(named(of, measure()) if of else measure()))
            except (CacheError, ConfigError, ViewError) as error:
                report.missing.append(f"{of}, {part}: {error.cause}")
        say("done", "")
    report.missing += _missing(suite)
    show_report(console, "benchmarks", report)
    if out is not None:
        report.write(out)
    elif not suite.whole:
        console.say("a part of the figures does not replace the results: give --out to keep them")
    else:
        RESULTS.mkdir(exist_ok=True)
        report.write(RESULTS / ("gpu.json" if device.type == "cuda" else "cpu.json"))
        write_table()
    return report


_Case = tuple[str, str, Callable[[], cases.Figures]]
"""Which part, of what, and what measures it."""


def _cases(
    suite: Suite, parts: Sequence[str], folder: Path, say: Callable[[str, str], None]
) -> Iterator[_Case]:
    """Every case of these parts, world by world. Views do not depend on models and are measured on
    the last world, as is stage two of a small cache; what only a GPU shows on the first and the
    last; a sweep, which takes long, on the first; reading and stage two on synthetic logits.
    """
    splits, few = worlds.load(suite.plans), suite.few
    for number, plan in enumerate(suite.plans):
        here = folder / f"world-{number}"
        here.mkdir()
        say("teacher and cache for", plan.name)
        world = worlds.make_world(plan, splits[plan.dataset], here, suite.device)
        bench = Bench(here, world.splits, suite.turns, suite.seconds)
        by_part: dict[str, Callable[[], cases.Figures]] = {
            "teacher": partial(
                teacher_figures, world.job.config, world.splits, here, few, plan.small
            )
        }
        if number == len(suite.plans) - 1:
            by_part["rectify"] = partial(cases.rectifying_little, world, here, few)
            by_part["views"] = partial(cases.views, world, few)
        if number == 0:
            by_part["sweep"] = partial(cases.sweep, world, here, min(few, 2), *suite.sweep)
        if suite.accelerated and number in (0, len(suite.plans) - 1):
            by_part["gpu"] = partial(accelerator_figures, world, bench)
        if "students" in parts:
            for name in plan.students:
                measure = partial(student_figures, bench, world.student(name), world.job)
                yield "students", f"{plan.name} -> {name}", measure
        yield from ((part, plan.name, by_part[part]) for part in parts if part in by_part)
    if {"reading", "rectify"} & set(parts):
        views, samples = suite.rows
        of = f"{samples:,} x 100, {views} views, synthetic"
        say("cache of", of)
        cache = written_cache(folder / "synthetic.zarr", views, samples)
        if "reading" in parts:
            device = choose_device(suite.device)
            yield "reading", of, partial(cases.reading, cache, folder, few, device)
        if "rectify" in parts:
            yield "rectify", of, partial(cases.rectifying, cache, folder, few)
    if "help" in parts:
        yield "help", "", partial(cases.answering, few)


def _missing(suite: Suite) -> list[str]:
    """What this machine cannot show."""
    if not suite.accelerated:
        return [f"on a GPU: {row}" for row in ("every row above", *ROWS)]
    return []


if __name__ == "__main__":
    main()
