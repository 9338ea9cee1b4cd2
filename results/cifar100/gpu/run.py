"""A first experiment on a GPU, in pieces: a teacher, its cache, six students of three seeds.

    python -m results.cifar100.gpu.run --dataset folder:DIR --minutes 8

It reads the rates that `python -m benchmarks.gpu` has measured on this device, chooses the largest
size that fits, says so, and starts; where none fits it says what would. Given again, the command
goes on: finished pieces are kept, one that was cut off is resumed. It stops itself in time.
`--carry FILE` takes along what is done to another machine, without the cache and half-trained
students: a cache is made again there.

    python -m results.cifar100.gpu.run --rehearse --device cpu --rates RATES.json    a few minutes

RATES.json: of `python -m benchmarks.gpu --device cpu --quick --out RATES.json`.
"""

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

from benchmarks.book import RATES_RUN, read_runs
from benchmarks.table import GPU, RESULTS
from pipeline.console import Console
from pipeline.ranks import tell
from results.cifar100.gpu.carry import pack, unpack
from results.cifar100.gpu.experiment import Experiment
from results.cifar100.gpu.plan import SIZES, Plan, Rates, Size, Work, plan
from stages.device import choose_device, device_name
from stages.errors import ConfigError, PipelineError, StoppedError
from stages.files import replace_file


class Brief(Console):
    """Leaves out the configurations of runs, which lie in their folders."""

    def say(self, text: str) -> None:
        if "\n" not in text.strip():
            super().say(text)


SMALL = (Size(2, 3, 2), Size(1, 2, 1))
"""Of a rehearsal."""


def planned_here(here: Experiment, rates: Path, seconds: float, sizes: tuple[Size, ...]) -> Plan:
    """What is left to do, at the largest of some sizes that fits in some seconds."""
    if not rates.is_file():
        raise ConfigError(
            f"{rates} is not there", "Measure first: python -m benchmarks.gpu --seconds 150."
        )
    runs = [each for each in read_runs(rates) if each.kind.startswith(RATES_RUN)]
    known = Rates.of(runs, device_name(choose_device(here.device)))
    work = Work(*here.samples, here.left, here.full_epochs)
    return plan(work, known, here.done, seconds, sizes)


def show(planned: Plan, here: Experiment, minutes: float, launches: int) -> None:
    """The plan as a table."""
    size, ends = planned.size, 60 * minutes
    begun, rows = 0.0, []
    for piece, seconds in planned.seconds.items():
        begun += seconds
        when = "in this launch" if begun <= ends else "in a later one"
        rows.append((piece, f"{seconds / 60:.1f}", when if launches > 1 else ""))
    title = (
        f"{size.teacher} epochs of the teacher, {size.views} views, students of {size.students} "
        f"epochs, {here.seeds} seeds: {planned.total / 60:.1f} of {launches * minutes:g} minutes"
    )
    here.console.table(title, ("piece", "minutes", ""), rows)
    if "full" not in planned.seconds and not here.done("full"):
        here.console.say("the 240 epochs of full.yaml do not fit, and are left out")


@contextmanager
def stopping_after(seconds: float) -> Iterator[None]:
    """Stop what is at work by SIGTERM: a run saves, and all of it ends with StoppedError."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedError("stopped in time", "", number)

    before = signal.signal(signal.SIGTERM, stop)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    except StoppedError as error:
        again = "Give the same command again to go on."
        raise StoppedError(error.cause, again, error.exit_code - 128) from error
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)


def chosen_size(work: Path, sizes: tuple[Size, ...]) -> tuple[Size, ...]:
    """The size of what was begun, or all that there are."""
    file = work / "size.txt"
    return (Size.parse(file.read_text().strip()),) if file.exists() else sizes


@click.command()
@click.option("--dataset", default="cifar100", show_default=True, help="As `pipeline` takes it.")
@click.option("--work", default="runs/gpu", show_default=True, type=click.Path(path_type=Path))
@click.option("--rates", default=RESULTS / GPU, type=click.Path(path_type=Path))
@click.option("--minutes", default=8.0, show_default=True, help="That a launch may take.")
@click.option("--launches", default=1, show_default=True, help="That shall add up, this one too.")
@click.option("--size", help="Epochs of the teacher, views, epochs of a student: 60,162,30.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--carry", type=click.Path(path_type=Path), help="A tar file, read and written.")
@click.option("--rehearse", is_flag=True, help="300 images of the digits, small models.")
@click.option("--plan-only", is_flag=True, help="Say what would be done.")
def main(
    dataset: str,
    work: Path,
    rates: Path,
    minutes: float,
    launches: int,
    size: str | None,
    seeds: int,
    device: str,
    carry: Path | None,
    rehearse: bool,
    plan_only: bool,
) -> None:
    """Train a teacher, cache it, train students from the cache: as much as fits."""
    console = Brief()
    if carry is not None:
        unpack(carry, work)
    here = Experiment(work, "digits" if rehearse else dataset, device, seeds, rehearse, console)
    sizes = (Size.parse(size),) if size else SMALL if rehearse else SIZES
    planned = planned_here(here, rates, 60 * minutes * launches, chosen_size(work, sizes))
    show(planned, here, minutes, launches)
    if plan_only:
        return
    work.mkdir(parents=True, exist_ok=True)
    replace_file(work / "size.txt", f"{planned.size}\n".encode())
    here = dataclasses.replace(here, size=planned.size)
    with stopping_after(60 * minutes):
        for piece in planned.seconds:
            console.say(f"== {piece}")
            try:
                here.make(piece)
            finally:
                if carry is not None:
                    pack(work, carry)


if __name__ == "__main__":
    try:
        main()
    except PipelineError as error:
        tell(error)
        sys.exit(error.exit_code)
