"""Students from the cache, on hard labels alone, and beside a teacher that runs on every batch.

All of them in the same turns, epoch by epoch (`epochs.py`).
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from benchmarks.epochs import OnlineStudent, TimedStudent
from benchmarks.measure import Figure, Laps, Ratio, in_turns, steadily
from benchmarks.teacher import forward
from stages.cache import LogitCache
from stages.data import Splits
from stages.device import choose_device
from stages.errors import ConfigError
from stages.inputs.feed import Batch
from stages.objectives.losses import mixed_ce
from stages.order import held_out, view_order
from stages.reporting import Silent
from stages.settings import LossSettings, StudentConfig
from stages.teacher.job import CacheJob
from stages.train_student import student_trainer
from stages.training.learner import Learner
from stages.training.models import build
from stages.training.objective import Objective, student_loss
from stages.training.run_directory import RunDirectory
from stages.training.stream import Showing, open_stream
from stages.training.trainer import Trainer

CACHED_TARGET, ADDED_TARGET, ONLINE_TARGET, WAITING_TARGET = 1.02, 0.02, 0.95, 0.01
_LOSS_TURNS = 3
WAITING = "spent waiting for targets"
MANY_EPOCHS = 10_000
"""More than are ever measured: targets are read ahead, and the schedule stays where it is."""


class OnlineTask:
    """Distillation without a cache: the teacher runs on the pixels of every batch.

    As fast as it is simply done: the student's precision, no gradients, channels-last, and one
    rendering of the views for both.
    """

    def __init__(
        self, job: CacheJob, config: StudentConfig, labels: Tensor, views: int, laps: Laps
    ) -> None:
        """laps: to be taken of the teacher's forward passes."""
        self._laps = laps
        self._job, self._config, self._labels, self._views = job, config, labels, views
        self._objective = Objective(student_loss(config.loss))
        self.learned = self._objective.learned

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        self._objective.start_epoch(epoch)
        return (view_order(self._config.seed.data, epoch, self._views),)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        with self._laps.lap():
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

    def hard(self, config: StudentConfig, like: TimedStudent | None = None) -> TimedStudent:
        """The same run with hard labels only, on the cache's views. It says how much of an epoch
        those that are compared with it are measured on; like: what says it to this one.
        """
        config = longer(msgspec.structs.replace(config, loss=LossSettings(name="ce")))
        return TimedStudent(self._trainer(config), self.most_seconds, like)

    def cached(self, config: StudentConfig, hard: TimedStudent) -> TimedStudent:
        """A student of a cache. Where epochs are cut, each of them would read a whole slab for a
        part of its rows: it stays with one view then, and the reading of a slab is added to the
        answer as if nothing were read ahead, the worst that it can be.
        """
        if not hard.cut:
            return TimedStudent(self._trainer(longer(config)), self.most_seconds, hard)
        config = msgspec.structs.replace(longer(config), views=1)
        timed = TimedStudent(self._trainer(config), self.most_seconds, hard)
        cache, device = LogitCache.open(config.cache), choose_device(config.device)
        view = cache.complete_views[0]
        timed.added = steadily(lambda: cache.read_view(view).to(device), device)()
        return timed

    def _trainer(self, config: StudentConfig) -> Trainer:
        return student_trainer([config], [RunDirectory(self.run())], self.splits)

    def together(self, configs: Sequence[StudentConfig]) -> TimedStudent:
        """Several students of one stream; the answer is what all of them take."""
        runs = [RunDirectory(self.run()) for _ in configs]
        trainer = student_trainer([longer(config) for config in configs], runs, self.splits)
        return TimedStudent(trainer, self.most_seconds)

    def online(self, config: StudentConfig, job: CacheJob, hard: TimedStudent) -> OnlineStudent:
        """The same student with the teacher of `job` running beside it.

        Raises ConfigError where teacher and student take images of different sizes.
        """
        feed, laps = hard.feed, Laps(job.device)
        if feed.image_size != job.image_size:
            raise ConfigError(
                f"the teacher takes images of {job.image_size} pixels, the student of "
                f"{feed.image_size}",
                "Online distillation is measured where one image serves both.",
            )
        loss = student_loss(config.loss).settings
        config = msgspec.structs.replace(longer(config), loss=loss)
        train, policy, device = self.splits.train, feed.policy, feed.device
        models = build([config], train, job.image_size, Silent(), device)
        fraction, seed = config.data.val_fraction, config.seed.data
        showing = Showing(*held_out(len(train), fraction, seed, train.skipped))
        size = models[0].settings.image_size
        stream = open_stream(config, self.splits, policy, size, showing, device)
        task = OnlineTask(job, config, stream.labels, job.config.views, laps)
        learner = Learner(config, models[0], task, RunDirectory(self.run()), stream)
        trainer = Trainer([learner], stream, Silent())
        return OnlineStudent(trainer, laps, hard)


def longer(config: StudentConfig) -> StudentConfig:
    """The same run, with epochs enough to be measured."""
    train = msgspec.structs.replace(config.train, epochs=MANY_EPOCHS)
    return msgspec.structs.replace(config, train=train)


def student_figures(
    bench: Bench,
    config: StudentConfig,
    job: CacheJob | None = None,
    variants: Mapping[str, StudentConfig] | None = None,
) -> list[Ratio | Figure]:
    """A student from its cache against hard labels only; with the cache's teacher, also against
    distillation online. All of them in the same turns. variants: the same student trained in other
    ways, by their names: against the first, and against hard labels in the same way.

    Raises what `student_trainer` raises where cache, dataset and student do not go together.
    """
    hard = bench.hard(config)
    cached = bench.cached(config, hard)
    online = None if job is None else bench.online(config, job, hard)
    works: dict[str, Callable[[], float]] = {"hard": hard, "cached": cached}
    if online is not None:
        works["online"] = online
    for name, other in (variants or {}).items():
        works[name] = bench.cached(other, hard)
        works[f"{name} hard"] = bench.hard(other, hard)
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
        *_added(cached, hard, times, note),
        speed("cached student", cached, times["cached"], note),
    ]
    for name in variants or {}:
        found += _variant(name, cached, times, note)
    if job is not None and online is not None:
        times["teacher"] = tuple(online.teacher)
        note = f"teacher {job.model.architecture}, {config.train.dtype}"
        found += _against_online(times, note)
        found.append(speed("teacher, forward inside online", cached, times["teacher"], note))
    return found


def _added(
    cached: TimedStudent, hard: TimedStudent, times: dict[str, tuple[float, ...]], note: str
) -> list[Ratio | Figure]:
    """What a cache adds to a student's epoch, by its own clock: noise of a percent does not hide
    it, as it does in the ratio of two epochs.
    """
    waiting = cached.waiting
    if cached.cut:
        waiting = cached.added / statistics.median(times["cached"])
    losses = in_turns({"cached": cached.loss_seconds, "hard": hard.loss_seconds}, _LOSS_TURNS)
    more = statistics.median(losses["cached"]) - statistics.median(losses["hard"])
    step = statistics.median(times["hard"]) / hard.steps
    return [
        Figure(
            name=f"share of a cached epoch {'that reading takes' if cached.cut else WAITING}",
            value=waiting,
            unit="",
            target=WAITING_TARGET,
            note=f"{note}; at most, if nothing is read ahead" if cached.cut else note,
        ),
        Figure(
            name="what targets and their loss add to a step, share of the step",
            value=more / step + waiting,
            unit="",
            target=ADDED_TARGET,
            note=f"{1e3 * more:.2f} ms of loss and its gradient, in a step of {1e3 * step:.1f} ms; "
            "and the share above",
        ),
    ]


def _variant(
    name: str, cached: TimedStudent, times: Mapping[str, tuple[float, ...]], note: str
) -> list[Ratio | Figure]:
    """A student trained in another way, against the first and against hard labels in its way."""
    return [
        Ratio(
            name=f"{name} epoch / cached epoch",
            ours=times[name],
            yardstick=times["cached"],
            note=note,
        ),
        Ratio(
            name=f"{name}: cached epoch / hard-label epoch",
            ours=times[name],
            yardstick=times[f"{name} hard"],
            target=CACHED_TARGET,
            note=note,
        ),
        Figure(
            name=f"{name}: epoch of {cached.samples:,} images",
            value=statistics.median(times[name]),
            unit="s",
            note=note,
        ),
        speed(f"{name} student", cached, times[name], note),
    ]


def speed(what: str, student: TimedStudent, times: tuple[float, ...], note: str) -> Figure:
    """Images that are trained on in a second, by the seconds of whole epochs."""
    value = student.samples / statistics.median(times)
    return Figure(name=f"{what}, training images", value=value, unit="images/s", note=note)


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
