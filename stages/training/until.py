"""When the distillation term is switched off, so that a weak teacher helps early and no longer.

After some epochs (stopping distillation early: Cho, Hariharan 2019, arXiv 1910.01348), or once the
student has more of the held-out samples right than its teacher. What was measured decides, so that
a run that goes on from its metrics decides the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.cache import LogitCache
from stages.errors import ConfigError
from stages.reporting import Reporter
from stages.settings import StudentConfig
from stages.training.stream import BatchStream

BEATS_TEACHER = "beats-teacher"


@dataclass(frozen=True)
class Until:
    """epochs: how many have the term, None where that is not known before. teacher_top1: of the
    teacher on the held-out samples, in [0, 1], None where the student is not compared with it.
    left: what the loss is afterwards, in words.
    """

    epochs: int | None
    teacher_top1: float | None
    left: str

    def on_epochs(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        """How many epochs have the term, if it is switched off after those of `history`, the lines
        of a run's metrics; else None.
        """
        if self.epochs is not None:
            return self.epochs if len(history) >= self.epochs else None
        better = (line["epoch"] + 1 for line in history if line["val_top1"] > self.teacher_top1)
        return next(better, None)

    def message(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """For people, that it is switched off after those epochs; None where it is not."""
        if (epochs := self.on_epochs(history)) is None:
            return None
        why = ""
        if self.teacher_top1 is not None:
            shares = f"{history[epochs - 1]['val_top1']:.2%}, the teacher {self.teacher_top1:.2%}"
            why = f": the student has {shares} of the held-out samples right"
        return f"no distillation after epoch {epochs}{why}. The loss is {self.left}"

    def metrics(self, weight: float) -> dict[str, float]:
        """What metrics have of an epoch. weight: of the term."""
        known = {} if self.teacher_top1 is None else {"teacher_val_top1": self.teacher_top1}
        return {"weight_loss": weight, **known}


def check_until(config: StudentConfig) -> None:
    """Raise ConfigError where the distillation term cannot be switched off as it should be.

    config: with its loss's defaults filled in.
    """
    loss = config.loss
    if loss.until is None:
        return
    if not loss.ce_weight:
        raise ConfigError(
            f"loss.until switches the loss '{loss.name}' off, and a loss.ce_weight of 0 leaves "
            "nothing to learn from",
            "Give --set loss.ce_weight=0.5, or leave --until out.",
        )
    if loss.until != BEATS_TEACHER:
        return
    if not config.data.val_fraction:
        raise ConfigError(
            "--until beats-teacher compares the two on held-out samples, and none are held out",
            "Add --val-fraction 0.1, or give a number of epochs.",
        )
    if config.also:
        raise ConfigError(
            "--until beats-teacher compares with one teacher, and several are averaged",
            "Leave --also out, or give a number of epochs.",
        )


def untils(
    configs: Sequence[StudentConfig],
    cache: LogitCache,
    choices: Sequence[tuple[int, ...]],
    stream: BatchStream,
    reporter: Reporter,
) -> list[Until | None]:
    """When the term of each student of a stream is switched off; None for never. choices: what an
    epoch may show. Says what the teacher has right, where a student is compared with it.
    """
    top1: float | None = None
    if any(config.loss.until == BEATS_TEACHER for config in configs):
        samples = stream.evaluations["val"].samples
        top1 = top1_on(cache, samples, sorted({view for some in choices for view in some}))
        seen = "" if cache.identity.teacher.folds else ", which it may have been trained on"
        reporter.say(f"the teacher has {top1:.2%} of {len(samples):,} held-out samples right{seen}")
    return [until_of(config, top1) for config in configs]


def until_of(config: StudentConfig, teacher_top1: float | None = None) -> Until | None:
    """When the term of a student is switched off; None for never. config: complete. teacher_top1:
    see `Until`.
    """
    until, epochs = config.loss.until, config.train.epochs
    if until is None:
        return None
    left = f"{config.loss.ce_weight:g} times the labels' cross-entropy"
    if until == BEATS_TEACHER:
        return Until(None, teacher_top1, left)
    number = float(until)
    share = sum(epoch / epochs < number for epoch in range(epochs))
    return Until(share if number < 1 else int(number), None, left)


def top1_on(cache: LogitCache, samples: Tensor, views: Sequence[int]) -> float:
    """The teacher's accuracy on some samples, the mean over these views: in [0, 1], rounded as a
    student's is, so that the same share is the same number.

    samples: int64 (n,), n > 0. Raises CacheError for a view that is not complete.
    """
    rows, labels = cache.row_of[samples], cache.labels[samples]
    shares = [(cache.predictions(v)[rows] == labels).double().mean() for v in views]
    return float(torch.stack(shares).mean().float())
