"""CTKD: KD at a temperature that is learned against the student."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import ConfigError
from stages.objectives.losses.kd import kd
from stages.objectives.losses.registry import LearningLoss, loss
from stages.objectives.losses.rows import Reduction, TeacherRows, whole

LEAST, RANGE, DECAY = 1.0, 20.0, 10.0
"""t_start, t_end and decay where nothing is said: the released command for CIFAR-100."""


@loss("ctkd", reads_labels=False, ce_weight=0.1, weight=0.9, on_host=True, lskd={"weight": 9.0})
class CTKD(LearningLoss):
    """KD at T = t_start + t_end sigmoid(theta): Li et al. 2023, arXiv 2211.16231, the global
    temperature; t_start 1 and t_end 20 unless given, as released.

    theta belongs into the student's optimiser. Its gradient is multiplied by lambda, which goes
    from 0 to -1 along half a cosine over `decay` epochs, 10 unless given: T ascends what the
    student descends. theta starts at 1, T at about 15.6. Call `start_epoch` at the start of every
    epoch: without it the loss raises ConfigError, as T would stay where it is. Needs whole rows.
    """

    def __init__(
        self,
        *rows: object,
        t_start: float | None = None,
        t_end: float | None = None,
        decay: float | None = None,
    ) -> None:
        """rows: none. t_end: what the temperature can have above t_start. decay: in epochs.

        Raises ConfigError where it is called as if it were a function.
        """
        if rows:
            raise ConfigError(
                "the loss 'ctkd' learns a temperature: it is made first, and then called",
                "Make one for each student, build_loss('ctkd').",
            )
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))
        self._least = LEAST if t_start is None else t_start
        self._range = RANGE if t_end is None else t_end
        self._decay = DECAY if decay is None else decay
        self.reversal: float | None = None

    def start_epoch(self, epoch: int) -> None:
        """epoch: from 0; the released loop counts from 1."""
        progress = min((epoch + 1) / self._decay, 1)
        self.reversal = (math.cos(math.pi * progress) - 1) / 2

    @property
    def temperature(self) -> Tensor:
        """float32, ()."""
        return self._least + self._range * torch.sigmoid(self.theta)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherRows,
        labels: Tensor,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """student_logits, teacher_logits: float (B, C). Returns float32, () or (B,)."""
        temperature: Any = _Scaled.apply(self.temperature, self.reversal or 0.0)
        teacher = whole(teacher_logits, "ctkd", temperature)
        if self.reversal is None:
            raise ConfigError(
                "the loss 'ctkd' learns a temperature, and no epoch of it has begun",
                "Call its start_epoch(epoch), and give its parameters to the optimiser.",
            )
        return kd(student_logits, teacher, labels, temperature, reduction)


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
