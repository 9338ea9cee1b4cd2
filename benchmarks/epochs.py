"""One epoch of a student, timed.

Every epoch is one of the trainer's own, stopped after it and gone on with, as a run that was
interrupted is; its seconds are those that metrics.jsonl has: training, without evaluation.
"""

import math
import statistics
from dataclasses import replace

import msgspec
import torch
from torch import Tensor, nn

from benchmarks.measure import Laps
from stages.inputs.feed import Batch, ViewFeed
from stages.training.task import Task
from stages.training.trainer import Trainer

_TRIED_BATCHES, _EVALUATED = 4, 32
_LEAST_SECONDS = 1.0
"""Of one measurement: shorter epochs are done several at a time."""


class TimedStudent:
    """Students of one stream, mostly one, that train for an epoch whenever they are called, and
    answer with its seconds; of short epochs for several, and with the mean.

    Where an epoch takes more than `most_seconds` it shows only some of the samples, and the answer
    is what all of them would take: waiting for targets, once an epoch, is not scaled, and `added`
    seconds are added. like: another student, whose number of samples and epochs is taken instead:
    what is compared does as many steps.
    """

    def __init__(
        self, trainer: Trainer, most_seconds: float, like: "TimedStudent | None" = None
    ) -> None:
        self._trainer, self._all, self._epochs = trainer, trainer.stream.samples, 1
        self.waits: list[float] = []
        self.added = 0.0
        stream = trainer.stream
        stream.evaluations = {
            name: replace(each, samples=each.samples[:_EVALUATED])
            for name, each in stream.evaluations.items()
        }
        batch = trainer.settings.batch_size
        stream.samples = self._all[: _TRIED_BATCHES * batch]
        self()  # kernels are chosen, the first targets are read
        if like is not None:
            stream.samples, self._epochs = (
                self._all[: len(like._trainer.stream.samples)],
                like._epochs,
            )
        else:
            tried = statistics.median(self() for _ in range(2))
            batches = max(1, int(most_seconds / tried * len(self._all) / batch))
            stream.samples = self._all[: batches * batch]
            expected = tried * len(stream.samples) / len(self._all)
            self._epochs = max(1, math.ceil(min(_LEAST_SECONDS, most_seconds) / expected))
        self.waits.clear()

    @property
    def feed(self) -> ViewFeed:
        """The images that it is shown."""
        return self._trainer.stream.feed

    @property
    def cut(self) -> bool:
        """Whether only a part of each epoch is measured."""
        return len(self._trainer.stream.samples) < len(self._all)

    @property
    def shown(self) -> str:
        """Which part of an epoch is measured, for a note."""
        some, every = len(self._trainer.stream.samples), len(self._all)
        return f"{some:,} of {every:,} samples, scaled" if self.cut else f"{every:,} samples"

    @property
    def samples(self) -> int:
        """Of a whole epoch."""
        return len(self._all)

    @property
    def steps(self) -> float:
        """Of a whole epoch; the last batch by its share."""
        return self.samples / self._trainer.settings.batch_size

    @property
    def waiting(self) -> float:
        """The share of an epoch that went into waiting for targets: median over the epochs."""
        return statistics.median(self.waits)

    def scaled(self, seconds: float) -> float:
        """What some seconds of all that a call computes are of one whole epoch."""
        return seconds * len(self._all) / len(self._trainer.stream.samples) / self._epochs

    def __call__(self) -> float:
        trainer = self._trainer
        epochs = trainer.learners[0].position.epoch + self._epochs
        trainer.settings = msgspec.structs.replace(trainer.settings, epochs=epochs)
        trainer.fit_all()
        lines = [line for each in trainer.learners for line in each.history[-self._epochs :]]
        waited = sum(line.get("wait_seconds", 0.0) for line in lines)
        computed = self.scaled(sum(line["seconds"] for line in lines) - waited)
        waited /= self._epochs
        self.waits.append(waited / (computed + waited))
        return float(computed + waited) + self.added

    def loss_seconds(self) -> float:
        """Median seconds a step that a single student's loss takes, see `TimedTask`. Trains as a
        call does, which shall not be compared with one.
        """
        learner, device = self._trainer.learner, self._trainer.stream.device
        plain, timed = learner.task, TimedTask(learner.task, device)
        learner.task = timed
        self()
        learner.task = plain
        self.waits.pop()
        return statistics.median(timed.laps.take())


class TimedTask:
    """Another task, with the time that its loss takes: from a student's logits to the loss, targets
    and all, and back to the gradient of these logits (which is computed twice, once to be timed).
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self._task, self.laps = task, Laps(device)

    @property
    def learned(self) -> nn.Module | None:
        return self._task.learned

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        return self._task.start_epoch(epoch)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        with self.laps.lap():
            parts = self._task.loss_parts(logits, batch)
            torch.autograd.grad(parts["loss"], logits, retain_graph=True)
        return parts

    def epoch_metrics(self) -> dict[str, float]:
        return self._task.epoch_metrics()


class OnlineStudent(TimedStudent):
    """A student whose teacher runs on every batch. laps: of the teacher's forward. teacher: the
    seconds of a whole epoch that it took, call by call.
    """

    def __init__(self, trainer: Trainer, laps: Laps, like: TimedStudent) -> None:
        self._laps, self.teacher = laps, list[float]()
        super().__init__(trainer, 0.0, like)
        self.teacher.clear()

    def __call__(self) -> float:
        taken = super().__call__()
        self.teacher.append(self.scaled(sum(self._laps.take())))
        return taken
