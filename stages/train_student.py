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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.cache.targets import Targets
from stages.data import Splits, cached_policy, check_dataset, load_data, skips_of, split_digests
from stages.distributed import (
    ALONE,
    Ranks,
    device_of_rank,
    first_rank_before_others,
    launched_ranks,
    process_group,
)
from stages.inputs.feed import Batch
from stages.objectives.bias import BiasWeights, bias_weights
from stages.objectives.correction import BOUND, STRENGTH, corrected
from stages.objectives.losses import TeacherRows, mixed_ce
from stages.order import ViewSchedule
from stages.reporting import Reporter, Silent
from stages.settings import StudentConfig
from stages.student_checks import check_students, complete, made_from, slab_plan
from stages.targets.in_place import kept_in_place, take
from stages.targets.reader import TargetReader
from stages.training.compiled import Compiled
from stages.training.learner import Learner
from stages.training.models import build, check_models
from stages.training.objective import Objective
from stages.training.run_directory import RunDirectory
from stages.training.stream import Showing, open_stream
from stages.training.trainer import Outcome, Trainer
from stages.training.until import Until, untils


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
    tasks = [
        CachedTask(c, schedule, readers[c.bias.rectified or names[0]], stream.labels, labelled, end)
        for c, end in zip(
            configs, untils(configs, cache, schedule.choices, stream, reporter), strict=True
        )
    ]

    # 5) all of it together: `fit` trains
    digests = split_digests(splits)
    learners = [
        Learner(c, model, task, run, stream, {**digests, **made_from(c, caches)})
        for c, model, task, run in zip(configs, models, tasks, runs, strict=True)
    ]
    return Trainer(learners, stream, reporter)


class CachedTask:
    """Learns from the cached row of the view that each epoch shows.

    targets: those of the epoch at hand, None where the loss uses none.
    """

    def __init__(
        self,
        config: StudentConfig,
        schedule: ViewSchedule,
        reader: TargetReader,
        labels: Tensor,
        labelled: bool = True,
        until: Until | None = None,
    ) -> None:
        """config: complete. labels: int64 (N,), on the device. labelled: whether they are known.
        until: when the loss is switched off, None for never; it is reported afterwards too.
        """
        self._config, self._schedule, self._labels = config, schedule, labels
        self._labelled = labelled
        self._objective = None if config.loss.name == "ce" else Objective(config.loss)
        self.learned = None if self._objective is None else self._objective.learned
        self._reader, self._epoch, self._until, self._off = reader, 0, until, False
        # Weights of the epoch at hand: of the loss, of right rows and of wrong ones.
        self._weights = torch.ones(3, device=labels.device)
        self._weight, right, wrong = self._weights.unbind()
        self._bias = BiasWeights(right, wrong, config.bias.reduction)
        self._told: dict[str, float] = {}
        self.targets: Targets | None = None
        self._kept: Targets | None = None
        self._compiled: Compiled | None = None

    def look_back(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Whether the loss is switched off after these epochs; says so once."""
        told = None if self._until is None or self._off else self._until.told(history)
        self._off |= told is not None
        return told

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        """The views that an epoch shows, or its round; their targets are read now."""
        self._epoch, bias, weight = epoch, self._config.bias, 0.0
        self.targets = None  # let go before more is read
        if self._objective is not None:
            self._objective.start_epoch(epoch)
            weight = 0.0 if self._off else self._objective.weight
            self.targets = self._reader.of_epoch(epoch)
        if self._kept is not None and self.targets is not None:
            take(self._kept, self.targets)
            self.targets = self._kept
        of_rows = bias_weights(
            bias.mode, bias.chosen_schedule, bias.reduction, epoch, self._config.train.epochs
        )
        right, wrong = float(of_rows.right), float(of_rows.wrong)
        self._weights.copy_(torch.tensor([weight, right, wrong]))
        self._told = {"weight_right": right, "weight_wrong": wrong}
        if self._until is not None:
            self._told |= self._until.metrics(weight)
        return self._schedule.of_epoch(epoch)

    def keep_in_place(self) -> str | None:
        """From the epoch at hand on, targets and weights of every epoch lie in the same memory.
        Returns why they cannot, as a sentence without its end.
        """
        if self._objective is None or self.targets is None:
            return None
        if self._objective.on_host:
            return f"the loss '{self._config.loss.name}' takes steps on the host, or may"
        self._kept = kept_in_place(self.targets)
        if self._kept is None:
            return "targets are read in groups, or are of several views"
        self.targets = self._kept
        return None

    def compile(self, batch_size: int) -> None:
        """Compile what is computed from logits, for batches of this size. Left as they are: losses
        that work on the host, and a correction, which is differentiated twice.
        """
        objective = self._objective
        if objective is not None and not objective.on_host and self._config.bias.mode != "correct":
            self._compiled = Compiled(self._parts, batch_size, self._labels.device, what="loss")

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The loss of a batch, and the means that metrics have of it: () each."""
        labels, *mixed = batch.hard_labels(self._labels)
        if not self._labelled:
            return self._taught(logits, batch, labels)
        if self._objective is None or self.targets is None:
            return {"loss": mixed_ce(logits, labels, *mixed)}
        loss, rectified = self._config.loss, self._config.bias.rectified is not None
        targets = self.targets.shown(batch.views)
        rows = targets.of(batch.samples, rectified, loss.calibrate)
        wrong = rows.wrong()
        if rows.tempered:
            return self._parts(logits, rows, wrong, labels, *mixed)
        parts = self._compiled or self._parts
        found: dict[str, Tensor] = parts(logits, rows.at(), wrong, labels, *mixed)
        return found

    def _parts(
        self, logits: Tensor, teacher: TeacherRows, wrong: Tensor, labels: Tensor, *mixed: Any
    ) -> dict[str, Tensor]:
        """As `loss_parts`, of what was looked up. wrong: bool (B,)."""
        hard = mixed_ce(logits, labels, *mixed)
        weights = self._bias.rows(wrong) if self._config.bias.weighs else None
        value = self._value(logits, teacher, labels, weights)  # (B,), or () of coupled rows
        mean, ce_weight = value.mean(), self._config.loss.ce_weight or 0.0
        parts = {
            "loss": torch.add(self._weight * mean, hard, alpha=ce_weight),
            "loss_ce": hard,
            "loss_kd": mean,
        }
        # What is only reported takes few operations: small students wait for each of them.
        told = {"wrong_rate": wrong}
        if value.dim():
            seen = value.detach()
            of_wrong = seen * wrong
            told |= {"loss_right": seen - of_wrong, "loss_wrong": of_wrong}
        means = torch.stack([*told.values()]).mean(1, dtype=torch.float32)
        return parts | dict(zip(told, means, strict=True))

    def _taught(self, logits: Tensor, batch: Batch, labels: Tensor) -> dict[str, Tensor]:
        """As `loss_parts`, of the teacher alone: nothing is known to be right or wrong."""
        assert self._objective is not None
        assert self.targets is not None
        targets = self.targets.shown(batch.views)
        rows = targets.of(batch.samples, calibrated=self._config.loss.calibrate)
        mean = self._value(logits, rows if rows.tempered else rows.at(), labels, None).mean()
        return {"loss": self._weight * mean, "loss_kd": mean}

    def _value(
        self, logits: Tensor, teacher: TeacherRows, labels: Tensor, weights: Tensor | None
    ) -> Tensor:
        """The objective, corrected where that was asked for; as `Objective` returns it."""
        objective, bias = self._objective, self._config.bias
        assert objective is not None
        if bias.mode != "correct":
            return objective(logits, teacher, labels, weights)
        return corrected(
            lambda rows: objective(logits, rows, labels, weights),
            teacher,
            labels,
            BOUND if bias.alpha is None else bias.alpha,
            STRENGTH if bias.gamma is None else bias.gamma,
        )

    def epoch_metrics(self) -> dict[str, float]:
        """What else metrics have of the epoch at hand."""
        return {
            **self._told,
            "wait_seconds": self._reader.waited(self._epoch),
        }
