"""Students from the cache, on hard labels alone, and beside a teacher that runs on every batch.

All of them in the same turns, epoch by epoch (`epochs.py`).
"""

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from pipeline.bench.epochs import TimedStudent
from pipeline.bench.measure import Figure, Ratio, in_turns, steadily
from pipeline.bench.teacher import TimedForward, forward
from stages.cache import LogitCache
from stages.cache_job import CacheJob
from stages.device import choose_device
from stages.errors import ConfigError
from stages.inputs.feed import Batch, ViewFeed
from stages.objectives.losses import mixed_ce
from stages.reporting import Silent
from stages.train_student import StudentConfig, student_trainer, students_trainer
from stages.training.assemble import Destination, Planned, make_trainer
from stages.training.config import LossSettings
from stages.training.objective import Objective, resolved
from stages.training.order import view_order
from stages.training.setup import Splits

CACHED_TARGET, ONLINE_TARGET, WAITING_TARGET = 1.02, 0.95, 0.01
WAITING = "spent waiting for targets"
MANY_EPOCHS = 10_000
"""More than are ever measured: targets are read ahead, and the schedule stays where it is."""


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
        """A student of a cache. Where its epochs are cut, each of them would read a whole slab for
        a part of its rows: it stays with one view then, and the reading of a slab is added to the
        answer as if nothing were read ahead, the worst that it can be.
        """
        timed = self._timed(config)
        if not timed.cut or config.loss.name == "ce":
            return timed
        timed = self._timed(msgspec.structs.replace(config, views=1))
        cache, device = LogitCache.open(config.cache), choose_device(config.device)
        view = cache.complete_views[0]
        timed.added = steadily(lambda: cache.read_view(view).to(device), device)()
        return timed

    def _timed(self, config: StudentConfig) -> TimedStudent:
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
            name=f"share of a cached epoch {'that reading takes' if cached.cut else WAITING}",
            value=cached.added / min(times["cached"]) if cached.cut else cached.waiting,
            unit="",
            target=WAITING_TARGET,
            note=f"{note}; at most, if nothing is read ahead" if cached.cut else note,
        ),
    ]
    speeds = {"cached": "cached student", "teacher": "teacher, forward alone"}
    found += [
        Figure(
            name=f"{what}, training images",
            value=len(bench.splits.train) / statistics.median(times[which]),
            unit="images/s",
            note=note,
        )
        for which, what in speeds.items()
        if which in times
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
