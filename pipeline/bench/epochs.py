"""One epoch of a student, timed.

Every epoch is one of the trainer's own, stopped after it and gone on with, as a run that was
interrupted is; its seconds are those that metrics.jsonl has: training, without evaluation.
"""

import math
import statistics
from dataclasses import replace

import msgspec

from stages.inputs.feed import ViewFeed
from stages.training.trainer import Trainer

_TRIED_BATCHES, _EVALUATED = 10, 256
_LEAST_SECONDS = 1.0
"""Of one measurement: shorter epochs are done several at a time."""


class TimedStudent:
    """Students of one stream, mostly one, that train for an epoch whenever they are called, and
    answer with its seconds; of short epochs for several, and with the mean.

    Where an epoch takes more than `most_seconds` it shows only some of the samples, and the answer
    is what all of them would take: waiting for targets, once an epoch, is not scaled, and `added`
    seconds are added.
    """

    def __init__(self, trainer: Trainer, most_seconds: float) -> None:
        self._trainer, self._all, self._epochs = trainer, trainer.samples, 1
        self.waits: list[float] = []
        self.added = 0.0
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
    def cut(self) -> bool:
        """Whether only a part of each epoch is measured."""
        return len(self._trainer.samples) < len(self._all)

    @property
    def shown(self) -> str:
        """Which part of an epoch is measured, for a note."""
        some, every = len(self._trainer.samples), len(self._all)
        return f"{some:,} of {every:,} samples, scaled" if self.cut else f"{every:,} samples"

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
        return float(seconds) / self._epochs + self.added
