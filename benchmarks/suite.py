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
from benchmarks.accelerator import CAN_COMPILE, ROWS, accelerator_figures
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
    """What is measured. seconds: longer epochs are cut short and scaled. quick: a smoke run, that
    leaves no results. accelerated: with the figures that only a GPU shows.
    """

    plans: Sequence[Plan]
    device: str
    turns: int
    seconds: float
    quick: bool = False
    accelerated: bool = False

    @property
    def sweep(self) -> tuple[int, int]:
        """How many students, and the epochs of each."""
        return (2, 1) if self.quick else (8, 3)


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
@click.option("--turns", default=3, show_default=True)
@click.option("--seconds", default=8.0, show_default=True, help="Longer epochs are cut short.")
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
    elif not suite.quick:
        RESULTS.mkdir(exist_ok=True)
        report.write(RESULTS / ("gpu.json" if device.type == "cuda" else "cpu.json"))
        write_table()
    return report


_Case = tuple[str, str, Callable[[], cases.Figures]]
"""Which part, of what, and what measures it."""


def _cases(
    suite: Suite, parts: Sequence[str], folder: Path, say: Callable[[str, str], None]
) -> Iterator[_Case]:
    """Every case of these parts, world by world. What does not depend on models is measured on the
    last world, what only a GPU shows on the first and the last; a sweep, which takes long, on the
    first.
    """
    splits, turns = worlds.load(suite.plans), suite.turns
    for number, plan in enumerate(suite.plans):
        here = folder / f"world-{number}"
        here.mkdir()
        say("teacher and cache for", plan.name)
        world = worlds.make_world(plan, splits[plan.dataset], here, suite.device)
        bench = Bench(here, world.splits, turns, suite.seconds)
        by_part: dict[str, Callable[[], cases.Figures]] = {
            "teacher": partial(teacher_figures, world.job.config, world.splits, here, turns)
        }
        if number == len(suite.plans) - 1:
            by_part["reading"] = partial(cases.reading, world, here, turns)
            by_part["rectify"] = partial(cases.rectifying, world, here, turns)
            by_part["views"] = partial(cases.views, world, turns)
        if number == 0:
            by_part["sweep"] = partial(cases.sweep, world, here, turns, *suite.sweep)
        if suite.accelerated and number in (0, len(suite.plans) - 1):
            by_part["gpu"] = partial(accelerator_figures, world, bench)
        if "students" in parts:
            for name in plan.students:
                measure = partial(student_figures, bench, world.student(name), world.job)
                yield "students", f"{plan.name} -> {name}", measure
        yield from ((part, plan.name, by_part[part]) for part in parts if part in by_part)
    if "help" in parts:
        yield "help", "", partial(cases.answering, turns)


def _missing(suite: Suite) -> list[str]:
    """What this machine cannot show."""
    if not suite.accelerated:
        return [f"on a GPU: {row}" for row in ("every row above", *ROWS)]
    return [] if CAN_COMPILE else [f"{ROWS[0]}: this version does not compile students"]


if __name__ == "__main__":
    main()
