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

import torch

from stages.cache import LogitCache
from stages.data import (
    Splits,
    cached_policy,
    check_dataset,
    load_data,
    skips_of,
    split_digests,
)
from stages.device import choose_device, device_of_rank
from stages.distributed import ALONE, Ranks, first_rank_first, launched_ranks, process_group
from stages.order import held_out
from stages.reporting import Reporter, Silent
from stages.settings import StudentConfig
from stages.student_checks import check_students, complete, made_from
from stages.targets.chunks import plan_of_rank, plan_slabs
from stages.targets.reader import TargetReader
from stages.training.cached_task import CachedTask
from stages.training.learner import Learner
from stages.training.models import build
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
    device = device_of_rank(ranks, config.device)
    with process_group(ranks, device):
        return rank_trainer([config], [run], device, ranks, splits, reporter).fit()


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
) -> Trainer:
    """Everything checked and loaded, ready for `fit`: one student, or several that are shown the
    same batches, in this process. splits: the dataset, if it is loaded.

    Raises IdentityError if the dataset is not the one the cache was made from, CacheError if the
    cache or the rectification is missing or incomplete, ConfigError for settings that cannot be,
    RunError if a run directory may not be written.
    """
    return rank_trainer(configs, runs, choose_device(configs[0].device), ALONE, splits, reporter)


def rank_trainer(
    configs: Sequence[StudentConfig],
    runs: Sequence[RunDirectory],
    device: torch.device,
    ranks: Ranks,
    splits: Splits | None = None,
    reporter: Reporter | None = None,
) -> Trainer:
    """As `student_trainer`, of one of several processes, on its device."""
    reporter = reporter or Silent()
    # 1) the caches, and the students that learn from them
    caches = [LogitCache.open(path) for path in (configs[0].cache, *configs[0].also)]
    cache, policy = caches[0], cached_policy(caches[0])
    students = [complete(config, cache) for config in configs]
    schedule = check_students(students, caches, policy, ranks)
    config = students[0].config  # what decides the stream of batches is the same in all of them

    # 2) the images: those that the teachers saw
    if splits is None:
        with first_rank_first(ranks):
            splits = load_data(config.data, skips_of(c.skips for c in caches))
    splits = splits.with_classes(cache.identity.dataset.class_names)
    splits.tell(reporter)
    for member in caches:
        check_dataset(member, splits, policy, config.accept_pixel_drift, reporter)
    train, digests = splits.train, split_digests(splits)
    fraction, seed = config.data.val_fraction, config.seed.data
    samples, validation = held_out(len(train), fraction, seed, train.skipped)

    # 3) the models; the batches that they are shown, and the targets that are read for these: once
    # for all students that learn from the same rectification
    models = build(configs, train, cache.identity.teacher.image_size, reporter, device)
    names: list[str | None] = [
        *dict.fromkeys(name for s in students if (name := s.config.bias.rectified) is not None)
    ] or [None]  # what is read with a rectification has the teacher's own rows as well
    readings = len(names) if any(s.loss.reads_teacher for s in students) else 0
    if ranks.world > 1:
        plan = plan_of_rank(cache, ranks)
    else:
        plan = plan_slabs(caches, schedule, samples, config, device, readings)
    showing = Showing(samples, validation, plan.order, ranks, schedule.rounds)
    stream = open_stream(config, splits, policy, models[0].settings.image_size, showing, device)
    readers = {
        name: TargetReader(caches, name, schedule, plan, stream.labels, len(students))
        for name in names
    }

    # 4) all of it together: `fit` trains
    ends = untils([s.config for s in students], cache, schedule.choices, stream, reporter)
    learners = []
    for student, model, run, end in zip(students, models, runs, ends, strict=True):
        reader = readers[student.config.bias.rectified or names[0]]
        task = CachedTask(student, schedule, reader, stream.labels, train.labelled, end)
        origin = {**digests, **made_from(student.config, caches)}
        learners.append(Learner(student.config, model, task, run, stream, origin))
    return Trainer(learners, stream, reporter)
