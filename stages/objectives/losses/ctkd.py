"""CTKD: KD at a temperature that is learned against the student."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from stages.errors import ConfigError
from stages.objectives.losses.kd import kd
from stages.objectives.losses.registry import LearningLoss, loss
from stages.objectives.losses.rows import Reduction, TeacherRows, whole

CURRICULUM_EPOCHS = 10
"""Over so many epochs the gradient of the temperature goes from nothing to its full reverse."""


@loss("ctkd", ce_weight=0.1, weight=0.9, lskd={"weight": 9.0})
class CTKD(LearningLoss):
    """KD at T = 1 + 20 sigmoid(theta): Li et al. 2023, arXiv 2211.16231, the global temperature.

    theta belongs into the student's optimiser. Its gradient is multiplied by lambda, which goes
    from 0 to -1 along half a cosine over ten epochs: T ascends what the student descends. theta
    starts at 1, T at about 15.6. Call `start_epoch` at the start of every epoch: without it the
    loss raises ConfigError, as T would stay where it is. Needs whole rows.
    """

    def __init__(self, *rows: object) -> None:
        """rows: none. Raises ConfigError where it is called as if it were a function."""
        if rows:
            raise ConfigError(
                "the loss 'ctkd' learns a temperature: it is made first, and then called",
                "Make one for each student, build_loss('ctkd').",
            )
        super().__init__()
        self.theta = nn.Parameter(torch.ones(()))
        self.reversal: float | None = None

    def start_epoch(self, epoch: int) -> None:
        """epoch: from 0; the released loop counts from 1."""
        progress = min((epoch + 1) / CURRICULUM_EPOCHS, 1)
        self.reversal = (math.cos(math.pi * progress) - 1) / 2

    @property
    def temperature(self) -> Tensor:
        """float32, ()."""
        return 1 + 20 * torch.sigmoid(self.theta)

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
