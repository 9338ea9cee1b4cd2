"""What a student learns from a cache: the targets of each epoch, and the loss of each batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.cache.targets import Targets
from stages.inputs.feed import Batch
from stages.objectives.bias import BiasWeights, bias_weights
from stages.objectives.correction import BOUND, STRENGTH, corrected
from stages.objectives.losses import TeacherRows, mixed_ce
from stages.order import ViewSchedule
from stages.targets.in_place import kept_in_place, take
from stages.targets.reader import TargetReader
from stages.training.objective import Objective, Student
from stages.training.passes import Compiled
from stages.training.until import Until


class CachedTask:
    """Learns from the cached row of the view that each epoch shows.

    targets: those of the epoch at hand, None where the loss uses none.
    """

    def __init__(
        self,
        student: Student,
        schedule: ViewSchedule,
        reader: TargetReader,
        labels: Tensor,
        labelled: bool = True,
        until: Until | None = None,
    ) -> None:
        """labels: int64 (N,), on the device. labelled: whether they are known.
        until: when the loss is switched off, None for never; it is reported afterwards too.
        """
        self._config, self._schedule, self._labels = student.config, schedule, labels
        self._labelled = labelled
        self._objective = Objective(student.loss) if student.loss.reads_teacher else None
        self.learned = None if self._objective is None else self._objective.learned
        self._reader, self._epoch, self._until, self._off = reader, 0, until, False
        # Weights of the epoch at hand: of the loss, of right rows and of wrong ones.
        self._weights = torch.ones(3, device=labels.device)
        self._weight, right, wrong = self._weights.unbind()
        self._bias = BiasWeights(right, wrong, student.config.bias.chosen_reduction)
        self._weights_shown: dict[str, float] = {}
        self.targets: Targets | None = None
        self._kept: Targets | None = None
        self._compiled: Compiled | None = None

    def look_back(self, history: Sequence[Mapping[str, Any]]) -> str | None:
        """Switch the loss off if it ends after these epochs; return a message then, once."""
        message = None if self._until is None or self._off else self._until.message(history)
        self._off |= message is not None
        return message

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
            bias.mode, bias.chosen_schedule, bias.chosen_reduction, epoch, self._config.train.epochs
        )
        right, wrong = float(of_rows.right), float(of_rows.wrong)
        self._weights.copy_(torch.tensor([weight, right, wrong]))
        self._weights_shown = {"weight_right": right, "weight_wrong": wrong}
        if self._until is not None:
            self._weights_shown |= self._until.metrics(weight)
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
            return "targets are read in groups, are of several views, or stay beside another view"
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
        reported = {"wrong_rate": wrong}
        if value.dim():
            seen = value.detach()
            of_wrong = seen * wrong
            reported |= {"loss_right": seen - of_wrong, "loss_wrong": of_wrong}
        means = torch.stack([*reported.values()]).mean(1, dtype=torch.float32)
        return parts | dict(zip(reported, means, strict=True))

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
            **self._weights_shown,
            "wait_seconds": self._reader.waited(self._epoch),
        }
