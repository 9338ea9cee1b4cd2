"""Everything that this project claims about its speed, measured here and now.

    make bench
    python -m benchmarks.suite --quick
    python -m benchmarks.suite --dataset folder:DIR --weights runs/teacher --student resnet9_w8
    python -m benchmarks.suite --cache CACHE --dataset D --student M --weights runs/teacher

With --cache a cache of your own is measured, which is only read: what reading and rectifying it
costs; with a dataset and students also their epochs, and with weights distillation online.
Without arguments nothing is downloaded: the embedded digits, and synthetic images of CIFAR's shape
with a cheap and an expensive teacher, trained for an epoch. Writes results/cpu.json, and the table
in README.md from all results; a GPU has larger models and `benchmarks.gpu`. Every figure is a ratio
of things done in turns in one process; nothing fails by being slow.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import click
import msgspec
import torch

from benchmarks import cases, worlds
from benchmarks.measure import Report, new_report
from benchmarks.own_cache import bench_cache, named
from benchmarks.synthetic_cache import written_cache
from benchmarks.table import CPU, RESULTS, show_report, write_table
from benchmarks.teacher import teacher_figures
from benchmarks.training import Bench, student_figures
from benchmarks.worlds import Plan
from pipeline.console import Console
from stages.device import choose_device
from stages.errors import CacheError, ConfigError, PipelineError, ViewError
from stages.settings import Dtype
from stages.user_code import modules_in, trusting

PARTS = ("students", "teacher", "reading", "rectify", "views", "sweep", "help")


@dataclass(frozen=True)
class Suite:
    """What is measured. turns: of students; of the rest fewer. seconds: longer epochs are cut short
    and scaled. quick: a smoke run. whole: nothing is left out, so that the results that are there
    are replaced.
    """

    plans: Sequence[Plan]
    device: str
    turns: int
    seconds: float
    quick: bool = False
    whole: bool = False

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
@click.option("--cache", help="Measure this cache instead; it is only read.")
@click.option("--dataset", help="Instead of the synthetic images, with --weights.")
@click.option("--root", help="Where torchvision's datasets lie, with --cache.")
@click.option("--weights", multiple=True, help="Run directories of teachers of --dataset.")
@click.option(
    "--student", "students", multiple=True, help="With --dataset; resnet9_w8 if left out."
)
@click.option("--augment", default="pad-crop-flip", show_default=True, help="With --dataset.")
@click.option("--device", default="auto", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(get_args(Dtype)),
    help="Of 32-pixel models: bfloat16; float32 with --cache.",
)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--turns", type=click.IntRange(1), help="Of students: 11; else 3.")
@click.option("--seconds", type=float, help="Longer epochs are cut short: 1; 4 with --cache.")
@click.option("--threads", default=0, help="CPU threads; torch's choice if 0.")
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these.")
@click.option("--quick", is_flag=True, help="Digits alone, one turn: a smoke run.")
@click.option(
    "--trust", multiple=True, help="Run this module's code where only the cache or a run names it."
)
@click.option("--out", help="JSON; benchmarks/results/cpu.json if left out.")
def main(**given: object) -> None:
    """Measure every figure and write the table."""
    options = msgspec.convert(given, _Options)
    modules = modules_in(options.dataset, options.augment, *options.students)
    try:
        with trusting(*options.trust, *modules):
            _measure(options)
    except PipelineError as error:
        raise click.ClickException(f"{error.cause}\n{error.remedy or ''}".rstrip()) from error


def _measure(options: "_Options") -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.cache is not None:
        bench_cache(Console(), options.out, **options.of_cache())
        return
    device = choose_device(options.device)
    suite = Suite(
        plans=options.plans(),
        device=str(device),
        turns=1 if options.quick else options.turns or 11,
        seconds=1.0 if options.seconds is None else options.seconds,
        quick=options.quick,
        whole=device.type == "cpu" and not (options.quick or options.parts or options.dataset),
    )
    run_suite(suite, options.parts or PARTS, options.out)


class _Options(msgspec.Struct, frozen=True):
    cache: str | None
    dataset: str | None
    root: str | None
    weights: tuple[str, ...]
    students: tuple[str, ...]
    augment: str
    device: str
    dtype: Dtype | None
    batch_size: int
    turns: int | None
    seconds: float | None
    threads: int
    parts: tuple[str, ...]
    quick: bool
    trust: tuple[str, ...]
    out: str | None

    def of_cache(self) -> dict[str, object]:
        """What `bench_cache` takes. Raises UsageError where there are several teachers."""
        if len(self.weights) > 1:
            raise click.UsageError("a cache has one teacher: give --weights once")
        names = ("cache", "dataset", "root", "students", "device", "dtype", "batch_size")
        given = {name: getattr(self, name) for name in (*names, "turns", "seconds")}
        return given | {"weights": next(iter(self.weights), None)}

    def plans(self) -> list[Plan]:
        """What there is to measure on. Raises UsageError for options that belong together."""
        if (self.dataset is None) != (not self.weights):
            raise click.UsageError("--dataset and --weights belong together")
        small, dtype = [worlds.digits("float32")], self.dtype or "bfloat16"
        if self.quick:
            return small
        if self.dataset is None:
            make = [("resnet9_w8", ("resnet9_w2", "resnet8x4")), ("resnet9_w32", ("resnet9_w8",))]
            return small + [worlds.synthetic(*m, dtype, self.batch_size) for m in make]
        return small + [
            Plan(
                name=f"{self.dataset}, {Path(weights).name}",
                dataset=self.dataset,
                teacher="",
                students=self.students or ("resnet9_w8",),
                augment=self.augment,
                weights=weights,
                batch_size=self.batch_size,
                dtype=dtype,
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
    if device.type == "cpu":
        report.missing.append("on a GPU: `python -m benchmarks.gpu`")
    show_report(console, "benchmarks", report, out)
    if out is None and not suite.whole:
        console.say("a part of the figures does not replace the results: give --out to keep them")
    elif out is None:
        RESULTS.mkdir(exist_ok=True)
        report.write(RESULTS / CPU)
        write_table()
    return report


_Case = tuple[str, str, Callable[[], cases.Figures]]
"""Which part, of what, and what measures it."""


def _cases(
    suite: Suite, parts: Sequence[str], folder: Path, say: Callable[[str, str], None]
) -> Iterator[_Case]:
    """Every case of these parts, world by world. Views do not depend on models and are measured on
    the last world, as is stage two of a small cache; a sweep, which takes long, on the first;
    reading and stage two on synthetic logits.
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


if __name__ == "__main__":
    main()
