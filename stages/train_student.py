"""Stage three: train a student from a cache. The teacher is never loaded.

    pipeline train-student digits.zarr --dataset digits --student resnet8 --out runs/student \\
        --loss kd --bias rectify

What a student learns from is a `CachedTask` (`stages.training.student`); what must hold before its
first step is in `stages.student_checks`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stages.cache import LogitCache
from stages.data import Splits, check_dataset, load_data, skips_of
from stages.distributed import (
    ALONE,
    Ranks,
    device_of_rank,
    first_rank_before_others,
    launched_ranks,
    process_group,
)
from stages.inputs.views import ViewPolicy
from stages.reporting import Reporter, Silent
from stages.settings import StudentConfig
from stages.student_checks import check_students, made_from, slab_plan
from stages.targets.reader import TargetReader
from stages.training.assemble import Destination, Planned, make_trainer
from stages.training.student import CachedTask
from stages.training.trainer import Outcome, Trainer

__all__ = [
    "student_trainer",
    "students_trainer",
    "train_student",
    "train_together",
]


def train_student(
    config: StudentConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train a student and return the run's summary; see `student_trainer`.

    Under torchrun the ranks train it together, and the first of them writes.
    """
    ranks = launched_ranks()
    with process_group(ranks, device_of_rank(ranks, config.device)):
        return student_trainer(config, out, resume, overwrite, splits, reporter, ranks).fit()


def train_together(
    configs: Sequence[StudentConfig],
    outs: Sequence[str | Path],
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> list[Outcome]:
    """Train several students in one process from one stream of batches: each has the weights that
    it would have alone. The summary of every run, or the RunError of one that failed.

    They may differ in model, loss, bias, optimiser and seed.init. Raises ConfigError where they
    cannot share a stream, and what `student_trainer` raises.
    """
    students = list(zip(configs, map(Path, outs), strict=True))
    return students_trainer(students, resume, overwrite, splits, reporter).fit_all()


def student_trainer(
    config: StudentConfig,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """As `students_trainer`, for one student."""
    return students_trainer([(config, Path(out))], resume, overwrite, splits, reporter, ranks)


def students_trainer(
    students: Sequence[tuple[StudentConfig, Path]],
    resume: bool = False,
    overwrite: bool = False,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Everything checked and loaded, ready for `fit`. `splits`: the dataset, if it is loaded.

    Raises IdentityError if the dataset is not the one the cache was made from, CacheError if the
    cache or the rectification is missing or incomplete, ConfigError for settings that cannot be.
    """
    reporter = reporter or Silent()
    # 1) the cache, and what is to be learned from it
    cache = LogitCache.open(students[0][0].cache)
    checked = check_students([config for config, _ in students], cache)
    configs, caches, policy, shown = checked.configs, checked.caches, checked.policy, checked.shown
    config = configs[0]

    # 2) images: the ones the teachers saw
    splits = splits or first_rank_before_others(
        ranks, lambda: load_data(config.data, skips_of(c.skips for c in caches))
    )
    splits.tell(reporter)
    for member in caches:
        check_dataset(member, splits, policy, config.accept_pixel_drift, reporter)

    # 3) the students and their runs
    reads = next((each for each in configs if each.loss.name != "ce"), config)
    plan, order = slab_plan(caches, reads, len(checked.views), ranks, splits.train.skipped)
    rectifications = [c.bias.rectified for c in configs if c.bias.rectified is not None]
    if len(set(rectifications)) > 1:  # each is read for itself: together they might be too much
        plan = dataclasses.replace(plan, resident=False)

    @functools.cache
    def reader(rectified: str | None, labels: Tensor) -> TargetReader:
        seed, epochs = config.seed.data, config.train.epochs
        return TargetReader(caches, rectified, shown, plan, epochs, seed, labels, len(configs))

    def planned(config: StudentConfig, out: Path) -> Planned:
        def task(labels: Tensor, _: ViewPolicy) -> CachedTask:
            # What is read with a rectification has the teacher's own rows as well: read once.
            rectified = config.bias.rectified or next(iter(rectifications), None)
            return CachedTask(reader(rectified, labels), config, labels)

        return Planned(
            config,
            Destination(out, "student", resume, overwrite),
            task,
            len(shown[0]),
            made_from(config, caches, len(checked.views)),
        )

    return make_trainer(
        [planned(each, out) for each, (_, out) in zip(configs, students, strict=True)],
        splits,
        lambda _: policy,
        reporter,
        teacher_size=cache.identity.teacher.image_size,
        order=order,
        ranks=ranks,
    )
