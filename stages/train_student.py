r"""Stage three: train students from a cache. The teacher is never loaded.

    pipeline train-student digits.zarr --dataset digits --student resnet8 --out runs/student \
        --loss kd --bias rectify

An epoch shows as many images as there are samples, each in a view, and learns from that view's row
of the cache:

    L = ce_weight * CE(z_s, y) + weight * mean_i w_i * loss(z_s, z_t)_i

where the row weights w are all 1, or those of bias elimination and rectification
(`stages.objectives.bias`); losses that couple rows say themselves what weights mean to them. A
corrected loss has a term more, see `stages.objectives.correction`. With the loss `ce` the same
views are shown and no targets are read: the fair baseline. Where the cached views mix two samples
(mixup, cutmix), CE is that of both labels by their shares, and targets are as ever: the teacher saw
the mixed image. An epoch shows every sample once, unless --views-per-decode has several epochs
share decoded images (`stages.order.Rounds`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.cache import LogitCache
from stages.data import Splits, cached_policy, check_dataset, load_data, skips_of, split_digests
from stages.distributed import (
    ALONE,
    Ranks,
    device_of_rank,
    first_rank_before_others,
    launched_ranks,
    process_group,
)
from stages.reporting import Reporter, Silent
from stages.settings import StudentConfig
from stages.student_checks import check_students, complete, made_from, slab_plan
from stages.targets.reader import TargetReader
from stages.training.cached_task import CachedTask
from stages.training.learner import Learner
from stages.training.models import build, check_models
from stages.training.run_directory import RunDirectory
from stages.training.stream import Showing, open_stream
from stages.training.trainer import Outcome, Trainer
from stages.training.until import untils


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
    run, ranks = RunDirectory(out, resume, overwrite), launched_ranks()
    with process_group(ranks, device_of_rank(ranks, config.device)):
        return student_trainer([config], [run], splits, reporter, ranks).fit()


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
    runs = [RunDirectory(out, resume, overwrite) for out in outs]
    return student_trainer(configs, runs, splits, reporter).fit_all()


def student_trainer(
    configs: Sequence[StudentConfig],
    runs: Sequence[RunDirectory],
    splits: Splits | None = None,
    reporter: Reporter | None = None,
    ranks: Ranks = ALONE,
) -> Trainer:
    """Everything checked and loaded, ready for `fit`: one student, or several that are shown the
    same batches. splits: the dataset, if it is loaded. ranks: of a launch on several processes.

    Raises IdentityError if the dataset is not the one the cache was made from, CacheError if the
    cache or the rectification is missing or incomplete, ConfigError for settings that cannot be,
    RunError if a run directory may not be written.
    """
    reporter = reporter or Silent()
    # 1) the cache, and what its views teach
    cache = LogitCache.open(configs[0].cache)
    configs = [complete(config, cache) for config in configs]
    caches, schedule = check_students(configs, cache)
    config = configs[0]  # what decides the stream of batches is the same in all of them

    # 2) the images: those that the teachers saw
    splits = splits or first_rank_before_others(
        ranks, lambda: load_data(config.data, skips_of(c.skips for c in caches))
    )
    splits = splits.with_classes(cache.identity.dataset.class_names)
    splits.tell(reporter)
    policy = cached_policy(cache)
    for member in caches:
        check_dataset(member, splits, policy, config.accept_pixel_drift, reporter)

    # 3) the students, and the batches that they are shown
    plan = slab_plan(configs, caches, schedule, ranks, splits.train.skipped)
    models = build(configs, splits.train, cache.identity.teacher.image_size, reporter, ranks)
    image_size = models[0].settings.image_size
    showing = Showing(plan.order, ranks, schedule.rounds)
    stream = open_stream(config, splits, policy, image_size, showing)
    check_models(models, stream)

    # 4) the targets of every epoch, read once for all students that learn from the same
    names: list[str | None] = [
        c.bias.rectified for c in configs if c.bias.rectified is not None
    ] or [None]
    readers = {
        name: TargetReader(caches, name, schedule, plan, stream.labels, len(configs))
        for name in dict.fromkeys(names)
    }
    labelled = splits.train.labelled
    # What is read with a rectification has the teacher's own rows as well.
    ends = untils(configs, cache, schedule.choices, stream, reporter)
    tasks = [
        CachedTask(c, schedule, readers[c.bias.rectified or names[0]], stream.labels, labelled, end)
        for c, end in zip(configs, ends, strict=True)
    ]

    # 5) all of it together: `fit` trains
    digests = split_digests(splits)
    learners = [
        Learner(c, model, task, run, stream, {**digests, **made_from(c, caches)})
        for c, model, task, run in zip(configs, models, tasks, runs, strict=True)
    ]
    return Trainer(learners, stream, reporter)
