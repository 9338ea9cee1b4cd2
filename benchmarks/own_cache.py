"""What a user's cache costs on their machine: `python -m benchmarks.suite --cache CACHE`.

The cache is only read.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.measure import Figure, Ratio, Report, new_report
from benchmarks.reading import reading_figures
from benchmarks.rectifying import TARGET, rectify_figures
from benchmarks.table import show_report
from benchmarks.training import Bench, student_figures
from pipeline.config import convert
from pipeline.console import Console
from pipeline.evaluation import check_json
from stages.cache import LogitCache
from stages.data import load_data, skips_of
from stages.device import choose_device
from stages.errors import CacheError, ConfigError, ViewError
from stages.inputs.models import build_model
from stages.repair import recorded_job
from stages.schema import Settings, check_bounds
from stages.settings import (
    MOST_IN_A_BATCH,
    DataSettings,
    Dtype,
    ModelSettings,
    StudentConfig,
    TrainSettings,
)
from stages.teacher.job import CacheJob

_FIXED_COSTS = 20_000
"""Samples; stage two on fewer is mostly starting and ending, and not held to its target."""


class BenchSettings(Settings, frozen=True, kw_only=True):
    """What is measured. weights: of the teacher that the cache was made from, None for no online
    distillation. seconds: epochs that take longer are cut short and scaled.
    """

    cache: str
    dataset: str | None = None
    root: str | None = None
    students: tuple[str, ...] = ()
    weights: str | None = None
    device: str = "auto"
    dtype: Dtype = "float32"
    batch_size: int = 128
    turns: int = 3
    seconds: float = 4.0

    def __post_init__(self) -> None:
        check_bounds("--turns", self.turns, above=0, most=1000)
        check_bounds("--batch-size", self.batch_size, above=0, most=MOST_IN_A_BATCH)
        check_bounds("--seconds", self.seconds, above=0, most=86_400)
        if self.students and self.dataset is None:
            raise ConfigError("--student needs the images", "Give --dataset as well.")
        if self.weights is not None and not self.students:
            raise ConfigError(
                "--weights is for online distillation, which needs a student",
                "Give --dataset and --student as well.",
            )


def bench_cache(console: Console, out: str | None = None, **given: Any) -> Report:
    """Measure a cache and show what came of it. given: fields of `BenchSettings`.

    Raises CacheError if there is no cache, or no complete view in it, ConfigError for what cannot
    be measured, and what `train_student` raises where dataset or teacher are others.
    """
    # 1) what there is
    if out is not None:
        check_json(out, Report)
    known = {name: value for name, value in given.items() if value is not None}
    settings = convert(BenchSettings, known)
    cache, device = LogitCache.open(settings.cache), choose_device(settings.device)
    if not cache.complete_views:
        raise CacheError(
            f"{settings.cache} has no complete view yet",
            "Run `pipeline cache-teacher` again to finish it.",
        )
    cache.commits.check_all_objects()
    report = new_report(msgspec.to_builtins(settings), device)

    # 2) everything that is written goes to a folder of its own
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        # Students first: whatever does not belong to the cache is reported at once.
        for figures in _student_figures(settings, Path(folder), console):
            report.add(*figures)
        console.say("reading a slab")
        report.add(*reading_figures([cache], Path(folder), settings.turns, device))
        console.say("rectifying a copy of a few views")
        try:
            target = TARGET if cache.num_samples >= _FIXED_COSTS else None
            report.add(*rectify_figures(cache, Path(folder), settings.turns, target=target))
        except ViewError as error:  # views that mix samples
            report.missing.append(f"rectify: {error.cause}")

    # 3) what came of it, and what would show more
    report.missing += _lacking(settings)
    if (complete := len(cache.complete_views)) < cache.num_views:
        report.missing.append(f"views: {complete} of {cache.num_views} are complete")
    show_report(console, settings.cache, report, out)
    return report


def _student_figures(
    settings: BenchSettings, folder: Path, console: Console
) -> Iterator[list[Ratio | Figure]]:
    """Of one student after another."""
    if settings.dataset is None or not settings.students:
        return
    data = DataSettings(dataset=settings.dataset, root=settings.root)
    job: CacheJob | None = None
    if settings.weights is not None:
        job = recorded_job(
            settings.cache, settings.dataset, settings.root, settings.weights, settings.device
        )
    bench = Bench(
        folder,
        job.splits if job else load_data(data, skips_of([LogitCache.open(settings.cache).skips])),
        settings.turns,
        settings.seconds,
    )
    train = bench.splits.train
    for student in settings.students:  # one that is unknown is reported before any is trained
        build_model(student, len(train.class_names), train.shape[0])
    for student in dict.fromkeys(settings.students):
        console.say(f"training {student}")
        config = StudentConfig(
            cache=settings.cache,
            data=data,
            model=ModelSettings(architecture=student),
            train=TrainSettings(batch_size=settings.batch_size, dtype=settings.dtype),
            device=settings.device,
        )
        yield named(student, student_figures(bench, config, job))


def named(of: str, measured: Sequence[Ratio | Figure]) -> list[Ratio | Figure]:
    """The same figures under names that say what they are of."""
    return [msgspec.structs.replace(one, name=f"{of}: {one.name}") for one in measured]


def _lacking(settings: BenchSettings) -> list[str]:
    lacking = []
    if not settings.students:
        lacking.append("a student's epoch: give --dataset and --student to see it")
    if settings.weights is None:
        needs = "--weights" if settings.students else "--dataset, --student and --weights"
        lacking.append(f"distillation with the teacher running: give {needs} to see it")
    return lacking
