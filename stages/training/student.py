"""A student: its settings, and what it learns from.

An epoch shows one view of every sample and learns from that view's row of the cache:

    L = ce_weight * CE(z_s, y) + weight * mean_i w_i * loss(z_s, z_t)_i

where the row weights w are all 1, or those of bias elimination and rectification
(`stages.objectives.bias`); losses that couple rows say themselves what weights mean to them. With
the loss `ce` the same views are shown and no targets are read: the fair baseline. Where the cached
views mix two samples (mixup, cutmix), CE is that of both labels by their shares, and targets are as
ever: the teacher saw the mixed image.
"""

import torch
from torch import Tensor

from stages.cache.targets import SampleTargets, Targets
from stages.inputs.feed import Batch
from stages.objectives.bias import BiasWeights, bias_weights
from stages.objectives.losses import TeacherRows, TemperedRows, mixed_ce
from stages.settings import StudentConfig
from stages.targets.reader import TargetReader
from stages.training.objective import Objective


class CachedTask:
    """Learns from the cached row of the view that each epoch shows.

    targets: those of the epoch at hand, None where the loss uses none.
    """

    def __init__(self, reader: TargetReader, config: StudentConfig, labels: Tensor) -> None:
        """config: with a resolved loss. labels: int64 (N,), on the device."""
        self._reader, self._config, self._labels = reader, config, labels
        self._objective = None if config.loss.name == "ce" else Objective(config.loss)
        self.learned = None if self._objective is None else self._objective.learned
        self._weights = BiasWeights(1.0, 1.0)
        self.targets: Targets | None = None
        self._epoch = 0

    def start_epoch(self, epoch: int) -> tuple[int, ...]:
        self._epoch, bias = epoch, self._config.bias
        self._weights = bias_weights(
            bias.mode, bias.chosen_schedule, bias.reduction, epoch, self._config.train.epochs
        )
        self.targets = None  # let go before more is read
        if self._objective is not None:
            self._objective.start_epoch(epoch)
            self.targets = self._reader.of_epoch(epoch)
        return self._reader.views_of(epoch)

    def loss_parts(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        labels, *mixed = batch.hard_labels(self._labels)
        hard = mixed_ce(logits, labels, *mixed)
        if self._objective is None or self.targets is None:
            return {"loss": hard}
        targets = self.targets.at(batch.samples)
        wrong = targets.wrong()
        weights = None if self._config.bias.mode == "none" else self._weights.rows(wrong)
        teacher = self._teacher_rows(targets)
        value = self._objective(logits, teacher, labels, weights)  # (B,), or () of coupled rows
        mean, ce_weight = value.mean(), self._config.loss.ce_weight or 0.0
        parts = {
            "loss": ce_weight * hard + self._objective.weight * mean,
            "loss_ce": hard,
            "loss_kd": mean,
        }
        # What is only reported takes few operations: small students wait for each of them.
        told = {"wrong_rate": wrong.float()}
        if value.dim():
            of_wrong = value.detach() * told["wrong_rate"]
            told |= {"loss_right": value.detach() - of_wrong, "loss_wrong": of_wrong}
        return parts | dict(zip(told, torch.stack([*told.values()]).mean(1), strict=True))

    def _teacher_rows(self, targets: SampleTargets) -> TeacherRows:
        """float32 (B, C); as they are at a temperature where that makes a difference."""
        rectified = self._config.bias.rectified is not None
        read = targets.rectified_rows if rectified else targets.rows
        kept = targets.kept()
        if kept is None and not self._config.also:
            return read()
        return TemperedRows(read, kept)

    def epoch_metrics(self) -> dict[str, float]:
        return {
            "weight_right": self._weights.right,
            "weight_wrong": self._weights.wrong,
            "wait_seconds": self._reader.waited(self._epoch),
        }
