"""Students from the cache, on hard labels alone, and beside a teacher that runs on every batch.

Every epoch is one of the trainer's own, stopped after it and gone on with, as a run that was
interrupted is; its seconds are those that metrics.jsonl has: training, without evaluation.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from pipeline.bench.measure import Figure, Ratio, in_turns
from pipeline.bench.teacher import TimedForward, forward
from stages.cache_job import CacheJob
from stages.errors import ConfigError
from stages.inputs.feed import Batch, ViewFeed
from stages.objectives.losses import mixed_ce
from stages.reporting import Silent
from stages.train_student import StudentConfig, student_trainer, students_trainer
from stages.training.assemble import Destination, Planned, make_trainer
from stages.training.config import LossSettings
from stages.training.objective import Objective, resolved
from stages.training.setup import Splits
from stages.training.trainer import Trainer, view_order

CACHED_TARGET, ONLINE_TARGET, WAITING_TARGET = 1.02, 0.95, 0.01
MANY_EPOCHS = 10_000
"""More than are ever measured: targets are read ahead, and the schedule stays where it is."""
_TRIED_BATCHES, _EVALUATED = 10, 256
_LEAST_SECONDS = 1.0
"""Of one measurement: shorter epochs are done several at a time."""


class TimedStudent:
    """Students of one stream, mostly one, that train for an epoch whenever they are called, and
    answer with its seconds; of short epochs for several, and with the mean.

    Where an epoch takes more than `most_seconds` it shows only some of the samples, and the answer
    is what all of them would take: waiting for targets, once an epoch, is not scaled. Such an epoch
    reads its targets whole all the same, so that it makes the cache look slower than it is.
    """

    def __init__(self, trainer: Trainer, most_seconds: float) -> None:
        self._trainer, self._all, self._epochs = trainer, trainer.samples, 1
        self.waits: list[float] = []
        for learner in trainer.learners:
            learner.evaluations = {
                name: replace(each, samples=each.samples[:_EVALUATED])
                for name, each in learner.evaluations.items()
            }
        batch = trainer.settings.batch_size
        trainer.samples = self._all[: _TRIED_BATCHES * batch]
        self()  # kernels are chosen, the first targets are read
        tried = statistics.median(self() for _ in range(2))
        batches = max(1, int(most_seconds / tried * len(self._all) / batch))
        trainer.samples = self._all[: batches * batch]
        expected = tried * len(trainer.samples) / len(self._all)
        self._epochs = max(1, math.ceil(min(_LEAST_SECONDS, most_seconds) / expected))
        self.waits.clear()

    @property
    def feed(self) -> ViewFeed:
        """The images that it is shown."""
        return self._trainer.feeds[0]

    @property
    def shown(self) -> str:
        """Which part of an epoch is measured, for a note."""
        some, every = len(self._trainer.samples), len(self._all)
        return f"{every:,} samples" if some == every else f"{some:,} of {every:,} samples, scaled"

    @property
    def waiting(self) -> float:
        """The share of an epoch that went into waiting for targets: median over the epochs."""
        return statistics.median(self.waits)

    def __call__(self) -> float:
        trainer = self._trainer
        epochs = trainer.learners[0].position.epoch + self._epochs
        trainer.settings = msgspec.structs.replace(trainer.settings, epochs=epochs)
        trainer.fit_all()
        lines = [line for each in trainer.learners for line in each.history[-self._epochs :]]
        waited = sum(line.get("wait_seconds", 0.0) for line in lines)
        computed = sum(line["seconds"] for line in lines) - waited
        seconds = computed * len(self._all) / len(trainer.samples) + waited
        self.waits.append(waited / seconds)
        return float(seconds) / self._epochs


class OnlineTask:
    """Distillation without a cache: the teacher runs on the pixels of every batch.

    As fast as it is simply done: the student's precision, no gradients, channels-last, and one
    rendering of the views for both.
    """

    def __init__(self, job: CacheJob, config: StudentConfig, labels: Tensor, views: int) -> None:
        self._job, self._config, self._labels, self._views = job, config, labels, views
        self._objective = Objective(config.loss)
        self.learned = self._objective.learned

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        self._objective.start_epoch(epoch)
        return (view_order(self._config.seed.data, epoch, self._views),)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        teacher = forward(self._job, batch.pixels, self._config.train.dtype).clone()
        hard = mixed_ce(logits, *batch.hard_labels(self._labels))
        labels = self._labels[batch.samples]
        value = self._objective(logits, teacher, labels, torch.ones_like(teacher[:, 0])).mean()
        ce_weight = self._config.loss.ce_weight or 0.0
        loss = ce_weight * hard + self._objective.weight * value
        return {"loss": loss, "loss_ce": hard, "loss_kd": value}

    def epoch_metrics(self) -> dict[str, float]:
        return {}


@dataclass
class Bench:
    """How students are measured. folder: where their runs go. most_seconds: see `TimedStudent`."""

    folder: Path
    splits: Splits
    turns: int
    most_seconds: float

    def __post_init__(self) -> None:
        self._runs = itertools.count()

    def run(self) -> Path:
        """A folder that is not there yet."""
        return self.folder / f"run-{next(self._runs)}"

    def student(self, config: StudentConfig) -> TimedStudent:
        """A student of a cache."""
        trainer = student_trainer(longer(config), self.run(), splits=self.splits)
        return TimedStudent(trainer, self.most_seconds)

    def together(self, configs: Sequence[StudentConfig]) -> TimedStudent:
        """Several students of one stream; the answer is what all of them take."""
        runs = [(longer(config), self.run()) for config in configs]
        return TimedStudent(students_trainer(runs, splits=self.splits), self.most_seconds)

    def online(self, config: StudentConfig, job: CacheJob, feed: ViewFeed) -> TimedStudent:
        """The same student with the teacher of `job` running beside it. feed: of the student.

        Raises ConfigError where teacher and student take images of different sizes.
        """
        if feed.image_size != job.image_size:
            raise ConfigError(
                f"the teacher takes images of {job.image_size} pixels, the student of "
                f"{feed.image_size}",
                "Online distillation is measured where one image serves both.",
            )
        config = msgspec.structs.replace(longer(config), loss=resolved(config.loss))
        trainer = make_trainer(
            [
                Planned(
                    config,
                    Destination(self.run(), "student", resume=False, overwrite=False),
                    lambda labels, _: OnlineTask(job, config, labels, job.config.views),
                )
            ],
            self.splits,
            lambda _: feed.policy,
            Silent(),
            teacher_size=job.image_size,
        )
        return TimedStudent(trainer, self.most_seconds)


def longer(config: StudentConfig) -> StudentConfig:
    """The same run, with epochs enough to be measured."""
    train = msgspec.structs.replace(config.train, epochs=MANY_EPOCHS)
    return msgspec.structs.replace(config, train=train)


def hard_labels(config: StudentConfig) -> StudentConfig:
    """The same run with hard labels only, on the cache's views."""
    return msgspec.structs.replace(config, loss=LossSettings(name="ce"))


def student_figures(
    bench: Bench, config: StudentConfig, job: CacheJob | None = None
) -> list[Ratio | Figure]:
    """A student from its cache against hard labels only; with the cache's teacher, also against
    distillation online. All of them in the same turns.

    Raises what `student_trainer` raises where cache, dataset and student do not go together.
    """
    cached, hard = bench.student(config), bench.student(hard_labels(config))
    works: dict[str, Callable[[], float]] = {"cached": cached, "hard": hard}
    if job is not None:
        works["online"] = bench.online(config, job, cached.feed)
        works["teacher"] = TimedForward(job, config.train.batch_size, config.train.dtype)
    times = in_turns(works, bench.turns)
    note = f"{cached.shown}, {config.train.dtype}"
    found: list[Ratio | Figure] = [
        Ratio(
            name="cached epoch / hard-label epoch",
            ours=times["cached"],
            yardstick=times["hard"],
            target=CACHED_TARGET,
            note=note,
        ),
        Figure(
            name="share of a cached epoch spent waiting for targets",
            value=cached.waiting,
            unit="",
            target=WAITING_TARGET,
            note=note,
        ),
    ]
    if job is not None:
        found += _against_online(times, f"teacher {job.model.architecture}, {config.train.dtype}")
    return found


def _against_online(times: dict[str, tuple[float, ...]], note: str) -> list[Ratio | Figure]:
    speedup = Ratio(
        name="online epoch / cached epoch",
        ours=times["online"],
        yardstick=times["cached"],
        note=note,
    )
    ideal = tuple(
        (hard + teacher) / hard
        for hard, teacher in zip(times["hard"], times["teacher"], strict=True)
    )
    return [
        speedup,
        Ratio(
            name="online / cached, of the ideal (student + teacher forward) / student",
            ours=tuple(speedup.ratios),
            yardstick=ideal,
            target=ONLINE_TARGET,
            at_least=True,
            note=f"{note}; both columns are ratios, not seconds",
        ),
    ]
