"""Ratios of two things measured alternately in one run, so that a machine's drift cancels.

    python benchmarks/ratios.py --dataset folder:DIR --weights runs/teacher --student resnet9_w8

Prints a table and writes it as JSON. Nothing here is a test: nothing fails by being slow.

    teacher pass    stage one appending a view  /  the same forward passes alone
    cached epoch    a KD epoch from the cache   /  the same epoch with hard labels only
    rectify         stage two on every view     /  NumPy reading and decoding the same arrays
    together        an epoch of four students from one stream of batches  /  of each alone, added up
    help            pipeline --help, in seconds
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec
import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from pipeline.console import Console
from stages.cache_teacher import (
    CacheConfig,
    TeacherSettings,
    cache_teacher,
    prepare,
    teacher_logits,
)
from stages.device import device_name, versions
from stages.rectify import RectifyConfig, rectify
from stages.train_student import StudentConfig, train_student, train_together
from stages.training.config import (
    DataSettings,
    LossSettings,
    ModelSettings,
    SeedSettings,
    Settings,
    TrainSettings,
)
from stages.training.setup import Splits, load_data


@dataclass
class Pair:
    """Seconds of a thing and of its yardstick, pair by pair."""

    name: str
    ours: list[float] = field(default_factory=list)
    yardstick: list[float] = field(default_factory=list)
    target: float | None = None

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.yardstick, strict=True)]

    def row(self) -> tuple[str, ...]:
        ratios = self.ratios
        return (
            self.name,
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f} to {max(ratios):.3f}",
            f"{statistics.median(self.ours):.2f} / {statistics.median(self.yardstick):.2f} s",
            str(len(ratios)),
            "" if self.target is None else f"<= {self.target}",
        )


class Bench(Settings, frozen=True):
    """What is measured on what."""

    dataset: str
    weights: str
    student: str
    augment: str
    pairs: int
    epochs: int


@click.command()
@click.option("--dataset", default="digits", show_default=True)
@click.option("--weights", required=True, help="The teacher's run directory.")
@click.option("--student", default="resnet9_w8", show_default=True)
@click.option("--augment", default="pad-crop-flip", show_default=True)
@click.option("--pairs", default=3, show_default=True)
@click.option("--epochs", default=2, show_default=True, help="Of each measured student run.")
@click.option("--out", default=None, help="JSON file for the figures.")
def main(out: str | None, **given: object) -> None:
    """Measure every pair and show the table."""
    bench = msgspec.convert(given, Bench)
    splits = load_data(DataSettings(dataset=bench.dataset))
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache.zarr"
        rows = [teacher_pass(bench, splits, cache)]
        epoch, waiting = student_epoch(bench, splits, cache, Path(folder))
        rows += [epoch, rectification(bench, cache), together(bench, splits, cache, Path(folder))]
        rows.append(help_time(bench))
    console = Console()
    columns = ("what", "ratio (median)", "spread", "ours / yardstick", "pairs", "target")
    console.table("ratios", columns, [pair.row() for pair in rows])
    console.say(f"waiting for targets: {waiting:.2%} of a cached epoch (target <= 2%)")
    if out:
        machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads()}
        figures = [{"name": p.name, "ours": p.ours, "yardstick": p.yardstick} for p in rows]
        report = {"bench": msgspec.to_builtins(bench), "machine": machine, "versions": versions()}
        report |= {"pairs": figures, "waiting": waiting}
        Path(out).write_text(json.dumps(report, indent=2) + "\n")


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def teacher_pass(bench: Bench, splits: Splits, cache: Path) -> Pair:
    """Stage one appending one view at a time, against the bare forward passes of that view."""
    config = CacheConfig(
        data=DataSettings(dataset=bench.dataset),
        teacher=TeacherSettings(weights=bench.weights),
        views=1,
        augment=bench.augment,
        dtype="bfloat16",
    )
    job = prepare(config, splits)
    cache_teacher(job, cache)  # the first view and the test split; warms up
    pair = Pair("teacher pass / bare forward", target=1.10)
    samples = torch.arange(len(splits.train))
    for view in range(1, bench.pairs + 1):
        appended = prepare(msgspec.structs.replace(config, views=view + 1), splits)
        feed = appended.feed(splits.train, appended.policy)
        pair.yardstick.append(seconds(lambda: teacher_logits(appended, feed, samples, view)))  # noqa: B023
        pair.ours.append(seconds(lambda: cache_teacher(appended, cache)))  # noqa: B023
    return pair


def student_epoch(bench: Bench, splits: Splits, cache: Path, folder: Path) -> tuple[Pair, float]:
    """Training part of KD epochs from the cache, against hard-label epochs on the same views."""
    pair, waits = Pair("cached KD epoch / hard-label epoch", target=1.05), []
    for turn in range(bench.pairs):
        for loss, times in (("ce", pair.yardstick), ("kd", pair.ours)):
            run = folder / f"{loss}-{turn}"
            train_student(student(bench, cache, loss), run, splits=splits)
            metrics = epochs_of(run)
            times.append(statistics.median(m["seconds"] for m in metrics))
            if loss == "kd":
                waits.append(
                    sum(m["wait_seconds"] for m in metrics) / sum(m["seconds"] for m in metrics)
                )
    return pair, statistics.median(waits)


def together(bench: Bench, splits: Splits, cache: Path, folder: Path) -> Pair:
    """Training part of an epoch of four KD students of one stream, against each alone."""
    pair = Pair("four students together / one by one")
    for turn in range(bench.pairs):
        configs = [student(bench, cache, "kd", init) for init in range(4)]
        alone, group = (
            [folder / f"{how}-{turn}-{init}" for init in range(4)] for how in ("alone", "group")
        )
        for config, run in zip(configs, alone, strict=True):
            train_student(config, run, splits=splits)
        train_together(configs, group, splits=splits)
        for times, runs in ((pair.yardstick, alone), (pair.ours, group)):
            each = [statistics.median(m["seconds"] for m in epochs_of(run)) for run in runs]
            times.append(sum(each))  # together, every student is given its share of the time
    return pair


def student(bench: Bench, cache: Path, loss: str, init: int = 0) -> StudentConfig:
    return StudentConfig(
        cache=str(cache),
        data=DataSettings(dataset=bench.dataset),
        model=ModelSettings(architecture=bench.student),
        loss=LossSettings(name=loss),
        train=TrainSettings(epochs=bench.epochs, batch_size=256, dtype="bfloat16"),
        seed=SeedSettings(init=init),
    )


def epochs_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rectification(bench: Bench, cache: Path) -> Pair:
    """Stage two over all views, against reading and decoding its inputs with zarr and NumPy."""
    pair = Pair("rectify / plain NumPy pass", target=3.0)

    def plain_pass() -> int:
        group = zarr.open_group(cache, mode="r")
        label, wrong = np.asarray(group["label"][:]), 0  # type: ignore[index]
        for view in range(group["prediction"].shape[0]):  # type: ignore[union-attr]
            plainly_decoded(group, view)
            prediction = np.asarray(group["prediction"][view])  # type: ignore[index]
            wrong += int((prediction != label).sum())
        return wrong

    for turn in range(bench.pairs):
        pair.yardstick.append(seconds(plain_pass))
        config = RectifyConfig(name=f"bench-{turn}")
        pair.ours.append(seconds(lambda: rectify(cache, config)))  # noqa: B023
    return pair


def plainly_decoded(group: zarr.Group, view: int) -> NDArray[np.float32]:
    """The rows of a view, as docs/cache-format.md says to decode them."""
    if "logits" in group:
        return np.asarray(group["logits"][view], dtype=np.float32)  # type: ignore[index]
    codes, basis, mean, step = (
        np.asarray(group[name][where], dtype=np.float32)  # type: ignore[index]
        for name, where in (
            ("logits_code", view),
            *((f"klt_{name}", slice(None)) for name in ("basis", "mean", "step")),
        )
    )
    rows: NDArray[np.float32] = codes * step @ basis + mean
    return rows


def help_time(bench: Bench) -> Pair:
    """`pipeline --help` against a bare interpreter."""
    pair = Pair("pipeline --help / python -c pass")
    for _ in range(max(5, bench.pairs)):
        bare, help_ = ["-c", "pass"], ["-m", "pipeline", "--help"]
        for arguments, times in ((bare, pair.yardstick), (help_, pair.ours)):
            command = [sys.executable, *arguments]
            times.append(seconds(lambda: subprocess.run(command, capture_output=True, check=True)))  # noqa: B023
    return pair


if __name__ == "__main__":
    main()
